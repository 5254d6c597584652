"""The recipe of a weighted mean of tensors."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite
from typing import Literal

from statedict.dtypes import DType
from statedict.errors import RuleError
from statedict.lazy_tensor import LazyTensor
from statedict.recipes.derived import Computed, Packed, keys_of

__all__ = ["Mean"]


class Mean(Computed):
    """The sum of tensors of one shape, each times its weight, rounded once to ``dtype`` (that of the last if None is given).

    ``weights`` are used as they are: they should add up to 1. The sum is kept in ``accumulate``: ``float64``, or ``float32``, which is
    13 bits more than any dtype of 16 bits has. The sources may have different dtypes, all floats or all complex. Needs one block of
    each of two sources at a time, however many there are.

    Raises ``RuleError`` for other shapes or dtypes, and for weights that aren't one finite number for each source.
    """

    def __init__(
        self,
        sources: Sequence[LazyTensor],
        weights: Sequence[float],
        accumulate: Literal["float32", "float64"] = "float64",
        dtype: DType | None = None,
    ) -> None:
        if not sources or len(weights) != len(sources) or not all(map(isfinite, weights)):
            found = ", ".join([str(weight) for weight in weights[:8]]) or "none"
            raise RuleError("mean: the weights don't fit", expected=f"{len(sources)} finite numbers", found=found)
        if accumulate not in ("float32", "float64"):
            raise RuleError("mean: there are no such accumulators", expected="float32 or float64", found=accumulate)
        self.name = f"mean of {keys_of(sources)}"
        self.dtype, self.shape = dtype or sources[-1].entry.dtype, sources[-1].shape
        for source in sources:
            _check(source, self.shape, self.dtype)
        self._sources = [Packed(source) for source in sources]
        self._weights = tuple([float(weight) for weight in weights])
        self._wide = accumulate == "float64"
        self.block = min(source.block for source in self._sources)

    def _fill(self, first: int, buffer: memoryview) -> None:
        from statedict.numerics.folding import WeightedSum

        count = len(buffer) // self.dtype.itemsize
        total = WeightedSum(count * (2 if self.dtype.kind == "complex" else 1), self._wide)
        room = memoryview(bytearray(count * max(source.dtype.itemsize for source in self._sources)))
        for source, weight in zip(self._sources, self._weights):
            size = source.dtype.itemsize
            data = room[: count * size]
            source.read_into(first * size, data)
            total.add(data, source.dtype, weight)
        total.into(self.dtype, buffer)


def _check(source: LazyTensor, shape: tuple[int, ...], dtype: DType) -> None:
    from statedict.numerics.casting import is_castable

    key = source.entry.key
    if source.shape != shape:
        raise RuleError("mean: the shapes differ", key=key, expected=list(shape), found=list(source.shape))
    if not is_castable(source.entry.dtype, dtype):
        expected = f"floats that can become {dtype}"
        raise RuleError("mean: there is no mean of such tensors", key=key, expected=expected, found=source.dtype)
