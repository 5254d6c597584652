"""The checkpoints that another program writes into one folder, each a folder of its own, sealed: which is the newest whole one, which go.

out/checkpoint-500            sealed, or not yet
out/checkpoint-1000.damaged   found not to be as it was sealed, and renamed: never counted, never deleted
out/.trash-checkpoint-250-…   being deleted
"""

from __future__ import annotations

import errno
import os
import re
import sys
import time
from collections.abc import Collection, Mapping
from contextlib import suppress

from statedict.errors import CorruptFile, FileError, LimitExceeded, RunError, StateDictError, Uncommitted, one_line
from statedict.report.escape import visible
from statedict.runs.catalogue import DAMAGED_MARK, TRASH, Step
from statedict.runs.pieces import FellBack
from statedict.runs.policies import Keep, keep_of
from statedict.runs.retention import spared, surplus
from statedict.runs.sealing import Seal, check_sealed, read_seal, seal
from statedict.runs.storage import LocalStorage

__all__ = ["SealedFolders", "is_loss", "make_folders", "say"]

_MOST_ASIDE = 10_000
_LONGEST_LINE = 2000
# What a disk answers that has lost bytes.
_LOST = frozenset({errno.EIO, errno.ESTALE, getattr(errno, "EUCLEAN", errno.EIO), getattr(errno, "EBADMSG", errno.EIO)})


