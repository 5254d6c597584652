"""Two checkpoints side by side, against what numpy and torch say of the same values."""

from __future__ import annotations

import json
import math
import os
from collections import OrderedDict
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors.numpy import save_file

import statedict
from statedict.ops.compare import compare
from statedict.ops.comparing.changes import Change
from statedict.ops.comparing.comparison import Comparison

Array = np.ndarray[Any, Any]

FLOATS = ["float16", "float32", "float64", "bfloat16"]
EIGHT_BITS = ["float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz"]
WHOLE = ["int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"]


def kind(name: str) -> np.dtype[Any]:
    return np.dtype(getattr(ml_dtypes, name, name))


def random(seed: int, *shape: int) -> Array:
    values: Array = np.random.default_rng(seed).standard_normal(shape)
    return values


def only(found: Comparison) -> Change:
    """The one record of a comparison, which says unequal."""
    assert not found
    assert 1 == len(found.changed)
    return found.changed[0]


# -------------------------------------------------------------------- keys, shapes, dtypes


def test_the_same_is_equal() -> None:
    value = {"a": random(1, 3, 4), "b": [np.arange(3), {"c": 1.5}], "d": "text"}
    found = compare(value, {"a": random(1, 3, 4), "b": [np.arange(3), {"c": 1.5}], "d": "text"})

    assert found
    assert ([], [], [], []) == (found.changed, found.only_in_a, found.only_in_b, found.renamed)
    assert (2, 2, 2) == (found.counts["tensors"], found.counts["objects"], found.counts["identical"])
    assert "The same 2 tensors and 2 other values." in str(found)


def test_keys_of_one_side_only_are_listed() -> None:
    found = compare({"a": np.ones(2), "b": np.ones(2)}, {"b": np.ones(2), "c": 3})

    assert not found
    assert (["a"], ["c"], []) == (found.only_in_a, found.only_in_b, found.changed)


def test_nesting_and_the_kinds_of_containers_do_not_matter() -> None:
    x = np.arange(4)
    flat = {"m.0": x, "m.1": x.copy(), "n.k": 1, "e": [], "t": (1, 2)}
    nested = OrderedDict(m=[x.copy(), x.copy()], n=OrderedDict(k=1), e=(), t=[1, 2])

    assert compare(flat, nested)


def test_paths_that_read_alike_are_matched_by_path() -> None:
    found = compare({"a.b": np.ones(1), "a": {"b": np.zeros(1)}}, {"a.b": np.ones(1)})

    assert ([".a.b"], [], []) == (found.only_in_a, found.only_in_b, found.changed)


def test_another_shape_is_one_record() -> None:
    record = only(compare({"a": np.ones((4, 3))}, {"a": np.zeros((4, 4))}))

    assert ("a", "shape", [4, 3], [4, 4]) == (record.key, record.kind, record.a, record.b)


@pytest.mark.parametrize(
    ("a", "b", "verdict", "mismatched"),
    [
        (np.float32([1, 2.5, np.nan, np.inf]), np.float64([1, 2.5, np.nan, np.inf]), "equal after cast", 0),
        (np.float32([1, 2]), np.float64([1, 3]), "differs", 1),
        (np.float32([0.1, 3]), np.float32([0.1, 3]).astype(ml_dtypes.bfloat16), "equal after cast", 1),
        (np.int64([2**53 + 1, 5]), np.float64([2**53, 5]), "differs", 1),
        (np.int64([2**63 - 1, -(2**63)]), np.float64([2.0**63, -(2.0**63)]), "differs", 1),
        (np.uint64([2**64 - 1, 7]), np.float64([2.0**64, 7]), "differs", 1),
        (np.int32([1, 2]), np.float32([1, 2]), "equal after cast", 0),
        (np.array([True, False]), np.uint8([1, 0]), "equal after cast", 0),
        (np.float64([1, 2]), np.complex128([1, 2 + 1e-9j]), "differs", 1),
    ],
)
def test_equal_values_of_another_dtype_are_one_record_of_dtype(
    a: Array, b: Array, verdict: str, mismatched: int
) -> None:
    for one, two in ((a, b), (b, a)):
        record = only(compare({"x": one}, {"x": two}))

        assert ("dtype", verdict, mismatched) == (record.kind, record.verdict, record.mismatched)
        assert (one.dtype.name, two.dtype.name) == (record.a, record.b)


