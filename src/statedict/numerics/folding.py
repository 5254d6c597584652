"""The arithmetic of folds: sums of squares by channel, scales by channel, products of thin matrices, weighted sums.

Everything works on blocks of packed elements that the caller has read, as float32, or as float64 where ``wide`` says so.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from statedict.dtypes import BY_CODE, DType
from statedict.numerics.arrays import Array, to_packed_bytes
from statedict.numerics.casting import as_float, cast

__all__ = ["BatchNorm", "Block", "SquareSums", "WeightedSum", "add_product", "norm_scales", "scale_channels"]

# Elements that are summed together: half a MiB of them in float64. Five files of float32 came to 3.8 GB/s so, with 16 Ki to 2.8.
_VALUES = 64 * 1024
_FLOAT32, _FLOAT64 = _REAL = BY_CODE["F32"], BY_CODE["F64"]
_COMPLEX = BY_CODE["C64"], BY_CODE["C128"]


class SquareSums:
    """The sum of the squares of each channel, in float64. Element ``i`` in reading order is of channel ``i // inner % channels``."""

    def __init__(self, channels: int, inner: int) -> None:
        self.sums = np.zeros(channels, np.float64)
        self._inner = inner

    def add(self, data: memoryview, dtype: DType, first: int) -> None:
        """Take in packed elements, of which the first stands at that position of the tensor."""
        values = as_float(data, dtype, True)
        head = -first % self._inner
        row, channels = first // self._inner, len(self.sums)
        if head:
            part = values[:head]
            self.sums[row % channels] += np.dot(part, part)
            values, row = values[head:], row + 1
        whole = len(values) // self._inner
        rows = values[: whole * self._inner].reshape(whole, self._inner)
        np.add.at(self.sums, np.arange(row, row + whole) % channels, np.einsum("ij,ij->i", rows, rows))
        rest = values[whole * self._inner :]
        if len(rest):
            self.sums[(row + whole) % channels] += np.dot(rest, rest)


def norm_scales(sums: Array, magnitude: memoryview, dtype: DType) -> Array:
    """What each channel of a direction is multiplied by to get the magnitude as its norm. A zero norm gives Inf or NaN, as in torch."""
    with np.errstate(all="ignore"):
        made: Array = as_float(magnitude, dtype, True) / np.sqrt(sums)
    return made


def scale_channels(data: memoryview, dtype: DType, scales: Array, inner: int, first: int, out: memoryview) -> None:
    """Multiply packed elements by the scale of their channel, rounded to the same dtype, into ``out``.

    The first element stands at position ``first`` of the tensor; element ``i`` is of channel ``i // inner % len(scales)``.
    """
    wide = dtype.code == "F64"
    values = as_float(data, dtype, wide)
    low, high = first // inner, -(-(first + len(values)) // inner)
    rows = scales[np.arange(low, high) % len(scales)].astype(values.dtype)
    with np.errstate(all="ignore"):
        made = values * np.repeat(rows, inner)[first - low * inner :][: len(values)]
    cast(to_packed_bytes(made), _FLOAT64 if wide else _FLOAT32, dtype, out)


class BatchNorm:
    """The numbers of a batch norm by channel, in float64; None is what its affine parameters are where it has none."""

    def __init__(self, gamma: Array | None, var: Array, eps: float) -> None:
        with np.errstate(all="ignore"):
            inverse = 1.0 / np.sqrt(var + eps)
            self.scales: Array = inverse if gamma is None else inverse * gamma

    def bias(self, bias: Array | None, beta: Array | None, mean: Array, dtype: DType) -> memoryview:
        """``(bias - mean) * scale + beta``, packed in that dtype."""
        with np.errstate(all="ignore"):
            made = ((0.0 if bias is None else bias) - mean) * self.scales + (0.0 if beta is None else beta)
        out = memoryview(bytearray(dtype.nbytes(made.size)))
        cast(to_packed_bytes(made), _FLOAT64, dtype, out)
        return out


class Block(NamedTuple):
    """Packed elements of a dtype."""

    data: memoryview
    dtype: DType


def add_product(base: Block, left: Block, right: Block, rank: int, scaling: float, out: memoryview) -> None:
    """``base + scaling * (left @ right)``, rounded to base's dtype once, into ``out``.

    ``base`` is a block ``[rows, columns]``, ``left`` ``[rows, rank]``, ``right`` ``[rank, columns]``.
    """
    wide = base.dtype.code == "F64"
    values, one, two = (as_float(block.data, block.dtype, wide) for block in (base, left, right))
    rows = one.size // rank
    with np.errstate(all="ignore"):
        made = one.reshape(rows, rank) @ two.reshape(rank, -1)
        made *= scaling
        made += values.reshape(rows, -1)
    cast(to_packed_bytes(made), _FLOAT64 if wide else _FLOAT32, base.dtype, out)


class WeightedSum:
    """A sum of weighted blocks of ``numel`` elements, in float64 if ``wide``, else in float32. A complex number is two of them."""

    def __init__(self, numel: int, wide: bool) -> None:
        self._wide = wide
        self._sums: Array = np.zeros(numel, np.float64 if wide else np.float32)
        # Room that is used again and again: fresh pages for each block took twice as long as the sum.
        self._part: Array = np.empty(min(numel, _VALUES), self._sums.dtype)
        self._bits: Array = np.empty(min(numel, _VALUES), np.uint32)

    def add(self, data: memoryview, dtype: DType, weight: float) -> None:
        """Take in packed elements of any dtype of floats or complex numbers."""
        step = _VALUES * len(data) // max(1, self._sums.size)
        with np.errstate(all="ignore"):
            for first in range(0, self._sums.size, _VALUES):
                sums = self._sums[first : first + _VALUES]
                part = self._part[: sums.size]
                at = first // _VALUES * step
                values = self._numbers(data[at : at + step], dtype)
                np.multiply(values, weight, out=part, dtype=part.dtype, casting="same_kind")
                np.add(sums, part, out=sums)

    def _numbers(self, data: memoryview, dtype: DType) -> Array:
        """The elements as numbers that numpy multiplies without a copy of its own; float32 as they are, in the wide sum too."""
        if dtype.code in ("F32", "C64"):
            return np.frombuffer(data, np.float32)
        if dtype.code == "BF16":
            upper = np.frombuffer(data, np.uint16)
            bits = self._bits[: len(upper)]
            np.left_shift(upper, 16, out=bits, dtype=np.uint32)
            return bits.view(np.float32)
        return as_float(data, dtype, self._wide)

    def into(self, dtype: DType, out: memoryview) -> None:
        """The sum, rounded to that dtype."""
        data = to_packed_bytes(self._sums)
        kinds = _COMPLEX if dtype.kind == "complex" else _REAL
        cast(data, kinds[self._wide], dtype, out)
