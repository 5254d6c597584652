"""``TrainingRun``: a run's folder with ``save`` and ``restore`` of a training state.

Nothing here knows torch: the state brings what it needs (``Capturable``).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, nullcontext, suppress
from threading import RLock
from types import TracebackType
from typing import TYPE_CHECKING, Any

from statedict.errors import KeyNotFound, StateDictError, StepExists, one_line
from statedict.keys import near
from statedict.report.units import human_bytes, plural
from statedict.runs.pieces import Capturable, Captured, FellBack, OpenedStep
from statedict.runs.policies import Due, Keep
from statedict.runs.run import RunFolder
from statedict.runs.saving import Saved, duration
from statedict.runs.writing import Phase

if TYPE_CHECKING:
    from statedict.ops.trend_report import Trend

__all__ = ["Restored", "TrainingRun"]

# Differences that the line about a restored step names.
_NAMED = 3


class Restored:
    """What ``restore`` has done: ``step``, ``path``, ``metrics``, ``facts`` (of the step), ``differences`` (of the environment and the
    hyperparameters), ``report`` (what the state says of its loading), ``fell_back`` (newer steps that couldn't be used), ``seconds``
    (from the look for the step on) and ``nbytes`` (of the step, all of which are compared).
    """

    def __init__(self, opened: OpenedStep, report: object, seconds: float) -> None:
        self.seconds = seconds
        self.nbytes = opened.manifest.nbytes
        self.step = opened.step
        self.path = opened.path
        self.metrics = dict(opened.metrics)
        self.facts = dict(opened.facts)
        self.differences: Any = getattr(report, "differences", ())
        self.report: Any = getattr(report, "report", report)
        self.fell_back: tuple[FellBack, ...] = opened.fell_back

    def __str__(self) -> str:
        """``step 1000: 1.20 GB restored in 0.4 s (3 GB/s), 1 difference (optimizer.0.lr), fell back from step 2000``."""
        rate = Phase(self.seconds, self.nbytes).gb_per_s
        text = f"step {self.step}: {human_bytes(self.nbytes)} restored in {duration(self.seconds)} ({rate:.3g} GB/s)"
        names = [one_line(getattr(found, "name", found)) for found in self.differences]
        if names:
            more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
            text += f", {plural(len(names), 'difference')} ({', '.join(names[:_NAMED])}{more})"
        if self.fell_back:
            text += f", fell back from step {', '.join([str(fallen.step) for fallen in self.fell_back])}"
        return text

    def __repr__(self) -> str:
        return f"Restored({self.step}, {self.path!r}{', fell back' if self.fell_back else ''})"


def _still(state: Capturable) -> AbstractContextManager[Captured]:
    """The state over memory that doesn't change until the block is left: its own, if it can be held still, else a copy."""
    still: Callable[[], AbstractContextManager[Captured]] | None = getattr(state, "still", None)
    return nullcontext(state.capture()) if still is None else still()


def _record(state: Capturable, saved: Saved) -> None:
    """Have the state record what the next step comes to, if it can."""
    record: Callable[[Saved], None] | None = getattr(state, "record_next_step", None)
    if record is not None:
        record(saved)


def _nbytes_of(captured: Captured) -> int:
    return sum([entry.nbytes for piece in captured.pieces.values() for entry in piece.manifest.tensors.values()])


class TrainingRun(RunFolder):
    """A training run on disk: ``save`` commits steps, ``restore`` brings the newest whole one back.

        with TrainingRun("run", keep=Latest(3) | Best("val_loss"), every=Steps(1000)) as run:
            run.restore(state)
            ...
            if run.should_save(step):
                run.save(step, state, metrics={"val_loss": loss}, wait=False)

    ``save_on_exception`` is a state that is saved, under its own ``step``, when the ``with`` block ends in an error. All else is as in
    ``RunFolder``.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        keep: Keep | int | None = None,
        every: Due | int | None = None,
        signals: bool = False,
        wait_for_space_s: float = 0,
        save_on_exception: Capturable | None = None,
    ) -> None:
        super().__init__(folder, keep=keep, every=every, signals=signals, wait_for_space_s=wait_for_space_s)
        self._rescued = save_on_exception
        self._under_way: Saved | None = None
        self._updating = RLock()

    def updating(self) -> RLock:
        """``with run.updating():`` around a change of the state: no save that another thread begins captures half of it."""
        return self._updating

    def save(
        self, step: int, state: Capturable, *, metrics: dict[str, float] | None = None, wait: bool = True
    ) -> Saved:
        """Commit a step. ``wait=False`` returns once the state is copied, and writes in a thread; one save is under way at a time.

        An error of the one before is raised here, and by ``close``. Raises what ``RunFolder.write`` and the state's ``capture`` do.
        """
        start = time.perf_counter()
        self.finish()
        saved = Saved(step, self.catalogue.path_of(step))
        self._check_free(step)
        if wait:
            with self._updating, _still(state) as captured:
                saved.captured_in(time.perf_counter() - start, _nbytes_of(captured))
                saved.run(lambda: self.write(step, captured, metrics=metrics))
                # While the state is still: a step of another thread that waits for this is the one that follows.
                _record(state, saved)
        else:
            with self._updating:
                copied = state.capture()
                _record(state, saved)
            saved.captured_in(time.perf_counter() - start, _nbytes_of(copied))
            self.note_begun(step)
            self._under_way = saved
            saved.start(lambda: self.write(step, copied, metrics=metrics))
        saved.blocked_ms = (time.perf_counter() - start) * 1e3
        return saved

    def trend(
        self, *, only: str | Collection[str] = (), last: int | None = None, component: str | None = None
    ) -> Trend:
        """How the model has moved over the steps: norms, changes and update ratios by step and module, the first NaN.

        ``only`` are globs for keys, ``last`` the newest so many steps, ``component`` another than the model. Reads each step once, and
        needs numpy. Raises as ``statedict.ops.trend.trend`` does.
        """
        from statedict.ops.trend import trend

        return trend(self, only=only, last=last, component=component)

    def finish(self) -> None:
        """Wait for the save that is under way. Raises the error that made it fail, once."""
        saved, self._under_way = self._under_way, None
        if saved is not None:
            saved.raise_unseen()

    def restore(
        self,
        state: Capturable,
        *,
        step: int | str = "latest",
        only: Collection[str] | None = None,
        keep_hyperparameters: Collection[str] = (),
        **options: object,
    ) -> Restored | None:
        """Bring a step back into the state; None on a first run, where no step was ever committed.

        Every digest is compared before anything is changed. A damaged step is set aside, and the next older one taken, which is said.
        ``only`` names components; what else a state can be told (``rules``, ``verify_next_step``) is handed on. Raises what
        ``open_step`` and the state's ``apply`` do.
        """
        self.finish()
        start = time.perf_counter()
        opened = self.open_step(step)
        if opened is None:
            return None
        with opened, self._updating:
            for name in only or ():
                if name not in opened.names:
                    hint = f"There is: {', '.join(near(name, opened.names) or opened.names)}"
                    raise KeyNotFound("the step has no such component", path=opened.path, key=name, hint=hint)
            given = {name: value for name, value in options.items() if value}
            report = state.apply(opened, only=only, keep_hyperparameters=keep_hyperparameters, **given)
            return Restored(opened, report, time.perf_counter() - start)

    def close(self) -> None:
        """Wait for the save that is under way, then as ``RunFolder``. Raises the error that made that save fail."""
        try:
            self.finish()
        finally:
            super().close()

    def __enter__(self) -> TrainingRun:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
            return
        # The error that ended the block is the one to be seen.
        with suppress(StateDictError):
            self.finish()
        try:
            self._rescue(error)
        finally:
            super().close()

    def _rescue(self, error: BaseException) -> None:
        state = self._rescued
        step = getattr(state, "step", None)
        if state is None or not isinstance(step, int):
            return
        try:
            self.save(step, state)
        except StepExists:
            return
        except StateDictError as refusal:
            if hasattr(error, "add_note"):
                error.add_note(f"step {step} couldn't be saved: {refusal}")
