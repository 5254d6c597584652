"""How a model has moved over the steps of a run: figures as numpy has them, each byte read once, and what is said of it."""

from __future__ import annotations

import json
import shutil
import tracemalloc
from collections.abc import Callable, Iterable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from statedict.checkpoint import of_memory
from statedict.dtypes import BY_CODE
from statedict.errors import KeyNotFound, StateDictError, StepNotFound
from statedict.io.ranges import LocalFile
from statedict.numerics.motion import Motion, MotionRoom
from statedict.ops.trend import trend
from statedict.ops.trend_report import Trend
from statedict.ops.trend_sources import depth_of, module_of
from statedict.runs import Steps, TrainingRun
from statedict.runs.pieces import Captured
from statedict.runs.run import RunFolder

Arrays = Mapping[str, Any]


def write(folder: Path, models: Iterable[Arrays], **more: Any) -> RunFolder:
    """A run with a step for each of these, numbered from 1 on; ``more`` are other components."""
    run = RunFolder(folder)
    for number, model in enumerate(models, 1):
        pieces = {"model": of_memory(dict(model)), **{name: of_memory(value) for name, value in more.items()}}
        run.write(number, Captured(pieces), metrics={"loss": 1 / number})
    return run


def norm(*arrays: Any) -> float:
    return float(numpy.sqrt(sum([(numpy.abs(array.astype("complex128")) ** 2).sum() for array in arrays])))


def figures(found: Trend) -> list[tuple[float | None, float | None]]:
    return [(step.figures.norm, step.figures.change) for step in found.steps]


def codes(found: Trend) -> list[str]:
    return [finding.code for finding in found.findings]


def said(found: Trend, code: str) -> str:
    return next(finding.message for finding in found.findings if finding.code == code)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "run"


# -------------------------------------------------------------------- figures

