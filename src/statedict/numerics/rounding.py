"""What a cast does to values, found quickly where the numbers are ordinary, as nearly all weights are.

A block of numbers is rounded, subtracted and divided as a whole. That tells the largest errors, and whether any number is beyond the
new dtype's reach: one that becomes zero is as far off as it is large, and where one is or becomes Inf or NaN the distance is no
number. Such blocks, and other pairs of dtypes, are left to ``CastTally``.
"""

from __future__ import annotations

from math import inf, isnan

import numpy as np

from statedict.dtypes import DType
from statedict.numerics.arrays import Array
from statedict.numerics.casting import CastTally

__all__ = ["BLOCK_NBYTES", "Rounding"]

# Elements that are looked at together: 1 MiB of float32. On two cores with as much second-level cache each, 1 GiB takes two threads
# 0.25 s and one 0.36; with 32 Ki elements 0.64 and 0.60, as the two wait for the interpreter after each of numpy's calls.
_VALUES = 256 * 1024
# Bytes to take in at a time.
BLOCK_NBYTES = 4 * _VALUES * 4


class Rounding:
    """A ``CastTally`` in ``tally``, and the room that it takes to fill it quickly. For one thread."""

    def __init__(self, before: DType, after: DType) -> None:
        self.tally = CastTally(before, after)
        self._before, self._after = before, after
        self._is_quick = before.code == "F32" and after.code in ("BF16", "F16")
        self._room: Array = np.empty(_VALUES if self._is_quick else 0, np.uint32)
        self._half: Array = np.empty(_VALUES if self._is_quick else 0, np.float16)

    def add(self, data: memoryview, first: int) -> None:
        """Take in packed elements, of which the first stands at that position of the tensor."""
        if not self._is_quick:
            self.tally.add(data, first)
            return
        values = np.frombuffer(data, np.float32)
        with np.errstate(all="ignore"):
            for start in range(0, len(values), _VALUES):
                some = values[start : start + _VALUES]
                if not self._is_ordinary(some):
                    self.tally.add(data[4 * start : 4 * (start + len(some))], first + start)

    def _is_ordinary(self, values: Array) -> bool:
        """Take in float32 numbers none of which is beyond the dtype's reach; False, and nothing, where there are such."""
        apart = self._rounded(values)
        np.subtract(values, apart, out=apart)
        far = _largest(apart)
        if not far < inf:
            return False
        np.divide(apart, values, out=apart)
        share = _largest(apart)
        if isnan(share):  # of zeros, which stay what they are
            share = max(float(np.fmax.reduce(apart)), -float(np.fmin.reduce(apart)), 0.0)
            share = 0.0 if isnan(share) else share
        if not share < 1:
            return False
        tally = self.tally
        tally.numel += len(values)
        tally.max_abs, tally.max_rel = max(tally.max_abs, far), max(tally.max_rel, share)
        return True

    def _rounded(self, values: Array) -> Array:
        """The numbers that the new dtype makes of these, as float32, in the room."""
        room = self._room[: len(values)]
        made: Array = room.view(np.float32)
        if self._after.code == "F16":
            half = self._half[: len(values)]
            np.copyto(half, values, casting="unsafe")
            np.copyto(made, half)
            return made
        # Half of the last place that stays is added, a little less where the last bit is even, and the rest cut off.
        bits = values.view(np.uint32)
        np.right_shift(bits, 16, out=room)
        np.bitwise_and(room, 1, out=room)
        np.add(room, 0x7FFF, out=room)
        np.add(room, bits, out=room)
        np.bitwise_and(room, 0xFFFF0000, out=room)
        return made


def _largest(values: Array) -> float:
    """The largest size of these numbers; NaN if one is none."""
    high, low = float(np.maximum.reduce(values)), float(np.minimum.reduce(values))
    return high if isnan(high) else max(high, -low)
