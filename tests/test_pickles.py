"""The interpreter of pickles gives what ``pickle.loads`` gives, and ends on anything else with one of our errors."""

from __future__ import annotations

import collections
import pickle
import pickletools
import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from statedict.errors import CorruptFile, LimitExceeded
from statedict.formats.pickles import Machine
from statedict.formats.records import Blob, Global, MappingRecord
from statedict.io.ranges import MemoryFile
from statedict.limits import Limits
from statedict.manifest import Opaque

_MODULUS = 2**61 - 1


def _named(pid: object) -> object:
    return ("named", pid)


def run(data: bytes, **options: Any) -> object:
    return Machine(MemoryFile(data), persistent=_named, **options).run()


def text(value: str) -> bytes:
    raw = value.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def long1(value: int) -> bytes:
    raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(raw)]) + raw


def name(module: str, attribute: str) -> bytes:
    return f"c{module}\n{attribute}\n".encode()


def identity(value: object, seen: dict[int, int] | None = None) -> object:
    """The value with its types, its floats as bytes, and a number for each container, so that sharing is compared."""
    seen = {} if seen is None else seen
    if isinstance(value, float):
        return "float", struct.pack("<d", value)
    if isinstance(value, complex):
        return "complex", struct.pack("<2d", value.real, value.imag)
    if isinstance(value, (list, dict, set, bytearray)):
        if id(value) in seen:
            return "again", seen[id(value)]
        seen[id(value)] = len(seen)
    if isinstance(value, dict):
        return "dict", [(identity(key, seen), identity(item, seen)) for key, item in value.items()]
    if isinstance(value, (list, tuple)):
        return type(value).__name__, [identity(item, seen) for item in value]
    if isinstance(value, (set, frozenset)):
        return type(value).__name__, sorted((identity(item) for item in value), key=repr)
    return type(value).__name__, value


ATOMS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**80), 2**80),
    st.sampled_from([0, 255, 256, 65535, 65536, 2**31 - 1, 2**31, -(2**31), 2**2000, -(2**2000), 2**8000]),
    st.floats(),
    st.complex_numbers(),
    st.text(st.characters(), max_size=12),
    st.binary(max_size=12),
    st.sampled_from(["x" * 300, "\ud800", "\x00\n\r\x1a\\u0041", b"y" * 300, ...]),
)
KEYS = st.one_of(ATOMS.filter(lambda atom: atom is not ...), st.tuples(st.integers(), st.text(max_size=3)))


def _containers(inner: st.SearchStrategy[object]) -> st.SearchStrategy[object]:
    return st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=4).map(tuple),
        st.dictionaries(KEYS, inner, max_size=4),
        st.sets(KEYS, max_size=4),
        st.frozensets(KEYS, max_size=4),
        st.binary(max_size=4).map(bytearray),
        st.tuples(inner, st.integers(2, 3)).map(lambda pair: [pair[0]] * pair[1]),
    )


VALUES = st.recursive(ATOMS, _containers, max_leaves=12)


@pytest.mark.parametrize("protocol", range(6))
@given(value=VALUES)
def test_a_plain_value_comes_out_as_it_went_in(value: object, protocol: int) -> None:
    data = pickle.dumps(value, protocol)

    assert identity(pickle.loads(data)) == identity(run(data))


@pytest.mark.parametrize("protocol", range(6))
def test_long_containers_come_in_batches(protocol: int) -> None:
    value = {"list": list(range(3000)), "dict": {i: str(i) for i in range(3000)}, "set": set(range(3000))}

    assert value == run(pickle.dumps(value, protocol))


@pytest.mark.parametrize("nbytes", [100, 16 * 1024, 1024 * 1024])
def test_an_instruction_may_lie_across_two_windows(nbytes: int) -> None:
    value = [["a" * (nbytes - 40 + i), i, 2**40 + i, "b" * i, float(i)] for i in range(60)]

    assert value == run(pickle.dumps(value, 4))


