"""Tensors that are computed as they are read: recipes, and the file that they lie in one after the other.

A recipe gives any range of the packed little-endian bytes of its result. ``DerivedFile`` makes ranges of a file of them, so that a
manifest's storage can have an extent over it, and nobody downstream can tell a derived tensor from a stored one.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from math import prod
from typing import Protocol

from statedict.dtypes import DType
from statedict.errors import CorruptFile, RuleError, Unsupported
from statedict.lazy_tensor import LazyTensor

__all__ = ["ALIGNMENT", "Computed", "DerivedFile", "Packed", "Recipe", "checked_dim", "keys_of", "nbytes_of"]

# Bytes that the start of each recipe in a DerivedFile is a multiple of: what the writers align tensors to as well.
ALIGNMENT = 64
# Bytes that are computed at once from a source that lies in order. Two of them, and what is made of them, stay in the cache.
_BLOCK_NBYTES = 1024 * 1024
# Bytes that are gathered at once from a source whose elements lie scattered: each piece may walk the whole storage.
_SCATTERED_NBYTES = 8 * 1024 * 1024
# Keys that a name or a message lists.
_LISTED = 3


class Recipe(Protocol):
    """How the values of a tensor are made.

    ``name`` says it in a few words, for messages: "cast of layers.0.weight to bfloat16".
    """

    name: str
    dtype: DType
    shape: tuple[int, ...]

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill the buffer (of bytes) with the packed little-endian bytes of the result from that offset.

        Any offset and length inside the result; several threads may do so at once. Needs at most a few MiB beside the buffer.
        """


