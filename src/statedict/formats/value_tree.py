"""From a nested value to the tree of a manifest.

The value is what the interpreter of pickles built, what the notes of a safetensors file say, or what someone holds in
memory; an ``adapt`` function turns the last into the interpreter's records. Containers become ``Container`` nodes, tensors and
arrays ``TensorEntry``, everything else ``ObjectEntry``. A list or set of plain values is one entry, and so is an empty
container, so that nothing of the file is left unlisted. Objects of unknown classes become containers of kind ``opaque``
whose children are what they would have been given. Nothing recurses on the depth of the file.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Mapping
from math import prod
from typing import Any

from statedict.errors import CorruptFile, LimitExceeded, Unsupported
from statedict.formats.modules import is_module, module_state
from statedict.formats.records import ArrayRecord, Blob, Global, MappingRecord, NumpyDType, StorageRef, TensorRecord
from statedict.keys import Path, dotted
from statedict.limits import Limits
from statedict.manifest import (
    Container,
    Extent,
    Finding,
    Node,
    NumpyScalar,
    ObjectEntry,
    Opaque,
    Storage,
    StorageView,
    TensorEntry,
    TorchValue,
)
from statedict.nodes import components
from statedict.views import packed_stride

__all__ = ["Tree", "TreeBuilder"]

_SCALARS = frozenset({int, float, bool, str, bytes, complex, type(None), TorchValue, NumpyScalar})
_NOTHING: Mapping[str, object] = {}
_NO_PARTS: Mapping[str, TensorEntry] = {}
# Values inside attributes and records may nest this deep; deeper ones are not facts that anyone reads.
_VALUE_DEPTH = 64


class Tree:
    """A finished tree: its root, its leaves by path, the storages that they use, and what to know."""

    __slots__ = ("notes", "objects", "root", "storages", "tensors")

    def __init__(self) -> None:
        self.root: Node = ObjectEntry((), "NoneType", None)
        self.tensors: dict[Path, TensorEntry] = {}
        self.objects: dict[Path, ObjectEntry] = {}
        self.storages: list[Storage] = []
        self.notes: list[Finding] = []


# A place still to be filled: its path, the value, the list and index that receive the node, and the containers above it.
Above = Any  # None, or (id of a container, what is above it)
_Task = tuple[Path, object, list[Node], int, Above]


class TreeBuilder:
    """Builds one ``Tree``.

    ``storage_of`` gives the storage of a reference, ``sources`` is for ``modules``, and ``adapt`` turns a value of another
    kind into an inert one before it is looked at.
    """

    def __init__(
        self,
        storage_of: Callable[[StorageRef], Storage],
        limits: Limits,
        *,
        path: str,
        sources: dict[str, str] | None = None,
        adapt: Callable[[object], object] | None = None,
    ) -> None:
        self._storage_of = storage_of
        self._adapt = adapt
        self._limits = limits
        self._path = path
        self._sources = sources or {}
        self._tree = Tree()
        self._memory: dict[int, Storage] = {}
        self._used: dict[int, Storage] = {}
        self._containers: dict[int, object] = {}
        self._visits = 0
        self._distinct = 0
        self._next_id = 1 << 40  # for storages inside the pickle; those of records are numbered from 0

    def build(self, value: object) -> Tree:
        """The tree of the value that the interpreter gave."""
        top: list[Node] = [self._tree.root]
        pending: list[_Task] = [((), value, top, 0, None)]
        while pending:
            path, item, siblings, index, above = pending.pop()
            siblings[index] = self._node(path, item, above, pending)
        self._tree.root = top[0]
        self._tree.storages = list(self._used.values())
        return self._tree

    def _node(self, path: Path, value: object, above: Above, pending: list[_Task]) -> Node:
        item = value if self._adapt is None else self._adapt(value)
        kind = type(item)
        if kind is TensorRecord:
            entry = self._tree.tensors[path] = self._tensor(path, item)  # type: ignore[arg-type]
            return entry
        if kind in _SCALARS:
            return self._object(path, _kind_of(item), item)
        if kind is TensorEntry:
            entry = self._tree.tensors[path] = self._placed(path, item)  # type: ignore[arg-type]
            return entry
        if kind is ArrayRecord and item.dtype is not None and item.dtype.dtype is not None:  # type: ignore[attr-defined]
            entry = self._tree.tensors[path] = self._array(path, item)  # type: ignore[arg-type]
            return entry
        if is_module(item):
            item, notes = module_state(item, self._limits, self._sources)  # type: ignore[arg-type]
            self._tree.notes.extend(notes)
        opened = _open(item)
        if opened is None or (not opened[1] and not opened[3]):
            return self._object(path, _kind_of(item), self._inert(item))
        if opened[0] in ("list", "tuple", "set", "frozenset") and all(type(child) in _SCALARS for child in opened[2]):
            return self._object(path, opened[0], self._inert(item))
        return self._container(path, value, opened, above, pending)

    def _object(self, path: Path, kind: str, value: object) -> ObjectEntry:
        entry = self._tree.objects[path] = ObjectEntry(path, kind, value)
        return entry

    def _container(self, path: Path, item: object, opened: _Opened, above: Above, pending: list[_Task]) -> Container:
        kind, keys, values, attributes, cls = opened
        self._guard(path, item, len(keys), above)
        children: list[Node] = [self._tree.root] * len(keys)
        facts = {name: self._inert(value) for name, value in attributes.items()}
        node = Container(kind, keys, children, type=cls, attributes=facts)
        here = (id(item), above)
        parts = components(keys)
        pending.extend(((*path, parts[i]), values[i], children, i, here) for i in range(len(keys) - 1, -1, -1))
        return node

    def _guard(self, path: Path, item: object, size: int, above: Above) -> None:
        """Refuse cycles, great depth, and small pickles whose shared containers unfold without end."""
        self._limits.check("depth", len(path), "containers are nested too deeply", path=self._path)
        self._visits += size + 1
        if id(item) not in self._containers:
            self._containers[id(item)] = item
            self._distinct += size + 1
        self._limits.check("nodes", self._visits, "too many values in containers", path=self._path)
        # A container that stands in two places is shown in both; many that hold each other twice would never end.
        most = 16 * self._distinct + 100_000
        if self._visits > most:
            raise LimitExceeded("shared containers unfold without end", limit="nodes", most=most, path=self._path)
        while above is not None:
            if above[0] == id(item):
                raise CorruptFile(f"the container '{dotted(path)}' contains itself", path=self._path)
            above = above[1]

    # ---------------------------------------------------------------- tensors

    def _placed(self, path: Path, entry: TensorEntry) -> TensorEntry:
        """A finished entry at its path."""
        for part in (entry, *entry.parts.values()):
            if part.view is not None:
                self._used[part.view.storage.id] = part.view.storage
        parts = {name: part._replace(path=(*path, name)) for name, part in entry.parts.items()}
        return entry._replace(path=path, parts=parts or _NO_PARTS)

    def _tensor(self, path: Path, record: TensorRecord) -> TensorEntry:
        ref = record.storage
        view = None
        device = record.device
        if ref is not None:
            storage = self._storage(ref)
            device = device or ref.device
            if device != "meta":
                view = StorageView(storage, record.offset + ref.view_offset, record.stride, record.bits)
        parts, attributes = _NO_PARTS, _NOTHING
        if record.parts or record.attributes:
            parts, attributes = self._facts(path, record)
        return TensorEntry(
            path,
            record.dtype,
            record.shape,
            view,
            record.layout,
            parts,
            device,
            record.requires_grad,
            record.kind,
            attributes,
        )

    def _facts(self, path: Path, record: TensorRecord) -> tuple[Mapping[str, TensorEntry], Mapping[str, object]]:
        """The tensors that belong to a tensor, and its other attributes."""
        parts = dict(record.parts)
        plain: dict[str, object] = {}
        for name, value in record.attributes.items():
            if isinstance(value, TensorRecord):
                parts[name] = value
            else:
                plain[name] = self._inert(value)
        for name, part in parts.items():
            if part.parts:
                raise Unsupported(f"part '{name}' is itself made of parts", path=self._path, key=dotted(path))
        return {name: self._tensor((*path, name), part) for name, part in parts.items()}, plain

    def _storage(self, ref: StorageRef) -> Storage:
        if ref.data is None:
            storage = self._storage_of(ref)
        else:
            storage = self._in_memory(ref.data, "little", ref.key)
        self._used[storage.id] = storage
        return storage

    def _in_memory(self, data: object, byteorder: str, name: str) -> Storage:
        """The storage of bytes that lie inside the pickle; the same bytes give the same one."""
        found = self._memory.get(id(data))
        if found is None:
            self._next_id += 1
            if isinstance(data, Blob):
                found = Storage(
                    self._next_id, data.nbytes, Extent(0, data.offset, data.nbytes), None, byteorder, None, name
                )
            else:
                raw = data.encode("utf-8") if isinstance(data, str) else bytes(data)  # type: ignore[call-overload]
                found = Storage(self._next_id, len(raw), None, raw, byteorder, None, name)
            self._memory[id(data)] = found
            self._containers[id(data)] = data  # keeps its identity while the tree is built
        return found

    def _array(self, path: Path, record: ArrayRecord) -> TensorEntry:
        assert record.dtype is not None and record.dtype.dtype is not None
        dtype = record.torch_dtype or record.dtype.dtype
        data = record.data
        if not isinstance(data, (bytes, bytearray, str, Blob)):
            raise CorruptFile("the data of an array are no bytes", path=self._path, key=dotted(path))
        storage = self._in_memory(data, record.dtype.byteorder, "array")
        self._used[storage.id] = storage
        wanted = record.dtype.dtype.nbytes(prod(record.shape))
        if storage.nbytes != wanted:
            raise CorruptFile(
                "an array has another size than its shape",
                path=self._path,
                key=dotted(path),
                expected=f"{wanted} bytes",
                found=storage.nbytes,
            )
        shape = record.shape
        stride = packed_stride(shape[::-1])[::-1] if record.fortran else packed_stride(shape)
        view = StorageView(storage, 0, stride)
        return TensorEntry(path, dtype, shape, view, "strided", _NO_PARTS, None, None, record.kind)

    # ---------------------------------------------------------------- values

    def _inert(self, value: object, depth: int = 0) -> object:
        """A value with every record of the interpreter replaced by one of the manifest's."""
        if self._adapt is not None:
            value = self._adapt(value)
        kind = type(value)
        if kind in _SCALARS or kind is TensorEntry:
            return value
        self._limits.check(
            "depth", depth * self._limits.depth // _VALUE_DEPTH, "values are nested too deeply", path=self._path
        )
        self._visits += 1
        self._limits.check("nodes", self._visits, "too many values in containers", path=self._path)
        down = depth + 1
        if isinstance(value, dict):
            return _like(value, {self._inert(key, down): self._inert(item, down) for key, item in value.items()})
        if kind in (list, tuple, set, frozenset):
            return kind(self._inert(item, down) for item in value)  # type: ignore[attr-defined]
        if isinstance(value, Opaque):
            made = Opaque(value.module, value.name, self._inert(value.args, down), self._inert(value.state, down))
            made.items = [self._inert(item, down) for item in value.items]
            made.pairs = [(self._inert(key, down), self._inert(item, down)) for key, item in value.pairs]
            return made
        if isinstance(value, Global):
            return Opaque(value.module, value.name, None)
        if isinstance(value, TensorRecord):
            return self._tensor((), value)
        if isinstance(value, NumpyDType):
            return Opaque("numpy", "dtype", (value.letters,))
        if isinstance(value, ArrayRecord):
            letters = value.dtype.letters if value.dtype else None
            return Opaque("numpy", "ndarray", (value.shape, letters), self._inert(value.data, down))
        return value