def test_a_stream_ends_where_the_next_one_begins() -> None:
    first, second = pickle.dumps([1, "a"], 2), pickle.dumps({"b": 2}, 4)
    machine = Machine(MemoryFile(b"junk" + first + second), offset=4, persistent=_named)

    assert ([1, "a"], 4 + len(first)) == (machine.run(), machine.offset)


INT4 = b"\x05\0\0\0"
# One stream for each instruction, and what it gives. An opaque record stands as its dotted name.
STREAMS: dict[str, tuple[bytes, object]] = {
    "INT": (b"I-17\n.", -17),
    "BININT": (b"J\xfe\xff\xff\xff.", -2),
    "BININT1": (b"K\xff.", 255),
    "BININT2": (b"M\x01\x02.", 513),
    "LONG": (b"L123456789012345678901234567890L\n.", 123456789012345678901234567890),
    "LONG1": (b"\x8a\x02\x00\xff.", -256),
    "LONG4": (b"\x8b\x02\0\0\0\x00\xff.", -256),
    "STRING": (b"S'a\\tb\\x41'\n.", "a\tbA"),
    "BINSTRING": (b"T\x02\0\0\0ab.", "ab"),
    "SHORT_BINSTRING": (b"U\x02a\xff.", b"a\xff"),
    "BINBYTES": (b"B\x02\0\0\0ab.", b"ab"),
    "SHORT_BINBYTES": (b"C\x02ab.", b"ab"),
    "BINBYTES8": (b"\x8e\x02\0\0\0\0\0\0\0ab.", b"ab"),
    "BYTEARRAY8": (b"\x96\x02\0\0\0\0\0\0\0ab.", bytearray(b"ab")),
    "READONLY_BUFFER": (b"N\x98.", None),
    "NONE": (b"N.", None),
    "NEWTRUE": (b"\x88.", True),
    "NEWFALSE": (b"\x89.", False),
    "UNICODE": (b"V\\u00e9b\n.", "éb"),
    "SHORT_BINUNICODE": (b"\x8c\x02ab.", "ab"),
    "BINUNICODE": (b"X\x02\0\0\0ab.", "ab"),
    "BINUNICODE8": (b"\x8d\x02\0\0\0\0\0\0\0ab.", "ab"),
    "FLOAT": (b"F1.5\n.", 1.5),
    "BINFLOAT": (b"G?\xf8\0\0\0\0\0\0.", 1.5),
    "EMPTY_LIST": (b"].", []),
    "APPEND": (b"]Na.", [None]),
    "APPENDS": (b"](NK\x01e.", [None, 1]),
    "LIST": (b"(NK\x01l.", [None, 1]),
    "EMPTY_TUPLE": (b").", ()),
    "TUPLE": (b"(NK\x01t.", (None, 1)),
    "TUPLE1": (b"N\x85.", (None,)),
    "TUPLE2": (b"NK\x01\x86.", (None, 1)),
    "TUPLE3": (b"NK\x01K\x02\x87.", (None, 1, 2)),
    "EMPTY_DICT": (b"}.", {}),
    "DICT": (b"(K\x01Nd.", {1: None}),
    "SETITEM": (b"}K\x01Ns.", {1: None}),
    "SETITEMS": (b"}(K\x01NK\x02Nu.", {1: None, 2: None}),
    "EMPTY_SET": (b"\x8f.", set()),
    "ADDITEMS": (b"\x8f(K\x01K\x02\x90.", {1, 2}),
    "FROZENSET": (b"(K\x01K\x02\x91.", frozenset({1, 2})),
    "POP": (b"NK\x010.", None),
    "DUP": (b"]2\x86.", ([], [])),
    "MARK": (b"(t.", ()),
    "POP_MARK": (b"N(K\x01K\x021.", None),
    "GET": (b"Np7\n0g7\n.", None),
    "BINGET": (b"Nq\x070h\x07.", None),
    "LONG_BINGET": (b"Nr" + INT4 + b"0j" + INT4 + b".", None),
    "PUT": (b"Np7\n.", None),
    "BINPUT": (b"Nq\x07.", None),
    "LONG_BINPUT": (b"Nr" + INT4 + b".", None),
    "MEMOIZE": (b"N\x940h\x00.", None),
    "EXT1": (b"\x82\x07.", "copyreg.extension_7"),
    "EXT2": (b"\x83\x07\x01.", "copyreg.extension_263"),
    "EXT4": (b"\x84\x07\0\0\0.", "copyreg.extension_7"),
    "GLOBAL": (b"csome.where\nThing\n.", "some.where.Thing"),
    "STACK_GLOBAL": (b"\x8c\x0asome.where\x8c\x05Thing\x93.", "some.where.Thing"),
    "REDUCE": (b"csome.where\nThing\n)R.", "some.where.Thing"),
    "BUILD": (b"csome.where\nThing\n)RNb.", "some.where.Thing"),
    "INST": (b"(K\x01isome.where\nThing\n.", "some.where.Thing"),
    "OBJ": (b"(csome.where\nThing\nK\x01o.", "some.where.Thing"),
    "NEWOBJ": (b"csome.where\nThing\n)\x81.", "some.where.Thing"),
    "NEWOBJ_EX": (b"csome.where\nThing\n)}K\x01Ns\x92.", "some.where.Thing"),
    "PROTO": (b"\x80\x05N.", None),
    "STOP": (b"N.", None),
    "FRAME": (b"\x95\x02\0\0\0\0\0\0\0N.", None),
    "PERSID": (b"Pabc\n.", ("named", "abc")),
    "BINPERSID": (b"K\x05Q.", ("named", 5)),
}


