"""Recipes that fold one part of a network into the weight beside it: weight norm, batch norm, low-rank adapters.

The numbers of each channel are computed in float64, and once; the large tensors in float32, or in float64 where they are that, a
block at a time, and rounded once to the dtype of the result.
"""

from __future__ import annotations

from math import isfinite, prod
from threading import Lock
from typing import TYPE_CHECKING

from statedict.dtypes import DType
from statedict.errors import RuleError, Unsupported
from statedict.io.ranges import blocks
from statedict.lazy_tensor import LazyTensor
from statedict.recipes.derived import Computed, Packed, checked_dim

if TYPE_CHECKING:
    from statedict.numerics.arrays import Array
    from statedict.numerics.folding import BatchNorm

__all__ = [
    "FoldedBatchNormBias",
    "FoldedBatchNormWeight",
    "FoldedWeightNorm",
    "MergedLora",
    "Scaled",
    "check_floats",
    "vector",
]

# Channels whose numbers are kept in memory: 32 MiB of them in float64, far more than any layer has.
_MOST_CHANNELS = 4 * 1024 * 1024
# Elements of the product of two thin matrices, and of each of them, that are worked on at once: 2 MiB in float32.
_BLOCK_ELEMENTS = 512 * 1024


class Scaled(Computed):
    """A tensor whose every channel is multiplied by a number, which is found when it is first needed."""

    def __init__(self, source: LazyTensor, dim: int | None) -> None:
        """``dim`` is that of the channels; None if the whole tensor is one."""
        self.dtype, self.shape = source.entry.dtype, source.shape
        self._source = Packed(source)
        self._channels = 1 if dim is None else self.shape[dim]
        self._inner = prod(self.shape) if dim is None else prod(self.shape[dim + 1 :])
        self.block = self._source.block
        self._lock = Lock()
        self._scales: Array | None = None
        if self._channels > _MOST_CHANNELS:
            raise Unsupported("there are too many channels", key=source.entry.key, found=self._channels)

    def _fill(self, first: int, buffer: memoryview) -> None:
        from statedict.numerics.folding import scale_channels

        with self._lock:
            if self._scales is None:
                self._scales = self._find_scales()
        data = memoryview(bytearray(len(buffer)))
        self._source.read_into(first * self.dtype.itemsize, data)
        scale_channels(data, self.dtype, self._scales, self._inner, first, buffer)

    def _find_scales(self) -> Array:
        """The number of each channel, in float64."""
        raise NotImplementedError


