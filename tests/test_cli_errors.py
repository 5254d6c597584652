"""Every class of error on the command line: one line on stderr, the exit code of the class, nothing on stdout."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import statedict
from statedict import errors
from statedict.cli import main

FAMILY = [getattr(errors, name) for name in errors.__all__ if isinstance(getattr(errors, name), type)]


class Custom:
    """Stands for a class that no reader builds."""

    def __init__(self) -> None:
        self.weight = np.ones(3)


def unknown(folder: Path) -> list[str]:
    (folder / "a.txt").write_text("just a note\n")
    return ["inspect", "a.txt"]


def corrupt(folder: Path) -> list[str]:
    save_file({"x": np.ones(100)}, folder / "a.safetensors")
    os.truncate(folder / "a.safetensors", 300)
    return ["inspect", "a.safetensors"]


def unsupported(folder: Path) -> list[str]:
    save_file({"x": np.ones(100)}, folder / "a.safetensors")
    return ["convert", "a.safetensors", "a.onnx"]


def too_large(folder: Path) -> list[str]:
    save_file({"x": np.ones(1), "y": np.ones(1)}, folder / "a.safetensors")
    return ["inspect", "a.safetensors", "--limit", "nodes=1"]


def unsafe(folder: Path) -> list[str]:
    (folder / "a.pkl").write_bytes(pickle.dumps({"model": Custom()}))
    return ["convert", "a.pkl", "a.pth"]


def no_key(folder: Path) -> list[str]:
    save_file({"x": np.ones(1)}, folder / "a.safetensors")
    return ["inspect", "a.safetensors", "--at", "model"]


def no_file(folder: Path) -> list[str]:
    return ["inspect", "missing.pth"]


def existing(folder: Path) -> list[str]:
    save_file({"x": np.ones(1)}, folder / "a.safetensors")
    (folder / "b.pth").write_bytes(b"precious")
    return ["convert", "a.safetensors", "b.pth"]


MET: list[tuple[type[errors.StateDictError], Callable[[Path], list[str]], str]] = [
    (errors.UnknownFormat, unknown, "a.txt"),
    (errors.CorruptFile, corrupt, "expected"),
    (errors.Unsupported, unsupported, ".safetensors, .pth"),
    (errors.LimitExceeded, too_large, "--limit nodes=N"),
    (errors.UnsafeContent, unsafe, "Custom"),
    (errors.KeyNotFound, no_key, "'model'"),
    (errors.FileError, no_file, "No such file"),
    (errors.TargetExists, existing, "--overwrite"),
]


@pytest.mark.parametrize(("kind", "prepare", "words"), MET, ids=[kind.__name__ for kind, _, _ in MET])
def test_an_error_is_one_line_and_its_exit_code(
    kind: type[errors.StateDictError],
    prepare: Callable[[Path], list[str]],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = prepare(tmp_path)
    before = sorted(os.listdir(tmp_path))
    code = main(arguments)
    said = capsys.readouterr()

    assert (kind.exit_code, "") == (code, said.out)
    assert 1 == said.err.count("\n")
    assert said.err.startswith("statedict: ")
    assert words in said.err
    assert "Traceback" not in said.err
    assert before == sorted(os.listdir(tmp_path))


@pytest.mark.parametrize("kind", FAMILY, ids=lambda kind: kind.__name__)
def test_every_class_of_error_leaves_by_its_own_exit_code(
    kind: type[errors.StateDictError],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import statedict.ops.inspect

    def fail(*_: object, **__: object) -> None:
        more: dict[str, object] = {"limit": "nodes", "most": 1} if kind is errors.LimitExceeded else {"hint": "Do this"}
        raise kind("something is wrong", path="model.pth", key="a\x1b[31m", **more)

    monkeypatch.setattr(statedict.ops.inspect, "inspect", fail)
    code = main(["inspect", str(tmp_path)])
    said = capsys.readouterr()

    assert (kind.exit_code, "") == (code, said.out)
    assert said.err.startswith("statedict: model.pth: something is wrong (tensor 'a\\x1b[31m')")
    assert 1 == said.err.count("\n")


def test_debug_shows_where_an_error_comes_from(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["inspect", str(tmp_path / "missing.pth"), "--debug"])

    assert (2, True) == (code, "Traceback" in capsys.readouterr().err)


def test_an_error_is_also_the_built_in_one_that_a_caller_expects(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file") as caught:
        statedict.open(tmp_path / "missing.pth")

    assert 2 == caught.value.errno