@pytest.mark.parametrize("instruction", STREAMS)
def test_every_instruction_is_carried_out(instruction: str) -> None:
    data, expected = STREAMS[instruction]
    found = run(data)

    assert expected == (found.type if isinstance(found, (Opaque, Global)) else found)


def test_every_instruction_has_a_stream_but_that_of_foreign_buffers() -> None:
    assert {"NEXT_BUFFER"} == {opcode.name for opcode in pickletools.opcodes} - set(STREAMS)


def test_dup_gives_the_same_object_twice() -> None:
    first, second = run(b"]2\x86.")  # type: ignore[misc]

    assert first is second


def test_an_unknown_class_keeps_all_that_it_would_be_given() -> None:
    stream = name("some.where", "Thing") + b"K\x01\x85}" + text("k") + b"Ns\x92(K\x02K\x03e(K\x04K\x05uK\x06b."
    made = run(stream)
    assert isinstance(made, Opaque)

    assert (((1,), {"k": None}), 6, [2, 3], [(4, 5)]) == (made.args, made.state, made.items, made.pairs)


def test_subclasses_of_containers_keep_their_items() -> None:
    value = collections.deque([1, 2], maxlen=5)
    made = run(pickle.dumps(value, 2))
    assert isinstance(made, Opaque)

    assert ("collections.deque", [1, 2]) == (made.type, made.items)


@pytest.mark.parametrize("protocol", range(6))
def test_an_ordered_dict_keeps_its_order_and_attributes(protocol: int) -> None:
    value = collections.OrderedDict(b=1, a=2)
    value.extra = [1]  # type: ignore[attr-defined]
    made = run(pickle.dumps(value, protocol))
    assert isinstance(made, MappingRecord)

    assert (["b", "a"], {"extra": [1]}) == (list(made), made.attributes)


def test_python_2_ordered_dict_is_a_list_of_pairs() -> None:
    made = run(name("collections", "OrderedDict") + b"](](U\x01bK\x01e](U\x01aK\x02ee\x85R.")
    assert isinstance(made, MappingRecord)

    assert [("b", 1), ("a", 2)] == list(made.items())


