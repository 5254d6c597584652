"""A disk that is full at every 64 KiB of a save, in four ways, and one that has no room for another file.

    python soak/full_disk.py [--short]          (root)

A tmpfs of its own holds a run with two steps and is made so small that the next save has 0, 64 KiB, 128 KiB … until it
succeeds:

- foreseen: the room is looked at before anything is written;
- reserved: the look is left out, so that reserving the room of a file fails;
- written: that is left out too, so that a write fails in the middle of a file, as on a file system that can't reserve;
- background: the same with ``wait=False``, where the error comes from the save's handle and from ``close``;
- files: there is room for 0, 1, 2 … more files.

Each refusal must be a ``StateDictError`` in one line with ENOSPC and the run's path; the steps before are whole; at
most 4 KiB of the attempt are left; and once there is room, the next save succeeds and leaves nothing.

tmpfs takes its pages when they are written. A file system that promises room and then has none when it writes back
(some thin volumes) says so at fsync, which is ``refused_calls.py``'s.
"""

from __future__ import annotations

import argparse
import errno
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

from trial import (
    KEPT,
    MOST_LEFT_NBYTES,
    Impossible,
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

STEP_NBYTES = 64 * 1024
# Floats of the part that changes: 2 MiB, so that one file alone is met in the middle dozens of times.
NUMEL = 1 << 19
WAYS = ("foreseen", "reserved", "written", "background")


class SmallDisk:
    """A tmpfs that can be made larger and smaller."""

    def __init__(self, place: Path) -> None:
        self.place = place
        place.mkdir()

    @contextmanager
    def mounted(self) -> Iterator[Path]:
        """The folder of a run with two steps on it."""
        self._mount("size=64m")
        try:
            prepared(self.place / "run", KEPT, NUMEL)
            yield self.place / "run"
        finally:
            subprocess.run(["umount", str(self.place)], check=True)

    def leave(self, *, nbytes: int | None = None, files: int | None = None) -> None:
        """Leave room for so many bytes, and files, more."""
        found = os.statvfs(self.place)
        size = "64m" if nbytes is None else str((found.f_blocks - found.f_bfree) * found.f_frsize + nbytes)
        most = 100_000 if files is None else found.f_files - found.f_ffree + files
        self._mount(f"remount,size={size},nr_inodes={most}")

    def _mount(self, chosen: str) -> None:
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", chosen, "tmpfs", str(self.place)],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise Impossible(f"a file system can't be mounted here: {done.stderr.strip()}")


@contextmanager
def in_the_dark(run: TrainingRun, way: str) -> Iterator[None]:
    """Leave out the looks ahead that this way leaves out."""

    def refuse(fd: int, offset: int, nbytes: int) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    storage = run.catalogue.storage
    with mock.patch.object(storage, "free_nbytes", storage.free_nbytes if way == "foreseen" else lambda path: None):
        if way in ("foreseen", "reserved"):
            yield
        else:
            with mock.patch("os.posix_fallocate", refuse):
                yield


def attempt(folder: Path, way: str) -> StateDictError | None:
    """Save step 3; what it was refused with."""
    run = TrainingRun(folder, keep=Latest(KEPT))
    try:
        run.restore(SmallState())
        with in_the_dark(run, way):
            try:
                run.save(KEPT + 1, SmallState(KEPT + 1, NUMEL), wait=way != "background")
            finally:
                run.close()
    except StateDictError as error:
        return error
    return None


def wrong_refusal(error: StateDictError, folder: Path) -> str:
    """What is wrong with how it was said, and with what it has left."""
    said = str(error)
    if getattr(error, "errno", None) != errno.ENOSPC or not said.startswith(str(folder)) or "\n" in said:
        return f"the refusal doesn't say what it should: {said}"
    if left_in(folder) > MOST_LEFT_NBYTES:
        return f"{left_in(folder)} bytes are left of the attempt"
    return ""


def fill(disk: SmallDisk, way: str, first: int, every: int, tally: Tally) -> int:
    """Attempts with more and more room, until one succeeds; the room that it had, in bytes or files."""
    room = first
    while True:
        with disk.mounted() as folder:
            disk.leave(nbytes=None if way == "files" else room, files=room if way == "files" else None)
            where = f"{way}, room for {room:,} {'files' if way == 'files' else 'bytes'}"
            old = list(range(1, KEPT + 1))
            try:
                error = attempt(folder, way)
            except Exception as stranger:
                tally.add(where, f"{type(stranger).__name__} comes out: {stranger}")
                return room
            if error is None:
                disk.leave()
                tally.add(where, wrong_after(folder, old, KEPT + 1, told=True))
                return room
            wrong = wrong_refusal(error, folder) or wrong_before_repair(folder, old[:-1], old[-1], told=True)
            disk.leave()
            tally.add(where, wrong or wrong_after(folder, old, KEPT + 1, told=False))
        room += every


def trial(chosen: argparse.Namespace, folder: Path, tally: Tally) -> None:
    """Every way."""
    if os.geteuid():
        raise Impossible("only root can mount file systems")
    disk = SmallDisk(folder / "small")
    for way in WAYS:
        room = fill(disk, way, 0, STEP_NBYTES * (8 if chosen.short else 1), tally)
        tally.note(f"{way}: until {room // 1024:,} KiB")
    tally.note(f"files: until {fill(disk, 'files', 0, 1, tally)}")


if __name__ == "__main__":
    carry_out(options(__doc__), trial)
