"""What kind of tensor a name speaks of, where that matters whatever the network."""

from __future__ import annotations

import functools

from statedict.aligning.alignment import Side
from statedict.aligning.naming import meaning, spot
from statedict.knowledge import vocabulary

# One name out of order among so many may be there because a prefix was changed after the sorting.
_SORTED = 20

__all__ = ["is_foreign", "is_recomputable", "is_resizable", "tells_order"]


def is_foreign(key: str) -> bool:
    """Whether the key is of an optimizer or scheduler that was saved beside the weights."""
    return not vocabulary().foreign.isdisjoint(key.split(".")[:2])


def is_recomputable(key: str) -> bool:
    """Whether a model makes such a tensor again by itself."""
    return not vocabulary().recomputable.isdisjoint(key.split(".")[-2:])


@functools.lru_cache(maxsize=65536)
def is_resizable(key: str) -> bool:
    """Whether such a tensor may have other rows in another use of the same network: a head, a vocabulary, positions."""
    said = meaning(spot(key).module)
    return said.role == "head" or not vocabulary().resizable.isdisjoint(said.words)


def tells_order(side: Side) -> bool:
    """Whether the order of the keys is that of a model's registration. Names in the order of the alphabet, type by type, say nothing."""
    if not side.is_ordered:
        return False
    last: dict[str, str] = {}
    falls = 0
    for key, spec in side.tensors.items():
        falls += key < last.get(spec.dtype, "")
        last[spec.dtype] = key
    return _SORTED * falls > len(side.tensors)