KINDS = ["float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "complex64", "complex128"]


@pytest.mark.parametrize("kind", KINDS)
def test_figures_are_those_of_numpy(folder: Path, kind: str) -> None:
    rng = numpy.random.default_rng(0)
    dtype = numpy.dtype(getattr(ml_dtypes, kind, kind))
    steps = [
        {"a": rng.normal(size=(300, 171)).astype(dtype), "b.c": rng.normal(size=7).astype(dtype)} for _ in range(3)
    ]
    with write(folder, [{**step, "count": numpy.arange(3), "on": numpy.ones(2, bool)} for step in steps]) as run:
        found = trend(run)
    wide = [[array.astype("complex128") for array in step.values()] for step in steps]

    assert [2, 2, 2] == [step.figures.tensors for step in found.steps]
    assert [norm(*arrays) for arrays in wide] == pytest.approx([step.figures.norm for step in found.steps])
    for before, now, step in zip(wide, wide[1:], found.steps[1:], strict=False):
        change = norm(*[two - one for one, two in zip(before, now, strict=True)])
        assert (change, change / norm(*now)) == pytest.approx((step.figures.change, step.figures.ratio))
    assert (None, None) == (found.steps[0].figures.change, found.steps[0].figures.ratio)
    parts = numpy.concatenate([array.view("float64").ravel() for array in wide[2]])
    assert numpy.abs(parts).max() == found.steps[2].figures.largest
    assert [{"loss": 1.0}, {"loss": 0.5}] == [step.metrics for step in found.steps[:2]]


def test_a_tensor_that_becomes_another_dtype_is_compared_by_number(folder: Path) -> None:
    values = numpy.array([1.0, 2.0, -4.0])
    with write(folder, [{"w": values}, {"w": (values + 1).astype("float16")}]) as run:
        found = trend(run)

    assert 3**0.5 == pytest.approx(found.steps[1].figures.change)


@pytest.mark.parametrize("scale", [1e-200, 1e200, 1e308])
def test_numbers_whose_squares_do_not_exist_have_a_norm(folder: Path, scale: float) -> None:
    values = numpy.array([0.5, -0.5, 0.25, 0.0])
    with write(folder, [{"w": values * scale}, {"w": -values * scale}]) as run:
        found = trend(run)
    last = found.steps[1].figures

    assert (0.75 * scale, 0.5 * scale) == pytest.approx((last.norm, last.largest))
    assert 1.5 == pytest.approx(last.change / scale)  # type: ignore[operator]


def test_a_change_beyond_float64_is_a_text_in_json(folder: Path) -> None:
    with write(folder, [{"w": numpy.full(9, 1e308)}, {"w": numpy.full(9, -1e308)}]) as run:
        found = json.loads(json.dumps(trend(run).to_dict(), allow_nan=False))

    assert ("inf", "inf") == (found["steps"][1]["norm"], found["steps"][1]["change"])


@given(
    st.lists(st.floats(width=32), min_size=1, max_size=40),
    st.lists(st.floats(width=32), min_size=1, max_size=40),
    st.integers(1, 7),
)
def test_blocks_of_any_size_come_to_the_same(now: list[float], before: list[float], size: int) -> None:
    count = min(len(now), len(before))
    new, old = numpy.array(now[:count], "<f4"), numpy.array(before[:count], "<f4")
    dtype, room, whole = BY_CODE["F32"], MotionRoom(), Motion()
    for first in range(0, count, size):
        part = Motion()
        cut = slice(first, first + size)
        part.add(memoryview(new[cut].tobytes()), dtype, room, (memoryview(old[cut].tobytes()), dtype))
        whole.merge(part)
    wide, finite = new.astype("f8"), numpy.isfinite(new)
    both = finite & numpy.isfinite(old)

    assert (int(numpy.isnan(new).sum()), int(numpy.isinf(new).sum())) == (whole.nan, whole.inf)
    assert (int(finite.sum()), int(both.sum())) == (whole.finite, whole.compared)
    assert float(numpy.linalg.norm(wide[finite])) == pytest.approx(whole.norm)
    assert float(numpy.linalg.norm(wide[both] - old.astype("f8")[both])) == pytest.approx(whole.change)
    assert float(numpy.abs(wide[finite]).max(initial=0.0)) == whole.largest


def test_tied_tensors_count_once(folder: Path) -> None:
    shared = numpy.arange(6, dtype="float32")
    with write(folder, [{"embed": shared, "head": shared}]) as run:
        found = trend(run)

    assert (1, norm(shared)) == (found.steps[0].figures.tensors, pytest.approx(found.steps[0].figures.norm))


def test_a_tensor_that_is_made_of_others_is_left_out_and_said(folder: Path) -> None:
    torch = pytest.importorskip("torch")
    model = {"a": torch.ones(3), "sparse": torch.ones(2, 2).to_sparse()}
    with write(folder, [model]) as run:
        found = trend(run)

    assert (1, "1 tensor left out (sparse_coo): 'sparse'") == (found.steps[0].figures.tensors, said(found, "left-out"))


# -------------------------------------------------------------------- NaN and Inf


def test_the_first_step_with_nan_or_inf_and_its_tensors_are_named(folder: Path) -> None:
    whole = {"a.w": numpy.ones(4, "f4"), "b.w": numpy.ones(4, "f4"), "b.v": numpy.ones(2, "f4")}
    bad = {
        **whole,
        "b.w": numpy.array([1, numpy.nan, numpy.inf, -numpy.inf], "f4"),
        "b.v": numpy.full(2, numpy.nan, "f4"),
    }
    with write(folder, [whole, bad, bad]) as run:
        found, healthy = trend(run), trend(run, only="a.*")
    nowhere = found.modules[1].figures[1]

    assert (2, (("b.w", 1, 2), ("b.v", 2, 0))) == found.first_non_finite
    assert "NaN or Inf first at step 2: 'b.w' (1 NaN and 2 Inf) and 1 more tensor; step 1 has none" == said(
        found, "non-finite"
    )
    assert [(0, 0), (3, 2), (3, 2)] == [(step.figures.nan, step.figures.inf) for step in found.steps]
    assert nowhere is not None and (1.0, 0.0) == (nowhere.norm, nowhere.change)
    assert (False, True, None) == (bool(found), bool(healthy), healthy.first_non_finite)


def test_without_a_finite_number_there_is_no_norm(folder: Path) -> None:
    with write(folder, [{"w": numpy.ones(3)}, {"w": numpy.full(3, numpy.nan)}]) as run:
        last = trend(run).steps[1].figures

    assert (None, None, None, None, 3) == (last.norm, last.change, last.ratio, last.largest, last.nan)


def test_nan_in_the_first_step_is_said_to_be_there_already(folder: Path) -> None:
    with write(folder, [{"w": numpy.full(3, numpy.inf)}]) as run:
        assert said(trend(run), "non-finite").startswith("NaN or Inf already at step 1: 'w' (3 Inf)")


# -------------------------------------------------------------------- what is read


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """The bytes of tensors that were read, by step; headers are read another way."""
    found: dict[str, int] = {}
    read_into = LocalFile.read_into

    def counting(self: LocalFile, offset: int, buffer: memoryview) -> None:
        step = Path(self.path).parent.name
        found[step] = found.get(step, 0) + len(buffer)
        read_into(self, offset, buffer)

    monkeypatch.setattr(LocalFile, "read_into", counting)
    return found


def test_each_byte_is_read_once_and_what_has_not_changed_not_at_all(folder: Path, reads: dict[str, int]) -> None:
    frozen = numpy.arange(5000, dtype="f4")
    models = [{"frozen.w": frozen, "head.w": numpy.full(3000, step, "f4")} for step in range(3)]
    with write(folder, models) as run:
        reads.clear()
        found = trend(run)

    assert {"step-00000001": 32_000, "step-00000002": 12_000, "step-00000003": 12_000} == reads
    assert (3 * 32_000, 56_000) == (found.nbytes, found.read_nbytes)


def test_of_many_steps_one_in_fifteen_is_read_twice_and_no_more(folder: Path, reads: dict[str, int]) -> None:
    rng = numpy.random.default_rng(0)
    models = [
        {"w": rng.normal(size=50), "frozen": numpy.ones(30), "late": numpy.full(4, step > 16)} for step in range(40)
    ]
    with write(folder, [{**model, "late": model["late"].astype("f8")} for model in models]) as run:
        reads.clear()
        found = trend(run)
    changes = [norm(two["w"] - one["w"], two["late"] * 1.0 - one["late"]) for one, two in pairwise(models)]

    assert changes == pytest.approx([step.figures.change for step in found.steps[1:]])
    assert [norm(*[model[key] * 1.0 for key in model]) for model in models] == pytest.approx(
        [step.figures.norm for step in found.steps]
    )
    assert ["frozen"] == list(found.frozen)
    twice = [name for name, nbytes in reads.items() if nbytes >= 800]
    assert ["step-00000015", "step-00000030"] == sorted([name for name in twice if name != "step-00000001"])


def test_memory_stays_bounded(folder: Path) -> None:
    with write(folder, [{"w": numpy.full(1 << 22, step, "f4")} for step in range(3)]) as run:
        trend(run)
        tracemalloc.start()
        try:
            trend(run)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    assert peak < 1 << 23 < 3 << 24


def test_progress_ends_with_all_of_it(folder: Path) -> None:
    told: list[tuple[int, int]] = []
    with write(folder, [{"a": numpy.full(10, step), "b": numpy.ones(5)} for step in (1.0, 2.0)]) as run:
        trend(run, on_progress=lambda done, total: told.append((done, total)))

    assert [(160, 240), (240, 240)] == told


def test_a_trend_changes_nothing_of_a_run_that_goes_on(folder: Path) -> None:
    write(folder, [{"w": numpy.ones(1)}, {"w": numpy.ones(1)}]).close()
    with TrainingRun(folder, every=Steps(10)) as run:
        before = [run.should_save(step) for step in (3, 11, 12)], sorted(folder.rglob("*"))
        found = run.trend(last=1, only=["w"])

        assert before == ([run.should_save(step) for step in (3, 11, 12)], sorted(folder.rglob("*")))
        assert [2] == [step.step for step in found.steps]


# -------------------------------------------------------------------- what stands still, comes and goes


def test_a_module_that_does_not_change_is_said_to_be_frozen(folder: Path) -> None:
    models = [
        {"body.a.w": numpy.ones(2), "body.a.b": numpy.ones(2), "body.c": numpy.ones(1), "head.w": numpy.full(2, step)}
        for step in (1.0, 2.0, 3.0)
    ]
    with write(folder, models) as run:
        found, all_still, alone = trend(run), trend(run, only="body.*"), trend(run, last=1)

    assert ("body.*",) == found.frozen
    assert "frozen from step 1 to 3: 'body.*'" == said(found, "frozen")
    assert "nothing changes from step 1 to 3" == said(all_still, "frozen")
    assert ((), []) == (alone.frozen, codes(alone))
    assert {"body.a.*": True, "body.c": True, "head.w": False} == {
        module.name: module.frozen for module in found.modules
    }
    assert "frozen" in next(line for line in str(found).splitlines() if "body.c" in line)


def test_a_tensor_that_is_new_gone_or_of_another_shape_has_no_change_and_is_said(folder: Path) -> None:
    models = [
        {"w": numpy.full(2, 1.0), "old": numpy.ones(3), "grown": numpy.ones(2)},
        {"w": numpy.full(2, 2.0), "new": numpy.ones(3), "grown": numpy.zeros(4)},
        {"w": numpy.full(2, 2.0), "new": numpy.ones(3), "grown": numpy.ones(4), "old": numpy.zeros(3)},
    ]
    with write(folder, models) as run:
        found = trend(run)

    assert [2**0.5, 2.0] == pytest.approx([step.figures.change for step in found.steps[1:]])
    assert [
        "at step 2, 1 tensor is new, without a change to tell: 'new'",
        "at step 2, 1 tensor is gone, without a change to tell: 'old'",
        "at step 2, 1 tensor is of another shape, without a change to tell: 'grown'",
        "at step 3, 1 tensor is new, without a change to tell: 'old'",
    ] == [finding.message for finding in found.findings if finding.code == "other-tensors"]


# -------------------------------------------------------------------- damage


def damage(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(bytes(data))


def test_bytes_that_are_not_as_they_were_written_are_said(folder: Path) -> None:
    with write(folder, [{"v": numpy.ones(2), "w": numpy.full(9, step)} for step in (1.0, 2.0)]) as run:
        whole = trend(run)
        damage(folder / "step-00000002" / "model.safetensors", -1)
        found = trend(run)

    assert (True, False) == (bool(whole), bool(found))
    assert "1 tensor of step 2 isn't as it was written, the digest differs: 'w'" == said(found, "damaged")


def header(folder: Path) -> None:
    damage(folder / "step-00000002" / "model.safetensors", 30)


def manifest(folder: Path) -> None:
    damage(folder / "step-00000002" / "manifest.json", 60)


@pytest.mark.parametrize(("act", "code"), [(header, "unread-step"), (manifest, "damaged-step")])
def test_a_step_that_cannot_be_read_is_left_out_and_said(folder: Path, act: Callable[[Path], None], code: str) -> None:
    with write(folder, [{"w": numpy.full(9, step)} for step in (1.0, 2.0, 4.0)]) as run:
        act(folder)
        found = trend(run)

    assert ([1, 3], False, [code]) == ([step.step for step in found.steps], bool(found), codes(found))
    assert [9.0] == [step.figures.change for step in found.steps[1:]]


def test_a_step_that_is_deleted_meanwhile_is_no_failure(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with write(folder, [{"w": numpy.full(9, step)} for step in (1.0, 2.0)]) as run:
        steps = run.steps()
        monkeypatch.setattr(run, "steps", lambda: steps)
        shutil.rmtree(folder / "step-00000001")
        found = trend(run)

    assert ([2], True, ["unread-step"]) == ([step.step for step in found.steps], bool(found), codes(found))


# -------------------------------------------------------------------- what is asked for


def test_a_run_without_steps_has_no_trend(folder: Path) -> None:
    with RunFolder(folder) as run, pytest.raises(StepNotFound, match="no step is committed"):
        trend(run)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"only": "x.*"}, KeyNotFound, r"no tensor of floating numbers matches.*There is: a\.w"),
        ({"only": "count"}, KeyNotFound, "no tensor of floating numbers"),
        ({"component": "modle"}, KeyNotFound, "no such component.*There is: model"),
        ({"last": 0}, StateDictError, "at least 1"),
        ({"last": "2"}, StateDictError, "at least 1"),
    ],
)
def test_what_is_not_there_is_an_error(folder: Path, options: Any, error: type[StateDictError], match: str) -> None:
    with (
        write(folder, [{"a.w": numpy.ones(2), "count": numpy.arange(2)}]) as run,
        pytest.raises(error, match=match) as caught,
    ):
        trend(run, **options)

    assert error is type(caught.value)


