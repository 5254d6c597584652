"""Recipes of weights that are kept as a product: a pruning mask, a spectral norm, the scales of quantised numbers.

A block at a time, in float32, or in float64 where the result is that; rounded once to the dtype of the result.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite, prod
from threading import Lock
from typing import TYPE_CHECKING

from statedict.dtypes import BY_CODE, DType
from statedict.errors import RuleError, Unsupported
from statedict.io.ranges import blocks
from statedict.lazy_tensor import LazyTensor
from statedict.recipes.derived import Computed, Packed, checked_dim
from statedict.recipes.folding import Scaled, check_floats, vector

if TYPE_CHECKING:
    from statedict.numerics.arrays import Array

__all__ = ["Dequantised", "FoldedSpectralNorm", "Masked", "blocks_of"]

# Scales that are kept in memory: 128 MiB of them in float64. The largest layers, in blocks of 128 by 128, have a hundredth of that.
_MOST_SCALES = 16 * 1024 * 1024
# Elements that are worked on at once: their places are reckoned with in 8 bytes for each dimension.
_BLOCK_ELEMENTS = 128 * 1024


class Masked(Computed):
    """``orig * mask``, as torch's pruning computes it. The mask may be of floats, integers or booleans; the dtype is that of ``orig``."""

    def __init__(self, orig: LazyTensor, mask: LazyTensor) -> None:
        self.name = f"{orig.entry.key} times {mask.entry.key}"
        check_floats("pruning", orig)
        if mask.shape != orig.shape:
            raise RuleError("pruning: the mask has another shape", key=mask.entry.key, found=list(mask.shape))
        _check_numbers("pruning", mask)
        self.dtype, self.shape = orig.entry.dtype, orig.shape
        self._orig, self._mask = Packed(orig), Packed(mask)
        self.block = min(self._orig.block, self._mask.block)

    def _fill(self, first: int, buffer: memoryview) -> None:
        from statedict.numerics.products import multiply

        count = len(buffer) // self.dtype.itemsize
        multiply(_read(self._orig, first, count), self.dtype, _read(self._mask, first, count), self._mask.dtype, buffer)


