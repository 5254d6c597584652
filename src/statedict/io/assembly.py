"""Lays the segments of a ``WritePlan`` into buffers one after the other, and sums payloads on the way.

Small segments share a buffer, and small payloads that lie near each other in their file are read at once, so that
100,000 payloads of 1 KiB cost about as many system calls as 100 MB in one piece.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

from xxhash import xxh3_128

from statedict.errors import CorruptFile
from statedict.io.crc import crc32
from statedict.io.plans import Later, Literal, MemorySource, Payload, Sum, WritePlan
from statedict.io.ranges import BLOCK_NBYTES, File, LocalFile, blocks

__all__ = ["Assembly", "Sink"]

# Bytes. Payloads up to here are worth reading together with their neighbours.
_SMALL = 64 * 1024
# Bytes. The most that is read at once for small payloads, and the widest gap between two that is read over: the padding
# and headers between the entries of a zip.
_WINDOW = 1024 * 1024
_GAP = 4096
# Bytes. From here on, bytes in memory are written from where they are, and bytes of a file are copied by the kernel.
_LARGE = 1024 * 1024


class Sink(Protocol):
    """Where the buffers go.

    ``alignment`` is what offsets should be multiples of where a buffer begins; above 1, everything goes through buffers.
    """

    alignment: int

    def buffer(self) -> memoryview:
        """A buffer to fill, which ``write`` gives back. All are of one size."""

    def write(self, offset: int, data: memoryview, buffer: memoryview | None) -> None:
        """Write the data there, now or soon. ``buffer`` is what it is part of, None if it is none of ours."""

    def copy(self, offset: int, file: LocalFile, source_offset: int, nbytes: int) -> bool:
        """Copy a range of a file there without showing the bytes to anyone; False where this can't be done."""


