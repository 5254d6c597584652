"""The interpreter of pickle bytes. It imports nothing and calls nothing that a file names.

Protocols 0 to 5 (``pickletools`` of CPython documents each instruction). The stack, the marks and the memo are those of
CPython's own reader, an instruction that reaches below the last mark is an error as there, and nothing recurses. A name is
looked up in the table of ``constructors``, whose functions are this program's own; every other name becomes an inert
``Opaque``. Lengths are checked against the bytes that are left before anything is allocated.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from itertools import repeat

from statedict.errors import CorruptFile, LimitExceeded, StateDictError
from statedict.formats.constructors import CONSTANTS, CONSTRUCTORS, COPYING, apply_state
from statedict.formats.pickle_keys import KeyGuard
from statedict.formats.pickle_literals import Literals
from statedict.formats.pickle_window import DAMAGED
from statedict.formats.records import Builder, Global, Unfit
from statedict.io.ranges import File
from statedict.limits import DEFAULT_LIMITS, Limits
from statedict.manifest import Opaque

__all__ = ["Machine"]

_TOO_SHORT = "the pickle ends in the middle of an instruction"
_FOUR_BYTES = struct.Struct("<I").unpack_from
# Memo entries are numbered from 0; the wide instruction has room for no more than this.
_MOST_MEMO = 2**32
# Elements that constructors may copy out of what the pickle holds, and how many more for every byte of it.
_FREE_COPIES = 1_000_000
_COPIES_PER_BYTE = 16


class Machine(Literals):
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
        super().__init__(file, offset, limits, keep_blobs)
        self.globals: dict[tuple[str, str], Global] = {}
        self._persistent = persistent
        self._constructors = {**CONSTRUCTORS, **extra} if extra else CONSTRUCTORS
        self._keys = KeyGuard()
        self._copies = 0
        self._marks: list[int] = []
        self._floor = 0
        self._memo: dict[int, object] = {}
        self._cold: dict[int, Callable[[], None]] = {op: getattr(self, name) for op, name in _COLD.items()}

    def run(self) -> object:
        """The value that the stream builds, made of inert records.

        Raises ``CorruptFile`` at the offset of the instruction that can't be, or ``LimitExceeded``.
        """
        try:
            return self._loop()
        except StateDictError as error:
            if error.offset is None:
                error.offset = self.offset
            if isinstance(error, CorruptFile):
                error.hint = error.hint or DAMAGED
            raise error.located(self.file.path) from error.__cause__
        except IndexError as error:
            # The window ended (with the file), or the stack did.
            short = self._pos >= len(self._data)
            raise self._bad(
                _TOO_SHORT if short else "a pickle instruction finds too few values on the stack"
            ) from error
        except KeyError as error:
            raise self._bad(f"the pickle asks for memo entry {error.args[0]}, which was never stored") from error
        except struct.error as error:
            raise self._bad(_TOO_SHORT) from error
        except (ValueError, TypeError, OverflowError, UnicodeError) as error:
            raise self._bad(f"a pickle instruction can't be carried out ({type(error).__name__})") from error

    # ---------------------------------------------------------------- the loop

    def _loop(self) -> object:
        """Run to STOP. The instructions of a state dict are carried out here, the rare ones by the table.

        One loop with local names, because 100,000 tensors take 3.2 million instructions: through methods alone it
        took 2.3 times as long (measured on CPython 3.11).
        """
        self._refill()
        stack, memo, marks = self._stack, self._memo, self._marks
        push = stack.append
        four_bytes = _FOUR_BYTES
        data, pos, floor = self._data, self._pos, self._floor
        guard = self._guard()
        try:
            for _ in repeat(None, self.limits.opcodes):
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
                        memo[four_bytes(data, pos)[0]] = stack[-1]
                        pos += 4
                elif op == 0x68:  # BINGET
                    push(memo[data[pos]])
                    pos += 1
                elif op == 0x4B:  # BININT1
                    push(data[pos])
                    pos += 1
                elif op == 0x28:  # MARK
                    floor = len(stack)
                    marks.append(floor)
                elif op == 0x58:  # BINUNICODE
                    end = pos + 4 + four_bytes(data, pos)[0]
                    if end < guard:
                        text = data[pos + 4 : end].decode("utf-8", "surrogatepass")
                        push(text)
                        pos = end
                        if data[pos] == 0x72:  # LONG_BINPUT, which all but always follows
                            memo[four_bytes(data, pos + 1)[0]] = text
                            pos += 5
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
                    stack[-1] = made = self._call(stack[-1], args)
                    if pos < guard and data[pos] == 0x72:
                        memo[four_bytes(data, pos + 1)[0]] = made
                        pos += 5
                elif op == 0x74:  # TUPLE
                    items = tuple(stack[floor:])
                    if not marks:
                        raise IndexError
                    del stack[floor:]
                    marks.pop()
                    floor = marks[-1] if marks else 0
                    push(items)
                    if pos < guard and data[pos] == 0x72:
                        memo[four_bytes(data, pos + 1)[0]] = items
                        pos += 5
                elif op == 0x86 or op == 0x85 or op == 0x87:  # TUPLE2, TUPLE1, TUPLE3
                    count = op - 0x84
                    if len(stack) - count < floor:
                        raise IndexError
                    if count == 1:
                        stack[-1] = items = (stack[-1],)
                    else:
                        items = tuple(stack[-count:])
                        del stack[-count:]
                        push(items)
                    if pos < guard and data[pos] == 0x72:
                        memo[four_bytes(data, pos + 1)[0]] = items
                        pos += 5
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
        except BaseException:
            if data is self._data:
                self._pos = max(pos, self._pos)
            raise
        raise LimitExceeded("a pickle has too many instructions", limit="opcodes", most=self.limits.opcodes)

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
        index = self._text_number()
        if not 0 <= index < _MOST_MEMO:
            self._fail("the number of a memo entry is out of range")
        self._memo[index] = self._top()

    def _op_get(self) -> None:
        self._stack.append(self._memo[self._text_number()])

    def _op_long_binget(self) -> None:
        self._stack.append(self._memo[self._number(4)])

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
        items = self._pop_mark()
        self._stack.append(frozenset(self._keys.checked(items, item, self._done) for item in items))

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
        target.update(self._keys.checked(target, item, self._done) for item in items)

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
                if type(key) is not str:
                    self._keys.checked(target, key, self._done)
                target[key] = items[at + 1]
        elif isinstance(target, Opaque):
            target.pairs.extend(zip(items[::2], items[1::2]))
        else:
            self._fail(f"the pickle sets an item of {type(target).__name__}, which is no mapping")

    # ---------------------------------------------------------------- names and objects

    def _look_up(self, module: object, name: object) -> None:
        if not isinstance(module, str) or not isinstance(name, str):
            self._fail("a name that the pickle looks up is no text")
        found = self.globals.get((module, name))
        if found is None:
            build = self._constructors.get((module, name))
            found = Global(module, name, self.offset, build, (module, name) in COPYING)
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
        if kwargs and isinstance(cls, Global):
            self._stack.append(Opaque(cls.module, cls.name, (args, kwargs)))
        else:
            self._stack.append(self._call(cls, args))

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
                if function.copies and args:
                    self._weigh(function, args)
                try:
                    return function.build(args)
                except Unfit:
                    pass
            return Opaque(function.module, function.name, args)
        # A thing that was itself built is called: shown as such, whatever it is.
        return Opaque("builtins", "call", (function, args))

    def _weigh(self, function: Global, args: tuple[object, ...]) -> None:
        """Refuse a pickle that has a few long values copied again and again, or looked up among keys chosen for it."""
        self._spend(sum(len(arg) for arg in args if isinstance(arg, _SIZED)))
        for key in COPYING[function.module, function.name](args):
            self._keys.checked(args, key, self._done)

    def _spend(self, count: int) -> None:
        self._copies += count
        if self._copies > _FREE_COPIES + _COPIES_PER_BYTE * self._done:
            self._fail("the pickle copies the same values without end")

    def _op_persid(self) -> None:
        self._stack.append(self._persistent(self._line().decode("utf-8")))

    def _op_build(self) -> None:
        state = self._pop()
        if isinstance(state, _SIZED):
            self._spend(
                sum(len(part) for part in state if isinstance(part, dict)) if type(state) is tuple else len(state)
            )
        target = self._top()
        self._stack[-1] = apply_state(target, state)

    def _op_proto(self) -> None:
        version = self._number(1)
        if version > 5:
            self._fail(f"the pickle is of protocol {version}, which doesn't exist")

    def _op_frame(self) -> None:
        self._claim(self._number(8), "a frame of the pickle")


_SIZED = (str, bytes, bytearray, list, tuple, dict, set, frozenset)
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
