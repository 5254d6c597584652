"""Rules that change tensors one by one: seen otherwise (transposed, cut, given other dimensions), padded, or cast.

What only sees the same elements otherwise is another view of the same storage: nothing is computed, and tied tensors that all
are changed stay tied.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import ClassVar, NamedTuple

from statedict.dtypes import DType
from statedict.errors import RuleError, one_line
from statedict.keys import dotted
from statedict.manifest import Node, TensorEntry
from statedict.rules.drafts import CastOf, Draft, identity_of, untied_by
from statedict.rules.patterns import Pattern
from statedict.rules.regrowing import Moved, Tree, grown
from statedict.rules.rule import NoMatch, Rule, Step, matches_nothing
from statedict.views import is_packed, packed_stride

__all__ = [
    "Cast",
    "Changed",
    "Each",
    "Pad",
    "Permute",
    "Reshape",
    "Slice",
    "Squeeze",
    "Transpose",
    "Unsqueeze",
    "dim_of",
    "seen",
    "strides_of",
]


class Changed(NamedTuple):
    """One tensor before and after."""

    key: str
    old: TensorEntry
    new: TensorEntry


class Each(Rule):
    """A rule whose first argument says which tensors, by a glob or a template; each is changed by itself."""

    __slots__ = ()

    def changed(self, entry: TensorEntry, draft: Draft) -> TensorEntry | None:
        """The tensor as the rule has it; None if it is left alone. Raises ``RuleError``."""
        raise NotImplementedError

    def undone(self, changed: Sequence[Changed]) -> tuple[Rule, ...] | None:
        """What takes it back."""
        back = self.inverse()
        return None if back is None else (back,)

    def left_alone(self, entries: Sequence[TensorEntry]) -> str:
        """Why these were left alone, in a sentence."""
        raise NotImplementedError

    def applied(self, draft: Draft) -> Step:
        """The tree with the tensors that the pattern matches changed; objects are never concerned."""
        tree = Tree(draft.root)
        pattern = Pattern(self.arguments[0])
        changed: list[Changed] = []
        alone: list[TensorEntry] = []
        leaves: list[Moved] = []
        for path, leaf in tree.leaves:
            node: Node = leaf
            if isinstance(leaf, TensorEntry) and pattern.match(key := dotted(path)) is not None:
                made = self._made(leaf, draft)
                if made is None:
                    alone.append(leaf)
                else:
                    changed.append(Changed(key, leaf, made))
                    node = made
            leaves.append(Moved(path, path, node))
        if not changed and not alone:
            names = [dotted(path) for path, leaf in tree.leaves if isinstance(leaf, TensorEntry)]
            raise matches_nothing(self, pattern.text, names)
        if not changed:
            raise NoMatch(f"{one_line(self)} changes nothing: {self.left_alone(alone)}")
        paths = frozenset([leaf.new for leaf, (_, old) in zip(leaves, tree.leaves) if leaf.node is not old])
        kept = [leaf.node for leaf, (_, old) in zip(leaves, tree.leaves) if leaf.node is old]
        broken = untied_by([each.old for each in changed], [leaf for leaf in kept if isinstance(leaf, TensorEntry)])
        notes = ((self.left_alone(alone),) if alone else ()) + broken
        return Step(grown(tree, leaves), len(changed), paths, notes=notes, inverse=self.undone(changed))

    def _made(self, entry: TensorEntry, draft: Draft) -> TensorEntry | None:
        try:
            return self.changed(entry, draft)
        except RuleError as error:
            raise RuleError(
                f"{one_line(self)}: {error.what}", key=entry.key, expected=error.expected, found=error.found
            ) from error

    def per_tensor(self, changed: Sequence[Changed], make: Callable[[str, Changed], Rule]) -> tuple[Rule, ...]:
        """One rule for all tensors if the same one is right for each of them, else one a tensor."""
        rules = {make(self.arguments[0], each) for each in changed}
        return tuple(rules) if len(rules) == 1 else tuple([make(each.key, each) for each in changed])


def seen(entry: TensorEntry, shape: Sequence[int], stride: Sequence[int], offset: int = 0) -> TensorEntry:
    """The same storage under another shape and other strides, from ``offset`` elements further on."""
    if entry.view is None or entry.dtype.bits % 8:
        what = "numbers smaller than a byte" if entry.view is not None else f"a {entry.layout} tensor"
        raise RuleError("this can only be done to strided tensors of whole bytes", found=what)
    view = entry.view._replace(stride=tuple(stride), offset=entry.view.offset + offset)
    return entry._replace(shape=tuple(shape), view=view, digest=None, memory_stride=None)


def strides_of(entry: TensorEntry) -> tuple[int, ...]:
    """The strides of its view; raises ``RuleError`` for a tensor without one."""
    if entry.view is None:
        raise RuleError("this can only be done to strided tensors", found=f"a {entry.layout} tensor")
    return entry.view.stride


def dim_of(dim: int, ndim: int) -> int:
    """The dimension counted from the front. Raises ``RuleError`` if there is none such."""
    if not -ndim <= dim < ndim:
        raise RuleError(f"there is no dimension {dim}", found=f"{ndim} dimensions")
    return dim % ndim


class Transpose(Each):
    """Two dimensions change places."""

    __slots__ = ()
    name = "transpose"
    fields = ("glob", "dim0", "dim1")
    defaults: ClassVar[Mapping[str, object]] = {"dim0": -2, "dim1": -1}

    def changed(self, entry: TensorEntry, draft: Draft) -> TensorEntry:
        """The view with two strides exchanged."""
        order = list(range(len(entry.shape)))
        one, two = (dim_of(dim, len(order)) for dim in self.arguments[1:])
        order[one], order[two] = order[two], order[one]
        return _permuted(entry, order)

    def inverse(self) -> Rule:
        """Itself."""
        return Transpose(*self.arguments)


class Permute(Each):
    """The dimensions in another order."""

    __slots__ = ()
    name = "permute"
    fields = ("glob", "dims")

    def changed(self, entry: TensorEntry, draft: Draft) -> TensorEntry:
        """The view with its strides in that order."""
        dims: tuple[int, ...] = self.arguments[1]
        if len(dims) != len(entry.shape):
            raise RuleError("not as many dimensions", expected=f"{len(dims)}", found=f"{len(entry.shape)}")
        return _permuted(entry, [dim_of(dim, len(dims)) for dim in dims])

    def inverse(self) -> Rule:
        """The order that puts each dimension back."""
        dims = [dim % len(self.arguments[1]) for dim in self.arguments[1]]
        return Permute(self.arguments[0], tuple([dims.index(at) for at in range(len(dims))]))


def _permuted(entry: TensorEntry, order: Sequence[int]) -> TensorEntry:
    stride = strides_of(entry)
    return seen(entry, [entry.shape[dim] for dim in order], [stride[dim] for dim in order])


class Reshape(Each):
    """The same elements in reading order under another shape."""

    __slots__ = ()
    name = "reshape"
    fields = ("glob", "shape")

    def changed(self, entry: TensorEntry, draft: Draft) -> TensorEntry:
        """Another view where the elements lie packed; else they are packed as they are read."""
        shape = _full(self.arguments[1], prod(entry.shape), entry.shape)
        if entry.view is not None and not is_packed(entry.shape, entry.view.stride):
            from statedict.recipes.joining import Concat

            key = ("packed", identity_of(entry))
            entry = draft.computed_once(key, entry, lambda: Concat([draft.lazy(entry)], 0))
        made = seen(entry, shape, packed_stride(shape))
        return made._replace(digest=entry.digest)

    def undone(self, changed: Sequence[Changed]) -> tuple[Rule, ...]:
        """The shapes that they had."""
        return self.per_tensor(changed, lambda glob, each: Reshape(glob, each.old.shape))


def _full(shape: tuple[int, ...], numel: int, old: tuple[int, ...]) -> tuple[int, ...]:
    """The shape with its -1 worked out."""
    known = prod([size for size in shape if size >= 0])
    if -1 in shape and known and numel % known == 0:
        shape = tuple([numel // known if size < 0 else size for size in shape])
    if prod(shape) != numel or any(size < 0 for size in shape):
        raise RuleError("not as many elements", expected=f"{list(shape)}", found=f"{list(old)}")
    return shape


class Squeeze(Each):
    """A dimension of size 1 is taken out."""

    __slots__ = ()
    name = "squeeze"
    fields = ("glob", "dim")

    def changed(self, entry: TensorEntry, draft: Draft) -> TensorEntry:
        """The view without that dimension."""
        dim = dim_of(self.arguments[1], len(entry.shape))
        if entry.shape[dim] != 1:
            raise RuleError(f"dimension {self.arguments[1]} isn't of size 1", found=f"{list(entry.shape)}")
        stride = strides_of(entry)
        made = seen(entry, entry.shape[:dim] + entry.shape[dim + 1 :], stride[:dim] + stride[dim + 1 :])
        return made._replace(digest=entry.digest)

    def inverse(self) -> Rule:
        """``unsqueeze``."""
        return Unsqueeze(*self.arguments)


class Unsqueeze(Each):
    """A dimension of size 1 is put in."""

    __slots__ = ()
    name = "unsqueeze"
    fields = ("glob", "dim")

    def changed(self, entry: TensorEntry, draft: Draft) -> TensorEntry:
        """The view with one more dimension."""
        dim = dim_of(self.arguments[1], len(entry.shape) + 1)
        stride = strides_of(entry)
        shape = (*entry.shape[:dim], 1, *entry.shape[dim:])
        made = seen(entry, shape, (*stride[:dim], prod(entry.shape[dim:]), *stride[dim:]))
        return made._replace(digest=entry.digest)

    def inverse(self) -> Rule:
        """``squeeze``."""
        return Squeeze(*self.arguments)


class Slice(Each):
    """Only some of the indices of a dimension."""

    __slots__ = ()
    name = "slice"
    fields = ("glob", "dim", "start", "stop")
    lossless = False

    def changed(self, entry: TensorEntry, draft: Draft) -> TensorEntry:
        """The view of that part; ``stop`` None is the end, negative numbers count from there."""
        _, dim, start, stop = self.arguments
        dim = dim_of(dim, len(entry.shape))
        size = entry.shape[dim]
        first, last, _ = slice(start, stop).indices(size)
        if last <= first or (stop is not None and stop > size):
            raise RuleError(f"there is no {start}:{stop} along dimension {dim}", found=f"{list(entry.shape)}")
        stride = strides_of(entry)
        return seen(entry, (*entry.shape[:dim], last - first, *entry.shape[dim + 1 :]), stride, first * stride[dim])

    def undone(self, changed: Sequence[Changed]) -> tuple[Rule, ...] | None:
        """Nothing, unless nothing was cut off."""
        return () if all(each.old.shape == each.new.shape for each in changed) else None


class Pad(Each):
    """A dimension grows to a size; the new elements, at its end, are one value."""

    __slots__ = ()
    name = "pad"
    fields = ("glob", "dim", "size", "value")
    defaults: ClassVar[Mapping[str, object]] = {"value": 0}

    def changed(self, entry: TensorEntry, draft: Draft) -> TensorEntry | None:
        """A computed tensor; those of the size already are left alone."""
        from statedict.recipes.joining import Pad as Padded

        _, dim, size, value = self.arguments
        at = dim_of(dim, len(entry.shape))
        more = size - entry.shape[at]
        if more < 0:
            raise RuleError(f"dimension {dim} is larger than {size}", found=f"{list(entry.shape)}")
        if not more:
            return None
        key = ("pad", at, size, value, identity_of(entry))
        return draft.computed_once(key, entry, lambda: Padded(draft.lazy(entry), at, 0, more, value))

    def left_alone(self, entries: Sequence[TensorEntry]) -> str:
        """They have the size."""
        return f"{len(entries)} of that size already"

    def undone(self, changed: Sequence[Changed]) -> tuple[Rule, ...]:
        """The part that was there before."""
        dim = self.arguments[1]
        return self.per_tensor(changed, lambda glob, each: Slice(glob, dim, 0, each.old.shape[dim]))


class Cast(Each):
    """Floating-point tensors in another dtype; complex ones in another complex one. All others are left alone."""

    __slots__ = ("_dtype",)
    name = "cast"
    fields = ("glob", "dtype")
    lossless = False

    def __init__(self, glob: str, dtype: str, *, is_optional: bool = False) -> None:
        from statedict.rules.dtypes import float_named

        self._dtype: DType = float_named(dtype)
        super().__init__(glob, self._dtype.torch, is_optional=is_optional)

    def changed(self, entry: TensorEntry, draft: Draft) -> TensorEntry | None:
        """A computed tensor, where there are numbers to cast."""
        from statedict.recipes.casting import Cast as Recast
        from statedict.rules.dtypes import is_number

        to = self._dtype
        if entry.layout != "strided" or entry.dtype.kind != to.kind or entry.dtype is to or not is_number(entry.dtype):
            return None
        if entry.view is None:
            return entry._replace(dtype=to, digest=None)
        draft.casts.append(CastOf(entry.key, draft.lazy(entry), to))
        key = ("cast", to.code, identity_of(entry))
        return draft.computed_once(key, entry, lambda: Recast(draft.lazy(entry), to))

    def left_alone(self, entries: Sequence[TensorEntry]) -> str:
        """They are of it already, or no numbers of its kind."""
        same = sum(entry.dtype is self._dtype for entry in entries)
        kinds = sorted(
            {str(e.dtype) if e.layout == "strided" else e.layout for e in entries if e.dtype is not self._dtype}
        )
        said = [f"{same} are {self._dtype} already"] if same else []
        if kinds:
            said.append(f"{len(entries) - same} were left alone ({', '.join(kinds)})")
        return ", ".join(said)

    def undone(self, changed: Sequence[Changed]) -> tuple[Rule, ...] | None:
        """The dtypes that they had, if this one holds every value of those."""
        from statedict.rules.dtypes import holds

        if not all(holds(self._dtype, each.old.dtype) for each in changed):
            return None
        return self.per_tensor(changed, lambda glob, each: Cast(glob, each.old.dtype.torch))
