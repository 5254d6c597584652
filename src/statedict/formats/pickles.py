"""The interpreter of pickle bytes. It imports nothing and calls nothing that a file names.

Protocols 0 to 5 (``pickletools`` of CPython documents each instruction). The stack, the marks and the memo are those of
CPython's own reader, an instruction that reaches below the last mark is an error as there, and nothing recurses. A name is
looked up in the table of ``constructors``, whose functions are this program's own; every other name becomes an inert
``Opaque``. Lengths are checked against the bytes that are left before anything is allocated.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from typing import NoReturn

from statedict.errors import CorruptFile, StateDictError
from statedict.formats.constructors import CONSTANTS, CONSTRUCTORS, apply_state
from statedict.formats.records import Blob, Builder, Global, Unfit
from statedict.io.ranges import File
from statedict.limits import DEFAULT_LIMITS, Limits
from statedict.manifest import Opaque

__all__ = ["Machine"]

# How much of a file is read at a time. Larger than any state dict's pickle of a few thousand tensors.
_WINDOW = 1024 * 1024
# A byte string of a file that is at least this long stays in the file.
_BLOB_NBYTES = 64 * 1024
# The longest line of a protocol-0 instruction that is waited for.
_LINE_NBYTES = 64 * 1024
# The fixed arguments of any instruction fit in this many bytes.
_MARGIN = 9
_TOO_SHORT = "the pickle ends in the middle of an instruction"


class Machine:
    """One run of one pickle stream of a file.

    ``persistent`` gives the value for a persistent id, ``extra`` are constructors of one format only. With ``keep_blobs``,
    long byte strings stay in the file as ``Blob``. After ``run()``: ``offset`` is where the stream ended (bytes from
    the start of the file), ``globals`` are the names that it looked up, in order.
    """

    def __init__(
        self,
        file: File,
        *,
        offset: int = 0,
        persistent: Callable[[object], object],
        extra: Mapping[tuple[str, str], Builder] | None = None,
        limits: Limits = DEFAULT_LIMITS,
        keep_blobs: bool = False,
    ) -> None:
        self.file = file
        self.limits = limits
        self.globals: dict[tuple[str, str], Global] = {}
        self._persistent = persistent
        self._constructors = {**CONSTRUCTORS, **extra} if extra else CONSTRUCTORS
        self._keep_blobs = keep_blobs
        self._base = offset  # where the window begins in the file
        self._read = 0  # bytes interpreted so far, without the window's
        self._data = b""
        self._pos = 0
        self._stack: list[object] = []
        self._marks: list[int] = []
        self._floor = 0
        self._memo: dict[int, object] = {}
        self._cold: dict[int, Callable[[], None]] = {op: getattr(self, name) for op, name in _COLD.items()}

    @property
    def offset(self) -> int:
        """Where the next instruction lies, in bytes from the start of the file."""
        return self._base + self._pos

    def run(self) -> object:
        """The value that the stream builds, made of inert records.

        Raises ``CorruptFile`` at the offset of the instruction that can't be, or ``LimitExceeded``.
        """
        try:
            return self._loop()
        except StateDictError as error:
            if error.offset is None:
                error.offset = self.offset
            raise error.located(self.file.path) from error.__cause__
        except IndexError as error:
            # The window ended (with the file), or the stack did.
            short = self._pos >= len(self._data)
            raise self._bad(
                _TOO_SHORT if short else "a pickle instruction finds too few values on the stack"
            ) from error
        except KeyError as error:
            raise self._bad(f"the pickle asks for memo entry {error.args[0]}, which was never stored") from error
        except (ValueError, TypeError, OverflowError, UnicodeError, struct.error) as error:
            raise self._bad(f"a pickle instruction can't be carried out ({type(error).__name__})") from error

    def _bad(self, what: str) -> CorruptFile:
        return CorruptFile(
            what, path=self.file.path, offset=self.offset, hint="The file is damaged: download or copy it again"
        )

    def _fail(self, what: str) -> NoReturn:
        raise self._bad(what)

    # ---------------------------------------------------------------- the window

    def _refill(self, need: int = _MARGIN) -> None:
        """Bring at least ``need`` bytes from the current position into the window, or all that the file has."""
        rest = self._data[self._pos :]
        self._read += self._pos
        self._base += self._pos
        self._pos = 0
        start = self._base + len(rest)
        count = min(max(_WINDOW, need - len(rest)), self.file.nbytes - start)
        self.limits.check("pickle_bytes", self._read + len(rest), "a pickle stream is too long")
        self._data = rest + self.file.read(start, count) if count > 0 else rest

    def _take(self, nbytes: int) -> bytes:
        """That many bytes at the current position, which moves on. Their number is checked before they are read."""
        if nbytes < 0 or self.offset + nbytes > self.file.nbytes:
            self._fail(
                f"a pickle instruction claims {nbytes} bytes, the file has {self.file.nbytes - self.offset} left"
            )
        if self._pos + nbytes > len(self._data):
            self.limits.check("pickle_bytes", self._read + nbytes, "a pickle stream is too long")
            self._refill(nbytes)
        data = self._data[self._pos : self._pos + nbytes]
        self._pos += nbytes
        return data

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

    # ---------------------------------------------------------------- the loop

    def _guard(self) -> int:
        """The last position at which an instruction's fixed arguments are surely in the window.

        At the end of the file there is nothing to wait for: the index runs out there.
        """
        rest = self._base + len(self._data) < self.file.nbytes
        return len(self._data) - _MARGIN if rest else len(self._data)

    def _loop(self) -> object:
        """Run to STOP. The instructions of a state dict are carried out here, the rare ones by the table.

        One loop with local names, because 100,000 tensors take 3.2 million instructions: through methods alone it
        took 2.3 times as long (measured on CPython 3.11).
        """
        self._refill()
        stack, memo, marks = self._stack, self._memo, self._marks
        push = stack.append
        data, pos, floor = self._data, self._pos, self._floor
        guard = self._guard()
        while True:
            if pos > guard:
                self._pos = pos
                self._refill()
                data, pos = self._data, 0
                guard = self._guard()
            op = data[pos]
            pos += 1
            if op == 0x72 or op == 0x71:  # LONG_BINPUT, BINPUT
                if len(stack) == floor:
                    raise IndexError
                if op == 0x71:
                    memo[data[pos]] = stack[-1]
                    pos += 1
                else:
                    memo[int.from_bytes(data[pos : pos + 4], "little")] = stack[-1]
                    pos += 4
            elif op == 0x4B:  # BININT1
                push(data[pos])
                pos += 1
            elif op == 0x68:  # BINGET
                push(memo[data[pos]])
                pos += 1
            elif op == 0x28:  # MARK
                floor = len(stack)
                marks.append(floor)
            elif op == 0x58:  # BINUNICODE
                end = pos + 4 + int.from_bytes(data[pos : pos + 4], "little")
                if end <= len(data):
                    push(data[pos + 4 : end].decode("utf-8", "surrogatepass"))
                    pos = end
                else:
                    self._pos = pos
                    self._op_binunicode()
                    data, pos = self._data, self._pos
                    guard = self._guard()
            elif op == 0x52:  # REDUCE
                if len(stack) - 2 < floor:
                    raise IndexError
                args = stack.pop()
                self._pos = pos
                stack[-1] = self._call(stack[-1], args)
            elif op == 0x74:  # TUPLE
                items = tuple(stack[floor:])
                if not marks:
                    raise IndexError
                del stack[floor:]
                marks.pop()
                floor = marks[-1] if marks else 0
                push(items)
            elif op == 0x86 or op == 0x85 or op == 0x87:  # TUPLE2, TUPLE1, TUPLE3
                count = op - 0x84
                if len(stack) - count < floor:
                    raise IndexError
                items = tuple(stack[-count:])
                del stack[-count:]
                push(items)
            elif op == 0x51:  # BINPERSID
                if len(stack) == floor:
                    raise IndexError
                self._pos = pos
                stack[-1] = self._persistent(stack[-1])
            elif op == 0x29:  # EMPTY_TUPLE
                push(())
            elif op == 0x89:  # NEWFALSE
                push(False)
            elif op == 0x2E:  # STOP
                self._pos = pos
                if marks or len(stack) != 1:
                    self._fail("the pickle stops with unfinished work on its stack")
                return stack.pop()
            else:
                self._pos, self._floor = pos, floor
                handler = self._cold.get(op)
                if handler is None:
                    self._fail(f"byte 0x{op:02x} is no pickle instruction")
                handler()
                if data is not self._data:
                    data = self._data
                    guard = self._guard()
                pos, floor = self._pos, self._floor

    # ---------------------------------------------------------------- stack

    def _pop(self) -> object:
        if len(self._stack) == self._floor:
            raise IndexError
        return self._stack.pop()

    def _top(self) -> object:
        if len(self._stack) == self._floor:
            raise IndexError
        return self._stack[-1]

    def _pop_mark(self) -> list[object]:
        if not self._marks:
            raise IndexError
        items = self._stack[self._floor :]
        del self._stack[self._floor :]
        self._marks.pop()
        self._floor = self._marks[-1] if self._marks else 0
        return items

    def _op_pop(self) -> None:
        if self._marks and len(self._stack) == self._floor:
            self._pop_mark()
        else:
            self._pop()

    def _op_pop_mark(self) -> None:
        self._pop_mark()

    def _op_dup(self) -> None:
        self._stack.append(self._top())

    # ---------------------------------------------------------------- memo

    def _op_memoize(self) -> None:
        self._memo[len(self._memo)] = self._top()

    def _op_put(self) -> None:
        self._memo[self._text_number()] = self._top()

    def _op_get(self) -> None:
        self._stack.append(self._memo[self._text_number()])

    def _op_long_binget(self) -> None:
        self._stack.append(self._memo[self._number(4)])

    # ---------------------------------------------------------------- numbers and constants

    def _text_number(self, line: bytes | None = None) -> int:
        line = self._line() if line is None else line
        self.limits.check("integer_bytes", len(line) // 2, "an integer of the pickle is too long")
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

        self._python2_text(codecs.escape_decode(line[1:-1])[0])

    def _op_binstring(self) -> None:
        self._python2_text(self._take(int.from_bytes(self._take(4), "little", signed=True)))

    def _op_short_binstring(self) -> None:
        self._python2_text(self._take(self._number(1)))

    def _bytes(self, nbytes: int) -> bytes | Blob:
        if not self._keep_blobs or nbytes < _BLOB_NBYTES:
            return self._take(nbytes)
        blob = Blob(self.offset, nbytes)
        if nbytes > self.file.nbytes - blob.offset:
            self._fail(
                f"a pickle instruction claims {nbytes} bytes, the file has {self.file.nbytes - blob.offset} left"
            )
        self._read += self._pos
        self._base, self._pos, self._data = blob.offset + nbytes, 0, b""
        self._refill()
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

    def _op_next_buffer(self) -> None:
        self._fail("the pickle's arrays are in buffers outside this file")

    def _op_nothing(self) -> None:
        """READONLY_BUFFER changes nothing that is kept."""

    # ---------------------------------------------------------------- containers

    def _op_empty_list(self) -> None:
        self._stack.append([])

    def _op_empty_dict(self) -> None:
        self._stack.append({})

    def _op_empty_set(self) -> None:
        self._stack.append(set())

    def _op_list(self) -> None:
        self._stack.append(self._pop_mark())

    def _op_dict(self) -> None:
        items = self._pop_mark()
        self._stack.append({})
        self._set_items(items)

    def _op_frozenset(self) -> None:
        self._stack.append(frozenset(self._hashable(item) for item in self._pop_mark()))

    def _op_append(self) -> None:
        item = self._pop()
        self._append_items([item])

    def _op_appends(self) -> None:
        self._append_items(self._pop_mark())

    def _append_items(self, items: list[object]) -> None:
        target = self._top()
        if type(target) is list:
            target.extend(items)
        elif isinstance(target, Opaque):
            target.items.extend(items)
        else:
            self._fail(f"the pickle appends to {type(target).__name__}, which is no list")

    def _op_additems(self) -> None:
        items = self._pop_mark()
        target = self._top()
        if not isinstance(target, set):
            self._fail(f"the pickle adds to {type(target).__name__}, which is no set")
        target.update(self._hashable(item) for item in items)

    def _op_setitem(self) -> None:
        value, key = self._pop(), self._pop()
        self._set_items([key, value])

    def _op_setitems(self) -> None:
        self._set_items(self._pop_mark())

    def _set_items(self, items: list[object]) -> None:
        target = self._top()
        if len(items) % 2:
            self._fail("the pickle sets a key without a value")
        if isinstance(target, dict):
            for at in range(0, len(items), 2):
                key = items[at]
                target[key if type(key) is str else self._hashable(key)] = items[at + 1]
        elif isinstance(target, Opaque):
            target.pairs.extend(zip(items[::2], items[1::2]))
        else:
            self._fail(f"the pickle sets an item of {type(target).__name__}, which is no mapping")

    def _hashable(self, key: object) -> object:
        """The key, if hashing it takes bounded time: a tuple of tuples can hold one value 2**60 times over."""
        pending, seen = [(key, 0)], 0
        while pending:
            item, depth = pending.pop()
            seen += 1
            if seen > 1000 or depth > 16:
                self._fail("a key of a mapping is nested too deeply")
            if isinstance(item, tuple):
                pending.extend((part, depth + 1) for part in item)
            elif isinstance(item, (list, dict, set, bytearray)):
                self._fail(f"the pickle uses {type(item).__name__} as a key")
        return key

    # ---------------------------------------------------------------- names and objects

    def _look_up(self, module: object, name: object) -> None:
        if not isinstance(module, str) or not isinstance(name, str):
            self._fail("a name that the pickle looks up is no text")
        found = self.globals.get((module, name))
        if found is None:
            found = Global(module, name, self.offset, self._constructors.get((module, name)))
            self.globals[module, name] = found
        self._stack.append(CONSTANTS.get((module, name), found))

    def _op_global(self) -> None:
        module = self._line().decode("utf-8")
        self._look_up(module, self._line().decode("utf-8"))

    def _op_stack_global(self) -> None:
        name, module = self._pop(), self._pop()
        self._look_up(module, name)

    def _op_inst(self) -> None:
        module, name = self._line().decode("utf-8"), self._line().decode("utf-8")
        args = tuple(self._pop_mark())
        self._look_up(module, name)
        self._stack[-1] = self._call(self._stack[-1], args)

    def _op_obj(self) -> None:
        items = self._pop_mark()
        self._stack.append(self._call(items[0], tuple(items[1:])))

    def _op_newobj(self) -> None:
        args, cls = self._pop(), self._pop()
        self._stack.append(self._call(cls, args))

    def _op_newobj_ex(self) -> None:
        kwargs, args, cls = self._pop(), self._pop(), self._pop()
        made = self._call(cls, args)
        if kwargs and isinstance(made, Opaque):
            made.args = (args, kwargs)
        self._stack.append(made)

    def _extension(self, code: int) -> None:
        self._stack.append(Opaque("copyreg", f"extension_{code}"))

    def _op_ext1(self) -> None:
        self._extension(self._number(1))

    def _op_ext2(self) -> None:
        self._extension(self._number(2))

    def _op_ext4(self) -> None:
        self._extension(self._number(4))

    def _call(self, function: object, args: object) -> object:
        """What a call gives: our own constructor's value, or a record of the call."""
        if isinstance(function, Global):
            if function.build is not None and isinstance(args, tuple):
                try:
                    return function.build(args)
                except Unfit:
                    pass
            return Opaque(function.module, function.name, args)
        # A thing that was itself built is called: shown as such, whatever it is.
        return Opaque("builtins", "call", (function, args))

    def _op_persid(self) -> None:
        self._stack.append(self._persistent(self._line().decode("utf-8")))

    def _op_build(self) -> None:
        state = self._pop()
        target = self._top()
        self._stack[-1] = apply_state(target, state)

    def _op_proto(self) -> None:
        version = self._number(1)
        if version > 5:
            self._fail(f"the pickle is of protocol {version}, which doesn't exist")

    def _op_frame(self) -> None:
        nbytes = self._number(8)
        if nbytes > self.file.nbytes - self.offset:
            self._fail(
                f"a frame of the pickle claims {nbytes} bytes, the file has {self.file.nbytes - self.offset} left"
            )