def test_distances_of_integers_of_all_kinds_are_exact() -> None:
    low, high = np.int64([-(2**63), -1, 5, 7]), np.uint64([2**64 - 1, 0, 5, 4])
    for one, two in ((low, high), (high, low)):
        record = only(compare({"x": one}, {"x": two}))

        assert (3, 2**64 - 1 + 2**63) == (record.mismatched, record.max_abs)
    assert 2**64 - 1 == only(compare({"x": np.int64([-(2**63)])}, {"x": np.int64([2**63 - 1])})).max_abs


# -------------------------------------------------------------------- numbers


def oracle(a: Array, b: Array) -> dict[str, Any]:
    """The figures by numpy in float64 (or complex128); of finite values."""
    wide = np.complex128 if a.dtype.kind == "c" else np.float64
    one, two = a.astype(wide).reshape(-1), b.astype(wide).reshape(-1)
    apart, size = np.abs(one - two), np.abs(two)
    unequal = one != two
    counted = unequal & (size > 0)
    return {
        "numel": one.size,
        "mismatched": int(unequal.sum()),
        "max_abs": apart[unequal].max(),
        "max_rel": (apart[counted] / size[counted]).max() if counted.any() else None,
        "cosine": (np.vdot(one, two).real / np.linalg.norm(one) / np.linalg.norm(two)),
        "first": np.unravel_index(int(unequal.argmax()), a.shape),
    }


def agrees(record: Change, wanted: dict[str, Any], *, cosine: bool = True) -> bool:
    exact = all(getattr(record, name) == wanted[name] for name in ("numel", "mismatched", "first"))
    names = ("max_abs", "max_rel", "cosine") if cosine else ("max_abs", "max_rel")
    return exact and all(
        getattr(record, name) is wanted[name] is None or math.isclose(getattr(record, name), wanted[name], rel_tol=1e-9)
        for name in names
    )


@pytest.mark.parametrize("name", [*FLOATS, *EIGHT_BITS, *WHOLE, "complex64", "complex128"])
def test_the_numbers_of_every_dtype(name: str) -> None:
    values = random(2, 300, 350) * 20
    if name.startswith("complex"):
        values = values + 1j * random(3, 300, 350)
    if name.startswith("u"):
        values = np.abs(values)
    a = values.astype(kind(name))
    b = a.copy()
    b[200:, ::7] = (values[200:, ::7] * 1.3 + 2).astype(kind(name))
    record = only(compare({"x": a}, {"x": b}))

    assert ("value", "changed") == (record.kind, record.verdict)
    assert agrees(record, oracle(a, b), cosine=name not in WHOLE)
    assert compare({"x": a}, {"x": a.copy()})


def test_booleans() -> None:
    record = only(compare({"x": np.array([True, False, True])}, {"x": np.array([True, True, False])}))

    assert (2, 3, 1, (1,)) == (record.mismatched, record.numel, record.max_abs, record.first)


def test_nan_equals_nan_at_the_same_place_unless_told_otherwise() -> None:
    a = np.array([1, np.nan, np.nan, 4])
    b = np.array([1, np.nan, 3, np.nan])

    assert compare({"x": a, "f": math.nan}, {"x": a.copy(), "f": math.nan})
    record = only(compare({"x": a}, {"x": b}))
    assert (2, (2,)) == (record.mismatched, record.first)
    assert math.isnan(record.max_abs or 0)
    assert "nan" == record.to_dict()["max_abs"]
    strict = compare({"x": a, "f": math.nan}, {"x": a, "f": math.nan}, equal_nan=False)
    assert [("x", "value", 2), ("f", "object", None)] == [(c.key, c.kind, c.mismatched) for c in strict.changed]


ODD = [0.0, 1.0, -1.0, math.inf, -math.inf, math.nan]


@pytest.mark.parametrize("equal_nan", [True, False])
def test_complex_numbers_with_nan_and_infinity(equal_nan: bool) -> None:
    numbers = np.array([complex(real, imag) for real in ODD for imag in ODD])
    a, b = np.repeat(numbers, len(numbers)), np.tile(numbers, len(numbers))
    equal = (a == b) | (np.isnan(a) & np.isnan(b) & equal_nan)
    record = only(compare({"x": a}, {"x": b}, equal_nan=equal_nan))

    assert int((~equal).sum()) == record.mismatched
    assert int(equal.argmin()) == (record.first or (None,))[0]
    for one, two, same in zip(a, b, equal):
        assert same == bool(compare({"x": np.array([one, 1])}, {"x": np.array([two, 1])}, equal_nan=equal_nan))


