"""One step written: the order of what is done to the disk, which is what makes a step outlive a kill and a power cut.

    1 a folder .tmp-STEP-TOKEN beside the steps      5 manifest.json, fsync
    2 each file once, hashed in passing, fsync       6 fsync of that folder
      (or a link to the step before)                 7 its rename to step-STEP, where nobody has that name
    3 state.json, fsync                              8 fsync of the run's folder: only now is the step durable

Whatever fails: the folder is removed, what was there before stays. An fsync that failed is never made again on the same file, as the
system may have dropped the pages that it couldn't write.
"""

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import NamedTuple

from statedict.errors import FileError, RunError, StateDictError, StepExists
from statedict.formats.step import (
    MANIFEST_NAME,
    STATE_NAME,
    STATE_SCHEMA,
    FileRecord,
    StepManifest,
    digest_of,
    render_step,
    step_name,
)
from statedict.io.plans import Literal, Sum, WritePlan
from statedict.manifest import Finding
from statedict.report.units import human_bytes
from statedict.runs.catalogue import TMP
from statedict.runs.components import Component, plan_component, record_of
from statedict.runs.pieces import Captured
from statedict.runs.storage import Storage

__all__ = ["Before", "OnPhase", "Phase", "StepWriter", "Written", "remove_folder", "step_exists"]

# A folder, its manifest and what the file system itself takes, beyond the files.
_MARGIN_NBYTES = 256 * 1024
# Seconds between two looks at the free space, while a save waits for it.
_LOOK_S = 1.0
_NO_LINKS = frozenset(
    {errno.EPERM, errno.EMLINK, errno.EXDEV, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.ENOENT}
)

OnPhase = Callable[[str, int, int], None]


class Phase(NamedTuple):
    """One part of a save: what it took, and the bytes that it was about."""

    seconds: float
    nbytes: int

    @property
    def gb_per_s(self) -> float:
        """10**9 bytes a second."""
        return self.nbytes / self.seconds / 1e9 if self.seconds > 0 else 0.0


class Written(NamedTuple):
    """A step that was committed."""

    step: int
    path: str
    durable: bool  # it outlives a power cut; False where the file system can't say
    nbytes: int  # of all its files
    linked_nbytes: int  # of them, not written because the step before has the very same
    phases: Mapping[str, Phase]  # "plan", "write", "fsync", "commit", "prune"
    manifest: StepManifest
    notes: tuple[Finding, ...] = ()


class Before(NamedTuple):
    """The step before, whose files may be linked: every byte of it is known to be right."""

    path: str
    manifest: StepManifest