def test_the_newest_steps_and_some_keys_alone(folder: Path) -> None:
    models = [{"a.w": numpy.full(2, step), "a.b": numpy.ones(1), "c": numpy.ones(3)} for step in (1.0, 2.0, 4.0)]
    with write(folder, models) as run:
        found = trend(run, only=["a.*", "nothing"], last=2)

    assert [2, 3] == [step.step for step in found.steps]
    assert [(9**0.5, None), (33**0.5, 8**0.5)] == [pytest.approx(pair) for pair in figures(found)]


def test_the_model_is_the_component_of_that_name_or_the_first_module(folder: Path) -> None:
    piece = of_memory({"w": numpy.ones(2)})
    facts = {"kinds": {"net": "module", "opt": "optimizer"}}
    other = {"net": piece, "opt": of_memory({"m": numpy.zeros(2)})}
    with write(folder, [{"w": numpy.ones(2)}], other={"x": numpy.zeros(1)}) as run:
        assert "model" == trend(run).component
        run.write(2, Captured(other, facts))
        assert ("net", 1) == (trend(run).component, len(trend(run).steps))
        run.write(3, Captured(other))
        with pytest.raises(KeyNotFound, match=r"nothing says which component is the model.*net, opt"):
            trend(run)
        assert "opt" == trend(run, component="opt").component
        run.write(4, Captured({"weights": piece, "plain": of_memory({"epoch": 3})}))

        assert "weights" == trend(run).component


