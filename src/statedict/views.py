"""The geometry of strided views: how far they reach, whether they are packed, and how to walk them in little memory.

Everything here counts elements, is pure, and works on Python integers, so that no product overflows. A view of shape
``[s0, s1, …]`` with strides ``[t0, t1, …]`` and an offset shows, at index ``(i0, i1, …)``, the element
``offset + i0·t0 + i1·t1 + …`` of its storage.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from typing import NamedTuple

__all__ = ["Box", "boxes", "is_dense", "is_packed", "packed_stride", "reach", "sliced"]


def packed_stride(shape: Sequence[int]) -> tuple[int, ...]:
    """The strides of a tensor of that shape whose elements lie one behind the other, last dimension fastest."""
    stride = [1] * len(shape)
    for i in range(len(shape) - 2, -1, -1):
        stride[i] = stride[i + 1] * max(shape[i + 1], 1)
    return tuple(stride)


def is_packed(shape: Sequence[int], stride: Sequence[int]) -> bool:
    """Whether the elements lie one behind the other in reading order; dimensions of size 1 don't matter."""
    if len(shape) == 1:
        return stride[0] == 1 or shape[0] < 2
    step = 1
    for size, jump in zip(reversed(shape), reversed(stride)):
        if size == 0:
            return True
        if size != 1:
            if jump != step:
                return False
            step *= size
    return True


def is_dense(shape: Sequence[int], stride: Sequence[int]) -> bool:
    """Whether the elements fill their range exactly once, in whatever order (a transposed tensor does)."""
    step = 1
    for jump, size in sorted((t, s) for s, t in zip(shape, stride) if s != 1):
        if jump != step:
            return False
        step *= size
    return True


def reach(shape: Sequence[int], stride: Sequence[int]) -> int:
    """Elements from the first one to the last one that the view touches, both included; 0 for an empty view."""
    last = 0
    for size, jump in zip(shape, stride):
        if size == 0:
            return 0
        last += (size - 1) * jump
    return last + 1


def sliced(
    shape: tuple[int, ...], stride: tuple[int, ...], index: object
) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
    """What ``view[index]`` is: the offset to add, and the new shape and strides.

    Takes integers, slices with a positive step, and one ``...``. Raises ``IndexError`` or ``TypeError`` as a list does.
    """
    parts = index if isinstance(index, tuple) else (index,)
    holes = sum(part is Ellipsis for part in parts)
    if holes > 1 or len(parts) - holes > len(shape):
        raise IndexError(f"too many indices for a tensor of {len(shape)} dimensions")
    at = next((i for i, part in enumerate(parts) if part is Ellipsis), len(parts))
    fill = (slice(None),) * (len(shape) - len(parts) + holes)
    parts = parts[:at] + fill + parts[at + 1 :]
    offset, sizes, strides = 0, [], []
    for dim, (part, size, jump) in enumerate(zip(parts, shape, stride)):
        if isinstance(part, slice):
            first, stop, step = part.indices(size)
            if step < 1:
                raise IndexError("a slice of a tensor needs a positive step")
            count = len(range(first, stop, step))
            offset += first * jump if count else 0
            sizes.append(count)
            strides.append(jump * step)
        elif hasattr(part, "__index__") and not isinstance(part, bool):
            i = part.__index__()
            if not -size <= i < size:
                raise IndexError(f"index {i} is out of range for dimension {dim} of size {size}")
            offset += (i % size) * jump
        else:
            raise TypeError(f"a tensor is indexed by integers and slices, not by {type(part).__name__}")
    return offset, tuple(sizes), tuple(strides)


class Box(NamedTuple):
    """A part of a view, small enough to read at once: which elements, and the range that holds them."""

    where: tuple[slice, ...]  # where it lies in the view
    offset: int  # of its first element, from the view's own first element
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    reach: int  # elements of the storage to read for it


def boxes(shape: tuple[int, ...], stride: tuple[int, ...], most: int) -> Iterator[Box]:
    """The view cut into boxes that each reach over at most ``most`` elements of the storage, in file order.

    The dimension with the longest stride is cut first, so the ranges of a view without overlaps follow one another in
    the storage and no element of it is read twice. A box whose single step is already too long is cut further in.
    """
    if prod(shape) == 0:
        return
    whole = tuple(slice(0, size) for size in shape)
    pending = [Box(whole, 0, shape, stride, reach(shape, stride))]
    while pending:
        box = pending.pop()
        cuttable = [dim for dim in range(len(shape)) if box.shape[dim] > 1 and box.stride[dim] > 0]
        if box.reach <= most or not cuttable:
            yield box
            continue
        dim = max(cuttable, key=lambda d: box.stride[d])
        pending.extend(reversed(_cut(box, dim, most)))


def _cut(box: Box, dim: int, most: int) -> list[Box]:
    """The box cut along one dimension, as few pieces as fit; at most 1024 at a time, so that the list stays short."""
    size, jump = box.shape[dim], box.stride[dim]
    rest = box.reach - (size - 1) * jump
    count = max(1, (most - rest) // jump + 1, -(-size // 1024))
    pieces = []
    for first in range(0, size, count):
        n = min(count, size - first)
        shape = (*box.shape[:dim], n, *box.shape[dim + 1 :])
        start = box.where[dim].start + first
        where = (*box.where[:dim], slice(start, start + n), *box.where[dim + 1 :])
        pieces.append(Box(where, box.offset + first * jump, shape, box.stride, reach(shape, box.stride)))
    return pieces
