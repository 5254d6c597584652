"""The order that rows were put in, told by where each of them was: nested loops over a dimension seen as several."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import NamedTuple

import numpy as np

from statedict.numerics.arrays import Array

__all__ = ["Grid", "grid_of", "ranges_of"]

# Loops within each other: real orders have at most four.
_MOST_LOOPS = 6


class Grid(NamedTuple):
    """Rows seen as ``view``, whose parts change places as ``order`` says; of the result, those from ``start`` on are meant."""

    view: tuple[int, ...]
    order: tuple[int, ...]
    start: int


def grid_of(rows: Sequence[int], count: int) -> Grid | None:
    """How ``count`` rows were reordered so that these came out, one after the other; None if it is no such order.

    [0, 2, 4, 1, 3, 5] of 6 are seen as (3, 2), whose parts change places. Some of the rows may be left out: then those meant come
    together in the reordered ones.
    """
    values = np.asarray(rows, dtype=np.int64)
    loops = _loops(values)
    if loops is None:
        return None
    # From the longest stride on: each stride is that of the next, times its size, times what the loops leave out in between.
    nested = sorted([(stride, size, at) for at, (size, stride) in enumerate(loops)], reverse=True)
    view: list[int] = []
    loop_of: list[int | None] = []  # the loop that each part of the view is, None where there is none
    outer = count
    for stride, size, at in nested:
        if stride < 1 or outer % (stride * size):
            return None
        if outer != stride * size:
            view.append(outer // (stride * size))
            loop_of.append(None)
        view.append(size)
        loop_of.append(at)
        outer = stride
    if outer > 1:
        view.append(outer)
        loop_of.append(None)
    fixed = [at for at, loop in enumerate(loop_of) if loop is None]
    order = (*fixed, *[loop_of.index(at) for at in range(len(loops))])
    start, first = 0, int(values[0])
    for at in fixed:
        start = start * view[at] + first // prod(view[at + 1 :]) % view[at]
    return Grid(tuple(view), order, start * len(values))


def _loops(values: Array) -> list[tuple[int, int]] | None:
    """Sizes and strides of the loops that make the values, the outermost first."""
    found: list[tuple[int, int]] = []
    while len(values) > 1:
        size = _run(values)
        if size is None or len(found) == _MOST_LOOPS:
            return None
        found.append((size, int(values[1] - values[0])))
        values = values[::size]
    return found[::-1]


def _run(values: Array) -> int | None:
    """The length of the longest runs with one stride that the values are made of, all of them alike."""
    total, stride = len(values), int(values[1] - values[0])
    steps = np.diff(values) != stride
    longest = int(np.argmax(steps)) + 1 if steps.any() else total
    for size in range(longest, 1, -1):
        if total % size == 0:
            blocks = values.reshape(-1, size)
            if (blocks == blocks[:, :1] + np.arange(size) * stride).all():
                return size
    return None


def ranges_of(rows: Sequence[int], most: int) -> list[tuple[int, int]] | None:
    """The ranges of rows that these are, one behind the other; None where there are more than so many."""
    found: list[list[int]] = []
    for row in rows:
        if found and row == found[-1][1]:
            found[-1][1] += 1
        elif len(found) < most:
            found.append([row, row + 1])
        else:
            return None
    return [(start, stop) for start, stop in found]
