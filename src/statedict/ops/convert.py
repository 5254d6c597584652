"""A checkpoint written again: in another format, changed by rules, in another dtype, or only its weights."""

from __future__ import annotations

import os
import time
from typing import NamedTuple

from statedict import rules as language
from statedict.checkpoint import Checkpoint
from statedict.checkpoint import open as open_checkpoint
from statedict.io.durable import check_target
from statedict.io.writers import Progress
from statedict.keys import Path
from statedict.limits import Limits
from statedict.manifest import Finding
from statedict.ops.casting import Casting, TensorCast, cast, examined, nbytes_of, refuse_overflow
from statedict.ops.conversion import Conversion
from statedict.ops.publishing import Publication, published
from statedict.ops.shards import ShardTarget, plan_shards, refuse_own_place, shard_target, write_shards
from statedict.ops.sources import source_of
from statedict.ops.writing import Prepared, Tree, format_of, prepare, write
from statedict.rules import Plan, Rules, RulesLike
from statedict.rules.drafts import CastOf

__all__ = ["Conversion", "convert"]


def convert(
    source: object,
    target: str | os.PathLike[str],
    *,
    rules: RulesLike = (),
    dtype: str | None = None,
    at: str | Path | None = None,
    max_shard_size: str | int | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    digests: bool = True,
    keep_storages: bool = False,
    allow_overflow: bool = False,
    weights_only: bool = False,
    ema: bool = False,
    limits: Limits | None = None,
    on_progress: Progress | None = None,
) -> Conversion:
    """Write a checkpoint again; the target's suffix says how: ``.safetensors``, ``.npz``, or ``.pth .pt .bin .ckpt``.

    A folder (a name with a slash at its end), ``NAME.safetensors.index.json``, and ``NAME.safetensors`` with a ``max_shard_size``
    (bytes, or a text such as ``5GB``) are written in several files and an index, as the hub has them; in one where that is enough.

    Nesting, values beside the tensors, ties, strides and ``_metadata`` are kept in both formats; every tensor is read in
    bounded memory. Changes are made in this order, whatever order they are given in:

    - ``at`` takes the part under a key
    - ``weights_only`` takes the weights in it as one flat state dict of plain tensors, without the component of a wrapper, and
      leaves out optimizer, scheduler and all else; ``ema`` does so with the averaged weights
    - ``rules`` are applied, one after the other
    - ``dtype`` casts what is a float

    The values of what is cast, by a rule too, are read first: if a number would become Inf, nothing is written, unless ``allow_overflow``.

    ``digests`` records an xxh3-128 of each tensor. Of storages that tensors are views of, only what they show is written, unless
    ``keep_storages``. ``dry_run`` plans everything, reads what a cast would do to the values, and writes nothing.

    The target appears complete, read back and compared, or not at all; the source is never modified. Raises ``TargetExists``,
    ``FileError``, what ``open`` raises, ``RuleError`` for rules and casts that can't be, ``KeyMismatch`` and ``KeyNotFound`` where
    it isn't sure which weights are meant, and ``Unsupported`` or ``UnsafeContent`` for leaves that the target's format doesn't take.
    """
    path = os.fspath(target)
    shards = shard_target(path, max_shard_size)
    if shards is None:
        format_of(path)
        check_target(path, overwrite=overwrite)
    else:
        shards.check(overwrite=overwrite)
    checkpoint = open_checkpoint(source, at=at, limits=limits)
    try:
        changes = _changed(checkpoint, Rules.of(rules), dtype, weights_only=weights_only, ema=ema)
        made = changes.checkpoint
        tree = Tree(made.manifest.structure, made.manifest.metadata, lambda entry: source_of(entry, made))
        if shards is None:
            prepared = prepare(tree, path, digests=digests, keep_storages=keep_storages)
        else:
            prepared = plan_shards(tree, shards, digests=digests, keep_storages=keep_storages)
        refuse_own_place(checkpoint.manifest.files, [path] if shards is None else shards.paths(prepared))
        result = Conversion(made, path, prepared, digests=digests and prepared.plan.format != "npz")
        changes.describe(result)
        progress = _Progress(on_progress, nbytes_of(changes.casts), prepared.plan.nbytes)
        result.casts, seconds = changes.examined(progress, allow_overflow=allow_overflow)
        result.seconds = seconds
        if not dry_run:
            _write(result, prepared, shards, overwrite=overwrite, progress=progress)
        return result
    finally:
        if not isinstance(source, Checkpoint):
            checkpoint.close()


