"""What differs between two tensors of one shape, as numbers, taken in block by block."""

from __future__ import annotations

from functools import cache
from math import isfinite, isnan, nan, sqrt
from typing import NamedTuple

import numpy as np

from statedict.dtypes import DType
from statedict.numerics.arrays import Array, numpy_dtype
from statedict.numerics.spacing import has_steps, steps
from statedict.numerics.tallies import FOUR_BITS, by_byte, quiet
from statedict.numerics.tolerances import Rule

__all__ = ["Affine", "Difference", "address", "is_comparable"]

# Elements that are compared together: 64 KiB of them in float64. An array from 128 KiB on is mapped anew by glibc each time, and every
# page of it costs a fault: 1 GiB of float32, all changed, took 1.0 s of one core so, and 8 s and more with 16 Ki or 32 Ki.
_VALUES = 8 * 1024
_WHOLE = frozenset({"int", "uint", "bool", "quantized", "bits"})
# Dtypes that numpy casts nothing to or from.
_UNCAST = frozenset({"C32", "F4", "F6_E2M3", "F6_E3M2"})
# From here on, float64 doesn't have every integer.
_EXACT = 2**53
# Mantissa bits and bias of the floats of six bits (OCP Microscaling Formats 1.0, 5.3.2); they have no infinity and no NaN.
_SIX_BITS = {"F6_E2M3": (3, 1), "F6_E3M2": (2, 3)}


class Affine(NamedTuple):
    """What a stored integer of a quantised tensor means: ``(integer - zero) * scale``."""

    scale: float
    zero: int


def address(data: bytes | memoryview) -> int:
    """Where the bytes lie in memory: the same memory has the same address, whichever view shows it."""
    found: int = np.frombuffer(data, np.uint8).__array_interface__["data"][0]
    return found


def is_comparable(a: DType, b: DType) -> bool:
    """Whether elements of the two can be compared by number. A pair of float4 has no like among single numbers."""
    return (a.code == "F4_X2") == (b.code == "F4_X2")


