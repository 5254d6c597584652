"""How a model has moved from step to step, as facts and as a document."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from math import isfinite
from typing import NamedTuple

from statedict.manifest import Finding
from statedict.ops.listing import notes_of
from statedict.report.document import Block, Column, Document, Facts, Heading, Paragraph, Table
from statedict.report.result import Result
from statedict.report.units import human_bytes, number, plural

__all__ = ["Figures", "ModuleTrend", "NonFinite", "StepTrend", "Trend"]

# Metrics that have a column of their own, and modules that have a line.
_MOST_METRICS = 6
_MOST_MODULES = 20
# A course is drawn from so many changes on, in at most so many characters.
_FEWEST_DRAWN, _MOST_DRAWN = 3, 24
_HEIGHTS = "▁▂▃▄▅▆▇█"


class Figures(NamedTuple):
    """What some tensors are at one step. ``norm`` (L2), ``largest`` (``|x|``) and ``change`` are of the finite numbers; None without any.

    ``change`` is the L2 norm of the difference from the step before, over what is finite in both; None where nothing is.
    """

    tensors: int
    norm: float | None
    change: float | None
    largest: float | None
    nan: int
    inf: int

    @property
    def ratio(self) -> float | None:
        """The update ratio, ``change / norm``; None where there is no change to tell, or only zeros."""
        if self.change is None or not self.norm:
            return None
        return self.change / self.norm

    @property
    def is_finite(self) -> bool:
        """Whether there is neither NaN nor Inf."""
        return not (self.nan or self.inf)

    def to_dict(self) -> dict[str, object]:
        """The facts, JSON-ready. A number that float64 doesn't have is a text."""
        made = {**self._asdict(), "ratio": self.ratio}
        return {name: _plain(value) for name, value in made.items()}


class StepTrend(NamedTuple):
    """One step: all its tensors together."""

    step: int
    time: float  # seconds since 1970
    metrics: Mapping[str, float]
    figures: Figures


class ModuleTrend(NamedTuple):
    """A part of the model by the beginning of its keys. ``figures`` are by step; None where a step has nothing of it."""

    name: str
    tensors: int
    frozen: bool  # nothing of it has changed
    figures: tuple[Figures | None, ...]

    @property
    def most(self) -> int | None:
        """Where in ``figures`` it differs most: the first with NaN or Inf, else the largest ratio."""
        known = [(at, found) for at, found in enumerate(self.figures) if found is not None]
        bad = [at for at, found in known if not found.is_finite]
        if bad:
            return bad[0]
        return max(known, key=lambda pair: (_size(pair[1].ratio), pair[0]))[0] if known else None

    @property
    def rank(self) -> tuple[bool, float]:
        """How much it differs where it differs most."""
        most = self.figures[self.most] if self.most is not None else None
        return (not most.is_finite, _size(most.ratio)) if most is not None else (False, -1.0)


class NonFinite(NamedTuple):
    """The first step that has NaN or Inf, and how many each tensor has: ``(key, nan, inf)``."""

    step: int
    tensors: tuple[tuple[str, int, int], ...]


