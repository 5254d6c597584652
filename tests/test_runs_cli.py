"""``statedict runs``: what it prints, what it changes, and its exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy
import pytest

from statedict.checkpoint import of_memory
from statedict.cli import main
from statedict.cli.progress import ProgressBar
from statedict.runs.pieces import Captured
from statedict.runs.run import RunFolder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run of three steps; the loss is best at the second."""
    with RunFolder(tmp_path / "run") as run:
        for step, loss in ((1, 0.5), (2, 0.1), (3, float("nan"))):
            piece = of_memory({"w": numpy.full(4, float(step))})
            run.write(step, Captured({"model": piece}), metrics={"val_loss": loss})
    return tmp_path / "run"


def steps(folder: Path) -> list[int]:
    with RunFolder(folder) as run:
        return [step.step for step in run.steps()]


def damage(folder: Path, step: int) -> None:
    path = folder / f"step-{step:08d}" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_the_steps_are_listed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert 0 == main(["runs", str(folder)])
    text = capsys.readouterr().out
    assert 0 == main(["runs", str(folder), "list", "--format", "json"])
    found = json.loads(capsys.readouterr().out)

    assert "val_loss" in text and "0.1" in text
    assert [(1, 0.5), (2, 0.1), (3, "nan")] == [(row["step"], row["metrics"]["val_loss"]) for row in found["steps"]]


@pytest.mark.parametrize("form", ["html", "markdown"])
def test_the_list_is_a_page_too(folder: Path, form: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert 0 == main(["runs", str(folder), "--format", form])

    assert "val_loss" in capsys.readouterr().out.replace("\\", "")


def test_damage_is_exit_code_one_and_repaired(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert 0 == main(["runs", str(folder), "verify"])
    damage(folder, 3)
    assert [1, 0] == [main(["runs", str(folder), "verify"]), main(["runs", str(folder), "verify", "2"])]
    assert 1 == main(["runs", str(folder), "repair"])
    capsys.readouterr()

    assert (0, [1, 2]) == (main(["runs", str(folder), "verify"]), steps(folder))
    assert 0 == main(["runs", str(folder)])
    assert "step-00000003.damaged" in capsys.readouterr().out


def test_prune_deletes_what_nothing_names(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keep = ["runs", str(folder), "prune", "--best", "val_loss:1"]
    assert (0, [1, 2, 3]) == (main([*keep, "--dry-run", "--format", "json"]), steps(folder))
    assert [1] == [row["step"] for row in json.loads(capsys.readouterr().out)["steps"]]

    assert (0, [2, 3]) == (main(keep), steps(folder))
    assert (0, [3]) == (main(["runs", str(folder), "prune", "--latest", "1"]), steps(folder))


def test_a_step_is_shown(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert 0 == main(["runs", str(folder), "show", "2"])

    assert "model.w" in capsys.readouterr().out


def test_a_trend_is_shown_and_is_json(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["runs", str(folder), "trend", "--last", "2", "--only", "w*", "--only", "v"]
    assert 0 == main(command)
    text = capsys.readouterr().out
    assert 0 == main([*command, "--format", "json"])
    found = json.loads(capsys.readouterr().out)

    assert "Norm" in text and "val_loss" in text
    assert [(2, 4.0, None), (3, 6.0, 2.0)] == [(row["step"], row["norm"], row["change"]) for row in found["steps"]]


def test_a_trend_with_nan_is_exit_code_one(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with RunFolder(folder) as run:
        run.write(4, Captured({"model": of_memory({"w": numpy.array([1.0, numpy.nan])})}))

    assert 1 == main(["runs", str(folder), "trend"])
    assert "NaN or Inf first at step 4: 'w' (1 NaN)" in capsys.readouterr().out


def test_verify_tells_how_far_it_is(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[int, int]] = []
    monkeypatch.setattr(ProgressBar, "__call__", lambda self, done, total: told.append((done, total)))
    assert 0 == main(["runs", str(folder), "verify"])
    assert 0 == main(["runs", str(folder), "verify", "2"])
    assert 0 == main(["runs", str(folder), "repair"])
    # 32 bytes of tensors in each of three steps, then of one, then of three; all has their headers and values in it too.
    done, totals = [each for each, _ in told], {total for _, total in told}

    assert [32, 64, 96, 32, 32, 64, 96] == done
    assert 2 == len(totals) and max(totals) == 3 * min(totals)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["show"], "which step"), (["show", "9"], "no step 9"), (["prune"], "which steps stay"),
        (["prune", "--best", "figure"], "which way"), (["show", "-3"], ""), (["verify", "9"], "no step 9"),
        (["trend", "--only", "x"], "There is: w"), (["trend", "--component", "ema"], "There is: model"),
        (["trend", "--last", "0"], "at least 1"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_exit_code_two(
    folder: Path, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert 2 == main(["runs", str(folder), *arguments])

    assert said in capsys.readouterr().err


def test_a_folder_that_is_not_there_is_not_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (2, False) == (main(["runs", str(tmp_path / "none")]), (tmp_path / "none").exists())
    assert "No such file" in capsys.readouterr().err