class Computed:
    """The base of recipes that make whole elements: turns ranges of bytes into ranges of elements, a block at a time.

    In the thread that asks: two threads for one buffer were slower than one, as each waits for the other between numpy's calls.
    """

    name: str
    dtype: DType
    shape: tuple[int, ...]
    block: int  # elements of the result that are made at once

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill the buffer with the packed bytes of the result from that offset."""
        size, done, total = self.dtype.itemsize, 0, len(buffer)
        while done < total:
            first, skip = divmod(offset + done, size)
            if skip or total - done < size:
                element = memoryview(bytearray(size))
                self._fill(first, element)
                count = min(size - skip, total - done)
                buffer[done : done + count] = element[skip : skip + count]
            else:
                count = min((total - done) // size, self.block) * size
                self._fill(first, buffer[done : done + count])
            done += count

    def _fill(self, first: int, buffer: memoryview) -> None:
        """Fill the buffer with whole elements of the result, in reading order, from that element on; at most ``block``."""
        raise NotImplementedError


class Packed(Computed):
    """Any range of the packed bytes of a lazy tensor, however its elements lie.

    Raises ``Unsupported`` or ``LimitExceeded`` when it is made, if the tensor's values can't be read.
    """

    def __init__(self, source: LazyTensor) -> None:
        source.check_readable()
        self.source = source
        self.name = source.entry.key
        self.dtype, self.shape = source.entry.dtype, source.shape
        self.nbytes = source.nbytes
        self.is_plain = source.is_plain
        self.block = max(1, (_BLOCK_NBYTES if self.is_plain else _SCATTERED_NBYTES) // max(1, self.dtype.itemsize))
        if not self.is_plain and self.dtype.bits % 8:
            hint = "Write the tensor packed first, with statedict convert"
            raise Unsupported("numbers smaller than a byte can't be gathered", key=self.name, hint=hint)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill the buffer; straight from the file where the bytes lie there as they are."""
        if not self.is_plain:
            super().read_into(offset, buffer)
        elif len(buffer):
            view = self.source.entry.view
            assert view is not None
            self.source.origin.reader.read_into(view.storage, self.source.plain_range()[0] + offset, buffer)

    def _fill(self, first: int, buffer: memoryview) -> None:
        from statedict.numerics.arrays import to_packed_bytes

        size, done = self.dtype.itemsize, 0
        for index in _slabs(self.shape, first, len(buffer) // size):
            data = to_packed_bytes((self.source[index] if index else self.source).numpy())
            buffer[done : done + len(data)] = data
            done += len(data)


def _slabs(shape: tuple[int, ...], first: int, count: int) -> Iterator[tuple[int | slice, ...]]:
    """Indices of the boxes that hold ``count`` elements in reading order from the flat position ``first`` on, one after the other."""
    inner = [prod(shape[dim + 1 :]) for dim in range(len(shape))]
    if not shape and count:
        yield ()
        return
    while count:
        dim = next(d for d, step in enumerate(inner) if step <= count and first % step == 0)
        at = [first // step % size for step, size in zip(inner[: dim + 1], shape)]
        rows = min(count // inner[dim], shape[dim] - at[dim])
        yield (*at[:dim], slice(at[dim], at[dim] + rows))
        first += rows * inner[dim]
        count -= rows * inner[dim]


class DerivedFile:
    """Recipes one after the other as a file that is read by position, each from a multiple of 64 bytes on.

    Nothing is computed before it is read, and nothing is kept. Between recipes there are zeros.
    """

    def __init__(self, recipes: Sequence[Recipe], path: str) -> None:
        self.path = path
        self._recipes = tuple(recipes)
        self._offsets: list[int] = []
        end = 0
        for recipe in self._recipes:
            self._offsets.append(-(-end // ALIGNMENT) * ALIGNMENT)
            end = self._offsets[-1] + nbytes_of(recipe)
        self.nbytes = end

    def offsets(self, number: int) -> int:
        """Where the bytes of that recipe begin; recipes are counted from 0."""
        return self._offsets[number]

    def read(self, offset: int, nbytes: int) -> bytes:
        """Exactly that many bytes, or ``CorruptFile``."""
        self._check(offset, nbytes)
        buffer = bytearray(nbytes)
        self.read_into(offset, memoryview(buffer))
        return bytes(buffer)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill the buffer (of bytes) from that position, or raise ``CorruptFile``; several threads may do so at once."""
        self._check(offset, len(buffer))
        done, number = 0, max(0, bisect_right(self._offsets, offset) - 1)
        while done < len(buffer):
            recipe, at = self._recipes[number], offset + done - self._offsets[number]
            nbytes = nbytes_of(recipe)
            if at < nbytes:
                count = min(len(buffer) - done, nbytes - at)
                recipe.read_into(at, buffer[done : done + count])
            else:
                count = min(len(buffer) - done, self._offsets[number + 1] - offset - done)
                buffer[done : done + count] = bytes(count)
                number += 1
            done += count

    def close(self) -> None:
        """The files that the recipes read from belong to whoever opened them."""

    def _check(self, offset: int, nbytes: int) -> None:
        if offset < 0 or nbytes < 0 or offset + nbytes > self.nbytes:
            raise CorruptFile(
                "the derived tensors end too early",
                path=self.path,
                offset=offset,
                expected=f"{nbytes} bytes",
                found=max(0, self.nbytes - offset),
            )


def nbytes_of(recipe: Recipe) -> int:
    """Bytes of the result, packed."""
    return recipe.dtype.nbytes(prod(recipe.shape))


def checked_dim(dim: int, ndim: int, what: str, keys: Sequence[str]) -> int:
    """The dimension counted from the front. Raises ``RuleError`` if the tensors don't have it."""
    if not -ndim <= dim < ndim:
        found = f"dimensions 0 to {ndim - 1}" if ndim else "tensors without dimensions"
        raise RuleError(f"{what}: there is no dimension {dim}", key=", ".join(keys[:_LISTED]), found=found)
    return dim % ndim


def keys_of(sources: Sequence[LazyTensor]) -> str:
    """The keys of the sources for a name: the first few, and how many more there are."""
    names = [source.entry.key for source in sources[:_LISTED]]
    rest = len(sources) - len(names)
    return ", ".join(names) + (f" and {rest} more" if rest else "")
