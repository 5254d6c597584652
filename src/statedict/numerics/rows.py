"""Rows of tensors as numbers of 64 bits: equal rows have equal numbers, and others, but for chance, have not.

A tensor of shape [d0, d1, …] is cut into rows in several ways at once, in one pass over its bytes: a *cut* names the dimensions
that count the rows; the others, in their order, are what a row holds. The number of a row is the sum of its elements, each times an odd
number of its own, modulo 2^64. Those are drawn anew in each process, so no file can be made for two rows to collide.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Sequence
from functools import lru_cache
from math import prod

import numpy as np

from statedict.numerics.arrays import Array

__all__ = ["Cut", "Place", "RowIndex", "Rows", "cut_into_rows", "cuts_of"]

# The dimensions that count rows; of a vector none: it is one row.
Cut = tuple[int, ...]

# A part, and a row in it.
Place = tuple[int, int]

# Rows of a tensor that may be blank or like others, before it is given up; and likes of one that are looked at.
_MOST_UNKNOWN = 200_000
_MOST_CANDIDATES = 64
# Elements that a row can have: as many multipliers are kept, 8 bytes each.
_MOST_ELEMENTS = 4 * 1024 * 1024
_SEED = int.from_bytes(os.urandom(8), "little")


class Rows:
    """The numbers of the rows of one tensor in one cut, in order. ``blank`` are rows whose elements are all equal: they prove nothing."""

    __slots__ = ("blank", "numbers")

    def __init__(self, numbers: Array, blank: Array) -> None:
        self.numbers = numbers
        self.blank = blank

    def __len__(self) -> int:
        return len(self.numbers)


def cuts_of(shape: Sequence[int]) -> dict[Cut, int]:
    """The ways in which a tensor without dimensions of size 1 is cut, and the elements of a row of each."""
    numel = prod(shape)
    if len(shape) == 1:
        cuts: list[Cut] = [()]
    else:
        cuts = [(0,), (1,)]
    if len(shape) == 3:
        cuts += [(2,), (0, 1), (0, 2)]
    elif len(shape) == 5:
        cuts.append((0, 1))
    sizes = {cut: numel // prod([shape[dim] for dim in cut]) for cut in cuts}
    return {cut: size for cut, size in sizes.items() if 0 < size <= _MOST_ELEMENTS}


def cut_into_rows(blocks: Iterable[memoryview], size: int, shape: Sequence[int]) -> dict[Cut, Rows]:
    """The rows of a tensor in all of its cuts. ``blocks`` are its packed bytes, each a whole number of indices of the first dimension.

    ``size`` is the bytes of an element, ``shape`` has no dimension of size 1, and at least one.
    """
    wanted = cuts_of(shape)
    split = max(1, size // 8)  # an element of more bytes is several words
    words = np.dtype(f"u{min(size, 8)}")
    box = shape if len(shape) < 4 else (shape[0], shape[1], prod(shape[2:]))
    sums: dict[Cut, list[Array]] = {cut: [] for cut in wanted}
    firsts: dict[Cut, list[Array]] = {cut: [] for cut in wanted}
    at = 0
    for block in blocks:
        flat = np.frombuffer(block, words).astype(np.uint64)
        flat = _joined(flat, split)
        part = flat.reshape(-1, *box[1:])
        for cut in wanted:
            number, first = _cut(part, at, box, cut)
            is_whole = 0 in cut
            if is_whole or not sums[cut]:
                sums[cut].append(number)
                firsts[cut].append(first)
            else:
                sums[cut][0] += number
        at += len(part)
    return {cut: _rows(np.concatenate(sums[cut]), np.concatenate(firsts[cut]), wanted[cut]) for cut in wanted}


def _joined(words: Array, split: int) -> Array:
    """One number for each element that is several words."""
    return words if split == 1 else _dot(words.reshape(-1, split), _multipliers(split + 7)[7:])


def _rows(numbers: Array, firsts: Array, elements: int) -> Rows:
    """A row of one element again and again has that element times the sum of all multipliers."""
    total = _multipliers(elements).sum(dtype=np.uint64)
    return Rows(numbers, numbers == firsts * total)


def _cut(part: Array, at: int, box: Sequence[int], cut: Cut) -> tuple[Array, Array]:
    """The numbers of the rows in a block that begins at index ``at`` of the first dimension, or what it adds to them; first elements."""
    count = len(part)
    if cut == ():
        return _dot(part.reshape(1, -1), _multipliers(box[0])[at : at + count]), part[:1]
    if cut == (0,):
        rows = part.reshape(count, -1)
        return _dot(rows, _multipliers(rows.shape[1])), rows[:, 0]
    if part.ndim == 2:
        return np.einsum("rc,r->c", part, _multipliers(box[0])[at : at + count]), part[0]
    _, middle, inner = box
    if cut == (1,):
        factors = _multipliers(box[0] * inner)[at * inner : (at + count) * inner].reshape(count, inner)
        return np.einsum("rbc,rc->b", part, factors), part[0, :, 0]
    if cut == (2,):
        factors = _multipliers(box[0] * middle)[at * middle : (at + count) * middle].reshape(count, middle)
        return np.einsum("rbc,rb->c", part, factors), part[0, 0]
    if cut == (0, 1):
        rows = part.reshape(-1, inner)
        return _dot(rows, _multipliers(inner)), rows[:, 0]
    return np.einsum("rbc,b->rc", part, _multipliers(middle)).reshape(-1), part[:, 0].reshape(-1)


def _dot(rows: Array, factors: Array) -> Array:
    made: Array = np.einsum("rc,c->r", rows, factors)
    return made


def _multipliers(count: int) -> Array:
    """The first so many multipliers."""
    return _drawn(1 << max(12, (count - 1).bit_length()))[:count]


@lru_cache(maxsize=2)
def _drawn(count: int) -> Array:
    """SplitMix64 of a counter, made odd: the same number for the same place, however many are drawn."""
    made = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(_SEED)
    made = (made ^ (made >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    made = (made ^ (made >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (made ^ (made >> np.uint64(31))) | np.uint64(1)


class RowIndex:
    """The rows of several tensors, to be found by their numbers."""

    def __init__(self, parts: Sequence[Rows]) -> None:
        numbers = np.concatenate([part.numbers for part in parts])
        self._order = np.argsort(numbers, kind="stable")
        self._sorted = numbers[self._order]
        self._numbers = numbers
        self._sizes = [len(part) for part in parts]
        self._owner = np.repeat(np.arange(len(parts)), self._sizes)
        self._starts = np.cumsum([0, *self._sizes[:-1]])

    def has_all(self, rows: Rows) -> bool:
        """Whether each of these rows is there."""
        at = np.minimum(np.searchsorted(self._sorted, rows.numbers), len(self._sorted) - 1)
        return bool((self._sorted[at] == rows.numbers).all())

    def places(self, rows: Rows) -> list[Place | None]:
        """The part and the row in it that each row is; None where it is blank, or could be several."""
        left, right = self._range(rows)
        single = (right - left == 1) & ~rows.blank
        found = self._order[np.minimum(left, len(self._order) - 1)]
        owner = self._owner[found]
        row = found - self._starts[owner]
        return [
            (int(one), int(two)) if sure else None
            for one, two, sure in zip(owner.tolist(), row.tolist(), single.tolist())
        ]

    def _range(self, rows: Rows) -> tuple[Array, Array]:
        """Where in the sorted numbers each row's is, and where the next greater one is."""
        return (
            np.searchsorted(self._sorted, rows.numbers, "left"),
            np.searchsorted(self._sorted, rows.numbers, "right"),
        )

    def settled(self, rows: Rows, places: list[Place | None], owners: Collection[int]) -> list[Place] | None:
        """The same with the rows that could be several: each is the one that goes on as its neighbours do. None where none does.

        ``owners`` are the parts that may be meant; a place in another one isn't taken.
        """
        made: list[Place | None] = [place if place is not None and place[0] in owners else None for place in places]
        unknown = [at for at, place in enumerate(made) if place is None]
        if not unknown:
            return [place for place in made if place is not None]
        if len(unknown) > _MOST_UNKNOWN:
            return None
        for at in unknown:
            made[at] = self._going_on(rows, made, at, -1)
        for at in reversed(unknown):
            if made[at] is None:
                made[at] = self._going_on(rows, made, at, 1)
        left, right = self._range(rows)
        for at in unknown:
            if made[at] is None:
                made[at] = self._beginning(range(int(left[at]), int(right[at])), made, owners)
                for after in range(at + 1, len(made)):
                    if made[after] is not None:
                        break
                    made[after] = self._going_on(rows, made, after, -1)
        known = [place for place in made if place is not None]
        return known if len(known) == len(made) else None

    def _going_on(self, rows: Rows, made: Sequence[Place | None], at: int, side: int) -> Place | None:
        """The place that follows from that of the row before (-1) or behind (1), if the row there is equal."""
        near = made[at + side] if 0 <= at + side < len(made) else None
        if near is None:
            return None
        part, row = near
        far = made[at + 2 * side] if 0 <= at + 2 * side < len(made) else None
        steps = [-side] + ([row - far[1]] if far is not None and far[0] == part else [])
        for step in steps:
            there = row + step
            if 0 <= there < self._sizes[part] and self._numbers[self._starts[part] + there] == rows.numbers[at]:
                return part, int(there)
        return None

    def _beginning(self, candidates: range, made: Sequence[Place | None], owners: Collection[int]) -> Place | None:
        """The first row of a part that no row was found in yet."""
        used = {place[0] for place in made if place is not None}
        for candidate in candidates[:_MOST_CANDIDATES]:
            found = int(self._order[candidate])
            owner = int(self._owner[found])
            if owner in owners and owner not in used and found == self._starts[owner]:
                return owner, 0
        return None