class Difference:
    """How far two tensors of one shape are apart.

    ``numel`` elements were compared; ``different`` aren't equal and ``mismatched`` aren't within the tolerance either.
    ``max_abs`` is the largest ``|a - b|`` (an exact ``int`` of integers; NaN where only NaN stands against numbers), ``max_rel`` the
    largest ``|a - b| / |b|`` where ``b`` isn't 0, ``mean`` that of all ``|a - b|``, NaN counted as 0. ``recast`` elements aren't even
    equal once the wider dtype is cast to the narrower. A complex number and a pair of float4 are one element.
    """

    __slots__ = (
        "_a",
        "_affine",
        "_b",
        "_dots",
        "_ends",
        "_is_whole",
        "_rule",
        "_total",
        "different",
        "max_abs",
        "max_rel",
        "mismatched",
        "numel",
        "recast",
    )

    def __init__(self, a: DType, b: DType, rule: Rule, affine: tuple[Affine, Affine] | None = None) -> None:
        self._a, self._b, self._rule, self._affine = a, b, rule, affine
        self._is_whole = affine is None and a.kind in _WHOLE and b.kind in _WHOLE
        self._dots = [0.0, 0.0, 0.0]  # of a with a, b with b, a with b
        self._total = 0.0  # of all |a - b|
        self._ends: list[int | None] = [None, None]  # the first difference and the first mismatch
        self.numel = self.different = self.mismatched = self.recast = 0
        self.max_abs: int | float = 0 if self._is_whole else 0.0
        self.max_rel: float | None = None

    @property
    def first(self) -> int | None:
        """The position of the first mismatch, else of the first difference, in the order that blocks were taken in."""
        return self._ends[0] if self._ends[1] is None else self._ends[1]

    @property
    def cosine(self) -> float | None:
        """The cosine between the two as vectors; None for integers, single numbers, zeros, and what isn't finite."""
        aa, bb, ab = self._dots
        if self.numel < 2 or not (aa > 0 and bb > 0 and isfinite(aa) and isfinite(bb) and isfinite(ab)):
            return None
        return min(1.0, max(-1.0, ab / sqrt(aa) / sqrt(bb)))

    @property
    def mean(self) -> float | None:
        """The mean of all ``|a - b|``; of single numbers for pairs of float4. None where there are no elements."""
        return self._total / (self.numel * (2 if self._a.code == "F4_X2" else 1)) if self.numel else None

    def add(self, a: memoryview, b: memoryview, count: int) -> None:
        """Take in that many elements of both, packed and little-endian."""
        with quiet(), np.errstate(divide="ignore"):
            for first in range(0, count, _VALUES):
                some = min(_VALUES, count - first)
                self._add(_cut(a, self._a, first, some), _cut(b, self._b, first, some), some)
                self.numel += some

    def merge(self, other: Difference) -> None:
        """Take in what another found of other numbers of the same two tensors; positions stay those of this one."""
        if self.different == 0 or isnan(self.max_abs):
            self.max_abs = other.max_abs if other.different else self.max_abs
        elif other.different and not isnan(other.max_abs):
            self.max_abs = max(self.max_abs, other.max_abs)
        if other.max_rel is not None:
            self.max_rel = max(self.max_rel or 0.0, other.max_rel)
        self._dots = [mine + theirs for mine, theirs in zip(self._dots, other._dots)]
        self._total += other._total
        self.numel += other.numel
        self.different += other.different
        self.mismatched += other.mismatched
        self.recast += other.recast

    def repeated(self, times: int) -> None:
        """Count everything that often: the tensors repeat what was compared."""
        self.numel *= times
        self._total *= times
        self.different *= times
        self.mismatched *= times
        self.recast *= times

    def _add(self, a: memoryview, b: memoryview, count: int) -> None:
        is_same = self._a is self._b and self._rule.equal_nan and self._affine is None and bytearray(a) == b
        if not self._is_whole:
            self._floats(a, b, count, is_same)
        elif not is_same:
            self._integers(_whole(a, self._a, count), _whole(b, self._b, count))

    def _floats(self, a: memoryview, b: memoryview, count: int, is_same: bool) -> None:
        of_a, of_b = self._affine or (None, None)
        left = _numbers(a, self._a, count, of_a)
        right = left if is_same else _numbers(b, self._b, count, of_b)
        left, right = _paired(left, right), _paired(right, left)
        flat = left.reshape(-1), right.reshape(-1)
        if is_same:
            once = float(np.dot(flat[0], flat[0]))
            self._dots = [before + once for before in self._dots]
            return
        for at, (one, two) in enumerate((flat[:1] * 2, flat[1:] * 2, flat)):
            self._dots[at] += float(np.dot(one, two))
        apart, unequal = np.abs(left - right), left != right
        if self._a.bits == 64 and self._b.kind == "float" and self._a.kind in ("int", "uint"):
            _correct(_whole(a, self._a, count), right, apart, unequal)
        elif self._b.bits == 64 and self._a.kind == "float" and self._b.kind in ("int", "uint"):
            _correct(_whole(b, self._b, count), left, apart, unequal)
        size = np.abs(right)
        # Where none of the distances is NaN, none of the numbers is.
        has_nan = isnan(apart.max())
        if left.ndim == 2:
            apart, size, unequal = np.hypot(*apart.T), np.hypot(*size.T), unequal.any(axis=1)
        if self._rule.equal_nan and has_nan:
            unequal &= ~(_are_nan(left) & _are_nan(right))
        self._take(unequal, apart, size, self._near(a, b, apart))
        if self._a is not self._b and unequal.any():
            unequal[unequal] = ~self._is_cast(a, b, count)[unequal]
            self.recast += int(np.count_nonzero(unequal))

    def _near(self, a: memoryview, b: memoryview, apart: Array) -> Array | None:
        """Which finite numbers are as near as the rule's ``ulp`` allows; None where it allows nothing."""
        if not self._rule.ulp or self._a is not self._b or self._affine is not None or not has_steps(self._a):
            return None
        near: Array = (steps(a, b, self._a) <= self._rule.ulp) & np.isfinite(apart)
        return near

    def _is_cast(self, a: memoryview, b: memoryview, count: int) -> Array:
        """Which elements of the narrower dtype are those of the wider one, cast; of two dtypes as wide, those of ``b``."""
        wide, narrow, left, right = (
            (self._a, self._b, a, b) if self._a.bits >= self._b.bits else (self._b, self._a, b, a)
        )
        if wide.kind != narrow.kind or not _UNCAST.isdisjoint((wide.code, narrow.code)):
            return np.zeros(count, np.bool_)
        cast = np.frombuffer(left, numpy_dtype(wide)).astype(numpy_dtype(narrow))
        made = np.frombuffer(right, numpy_dtype(narrow))
        same: Array = cast == made
        return same | (np.isnan(cast) & np.isnan(made)) if self._rule.equal_nan else same

    def _integers(self, left: Array, right: Array) -> None:
        if left.dtype == right.dtype:
            # Unsigned numbers wrap around, so the larger minus the smaller is right whatever the signs are.
            bare = np.dtype(f"u{left.itemsize}")
            ahead, behind = left.view(bare), right.view(bare)
            unequal = np.asarray(left != right)
            apart: Array = np.where(left > right, ahead - behind, behind - ahead)
        else:
            signed, plain = (left, right) if left.dtype.kind == "i" else (right, left)
            other, below = signed.astype(np.uint64), signed < 0
            unequal = (other != plain) | below
            apart = np.where(plain > other, plain - other, other - plain)
            # Wraps around: this is plain + |signed|, less 2**64 where that is beyond 64 bits.
            apart[below] = plain[below] - other[below]
            beyond = below & (apart < plain)
            if beyond.any():
                self.max_abs = max(self.max_abs, 2**64 + int(apart[beyond].max()))
                apart = np.abs(plain.astype(np.float64) - signed.astype(np.float64))
        self._take(unequal, apart, np.abs(right.astype(np.float64)))

    def _take(self, unequal: Array, apart: Array, size: Array, near: Array | None = None) -> None:
        """Take in which numbers aren't equal, how far apart they are, how large those of ``b`` are, and which are near all the same."""
        if not unequal.any():
            return
        beyond = unequal
        if not self._rule.is_exact:
            allowed = self._rule.atol + self._rule.rtol * size
            beyond = np.where(np.isfinite(apart) & (apart <= allowed), False, unequal)
            if near is not None:
                beyond &= ~near
        if self._is_whole or isfinite(apart.max()):
            self._widen(apart, size)  # all else is 0 apart
        else:
            self._widen(apart[unequal], size[unequal])
        if self._a.code == "F4_X2":
            unequal, beyond = (np.logical_or.reduce(flags.reshape(-1, 2), axis=1) for flags in (unequal, beyond))
        for at, flags in enumerate((unequal, beyond)):
            if self._ends[at] is None and flags.any():
                self._ends[at] = self.numel + int(flags.argmax())
        self.different += int(np.count_nonzero(unequal))
        self.mismatched += int(np.count_nonzero(beyond))

    def _widen(self, far: Array, size: Array) -> None:
        """Take in distances, with those of numbers that are equal only where they are 0."""
        known = far if self._is_whole else far[~np.isnan(far)]
        self._total += float(known.sum(dtype=np.float64))
        if known.dtype.kind == "u":
            self.max_abs = max(self.max_abs, int(known.max()))
        elif self._is_whole:
            pass  # beyond 64 bits: it was taken in exactly
        elif known.size:
            self.max_abs = max(0.0 if isnan(self.max_abs) else self.max_abs, float(known.max()))
        elif not self.different:
            self.max_abs = nan
        highest = (far / size).max() if size.min() > 0 else nan
        if isnan(highest):
            some = (size > 0) & (far > 0)
            ratios = far[some] / size[some]
            highest = np.fmax.reduce(ratios, initial=-1.0)
        if highest > 0:
            self.max_rel = max(self.max_rel or 0.0, float(highest))


