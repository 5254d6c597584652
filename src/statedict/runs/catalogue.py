"""Which steps a run has: folders with a manifest that holds, and files of the sizes that it gives. Nothing is changed here."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from statedict.errors import CorruptFile, FileError, StateDictError
from statedict.formats.step import MANIFEST_NAME, StepManifest, parse_step, step_name, step_number
from statedict.limits import DEFAULT_LIMITS, Limits
from statedict.runs.policies import Record
from statedict.runs.storage import Storage

__all__ = ["NEXT_STEP_NAME", "TMP", "TRASH", "VERIFIED_NAME", "Catalogue", "Step", "is_set_aside"]

# What a step is called while it is written, and while it is deleted.
TMP = ".tmp-"
TRASH = ".trash-"
DAMAGED_MARK = ".damaged"
# Says in a step that every byte of it was read and compared; written by ``verify``, and not part of the step.
VERIFIED_NAME = "verified.json"
# What the parameters were after the step that followed; written by a training state, and not part of the step.
NEXT_STEP_NAME = "next-step.json"


class Step(NamedTuple):
    """A committed step whose manifest and sizes hold."""

    step: int
    path: str
    time: float  # seconds since 1970
    nbytes: int  # of all its files
    metrics: Mapping[str, float]
    verified: bool  # every byte of it was read and compared since it was written

    @property
    def record(self) -> Record:
        """What retention knows of it."""
        return Record(self.step, self.time, self.metrics)


def is_set_aside(name: str) -> bool:
    """Whether this is the name of a step that was found damaged: ``step-00001000.damaged``, ``….damaged-2``."""
    stem, mark, rest = name.partition(DAMAGED_MARK)
    return bool(mark) and step_number(stem) is not None and (not rest or rest[1:].isdecimal())


class Catalogue:
    """The steps of one folder. What was read of a manifest is kept as long as its file is the same."""

    def __init__(self, folder: str, storage: Storage, limits: Limits = DEFAULT_LIMITS) -> None:
        self.folder = folder
        self.storage = storage
        self.limits = limits
        self._known: dict[int, tuple[object, StepManifest]] = {}

    def path_of(self, step: int) -> str:
        """Where a step is, or would be."""
        return os.path.join(self.folder, step_name(step))

    def names(self) -> list[str]:
        """All names in the folder; none where there is no folder. Raises ``FileError``."""
        try:
            return self.storage.listdir(self.folder)
        except FileNotFoundError:
            return []
        except OSError as error:
            raise FileError.of(error, self.folder, "the run can't be read") from error

    def numbers(self) -> list[int]:
        """The numbers of all committed steps, ascending, damaged ones among them that nobody has met yet."""
        return sorted([step for step in map(step_number, self.names()) if step is not None])

    def manifest(self, step: int, *, anew: bool = False) -> StepManifest:
        """The manifest of a step, once it holds and every file has its size. Raises ``CorruptFile`` or ``FileError``.

        ``anew`` reads it even where its file seems to be the same: rot changes neither times nor sizes.
        """
        folder = self.path_of(step)
        path = os.path.join(folder, MANIFEST_NAME)
        identity = self._facts(path)[2]
        kept = self._known.get(step)
        if anew or kept is None or kept[0] != identity:
            kept = self._known[step] = (identity, self._read(path))
        found = kept[1]
        if found.step != step:
            what = f"this is a copy of step {found.step} under the number of another"
            raise CorruptFile(what, path=folder, expected=f"step {step}", found=found.step)
        for record in found.files.values():
            nbytes = self._facts(os.path.join(folder, record.name))[1]
            if nbytes != record.nbytes:
                what = "the file has another size than when it was written"
                where = os.path.join(folder, record.name)
                raise CorruptFile(what, path=where, expected=f"{record.nbytes} bytes", found=nbytes)
        return found

    def _read(self, path: str) -> StepManifest:
        file = self.storage.open_file(path)
        try:
            self.limits.check("header_bytes", file.nbytes, "the manifest is too long", path=path)
            return parse_step(file.read(0, file.nbytes), path, self.limits)
        finally:
            file.close()

    def _facts(self, path: str) -> tuple[str, int, object]:
        """The facts of a file of a step. Raises ``CorruptFile`` where it is gone, or is something else."""
        try:
            facts = self.storage.facts(path)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise CorruptFile("a file of the step is missing", path=path) from error
        except OSError as error:
            raise FileError.of(error, path, "can't be read") from error
        if facts[0] != "file":
            raise CorruptFile("a file of the step is something else now", path=path, found=facts[0])
        return facts

    def steps(self) -> list[Step]:
        """The steps whose manifest and sizes hold, ascending."""
        return list(self._whole(self.numbers()))

    def latest(self) -> Step | None:
        """The newest of them; reads no more manifests than it takes to find one that holds."""
        return next(self._whole(reversed(self.numbers())), None)

    def _whole(self, numbers: Iterator[int] | list[int]) -> Iterator[Step]:
        for number in numbers:
            try:
                yield self.step(number)
            except StateDictError:  # noqa: PERF203
                continue

    def step(self, number: int) -> Step:
        """One step. Raises as ``manifest`` does."""
        found = self.manifest(number)
        path = self.path_of(number)
        return Step(number, path, found.time, found.nbytes, found.metrics, self._is_verified(path, found))

    def _is_verified(self, path: str, found: StepManifest) -> bool:
        mark = os.path.join(path, VERIFIED_NAME)
        try:
            if self.storage.facts(mark)[1] > 4096:
                return False
            file = self.storage.open_file(mark)
        except (OSError, StateDictError):
            return False
        try:
            return found.digest.encode("ascii") in file.read(0, file.nbytes)
        except StateDictError:
            return False
        finally:
            file.close()
