"""The command line around the verbs: streams, formats, exit codes, errors. What the verbs do is tested with them."""

from __future__ import annotations

import io
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from statedict.cli import main
from statedict.dtypes import BY_CODE
from statedict.errors import CorruptFile, UnsafeContent
from statedict.limits import DEFAULT_LIMITS
from statedict.manifest import Container, FileFact, Manifest, Storage, StorageView, TensorEntry
from statedict.ops import inspect as inspecting
from statedict.ops.inspect import Inspection, inspection_of


def inspection() -> Inspection:
    tensors = {}
    for i in range(3):
        path = (f"layers.{i}.w",)
        tensors[path] = TensorEntry(path, BY_CODE["F32"], (2, 2), StorageView(Storage(i, 16), 0, (2, 1)))
    manifest = Manifest("torch-zip", (FileFact("m.pth", 500),), (), tensors, {}, Container("dict", [], []))
    return inspection_of(manifest, "m.pth")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """What ``inspect`` is called with; it answers with a small inspection."""
    seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def answer(*args: Any, **kwargs: Any) -> Inspection:
        seen.append((args, kwargs))
        return inspection()

    monkeypatch.setattr(inspecting, "inspect", answer)
    return seen


def failing(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def fail(*args: Any, **kwargs: Any) -> Inspection:
        raise error

    monkeypatch.setattr(inspecting, "inspect", fail)


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"], ["help"]])
def test_without_a_verb_the_help_is_printed(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    code = main(words)
    streams = capsys.readouterr()

    assert (0, "") == (code, streams.err)
    assert "examples:" in streams.out
    assert "  inspect" in streams.out


@pytest.mark.parametrize("verb", ["inspect"])
def test_every_verb_explains_itself_with_examples(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    code = main([verb, "--help"])
    out = capsys.readouterr().out

    assert 0 == code
    assert "examples:" in out
    assert f"  statedict {verb} " in out
    assert all(
        option in out for option in ("--format", "-o FILE", "--quiet", "--no-color", "--debug", "--limit", "--at")
    )


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    from statedict import __version__

    assert 0 == main(["--version"])
    assert f"statedict {__version__}\n" == capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["inspct", "x"], "there is no verb 'inspct'. Did you mean statedict inspect?"),
        (
            ["\x1b[2J"],
            "there is no verb '\\x1b[2J'. There is: inspect, compare, convert, average, doctor, runs. See statedict --help",
        ),
        (["--format", "json"], "the verb comes first, then --format. See statedict --help"),
        (["inspect"], "the following arguments are required: SOURCE. See statedict inspect --help"),
        (
            ["inspect", "x", "--tree", "--flat"],
            "argument --flat: not allowed with argument --tree. See statedict inspect --help",
        ),
        (
            ["inspect", "x", "--limit", "depth=many"],
            "argument --limit: 'many' is no number of the kind that depth takes. See statedict inspect --help",
        ),
    ],
)
def test_a_wrong_command_is_one_line_and_exit_2(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code = main(words)
    streams = capsys.readouterr()

    assert (2, "") == (code, streams.out)
    assert f"statedict: {said}\n" == streams.err


def test_an_unknown_limit_names_those_that_exist(capsys: pytest.CaptureFixture[str]) -> None:
    assert 2 == main(["inspect", "x", "--limit", "speed=3"])
    assert "there is no limit 'speed'; there is pickle_bytes, opcodes" in capsys.readouterr().err


def test_the_text_is_the_result_and_stderr_is_empty(calls: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["inspect", "m.pth"])
    streams = capsys.readouterr()

    assert (0, f"{inspection()}\n", "") == (code, streams.out, streams.err)
    assert [(("m.pth",), {"stats": False, "at": None, "limits": DEFAULT_LIMITS})] == [
        without_progress(c) for c in calls
    ]


def test_options_reach_inspect(calls: list[Any]) -> None:
    main(["inspect", "m.pth", "--stats", "--at", "model", "--limit", "depth=5", "--limit", "nodes=1_000"])
    limits = DEFAULT_LIMITS._replace(depth=5, nodes=1000)

    assert (("m.pth",), {"stats": True, "at": "model", "limits": limits}) == without_progress(calls[0])


def without_progress(call: Any) -> Any:
    """A call without the callback, which is another each time."""
    positional, named = call
    assert callable(named["on_progress"])
    return positional, {name: value for name, value in named.items() if name != "on_progress"}


def test_json_is_exactly_the_results_facts(calls: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert 0 == main(["inspect", "m.pth", "--format", "json"])
    assert inspection().to_dict() == json.loads(capsys.readouterr().out)


def test_json_of_a_selection(calls: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    main(["inspect", "m.pth", "--format", "json", "--match", "*.1.w"])

    assert ["layers.1.w"] == [tensor["key"] for tensor in json.loads(capsys.readouterr().out)["tensors"]]


def test_html_and_markdown_are_the_results_own(calls: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    main(["inspect", "m.pth", "--format", "html"])
    html = capsys.readouterr().out
    main(["inspect", "m.pth", "--format", "markdown"])

    assert inspection().to_html() == html
    assert inspection().to_markdown() == capsys.readouterr().out


def test_flat_lists_every_tensor(calls: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    main(["inspect", "m.pth", "--flat"])

    assert "layers.1.w" in capsys.readouterr().out


def test_a_glob_without_a_match_is_said_unless_quiet(calls: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    main(["inspect", "m.pth", "--match", "x"])
    said = capsys.readouterr().err
    main(["-q", "inspect", "m.pth", "--match", "x"])

    assert ("statedict: no key matches 'x'\n", "") == (said, capsys.readouterr().err)


def test_a_result_goes_to_a_file(calls: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "m.json"
    code = main(["inspect", "m.pth", "--format", "json", "-o", str(target)])
    streams = capsys.readouterr()

    assert (0, "", f"statedict: written to {target}\n") == (code, streams.out, streams.err)
    assert inspection().to_dict() == json.loads(target.read_text("utf-8"))


def test_a_file_that_exists_is_kept_without_overwrite(
    calls: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "m.txt"
    target.write_text("mine", encoding="utf-8")

    assert 2 == main(["inspect", "m.pth", "-o", str(target)])
    assert ("mine", []) == (target.read_text("utf-8"), calls)
    assert "--overwrite" in capsys.readouterr().err
    assert 0 == main(["inspect", "m.pth", "-o", str(target), "--overwrite"])
    assert "layers" in target.read_text("utf-8")


@pytest.mark.parametrize("suffix", ["", "#model"])
def test_a_report_never_takes_the_place_of_its_source(suffix: str, calls: list[Any], tmp_path: Path) -> None:
    source = tmp_path / "m.pth"
    source.write_bytes(b"weights")

    assert 2 == main(["inspect", str(source) + suffix, "-o", str(source), "--overwrite"])
    assert (b"weights", []) == (source.read_bytes(), calls)


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("words", "variables", "colored"),
    [([], {}, True), (["--no-color"], {}, False), ([], {"NO_COLOR": "1"}, False), ([], {"TERM": "dumb"}, False)],
)
def test_colour_is_for_terminals_that_want_it(
    words: list[str], variables: dict[str, str], colored: bool, calls: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "stdout", Terminal())
    main(["inspect", "m.pth", *words])

    assert colored == ("\x1b[" in sys.stdout.getvalue())  # type: ignore[attr-defined]


def test_an_error_is_one_line_and_its_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failing(monkeypatch, CorruptFile("the header is cut", path="a\x1b.pth", offset=8))
    code = main(["inspect", "a.pth"])
    streams = capsys.readouterr()

    assert (2, "") == (code, streams.out)
    assert "statedict: a\\x1b.pth: the header is cut (at byte 8)\n" == streams.err


def test_unsafe_content_is_exit_3(monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, UnsafeContent("it would run code"))

    assert 3 == main(["inspect", "a.pth"])


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    failing(monkeypatch, CorruptFile("cut"))
    main(["inspect", "a.pth", "--debug"])

    assert "Traceback (most recent call last)" in capsys.readouterr().err


def test_a_bug_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    failing(monkeypatch, ZeroDivisionError("oh\nno"))
    code = main(["inspect", "a.pth"])
    said = capsys.readouterr().err

    assert (2, 1) == (code, len(said.splitlines()))
    assert "internal error: ZeroDivisionError: oh\\nno" in said
    assert "--debug" in said


def test_an_interruption_is_exit_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    failing(monkeypatch, KeyboardInterrupt())

    assert 130 == main(["inspect", "a.pth"])
    assert "statedict: interrupted\n" == capsys.readouterr().err


def test_a_closed_pipe_is_no_error(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    class Closed(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    monkeypatch.setattr(inspecting, "inspect", lambda *args, **kwargs: inspection())
    monkeypatch.setattr(sys, "stdout", Closed())

    assert 0 == main(["inspect", "a.pth"])
    assert "" == capfd.readouterr().err


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a small file that the safetensors library wrote, as the current one."""
    import numpy
    from safetensors.numpy import save_file

    save_file(
        {"layers.0.w": numpy.ones((2, 3), "float32"), "layers.1.w": numpy.ones((2, 3), "float32")},
        tmp_path / "m.safetensors",
    )
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_convert_says_what_was_written(weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["convert", "m.safetensors", "m.pth", "--format", "json"])
    streams = capsys.readouterr()
    found = json.loads(streams.out)

    assert (0, "") == (code, streams.err)
    assert ("torch-zip", 2, (weights / "m.pth").stat().st_size) == (
        found["target_format"],
        found["tensors"],
        found["nbytes"],
    )


@pytest.mark.parametrize("options", [["--dry-run"], ["--no-digests"], ["--keep-storages"], ["--at", "layers"]])
def test_the_options_of_convert(options: list[str], weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["convert", "m.safetensors", "m.pth", *options, "--format", "json"])
    found = json.loads(capsys.readouterr().out)

    assert 0 == code
    assert ("--dry-run" in options, "--no-digests" not in options) == (found["dry_run"], found["digests"])
    assert ("--dry-run" not in options) == (weights / "m.pth").exists()
    assert found["source"].endswith("#layers" if "--at" in options else ".safetensors")


def test_convert_replaces_a_file_only_when_told(weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (weights / "m.pth").write_bytes(b"precious")
    first = main(["convert", "m.safetensors", "m.pth"])
    kept = (weights / "m.pth").read_bytes()
    second = main(["convert", "m.safetensors", "m.pth", "--overwrite"])

    assert (2, b"precious", 0) == (first, kept, second)


def test_an_interrupted_conversion_leaves_nothing(
    weights: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from statedict.ops import writing

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(writing, "_compare", interrupted)
    code = main(["convert", "m.safetensors", "m.pth"])

    assert (130, "statedict: interrupted\n") == (code, capsys.readouterr().err)
    assert ["m.safetensors"] == os.listdir(weights)


def test_a_conversion_that_is_ended_by_sigterm_leaves_nothing(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import signal

    from statedict.ops import writing

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(writing, "_compare", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    code = main(["convert", "m.safetensors", "m.pth"])

    assert (143, ["m.safetensors"]) == (code, os.listdir(weights))
    assert before == signal.getsignal(signal.SIGTERM)


def test_bytes_that_come_back_otherwise_leave_the_old_file(
    weights: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from statedict.io.durable import DurableFile

    whole = DurableFile.reopened

    def flipped(self: DurableFile) -> Any:
        self.write_at(self.nbytes - 1, [b"\xff"])
        return whole(self)

    (weights / "m2.safetensors").write_bytes(b"precious")
    monkeypatch.setattr(DurableFile, "reopened", flipped)
    code = main(["convert", "m.safetensors", "m2.safetensors", "--overwrite"])
    said = capsys.readouterr().err

    assert 2 == code
    assert "the disk gives back other bytes than were written" in said
    assert b"precious" == (weights / "m2.safetensors").read_bytes()
    assert ["m.safetensors", "m2.safetensors"] == sorted(os.listdir(weights))
