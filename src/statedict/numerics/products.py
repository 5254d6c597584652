"""The arithmetic of weights that are a product: masks, spectral norms, scales of quantised numbers.

Everything works on blocks of packed elements that the caller has read, in float32, or in float64 where the result is that.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from statedict.dtypes import BY_CODE, DType
from statedict.numerics.arrays import Array, numpy_dtype, to_packed_bytes
from statedict.numerics.casting import as_float, cast, is_castable

__all__ = ["BilinearSum", "multiply", "numbers_of", "scale_blocks"]


def numbers_of(data: memoryview, dtype: DType, wide: bool) -> Array:
    """Packed floats, integers or booleans as float64 if ``wide``, else float32."""
    if is_castable(dtype, BY_CODE["F32"]):
        return as_float(data, dtype, wide)
    made: Array = np.frombuffer(data, numpy_dtype(dtype)).astype(np.float64 if wide else np.float32)
    return made


def multiply(data: memoryview, dtype: DType, mask: memoryview, mask_dtype: DType, out: memoryview) -> None:
    """Each element times that of the mask, rounded to ``dtype``, into ``out``."""
    wide = dtype.code == "F64"
    with np.errstate(all="ignore"):
        made = as_float(data, dtype, wide) * numbers_of(mask, mask_dtype, wide)
    cast(to_packed_bytes(made), BY_CODE["F64" if wide else "F32"], dtype, out)


class BilinearSum:
    """``uᵀ W v`` in float64, of a tensor whose dimension ``dim`` is the rows of ``W`` and whose others, in order, are its columns."""

    def __init__(self, shape: Sequence[int], dim: int, left: Array, right: Array) -> None:
        self._sum = 0.0
        self._inner = int(np.prod(shape[dim + 1 :], dtype=np.int64))
        self._rows = shape[dim]
        self._left, self._right = left, right

    def add(self, data: memoryview, dtype: DType, first: int) -> None:
        """Take in packed elements, of which the first stands at that position of the tensor."""
        values = as_float(data, dtype, True)
        outer, inside = np.divmod(np.arange(first, first + len(values)), self._inner)
        outer, row = np.divmod(outer, self._rows)
        with np.errstate(all="ignore"):
            self._sum += float(np.dot(values * self._left[row], self._right[outer * self._inner + inside]))

    def inverse(self) -> Array:
        """One through the sum, as an array of one element; through zero it is infinite, as in torch."""
        with np.errstate(all="ignore"):
            made: Array = 1 / np.array([self._sum], np.float64)
        return made


def scale_blocks(
    data: memoryview, dtype: DType, first: int, scales: Array, grid: Sequence[tuple[int, int]], wide: bool
) -> Array:
    """Packed numbers times the scale of the block that each stands in, from the position ``first`` of the tensor on.

    ``grid`` has the size of each dimension of the tensor and that of a block along it; ``scales`` has as many dimensions.
    """
    values = numbers_of(data, dtype, wide)
    places = np.unravel_index(np.arange(first, first + len(values)), tuple([size for size, _ in grid]))
    at = tuple([place // block for place, (_, block) in zip(places, grid)])
    with np.errstate(all="ignore"):
        made: Array = values * scales[at].astype(values.dtype)
    return made
