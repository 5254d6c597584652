"""A process that may not open, write or change what a save needs, and a system that takes fewer bytes than it is given.

    python soak/limits_and_rights.py [--short]

- descriptors: none more, one more, two more … (RLIMIT_NOFILE) until the save succeeds, and so for a restore;
- file size: no file above 0, 4, 8 … KiB (RLIMIT_FSIZE) until the save succeeds;
- rights: a folder that another user may read only; a file system that is mounted read-only (both as root only, who
  begins them);
- short writes: each write takes half of its bytes, a byte, an uneven number, or nothing from some moment on.

Refusals are ``StateDictError`` in one line with the errno and the run's path, and leave the steps before whole and at
most 4 KiB; a refused restore doesn't take the step for a damaged one, nor an older one in its place; afterwards the
next save succeeds and leaves nothing. Where the system takes fewer bytes than given, but some, the save succeeds.

Short writes are forged in this process, by ``os.pwritev`` and its kin: what the kernel does is a matter of the file
system.
"""

from __future__ import annotations

import argparse
import errno
import os
import random
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from trial import (
    KEPT,
    MOST_LEFT_NBYTES,
    Forked,
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

OLD = list(range(1, KEPT + 1))
NEW = KEPT + 1
# Of a user who has no rights.
NOBODY = 65534
Limit = Callable[[], None]


def attempt(folder: Path, limit: Limit, *, wait: bool) -> tuple[int, list[str]]:
    """Save step 3 in a child, under a limit that begins once the run is open; its exit code, and what it said."""

    def work(report: Callable[[str], None]) -> None:
        run = TrainingRun(folder, keep=Latest(KEPT))
        run.restore(SmallState())
        limit()
        try:
            try:
                run.save(NEW, SmallState(NEW), wait=wait).wait()
            finally:
                run.close()
        except StateDictError as error:
            path = str(error.path)
            report(f"refused {getattr(error, 'errno', None)} {path.startswith(str(folder))} {error}")
        else:
            report("durable")

    return Forked(work).lines()


def wrong_attempt(folder: Path, found: tuple[int, list[str]], expected: Sequence[int]) -> str:
    """What is wrong with what was said, and with what is left, while the limit may still be there."""
    code, lines = found
    if code or len(lines) != 1:
        return f"it ends with {code} and says {lines}"
    if lines == ["durable"]:
        return ""
    if not any(lines[0].startswith(f"refused {number} True") for number in expected):
        return f"the refusal doesn't say what it should: {lines[0]}"
    if left_in(folder) > MOST_LEFT_NBYTES:
        return f"{left_in(folder)} bytes are left of the attempt"
    return wrong_before_repair(folder, OLD[:-1], OLD[-1], told=True)


def try_once(folder: Path, where: str, limit: Limit, expected: Sequence[int], tally: Tally, *, wait: bool) -> bool:
    """One attempt in a run of its own; whether it was saved."""
    shutil.rmtree(folder, ignore_errors=True)
    prepared(folder, KEPT)
    found = attempt(folder, limit, wait=wait)
    is_saved = found[1] == ["durable"]
    wrong = wrong_attempt(folder, found, expected)
    tally.add(where, wrong or wrong_after(folder, OLD, NEW, told=is_saved))
    return is_saved


# -------------------------------------------------------------------- limits


def descriptors(more: int) -> Limit:
    """No more than so many further descriptors at a time."""

    def limit() -> None:
        listed = [int(name) for name in os.listdir("/proc/self/fd")]
        # The one that the list was read by is closed again.
        taken = {number for number in listed if os.path.lexists(f"/proc/self/fd/{number}")}
        # The numbers that are free below the highest one are taken first.
        most = [number for number in range(len(taken) + more + 1) if number not in taken][more]
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))

    return limit


