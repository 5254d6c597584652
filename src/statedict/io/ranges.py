"""Files as runs of bytes that are read by position, and a planner that merges what is asked of them.

Nothing here maps a file into memory: a file that is cut short while it is read gives a ``CorruptFile``, never a signal
that ends the process. Positions and sizes are bytes.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import islice
from threading import Lock
from typing import BinaryIO, NamedTuple, Protocol

from statedict.errors import CorruptFile, FileError, UnknownFormat, one_line

__all__ = [
    "BLOCK_NBYTES",
    "File",
    "LocalFile",
    "MemoryFile",
    "Run",
    "Slice",
    "StreamFile",
    "blocks",
    "close_all",
    "merge",
    "read_many",
]

# The unit in which large ranges are streamed: 4 MiB keeps both cores busy and stays in the second-level cache's reach.
BLOCK_NBYTES = 4 * 1024 * 1024
# Names of a folder that are looked at, and how many of them a sentence lists.
_MOST_NAMES = 10_000
_LISTED = 5
# What checkpoint files are called, the likeliest first.
_ENDS = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".th", ".npz", ".npy")


class File(Protocol):
    """Bytes that can be read by position, by several threads at once."""

    path: str
    nbytes: int

    def read(self, offset: int, nbytes: int) -> bytes:
        """Exactly that many bytes, or ``CorruptFile`` where the file ends before them."""

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill the buffer (of bytes) from that position, or raise ``CorruptFile``."""

    def close(self) -> None:
        """Let go of the file. Reading afterwards is an error."""


class LocalFile:
    """A regular file of this machine, opened for reading."""

    def __init__(self, path: str) -> None:
        """Open the file. A directory, pipe or device raises ``UnknownFormat``; the system's refusal ``FileError``."""
        self.path = path
        try:
            # Without O_NONBLOCK, opening a pipe that nobody writes to would wait for ever.
            self._fd = os.open(
                path,
                os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0),
            )
        except OSError as error:
            if error.errno == errno.ENXIO and os.path.exists(path):
                # A socket can't be opened at all.
                raise _no_file(path, os.stat(path).st_mode) from error
            raise FileError.of(error, path, "can't be opened") from error
        except ValueError as error:
            raise FileError("can't be opened: the name holds a NUL character", path=path) from error
        try:
            facts = os.fstat(self._fd)
        except OSError as error:
            self.close()
            raise FileError.of(error, path, "can't be opened") from error
        if not stat.S_ISREG(facts.st_mode):
            self.close()
            raise _no_file(path, facts.st_mode)
        self.nbytes = facts.st_size
        self.identity = (facts.st_dev, facts.st_ino)

    def read(self, offset: int, nbytes: int) -> bytes:
        """Exactly that many bytes; checked against the size of the file before anything is allocated."""
        if nbytes < 0 or offset < 0 or offset + nbytes > self.nbytes:
            raise _short(self.path, offset, nbytes, self.nbytes)
        data = self._pread(offset, nbytes)
        if len(data) == nbytes:
            return data
        buffer = bytearray(nbytes)
        self.read_into(offset, memoryview(buffer))
        return bytes(buffer)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill the buffer from that position; several threads may do so at once."""
        done, wanted = 0, len(buffer)
        while done < wanted:
            try:
                count = os.preadv(self._fd, [buffer[done:]], offset + done)
            except OSError as error:
                raise FileError.of(error, self.path, f"can't be read at byte {offset + done}") from error
            if count == 0:
                raise _short(self.path, offset, wanted, offset + done)
            done += count

    def _pread(self, offset: int, nbytes: int) -> bytes:
        try:
            return os.pread(self._fd, nbytes, offset)
        except OSError as error:
            raise FileError.of(error, self.path, f"can't be read at byte {offset}") from error

    def fileno(self) -> int:
        """The descriptor, for copies inside the kernel."""
        return self._fd

    def close(self) -> None:
        """Close the descriptor; a second call does nothing."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            # Nothing was written through it: what the system says here takes nothing from what was read.
            with suppress(OSError):
                os.close(fd)