class StepWriter:
    """Writes one step into the folder of a run, whose lock the caller holds."""

    def __init__(
        self, storage: Storage, folder: str, step: int, *, wait_s: float = 0, on_phase: OnPhase | None = None
    ) -> None:
        self.phases: dict[str, Phase] = {}
        self._storage = storage
        self._folder = folder
        self._step = step
        self._final = os.path.join(folder, step_name(step))
        self._temporary = os.path.join(folder, f"{TMP}{step}-{os.urandom(8).hex()}")
        self._wait_s = wait_s
        self._on_phase = on_phase
        self._durable = True
        self._linked_nbytes = 0

    def write(self, captured: Captured, metrics: Mapping[str, float], before: Before | None) -> Written:
        """The whole protocol. Raises ``StepExists``, ``RunError`` with the errno, ``Unsupported`` for values that can't be written."""
        try:
            with self._phase("plan"):
                manifest = None if before is None else before.manifest
                parts = [plan_component(name, piece, self._step, manifest) for name, piece in captured.pieces.items()]
            self._check_room(parts)
            self._storage.mkdir(self._temporary)
            try:
                made = self._build(parts, captured, metrics, before)
                self._commit(made.nbytes)
            except BaseException:
                remove_folder(self._storage, self._temporary)
                raise
        except OSError as error:
            raise self._refused(error) from error
        return Written(
            self._step, self._final, self._durable, made.nbytes, self._linked_nbytes, dict(self.phases), made
        )

    def _build(
        self, parts: Sequence[Component], captured: Captured, metrics: Mapping[str, float], before: Before | None
    ) -> StepManifest:
        """All files in the temporary folder, each on the disk."""
        records: dict[str, FileRecord] = {}
        for part in parts:
            for file in part.files:
                record = file.linked
                if record is None or before is None or not self._link(before, record):
                    record = record_of(file.name, file.plan, self._put(file.name, file.plan))
                records[file.name] = record
        state = self._state(parts)
        self._put(STATE_NAME, _literal(state))
        records[STATE_NAME] = FileRecord(STATE_NAME, len(state), digest_of(state))
        components = {part.name: tuple([file.name for file in part.files]) for part in parts}
        inventory = {part.name: part.inventory for part in parts}
        made = StepManifest(self._step, time.time(), records, components, inventory, metrics, captured.facts)
        data = render_step(made)
        self._put(MANIFEST_NAME, _literal(data))
        start = len('{"digest":"')
        return made._replace(digest=data[start : start + 41].decode("ascii"))

    def _state(self, parts: Sequence[Component]) -> bytes:
        body = {"components": {part.name: part.tree for part in parts}, "schema": STATE_SCHEMA, "step": self._step}
        return json.dumps(body, separators=(",", ":"), allow_nan=False).encode("ascii") + b"\n"

    def _put(self, name: str, plan: WritePlan) -> Mapping[str, Sum]:
        """Write one file, and have it on the disk."""
        file = self._storage.open_new(os.path.join(self._temporary, name), os.path.join(self._final, name), plan.nbytes)
        try:
            with self._phase("write", plan.nbytes):
                sums = file.fill(plan, on_progress=self._progress)
            with self._phase("fsync", plan.nbytes):
                self._durable &= file.fsync()
                file.keep()
        finally:
            file.discard()
        return sums

    def _progress(self, done: int, total: int) -> None:
        if self._on_phase is not None:
            self._on_phase("write", done, total)

    def _link(self, before: Before, record: FileRecord) -> bool:
        """Give a file of the step before a name in this one; False where the file system has no such thing."""
        try:
            self._storage.link(os.path.join(before.path, record.name), os.path.join(self._temporary, record.name))
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            return False
        self._linked_nbytes += record.nbytes
        return True

    def _commit(self, nbytes: int) -> None:
        storage = self._storage
        with self._phase("commit", nbytes):
            self._durable &= storage.fsync_folder(self._temporary)
            storage.rename_noreplace(self._temporary, self._final)
            try:
                self._durable &= storage.fsync_folder(self._folder)
            except BaseException:
                # Nobody was told that it is there: it goes again, so that its number is free.
                with suppress(OSError):
                    storage.rename(self._final, self._temporary)
                raise

    def _check_room(self, parts: Sequence[Component]) -> None:
        """Raise before anything is written where there isn't room, once the time to wait for it is over."""
        need = _MARGIN_NBYTES + sum([file.plan.nbytes for part in parts for file in part.files if file.linked is None])
        until = time.monotonic() + self._wait_s
        while True:
            free = self._storage.free_nbytes(self._folder)
            if free is None or free >= need:
                return
            if time.monotonic() >= until:
                break
            time.sleep(min(_LOOK_S, max(0.0, until - time.monotonic())))
        raise RunError(
            f"there isn't room for step {self._step}",
            errno=errno.ENOSPC,
            path=self._folder,
            expected=f"{human_bytes(need)} free",
            found=human_bytes(free),
            hint="Make room, or keep fewer steps; TrainingRun(..., wait_for_space_s=600) waits for it",
        )

    @contextmanager
    def _phase(self, name: str, nbytes: int = 0) -> Iterator[None]:
        if self._on_phase is not None:
            self._on_phase(name, 0, nbytes)
        start = time.perf_counter()
        try:
            yield
        finally:
            before = self.phases.get(name, Phase(0.0, 0))
            self.phases[name] = Phase(before.seconds + time.perf_counter() - start, before.nbytes + nbytes)

    def _refused(self, error: OSError) -> StateDictError:
        if isinstance(error, FileExistsError) and not isinstance(error, StateDictError):
            return step_exists(self._step, self._final)
        if isinstance(error, RunError):
            return error
        path = error.path if isinstance(error, FileError) and error.path else self._final
        hint = "Make room, or keep fewer steps" if error.errno in (errno.ENOSPC, errno.EDQUOT) else None
        return RunError.of(error, path, f"step {self._step} can't be saved", hint)


def step_exists(step: int, path: str) -> StepExists:
    """The error for a number that is taken."""
    hint = "A step is never written twice: save under another number, or into another folder"
    return StepExists(f"step {step} is committed already", errno=errno.EEXIST, path=path, hint=hint)


def _literal(data: bytes) -> WritePlan:
    return WritePlan("json", [Literal(data)])


def remove_folder(storage: Storage, folder: str) -> bool:
    """Remove a folder with its files as far as that can be done; whether it is gone."""
    try:
        names = storage.listdir(folder)
    except OSError:
        names = []
    for name in names:
        with suppress(OSError):
            storage.unlink(os.path.join(folder, name))
    try:
        storage.rmdir(folder)
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return True