def test_one_nan_does_not_hide_the_other_distances() -> None:
    assert 2 == only(compare({"x": np.array([np.nan, 1.0])}, {"x": np.array([0.0, 3.0])})).max_abs


def test_zeros_of_both_signs_and_other_nans_are_equal_in_other_bytes() -> None:
    other = np.array([0x7FF8000000000001, 0], np.uint64).view(np.float64)
    found = compare({"x": np.array([np.nan, -0.0])}, {"x": other})

    assert found
    assert (1, 0, []) == (found.counts["equal"], found.counts["identical"], found.changed)


def test_infinities_are_equal_where_their_signs_are() -> None:
    inf = np.inf
    record = only(compare({"x": np.array([inf, -inf, inf, 1])}, {"x": np.array([inf, -inf, -inf, 1])}, atol=inf))

    assert (1, inf, (2,)) == (record.mismatched, record.max_abs, record.first)


@pytest.mark.parametrize(("rtol", "atol", "equal"), [(None, 0.25, True), (0.02, None, True), (1e-3, 1e-3, False)])
def test_within_tolerance_counts_as_equal_where_one_is_given(
    rtol: float | None, atol: float | None, equal: bool
) -> None:
    a, b = np.float32([10, 20, 30]), np.float32([10, 20.1, 30.2])
    found = compare({"x": a}, {"x": b}, rtol=rtol, atol=atol)
    (record,) = found.changed

    assert equal == bool(found) == np.allclose(a, b, rtol=rtol or 0, atol=atol or 0)
    assert ("within tolerance" if equal else "changed", 0 if equal else 2) == (record.verdict, record.mismatched)
    assert math.isclose(0.2, record.max_abs or 0, rel_tol=1e-5)
    assert not compare({"x": a}, {"x": b})


@pytest.mark.parametrize("value", [-1.0, math.nan, "1"])
def test_a_tolerance_below_zero_is_refused(value: Any) -> None:
    with pytest.raises(statedict.StateDictError, match="rtol is no tolerance"):
        compare({}, {}, rtol=value)


@pytest.mark.parametrize("rtol", [0.0, 1e-3, 0.5])
@given(data=st.data())
def test_tolerance_is_that_of_allclose(rtol: float, data: st.DataObject) -> None:
    shape = data.draw(hnp.array_shapes(max_dims=2, max_side=4))
    numbers = st.floats(width=32) | st.sampled_from([0.0, -0.0, 1.0, 1.0009, 2.0])
    a, b = (data.draw(hnp.arrays(np.float32, shape, elements=numbers)) for _ in range(2))
    with np.errstate(all="ignore"):
        wide = a.astype(np.float64), b.astype(np.float64)
        close = np.isclose(*wide, rtol=rtol, atol=1e-3 if rtol else 0, equal_nan=True)
    found = compare({"x": a}, {"x": b}, rtol=rtol, atol=1e-3 if rtol else 0)

    assert bool(close.all()) == bool(found)
    assert int((~close).sum()) == sum(change.mismatched or 0 for change in found.changed)


def test_a_difference_anywhere_in_a_large_tensor_is_found(tmp_path: Path) -> None:
    a = random(4, 700, 1001).astype(np.float32)
    save_file({"x": a}, tmp_path / "a.safetensors")
    for place in ((0, 0), (65, 470), (350, 77), (699, 1000)):
        b = a.copy()
        b[place] += 1
        for other in (b, np.asfortranarray(b)):
            record = only(compare(tmp_path / "a.safetensors", {"x": other}))

            assert (1, a.size, place) == (record.mismatched, record.numel, record.first)


def test_views_are_compared_by_what_they_show() -> None:
    base = random(5, 60, 80)
    changed = base.copy()
    changed[7, 9] = 0
    for view in (lambda x: x.T, lambda x: x[:, ::3], lambda x: x[::-1], lambda x: x[3:9], lambda x: x[None, 7, 9]):
        same = compare({"x": view(base)}, {"x": np.ascontiguousarray(view(base))})
        found = compare({"x": view(base)}, {"x": view(changed)})

        assert same
        assert np.array_equal(view(base), view(changed)) == bool(found)
        for record in found.changed:
            assert {name: getattr(record, name) for name in ("mismatched", "first")} == {
                "mismatched": 1,
                "first": tuple(int(i[0]) for i in np.nonzero(view(base) != view(changed))),
            }


