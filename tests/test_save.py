"""``save`` against ``torch.load`` and the safetensors library: what was given comes back, or the old file is as it was."""

from __future__ import annotations

import errno
import io
import os
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings

import statedict
from statedict import FileError, StateDictError, UnsafeContent, Unsupported
from statedict.views import is_dense

torch = pytest.importorskip("torch")
saved_trees = pytest.importorskip("saved_trees")
saved_values = pytest.importorskip("saved_values")
ENDS = ("pth", "safetensors")
# torch says of complex32 that it is experimental, and of CSR tensors that they are in beta.
pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support", "ignore:Sparse CSR")


def without_strides(value: Any) -> Any:
    """The facts of a tree, without the strides of its tensors: gaps of views are not kept."""
    if type(value) is tuple and value[:1] == ("tensor",):
        return value[:3] + value[4:]
    if type(value) in (tuple, list):
        return type(value)(without_strides(item) for item in value)
    return value


def dense(tensor: Any) -> bool:
    return bool(tensor.layout == torch.strided and is_dense(tensor.shape, tensor.stride()))


def strides(value: Any) -> dict[object, object]:
    """The strides of all tensors without gaps, by place."""
    return {
        path: leaf.stride()
        for path, leaf in saved_trees.walk(value)
        if isinstance(leaf, torch.Tensor) and dense(leaf) and leaf.numel() > 1
    }


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_an_empty_view_does_not_part_those_that_overlap(suffix: str, tmp_path: Path) -> None:
    whole = torch.arange(48.0)
    path = tmp_path / f"a{suffix}"
    statedict.save([whole, whole[8:8], whole[8:16]], path)
    found = statedict.load(path)

    assert found[0].untyped_storage().data_ptr() == found[2].untyped_storage().data_ptr()
    assert (8, 0) == (found[2].storage_offset(), found[1].numel())


@settings(max_examples=150)
@given(saved_trees.trees())
def test_torch_loads_what_was_saved(tmp_path_factory: pytest.TempPathFactory, value: Any) -> None:
    path = tmp_path_factory.mktemp("save") / "tree.pth"
    statedict.save(value, path, durable=False)
    found = torch.load(path, weights_only=True)

    assert without_strides(saved_values.facts(value)) == without_strides(saved_values.facts(found))
    assert strides(value).items() <= strides(found).items()
    assert saved_trees.memory_overlaps(value) == saved_trees.memory_overlaps(found)


@settings(max_examples=150)
@given(saved_trees.trees())
def test_a_safetensors_file_gives_back_the_whole_tree(tmp_path_factory: pytest.TempPathFactory, value: Any) -> None:
    path = tmp_path_factory.mktemp("save") / "tree.safetensors"
    statedict.save(value, path, durable=False)
    found = statedict.load(path)

    assert without_strides(saved_values.facts(value)) == without_strides(saved_values.facts(found))
    assert strides(value).items() <= strides(found).items()
    assert saved_trees.memory_overlaps(value) == saved_trees.memory_overlaps(found)


@pytest.mark.parametrize("end", ENDS)
def test_a_module_stands_for_its_state_dict(end: str, tmp_path: Path) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    statedict.save(module, tmp_path / f"m.{end}")
    found = statedict.load(tmp_path / f"m.{end}")

    assert isinstance(found, OrderedDict) and module.state_dict()._metadata == found._metadata
    assert saved_values.facts(module.state_dict()) == saved_values.facts(found)


