"""The verdict of each tensor, the strongest that holds, and what a comparison says of the whole."""

from __future__ import annotations

import json
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
from statedict.ops.comparing.parts import parts_of

Array = np.ndarray[Any, Any]


def random(seed: int, *shape: int, dtype: str = "float32") -> Array:
    values: Array = np.random.default_rng(seed).standard_normal(shape).astype(dtype)
    return values


def only(found: Comparison) -> Change:
    """The one record of a comparison, which says unequal."""
    assert not found
    assert 1 == len(found.changed)
    return found.changed[0]


def codes(found: Comparison) -> set[str]:
    return {finding.code for finding in found.findings}


# -------------------------------------------------------------------- other orders and shapes


@pytest.mark.parametrize("order", [(1, 0), (0, 2, 1), (1, 0, 2), (2, 3, 1, 0)])
def test_a_shape_that_is_a_transpose_says_so(order: tuple[int, ...]) -> None:
    x = random(1, *(5, 4, 3, 2)[: len(order)])
    other = {"w": np.ascontiguousarray(x.transpose(order))}
    record = only(compare({"w": x}, other))

    assert ("shape", "equal after transpose", order) == (record.kind, record.verdict, record.order)
    assert compare({"w": x}, other, rules=compare({"w": x}, other).rules)


def test_a_square_matrix_that_was_transposed_is_found_by_its_content() -> None:
    x = random(2, 40, 40)
    record = only(compare({"w": x}, {"w": x.T.copy()}))

    assert ("value", "equal after transpose", (1, 0)) == (record.kind, record.verdict, record.order)
    assert record.mismatched == int((x != x.T).sum())


def test_a_transpose_with_another_number_is_none() -> None:
    x = random(3, 40, 30)
    y = x.T.copy()
    y[7, 9] += 1

    assert "another shape" == only(compare({"w": x}, {"w": y})).verdict


def test_the_same_elements_in_another_shape() -> None:
    x = random(4, 6, 4)
    found = compare({"w": x}, {"w": x.reshape(6, 4, 1)})

    assert ("shape", "equal after reshape") == only(found)[1:3]
    assert compare({"w": x}, {"w": x.reshape(6, 4, 1)}, rules=found.rules)


@pytest.mark.parametrize(("rows", "code"), [(14, "rows-added"), (9, "rows-removed")])
def test_rows_that_were_added_or_removed(rows: int, code: str) -> None:
    x = random(5, 20, 4)
    found = compare({"e": x[:12]}, {"e": x[:rows]})

    assert f"the first {min(rows, 12)} rows are equal" == only(found).verdict
    assert code in codes(found)


def test_other_strides_are_equal_and_said() -> None:
    x = random(6, 8, 6)
    found = compare({"w": x}, {"w": np.asfortranarray(x)})

    assert found
    assert (1, {"other-strides"}) == (found.counts["other_strides"], codes(found))


# -------------------------------------------------------------------- tolerances


@pytest.mark.parametrize("name", ["float16", "float32", "float64", "bfloat16", "float8_e4m3fn", "float8_e5m2"])
def test_units_in_the_last_place_are_counted_on_the_numbers(name: str) -> None:
    kind = np.dtype(getattr(ml_dtypes, name, name))
    bits = np.dtype(f"u{kind.itemsize}")
    one = np.array([1.0, -1.0, 0.0, 2.0], kind)
    two = one.view(bits).copy()
    two += np.array([3, 3, 2, 0], bits)
    other = two.view(kind)

    assert compare({"x": one}, {"x": other}, ulp=3)
    assert 2 == only(compare({"x": one}, {"x": other}, ulp=2)).mismatched


def test_units_in_the_last_place_cross_zero() -> None:
    tiny = np.array([1], np.uint32).view(np.float32)

    assert compare({"x": tiny}, {"x": -tiny}, ulp=2)
    assert not compare({"x": tiny}, {"x": -tiny}, ulp=1)
    assert compare({"x": np.complex64([1 + 1j])}, {"x": np.complex64([1 + np.nextafter(np.float32(1), 2) * 1j])}, ulp=1)


