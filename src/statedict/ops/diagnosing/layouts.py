"""Tensors cut into rows in every way that matters, in one pass over their bytes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from statedict.lazy_tensor import LazyTensor
from statedict.manifest import TensorEntry
from statedict.numerics.rows import Cut, Rows, cut_into_rows
from statedict.ops.comparing.walks import Side
from statedict.ops.diagnosing.reading_off import Form

__all__ = ["Laid", "laid_out"]

# Bytes that are cut at once: what is made of them on the way is twice as large, and stays in the cache.
_BLOCK_NBYTES = 1024 * 1024
# Bytes of a vector from which on it says something: fewer are too often the same by chance.
_TELLING_NBYTES = 8


class Laid(NamedTuple):
    """A tensor that was read: its form, its rows by cut, and the bytes of a vector. Constant: all elements are equal, or it is tiny."""

    key: str
    dtype: str
    form: Form
    rows: dict[Cut, Rows]
    data: bytes
    is_constant: bool

    def mark(self) -> object:
        """What equal tensors of one form share."""
        cut = next(iter(self.rows), None)
        return (
            self.dtype,
            self.form.long,
            cut,
            self.data if cut is None or not cut else self.rows[cut].numbers.tobytes(),
        )


def laid_out(key: str, tensor: Side) -> Laid:
    """Reads the tensor once. Raises what reading raises."""
    entry = tensor.entry
    form = Form.of(entry.shape)
    if not form.long:
        data = bytes(LazyTensor(entry, tensor.checkpoint).read())
        return Laid(key, entry.dtype.code, form, {}, data, is_constant=True)
    if len(form.long) == 1:
        data = bytes(LazyTensor(_long(entry, form), tensor.checkpoint).read())
        rows = cut_into_rows([memoryview(data)], entry.dtype.itemsize, form.long)
        is_constant = entry.nbytes < _TELLING_NBYTES or data == data[: entry.dtype.itemsize] * form.long[0]
        return Laid(key, entry.dtype.code, form, rows, data, is_constant)
    rows = cut_into_rows(_blocks(tensor, form), entry.dtype.itemsize, form.long)
    is_constant = entry.nbytes < _TELLING_NBYTES or any(_is_alike(each) for each in rows.values())
    return Laid(key, entry.dtype.code, form, rows, b"", is_constant)


def _is_alike(rows: Rows) -> bool:
    """Whether all rows are one element again and again."""
    return bool(rows.blank.all()) and bool((rows.numbers == rows.numbers[:1]).all())


def _long(entry: TensorEntry, form: Form) -> TensorEntry:
    """The same elements without the dimensions of size 1."""
    assert entry.view is not None
    stride = tuple([step for step, size in zip(entry.view.stride, entry.shape) if size != 1])
    return entry._replace(shape=form.long, view=entry.view._replace(stride=stride), digest=None, memory_stride=None)


def _blocks(tensor: Side, form: Form) -> Iterator[memoryview]:
    """The packed bytes in blocks of whole indices of the first dimension."""
    whole = LazyTensor(_long(tensor.entry, form), tensor.checkpoint)
    count = max(1, _BLOCK_NBYTES * form.long[0] // max(1, whole.nbytes))
    for start in range(0, form.long[0], count):
        yield whole[start : start + count].read()
