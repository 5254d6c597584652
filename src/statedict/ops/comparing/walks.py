"""Two tensors of one shape, read side by side in blocks that fit the cache: memory stays bounded, whatever they weigh."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import NamedTuple

from statedict.checkpoint import Checkpoint
from statedict.io.plans import FileSource, MemorySource
from statedict.manifest import StorageView, TensorEntry
from statedict.ops.sources import source_of
from statedict.views import is_dense, is_packed

__all__ = ["Room", "Side", "Walk", "are_same_bytes"]

# Bytes of one side that are looked at together. Two cores with 1 MiB of second-level cache each, 1 GiB against 1 GiB, page cache warm:
# with 128 and 256 KiB a fifth slower, with 1 and 2 MiB no faster.
_BLOCK_NBYTES = 512 * 1024


class Side(NamedTuple):
    """One of the two tensors, and the checkpoint that it is read from."""

    entry: TensorEntry
    checkpoint: Checkpoint


class Room:
    """What one thread reads with: a block for each side, and readers of its own.

    A reader remembers how far the last compressed storage was unwrapped; two threads with one would each begin again.
    """

    def __init__(self) -> None:
        self.blocks = bytearray(_BLOCK_NBYTES), bytearray(_BLOCK_NBYTES)
        self._own: dict[int, tuple[Checkpoint, Checkpoint]] = {}

    def own(self, side: Side) -> Side:
        """The same tensor, read through this thread's reader."""
        known = self._own.get(id(side.checkpoint))
        if known is None:
            shared = side.checkpoint
            own = Checkpoint(
                shared.manifest, shared.reader.files, source=shared.source, limits=shared.limits, owns_files=False
            )
            known = self._own[id(shared)] = shared, own
        return Side(side.entry, known[1])


def are_same_bytes(a: memoryview, b: memoryview) -> bool:
    """Whether two blocks of bytes of one length are equal."""
    # Two views are compared element by element, a bytearray and a view at the speed of memory.
    whole = a.obj
    if type(whole) is not bytearray or len(whole) != a.nbytes:
        whole = bytearray(a)
    return whole == b


class Walk:
    """Both tensors in blocks of as many elements.

    Dimensions that both only repeat (a stride of 0) are taken once. Where both are dense in the same order, they are read
    in that order, as their storages have them.
    """

    def __init__(self, a: Side, b: Side) -> None:
        self._shape = a.entry.shape
        one, two = _steps(a.entry), _steps(b.entry)
        repeated = [size > 1 and s == 0 == t for size, s, t in zip(self._shape, one, two)]
        self.repeats = prod([size for size, only in zip(self._shape, repeated) if only])
        shape = tuple([1 if only else size for size, only in zip(self._shape, repeated)])
        self._order = shape
        self._steps: tuple[int, ...] | None = None  # of the order in which they are read, if it isn't the usual one
        if one == two and not is_packed(shape, one) and is_dense(shape, one):
            self._steps, shape = one, (prod(shape),)
        self._a, self._b = self._flattened(a, shape), self._flattened(b, shape)
        self.numel = self._a.entry.numel
        self.bits = max(a.entry.dtype.bits, b.entry.dtype.bits)

    def _flattened(self, side: Side, shape: tuple[int, ...]) -> Side:
        entry = side.entry
        if shape == entry.shape or entry.view is None:
            return side
        stride = entry.view.stride if self._steps is None else (1,)
        return side._replace(entry=entry._replace(shape=shape, view=entry.view._replace(stride=stride)))

    @property
    def can_be_cut(self) -> bool:
        """Whether both can be read from any element on; else from the first to the last only. Raises what reading raises."""
        return all(
            isinstance(source_of(side.entry, side.checkpoint), (FileSource, MemorySource))
            for side in (self._a, self._b)
        )

    def blocks(
        self, first: int = 0, count: int | None = None, room: Room | None = None
    ) -> Iterator[tuple[memoryview, memoryview, int]]:
        """The elements as packed little-endian bytes of both, each valid until the next, and their number.

        ``first`` and ``count`` cut out some of them: whole bytes, as multiples of 16 are, and only where they ``can_be_cut``.
        """
        end = self.numel if count is None else first + count
        if first >= end:
            return
        # Whole bytes of any dtype: elements of 2, 4 and 6 bits fill them in groups of 4 at most.
        most = _BLOCK_NBYTES * 8 // self.bits & ~15
        room = Room() if room is None else room
        a, b = (_Reading(room.own(side), block) for side, block in zip((self._a, self._b), room.blocks))
        for start in range(first, end, most):
            some = min(most, end - start)
            yield a.read(start, some), b.read(start, some), some

    def index(self, position: int) -> tuple[int, ...]:
        """The index of the element that is read at that position."""
        if self._steps is not None:
            return tuple([position // max(step, 1) % size for step, size in zip(self._steps, self._order)])
        found = []
        for size in reversed(self._order):
            position, at = divmod(position, size)
            found.append(at)
        return tuple(reversed(found))


def _steps(entry: TensorEntry) -> tuple[int, ...]:
    view: StorageView | None = entry.view
    return () if view is None else view.stride


class _Reading:
    """The packed bytes of one tensor, by position."""

    def __init__(self, side: Side, block: bytearray) -> None:
        self._dtype = side.entry.dtype
        self._source = source_of(side.entry, side.checkpoint)
        self._data = self._source.data if isinstance(self._source, MemorySource) else None
        self._buffer = memoryview(block)

    def read(self, first: int, count: int) -> memoryview:
        """That many elements; ``first`` is a multiple of 16."""
        start, nbytes = first * self._dtype.bits // 8, self._dtype.nbytes(count)
        if self._data is not None:
            return self._data[start : start + nbytes]
        buffer = self._buffer[:nbytes]
        self._source.read_into(start, buffer)
        return buffer
