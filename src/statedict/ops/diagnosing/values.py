"""What looks wrong in the values: NaN and Inf with their rows, constants, statistics that nobody gathered, memory that nobody set.

Everything is judged by the figures of one pass. Tensors that look odd by those, and only they, are read once more.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from statedict.checkpoint import Checkpoint
from statedict.errors import FormatError, StateDictError
from statedict.lazy_tensor import LazyTensor
from statedict.manifest import Finding, TensorEntry
from statedict.ops.diagnosing.beginnings import beginnings
from statedict.ops.diagnosing.subject import Part, Subject
from statedict.ops.findings import named
from statedict.report.units import number, plural
from statedict.tree import ranges

__all__ = ["value_faults"]

# Tensors whose rows are named in one message.
_DETAILED = 3
# Beyond these the largest value of a tensor is looked at: no weight is so large, none that does anything so small.
_HUGE, _TINY = 1e30, 1e-30
# The share of a tensor's values that must be of no sensible size.
_ODD_SHARE = 100
# Constant tensors of fewer values say little.
_FEWEST = 8
# What is constant by its nature: buffers, and parameters that begin so and may stay.
_STATISTICS = re.compile(r"(^|[._])(running_mean|running_var|num_batches_tracked)$")
_MASK = re.compile(r"mask|position_ids|inv_freq|rel_pos_index|relative_position_index|causal|triu|tril", re.IGNORECASE)


def value_faults(subject: Subject) -> Iterator[Finding]:
    """Everything that the figures show. Raises what reading raises."""
    fresh, untrained = beginnings(subject)
    yield from fresh
    bad = _non_finite(subject)
    yield from _described(subject, bad)
    sick = {entry.path for entry in bad}
    odd = [entry for entry in _odd(subject) if entry.path not in sick]
    yield from _uninitialised(subject, odd)
    yield from _impossible(subject, sick)
    for part in subject.parts:
        if part.path not in untrained:
            yield from _constant(subject, part)


# -------------------------------------------------------------------- NaN and Inf


def _non_finite(subject: Subject) -> list[TensorEntry]:
    """The tensors with NaN or Inf, but for masks, which have -Inf and nothing else beside one number."""
    found = []
    for path, figures in subject.figures.items():
        nan, inf = figures.get("nan"), figures.get("inf")
        entry = subject.checkpoint.manifest.tensors[path]
        if nan or (inf and not (figures.get("std") in (0, None) and _MASK.search(subject.names[path]))):
            found.append(entry)
    return found


def _described(subject: Subject, bad: Sequence[TensorEntry]) -> Iterator[Finding]:
    places = {entry.path for _, _, entry in subject.weights()}
    weights = [entry for entry in bad if entry.path in places]
    statistics = [entry for entry in weights if _STATISTICS.search(subject.names[entry.path])]
    if weights and len(statistics) == len(weights):
        message = (
            f"NaN or Inf in the statistics of {plural(len(weights), 'batch norm tensor')} and nowhere else: "
            f"{_rows(subject, weights)}. In eval mode the model gives NaN. The weights are whole: statistics can be "
            "gathered anew with torch.optim.swa_utils.update_bn and data"
        )
        yield Finding("non-finite", "error", message, subject.keys(weights))
    elif weights:
        message = (
            f"NaN or Inf in {plural(len(weights), 'tensor')}: {_rows(subject, weights)}. A model that uses these "
            "values gives NaN. Take an earlier checkpoint: zeros in their places would make a model that runs and "
            "is wrong"
        )
        yield Finding("non-finite", "error", message, subject.keys(weights))
    # A single number may be the best loss so far, which begins as infinity.
    others = [entry for entry in bad if entry.path not in places and entry.shape]
    if others:
        message = (
            f"NaN or Inf in {plural(len(others), 'tensor')} beside the weights (the state of an optimizer, say): "
            f"{_rows(subject, others)}. A training that goes on from here soon has them in the weights"
        )
        yield Finding("non-finite", "error", message, subject.keys(others))


def _rows(subject: Subject, entries: Sequence[TensorEntry]) -> str:
    """The first of the tensors with the rows that have NaN or Inf, and how many others there are."""
    shown = [f"{named(subject.keys([entry]))}{_place(subject, entry)}" for entry in entries[:_DETAILED]]
    rest = len(entries) - len(shown)
    return ", ".join(shown) + (f" and {rest:,} more" if rest else "")


def _place(subject: Subject, entry: TensorEntry) -> str:
    """Where in a tensor they are: in all of it, in rows, or how many."""
    nan, inf = (subject.figure(entry, name) for name in ("nan", "inf"))
    count = (nan if isinstance(nan, int) else 0) + (inf if isinstance(inf, int) else 0)
    if count >= entry.numel > 0:
        return " (every value)"
    if len(entry.shape) < 1 or entry.parts:
        return ""
    what = "place" if len(entry.shape) == 1 else "row"
    rows, total = _bad_rows(subject.checkpoint, entry)
    if not rows:
        return f" ({count:,} values)"
    listed = ranges(rows[:64]) if len(rows) == total else f"{ranges(rows[:3])} and more"
    return f" ({plural(count, 'value')} in {what if total == 1 else what + 's'} {listed} of {entry.shape[0]:,})"


def _bad_rows(checkpoint: Checkpoint, entry: TensorEntry) -> tuple[list[int], int]:
    from statedict.numerics.oddities import BadRows

    found = BadRows(entry.dtype, entry.numel // max(entry.shape[0], 1))
    try:
        for block in LazyTensor(entry, checkpoint).blocks():
            found.add(block)
    except StateDictError:
        return [], 0
    return found.rows, found.count


# -------------------------------------------------------------------- sizes that no weight has


def _odd(subject: Subject) -> list[TensorEntry]:
    """Float weights whose largest value is of no sensible size."""
    found = []
    for _, name, entry in subject.weights():
        low, high = subject.figure(entry, "min"), subject.figure(entry, "max")
        if (
            entry.dtype.kind != "float"
            or not isinstance(low, float)
            or not isinstance(high, float)
            or _MASK.search(name)
        ):
            continue
        largest = max(-low, high)
        if largest > _HUGE or 0 < largest < _TINY:
            found.append(entry)
    return found


def _uninitialised(subject: Subject, odd: Sequence[TensorEntry]) -> Iterator[Finding]:
    found = [entry for entry in odd if _is_noise(subject.checkpoint, entry)]
    if found:
        extremes = [
            f"{number(subject.figure(each, 'min'))} to {number(subject.figure(each, 'max'))}" for each in found[:1]
        ]
        message = (
            f"the values of {plural(len(found), 'tensor')} look like memory that nobody set: "
            f"{named(subject.keys(found))} (from {extremes[0]}). No training makes numbers of such sizes. They were "
            "allocated and never filled, as layers are that a loader skipped"
        )
        yield Finding("uninitialised", "warning", message, subject.keys(found))


def _is_noise(checkpoint: Checkpoint, entry: TensorEntry) -> bool:
    """Whether the values of no sensible size are many, or differ: one huge number again and again is a mask's."""
    from statedict.numerics.oddities import Magnitudes

    sizes = Magnitudes(entry.dtype)
    try:
        for block in LazyTensor(entry, checkpoint).blocks():
            sizes.add(block)
    except FormatError:
        return False  # what can't be read has been said
    return (sizes.huge > 0 and (len(sizes.kinds) > 1 or sizes.tiny > 0)) or _ODD_SHARE * sizes.tiny > sizes.numel