class Assembly:
    """One pass over a plan. After ``run``, ``sums`` has every payload, ``unwritten`` the bytes that had to wait for them."""

    def __init__(
        self,
        plan: WritePlan,
        sink: Sink,
        *,
        sums: Mapping[str, Sum] | None = None,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self.sums: dict[str, Sum] = dict(sums or {})
        self.unwritten: list[tuple[int, Later]] = []  # with their offsets
        self._segments = plan.segments
        self._payloads = sum(isinstance(segment, Payload) for segment in plan.segments)
        self._nbytes = plan.nbytes
        self._sink = sink
        self._on_progress = on_progress
        self._position = 0  # where in the file the buffer begins
        self._buffer: memoryview | None = None
        self._filled = 0
        self._holes: list[tuple[int, Later]] = []  # with their offsets in the buffer
        self._window = _Window()

    def run(self) -> None:
        """Hand every segment to the sink, in order."""
        for index, segment in enumerate(self._segments):
            if isinstance(segment, Payload):
                self._payload(index, segment)
            elif isinstance(segment, Literal):
                self._put(segment.data)
            else:
                self._later(segment)
        self._flush()

    def rendered(self, later: Later) -> bytes:
        """The bytes that were not known before. Raises ``ValueError`` if they are not as many as was said."""
        data = later.render(self.sums)
        if len(data) != later.nbytes:
            raise ValueError(f"a segment was planned with {later.nbytes} bytes, and came to {len(data)}")
        return data

    def _payload(self, index: int, payload: Payload) -> None:
        extent = payload.source.extent()
        summing = _Summing(payload)
        if payload.nbytes <= _SMALL and extent is not None:
            data = self._near(index, payload.nbytes, *extent)
            summing.update(data)
            self._put(data)
        elif payload.nbytes >= _LARGE and self._sink.alignment == 1 and self._whole(payload, extent, summing):
            pass
        else:
            self._stream(payload, summing)
        found = summing.result()
        if self.sums.setdefault(payload.key, found) != found:
            raise CorruptFile("the bytes changed while they were being copied", key=payload.key)

    def _stream(self, payload: Payload, summing: _Summing) -> None:
        done = 0
        while done < payload.nbytes:
            room = self._room()[: payload.nbytes - done]
            payload.source.read_into(done, room)
            summing.update(room)
            self._filled += len(room)
            done += len(room)

    def _whole(self, payload: Payload, extent: tuple[File, int] | None, summing: _Summing) -> bool:
        """Hand on a large payload without a copy in between, if its source allows that."""
        source = payload.source
        if isinstance(source, MemorySource) and len(source.data) == payload.nbytes:
            self._flush()
            for offset, count in blocks(0, payload.nbytes, BLOCK_NBYTES):
                part = source.data[offset : offset + count]
                summing.update(part)
                self._sink.write(self._position, part, None)
                self._advance(count)
            return True
        if payload.digest or payload.crc or extent is None or not isinstance(extent[0], LocalFile):
            return False
        self._flush()
        if not self._sink.copy(self._position, extent[0], extent[1], payload.nbytes):
            return False
        self._advance(payload.nbytes)
        return True

    def _near(self, index: int, nbytes: int, file: File, offset: int) -> memoryview:
        window = self._window
        if not window.holds(file, offset, nbytes):
            self._window = window = _Window(file, offset, self._end_of_run(index, file, offset, nbytes))
        return window.part(offset, nbytes)

    def _end_of_run(self, index: int, file: File, start: int, nbytes: int) -> int:
        """Where the last of the small payloads ends that follow this one in the plan and in the file."""
        end = start + nbytes
        for following in range(index + 1, len(self._segments)):
            segment = self._segments[following]
            if not isinstance(segment, Payload):
                continue
            extent = segment.source.extent()
            if segment.nbytes > _SMALL or extent is None or extent[0] is not file:
                break
            if not 0 <= extent[1] - end <= _GAP or extent[1] + segment.nbytes - start > _WINDOW:
                break
            end = extent[1] + segment.nbytes
        return end

    def _later(self, later: Later) -> None:
        if self._is_known(later):
            self._put(self.rendered(later))
        elif later.nbytes > BLOCK_NBYTES // 2:
            self._flush()
            self.unwritten.append((self._position, later))
            self._advance(later.nbytes)
        else:
            if len(self._room()) < later.nbytes:
                self._flush()
            self._room()
            self._holes.append((self._filled, later))
            self._filled += later.nbytes

    def _is_known(self, later: Later) -> bool:
        if later.needs is None:
            return len(self.sums) == self._payloads
        return all(key in self.sums for key in later.needs)

    def _put(self, data: bytes | memoryview) -> None:
        done = 0
        while done < len(data):
            room = self._room()
            count = min(len(room), len(data) - done)
            room[:count] = data[done : done + count]
            self._filled += count
            done += count

    def _room(self) -> memoryview:
        """What is left of the buffer; of a new one if it is full."""
        if self._buffer is not None and self._filled == len(self._buffer):
            self._flush()
        if self._buffer is None:
            buffer = self._sink.buffer()
            # The first one after an early flush is cut short, so that those behind it are aligned again.
            self._buffer = buffer[: len(buffer) - self._position % self._sink.alignment]
        return self._buffer[self._filled :]

    def _flush(self) -> None:
        buffer = self._buffer
        if buffer is None or not self._filled:
            return
        for offset, later in self._holes:
            if self._is_known(later):
                buffer[offset : offset + later.nbytes] = self.rendered(later)
            else:
                self.unwritten.append((self._position + offset, later))
        self._holes.clear()
        count, self._filled, self._buffer = self._filled, 0, None
        self._sink.write(self._position, buffer[:count], buffer)
        self._advance(count)

    def _advance(self, count: int) -> None:
        self._position += count
        if self._on_progress is not None:
            self._on_progress(self._position, self._nbytes)


class _Summing:
    """The sums of one payload, as far as it has been read."""

    __slots__ = ("_crc", "_digest")

    def __init__(self, payload: Payload) -> None:
        self._digest = xxh3_128() if payload.digest else None
        self._crc = 0 if payload.crc else None

    def update(self, data: memoryview) -> None:
        if self._digest is not None:
            self._digest.update(data)
        if self._crc is not None:
            self._crc = crc32(data, self._crc)

    def result(self) -> Sum:
        return Sum(None if self._digest is None else f"xxh3-128:{self._digest.hexdigest()}", self._crc)


class _Window:
    """A range of a file that was read at once, for the small payloads in it."""

    __slots__ = ("_data", "_file", "_start")

    def __init__(self, file: File | None = None, start: int = 0, end: int = 0) -> None:
        self._file = file
        self._start = start
        self._data = memoryview(b"" if file is None else file.read(start, end - start))

    def holds(self, file: File, offset: int, nbytes: int) -> bool:
        return self._file is file and self._start <= offset and offset + nbytes <= self._start + len(self._data)

    def part(self, offset: int, nbytes: int) -> memoryview:
        return self._data[offset - self._start : offset - self._start + nbytes]