class FoldedWeightNorm(Scaled):
    """The weight that weight normalisation computes: ``v * g / norm(v)``, with the norm over all dimensions but ``dim``.

    ``dim`` None or -1 is the norm over all of ``v``, as in ``torch.nn.utils.weight_norm``; ``g`` has one element for each slice along
    ``dim``, in any shape. The dtype is that of ``v``, which is read once more than it is written.
    """

    def __init__(self, g: LazyTensor, v: LazyTensor, dim: int | None = 0) -> None:
        keys = [g.entry.key, v.entry.key]
        self.name = f"weight norm of {keys[0]} and {keys[1]}"
        at = None if dim in (None, -1) else checked_dim(dim or 0, len(v.shape), "weight norm", keys)
        check_floats("weight norm", g, v)
        super().__init__(v, at)
        _check_channels("weight norm", g, self._channels)
        self._magnitude = g

    def _find_scales(self) -> Array:
        from statedict.numerics.folding import SquareSums, norm_scales

        sums, size = SquareSums(self._channels, max(1, self._inner)), self.dtype.itemsize
        step = self.block * size
        buffer = memoryview(bytearray(min(step, self._source.nbytes)))
        for offset, count in blocks(0, self._source.nbytes, step):
            self._source.read_into(offset, buffer[:count])
            sums.add(buffer[:count], self.dtype, offset // size)
        return norm_scales(sums.sums, self._magnitude.read(), self._magnitude.entry.dtype)


class FoldedBatchNormWeight(Scaled):
    """The weight of a layer with the batch norm behind it folded in: ``weight * gamma / sqrt(var + eps)`` along ``dim``.

    ``dim`` is 0 for convolutions and linear layers, 1 for transposed convolutions; ``gamma`` None is a norm without affine parameters.
    As ``torch.nn.utils.fusion.fuse_conv_bn_weights``; the dtype is that of the weight.
    """

    def __init__(
        self, weight: LazyTensor, gamma: LazyTensor | None, var: LazyTensor, eps: float = 1e-5, dim: int = 0
    ) -> None:
        self.name = f"batch norm folded into {weight.entry.key}"
        check_floats("batch norm", weight, gamma, var)
        super().__init__(weight, checked_dim(dim, len(weight.shape), "batch norm", [weight.entry.key]))
        for each in (gamma, var):
            _check_channels("batch norm", each, self._channels)
        self._gamma, self._var, self._eps = gamma, var, eps

    def _find_scales(self) -> Array:
        return _batch_norm(self._gamma, self._var, self._eps).scales


class FoldedBatchNormBias:
    """The bias of a layer with the batch norm behind it folded in: ``(bias - mean) * gamma / sqrt(var + eps) + beta``.

    What is None isn't there: a bias or ``beta`` of 0, a ``gamma`` of 1. The dtype is ``dtype``, else that of the bias, else of the mean.
    """

    def __init__(
        self,
        bias: LazyTensor | None,
        gamma: LazyTensor | None,
        beta: LazyTensor | None,
        mean: LazyTensor,
        var: LazyTensor,
        eps: float = 1e-5,
        *,
        dtype: DType | None = None,
    ) -> None:
        self.name = f"bias of the batch norm of {mean.entry.key}"
        self.shape = mean.shape
        self.dtype = dtype or (mean if bias is None else bias).entry.dtype
        if len(self.shape) != 1 or self.shape[0] > _MOST_CHANNELS:
            found = list(self.shape)
            raise RuleError("batch norm: this is no mean of channels", key=mean.entry.key, found=found)
        check_floats("batch norm", bias, gamma, beta, mean, var)
        for each in (bias, gamma, beta, var):
            _check_channels("batch norm", each, self.shape[0])
        self._bias, self._gamma, self._beta, self._mean, self._var, self._eps = bias, gamma, beta, mean, var, eps
        self._lock = Lock()
        self._made: memoryview | None = None

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill the buffer with the packed bytes of the bias from that offset. It is computed once, whole."""
        with self._lock:
            if self._made is None:
                norm = _batch_norm(self._gamma, self._var, self._eps)
                mean = vector(self._mean)
                bias, beta = (None if each is None else vector(each) for each in (self._bias, self._beta))
                self._made = norm.bias(bias, beta, mean, self.dtype)
        buffer[:] = self._made[offset : offset + len(buffer)]


class MergedLora(Computed):
    """A weight with a low-rank adapter added: ``base + scaling * (b @ a)``.

    Shapes: base ``[out, in]``, a ``[rank, in]``, b ``[out, rank]``; of a convolution base ``[out, in, *kernel]``,
    a ``[rank, in, *kernel]``, b ``[out, rank, 1, …]``. ``transposed`` is for a base ``[in, out]``. The sum is rounded once, to the dtype
    of the base.
    """

    def __init__(
        self, base: LazyTensor, a: LazyTensor, b: LazyTensor, scaling: float, transposed: bool = False
    ) -> None:
        self.name = f"{base.entry.key} with the adapter {a.entry.key}"
        check_floats("adapter", base, a, b)
        self._rank = _rank(base, a, b, transposed)
        if not isfinite(scaling):
            raise RuleError("adapter: the scaling is no number", key=base.entry.key, found=scaling)
        left, right = (_turned(a), _turned(b)) if transposed else (b, a)
        self.dtype, self.shape = base.entry.dtype, base.shape
        self._base, self._left, self._right = Packed(base), Packed(left), Packed(right)
        self._scaling = float(scaling)
        self._columns = prod(base.shape[1:])
        self.block = max(1, min(self._base.block, _BLOCK_ELEMENTS))

    def _fill(self, first: int, buffer: memoryview) -> None:
        """Piece by piece: whole rows, or a part of a single one."""
        size, columns, done = self.dtype.itemsize, self._columns, 0
        count = len(buffer) // size
        most = max(1, _BLOCK_ELEMENTS // self._rank)  # rows of b, or columns of a
        while done < count:
            row, column = divmod(first + done, columns)
            if column or count - done < columns or columns > most:
                rows, width = 1, min(columns - column, count - done, most)
            else:
                rows, width = min((count - done) // columns, most), columns
            self._fill_box(row, column, width, buffer[done * size : (done + rows * width) * size])
            done += rows * width

    def _fill_box(self, row: int, column: int, width: int, buffer: memoryview) -> None:
        from statedict.numerics.folding import Block, add_product

        rows = len(buffer) // (self.dtype.itemsize * width)
        base = _read(self._base, row * self._columns + column, rows * width)
        left = _read(self._left, row * self._rank, rows * self._rank)
        if width == self._columns:
            right = _read(self._right, 0, self._rank * width)
        else:
            right = memoryview(bytearray(self._rank * width * self._right.dtype.itemsize))
            size = width * self._right.dtype.itemsize
            for k in range(self._rank):
                at = (k * self._columns + column) * self._right.dtype.itemsize
                self._right.read_into(at, right[k * size : (k + 1) * size])
        parts = [Block(base, self.dtype), Block(left, self._left.dtype), Block(right, self._right.dtype)]
        add_product(parts[0], parts[1], parts[2], self._rank, self._scaling, buffer)


def _read(source: Packed, first: int, count: int) -> memoryview:
    """That many elements from that one on."""
    size = source.dtype.itemsize
    buffer = memoryview(bytearray(count * size))
    source.read_into(first * size, buffer)
    return buffer


def _turned(matrix: LazyTensor) -> LazyTensor:
    """The matrix transposed: the same storage seen the other way."""
    entry = matrix.entry
    assert entry.view is not None
    view = entry.view._replace(stride=entry.view.stride[::-1])
    return LazyTensor(
        entry._replace(shape=entry.shape[::-1], view=view, digest=None, memory_stride=None), matrix.origin
    )


def _rank(base: LazyTensor, a: LazyTensor, b: LazyTensor, transposed: bool) -> int:
    """The rank of the adapter, once it is sure that the three shapes fit. Else ``RuleError``."""
    shape = (base.shape[1], base.shape[0]) if transposed and len(base.shape) == 2 else base.shape
    rank = a.shape[0] if a.shape else 0
    ones = (1,) * (len(shape) - 2)
    fits = len(shape) >= 2 and not (transposed and len(shape) > 2)
    if not (fits and rank and a.shape[1:] == shape[1:] and b.shape == (shape[0], rank, *ones)):
        raise RuleError(
            "adapter: the shapes don't fit",
            key=base.entry.key,
            expected=f"a [rank, in] and b [out, rank] for a base {list(base.shape)}{' that is transposed' if transposed else ''}",
            found=f"'{a.entry.key}' {list(a.shape)} and '{b.entry.key}' {list(b.shape)}",
        )
    if rank > _BLOCK_ELEMENTS:
        raise Unsupported("the rank of the adapter is too large", key=a.entry.key, found=rank)
    return rank


def _batch_norm(gamma: LazyTensor | None, var: LazyTensor, eps: float) -> BatchNorm:
    from statedict.numerics.folding import BatchNorm

    return BatchNorm(None if gamma is None else vector(gamma), vector(var), eps)


def vector(tensor: LazyTensor) -> Array:
    """The numbers of a small tensor in float64."""
    from statedict.numerics.casting import as_float

    return as_float(tensor.read(), tensor.entry.dtype, True)


def check_floats(what: str, *tensors: LazyTensor | None) -> None:
    """Raise ``RuleError`` for a tensor that isn't of floats, and whatever keeps one from being read."""
    from statedict.numerics.casting import is_castable

    for tensor in tensors:
        if tensor is None:
            continue
        tensor.check_readable()
        if tensor.entry.dtype.kind != "float" or not is_castable(tensor.entry.dtype, tensor.entry.dtype):
            raise RuleError(f"{what}: this is no tensor of floats", key=tensor.entry.key, found=tensor.dtype)


def _check_channels(what: str, tensor: LazyTensor | None, channels: int) -> None:
    if tensor is not None and tensor.numel != channels:
        raise RuleError(
            f"{what}: the number of channels differs",
            key=tensor.entry.key,
            expected=f"{channels} elements",
            found=tensor.numel,
        )
