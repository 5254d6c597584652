"""The figures of many values: extremes, mean, spread and counts, taken in block by block."""

from __future__ import annotations

from functools import cache
from math import frexp, hypot, isfinite, ldexp, sqrt
from typing import Any

import numpy as np

from statedict.dtypes import DType
from statedict.numerics.arrays import Array, numpy_dtype

__all__ = ["FOUR_BITS", "Scratch", "Tally", "by_byte", "quiet"]

# Values that are looked at together. Fewer stay nearer to the processor, but then two threads wait for the interpreter more than
# they count: GB/s of float32 on two cores with 1 MiB of second-level cache each, page cache warm, by values a block and threads
# (medians of 5): 64 Ki 3.2 with one and 2.2 with two, 256 Ki 3.7 and 4.4, 512 Ki 3.8 and 5.2, 1 Mi 3.5 and 4.7.
_FIGURE_VALUES = 512 * 1024
# Bytes that a block has at most.
_FIGURE_NBYTES = 4 * 1024 * 1024
# float32 sums of squares are safe for values between these; others are summed in float64.
_LARGE, _SMALL = 1e15, 1e-12
# Sums of squares of a block are safe in float64 up to the first, and say something from a spread of the second on.
_HUGE, _TINY = 1e150, 1e-140
# How much farther from the pivot than spread about it the mean of a block may be, before the pivot is moved to it.
_FAR = 1.0
# Elements whose squares are summed in float32 at once: 64 Ki of them gave errors of 6e-6, 8 Ki give a tenth.
_DOT = 8192
# Bytes from which on they are counted two at a time: 1.3 GB/s, but 65,536 counts; singly 0.8 GB/s.
_PAIRED_NBYTES = 128 * 1024
# What the 16 numbers of four bits mean (the ml_dtypes README, float4_e2m1fn).
FOUR_BITS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


class Scratch:
    """Room for the passes over one block, used again for each: one for each thread."""

    def __init__(self) -> None:
        self.buffer = memoryview(bytearray(_FIGURE_NBYTES))  # to read a block into
        self._floats = np.empty(_FIGURE_VALUES, np.float64)
        self._shifted = np.empty(_FIGURE_VALUES, np.float64)
        self._flags = np.empty(_FIGURE_VALUES, np.bool_)

    def values(self, count: int, kind: Any) -> Array:
        """An array of that many numbers of up to 8 bytes each."""
        made: Array = self._floats.view(kind)[:count]
        return made

    def shifted(self, count: int, kind: Any) -> Array:
        """A second one."""
        made: Array = self._shifted.view(kind)[:count]
        return made

    def flags(self, count: int) -> Array:
        """An array of that many truth values."""
        return self._flags[:count]


def quiet() -> Any:
    """A context in which sums that overflow give infinity without a warning. It holds in its own thread only."""
    return np.errstate(over="ignore", invalid="ignore", under="ignore")