# -------------------------------------------------------------------- modules

GPT2 = [
    "wte.weight", "wpe.weight", "ln_f.weight", "ln_f.bias",
    *[f"h.{n}.{part}" for n in range(12) for part in ("attn.c_attn.weight", "attn.c_attn.bias", "mlp.c_fc.weight")],
]  # fmt: skip
LLAMA = [
    "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight",
    *[f"model.layers.{n}.{part}.weight" for n in range(32) for part in ("self_attn.q_proj", "mlp.up_proj")],
]  # fmt: skip
HUGE = [f"blocks.{n}.{part}" for n in range(500) for part in ("w", "b")]
SMALL = ["fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"]


@pytest.mark.parametrize(
    ("keys", "count", "one"),
    [(GPT2, 16, "h.3.*"), (LLAMA, 35, "model.layers.3.*"), (HUGE, 1, "blocks.*"), (SMALL, 2, "fc1.*"), (["w"], 1, "w")],
)
def test_modules_are_what_a_person_would_name(keys: list[str], count: int, one: str) -> None:
    modules = {module_of(key, depth_of(keys)) for key in keys}

    assert (count, True) == (len(modules), one in modules)


def test_the_modules_that_have_changed_most_have_a_line(folder: Path) -> None:
    def model(step: int) -> dict[str, Any]:
        weights = {f"layers.{n}.w": numpy.full(2, 100.0 + n * step) for n in range(30)}
        return {**weights, **{f"layers.{n}.b": numpy.zeros(1) for n in range(30)}}

    with write(folder, [model(step) for step in range(5)]) as run:
        found = trend(run)
    text = str(found)

    assert "20 of 30 modules" in text
    assert [f"layers.{n}.*" for n in range(10, 30)] == [word for word in text.split() if word.startswith("layers.")][
        :20
    ]
    assert (30, 1) == (len(found.modules), found.modules[20].most)
    assert next(line for line in text.splitlines() if "layers.20.*" in line).endswith("█▇▇▆")


