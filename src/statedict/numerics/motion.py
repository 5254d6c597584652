"""How large the values of a tensor are, and how far they have come since the step before, taken in block by block."""

from __future__ import annotations

from math import frexp, hypot, isfinite, ldexp, sqrt
from typing import Any

import numpy as np

from statedict.dtypes import DType
from statedict.numerics.arrays import Array, numpy_dtype
from statedict.numerics.tallies import by_byte, quiet

__all__ = ["Motion", "MotionRoom", "is_measured"]

# Numbers that are looked at together: 64 KiB of them in float64. Larger arrays leave the nearest cache, and from 10,000 numbers on
# OpenBLAS sums in threads of its own, each time in another order.
_VALUES = 8 * 1024
# Sums of squares between these two are exact enough; others are of numbers whose squares float64 doesn't have.
_HUGE, _TINY = 1e300, 1e-280


def is_measured(dtype: DType) -> bool:
    """Whether it is a kind of floating or complex numbers with whole bytes; pairs of float4 and floats of six bits aren't trained."""
    return dtype.kind in ("float", "complex") and dtype.numpy != "" and dtype.code != "F4_X2"


class MotionRoom:
    """Room for one block of each of two steps in float64, used again for each: one for each thread."""

    def __init__(self) -> None:
        self._now = np.empty(_VALUES)
        self._before = np.empty(_VALUES)
        self._apart = np.empty(_VALUES)
        self._flags = np.empty(_VALUES, np.bool_)
        self._wide = np.empty(_VALUES, np.uint32)

    def now(self, block: memoryview, dtype: DType) -> Array:
        """The numbers of a block, valid until the next; a complex one is two."""
        return self._widened(block, dtype, self._now)

    def before(self, block: memoryview, dtype: DType) -> Array:
        """Those of the step before."""
        return self._widened(block, dtype, self._before)

    def apart(self, now: Array, before: Array) -> Array:
        """``now - before``."""
        return np.subtract(now, before, out=self._apart[: len(now)])

    def finite(self, values: Array) -> Array:
        """Which of the numbers are neither NaN nor infinite."""
        return np.isfinite(values, out=self._flags[: len(values)])

    def _widened(self, block: memoryview, dtype: DType, out: Array) -> Array:
        if dtype.code == "BF16":
            raw = np.frombuffer(block, "<u2")
            wide = self._wide[: len(raw)]
            np.copyto(wide, raw)
            np.left_shift(wide, 16, out=wide)
            values: Any = wide.view(np.float32)
        elif dtype.bits == 8:
            raw = np.frombuffer(block, np.uint8)
            # "clip" writes into ``out`` directly; every byte has an entry.
            return np.take(by_byte(dtype), raw, out=out[: len(raw)], mode="clip")
        elif dtype.kind == "complex":
            values = np.frombuffer(block, {"C32": "<f2", "C64": "<f4", "C128": "<f8"}[dtype.code])
        else:
            values = np.frombuffer(block, numpy_dtype(dtype))
        found = out[: len(values)]
        np.copyto(found, values)
        return found


class Motion:
    """One tensor, or several, at one step.

    ``norm`` (L2) and ``largest`` (of all ``|x|``) are of the ``finite`` numbers, ``change`` is the L2 norm of what was added to the
    ``compared`` ones, which were finite before, too. Beside those there are ``nan`` and ``inf``; a complex number counts as two.
    """

    __slots__ = ("change", "compared", "finite", "inf", "largest", "nan", "norm")

    def __init__(self) -> None:
        self.norm = self.change = self.largest = 0.0
        self.finite = self.compared = self.nan = self.inf = 0

    def add(
        self, now: memoryview, dtype: DType, room: MotionRoom, before: tuple[memoryview, DType] | None = None
    ) -> None:
        """Take in packed little-endian elements, and those at the same places at the step before."""
        step = _VALUES // (2 if dtype.kind == "complex" else 1)
        with quiet():
            for first in range(0, len(now) // dtype.itemsize, step):
                values = room.now(_cut(now, dtype, first, step), dtype)
                self._take(values, room)
                if before is not None:
                    self._compare(values, room.before(_cut(*before, first, step), before[1]), room)

    @property
    def is_finite(self) -> bool:
        """Whether none of the numbers is NaN or infinite."""
        return not (self.nan or self.inf)

    def at_rest(self) -> Motion:
        """The same numbers, unchanged since the step before."""
        made = Motion()
        made.merge(self)
        made.change, made.compared = 0.0, self.finite
        return made

    def merge(self, other: Motion) -> None:
        """Take in what another has of other numbers."""
        self.norm, self.change = hypot(self.norm, other.norm), hypot(self.change, other.change)
        self.largest = max(self.largest, other.largest)
        self.finite += other.finite
        self.compared += other.compared
        self.nan += other.nan
        self.inf += other.inf

    def _take(self, values: Array, room: MotionRoom) -> None:
        squares = float(np.dot(values, values))
        if not isfinite(squares):
            finite = room.finite(values)
            nans = int(np.count_nonzero(np.isnan(values)))
            self.nan += nans
            self.inf += len(values) - int(np.count_nonzero(finite)) - nans
            values = values[finite]
            squares = float(np.dot(values, values))
        self.finite += len(values)
        largest = _largest(values)
        self.largest = max(self.largest, largest)
        self.norm = hypot(self.norm, _length(values, squares, largest))

    def _compare(self, now: Array, before: Array, room: MotionRoom) -> None:
        apart = room.apart(now, before)
        squares = float(np.dot(apart, apart))
        if not isfinite(squares):
            both = room.finite(now) & np.isfinite(before)
            # Halved, so that numbers of opposite signs that are nearly the largest have a distance.
            apart = now[both] / 2 - before[both] / 2
            self.change = hypot(self.change, 2 * _length(apart, float(np.dot(apart, apart)), _largest(apart)))
            self.compared += len(apart)
            return
        self.compared += len(apart)
        self.change = hypot(self.change, _length(apart, squares))


def _cut(block: memoryview, dtype: DType, first: int, count: int) -> memoryview:
    return block[first * dtype.itemsize : (first + count) * dtype.itemsize]


def _largest(values: Array) -> float:
    return max(float(np.maximum.reduce(values)), -float(np.minimum.reduce(values))) if len(values) else 0.0


def _length(values: Array, squares: float, largest: float | None = None) -> float:
    """The L2 norm of finite numbers whose sum of squares is known, if float64 has it."""
    if _TINY < squares < _HUGE:
        return sqrt(squares)
    exponent = frexp(_largest(values) if largest is None else largest)[1]
    scaled = np.ldexp(values, -exponent)
    try:
        return ldexp(sqrt(float(np.dot(scaled, scaled))), exponent)
    except OverflowError:
        return float("inf")