_COLD = {
    0x30: "_op_pop", 0x31: "_op_pop_mark", 0x32: "_op_dup", 0x94: "_op_memoize", 0x70: "_op_put", 0x67: "_op_get",
    0x6A: "_op_long_binget", 0x49: "_op_int", 0x4C: "_op_long", 0x46: "_op_float", 0x47: "_op_binfloat",
    0x4A: "_op_binint", 0x4D: "_op_binint2", 0x8A: "_op_long1", 0x8B: "_op_long4", 0x4E: "_op_none", 0x88: "_op_newtrue",
    0x58: "_op_binunicode", 0x8C: "_op_short_binunicode", 0x8D: "_op_binunicode8", 0x56: "_op_unicode",
    0x53: "_op_string", 0x54: "_op_binstring", 0x55: "_op_short_binstring", 0x42: "_op_binbytes",
    0x43: "_op_short_binbytes", 0x8E: "_op_binbytes8", 0x96: "_op_bytearray8", 0x97: "_op_next_buffer",
    0x98: "_op_nothing", 0x5D: "_op_empty_list", 0x7D: "_op_empty_dict", 0x8F: "_op_empty_set", 0x6C: "_op_list",
    0x64: "_op_dict", 0x91: "_op_frozenset", 0x61: "_op_append", 0x65: "_op_appends", 0x90: "_op_additems",
    0x73: "_op_setitem", 0x75: "_op_setitems", 0x63: "_op_global", 0x93: "_op_stack_global", 0x69: "_op_inst",
    0x6F: "_op_obj", 0x81: "_op_newobj", 0x92: "_op_newobj_ex", 0x82: "_op_ext1", 0x83: "_op_ext2", 0x84: "_op_ext4",
    0x50: "_op_persid", 0x62: "_op_build", 0x80: "_op_proto", 0x95: "_op_frame",
}  # fmt: skip