class FoldedSpectralNorm(Scaled):
    """The weight that spectral normalisation computes in evaluation: ``orig / (uᵀ W v)``.

    ``W`` is ``orig`` with the dimension ``dim`` as its rows and all others as its columns; ``u`` and ``v`` are the vectors that training
    keeps. The dtype is that of ``orig``, which is read once more than it is written.
    """

    def __init__(self, orig: LazyTensor, u: LazyTensor, v: LazyTensor, dim: int = 0) -> None:
        self.name = f"spectral norm of {orig.entry.key}"
        at = checked_dim(dim, len(orig.shape), "spectral norm", [orig.entry.key])
        check_floats("spectral norm", orig, u, v)
        rows = orig.shape[at]
        for each, numel in ((u, rows), (v, prod(orig.shape) // max(1, rows))):
            if each.numel != numel:
                expected = f"{numel} elements"
                raise RuleError(
                    "spectral norm: the sizes don't fit", key=each.entry.key, expected=expected, found=each.numel
                )
        super().__init__(orig, None)
        self._dim, self._vectors = at, (u, v)

    def _find_scales(self) -> Array:
        from statedict.numerics.products import BilinearSum

        left, right = (vector(each) for each in self._vectors)
        found, size = BilinearSum(self.shape, self._dim, left, right), self.dtype.itemsize
        step = min(self.block, _BLOCK_ELEMENTS) * size
        buffer = memoryview(bytearray(min(step, self._source.nbytes)))
        for offset, count in blocks(0, self._source.nbytes, step):
            self._source.read_into(offset, buffer[:count])
            found.add(buffer[:count], self.dtype, offset // size)
        return found.inverse()


class Dequantised(Computed):
    """Quantised numbers times their scales: ``weight * scale * factor``, the scale being that of the block an element stands in.

    ``scale`` has one element for the whole, or as many dimensions as the weight has (further ones of size 1 may be missing at the end),
    and the size of a dimension divided by that of a block, rounded up, in each. ``block`` are the sizes of a block.
    """

    def __init__(
        self, weight: LazyTensor, scale: LazyTensor, block: Sequence[int], factor: float = 1.0, *, dtype: DType
    ) -> None:
        self.name = f"{weight.entry.key} times {scale.entry.key}"
        _check_numbers("scale", weight)
        check_floats("scale", scale)
        if dtype.kind != "float" or not isfinite(factor):
            raise RuleError("scale: this is no dtype of floats, or no factor", key=weight.entry.key, found=dtype.torch)
        if scale.numel > _MOST_SCALES:
            raise Unsupported("there are too many scales", key=scale.entry.key, found=scale.numel)
        self.dtype, self.shape = dtype, weight.shape
        self._weight, self._scale, self._factor = Packed(weight), scale, factor
        self._grid = tuple(zip(weight.shape, block)) or ((1, 1),)
        self._counts = tuple([-(-size // each) for size, each in self._grid])
        if len(block) != len(weight.shape) or prod(self._counts) != scale.numel:
            found = list(scale.shape)
            raise RuleError(
                "scale: the shapes don't fit", key=scale.entry.key, expected=list(self._counts), found=found
            )
        self.block = min(self._weight.block, _BLOCK_ELEMENTS)
        self._lock = Lock()
        self._scales: Array | None = None

    def _fill(self, first: int, buffer: memoryview) -> None:
        from statedict.numerics.arrays import to_packed_bytes
        from statedict.numerics.casting import cast
        from statedict.numerics.products import scale_blocks

        with self._lock:
            if self._scales is None:
                self._scales = vector(self._scale).reshape(self._counts) * self._factor
        wide = self.dtype.code == "F64"
        data = _read(self._weight, first, len(buffer) // self.dtype.itemsize)
        made = scale_blocks(data, self._weight.dtype, first, self._scales, self._grid, wide)
        cast(to_packed_bytes(made), BY_CODE["F64" if wide else "F32"], self.dtype, buffer)


def blocks_of(shape: Sequence[int], scales: Sequence[int]) -> list[set[int]]:
    """The sizes that a block may have along each dimension, if the scales of a tensor have that shape; an empty set where none fits.

    One scale is that of the whole, and as many as there are indices are one for each. Else a block has a power of two, or divides the
    dimension evenly.
    """
    counts = [1] * len(shape) if prod(scales) == 1 else [*scales, *[1] * (len(shape) - len(scales))]
    if len(counts) != len(shape):
        return [set() for _ in shape]
    return [_sizes(size, count) for size, count in zip(shape, counts)]


def _sizes(size: int, count: int) -> set[int]:
    if count == 1:
        return {max(1, size)}
    if count == size:
        return {1}
    powers = {1 << bits for bits in range(size.bit_length()) if -(-size // (1 << bits)) == count}
    return powers | ({size // count} if count and not size % count else set())


def _read(source: Packed, first: int, count: int) -> memoryview:
    """That many elements from that one on."""
    size = source.dtype.itemsize
    buffer = memoryview(bytearray(count * size))
    source.read_into(first * size, buffer)
    return buffer


def _check_numbers(what: str, tensor: LazyTensor) -> None:
    """Raise ``RuleError`` for a tensor that is neither of floats nor of whole bytes of integers, and whatever keeps it from being read."""
    if tensor.entry.dtype.kind not in ("float", "int", "uint", "bool") or tensor.entry.dtype.bits % 8:
        raise RuleError(f"{what}: this is no tensor of numbers", key=tensor.entry.key, found=tensor.dtype)
    if tensor.entry.dtype.kind == "float":
        check_floats(what, tensor)
    tensor.check_readable()
