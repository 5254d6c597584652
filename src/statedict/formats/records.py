"""What the interpreter of pickles builds instead of the objects that a file names: inert records.

They are the interpreter's own, and mutable, because a pickle fills an object after making it. ``value_tree`` turns them
into the entries of a manifest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from statedict.dtypes import DType

__all__ = [
    "ArrayRecord",
    "Blob",
    "Builder",
    "Global",
    "MappingRecord",
    "NumpyDType",
    "StorageRef",
    "TensorRecord",
    "Unfit",
    "shown",
]


# Shared by all records without any: 100,000 tensors would otherwise make 300,000 empty dicts.
_NOTHING: Mapping[str, Any] = {}


class Unfit(Exception):
    """Arguments that a constructor doesn't understand: the object becomes an opaque record."""


def shown(value: object) -> str:
    """A value of a file for a message: a number or short text as it is, else its type.

    Never walks a container: one of a few bytes may hold another 2**60 times over, or be 100,000 deep.
    """
    if value is None or isinstance(value, (bool, int, float)):
        return repr(value)
    if isinstance(value, (str, bytes)):
        return repr(value[:100])
    return value.type if isinstance(value, Global) else f"a {type(value).__name__}"


Builder = Callable[[tuple[object, ...]], object]


class Global:
    """A name that the pickle looks up: a class or a function. Nothing is imported; ``build`` is our own, if any."""

    __slots__ = ("build", "copies", "module", "name", "offset")

    def __init__(self, module: str, name: str, offset: int, build: Builder | None, copies: bool = False) -> None:
        self.module = module
        self.name = name
        self.offset = offset  # of the instruction, in the pickle's own file
        self.build = build
        self.copies = copies  # `build` takes as long as its arguments are

    @property
    def type(self) -> str:
        """The dotted name."""
        return f"{self.module}.{self.name}"

    def __repr__(self) -> str:
        return f"Global({self.type})"


class Blob(NamedTuple):
    """Bytes of a pickle that stay in its file because they are many: where, and how many."""

    offset: int
    nbytes: int


class StorageRef:
    """A persistent id: which storage, of which dtype, how many elements, on which device it was."""

    __slots__ = ("data", "device", "dtype", "key", "numel", "view_offset")

    def __init__(self, key: str, dtype: DType, numel: int, device: str, view_offset: int = 0) -> None:
        self.key = key
        self.dtype = dtype
        self.numel = numel  # elements; bytes where an element is smaller than one
        self.device = device
        self.view_offset = view_offset  # elements into the root storage (torch 0.3 and before)
        self.data: bytes | Blob | None = None  # set where the bytes are inside the pickle

    @property
    def nbytes(self) -> int:
        """Bytes of the storage. Where an element is smaller than a byte, torch's storages count bytes."""
        return self.numel * (self.dtype.itemsize or 1)

    def __repr__(self) -> str:
        return f"StorageRef({self.key!r}, {self.dtype} ×{self.numel})"


class TensorRecord:
    """A tensor that a rebuild function would make."""

    __slots__ = (
        "attributes",
        "bits",
        "device",
        "dtype",
        "kind",
        "layout",
        "offset",
        "parts",
        "requires_grad",
        "shape",
        "storage",
        "stride",
    )

    def __init__(
        self,
        storage: StorageRef | None,
        dtype: DType,
        offset: int,
        shape: tuple[int, ...],
        stride: tuple[int, ...],
        requires_grad: bool = False,
        bits: str = "",
    ) -> None:
        self.storage = storage
        self.dtype = dtype
        self.offset = offset
        self.shape = shape
        self.stride = stride
        self.requires_grad = requires_grad
        self.bits = bits
        self.kind = "Tensor"
        self.layout = "strided"
        self.parts: Mapping[str, TensorRecord] = _NOTHING
        self.attributes: Mapping[str, object] = _NOTHING
        self.device: str | None = None  # where it differs from the storage's


class NumpyDType:
    """A numpy dtype: its letters without the byte order, and the byte order."""

    __slots__ = ("byteorder", "dtype", "letters", "structured")

    def __init__(self, letters: str, dtype: DType | None) -> None:
        self.letters = letters
        self.dtype = dtype  # None for objects, texts, records …
        self.byteorder = "little"
        self.structured = False

    def __repr__(self) -> str:
        return f"NumpyDType({self.letters})"


class ArrayRecord:
    """A numpy array: filled by BUILD, or complete at once (``_frombuffer``)."""

    __slots__ = ("data", "dtype", "fortran", "kind", "shape", "torch_dtype")

    def __init__(self, kind: str = "ndarray") -> None:
        self.kind = kind
        self.dtype: NumpyDType | None = None
        self.shape: tuple[int, ...] = ()
        self.fortran = False
        self.data: object = b""
        self.torch_dtype: DType | None = None  # of a device's tensor that was saved as an array


class MappingRecord(dict[object, object]):
    """A mapping or record that is no plain dict: its kind, and what was set on it as attributes."""

    __slots__ = ("attributes", "kind", "type")

    def __init__(self, kind: str, type: str = "") -> None:
        self.kind = kind
        self.type = type
        self.attributes: Mapping[str, object] = _NOTHING
