"""Files that others have published, compared with ``torch.load`` value by value."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import statedict
from statedict.cli import main

SUFFIXES = (".pth", ".pt", ".th", ".bin")


def files(shared: Path) -> list[Path]:
    """The checkpoints among the real files."""
    found = [path for path in sorted((shared / "data" / "real").iterdir()) if path.suffix in SUFFIXES]

    assert len(found) >= 12
    return found


def on_cpu(found: Any) -> Any:
    """The facts with every tensor on the CPU: torch can't load a tensor of a GPU as one without having it."""
    if isinstance(found, tuple) and len(found) == 7 and found[0] == "tensor":
        return (*found[:4], "cpu", *found[5:])
    return type(found)(on_cpu(part) for part in found) if type(found) in (tuple, list) else found


def test_every_value_of_every_file_equals_torch_load(shared: Path) -> None:
    torch = pytest.importorskip("torch")
    from saved_values import facts, found_facts, found_sharing, sharing

    for path in files(shared):
        expected = torch.load(path, map_location="cpu", weights_only=True)
        with statedict.open(path) as checkpoint:
            tree = checkpoint[()] if isinstance(expected, torch.Tensor) else checkpoint.tree()

            assert facts(expected) == on_cpu(found_facts(tree)), path.name
            assert sharing(expected) == found_sharing(tree), path.name


def test_every_file_is_shown_and_counted_on_the_command_line(shared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in files(shared):
        code = main(["inspect", str(path), "--stats", "--format", "json"])
        found = json.loads(capsys.readouterr().out)

        assert (0, "statedict.inspection/1") == (code, found["schema"])
        assert found["totals"]["tensors"] == len(found["tensors"]) > 0
        assert all(tensor["stats"]["nan"] == 0 for tensor in found["tensors"])
        assert not [finding for finding in found["findings"] if finding["level"] == "error"]


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_every_file_can_be_written_again(suffix: str, shared: Path, tmp_path: Path) -> None:
    for path in files(shared):
        target = tmp_path / f"{path.stem}{suffix}"
        statedict.convert(path, target, overwrite=True)
        with statedict.open(path) as before, statedict.open(target) as after:
            assert {key: before[key].read().tobytes() for key in before} == {
                key: after[key].read().tobytes() for key in after
            }
            assert before.objects == after.objects, path.name
