"""What a comparison found: the records of what differs, their counts, and how they are shown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import isnan
from typing import NamedTuple

from statedict.manifest import Finding
from statedict.ops.listing import notes_of
from statedict.ops.values import exact, json_value
from statedict.report.document import Block, Column, Document, Heading, Paragraph, Table
from statedict.report.result import Result
from statedict.report.units import number, plural
from statedict.tree import fold

__all__ = ["WITHIN", "Change", "Comparison"]

# The verdict of numbers that differ by less than was allowed.
WITHIN = "within tolerance"
# Rows of one table before the rest is only counted; ``to_dict`` has them all.
_ROWS = 200
# Keys that a cell lists.
_NAMED = 3


class Change(NamedTuple):
    """One key whose two values differ. The numbers are None where there are none, as of values that are no tensors.

    ``a`` and ``b`` are the two shapes (lists), dtypes (texts), values in brief (texts), or the other keys that each is tied
    with (lists), as the kind has it.
    """

    key: str
    kind: str  # "shape" | "dtype" | "value" | "object" | "aliasing"
    verdict: str
    a: object
    b: object
    numel: int | None = None  # elements that were compared
    mismatched: int | None = None  # of those, not equal and not within the tolerance
    max_abs: float | None = None  # the largest |a - b|; NaN where NaN stands against numbers only
    max_rel: float | None = None  # the largest |a - b| / |b| where b isn't 0
    cosine: float | None = None
    first: tuple[int, ...] | None = None  # the index of a mismatch: the first in the order of storage

    @property
    def is_equal(self) -> bool:
        """Whether the two count as equal all the same: values within the tolerance."""
        return self.kind == "value" and self.verdict == WITHIN

    def to_dict(self) -> dict[str, object]:
        """The record, JSON-ready; of a value, ``mismatched``, ``numel`` and ``max_abs`` are always there."""
        made: dict[str, object] = {
            "key": self.key,
            "kind": self.kind,
            "verdict": self.verdict,
            "a": self.a,
            "b": self.b,
        }
        numbers = {name: getattr(self, name) for name in ("mismatched", "numel", "max_abs", "max_rel", "cosine")}
        for name, value in numbers.items():
            if value is not None or (self.kind == "value" and name in ("mismatched", "numel", "max_abs")):
                made[name] = json_value(value)
        if self.first is not None:
            made["first"] = list(self.first)
        return made


class Comparison(Result):
    """Two checkpoints side by side. ``bool()`` says whether they are equal.

    Attributes: ``equal``, ``only_in_a`` and ``only_in_b`` (keys), ``changed`` (a ``Change`` for each key that differs, also within
    the tolerance), ``renamed`` (pairs of keys), ``counts``, ``findings``, ``source_a``, ``source_b``.
    """

    __slots__ = ("changed", "counts", "findings", "only_in_a", "only_in_b", "renamed", "source_a", "source_b")

    schema = "statedict.comparison/1"

    def __init__(
        self,
        sources: tuple[str, str],
        changed: Sequence[Change],
        only: tuple[Sequence[str], Sequence[str]],
        counts: Mapping[str, int],
        findings: Sequence[Finding] = (),
    ) -> None:
        self.source_a, self.source_b = sources
        self.changed = list(changed)
        self.only_in_a, self.only_in_b = list(only[0]), list(only[1])
        self.renamed: list[dict[str, object]] = []
        self.counts = dict(counts)
        self.findings = tuple(findings)

    @property
    def equal(self) -> bool:
        """Whether keys, shapes, dtypes, values and ties are the same; values within the tolerance are."""
        return not (self.only_in_a or self.only_in_b or any(not change.is_equal for change in self.changed))

    def __bool__(self) -> bool:
        return self.equal

    def __repr__(self) -> str:
        return f"Comparison({'equal' if self.equal else 'different'}: {self.summary})"

    def to_dict(self) -> dict[str, object]:
        """The facts, JSON-ready: ``statedict.comparison/1``."""
        return {
            "schema": self.schema,
            "equal": self.equal,
            "counts": dict(self.counts),
            "only_in_a": list(self.only_in_a),
            "only_in_b": list(self.only_in_b),
            "changed": [change.to_dict() for change in self.changed],
            "renamed": list(self.renamed),
        }

    @property
    def summary(self) -> str:
        """What differs, in one sentence."""
        counts = self.counts
        tensors, values = counts["tensors"], counts["objects"]
        ties = [change for change in self.changed if change.kind == "aliasing"]
        real = [change for change in self.changed if change.kind not in ("aliasing", "object") and not change.is_equal]
        others = [change for change in self.changed if change.kind == "object"]
        near = counts["within_tolerance"]
        said = []
        if real:
            said.append(f"{len(real):,} of {plural(tensors, 'tensor')} changed{_place(real, tensors)}")
        if others:
            said.append(f"{plural(len(others), 'other value')} changed")
        said += [f"{plural(len(keys), 'key')} only in {side}" for side, keys in self._only() if keys]
        if ties:
            said.append(f"{plural(len(ties), 'tensor')} tied otherwise")
        if near:
            said.append(f"{plural(near, 'tensor')} within the tolerance")
        rest = tensors - len(real) - near
        if not said:
            also = f" and {plural(values, 'other value')}" if values else ""
            return f"The same {plural(tensors, 'tensor')}{also}." if tensors or values else "Both are empty."
        if rest or (values and not others):
            said.append("the rest the same")
        return "; ".join(said) + "."

    def _only(self) -> tuple[tuple[str, list[str]], tuple[str, list[str]]]:
        return ("A", self.only_in_a), ("B", self.only_in_b)

    def document(self) -> Document:
        """The summary, then a table of each kind of difference; keys that differ in their numbers alone share a line."""
        blocks: list[Block] = [Paragraph(self.summary)]
        blocks += _numbers([change for change in self.changed if change.kind == "value"])
        for title, kinds in (("Shapes and dtypes", ("shape", "dtype")), ("Other values", ("object",))):
            blocks += _pairs(title, [change for change in self.changed if change.kind in kinds])
        blocks += _pairs("Ties", [change for change in self.changed if change.kind == "aliasing"])
        for side, keys in self._only():
            rows = [[group.key, _times(group.times)] for group in fold((key, None) for key in keys)]
            blocks += _table(f"Only in {side}", [Column("Key", "key"), Column("Keys", "number")], rows)
        return Document(f"A: {self.source_a}, B: {self.source_b}", [*blocks, *notes_of(self.findings)])


def _place(changes: Sequence[Change], tensors: int) -> str:
    """Where the changes are, if that is one place and not everywhere."""
    if len(changes) == 1:
        return f": {changes[0].key}"
    parts = [change.key.split(".")[:-1] for change in changes]
    shared = 0
    while all(len(part) > shared and part[shared] == parts[0][shared] for part in parts):
        shared += 1
    return f", all in {'.'.join(parts[0][:shared])}.*" if shared and len(changes) < tensors else ""


def _numbers(changes: Sequence[Change]) -> list[Block]:
    columns = [Column("Key", "key"), Column("Tensors", "number"), Column("Type"), Column("Verdict")]
    columns += [Column(title, "number") for title in ("Mismatched", "Of", "Max abs", "Max rel", "Cosine")]
    rows = []
    for group in fold((change.key, (change.verdict, str(change.a), str(change.b))) for change in changes):
        members = [changes[at] for at in group.members]
        first = members[0]
        cells = [group.key, _times(group.times), str(first.a), first.verdict]
        cells += [
            exact(sum([change.mismatched or 0 for change in members])),
            exact(sum([c.numel or 0 for c in members])),
        ]
        cells += [_extreme(change.max_abs for change in members), _extreme(change.max_rel for change in members)]
        cosines = [change.cosine for change in members if change.cosine is not None]
        rows.append([*cells, f"{min(cosines):.6f}" if cosines else ""])
    return _table("Values", columns, rows)


def _extreme(values: Iterable[float | None]) -> str:
    """The largest of the numbers; NaN where that is all there is."""
    known = [value for value in values if value is not None]
    return number(max([value for value in known if not isnan(value)], default=known[0] if known else None))


def _pairs(title: str, changes: Sequence[Change]) -> list[Block]:
    columns = [Column("Key", "key"), Column("Keys", "number"), Column("Verdict"), Column("A"), Column("B")]
    shown = [(change.verdict, _text(change.kind, change.a), _text(change.kind, change.b)) for change in changes]
    groups = fold((change.key, cells) for change, cells in zip(changes, shown))
    return _table(title, columns, [[group.key, _times(group.times), *shown[group.members[0]]] for group in groups])


def _text(kind: str, value: object) -> str:
    """What one side has as a cell: a shape, a dtype, a value, or the keys that it is tied with."""
    if kind != "aliasing" or not isinstance(value, list):
        return str(value)
    more = f" and {len(value) - _NAMED} more" if len(value) > _NAMED else ""
    return f"tied with {', '.join(value[:_NAMED])}{more}" if value else "not tied"


def _times(count: int) -> str:
    return f"{count:,}" if count > 1 else ""


def _table(title: str, columns: Sequence[Column], rows: Sequence[Sequence[str]]) -> list[Block]:
    """The table under its heading, without its second column where all its lines stand for one key; nothing without rows."""
    if not rows:
        return []
    if not any(row[1] for row in rows):
        columns, rows = [columns[0], *columns[2:]], [[row[0], *row[2:]] for row in rows]
    blocks: list[Block] = [Heading(title), Table(columns, rows[:_ROWS])]
    if len(rows) > _ROWS:
        blocks.append(Paragraph(f"And {plural(len(rows) - _ROWS, 'line')} more, which --format json lists."))
    return blocks
