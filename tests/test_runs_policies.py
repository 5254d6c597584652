"""What is kept and what is due: pure functions, so every run of them can be compared with what they say they are."""

from __future__ import annotations

from math import isnan
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from statedict.errors import StateDictError
from statedict.runs.policies import Best, Clock, Every, Keep, Latest, Minutes, Record, Steps, Within, due_of, keep_of

NOW = 1e6
values = st.one_of(st.none(), st.floats())


@st.composite
def records(draw: st.DrawFn) -> list[Record]:
    """Steps of a run, ascending, with a metric that some don't have."""
    steps = sorted(draw(st.sets(st.integers(0, 500), max_size=20)))
    made = []
    for step in steps:
        loss = draw(values)
        age = draw(st.floats(0, 1e5))
        made.append(Record(step, NOW - age, {} if loss is None else {"loss": loss}))
    return made


policies = st.one_of(
    st.builds(Latest, st.integers(1, 30)),
    st.builds(lambda count, mode: Best("loss", count, mode=mode), st.integers(1, 30), st.sampled_from(["min", "max"])),
    st.builds(Every, st.integers(1, 100)),
    st.builds(lambda hours: Within(hours=hours), st.floats(0.001, 100)),
)


@given(records(), policies, policies, policies)
def test_what_combined_policies_keep_is_what_any_of_them_keeps(found: list[Record], a: Keep, b: Keep, c: Keep) -> None:
    each = [policy.keeps(found, NOW) for policy in (a, b, c)]

    assert frozenset().union(*each) == (a | b | c).keeps(found, NOW) == (a | (b | c)).keeps(found, NOW)


@given(records(), policies)
def test_a_policy_keeps_only_what_is_there(found: list[Record], policy: Keep) -> None:
    assert policy.keeps(found, NOW) <= {record.step for record in found}


@given(records(), st.integers(1, 30))
def test_latest_keeps_the_newest(found: list[Record], count: int) -> None:
    assert {record.step for record in found[max(0, len(found) - count) :]} == Latest(count).keeps(found, NOW)


@given(records(), st.integers(1, 30), st.sampled_from(["min", "max"]))
def test_best_keeps_none_that_is_worse_than_one_that_goes(found: list[Record], count: int, mode: str) -> None:
    kept = Best("loss", count, mode=mode).keeps(found, NOW)
    known = {each.step: each.metrics["loss"] for each in found if not isnan(each.metrics.get("loss", float("nan")))}
    sign = 1 if mode == "min" else -1

    assert kept <= known.keys() and len(kept) == min(count, len(known))
    assert all(sign * known[one] <= sign * known[other] for one in kept for other in known.keys() - kept)


@given(records(), st.floats(0.1, 30))
def test_within_keeps_the_young(found: list[Record], hours: float) -> None:
    young = {record.step for record in found if NOW - record.time <= hours * 3600}

    assert young == Within(hours=hours).keeps(found, NOW)


@given(st.integers(1, 50), st.lists(st.integers(1, 7), min_size=1, max_size=60))
def test_steps_is_due_once_for_every_multiple_that_is_passed(count: int, strides: list[int]) -> None:
    policy, last, step, saved = Steps(count), 0, 0, []
    for stride in strides:
        step += stride
        if policy.is_due(Clock(step, last, 0)):
            saved.append(step)
            last = step

    assert len(saved) == len({at // count for at in _every(strides)} - {0})


def _every(strides: list[int]) -> list[int]:
    found, step = [], 0
    for stride in strides:
        step += stride
        found.append(step)
    return found


def test_whichever_comes_first_is_due() -> None:
    policy = Steps(1000) | Minutes(15)

    assert [False, True, True] == [
        policy.is_due(clock) for clock in (Clock(999, 0, 14.9), Clock(1000, 0, 0), Clock(5, 4, 15.0))
    ]


def test_numbers_stand_for_the_simplest_policies() -> None:
    assert ["Latest(3)", "Steps(7)"] == [repr(keep_of(3)), repr(due_of(7))]
    assert "Latest(3) | Best('val_loss', 2, mode='min')" == repr(Latest(3) | Best("val_loss", 2))


@pytest.mark.parametrize(
    ("metric", "mode"),
    [
        ("val_loss", "min"),
        ("val/error", "min"),
        ("ppl", "min"),
        ("top1.acc", "max"),
        ("F1", "max"),
        ("val-bleu", "max"),
    ],
)
def test_the_name_of_a_metric_tells_which_way_is_better(metric: str, mode: str) -> None:
    assert mode == Best(metric).mode


@pytest.mark.parametrize(
    "make",
    [
        lambda: Best("figure"), lambda: Best("loss_acc"), lambda: Best("loss", mode="up"), lambda: Latest(0),
        lambda: Every(True), lambda: Steps(-1), lambda: Minutes(0), lambda: Minutes(float("nan")), lambda: Within(),
        lambda: keep_of("all"), lambda: due_of(None), lambda: keep_of(0), lambda: Latest(1) | "x",
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused_when_it_is_said(make: Any) -> None:
    with pytest.raises(StateDictError):
        make()