class MemoryFile:
    """Bytes in memory under a name, read as a file is."""

    def __init__(self, data: bytes, path: str = "<memory>") -> None:
        self.path = path
        self.nbytes = len(data)
        self._data = data

    def read(self, offset: int, nbytes: int) -> bytes:
        """Exactly that many bytes, or ``CorruptFile``."""
        if nbytes < 0 or offset < 0 or offset + nbytes > self.nbytes:
            raise _short(self.path, offset, nbytes, self.nbytes)
        return self._data[offset : offset + nbytes]

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill the buffer from that position, or raise ``CorruptFile``."""
        buffer[:] = self.read(offset, len(buffer))

    def close(self) -> None:
        """Nothing to let go of."""


class StreamFile:
    """An open binary file object that can be positioned, from where it stands to its end; it stays open, and its owner's."""

    def __init__(self, stream: BinaryIO) -> None:
        """Raises ``FileError`` for an object that can't be read by position (a pipe, a socket, a text file)."""
        name = getattr(stream, "name", None)
        self.path = name if isinstance(name, str) else "<stream>"
        self._stream = stream
        self._lock = Lock()
        try:
            self._start = stream.tell()
            self.nbytes = stream.seek(0, os.SEEK_END) - self._start
            stream.seek(self._start)
            if not isinstance(stream.read(0), bytes):
                raise FileError("can't be read: it gives text. Open it for bytes", path=self.path)
        except (OSError, ValueError, AttributeError) as error:
            if isinstance(error, FileError):
                raise
            raise FileError(f"can't be read by position: {one_line(error)}", path=self.path) from error

    def read(self, offset: int, nbytes: int) -> bytes:
        """Exactly that many bytes, or ``CorruptFile``."""
        if nbytes < 0 or offset < 0 or offset + nbytes > self.nbytes:
            raise _short(self.path, offset, nbytes, self.nbytes)
        buffer = bytearray(nbytes)
        self.read_into(offset, memoryview(buffer))
        return bytes(buffer)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill the buffer from that position, one thread at a time."""
        done = 0
        with self._lock:
            try:
                self._stream.seek(self._start + offset)
                while done < len(buffer):
                    data = self._stream.read(len(buffer) - done)
                    if not data:
                        raise _short(self.path, offset, len(buffer), offset + done)
                    buffer[done : done + len(data)] = data
                    done += len(data)
            except (OSError, ValueError) as error:
                if isinstance(error, CorruptFile):
                    raise
                raise FileError(f"can't be read at byte {offset + done}: {one_line(error)}", path=self.path) from error

    def close(self) -> None:
        """The object belongs to whoever opened it."""


def _short(path: str, offset: int, wanted: int, size: int) -> CorruptFile:
    return CorruptFile(
        "the file ends too early",
        path=path,
        offset=offset,
        expected=f"{wanted} bytes",
        found=f"{max(0, size - offset)}",
        hint="The file was cut short: download or copy it again",
    )


def _no_file(path: str, mode: int) -> UnknownFormat:
    """The error that says what is there instead of a regular file."""
    kinds = {stat.S_IFDIR: "a directory", stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket"}
    kind = kinds.get(stat.S_IFMT(mode), "a device")
    hint = _in_folder(path) if stat.S_ISDIR(mode) else "Name a checkpoint file"
    return UnknownFormat(f"this is {kind}, not a file", path=path, hint=hint)


def _in_folder(path: str) -> str:
    """What a folder holds that could be opened instead. Looks at its first 10,000 names."""
    try:
        with os.scandir(path) as entries:
            names = sorted(entry.name for entry in islice(entries, _MOST_NAMES))
    except OSError:
        return "Name a checkpoint file"
    found = [name for end in _ENDS for name in names if name.lower().endswith(end)]
    if found:
        rest = f" and {len(found) - _LISTED:,} more" if len(found) > _LISTED else ""
        return f"In it could be opened: {', '.join([one_line(name) for name in found[:_LISTED]])}{rest}"
    if ".metadata" in names or any(name.endswith(".distcp") for name in names):
        return "It is a distributed checkpoint, which can't be opened yet"
    return "Nothing in it has the name of a checkpoint" if names else "It is empty"


class Run(NamedTuple):
    """A range to read at once, and which of the wanted ranges lie in it."""

    offset: int
    nbytes: int
    members: tuple[int, ...]


def merge(ranges: Sequence[tuple[int, int]], *, gap: int, most: int) -> list[Run]:
    """The reads that cover all ranges ``(offset, nbytes)``: sorted, joined over gaps of up to ``gap`` bytes.

    No read is longer than ``most`` unless a single range is. Pure: what to read, not the reading.
    """
    runs: list[Run] = []
    order = sorted(range(len(ranges)), key=lambda i: ranges[i])
    start = end = 0
    members: list[int] = []
    for i in order:
        offset, nbytes = ranges[i]
        if members and offset - end <= gap and max(end, offset + nbytes) - start <= most:
            end = max(end, offset + nbytes)
            members.append(i)
            continue
        if members:
            runs.append(Run(start, end - start, tuple(members)))
        start, end, members = offset, offset + nbytes, [i]
    if members:
        runs.append(Run(start, end - start, tuple(members)))
    return runs


def read_many(file: File, ranges: Sequence[tuple[int, int]], *, gap: int = 4096) -> list[bytes]:
    """The bytes of many small ranges of one file, in their order; near ones are read together."""
    out: list[bytes] = [b""] * len(ranges)
    for run in merge(ranges, gap=gap, most=BLOCK_NBYTES):
        data = file.read(run.offset, run.nbytes)
        for i in run.members:
            first = ranges[i][0] - run.offset
            out[i] = data[first : first + ranges[i][1]]
    return out


def blocks(offset: int, nbytes: int, size: int = BLOCK_NBYTES) -> Iterator[tuple[int, int]]:
    """A range cut into ``(offset, nbytes)`` of at most ``size`` bytes."""
    for first in range(0, nbytes, size):
        yield offset + first, min(size, nbytes - first)


def close_all(files: Iterable[File]) -> None:
    """Close every file."""
    for file in files:
        file.close()


class Slice:
    """A part of another file as a file of its own: what an entry or a nested stream is."""

    def __init__(self, file: File, offset: int, nbytes: int, name: str = "") -> None:
        if offset < 0 or nbytes < 0 or offset + nbytes > file.nbytes:
            raise _short(file.path, offset, nbytes, file.nbytes)
        self.path = f"{file.path}:{name}" if name else file.path
        self.nbytes = nbytes
        self._file = file
        self._offset = offset

    def read(self, offset: int, nbytes: int) -> bytes:
        """Exactly that many bytes of the part, or ``CorruptFile``."""
        if nbytes < 0 or offset < 0 or offset + nbytes > self.nbytes:
            raise _short(self.path, offset, nbytes, self.nbytes)
        return self._file.read(self._offset + offset, nbytes)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill the buffer from that position of the part, or raise ``CorruptFile``."""
        if offset + len(buffer) > self.nbytes:
            raise _short(self.path, offset, len(buffer), self.nbytes)
        self._file.read_into(self._offset + offset, buffer)

    def close(self) -> None:
        """Nothing of its own to let go of."""
