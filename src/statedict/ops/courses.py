"""One tensor through several steps: each of its bytes is read once, beside those at the same place of the step before."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from statedict.numerics.motion import Motion, MotionRoom
from statedict.ops.comparing.walks import Room, Side
from statedict.ops.sources import source_of

if TYPE_CHECKING:
    from statedict.dtypes import DType

__all__ = ["Course", "CourseRoom", "Stop", "follow"]


class Stop(NamedTuple):
    """The tensor at one step; ``at`` is the number of that step among those that are looked at."""

    at: int
    side: Side


class Course(NamedTuple):
    """What was found at a stop. ``is_compared``: the step before has the tensor in the same shape, so there is a change to tell."""

    at: int
    motion: Motion
    is_compared: bool = False
    is_damaged: bool = False  # its bytes aren't those that were written
    is_read: bool = True  # False where it records the same bytes as the step before


class CourseRoom:
    """What one thread reads and counts with."""

    def __init__(self) -> None:
        self.reading = Room()
        self.numbers = MotionRoom()


class _Frame:
    """The tensor as it is at one stop, and at those behind it that record the same bytes."""

    def __init__(self, stop: Stop, carried: Motion | None) -> None:
        self.stop = stop
        self.is_carried = carried is not None
        self.motion = Motion() if carried is None else carried
        self.follows = False  # there is a frame before to compare with
        self.is_damaged = False

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stop.side.entry.shape


class _Reading:
    """The packed bytes of a frame, from the first to the last, with their digest if one is recorded."""

    def __init__(self, frame: _Frame, room: Room) -> None:
        side = room.own(frame.stop.side)
        self.frame = frame
        self.dtype: DType = side.entry.dtype
        self.source = source_of(side.entry, side.checkpoint)
        self.digest = side.entry.digest
        self.state: Any = None
        if self.digest is not None:
            from xxhash import xxh3_128

            self.state = xxh3_128()

    def read(self, first: int, count: int, buffer: bytearray) -> memoryview:
        """That many elements from that one on."""
        block = memoryview(buffer)[: self.dtype.nbytes(count)]
        self.source.read_into(self.dtype.nbytes(first), block)
        if self.state is not None:
            self.state.update(block)
        return block

    def finish(self) -> None:
        """Compare the digest."""
        self.frame.is_damaged = self.state is not None and f"xxh3-128:{self.state.hexdigest()}" != self.digest


def follow(stops: Sequence[Stop], room: CourseRoom, carried: Motion | None = None) -> list[Course]:
    """The figures of a tensor at each stop. What records the same bytes as the stop before isn't read again.

    ``carried`` are the figures of the first stop, where they are known: it is read only if the second differs, and isn't in the
    answer. Memory is two blocks. Raises what reading raises.
    """
    frames: list[_Frame] = []
    shown: list[_Frame] = []
    before: Stop | None = None
    for stop in stops:
        if before is None or not _is_same(before, stop):
            frame = _Frame(stop, carried if before is None else None)
            frame.follows = before is not None and _is_comparable(before, stop)
            frames.append(frame)
        shown.append(frames[-1])
        before = stop
    for group in _groups(frames):
        if not (group[0].is_carried and len(group) == 1):
            _read(group, room)
    found = [_course(stop, frame) for stop, frame in zip(stops, shown)]
    return found if carried is None else found[1:]


def _course(stop: Stop, frame: _Frame) -> Course:
    if frame.stop is stop:
        return Course(stop.at, frame.motion, frame.follows, frame.is_damaged)
    return Course(stop.at, frame.motion.at_rest(), is_compared=True, is_read=False)


def _is_comparable(before: Stop, stop: Stop) -> bool:
    return stop.at == before.at + 1 and before.side.entry.shape == stop.side.entry.shape


def _is_same(before: Stop, stop: Stop) -> bool:
    """Whether both record the digest of the same bytes."""
    one, two = before.side.entry, stop.side.entry
    is_known = one.digest is not None and one.digest == two.digest and one.dtype is two.dtype
    return is_known and _is_comparable(before, stop)


def _groups(frames: Sequence[_Frame]) -> Iterator[list[_Frame]]:
    """The frames in runs of which each can be compared with the one before."""
    group: list[_Frame] = []
    for frame in frames:
        if group and not frame.follows:
            yield group
            group = []
        group.append(frame)
    if group:
        yield group


def _read(group: Sequence[_Frame], room: CourseRoom) -> None:
    """Read frames of one shape side by side: of each the first block, then the second …"""
    readings = [_Reading(frame, room.reading) for frame in group]
    numel = group[0].stop.side.entry.numel
    most = len(room.reading.blocks[0]) // max([reading.dtype.itemsize for reading in readings])
    for first in range(0, numel, most):
        count = min(most, numel - first)
        before: tuple[memoryview, DType] | None = None
        for number, reading in enumerate(readings):
            # The block before this one lies in the other of the two.
            now = reading.read(first, count, room.reading.blocks[number % 2])
            if not reading.frame.is_carried:
                reading.frame.motion.add(now, reading.dtype, room.numbers, before)
            before = now, reading.dtype
    for reading in readings:
        reading.finish()
