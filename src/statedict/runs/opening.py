"""Opening a step: held against retention, compared with its digests, and the next one in its place where it is damaged."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from typing import NoReturn

from statedict.errors import CorruptFile, FileError, FormatError, LimitExceeded, RunError, StepNotFound, one_line
from statedict.io.ranges import File
from statedict.report.escape import visible
from statedict.runs.catalogue import Catalogue, is_set_aside
from statedict.runs.pieces import FellBack, OpenedStep
from statedict.runs.policies import AnyKeep, Best, Keep
from statedict.runs.retention import lease, set_aside
from statedict.runs.verification import check_files

__all__ = ["Opener", "best_of", "listed"]

# What a disk answers that has lost bytes. Anything else that the system refuses (no descriptors, no permission) says nothing
# about the step, and an older one in its place would be a wrong answer.
_LOST = frozenset({errno.EIO, errno.ESTALE, getattr(errno, "EUCLEAN", errno.EIO), getattr(errno, "EBADMSG", errno.EIO)})
_LONGEST_LINE = 2000
# Numbers that a hint lists.
_LISTED = 5


class Opener:
    """Opens steps of one run. With ``check`` every byte is compared first, and ``trusted`` is told the digest of the manifest."""

    def __init__(self, catalogue: Catalogue, trusted: dict[int, str], *, check: bool) -> None:
        self._catalogue = catalogue
        self._trusted = trusted
        self._check = check

    def exactly(self, number: int) -> OpenedStep:
        """That step. A damaged one is set aside, and ``CorruptFile`` raised."""
        try:
            return self._opened(number)
        except CorruptFile:
            set_aside(self._catalogue, number)
            raise

    def first_of(self, numbers: Sequence[int]) -> OpenedStep | None:
        """The first of them that is whole, those before it set aside; None where no step was ever committed."""
        fallen: list[FellBack] = []
        for number in numbers:
            try:
                opened = self._opened(number)
            except (FormatError, FileError) as error:
                fallen.append(self._fallen(number, error))
                continue
            opened.fell_back = tuple(fallen)
            return opened
        if fallen or any(is_set_aside(name) for name in self._catalogue.names()):
            self._none_whole(fallen)
        return None

    def ranked(self, best: Best | None) -> list[int]:
        """The steps from the best on. Raises ``RunError`` where nobody has said what that is, ``StepNotFound`` where no step has it."""
        numbers = self._catalogue.numbers()
        if not numbers:
            return []
        if best is None:
            hint = "TrainingRun(..., keep=Best('val_loss')), or restore(step=run.best('val_loss').step)"
            raise RunError("nobody has said what the best step is", path=self._catalogue.folder, hint=hint)
        found = [record.step for record in best.ranked([step.record for step in self._catalogue.steps()])]
        if not found:
            what = f"no step has the metric '{best.metric}'"
            raise StepNotFound(what, path=self._catalogue.folder, hint=listed(numbers))
        return found

    def _opened(self, number: int) -> OpenedStep:
        catalogue, path = self._catalogue, self._catalogue.path_of(number)
        try:
            holding = lease(catalogue.storage, path)
        except FileNotFoundError as error:
            raise CorruptFile("the step has no manifest", path=path) from error
        try:
            manifest = catalogue.manifest(number, anew=self._check)
            errors = check_files(catalogue, path, manifest, first=True) if self._check else []
            if errors:
                raise errors[0]
        except BaseException:
            if holding is not None:
                holding.let_go()
            raise
        if self._check:
            self._trusted[number] = manifest.digest
        let_go = None if holding is None else holding.let_go
        return OpenedStep(manifest, path, partial(_file, catalogue, path), let_go=let_go, limits=catalogue.limits)

    def _fallen(self, number: int, error: FormatError | FileError) -> FellBack:
        """Set a damaged step aside, loudly. Raises the error again if it isn't about the step's bytes."""
        if isinstance(error, LimitExceeded) or (isinstance(error, FileError) and error.errno not in _LOST):
            raise error
        moved = None if isinstance(error, FileError) else set_aside(self._catalogue, number)
        where = f"it is called {os.path.basename(moved)} from now on" if moved else "it stays where it is"
        self._say(f"step {number} can't be used, {where}: {error}")
        return FellBack(number, moved or self._catalogue.path_of(number), str(error))

    def _none_whole(self, fallen: Sequence[FellBack]) -> NoReturn:
        why = f": {fallen[0].reason}" if fallen else ""
        hint = "Look at the folder with statedict runs FOLDER verify; begin anew in another folder"
        what = f"steps were committed, and none of them is whole{why}"
        raise RunError(what, errno=errno.EIO, path=self._catalogue.folder, hint=hint)

    def _say(self, text: str) -> None:
        # A training that goes on from an older step must not look like one that goes on from the newest.
        with suppress(OSError, ValueError, AttributeError):
            sys.stderr.write(f"statedict: {one_line(self._catalogue.folder)}: {visible(text, _LONGEST_LINE)}\n")


def _file(catalogue: Catalogue, path: str, name: str) -> File:
    return catalogue.storage.open_file(os.path.join(path, name))


def best_of(keep: Keep | None) -> Best | None:
    """The first policy that names a best."""
    pending: list[object] = [keep]
    while pending:
        policy = pending.pop(0)
        if isinstance(policy, Best):
            return policy
        if isinstance(policy, AnyKeep):
            pending = [*policy.policies, *pending]
    return None


def listed(numbers: Sequence[int]) -> str:
    """What there is, for a hint."""
    if not numbers:
        return "No step is committed"
    shown = ", ".join([str(number) for number in numbers[-_LISTED:]])
    return f"There is {shown}" if len(numbers) <= _LISTED else f"There are {len(numbers):,}, the last of them {shown}"