def test_repetitions_are_compared_once() -> None:
    a, b = (np.broadcast_to(np.array([0.0, value]), (10**12, 2)) for value in (2, 3))
    record = only(compare({"x": a}, {"x": b}))

    assert (10**12, 2 * 10**12, 1, (0, 1)) == (record.mismatched, record.numel, record.max_abs, record.first)
    assert compare({"x": a}, {"x": np.broadcast_to(np.array([0.0, 2.0]), (10**12, 2))})


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (1,)])
def test_scalars_and_empty_tensors(shape: tuple[int, ...]) -> None:
    one, two = np.ones(shape), np.zeros(shape)

    assert (not one.size) == bool(compare({"x": one}, {"x": two}))
    assert compare({"x": one}, {"x": one.copy()})


# -------------------------------------------------------------------- what isn't read


def no_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on, reading a tensor's bytes is a failure."""
    from statedict.io.ranges import LocalFile

    def refused(self: LocalFile, offset: int, buffer: memoryview) -> None:
        raise AssertionError(f"{self.path} is read at {offset}")

    monkeypatch.setattr(LocalFile, "read_into", refused)
    monkeypatch.setattr("statedict.ops.comparing.walks.are_same_bytes", None)


def test_equal_digests_are_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    value = {"x": random(6, 100)}
    statedict.convert(value, tmp_path / "a.safetensors")
    statedict.convert(value, tmp_path / "b.safetensors")
    with statedict.open(tmp_path / "a.safetensors") as a, statedict.open(tmp_path / "b.safetensors") as b:
        no_reading(monkeypatch)

        assert compare(a, b)


def test_the_same_memory_and_the_same_file_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x = random(7, 100)
    save_file({"x": x}, tmp_path / "a.safetensors")
    with statedict.open(tmp_path / "a.safetensors") as opened:
        no_reading(monkeypatch)

        assert compare({"x": x}, {"x": x})
        assert compare(opened, opened)
        assert not compare({"x": x[:50]}, {"x": x})


def test_a_file_that_ends_too_early_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    x = random(8, 100_000)
    save_file({"x": x}, path)
    with statedict.open(path) as opened:
        os.truncate(path, 300_000)

        with pytest.raises(statedict.CorruptFile, match="ends too early"):
            compare(opened, {"x": x})


def test_a_source_that_was_passed_open_stays_open(tmp_path: Path) -> None:
    save_file({"x": np.ones(3)}, tmp_path / "a.safetensors")
    with statedict.open(tmp_path / "a.safetensors") as opened:
        compare(opened, tmp_path / "a.safetensors")

        assert 3 == opened["x"].numpy().sum()


# -------------------------------------------------------------------- ties, ignored keys


def test_ties_matter() -> None:
    x = random(9, 5)
    record_a, record_b = compare({"a": x, "b": x, "c": x.copy()}, {"a": x, "b": x.copy(), "c": x.copy()}).changed

    assert ("a", "aliasing", "tied in a only", ["b"], []) == record_a[:5]
    assert ("b", "aliasing", "tied in a only", ["a"], []) == record_b[:5]
    assert compare({"a": x, "b": x}, {"a": (y := x.copy()), "b": y})


def test_ties_with_keys_of_one_side_only_are_told_by_those_keys() -> None:
    x = random(10, 5)
    found = compare({"a": x, "b": x}, {"a": x})

    assert ([], ["b"]) == (found.changed, found.only_in_a)


def test_other_partners_are_other_ties() -> None:
    x, y = np.ones(2), np.ones(2)
    found = compare({"a": x, "b": x, "c": y, "d": y}, {"a": x, "c": x, "b": y, "d": y})

    assert {"tied otherwise"} == {change.verdict for change in found.changed}
    assert (["b"], ["c"]) == (found.changed[0].a, found.changed[0].b)


def test_a_key_has_one_record() -> None:
    x = np.ones(2)
    found = compare({"a": x, "b": x}, {"a": x, "b": np.zeros(2)})

    assert [("a", "aliasing"), ("b", "value")] == sorted((change.key, change.kind) for change in found.changed)


