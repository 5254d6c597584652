"""What tensors hold, in a few bytes: a digest of the whole, and one of each row. Streamed, in bounded memory."""

from __future__ import annotations

from array import array
from typing import NamedTuple

from statedict.lazy_tensor import LazyTensor
from statedict.ops.comparing.walks import Side

__all__ = ["Content", "content_of", "is_repeated", "row_digests"]

# Bytes of repeated elements that are compared at once.
_PIECE_NBYTES = 64 * 1024


# Bytes from which on a tensor of different elements is taken to be like no other: fewer are too often the same by chance.
_TELLING_NBYTES = 8


class Content(NamedTuple):
    """The digest of a tensor's packed bytes, and whether it says nothing: all its elements are one, or it is tiny."""

    digest: bytes
    is_constant: bool


def content_of(side: Side) -> Content:
    """Reads the tensor once. Raises what reading raises."""
    from xxhash import xxh3_128

    state = xxh3_128()
    size = side.entry.dtype.itemsize
    first: bytes | None = None
    is_constant = True
    is_tiny = side.entry.nbytes < _TELLING_NBYTES
    for block in LazyTensor(side.entry, side.checkpoint).blocks():
        state.update(block)
        if first is None:
            first = bytes(block[:size])
        is_constant = is_constant and is_repeated(block, first)
    return Content(state.digest(), is_constant or is_tiny)


def is_repeated(block: memoryview, element: bytes) -> bool:
    """Whether the block is that element again and again. Stops at the first piece where it isn't."""
    pattern = element * max(1, _PIECE_NBYTES // len(element))
    for start in range(0, len(block), len(pattern)):
        piece = bytes(block[start : start + len(pattern)])
        if piece != pattern[: len(piece)]:
            return False
    return True


def row_digests(side: Side, rows: int) -> array[int]:
    """A number of 64 bits for each of so many equal parts of the packed bytes, in order. Raises what reading raises."""
    from xxhash import xxh3_64, xxh3_64_intdigest

    wanted = side.entry.nbytes // rows
    out = array("Q")
    state, missing = xxh3_64(), wanted
    for block in LazyTensor(side.entry, side.checkpoint).blocks():
        at = 0
        while at < len(block):
            count = min(missing, len(block) - at)
            if count == wanted:
                out.append(xxh3_64_intdigest(block[at : at + count]))
            else:
                state.update(block[at : at + count])
                missing -= count
                if not missing:
                    out.append(state.intdigest())
                    state, missing = xxh3_64(), wanted
            at += count
    return out
