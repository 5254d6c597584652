"""How a model has moved over the steps of a run: norms, changes, and the first NaN.

A few steps are open at a time, and each tensor is read through all of them before the next. So every byte of a step is read once, but
for those of one step in fifteen, with which the next few are compared. What records the same digest as the step before, as files that
are linked do, isn't read at all. Memory is a few blocks, and the figures of each module at each step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from threading import Lock

from statedict.errors import CorruptFile, KeyNotFound, StateDictError, StepNotFound
from statedict.io.engine import cpus
from statedict.io.workers import Workers
from statedict.keys import near
from statedict.manifest import Finding
from statedict.ops.courses import Course, CourseRoom, Stop, follow
from statedict.ops.trend_report import ModuleTrend, Trend
from statedict.ops.trend_sources import MeasuredStep, component_of
from statedict.ops.trend_totals import Totals
from statedict.runs.catalogue import Step
from statedict.runs.opening import Opener
from statedict.runs.run import RunFolder

__all__ = ["Progress", "trend"]

# Steps that are open at a time, one of them for comparison: each takes a descriptor for its lease and for every file of its model.
_OPEN_STEPS = 16
# More threads than this only wait for the memory.
_MOST_THREADS = 8
# Bytes from which on a second thread is worth its start.
_SHARED_NBYTES = 16 * 1024 * 1024

Progress = Callable[[int, int], None]


def trend(
    run: RunFolder,
    *,
    only: str | Iterable[str] = (),
    last: int | None = None,
    component: str | None = None,
    on_progress: Progress | None = None,
) -> Trend:
    """Norm, change, update ratio, largest number, NaN and Inf of a model's floating numbers, step by step and module by module.

    ``only`` are globs: keys that one of them matches as a whole are looked at. ``last``: the newest so many steps. ``component`` is
    needed where nothing says which is the model. Tied tensors count once; sums are in float64, of the finite numbers.
    ``on_progress`` is told the bytes done and in all, as far as that can be known.

    Raises ``StepNotFound`` where no step is committed, ``KeyNotFound`` for a component or a key that isn't there, and what reading
    raises. A step that can't be opened becomes a finding, and so do bytes that aren't as they were written.
    """
    steps = run.steps()
    if not steps:
        raise StepNotFound("no step is committed, so there is nothing to look at", path=run.folder)
    if last is not None and (type(last) is not int or last < 1):
        raise StateDictError("that is no number of steps", expected="a whole number of at least 1", found=last)
    globs = (only,) if isinstance(only, str) else tuple(only)
    newest = steps[-1]
    named = component_of(run.catalogue.manifest(newest.step), newest.path, component)
    return _Trend(run, globs, named, on_progress).of(steps if last is None else steps[-last:])


class _Trend:
    """One trend on its way."""

    def __init__(self, run: RunFolder, globs: Sequence[str], component: str, on_progress: Progress | None) -> None:
        self._run, self._globs, self._component, self._on_progress = run, globs, component, on_progress
        self._opener = Opener(run.catalogue, {}, check=False)
        self._totals = Totals()
        self._unread: list[Finding] = []
        self._lock = Lock()
        self._opened = 0
        self._done_nbytes = self._all_nbytes = 0

    def of(self, steps: Sequence[Step]) -> Trend:
        """All of the steps, a few at a time."""
        self._note_uncounted(steps)
        carried: MeasuredStep | None = None
        with ExitStack() as stack:
            for first in range(0, len(steps), _OPEN_STEPS - 1):
                opened = [] if carried is None else [carried]
                for step in steps[first : first + _OPEN_STEPS - 1]:
                    measured = self._open(step)
                    if measured is not None:
                        stack.callback(measured.close)
                        self._totals.add_step(step, measured, opened[-1] if opened else None)
                        opened.append(measured)
                if opened and opened[-1] is not carried:
                    self._read(opened, carried, len(steps))
                    for measured in opened[:-1]:
                        measured.close()
                    carried = opened[-1]
            modules = self._totals.modules()
            if self._globs and carried is not None and not modules:
                raise self._no_match(carried.keys)
        return self._made(modules)

    def _no_match(self, keys: Sequence[str]) -> KeyNotFound:
        glob = self._globs[0]
        hint = f"There is: {', '.join(near(glob, keys) or keys[:5])}"
        return KeyNotFound("no tensor of floating numbers matches", path=self._run.folder, key=glob, hint=hint)

    def _made(self, modules: Sequence[ModuleTrend]) -> Trend:
        totals = self._totals
        found = [*totals.findings(), *self._unread]
        found.sort(key=lambda finding: ("error", "warning", "info").index(finding.level))
        return Trend(
            self._run.folder,
            self._component,
            totals.steps(),
            modules,
            first_non_finite=totals.first_non_finite,
            frozen=totals.frozen,
            findings=found,
            nbytes=(totals.nbytes, totals.nbytes - totals.spared_nbytes),
        )

    def _note_uncounted(self, steps: Sequence[Step]) -> None:
        """Say which steps are left out because their manifest or sizes don't hold."""
        whole = [step.step for step in self._run.steps()]
        oldest = 0 if whole[:1] == [steps[0].step] else steps[0].step
        damaged = [str(n) for n in self._run.catalogue.numbers() if n not in whole and n >= oldest]
        if damaged:
            text = f"not counted, as their manifest or sizes don't hold: step {', '.join(damaged[:5])}"
            text += f" and {len(damaged) - 5} more" if len(damaged) > 5 else ""
            self._unread.append(Finding("damaged-step", "error", text))

    def _open(self, step: Step) -> MeasuredStep | None:
        """The step, or None and a finding where it can't be read: it was deleted meanwhile, or a header isn't as it was written."""
        opened = None
        try:
            opened = self._opener.exactly(step.step)
            measured = MeasuredStep(self._opened, opened, self._component, self._globs)
        except (CorruptFile, KeyNotFound) as error:
            if opened is not None:
                opened.close()
            is_there = step.step in self._run.catalogue.numbers()
            level = "error" if isinstance(error, CorruptFile) and is_there else "info"
            self._unread.append(Finding("unread-step", level, f"step {step.step} is left out: {error}"))
            return None
        except BaseException:
            if opened is not None:
                opened.close()
            raise
        self._opened += 1
        return measured

    def _read(self, opened: Sequence[MeasuredStep], carried: MeasuredStep | None, steps: int) -> None:
        """Each tensor through these of so many steps; ``carried`` is the first of them, whose figures are known."""
        keys = list(dict.fromkeys([key for measured in opened for key in measured.tensors]))
        self._totals.choose_modules(keys)
        self._all_nbytes = self._all_nbytes or opened[-1].nbytes * steps
        found: dict[str, list[Course]] = {}
        pending = iter(keys)

        def work() -> None:
            room = CourseRoom()
            while not workers.stopped:
                with self._lock:
                    key = next(pending, None)
                if key is None:
                    return
                stops = [Stop(each.at, each.side(key)) for each in opened if key in each.tensors]
                is_known = carried is not None and stops[0].at == carried.at
                found[key] = follow(stops, room, self._totals.latest[key] if is_known else None)
                self._progress(stops[int(is_known) :])

        is_large = sum([measured.nbytes for measured in opened]) > _SHARED_NBYTES
        workers = Workers(min(_MOST_THREADS, cpus()) if is_large else 1)
        workers.run(work)
        by_number = {measured.at: measured for measured in opened}
        latest = {}
        for key in keys:
            courses = found[key]
            self._totals.take(key, courses, [by_number[course.at].tensors[key].nbytes for course in courses])
            if courses and courses[-1].at == opened[-1].at:
                latest[key] = courses[-1].motion
        self._totals.latest = latest

    def _progress(self, stops: Sequence[Stop]) -> None:
        if self._on_progress is not None:
            with self._lock:
                self._done_nbytes += sum([stop.side.entry.nbytes for stop in stops])
                self._on_progress(min(self._done_nbytes, self._all_nbytes), self._all_nbytes)
