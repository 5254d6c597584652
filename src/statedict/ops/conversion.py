"""What a conversion has written, or would write, and its document."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest

from statedict.checkpoint import Checkpoint
from statedict.manifest import Finding
from statedict.ops.casting import TensorCast
from statedict.ops.listing import notes_of
from statedict.ops.publishing import LeftOut
from statedict.ops.writing import Prepared, removed_nbytes
from statedict.report.document import Block, Column, Document, Facts, Heading, Paragraph, Table
from statedict.report.result import Result
from statedict.report.units import human_bytes, number, plural
from statedict.tree import fold

__all__ = ["Conversion"]

# Rows of a table that are shown before the rest is only counted.
_ROWS = 24


class Conversion(Result):
    """What a conversion has written, or would write.

    Attributes: ``source``, ``target``, ``source_format``, ``target_format``, ``tensors`` and ``objects`` (counts), ``nbytes`` (of
    the new file), ``removed_nbytes`` (of storages that no tensor shows, left out), ``digests`` (whether they were recorded),
    ``dry_run``, ``durable``, ``method`` (bytes by the way they took), ``seconds`` (``examine``, ``write``, ``check``), ``findings``.

    What was changed on the way: ``weights`` (the key that the weights were taken from, with ``weights_only`` or ``ema``; None
    without), ``left_out`` (all that stood beside them), ``rules`` (as one types them), ``coverage`` (what the rules concerned),
    ``casts`` (what the cast did to each tensor, in the order of the file).
    """

    schema = "statedict.conversion/1"

    def __init__(self, checkpoint: Checkpoint, target: str, prepared: Prepared, *, digests: bool) -> None:
        manifest = checkpoint.manifest
        self.source = checkpoint.source
        self.target = target
        self.source_format = manifest.format
        self.target_format = prepared.plan.format
        self.tensors = len(manifest.tensors)
        self.objects = len(manifest.objects)
        self.nbytes = prepared.plan.nbytes
        self.removed_nbytes = removed_nbytes(manifest, prepared.plan)
        self.digests = digests
        self.dry_run = True
        self.durable = False
        self.method: Mapping[str, int] = {}
        self.seconds: Mapping[str, float] = {}
        self.findings: Sequence[Finding] = prepared.notes
        self.weights: str | None = None
        self.left_out: Sequence[LeftOut] = ()
        self.rules: Sequence[str] = ()
        self.coverage: Mapping[str, object] | None = None
        self.coverage_lines: Sequence[str] = ()
        self.casts: Sequence[TensorCast] = ()

    def __repr__(self) -> str:
        return f"Conversion({self.source!r} to {self.target!r}, {self.tensors} tensors)"

    def to_dict(self) -> dict[str, object]:
        """The facts, JSON-ready: ``statedict.conversion/1``."""
        return {
            "schema": self.schema,
            "source": self.source,
            "target": self.target,
            "source_format": self.source_format,
            "target_format": self.target_format,
            "tensors": self.tensors,
            "objects": self.objects,
            "nbytes": self.nbytes,
            "removed_nbytes": self.removed_nbytes,
            "digests": self.digests,
            "dry_run": self.dry_run,
            "durable": self.durable,
            "method": dict(self.method),
            "seconds": {name: round(value, 3) for name, value in self.seconds.items()},
            "weights": self.weights,
            "left_out": [each.to_dict() for each in self.left_out],
            "rules": list(self.rules),
            "coverage": None if self.coverage is None else dict(self.coverage),
            "casts": [each.to_dict() for each in self.casts],
            "findings": [finding.to_dict() for finding in self.findings],
        }

    def document(self) -> Document:
        """The facts as a document."""
        title = "Nothing was written (--dry-run)" if self.dry_run else f"Converted {self.source}"
        blocks: list[Block] = [Facts(list(self._facts()))]
        blocks += [*self._rules(), *self._left_out(), *_cast_table(self.casts), *notes_of(self.findings)]
        return Document(title, blocks)

    def _facts(self) -> Iterator[tuple[str, str]]:
        yield "from", f"{self.source} ({self.source_format})"
        if self.weights is not None:
            yield "weights", f"those under '{self.weights}'" if self.weights else "those of the whole file"
        yield "to", f"{self.target} ({self.target_format})"
        beside = f", {plural(self.objects, 'value')} beside them" if self.objects or self.weights is None else ""
        yield (
            "would be" if self.dry_run else "written",
            f"{human_bytes(self.nbytes)}, {plural(self.tensors, 'tensor')}{beside}",
        )
        if self.removed_nbytes:
            yield "left out", f"{human_bytes(self.removed_nbytes)} that no tensor needs"
        yield "digests", "one of each tensor, xxh3-128" if self.digests else "none"
        if not self.dry_run:
            yield "checked", "read back and compared" if self.digests else "header read back and compared"
            if not self.durable:
                yield "durable", "no: this file system has no fsync for it"

    def _rules(self) -> Iterator[Block]:
        """What each rule has come to."""
        if self.coverage_lines:
            yield Heading("Rules")
            # Behind the rules stands what is to be said of them all.
            numbers = [str(at) for at in range(1, len(self.rules) + 1)]
            yield Facts(list(zip_longest(numbers, self.coverage_lines, fillvalue="")))

    def _left_out(self) -> Iterator[Block]:
        """What stood beside the weights: a line for all that has tensors, and one for the values."""
        if not self.left_out:
            return
        large = [each for each in self.left_out if each.tensors]
        rows = []
        for group in fold((each.key, None) for each in large):
            members = [large[at] for at in group.members]
            counts = sum([each.tensors for each in members]), sum([each.nbytes for each in members])
            rows.append([group.key, f"{counts[0]:,}", human_bytes(counts[1])])
        yield Heading("Left out")
        if rows:
            yield Table([Column("Key", "key"), Column("Tensors", "number"), Column("Size", "number")], rows[:_ROWS])
        rest = [f"{plural(len(rows) - _ROWS, 'row')} more"] if len(rows) > _ROWS else []
        values = [each.key for each in self.left_out if not each.tensors]
        if values:
            more = f" and {len(values) - _ROWS:,} more" if len(values) > _ROWS else ""
            rest.append(f"without tensors: {', '.join(values[:_ROWS])}{more}")
        if rest:
            yield Paragraph("; ".join(rest))


def _cast_table(casts: Sequence[TensorCast]) -> Iterator[Block]:
    """What the cast does, the worst first; tensors whose keys differ in their numbers alone share a line."""
    if not casts:
        return
    facts = [(each.before, each.after, each.overflowed > 0, each.underflowed > 0) for each in casts]
    groups = [
        (group, [casts[at] for at in group.members])
        for group in fold((each.key, fact) for each, fact in zip(casts, facts))
    ]
    rows = [
        (
            sum([each.overflowed for each in members]),
            max([each.max_rel for each in members]),
            sum([each.underflowed for each in members]),
            max([each.max_abs for each in members]),
            [group.key, members[0].before.torch, f"×{group.times:,}" if group.times > 1 else ""],
        )
        for group, members in groups
    ]
    rows.sort(key=lambda row: row[:4], reverse=True)
    columns = [Column("Key", "key"), Column("From"), Column("Count")]
    columns += [Column(title, "number") for title in ("To Inf", "To zero", "Largest error", "Relative")]
    shown = [
        [*cells, f"{over:,}", f"{under:,}", number(error), number(share)]
        for over, share, under, error, cells in rows[:_ROWS]
    ]
    yield Heading(f"Cast to {casts[0].after}")
    yield Table(columns, shown, sortable=False)
    if len(rows) > _ROWS:
        yield Paragraph(f"… and {len(rows) - _ROWS:,} lines more, whose errors are smaller.")