def _cut(block: memoryview, dtype: DType, first: int, count: int) -> memoryview:
    """Some elements of a block. ``first`` is a multiple of 16, so that it begins at a whole byte in every dtype."""
    start = first * dtype.bits // 8
    return block[start : start + dtype.nbytes(count)]


def _are_nan(values: Array) -> Array:
    """Which of the numbers are NaN; a complex one is if a part of it is."""
    flags: Array = np.isnan(values)
    return np.logical_or.reduce(flags, axis=1) if flags.ndim == 2 else flags


def _paired(values: Array, other: Array) -> Array:
    """Real numbers as complex ones, in pairs, where the others are."""
    return np.stack([values, np.zeros_like(values)], axis=1) if values.ndim < other.ndim else values


def _whole(block: memoryview, dtype: DType, count: int) -> Array:
    """Stored integers as they are compared: in 64 bits with a sign, or without where they need it."""
    if dtype.bits < 8:
        return _unpacked(block, dtype.bits, count).astype(np.int64)
    raw = np.frombuffer(block, numpy_dtype(dtype))
    if dtype.kind == "bool":
        # A byte of another program's may be any; torch and numpy take all but 0 as true.
        raw = raw.view(np.uint8) != 0
    return raw if raw.itemsize == 8 else raw.astype(np.int64)


