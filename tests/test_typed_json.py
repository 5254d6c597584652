"""Values keep their types through JSON."""

from __future__ import annotations

import json
import struct
from collections import Counter, OrderedDict, defaultdict
from datetime import date, datetime, time, timedelta, timezone
from decimal import Decimal
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import statedict
from statedict.errors import Unsupported
from statedict.formats.typed_json import decode, encode, encode_value
from statedict.formats.value_tree import TreeBuilder
from statedict.limits import DEFAULT_LIMITS
from statedict.manifest import Node, NumpyScalar, Opaque, TorchValue


def through_json(value: object) -> Any:
    """The tree of a mapping in memory, written as JSON text and read again, as Python values."""
    with statedict.open({"value": value}) as checkpoint:
        text = json.dumps(encode(checkpoint.manifest.structure, lambda entry: entry.key))
    root = TreeBuilder(lambda ref: None, DEFAULT_LIMITS, path="test").build(decode(json.loads(text), str)).root  # type: ignore[arg-type, return-value]
    return plain(root)["value"]


def plain(root: Node) -> Any:
    from statedict.checkpoint import Checkpoint
    from statedict.manifest import Manifest

    return Checkpoint(Manifest("test", (), (), {}, {}, root), [], source="test").tree()


def typed(value: object) -> object:
    """A form in which values of different types, NaN and minus zero are told apart."""
    if isinstance(value, dict):
        return type(value).__name__, [(typed(key), typed(item)) for key, item in value.items()]
    if isinstance(value, (list, tuple)):
        return type(value).__name__, [typed(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return type(value).__name__, sorted([typed(item) for item in value], key=repr)
    if isinstance(value, (float, complex)):
        return type(value).__name__, struct.pack("<2d", value.real, value.imag)
    return type(value).__name__, repr(value)


scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.complex_numbers()
    | st.text(st.characters(), max_size=5)
    | st.binary(max_size=5)
    | st.datetimes(timezones=st.just(timezone.utc) | st.none())
    | st.dates()
    | st.times()
    | st.timedeltas()
    | st.decimals()
    | st.slices(5)
    | st.builds(range, st.integers(0, 9))
    | st.just(Ellipsis)
)
hashable = (
    st.text(max_size=3) | st.integers() | st.tuples(st.integers(), st.text(max_size=2)) | st.booleans() | st.none()
)
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.tuples(inner, inner)
        | st.dictionaries(st.text(max_size=3), inner, max_size=4)
        | st.dictionaries(hashable, inner, max_size=4)
        | st.dictionaries(st.text(max_size=3), inner, max_size=4).map(OrderedDict)
        | st.frozensets(hashable, max_size=3)
        | st.sets(hashable, max_size=3)
    ),
    max_leaves=12,
)


@given(values)
def test_what_was_written_is_what_is_read(value: object) -> None:
    assert typed(value) == typed(through_json(value))


@pytest.mark.parametrize(
    "value",
    [
        Counter("abca"),
        defaultdict(None, {"a": 1}),
        date(2026, 1, 2),
        time(1, 2, 3, 4, timezone.utc, fold=1),
        datetime(2026, 1, 2, tzinfo=timezone(timedelta(hours=2), "here")),
        Decimal("sNaN"),
        PurePosixPath("/a/b"),
        PureWindowsPath("c:\\a"),
        bytearray(b"\x00\x01"),
        10**5000 // 10**4990,
        TorchValue("Size", (1, 2)),
        TorchValue("dtype", "bfloat16"),
        NumpyScalar.of("f4", b"\x00\x00\x80\x3f"),
        struct.unpack(">d", b"\xff\xf8\x00\x00\x00\x00\x00\x01")[0],
        complex(-0.0, struct.unpack(">d", b"\xff\xf8\x00\x00\x00\x00\x00\x00")[0]),
        {"a": (), "b": [], "c": {}, "d": set(), "e": OrderedDict(), "f": Counter()},
    ],
    ids=repr,
)
def test_a_value_of_each_kind_comes_back(value: object) -> None:
    assert typed(value) == typed(through_json(value))


def test_a_record_keeps_its_class_and_fields() -> None:
    record = Opaque("package.module", "Class", (1, "two"), {"a": 3})
    record.items, record.pairs = [4], [("k", 5)]
    found = through_json(record)

    assert (record.type, record.args, record.state) == (found.type, found.args, found.state)
    assert (record.items, record.pairs) == (found.items, found.pairs)


def test_a_set_is_written_in_an_order_of_its_own() -> None:
    first = encode_value({"b", "a", "c"}, lambda entry: "")

    assert {"set": ["a", "b", "c"]} == first


def test_a_value_of_an_unknown_type_is_refused() -> None:
    with pytest.raises(Unsupported, match=r"builtins\.memoryview"):
        encode_value(memoryview(b""), lambda entry: "", "the.key")


def test_a_tree_that_json_readers_can_not_take_is_refused() -> None:
    value: Any = "leaf"
    for _ in range(300):
        value = {"k": value}

    with pytest.raises(Unsupported, match="too deeply"):
        through_json(value)


@pytest.mark.parametrize(
    "text",
    ["{}", '{"what": 1}', '{"float": "five"}', '{"bytes": "?"}', '{"complex": [1]}', '{"torch": "x", "value": "y"}',
     '{"numpy": "f4", "bytes": "AA=="}', '{"slice": ["a", 1, 2]}', '{"datetime": [1]}', '{"opaque": 1, "pairs": [1]}',
     '{"set": [[1]]}', '{"timezone": [0, 0, 0]}', '{"Decimal": "x"}'],
)  # fmt: skip
def test_anything_else_is_an_error_of_value_or_type(text: str) -> None:
    with pytest.raises((ValueError, TypeError, KeyError, IndexError, ArithmeticError)):
        decode(json.loads(text), lambda name: name)
