"""How many representable numbers two floats are apart: units in the last place, counted on the bits."""

from __future__ import annotations

from functools import cache

import numpy as np

from statedict.dtypes import DType
from statedict.numerics.arrays import Array
from statedict.numerics.tallies import by_byte

__all__ = ["has_steps", "steps"]

# Bits of a float, or of each of the two of a complex number.
_WIDTHS = {"F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C32": 16, "C64": 32, "C128": 64}


def has_steps(dtype: DType) -> bool:
    """Whether the numbers of this dtype are floats whose distance can be counted."""
    return dtype.code in _WIDTHS or (dtype.kind == "float" and dtype.bits == 8 and dtype.code != "F4_X2")


def steps(a: memoryview, b: memoryview, dtype: DType) -> Array:
    """The distance of each pair, ``uint64 [count]``; of complex numbers the larger one of their parts.

    Both zeros are one number. What stands for infinities and NaN means nothing: the caller leaves them out.
    """
    width = _WIDTHS.get(dtype.code)
    if width is None:
        ranks = _ranks(dtype)
        one, two = ranks[np.frombuffer(a, np.uint8)], ranks[np.frombuffer(b, np.uint8)]
        apart: Array = np.abs(one - two).astype(np.uint64)
        return apart
    found = _apart(np.frombuffer(a, f"<u{width // 8}"), np.frombuffer(b, f"<u{width // 8}"), width)
    made: Array = found.reshape(-1, 2).max(axis=1) if dtype.kind == "complex" else found
    return made


def _apart(one: Array, two: Array, width: int) -> Array:
    """Of numbers whose first bit is their sign, and whose other bits grow with their size."""
    most = np.uint64(2 ** (width - 1) - 1)
    left, right = one.astype(np.uint64), two.astype(np.uint64)
    is_one_sign = (left ^ right) <= most
    left, right = left & most, right & most
    made: Array = np.where(is_one_sign, np.where(left > right, left - right, right - left), left + right)
    return made


@cache
def _ranks(dtype: DType) -> Array:
    """The place of each byte's number among all numbers of the dtype."""
    values = by_byte(dtype)
    finite = np.isfinite(values)
    made = np.zeros(256, np.int64)
    made[finite] = np.searchsorted(np.unique(values[finite]), values[finite])
    return made
