"""``reorder``: the indices of a dimension in another order, as where rotary embeddings pair other rows of a projection."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import ClassVar

from statedict.errors import RuleError
from statedict.manifest import TensorEntry
from statedict.rules.drafts import Draft, identity_of
from statedict.rules.each import Changed, Each, dim_of, seen, strides_of
from statedict.rules.rule import Rule
from statedict.views import is_packed, packed_stride

__all__ = ["Reorder"]


class Reorder(Each):
    """A dimension seen as several (``view``), which change places (``order``) and are one dimension again."""

    __slots__ = ()
    name = "reorder"
    fields = ("glob", "view", "order", "dim")
    defaults: ClassVar[Mapping[str, object]] = {"dim": 0}

    def changed(self, entry: TensorEntry, draft: Draft) -> TensorEntry:
        """The tensor with its indices in the other order; they are put into that order as they are read."""
        _, _, order, dim = self.arguments
        dim = dim_of(dim, len(entry.shape))
        view, stride = self._view(entry.shape[dim]), strides_of(entry)
        inner = [stride[dim] * prod(view[at + 1 :]) for at in range(len(view))]
        shape = (*entry.shape[:dim], *[view[at] for at in order], *entry.shape[dim + 1 :])
        turned = seen(entry, shape, (*stride[:dim], *[inner[at] for at in order], *stride[dim + 1 :]))
        if not is_packed(shape, turned.view.stride if turned.view is not None else ()):
            from statedict.recipes.joining import Concat

            key = ("reordered", identity_of(turned))
            turned = draft.computed_once(key, turned, lambda: Concat([draft.lazy(turned)], 0))
        return seen(turned, entry.shape, packed_stride(entry.shape))

    def _view(self, size: int) -> tuple[int, ...]:
        """The sizes that the dimension is seen as, with their -1 worked out."""
        view: tuple[int, ...] = self.arguments[1]
        known = prod([each for each in view if each >= 0])
        if -1 in view and known and size % known == 0:
            view = tuple([size // known if each < 0 else each for each in view])
        if prod(view) != size or any(each < 0 for each in view):
            raise RuleError("the dimension can't be seen so", expected=f"{list(self.arguments[1])}", found=f"{size}")
        return view

    def inverse(self) -> Rule:
        """The order that puts each index back."""
        glob, view, order, dim = self.arguments
        back = tuple([order.index(at) for at in range(len(order))])
        return Reorder(glob, tuple([view[at] for at in order]), back, dim)

    def undone(self, changed: Sequence[Changed]) -> tuple[Rule, ...]:
        """The same."""
        return (self.inverse(),)
