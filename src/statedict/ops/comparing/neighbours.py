"""What other names of a network say about one: where its neighbours went, and the template that its layers share.

Tensors with equal content could each be any of their likes. Which is which is decided by names whose renaming is proven: where
``layers.0.attn.weight`` became ``blocks.0.mixer.weight``, ``layers.0.attn`` became ``blocks.0.mixer``, and ``layers.0``, ``blocks.0``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from statedict.keys import natural, template

__all__ = ["Neighbours", "paired_by_template"]

# Components of a key that are looked at; the rest stays in one name. Real keys have fewer than 20.
_MOST_PARTS = 64

_Parts = tuple[str, ...]


class Neighbours:
    """The places that modules have moved to, as far as names with proof show them."""

    def __init__(self) -> None:
        self._places: dict[_Parts, set[_Parts]] = {}

    def add(self, old: str, new: str) -> None:
        """Take in a name that is proven: its module's place, and those of the modules above."""
        here, there = _parts(old), _parts(new)
        is_same = True  # the names below, so far
        while here and there:
            is_same = is_same and here[-1] == there[-1]
            here, there = here[:-1], there[:-1]
            # Where names below differ, a module may have come to stand higher: the top is no place then.
            if there or is_same:
                self._note(here, there)

    def _note(self, here: _Parts, there: _Parts) -> None:
        self._places.setdefault(here, set()).add(there)

    def named(self, keys: Sequence[str], candidates: Sequence[str]) -> list[tuple[str, str]]:
        """The pairs of keys that have the same name in a module whose place is known."""
        names = {_parts(name): name for name in candidates}
        found = []
        for key in keys:
            parts = _parts(key)
            place, size = self._nearest(parts)
            chosen = names.get((*place, *parts[size:])) if place is not None else None
            if chosen is not None:
                found.append((key, chosen))
        return _distinct(found)

    def left_over(self, keys: Sequence[str], candidates: Sequence[str]) -> list[tuple[str, str]]:
        """The pairs of keys that are the only ones, or the only ones with that last name, in the nearest known module and its place."""
        found = []
        inside, others = _by_module(keys), _by_module(candidates)
        for key in keys:
            parts = _parts(key)
            place, size = self._nearest(parts)
            if place is None or not size:
                continue  # all there is would do for a key without a module: that says nothing
            here, there = inside[parts[:size]], others.get(place, [])
            if len(there) > 1 or len(here) > 1:
                here = [each for each in here if _last(each) == parts[-1]]
                there = [name for name in there if _last(name) == parts[-1]]
            if len(here) == len(there) == 1:
                found.append((key, there[0]))
        return _distinct(found)

    def _nearest(self, key: _Parts) -> tuple[_Parts | None, int]:
        """The place of the nearest module around a key that has moved to one place, and how many components that module has."""
        for size in range(len(key) - 1, -1, -1):
            places = self._places.get(key[:size], set())
            if len(places) == 1:
                return next(iter(places)), size
        return None, 0


def _distinct(pairs: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """The pairs without those that share a key."""
    taken = Counter([new for _, new in pairs])
    return [(old, new) for old, new in pairs if taken[new] == 1]


def _by_module(keys: Iterable[str]) -> dict[_Parts, list[str]]:
    """The keys below each module, the top among them."""
    found: dict[_Parts, list[str]] = {}
    for key in keys:
        parts = _parts(key)
        for size in range(len(parts)):
            found.setdefault(parts[:size], []).append(key)
    return found


def _last(key: str) -> str:
    return key.rpartition(".")[2]


def _parts(key: str) -> _Parts:
    return tuple(key.split(".", _MOST_PARTS))


def paired_by_template(old: Sequence[str], new: Sequence[str]) -> list[tuple[str, str]]:
    """As many names on both sides that differ in numbers alone, paired by their numbers; none where those don't agree.

    The numbers may all be shifted by the same: ``layers.{0…5}`` can be ``blocks.{1…6}``.
    """
    if len(old) != len(new) or len(old) < 2:
        return []
    here, there = sorted(old, key=natural), sorted(new, key=natural)
    forms, others = [template(key) for key in here], [template(key) for key in there]
    if len({form for form, _ in forms}) > 1 or len({form for form, _ in others}) > 1:
        return []
    shifts = {tuple([y - x for x, y in zip(a, b)]) for (_, a), (_, b) in zip(forms, others)}
    if len(shifts) > 1 or not forms[0][1] or len(forms[0][1]) != len(others[0][1]):
        return []
    return list(zip(here, there))
