"""A nested value in memory as a checkpoint: tensors of torch, numpy arrays, lazy tensors, and everything beside them.

Nothing is copied: the storages of the manifest are views of the memory that the tensors have, so that tied tensors and
overlapping views are seen as such. Neither torch nor numpy is imported here: a value of theirs brings its own.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

from statedict import bridge
from statedict.dtypes import BY_NUMPY, BY_TORCH, DType
from statedict.errors import Unsupported
from statedict.formats.records import MappingRecord
from statedict.formats.value_tree import TreeBuilder
from statedict.io.ranges import File
from statedict.limits import Limits
from statedict.manifest import (
    Extent,
    FileFact,
    Manifest,
    NumpyScalar,
    Opaque,
    Storage,
    StorageView,
    TensorEntry,
    TorchValue,
)

__all__ = ["Gathered", "is_foreign", "is_source", "manifest_of"]

# Types that are values as they are.
_PLAIN = frozenset(
    {type(None), bool, int, float, complex, str, bytes, bytearray, dict, list, tuple, set, frozenset, slice, range}
)
_PLAIN_MODULES = frozenset({"datetime", "decimal"})
_MAPPINGS = {
    ("collections", "OrderedDict"): "OrderedDict",
    ("collections", "Counter"): "Counter",
    ("collections", "defaultdict"): "defaultdict",
}

# What a lazy tensor is: its entry, and the files that it is read from. None for another value.
Lazy = Callable[[object], "tuple[TensorEntry, tuple[File, ...]] | None"]


class Gathered:
    """The storages and files that were met: the same memory gives the same storage."""

    def __init__(self, *, still: bool = False) -> None:
        """``still`` says that the memory won't change until all of it was read: devices may be read ahead."""
        self.files: list[File] = []
        self._numbers: dict[int, int] = {}  # of the files, by their id
        self._shared: dict[object, Any] = {"still": still}  # what the readers of several storages use together
        self._storages: dict[object, Storage] = {}
        self._alive: list[object] = []  # what the storages' memory belongs to

    def storage(self, key: object, owner: object, make: Callable[[dict[object, Any]], tuple[Any, str]]) -> Storage:
        """The storage of that key. ``make`` gives its bytes and byte order when it is met first: memory of the CPU, or a file
        that reads the memory of another device; it may keep what several of those share in the dict that it is given.
        """
        found = self._storages.get(key)
        if found is None:
            data, byteorder = make(self._shared)
            number = len(self._storages)
            self._alive.append(owner)
            if hasattr(data, "read_into"):
                extent = Extent(self._number(data), 0, data.nbytes)
                found = Storage(number, data.nbytes, extent, None, byteorder, None, data.path)
            else:
                view = memoryview(data).cast("B")
                found = Storage(number, view.nbytes, None, view, byteorder, None, "memory")
            self._storages[key] = found
        return found

    def moved(self, entry: TensorEntry, files: tuple[File, ...]) -> TensorEntry:
        """A tensor of another checkpoint: its storages and files get numbers of this one."""
        view = entry.view
        if view is not None:
            view = view._replace(storage=self._moved_storage(view.storage, files))
        parts = {name: self.moved(part, files) for name, part in entry.parts.items()}
        return entry._replace(view=view, parts=parts)

    def _moved_storage(self, storage: Storage, files: tuple[File, ...]) -> Storage:
        key = (id(files[storage.extent.file]) if storage.extent is not None else id(storage.data), storage.id)
        found = self._storages.get(key)
        if found is None:
            extent = storage.extent
            if extent is not None:
                extent = extent._replace(file=self._number(files[extent.file]))
            self._alive.append(storage)
            found = self._storages[key] = storage._replace(id=len(self._storages), extent=extent)
        return found

    def _number(self, file: File) -> int:
        number = self._numbers.setdefault(id(file), len(self.files))
        if number == len(self.files):
            self.files.append(file)
        return number


def is_source(value: object) -> bool:
    """Whether a value can be opened as a checkpoint: a mapping, or a module of torch's."""
    return isinstance(value, Mapping) or bridge.is_module(value)


def manifest_of(value: object, limits: Limits, lazy: Lazy, *, still: bool = False) -> tuple[Manifest, list[File]]:
    """The manifest of a nested value, and the files that its lazy tensors are read from.

    A module stands for its state dict. Objects of unknown classes become inert records of their attributes. Raises
    ``Unsupported`` for tensors whose memory can't be seen, ``CorruptFile`` for a container that contains itself.
    """
    gathered = Gathered(still=still)
    root = bridge.state_dict(value) if bridge.is_module(value) else value
    tree = TreeBuilder(_no_storage, limits, path="memory", adapt=_Adapter(gathered, lazy)).build(root)
    facts = tuple(FileFact(file.path, file.nbytes) for file in gathered.files)
    manifest = Manifest("memory", facts, tuple(tree.storages), tree.tensors, tree.objects, tree.root)
    return manifest, gathered.files


def is_foreign(value: object) -> bool:
    """Whether a value that is no container would become a record: an object of a class that nobody builds on loading."""
    if bridge.is_tensor(value) or isinstance(value, Opaque):
        return False
    return isinstance(_Adapter(Gathered(), lambda item: None)(value), Opaque)


