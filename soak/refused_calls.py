"""Every system call of a save, and of a restore, that is about files is refused, once, with each error that it may give.

    python soak/refused_calls.py [--short] [--calls fsync]

strace makes one call of the save fail without being carried out: an EIO at each fsync, and so on through what a save
calls. After it the save has either been refused (a ``StateDictError`` in one line, with that errno and the run's path),
and then the steps before are there, whole, the new one isn't, and at most 4 KiB are left; or it says that the step is
durable, and then it is there. The next writer saves and leaves nothing.

A restore gives the newest step as it was saved, or is refused, or (EIO only) gives the step before, and says so. No
step is taken for damaged.

What each error does is up to the kernel and the file system; here only the answer is forged. That a failed fsync isn't
made again on the same file is ``tests/test_runs_faults.py``'s.
"""

from __future__ import annotations

import argparse
import errno
import shutil
from collections.abc import Sequence
from pathlib import Path

from tracing import Report, calls_of, check_tracing, traced
from trial import (
    KEPT,
    MOST_LEFT_NBYTES,
    SmallState,
    Tally,
    carry_out,
    left_in,
    options,
    prepared,
    wrong_after,
    wrong_before_repair,
)

from statedict.errors import StateDictError
from statedict.runs.policies import Latest
from statedict.runs.training_run import TrainingRun

# What each call is refused with. Calls that a system hasn't are never met.
ANSWERS: dict[str, tuple[str, ...]] = {
    "openat": ("EIO", "EMFILE", "ENOSPC", "EACCES", "EROFS"),
    "mkdir": ("EIO", "ENOSPC", "EMLINK", "EROFS"),
    "mkdirat": ("EIO", "ENOSPC", "EMLINK", "EROFS"),
    "link": ("EIO", "ENOSPC", "EMLINK", "EPERM"),
    "linkat": ("EIO", "ENOSPC", "EMLINK", "EPERM"),
    "fallocate": ("EIO", "ENOSPC", "EOPNOTSUPP", "EDQUOT", "EFBIG"),
    "pwrite64": ("EIO", "ENOSPC"),
    "pwritev": ("EIO", "ENOSPC", "EDQUOT", "EFBIG"),
    "pwritev2": ("EIO", "ENOSPC", "EDQUOT", "EFBIG"),
    "fsync": ("EIO", "ENOSPC", "EDQUOT"),
    "fdatasync": ("EIO", "ENOSPC", "EDQUOT"),
    "rename": ("EIO", "ENOSPC", "EACCES"),
    "renameat": ("EIO", "ENOSPC", "EACCES"),
    "renameat2": ("EIO", "ENOSPC", "ENOSYS", "EINVAL"),
    "unlink": ("EIO", "EACCES", "EBUSY"),
    "unlinkat": ("EIO", "EACCES", "EBUSY"),
    "rmdir": ("EIO", "EBUSY"),
    "close": ("EIO", "ENOSPC", "EDQUOT"),
    "ftruncate": ("EIO",),
    "flock": ("EIO", "ENOLCK"),
    "fcntl": ("EIO",),
    "ioctl": ("EIO",),
    "lseek": ("EIO",),
    "statfs": ("EIO",),
    "newfstatat": ("EIO", "EACCES"),
    "fstat": ("EIO",),
    "statx": ("EIO", "EACCES"),
    "getdents64": ("EIO",),
    "read": ("EIO",),
    "pread64": ("EIO",),
}
SHORT: dict[str, tuple[str, ...]] = {"fsync": ("EIO",), "renameat2": ("EIO",)}
OLD = list(range(1, KEPT + 1))
NEW = KEPT + 1


