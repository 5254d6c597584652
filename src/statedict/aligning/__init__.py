"""The alignment of two state dicts by names, shapes and order."""

from __future__ import annotations

from statedict.aligning.alignment import Alignment, Left, Mapped, Side
from statedict.aligning.engine import align

__all__ = ["Alignment", "Left", "Mapped", "Side", "align"]
