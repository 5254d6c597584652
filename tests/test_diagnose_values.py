"""What values prove: each op on tensors of both sides that hold the same numbers, and what proves nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import statedict
from statedict import rules
from statedict.numerics.rows import RowIndex, cut_into_rows
from statedict.numerics.sequences import grid_of, ranges_of

Arrays = dict[str, np.ndarray[Any, Any]]
Case = Callable[[np.random.Generator], tuple[Arrays, Arrays]]

WIDTH, HEADS, HALF, EXPERTS, INNER = 16, 4, 2, 3, 8


def random(rng: np.random.Generator, *shape: int) -> np.ndarray[Any, Any]:
    return rng.standard_normal(shape).astype(np.float32)


def renamed(rng: np.random.Generator) -> tuple[Arrays, Arrays]:
    weight, bias = random(rng, 8, 5), random(rng, 8)
    return {"a.weight": weight, "a.bias": bias}, {"b.weight": weight, "b.bias": bias}


def transposed_square(rng: np.random.Generator) -> tuple[Arrays, Arrays]:
    weight = random(rng, 9, 9)
    return {"c_proj.weight": weight}, {"c_proj.weight": weight.T}


def kernel_of_keras(rng: np.random.Generator) -> tuple[Arrays, Arrays]:
    kernel = random(rng, 3, 3, 4, 8)
    return {"conv.kernel": kernel}, {"conv.weight": kernel.transpose(3, 2, 0, 1)}


def split_with_biases(rng: np.random.Generator) -> tuple[Arrays, Arrays]:
    weight, bias = random(rng, 2 * WIDTH, WIDTH), random(rng, 2 * WIDTH)
    cuts = {"q": (0, 16), "k": (16, 24), "v": (24, 32)}
    parts = {f"{name}.weight": weight[a:b] for name, (a, b) in cuts.items()}
    return {"qkv.weight": weight, "qkv.bias": bias}, parts | {f"{n}.bias": bias[a:b] for n, (a, b) in cuts.items()}


def split_columns_and_turned(rng: np.random.Generator) -> tuple[Arrays, Arrays]:
    weight = random(rng, WIDTH, 3 * WIDTH)
    return {"c_attn": weight}, {name: part.T for name, part in zip("qkv", np.split(weight, 3, 1))}


def fused_along_columns(rng: np.random.Generator) -> tuple[Arrays, Arrays]:
    parts = {name: random(rng, WIDTH, WIDTH) for name in "qkv"}
    return parts, {"c_attn": np.concatenate([part.T for part in parts.values()], 1)}


def stacked(rng: np.random.Generator) -> tuple[Arrays, Arrays]:
    parts = {f"experts.{at}.down": random(rng, WIDTH, INNER) for at in range(12)}
    return parts, {"experts.down": np.stack(list(parts.values()))}


def stacked_fused_and_turned(rng: np.random.Generator) -> tuple[Arrays, Arrays]:
    parts = {f"experts.{at}.{name}": random(rng, INNER, WIDTH) for at in range(EXPERTS) for name in ("gate", "up")}
    fused = [np.concatenate([parts[f"experts.{at}.gate"], parts[f"experts.{at}.up"]]).T for at in range(EXPERTS)]
    return parts, {"experts.gate_up": np.stack(fused)}


def unstacked(rng: np.random.Generator) -> tuple[Arrays, Arrays]:
    whole = random(rng, EXPERTS, WIDTH, INNER)
    return {"experts.down": whole}, {f"experts.{at}.down.weight": whole[at] for at in range(EXPERTS)}


def unstacked_and_split(rng: np.random.Generator) -> tuple[Arrays, Arrays]:
    whole = random(rng, EXPERTS, WIDTH, 2 * INNER)
    gates = {f"experts.{at}.gate": whole[at, :, :INNER].T for at in range(EXPERTS)}
    return {"experts.gate_up": whole}, gates | {f"experts.{at}.up": whole[at, :, INNER:].T for at in range(EXPERTS)}


def rotary(rng: np.random.Generator) -> tuple[Arrays, Arrays]:
    weight, bias = random(rng, WIDTH, WIDTH), random(rng, WIDTH)
    halves = [
        each.reshape(HEADS, HALF, 2, *each.shape[1:]).swapaxes(1, 2).reshape(each.shape) for each in (weight, bias)
    ]
    return {"wq.weight": weight, "wq.bias": bias}, dict(zip(("q_proj.weight", "q_proj.bias"), halves))


def split_by_heads(rng: np.random.Generator) -> tuple[Arrays, Arrays]:
    weight, bias = random(rng, 3 * WIDTH, WIDTH), random(rng, 3 * WIDTH)
    found: Arrays = {}
    for at, name in enumerate("qkv"):
        found[f"{name}.weight"] = weight.reshape(HEADS, 3, 4, WIDTH)[:, at].reshape(WIDTH, WIDTH)
        found[f"{name}.bias"] = bias.reshape(HEADS, 3, 4)[:, at].reshape(WIDTH)
    return {"qkv.weight": weight, "qkv.bias": bias}, found


def joined_by_heads(rng: np.random.Generator) -> tuple[Arrays, Arrays]:
    parts = {name: random(rng, WIDTH, WIDTH) for name in "qkv"}
    heads = [part.reshape(HEADS, 4, WIDTH) for part in parts.values()]
    return parts, {"qkv": np.stack(heads, 1).reshape(3 * WIDTH, WIDTH)}


def halves_exchanged(rng: np.random.Generator) -> tuple[Arrays, Arrays]:
    weight = random(rng, 2 * INNER, WIDTH)
    return {"gate_up": weight}, {"up_gate": np.concatenate([weight[INNER:], weight[:INNER]])}


def background_last(rng: np.random.Generator) -> tuple[Arrays, Arrays]:
    weight = random(rng, 11, WIDTH)
    return {"cls.weight": weight}, {"cls.weight": np.roll(weight, -1, 0)}


def fewer_words(rng: np.random.Generator) -> tuple[Arrays, Arrays]:
    weight = random(rng, 40, WIDTH)
    return {"wte": weight}, {"embed": weight[:32]}


def without_ones(rng: np.random.Generator) -> tuple[Arrays, Arrays]:
    kernel, positions = random(rng, 8, WIDTH, 1, 1), random(rng, 1, 17, WIDTH)
    return {"k": kernel, "p": positions}, {"k": kernel[:, :, 0, 0], "p": positions[0]}


CASES = [
    (renamed, {"copy"}),
    (transposed_square, {"transpose"}),
    (kernel_of_keras, {"transpose"}),
    (split_with_biases, {"split"}),
    (split_columns_and_turned, {"split"}),
    (fused_along_columns, {"concat"}),
    (stacked, {"stack"}),
    (stacked_fused_and_turned, {"stack"}),
    (unstacked, {"unstack"}),
    (unstacked_and_split, {"unstack"}),
    (rotary, {"permute"}),
    (split_by_heads, {"permute"}),
    (joined_by_heads, {"concat"}),
    (halves_exchanged, {"permute"}),
    (background_last, {"permute"}),
    (fewer_words, {"slice"}),
    (without_ones, {"squeeze"}),
]


def packed(arrays: Mapping[str, np.ndarray[Any, Any]]) -> Arrays:
    return {key: np.ascontiguousarray(array) for key, array in arrays.items()}


@pytest.mark.parametrize(("case", "ops"), CASES, ids=lambda value: getattr(value, "__name__", ""))
def test_values_prove_the_op_and_its_rules_give_the_targets_bytes(case: Case, ops: set[str]) -> None:
    source, target = map(packed, case(np.random.default_rng(0)))
    found = statedict.diagnose(source, target)

    assert ({"proven"}, ops) == ({each.tier for each in found.plan}, {each.op for each in found.plan})
    assert list(target) == [each.target for each in found.plan]
    with statedict.remap(source, found.rules) as made:
        equal = {key: bool((made[key].numpy() == array).all()) for key, array in target.items()}

        assert dict.fromkeys(target, True) == equal
        assert set(target) == set(made)


@pytest.mark.parametrize(("case", "ops"), CASES, ids=lambda value: getattr(value, "__name__", ""))
def test_what_loses_nothing_can_be_taken_back(case: Case, ops: set[str]) -> None:
    source, target = map(packed, case(np.random.default_rng(1)))
    plan = rules.plan(statedict.open(source), statedict.diagnose(source, target).rules)
    back = plan.inverse()

    assert ("slice" not in ops) == plan.lossless
    if back is not None:
        with statedict.remap(plan.checkpoint, back) as made:
            assert {key: array.tobytes() for key, array in source.items()} == {
                key: bytes(made[key].read()) for key in source
            }


def test_a_constant_bias_goes_with_its_weight() -> None:
    rng = np.random.default_rng(0)
    weight = random(rng, 12, 4)
    source = {"qkv.weight": weight, "qkv.bias": np.zeros(12, np.float32), "lone": np.ones(4, np.float32)}
    target = {
        "q.weight": weight[:6],
        "q.bias": np.zeros(6, np.float32),
        "k.weight": weight[6:],
        "k.bias": np.zeros(6, np.float32),
        "other": np.ones(4, np.float32),
    }
    by_key = {each.target: each for each in statedict.diagnose(source, target).plan}

    assert ("split", "corroborated") == (by_key["q.bias"].op, by_key["q.bias"].tier)
    assert "proven" not in {each.tier for key, each in by_key.items() if key == "other"}


def test_equal_tensors_are_left_to_the_names() -> None:
    """Values say that it is one of two; only the names say which."""
    rng = np.random.default_rng(0)
    twin, other = random(rng, 4, 4), random(rng, 5, 4)
    source = {"x.a": twin, "x.b": twin.copy(), "x.c": other}
    target = {"y.p": twin, "y.c": other}
    by_key = {each.target: each for each in statedict.diagnose(source, target).plan}

    assert "proven" == by_key["y.c"].tier
    assert "y.p" not in by_key or "proven" != by_key["y.p"].tier


def test_equal_tensors_of_one_name_are_that_name() -> None:
    twin = random(np.random.default_rng(0), 4, 4)
    source = {"a": twin, "b": twin.copy()}
    plan = statedict.diagnose(source, {"b": twin, "a": twin.copy()}).plan

    assert {("a", "a"), ("b", "b")} == {(each.target, each.sources[0]) for each in plan}


def test_zeros_behind_different_beginnings_prove_nothing() -> None:
    """As of sparse files: both are zero from some row on."""
    rng = np.random.default_rng(0)
    source, target = np.zeros((64, 32), np.float32), np.zeros((64, 32), np.float32)
    source[:8], target[:8] = random(rng, 8, 32), random(rng, 8, 32)
    found = statedict.diagnose(
        {"a.weight": source, "n.b": source[:, 0].copy()}, {"x.y": target, "m.b": target[:, 0].copy()}
    )

    assert [] == [each for each in found.plan if each.tier == "proven"]


def test_zero_rows_inside_a_tensor_dont_hide_it() -> None:
    weight = random(np.random.default_rng(0), 32, 8)
    weight[[0, 5, 6, 31]] = 0
    source = {"qkv": weight}
    found = statedict.diagnose(source, {"q": weight[:16].copy(), "k": weight[16:].copy()})

    assert [("split", "proven")] * 2 == [(each.op, each.tier) for each in found.plan]


def test_a_fine_tuned_checkpoint_proves_nothing_and_contradicts_nothing() -> None:
    rng = np.random.default_rng(0)
    source = {f"layers.{at}.{leaf}": random(rng, 6, 6) for at in range(4) for leaf in ("fc1.weight", "fc2.weight")}
    target = {f"model.{key}": array + 0.01 for key, array in source.items()}
    found = statedict.diagnose(source, target)

    assert 1.0 == found.coverage.keys if found.coverage is not None else 0
    assert "add_prefix('model.')" == str(found.rules)


def test_a_frozen_part_is_proven_and_the_rest_follows_by_name() -> None:
    rng = np.random.default_rng(0)
    source = {f"body.{at}.weight": random(rng, 6, 6) for at in range(6)}
    target = {f"trunk.{key}": array if at < 3 else array + 1 for at, (key, array) in enumerate(source.items())}
    tiers = [each.tier for each in statedict.diagnose(source, target).plan]

    assert ["proven"] * 3 == tiers[:3]
    assert {"proven"}.isdisjoint(tiers[3:])
    assert 6 == len(tiers)


def test_a_tensor_of_another_dtype_is_left_to_its_name() -> None:
    weight = random(np.random.default_rng(0), 8, 8)
    found = statedict.diagnose({"a.weight": weight}, {"a.weight": weight.astype(np.float16)})

    assert ["another-dtype"] == [each.code for each in found.findings if each.code == "another-dtype"]
    assert bool(found)


def test_tied_tensors_of_the_target_are_tied_again() -> None:
    torch = pytest.importorskip("torch")
    table, other = torch.randn(20, 4), torch.randn(3, 4)
    tied = table.clone()
    found = statedict.diagnose({"wte": table, "z": other}, {"embed": tied, "head": tied, "z": other})

    assert [("copy", "wte"), ("tie", "wte"), ("copy", "z")] == [(each.op, each.sources[0]) for each in found.plan]
    with statedict.remap({"wte": table, "z": other}, found.rules) as made:
        assert ("head",) == made["embed"].tied_with


@given(st.permutations(range(3)), st.tuples(*[st.integers(2, 4)] * 3))
def test_any_order_of_a_view_is_told_by_where_the_rows_went(order: list[int], view: tuple[int, ...]) -> None:
    count = view[0] * view[1] * view[2]
    rows = np.arange(count).reshape(view).transpose(order).reshape(-1)
    grid = grid_of(rows.tolist(), count)

    assert grid is not None
    again = np.arange(count).reshape(grid.view).transpose(grid.order).reshape(-1)
    assert rows.tolist() == again.tolist()


@given(st.integers(2, 5), st.integers(2, 5), st.integers(1, 5), st.data())
def test_rows_taken_at_intervals_come_together(outer: int, parts: int, inner: int, data: st.DataObject) -> None:
    at = data.draw(st.integers(0, parts - 1))
    rows = np.arange(outer * parts * inner).reshape(outer, parts, inner)[:, at].reshape(-1)
    grid = grid_of(rows.tolist(), outer * parts * inner)

    assert grid is not None
    again = np.arange(outer * parts * inner).reshape(grid.view).transpose(grid.order).reshape(-1)
    assert rows.tolist() == again[grid.start : grid.start + len(rows)].tolist()


def test_rows_in_no_order_have_no_grid() -> None:
    rows = [3, 0, 7, 1, 2, 6, 5, 4]

    assert (None, None) == (grid_of(rows, 8), ranges_of(rows, 4))


@given(st.integers(1, 9), st.integers(1, 7), st.sampled_from([1, 2, 4, 8, 16]), st.integers(1, 4))
def test_a_row_has_one_number_however_the_tensor_lies(rows: int, columns: int, size: int, step: int) -> None:
    data = np.random.default_rng(rows).integers(0, 256, (rows + 1, columns + 1, size), np.uint8)
    turned = np.ascontiguousarray(data.swapaxes(0, 1))
    shape = rows + 1, columns + 1
    blocks = [memoryview(np.ascontiguousarray(data[at : at + step])).cast("B") for at in range(0, rows + 1, step)]
    one = cut_into_rows(blocks, size, shape)
    two = cut_into_rows([memoryview(turned).cast("B")], size, shape[::-1])

    assert one[0,].numbers.tolist() == two[1,].numbers.tolist()
    assert one[1,].numbers.tolist() == two[0,].numbers.tolist()
    assert RowIndex([one[0,]]).has_all(two[1,])


def test_bfloat16_and_transposed_views_of_torch_are_read() -> None:
    torch = pytest.importorskip("torch")
    weight = torch.randn(12, 7, dtype=torch.bfloat16)
    found = statedict.diagnose({"a": weight}, {"b": weight.T, "c": weight[:, :0]})

    assert [("b", "transpose", "proven")] == [(each.target, each.op, each.tier) for each in found.plan]
