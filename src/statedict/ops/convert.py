"""A checkpoint written again: in the other format, or in its own without what no tensor shows."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence

from statedict.checkpoint import Checkpoint
from statedict.checkpoint import open as open_checkpoint
from statedict.errors import FileError
from statedict.io.durable import check_target
from statedict.io.writers import Progress
from statedict.keys import Path
from statedict.limits import Limits
from statedict.manifest import Finding
from statedict.ops.listing import notes_of
from statedict.ops.sources import source_of
from statedict.ops.writing import Prepared, Tree, format_of, prepare, removed_nbytes, write
from statedict.report.document import Block, Document, Facts
from statedict.report.result import Result
from statedict.report.units import human_bytes, plural

__all__ = ["Conversion", "convert"]


class Conversion(Result):
    """What a conversion has written, or would write.

    Attributes: ``source``, ``target``, ``source_format``, ``target_format``, ``tensors`` and ``objects`` (counts), ``nbytes`` (of
    the new file), ``removed_nbytes`` (of storages that no tensor shows, left out), ``digests`` (whether they were recorded),
    ``dry_run``, ``durable``, ``method`` (bytes by the way they took), ``seconds`` (``write``, ``check``), ``findings``.
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
            "findings": [finding.to_dict() for finding in self.findings],
        }

    def document(self) -> Document:
        """The facts as a document."""
        size = (
            f"{human_bytes(self.nbytes)}, {plural(self.tensors, 'tensor')}, {plural(self.objects, 'value')} beside them"
        )
        pairs = [("from", f"{self.source} ({self.source_format})"), ("to", f"{self.target} ({self.target_format})")]
        pairs.append(("would be" if self.dry_run else "written", size))
        if self.removed_nbytes:
            pairs.append(("left out", f"{human_bytes(self.removed_nbytes)} that no tensor needs"))
        pairs.append(("digests", "one of each tensor, xxh3-128" if self.digests else "none"))
        if not self.dry_run:
            pairs.append(("checked", "read back and compared" if self.digests else "header read back and compared"))
            if not self.durable:
                pairs.append(("durable", "no: this file system has no fsync for it"))
        title = "Nothing was written (--dry-run)" if self.dry_run else f"Converted {self.source}"
        blocks: list[Block] = [Facts(pairs), *notes_of(self.findings)]
        return Document(title, blocks)


def convert(
    source: object,
    target: str | os.PathLike[str],
    *,
    at: str | Path | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    digests: bool = True,
    keep_storages: bool = False,
    limits: Limits | None = None,
    on_progress: Progress | None = None,
) -> Conversion:
    """Write a checkpoint again; the target's suffix says how: ``.safetensors``, or ``.pth .pt .bin .ckpt``.

    Nesting, values beside the tensors, ties, strides and ``_metadata`` are kept in both formats; every tensor is read in
    bounded memory. ``digests`` records an xxh3-128 of each tensor. Of storages that tensors are views of, only what they
    show is written, unless ``keep_storages``. ``dry_run`` plans everything and writes nothing.

    The target appears complete, read back and compared, or not at all; the source is never modified. Raises ``TargetExists``,
    ``FileError``, what ``open`` raises, and ``Unsupported`` or ``UnsafeContent`` for leaves that the target's format doesn't take.
    """
    path = os.fspath(target)
    format_of(path)
    check_target(path, overwrite=overwrite)
    checkpoint = open_checkpoint(source, at=at, limits=limits)
    try:
        _spare(checkpoint, path)
        manifest = checkpoint.manifest
        tree = Tree(manifest.structure, manifest.metadata, lambda entry: source_of(entry, checkpoint))
        prepared = prepare(tree, path, digests=digests, keep_storages=keep_storages)
        result = Conversion(checkpoint, path, prepared, digests=digests)
        if dry_run:
            return result
        start = time.perf_counter()
        written, checking = write(prepared, path, overwrite=overwrite, on_progress=on_progress)
        result.dry_run, result.durable, result.method = False, written.durable, written.method
        result.seconds = {"write": time.perf_counter() - start - checking, "check": checking}
        return result
    finally:
        if not isinstance(source, Checkpoint):
            checkpoint.close()


def _spare(checkpoint: Checkpoint, target: str) -> None:
    """Raise ``FileError`` where the target is one of the files that are read."""
    for file in checkpoint.manifest.files:
        if os.path.exists(target) and os.path.exists(file.path) and os.path.samefile(file.path, target):
            raise FileError("a file can't be converted in its own place", path=target, hint="Name another target")
