"""The numerical rank of the difference of two matrices, as far as it is low."""

from __future__ import annotations

import numpy as np

from statedict.dtypes import DType
from statedict.numerics.arrays import Array, numpy_dtype
from statedict.numerics.tallies import quiet

__all__ = ["low_rank"]

# The share of the squared difference that the rank has to explain. Rounding to bfloat16 leaves noise of full rank beside an update.
_EXPLAINED = 0.99
# Directions that are looked for; more is no low rank.
_MOST_RANK = 64
# Directions beyond those, so that the last ones are found too (Halko, Martinsson and Tropp, 2011, section 4.2).
_EXTRA = 10


def low_rank(a: memoryview, b: memoryview, dtype: DType, rows: int) -> int | None:
    """The fewest directions that explain 99% of ``b - a``, if they are at most 64 and a quarter of the smaller dimension; else None.

    Both are packed matrices of floats with so many rows. Takes memory of some times their size, and multiplies with 74 vectors.
    """
    with quiet():
        one, two = (np.frombuffer(data, numpy_dtype(dtype)).astype(np.float32) for data in (a, b))
        delta = (two - one).reshape(rows, -1)
        total = float(np.sum(np.square(delta, dtype=np.float32), dtype=np.float64))
        most = min(_MOST_RANK, min(delta.shape) // 4)
        if not np.isfinite(total) or total <= 0 or most < 1:
            return None
        strengths = _strengths(delta, most + _EXTRA)
        explained = np.cumsum(np.square(strengths, dtype=np.float64)) >= _EXPLAINED * total
    rank = int(explained.argmax()) + 1
    return rank if explained.any() and rank <= most else None


def _strengths(delta: Array, count: int) -> Array:
    """The largest singular values, by a random projection that is the same every time, and one power step."""
    count = min(count, *delta.shape)
    directions = np.random.default_rng(0).standard_normal((delta.shape[1], count), dtype=np.float32)
    basis = np.linalg.qr(delta @ directions)[0]
    basis = np.linalg.qr(delta @ (delta.T @ basis))[0]
    found: Array = np.linalg.svd(basis.T @ delta, compute_uv=False)
    return found
