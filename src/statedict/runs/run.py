"""``RunFolder``: a folder of committed steps, and everything about it that needs no torch."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from types import TracebackType

from statedict.errors import CorruptFile, FileError, RunError, StateDictError, StepNotFound, Uncommitted
from statedict.formats.step import StepManifest
from statedict.io.plans import Literal, WritePlan
from statedict.manifest import Finding
from statedict.runs.catalogue import TMP, VERIFIED_NAME, Catalogue, Step
from statedict.runs.locks import RunLock
from statedict.runs.opening import Opener, best_of, listed
from statedict.runs.pieces import Captured, OpenedStep
from statedict.runs.policies import Best, Clock, Due, Keep, due_of, keep_of
from statedict.runs.retention import lease, leftovers, prune, set_aside, spared, surplus, sweep
from statedict.runs.signals import StopFlag
from statedict.runs.storage import LocalStorage, Progress, Storage
from statedict.runs.verification import Advance, StepCheck, Verification, check_step
from statedict.runs.writing import Before, OnPhase, Phase, StepWriter, Written, step_exists

__all__ = ["RunFolder"]

# The largest number of a step that the name of its folder is read back from.
_MOST_STEP = 10**18


class RunFolder:
    """A folder of committed steps: what is there, what is whole, and how another comes to be.

    ``keep`` says which steps stay (None: all), a number or ``Latest(3) | Best("val_loss", 2)``; ``every`` when ``should_save``
    is true (None: always). ``signals=True`` has SIGTERM and SIGUSR1 set ``should_stop``. The folder is made if its parent exists.
    Reading takes no lock and writes nothing that it needs; the first save takes the run's lock, until ``close``. Several threads may
    use one.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        keep: Keep | int | None = None,
        every: Due | int | None = None,
        signals: bool = False,
        wait_for_space_s: float = 0,
        storage: Storage | None = None,
    ) -> None:
        self.folder = os.fspath(folder)
        self.keep = None if keep is None else keep_of(keep)
        self.every = None if every is None else due_of(every)
        self.wait_for_space_s = wait_for_space_s
        self._storage: Storage = LocalStorage() if storage is None else storage
        self.catalogue = Catalogue(self.folder, self._storage)
        self._lock = self._storage.lock(self.folder)
        self._trusted: dict[int, str] = {}  # steps of which this process knows every byte, and their manifests' digests
        self._last: int | None = None
        self._since = time.monotonic()
        self._stop = StopFlag()
        self._open_folder()
        if signals:
            self._stop.watch()

    @classmethod
    def existing(cls, folder: str | os.PathLike[str], *, keep: Keep | int | None = None) -> RunFolder:
        """A run that is there; no folder is made. Raises ``RunError`` where there is none."""
        if not os.path.isdir(folder):
            refusal = OSError(errno.ENOENT if not os.path.lexists(folder) else errno.ENOTDIR, "")
            raise RunError.of(refusal, folder, "the run can't be opened")
        return cls(folder, keep=keep)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.folder!r})"

    def _open_folder(self) -> None:
        try:
            if self._storage.facts(self.folder)[0] != "file":
                return
            raise RunError("a run is a folder, and a file is there", errno=errno.ENOTDIR, path=self.folder)
        except FileNotFoundError:
            pass
        except RunError:
            raise
        except OSError as error:
            raise RunError.of(error, self.folder, "the run can't be opened") from error
        try:
            self._storage.mkdir(self.folder)
            self._storage.fsync_folder(os.path.dirname(os.path.abspath(self.folder)))
        except FileExistsError:
            return
        except OSError as error:
            hint = "Make the folder above it first" if error.errno == errno.ENOENT else None
            raise RunError.of(error, self.folder, "the run's folder can't be made", hint) from error

    # ---------------------------------------------------------------- what is there

    def steps(self) -> list[Step]:
        """The committed steps whose manifest and sizes hold, ascending. Raises ``FileError`` where the folder can't be read."""
        return self.catalogue.steps()

    def latest(self) -> Step | None:
        """The newest of them. Looks at names, manifests and sizes; reads no tensor."""
        return self.catalogue.latest()

    def best(self, metric: str, mode: str | None = None) -> Step | None:
        """The step with the best value of a metric; None where none has it. ``mode`` is needed where its name doesn't tell."""
        ranked = Best(metric, mode=mode).ranked([step.record for step in self.steps()])
        return self.catalogue.step(ranked[0].step) if ranked else None

    def verify(self, step: int | None = None, *, on_progress: Progress | None = None) -> Verification:
        """Read every byte of a step, or of all, and compare. Changes nothing, but notes in a step that it was found whole.

        ``on_progress`` is told the bytes compared and those in all. Raises ``StepNotFound`` for a number that isn't there,
        ``FileError`` for what the system doesn't let be read.
        """
        numbers = self.catalogue.numbers() if step is None else [self._existing(step)]
        return Verification(self.folder, self._checks(numbers, on_progress), leftovers=leftovers(self.catalogue))

    def _checks(self, numbers: Sequence[int], on_progress: Progress | None) -> list[StepCheck]:
        """What is found about each; nothing about one that was deleted meanwhile."""
        advance = None if on_progress is None else self._advance(numbers, on_progress)
        return [check for number in numbers if (check := self._verified(number, advance)) is not None]

    def _advance(self, numbers: Sequence[int], on_progress: Progress) -> Advance:
        done = total = 0
        for number in numbers:
            with suppress(CorruptFile, FileError):
                total += self.catalogue.manifest(number).nbytes

        def advance(nbytes: int) -> None:
            nonlocal done
            done += nbytes
            on_progress(min(done, total), total)

        return advance

    def _verified(self, number: int, advance: Advance | None = None) -> StepCheck | None:
        path = self.catalogue.path_of(number)
        try:
            holding = lease(self._storage, path)
        except FileNotFoundError:
            if number not in self.catalogue.numbers():
                return None  # it was deleted meanwhile
            holding = None
        try:
            check = check_step(self.catalogue, number, advance)
            self._note(path, self.catalogue.manifest(number) if check.ok else None)
            return check
        finally:
            if holding is not None:
                holding.let_go()

    def _note(self, path: str, whole: StepManifest | None) -> None:
        """Note in a step that it is whole, or take back that it was; as far as the file system lets that be written."""
        mark = os.path.join(path, VERIFIED_NAME)
        with suppress(OSError):
            self._storage.unlink(mark)
        if whole is None:
            return
        self._trusted[whole.step] = whole.digest
        text = f'{{"digest":"{whole.digest}","schema":"statedict.verified/1","time":{time.time():.3f}}}\n'
        data = text.encode("ascii")
        with suppress(OSError):
            file = self._storage.open_new(mark, mark, len(data))
            try:
                file.fill(WritePlan("json", [Literal(data)]))
                file.keep()
            finally:
                file.discard()

    def _existing(self, step: int) -> int:
        numbers = self.catalogue.numbers()
        if step in numbers:
            return step
        if any(name.startswith(f"{TMP}{step}-") for name in self.catalogue.names()):
            raise Uncommitted(f"step {step} was begun, but never committed", path=self.folder, hint=listed(numbers))
        raise StepNotFound(f"there is no step {step}", path=self.folder, hint=listed(numbers))

    # ---------------------------------------------------------------- reading

    def open_step(self, step: int | str = "latest", *, check: bool = True) -> OpenedStep | None:
        """A step for reading, of which every digest was compared (``check=False``: its manifest and sizes only).

        ``"latest"`` and ``"best"`` (what ``keep=Best(…)`` names) fall back to the next one where a step is damaged: that one is renamed
        to ``step-….damaged``, said on stderr, and listed in ``fell_back``. A number is that step or none. None is given only where no step
        was ever committed. Raises ``StepNotFound``, ``CorruptFile`` for a damaged step of that number, ``RunError`` where all are damaged.
        """
        opener = Opener(self.catalogue, self._trusted, check=check)
        if isinstance(step, int) and not isinstance(step, bool):
            opened: OpenedStep | None = opener.exactly(self._existing(step))
        elif step == "latest":
            opened = opener.first_of(self.catalogue.numbers()[::-1])
        elif step == "best":
            opened = opener.first_of(opener.ranked(best_of(self.keep)))
        else:
            raise RunError("a step is a number, 'latest' or 'best'", path=self.folder, found=repr(step))
        if opened is not None:
            self._last = opened.step
        return opened

    # ---------------------------------------------------------------- writing

    def write(
        self,
        step: int,
        captured: Captured,
        *,
        metrics: Mapping[str, float] | None = None,
        on_phase: OnPhase | None = None,
    ) -> Written:
        """Commit a step: when this returns it is durable, and only then are old ones deleted. Nothing is left where it fails.

        ``on_phase`` is told the phase, and bytes done and in all. Raises ``StepExists``, ``RunError`` with the errno (another
        writer, no room, a refusal of the disk), and ``Unsupported`` for values that can't be written.
        """
        number = _checked_step(step)
        values = _checked_metrics(metrics or {})
        with self._writing():
            sweep(self.catalogue)
            self._check_free(number)
            writer = StepWriter(self._storage, self.folder, number, wait_s=self.wait_for_space_s, on_phase=on_phase)
            written = writer.write(captured, values, self._before())
            self._trusted = {number: written.manifest.digest}
            self.note_begun(number)
            return self._retained(written)

    def _writing(self) -> RunLock:
        try:
            self._lock.take()
        except RunError:
            raise
        except OSError as error:
            raise RunError.of(error, self.folder, "the run can't be written to") from error
        return self._lock

    def _check_free(self, step: int) -> None:
        if not _is_free(self.catalogue, step):
            raise step_exists(step, self.catalogue.path_of(step))

    def _before(self) -> Before | None:
        """The newest step of which this process knows every byte: only its files are linked, so that no damage is handed on."""
        for step in sorted(self._trusted, reverse=True):
            try:
                found = self.catalogue.manifest(step)
            except (StateDictError, OSError):
                continue
            if found.digest == self._trusted[step]:
                return Before(self.catalogue.path_of(step), found)
        return None

    def _retained(self, written: Written) -> Written:
        """Delete what isn't kept, now that the new step is durable. That this fails doesn't undo the step: it is noted."""
        if self.keep is None:
            return written
        start = time.perf_counter()
        try:
            removed = prune(self.catalogue, self._victims())
        except (StateDictError, OSError) as error:
            note = Finding("not-pruned", "warning", str(error))
            return written._replace(notes=(*written.notes, note))
        phase = Phase(time.perf_counter() - start, sum([step.nbytes for step in removed]))
        return written._replace(phases={**written.phases, "prune": phase})

    def prune(self) -> list[Step]:
        """Delete the steps that ``keep`` doesn't keep, and what dead writers have left; gives the steps that are gone."""
        with self._writing():
            sweep(self.catalogue)
            if self.keep is None:
                return []
            return prune(self.catalogue, self._victims())

    def _victims(self) -> list[Step]:
        """The surplus, once a step that stays is known to be whole."""

        def is_whole(step: Step) -> bool:
            check = self._verified(step.step)
            return check is not None and check.ok

        steps, victims = self.steps(), self.surplus()
        return spared(steps, victims, lambda step: step.step in self._trusted, is_whole) if victims else []

    def surplus(self) -> list[Step]:
        """The steps that ``keep`` doesn't keep; ``prune`` deletes them."""
        return [] if self.keep is None else surplus(self.steps(), self.keep, time.time())

    def repair(self, *, on_progress: Progress | None = None) -> Verification:
        """Verify all steps, rename the damaged ones to ``step-….damaged``, and remove what dead writers have left."""
        with self._writing():
            checks = self._checks(self.catalogue.numbers(), on_progress)
            aside = [set_aside(self.catalogue, check.step) for check in checks if not check.ok]
            swept = sweep(self.catalogue)
        left = leftovers(self.catalogue)
        return Verification(
            self.folder, checks, set_aside=[path for path in aside if path], swept=swept, leftovers=left
        )

    # ---------------------------------------------------------------- when

    @property
    def should_stop(self) -> bool:
        """Whether the system has asked that training ends (``signals=True``): save at the next step, and end."""
        return self._stop.is_set

    def should_save(self, step: int) -> bool:
        """Whether ``every`` says that this step is due, or the system wants training to end; never for one that is committed."""
        if self._last is None:
            self._last = next(reversed(self.catalogue.numbers()), 0)
        minutes = (time.monotonic() - self._since) / 60
        is_due = self.every is None or self.should_stop or self.every.is_due(Clock(step, self._last, minutes))
        return is_due and _is_free(self.catalogue, step)

    def note_begun(self, step: int) -> None:
        """Count from this step on, which is being saved: for ``should_save`` while a save is under way."""
        self._last = step
        self._since = time.monotonic()

    def close(self) -> None:
        """Let the run's lock go, and give the signals back. A second call does nothing."""
        self._stop.close()
        self._lock.let_go()

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _is_free(catalogue: Catalogue, step: int) -> bool:
    """Whether no step of that number is committed."""
    try:
        catalogue.storage.facts(catalogue.path_of(step))
    except OSError:
        return True
    return False


def _checked_step(step: object) -> int:
    try:
        number = int(step.__index__())  # type: ignore[attr-defined]
    except (AttributeError, TypeError):
        number = -1
    if isinstance(step, bool) or not 0 <= number < _MOST_STEP:
        raise StateDictError("the number of a step is a whole number of at least 0", found=repr(step))
    return number


def _checked_metrics(metrics: Mapping[str, object]) -> dict[str, float]:
    """The metrics as Python's floats: numbers, and whatever can become one, such as a tensor with one element."""
    made = {}
    for name, value in metrics.items():
        try:
            made[str(name)] = float(value)  # type: ignore[arg-type]
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:  # noqa: PERF203
            raise StateDictError("a metric is a number", key=str(name), found=type(value).__name__) from error
    return made
