"""The instructions of a pickle that push a value which stands in the stream: numbers, texts, bytes."""

from __future__ import annotations

import struct

from statedict.formats.pickle_window import Window
from statedict.formats.records import Blob
from statedict.io.ranges import File
from statedict.limits import Limits

__all__ = ["Literals"]

# A byte string of a file that is at least this long stays in the file.
_BLOB_NBYTES = 64 * 1024


class Literals(Window):
    """The stack, and what pushes literal values onto it.

    With ``keep_blobs``, long byte strings stay in the file as ``Blob``.
    """

    def __init__(self, file: File, offset: int, limits: Limits, keep_blobs: bool) -> None:
        super().__init__(file, offset, limits)
        self._keep_blobs = keep_blobs
        self._stack: list[object] = []

    # ---------------------------------------------------------------- numbers and constants

    def _text_number(self, line: bytes | None = None) -> int:
        line = self._line() if line is None else line
        # Five digits are a little more than two bytes.
        self.limits.check("integer_bytes", len(line) * 2 // 5, "an integer of the pickle is too long")
        digits = line[1:] if line[:1] in b"+-" else line
        if not digits.isdigit():
            self._fail("a line of the pickle should be a number")
        return int(line)

    def _op_int(self) -> None:
        line = self._line()
        self._stack.append({b"00": False, b"01": True}[line] if line in (b"00", b"01") else self._text_number(line))

    def _op_long(self) -> None:
        line = self._line()
        self._stack.append(self._text_number(line[:-1] if line[-1:] == b"L" else line))

    def _op_float(self) -> None:
        line = self._line()
        if len(line) > 100:
            self._fail("a line of the pickle should be a number")
        self._stack.append(float(line))

    def _op_binfloat(self) -> None:
        self._stack.append(struct.unpack(">d", self._take(8))[0])

    def _op_binint(self) -> None:
        self._stack.append(int.from_bytes(self._take(4), "little", signed=True))

    def _op_binint2(self) -> None:
        self._stack.append(self._number(2))

    def _long(self, nbytes: int) -> None:
        self.limits.check("integer_bytes", nbytes, "an integer of the pickle is too long")
        self._stack.append(int.from_bytes(self._take(nbytes), "little", signed=True))

    def _op_long1(self) -> None:
        self._long(self._number(1))

    def _op_long4(self) -> None:
        self._long(int.from_bytes(self._take(4), "little", signed=True))

    def _op_none(self) -> None:
        self._stack.append(None)

    def _op_newtrue(self) -> None:
        self._stack.append(True)

    # ---------------------------------------------------------------- texts and bytes

    def _text(self, nbytes: int) -> None:
        self._stack.append(self._take(nbytes).decode("utf-8", "surrogatepass"))

    def _op_binunicode(self) -> None:
        self._text(self._number(4))

    def _op_short_binunicode(self) -> None:
        self._text(self._number(1))

    def _op_binunicode8(self) -> None:
        self._text(self._number(8))

    def _op_unicode(self) -> None:
        self._stack.append(self._line().decode("raw-unicode-escape"))

    def _python2_text(self, raw: bytes) -> None:
        # Python 2 had one type for both. torch.load decodes it as UTF-8; what isn't UTF-8 stays bytes.
        try:
            self._stack.append(raw.decode("utf-8"))
        except UnicodeDecodeError:
            self._stack.append(raw)

    def _op_string(self) -> None:
        line = self._line()
        if len(line) < 2 or line[:1] != line[-1:] or line[:1] not in b"\"'":
            self._fail("a text of the pickle has no quotes")
        import codecs

        self._check_escapes(line)
        self._python2_text(codecs.escape_decode(line[1:-1])[0])

    def _check_escapes(self, line: bytes) -> None:
        """Python's own decoder warns of sequences that it doesn't know; Python 2 never wrote one."""
        at = line.find(b"\\")
        while at >= 0:
            if line[at + 1] not in b"\\'\"abfnrtvx0123":
                self._fail("a text of the pickle has an unknown escape sequence")
            at = line.find(b"\\", at + 2)

    def _op_binstring(self) -> None:
        self._python2_text(self._take(int.from_bytes(self._take(4), "little", signed=True)))

    def _op_short_binstring(self) -> None:
        self._python2_text(self._take(self._number(1)))

    def _bytes(self, nbytes: int) -> bytes | Blob:
        if not self._keep_blobs or nbytes < _BLOB_NBYTES:
            return self._take(nbytes)
        blob = Blob(self.offset, nbytes)
        self._skip(nbytes)
        return blob

    def _op_binbytes(self) -> None:
        self._stack.append(self._bytes(self._number(4)))

    def _op_short_binbytes(self) -> None:
        self._stack.append(self._take(self._number(1)))

    def _op_binbytes8(self) -> None:
        self._stack.append(self._bytes(self._number(8)))

    def _op_bytearray8(self) -> None:
        data = self._bytes(self._number(8))
        self._stack.append(data if isinstance(data, Blob) else bytearray(data))
