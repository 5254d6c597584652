"""Recipes that put tensors side by side and change no element: concatenated, interleaved, padded.

Each result is the same picture: rows, and in every row one run of bytes of each piece.

    row 0   │ a: chunk 0 │ b: chunk 0 │ …
    row 1   │ a: chunk 1 │ b: chunk 1 │ …

A concatenation along the first dimension has a single row; the later the dimension, the more and the shorter the rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Protocol

from statedict.dtypes import DType
from statedict.errors import RuleError, StateDictError, Unsupported
from statedict.lazy_tensor import LazyTensor
from statedict.recipes.derived import Packed, checked_dim, keys_of

__all__ = ["Concat", "Interleave", "Pad"]

# Rows shorter than this are read many at once and then spread, instead of run by run. A run costs a system call and a few
# microseconds of Python, which is what a copy of 64 KiB costs too.
_SHORT_ROW_NBYTES = 64 * 1024
# Bytes of rows that are spread at once.
_BLOCK_NBYTES = 1024 * 1024


class _Piece(Protocol):
    """Bytes that can be had by range."""

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill the buffer from that offset."""


class _Constant:
    """The bytes of one element, repeated for ever."""

    def __init__(self, element: bytes) -> None:
        self._element = element

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill the buffer, beginning inside an element if the offset says so."""
        size = len(self._element)
        skip = offset % size
        repeated = self._element * (-(-(skip + len(buffer)) // size))
        buffer[:] = memoryview(repeated)[skip : skip + len(buffer)]


class _Joined:
    """Rows that are made of one run of bytes of each piece."""

    def __init__(self, pieces: Sequence[_Piece], chunks: Sequence[int]) -> None:
        """``chunks`` are the bytes of each piece in one row."""
        self._pieces = tuple(pieces)
        self._chunks = tuple(chunks)
        self._row = sum(chunks)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill the buffer with the packed bytes of the result from that offset."""
        done, total = 0, len(buffer)
        while done < total:
            row, skip = divmod(offset + done, self._row)
            rows = (total - done) // self._row
            if skip or rows < 2 or self._row > _SHORT_ROW_NBYTES:
                count = min(total - done, self._row - skip)
                self._read_runs(row, skip, buffer[done : done + count])
            else:
                rows = min(rows, _BLOCK_NBYTES // self._row)
                count = rows * self._row
                self._spread(row, rows, buffer[done : done + count])
            done += count

    def _read_runs(self, row: int, skip: int, buffer: memoryview) -> None:
        """A part of a single row, piece by piece."""
        done = 0
        for piece, chunk in zip(self._pieces, self._chunks):
            if skip >= chunk:
                skip -= chunk
                continue
            count = min(chunk - skip, len(buffer) - done)
            if not count:
                return
            piece.read_into(row * chunk + skip, buffer[done : done + count])
            done += count
            skip = 0

    def _spread(self, row: int, rows: int, buffer: memoryview) -> None:
        """Whole rows: the bytes of each piece are read for all of them at once."""
        from statedict.numerics.joining import put_columns

        at = 0
        for piece, chunk in zip(self._pieces, self._chunks):
            if chunk:
                data = memoryview(bytearray(rows * chunk))
                piece.read_into(row * chunk, data)
                put_columns(buffer, self._row, at, data, chunk)
            at += chunk


class Concat(_Joined):
    """Tensors one after the other along a dimension, as ``torch.cat`` does.

    All have one dtype, and one shape but for that dimension; else ``RuleError``. Dtypes smaller than a byte raise ``Unsupported`` where
    a run of them doesn't fill whole bytes.
    """

    def __init__(self, sources: Sequence[LazyTensor], dim: int) -> None:
        what = "concat"
        first = _checked_sources(sources, what)
        dim = checked_dim(dim, len(first.shape), what, [source.entry.key for source in sources])
        for source in sources[1:]:
            if _without(source.shape, dim) != _without(first.shape, dim):
                raise _unlike(what, first, source, f"the shape of '{first.entry.key}' but for dimension {dim}")
        self.name = f"{what} of {keys_of(sources)}"
        self.dtype = first.entry.dtype
        self.shape = (*first.shape[:dim], sum([source.shape[dim] for source in sources]), *first.shape[dim + 1 :])
        chunks = [_chunk(self.dtype, source.shape[dim:], source.entry.key) for source in sources]
        super().__init__([Packed(source) for source in sources], chunks)


class Interleave(_Joined):
    """Tensors of one shape whose slices along a dimension take turns: a0 b0 a1 b1 …

    As ``torch.stack(sources, dim + 1).flatten(dim, dim + 1)``. Another shape or dtype raises ``RuleError``.
    """

    def __init__(self, sources: Sequence[LazyTensor], dim: int) -> None:
        what = "interleave"
        first = _checked_sources(sources, what)
        dim = checked_dim(dim, len(first.shape), what, [source.entry.key for source in sources])
        for source in sources[1:]:
            if source.shape != first.shape:
                raise _unlike(what, first, source, f"the shape of '{first.entry.key}', {list(first.shape)}")
        self.name = f"{what} of {keys_of(sources)}"
        self.dtype = first.entry.dtype
        self.shape = (*first.shape[:dim], first.shape[dim] * len(sources), *first.shape[dim + 1 :])
        chunks = [_chunk(self.dtype, source.shape[dim + 1 :], source.entry.key) for source in sources]
        super().__init__([Packed(source) for source in sources], chunks)


class Pad(_Joined):
    """A tensor with ``before`` and ``after`` more slices along a dimension, filled with a value, as ``torch.nn.functional.pad`` does.

    Raises ``RuleError`` for a negative count, and for a value that the dtype doesn't have.
    """

    def __init__(self, source: LazyTensor, dim: int, before: int, after: int, value: float = 0) -> None:
        key = source.entry.key
        dim = checked_dim(dim, len(source.shape), "pad", [key])
        if before < 0 or after < 0:
            found = f"{before} before and {after} after"
            raise RuleError("pad: a tensor can't be padded by fewer than none", key=key, found=found)
        self.name = f"pad of {key}"
        self.dtype = source.entry.dtype
        shape = source.shape
        self.shape = (*shape[:dim], before + shape[dim] + after, *shape[dim + 1 :])
        rest = shape[dim + 1 :]
        constant = _Constant(_element(self.dtype, value, key))
        chunks = [_chunk(self.dtype, (size, *rest), key) for size in (before, shape[dim], after)]
        super().__init__([constant, Packed(source), constant], chunks)


def _checked_sources(sources: Sequence[LazyTensor], what: str) -> LazyTensor:
    """The first source, once it is sure that there is one and that the others have its dtype and number of dimensions."""
    if not sources:
        raise RuleError(f"{what}: there is nothing to join")
    first = sources[0]
    for source in sources[1:]:
        if source.entry.dtype != first.entry.dtype:
            expected = f"{first.dtype}, as '{first.entry.key}' has"
            hint = "Cast them to one dtype first"
            raise RuleError(
                f"{what}: the dtypes differ", key=source.entry.key, expected=expected, found=source.dtype, hint=hint
            )
        if len(source.shape) != len(first.shape):
            raise _unlike(what, first, source, f"{len(first.shape)} dimensions, as '{first.entry.key}' has")
    return first


def _unlike(what: str, first: LazyTensor, source: LazyTensor, expected: str) -> RuleError:
    return RuleError(f"{what}: the shapes don't fit", key=source.entry.key, expected=expected, found=list(source.shape))


def _without(shape: tuple[int, ...], dim: int) -> tuple[int, ...]:
    return shape[:dim] + shape[dim + 1 :]


def _chunk(dtype: DType, shape: tuple[int, ...], key: str) -> int:
    """Bytes of a run of that shape. Raises ``Unsupported`` where the next one would begin inside a byte."""
    bits = prod(shape) * dtype.bits
    if bits % 8:
        raise Unsupported(
            f"numbers of {dtype} can't be joined where a run of them ends inside a byte",
            key=key,
            expected="a multiple of 8 bits",
            found=bits,
        )
    return bits // 8


def _element(dtype: DType, value: float, key: str) -> bytes:
    """The bytes of one element, or of the smallest whole number of bytes that repeats."""
    if not value and not (isinstance(value, float) and str(value).startswith("-")):
        return bytes(max(1, dtype.itemsize))
    from statedict.numerics.joining import element_bytes

    try:
        return element_bytes(dtype, value)
    except StateDictError:
        raise
    except (ValueError, OverflowError, TypeError) as error:
        raise RuleError(f"pad: {value!r} is no value of {dtype}", key=key) from error
