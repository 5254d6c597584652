"""Floats as floats of another dtype, to the bits that torch's ``Tensor.to`` gives, and what is lost by it.

torch casts through float32, whatever the two dtypes are, and so does this: a float64 that becomes a float16 is rounded twice.
Rounding is to the nearest, ties to even. What each dtype makes of numbers that it doesn't have was found by asking torch 2.13
for every value (tests/test_recipes_casting.py does so again), and stands in its c10/util: float8_e4m3fn has no infinity and
saturates at ±448; float8_e5m2 overflows to ±Inf, the ``fnuz`` kinds to NaN; float8_e8m0fnu has neither sign nor zero.
A NaN stays a NaN; torch's own bits of it differ between its vector code and the rest, so they are those of the vector code for x86.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from math import isfinite, isnan

import numpy as np

from statedict.dtypes import BY_CODE, DType
from statedict.numerics.arrays import Array, numpy_dtype

__all__ = ["CastTally", "as_float", "cast", "is_castable"]

# Elements that are cast together: 1 MiB of them in float32. From float32 to bfloat16 this came to 3.7 GB/s by one thread and 6 by two, with
# 64 Ki to 3.5 and 4.3, with 16 Ki to 2.6 and 2.1: after each of numpy's calls two threads wait for the interpreter.
_VALUES = 256 * 1024
# What a complex number is a pair of.
_PARTS = {"C128": "F64", "C64": "F32", "C32": "F16"}
_FLOATS = frozenset({"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F8_E8M0"})
# The largest float8_e4m3fn, 448, and the last number that is rounded to it: beyond, what is nearest is a number that it doesn't have.
_E4M3_LAST = np.float32(464)


def is_castable(before: DType, after: DType) -> bool:
    """Whether ``cast`` does it: floats to floats and complex numbers to complex ones, of whole bytes."""
    return (before.code in _FLOATS and after.code in _FLOATS) or (before.code in _PARTS and after.code in _PARTS)


def cast(data: memoryview, before: DType, after: DType, out: memoryview) -> None:
    """Cast packed little-endian elements into ``out``, which has room for as many. Only where ``is_castable``."""
    if before is after:
        out[:] = data
        return
    before, after = _part(before), _part(after)
    source, target = np.frombuffer(data, _plain(before)), np.frombuffer(out, _plain(after))
    rounding = _FROM_FLOAT32.get(after.code)
    with np.errstate(all="ignore"):
        for first in range(0, len(source), _VALUES):
            some = source[first : first + _VALUES]
            made = target[first : first + _VALUES]
            if after.code == "F64":
                made[:] = _float32(some, before)
            elif rounding is None:
                made[:] = some if before.code == "F64" else _float32(some, before)
            else:
                rounding(_float32(some, before), made)


def as_float(data: memoryview, dtype: DType, wide: bool) -> Array:
    """Packed elements as float64 if ``wide``, else float32; a view where they are that already. Complex numbers are pairs."""
    dtype = _part(dtype)
    values = np.frombuffer(data, _plain(dtype))
    with np.errstate(all="ignore"):
        if dtype.code == "F64":
            return values if wide else values.astype(np.float32)
        made = _float32(values, dtype)
        return made.astype(np.float64) if wide else made


def _part(dtype: DType) -> DType:
    return BY_CODE[_PARTS.get(dtype.code, dtype.code)]


def _plain(dtype: DType) -> np.dtype[np.generic]:
    """The dtype to look at bytes with: floats from 32 bits on as they are, the others as unsigned integers."""
    return np.dtype(dtype.numpy if dtype.bits > 16 else f"u{dtype.itemsize}")


def _float32(values: Array, dtype: DType) -> Array:
    """The numbers as float32: exact, but for float64."""
    if dtype.code == "BF16":
        wide = values.astype(np.uint32)
        wide <<= 16
        return wide.view(np.float32)
    if dtype.bits <= 16:
        # 2.3 GB/s of float16, where numpy's own cast comes to 1.1.
        return np.take(_numbers(dtype.code), values)
    return values if dtype.code == "F32" else values.astype(np.float32)


@cache
def _numbers(code: str) -> Array:
    """The numbers that all patterns of 8 or 16 bits stand for."""
    dtype = BY_CODE[code]
    patterns = np.arange(1 << dtype.bits, dtype=f"u{dtype.itemsize}")
    return patterns.view(numpy_dtype(dtype)).astype(np.float32)


def _to_bfloat16(values: Array, out: Array) -> None:
    """The upper half of each float32, rounded: half of the last place is added, a little less where the last bit is even."""
    bits = values.view(np.uint32)
    sums = bits >> 16
    sums &= 1
    sums += 0x7FFF
    sums += bits
    out[:] = sums.view(np.uint16)[1::2]
    if isnan(np.maximum.reduce(values)):
        out[np.isnan(values)] = 0xFFFF


def _to_float16(values: Array, out: Array) -> None:
    out.view(np.float16)[:] = values
    if isnan(np.maximum.reduce(values)):
        where = np.isnan(values)
        bits = values.view(np.uint32)[where]
        out[where] = (bits >> 16 & 0x8000) | 0x7E00 | (bits >> 13 & 0x3FF)


def _to_e4m3(values: Array, out: Array) -> None:
    clipped = np.clip(values, -_E4M3_LAST, _E4M3_LAST)  # a NaN stays one
    out[:] = clipped.astype(numpy_dtype(BY_CODE["F8_E4M3"])).view(np.uint8)


def _to_e5m2(values: Array, out: Array) -> None:
    out[:] = values.astype(numpy_dtype(BY_CODE["F8_E5M2"])).view(np.uint8)
    if isnan(np.maximum.reduce(values)):
        where = np.isnan(values)
        out[where] = np.signbit(values[where]) * np.uint8(0x80) | np.uint8(0x7F)


def _to_e8m0(values: Array, out: Array) -> None:
    """The exponent, one more from the middle between two powers on; of a subnormal number only beyond the middle."""
    bits = values.view(np.uint32)
    exponent = (bits >> 23 & 0xFF).astype(np.uint8)
    half, rest = (bits >> 22 & 1).astype(np.uint8), bits & 0x3FFFFF != 0
    out[:] = exponent + half * ((rest | (exponent > 0)) & (exponent < 0xFF))


def _by_ml_dtypes(code: str) -> Callable[[Array, Array], None]:
    def to(values: Array, out: Array) -> None:
        out[:] = values.astype(numpy_dtype(BY_CODE[code])).view(np.uint8)

    return to


_FROM_FLOAT32: dict[str, Callable[[Array, Array], None]] = {
    "BF16": _to_bfloat16,
    "F16": _to_float16,
    "F8_E4M3": _to_e4m3,
    "F8_E5M2": _to_e5m2,
    "F8_E8M0": _to_e8m0,
    "F8_E4M3FNUZ": _by_ml_dtypes("F8_E4M3FNUZ"),
    "F8_E5M2FNUZ": _by_ml_dtypes("F8_E5M2FNUZ"),
}


class CastTally:
    """What a cast does to values, taken in block by block, in reading order.

    ``numel`` numbers were looked at (a complex one counts as two). ``overflowed`` are finite before and Inf, NaN or cut to the largest
    number after; ``first_overflow`` is the position of the first, counted in elements of the tensor. ``underflowed`` aren't zero
    before and are after. ``max_abs`` and ``max_rel`` are the largest ``|before - after|``, and that over ``|before|``, of all numbers
    that are finite on both sides and weren't cut.
    """

    __slots__ = ("_after", "_before", "first_overflow", "max_abs", "max_rel", "numel", "overflowed", "underflowed")

    def __init__(self, before: DType, after: DType) -> None:
        self._before, self._after = before, after
        self.numel = self.overflowed = self.underflowed = 0
        self.max_abs = self.max_rel = 0.0
        self.first_overflow: int | None = None

    @property
    def is_exact(self) -> bool:
        """Whether every number is the same after the cast."""
        return not (self.overflowed or self.underflowed or self.max_abs)

    def add(self, data: memoryview, first: int) -> None:
        """Take in packed elements, of which the first stands at that position of the tensor."""
        size, made = self._before.itemsize, self._after.itemsize
        out = memoryview(bytearray(_VALUES * made))
        for start in range(0, len(data), _VALUES * size):
            some = data[start : start + _VALUES * size]
            after = out[: len(some) // size * made]
            cast(some, self._before, self._after, after)
            self._take(some, after, first + start // size)

    def merge(self, other: CastTally) -> None:
        """Take in what another found of other elements of the same tensor."""
        self.numel += other.numel
        self.overflowed += other.overflowed
        self.underflowed += other.underflowed
        self.max_abs, self.max_rel = max(self.max_abs, other.max_abs), max(self.max_rel, other.max_rel)
        firsts = [first for first in (self.first_overflow, other.first_overflow) if first is not None]
        self.first_overflow = min(firsts, default=None)

    def _take(self, data: memoryview, cast_data: memoryview, first: int) -> None:
        wide = self._before.code in ("F64", "C128")
        before, after = as_float(data, self._before, wide), as_float(cast_data, self._after, wide)
        self.numel += before.size
        with np.errstate(all="ignore"):
            # A zero stays one, so what there are more of afterwards has become one.
            self.underflowed += max(0, int(np.count_nonzero(before)) - int(np.count_nonzero(after)))
            apart = before - after
            np.abs(apart, out=apart)
            most = float(apart.max())
            if not isfinite(most) or self._after.code == "F8_E4M3":
                self._overflow(before, after, apart, first)
                most = float(apart.max())
            if most:
                self.max_abs = max(self.max_abs, most)
                apart /= before
                np.abs(apart, out=apart)
                # fmax passes over 0 / 0.
                self.max_rel = max(self.max_rel, float(np.fmax.reduce(apart)))

    def _overflow(self, before: Array, after: Array, apart: Array, first: int) -> None:
        """Take in the numbers that the dtype doesn't reach, and take them out of the distances."""
        beyond = np.isfinite(before) & ~np.isfinite(after)
        if self._after.code == "F8_E4M3":
            beyond |= np.isfinite(before) & (np.abs(before) > _E4M3_LAST)
        apart[beyond | ~np.isfinite(before)] = 0
        count = int(np.count_nonzero(beyond))
        if count and self.first_overflow is None:
            self.first_overflow = first + int(beyond.argmax()) // (2 if self._before.kind == "complex" else 1)
        self.overflowed += count
