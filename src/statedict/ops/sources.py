"""The bytes of a checkpoint's tensors as the sources of a write plan."""

from __future__ import annotations

from collections.abc import Iterator

from statedict.checkpoint import Checkpoint
from statedict.io.plans import FileSource, MemorySource, Source
from statedict.io.ranges import File
from statedict.lazy_tensor import LazyTensor
from statedict.manifest import TensorEntry

__all__ = ["source_of"]


def source_of(entry: TensorEntry, checkpoint: Checkpoint) -> Source:
    """The packed little-endian bytes of a tensor: where they lie, if they lie so somewhere, else made as they are read.

    Raises ``Unsupported`` or ``LimitExceeded``, before anything is written, for a tensor whose values can't be read.
    """
    tensor = LazyTensor(entry, checkpoint)
    tensor.check_readable()
    view = entry.view
    if view is None or not entry.numel:
        return MemorySource(b"")
    if tensor.is_plain:
        first, nbytes = tensor.plain_range()
        storage = view.storage
        if storage.data is not None:
            return MemorySource(memoryview(storage.data)[first : first + nbytes])
        if storage.extent is not None and storage.extent.codec == "raw":
            return FileSource(checkpoint.reader.files[storage.extent.file], storage.extent.offset + first)
    return _MadeSource(tensor)


class _MadeSource:
    """Bytes that are unwrapped, gathered or turned as they are asked for, from the first to the last."""

    __slots__ = ("_blocks", "_position", "_rest", "_tensor")

    def __init__(self, tensor: LazyTensor) -> None:
        self._tensor = tensor
        self._blocks: Iterator[memoryview] = iter(())
        self._rest = memoryview(b"")
        self._position = 0

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill the buffer with the bytes from that offset; going back means beginning again."""
        if offset == 0 or offset < self._position:
            self._blocks, self._rest, self._position = self._tensor.blocks(), memoryview(b""), 0
        while self._position < offset:
            self._take(offset - self._position)
        done = 0
        while done < len(buffer):
            piece = self._take(len(buffer) - done)
            buffer[done : done + len(piece)] = piece
            done += len(piece)

    def _take(self, most: int) -> memoryview:
        if not len(self._rest):
            self._rest = memoryview(next(self._blocks)).cast("B")
        piece, self._rest = self._rest[:most], self._rest[most:]
        self._position += len(piece)
        return piece

    def extent(self) -> tuple[File, int] | None:
        """They lie nowhere as they are."""
        return None
