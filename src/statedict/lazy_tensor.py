"""A tensor of a checkpoint that is read when it is asked for, and only as far as it is."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import TYPE_CHECKING, Any, Protocol

from statedict.errors import LimitExceeded, StateDictError, Unsupported
from statedict.io.ranges import BLOCK_NBYTES
from statedict.io.storages import StorageReader
from statedict.limits import Limits
from statedict.manifest import TensorEntry
from statedict.views import boxes, is_packed, sliced

if TYPE_CHECKING:
    import torch

    from statedict.numerics.arrays import Array

__all__ = ["LazyTensor", "Origin"]

# A tensor whose elements lie scattered is gathered in pieces of this size: each piece may walk its whole storage.
_SCATTERED_NBYTES = 64 * 1024 * 1024


class Origin(Protocol):
    """What a lazy tensor is read through: the checkpoint that it belongs to."""

    source: str
    limits: Limits
    reader: StorageReader

    def tied_with(self, entry: TensorEntry) -> tuple[str, ...]:
        """The other keys of the very same tensor."""


class LazyTensor:
    """A tensor of a checkpoint whose bytes are read when they are asked for, and only those.

    Slicing gives another ``LazyTensor``; ``numpy()`` and ``read()`` read. Nothing is cached.
    """

    __slots__ = ("entry", "origin")

    def __init__(self, entry: TensorEntry, origin: Origin) -> None:
        self.entry = entry
        self.origin = origin

    @property
    def shape(self) -> tuple[int, ...]:
        """Elements along each dimension."""
        return self.entry.shape

    @property
    def dtype(self) -> str:
        """As torch spells it, without the prefix: ``float32``, ``bfloat16``, ``float8_e4m3fn``."""
        return self.entry.dtype.torch

    @property
    def nbytes(self) -> int:
        """Bytes of the values, packed; for sparse and quantised tensors those of all their parts."""
        return self.entry.nbytes

    @property
    def numel(self) -> int:
        """Elements that the shape counts."""
        return self.entry.numel

    @property
    def device(self) -> str | None:
        """The device that the file names (``cuda:0``); None where its format has none."""
        return self.entry.device

    @property
    def requires_grad(self) -> bool | None:
        """As the file has it; None where its format doesn't say."""
        return self.entry.requires_grad

    @property
    def stride(self) -> tuple[int, ...]:
        """Elements from one index to the next along each dimension, as the tensor was in memory."""
        return self.entry.stride

    @property
    def layout(self) -> str:
        """``strided``, or what the tensor's parts make: ``sparse_coo``, ``quantized``, ``nested`` …"""
        return self.entry.layout

    @property
    def parts(self) -> dict[str, LazyTensor]:
        """The tensors that a sparse, quantised or nested one is made of, by name; none for a strided one."""
        return {name: LazyTensor(part, self.origin) for name, part in self.entry.parts.items()}

    @property
    def tied_with(self) -> tuple[str, ...]:
        """The other keys that show the very same elements."""
        return self.origin.tied_with(self.entry)

    def __len__(self) -> int:
        if not self.shape:
            raise TypeError("a tensor without dimensions has no length")
        return self.shape[0]

    def __repr__(self) -> str:
        return f"LazyTensor({self.entry.key!r}, {self.dtype}, {list(self.shape)})"

    def __getitem__(self, index: object) -> LazyTensor:
        """A part of the tensor, by integers, slices with a positive step, and ``...``; nothing is read yet."""
        entry = self.entry
        if entry.view is None or entry.dtype.bits % 8:
            raise self._unsupported("can't be sliced", "Read it whole, or slice its parts")
        offset, shape, stride = sliced(entry.shape, entry.view.stride, index)
        view = entry.view._replace(offset=entry.view.offset + offset, stride=stride)
        return LazyTensor(entry._replace(shape=shape, view=view, digest=None, memory_stride=None), self.origin)

    def read(self, out: Any = None) -> memoryview:
        """The values as packed little-endian bytes in reading order, in ``out`` if it is given.

        ``out`` is a writable buffer of exactly ``nbytes`` bytes. Without it, memory of its own is made. Reads the bytes of
        this tensor only (packed), else the ranges that its elements reach over.
        """
        buffer = memoryview(bytearray(self.nbytes) if out is None else out).cast("B")
        if buffer.nbytes != self.nbytes:
            raise StateDictError(
                "the buffer is of another size",
                key=self.entry.key,
                expected=f"{self.nbytes} bytes",
                found=buffer.nbytes,
            )
        if self.is_plain and self.numel:
            view = self._readable().view
            assert view is not None
            self.origin.reader.read_into(view.storage, self.plain_range()[0], buffer)
            return buffer
        done = 0
        for block in self.blocks():
            buffer[done : done + len(block)] = block
            done += len(block)
        return buffer

    def blocks(self, nbytes: int = BLOCK_NBYTES) -> Iterator[memoryview]:
        """The same bytes in pieces of whole elements, each valid until the next is asked for; memory stays bounded."""
        entry = self._readable()
        if not entry.numel:
            return
        if self.is_plain:
            yield from self._plain_blocks(entry, nbytes)
        else:
            yield from self._gathered_blocks(entry)

    @property
    def is_plain(self) -> bool:
        """Whether the values are one run of bytes of the storage, in order, ready to be copied."""
        view = self.entry.view
        if view is None or view.bits or not is_packed(self.shape, view.stride):
            return False
        return view.storage.byteorder == "little" or self.entry.dtype.swap == 1

    def plain_range(self) -> tuple[int, int]:
        """Offset and length of that run, in bytes of the storage. Only where ``is_plain``."""
        view = self.entry.view
        assert view is not None
        return self.entry.dtype.nbytes(view.offset), self.nbytes

    def _plain_blocks(self, entry: TensorEntry, nbytes: int) -> Iterator[memoryview]:
        assert entry.view is not None
        reader, storage = self.origin.reader, entry.view.storage
        first, total = self.plain_range()
        if storage.data is not None:
            yield memoryview(storage.data)[first : first + total]
            return
        buffer = memoryview(bytearray(min(nbytes, total)))
        for start in range(0, total, nbytes):
            piece = buffer[: min(nbytes, total - start)]
            reader.read_into(storage, first + start, piece)
            yield piece

    def _gathered_blocks(self, entry: TensorEntry) -> Iterator[memoryview]:
        """Pieces of a scattered tensor, cut along its first dimensions so that each fits."""
        from statedict.numerics.arrays import to_packed_bytes

        for index in _pieces(entry.shape, max(1, _SCATTERED_NBYTES // max(entry.dtype.itemsize, 1))):
            part = self[index] if entry.shape else self
            yield to_packed_bytes(part._gather())

    def numpy(self) -> Array:
        """The values as an array of its own memory, in reading order.

        bfloat16 and the eight-bit floats get ml_dtypes' types; ``float4_e2m1fn_x2`` stays pairs in ``uint8``; complex32
        becomes a structured array. Raises ``Unsupported`` for sparse, quantised, nested and meta tensors.
        """
        from statedict.numerics.arrays import array

        entry = self._readable()
        if not self.is_plain and entry.numel:
            return self._gather()
        return array(self.read(), entry.dtype, entry.shape)

    def torch(self) -> torch.Tensor:
        """The values as a tensor of torch's on the CPU, in memory of its own, with the strides that it had.

        Raises ``MissingDependency`` where torch isn't installed, ``Unsupported`` for what torch has no tensor of.
        """
        from statedict.bridge import to_torch

        return to_torch(self)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        made = self.numpy()
        return made if dtype is None else made.astype(dtype)

    def _gather(self) -> Array:
        """The values of a scattered tensor: read in file order in boxes, each put where it belongs."""
        from statedict.numerics.arrays import empty, gather

        entry = self.entry
        view, dtype = entry.view, entry.dtype
        assert view is not None
        out = empty(dtype, entry.shape)
        size = dtype.itemsize
        reader = self.origin.reader
        for box in boxes(entry.shape, view.stride, max(BLOCK_NBYTES // size, 1)):
            raw = reader.read(view.storage, (view.offset + box.offset) * size, box.reach * size)
            target = out[box.where] if entry.shape else out
            gather(raw, dtype, box.shape, box.stride, byteorder=view.storage.byteorder, bits=view.bits, out=target)
        return out

    def check_readable(self) -> None:
        """Raise ``Unsupported`` or ``LimitExceeded`` if the values can't be read; reads nothing."""
        self._readable()

    def _readable(self) -> TensorEntry:
        """The entry, once it is sure that its values can be read and don't unfold into more than is allowed."""
        entry = self.entry
        if entry.view is None:
            if entry.device == "meta":
                raise self._unsupported("has no values: it was saved from the meta device", "Load real weights for it")
            raise self._unsupported(f"is {entry.layout}", "Its parts can be read: .parts")
        if entry.dtype.bits % 8 and not (is_packed(entry.shape, entry.view.stride) and entry.view.offset == 0):
            raise self._unsupported("is a view of numbers smaller than a byte", "Read the whole tensor")
        extra = entry.nbytes - entry.view.storage.nbytes
        most = self.origin.limits.expanded_bytes
        if extra > most:
            raise LimitExceeded(
                f"the tensor claims {entry.nbytes:,} bytes, of which the file holds {entry.view.storage.nbytes:,}",
                limit="expanded_bytes",
                most=most,
                path=self.origin.source,
                key=entry.key,
            )
        return entry

    def _unsupported(self, what: str, hint: str) -> Unsupported:
        return Unsupported(f"the tensor {what}", path=self.origin.source, key=self.entry.key, hint=hint)


def _pieces(shape: tuple[int, ...], most: int) -> Iterator[tuple[slice | int, ...]]:
    """Indices that cut a tensor into pieces of at most ``most`` elements that follow one another in reading order."""
    if prod(shape) <= most or not shape:
        yield (slice(None),) * min(1, len(shape))
        return
    row = prod(shape[1:])
    if row <= most:
        for first in range(0, shape[0], most // row):
            yield (slice(first, first + most // row),)
        return
    for first in range(shape[0]):
        for rest in _pieces(shape[1:], most):
            yield (first, *rest)
