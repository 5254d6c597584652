"""``diagnose``: which weights are meant, what is said, what is written, and the cases that aligning is judged by."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import statedict

Arrays = dict[str, np.ndarray[Any, Any]]


def network(seed: int = 0, *, classes: int = 10, prefix: str = "") -> Arrays:
    """A small network with values of its own."""
    rng = np.random.default_rng(seed)
    shapes = {
        "conv1.weight": (8, 3, 3, 3),
        "bn1.weight": (8,),
        "bn1.bias": (8,),
        "bn1.running_mean": (8,),
        "bn1.running_var": (8,),
        "layer1.0.weight": (8, 8, 3, 3),
        "layer1.1.weight": (16, 8, 3, 3),
        "fc.weight": (classes, 16),
        "fc.bias": (classes,),
    }
    return {prefix + key: rng.standard_normal(shape).astype(np.float32) for key, shape in shapes.items()}


def written(folder: Path, name: str, arrays: Arrays) -> Path:
    save_file(arrays, folder / name)
    return folder / name


def codes(found: statedict.Diagnosis) -> dict[str, str]:
    return {finding.code: finding.level for finding in found.findings}


# -------------------------------------------------------------------- what is said


def test_the_same_names_need_nothing() -> None:
    found = statedict.diagnose(network(), network(1))

    assert bool(found)
    assert (
        "All 9 names and shapes of the target are in the source as they are: nothing has to change." == found.sentence
    )
    assert [] == list(found.rules)


def test_a_prefix_is_said_with_what_puts_it_there() -> None:
    found = statedict.diagnose(network(prefix="module."), network(1))

    assert not found
    assert "strip_prefix('module.')" == str(found.rules)
    assert (
        "All 9 names in the source begin with 'module.': it was saved from a model in DataParallel or "
        "DistributedDataParallel. Without that difference 9 of 9 names and shapes match; nothing else changes."
    ) == found.sentence


def test_a_wrapped_target_is_said_too() -> None:
    found = statedict.diagnose(network(), network(1, prefix="_orig_mod."))

    assert "add_prefix('_orig_mod.')" == str(found.rules)
    assert found.sentence.startswith("All names of the target begin with '_orig_mod.', and those of the source don't.")


def test_a_head_of_another_size_is_named_and_left_out(tmp_path: Path) -> None:
    found = statedict.diagnose(network(classes=10), network(1, classes=5))

    assert found.sentence.endswith(
        "; 2 have another size ('fc.weight': [10, 16] in the source, [5, 16] in the target)."
    )
    assert {"fc.weight", "fc.bias"} == {left.key for left in found.unfilled}
    assert "warning" == codes(found)["another-size"]
    with pytest.raises(statedict.KeyMismatch, match="2 tensors of the target would be missing") as caught:
        found.fix(tmp_path / "fixed.safetensors")
    assert ("fc.weight", "fc.bias") == caught.value.missing
    assert not (tmp_path / "fixed.safetensors").exists()

    found.fix(tmp_path / "fixed.safetensors", allow_partial=True)
    with statedict.open(tmp_path / "fixed.safetensors") as made:
        assert 7 == len(made)


def test_another_network_is_refused_in_one_sentence(tmp_path: Path) -> None:
    other = {f"features.{at}.{leaf}": np.ones((7, 5), np.float32) for at in range(6) for leaf in ("a", "b")}
    found = statedict.diagnose(network(), other)

    assert found.refusal == found.sentence
    assert "error" == codes(found)["different-networks"]
    assert ([], {"refusal", "plan"}) == (list(found.plan), {"refusal", "plan"} & set(found.to_dict()))
    with pytest.raises(statedict.KeyMismatch, match="there is nothing to write"):
        found.fix(tmp_path / "x.safetensors")


def test_the_first_lines_are_at_most_five(tmp_path: Path) -> None:
    source = written(tmp_path, "a.safetensors", network(prefix="model."))
    target = written(tmp_path, "b.safetensors", network(1))
    found = statedict.diagnose(source, target)
    first = found.document().blocks[0]

    assert len(first) <= 5
    assert "`statedict doctor" in str(found)
    assert "strip_prefix('model.')" in found.to_markdown()


def test_the_dictionary_is_that_of_the_contract() -> None:
    made = statedict.diagnose(network(prefix="module."), network(1)).to_dict()

    assert "statedict.diagnosis/1" == made["schema"]
    assert {"target", "op", "sources", "args", "tier", "reasons"} == set(made["plan"][0])  # type: ignore[index]
    assert [{"rule": "strip_prefix", "prefix": "module."}] == made["rules"]
    assert {"keys": 1.0, "parameters": 1.0, "bytes": 1.0} == made["coverage"]
    assert made == json.loads(json.dumps(made))


# -------------------------------------------------------------------- which weights are meant


def test_the_weights_of_a_training_checkpoint_are_found_and_fixed(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    optimizer = torch.optim.Adam(net.parameters())
    net(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    weights = {f"module.{key}": value for key, value in net.state_dict().items()}
    torch.save({"epoch": 3, "model_state_dict": weights, "optimizer": optimizer.state_dict()}, tmp_path / "run.pth")
    other = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2)).state_dict()
    found = statedict.diagnose(tmp_path / "run.pth", other)

    assert "select('model_state_dict'), strip_prefix('module.')" == str(found.rules)
    assert "model_state_dict.module.0.weight" == found.plan[0].sources[0]
    found.fix(tmp_path / "fixed.pth")
    made = torch.load(tmp_path / "fixed.pth", weights_only=True)

    assert list(other) == list(made)
    assert all(torch.equal(made[key], value) for key, value in net.state_dict().items())


def test_weights_and_their_average_are_a_question() -> None:
    source = {"model": network(), "ema": network(1)}
    found = statedict.diagnose(source, network(2))

    assert "Which weights are meant" in found.question
    assert {"ambiguous"} == {each.tier for each in found.plan}
    assert [] == list(found.rules)


def test_values_answer_which_weights_are_meant() -> None:
    source = {"model": network(), "ema": network(1)}
    found = statedict.diagnose(source, network(1))

    assert "" == found.question
    assert "drop('model.*'), strip_prefix('ema.')" == str(found.rules)


def test_what_stands_beside_the_weights_is_dropped(tmp_path: Path) -> None:
    found = statedict.diagnose({**network(), "extra.ops": np.ones(2, np.float32), "epoch": 3}, network(1))
    found.fix(tmp_path / "fixed.safetensors")

    with statedict.open(tmp_path / "fixed.safetensors") as made:
        assert (set(network()), {}) == (set(made), made.objects)


def test_the_fix_reads_what_was_a_file_again(tmp_path: Path) -> None:
    source = written(tmp_path, "a.safetensors", network(prefix="net."))
    found = statedict.diagnose(source, written(tmp_path, "b.safetensors", network()))
    found.fix(tmp_path / "c.safetensors")

    assert statedict.compare(tmp_path / "c.safetensors", tmp_path / "b.safetensors")
    with pytest.raises(statedict.TargetExists):
        found.fix(tmp_path / "c.safetensors")


def test_the_inputs_stay_open_and_as_they_were(tmp_path: Path) -> None:
    path = written(tmp_path, "a.safetensors", network(prefix="net."))
    before = path.read_bytes()
    with statedict.open(path) as source:
        statedict.diagnose(source, network(1))

        assert 8 == source["net.bn1.bias"].numel
    assert before == path.read_bytes()


# -------------------------------------------------------------------- doors


def test_one_checkpoint_alone_is_examined() -> None:
    found = statedict.diagnose(network())

    assert (None, (), ()) == (found.target, found.plan, tuple(found.rules))
    assert "statedict.diagnosis/1" == found.to_dict()["schema"]
    assert found.sentence in str(found).replace("\n", " ") or found.sentence


def test_a_source_that_is_no_checkpoint_is_a_finding(tmp_path: Path) -> None:
    pointer = tmp_path / "model.safetensors"
    pointer.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 391000000\n")
    found = statedict.diagnose(pointer, network())

    assert not found
    assert ("error", ()) == (found.findings[0].level, found.plan)
    with pytest.raises(statedict.KeyMismatch):
        found.fix(tmp_path / "x.safetensors")


def test_what_isnt_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(statedict.FileError):
        statedict.diagnose(tmp_path / "a.pth", network())
    with pytest.raises(statedict.FileError):
        statedict.diagnose(network(), tmp_path / "a.pth")
    with pytest.raises(statedict.Unsupported, match="probe"):
        statedict.diagnose(network(), network(), probe=object())


def test_empty_and_odd_tensors_are_no_trouble() -> None:
    odd: Arrays = {
        "empty": np.empty((0, 4), np.float32),
        "scalar": np.array(3, np.int64),
        "one": np.ones((1, 1), np.float32),
        "flags": np.array([True, False, True]),
        "wide": np.arange(6, dtype=np.complex128).reshape(2, 3),
    }
    found = statedict.diagnose({f"a.{key}": array for key, array in odd.items()}, odd)

    assert {"one", "scalar", "empty", "flags", "wide"} == {each.target for each in found.plan}
    assert "wide" in {each.target for each in found.plan if each.tier == "proven"}


# -------------------------------------------------------------------- the cases that aligning is judged by


@pytest.fixture(scope="module")
def scoring(request: pytest.FixtureRequest) -> ModuleType:
    """``score.py`` beside the cases."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data" / "pairs"
    if not folder.is_dir():
        pytest.skip(f"{folder} does not exist")
    spec = importlib.util.spec_from_file_location("score", folder / "score.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "name",
    [
        "control.resnet18-resnet50",
        "control.vit32-vit48-same-names",
        "hf.gte.GteForMaskedLM.disk-memory",
        "hf.vit.ViTForImageClassification.memory-disk",
        "noise.resnet18.ema-twin",
        "noise.resnet18.head",
        "noise.resnet18.nested",
        "p1-resnet18.torchvision-hf.sorted",
        "p3-vit.timm-hf.registered",
        "p7-gpt2.conv1d-linear.registered",
    ],
)
def test_a_pair_of_libraries_is_aligned_without_an_error(shared: Path, scoring: ModuleType, name: str) -> None:
    """Through files, as the scorer does it. How many keys are found is measured where names are aligned."""
    case = json.loads((shared / "data" / "pairs" / f"{name}.json").read_text(encoding="utf-8"))
    count, wrong = scoring.score(case, scoring.project(case, 0))

    assert [] == [note for note in wrong if not note.startswith("guess")]
    assert 0 == count["wrong"]
    assert count["right"] >= 0.75 * count["keys"]
    assert case["expect"] != "refuse" or count["refused"]
