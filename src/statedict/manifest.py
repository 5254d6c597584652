"""The nouns: a checkpoint is a manifest over byte ranges.

A ``Manifest`` says what a file or folder holds and where its bytes lie. Nothing in this module reads a file. The two nouns
that read, ``LazyTensor`` and ``Checkpoint``, live in ``checkpoint.py``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from struct import unpack
from typing import NamedTuple, Union

from statedict.dtypes import BY_NUMPY, DType
from statedict.errors import CorruptFile
from statedict.keys import Path, dotted
from statedict.limits import DEFAULT_LIMITS, Limits
from statedict.views import packed_stride, reach

__all__ = [
    "Container",
    "Extent",
    "FileFact",
    "Finding",
    "Manifest",
    "Node",
    "NumpyScalar",
    "ObjectEntry",
    "Opaque",
    "Storage",
    "StorageView",
    "TensorEntry",
    "TorchValue",
    "tied_groups",
]


class FileFact(NamedTuple):
    """One file of a checkpoint: its path as given, and its size in bytes."""

    path: str
    nbytes: int


class Extent(NamedTuple):
    """A range of bytes of one file, as they are stored."""

    file: int  # index into the manifest's files
    offset: int  # bytes from the start of the file
    nbytes: int  # bytes in the file, still wrapped
    codec: str = "raw"  # "raw", or "deflate" (RFC 1951, no header)


class Storage(NamedTuple):
    """A run of bytes that tensors are views of; what torch calls an untyped storage.

    The bytes are ``data`` where they are in memory, else those of ``extent``, else there are none (meta tensors).
    """

    id: int  # unique in its manifest; tied tensors have views with the same one
    nbytes: int  # bytes, unwrapped
    extent: Extent | None = None
    data: bytes | memoryview | None = None
    byteorder: str = "little"
    crc: int | None = None  # CRC-32 of the unwrapped bytes; None where none was computed
    name: str = ""  # what the file calls it, for messages
    digest: str | None = None  # "xxh3-128:…" of the unwrapped bytes, where the file records one

    def __repr__(self) -> str:
        where = self.extent if self.extent is not None else "memory" if self.data is not None else "nowhere"
        return f"Storage({self.id}, {self.nbytes} bytes, {where})"


class StorageView(NamedTuple):
    """A tensor as a view of a storage. Offset and strides count elements."""

    storage: Storage
    offset: int
    stride: tuple[int, ...]
    bits: str = ""  # "c" conjugate and "n" negative, still to be applied to the values


class TensorEntry(NamedTuple):
    """One tensor: what it is, and the view that holds it.

    ``view`` is None where there are no bytes of its own: meta tensors, and layouts made of ``parts``.
    """

    path: Path
    dtype: DType
    shape: tuple[int, ...]
    view: StorageView | None
    layout: str = "strided"  # or "sparse_coo", "sparse_csr", …, "quantized", "nested", "wrapper"
    parts: Mapping[str, TensorEntry] = {}  # the named tensors that such a layout is made of
    device: str | None = "cpu"  # the tag that the file holds; None where the format has none
    requires_grad: bool | None = None  # None where the format doesn't say
    kind: str = "Tensor"  # "Parameter", "ndarray", or the class that the file names
    attributes: Mapping[str, object] = {}  # facts that belong to it, inert: quantizer, Python attributes
    digest: str | None = None  # "xxh3-128:…" of the packed little-endian bytes, where the file records one
    memory_stride: tuple[int, ...] | None = None  # its strides in memory, where the file holds it in another order

    def __repr__(self) -> str:
        return f"TensorEntry({self.key!r}, {self.dtype}, {list(self.shape)})"

    @property
    def key(self) -> str:
        """The path as people write it."""
        return dotted(self.path)

    @property
    def stride(self) -> tuple[int, ...]:
        """Elements from one index to the next along each dimension, as the tensor was in memory."""
        if self.memory_stride is not None:
            return self.memory_stride
        return self.view.stride if self.view is not None else packed_stride(self.shape)

    @property
    def numel(self) -> int:
        """Elements that the shape counts."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the values, packed; of all parts where the layout has parts."""
        if self.parts and self.view is None:
            return sum(part.nbytes for part in self.parts.values())
        return self.dtype.nbytes(prod(self.shape))