@pytest.mark.parametrize("end", ENDS)
def test_an_optimizer_is_saved_with_the_names_of_its_parameters(end: str, tmp_path: Path) -> None:
    module = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(module.parameters())
    module(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    statedict.save({"model": module, "nested": [optimizer]}, tmp_path / f"run.{end}")
    saved = statedict.load(tmp_path / f"run.{end}")["nested"][0]

    assert ["weight", "bias"] == saved["param_groups"][0]["param_names"]
    torch.optim.AdamW(module.parameters()).load_state_dict(saved)
    assert torch.equal(optimizer.state_dict()["state"][0]["exp_avg"], saved["state"][0]["exp_avg"])


def test_what_was_given_is_not_modified(tmp_path: Path) -> None:
    module = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    state = module.state_dict()
    before = (list(state), dict(state._metadata), optimizer.state_dict())
    given: dict[str, Any] = {"state": state, "optimizer": optimizer, "model": module}
    statedict.save(given, tmp_path / "x.pth")

    assert before == (list(state), dict(state._metadata), optimizer.state_dict())
    assert given["optimizer"] is optimizer and given["model"] is module


class Custom:
    """A class that nobody but this test has."""


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("f", {"f": lambda: 0}),
        ("deep.1.lock", {"deep": [0, {"lock": threading.Lock()}]}),
        ("config", {"config": Custom()}),
        ("loss", {"loss": torch.nn.functional.mse_loss}),
    ],
)
def test_an_object_that_only_its_code_could_bring_back_is_named(
    end: str, key: str, value: dict[str, Any], tmp_path: Path
) -> None:
    path = tmp_path / f"run.{end}"
    statedict.save({"w": torch.ones(2)}, path)
    before = path.read_bytes()
    with pytest.raises(UnsafeContent) as caught:
        statedict.save({"w": torch.zeros(2), **value}, path)

    assert key == caught.value.key and f"'{key}'" in str(caught.value)
    assert (before, [path.name]) == (path.read_bytes(), os.listdir(tmp_path))


