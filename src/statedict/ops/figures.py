"""The statistics of tensors as cells of a table, of one tensor or of several that share a line."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import isfinite, sqrt

from statedict.ops.contents import TensorFacts
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
    return cells + [f"{total:,}" if total else "" for total in sums]


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
    count, total, squares = 0, 0.0, 0.0
    for stats, numel in known:
        mean, std = stats.get("mean"), stats.get("std")
        if not isinstance(mean, (int, float)) or not isfinite(mean):
            continue
        finite = numel - sum([int(each) for name in ("nan", "inf") for each in _numbers([stats], name)])
        spread = std if isinstance(std, (int, float)) and isfinite(std) else 0.0
        count, total, squares = count + finite, total + finite * mean, squares + finite * (spread**2 + mean**2)
    if not count:
        return "", ""
    average = total / count
    return number(average), number(sqrt(max(0.0, squares / count - average**2)))