class ObjectEntry(NamedTuple):
    """One leaf that is no tensor. The value is inert: building it ran nothing."""

    path: Path
    kind: str  # "int", "str", "datetime", "opaque", …
    value: object

    def __repr__(self) -> str:
        return f"ObjectEntry({self.key!r}, {self.kind})"

    @property
    def key(self) -> str:
        """The path as people write it."""
        return dotted(self.path)


class Opaque:
    """The record of an object that nobody builds: which class the file names, and what it would be given.

    ``args`` and ``state`` are inert values, further records, and tensors (as entries) among them.
    """

    __slots__ = ("args", "items", "module", "name", "pairs", "state")

    def __init__(self, module: str, name: str, args: object = (), state: object = None) -> None:
        self.module = module
        self.name = name
        self.args = args
        self.state = state
        self.items: list[object] = []  # what would be appended, if it is a list
        self.pairs: list[tuple[object, object]] = []  # what would be set, if it is a mapping

    @property
    def type(self) -> str:
        """The dotted name of the class or function."""
        return f"{self.module}.{self.name}"

    def __repr__(self) -> str:
        return f"Opaque({self.type})"


class TorchValue(NamedTuple):
    """A value of torch's that is no tensor: a dtype, device, size, layout, qscheme or memory format."""

    kind: str  # "dtype" | "device" | "Size" | "layout" | "qscheme" | "memory_format"
    value: object  # a str, or a tuple of int for Size

    def __repr__(self) -> str:
        return f"torch.{self.kind}({self.value!r})"


_STRUCT = {"F64": "<d", "F32": "<f", "F16": "<e", "BOOL": "<?", "C64": "<2f", "C128": "<2d"}


class NumpyScalar(NamedTuple):
    """One number of numpy's: its dtype in numpy's letters, and its bytes in little-endian order."""

    dtype: str
    data: bytes
    value: object  # the number as Python's own, where Python has one

    @classmethod
    def of(cls, letters: str, data: bytes) -> NumpyScalar:
        """The number in these bytes. Raises ``ValueError`` if they are not those of one number of that dtype."""
        dtype = BY_NUMPY.get(letters)
        if dtype is None or len(data) != dtype.itemsize:
            raise ValueError(f"{len(data)} bytes are no number of numpy's type {letters}")
        if dtype.kind in ("int", "uint"):
            return cls(letters, data, int.from_bytes(data, "little", signed=dtype.kind == "int"))
        values = unpack(_STRUCT[dtype.code], data) if dtype.code in _STRUCT else (None,)
        return cls(letters, data, complex(*values) if len(values) == 2 else values[0])

    def __repr__(self) -> str:
        return f"numpy.{self.dtype}({self.value!r})"


class Container:
    """A nested value: dict, list, tuple and their kin. The leaves of the tree are entries.

    ``keys`` are the keys themselves (of any inert type) for mappings; the positions for sequences. ``type`` is the
    class that the file names, where it isn't a plain one. ``attributes`` are facts about the container itself, such as
    the ``_metadata`` of a state dict.
    """

    __slots__ = ("attributes", "children", "keys", "kind", "type")

    def __init__(
        self,
        kind: str,
        keys: Sequence[object],
        children: Sequence[Node],
        *,
        type: str = "",
        attributes: Mapping[str, object] | None = None,
    ) -> None:
        self.kind = kind
        self.keys = keys
        self.children = children
        self.type = type
        self.attributes = attributes or {}

    def __repr__(self) -> str:
        return f"Container({self.type or self.kind}, {len(self.children)} children)"


Node = Union[Container, TensorEntry, ObjectEntry]


class Finding(NamedTuple):
    """Something that a person should know: a code for programs, a sentence for people."""

    code: str
    level: str  # "info" | "warning" | "error"
    message: str
    keys: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, object]:
        """The finding, JSON-ready."""
        return {"code": self.code, "level": self.level, "message": self.message, "keys": list(self.keys)}