@pytest.mark.parametrize("form", ["to_html", "to_markdown"])
def test_it_is_a_page_too(folder: Path, form: str) -> None:
    with write(folder, [{"a<b>.w": numpy.ones(2)}]) as run:
        text = getattr(trend(run), form)()

    assert "<b>" not in text and "loss" in text


def test_json_has_all_of_it(folder: Path) -> None:
    with write(
        folder, [{"a.w": numpy.ones(2), "a.v": numpy.ones(1)}, {"a.w": numpy.full(2, 2.0), "b": numpy.ones(1)}]
    ) as run:
        found = json.loads(json.dumps(trend(run).to_dict(), allow_nan=False))
    row = found["steps"][1]

    assert ("statedict.trend/1", "model", True) == (found["schema"], found["component"], found["ok"])
    assert (2, {"loss": 0.5}, 3.0, 2) == (row["step"], row["metrics"], row["norm"], row["tensors"])
    assert (2**0.5, 2**0.5 / 3, 2.0, 0, 0) == pytest.approx(
        (row["change"], row["ratio"], row["largest"], row["nan"], row["inf"])
    )
    assert [("a.*", 2, 2), ("b", 1, 2)] == [(m["name"], m["tensors"], len(m["steps"])) for m in found["modules"]]
    assert found["modules"][1]["steps"][0] is None
