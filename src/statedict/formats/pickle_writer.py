"""The writer of ``data.pkl``: protocol 2, with only the instructions and names that torch's weights-only reader knows.

Source: torch 2.13 ``torch/_weights_only_unpickler.py``. What that reader doesn't take is refused, all of it at once and by
key, unless it is a plain value that it takes in another spelling.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from statedict.dtypes import BY_STORAGE
from statedict.errors import StateDictError, UnsafeContent, Unsupported
from statedict.formats.layout import Layout
from statedict.formats.pickle_stream import PickleStream, Refused
from statedict.keys import dotted
from statedict.manifest import Container, Node, ObjectEntry, Opaque, TensorEntry, TorchValue
from statedict.views import packed_stride

__all__ = ["PickleWriter"]

# The storage class of each dtype that has one. Newer dtypes are views of untyped bytes.
_STORAGE_CLASS = {dtype.code: name for name, dtype in BY_STORAGE.items() if name != "UntypedStorage"}
# Containers are filled in batches of this size, as pickle's own writer does.
_BATCH = 1000
_ELSEWHERE = "Write a .safetensors file, which keeps them as inert records, or take a part: --at KEY"


class PickleWriter(PickleStream):
    """Turns one tree into the bytes of ``data.pkl``; the storages are named by their number in the layout."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        super().__init__()
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
        self.op(b".")
        return bytes(self.out)

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
            self.op(b"}")
        elif kind == "OrderedDict":
            self.call("collections", "OrderedDict", b")")
        else:
            self.look_up("collections", "Counter")
            self.op(b"}")
        steps: list[Node | Callable[[], None]] = []
        for first in range(0, len(node.keys), _BATCH):
            steps.append(lambda: self.op(b"("))
            for key, child in zip(node.keys[first : first + _BATCH], node.children[first : first + _BATCH]):
                steps.append(lambda key=key, child=child: self._key(key, child))  # type: ignore[misc]
                steps.append(child)
            steps.append(lambda: self.op(b"u"))
        if kind == "Counter":
            steps.append(lambda: self.op(b"\x85R"))
        if kind == "OrderedDict" and node.attributes:
            steps.append(lambda: self._attributes(node))
        return steps

    def _attributes(self, node: Container) -> None:
        try:
            self.value(dict(node.attributes))
        except Refused as refused:
            self._refuse(node, f"{refused.kind} among the attributes of an {node.kind}")
            if isinstance(refused.value, Opaque):
                self._unsafe[refused.value.type] = None
        self.op(b"b")

    def _sequence(self, kind: str, children: Any) -> list[Node | Callable[[], None]]:
        if kind == "tuple":
            self.op(b"(")
            return [*children, lambda: self.op(b"t")]
        if kind == "set":
            self.look_up("__builtin__", "set")
        self.op(b"]")
        steps: list[Node | Callable[[], None]] = []
        for first in range(0, len(children), _BATCH):
            steps += [lambda: self.op(b"("), *children[first : first + _BATCH], lambda: self.op(b"e")]
        return [*steps, lambda: self.op(b"\x85R")] if kind == "set" else steps

    def _key(self, key: object, child: Node) -> None:
        try:
            self.value(key)
        except Refused:
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
        except Refused as refused:
            self._refuse(entry, refused.kind)
            if isinstance(refused.value, Opaque):
                self._unsafe[refused.value.type] = None

    def _empty_or_value(self, entry: ObjectEntry) -> None:
        # An empty OrderedDict or Counter is a leaf whose value has lost its class.
        if entry.kind in ("OrderedDict", "Counter") and isinstance(entry.value, dict):
            self.call("collections", entry.kind, b")")
        elif entry.kind in ("defaultdict", "Namespace"):
            raise Refused(entry.value, entry.kind)
        else:
            self.value(entry.value)

    # ---------------------------------------------------------------- tensors

    def _tensor(self, entry: TensorEntry) -> None:
        try:
            self._one_tensor(entry)
        except Refused as refused:
            self._refuse(entry, refused.kind)

    def _one_tensor(self, entry: TensorEntry) -> None:
        extra = dict(entry.attributes) if entry.layout == "strided" else {}
        if entry.kind not in ("Tensor", "Parameter", "Buffer", "ndarray"):
            self._unsafe[entry.kind] = None
            raise Refused(entry, entry.kind)
        if extra or (entry.parts and entry.layout == "strided"):
            self._with_attributes(entry, extra)
        elif entry.kind == "Parameter":
            self.look_up("torch._utils", "_rebuild_parameter")
            self._plain_tensor(entry._replace(kind="Tensor"), entry)
            self.op(b"\x88" if entry.requires_grad else b"\x89")
            self.call("collections", "OrderedDict", b")")
            self.op(b"\x87R")
        else:
            self._plain_tensor(entry, entry)

    def _with_attributes(self, entry: TensorEntry, extra: Mapping[str, object]) -> None:
        """A tensor on which Python attributes were set: torch saves it with its dict as state."""
        self.look_up("torch._tensor", "_rebuild_from_type_v2")
        self.op(b"(")
        self.look_up("torch._utils", "_rebuild_tensor_v3" if self._untyped(entry) else "_rebuild_tensor_v2")
        cls = ("torch.nn.parameter", "Parameter") if entry.kind == "Parameter" else ("torch", "Tensor")
        self.look_up(*cls)
        self._arguments(entry, entry)
        self.op(b"}(")
        for name, value in extra.items():
            self.text(name)
            self.value(value)
        for name, part in entry.parts.items():
            self.text(name)
            self._plain_tensor(part, part)
        self.op(b"utR")

    def _plain_tensor(self, entry: TensorEntry, placed: TensorEntry) -> None:
        if entry.layout == "quantized":
            self._quantized(entry)
        elif entry.layout.startswith("sparse_"):
            self._sparse(entry)
        elif entry.layout != "strided":
            raise Refused(entry, f"a {entry.layout} tensor")
        elif entry.view is None:
            self.look_up("torch._utils", "_rebuild_meta_tensor_no_storage")
            self.op(b"(")
            self.look_up("torch", entry.dtype.torch)
            self.value(entry.shape)
            self.value(packed_stride(entry.shape))
            self.op((b"\x88" if entry.requires_grad else b"\x89") + b"tR")
        else:
            self.look_up("torch._utils", "_rebuild_tensor_v3" if self._untyped(entry) else "_rebuild_tensor_v2")
            self._arguments(entry, placed)
            self.op(b"R")

    def _untyped(self, entry: TensorEntry) -> bool:
        return self._typed_code(entry) is None

    def _typed_code(self, entry: TensorEntry) -> str | None:
        return _STORAGE_CLASS.get(entry.dtype.code)

    def _view(self, entry: TensorEntry, placed: TensorEntry) -> str:
        """Storage, offset, shape and strides; gives the conj and neg bits that stay."""
        place = self._layout.places[id(placed)]
        if not entry.dtype.in_torch:
            raise Refused(entry, f"dtype {entry.dtype}, which torch has not")
        self._storage(place.target, entry)
        self.integer(place.offset)
        self.value(entry.shape)
        self.value(place.stride)
        return place.bits

    def _storage(self, number: int, entry: TensorEntry) -> None:
        target = self._layout.targets[number]
        name = self._typed_code(entry)
        self.op(b"(")
        self.text("storage")
        if name is None:
            self.look_up("torch.storage", "UntypedStorage")
        else:
            self.look_up("torch", name)
        self.text(str(number))
        self.text(target.device)
        self.integer(target.nbytes if name is None else target.nbytes * 8 // entry.dtype.bits)
        self.op(b"tQ")

    def _arguments(self, entry: TensorEntry, placed: TensorEntry) -> None:
        """The tuple of arguments of ``_rebuild_tensor_v2`` or ``v3``."""
        self.op(b"(")
        bits = self._view(entry, placed)
        self.op(b"\x88" if entry.requires_grad and entry.kind != "Parameter" else b"\x89")
        self.call("collections", "OrderedDict", b")")
        if self._untyped(entry):
            self.look_up("torch", entry.dtype.torch)
        if bits:
            self.value({name: True for letter, name in (("c", "conj"), ("n", "neg")) if letter in bits})
        self.op(b"t")

    def _sparse(self, entry: TensorEntry) -> None:
        self.look_up("torch._utils", "_rebuild_sparse_tensor")
        self.op(b"(")
        self.value(TorchValue("layout", f"torch.{entry.layout}"))
        self.op(b"(")
        for part in entry.parts.values():
            self._plain_tensor(part, part)
        self.look_up("torch", "Size")
        self.value(entry.shape)
        self.op(b"\x85R")
        if "is_coalesced" in entry.attributes:
            self.value(entry.attributes["is_coalesced"])
        self.op(b"ttR")

    def _quantized(self, entry: TensorEntry) -> None:
        self.look_up("torch._utils", "_rebuild_qtensor")
        self.op(b"(")
        inner = entry.parts["int_repr"]
        self._view(inner, inner)
        self.op(b"(")
        self.value(entry.attributes["qscheme"])
        for name in ("scale", "zero_point", "axis"):
            if name in entry.parts:
                self._plain_tensor(entry.parts[name], entry.parts[name])
            elif name in entry.attributes:
                self.value(entry.attributes[name])
        self.op(b"t" + (b"\x88" if entry.requires_grad else b"\x89"))
        self.call("collections", "OrderedDict", b")")
        self.op(b"tR")
