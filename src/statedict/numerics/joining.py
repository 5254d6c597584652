"""Runs of bytes put side by side in rows, and the bytes of a single element."""

from __future__ import annotations

from math import gcd

import numpy as np

from statedict.dtypes import DType
from statedict.errors import Unsupported
from statedict.numerics.arrays import numpy_dtype

__all__ = ["element_bytes", "put_columns"]

# Kinds whose elements a number can be written as.
_NUMBERS = frozenset({"float", "int", "uint", "bool", "complex"})


def put_columns(buffer: memoryview, row: int, at: int, data: memoryview, chunk: int) -> None:
    """Copy runs of ``chunk`` bytes that lie one behind the other into rows of ``row`` bytes, each to position ``at`` of its row."""
    unit = gcd(row, at, chunk, 8)
    word = np.dtype(f"u{unit}")
    target = np.frombuffer(buffer, word).reshape(-1, row // unit)
    target[:, at // unit : (at + chunk) // unit] = np.frombuffer(data, word).reshape(-1, chunk // unit)


def element_bytes(dtype: DType, value: complex) -> bytes:
    """The little-endian bytes of one element with that value, rounded to the dtype.

    Raises ``Unsupported`` for packed and quantised dtypes, ``ValueError`` for a number that an integer dtype doesn't have.
    """
    if dtype.kind not in _NUMBERS or dtype.bits % 8 or dtype.code in ("F4_X2", "C32"):
        raise Unsupported(f"a value of {dtype} can't be written as a number", hint="Use 0")
    whole = dtype.kind in ("int", "uint", "bool")
    made = np.asarray(value).astype(numpy_dtype(dtype))
    if whole and made.item() != value:
        raise ValueError(f"{value!r} is no value of {dtype}")
    return made.tobytes()