class _Changes(NamedTuple):
    """What becomes of a checkpoint on its way: each step that was asked for."""

    checkpoint: Checkpoint
    publication: Publication | None
    plan: Plan | None
    casting: Casting | None
    before_cast: Checkpoint

    @property
    def casts(self) -> list[CastOf]:
        """The tensors that are cast, by a rule or for the dtype."""
        of_rules = [] if self.plan is None else list(self.plan.casts)
        return of_rules + ([] if self.casting is None else self.casting.casts(self.before_cast))

    def describe(self, result: Conversion) -> None:
        """Put into the result what was done, save for the values."""
        findings: list[Finding] = []
        if self.publication is not None:
            result.weights, result.left_out = self.publication.weights, self.publication.left_out
            findings += self.publication.findings
        if self.plan is not None:
            result.rules = [str(rule) for rule in self.plan.rules]
            result.coverage, result.coverage_lines = self.plan.coverage.to_dict(), self.plan.coverage.lines()
        if self.casting is not None:
            findings += self.casting.findings
        result.findings = [*findings, *result.findings]

    def examined(self, progress: _Progress, *, allow_overflow: bool) -> tuple[list[TensorCast], dict[str, float]]:
        """What casts do to the values, and the seconds that it took to see. Raises ``RuleError`` for silent Inf."""
        wanted = self.casts
        if not wanted:
            return [], {}
        start = time.perf_counter()
        casts = examined(wanted, progress.examined)
        if not allow_overflow:
            refuse_overflow(casts, self.before_cast)
        return casts, {"examine": time.perf_counter() - start}


def _changed(checkpoint: Checkpoint, rules: Rules, dtype: str | None, *, weights_only: bool, ema: bool) -> _Changes:
    """The checkpoint with all changes; nothing is read."""
    publication = published(checkpoint, ema=ema, spared=rules) if weights_only or ema else None
    made = checkpoint if publication is None else publication.checkpoint
    plan = language.plan(made, rules) if len(rules) else None
    made = made if plan is None else plan.checkpoint
    casting = None if dtype is None else cast(made, dtype)
    return _Changes(made if casting is None else casting.checkpoint, publication, plan, casting, made)


class _Progress:
    """One count of bytes over looking at values and writing them."""

    def __init__(self, callback: Progress | None, examined_nbytes: int, written_nbytes: int) -> None:
        self._callback = callback
        self._examined_nbytes = examined_nbytes
        self._nbytes = examined_nbytes + written_nbytes

    def examined(self, done: int) -> None:
        """So many bytes were looked at."""
        if self._callback is not None:
            self._callback(done, self._nbytes)

    def written(self, done: int, total: int) -> None:
        """So many bytes were written."""
        if self._callback is not None:
            self._callback(self._examined_nbytes + done, self._nbytes)


def _write(
    result: Conversion, prepared: Prepared, shards: ShardTarget | None, *, overwrite: bool, progress: _Progress
) -> None:
    """Write what is prepared, and put into the result how."""
    start = time.perf_counter()
    if shards is None:
        written, checking = write(prepared, result.target, overwrite=overwrite, on_progress=progress.written)
    else:
        written, checking = write_shards(prepared, shards, overwrite=overwrite, on_progress=progress.written)
    result.dry_run, result.durable, result.method = False, written.durable, written.method
    took = {"write": time.perf_counter() - start - checking, "check": checking}
    result.seconds = {**result.seconds, **took}
