"""A comparison as blocks of a document: a table of each kind of difference, in which layers share a line."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import isnan

from statedict.keys import template
from statedict.ops.comparing.changes import Change, Found
from statedict.ops.comparing.parts import Part
from statedict.ops.comparing.renames import Rename
from statedict.ops.comparing.training_changes import is_training
from statedict.ops.listing import notes_of
from statedict.ops.values import exact
from statedict.report.document import Block, Column, Heading, Note, Notes, Paragraph, Table
from statedict.report.units import number, plural
from statedict.tree import fold

__all__ = ["blocks_of"]

# Rows of one table before the rest is only counted; ``to_dict`` has them all.
_ROWS = 200
# Keys that a cell lists.
_NAMED = 3


def blocks_of(found: Found, summary: str, parts: Sequence[Part]) -> list[Block]:
    """The summary, then what differs by kind, then the findings; ``parts`` say where tensors changed."""
    blocks: list[Block] = [Paragraph(summary)]
    training = [each for each in found.findings if is_training(each)]
    if training:
        notes = [Note(each.level, each.code, each.message) for each in training]
        blocks += [Heading("Training state"), Notes(notes)]
    if any(len(part.keys) > 1 for part in parts):
        rows = [[part.name, f"{len(part.keys):,}"] for part in parts]
        blocks += _table("Where tensors changed", [Column("Part", "key"), Column("Tensors", "number")], rows)
    blocks += _renamed(found.renamed)
    blocks += _numbers([change for change in found.changed if change.kind == "value"])
    for title, kinds in (("Shapes and dtypes", ("shape", "dtype")), ("Other values", ("object",))):
        blocks += _pairs(title, [change for change in found.changed if change.kind in kinds])
    blocks += _pairs("Ties", [change for change in found.changed if change.kind == "aliasing"])
    for side, keys in zip("AB", found.only):
        rows = [[group.key, _times(group.times)] for group in fold((key, None) for key in keys)]
        blocks += _table(f"Only in {side}", [Column("Key", "key"), Column("Keys", "number")], rows)
    return [*blocks, *notes_of([each for each in found.findings if not is_training(each)])]


def _renamed(renamed: Sequence[Rename]) -> list[Block]:
    columns = [Column("A", "key"), Column("Tensors", "number"), Column("B", "key"), Column("Proof")]
    rows = []
    for group in fold((rename.a[0], _likeness(rename)) for rename in renamed):
        members = [renamed[at] for at in group.members]
        here, there = (_together([each.keys(side) for each in members]) for side in (0, 1))
        first = members[0]
        # What the parts are is said beside it.
        proof = "rows" if first.fusion is not None and first.proof.startswith("rows of") else first.proof
        rows.append([here, _times(group.times), there, proof])
    return _table("Renamed", columns, rows)


def _together(keys: Sequence[Sequence[str]]) -> str:
    """The keys of one side, in several renames that share a line: the parts in their order, layers folded."""
    groups = fold((key, None) for parts in keys for key in parts)
    names = [group.key for group in groups]
    return ", ".join(names[:_NAMED]) + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")


def _likeness(rename: Rename) -> tuple[object, ...]:
    """What renames have in common that share a line: the forms of all names, and how their numbers follow from the first one's."""
    first = template(rename.a[0])[1]
    forms = [template(key) for key in (*rename.a, *rename.b)]
    shifts = [tuple([there - here for here, there in zip(first, numbers)]) for _, numbers in forms]
    return tuple([form for form, _ in forms]), tuple(shifts), rename.proof if rename.fusion is None else ""


def _numbers(changes: Sequence[Change]) -> list[Block]:
    columns = [Column("Key", "key"), Column("Tensors", "number"), Column("Type"), Column("Verdict")]
    columns += [Column(title, "number") for title in ("Mismatched", "Of", "Share")]
    columns += [Column(title, "number") for title in ("Max abs", "Max rel", "Mean abs", "Cosine")]
    rows = []
    for group in fold((change.key, (change.verdict, str(change.a), str(change.b))) for change in changes):
        members = [changes[at] for at in group.members]
        first = members[0]
        wrong, numel = (sum([getattr(each, name) or 0 for each in members]) for name in ("mismatched", "numel"))
        cells = [group.key, _times(group.times), str(first.a), first.verdict, exact(wrong), exact(numel)]
        cells += [_share(wrong, numel), _extreme(each.max_abs for each in members)]
        cells += [_extreme(each.max_rel for each in members), _extreme(each.mean for each in members)]
        cosines = [change.cosine for change in members if change.cosine is not None]
        rows.append([*cells, f"{min(cosines):.6f}" if cosines else ""])
    return _table("Values", columns, rows)


def _share(part: int, whole: int) -> str:
    """A share as people read it: neither 0% of something nor 100% of less than all."""
    if not whole or part in (0, whole):
        return "100%" if part else "0%"
    tenths = part * 1000 // whole
    if not tenths:
        return "<0.1%"
    return f"{min(tenths, 999) / 10:.1f}%"


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
