"""From a nested value to the tree of a manifest.

The value is what the interpreter of pickles built, what the notes of a safetensors file say, or what someone holds in
memory; an ``adapt`` function turns the last into the interpreter's records. Containers become ``Container`` nodes, tensors and
arrays ``TensorEntry``, everything else ``ObjectEntry``. A list or set of plain values is one entry, and so is an empty
container, so that nothing of the file is left unlisted. Objects of unknown classes become containers of kind ``opaque``
whose children are what they would have been given. Nothing recurses on the depth of the file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod
from typing import Any

from statedict.errors import CorruptFile, LimitExceeded, Unsupported
from statedict.formats.modules import is_module, module_state
from statedict.formats.records import ArrayRecord, Blob, Global, NumpyDType, StorageRef, TensorRecord
from statedict.formats.value_kinds import Opened, dict_like, hashed, kind_of, letters_of, of_storage, opened
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
from statedict.views import packed_stride, reach

__all__ = ["Tree", "TreeBuilder"]

_SCALARS = frozenset({int, float, bool, str, bytes, complex, type(None), TorchValue, NumpyScalar})
_NOTHING: Mapping[str, object] = {}
_NO_PARTS: Mapping[str, TensorEntry] = {}
# Values inside attributes and records may nest this deep; deeper ones are not facts that anyone reads.
_VALUE_DEPTH = 64
# Integers from 0 to below this are their own hash (``sys.hash_info.modulus``); -1 and -2 share one, and larger ones can be
# chosen to. Paths made of such would be compared each with all others: so many may share a hash.
_MODULUS = 2**61 - 1
_MOST_ALIKE = 256


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
        self._pairs: dict[int, list[object]] = {}
        self._alike: dict[int, int] | None = None  # leaves by the hash of their path, once a key calls for it
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
        if self._alike is not None:
            self._count_alike(path, self._alike)
        if kind is TensorRecord:
            entry = self._tree.tensors[path] = self._tensor(path, item)  # type: ignore[arg-type]
            return entry
        if kind in _SCALARS:
            return self._object(path, kind_of(item), item)
        if kind is TensorEntry:
            entry = self._tree.tensors[path] = self._placed(path, item)  # type: ignore[arg-type]
            return entry
        if kind is ArrayRecord and item.dtype is not None and item.dtype.dtype is not None:  # type: ignore[attr-defined]
            entry = self._tree.tensors[path] = self._array(path, item)  # type: ignore[arg-type]
            return entry
        if kind is StorageRef:
            entry = self._tree.tensors[path] = self._tensor(path, of_storage(item))  # type: ignore[arg-type]
            return entry
        if is_module(item):
            item, notes = module_state(item, self._limits, self._sources)  # type: ignore[arg-type]
            self._tree.notes.extend(notes)
        shown = self._open(item)
        if shown is None or (not shown[1] and not shown[3]):
            return self._object(path, kind_of(item), self._inert(item))
        if shown[0] in ("list", "tuple", "set", "frozenset") and all(type(child) in _SCALARS for child in shown[2]):
            return self._object(path, shown[0], self._inert(item))
        return self._container(path, value, shown, above, pending)

    def _object(self, path: Path, kind: str, value: object) -> ObjectEntry:
        entry = self._tree.objects[path] = ObjectEntry(path, kind, value)
        return entry

    def _container(self, path: Path, item: object, shown: Opened, above: Above, pending: list[_Task]) -> Node:
        kind, keys, values, attributes, cls = shown
        if self._returns(path, item, above):
            return self._object(path, "opaque", Opaque("builtins", "reference", (kind, cls)))
        self._guard(path, item, len(keys))
        keys = [key if type(key) in _SCALARS else self._key(key) for key in keys]
        if self._alike is None and any(type(key) is int and not 0 <= key < _MODULUS for key in keys):
            self._alike = {}
        children: list[Node] = [self._tree.root] * len(keys)
        facts = {name: self._inert(value) for name, value in attributes.items()}
        node = Container(kind, keys, children, type=cls, attributes=facts)
        here = (id(item), above)
        parts = components(keys)
        pending.extend(((*path, parts[i]), values[i], children, i, here) for i in range(len(keys) - 1, -1, -1))
        return node

    def _guard(self, path: Path, item: object, size: int) -> None:
        """Refuse great depth, and small pickles whose shared containers unfold without end."""
        self._limits.check("depth", len(path), "containers are nested too deeply", path=self._path)
        self._count(item, size)

    def _count(self, item: object, size: int) -> None:
        self._visits += size + 1
        if id(item) not in self._containers:
            self._containers[id(item)] = item
            self._distinct += size + 1
        self._limits.check("nodes", self._visits, "too many values in containers", path=self._path)
        # A container that stands in two places is shown in both; many that hold each other twice would never end.
        most = 16 * self._distinct + 100_000
        if self._visits > most:
            raise LimitExceeded("shared containers unfold without end", limit="nodes", most=most, path=self._path)

    def _returns(self, path: Path, item: object, above: Above) -> bool:
        """Whether the container is one of those above it: objects know their parents, plain containers are refused."""
        through_object = isinstance(item, Opaque)
        while above is not None:
            through_object = through_object or isinstance(self._containers[above[0]], Opaque)
            if above[0] == id(item):
                if not through_object:
                    raise CorruptFile(f"the container '{dotted(path)}' contains itself", path=self._path)
                return True
            above = above[1]
        return False

    def _count_alike(self, path: Path, alike: dict[int, int]) -> None:
        mark = hash(path)
        alike[mark] = alike.get(mark, 0) + 1
        if alike[mark] > _MOST_ALIKE:
            raise CorruptFile("keys are chosen to be found slowly", path=self._path, key=dotted(path))

    def _key(self, key: object) -> object:
        """A key that is neither a text nor a number, as an inert value that a mapping can have."""
        made = self._inert(key)
        if isinstance(made, TensorEntry):
            return Opaque("torch", "Tensor", (made,))
        try:
            hash(made)
        except TypeError:
            return Opaque("builtins", type(made).__name__, (made,))
        return made

    def _open(self, item: object) -> Opened | None:
        shown = opened(item)
        if shown is None or not isinstance(item, Opaque) or not item.pairs:
            return shown
        # The pairs of one object are one list, wherever the object stands: what is new each time would never be shared.
        pairs = self._pairs.setdefault(id(item), shown[2][-1])  # type: ignore[arg-type]
        return (shown[0], shown[1], [*shown[2][:-1], pairs], shown[3], shown[4])

    # ---------------------------------------------------------------- tensors

    def _placed(self, path: Path, entry: TensorEntry) -> TensorEntry:
        """A finished entry at its path."""
        for part in (entry, *entry.parts.values()):
            if part.view is not None:
                self._used[part.view.storage.id] = part.view.storage
        parts = {name: part._replace(path=(*path, name)) for name, part in entry.parts.items()}
        return entry._replace(path=path, parts=parts or _NO_PARTS)

    def _tensor(self, path: Path, record: TensorRecord, depth: int = 0) -> TensorEntry:
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
            parts, attributes = self._facts(path, record, depth)
        hidden = record.stride if view is None and len(record.stride) == len(record.shape) else None
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
            memory_stride=None if hidden is None or hidden == packed_stride(record.shape) else hidden,
        )

    def _facts(
        self, path: Path, record: TensorRecord, depth: int
    ) -> tuple[Mapping[str, TensorEntry], Mapping[str, object]]:
        """The tensors that belong to a tensor, and its other attributes."""
        parts = dict(record.parts)
        plain: dict[str, object] = {}
        for name, part in parts.items():
            if part.parts:
                raise Unsupported(f"part '{name}' is itself made of parts", path=self._path, key=dotted(path))
        for name, value in record.attributes.items():
            bare = isinstance(value, TensorRecord) and not value.parts and not value.attributes
            if bare and depth == 0 and name not in parts:
                parts[name] = value  # type: ignore[assignment]
            else:
                plain[name] = self._inert(value, depth + 1)
        return {name: self._tensor((*path, name), part, depth + 1) for name, part in parts.items()}, plain

    def _storage(self, ref: StorageRef) -> Storage:
        if ref.data is None:
            storage = self._storage_of(ref)
        else:
            storage = self._in_memory(ref.data, "little", ref.key)
        self._used[storage.id] = storage
        return storage

    def _in_memory(self, data: object, byteorder: str, name: str) -> Storage:
        """The storage of bytes that lie inside the pickle; the same object gives the same one."""
        # CPython has one object for all bytes of one length 1 and value, so those say nothing.
        known = isinstance(data, Blob) or len(data) > 1  # type: ignore[arg-type]
        found = self._memory.get(id(data)) if known else None
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
        self._count(value, 0)
        down = depth + 1
        if isinstance(value, dict):
            pairs = [(self._inert(key, down), self._inert(item, down)) for key, item in value.items()]
            return hashed(dict_like(value), pairs, kind.__name__)
        if kind in (list, tuple):
            return kind(self._inert(item, down) for item in value)  # type: ignore[attr-defined]
        if kind in (set, frozenset):
            return hashed(kind, [self._inert(item, down) for item in value], kind.__name__)  # type: ignore[attr-defined]
        if isinstance(value, Opaque):
            made = Opaque(value.module, value.name, self._inert(value.args, down), self._inert(value.state, down))
            made.items = [self._inert(item, down) for item in value.items]
            made.pairs = [(self._inert(key, down), self._inert(item, down)) for key, item in value.pairs]
            return made
        if isinstance(value, Global):
            return Opaque(value.module, value.name, None)
        if isinstance(value, (TensorRecord, StorageRef)):
            record = value if isinstance(value, TensorRecord) else of_storage(value)
            return self._within(self._tensor((), record, down))
        if isinstance(value, NumpyDType):
            return Opaque("numpy", "dtype", (letters_of(value),))
        if isinstance(value, ArrayRecord):
            return Opaque("numpy", "ndarray", (value.shape, letters_of(value.dtype)), self._inert(value.data, down))
        return value

    def _within(self, entry: TensorEntry) -> TensorEntry:
        """A tensor inside a value, which no path leads to: the manifest's own check doesn't come to it."""
        for part in (entry, *entry.parts.values()):
            view = part.view
            if view is not None:
                length = reach(part.shape, view.stride)
                if length and part.dtype.nbytes(view.offset + length) > view.storage.nbytes:
                    raise CorruptFile("a tensor inside an attribute reaches outside its storage", path=self._path)
        return entry