class Trend(Result):
    """How the floating numbers of a model have moved over the steps of a run. True where all are finite and as they were written.

    Attributes: ``source`` (the run's folder), ``component``, ``steps`` (a ``StepTrend`` each, ascending), ``modules`` (a ``ModuleTrend``
    each, in the order of the state dict), ``first_non_finite`` (None where there is none), ``frozen`` (subtrees that have not changed),
    ``nbytes`` (of the tensors in all steps), ``read_nbytes`` (less what is the same as in the step before), ``findings``.
    """

    schema = "statedict.trend/1"

    def __init__(
        self,
        source: str,
        component: str,
        steps: Sequence[StepTrend],
        modules: Sequence[ModuleTrend],
        *,
        first_non_finite: NonFinite | None = None,
        frozen: Sequence[str] = (),
        findings: Sequence[Finding] = (),
        nbytes: tuple[int, int] = (0, 0),
    ) -> None:
        self.source = source
        self.component = component
        self.steps = tuple(steps)
        self.modules = tuple(modules)
        self.first_non_finite = first_non_finite
        self.frozen = tuple(frozen)
        self.findings = tuple(findings)
        self.nbytes, self.read_nbytes = nbytes

    @property
    def ok(self) -> bool:
        """Whether every number is finite, and nothing that was read is damaged."""
        return self.first_non_finite is None and all(found.level != "error" for found in self.findings)

    def __bool__(self) -> bool:
        return self.ok

    def __repr__(self) -> str:
        return f"Trend({self.source!r}, {plural(len(self.steps), 'step')}{'' if self.ok else ', not ok'})"

    def to_dict(self) -> dict[str, object]:
        """The facts, JSON-ready: ``statedict.trend/1``."""
        bad = self.first_non_finite
        return {
            "schema": self.schema,
            "source": self.source,
            "component": self.component,
            "ok": self.ok,
            "steps": [_step_row(step) for step in self.steps],
            "modules": [_module_row(module) for module in self.modules],
            "first_non_finite": None
            if bad is None
            else {
                "step": bad.step,
                "tensors": [{"key": key, "nan": nan, "inf": inf} for key, nan, inf in bad.tensors],
            },
            "frozen": list(self.frozen),
            "nbytes": self.nbytes,
            "read_nbytes": self.read_nbytes,
            "findings": [found.to_dict() for found in self.findings],
        }

    def document(self) -> Document:
        """The facts as a document."""
        blocks: list[Block] = [Facts(self._facts()), self._step_table()]
        if self.modules:
            blocks += [Heading("Modules"), *self._module_table()]
        return Document(f"Trend of {self.source}", [*blocks, *notes_of(self.findings)])

    def _facts(self) -> list[tuple[str, str]]:
        numbers = [step.step for step in self.steps]
        span = f", {numbers[0]} to {numbers[-1]}" if len(numbers) > 1 else ""
        pairs = [("component", self.component), ("steps", plural(len(numbers), "step") + span)]
        pairs += (
            [("tensors", f"{plural(self.steps[-1].figures.tensors, 'tensor')} of floating numbers")] if numbers else []
        )
        spared = self.nbytes - self.read_nbytes
        rest = f", {human_bytes(spared)} not again: the same as in the step before" if spared > 0 else ""
        return [*pairs, ("read", human_bytes(self.read_nbytes) + rest)]

    def _step_table(self) -> Table:
        names = list(dict.fromkeys([name for step in self.steps for name in step.metrics]))[:_MOST_METRICS]
        columns = [Column(name, "number") for name in ("Step", *_TITLES, *names)]
        rows = [
            (str(step.step), *_cells(step.figures), *[number(step.metrics.get(name)) for name in names])
            for step in self.steps
        ]
        return Table(columns, rows)

    def _module_table(self) -> list[Block]:
        order = sorted(range(len(self.modules)), key=lambda at: self.modules[at].rank, reverse=True)
        listed = [self.modules[at] for at in sorted(order[:_MOST_MODULES])]
        text = "Each at the step at which it has changed most for its norm; with NaN or Inf, at the first such step."
        if len(listed) < len(self.modules):
            text = f"{len(listed)} of {len(self.modules)} modules, those that have changed most for their norm. {text}"
        courses = [_course([found and found.ratio for found in module.figures]) for module in listed]
        is_drawn = any(courses)
        columns = [Column("Module", "key"), Column("Tensors", "number")]
        columns += [Column(name, "number") for name in ("Step", *_TITLES)]
        columns += [Column("Ratio by step")] if is_drawn else []
        rows = []
        for module, course in zip(listed, courses):
            at = module.most
            found = module.figures[at] if at is not None else None
            if at is None or found is None:
                continue
            cells = _cells(found)
            cells[1] = "frozen" if module.frozen else cells[1]
            row = [module.name, f"{module.tensors:,}", str(self.steps[at].step), *cells]
            rows.append([*row, *([course] if is_drawn else [])])
        return [Paragraph(text), Table(columns, rows)]


_TITLES = ("Norm", "Change", "Ratio", "Largest", "NaN", "Inf")


def _cells(figures: Figures) -> list[str]:
    counts = [f"{count:,}" if count else "" for count in (figures.nan, figures.inf)]
    values = [figures.norm, figures.change, figures.ratio, figures.largest]
    return [*[number(value) for value in values], *counts]


def _course(ratios: Sequence[float | None]) -> str:
    """The ratios as a line of bars from 0 to their largest; the largest of several where there isn't room for all."""
    known = [ratio for ratio in ratios if ratio is not None]
    top = max(known, default=0.0)
    if len(known) < _FEWEST_DRAWN or not 0 < top < float("inf"):
        return ""
    width = min(len(ratios), _MOST_DRAWN)
    cuts = [len(ratios) * at // width for at in range(width + 1)]
    drawn = ""
    for first, last in pairwise(cuts):
        some = [ratio for ratio in ratios[first:last] if ratio is not None]
        drawn += _HEIGHTS[min(7, int(8 * max(some) / top))] if some else " "
    return drawn.strip()


def _size(ratio: float | None) -> float:
    return -1.0 if ratio is None else ratio


def _plain(value: object) -> object:
    return str(value) if isinstance(value, float) and not isfinite(value) else value


def _step_row(step: StepTrend) -> dict[str, object]:
    metrics = {name: _plain(value) for name, value in step.metrics.items()}
    return {"step": step.step, "time": step.time, "metrics": metrics, **step.figures.to_dict()}


def _module_row(module: ModuleTrend) -> dict[str, object]:
    figures = [None if found is None else found.to_dict() for found in module.figures]
    return {"name": module.name, "tensors": module.tensors, "frozen": module.frozen, "steps": figures}
