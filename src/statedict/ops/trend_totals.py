"""The figures of single tensors put together: by step, by module and step, and what of it is worth a sentence."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from statedict.manifest import Finding
from statedict.numerics.motion import Motion
from statedict.ops.comparing.parts import parts_of
from statedict.ops.courses import Course
from statedict.ops.findings import named
from statedict.ops.trend_report import Figures, ModuleTrend, NonFinite, StepTrend
from statedict.ops.trend_sources import MeasuredStep, depth_of, module_of
from statedict.report.units import plural
from statedict.runs.catalogue import Step

__all__ = ["Totals"]

# Findings of one kind before the rest is only counted, and parts that one sentence lists.
_MOST, _MOST_PARTS = 8, 6


class _Total:
    """The figures of several tensors at one step."""

    __slots__ = ("_motion", "_tensors")

    def __init__(self) -> None:
        self._motion = Motion()
        self._tensors = 0

    def add(self, course: Course) -> None:
        self._motion.merge(course.motion)
        self._tensors += 1

    def figures(self) -> Figures:
        made = self._motion
        norm, largest = (made.norm, made.largest) if made.finite else (None, None)
        return Figures(self._tensors, norm, made.change if made.compared else None, largest, made.nan, made.inf)


class Totals:
    """What is known of the steps so far. ``latest`` has the figures of each tensor at the newest of them."""

    def __init__(self) -> None:
        self.latest: dict[str, Motion] = {}
        self.nbytes = self.spared_nbytes = 0
        self._steps: list[Step] = []
        self._totals: list[_Total] = []
        self._depth = 0
        self._modules: dict[str, str] = {}  # the module of each key
        self._by_module: dict[str, dict[int, _Total]] = {}
        self._compared: set[str] = set()
        self._moved: set[str] = set()
        self._bad: list[tuple[str, int, int]] = []
        self._bad_at = -1
        self._news: list[Finding] = []
        self._damaged: dict[int, list[str]] = {}
        self._left_out: dict[str, dict[str, None]] = {}

    def add_step(self, step: Step, measured: MeasuredStep, before: MeasuredStep | None) -> None:
        """Begin with another step, behind all others."""
        self._steps.append(step)
        self._totals.append(_Total())
        for reason, keys in measured.left_out.items():
            self._left_out.setdefault(reason, {}).update(dict.fromkeys(keys))
        if before is not None:
            self._compare_keys(measured, before)

    def _compare_keys(self, measured: MeasuredStep, before: MeasuredStep) -> None:
        now, then = measured.tensors, before.tensors
        kinds = {
            "new": [key for key in now if key not in then],
            "gone": [key for key in then if key not in now],
            "of another shape": [key for key in now if key in then and now[key].shape != then[key].shape],
        }
        for what, keys in kinds.items():
            if keys:
                verb = "is" if len(keys) == 1 else "are"
                text = f"at step {measured.step}, {plural(len(keys), 'tensor')} {verb} {what}, without a change to tell"
                self._news.append(Finding("other-tensors", "info", f"{text}: {named(keys)}", tuple(keys)))

    def take(self, key: str, courses: Sequence[Course], nbytes: Sequence[int]) -> None:
        """Take in what was found of a tensor at some steps, and the bytes that it has there."""
        module = self._module(key)
        for course, size in zip(courses, nbytes):
            self._totals[course.at].add(course)
            self._by_module.setdefault(module, {}).setdefault(course.at, _Total()).add(course)
            self.nbytes += size
            self.spared_nbytes += 0 if course.is_read else size
            if course.is_compared:
                self._compared.add(key)
            if course.is_compared and course.is_read and (course.motion.change > 0 or not course.motion.is_finite):
                self._moved.add(key)
            if course.is_damaged:
                self._damaged.setdefault(course.at, []).append(key)
            if not course.motion.is_finite:
                self._note_bad(key, course)

    def choose_modules(self, keys: Sequence[str]) -> None:
        """Divide the tensors into modules as it suits the first keys that there are; before any is taken in."""
        if keys and not self._depth:
            self._depth = depth_of(keys)

    def _module(self, key: str) -> str:
        return self._modules.setdefault(key, module_of(key, self._depth))

    def _note_bad(self, key: str, course: Course) -> None:
        if self._bad_at < 0 or course.at < self._bad_at:
            self._bad, self._bad_at = [], course.at
        if course.at == self._bad_at:
            self._bad.append((key, course.motion.nan, course.motion.inf))

    # ---------------------------------------------------------------- what it comes to

    def steps(self) -> list[StepTrend]:
        """A line for each step."""
        return [
            StepTrend(step.step, step.time, step.metrics, total.figures())
            for step, total in zip(self._steps, self._totals)
        ]

    def modules(self) -> list[ModuleTrend]:
        """A line for each module, in the order of the keys."""
        keys: dict[str, list[str]] = {}
        for key, module in self._modules.items():
            keys.setdefault(module, []).append(key)
        still = self._compared - self._moved
        found = []
        for name, members in keys.items():
            totals = self._by_module[name]
            figures = [totals[at].figures() if at in totals else None for at in range(len(self._steps))]
            found.append(ModuleTrend(name, len(members), still.issuperset(members), tuple(figures)))
        return found

    @property
    def first_non_finite(self) -> NonFinite | None:
        """The first step with NaN or Inf."""
        return NonFinite(self._steps[self._bad_at].step, tuple(self._bad)) if self._bad else None

    @property
    def frozen(self) -> list[str]:
        """The largest subtrees of which nothing has changed."""
        still = [key for key in self._modules if key in self._compared and key not in self._moved]
        return [part.name for part in parts_of(still, self._modules)]

    def findings(self) -> Iterator[Finding]:
        """What is worth a sentence, the gravest first."""
        if self._bad:
            yield self._non_finite()
        for at, keys in self._damaged.items():
            verb = "isn't as it was" if len(keys) == 1 else "aren't as they were"
            text = f"{plural(len(keys), 'tensor')} of step {self._steps[at].step} {verb} written, the digest differs"
            yield Finding("damaged", "error", f"{text}: {named(keys)}", tuple(keys))
        if self._compared and not self._moved:
            yield Finding("frozen", "warning", f"nothing changes {self._span}")
        elif self.frozen:
            yield self._frozen()
        yield from self._news[:_MOST]
        if len(self._news) > _MOST:
            yield Finding("other-tensors", "info", f"and {len(self._news) - _MOST} more changes of that kind")
        for reason, names in self._left_out.items():
            keys = list(names)
            text = f"{plural(len(keys), 'tensor')} left out ({reason}): {named(keys)}"
            yield Finding("left-out", "info", text, tuple(keys))

    def _non_finite(self) -> Finding:
        key, nan, inf = self._bad[0]
        counts = " and ".join([f"{count:,} {what}" for count, what in ((nan, "NaN"), (inf, "Inf")) if count])
        more = f" and {plural(len(self._bad) - 1, 'more tensor')}" if len(self._bad) > 1 else ""
        step = self._steps[self._bad_at].step
        when = "already at" if not self._bad_at else "first at"
        text = f"NaN or Inf {when} step {step}: {named([key])} ({counts}){more}"
        if self._bad_at:
            text += f"; step {self._steps[self._bad_at - 1].step} has none"
        return Finding("non-finite", "error", text, tuple([bad[0] for bad in self._bad]))

    def _frozen(self) -> Finding:
        parts = self.frozen
        shown = ", ".join([named([part]) for part in parts[:_MOST_PARTS]])
        rest = f" and {len(parts) - _MOST_PARTS} more" if len(parts) > _MOST_PARTS else ""
        return Finding("frozen", "info", f"frozen {self._span}: {shown}{rest}", tuple(parts))

    @property
    def _span(self) -> str:
        return f"from step {self._steps[0].step} to {self._steps[-1].step}"
