"""What the trials share: a small run, what must hold of it after a fault, and the line that says what was tried.

A trial is a script. It prints one line, *NAME: N states, V violations, seed S, T s*, and exits with 1 where a violation
was found, or where its control wasn't caught. Where the system lacks what it takes, the line says what that is, and the
exit code is 0.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import numpy

from statedict.checkpoint import of_memory
from statedict.errors import StateDictError
from statedict.runs.pieces import Captured, OpenedStep
from statedict.runs.policies import Latest
from statedict.runs.training_run import TrainingRun

__all__ = [
    "KEPT",
    "MOST_LEFT_NBYTES",
    "Forked",
    "Impossible",
    "SmallState",
    "Tally",
    "carry_out",
    "left_in",
    "options",
    "prepared",
    "scratch",
    "wrong_after",
    "wrong_before_repair",
]

# Steps that the small run keeps.
KEPT = 2
# Of a failed save: what may be left, the owner's file among it.
MOST_LEFT_NBYTES = 4096
# Violations that are shown; the line counts all.
_MOST_SHOWN = 20
# What a child says must come through, whatever a trial has made of ``os.write``.
_WRITE = os.write
FROZEN = numpy.arange(900, dtype="float32")


class Impossible(Exception):
    """This system lacks what the trial takes; says what."""


class SmallState:
    """A training state without torch: a part that stands still, so that it is linked, one that changes, and a value. All tell the step."""

    def __init__(self, step: int = -1, numel: int = 3000) -> None:
        self.step = step
        self.model = numpy.full(numel, step, "float32")
        self.frozen = FROZEN

    def capture(self) -> Captured:
        """Copies of all three."""
        model = {"w": self.model.copy(), "step": self.step}
        return Captured({"frozen": of_memory({"w": self.frozen}), "model": of_memory(model)}, {"step": self.step})

    def apply(self, step: OpenedStep, *, only: Collection[str] | None, keep_hyperparameters: Collection[str]) -> None:
        """Take over what a step holds."""
        tree = step.piece("model").tree()
        self.step, self.model = tree["step"], tree["w"].numpy()
        self.frozen = step.piece("frozen")["w"].numpy()

    def is_of(self, step: int) -> bool:
        """Whether every value is the one of that step."""
        same = numpy.array_equal(self.model, numpy.full(len(self.model), step, "float32"))
        return self.step == step and same and numpy.array_equal(self.frozen, FROZEN)


def prepared(folder: Path, steps: int = 2, numel: int = 3000) -> None:
    """A run with steps 1 to ``steps``."""
    with TrainingRun(folder, keep=Latest(KEPT)) as run:
        for step in range(1, steps + 1):
            run.save(step, SmallState(step, numel))


# -------------------------------------------------------------------- what must hold


def wrong_before_repair(folder: Path, old: Sequence[int], new: int, *, told: bool) -> str:
    """What is wrong where ``new`` was being saved into a run with the steps ``old``; empty if nothing is.

    ``told``: the caller was told that it is durable. Every step that is there must be whole, and be the step that it says.
    """
    kept = list(old)[-KEPT:]
    allowed = [[*kept, new], [*kept, new][-KEPT:]] if told else [kept, [*kept, new], [*kept, new][-KEPT:]]
    with TrainingRun(folder) as run:
        numbers = run.catalogue.numbers()
        if numbers not in allowed:
            return f"the steps are {numbers}, and may be {allowed}"
        latest = run.latest()
        if (latest.step if latest else None) != (numbers[-1] if numbers else None):
            return f"latest() gives {latest}, and the steps are {numbers}"
        found = run.verify()
        if not found.ok:
            return f"not every step is whole: {found.findings[0].message}"
        every: list[int | str] = [*numbers, "latest"] if numbers else []
        for number in every:
            state = SmallState()
            restored = run.restore(state, step=number)
            if restored is None or restored.fell_back or not state.is_of(restored.step):
                return f"step {number} doesn't come back as it was saved"
    return ""


def wrong_after(folder: Path, old: Sequence[int], new: int, *, told: bool) -> str:
    """The same; and the next writer must be able to save, after which nothing is left but whole steps."""
    try:
        wrong = wrong_before_repair(folder, old, new, told=told)
        if wrong:
            return wrong
        with TrainingRun(folder, keep=Latest(KEPT)) as run:
            run.save(new + 1, SmallState(new + 1))
        numbers = sorted(name for name in os.listdir(folder) if not name.startswith("step-"))
        if numbers != [".lock"]:
            return f"the next save leaves {numbers}"
        state = SmallState()
        with TrainingRun(folder) as run:
            if run.restore(state) is None or not state.is_of(new + 1):
                return "the next step doesn't come back as it was saved"
    except (StateDictError, OSError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def left_in(folder: Path) -> int:
    """Bytes in everything but committed steps."""
    files = [path for path in folder.rglob("*") if not path.relative_to(folder).parts[0].startswith("step-")]
    return sum(path.stat().st_size for path in files if path.is_file())


# -------------------------------------------------------------------- what was tried


class Tally:
    """The states that were tried, and what was wrong in which."""

    def __init__(self) -> None:
        self.states = 0
        self.violations: list[str] = []
        self.notes: list[str] = []

    def add(self, where: str, wrong: str) -> None:
        """One state; ``wrong`` is empty where all was well."""
        self.states += 1
        if wrong:
            self.violations.append(f"{where}: {wrong}")

    def note(self, text: str) -> None:
        """Something for the line, beside the numbers."""
        self.notes.append(text)


def options(description: str | None) -> argparse.ArgumentParser:
    """The options that every trial has."""
    parser = argparse.ArgumentParser(description=(description or "").split("\n")[0])
    parser.add_argument("--short", action="store_true", help="a few of the states, in seconds")
    parser.add_argument("--seed", type=int, default=None, help="of what is random (default: another each time)")
    parser.add_argument(
        "--folder", type=Path, default=None, help="where to work (default: the system's for temporary files)"
    )
    return parser


def carry_out(parser: argparse.ArgumentParser, trial: Callable[[argparse.Namespace, Path, Tally], None]) -> NoReturn:
    """Run a trial in a folder of its own, print its line, and exit."""
    chosen = parser.parse_args()
    if chosen.seed is None:
        chosen.seed = int.from_bytes(os.urandom(4), "little")
    tally, start, name = Tally(), time.monotonic(), Path(sys.argv[0]).stem
    try:
        with scratch(chosen.folder) as folder:
            trial(chosen, folder, tally)
    except Impossible as error:
        sys.stdout.write(f"{name}: skipped: {error}\n")
        sys.exit(0)
    for violation in tally.violations[:_MOST_SHOWN]:
        sys.stderr.write(f"{name}: violation: {violation}\n")
    numbers = [f"{tally.states:,} states", f"{len(tally.violations):,} violations", *tally.notes]
    sys.stdout.write(f"{name}: {', '.join(numbers)}, seed {chosen.seed}, {time.monotonic() - start:.0f} s\n")
    sys.exit(1 if tally.violations else 0)


@contextmanager
def scratch(parent: Path | None) -> Iterator[Path]:
    """A folder of one's own, which goes in the end."""
    made = Path(tempfile.mkdtemp(prefix="statedict-soak-", dir=parent))
    try:
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)


# -------------------------------------------------------------------- processes


class Forked:
    """A forked child that runs ``work(report)`` and ends; ``report`` sends a line to the parent.

    ``lines()`` gives those that have come once the child has ended. What ``work`` raises becomes a line that begins with ``raised``.
    """

    def __init__(self, work: Callable[[Callable[[str], None]], None]) -> None:
        self._reading, writing = os.pipe()
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid:
            os.close(writing)
            return
        code = 1
        try:
            os.close(self._reading)
            work(lambda line: _send(writing, line))
            code = 0
        except BaseException as error:
            _send(writing, f"raised {type(error).__name__}: {error} {traceback.format_exc()!r}")
        finally:
            os._exit(code)

    def kill(self) -> None:
        """End it as the kernel would."""
        os.kill(self.pid, signal.SIGKILL)

    def lines(self) -> tuple[int, list[str]]:
        """Its exit code (of a signal: minus its number), and what it has said."""
        with os.fdopen(self._reading, "rb") as pipe:
            said = pipe.read()
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1]), said.decode("utf-8", "replace").splitlines()


def _send(fd: int, line: str) -> None:
    _WRITE(fd, line.replace("\n", " ").encode("utf-8", "replace") + b"\n")
