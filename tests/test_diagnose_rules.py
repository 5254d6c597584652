"""Plans as rules, and the obligations that every plan has to keep."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import statedict
from statedict import rules
from statedict.aligning import Alignment, Left, Mapped, Side
from statedict.aligning.alignment import Spec
from statedict.ops.diagnosing.carrying import Misfit, carried
from statedict.ops.diagnosing.obligations import broken, kept, left_over
from statedict.ops.diagnosing.ruling import Ruling, ruled

Shapes = dict[str, tuple[int, ...]]


def claim(target: str, *sources: str, op: str = "copy", tier: str = "corroborated", **args: object) -> Mapped:
    return Mapped(target, op, sources, tier, ("a test says so",), args)


def ruling(claims: list[Mapped], source: Shapes, target: Shapes, **more: Any) -> Ruling:
    return ruled(claims, source, target, **more)


def side(shapes: Mapping[str, tuple[int, ...]], dtype: str = "float32", tied: tuple[tuple[str, ...], ...] = ()) -> Side:
    return Side({key: Spec(shape, dtype) for key, shape in shapes.items()}, True, tied)


# -------------------------------------------------------------------- rules


def test_layers_share_one_template() -> None:
    source = {f"enc.layer.{at}.attn.{leaf}.weight": (4, 4) for at in range(12) for leaf in ("q", "k", "v")}
    names = {key: key.replace("enc.layer.", "blocks.").replace("attn", "mixer") for key in source}
    made = ruling([claim(new, old) for old, new in names.items()], source, dict.fromkeys(names.values(), (4, 4)))

    assert "rename('enc.layer.{n}.attn.{rest...}', 'blocks.{n}.mixer.{rest}')" == str(made.rules)


def test_numbers_may_be_shifted() -> None:
    source = {f"layer{at}.conv.weight": (4, 4) for at in range(1, 5)}
    names = {key: f"stages.{at}.w" for at, key in enumerate(source)}
    made = ruling([claim(new, old) for old, new in names.items()], source, dict.fromkeys(names.values(), (4, 4)))

    assert "rename('layer{n}.conv.weight', 'stages.{n-1}.w')" == str(made.rules)


def test_names_that_change_places_are_renamed_at_once() -> None:
    source = {"a.weight": (2, 2), "b.weight": (2, 2)}
    made = ruling([claim("a.weight", "b.weight"), claim("b.weight", "a.weight")], source, source)

    assert ("", 1) == (made.problem, len(made.rules))


def test_what_nobody_uses_is_dropped_first() -> None:
    source = {"module.fc.weight": (2, 2), "module.aux.a": (1,), "module.aux.b": (2,), "n_averaged": ()}
    made = ruling([claim("fc.weight", "module.fc.weight")], source, {"fc.weight": (2, 2)}, others=["epoch"])

    assert ["drop", "drop", "drop", "strip_prefix"] == [rule.name for rule in made.rules]
    assert not made.problem


def test_stacks_of_fused_experts_take_three_rules() -> None:
    source = {f"l.{n}.experts.{e}.{name}": (4, 8) for n in range(3) for e in range(5) for name in ("gate", "up")}
    target = {f"l.{n}.experts.gate_up": (5, 8, 8) for n in range(3)}
    claims = [
        claim(
            f"l.{n}.experts.gate_up",
            *[f"l.{n}.experts.{e}.{name}" for e in range(5) for name in ("gate", "up")],
            op="stack",
            dim=0,
            each=[{"op": "concat", "dim": 0}],
            group=2,
        )
        for n in range(3)
    ]
    made = ruling(claims, source, target)

    assert ["concat", "stack"] == [rule.name for rule in made.rules]


def test_rules_that_must_not_be_applied_twice_are_said() -> None:
    """A square matrix that is transposed under its own name looks the same afterwards; a renamed one is refused."""
    source = {"w": (3, 3), "v": (3, 3)}
    turned = claim("w", "w", op="transpose", dims=[1, 0])

    assert ruling([turned, claim("v", "v")], source, source).only_once
    assert not ruling([claim("a", "w"), claim("b", "v")], source, {"a": (3, 3), "b": (3, 3)}).only_once
    found = statedict.diagnose({"w": (array := np.random.default_rng(0).random((3, 3)))}, {"w": array.T.copy()})

    assert "only-once" in {finding.code for finding in found.findings}


def test_keys_with_braces_have_no_rules() -> None:
    made = ruling([claim("x", "a{n}")], {"a{n}": (2,)}, {"x": (2,)})

    assert (0, "keys with braces can't be named in rules") == (len(made.rules), made.problem)


def test_a_plan_that_cannot_be_carried_out_has_no_rules() -> None:
    made = ruling([claim("x", "a")], {"a": (2, 3)}, {"x": (3, 2)})

    assert "the plan can't be carried out: it makes [2, 3], and [3, 2] is wanted" == made.problem


def test_globs_in_names_are_taken_as_they_are() -> None:
    source = {"a[0].weight": (2, 3), "a0.weight": (2, 3), "b*": (2,)}
    plan = [claim("x", "a[0].weight", op="transpose", dims=[1, 0]), claim("b?", "b*")]
    made = ruling(plan, source, {"x": (3, 2), "b?": (2,)})
    arrays = {key: np.random.default_rng(1).random(shape, np.float32) for key, shape in source.items()}

    assert not made.problem
    with statedict.remap(arrays, made.rules) as found:
        assert ["b?", "x"] == sorted(found)
        assert arrays["a[0].weight"].T.tobytes() == bytes(found["x"].read())


NAMES = st.lists(
    st.builds(
        lambda words: ".".join(words),
        st.lists(st.sampled_from(["a", "b", "0", "1", "2", "w", "c3"]), min_size=1, max_size=4),
    ),
    min_size=1,
    max_size=12,
    unique=True,
)


def is_tree(names: list[str]) -> bool:
    """Whether no name is that of a module that another one is in."""
    return not any(other.startswith(f"{name}.") for name in names for other in names)


@given(NAMES.filter(is_tree), NAMES.filter(is_tree))
def test_any_renaming_is_carried_out_exactly(old: list[str], new: list[str]) -> None:
    """Whatever rules are found for it, each tensor ends under its own new name."""
    pairs = list(zip(old, new))
    source = {key: (at + 1,) for at, key in enumerate(old)}
    made = ruling([claim(two, one) for one, two in pairs], source, {two: source[one] for one, two in pairs})
    arrays = {key: np.full(shape, at, np.float32) for at, (key, shape) in enumerate(source.items())}

    assert "" == made.problem
    with statedict.remap(arrays, made.rules) as found:
        assert {two: arrays[one].tolist() for one, two in pairs} == {key: found[key].numpy().tolist() for key in found}


# -------------------------------------------------------------------- reorder


@given(st.permutations(range(3)), st.tuples(*[st.integers(1, 3)] * 3), st.integers(0, 1))
def test_reorder_does_what_a_view_does_and_is_taken_back(order: list[int], view: tuple[int, ...], dim: int) -> None:
    count = view[0] * view[1] * view[2]
    array = np.arange(count * 5, dtype=np.float32).reshape((count, 5) if dim == 0 else (5, count))
    rule = rules.reorder("w", view, order, dim)
    rows = np.arange(count).reshape(view).transpose(order).reshape(-1)
    plan = rules.plan(statedict.open({"w": array}), [rule])

    assert np.take(array, rows, dim).tolist() == plan.checkpoint["w"].numpy().tolist()
    with statedict.remap(plan.checkpoint, plan.inverse() or ()) as back:
        assert array.tolist() == back["w"].numpy().tolist()


def test_reorder_works_out_one_size_and_refuses_what_doesnt_fit() -> None:
    array = np.arange(12, dtype=np.float32)
    with statedict.remap({"w": array}, rules.reorder("w", (-1, 2), (1, 0))) as made:
        assert [0, 2, 4, 6, 8, 10, 1, 3, 5, 7, 9, 11] == made["w"].numpy().tolist()
    with pytest.raises(statedict.RuleError, match="can't be seen so"):
        statedict.remap({"w": array}, rules.reorder("w", (5, -1), (1, 0)))
    with pytest.raises(statedict.RuleError, match="an order of as many places"):
        rules.reorder("w", (2, 6), (0, 2))


# -------------------------------------------------------------------- obligations

SOURCE = {"qkv": (12, 4), "a": (4, 4), "b": (4, 4), "counts": (2,)}
TARGET = {"q": (4, 4), "k": (4, 4), "v": (4, 4), "x": (4, 4), "y": (4, 4)}
GOOD = [
    *[claim(name, "qkv", op="split", dim=0, start=4 * at, stop=4 * at + 4) for at, name in enumerate("qkv")],
    claim("x", "a"),
    claim("y", "b"),
]


def plan_of(claims: list[Mapped]) -> Alignment:
    return Alignment(tuple(claims), (Left("counts", "not needed"),), ())


def faults(claims: list[Mapped], source: Side | None = None, target: Side | None = None) -> set[str]:
    return {each.obligation for each in broken(plan_of(claims), source or side(SOURCE), target or side(TARGET))}


def test_a_good_plan_breaks_nothing() -> None:
    assert set() == faults(GOOD)


PLANTED = {
    "one source twice": ([*GOOD[:4], claim("y", "a")], "injective"),
    "overlapping ranges": ([claim("q", "qkv", op="split", dim=0, start=2, stop=6), *GOOD[1:]], "injective"),
    "made twice": ([*GOOD, claim("x", "b")], "injective"),
    "another shape": ([*GOOD[:4], claim("y", "qkv")], "shapes"),
    "no such source": ([*GOOD[:4], claim("y", "z")], "shapes"),
    "an op without sense": ([*GOOD[:4], claim("y", "b", op="split", dim=0)], "shapes"),
    "a source left over": (GOOD[:4], "accounted"),
    "a target left over": (GOOD[:4], "filled"),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_violation_is_found(name: str) -> None:
    claims, obligation = PLANTED[name]

    assert obligation in faults(claims)


def test_integers_are_no_floats() -> None:
    assert {"numbers"} == faults(GOOD, side(SOURCE, "int8"))


def test_layers_made_otherwise_are_found() -> None:
    source = {f"l.{at}.w": (4, 4) for at in range(4)}
    claims = [claim(key, key) for key in source]
    claims[2] = claim("l.2.w", "l.2.w", op="transpose", dims=[1, 0])
    found = broken(Alignment(tuple(claims), (), ()), side(source), side(source))

    assert ["alike"] == [each.obligation for each in found]


def test_one_tensor_of_the_target_may_have_a_source_twice() -> None:
    source, target = {"a": (4, 4)}, {"x": (4, 4), "y": (4, 4)}
    plan = Alignment((claim("x", "a"), claim("y", "a")), (), ())

    assert [] == broken(plan, side(source), side(target, tied=(("x", "y"),)))
    assert ["injective"] == [each.obligation for each in broken(plan, side(source), side(target))]


def test_what_breaks_an_obligation_becomes_a_guess_and_is_listed() -> None:
    claims = [claim("x", "a", tier="proven"), claim("y", "a")]
    made, wrong = kept(Alignment(tuple(claims), (), ()), side({"a": (2,), "b": (2,)}), side({"x": (2,), "y": (2,)}))

    assert [("x", "proven"), ("y", "guess")] == [(each.target, each.tier) for each in made.mapped]
    assert (["b"], ["y"]) == ([left.key for left in made.dropped], [left.key for left in made.unfilled])
    assert 1 == len(wrong)


@given(st.sets(st.integers(0, 4), max_size=3), st.integers(0, 3))
def test_what_is_kept_breaks_nothing(leave: set[int], doubled: int) -> None:
    """Whatever is planted, the plan that is left keeps every obligation."""
    claims = [each for at, each in enumerate(GOOD) if at not in leave]
    claims += [claim(name, "a") for name in ("x", "y", "q")[:doubled]]
    made, _ = kept(Alignment(tuple(claims), (), ()), side(SOURCE), side(TARGET))

    assert [] == broken(made, side(SOURCE), side(TARGET))


def test_rows_that_nobody_uses_are_counted() -> None:
    claims = [claim("q", "qkv", op="slice", dim=0, start=0, stop=4)]

    assert {"qkv": 32} == left_over(plan_of(claims), side(SOURCE), side(TARGET))


def test_steps_are_followed_back_to_the_element() -> None:
    """Against numpy, with every kind of step."""
    array = np.arange(3 * 4 * 6).reshape(3, 4, 6)
    then = [{"op": "split", "dim": 1, "start": 3, "stop": 6}, {"op": "transpose", "dims": [1, 0]}]
    way = carried(claim("t", "s", op="unstack", dim=0, index=2, then=then), {"s": (3, 4, 6)}, (3, 4))
    wanted = array[2, :, 3:6].T.reshape(-1)

    assert wanted.tolist() == [way.origin(place)[1] for place in range(12)]
    with pytest.raises(Misfit, match="no index 5"):
        carried(claim("t", "s", op="unstack", dim=0, index=5), {"s": (3, 4)}, (4,))