class Tally:
    """Extremes, mean, spread and counts of the values of one tensor, taken in block by block.

    Minimum and maximum are of all values but NaN; mean and standard deviation (of the whole population) of the finite ones. They
    are summed about a moving pivot, in float32 for blocks of float32 and below, and combined in float64 (Chan, Golub and LeVeque,
    "Updating Formulae and a Pairwise Algorithm for Computing Sample Variances", 1979). Deviations are combined without their
    squares, which the largest and smallest numbers of float64 don't have.
    """

    __slots__ = ("_dtype", "_kind", "_zero", "count", "high", "inf", "low", "mean", "nan", "numel", "std", "zeros")

    def __init__(self, dtype: DType, zero: int = 0) -> None:
        """``zero`` is the number that stands for nought in a quantised tensor."""
        self._dtype = dtype
        self._kind = numpy_dtype(dtype)
        self._zero = zero
        self.numel = 0
        self.count = 0  # finite values
        self.mean: Any = 0.0
        self.std = 0.0  # of those
        self.low: Any = None
        self.high: Any = None
        self.zeros = 0
        self.nan = 0
        self.inf = 0

    @property
    def block_nbytes(self) -> int:
        """Bytes of whole elements to take in at a time."""
        return min(_FIGURE_NBYTES, _FIGURE_VALUES * self._kind.itemsize)

    def add(self, block: memoryview, scratch: Scratch) -> None:
        """Take in packed little-endian values: whole elements, at most ``block_nbytes`` bytes."""
        if not len(block):
            return
        code = self._dtype.code
        if code == "BOOL":
            self._bools(np.frombuffer(block, np.uint8))
        elif self._dtype.kind in ("int", "uint", "quantized", "bits"):
            self._integers(np.frombuffer(block, self._kind), scratch)
        elif self._dtype.kind == "complex":
            self._complex(block, scratch)
        elif code == "F64":
            self._floats(np.frombuffer(block, self._kind), scratch)
        elif self._dtype.bits == 8:
            counts = _count_bytes(block)
            if code == "F4_X2":  # the low half of a byte is the first number
                nibbles = counts.reshape(16, 16)
                self._by_count(nibbles.sum(axis=0) + nibbles.sum(axis=1), np.array(FOUR_BITS))
            else:
                self._by_count(counts, by_byte(self._dtype))
        else:
            self._floats(self._widened(block, scratch), scratch)

    def _widened(self, block: memoryview, scratch: Scratch) -> Array:
        """The values as float32, which holds each of them exactly."""
        code = self._dtype.code
        if code == "F32":
            return np.frombuffer(block, self._kind)
        if code == "BF16":
            raw = np.frombuffer(block, "<u2")
            wide = scratch.values(len(raw), np.uint32)
            np.copyto(wide, raw)
            np.left_shift(wide, 16, out=wide)
            return wide.view(np.float32)
        raw = np.frombuffer(block, self._kind)
        out = scratch.values(len(raw), np.float32)
        np.copyto(out, raw)
        return out

    def _by_count(self, counts: Array, values: Array) -> None:
        """Take in each of these values as often as its count says."""
        there = counts > 0
        counts, values = counts[there], values[there]
        nan, zero, finite = np.isnan(values), values == 0, np.isfinite(values)
        self.numel += int(counts.sum())
        self.nan += int(counts[nan].sum())
        self.inf += int(counts[~nan & ~finite].sum())
        self.zeros += int(counts[zero].sum())
        if not nan.all():
            self._extremes(float(np.nanmin(values)), float(np.nanmax(values)))
        if finite.any():
            counts, values = counts[finite], values[finite]
            count = int(counts.sum())
            mean = float(np.dot(counts, values)) / count
            self._combine(count, mean, sqrt(float(np.dot(counts, (values - mean) ** 2)) / count))

    def _floats(self, values: Array, scratch: Scratch) -> None:
        low, high = np.minimum.reduce(values), np.maximum.reduce(values)
        flags = scratch.flags(len(values))
        if low != low:
            flags = np.isnan(values, out=flags)
            nans = int(np.count_nonzero(flags))
            self.nan += nans
            self.numel += nans
            values = values[~flags]
            if not len(values):
                return
            low, high = values.min(), values.max()
            flags = scratch.flags(len(values))
        self.numel += len(values)
        self.zeros += int(np.count_nonzero(np.equal(values, 0, out=flags)))
        low, high = float(low), float(high)
        self._extremes(low, high)
        if low == -np.inf or high == np.inf:
            finite = values[np.isfinite(values)]
            self.inf += len(values) - len(finite)
            if not len(finite):
                return
            values, low, high = finite, float(finite.min()), float(finite.max())
        self._combine(len(values), *_moments(values, low, high, self._guess(low, high), scratch))

    def _guess(self, low: float, high: float) -> float:
        """A number that the mean of values between those two may be near."""
        return self.mean if self.count and low <= self.mean <= high else low / 2 + high / 2

    def _extremes(self, low: Any, high: Any) -> None:
        self.low = low if self.low is None or low < self.low else self.low
        self.high = high if self.high is None or high > self.high else self.high

    def _combine(self, count: int, mean: Any, std: float) -> None:
        if not self.count:
            self.count, self.mean, self.std = count, mean, std
            return
        total = self.count + count
        old, new = self.count / total, count / total
        weight = sqrt(old * new)
        apart = mean - self.mean
        if isfinite(apart.real) and isfinite(apart.imag):
            self.mean, distance = self.mean + apart * new, apart * weight
        else:
            self.mean, distance = self.mean * old + mean * new, mean * weight - self.mean * weight
        self.std = hypot(self.std * sqrt(old), std * sqrt(new), distance.real, distance.imag)
        self.count = total

    def _integers(self, values: Array, scratch: Scratch) -> None:
        low, high = int(values.min()), int(values.max())
        self.numel += len(values)
        self.zeros += int(np.count_nonzero(np.equal(values, self._zero, out=scratch.flags(len(values)))))
        self._extremes(low, high)
        floats = scratch.values(len(values), np.float64)
        np.copyto(floats, values, casting="unsafe")
        lowest, highest = float(low), float(high)
        self._combine(len(values), *_moments(floats, lowest, highest, self._guess(lowest, highest), scratch))

    def _bools(self, values: Array) -> None:
        ones = int(np.count_nonzero(values))
        count = len(values)
        self.numel += count
        self.zeros += count - ones
        self._extremes(int(ones == count), int(ones > 0))
        self._combine(count, ones / count, sqrt(ones * (count - ones)) / count)

    def _complex(self, block: memoryview, scratch: Scratch) -> None:
        part = {"C32": "<f2", "C64": "<f4", "C128": "<f8"}[self._dtype.code]
        pairs: Array = np.frombuffer(block, part).astype(np.float64).reshape(-1, 2)
        self.numel += len(pairs)
        nans = np.isnan(pairs).any(axis=1)
        self.nan += int(np.count_nonzero(nans))
        self.inf += int(np.count_nonzero(np.isinf(pairs).any(axis=1) & ~nans))
        self.zeros += int(np.count_nonzero((pairs == 0).all(axis=1)))
        finite = pairs[np.isfinite(pairs).all(axis=1)]
        if len(finite):
            means, stds = [], []
            for numbers in np.ascontiguousarray(finite.T):
                low, high = float(numbers.min()), float(numbers.max())
                mean, std = _moments(numbers, low, high, low / 2 + high / 2, scratch)
                means.append(mean)
                stds.append(std)
            self._combine(len(finite), complex(*means), hypot(*stds))

    def merge(self, other: Tally) -> None:
        """Take in what another has of the same tensor."""
        if other.low is not None:
            self._extremes(other.low, other.high)
        if other.count:
            self._combine(other.count, other.mean, other.std)
        self.numel += other.numel
        self.zeros += other.zeros
        self.nan += other.nan
        self.inf += other.inf

    def figures(self) -> dict[str, Any]:
        """min, max, mean, std, zeros, nan and inf; the first four None where no value has them."""
        mean, std = (self.mean, self.std) if self.count else (None, None)
        counts = {"zeros": self.zeros, "nan": self.nan, "inf": self.inf}
        return {"min": self.low, "max": self.high, "mean": mean, "std": std, **counts}


