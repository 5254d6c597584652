"""The statistics of tensors as cells of a table, of one tensor or of several that share a line."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import hypot, isfinite, sqrt

from statedict.ops.contents import TensorFacts
from statedict.ops.values import exact
from statedict.report.document import Column
from statedict.report.units import number

__all__ = ["figure_columns", "figures_of"]

_SUMS = ("zeros", "nan", "inf")


def figure_columns() -> list[Column]:
    """The columns of the cells that ``figures_of`` gives."""
    return [Column(title, "number") for title in ("Min", "Max", "Mean", "Std", "Zeros", "NaN", "Inf")]


def figures_of(tensors: Sequence[TensorFacts]) -> list[str]:
    """The extremes, mean, deviation and counts of all values of the tensors; empty where nobody counted, or none is."""
    known = [(tensor.stats, tensor.numel) for tensor in tensors if tensor.stats is not None]
    if not known:
        return [""] * (4 + len(_SUMS))
    stats = [each for each, _ in known]
    lows, highs = list(_numbers(stats, "min")), list(_numbers(stats, "max"))
    mean, deviation = _pooled(known)
    cells = [number(min(lows, default=None)), number(max(highs, default=None)), mean, deviation]
    sums = [sum([int(each) for each in _numbers(stats, name)]) for name in _SUMS]
    return cells + [exact(total) if total else "" for total in sums]


def _numbers(stats: Sequence[Mapping[str, object]], name: str) -> Iterator[int | float]:
    for each in stats:
        value = each.get(name)
        if isinstance(value, (int, float)):
            yield value


def _pooled(known: Sequence[tuple[Mapping[str, object], int]]) -> tuple[str, str]:
    """Mean and deviation over all finite values; one tensor's own as they are."""
    if len(known) == 1:
        stats, _ = known[0]
        return number(stats.get("mean")), number(stats.get("std"))
    # Combined without sums of squares: the largest numbers have none, and those of a mean far from 0 lose the deviation.
    count, average, deviation = 0, 0.0, 0.0
    for stats, numel in known:
        mean, std = stats.get("mean"), stats.get("std")
        if not isinstance(mean, (int, float)) or not isfinite(mean):
            continue
        finite = numel - sum([int(each) for name in ("nan", "inf") for each in _numbers([stats], name)])
        spread = std if isinstance(std, (int, float)) and isfinite(std) else 0.0
        old, new = count / (count + finite), finite / (count + finite)
        apart = mean / 2 - average / 2
        deviation = hypot(deviation * sqrt(old), spread * sqrt(new), 2 * sqrt(old * new) * apart)
        count, average = count + finite, average + new * apart + new * apart
    return (number(average), number(deviation)) if count else ("", "")
