"""``statedict compare`` on the command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from statedict.cli import main


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Files to compare, in the current folder: ``b`` is ``a`` with a changed head, ``c`` is ``a`` under other names."""
    generator = np.random.default_rng(1)
    a = {f"layers.{n}.w": generator.standard_normal((4, 3)).astype("float32") for n in range(3)}
    a["head.w"] = generator.standard_normal((2, 3)).astype("float32")
    save_file(a, tmp_path / "a.safetensors")
    save_file(a, tmp_path / "same.safetensors")
    save_file({**a, "head.w": a["head.w"] * np.float32(1.001)}, tmp_path / "b.safetensors")
    renamed = {f"blocks.{n}.w": np.ascontiguousarray(a[f"layers.{n}.w"].T) for n in range(3)}
    save_file({**renamed, "head.w": a["head.w"]}, tmp_path / "c.safetensors")
    save_file({f"model.{key}": x for key, x in a.items()}, tmp_path / "nested.safetensors")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["a.safetensors", "same.safetensors"], 0),
        (["a.safetensors", "b.safetensors"], 1),
        (["a.safetensors", "b.safetensors", "--rtol", "0.01"], 0),
        (["a.safetensors", "b.safetensors", "--atol", "0.1"], 0),
        (["a.safetensors", "b.safetensors", "--ulp", "100000"], 0),
        (["a.safetensors", "b.safetensors", "--ulp", "10"], 1),
        (["a.safetensors", "b.safetensors", "--close"], 1),
        (["a.safetensors", "b.safetensors", "--ignore", "head.*"], 0),
        (["a.safetensors", "c.safetensors"], 1),
        (["a.safetensors", "nested.safetensors#model"], 0),
        (["a.safetensors", "missing.safetensors"], 2),
        (["a.safetensors", "b.safetensors", "--rtol", "-1"], 2),
        (["a.safetensors", "b.safetensors", "--ulp", "x"], 2),
    ],
)
def test_exit_codes(folder: Path, arguments: list[str], code: int) -> None:
    assert code == main(["compare", *arguments])


def test_nan_can_differ(folder: Path) -> None:
    save_file({"x": np.float32([np.nan])}, "n.safetensors")

    assert (0, 1) == (
        main(["compare", "n.safetensors", "n.safetensors"]),
        main(["compare", "n.safetensors", "n.safetensors", "--nan-differs"]),
    )


def test_json_is_the_result(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["compare", "a.safetensors", "b.safetensors", "--format", "json"])
    made = json.loads(capsys.readouterr().out)

    assert ("statedict.comparison/1", False) == (made["schema"], made["equal"])
    assert [("head.w", "value", 6)] == [(each["key"], each["kind"], each["mismatched"]) for each in made["changed"]]


@pytest.mark.parametrize("kind", ["text", "html", "markdown"])
def test_every_format_begins_with_the_sentence(folder: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    main(["compare", "a.safetensors", "b.safetensors", "--format", kind])
    text = " ".join(capsys.readouterr().out.split())

    assert "1 of 4 tensors changed: head.w; the rest byte-identical." in text


@pytest.mark.parametrize("name", ["rules.toml", "rules.json"])
def test_exported_rules_make_both_equal(folder: Path, name: str) -> None:
    assert 1 == main(["compare", "a.safetensors", "c.safetensors", "--export-rules", name])
    assert 0 == main(["compare", "a.safetensors", "c.safetensors", "--rules", name])
    assert 2 == main(["compare", "a.safetensors", "c.safetensors", "--export-rules", name])


@pytest.mark.parametrize("option", ["-o", "--export-rules"])
@pytest.mark.parametrize("name", ["a.safetensors", "c.safetensors"])
def test_a_file_that_is_compared_is_never_overwritten(folder: Path, option: str, name: str) -> None:
    before = (folder / name).read_bytes()

    assert 2 == main(["compare", "a.safetensors", "c.safetensors", option, name, "--overwrite"])
    assert before == (folder / name).read_bytes()


def test_comparing_equal_files_imports_neither_torch_nor_numpy(folder: Path) -> None:
    command = [sys.executable, "-X", "importtime", "-m", "statedict", "compare", "a.safetensors", "same.safetensors"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    imported = {line.rpartition("|")[2].strip() for line in run.stderr.splitlines()}

    assert 0 == run.returncode
    assert set() == {"torch", "numpy", "rich", "xxhash"} & imported


def test_git_shows_what_changed_in_a_checkpoint(folder: Path) -> None:
    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "core.autocrlf=false"]
        environment = {**os.environ, "GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"}
        command = ["git", *identity, *arguments]
        run = subprocess.run(command, capture_output=True, text=True, timeout=100, check=True, env=environment)
        return run.stdout

    try:
        git("init", "-q", ".")
    except FileNotFoundError:
        pytest.skip("git is not installed")
    (folder / ".gitattributes").write_text("*.safetensors diff=statedict\n", encoding="utf-8")
    git(
        "config", "diff.statedict.textconv", f"'{sys.executable}' -m statedict inspect --flat --stats --format markdown"
    )
    git("add", ".gitattributes", "a.safetensors")
    git("commit", "-q", "-m", "one")
    (folder / "a.safetensors").write_bytes((folder / "b.safetensors").read_bytes())
    changed = [line for line in git("diff").splitlines() if line.startswith(("-", "+"))]

    assert ["-|", "+|"] == [line.split()[0] for line in changed if "`head.w`" in line]
    assert not any("layers" in line for line in changed)