def _moments(values: Array, low: float, high: float, guess: float, scratch: Scratch) -> tuple[float, float]:
    """Mean and deviation of a block of finite values between those two; ``guess`` is a number near the mean."""
    if low == high:
        return low, 0.0
    largest = max(-low, high)
    kind, exponent = values.dtype.type, 0
    if kind is np.float32 and not (_SMALL < largest < _LARGE and high - low > 1e-4 * largest):
        # Too large, too small, or too near each other for sums in float32.
        values, kind = values.astype(np.float64), np.float64
    if largest > _HUGE or high - low < _TINY:
        # Their squares are beyond float64: nothing changes but the exponent.
        exponent = frexp(largest)[1]
        values, guess = np.ldexp(values.astype(np.float64), -exponent), ldexp(guess, -exponent)
        kind = np.float64
    mean, m2 = _about(values, kind(guess), scratch)
    if len(values) * (mean - guess) ** 2 > _FAR * m2:
        mean, m2 = _about(values, kind(mean), scratch)
    # No mean is beyond the extremes and no deviation beyond half of the range, whatever was rounded.
    mean = min(max(mean, ldexp(low, -exponent)), ldexp(high, -exponent))
    std = min(sqrt(m2 / len(values)), ldexp(largest, -exponent))
    return ldexp(mean, exponent), ldexp(std, exponent)


def _about(values: Array, pivot: Any, scratch: Scratch) -> tuple[float, float]:
    """The mean of a block, and the sum of the squared distances from it, summed about a number near it."""
    count = len(values)
    shifted = scratch.shifted(count, values.dtype)
    np.subtract(values, pivot, out=shifted)
    total = float(np.add.reduce(shifted))
    squares = 0.0
    for first in range(0, count, _DOT):
        part = shifted[first : first + _DOT]
        squares += float(np.dot(part, part))
    return float(pivot) + total / count, max(0.0, squares - total * total / count)


def _count_bytes(block: memoryview) -> Array:
    """How often each byte occurs."""
    raw = np.frombuffer(block, np.uint8)
    if len(raw) < _PAIRED_NBYTES:
        return np.bincount(raw, minlength=256)
    even = len(raw) & ~1
    pairs = np.bincount(raw[:even].view("<u2"), minlength=65536).reshape(256, 256)
    counts: Array = pairs.sum(axis=0) + pairs.sum(axis=1) + np.bincount(raw[even:], minlength=256)
    return counts


@cache
def by_byte(dtype: DType) -> Array:
    """The value of each byte of an eight-bit kind, in float64."""
    made: Array = np.arange(256, dtype=np.uint8).view(numpy_dtype(dtype)).astype(np.float64)
    return made
