"""What a checkpoint holds: every tensor and object, the totals, and what a person should know about it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import TYPE_CHECKING

from statedict.keys import Path, display, matches
from statedict.limits import Limits
from statedict.manifest import Manifest, tied_groups
from statedict.ops.contents import Contents, ObjectFacts, TensorFacts, Totals
from statedict.ops.findings import Evidence, findings_of
from statedict.ops.training import buffers_of, training_of
from statedict.report.document import Document
from statedict.report.result import Result

if TYPE_CHECKING:
    from statedict.ops.statistics import Progress

__all__ = ["Inspection", "inspect", "inspection_of"]

# Names that a tensor's own record repeats of those it is tied with: all pairs of a large group would be quadratic.
_MOST_TIED = 32


class Inspection(Contents, Result):
    """The facts of one checkpoint. ``str()`` is for a terminal; ``to_dict``, ``to_html`` and ``to_markdown`` for the rest."""

    __slots__ = ()

    schema = "statedict.inspection/1"

    def __repr__(self) -> str:
        return f"Inspection({self.source!r}, {self.format}, {self.totals.tensors} tensors)"

    def to_dict(self) -> dict[str, object]:
        """The facts, JSON-ready: ``statedict.inspection/1``. All numbers are exact."""
        made: dict[str, object] = {
            "schema": self.schema,
            "source": self.source,
            "format": self.format,
            "tensors": [tensor.to_dict() for tensor in self.tensors],
            "objects": [entry.to_dict() for entry in self.objects],
            "totals": self.totals.to_dict(),
            "tied": [list(group) for group in self.tied],
            "metadata": dict(self.metadata),
            "findings": [finding.to_dict() for finding in self.findings],
        }
        return made if self.match is None else {**made, "match": self.match}

    def matching(self, glob: str) -> Inspection:
        """The part whose keys match the glob as a whole: its tensors, objects and totals, and what was found about it."""
        tensors = [tensor for tensor in self.tensors if matches(tensor.key, glob)]
        kept = {tensor.key for tensor in tensors}
        return Inspection(
            self.source,
            self.format,
            tensors=tensors,
            objects=[entry for entry in self.objects if matches(entry.key, glob)],
            totals=_totals(tensors, self.totals.file_nbytes),
            tied=[group for group in self.tied if kept.intersection(group)],
            metadata=self.metadata,
            findings=[found for found in self.findings if not found.keys or kept.intersection(found.keys)],
            training=self.training,
            match=glob,
        )

    def document(self, view: str | None = None, match: str | None = None) -> Document:
        """The facts as a document.

        ``view`` is ``folded`` (equal layers once, the usual one), ``flat`` (every tensor), ``tree``, or ``complete`` (folded,
        and every tensor below). ``match`` is a glob that keys must match as a whole.
        """
        from statedict.ops.listing import document_of

        return document_of(self if match is None else self.matching(match), view or "folded")

    def to_html(self) -> str:
        """One page without anything from outside, with every tensor on it."""
        from statedict.report.html import page

        return page(self.document("complete"))


def inspect(
    source: object,
    *,
    stats: bool = False,
    at: str | Path | None = None,
    limits: Limits | None = None,
    on_progress: Progress | None = None,
) -> Inspection:
    """What is in a checkpoint: its header is read, and with ``stats`` every byte of its tensors once.

    ``source`` is a path (``PATH#KEY`` selects a part), a ``Checkpoint``, a mapping of tensors, or a module. ``stats`` gives min,
    max, mean, std, zeros, nan and inf of each tensor: the extremes of all values but NaN, mean and std (of the population) of
    the finite ones. Raises what ``open`` raises.
    """
    from statedict.checkpoint import Checkpoint
    from statedict.checkpoint import open as open_checkpoint

    checkpoint = open_checkpoint(source, at=at, limits=limits)
    try:
        if not stats:
            return inspection_of(checkpoint.manifest, checkpoint.source)
        from statedict.ops.statistics import statistics_of

        figures, notes = statistics_of(checkpoint, on_progress)
        manifest = checkpoint.manifest._replace(notes=(*checkpoint.manifest.notes, *notes))
        return inspection_of(manifest, checkpoint.source, stats=figures)
    finally:
        # A checkpoint that was passed in is open for its owner, who closes it.
        if not isinstance(source, Checkpoint):
            checkpoint.close()


def inspection_of(
    manifest: Manifest, source: str, *, stats: Mapping[Path, Mapping[str, object]] | None = None
) -> Inspection:
    """What a manifest says. Pure: ``stats`` are the figures of the tensors' values by path, if someone counted them."""
    figures = stats or {}
    names = {path: key for key, path in display(manifest.tensors).items()}
    tied = tied_groups(manifest.tensors)
    training = training_of(manifest)
    parameters = {path: name for optimizer in training.optimizers for path, name in optimizer.parameters.items()}
    others = _others(tied, names)
    tensors = []
    for path, entry in manifest.tensors.items():
        numel = prod(entry.shape)
        nbytes = entry.nbytes if entry.parts else entry.dtype.nbytes(numel)
        tensors.append(
            TensorFacts(
                names[path], entry, numel, nbytes, others.get(path, ()), figures.get(path), parameters.get(path)
            )
        )
    return Inspection(
        source,
        manifest.format,
        tensors=tensors,
        objects=[
            ObjectFacts(key, manifest.objects[path].kind, manifest.objects[path].value)
            for key, path in display(manifest.objects).items()
        ],
        totals=_totals(tensors, sum(file.nbytes for file in manifest.files)),
        tied=[[names[path] for path in group] for group in tied],
        metadata={**manifest.container, **manifest.metadata},
        findings=findings_of(Evidence(manifest, source, names, tied, training, figures)),
        training=training,
    )


def _others(tied: Sequence[Sequence[Path]], names: Mapping[Path, str]) -> dict[Path, tuple[str, ...]]:
    """The keys that each tied tensor is tied with: all, or the first few of a very large group, which ``tied`` lists whole."""
    others: dict[Path, tuple[str, ...]] = {}
    for group in tied:
        first = group[: _MOST_TIED + 1]
        for path in group:
            others[path] = tuple([names[other] for other in first if other != path][:_MOST_TIED])
    return others


def _totals(tensors: Sequence[TensorFacts], file_nbytes: int) -> Totals:
    by_dtype: dict[str, dict[str, int]] = {}
    storages: dict[int, int] = {}
    for tensor in tensors:
        sums = by_dtype.setdefault(tensor.entry.dtype.torch, {"tensors": 0, "parameters": 0, "nbytes": 0})
        sums["tensors"] += 1
        sums["parameters"] += tensor.numel
        sums["nbytes"] += tensor.nbytes
        for part in (tensor.entry, *tensor.entry.parts.values()) if tensor.entry.parts else (tensor.entry,):
            if part.view is not None:
                storages[part.view.storage.id] = part.view.storage.nbytes
    buffers = buffers_of({tensor.entry.path: tensor.entry for tensor in tensors})
    return Totals(
        tensors=len(tensors),
        parameters=sum(sums["parameters"] for sums in by_dtype.values()),
        buffers=sum(tensor.numel for tensor in tensors if tensor.entry.path in buffers) if buffers else 0,
        nbytes=sum(sums["nbytes"] for sums in by_dtype.values()),
        storage_nbytes=sum(storages.values()),
        file_nbytes=file_nbytes,
        by_dtype=by_dtype,
    )