def test_long_bytes_stay_in_the_file() -> None:
    data = pickle.dumps([b"a" * 70_000, "after", b"b" * 65_536, b"short"], 4)
    first, after, second, short = run(data, keep_blobs=True)  # type: ignore[misc]
    assert isinstance(first, Blob) and isinstance(second, Blob)

    assert (b"a" * 70_000, b"b" * 65_536) == tuple(data[b.offset : b.offset + b.nbytes] for b in (first, second))
    assert ("after", b"short") == (after, short)


def test_what_is_looked_up_is_listed_and_never_imported() -> None:
    machine = Machine(MemoryFile(name("os", "system") + text("false") + b"\x85R."), persistent=_named)
    made = machine.run()
    assert isinstance(made, Opaque)

    assert ("os.system", ("false",), [("os", "system")]) == (made.type, made.args, list(machine.globals))


# ------------------------------------------------------------------------- streams that are damaged, or made to harm

DAG = b")" + b"q\x00h\x00\x86" * 60
TENSOR = name("torch._utils", "_rebuild_tensor_v2")
BAD = {
    "stack underflow": b"a.",
    "stack underflow below a mark": b"K\x01(0a.",
    "no mark": b"t.",
    "nothing at the end": b".",
    "two values at the end": b"NN.",
    "a mark at the end": b"N(.",
    "no such instruction": b"\xff.",
    "no stop": b"N",
    "half an instruction": b"J\x01\x02",
    "half a memo number": b"Nr\x01",
    "memo miss": b"h\x05.",
    "long memo miss": b"j\x05\0\0\0.",
    "text memo miss": b"g5\n.",
    "memo number too large": b"Np99999999999999999999\n.",
    "memo number negative": b"Np-1\n.",
    "list as key": b"}]Ns.",
    "dict in a set": b"\x8f(}\x90.",
    "bytearray in a frozen set": b"(\x96\0\0\0\0\0\0\0\0\x91.",
    "set of lists": name("builtins", "set") + b"(]l\x85R.",
    "slice as key": b"}" + name("builtins", "slice") + b"K\x01K\x02\x86RNs.",
    "negative length": b"\x8b\xfb\xff\xff\xff.",
    "negative text length": b"T\xff\xff\xff\xffabc.",
    "text beyond the end": b"\x8d" + struct.pack("<Q", 2**62) + b"aa.",
    "bytes beyond the end": b"\x8e" + struct.pack("<Q", 2**63 + 5) + b"a.",
    "bytearray beyond the end": b"\x96" + struct.pack("<Q", 2**40) + b"a.",
    "line without end": b"I12345",
    "very long line": b"c" + b"a" * 200_000 + b"\n",
    "frame beyond the end": b"\x95" + struct.pack("<Q", 2**40) + b"N.",
    "protocol of the future": b"\x80\x09N.",
    "bad UTF-8": b"X\x02\0\0\0\xff\xff.",
    "bad UTF-8 in a name": b"c\xff\nb\n.",
    "bad escape": b"S'a\\q'\n.",
    "bad octal escape": b"S'\\777'\n.",
    "half an escape": b"S'\\x4'\n.",
    "no quotes": b"Sabc\n.",
    "bad unicode escape": b"V\\u12\n.",
    "bad number": b"I1_0\n.",
    "empty number": b"I\n.",
    "bad float": b"Fzz\n.",
    "very long float": b"F" + b"1" * 200 + b"\n.",
    "name that is no text": b"K\x01K\x02\x93.",
    "buffers outside": b"\x97.",
    "append to a dict": b"}Na.",
    "add to a dict": b"}(N\x90.",
    "set an item of a list": b"]NNs.",
    "key without value": b"}(Nu.",
    "object without class": b"(o.",
    "many marks": b"(" * 10**6,
    "many duplicates": b"N" + b"2" * 10**6 + b".",
    "key that is one tuple 2**60 times": b"}" + DAG + b"Ns.",
    "the same text encoded for ever": name("_codecs", "encode")
    + b"q\x00"
    + text("a" * 100_000)
    + text("latin1")
    + b"\x86q\x01]("
    + b"h\x00h\x01R" * 5000
    + b"e.",
    "the same list copied for ever": name("builtins", "list")
    + b"q\x00("
    + b"N" * 100_000
    + b"l\x85q\x01]("
    + b"h\x00h\x01R" * 5000
    + b"e.",
    "the same state set for ever": name("collections", "OrderedDict")
    + b"q\x00}("
    + b"".join(text(str(i)) + b"N" for i in range(10_000))
    + b"uq\x01]("
    + b"h\x00)Rh\x01b" * 1000
    + b"e.",
    "a storage that is a deep list": TENSOR + b"(" + b"]" * 50_000 + b"a" * 49_999 + b"K\x00))\x89NtR.",
}


