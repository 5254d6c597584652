"""Renames that are found by content: what proves one, what doesn't, and the rules that carry them out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from statedict.ops.compare import compare
from statedict.ops.comparing.comparison import Comparison
from statedict.rules import Rules

Array = np.ndarray[Any, Any]


def random(seed: int, *shape: int, dtype: str = "float32") -> Array:
    values: Array = np.random.default_rng(seed).standard_normal(shape).astype(dtype)
    return values


def pairs(found: Comparison) -> list[tuple[object, object, object]]:
    return [(each["a"], each["b"], each["proof"]) for each in found.renamed]


def test_a_tensor_under_another_name_is_a_rename() -> None:
    x = random(1, 4, 3)
    found = compare({"old": x, "same": x + 1}, {"new": x.copy(), "same": x + 1})

    assert not found
    assert [("old", "new", "same bytes")] == pairs(found)
    assert ([], [], [], 1) == (found.only_in_a, found.only_in_b, found.changed, found.counts["renamed"])
    assert "old" in str(found) and "new" in str(found) and "1 tensor renamed" in found.summary


def test_renames_are_found_between_files_of_any_format(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    x, y = random(2, 40, 30), random(3, 5)
    save_file({"a.w": x, "a.b": y}, tmp_path / "a.safetensors")
    torch.save({"b": {"w": torch.from_numpy(x).t(), "b": torch.from_numpy(y)}}, tmp_path / "b.pth")
    found = compare(tmp_path / "a.safetensors", tmp_path / "b.pth")

    assert [("a.w", "b.w", "same bytes, transposed"), ("a.b", "b.b", "same bytes")] == sorted(
        pairs(found), key=lambda pair: str(pair[1]), reverse=True
    )
    assert compare(tmp_path / "a.safetensors", tmp_path / "b.pth", rules=found.rules)


@pytest.mark.parametrize(
    ("shape", "order"), [((6, 4), (1, 0)), ((5, 5), (1, 0)), ((4, 3, 2), (0, 2, 1)), ((4, 3, 2, 2), (2, 3, 1, 0))]
)
def test_a_transposed_tensor_is_a_rename(shape: tuple[int, ...], order: tuple[int, ...]) -> None:
    x = random(4, *shape)
    other = {"new": np.ascontiguousarray(x.transpose(order))}
    found = compare({"old": x}, other)

    assert [("old", "new", "same bytes, transposed")] == pairs(found)
    assert compare({"old": x}, other, rules=found.rules)


def test_another_shape_of_the_same_elements_is_a_rename() -> None:
    x = random(5, 8, 4, 1, 1)
    found = compare({"conv": x}, {"linear": x.reshape(8, 4)})

    assert [("conv", "linear", "same bytes, reshaped")] == pairs(found)
    assert compare({"conv": x}, {"linear": x.reshape(8, 4)}, rules=found.rules)


FUSIONS = {
    "rows": lambda parts: np.concatenate(parts),
    "columns": lambda parts: np.concatenate(parts, axis=1),
    "turned rows": lambda parts: np.concatenate([part.T for part in parts]),
    "turned columns": lambda parts: np.concatenate([part.T for part in parts], axis=1),
    "stack": lambda parts: np.stack(parts),
    "stack of turned": lambda parts: np.stack([part.T for part in parts]),
    "stack in the middle": lambda parts: np.stack(parts, axis=1),
}


@pytest.mark.parametrize("name", FUSIONS)
def test_fused_and_stacked_tensors_are_found_and_so_are_split_ones(name: str) -> None:
    parts = [random(10 + at, 6, 4) for at in range(3)]
    apart: dict[str, Array] = {f"e.{at}.w": part for at, part in enumerate(parts)}
    joined = {"all.w": FUSIONS[name](parts)}
    keys = ["e.0.w", "e.1.w", "e.2.w"]
    found, back = compare(apart, joined), compare(joined, apart)

    assert [(keys, "all.w", "rows of e.0.w, e.1.w, e.2.w")] == pairs(found)
    assert [("all.w", keys, "rows of all.w")] == pairs(back)
    assert compare(apart, joined, rules=found.rules)
    assert compare(joined, apart, rules=back.rules)


def test_experts_that_were_fused_and_stacked_are_found() -> None:
    parts = {f"e.{at}.{name}": random(at * 2 + (name == "w3"), 6, 4) for at in range(3) for name in ("w1", "w3")}
    fused = np.stack([np.concatenate([parts[f"e.{at}.w1"], parts[f"e.{at}.w3"]]) for at in range(3)])
    found = compare(parts, {"gate_up": fused})

    assert [(list(parts), "gate_up")] == [pair[:2] for pair in pairs(found)]
    assert compare(parts, {"gate_up": fused}, rules=found.rules)
    assert compare({"gate_up": fused}, parts, rules=compare({"gate_up": fused}, parts).rules)


def test_parts_of_different_sizes_are_found_in_their_order() -> None:
    q, k, v = random(1, 12), random(2, 4), random(3, 4)
    found = compare({"k": k, "q": q, "v": v}, {"qkv": np.concatenate([q, k, v])})

    assert [(["q", "k", "v"], "qkv", "rows of q, k, v")] == pairs(found)


@pytest.mark.parametrize("value", [0.0, 1.0, 0.02, float("nan")])
def test_a_constant_tensor_proves_nothing(value: float) -> None:
    x = np.full(5, value, "float32")
    found = compare({"a": x}, {"b": x.copy()})

    assert (["a"], ["b"], []) == (found.only_in_a, found.only_in_b, found.renamed)
    assert [("constant-tensors", ("a",))] == [(each.code, each.keys) for each in found.findings]


def test_a_single_number_proves_nothing() -> None:
    assert (
        [] == compare({"a": np.float64([3.25]), "n": np.array(7)}, {"b": np.float64([3.25]), "m": np.array(7)}).renamed
    )


def test_constant_tensors_follow_the_names_of_their_neighbours() -> None:
    one, two = random(1, 4, 4), random(2, 4, 4)
    a = {
        "l.0.attn.w": one,
        "l.0.attn.b": np.zeros(4),
        "l.1.attn.w": two,
        "l.1.attn.b": np.zeros(4),
        "l.1.n": np.ones(4),
    }
    b = {"h.0.mix.w": one, "h.0.mix.b": np.zeros(4), "h.1.mix.w": two, "h.1.mix.b": np.zeros(4), "h.1.m": np.ones(4)}
    found = compare(a, b)

    assert {"l.0.attn.b": "h.0.mix.b", "l.1.attn.b": "h.1.mix.b", "l.1.n": "h.1.m"} == {
        old: new for old, new, proof in pairs(found) if proof == "same structure"
    }
    assert ([], []) == (found.only_in_a, found.only_in_b)
    assert compare(a, b, rules=found.rules)


def test_two_norms_that_are_alike_are_not_told_apart() -> None:
    x = random(1, 4, 4)
    a = {"l.0.w": x, "l.0.norm1.weight": np.ones(4), "l.0.norm2.weight": np.ones(4)}
    b = {"h.0.w": x, "h.0.ln_a.weight": np.ones(4), "h.0.ln_b.weight": np.ones(4)}
    found = compare(a, b)

    assert [("l.0.w", "h.0.w", "same bytes")] == pairs(found)
    assert (2, 2) == (len(found.only_in_a), len(found.only_in_b))


def test_constant_biases_follow_what_was_fused() -> None:
    weights = [random(at, 4, 4) for at in range(3)]
    a = {
        f"{name}.{leaf}": x for name, w in zip("qkv", weights) for leaf, x in (("w", w), ("b", np.zeros(4, "float32")))
    }
    b = {"qkv.w": np.concatenate(weights), "qkv.b": np.zeros(12, "float32")}
    found = compare(a, b)

    assert (["q.b", "k.b", "v.b"], "qkv.b", "same structure") in pairs(found)
    assert compare(a, b, rules=found.rules)


def test_equal_layers_are_paired_by_their_numbers() -> None:
    x = random(1, 3, 3)
    found = compare({f"layers.{n}.w": x.copy() for n in range(4)}, {f"blocks.{n + 1}.w": x.copy() for n in range(4)})

    assert [(f"layers.{n}.w", f"blocks.{n + 1}.w") for n in range(4)] == [pair[:2] for pair in pairs(found)]


def test_several_equal_tensors_without_a_template_are_left_and_said() -> None:
    x = random(1, 3)
    found = compare({"a": x, "b": x.copy()}, {"c": x.copy(), "d": x.copy()})

    assert ([], ["a", "b"], ["c", "d"]) == (found.renamed, found.only_in_a, found.only_in_b)
    assert [("equal-tensors", ("a", "b"))] == [(each.code, each.keys) for each in found.findings]


def test_tied_tensors_are_one_under_either_name() -> None:
    x, y = random(1, 3), random(1, 3)
    found = compare({"a": x, "b": x}, {"c": y, "d": y})

    assert [("a", "c"), ("b", "d")] == [pair[:2] for pair in pairs(found)]


def test_another_dtype_or_one_other_bit_is_no_rename() -> None:
    x = random(1, 30)
    other = x.copy()
    other.view(np.uint32)[17] ^= 1

    assert [] == compare({"a": x, "b": x}, {"c": x.astype("float64"), "d": other}).renamed


def test_a_few_bytes_prove_nothing() -> None:
    x = np.array([1, 0, 1], bool)

    assert [] == compare({"a": x}, {"b": x.copy()}).renamed
    assert [] == compare({"a": np.arange(4)}, {"b": np.arange(2), "c": np.arange(2) + 2}).renamed


def test_views_that_unfold_into_too_much_are_not_read() -> None:
    a, b = (np.broadcast_to(np.array([1.0, 2.0]), (10**12, 2)) for _ in range(2))
    found = compare({"a": a}, {"b": b})

    assert (["a"], ["b"], []) == (found.only_in_a, found.only_in_b, found.renamed)


def test_renames_are_not_searched_for_where_that_was_said() -> None:
    x = random(1, 3)

    assert [] == compare({"a": x}, {"b": x.copy()}, renames=False).renamed


def test_the_rules_name_layers_by_templates(tmp_path: Path) -> None:
    a = {f"layers.{n}.w": random(n, 3, 4) for n in range(5)}
    b = {f"blocks.{n + 1}.v": a[f"layers.{n}.w"].T.copy() for n in range(5)}
    rules = compare(a, b).rules
    rules.to_file(tmp_path / "rules.toml")

    assert ["rename('layers.{n}.w', 'blocks.{n+1}.v')", "transpose('blocks.{n}.v')"] == [str(rule) for rule in rules]
    assert compare(a, b, rules=Rules.from_file(tmp_path / "rules.toml"))


def test_a_prefix_is_one_rule() -> None:
    a = {f"module.{name}": random(at, 3, 3) for at, name in enumerate(("a.w", "b.w", "c"))}
    found = compare({**a, "epoch": 3}, {**{key.removeprefix("module."): x for key, x in a.items()}, "epoch": 3})

    assert ["strip_prefix('module.')"] == [str(rule) for rule in found.rules]


def test_a_template_that_would_rename_more_is_not_used() -> None:
    a = {f"l.{n}.w": random(n, 3) for n in range(4)}
    b = {"l.0.w": a["l.0.w"], **{f"l.{n}.v": a[f"l.{n}.w"] for n in range(1, 4)}}

    assert compare(a, b, rules=compare(a, b).rules)


def test_ties_and_casts_are_rules_too() -> None:
    x, y = random(1, 4, 2), random(2, 3)
    a = {"a": x, "b": x.copy(), "c": y}
    b = {"a": (z := x.copy()), "b": z, "c": y.astype("float64")}
    found = compare(a, b)

    assert compare(a, b, rules=found.rules)


NAMES = st.lists(st.sampled_from(["wte", "h.0.a", "h.0.b", "h.1.a", "h.1.b", "head"]), min_size=1, unique=True)


@settings(max_examples=60)
@given(NAMES, st.integers(0, 2**32), st.data())
def test_any_renaming_of_random_tensors_is_found(names: list[str], seed: int, data: st.DataObject) -> None:
    shapes = st.lists(st.integers(2, 5), min_size=1, max_size=3)
    a = {name: random(seed + at, *data.draw(shapes)) for at, name in enumerate(names)}
    b: dict[str, Array] = {}
    for name, x in a.items():
        order = data.draw(st.permutations(range(x.ndim)))
        b[f"new.{name}"] = np.ascontiguousarray(x.transpose(order))
    found = compare(a, b)

    assert {(name, f"new.{name}") for name in names} == {pair[:2] for pair in pairs(found)}
    assert compare(a, b, rules=found.rules)
