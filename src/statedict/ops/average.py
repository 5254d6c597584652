"""The mean of several checkpoints of one structure, as a checkpoint."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Literal

from statedict.checkpoint import Checkpoint
from statedict.checkpoint import open as open_checkpoint
from statedict.dtypes import BY_TORCH, DType
from statedict.errors import FileError, StateDictError, Unsupported
from statedict.io.durable import check_target
from statedict.io.writers import Progress
from statedict.keys import Path, dotted
from statedict.limits import Limits
from statedict.manifest import Container, Finding, Node, TensorEntry
from statedict.nodes import fold
from statedict.ops.agreement import entries_of, refuse_disagreement
from statedict.ops.casting import cast, examined, refuse_overflow
from statedict.ops.casts import refusal
from statedict.ops.conversion import Conversion
from statedict.ops.findings import named
from statedict.ops.shares import Shares, shares_of
from statedict.ops.sources import source_of
from statedict.ops.training import buffers_of, training_of
from statedict.ops.writing import Prepared, Tree, format_of, prepare, write
from statedict.report.document import Document
from statedict.report.units import plural
from statedict.rules.drafts import Draft, identity_of
from statedict.views import is_dense, is_packed

__all__ = ["Accumulate", "Averaging", "average"]

Accumulate = Literal["float32", "float64"]

_FLOAT32 = BY_TORCH["float32"]
# The key of the file's metadata under which stands what the mean was made of.
_PROVENANCE = "statedict.average"
# What a batch norm has seen, which belongs to the weights that it was seen with.
_STATISTICS = ("running_mean", "running_var")


class Averaging(Conversion):
    """What an average has written, or would write: a ``Conversion`` whose ``source`` names all sources."""

    def document(self) -> Document:
        """The facts as a document."""
        made = super().document()
        return made if self.dry_run else made._replace(title=f"Averaged into {self.target}")


def average(
    sources: Iterable[object],
    target: str | os.PathLike[str],
    *,
    weights: Sequence[float] | None = None,
    ema: float | None = None,
    at: str | Path | None = None,
    dtype: str | None = None,
    accumulate: Accumulate | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    digests: bool = True,
    allow_overflow: bool = False,
    limits: Limits | None = None,
    on_progress: Progress | None = None,
) -> Averaging:
    """Write the mean of checkpoints of one structure, in any formats; the target's suffix says in which it is written.

    ``weights`` are one number for each source, and are divided by their sum. ``ema`` is the decay of a moving average over the
    sources in order: ``mean = ema * mean + (1 - ema) * next``. ``at`` is the part of each source to take. Sums are kept in
    ``accumulate``; unless it is given, in float32 for dtypes of up to 16 bits and in float64 for the others, so that they have at
    least 13 bits more than the result, which is rounded once. ``dtype`` then casts the mean as ``convert`` does.

    Floats and complex numbers are averaged. Integers, booleans and all values that are no tensors are those of the last source, and a
    finding says so; another says where statistics of batch norms were averaged. Ties that all sources have stay ties. What the mean
    was made of stands in the file's metadata under ``statedict.average``.

    Everything is read in bounded memory, and the sources are never modified. Raises ``KeyMismatch`` or ``SpecMismatch`` for every
    difference in keys, shapes and dtypes, before anything is read; ``Unsupported`` for quantised weights and for checkpoints with an
    optimizer; ``RuleError`` for weights that make no mean; and what ``convert`` raises.
    """
    path = os.fspath(target)
    format_of(path)
    check_target(path, overwrite=overwrite)
    given = _listed(sources)
    shares = shares_of(len(given), weights, ema)
    with ExitStack() as stack:
        checkpoints = [_opened(source, at, limits, stack) for source in given]
        _refuse(checkpoints, path, cast=dtype is not None)
        mean, findings = _mean(checkpoints, shares, accumulate)
        casting = None if dtype is None else cast(mean, dtype)
        made = mean if casting is None else casting.checkpoint
        texts = {**made.manifest.metadata, _PROVENANCE: _provenance(checkpoints, shares, accumulate)}
        prepared = prepare(
            Tree(made.manifest.structure, texts, lambda entry: source_of(entry, made)), path, digests=digests
        )
        result = Averaging(made, path, prepared, digests=digests)
        result.source = ", ".join([checkpoint.source for checkpoint in checkpoints])
        result.source_format = ", ".join(dict.fromkeys([checkpoint.format for checkpoint in checkpoints]))
        result.removed_nbytes = 0  # nothing that a tensor shows
        result.findings = [*shares.findings, *findings, *(casting.findings if casting else ()), *result.findings]
        if casting is not None:
            result.casts = examined(casting.casts(mean), lambda done: None)
            if not allow_overflow:
                refuse_overflow(result.casts, mean)
        if not dry_run:
            _write(result, prepared, overwrite=overwrite, on_progress=on_progress)
        return result


def _write(result: Averaging, prepared: Prepared, *, overwrite: bool, on_progress: Progress | None) -> None:
    """Write what is prepared, and put into the result how."""
    start = time.perf_counter()
    written, checking = write(prepared, result.target, overwrite=overwrite, on_progress=on_progress)
    result.dry_run, result.durable, result.method = False, written.durable, written.method
    result.seconds = {"write": time.perf_counter() - start - checking, "check": checking}


def _listed(sources: Iterable[object]) -> list[object]:
    if isinstance(sources, (str, bytes, os.PathLike, Mapping)) or not isinstance(sources, Iterable):
        raise StateDictError("an average takes a list of sources", found=type(sources).__name__, hint="Give a list")
    given = list(sources)
    if not given:
        raise StateDictError("there is nothing to average", hint="Name at least one source")
    return given


def _opened(source: object, at: str | Path | None, limits: Limits | None, stack: ExitStack) -> Checkpoint:
    checkpoint = open_checkpoint(source, at=at, limits=limits)
    if not isinstance(source, Checkpoint):
        stack.callback(checkpoint.close)
    return checkpoint


# ---------------------------------------------------------------- what has no mean


def _refuse(checkpoints: Sequence[Checkpoint], target: str, *, cast: bool) -> None:
    """Raise for whatever keeps the mean from being made; no tensor is read."""
    for checkpoint in checkpoints:
        for file in checkpoint.manifest.files:
            if os.path.exists(target) and os.path.exists(file.path) and os.path.samefile(file.path, target):
                raise FileError("the mean can't take the place of a source", path=target, hint="Name another target")
        _refuse_optimizer(checkpoint)
    refuse_disagreement(checkpoints, dtypes=not cast)
    last = checkpoints[-1]
    entries = entries_of(last)
    for key, entry in entries.items():
        reason = _refusal(key, entry, entries)
        if reason:
            hint = "Average the weights before they are quantised, or leave the tensor out"
            raise Unsupported(f"there is no mean of this tensor: {reason}", path=last.source, key=key, hint=hint)


def _refuse_optimizer(checkpoint: Checkpoint) -> None:
    training = training_of(checkpoint.manifest)
    if training.optimizers:
        weights = training.weights
        hint = f"Name the weights: at='{dotted(weights)}', or --at" if weights else "Name the weights with at=, or --at"
        what = "this is a training checkpoint, and there is no mean of the state of its optimizer"
        raise Unsupported(what, path=checkpoint.source, key=dotted(training.optimizers[0].path) or None, hint=hint)


def _refusal(key: str, entry: TensorEntry, entries: Mapping[str, TensorEntry]) -> str | None:
    """Why a tensor can neither be averaged nor be taken from the last source; None for one that can."""
    dtype = entry.dtype
    if dtype.kind == "float" and dtype.bits <= 8:
        return f"numbers of {dtype} mean nothing without their scales"
    if dtype.kind == "quantized" or entry.layout == "quantized":
        return "these are quantised weights"
    if entry.view is None and entry.device != "meta" and dtype.kind in ("float", "complex"):
        return f"it is {entry.layout}"
    if dtype.kind in ("int", "uint") and dtype.bits <= 8:
        # Said of any small integers; a scale is named where there is one.
        said = [refusal(key, dtype, _FLOAT32, is_parameter=True, keys=keys) for keys in (entries, ())]
        return said[0] if said[0] != said[1] else None
    return None


# ---------------------------------------------------------------- the mean


def _mean(
    checkpoints: Sequence[Checkpoint], shares: Shares, accumulate: Accumulate | None
) -> tuple[Checkpoint, list[Finding]]:
    """The mean as a checkpoint of which nothing is computed yet, over the files of the sources; and what is to be said of it."""
    from statedict.recipes.averaging import Mean

    last = checkpoints[-1]
    shown = {last.path_of(key): key for key in last}
    draft = Draft(last)
    kept: list[str] = []

    def leaf(node: Node) -> Node:
        if not isinstance(node, TensorEntry):
            return node
        key = shown[node.path]
        if node.dtype.kind not in ("float", "complex"):
            kept.append(key)
            return node
        tensors = [checkpoint[key] for checkpoint in checkpoints]
        dtype = _dtype([tensor.entry.dtype for tensor in tensors])
        sums = accumulate or ("float32" if dtype.bits <= 16 else "float64")
        # Tensors are tied in the mean if they are in every source.
        tie = tuple([identity_of(tensor.entry) for tensor in tensors])
        made = draft.computed_once(tie, node, lambda: Mean(tensors, shares.weights, sums, dtype))
        keeps = is_dense(node.shape, node.stride) and not is_packed(node.shape, node.stride)
        return made._replace(memory_stride=node.stride if keeps else None)

    draft.root = fold(last.manifest.structure, leaf, _container)
    draft.settle()
    return draft.checkpoint(owns_files=False), _findings(last, shown, kept)


def _dtype(dtypes: Sequence[DType]) -> DType:
    """What the mean of such tensors is rounded to: their dtype, or one that loses nothing where they have several."""
    if len(set(dtypes)) == 1:
        return dtypes[0]
    return BY_TORCH["float64" if BY_TORCH["float64"] in dtypes else "float32"]


def _container(node: Container, children: list[Node]) -> Container:
    return Container(node.kind, node.keys, children, type=node.type, attributes=node.attributes)


def _findings(last: Checkpoint, shown: Mapping[Path, str], kept: Sequence[str]) -> list[Finding]:
    """What the mean is not."""
    manifest = last.manifest
    found = []
    if kept:
        message = f"{plural(len(kept), 'tensor')} of integers or booleans taken from the last source: {named(kept)}"
        found.append(Finding("average-last", "info", message, tuple(kept)))
    if manifest.objects:
        count = plural(len(manifest.objects), "value")
        keys = tuple([dotted(path) for path in manifest.objects])
        message = f"{count} beside the tensors taken from the last source: {named(keys)}"
        found.append(Finding("average-last-values", "info", message, keys))
    buffers = buffers_of(manifest.tensors)
    statistics = tuple([key for path, key in shown.items() if path in buffers and key.endswith(_STATISTICS)])
    if statistics:
        message = (
            f"the statistics of batch norms are means too, and not those of the mean weights: {named(statistics)}. "
            "Recompute them on training data, as torch.optim.swa_utils.update_bn does"
        )
        found.append(Finding("average-statistics", "warning", message, statistics))
    return found


# ---------------------------------------------------------------- where it came from


def _provenance(checkpoints: Sequence[Checkpoint], shares: Shares, accumulate: Accumulate | None) -> str:
    """What the mean was made of, as canonical JSON: file names without folders, weights, and digests where the files hold them."""
    import json

    sources = []
    for checkpoint, weight in zip(checkpoints, shares.weights):
        facts: dict[str, object] = {"name": os.path.basename(checkpoint.source), "weight": weight}
        digest = _digest(checkpoint)
        sources.append({**facts, "digest": digest} if digest else facts)
    made: dict[str, object] = {"sources": sources, "accumulate": accumulate or "by dtype"}
    if shares.ema is not None:
        made["ema"] = shares.ema
    return json.dumps(made, sort_keys=True, separators=(",", ":"))


def _digest(checkpoint: Checkpoint) -> str | None:
    """One digest over the keys of the tensors and the digests that the file records of them; None if it lacks one."""
    from xxhash import xxh3_128

    whole = xxh3_128()
    for key, entry in entries_of(checkpoint).items():
        recorded = entry.digest or (entry.view.storage.digest if entry.view is not None else None)
        if recorded is None:
            return None
        whole.update(f"{key}\0{recorded}\n".encode("utf-8", "backslashreplace"))
    return f"xxh3-128:{whole.hexdigest()}"
