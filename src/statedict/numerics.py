"""Arrays of any dtype from bytes. The only module outside ``statedict.torch`` that imports numpy."""

from __future__ import annotations

import ast
from typing import Any

import numpy as np

from statedict.dtypes import DType
from statedict.errors import Unsupported
from statedict.views import reach

__all__ = ["array", "empty", "gather", "numpy_dtype", "to_packed_bytes"]

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
    return np.frombuffer(data, numpy_dtype(dtype)).reshape(shape)


def empty(dtype: DType, shape: tuple[int, ...]) -> Array:
    """An array of that shape whose values are not set."""
    return np.empty(shape, numpy_dtype(dtype))


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
    flat = np.frombuffer(raw, kind, reach(shape, stride))
    seen = np.lib.stride_tricks.as_strided(flat, shape, [step * kind.itemsize for step in stride], writeable=False)
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


def to_packed_bytes(values: Array) -> memoryview:
    """The bytes of an array in reading order; a view where they lie so already."""
    packed: Any = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
    return memoryview(packed)