@pytest.mark.parametrize("ignore", ["*.n", ["x.n", "y*"], ("?.n",)])
def test_ignored_keys_are_left_out(ignore: Any) -> None:
    found = compare(
        {"x": {"n": 1}, "y.n": np.ones(2), "z": np.ones(1)}, {"x": {"n": 2}, "z": np.ones(1)}, ignore=ignore
    )

    assert found
    assert 3 == found.counts["ignored"]
    assert not compare({"x.nn": 1}, {"x.nn": 2}, ignore="x.n")


def test_rules_are_applied_to_the_first(tmp_path: Path) -> None:
    from statedict.rules import strip_prefix

    save_file({"module.w": np.ones(2), "module.b": np.zeros(1)}, tmp_path / "a.safetensors")
    plain = {"w": np.ones(2), "b": np.zeros(1)}

    assert compare(tmp_path / "a.safetensors", plain, rules=[strip_prefix("module.")])
    assert 2 == len(compare(tmp_path / "a.safetensors", plain).only_in_a)


# -------------------------------------------------------------------- values that are no tensors


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (1, True),
        (1, 1.0),
        (1.0, 1.5),
        ("a", "b"),
        (b"a", b"b"),
        (b"a", "a"),
        (None, 0),
        ([1, 2], [1, 2, 3]),
        ([1, "b"], [1, None]),
        ([1, [2, {"a": [1]}]], [1, [2, {"a": [True]}]]),
        ({1, 2}, {1, 3}),
        ({1}, {True}),
        ([], {}),
        (np.float32(1), np.float64(1)),
        (np.float32(1), np.float32(2)),
        (slice(1, 2), slice(1, 3)),
        (complex(1, 2), complex(1, 3)),
    ],
)
def test_other_values_differ_by_type_and_value(a: object, b: object) -> None:
    record = only(compare({"v": {"w": a}}, {"v": {"w": b}}))

    assert "object" == record.kind
    assert record.key.startswith("v.w")
    assert record.a != record.b


def test_long_texts_are_shown_from_where_they_differ() -> None:
    record = only(compare({"v": "x" * 100 + "old"}, {"v": "x" * 100 + "new"}))

    assert ("'old' at 100", "'new' at 100") == (record.a, record.b)


@pytest.mark.parametrize(
    "make",
    [
        lambda: math.nan,
        lambda: [1, math.nan, None],
        lambda: {1, "a", frozenset({2})},
        lambda: {math.nan: 1},
        lambda: [{(1, 2): {3}}],
        lambda: np.float32("nan"),
        lambda: np.int16(3),
        lambda: complex(math.nan, 1),
        lambda: bytes(9),
        lambda: range(3),
        lambda: slice(1, None),
        lambda: Ellipsis,
        lambda: __import__("datetime").datetime(2024, 1, 2),
        lambda: __import__("decimal").Decimal("NaN"),
        lambda: Path("a/b"),
        lambda: Colored(3),
        lambda: [Colored({"x": [np.arange(3)]})],
    ],
)
def test_copies_of_other_values_are_equal(make: Any) -> None:
    assert compare({"v": make(), "l": [[make()]]}, {"v": make(), "l": [[make()]]})


class Colored:
    """A class that nobody else knows."""

    def __init__(self, content: object) -> None:
        self.content = content


class Coloured(Colored):
    """Another of the same content."""


def test_records_of_unknown_classes_are_compared_by_class_and_content() -> None:
    x = np.arange(3)

    assert compare({"v": Colored(x)}, {"v": Colored(x.copy())})
    assert "value" == only(compare({"v": Colored(x)}, {"v": Colored(x + 1)})).kind
    record = only(compare({"v": Colored(x)}, {"v": Coloured(x)}))
    assert ("object", "another class") == (record.kind, record.verdict)
    hidden = compare({"v": [1, {"s": slice(0, 1)}, Colored([x])]}, {"v": [1, {"s": slice(0, 1)}, Colored([x * 2])]})
    assert not hidden


def test_a_tensor_against_another_value() -> None:
    record = only(compare({"x": np.ones(2)}, {"x": 3}))

    assert ("object", "float64 [2]", "3") == (record.kind, record.a, record.b)


def test_deep_values_are_compared_without_recursion() -> None:
    def deep(last: int) -> object:
        value: object = last
        for _ in range(50):
            value = [value, {"k": 1}]
        return {"v": value}

    assert compare(deep(1), deep(1))
    assert not compare(deep(1), deep(2))


plain = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4) | st.binary(max_size=4)
values = st.recursive(
    plain,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3) | st.integers(0, 9), inner, max_size=3)
    ),
    max_leaves=12,
)


