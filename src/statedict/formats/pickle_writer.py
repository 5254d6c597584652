"""The writer of ``data.pkl``: protocol 2, with only the instructions and names that torch's weights-only reader knows.

Source: torch 2.13 ``torch/_weights_only_unpickler.py``. What that reader doesn't take is refused, all of it at once and by
key, unless it is a plain value that it takes in another spelling.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from typing import Any

from statedict.dtypes import BY_STORAGE
from statedict.errors import StateDictError, UnsafeContent, Unsupported
from statedict.formats.layout import Layout
from statedict.keys import dotted
from statedict.manifest import Container, Node, ObjectEntry, Opaque, TensorEntry, TorchValue

__all__ = ["PickleWriter"]

# The storage class of each dtype that has one. Newer dtypes are views of untyped bytes.
_STORAGE_CLASS = {dtype.code: name for name, dtype in BY_STORAGE.items() if name != "UntypedStorage"}
# Containers are filled in batches of this size, as pickle's own writer does.
_BATCH = 1000
_ELSEWHERE = "Write a .safetensors file, which keeps them as inert records, or take a part: --at KEY"


class PickleWriter:
    """Turns one tree into the bytes of ``data.pkl``; the storages are named by their number in the layout."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._out = bytearray(b"\x80\x02")
        self._memo: dict[str, int] = {}
        self._refused: dict[str, str] = {}
        self._unsafe: dict[str, None] = {}

    def write(self, root: Node) -> bytes:
        """The pickle of the tree.

        Raises ``UnsafeContent`` if it holds objects that loading would have to build by running code, ``Unsupported`` for
        other leaves that the weights-only reader refuses; both name every key.
        """
        self._tree(root)
        if self._refused:
            raise self._refusal()
        self._out += b"."
        return bytes(self._out)

    def _refusal(self) -> StateDictError:
        shown = ", ".join(f"'{key}' ({kind})" for key, kind in list(self._refused.items())[:5])
        more = f" and {len(self._refused) - 5} more" if len(self._refused) > 5 else ""
        first = next(iter(self._refused))
        if self._unsafe:
            what = f"objects can't be written to a file that loads without running code: {shown}{more}"
            return UnsafeContent(what, globals=self._unsafe, key=first, hint=_ELSEWHERE)
        return Unsupported(
            f"torch.load(weights_only=True) can't read these leaves: {shown}{more}", key=first, hint=_ELSEWHERE
        )

    # ---------------------------------------------------------------- the tree

    def _tree(self, root: Node) -> None:
        """Every node in order. A step is a node, or what is to be written once the nodes before it are."""
        pending: list[Node | Callable[[], None]] = [root]
        while pending:
            step = pending.pop()
            if isinstance(step, TensorEntry):
                self._tensor(step)
            elif isinstance(step, ObjectEntry):
                self._object(step)
            elif isinstance(step, Container):
                pending.extend(reversed(self._container(step)))
            else:
                step()

    def _container(self, node: Container) -> list[Node | Callable[[], None]]:
        """The steps that write a container."""
        kind = node.kind
        if kind in ("list", "tuple", "set"):
            return self._sequence(kind, node.children)
        if kind not in ("dict", "OrderedDict", "Counter"):
            self._refuse_container(node)
            return []
        if kind == "dict":
            self._op(b"}")
        elif kind == "OrderedDict":
            self._call("collections", "OrderedDict", b")")
        else:
            self._global("collections", "Counter")
            self._op(b"}")
        steps: list[Node | Callable[[], None]] = []
        for first in range(0, len(node.keys), _BATCH):
            steps.append(lambda: self._op(b"("))
            for key, child in zip(node.keys[first : first + _BATCH], node.children[first : first + _BATCH]):
                steps.append(lambda key=key, child=child: self._key(key, child))  # type: ignore[misc]
                steps.append(child)
            steps.append(lambda: self._op(b"u"))
        if kind == "Counter":
            steps.append(lambda: self._op(b"\x85R"))
        if kind == "OrderedDict" and node.attributes:
            steps.append(lambda: self._attributes(node.attributes))
        return steps

    def _attributes(self, attributes: Mapping[str, object]) -> None:
        self._value(dict(attributes))
        self._op(b"b")

    def _sequence(self, kind: str, children: Any) -> list[Node | Callable[[], None]]:
        if kind == "tuple":
            self._op(b"(")
            return [*children, lambda: self._op(b"t")]
        if kind == "set":
            self._global("__builtin__", "set")
        self._op(b"]")
        steps: list[Node | Callable[[], None]] = []
        for first in range(0, len(children), _BATCH):
            steps += [lambda: self._op(b"("), *children[first : first + _BATCH], lambda: self._op(b"e")]
        return [*steps, lambda: self._op(b"\x85R")] if kind == "set" else steps

    def _key(self, key: object, child: Node) -> None:
        try:
            self._value(key)
        except _Refused:
            self._refuse(child, f"its key is a {type(key).__name__}")

    def _refuse_container(self, node: Container) -> None:
        first: Node = node
        while isinstance(first, Container) and first.children:
            first = first.children[0]
        self._refuse(first, node.type or node.kind)
        if node.kind == "opaque":
            self._unsafe[node.type] = None

    def _refuse(self, node: Node, kind: str) -> None:
        key = dotted(node.path) if not isinstance(node, Container) else kind
        self._refused.setdefault(key, kind)

    def _object(self, entry: ObjectEntry) -> None:
        try:
            self._empty_or_value(entry)
        except _Refused as refused:
            self._refuse(entry, refused.kind)
            if isinstance(refused.value, Opaque):
                self._unsafe[refused.value.type] = None

    def _empty_or_value(self, entry: ObjectEntry) -> None:
        # An empty OrderedDict or Counter is a leaf whose value has lost its class.
        if entry.kind in ("OrderedDict", "Counter") and isinstance(entry.value, dict):
            self._call("collections", entry.kind, b")")
        elif entry.kind in ("defaultdict", "Namespace"):
            raise _Refused(entry.value, entry.kind)
        else:
            self._value(entry.value)

    # ---------------------------------------------------------------- values

    def _op(self, code: bytes) -> None:
        self._out += code

    def _global(self, module: str, name: str) -> None:
        key = f"{module} {name}"
        at = self._memo.get(key)
        if at is None:
            at = self._memo[key] = len(self._memo)
            self._out += f"c{module}\n{name}\n".encode("ascii")
            self._out += b"q" + bytes([at])
        else:
            self._out += b"h" + bytes([at])

    def _call(self, module: str, name: str, args: bytes) -> None:
        """A call whose arguments are written already, as one tuple's instructions."""
        self._global(module, name)
        self._out += args + b"R"

    def _text(self, text: str) -> None:
        raw = text.encode("utf-8", "surrogatepass")
        self._out += b"X" + len(raw).to_bytes(4, "little") + raw

    def _int(self, number: int) -> None:
        if 0 <= number < 256:
            self._out += b"K" + bytes([number])
        elif -(1 << 31) <= number < 1 << 31:
            self._out += b"J" + number.to_bytes(4, "little", signed=True)
        else:
            raw = number.to_bytes(number.bit_length() // 8 + 1, "little", signed=True)
            if len(raw) > 255:
                raise _Refused(number, "an integer of more than 255 bytes")
            self._out += b"\x8a" + bytes([len(raw)]) + raw

    def _value(self, value: object) -> None:
        """An inert value. Those nest little (a file's own nesting is in its containers), so this recurses."""
        if value is None:
            self._op(b"N")
        elif value is True or value is False:
            self._op(b"\x88" if value else b"\x89")
        elif type(value) is int:
            self._int(value)
        elif type(value) is float:
            self._op(b"G" + struct.pack(">d", value))
        elif type(value) is str:
            self._text(value)
        elif type(value) in (bytes, bytearray):
            self._bytes(value)  # type: ignore[arg-type]
        elif type(value) is complex:
            self._global("__builtin__", "complex")
            self._op(b"G" + struct.pack(">d", value.real) + b"G" + struct.pack(">d", value.imag) + b"\x86R")
        elif isinstance(value, TorchValue):
            self._torch_value(value)
        else:
            self._collection(value)

    def _bytes(self, value: bytes | bytearray) -> None:
        if type(value) is bytearray:
            self._global("__builtin__", "bytearray")
        self._global("_codecs", "encode")
        self._text(value.decode("latin-1"))
        self._text("latin1")
        self._op(b"\x86R")
        if type(value) is bytearray:
            self._op(b"\x85R")

    def _torch_value(self, value: TorchValue) -> None:
        if value.kind == "dtype":
            self._global("torch", str(value.value))
        elif value.kind == "Size":
            self._global("torch", "Size")
            self._value(value.value)
            self._op(b"\x85R")
        elif value.kind == "device":
            name, _, index = str(value.value).partition(":")
            self._global("torch", "device")
            self._text(name)
            if index:
                self._int(int(index))
            self._op(b"\x86R" if index else b"\x85R")
        elif value.kind == "layout":
            self._global("torch.serialization", "_get_layout")
            self._text(str(value.value))
            self._op(b"\x85R")
        elif value.kind == "qscheme":
            self._global("torch", str(value.value).removeprefix("torch."))
        else:
            raise _Refused(value, f"torch.{value.kind}")

    def _collection(self, value: object) -> None:
        kind = type(value)
        if kind is tuple:
            self._op(b"(")
            for item in value:  # type: ignore[attr-defined]
                self._value(item)
            self._op(b"t")
        elif kind is list or kind is set:
            if kind is set:
                self._global("__builtin__", "set")
            self._op(b"](")
            for item in sorted(value, key=repr) if kind is set else value:  # type: ignore[call-overload, union-attr]
                self._value(item)
            self._op(b"e\x85R" if kind is set else b"e")
        elif kind is dict or kind.__name__ == "OrderedDict":
            if kind is dict:
                self._op(b"}")
            else:
                self._call("collections", "OrderedDict", b")")
            self._op(b"(")
            for key, item in value.items():  # type: ignore[attr-defined]
                self._value(key)
                self._value(item)
            self._op(b"u")
        else:
            name = value.type if isinstance(value, Opaque) else kind.__name__
            raise _Refused(value, name)

    # ---------------------------------------------------------------- tensors

    def _tensor(self, entry: TensorEntry) -> None:
        try:
            self._one_tensor(entry)
        except _Refused as refused:
            self._refuse(entry, refused.kind)

    def _one_tensor(self, entry: TensorEntry) -> None:
        extra = dict(entry.attributes) if entry.layout == "strided" else {}
        if entry.kind not in ("Tensor", "Parameter", "Buffer", "ndarray"):
            self._unsafe[entry.kind] = None
            raise _Refused(entry, entry.kind)
        if extra or (entry.parts and entry.layout == "strided"):
            self._with_attributes(entry, extra)
        elif entry.kind == "Parameter":
            self._global("torch._utils", "_rebuild_parameter")
            self._plain_tensor(entry._replace(kind="Tensor"), entry)
            self._op(b"\x88" if entry.requires_grad else b"\x89")
            self._call("collections", "OrderedDict", b")")
            self._op(b"\x87R")
        else:
            self._plain_tensor(entry, entry)

    def _with_attributes(self, entry: TensorEntry, extra: Mapping[str, object]) -> None:
        """A tensor on which Python attributes were set: torch saves it with its dict as state."""
        self._global("torch._tensor", "_rebuild_from_type_v2")
        self._op(b"(")
        self._global("torch._utils", "_rebuild_tensor_v3" if self._untyped(entry) else "_rebuild_tensor_v2")
        cls = ("torch.nn.parameter", "Parameter") if entry.kind == "Parameter" else ("torch", "Tensor")
        self._global(*cls)
        self._arguments(entry, entry)
        self._op(b"}(")
        for name, value in extra.items():
            self._text(name)
            self._value(value)
        for name, part in entry.parts.items():
            self._text(name)
            self._plain_tensor(part, part)
        self._op(b"utR")

    def _plain_tensor(self, entry: TensorEntry, placed: TensorEntry) -> None:
        if entry.layout == "quantized":
            self._quantized(entry)
        elif entry.layout.startswith("sparse_"):
            self._sparse(entry)
        elif entry.layout != "strided":
            raise _Refused(entry, f"a {entry.layout} tensor")
        elif entry.view is None:
            self._global("torch._utils", "_rebuild_meta_tensor_no_storage")
            self._op(b"(")
            self._global("torch", entry.dtype.torch)
            self._value(entry.shape)
            self._value(_contiguous(entry))
            self._op((b"\x88" if entry.requires_grad else b"\x89") + b"tR")
        else:
            self._global("torch._utils", "_rebuild_tensor_v3" if self._untyped(entry) else "_rebuild_tensor_v2")
            self._arguments(entry, placed)
            self._op(b"R")

    def _untyped(self, entry: TensorEntry) -> bool:
        return self._typed_code(entry) is None

    def _typed_code(self, entry: TensorEntry) -> str | None:
        return _STORAGE_CLASS.get(entry.dtype.code)

    def _view(self, entry: TensorEntry, placed: TensorEntry) -> str:
        """Storage, offset, shape and strides; gives the conj and neg bits that stay."""
        place = self._layout.places[id(placed)]
        if not entry.dtype.in_torch:
            raise _Refused(entry, f"dtype {entry.dtype}, which torch has not")
        self._storage(place.target, entry)
        self._int(place.offset)
        self._value(entry.shape)
        self._value(place.stride)
        return place.bits

    def _storage(self, number: int, entry: TensorEntry) -> None:
        target = self._layout.targets[number]
        name = self._typed_code(entry)
        self._op(b"(")
        self._text("storage")
        if name is None:
            self._global("torch.storage", "UntypedStorage")
        else:
            self._global("torch", name)
        self._text(str(number))
        self._text(target.device)
        self._int(target.nbytes if name is None else target.nbytes * 8 // entry.dtype.bits)
        self._op(b"tQ")

    def _arguments(self, entry: TensorEntry, placed: TensorEntry) -> None:
        """The tuple of arguments of ``_rebuild_tensor_v2`` or ``v3``."""
        self._op(b"(")
        bits = self._view(entry, placed)
        self._op(b"\x88" if entry.requires_grad and entry.kind != "Parameter" else b"\x89")
        self._call("collections", "OrderedDict", b")")
        if self._untyped(entry):
            self._global("torch", entry.dtype.torch)
        if bits:
            self._value({name: True for letter, name in (("c", "conj"), ("n", "neg")) if letter in bits})
        self._op(b"t")

    def _sparse(self, entry: TensorEntry) -> None:
        self._global("torch._utils", "_rebuild_sparse_tensor")
        self._op(b"(")
        self._value(TorchValue("layout", f"torch.{entry.layout}"))
        self._op(b"(")
        for part in entry.parts.values():
            self._plain_tensor(part, part)
        self._global("torch", "Size")
        self._value(entry.shape)
        self._op(b"\x85R")
        if "is_coalesced" in entry.attributes:
            self._value(entry.attributes["is_coalesced"])
        self._op(b"ttR")

    def _quantized(self, entry: TensorEntry) -> None:
        self._global("torch._utils", "_rebuild_qtensor")
        self._op(b"(")
        inner = entry.parts["int_repr"]
        self._view(inner, inner)
        self._op(b"(")
        self._value(entry.attributes["qscheme"])
        for name in ("scale", "zero_point", "axis"):
            if name in entry.parts:
                self._plain_tensor(entry.parts[name], entry.parts[name])
            elif name in entry.attributes:
                self._value(entry.attributes[name])
        self._op(b"t" + (b"\x88" if entry.requires_grad else b"\x89"))
        self._call("collections", "OrderedDict", b")")
        self._op(b"tR")


class _Refused(Exception):
    """A leaf that the weights-only reader doesn't take."""

    def __init__(self, value: object, kind: str) -> None:
        super().__init__(kind)
        self.value = value
        self.kind = kind


def _contiguous(entry: TensorEntry) -> tuple[int, ...]:
    from statedict.views import packed_stride

    return packed_stride(entry.shape)
