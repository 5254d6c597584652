"""``statedict doctor`` on the command line: exit codes, formats, and lines that a hostile file can't forge."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from statedict.cli import main


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Healthy, sick and foreign files in the current folder."""
    generator = np.random.default_rng(1)
    state = {f"layers.{n}.w": generator.normal(0.3, 1.0, (4, 3)).astype("float32") for n in range(3)}
    save_file(state, tmp_path / "good.safetensors")
    save_file({**state, "layers.1.w": np.full((4, 3), np.nan, "float32")}, tmp_path / "nan.safetensors")
    save_file({f"module.{name}": values for name, values in state.items()}, tmp_path / "wrapped.safetensors")
    save_file({**state, "x\x1b[31m\u202e\n": np.full((4, 3), np.inf, "float32")}, tmp_path / "hostile.safetensors")
    (tmp_path / "pointer.pth").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5000000\n")
    (tmp_path / "page.pth").write_text("<!DOCTYPE html><html><head><title>401</title></head></html>")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["good.safetensors"], 0),
        (["nan.safetensors"], 1),
        (["nan.safetensors", "--quick"], 0),
        (["nan.safetensors", "--at", "layers.0"], 0),
        (["wrapped.safetensors", "--quick"], 1),
        (["pointer.pth"], 1),
        (["page.pth"], 1),
        (["nothing.pth"], 2),
        (["good.safetensors", "--at", "nothing"], 2),
        (["good.safetensors", "--limit", "header_bytes=10"], 2),
        ([], 2),
    ],
)
def test_exit_codes(folder: Path, arguments: list[str], code: int) -> None:
    assert code == main(["doctor", *arguments])


def test_the_text_begins_with_at_most_five_lines(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["doctor", "nan.safetensors"])
    title, blank, *lines = capsys.readouterr().out.splitlines()

    assert ("nan.safetensors", "") == (title, blank)
    assert lines[0].startswith("  Verdict  NaN or Inf in 1 tensor: 'layers.1.w' (every value).")
    assert lines.index("") <= 5


def test_json_is_a_diagnosis_without_a_target(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["doctor", "wrapped.safetensors", "--format", "json"])
    made = json.loads(capsys.readouterr().out)
    (finding,) = [each for each in made["findings"] if each["code"] == "data-parallel"]

    assert ("statedict.diagnosis/1", [], []) == (made["schema"], made["plan"], made["rules"])
    assert {"code", "level", "message", "keys"} == set(finding)
    assert ["DataParallel"] == made["facts"]["saved_from"]


def test_a_file_that_cannot_be_opened_is_json_too(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["doctor", "pointer.pth", "--format", "json"])
    made = json.loads(capsys.readouterr().out)

    assert ["pointer-file"] == [each["code"] for each in made["findings"]]
    assert made["facts"]["readable"] is False


@pytest.mark.parametrize("format", ["text", "html", "markdown"])
def test_keys_of_a_hostile_file_are_escaped(format: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["doctor", "hostile.safetensors", "--format", format])
    out = capsys.readouterr().out

    assert "\x1b[31m" not in out
    assert "\u202e" not in out


def test_a_report_goes_to_a_file(folder: Path) -> None:
    main(["doctor", "nan.safetensors", "-o", "report.html", "--format", "html"])

    assert "non-finite" in (folder / "report.html").read_text(encoding="utf-8")


def test_the_command_to_type_quotes_the_name(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "wrapped.safetensors").rename(folder / "two words.safetensors")
    main(["doctor", "two words.safetensors"])

    assert "convert 'two words.safetensors' weights.safetensors" in " ".join(capsys.readouterr().out.split())


def test_a_fix_without_a_target_writes_the_weights_without_wrappers(folder: Path) -> None:
    code = main(["doctor", "wrapped.safetensors", "--fix", "plain.safetensors"])

    assert 1 == code
    assert {"layers.0.w", "layers.1.w", "layers.2.w"} == set(load_file("plain.safetensors"))


def test_a_fix_with_a_target_writes_its_names(folder: Path) -> None:
    code = main(["doctor", "wrapped.safetensors", "--for", "good.safetensors", "--fix", "fixed.safetensors"])
    good, fixed = load_file("good.safetensors"), load_file("fixed.safetensors")

    assert 1 == code
    assert {name: values.tobytes() for name, values in good.items()} == {
        name: values.tobytes() for name, values in fixed.items()
    }


def test_a_file_that_fits_has_exit_code_0(folder: Path) -> None:
    assert 0 == main(["doctor", "good.safetensors", "--for", "good.safetensors"])


@pytest.mark.parametrize(
    "arguments",
    [
        ["nan.safetensors", "--fix", "out.safetensors"],
        ["pointer.pth", "--fix", "out.safetensors"],
        ["good.safetensors", "--fix", "nan.safetensors"],
        ["good.safetensors", "--fix", "good.safetensors", "--overwrite"],
        ["wrapped.safetensors", "--for", "good.safetensors", "--fix", "good.safetensors", "--overwrite"],
        ["wrapped.safetensors", "--for", "package.module:factory"],
        ["wrapped.safetensors", "--for", "nothing.safetensors"],
    ],
)
def test_what_cannot_be_repaired_or_compared_is_refused_and_nothing_is_written(
    arguments: list[str], folder: Path
) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    assert 2 == main(["doctor", *arguments])
    assert before == {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_damaged_source_is_said_before_it_is_compared(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert 1 == main(["doctor", "pointer.pth", "--for", "good.safetensors"])
    assert "git lfs pull" in capsys.readouterr().out