@pytest.mark.parametrize("defect", BAD)
def test_a_damaged_stream_is_refused_at_its_byte(defect: str) -> None:
    with pytest.raises(CorruptFile) as caught:
        run(BAD[defect])

    assert caught.value.offset is not None and caught.value.hint is not None


COLLIDING = [long1(i * _MODULUS) for i in range(1, 2000)]
SLOW = {
    "dict": b"}(" + b"N".join(COLLIDING) + b"Nu.",
    "dict, one by one": b"}" + b"".join(key + b"Ns" for key in COLLIDING) + b".",
    "set": b"\x8f(" + b"".join(COLLIDING) + b"\x90.",
    "frozenset": b"(" + b"".join(COLLIDING) + b"\x91.",
    "set of protocol 2": name("__builtin__", "set") + b"]q\x01(" + b"".join(COLLIDING) + b"e\x85R.",
    "tuples": b"}(" + b"".join(key + b"\x85N" for key in COLLIDING) + b"u.",
    "OrderedDict of Python 2": name("collections", "OrderedDict")
    + b"](" + b"".join(b"](" + key + b"Ne" for key in COLLIDING) + b"e\x85R.",
}  # fmt: skip


@pytest.mark.parametrize("where", SLOW)
def test_numbers_chosen_to_share_one_hash_are_refused(where: str) -> None:
    with pytest.raises(CorruptFile, match="found slowly"):
        run(SLOW[where])


def test_ordinary_numbers_and_tuples_are_no_attack() -> None:
    value = {i * 2**20: None for i in range(5000)} | {(i, -i): None for i in range(5000)} | {-1: 0, -2: 0, 2**70: 0}

    assert value == run(pickle.dumps(value, 4))


LIMITS = {
    "integer_bytes": b"\x8b" + struct.pack("<i", 5000) + b"a" * 5000 + b".",
    "opcodes": b"N0" * 600 + b"N.",
    "pickle_bytes": text("a" * 10_000) + b"0" + text("b" * 10_000) + b".",
}


@pytest.mark.parametrize("limit", LIMITS)
def test_a_stream_that_asks_for_too_much_names_the_limit(limit: str) -> None:
    with pytest.raises(LimitExceeded) as caught:
        run(LIMITS[limit], limits=Limits(opcodes=1000, pickle_bytes=15_000))

    assert (limit, True) == (caught.value.limit, f"--limit {limit}=" in str(caught.value))


@given(value=VALUES, protocol=st.integers(0, 5), data=st.data())
def test_a_mutated_stream_gives_a_value_or_one_of_our_errors(value: object, protocol: int, data: st.DataObject) -> None:
    stream = bytearray(pickle.dumps([value, collections.OrderedDict(a=1)], protocol))
    for _ in range(data.draw(st.integers(1, 4))):
        stream[data.draw(st.integers(0, len(stream) - 1))] = data.draw(st.integers(0, 255))
    try:
        run(bytes(stream))
    except (CorruptFile, LimitExceeded) as error:
        assert "\n" not in str(error)


@given(data=st.binary(max_size=60))
def test_any_bytes_give_a_value_or_one_of_our_errors(data: bytes) -> None:
    try:
        run(data)
    except (CorruptFile, LimitExceeded) as error:
        assert "\n" not in str(error)