def test_infinity_and_nan_are_near_to_nothing() -> None:
    most = np.array([np.finfo(np.float32).max, np.inf], np.float32)
    other = np.array([np.inf, np.nan], np.float32)

    assert 2 == only(compare({"x": most}, {"x": other}, ulp=2**40)).mismatched


@pytest.mark.parametrize("value", [-1, 1.5, True])
def test_a_wrong_number_of_units_is_refused(value: Any) -> None:
    with pytest.raises(statedict.StateDictError, match="ulp is no tolerance"):
        compare({}, {}, ulp=value)


@given(st.sampled_from(["float16", "float32", "float64", "bfloat16", "complex64", "int32"]), st.data())
def test_close_is_what_torch_testing_says(name: str, data: st.DataObject) -> None:
    torch = pytest.importorskip("torch")
    kind = getattr(torch, name)
    numbers = data.draw(hnp.arrays(np.float64, 6, elements=st.floats(-100, 100)))
    factor = 1 + data.draw(st.sampled_from([0.0, 1e-8, 1e-6, 1.5e-6, 5e-4, 2e-3, 1e-2, 2e-2]))
    a, b = torch.tensor(numbers).to(kind), torch.tensor(numbers * factor).to(kind)
    try:
        torch.testing.assert_close(a, b)
        close = True
    except AssertionError:
        close = False

    assert close == bool(compare({"x": a}, {"x": b}, close=True))


def test_a_tolerance_that_is_given_goes_before_that_of_the_dtype() -> None:
    a, b = np.float32([1]), np.float32([1.01])

    assert compare({"x": a}, {"x": b}, close=True, rtol=0.1)
    assert not compare({"x": a}, {"x": b}, close=True)


@pytest.mark.parametrize("name", ["float32", "float64", "bfloat16", "int16", "uint64", "complex64"])
def test_the_mean_of_the_differences(name: str) -> None:
    kind = np.dtype(getattr(ml_dtypes, name, name))
    a, b = (np.abs(random(seed, 200, 301) * 40).astype(kind) for seed in (7, 8))
    wide = np.complex128 if kind.kind == "c" else np.float64
    wanted = np.abs(a.astype(wide) - b.astype(wide)).mean()
    record = only(compare({"x": a}, {"x": b}))

    assert record.mean == pytest.approx(wanted, rel=1e-9)


# -------------------------------------------------------------------- many tensors and large ones


def test_any_single_changed_byte_of_files_is_found_by_all_threads(tmp_path: Path) -> None:
    value = {f"t{at}": random(at, 3000, 1100 + at) for at in range(4)}  # 13 MB each: several pieces
    value |= {f"s{at}": random(at, at + 1) for at in range(300)}
    save_file(value, tmp_path / "a.safetensors")
    save_file(value, tmp_path / "b.safetensors")

    assert 304 == compare(tmp_path / "a.safetensors", tmp_path / "b.safetensors").counts["identical"]
    for key, place in (("t0", 0), ("t3", -1), ("t2", 1_000_003), ("s0", 0), ("s299", 150)):
        other = {**value, key: value[key].copy()}
        other[key].reshape(-1).view(np.uint32)[place] ^= 1
        save_file(other, tmp_path / "b.safetensors")
        record = only(compare(tmp_path / "a.safetensors", tmp_path / "b.safetensors"))

        assert (key, "value", 1) == (record.key, record.kind, record.mismatched)
        assert place % value[key].size == np.ravel_multi_index(record.first or (), value[key].shape)


