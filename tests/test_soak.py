"""The trials of soak/, each with a few of its states; what they have found, as tests of its own."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import numpy
import pytest

from statedict.checkpoint import of_memory
from statedict.errors import CorruptFile
from statedict.runs.locks import hold
from statedict.runs.pieces import Captured
from statedict.runs.run import RunFolder

SOAK = Path(__file__).resolve().parents[1] / "soak"


def line_of(script: str, *arguments: str, folder: Path) -> str:
    """The line of a trial; the test is skipped where the system lacks what it takes."""
    command = [sys.executable, str(SOAK / script), "--short", "--seed", "1", "--folder", str(folder), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.stdout.startswith(f"{Path(script).stem}: skipped: "):
        pytest.skip(done.stdout.strip())

    assert (0, "") == (done.returncode, done.stderr)
    return done.stdout


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """A run with two steps."""
    made = RunFolder(tmp_path / "run")
    for step in (1, 2):
        made.write(step, Captured({"model": of_memory({"w": numpy.full(5, step)})}))
    return made


def rot(path: Path) -> None:
    """Turn one bit around, as a disk does it: the times of the file stay."""
    facts = path.stat()
    data = bytearray(path.read_bytes())
    data[200] ^= 1
    path.write_bytes(bytes(data))
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))


def test_a_manifest_that_rots_after_it_was_read_is_found_by_verify(run: RunFolder) -> None:
    assert run.verify().ok
    rot(Path(run.catalogue.path_of(2)) / "manifest.json")

    assert [True, False] == [step.ok for step in run.verify().steps]


def test_a_manifest_that_rots_after_it_was_read_is_found_by_opening(run: RunFolder) -> None:
    assert run.verify().ok
    rot(Path(run.catalogue.path_of(2)) / "manifest.json")
    with pytest.raises(CorruptFile, match="its digest differs"):
        run.open_step(2)


def test_a_lock_whose_descriptor_the_system_fails_to_close_is_let_go(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = os.path.join(run.catalogue.path_of(2), "manifest.json")
    shared = hold(path, exclusive=False)
    real = os.close

    def refuse(fd: int) -> None:
        real(fd)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    assert shared is not None
    with monkeypatch.context() as patched:
        patched.setattr(os, "close", refuse)
        shared.let_go()
    alone = hold(path, exclusive=True)

    assert alone is not None
    alone.let_go()


# -------------------------------------------------------------------- the trials, short

TRIALS = ("kill_at_calls", "power_cut", "full_disk", "refused_calls", "limits_and_rights", "bit_rot")


@pytest.mark.parametrize("trial", TRIALS)
def test_no_fault_of_a_trial_costs_a_step(tmp_path: Path, trial: str) -> None:
    assert " 0 violations" in line_of(f"{trial}.py", folder=tmp_path)


def test_a_training_that_is_killed_goes_on_as_if_nothing_had_been(tmp_path: Path) -> None:
    pytest.importorskip("torch")

    assert " 0 violations" in line_of("kill_training.py", folder=tmp_path)


def test_a_trial_says_what_the_system_lacks(tmp_path: Path) -> None:
    without = {**os.environ, "PATH": str(tmp_path)}
    command = [sys.executable, str(SOAK / "kill_at_calls.py"), "--folder", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=without)

    assert (0, "kill_at_calls: skipped: strace isn't installed\n") == (done.returncode, done.stdout)


def test_a_trial_ends_with_1_and_says_where_a_step_is_lost(tmp_path: Path) -> None:
    """Negative control: a verify that compares nothing but the manifest and the sizes."""
    program = (
        "import os, sys, runpy\n"
        f"sys.path.insert(0, {str(SOAK)!r})\n"
        "sys.argv = ['bit_rot.py', '--short', '--folder', sys.argv[1]]\n"
        "from statedict.runs import verification\n"
        "verification.check_files = lambda *arguments, **more: []\n"
        f"runpy.run_path({str(SOAK / 'bit_rot.py')!r}, run_name='__main__')\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=False)

    assert 1 == done.returncode
    assert "violation: frozen.safetensors: bit" in done.stderr