def copied(value: Any) -> Any:
    """The value again, its containers and numbers new ones."""
    if isinstance(value, dict):
        return {key: copied(item) for key, item in value.items()}
    if isinstance(value, list):
        return [copied(item) for item in value]
    return float(str(value)) if isinstance(value, float) else value


@given(values)
def test_any_value_equals_its_copy(value: object) -> None:
    assert compare({"v": value, "l": [[value]]}, {"v": copied(value), "l": ((copied(value),),)})


@given(st.lists(plain, max_size=4), plain, plain, st.data())
def test_a_change_of_any_item_is_found(items: list[object], old: object, new: object, data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(items)))
    same = type(old) is type(new) and (old == new or (old != old and new != new))

    assert same == bool(compare({"v": [*items[:at], old, *items[at:]]}, {"v": [*items[:at], new, *items[at:]]}))


# -------------------------------------------------------------------- the result


def test_the_result_as_data_and_as_text() -> None:
    a = {f"layers.{n}.weight": random(n, 4, 4) for n in range(6)} | {
        "head.w": np.ones(2),
        "head.b": np.ones(1),
        "lr": 0.1,
    }
    b = {**a, "head.w": np.zeros(2), "head.b": np.zeros(1), "lr": 0.01}
    found = compare(a, b)
    made = json.loads(json.dumps(found.to_dict()))

    names = {"schema", "equal", "summary", "counts", "only_in_a", "only_in_b", "changed", "renamed", "findings"}
    assert names == set(made)
    assert ("statedict.comparison/1", False, []) == (made["schema"], made["equal"], made["renamed"])
    assert {
        "key": "head.w",
        "kind": "value",
        "verdict": "changed",
        "a": "float64 [2]",
        "b": "float64 [2]",
        "mismatched": 2,
        "numel": 2,
        "max_abs": 1.0,
        "mean": 1.0,
        "first": [0],
    } == made["changed"][0]
    assert {"key": "lr", "kind": "object", "verdict": "changed", "a": "0.1", "b": "0.01"} == made["changed"][2]
    assert (
        "Same network; 2 of 8 tensors changed, all in head.*; 1 other value changed; the rest byte-identical."
        == found.summary
    )
    assert found.summary in " ".join(str(found).split())
    assert all("head.w" in text for text in (str(found), found.to_markdown(), found.to_html(), found._repr_html_()))


def test_equal_layers_share_a_line() -> None:
    a = {f"layers.{n}.weight": random(n, 4, 4) for n in range(12)}
    b = {key: value + 1 for key, value in a.items()}

    assert "layers.{0…11}.weight" in str(compare(a, b))


def test_keys_are_shown_escaped() -> None:
    assert "\x1b" not in str(compare({"\x1b[31mx": np.ones(2)}, {"\x1b[31mx": np.zeros(2), "\x1by": 1}))


@given(st.integers(0, 2**32), st.data())
def test_any_single_change_is_found_and_named(seed: int, data: st.DataObject) -> None:
    generator = np.random.default_rng(seed)
    names = data.draw(st.lists(st.sampled_from([*FLOATS, *WHOLE, "bool", "complex64"]), min_size=1, max_size=5))
    value = {f"t{at}": generator.integers(0, 2, (at, 3)).astype(kind(name)) for at, name in enumerate(names, 1)}
    other = {key: array.copy() for key, array in value.items()}
    key = data.draw(st.sampled_from(sorted(value)))
    place = int(generator.integers(value[key].size))
    flat = other[key].reshape(-1)
    flat[place] = not flat[place]

    assert compare(value, {name: array.copy() for name, array in value.items()})
    record = only(compare(value, other))
    assert (key, "value", 1, 1) == (record.key, record.kind, record.mismatched, record.max_abs)
    assert np.unravel_index(place, value[key].shape) == record.first


# -------------------------------------------------------------------- tensors of torch


def torch_values() -> dict[str, Any]:
    """A tensor of every dtype that torch fills with numbers."""
    torch = pytest.importorskip("torch")
    generator = torch.Generator().manual_seed(3)
    base = torch.randn(40, 30, generator=generator) * 8
    names = ["float64", "float32", "float16", "bfloat16", "complex64", "complex128", "bool"]
    names += ["int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"]
    names += ["float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz"]
    return {name: base.abs().to(getattr(torch, name)) for name in names}