def _numbers(block: memoryview, dtype: DType, count: int, affine: Affine | None) -> Array:
    """The values in float64: ``[count]``, ``[count, 2]`` of complex numbers, ``[2 * count]`` of pairs of float4."""
    code = dtype.code
    if dtype.kind in _WHOLE:
        values = _whole(block, dtype, count).astype(np.float64)
        return values if affine is None else (values - affine.zero) * affine.scale
    if code in ("F4_X2", "F4"):
        return np.array(FOUR_BITS)[_unpacked(block, 4, count * 2 if code == "F4_X2" else count)]
    if code in _SIX_BITS:
        return _six_bits(code)[_unpacked(block, 6, count)]
    if code == "BF16":
        return (np.frombuffer(block, "<u2").astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    if dtype.bits == 8:
        return by_byte(dtype)[np.frombuffer(block, np.uint8)]
    if dtype.kind == "complex":
        part = {"C32": "<f2", "C64": "<f4", "C128": "<f8"}[code]
        return np.frombuffer(block, part).astype(np.float64).reshape(-1, 2)
    return np.frombuffer(block, numpy_dtype(dtype)).astype(np.float64)


def _unpacked(block: memoryview, bits: int, count: int) -> Array:
    """Numbers of 2, 4 or 6 bits, the lowest bits of the first byte first, each in a byte of its own."""
    flags = np.unpackbits(np.frombuffer(block, np.uint8), bitorder="little")[: count * bits].reshape(count, bits)
    made: Array = np.packbits(flags, axis=1, bitorder="little").reshape(count)
    return made


@cache
def _six_bits(code: str) -> Array:
    """The value of each number of six bits."""
    width, bias = _SIX_BITS[code]
    made = np.empty(64)
    for number in range(64):
        exponent, mantissa = number >> width & (1 << 5 - width) - 1, number & (1 << width) - 1
        unit = 2.0 ** (max(exponent, 1) - bias - width)
        value = (mantissa + ((1 << width) if exponent else 0)) * unit
        made[number] = -value if number & 32 else value
    return made


def _correct(whole: Array, floats: Array, apart: Array, unequal: Array) -> None:
    """Correct what float64 has rounded of integers that stand against floats."""
    limit = 2.0 ** (63 if whole.dtype.kind == "i" else 64)
    seen = ~unequal & (np.abs(floats) >= _EXACT)
    inside = np.flatnonzero(seen & (floats < limit))
    exact, near = whole[inside], floats[inside].astype(whole.dtype)
    apart[inside] = np.where(exact > near, exact - near, near - exact)
    unequal[inside] = exact != near
    for at in np.flatnonzero(seen & (floats >= limit)):
        unequal[at], apart[at] = True, int(limit) - int(whole[at])