@pytest.mark.parametrize("end", ENDS)
def test_a_full_disk_leaves_the_old_file(end: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / f"run.{end}"
    statedict.save({"w": torch.ones(2)}, path)
    before = path.read_bytes()

    def full(*args: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwritev", full)
    with pytest.raises(FileError) as caught:
        statedict.save({"w": torch.zeros(2)}, path)

    assert (errno.ENOSPC, str(path)) == (caught.value.errno, caught.value.path)
    assert (before, [path.name]) == (path.read_bytes(), os.listdir(tmp_path))


def test_an_interrupted_save_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "run.pth"
    statedict.save({"w": torch.ones(2)}, path)
    before = path.read_bytes()

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        statedict.save({"w": torch.zeros(2 << 20)}, path, on_progress=interrupt)

    assert (before, [path.name]) == (path.read_bytes(), os.listdir(tmp_path))


@pytest.mark.parametrize("end", ENDS)
def test_the_same_value_gives_the_same_bytes(end: str, tmp_path: Path) -> None:
    value = {"a": torch.arange(9.0).view(3, 3).t(), "n": [1, {"b": torch.ones(2, dtype=torch.bfloat16)}], 3: None}
    statedict.save(value, tmp_path / f"one.{end}")
    statedict.save(value, tmp_path / f"two.{end}")

    assert (tmp_path / f"one.{end}").read_bytes() == (tmp_path / f"two.{end}").read_bytes()


@pytest.mark.parametrize("end", ENDS)
def test_each_tensor_has_its_digest(end: str, tmp_path: Path) -> None:
    from xxhash import xxh3_128

    weight = torch.arange(6.0)
    statedict.save({"w": weight}, tmp_path / f"x.{end}")
    statedict.save({"w": weight}, tmp_path / f"y.{end}", digests=False)
    expected = f"xxh3-128:{xxh3_128(weight.numpy().tobytes()).hexdigest()}"
    with statedict.open(tmp_path / f"x.{end}") as one, statedict.open(tmp_path / f"y.{end}") as two:
        found = [ckpt["w"].entry.view.storage.digest for ckpt in (one, two)]

    assert [expected, None] == found


@pytest.mark.parametrize("end", ENDS)
def test_odd_keys_never_make_a_broken_file(end: str, tmp_path: Path) -> None:
    nan = float("nan")
    value = {
        "__metadata__": torch.ones(2),
        nan: torch.zeros(1),
        7: 1,
        ("a", 1): torch.ones(1),
        "": 2,
        None: 3,
        "a.b": 4,
    }
    statedict.save(value, tmp_path / f"x.{end}")
    found = statedict.load(tmp_path / f"x.{end}")

    assert [str(key) for key in value] == [str(key) for key in found]
    assert torch.equal(value["__metadata__"], found["__metadata__"])


def test_a_tensor_called_metadata_is_no_trap_for_the_safetensors_library(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    statedict.save({"__metadata__": torch.ones(2), "w": torch.zeros(3)}, tmp_path / "x.safetensors")
    found = load_file(tmp_path / "x.safetensors")

    assert 2 == len(found) and torch.equal(torch.zeros(3), found["w"])


@pytest.mark.parametrize("end", ENDS)
def test_an_open_file_is_written_in_order(end: str, tmp_path: Path) -> None:
    value = {"w": torch.arange(5.0), "epoch": 3}
    stream = io.BytesIO()
    report = statedict.save(value, stream, format="safetensors" if end == "safetensors" else None)
    with open(tmp_path / f"x.{end}", "wb") as file:
        statedict.save(value, file)
    statedict.save(value, tmp_path / f"y.{end}")

    assert (False, False) == (report.atomic, report.durable)
    assert stream.getvalue() == (tmp_path / f"x.{end}").read_bytes() == (tmp_path / f"y.{end}").read_bytes()


def test_a_report_says_what_was_written_and_how(tmp_path: Path) -> None:
    base = torch.arange(1000.0)
    report = statedict.save({"view": base[:10], "epoch": 1}, tmp_path / "x.pth", metadata={"run": "7"})
    hasty = statedict.save({"w": base}, tmp_path / "y.pth", durable=False, digests=False)

    assert ("torch-zip", 1, 1, True, True, True) == (
        report.format, report.tensors, report.objects, report.atomic, report.durable, report.digests
    )  # fmt: skip
    assert (3960, (tmp_path / "x.pth").stat().st_size) == (report.removed_nbytes, report.nbytes)
    assert (False, True, False) == (hasty.durable, hasty.atomic, hasty.digests)
    assert "statedict.save-report/1" == report.to_dict()["schema"] and "outlives" not in str(report)
    with statedict.open(tmp_path / "x.pth") as checkpoint:
        assert {"run": "7"} == dict(checkpoint.metadata)


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda path: statedict.save({}, path / "x.xyz"), Unsupported),
        (lambda path: statedict.save({}, path / "x.pth", format="gguf"), Unsupported),
        (lambda path: statedict.save({}, path / "no" / "x.pth"), FileError),
        (lambda path: statedict.save({}, path / "x.pth", metadata={"a": 1}), StateDictError),
        (lambda path: statedict.save({}, io.StringIO()), StateDictError),
    ],
)
def test_what_can_not_be_saved_so_is_refused_before_anything_is_written(call: Any, error: Any, tmp_path: Path) -> None:
    with pytest.raises(error):
        call(tmp_path)

    assert [] == os.listdir(tmp_path)


def test_a_value_that_contains_itself_is_refused(tmp_path: Path) -> None:
    value: dict[str, Any] = {"w": torch.ones(1)}
    value["again"] = value
    with pytest.raises(StateDictError, match="contains itself"):
        statedict.save(value, tmp_path / "x.pth")


def test_one_tensor_and_a_list_are_values_too(tmp_path: Path) -> None:
    statedict.save(torch.arange(3), tmp_path / "t.pth")
    statedict.save([torch.arange(3), 1], tmp_path / "l.safetensors")

    assert torch.equal(torch.arange(3), torch.load(tmp_path / "t.pth"))
    assert [0, 1, 2] == statedict.load(tmp_path / "l.safetensors")[0].tolist()
