"""A process that saves is ended (SIGKILL) at every system call that the save makes.

    python soak/kill_at_calls.py [--short] [--calls fsync,renameat2]

Three saves: one that waits, one in the background (``wait=False``), and the first of a new run, its folder included.
The child is forked from a process that has everything imported, and strace comes before the save begins: so every call
of the save is met, and none of the interpreter's start. After each kill: every step that is there is whole and comes
back as it was saved, the newest is the one before or the new one (the new one, if the caller was told), and the next
writer takes the lock, sweeps, saves, and leaves nothing.

It proves that no order of calls leaves half a step to a process that dies. It proves nothing about power cuts: what the
kernel has taken is there after a kill, synced or not. ``power_cut.py`` and ``tests/test_runs_crash.py`` are about
those.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from tracing import Report, calls_of, check_tracing, met, traced
from trial import KEPT, SmallState, Tally, carry_out, options, prepared, wrong_after

from statedict.runs.policies import Latest
from statedict.runs.training_run import TrainingRun

# name: steps that are there before, and whether the save waits.
SAVES = {"waiting": (2, True), "background": (2, False), "first": (0, True)}
SHORT = ("fsync", "renameat2", "unlink", "unlinkat")


class Save:
    """One kind of save, into a copy of the same run each time."""

    def __init__(self, folder: Path, steps: int, *, wait: bool) -> None:
        self._folder = folder
        self._steps = steps
        self._wait = wait
        self._run: TrainingRun | None = None
        self.run_folder = folder / "run"
        if steps:
            prepared(folder / "template", steps)

    def renew(self) -> None:
        """The run as it was before the save."""
        shutil.rmtree(self.run_folder, ignore_errors=True)
        if self._steps:
            shutil.copytree(self._folder / "template", self.run_folder)

    def open(self) -> None:
        """What a training does before: it has read the newest step, so that parts of it can be linked."""
        if self._steps:
            self._run = TrainingRun(self.run_folder, keep=Latest(KEPT))
            self._run.restore(SmallState())

    def work(self, report: Report) -> None:
        """The save."""
        run = self._run or TrainingRun(self.run_folder, keep=Latest(KEPT))
        saved = run.save(self._steps + 1, SmallState(self._steps + 1), wait=self._wait)
        saved.wait()
        if saved.durable:
            report("durable")
        run.close()

    def wrong(self, told: bool) -> str:
        """What is wrong after it."""
        return wrong_after(self.run_folder, range(1, self._steps + 1), self._steps + 1, told=told)


def kill_everywhere(save: Save, name: str, only: set[str] | None, folder: Path, tally: Tally) -> None:
    """One kill for each call and number, until the save ends alive."""
    save.renew()
    calls = calls_of(save.work, folder, save.open)
    names = sorted({call for _, call in calls if only is None or call in only})
    wanted = [call for call in calls if call[1] in names]
    tally.note(f"{name}: {len(wanted)} calls, {met(wanted)} of them met")
    for call in names:
        number, code = 0, -9
        while code == -9:
            number += 1
            save.renew()
            inject = f"inject={call}:signal=KILL:when={number}"
            code, lines = traced(save.work, [f"trace={call}", inject], before=save.open)
            where = f"{name}, {call} {number}"
            if code == -9:
                tally.add(where, save.wrong("durable" in lines))
            elif code or "durable" not in lines:
                tally.add(where, f"the save that isn't killed fails: {code}, {lines}")


def trial(chosen: argparse.Namespace, folder: Path, tally: Tally) -> None:
    """All kinds of saves."""
    check_tracing(folder)
    only = set(chosen.calls.split(",")) if chosen.calls else set(SHORT) if chosen.short else None
    # What a process imports and looks up once is none of the save's calls.
    prepared(folder / "warm", KEPT + 1)
    for name, (steps, wait) in SAVES.items():
        if chosen.short and name == "first":
            continue
        place = folder / name
        place.mkdir()
        kill_everywhere(Save(place, steps, wait=wait), name, only, folder, tally)


if __name__ == "__main__":
    parser = options(__doc__)
    parser.add_argument("--calls", help="only these, by their names")
    carry_out(parser, trial)
