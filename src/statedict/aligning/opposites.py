"""Words that exclude each other: what is of the encoder isn't of the decoder."""

from __future__ import annotations

from collections.abc import Iterable

from statedict.knowledge import vocabulary

__all__ = ["opposed"]


def opposed(one: Iterable[str], two: Iterable[str]) -> bool:
    """Whether one name has a word, and the other has another word of the same choice instead."""
    first, second = set(one), set(two)
    for choice in vocabulary().choices:
        mine, theirs = first & choice, second & choice
        if mine and theirs and not mine & theirs:
            return True
    return False
