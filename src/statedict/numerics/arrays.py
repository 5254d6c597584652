"""Arrays of any dtype from bytes, and bytes from arrays."""

from __future__ import annotations

import ast
from typing import Any

import numpy as np

from statedict.dtypes import DType
from statedict.errors import Unsupported
from statedict.views import reach

__all__ = ["Array", "array", "empty", "gather", "numpy_dtype", "swapped", "to_packed_bytes"]

Array = np.ndarray[Any, Any]


def numpy_dtype(dtype: DType) -> np.dtype[Any]:
    """numpy's dtype of an array of it, little-endian; ml_dtypes' where numpy has none."""
    name = dtype.numpy
    if not name:
        raise Unsupported(f"numpy has no arrays of {dtype}", hint="Read its bytes: .read()")
    if name.startswith("["):
        made: np.dtype[Any] = np.dtype(ast.literal_eval(name))
        return made
    if name == "bfloat16" or name.startswith("float8"):
        import ml_dtypes

        named: np.dtype[Any] = np.dtype(getattr(ml_dtypes, name))
        return named
    return np.dtype(name)


def array(data: bytes | bytearray | memoryview, dtype: DType, shape: tuple[int, ...]) -> Array:
    """A view of packed little-endian bytes as an array; nothing is copied."""
    flat = np.frombuffer(data, numpy_dtype(dtype))
    try:
        return flat.reshape(shape)
    except ValueError as error:
        raise _unfit(error) from error


def empty(dtype: DType, shape: tuple[int, ...]) -> Array:
    """An array of that shape whose values are not set."""
    try:
        return np.empty(shape, numpy_dtype(dtype))
    except ValueError as error:
        raise _unfit(error) from error


def _unfit(error: ValueError) -> Unsupported:
    """The error of a shape with more dimensions than numpy has, or sizes beside a zero whose product it can't count."""
    return Unsupported(f"numpy has no array of this shape ({error})", hint="Read its bytes: .read()")


def gather(
    raw: bytes | bytearray | memoryview,
    dtype: DType,
    shape: tuple[int, ...],
    stride: tuple[int, ...],
    *,
    byteorder: str,
    bits: str,
    out: Array,
) -> None:
    """Copy a strided view into ``out``: ``raw`` begins at its first element, strides count elements.

    Big-endian values are turned, conjugate ("c") and negative ("n") bits are carried out.
    """
    kind = numpy_dtype(dtype)
    # numpy's stride tricks don't know the names of ml_dtypes' kinds.
    plain = kind if kind.isbuiltin == 1 else np.dtype(f"u{kind.itemsize}")
    flat = np.frombuffer(raw, plain, reach(shape, stride))
    # The stride of a single element is never taken, and may be too large for numpy.
    steps = [step * kind.itemsize if size > 1 else 0 for size, step in zip(shape, stride)]
    seen = np.lib.stride_tricks.as_strided(flat, shape, steps, writeable=False).view(kind)
    if byteorder == "big" and dtype.swap > 1:
        seen = seen.byteswap()
    out[...] = seen
    if "c" in bits:
        _negate_imaginary(out)
    if "n" in bits:
        np.negative(out, out=out)


def _negate_imaginary(values: Array) -> None:
    if values.dtype.names:
        values["imag"] = -values["imag"]
    else:
        np.conjugate(values, out=values)


def swapped(data: bytes | memoryview, dtype: DType) -> memoryview:
    """A copy of big-endian values as little-endian ones."""
    return to_packed_bytes(np.frombuffer(data, f"u{dtype.swap}").byteswap())


def to_packed_bytes(values: Array) -> memoryview:
    """The bytes of an array in reading order; a view where they lie so already."""
    packed: Any = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
    return memoryview(packed)