def test_compressed_tensors_are_compared_by_several_threads(tmp_path: Path) -> None:
    value = {f"t{at}": np.arange(3_000_000, dtype=np.int32) // (at + 1) for at in range(4)}
    changed = value["t2"].copy()
    changed[-1] += 1
    np.savez_compressed(tmp_path / "a.npz", **value)
    np.savez_compressed(tmp_path / "b.npz", **{**value, "t2": changed})

    assert compare(tmp_path / "a.npz", value)
    record = only(compare(tmp_path / "a.npz", tmp_path / "b.npz"))
    assert ("t2", 1, (2_999_999,)) == (record.key, record.mismatched, record.first)


def test_files_of_a_sharded_folder_are_compared_with_one_file(tmp_path: Path) -> None:
    value = {f"t{at}": random(at, 30, 20) for at in range(4)}
    names = {key: f"model-0000{1 + at % 2}-of-00002.safetensors" for at, key in enumerate(value)}
    for name in set(names.values()):
        save_file({key: value[key] for key in value if names[key] == name}, tmp_path / name)
    index = {"metadata": {"total_size": 9600}, "weight_map": names}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    np.savez(tmp_path / "one.npz", **value)
    np.savez(tmp_path / "two.npz", **{**value, "t3": value["t3"] * 2})

    assert compare(tmp_path / "one.npz", tmp_path / "model.safetensors.index.json")
    assert "t3" == only(compare(tmp_path / "two.npz", tmp_path / "model.safetensors.index.json")).key


def test_progress_ends_at_all_bytes(tmp_path: Path) -> None:
    save_file({"x": random(1, 5000, 1000)}, tmp_path / "a.safetensors")
    told: list[tuple[int, int]] = []
    compare(tmp_path / "a.safetensors", {"x": random(1, 5000, 1000)}, on_progress=lambda *each: told.append(each))

    assert (40_000_000, 40_000_000) == told[-1]
    assert told == sorted(told)


def test_digests_that_both_files_record_are_said(tmp_path: Path) -> None:
    for name in ("a", "b"):
        statedict.convert({"x": random(1, 9), "y": random(2, 9)}, tmp_path / f"{name}.safetensors")
    found = compare(tmp_path / "a.safetensors", tmp_path / "b.safetensors")

    assert found
    assert (2, {"same-digests"}) == (found.counts["by_digest"], codes(found))


# -------------------------------------------------------------------- what the changes come to


def test_changed_layers_are_one_part() -> None:
    keys = [f"layers.{n}.{part}.{leaf}" for n in range(3) for part in ("attn", "mlp") for leaf in ("w", "b")]
    changed = [key for key in keys if "attn" in key]

    assert ["layers.{0…2}.attn.*"] == [part.name for part in parts_of(changed, keys)]
    assert ["layers.0.attn.w"] == [part.name for part in parts_of(["layers.0.attn.w"], keys)]
    assert ["layers.*"] == [part.name for part in parts_of(keys, keys)]


def network() -> dict[str, Array]:
    made: dict[str, Array] = {"embed.weight": random(1, 30, 16)}
    for n in range(3):
        made |= {f"layers.{n}.attn.weight": random(n, 32, 32), f"layers.{n}.attn.bias": random(n, 32)}
        made |= {f"layers.{n}.norm.weight": random(n, 32), f"layers.{n}.norm.bias": random(n + 9, 32)}
    return {**made, "head.weight": random(4, 10, 16), "head.bias": random(5, 10)}


@pytest.mark.parametrize(
    ("fits", "code", "place"),
    [
        (lambda key: "norm" in key, "only-norms", "layers.{0…2}.norm.*"),
        (lambda key: key.endswith("bias"), "only-biases", ""),
        (lambda key: key.startswith("head"), "only-head", "head.*"),
        (lambda key: "attn" in key, "frozen", "layers.{0…2}.attn.*"),
    ],
)
def test_what_a_fine_tune_leaves_behind(fits: Any, code: str, place: str) -> None:
    a = network()
    b = {key: x + 0.5 if fits(key) else x for key, x in a.items()}
    found = compare(a, b)
    count = sum(map(fits, a))

    assert code in codes(found)
    assert found.summary.startswith(f"Same network; {count} of 15 tensors changed")
    assert place in found.summary
    assert "the rest byte-identical" in found.summary


def test_frozen_parts_are_named() -> None:
    a = network()
    found = compare(a, {**a, "head.weight": a["head.weight"] * 2})
    (frozen,) = [each for each in found.findings if each.code == "frozen"]

    assert ("embed.*", "layers.*") == frozen.keys


@pytest.mark.parametrize("rank", [1, 4])
def test_a_change_of_low_rank_is_seen(rank: int) -> None:
    x, low = random(1, 96, 128), random(2, 96, rank) @ random(3, rank, 128)
    (finding,) = [each for each in compare({"w": x}, {"w": x + low * 0.01}).findings if each.code == "low-rank"]

    assert f"{rank} direction" in finding.message
    assert "low-rank" not in codes(compare({"w": x}, {"w": x + random(4, 96, 128)}))


def test_a_prefix_on_every_key_is_said_with_the_words_to_type() -> None:
    a = network()
    found = compare({f"module.{key}": x for key, x in a.items()}, {key: x + 1 for key, x in a.items()})
    (finding,) = [each for each in found.findings if each.code == "prefix"]

    assert "strip_prefix('module.')" in finding.message


# -------------------------------------------------------------------- training states


def state(epochs: int, rate: float, *, steps: bool = True) -> dict[str, Any]:
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2))
    optimizer = torch.optim.AdamW(model.named_parameters(), lr=rate)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 10)
    if steps:
        model(torch.ones(1, 4)).sum().backward()
        optimizer.step()
        scheduler.step()
    return {
        "model_state_dict": model.state_dict(),
        "optimizer_state_dict": optimizer.state_dict(),
        "scheduler_state_dict": scheduler.state_dict(),
        "epoch": epochs,
        "rng_state": torch.Generator().manual_seed(epochs).get_state(),
    }


