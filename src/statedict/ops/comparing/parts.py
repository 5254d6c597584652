"""The parts of a network that some of its keys fill: whole subtrees under one name, layers folded."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import NamedTuple

from statedict.tree import fold

__all__ = ["Part", "parts_of", "tops"]

# Components of a key that are looked at. Real keys have fewer than 20.
_MOST_LEVELS = 64


class Part(NamedTuple):
    """A subtree as people write it (``layers.{0…11}.attn.*``), or a single key; and the keys in it."""

    name: str
    keys: tuple[str, ...]


def parts_of(chosen: Collection[str], keys: Iterable[str]) -> list[Part]:
    """The chosen ones of the keys as the largest subtrees that hold nothing else, in the order of the keys."""
    wanted = set(chosen)
    counts: dict[str, list[int]] = {}  # of each subtree: keys, and chosen ones
    for key in keys:
        for start in _starts(key):
            count = counts.setdefault(start, [0, 0])
            count[0] += 1
            count[1] += key in wanted
    found: dict[str, list[str]] = {}
    for key in chosen:
        full = next((start for start in _starts(key) if counts[start][0] == counts[start][1] > 1), None)
        found.setdefault(f"{full}.*" if full is not None else key, []).append(key)
    inside = list(found.values())
    return [
        Part(group.key, tuple([key for at in group.members for key in inside[at]]))
        for group in fold((name, len(members)) for name, members in found.items())
    ]


def _starts(key: str) -> list[str]:
    """The subtrees that a key is in, the largest first."""
    parts = key.split(".", _MOST_LEVELS)[:-1]
    return [".".join(parts[: size + 1]) for size in range(len(parts))]


def tops(keys: Iterable[str]) -> dict[str, list[str]]:
    """The keys by the first component in which they differ: the parts that a person would name."""
    found = list(keys)
    parts = [key.split(".", _MOST_LEVELS) for key in found]
    level = 0
    while parts and all(len(each) > level + 1 for each in parts) and len({each[level] for each in parts}) == 1:
        level += 1
    made: dict[str, list[str]] = {}
    for key, each in zip(found, parts):
        name = ".".join(each[: level + 1]) + (".*" if len(each) > level + 1 else "")
        made.setdefault(name, []).append(key)
    return made