class SealedFolders:
    """The checkpoints ``folder/PREFIX + number``. ``keep`` says which stay (None: all), as in ``TrainingRun``.

    One process seals and deletes; several may read, on storage that all of them see.
    """

    def __init__(self, folder: str | os.PathLike[str], prefix: str, *, keep: Keep | int | None = None) -> None:
        self.folder = os.fspath(folder)
        self.keep = None if keep is None else keep_of(keep)
        self.fell_back: tuple[FellBack, ...] = ()
        self._prefix = prefix
        self._storage = LocalStorage()
        self._known: set[int] = set()  # those of which this process has hashed every byte

    def path_of(self, step: int) -> str:
        """Where a checkpoint is, or would be."""
        return os.path.join(self.folder, f"{self._prefix}{step}")

    def numbers(self) -> list[int]:
        """The numbers of all checkpoints that are there, ascending, whether they are sealed or not. Raises ``FileError``."""
        pattern = re.compile(re.escape(self._prefix) + r"(0|[1-9]\d{0,18})")
        return sorted([int(found[1]) for name in self._names() if (found := pattern.fullmatch(name))])

    def _names(self) -> list[str]:
        try:
            return self._storage.listdir(self.folder)
        except FileNotFoundError:
            return []
        except OSError as error:
            raise FileError.of(error, self.folder, "the folder can't be read") from error

    def steps(self) -> list[Step]:
        """The sealed checkpoints, ascending. Reads their seals, and no other file."""
        found = []
        for number in self.numbers():
            with suppress(StateDictError):
                made = read_seal(self.path_of(number))
                found.append(Step(number, made.path, made.time, made.nbytes, made.metrics, False))
        return found

    def seal(self, step: int, *, metrics: Mapping[str, float] | None = None, path: str | None = None) -> Seal:
        """Seal a checkpoint, which may have another path still. Raises as ``sealing.seal`` does."""
        made = seal(self.path_of(step) if path is None else path, step=step, metrics=metrics)
        self._known.add(step)
        return made

    def newest(self) -> Seal | None:
        """The newest sealed checkpoint of which every byte is as it was sealed; None where none was ever sealed.

        What is passed over is said on stderr and listed in ``fell_back``: a checkpoint without a seal, and a damaged one, which is renamed
        to ``….damaged`` first. Raises ``RunError`` where all that were sealed are damaged.
        """
        fallen: list[FellBack] = []
        for number in reversed(self.numbers()):
            try:
                return self._whole(number)
            except (CorruptFile, FileError) as error:  # noqa: PERF203
                fallen.append(self._fallen(number, error))
            finally:
                self.fell_back = tuple(fallen)
        if any(DAMAGED_MARK in name and name.startswith(self._prefix) for name in self._names()):
            why = f": {fallen[0].reason}" if fallen else ""
            raise RunError(
                f"checkpoints were sealed, and none of them is whole{why}", errno=errno.EIO, path=self.folder
            )
        return None

    def _whole(self, number: int) -> Seal:
        check = check_sealed(self.path_of(number), first=True)
        if check.errors:
            raise check.errors[0]
        for finding in check.findings:
            say(check.seal.path, finding.message)
        self._known.add(number)
        return check.seal

    def _fallen(self, number: int, error: StateDictError) -> FellBack:
        """Say that a checkpoint is passed over, and set it aside if its bytes are to blame. Raises what says nothing about it."""
        is_damaged = isinstance(error, CorruptFile) or getattr(error, "errno", None) == errno.ENOENT
        if isinstance(error, LimitExceeded) or not (is_damaged or isinstance(error, Uncommitted) or is_loss(error)):
            raise error
        path = self.path_of(number)
        moved = self._set_aside(path) if is_damaged else None
        now = f", and is called {os.path.basename(moved)} from now on" if moved else ""
        say(self.folder, f"{os.path.basename(path)} is passed over{now}: {error}")
        return FellBack(number, moved or path, str(error))

    def _set_aside(self, path: str) -> str | None:
        for number in range(1, _MOST_ASIDE):
            target = path + DAMAGED_MARK + (f"-{number}" if number > 1 else "")
            try:
                self._storage.rename_noreplace(path, target)
            except OSError as error:
                if error.errno in (errno.EEXIST, errno.ENOTEMPTY):
                    continue
                return None
            with suppress(OSError):
                self._storage.fsync_folder(self.folder)
            return target
        return None

    def prune(self, *, spare: Collection[str] = ()) -> list[Step]:
        """Delete the sealed checkpoints that ``keep`` doesn't keep; gives those that are gone.

        Never the newest, nor the last one that is whole, nor those whose paths are in ``spare``, nor any without a seal. Each is renamed,
        the folder synced, and only then its files are removed. Raises ``RunError``.
        """
        if self.keep is None:
            return []
        steps = self.steps()
        kept = {os.path.realpath(path) for path in spare}
        victims = [step for step in surplus(steps, self.keep, time.time()) if os.path.realpath(step.path) not in kept]
        gone = spared(steps, victims, lambda step: step.step in self._known, self._is_whole) if victims else []
        try:
            self._delete(gone)
        except OSError as error:
            what = "old checkpoints can't be deleted"
            raise RunError.of(error, self.folder, what, "The new one is sealed and whole") from error
        return gone

    def _is_whole(self, step: Step) -> bool:
        try:
            return not check_sealed(step.path, first=True).errors
        except StateDictError:
            return False

    def _delete(self, steps: Collection[Step]) -> None:
        from shutil import rmtree  # only who deletes needs it

        for step in steps:
            name = os.path.basename(step.path)
            self._storage.rename(step.path, os.path.join(self.folder, f"{TRASH}{name}-{os.urandom(8).hex()}"))
        if steps:
            self._storage.fsync_folder(self.folder)
        for name in self._names():
            if name.startswith(f"{TRASH}{self._prefix}"):  # those too that a killed process had begun to delete
                rmtree(os.path.join(self.folder, name), ignore_errors=True)


def is_loss(error: StateDictError) -> bool:
    """Whether the disk says that bytes are lost; any other refusal (no permission, no descriptors) says nothing about them."""
    return isinstance(error, FileError) and error.errno in _LOST


def say(where: str, text: str) -> None:
    """Say on stderr what must not be missed: a training that goes on from an older checkpoint looks like one from the newest."""
    with suppress(OSError, ValueError, AttributeError):
        sys.stderr.write(f"statedict: {one_line(where)}: {visible(text, _LONGEST_LINE)}\n")


def make_folders(folder: str) -> None:
    """Make a folder and those above it that aren't there, so that their names outlive a power cut. Raises ``RunError``."""
    missing = []
    path = os.path.abspath(folder)
    while not os.path.isdir(path) and os.path.dirname(path) != path:
        missing.append(path)
        path = os.path.dirname(path)
    storage = LocalStorage()
    try:
        for each in reversed(missing):
            with suppress(FileExistsError):
                storage.mkdir(each)
            storage.fsync_folder(os.path.dirname(each))
    except OSError as error:
        raise RunError.of(error, folder, "the folder can't be made") from error
