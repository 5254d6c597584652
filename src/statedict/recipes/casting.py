"""The recipe that changes the dtype of floats."""

from __future__ import annotations

from statedict.dtypes import DType
from statedict.errors import RuleError
from statedict.lazy_tensor import LazyTensor
from statedict.recipes.derived import Computed, Packed

__all__ = ["Cast"]


class Cast(Computed):
    """A tensor of floats in another dtype, rounded as ``torch.Tensor.to`` does; complex numbers in another complex dtype.

    Raises ``RuleError`` for any other pair of dtypes: integers aren't changed by a cast of floats, and a complex number doesn't
    become a real one.
    """

    def __init__(self, source: LazyTensor, dtype: DType) -> None:
        _check(source, dtype)
        self.name = f"cast of {source.entry.key} to {dtype}"
        self.dtype, self.shape = dtype, source.shape
        self._source = Packed(source)
        self.block = self._source.block

    def _fill(self, first: int, buffer: memoryview) -> None:
        from statedict.numerics.casting import cast

        before = self._source.dtype
        data = memoryview(bytearray(len(buffer) // self.dtype.itemsize * before.itemsize))
        self._source.read_into(first * before.itemsize, data)
        cast(data, before, self.dtype, buffer)


def _check(source: LazyTensor, dtype: DType) -> None:
    from statedict.numerics.casting import is_castable

    if source.entry.dtype != dtype and not is_castable(source.entry.dtype, dtype):
        raise RuleError(
            f"a tensor of {source.dtype} can't be cast to {dtype}",
            key=source.entry.key,
            hint="Floats are cast to floats, complex numbers to complex ones",
        )