def test_a_training_state_is_told_in_sentences() -> None:
    found = compare(state(3, 0.1), state(4, 0.01))
    said = {finding.code: finding.message for finding in found.findings}

    assert "optimizer_state_dict, group 0: lr 0.1 → 0.01" in [each.message for each in found.findings]
    assert "epoch 3 → 4" == said["progress"]
    assert "the state of a random generator differs: rng_state" == said["random-state"]
    assert said["scheduler"].startswith("scheduler_state_dict")
    assert "Training state" in str(found)


def test_missing_moments_are_counted_by_parameter() -> None:
    found = compare(state(3, 0.1), state(3, 0.1, steps=False))
    (moments,) = [each for each in found.findings if each.code == "moments"]

    assert "moments missing in B for 4 parameters (step, exp_avg, exp_avg_sq): " in moments.message
    assert "'{0,1}.weight', '{0,1}.bias'" in moments.message


# -------------------------------------------------------------------- any change at all

SHAPES = hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4)
DTYPES = st.sampled_from(["float16", "float32", "float64", "int8", "int64", "uint16", "bool", "complex64"])
ARRAYS = st.builds(
    lambda shape, name, seed: np.asarray(abs(random(seed, *shape)) * 9).astype(name), SHAPES, DTYPES, st.integers(0, 99)
)
STATES = st.dictionaries(st.sampled_from(["a", "b.w", "b.b", "c.0.x", "c.1.x"]), ARRAYS, min_size=1)


@given(STATES)
def test_a_state_equals_its_copy(value: dict[str, Array]) -> None:
    found = compare(value, {key: x.copy() for key, x in value.items()})

    assert found
    assert ([], [], [], []) == (found.changed, found.only_in_a, found.only_in_b, found.renamed)


def _bit(x: Array) -> Array | None:
    made = x.copy()
    if not x.size or x.dtype == bool:
        return None
    made.reshape(-1).view(np.uint8)[-1] ^= 0x40
    return made


CHANGES: dict[str, Any] = {
    "bit": _bit,
    "dtype": lambda x: x.astype("float64" if x.dtype != np.float64 else "float32") if x.dtype.kind != "c" else None,
    "shape": lambda x: x[None] if x.ndim < 3 else None,
    "object": lambda x: 3,
}


@given(STATES, st.sampled_from([*CHANGES, "key", "tie"]), st.data())
def test_any_single_change_of_a_state_is_found_and_named(
    value: dict[str, Array], kind: str, data: st.DataObject
) -> None:
    key = data.draw(st.sampled_from(sorted(value)))
    other: dict[str, Any] = {name: x.copy() for name, x in value.items()}
    if kind == "key":
        del other[key]
    elif kind == "tie":
        value["tied"], other["tied"] = value[key], other[key].copy()
    else:
        other[key] = CHANGES[kind](value[key])
    found = compare(value, other)
    if other.get(key, 0) is None or (kind == "tie" and not value[key].size):
        return

    assert not found
    named = {change.key for change in found.changed} | set(found.only_in_a)
    assert ({key, "tied"} if kind == "tie" else {key}) == named
