"""An inspection as a document: the facts, the tables of tensors and objects in one of their views, the findings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from statedict.keys import dotted
from statedict.manifest import Finding
from statedict.ops.contents import Contents, ObjectFacts, TensorFacts
from statedict.ops.figures import figure_columns, figures_of
from statedict.ops.values import brief, exact
from statedict.report.document import Block, Column, Document, Facts, Heading, Note, Notes, Paragraph, Table
from statedict.report.units import human_bytes, human_count, plural
from statedict.tree import Leaf, branches, fold
from statedict.views import is_packed

__all__ = ["document_of", "notes_of"]

# Rows of objects and texts of metadata that are shown before the rest is only counted.
_OBJECTS = 24
_METADATA = 12


def document_of(inspection: Contents, view: str) -> Document:
    """The document in one view: ``folded``, ``flat``, ``tree`` or ``complete``."""
    listing = _Listing(inspection)
    findings = notes_of(inspection.findings)
    blocks: list[Block] = [Facts(list(listing.facts()))]
    blocks += findings if view == "complete" else []
    blocks += listing.tensors(view)
    blocks += listing.objects(view)
    blocks += findings if view != "complete" else []
    return Document(inspection.source, blocks)


def notes_of(findings: Sequence[Finding]) -> list[Block]:
    """The findings under their heading; nothing where there are none."""
    if not findings:
        return []
    return [Heading("Findings"), Notes([Note(found.level, found.code, _sentence(found.message)) for found in findings])]


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + ("" if text.endswith((".", "`", "!")) else ".")


def _quoted(key: str) -> str:
    """The key; between quotes where it begins or ends with nothing that could be seen."""
    return key if key and key == key.strip() else f'"{key}"'


class _Listing:
    """The tables of one inspection."""

    def __init__(self, inspection: Contents) -> None:
        self.inspection = inspection
        self.devices = {tensor.entry.device for tensor in inspection.tensors} - {None}
        self.kinds = {tensor.entry.kind for tensor in inspection.tensors}

    def facts(self) -> Iterator[tuple[str, str]]:
        totals = self.inspection.totals
        yield "Format", self.inspection.format
        if totals.file_nbytes:
            yield "File", human_bytes(totals.file_nbytes)
        if self.inspection.match is not None:
            yield "Keys", f"only those that match '{self.inspection.match}'"
        yield "Tensors", f"{totals.tensors:,}, {human_bytes(totals.nbytes)}" if totals.tensors else "none"
        if totals.storage_nbytes != totals.nbytes:
            why = "shared ones once" if totals.storage_nbytes < totals.nbytes else "more than the tensors show"
            yield "Storages", f"{human_bytes(totals.storage_nbytes)}, {why}"
        if totals.parameters:
            written = f" ({exact(totals.parameters)})" if totals.parameters >= 1000 else ""
            buffers = f", {human_count(totals.buffers)} of them in buffers" if totals.buffers else ""
            yield "Parameters", human_count(totals.parameters) + written + buffers
        if totals.by_dtype:
            yield "Dtypes", _dtypes(totals.by_dtype)
        if len(self.devices) == 1 and self.devices != {"cpu"}:
            yield "Device", str(next(iter(self.devices)))
        if self.inspection.metadata:
            yield "Metadata", _metadata(self.inspection.metadata)

    def tensors(self, view: str) -> list[Block]:
        tensors = self.inspection.tensors
        if not tensors:
            return []
        if view == "flat":
            return [Heading("Tensors"), self._flat(tensors)]
        if view == "tree":
            return [Heading("Tensors"), self._tree(tensors)]
        states = [tensor for tensor in tensors if tensor.parameter is not None]
        rest = [tensor for tensor in tensors if tensor.parameter is None]
        blocks: list[Block] = []
        shown = 0
        if rest:
            table = self._folded(rest)
            shown += len(table.rows)
            blocks += [Heading("Tensors"), table]
        for optimizer in self.inspection.training.optimizers:
            owned = [tensor for tensor in states if tensor.entry.path in optimizer.parameters]
            if owned:
                where = dotted(optimizer.path)
                table = self._states(owned, len(optimizer.path) + 2)
                shown += len(table.rows)
                blocks += [
                    Heading(f"Optimizer state, by parameter ({where})" if where else "Optimizer state, by parameter"),
                    table,
                ]
        if view == "complete" and shown < len(tensors):
            blocks.append(self._flat(tensors)._replace(summary=f"All {len(tensors):,} tensors"))
        return blocks

    def _tags(self, tensor: TensorFacts, full: bool) -> tuple[str, ...]:
        """What is unusual about a tensor; in ``full``, also what only that one has."""
        entry = tensor.entry
        tags: list[str] = []
        if tensor.parameter is not None and full:
            tags.append(f"of {tensor.parameter}")
        if tensor.tied_with:
            tags.append(f"tied with {tensor.tied_with[0]}" if full and len(tensor.tied_with) == 1 else "tied")
        if len(self.kinds) > 1 and entry.kind not in ("Tensor", "Parameter"):
            tags.append(entry.kind.lower() if entry.kind == "Buffer" else entry.kind)
        if entry.layout != "strided":
            tags.append(entry.layout)
        if len(self.devices) > 1 and entry.device != "cpu" and entry.device is not None:
            tags.append(entry.device)
        view = entry.view
        if view is not None:
            if not is_packed(entry.shape, entry.stride):
                tags.append(f"stride {list(entry.stride)}")
            if view.bits:
                tags.append({"c": "conjugate", "n": "negative"}.get(view.bits, "conjugate, negative"))
        return tuple(tags)

    def _notes(self, tensor: TensorFacts) -> str:
        return ", ".join(self._tags(tensor, True))

    def _cells(self, tensor: TensorFacts) -> list[str]:
        return [str(list(tensor.entry.shape)), tensor.entry.dtype.torch]

    def _folded(self, tensors: Sequence[TensorFacts]) -> Table:
        tags = [self._tags(tensor, False) for tensor in tensors]
        groups = fold(
            (tensor.key, (tensor.entry.shape, tensor.entry.dtype.torch, tag)) for tensor, tag in zip(tensors, tags)
        )
        rows = []
        for group in groups:
            first = tensors[group.members[0]]
            notes = ", ".join(tags[group.members[0]]) if group.times > 1 else self._notes(first)
            members = [tensors[at] for at in group.members]
            row = [_quoted(group.key), *self._cells(first), _count(group.times), _size(members), notes]
            rows.append(row + figures_of(members))
        return _pruned([*_COLUMNS, *figure_columns()], rows)

    def _flat(self, tensors: Sequence[TensorFacts]) -> Table:
        rows = [
            [
                _quoted(tensor.key),
                *self._cells(tensor),
                "",
                human_bytes(tensor.nbytes),
                self._notes(tensor),
                *figures_of([tensor]),
            ]
            for tensor in tensors
        ]
        return _pruned([*_COLUMNS, *figure_columns()], rows)

    def _tree(self, tensors: Sequence[TensorFacts]) -> Table:
        leaves = [
            Leaf(tensor.key, (*self._cells(tensor), ", ".join(self._tags(tensor, False))), tensor.numel, tensor.nbytes)
            for tensor in tensors
        ]
        rows = []
        for branch in branches(leaves):
            shape, dtype, notes = branch.facts if isinstance(branch.facts, tuple) else ("", "", "")
            label = branch.rails + _quoted(branch.label)
            numbers = [_count(branch.copies), f"{branch.tensors:,}", human_bytes(branch.nbytes)]
            rows.append([label, shape, dtype, *numbers, notes])
        columns = [*_COLUMNS[:4], Column("Tensors", "number"), *_COLUMNS[4:]]
        return _pruned(columns, rows)._replace(sortable=False)

    def _states(self, tensors: Sequence[TensorFacts], place: int) -> Table:
        """The state of an optimizer by the name of the parameter. ``place`` is where in a path the state's name begins."""
        states: dict[tuple[str, str, str], list[TensorFacts]] = {}
        scalars: dict[tuple[str, str], list[TensorFacts]] = {}
        for tensor in tensors:
            shape, dtype = self._cells(tensor)
            if tensor.entry.shape == ():
                scalars.setdefault((dotted(tensor.entry.path[place:]), dtype), []).append(tensor)
            else:
                states.setdefault((str(tensor.parameter), shape, dtype), []).append(tensor)
        lines = [
            (name, (", ".join([dotted(tensor.entry.path[place:]) for tensor in members]), shape, dtype), members)
            for (name, shape, dtype), members in states.items()
        ]
        rows = []
        for group in fold((name, facts) for name, facts, _ in lines):
            members = [tensor for at in group.members for tensor in lines[at][2]]
            rows.append([group.key, *lines[group.members[0]][1], _count(len(members)), _size(members)])
        for (what, dtype), members in scalars.items():
            rows.append(
                [f"({plural(len(members), 'parameter')})", what, "[]", dtype, _count(len(members)), _size(members)]
            )
        return Table([Column("Parameter", "key"), Column("State"), *_COLUMNS[1:5]], rows)

    def objects(self, view: str) -> list[Block]:
        entries = self.inspection.objects
        if not entries:
            return []
        heading = Heading("Objects")
        columns = [Column("Key", "key"), Column("Type"), Column("Count"), Column("Value")]
        if view == "flat":
            rows = [[_quoted(entry.key), entry.kind, "", brief(entry.value)] for entry in entries]
            return [heading, _pruned(columns, rows)]
        groups = fold((entry.key, entry.kind) for entry in entries)
        rows = [
            [
                _quoted(group.key),
                entries[group.members[0]].kind,
                _count(group.times),
                _together([entries[at] for at in group.members]),
            ]
            for group in groups[:_OBJECTS]
        ]
        blocks: list[Block] = [heading, _pruned(columns, rows)]
        rest = sum(group.times for group in groups[_OBJECTS:])
        if rest:
            blocks.append(Paragraph(f"… and {rest:,} more; the flat view lists all."))
        return blocks


