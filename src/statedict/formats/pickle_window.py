"""The part of a file that the interpreter of pickles has in memory, and how far into the file that is."""

from __future__ import annotations

from typing import NoReturn

from statedict.errors import CorruptFile
from statedict.io.ranges import File
from statedict.limits import Limits

__all__ = ["DAMAGED", "MARGIN", "Window"]

# How much of a file is read at a time: little at first, because most pickles of a stream are short, then twice as much
# each time. One MiB is more than the pickle of a few thousand tensors.
_FIRST_WINDOW = 16 * 1024
_LARGEST_WINDOW = 1024 * 1024
# The longest line of a protocol-0 instruction that is waited for.
_LINE_NBYTES = 64 * 1024
# The fixed arguments of any instruction fit in this many bytes.
MARGIN = 9
DAMAGED = "The file was cut short or damaged: download or copy it again"


class Window:
    """Bytes of a file from ``offset`` on, read ahead of who takes them.

    The next byte is ``_data[_pos]``. Every length is checked against the bytes that the file has left before it is read.
    """

    def __init__(self, file: File, offset: int, limits: Limits) -> None:
        self.file = file
        self.limits = limits
        self._base = offset  # where the window begins in the file
        self._read = 0  # bytes taken so far, without the window's
        self._size = _FIRST_WINDOW
        self._data = b""
        self._pos = 0

    @property
    def offset(self) -> int:
        """Where the next instruction lies, in bytes from the start of the file."""
        return self._base + self._pos

    @property
    def _done(self) -> int:
        """Bytes of the stream that have been taken."""
        return self._read + self._pos

    def _bad(self, what: str) -> CorruptFile:
        return CorruptFile(what, path=self.file.path, offset=self.offset, hint=DAMAGED)

    def _fail(self, what: str) -> NoReturn:
        raise self._bad(what)

    def _refill(self, need: int = MARGIN) -> None:
        """Bring at least ``need`` bytes from the current position into the window, or all that the file has."""
        rest = self._data[self._pos :]
        self._read += self._pos
        self._base += self._pos
        self._pos = 0
        start = self._base + len(rest)
        count = min(max(self._size, need - len(rest)), self.file.nbytes - start)
        self._size = min(2 * self._size, _LARGEST_WINDOW)
        self.limits.check("pickle_bytes", self._read + len(rest), "a pickle stream is too long")
        self._data = rest + self.file.read(start, count) if count > 0 else rest

    def _guard(self) -> int:
        """The last position at which an instruction's fixed arguments are surely in the window.

        At the end of the file there is nothing to wait for: the index runs out there.
        """
        rest = self._base + len(self._data) < self.file.nbytes
        return len(self._data) - MARGIN if rest else len(self._data)

    def _claim(self, nbytes: int, what: str = "a pickle instruction") -> None:
        """Refuse a length that the rest of the file hasn't."""
        left = self.file.nbytes - self.offset
        if not 0 <= nbytes <= left:
            self._fail(f"{what} claims {nbytes} bytes, the file has {left} left")

    def _take(self, nbytes: int) -> bytes:
        """That many bytes at the current position, which moves on. Their number is checked before they are read."""
        if nbytes < 0 or self._pos + nbytes > len(self._data):
            self._claim(nbytes)
            self.limits.check("pickle_bytes", self._read + nbytes, "a pickle stream is too long")
            self._refill(nbytes)
        data = self._data[self._pos : self._pos + nbytes]
        self._pos += nbytes
        return data

    def _skip(self, nbytes: int) -> None:
        """Go on behind that many bytes, which aren't read."""
        self._claim(nbytes)
        self._read += self._pos
        self._base, self._pos, self._data, self._size = self.offset + nbytes, 0, b"", _FIRST_WINDOW
        self._refill()

    def _number(self, nbytes: int) -> int:
        return int.from_bytes(self._take(nbytes), "little")

    def _line(self) -> bytes:
        end = self._data.find(b"\n", self._pos)
        if end < 0:
            self._refill(_LINE_NBYTES)
            end = self._data.find(b"\n", self._pos)
        if end < 0:
            self._fail("a line of the pickle has no end")
        line = self._data[self._pos : end]
        self._pos = end + 1
        return line
