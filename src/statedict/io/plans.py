"""What a file will be, as data: literal bytes, payloads that are copied, and bytes that follow from the payloads' sums.

A format makes a ``WritePlan``; ``writers.py`` carries it out. All sizes are known before the first byte is written, so
the offset of every segment is the sum of the sizes before it. Nothing here reads or writes a file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol, Union

from statedict.errors import CorruptFile
from statedict.io.ranges import File

__all__ = ["FileSource", "Later", "Literal", "MemorySource", "Payload", "Segment", "Source", "Sum", "WritePlan"]


class Source(Protocol):
    """Bytes that can be had by range, in any order."""

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill the buffer (of bytes) from that offset of the source, or raise ``CorruptFile``."""

    def extent(self) -> tuple[File, int] | None:
        """The file, and the offset in it, where these very bytes lie in one piece; None where they lie nowhere."""


class FileSource:
    """Bytes that lie in a file from ``offset`` on."""

    __slots__ = ("_file", "_offset")

    def __init__(self, file: File, offset: int) -> None:
        self._file = file
        self._offset = offset

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill the buffer from the file."""
        self._file.read_into(self._offset + offset, buffer)

    def extent(self) -> tuple[File, int]:
        """The file and the offset."""
        return self._file, self._offset


class MemorySource:
    """Bytes in memory; they are written from where they are, and must not change until that is done."""

    __slots__ = ("data",)

    def __init__(self, data: bytes | bytearray | memoryview) -> None:
        self.data = memoryview(data).cast("B")

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Copy the bytes."""
        part = self.data[offset : offset + len(buffer)]
        if len(part) != len(buffer):
            raise CorruptFile("the bytes in memory end too early", expected=f"{len(buffer)} bytes", found=len(part))
        buffer[:] = part

    def extent(self) -> None:
        """They lie in no file."""
        return


class Sum(NamedTuple):
    """What was computed of one payload while it was copied."""

    digest: str | None  # "xxh3-128:" and 32 hexadecimal digits
    crc: int | None  # CRC-32 as zip has it


class Literal(NamedTuple):
    """Bytes that are known already."""

    data: bytes

    @property
    def nbytes(self) -> int:
        """Their number."""
        return len(self.data)


class Payload(NamedTuple):
    """Bytes to copy from a source, and what to compute of them in passing."""

    key: str  # unique in its plan: sums are found by it
    nbytes: int
    source: Source
    digest: bool = False
    crc: bool = False


class Later(NamedTuple):
    """Bytes that are known once payloads were summed: digests in a header, CRCs in the directory of a zip."""

    nbytes: int
    render: Callable[[Mapping[str, Sum]], bytes]  # gives exactly nbytes
    # The keys of the payloads whose sums it uses; None for all. Naming them lets the local header of a small zip entry
    # be written with its entry, instead of by a system call of its own at the end.
    needs: tuple[str, ...] | None = None


Segment = Union[Literal, Payload, Later]


class WritePlan(NamedTuple):
    """A file to write: its segments, one after the other without gaps."""

    format: str
    segments: Sequence[Segment]

    def __repr__(self) -> str:
        return f"WritePlan({self.format}, {len(self.segments)} segments, {self.nbytes} bytes)"

    @property
    def nbytes(self) -> int:
        """The size of the file."""
        return sum(segment.nbytes for segment in self.segments)
