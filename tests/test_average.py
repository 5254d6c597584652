"""The mean of checkpoints: of the right numbers, of one structure, and honest about what it isn't."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import statedict
from statedict.checkpoint import Checkpoint
from statedict.checkpoint import open as open_checkpoint
from statedict.cli import main
from statedict.errors import (
    FileError,
    KeyMismatch,
    KeyNotFound,
    RuleError,
    SpecMismatch,
    StateDictError,
    TargetExists,
    Unsupported,
)
from statedict.ops.average import average

torch = pytest.importorskip("torch")
safetensors = pytest.importorskip("safetensors.torch")


def network(seed: int) -> dict[str, Any]:
    """A state dict with a batch norm, whose counter of batches is an integer."""
    torch.manual_seed(seed)
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Linear(4, 2))
    module(torch.randn(2, 3, 6, 4 + 2))
    for _ in range(seed):
        module[1](torch.randn(2, 4, 3, 3))
    state: dict[str, Any] = module.state_dict()
    return state


@pytest.fixture
def sources(tmp_path: Path) -> list[Path]:
    """Three checkpoints of one structure: two of torch's, one of the safetensors library's."""
    paths = [tmp_path / "a.pth", tmp_path / "b.pth", tmp_path / "c.safetensors"]
    for seed, path in enumerate(paths[:2]):
        torch.save(network(seed), path)
    safetensors.save_file(network(2), paths[2])
    return paths


def expected_mean(weights: list[float]) -> dict[str, Any]:
    """The mean of the networks in float64."""
    states = [network(seed) for seed in range(len(weights))]
    return {key: sum(state[key].double() * w for state, w in zip(states, weights)) for key in states[0]}


def assert_mean(weights: list[float], found: dict[str, Any]) -> None:
    for key, values in expected_mean(weights).items():
        if found[key].is_floating_point():
            torch.testing.assert_close(found[key], values.float())


def test_the_mean_of_files_of_several_formats_is_that_of_torch(sources: list[Path], tmp_path: Path) -> None:
    average(sources, tmp_path / "mean.safetensors")

    assert_mean([1 / 3] * 3, safetensors.load_file(tmp_path / "mean.safetensors"))


def test_torch_reads_the_mean(sources: list[Path], tmp_path: Path) -> None:
    average(sources, tmp_path / "mean.pth", weights=[0.2, 0.3, 0.5])

    assert_mean([0.2, 0.3, 0.5], torch.load(tmp_path / "mean.pth", weights_only=True))


def test_weights_are_divided_by_their_sum_and_it_is_said(sources: list[Path], tmp_path: Path) -> None:
    made = average(sources, tmp_path / "mean.safetensors", weights=[1, 1, 2])

    assert_mean([0.25, 0.25, 0.5], safetensors.load_file(tmp_path / "mean.safetensors"))
    assert "the weights were divided by their sum, 4" in [finding.message for finding in made.findings]


def test_ema_is_the_moving_average_in_the_order_of_the_sources(sources: list[Path], tmp_path: Path) -> None:
    average(sources, tmp_path / "mean.safetensors", ema=0.9)
    moving = {key: values.double() for key, values in network(0).items()}
    for seed in (1, 2):
        moving = {key: 0.9 * moving[key] + 0.1 * values for key, values in network(seed).items()}
    found = safetensors.load_file(tmp_path / "mean.safetensors")

    for key in ("0.weight", "1.running_var", "2.bias"):
        torch.testing.assert_close(found[key], moving[key].float())


@given(st.lists(st.floats(0.015625, 8), min_size=1, max_size=5), st.sampled_from(["float32", "float16", "bfloat16"]))
def test_the_mean_of_memory_is_the_mean(tmp_path_factory: Any, weights: list[float], dtype: str) -> None:
    target = tmp_path_factory.mktemp("mean") / "mean.safetensors"
    tensors = [torch.randn(7, 5).to(getattr(torch, dtype)).T for _ in weights]
    average([{"w": tensor} for tensor in tensors], target, weights=weights)
    expected = sum(tensor.double() * weight for tensor, weight in zip(tensors, weights)) / sum(weights)

    torch.testing.assert_close(safetensors.load_file(target)["w"], expected.to(tensors[0].dtype))


def test_integers_and_values_are_those_of_the_last_source_and_it_is_said(tmp_path: Path) -> None:
    first = {"w": torch.ones(2), "n": torch.tensor(3), "m": torch.tensor([True]), "epoch": 1}
    last = {"w": torch.zeros(2), "n": torch.tensor(9), "m": torch.tensor([False]), "epoch": 2}
    made = average([first, last], tmp_path / "mean.pth")
    found = torch.load(tmp_path / "mean.pth", weights_only=True)
    said = {finding.code: finding.keys for finding in made.findings}

    assert (9, False, 2, [0.5, 0.5]) == (int(found["n"]), bool(found["m"]), found["epoch"], found["w"].tolist())
    assert {"average-last": ("n", "m"), "average-last-values": ("epoch",)} == said


def test_statistics_of_batch_norms_are_warned_about(sources: list[Path], tmp_path: Path) -> None:
    made = average(sources, tmp_path / "mean.pth", dry_run=True)
    [found] = [finding for finding in made.findings if finding.level == "warning"]

    assert ("average-statistics", ("1.running_mean", "1.running_var")) == (found.code, found.keys)
    assert "update_bn" in found.message


def test_ties_of_all_sources_stay_ties(tmp_path: Path) -> None:
    sources = []
    for seed in range(2):
        shared, apart = torch.full((3,), float(seed)), torch.full((3,), 5.0 * seed)
        sources.append({"a": shared, "b": shared, "c": apart, "d": apart if seed else apart.clone() + 1})
    average(sources, tmp_path / "mean.pth")
    found = torch.load(tmp_path / "mean.pth", weights_only=True)

    assert found["a"].data_ptr() == found["b"].data_ptr()
    assert found["c"].data_ptr() != found["d"].data_ptr()
    assert ([0.5] * 3, [2.5] * 3, [3.0] * 3) == tuple(found[key].tolist() for key in "acd")


def test_strides_parameters_and_nesting_are_kept(tmp_path: Path) -> None:
    def made(value: float) -> dict[str, Any]:
        conv = torch.full((2, 3, 4, 4), float(value)).to(memory_format=torch.channels_last)
        return {"net": {"conv": torch.nn.Parameter(conv), "list": [torch.full((2,), float(value)), None]}}

    average([made(1), made(3)], tmp_path / "mean.pth")
    found = torch.load(tmp_path / "mean.pth", weights_only=True)["net"]

    assert isinstance(found["conv"], torch.nn.Parameter)
    assert found["conv"].is_contiguous(memory_format=torch.channels_last)
    assert ({2.0}, [2.0, 2.0], None) == (
        set(found["conv"].flatten().tolist()),
        found["list"][0].tolist(),
        found["list"][1],
    )


def test_a_flat_file_and_a_nested_one_of_the_same_keys_have_a_mean(tmp_path: Path) -> None:
    average([{"a.b": torch.ones(2)}, {"a": {"b": torch.zeros(2)}}], tmp_path / "mean.pth")

    assert [0.5, 0.5] == torch.load(tmp_path / "mean.pth", weights_only=True)["a"]["b"].tolist()


def test_provenance_stands_in_the_metadata(sources: list[Path], tmp_path: Path) -> None:
    recorded = tmp_path / "d.safetensors"
    statedict.convert(sources[0], recorded)
    average([recorded, sources[1]], tmp_path / "mean.safetensors", ema=0.75)
    with open_checkpoint(tmp_path / "mean.safetensors") as checkpoint:
        text = checkpoint.metadata["statedict.average"]
    found = json.loads(text)
    digest = found["sources"][0].pop("digest")

    assert json.dumps(found, sort_keys=True, separators=(",", ":")) in text.replace(f'"digest":"{digest}",', "")
    assert digest.startswith("xxh3-128:")
    assert {"accumulate": "by dtype", "ema": 0.75, "sources": found["sources"]} == found
    assert [{"name": "d.safetensors", "weight": 0.75}, {"name": "b.pth", "weight": 0.25}] == found["sources"]


def test_the_same_input_gives_the_same_bytes(sources: list[Path], tmp_path: Path) -> None:
    for name in ("one.pth", "two.pth"):
        average(sources, tmp_path / name)

    assert (tmp_path / "one.pth").read_bytes() == (tmp_path / "two.pth").read_bytes()


def test_a_mean_can_be_cast(sources: list[Path], tmp_path: Path) -> None:
    average(sources, tmp_path / "mean.safetensors", dtype="bfloat16")
    found = safetensors.load_file(tmp_path / "mean.safetensors")

    assert {torch.bfloat16, torch.int64} == {tensor.dtype for tensor in found.values()}
    torch.testing.assert_close(found["0.weight"], expected_mean([1 / 3] * 3)["0.weight"].bfloat16())


def test_floats_of_several_dtypes_have_a_mean_where_one_is_asked_for(tmp_path: Path) -> None:
    values = torch.randn(50)
    sources = [{"w": values}, {"w": values.bfloat16()}]

    with pytest.raises(SpecMismatch, match=r"'w' as float32 \[50\] instead of bfloat16 \[50\]"):
        average(sources, tmp_path / "mean.safetensors")
    average(sources, tmp_path / "mean.safetensors", dtype="float32")
    expected = ((values.double() + values.bfloat16().double()) / 2).float()
    torch.testing.assert_close(safetensors.load_file(tmp_path / "mean.safetensors")["w"], expected)


def test_numbers_that_a_dtype_does_not_reach_are_refused(tmp_path: Path) -> None:
    sources = [{"w": torch.tensor([1e6])}] * 2

    with pytest.raises(RuleError, match="float16 doesn't reach 1 number"):
        average(sources, tmp_path / "mean.pth", dtype="float16")
    assert not (tmp_path / "mean.pth").exists()
    average(sources, tmp_path / "mean.pth", dtype="float16", allow_overflow=True)
    assert torch.load(tmp_path / "mean.pth", weights_only=True)["w"].isinf().all()


def test_nan_and_infinity_of_one_source_are_those_of_the_mean(tmp_path: Path) -> None:
    average([{"w": torch.tensor([float("nan"), float("inf"), 1])}, {"w": torch.ones(3)}], tmp_path / "mean.pth")
    found = torch.load(tmp_path / "mean.pth", weights_only=True)["w"]

    assert (True, True, 1.0) == (bool(found[0].isnan()), bool(found[1].isinf()), float(found[2]))


@pytest.mark.parametrize("value", [torch.tensor(2.0), torch.ones(0, 3), torch.ones(2) + 1j])
def test_scalars_empty_tensors_and_complex_numbers_have_a_mean(value: Any, tmp_path: Path) -> None:
    average([{"w": value}, {"w": value * 3}], tmp_path / "mean.pth")

    assert torch.equal(value * 2, torch.load(tmp_path / "mean.pth", weights_only=True)["w"])


def test_every_difference_of_structure_is_listed_at_once(tmp_path: Path) -> None:
    last = {f"layers.{at}.w": torch.ones(2) for at in range(4)} | {"head": torch.ones(4)}
    first = {"head": torch.ones(5), "layers.0.w": torch.ones(2).half(), "extra": torch.ones(1)}

    with pytest.raises(KeyMismatch) as caught:
        average([first, last], tmp_path / "mean.pth")
    text = str(caught.value)
    assert tuple([f"layers.{at}.w" for at in (1, 2, 3)]) == caught.value.missing
    assert ("extra",) == caught.value.unexpected
    for part in ("3 missing (layers.{1…3}.w)", "1 unexpected (extra)", "'head' as float32 [5] instead of float32 [4]"):
        assert part in text
    assert "'layers.0.w' as float16 [2] instead of float32 [2]" in text
    assert "\n" not in text


def training_file(value: float) -> dict[str, Any]:
    """A checkpoint with an optimizer beside the weights."""
    module = torch.nn.Linear(2, 2)
    torch.nn.init.constant_(module.weight, value)
    optimizer = torch.optim.Adam(module.parameters())
    module(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    torch.nn.init.constant_(module.weight, value)
    return {"model_state_dict": module.state_dict(), "optimizer_state_dict": optimizer.state_dict(), "epoch": 3}


def test_a_training_checkpoint_needs_the_part_that_is_meant(tmp_path: Path) -> None:
    sources = [training_file(1), training_file(2)]

    with pytest.raises(Unsupported, match=r"state of its optimizer.*Name the weights: at='model_state_dict'"):
        average(sources, tmp_path / "mean.pth")
    average(sources, tmp_path / "mean.pth", at="model_state_dict")
    assert {1.5} == set(torch.load(tmp_path / "mean.pth", weights_only=True)["weight"].flatten().tolist())


W = {"w": torch.ones(2)}
WRONG: dict[str, tuple[Callable[[], tuple[Any, dict[str, Any]]], type[Exception], str]] = {
    "a path": (lambda: ("model.pth", {}), StateDictError, "takes a list of sources: found str"),
    "a mapping": (lambda: (W, {}), StateDictError, "takes a list of sources"),
    "nothing": (lambda: ([], {}), StateDictError, "nothing to average"),
    "both": (lambda: ([W, W], {"weights": [1, 1], "ema": 0.5}), RuleError, "Give one of the two"),
    "too few": (lambda: ([W, W], {"weights": [1]}), RuleError, "expected 2 numbers with a sum above 0, found 1"),
    "none": (lambda: ([W, W], {"weights": [1, -1]}), RuleError, "sum above 0, found 1, -1"),
    "no number": (lambda: ([W, W], {"weights": [1, float("nan")]}), RuleError, "found 1, nan"),
    "infinite": (lambda: ([W, W], {"weights": [1e308, 1e308]}), RuleError, "make no mean|sum above 0"),
    "decay": (lambda: ([W, W], {"ema": 1.0}), RuleError, "expected 0 or more, and below 1, found 1.0"),
    "no part": (lambda: ([W, W], {"at": "model"}), KeyNotFound, "there is no such part"),
    "dtype": (lambda: ([W, W], {"dtype": "int8"}), RuleError, "found 'int8'"),
    "meta": (lambda: ([{"w": torch.ones(2, device="meta")}] * 2, {}), Unsupported, "meta device"),
    "sparse": (lambda: ([{"w": torch.ones(2).to_sparse()}] * 2, {}), Unsupported, "it is sparse_coo"),
    "float8": (lambda: ([{"w": torch.ones(2).to(torch.float8_e5m2)}] * 2, {}), Unsupported, "without their scales"),
    "int8": (
        lambda: ([{"w": torch.ones(2, 2, dtype=torch.int8), "w_scale": torch.ones(2)}] * 2, {}),
        Unsupported,
        "quantised weights .its scale is 'w_scale'.",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_makes_no_mean_is_refused_before_anything_is_written(name: str, tmp_path: Path) -> None:
    make, error, match = WRONG[name]
    sources, options = make()

    with pytest.raises(error, match=match):
        average(sources, tmp_path / "mean.pth", **options)
    assert [] == list(tmp_path.iterdir())


def test_a_target_that_exists_or_is_a_source_is_spared(sources: list[Path], tmp_path: Path) -> None:
    before = sources[0].read_bytes()

    with pytest.raises(TargetExists):
        average(sources, sources[0])
    with pytest.raises(FileError, match="can't take the place of a source"):
        average(sources, sources[0], overwrite=True)
    assert before == sources[0].read_bytes()


def test_checkpoints_that_were_open_stay_open(sources: list[Path], tmp_path: Path) -> None:
    with open_checkpoint(sources[0]) as first:
        average([first, *sources[1:]], tmp_path / "mean.pth")

        assert isinstance(first, Checkpoint)
        assert torch.equal(network(0)["0.weight"], first["0.weight"].torch())


def test_the_command_line_writes_to_o_and_reports_to_stdout(
    sources: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [str(path) for path in sources]
    code = main(["average", *names, "-o", str(tmp_path / "m.safetensors"), "--weights", "1,1,2", "--format", "json"])
    facts = json.loads(capsys.readouterr().out)

    assert_mean([0.25, 0.25, 0.5], safetensors.load_file(tmp_path / "m.safetensors"))
    assert (0, "statedict.conversion/1", False) == (code, facts["schema"], facts["dry_run"])
    assert ", ".join(names) == facts["source"]
    assert "torch-zip, safetensors" == facts["source_format"]


def test_the_command_line_shows_findings_and_writes_nothing_when_asked(
    sources: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "m.pth"
    code = main(["average", *map(str, sources), "-o", str(target), "--ema", "0.9", "--dry-run", "--dtype", "bf16"])
    text = capsys.readouterr().out

    assert 0 == code
    assert not target.exists()
    for word in ("Nothing was written", "update_bn", "Cast to bfloat16"):
        assert word in text


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["a.pth", "b.pth"], "the following arguments are required: -o"),
        (["a.pth", "b.pth", "-o", "m.pth", "--weights", "1,x"], "'1,x' is no list of numbers"),
        (["a.pth", "b.pth", "-o", "m.pth", "--weights", "1,2", "--ema", "0.5"], "not allowed with"),
        (["a.pth", "b.pth", "-o", "m.xyz"], "files ending in '.xyz' can't be written"),
        (["missing.pth", "b.pth", "-o", "m.pth"], "missing.pth: can't be opened"),
    ],
)
def test_wrong_words_end_in_one_line(
    words: list[str],
    said: str,
    sources: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    code = main(["average", *words])
    error = capsys.readouterr().err

    assert (2, 1) == (code, error.count("\n"))
    assert said in error
