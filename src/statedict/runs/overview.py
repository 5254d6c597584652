"""A run as a table: its steps, what is kept of each, and what lies beside them."""

from __future__ import annotations

import time
from collections.abc import Sequence

from statedict.report.document import Block, Column, Document, Facts, Paragraph, Table
from statedict.report.result import Result
from statedict.report.units import human_bytes, number, plural
from statedict.runs.catalogue import Step, is_set_aside
from statedict.runs.retention import leftovers
from statedict.runs.run import RunFolder

__all__ = ["Deletion", "Overview", "overview"]

# Metrics that have a column of their own; more of them stand with ``show``.
_MOST_METRICS = 6
_UNITS = ((86_400, "d"), (3_600, "h"), (60, "min"))


class Overview(Result):
    """What a run has: ``source``, ``steps`` (whole ones, ascending), ``damaged`` (numbers of those whose manifest or sizes don't hold),
    ``set_aside`` and ``leftovers`` (names).
    """

    schema = "statedict.run/1"

    def __init__(
        self,
        source: str,
        steps: Sequence[Step],
        *,
        damaged: Sequence[int] = (),
        set_aside: Sequence[str] = (),
        leftovers: Sequence[str] = (),
    ) -> None:
        self.source = source
        self.steps = tuple(steps)
        self.damaged = tuple(damaged)
        self.set_aside = tuple(set_aside)
        self.leftovers = tuple(leftovers)

    def __repr__(self) -> str:
        return f"Overview({self.source!r}, {plural(len(self.steps), 'step')})"

    def to_dict(self) -> dict[str, object]:
        """The facts, JSON-ready: ``statedict.run/1``. A metric that is no finite number is a text."""
        return {
            "schema": self.schema,
            "source": self.source,
            "steps": [_row(step) for step in self.steps],
            "damaged": list(self.damaged),
            "set_aside": list(self.set_aside),
            "leftovers": list(self.leftovers),
        }

    def document(self) -> Document:
        """The facts as a document."""
        names = list(dict.fromkeys([name for step in self.steps for name in step.metrics]))[:_MOST_METRICS]
        pairs = [("steps", plural(len(self.steps), "step"))]
        pairs += [("size", human_bytes(sum([step.nbytes for step in self.steps])))] if self.steps else []
        pairs += [("damaged", ", ".join([str(step) for step in self.damaged]))] if self.damaged else []
        pairs += [("set aside", ", ".join(self.set_aside))] if self.set_aside else []
        pairs += [("left over", ", ".join(self.leftovers))] if self.leftovers else []
        blocks: list[Block] = [Facts(pairs)]
        if self.steps:
            columns = [Column("step", "number"), Column("age"), Column("size", "number"), Column("verified")]
            rows = [_cells(step, names, time.time()) for step in self.steps]
            blocks.append(Table([*columns, *[Column(name, "number") for name in names]], rows))
        if self.damaged:
            blocks.append(Paragraph("`statedict runs FOLDER repair` sets damaged steps aside"))
        return Document(f"Run {self.source}", blocks)


class Deletion(Overview):
    """The steps that ``prune`` has deleted, or would."""

    schema = "statedict.run-deletion/1"

    def document(self) -> Document:
        """The facts as a document."""
        made = super().document()
        return Document(
            f"Deleted from {self.source}" if self.steps else f"Nothing to delete in {self.source}", made.blocks
        )


def overview(run: RunFolder) -> Overview:
    """The steps of a run, by manifests and sizes; no tensor is read."""
    catalogue = run.catalogue
    steps = run.steps()
    whole = {step.step for step in steps}
    return Overview(
        run.folder,
        steps,
        damaged=[step for step in catalogue.numbers() if step not in whole],
        set_aside=sorted(filter(is_set_aside, catalogue.names())),
        leftovers=leftovers(catalogue),
    )


def _row(step: Step) -> dict[str, object]:
    metrics = {name: value if abs(value) < float("inf") else str(value) for name, value in step.metrics.items()}
    return {**step._asdict(), "metrics": metrics}


def _cells(step: Step, names: Sequence[str], now: float) -> list[str]:
    metrics = [number(step.metrics.get(name)) for name in names]
    return [str(step.step), _age(now - step.time), human_bytes(step.nbytes), "yes" if step.verified else "", *metrics]


def _age(seconds: float) -> str:
    for size, unit in _UNITS:
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"
