"""Values that no healthy tensor has: which rows hold NaN or Inf, and numbers of no sensible size."""

from __future__ import annotations

from typing import Any

import numpy as np

from statedict.dtypes import DType
from statedict.numerics.arrays import Array, numpy_dtype

__all__ = ["BadRows", "Magnitudes", "distance"]

# Elements that are looked at together.
_VALUES = 256 * 1024
# Rows that are kept by number.
_MOST_ROWS = 4096
# Numbers beyond these are no weights: float32 ends at 3.4e38, and its normal numbers at 1.2e-38.
_HUGE, _TINY = 1e30, 1e-30


def _floats(block: memoryview, dtype: DType) -> Array:
    """The values of packed little-endian bytes as floats; of complex numbers both components."""
    kind = numpy_dtype(dtype)
    if dtype.kind == "complex":
        kind = np.dtype({"C32": "<f2", "C64": "<f4", "C128": "<f8"}[dtype.code])
    values: Array = np.frombuffer(block, kind)
    return values if values.dtype.kind == "f" else values.astype(np.float32)


class BadRows:
    """The rows (along the first dimension) in which NaN or Inf stands, taken in block by block in reading order.

    ``rows`` are the first of them, ``count`` is how many there are, ``row_values`` the values of one row.
    """

    def __init__(self, dtype: DType, row_values: int) -> None:
        self.rows: list[int] = []
        self.count = 0
        self._dtype = dtype
        self._wide = max(1, row_values) * (2 if dtype.kind == "complex" else 1)
        self._done = 0
        self._last = -1

    def add(self, block: memoryview) -> None:
        """Take in the next values."""
        values = _floats(block, self._dtype)
        for first in range(0, len(values), _VALUES):
            piece = values[first : first + _VALUES]
            bad = np.flatnonzero(~np.isfinite(piece))
            if len(bad):
                self._take(np.unique((bad + self._done) // self._wide))
            self._done += len(piece)

    def _take(self, rows: Array) -> None:
        """Ascending numbers of rows; the first may be the last of those before."""
        if int(rows[0]) == self._last:
            rows = rows[1:]
        if len(rows):
            self.count += len(rows)
            self.rows += [int(row) for row in rows[: _MOST_ROWS - len(self.rows)]]
            self._last = int(rows[-1])


class Magnitudes:
    """How many finite values are larger than 1e30, how many of the others but zeros smaller than 1e-30, and the huge ones that differ."""

    def __init__(self, dtype: DType) -> None:
        self.numel = self.huge = self.tiny = 0
        self.kinds: set[float] = set()  # some of the huge values
        self._dtype = dtype

    def add(self, block: memoryview) -> None:
        """Take in some values."""
        values = _floats(block, self._dtype)
        for first in range(0, len(values), _VALUES):
            sizes = np.abs(values[first : first + _VALUES])
            huge = sizes[(sizes > _HUGE) & np.isfinite(sizes)]
            self.numel += len(sizes)
            self.huge += len(huge)
            self.tiny += int(np.count_nonzero((sizes < _TINY) & (sizes > 0)))
            self.kinds |= {float(value) for value in huge[:64]}


def distance(a: memoryview, b: memoryview, dtype: DType) -> tuple[float, float]:
    """Sums of squares, in float64, of the differences of two blocks of one dtype, and of the values of the first."""
    one, two = (_floats(block, dtype) for block in (a, b))
    apart, size = 0.0, 0.0
    for first in range(0, len(one), _VALUES):
        left: Any = one[first : first + _VALUES].astype(np.float64)
        right: Any = two[first : first + _VALUES].astype(np.float64)
        size += float(np.dot(left, left))
        left -= right
        apart += float(np.dot(left, left))
    return apart, size
