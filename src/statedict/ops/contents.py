"""What an inspection found, before it is shown: plain facts by tensor and object, and their sums."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from statedict.manifest import Finding, TensorEntry
from statedict.ops.training import Training
from statedict.ops.values import json_value
from statedict.views import is_packed

__all__ = ["Contents", "ObjectFacts", "TensorFacts", "Totals"]


class TensorFacts(NamedTuple):
    """One tensor as it is shown. ``parameter`` is the name of the parameter whose optimizer state it is, where known."""

    key: str
    entry: TensorEntry
    numel: int
    nbytes: int
    tied_with: tuple[str, ...] = ()
    stats: Mapping[str, object] | None = None
    parameter: str | None = None

    def to_dict(self) -> dict[str, object]:
        """The facts, JSON-ready; what is usual (packed strides, no ties, a plain layout) is left out."""
        entry = self.entry
        made: dict[str, object] = {
            "key": self.key,
            "path": list(entry.path),
            "shape": list(entry.shape),
            "dtype": entry.dtype.torch,
            "numel": json_value(self.numel),
            "nbytes": json_value(self.nbytes),
            "device": entry.device,
            "requires_grad": entry.requires_grad,
        }
        if entry.view is not None and not is_packed(entry.shape, entry.stride):
            made["stride"] = list(entry.stride)
        if entry.kind != "Tensor":
            made["kind"] = entry.kind
        if entry.layout != "strided":
            made["layout"] = entry.layout
        optional = {"digest": entry.digest, "parameter": self.parameter, "tied_with": list(self.tied_with) or None}
        made.update({name: value for name, value in optional.items() if value is not None})
        if self.stats is not None:
            made["stats"] = json_value(self.stats)
        return made


class ObjectFacts(NamedTuple):
    """One leaf that is no tensor, as it is shown."""

    key: str
    kind: str
    value: object

    def to_dict(self) -> dict[str, object]:
        """The facts, JSON-ready."""
        return {"key": self.key, "type": self.kind, "value": json_value(self.value)}


class Totals(NamedTuple):
    """Sums over the tensors. Parameters count elements of all tensors, buffers those of the tensors known as such."""

    tensors: int
    parameters: int
    buffers: int
    nbytes: int
    storage_nbytes: int  # distinct storages, each once, whole
    file_nbytes: int
    by_dtype: Mapping[str, Mapping[str, int]]  # dtype → tensors, parameters, nbytes

    def to_dict(self) -> dict[str, object]:
        """The sums by name."""
        sums = {name: json_value(value) for name, value in self._asdict().items() if name != "by_dtype"}
        return {**sums, "by_dtype": {name: json_value(dict(each)) for name, each in self.by_dtype.items()}}


class Contents:
    """Everything that was found in one checkpoint. ``match`` is the glob that its keys were chosen by, if they were."""

    __slots__ = (
        "findings",
        "format",
        "match",
        "metadata",
        "objects",
        "source",
        "tensors",
        "tied",
        "totals",
        "training",
    )

    def __init__(
        self,
        source: str,
        format: str,
        *,
        tensors: Sequence[TensorFacts],
        objects: Sequence[ObjectFacts],
        totals: Totals,
        tied: Sequence[Sequence[str]],
        metadata: Mapping[str, str],
        findings: Sequence[Finding],
        training: Training,
        match: str | None = None,
    ) -> None:
        self.source = source
        self.format = format
        self.tensors = tensors
        self.objects = objects
        self.totals = totals
        self.tied = tied
        self.metadata = metadata
        self.findings = findings
        self.training = training
        self.match = match