class Manifest(NamedTuple):
    """Everything that a file or folder holds, and where its bytes lie."""

    format: str
    files: tuple[FileFact, ...]
    storages: tuple[Storage, ...]
    tensors: Mapping[Path, TensorEntry]
    objects: Mapping[Path, ObjectEntry]
    structure: Node
    metadata: Mapping[str, str] = {}  # the texts that its writer gave it
    notes: tuple[Finding, ...] = ()
    container: Mapping[str, str] = {}  # what the container says of itself: version, byte order …

    def __repr__(self) -> str:
        return f"Manifest({self.format}, {len(self.tensors)} tensors, {len(self.objects)} objects)"

    def validate(self, limits: Limits = DEFAULT_LIMITS) -> Manifest:
        """This manifest, once every range is inside its file and every view inside its storage.

        Raises ``CorruptFile`` or ``LimitExceeded`` for the first one that isn't. Reads nothing, allocates nothing.
        """
        limits.check("nodes", len(self.tensors) + len(self.objects), "too many tensors and objects", path=self._path)
        for storage in self.storages:
            self._check_storage(storage)
        reaches: dict[tuple[object, object], int] = {}
        for entry in self.tensors.values():
            for part in (entry, *entry.parts.values()) if entry.parts else (entry,):
                if part.view is not None:
                    self._check_view(part, entry, reaches)
        return self

    @property
    def _path(self) -> str | None:
        return self.files[0].path if self.files else None

    def _check_storage(self, storage: Storage) -> None:
        extent = storage.extent
        if extent is None:
            return
        file = self.files[extent.file]
        if extent.offset < 0 or extent.nbytes < 0 or extent.offset + extent.nbytes > file.nbytes:
            raise CorruptFile(
                f"the bytes of storage '{storage.name}' end outside the file",
                path=file.path,
                offset=extent.offset,
                expected=f"{extent.nbytes} bytes",
                found=f"{max(0, file.nbytes - extent.offset)}",
                hint="The file was cut short: download or copy it again",
            )
        if extent.codec == "raw" and extent.nbytes != storage.nbytes:
            raise CorruptFile(
                f"storage '{storage.name}' has another size than its record",
                path=file.path,
                offset=extent.offset,
                expected=f"{storage.nbytes} bytes",
                found=f"{extent.nbytes}",
            )

    def _check_view(self, part: TensorEntry, entry: TensorEntry, reaches: dict[tuple[object, object], int]) -> None:
        view = part.view
        assert view is not None
        geometry = (part.shape, view.stride)
        length = reaches.get(geometry)
        if length is None:
            if len(view.stride) != len(part.shape) or (part.shape and (min(part.shape) < 0 or min(view.stride) < 0)):
                raise self._bad(entry, part, "its shape and strides make no tensor")
            length = reaches[geometry] = reach(part.shape, view.stride)
        if view.offset < 0 or (length and part.dtype.nbytes(view.offset + length) > view.storage.nbytes):
            raise self._bad(entry, part, "it reaches outside its storage")

    def _bad(self, entry: TensorEntry, part: TensorEntry, what: str) -> CorruptFile:
        view = part.view
        assert view is not None
        return CorruptFile(
            f"a tensor can't be what it claims: {what}",
            path=self._path,
            key=entry.key,
            offset=view.storage.extent.offset if view.storage.extent else None,
            expected=f"a view inside storage '{view.storage.name}' of {view.storage.nbytes} bytes",
            found=f"{part.dtype} shape {list(part.shape)} stride {list(view.stride)} offset {view.offset}",
        )


def tied_groups(tensors: Mapping[Path, TensorEntry]) -> list[tuple[Path, ...]]:
    """The paths of tensors that show the very same elements of one storage, in groups of two or more.

    Same storage, offset, shape, strides and dtype. Empty tensors are tied to nothing.
    """
    numbers = [entry.view.storage.id for entry in tensors.values() if entry.view is not None]
    if len(set(numbers)) == len(numbers):
        return []  # the usual case: each has a storage of its own
    groups: dict[tuple[object, ...], list[Path]] = {}
    for path, entry in tensors.items():
        view = entry.view
        if view is not None and view.storage.nbytes:
            groups.setdefault((view.storage.id, view.offset, entry.shape, view.stride, entry.dtype.code), []).append(
                path
            )
    return [tuple(paths) for paths in groups.values() if len(paths) > 1]