@pytest.mark.filterwarnings("ignore:ComplexHalf")
def test_every_dtype_of_torch_in_memory_and_in_a_file(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    value = torch_values() | {"complex32": torch.randn(20, dtype=torch.complex64).to(torch.complex32)}
    value["float4"] = torch.arange(200, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)
    value["float8_e8m0fnu"] = torch.arange(200, dtype=torch.uint8).view(torch.float8_e8m0fnu)
    torch.save(value, tmp_path / "a.pt")

    assert compare(value, tmp_path / "a.pt")
    assert compare({key: tensor.clone() for key, tensor in value.items()}, value)
    for key, tensor in value.items():
        raw = tensor.clone().view(torch.uint8)
        raw.reshape(-1)[-1] ^= 0x08 if key != "bool" else 1
        changed = raw.view(tensor.dtype)
        record = only(compare(tmp_path / "a.pt", {**value, key: changed}))

        assert (key, "value", 1, tensor.numel()) == (record.key, record.kind, record.mismatched, record.numel)
        assert tuple(size - 1 for size in tensor.shape) == record.first


def test_pairs_of_float4_are_compared_by_their_halves() -> None:
    torch = pytest.importorskip("torch")
    a, b = (torch.tensor(raw, dtype=torch.uint8).view(torch.float4_e2m1fn_x2) for raw in ([0x21, 0x80], [0x27, 0x08]))
    record = only(compare({"x": a}, {"x": b}))

    assert (1, 2, 5.5) == (record.mismatched, record.numel, record.max_abs)


@pytest.mark.parametrize(("name", "bits"), [("float4_e2m1fn", 4), ("float6_e2m3fn", 6), ("float6_e3m2fn", 6)])
def test_numbers_smaller_than_a_byte(name: str, bits: int) -> None:
    from statedict.dtypes import BY_TORCH
    from statedict.numerics.differences import Difference
    from statedict.numerics.tolerances import Rule

    codes = np.arange(2**bits, dtype=np.uint8)
    values = codes.view(getattr(ml_dtypes, name)).astype(np.float64)
    packed = [
        np.packbits(np.unpackbits(each[:, None], axis=1, count=bits, bitorder="little"), bitorder="little")
        for each in (codes, codes[::-1])
    ]
    found = Difference(BY_TORCH[name], BY_TORCH[name], Rule())
    found.add(memoryview(packed[0]), memoryview(packed[1]), len(codes))

    assert int((values != values[::-1]).sum()) == found.mismatched
    assert np.abs(values - values[::-1]).max() == found.max_abs


@pytest.mark.filterwarnings("ignore:.*quantiz")
def test_quantised_tensors_are_compared_by_what_they_stand_for(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    values = torch.linspace(-3, 3, 60).reshape(6, 10)

    def whole(scale: float, shift: float = 0.0) -> Any:
        return torch.quantize_per_tensor(values + shift, scale, 3, torch.qint8)

    def channels(scale: float) -> Any:
        scales, zeros = torch.full((6,), scale, dtype=torch.float64), torch.zeros(6, dtype=torch.int64)
        return torch.quantize_per_channel(values, scales, zeros, 0, torch.qint8)

    torch.save({"q": whole(0.05), "c": channels(0.05)}, tmp_path / "a.pt")

    assert compare(tmp_path / "a.pt", {"q": whole(0.05), "c": channels(0.05)})
    record = only(compare({"q": whole(0.05)}, {"q": whole(0.05, 0.1)}))
    wanted = (whole(0.05).dequantize().double() - whole(0.05, 0.1).dequantize().double()).abs()
    assert (int((wanted > 0).sum()), 60) == (record.mismatched, record.numel)
    assert math.isclose(wanted.max().item(), record.max_abs or 0, rel_tol=1e-5)
    assert "changed" == only(compare({"q": whole(0.05)}, {"q": whole(0.06)})).verdict
    assert {"mismatched", "numel", "max_abs"} <= set(
        only(compare({"q": channels(0.05)}, {"q": channels(0.06)})).to_dict()
    )


@pytest.mark.filterwarnings("ignore:.*[Ss]parse")
@pytest.mark.parametrize("layout", ["sparse_coo", "sparse_csr"])
def test_sparse_tensors_are_compared_by_their_parts(tmp_path: Path, layout: str) -> None:
    torch = pytest.importorskip("torch")
    dense = torch.eye(4)

    def sparse(values: Any) -> Any:
        return values.to_sparse() if layout == "sparse_coo" else values.to_sparse_csr()

    torch.save({"x": sparse(dense)}, tmp_path / "a.pt")

    assert compare(tmp_path / "a.pt", {"x": sparse(dense)})
    assert ("value", 4, 1.0) == (
        (record := only(compare({"x": sparse(dense)}, {"x": sparse(dense * 2)}))).kind,
        record.mismatched,
        record.max_abs,
    )
    fewer = dense.clone()
    fewer[0, 0] = 0
    other = only(compare({"x": sparse(dense)}, {"x": sparse(fewer)})).to_dict()
    assert ("value", "made of other parts", 16, 16, None) == tuple(
        other[name] for name in ("kind", "verdict", "mismatched", "numel", "max_abs")
    )
    assert ("dtype", "another layout") == (only(compare({"x": sparse(dense)}, {"x": dense}))[1:3])


def test_meta_tensors_are_compared_by_shape_and_dtype() -> None:
    torch = pytest.importorskip("torch")
    meta = torch.ones(3, device="meta")
    found = compare({"x": meta}, {"x": torch.empty(3, device="meta")})

    assert found
    assert (1, ("x",)) == (found.counts["without_values"], found.findings[0].keys)
    assert "shape" == only(compare({"x": meta}, {"x": torch.ones(4)})).kind
    assert "dtype" == only(compare({"x": meta}, {"x": torch.ones(3).half()})).kind
    record = only(compare({"x": meta}, {"x": torch.ones(3)})).to_dict()
    assert ("value", "no values in a", 3, 3, None) == tuple(
        record[name] for name in ("kind", "verdict", "mismatched", "numel", "max_abs")
    )


def test_devices_gradients_strides_and_subclasses_do_not_matter() -> None:
    torch = pytest.importorskip("torch")
    x = torch.randn(2, 3, 4, 5)
    other = {
        "a": torch.nn.Parameter(x.clone()),
        "b": x.contiguous(memory_format=torch.channels_last),
        "c": x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
        "d": x.to(torch.complex64).conj(),
    }

    assert compare({"a": x, "b": x.clone(), "c": x.clone(), "d": x.to(torch.complex64)}, other)


def test_modules_and_files_of_both_formats(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3))
    torch.save(model.state_dict(), tmp_path / "a.pt")
    statedict.convert(tmp_path / "a.pt", tmp_path / "a.safetensors")

    assert compare(model, tmp_path / "a.safetensors")
    assert compare(tmp_path / "a.pt", tmp_path / "a.safetensors")
    with torch.no_grad():
        model[1].running_mean[1] = 5
        model[1].num_batches_tracked += 1
    found = compare(tmp_path / "a.safetensors", model)
    assert [("1.running_mean", 5), ("1.num_batches_tracked", 1)] == [(c.key, c.max_abs) for c in found.changed]


def test_optimizers_and_their_values() -> None:
    torch = pytest.importorskip("torch")
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    state = optimizer.state_dict()
    before = {"optimizer": {**state, "param_groups": [dict(group) for group in state["param_groups"]]}}
    optimizer.param_groups[0]["lr"] = 0.01
    record = only(compare(before, {"optimizer": optimizer.state_dict()}))

    assert ("optimizer.param_groups.0.lr", "object", "0.1", "0.01") == (record.key, record.kind, record.a, record.b)


@given(st.integers(0, 2**32), st.data())
def test_equal_is_what_torch_says_of_every_key(seed: int, data: st.DataObject) -> None:
    torch = pytest.importorskip("torch")
    dtypes = [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.complex64, torch.float64]
    shapes = [(), (0,), (3,), (2, 2), (4, 1)]
    generator = torch.Generator().manual_seed(seed)

    def tree() -> dict[str, Any]:
        keys = data.draw(st.sets(st.sampled_from("abc"), min_size=1))
        return {
            key: torch.randint(0, 2, data.draw(st.sampled_from(shapes)), generator=generator).to(
                data.draw(st.sampled_from(dtypes[:2] if key == "a" else dtypes))
            )
            for key in sorted(keys)
        }

    a, b = tree(), tree()
    same = a.keys() == b.keys() and all(
        a[key].dtype == b[key].dtype and a[key].shape == b[key].shape and torch.equal(a[key], b[key]) for key in a
    )

    assert same == bool(compare(a, b))
    assert compare(a, {key: value.clone() for key, value in a.items()})