def _impossible(subject: Subject, sick: set[tuple[str | int, ...]]) -> Iterator[Finding]:
    """Variances below zero."""
    found = []
    for _, name, entry in subject.weights():
        low = subject.figure(entry, "min")
        if name.endswith("running_var") and isinstance(low, float) and low < 0 and entry.path not in sick:
            found.append(entry)
    if found:
        message = (
            f"{plural(len(found), 'running variance')} are below 0, which no variance is: "
            f"{named(subject.keys(found))}. The model gives NaN there in eval mode. Averages or differences of "
            "checkpoints have such values: statistics can't be subtracted"
        )
        yield Finding("negative-variance", "error", message, subject.keys(found))


# -------------------------------------------------------------------- constants


def _constant(subject: Subject, part: Part) -> Iterator[Finding]:
    """Weights with two or more dimensions whose values are all one; biases and norms begin so and may stay."""
    found: list[TensorEntry] = []
    zero = True
    for name, entry in part.tensors.items():
        if len(entry.shape) < 2 or entry.dtype.kind not in ("float", "int", "uint") or entry.numel < _FEWEST:
            continue
        if _MASK.search(name) or _STATISTICS.search(name) or max(entry.shape) == entry.numel or "lora_" in name:
            continue
        low, high = subject.figure(entry, "min"), subject.figure(entry, "max")
        if low is not None and low == high:
            found.append(entry)
            zero = zero and low == 0
    if found:
        what = "zero" if zero else "one and the same number"
        names = named(subject.keys(found))
        message = (
            f"every value of {plural(len(found), 'weight')} is {what}: {names}. Some layers are made so on purpose "
            "(the last of a residual branch, a control network, a head), and are then not trained yet; else the "
            "values were lost on the way"
        )
        yield Finding("constant-weights", "warning", message, subject.keys(found))