def _no_storage(ref: object) -> Storage:
    raise Unsupported("a value in memory names a storage of a file")


class _Adapter:
    """Turns each value into an inert one: what the interpreter of pickles would have made of it."""

    def __init__(self, gathered: Gathered, lazy: Lazy) -> None:
        self._gathered = gathered
        self._lazy = lazy

    def __call__(self, value: object) -> object:
        kind = type(value)
        if kind in _PLAIN or isinstance(value, (MappingRecord, Opaque, TorchValue, NumpyScalar, TensorEntry)):
            return value
        lazy = self._lazy(value)
        if lazy is not None:
            return self._gathered.moved(*lazy)
        if bridge.is_tensor(value):
            return bridge.entry_of(value, self._gathered.storage)
        module, name = kind.__module__.partition(".")[0], kind.__name__
        if module == "numpy" or hasattr(value, "__array_interface__"):
            found = self._numpy(value)
            if found is not None:
                return found
        if module == "torch":
            found = bridge.small_value(value)
            if found is not None:
                return found
        if module in _PLAIN_MODULES or value is Ellipsis or value is NotImplemented:
            return value
        return self._object(value, kind, module, name)

    def _object(self, value: Any, kind: type, module: str, name: str) -> object:
        mapping = _MAPPINGS.get((kind.__module__, name))
        if mapping is not None or (kind.__module__, name) in (("argparse", "Namespace"), ("types", "SimpleNamespace")):
            return _mapping(value, mapping or "Namespace", kind)
        if module == "pathlib":
            import pathlib

            return pathlib.PurePosixPath(value) if "Windows" not in name else pathlib.PureWindowsPath(value)
        if isinstance(value, str) and not hasattr(value, "_value_"):
            return str(value)  # a TorchVersion, for example
        return _opaque(value, kind)

    # ---------------------------------------------------------------- numpy, by what its values say of themselves

    def _numpy(self, value: Any) -> object:
        if not hasattr(value, "__array_interface__"):
            return None
        dtype = _dtype_of(value.dtype)
        if dtype is None:
            return Opaque("numpy", "ndarray", (tuple(value.shape), str(value.dtype)))
        if not hasattr(value, "__setitem__") or type(value).__name__ != "ndarray":
            # One number: a scalar has the interface of an array of no dimensions.
            return (
                NumpyScalar.of(value.dtype.str.lstrip("<>=|"), value.tobytes()) if dtype.numpy[:1] in "<ui?" else None
            )
        return self._array(value, dtype)

    def _array(self, array: Any, dtype: DType) -> TensorEntry:
        owner = array
        while type(getattr(owner, "base", None)) is type(array):
            owner = owner.base
        flat = owner.T if owner.flags.f_contiguous and not owner.flags.c_contiguous else owner
        simple = flat.flags.c_contiguous and all(
            stride % array.itemsize == 0 and stride >= 0 for stride in array.strides
        )
        if not simple or flat.dtype.itemsize == 0:
            owner = flat = array.copy(order="C")
            array = owner
        byteorder = "big" if array.dtype.str.startswith(">") else "little"
        storage = self._gathered.storage(
            id(owner), owner, lambda shared: (flat.reshape(-1).view("u1") if flat.size else b"", byteorder)
        )
        first = array.__array_interface__["data"][0] - owner.__array_interface__["data"][0] if array.size else 0
        stride = tuple(step // array.itemsize for step in array.strides)
        view = StorageView(storage, first // array.itemsize, stride)
        return TensorEntry((), dtype, tuple(array.shape), view, device=None, requires_grad=None, kind="ndarray")


def _dtype_of(dtype: Any) -> DType | None:
    """The dtype of a numpy array; ml_dtypes' are known by their names."""
    if dtype.type.__module__.startswith("ml_dtypes"):
        return BY_TORCH.get(dtype.name)
    return BY_NUMPY.get(dtype.str.lstrip("<>=|")) if dtype.names is None else None


def _mapping(value: Any, kind: str, cls: type) -> MappingRecord:
    name = f"{cls.__module__}.{cls.__name__}" if kind == "Namespace" else ""
    record = MappingRecord(kind, name)
    record.update(vars(value) if kind == "Namespace" else value)
    if kind == "OrderedDict" and isinstance(value, OrderedDict):
        record.attributes = dict(getattr(value, "__dict__", {}))
    return record


def _opaque(value: Any, kind: type) -> Opaque:
    """The record of an object of any class: its attributes, or its items if it is a tuple, list or mapping."""
    if isinstance(value, type) or (callable(value) and hasattr(value, "__qualname__")):
        return Opaque(str(value.__module__), str(value.__qualname__), None)
    made = Opaque(kind.__module__, kind.__qualname__)
    if hasattr(value, "_value_"):
        made.args = (value._value_,)
    elif isinstance(value, (tuple, set, frozenset)):
        made.args = tuple(value)
    elif isinstance(value, Mapping):
        made.pairs = list(value.items())
    elif isinstance(value, list):
        made.items = list(value)
    elif hasattr(value, "__dict__"):
        made.state = dict(vars(value))
    return made
