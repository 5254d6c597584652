"""The changes of shape under which a tensor is still the same: none, exchanged dimensions, dimensions of size 1."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from statedict.aligning.families import Family, Signature, signature_of

__all__ = ["SAME", "SQUEEZED", "TRANSPOSED", "View", "between", "seen"]


class View(NamedTuple):
    """An operation that changes shapes only, and what it is called."""

    op: str
    args: Mapping[str, object]
    reason: str


SAME = View("copy", {}, "")
TRANSPOSED = View("transpose", {"dims": [1, 0]}, "its two dimensions are exchanged, in all layers")
SQUEEZED = View("squeeze", {}, "the shapes differ in dimensions of size 1 only")


def seen(view: View, family: Family) -> Signature | None:
    """What is equal for families that may be each other as they are or under a view; None where the view says nothing about one.

    Matrices are seen as they are and transposed at once, so that both ways compete.
    """
    shapes = family.shapes
    if view is SQUEEZED:
        shapes = tuple(tuple(size for size in shape if size != 1) for shape in shapes)
        if not all(shapes):
            return None
    elif (
        family.leaf != "bias"
        and len(shapes[0]) == 2
        and all(len(shape) == 2 for shape in shapes)
        and shapes[0][0] > shapes[0][1]
    ):
        shapes = tuple(shape[::-1] for shape in shapes)
    return (
        family.signature
        if shapes is family.shapes
        else signature_of(family.lengths, family.kind, family.places, shapes)
    )


def between(old: Family, new: Family) -> View | None:
    """The view under which two families are the same; None where there is none."""
    if not old.aligns(new):
        return None
    if old.shapes == new.shapes:
        return SAME
    if all(len(one) == 2 and one == two[::-1] for one, two in zip(old.shapes, new.shapes)):
        return TRANSPOSED
    bare = [[tuple(size for size in shape if size != 1) for shape in family.shapes] for family in (old, new)]
    return SQUEEZED if bare[0] == bare[1] else None