def _like(record: dict[object, object], items: dict[object, object]) -> dict[object, object]:
    """The items in the standard library's mapping that the record stands for."""
    if not isinstance(record, MappingRecord):
        return items
    if record.kind == "OrderedDict":
        return OrderedDict(items)
    if record.kind in ("Counter", "defaultdict"):
        made: dict[object, object] = Counter() if record.kind == "Counter" else defaultdict()  # type: ignore[assignment]
        dict.update(made, items)  # a Counter's own update adds
        return made
    copy = MappingRecord(record.kind, record.type)
    copy.update(items)
    return copy


# What a container shows: kind, keys, children, attributes, class.
_Opened = tuple[str, list[object], list[object], Mapping[str, object], str]


def _open(item: object) -> _Opened | None:
    """The container as kind, keys, children, attributes and class; None for a value that is no container."""
    if isinstance(item, MappingRecord):
        return item.kind, list(item), list(item.values()), item.attributes, item.type
    kind = type(item)
    if kind is dict:
        return "dict", list(item), list(item.values()), _NOTHING, ""  # type: ignore[call-overload, attr-defined]
    if kind in (list, tuple, set, frozenset):
        values = list(item)  # type: ignore[call-overload]
        return kind.__name__, list(range(len(values))), values, _NOTHING, ""
    if isinstance(item, Opaque):
        return _open_opaque(item)
    return None


def _open_opaque(item: Opaque) -> _Opened | None:
    """An unknown object: its fields, if it has nothing but fields; else what each way of filling it gave."""
    groups: dict[object, object] = {}
    if item.args and item.args != ({},):
        groups["args"] = item.args
    if item.state is not None:
        groups["state"] = item.state
    if item.items:
        groups["items"] = item.items
    if item.pairs:
        groups["pairs"] = [list(pair) for pair in item.pairs]
    if set(groups) == {"state"} and isinstance(item.state, dict) and item.state:
        return "opaque", list(item.state), list(item.state.values()), {"fields": True}, item.type
    if not groups:
        return None
    return "opaque", list(groups), list(groups.values()), {"fields": False}, item.type


def _kind_of(item: object) -> str:
    if isinstance(item, TorchValue):
        return f"torch.{item.kind}"
    if isinstance(item, NumpyScalar):
        return f"numpy.{item.dtype}"
    if isinstance(item, MappingRecord):
        return item.kind
    if isinstance(item, (Opaque, Global, ArrayRecord, NumpyDType)):
        return "opaque"
    return type(item).__name__