_COLUMNS = (
    Column("Key", "key"),
    Column("Shape"),
    Column("Dtype"),
    Column("Count"),
    Column("Size", "number"),
    Column("Notes"),
)


def _pruned(columns: Sequence[Column], rows: Sequence[Sequence[str]]) -> Table:
    """The table without the columns that are empty in every row."""
    kept = [at for at in range(len(columns)) if at == 0 or any(row[at] for row in rows)]
    return Table([columns[at] for at in kept], [[row[at] for at in kept] for row in rows])


def _size(tensors: Sequence[TensorFacts]) -> str:
    return human_bytes(sum([tensor.nbytes for tensor in tensors]))


def _count(count: int) -> str:
    return f"×{count:,}" if count > 1 else ""


def _dtypes(by_dtype: Mapping[str, Mapping[str, int]]) -> str:
    if len(by_dtype) == 1:
        return next(iter(by_dtype))
    return ", ".join(
        [f"{name} ×{sums['tensors']:,} ({human_bytes(sums['nbytes'])})" for name, sums in by_dtype.items()]
    )


def _metadata(metadata: Mapping[str, str]) -> str:
    shown = [f"{key}: {text if len(text) <= 60 else f'({len(text):,} characters)'}" for key, text in metadata.items()]
    rest = len(shown) - _METADATA
    return ", ".join(shown[:_METADATA]) + (f" and {rest:,} more" if rest > 0 else "")


def _together(entries: Sequence[ObjectFacts]) -> str:
    """The value that all share, else the first and the last."""
    first, last = brief(entries[0].value), brief(entries[-1].value)
    if len(entries) == 1 or (first == last and all(brief(entry.value) == first for entry in entries)):
        return first
    return f"{first} … {last}"
