"""Tensors whose dimensions changed places: which orders two shapes allow, and whether the values agree with one of them."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import permutations

from statedict.manifest import StorageView, TensorEntry
from statedict.ops.comparing.walks import Side, Walk, are_same_bytes

__all__ = ["has_same_bytes", "may_be_equal", "orders", "permuted", "transposition"]

# Weights have up to five dimensions; of four there are 23 orders, of five more are not looked at than swaps.
_MOST_DIMS = 5
_ALL_ORDERS_DIMS = 4
# Single elements that are looked at before two tensors are read: a pair that isn't equal passes this by chance only.
_PROBES = 24


def orders(here: tuple[int, ...], there: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """The orders of ``here``'s dimensions that give the shape ``there``: the last two swapped first, then the first two."""
    count = len(here)
    if not 2 <= count <= _MOST_DIMS or sorted(here) != sorted(there):
        return
    usual = tuple(range(count))
    found = dict.fromkeys([_swapped(usual, count - 2, count - 1), _swapped(usual, 0, 1)])
    if count <= _ALL_ORDERS_DIMS:
        found |= dict.fromkeys(permutations(usual))
    else:
        found |= dict.fromkeys(_swapped(usual, i, j) for i in range(count) for j in range(i))
    for order in found:
        if _moves(order, here) and tuple([here[dim] for dim in order]) == there:
            yield order


def _swapped(order: tuple[int, ...], one: int, two: int) -> tuple[int, ...]:
    made = list(order)
    made[one], made[two] = made[two], made[one]
    return tuple(made)


def _moves(order: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    """Whether any element gets another place: dimensions of size 1 don't matter."""
    long = [dim for dim in order if shape[dim] != 1]
    return long != sorted(long)


def permuted(entry: TensorEntry, order: tuple[int, ...]) -> TensorEntry:
    """The same elements with the dimensions in that order; only its strides change."""
    assert entry.view is not None
    stride: StorageView = entry.view._replace(stride=tuple([entry.view.stride[dim] for dim in order]))
    shape = tuple([entry.shape[dim] for dim in order])
    return entry._replace(shape=shape, view=stride, digest=None, memory_stride=None)


def transposition(a: Side, b: Side) -> tuple[int, ...] | None:
    """The order of ``a``'s dimensions in which it has ``b``'s shape and bytes; None where there is none.

    A few single elements are looked at first, so that a pair that isn't equal costs little.
    """
    if a.entry.dtype is not b.entry.dtype or a.entry.view is None or b.entry.view is None or a.entry.dtype.bits % 8:
        return None
    for order in orders(a.entry.shape, b.entry.shape):
        turned = a._replace(entry=permuted(a.entry, order))
        if may_be_equal(turned, b) and has_same_bytes(turned, b):
            return order
    return None


def has_same_bytes(a: Side, b: Side) -> bool:
    """Whether two tensors of one shape and dtype hold the same values, byte by byte. Stops at the first block that differs."""
    return all(are_same_bytes(one, two) for one, two, _ in Walk(a, b).blocks())


def may_be_equal(a: Side, b: Side) -> bool:
    """Whether a few elements, the same ones of every pair of this shape, have the same bytes in both."""
    one, two = a.entry.view, b.entry.view
    if one is None or two is None or one.bits != two.bits or one.storage.byteorder != two.storage.byteorder:
        return True
    if not (_is_plain(one) and _is_plain(two)):
        return True
    for number in range(_PROBES if a.entry.numel else 0):
        # Multiples of the golden ratio are spread evenly.
        place = number * 0x9E3779B97F4A7C15 % a.entry.numel
        if _element(a, one, place) != _element(b, two, place):
            return False
    return True


def _is_plain(view: StorageView) -> bool:
    extent = view.storage.extent
    return view.storage.data is not None or (extent is not None and extent.codec == "raw")


def _element(side: Side, view: StorageView, place: int) -> bytes:
    """The bytes of one element, counted in reading order."""
    offset = view.offset
    for size, step in zip(reversed(side.entry.shape), reversed(view.stride)):
        place, at = divmod(place, size)
        offset += at * step
    size = side.entry.dtype.itemsize
    return bytes(side.checkpoint.reader.read(view.storage, offset * size, size))