def file_size(nbytes: int) -> Limit:
    """No file above this size; Python ignores the signal that comes with it, so that the call fails (EFBIG)."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, nbytes))


def until_saved(
    folder: Path, what: str, made: Callable[[int], Limit], number: int, tally: Tally, step: int = 1
) -> None:
    """Less and less strict, until the save succeeds, waiting and in the background."""
    for wait in (True, False):
        at = 0
        while not try_once(folder, f"{what} {at}, wait={wait}", made(at), [number], tally, wait=wait):
            at += step
            if at > 1 << 20:
                tally.add(what, "no limit is high enough")
                return
        tally.note(f"{what}: saved from {at:,} on")


def try_restores(folder: Path, tally: Tally) -> None:
    """Restores with more and more descriptors."""
    prepared(folder, KEPT)
    names = sorted(os.listdir(folder))
    lines: list[str] = []
    at = 0
    while not lines or lines[0].startswith("refused"):

        def work(report: Callable[[str], None], more: int = at) -> None:
            run, state = TrainingRun(folder), SmallState()
            descriptors(more)()
            try:
                restored = run.restore(state)
            except StateDictError as error:
                report(f"refused {getattr(error, 'errno', None)} {error}")
            else:
                report("restored" if restored is not None and state.is_of(KEPT) else "something else")

        code, lines = Forked(work).lines()
        is_right = code == 0 and (lines == ["restored"] or lines[0].startswith(f"refused {errno.EMFILE} "))
        is_same = names == sorted(os.listdir(folder))
        tally.add(
            f"restore, descriptors {at}", "" if is_right and is_same else f"{lines}, {sorted(os.listdir(folder))}"
        )
        at += 1
    tally.note(f"restored from {at - 1} descriptors on")


# -------------------------------------------------------------------- rights


def as_nobody() -> None:
    """Be a user with no rights."""
    os.setgroups([])
    os.setgid(NOBODY)
    os.setuid(NOBODY)


def try_rights(folder: Path, tally: Tally) -> None:
    """As another user, and on a read-only mount."""
    # The way to the run must be open to the other user.
    for parent in (folder, folder.parent):
        parent.chmod(0o755)
    for wait in (True, False):
        try_once(folder / "run", f"another user, wait={wait}", as_nobody, [errno.EACCES], tally, wait=wait)
    place = folder / "mount"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(place)], capture_output=True, check=False).returncode:
        tally.note("read-only mount skipped: a file system can't be mounted here")
        return
    try:
        for wait in (True, False):
            try_read_only(place, tally, wait=wait)
    finally:
        subprocess.run(["umount", str(place)], check=True)


def try_read_only(place: Path, tally: Tally, *, wait: bool) -> None:
    """The run can be read there, and a save is refused."""
    prepared(place / "run", KEPT)
    subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)
    try:
        wrong = wrong_attempt(place / "run", attempt(place / "run", lambda: None, wait=wait), [errno.EROFS])
    finally:
        subprocess.run(["mount", "-o", "remount,rw", str(place)], check=True)
    tally.add(f"read-only mount, wait={wait}", wrong or wrong_after(place / "run", OLD, NEW, told=False))
    shutil.rmtree(place / "run")


# -------------------------------------------------------------------- short writes


@contextmanager
def cut_short(count: Callable[[int], int]) -> Iterator[list[int]]:
    """Every write takes ``count`` of the bytes that it is given; gives the list of what they took."""
    taken: list[int] = []

    def cut(buffers: Sequence[Any]) -> list[memoryview]:
        views = [memoryview(buffer).cast("B") for buffer in buffers]
        left = count(sum(map(len, views)))
        taken.append(left)
        kept = []
        for view in views:
            kept.append(view[:left])
            left -= len(kept[-1])
        return kept

    real = {name: getattr(os, name) for name in ("write", "pwrite", "writev", "pwritev")}
    with ExitStack() as stack:
        for name, call in real.items():
            if name.endswith("v"):
                made = lambda fd, buffers, *more, call=call: call(fd, cut(buffers), *more)  # noqa: E731
            else:
                made = lambda fd, data, *more, call=call: call(fd, cut([data])[0], *more)  # noqa: E731
            stack.enter_context(mock.patch.object(os, name, made))
        yield taken


def try_short_writes(folder: Path, chance: random.Random, tally: Tally, *, rounds: int) -> None:
    """Writes that take less than they are given go on; those that take nothing are an error."""
    counts: dict[str, Callable[[int], int]] = {
        "half of the bytes": lambda nbytes: (nbytes + 1) // 2,
        "a byte less": lambda nbytes: max(1, nbytes - 1),
        "at most 777 bytes": lambda nbytes: min(777, nbytes),
        "at most a byte more than a page": lambda nbytes: min(4097, nbytes),
    }
    for number in range(rounds):
        counts[f"any number, {number}"] = lambda nbytes: chance.randint(1, max(1, nbytes))
    for name, count in counts.items():
        run_folder = folder / "run"
        shutil.rmtree(run_folder, ignore_errors=True)
        prepared(run_folder, KEPT)
        with TrainingRun(run_folder, keep=Latest(KEPT)) as run:
            run.restore(SmallState())
            with cut_short(count) as taken:
                run.save(NEW, SmallState(NEW))
        wrong = "" if len(taken) > 3 else "no write was cut short"
        tally.add(f"writes take {name}", wrong or wrong_after(run_folder, OLD, NEW, told=True))
    for after in range(5):
        try_nothing(folder / "run", after, tally)


def try_nothing(folder: Path, after: int, tally: Tally) -> None:
    """After so many writes the system takes no more bytes, and says no error: the save must not wait for ever."""
    written = iter([*range(after)])

    def limit() -> None:
        stack.enter_context(cut_short(lambda nbytes: nbytes if next(written, None) is not None else 0))

    with ExitStack() as stack:
        try_once(folder, f"nothing is taken after {after} writes", limit, [errno.EIO], tally, wait=True)


def trial(chosen: argparse.Namespace, folder: Path, tally: Tally) -> None:
    """All of it."""
    until_saved(folder / "run", "descriptors", descriptors, errno.EMFILE, tally)
    try_restores(folder / "restored", tally)
    until_saved(folder / "run", "bytes of a file", file_size, errno.EFBIG, tally, 16384 if chosen.short else 512)
    if os.geteuid() == 0:
        try_rights(folder, tally)
    else:
        tally.note("rights skipped: only root can give them up")
    try_short_writes(folder, random.Random(chosen.seed), tally, rounds=3 if chosen.short else 100)


if __name__ == "__main__":
    carry_out(options(__doc__), trial)