class Save:
    """A save, into a copy of the same run each time."""

    def __init__(self, folder: Path, *, wait: bool) -> None:
        self._template = folder / "template"
        self._wait = wait
        self._run: TrainingRun | None = None
        self.run_folder = folder / "run"
        prepared(self._template, KEPT)

    def renew(self) -> None:
        """The run as it was before the save."""
        shutil.rmtree(self.run_folder, ignore_errors=True)
        shutil.copytree(self._template, self.run_folder)

    def open(self) -> None:
        """What a training does before."""
        self._run = TrainingRun(self.run_folder, keep=Latest(KEPT))
        self._run.restore(SmallState())

    def work(self, report: Report) -> None:
        """The save; says ``durable``, or the errno, the path and the text of its refusal."""
        assert self._run is not None
        try:
            saved = self._run.save(NEW, SmallState(NEW), wait=self._wait)
            saved.wait()
        except StateDictError as error:
            path = str(error.path)
            report(f"refused {getattr(error, 'errno', None)} {path.startswith(str(self.run_folder))} {error}")
        else:
            report("durable" if saved.durable else "not durable")
        report("end")

    def wrong(self, code: int, lines: Sequence[str], answer: str) -> str:
        """What is wrong after it."""
        if code or lines[-1:] != ["end"] or len(lines) != 2:
            return f"it ends with {code} and says {lines}"
        said = lines[0]
        if said.startswith("refused"):
            if not said.startswith(f"refused {getattr(errno, answer)} True"):
                return f"the refusal doesn't say what it should: {said}"
            if left_in(self.run_folder) > MOST_LEFT_NBYTES:
                return f"{left_in(self.run_folder)} bytes are left of the attempt"
            if (wrong := wrong_before_repair(self.run_folder, OLD[:-1], OLD[-1], told=True)) != "":
                return wrong
        return wrong_after(self.run_folder, OLD, NEW, told=said == "durable")


class Restore(Save):
    """A restore of the same run."""

    def open(self) -> None:
        """Nothing is read before."""

    def work(self, report: Report) -> None:
        """The restore; says which step came back, and whether it did so whole."""
        state = SmallState()
        try:
            with TrainingRun(self.run_folder) as run:
                restored = run.restore(state)
        except StateDictError as error:
            report(f"refused {getattr(error, 'errno', None)} {error}")
        else:
            is_right = restored is not None and state.is_of(restored.step)
            fell = [each.step for each in restored.fell_back] if restored is not None else []
            report(f"{restored.step if restored else None} {is_right} {fell}")
        report("end")

    def wrong(self, code: int, lines: Sequence[str], answer: str) -> str:
        """What is wrong after it."""
        fine = [f"{OLD[-1]} True []", *([f"{OLD[-2]} True [{OLD[-1]}]"] if answer == "EIO" else [])]
        is_refused = lines[0].startswith(f"refused {getattr(errno, answer)} {self.run_folder}")
        if code or lines[1:] != ["end"] or not (is_refused or lines[0] in fine):
            return f"it ends with {code} and says {lines}"
        return wrong_after(self.run_folder, OLD, NEW, told=False)


def refuse_everywhere(save: Save, name: str, answers: dict[str, tuple[str, ...]], folder: Path, tally: Tally) -> None:
    """One refusal for each call, number and error."""
    save.renew()
    calls = [call for _, call in calls_of(save.work, folder, save.open)]
    refused = 0
    for call, errors in answers.items():
        for answer in errors:
            for number in range(1, calls.count(call) + 1):
                save.renew()
                inject = f"inject={call}:error={answer}:when={number}"
                code, lines = traced(save.work, [f"trace={call}", inject], before=save.open)
                tally.add(f"{name}, {answer} at {call} {number}", save.wrong(code, lines, answer))
                refused += lines[0].startswith("refused")
    tally.note(f"{name}: {refused} refused")


def trial(chosen: argparse.Namespace, folder: Path, tally: Tally) -> None:
    """A save that waits, one in the background, and a restore."""
    check_tracing(folder)
    prepared(folder / "warm", KEPT + 1)
    answers = SHORT if chosen.short else ANSWERS
    if chosen.calls:
        answers = {call: ANSWERS[call] for call in chosen.calls.split(",")}
    for name, wait in (("waiting", True), ("background", False)):
        place = folder / name
        place.mkdir()
        refuse_everywhere(Save(place, wait=wait), name, answers, folder, tally)
    (folder / "restore").mkdir()
    refuse_everywhere(Restore(folder / "restore", wait=True), "restore", answers, folder, tally)


if __name__ == "__main__":
    parser = options(__doc__)
    parser.add_argument("--calls", help="only these, by their names")
    carry_out(parser, trial)
