"""Which parts a tensor holds, as far as its name lists them."""

from __future__ import annotations

import functools
from typing import NamedTuple

from statedict.aligning.naming import component_words
from statedict.knowledge import vocabulary

__all__ = ["Parts", "parts_of"]


class Parts(NamedTuple):
    """The roles of the parts; ``is_ordered`` where the name lists them in their order."""

    roles: tuple[str, ...]
    is_ordered: bool


@functools.lru_cache(maxsize=65536)
def parts_of(component: str) -> Parts | None:
    """The parts that a component of a name lists, such as ``qkv_proj`` or ``gate_up``; None where it lists none."""
    known = vocabulary()
    raw = component.lower().removesuffix("_weight").removesuffix("_bias")
    joined = "_".join(word for word in component_words(component) if not word.isdigit())
    for name in (raw, joined):
        if name in known.fused_unordered:
            return Parts(known.fused_unordered[name], False)
        if name in known.fused:
            return Parts(known.fused[name], True)
    return None
