"""Rules between one tensor and several: concatenated and split, interleaved and taken apart.

Taking apart is views of the same storage; putting together is computed as it is read. Which tensors belong together is said by
templates: of each set of values of the names in braces every part must be there, else nothing is done and those missing are named.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from statedict.errors import RuleError, one_line
from statedict.keys import Path, dotted
from statedict.manifest import TensorEntry
from statedict.rules.drafts import Draft, identity_of, untied_by
from statedict.rules.each import dim_of, seen, strides_of
from statedict.rules.patterns import Pattern, Values, listed
from statedict.rules.regrowing import Moved, Tree, grown, placed
from statedict.rules.rule import Rule, Step, matches_nothing, refuse_collisions

if TYPE_CHECKING:
    from statedict.recipes.derived import Recipe

__all__ = ["Concat", "Deinterleave", "Exchange", "Group", "Interleave", "Made", "Split", "joined_by", "same_dtype"]


class Made(NamedTuple):
    """One instance of a rule: which tensors it took, and which it gave, by key."""

    taken: tuple[str, ...]
    given: tuple[str, ...]
    sizes: tuple[int, ...]  # of the parts along the dimension


class Group(NamedTuple):
    """The tensors that belong together: with their paths, in order, and the values that they share."""

    members: tuple[tuple[Path, TensorEntry], ...]
    values: Values


class Exchange(Rule):
    """Some tensors go, others come in the place of the first of them."""

    __slots__ = ()

    def groups(self, tensors: Mapping[str, tuple[Path, TensorEntry]]) -> list[Group]:
        """Which tensors belong together. Raises ``RuleError`` where some of a group are missing."""
        raise NotImplementedError

    def given(self, group: Group, draft: Draft) -> list[tuple[str, TensorEntry]]:
        """The tensors that come for a group, by key. Raises ``RuleError`` where they don't fit together."""
        raise NotImplementedError

    def undone(self, made: Sequence[Made]) -> tuple[Rule, ...] | None:
        """The rules that take it back."""
        raise NotImplementedError

    @property
    def _typed(self) -> str:
        first = self.arguments[0]
        return str(first if isinstance(first, str) else first[0])

    def applied(self, draft: Draft) -> Step:
        """The tree with the new tensors for the old ones."""
        tree = Tree(draft.root)
        tensors = {dotted(path): (path, leaf) for path, leaf in tree.leaves if isinstance(leaf, TensorEntry)}
        groups = self.groups(tensors)
        if not groups:
            raise matches_nothing(self, self._typed, list(tensors))
        coming: dict[Path, list[Moved]] = {}
        going: set[Path] = set()
        made: list[Made] = []
        for group in groups:
            first = group.members[0][0]
            given = self._given(group, draft)
            coming[first] = [Moved(first, placed(first, key, tree), entry) for key, entry in given]
            going.update([path for path, _ in group.members])
            made.append(self._made(group, given))
        leaves: list[Moved] = []
        for path, leaf in tree.leaves:
            leaves += coming.get(path, []) if path in going else [Moved(path, path, leaf)]
        refuse_collisions(self, leaves)
        touched = frozenset([moved.new for each in coming.values() for moved in each])
        created = tuple([key for each in made for key in each.given])
        taken = [entry for group in groups for _, entry in group.members]
        notes = untied_by(taken, [entry for path, entry in tensors.values() if path not in going])
        return Step(grown(tree, leaves), len(going), touched, (), created, notes, self.undone(made))

    def _given(self, group: Group, draft: Draft) -> list[tuple[str, TensorEntry]]:
        keys = [dotted(path) for path, _ in group.members]
        try:
            return self.given(group, draft)
        except RuleError as error:
            raise RuleError(
                f"{one_line(self)}: {error.what}",
                key=keys[0] if len(keys) == 1 else f"{keys[0]} …",
                expected=error.expected,
                found=error.found,
                hint=error.hint,
            ) from error

    def _made(self, group: Group, given: Sequence[tuple[str, TensorEntry]]) -> Made:
        parts = [entry for _, entry in group.members] if len(given) == 1 else [entry for _, entry in given]
        dim = self.arguments[-1]
        sizes = tuple([part.shape[dim] if -len(part.shape) <= dim < len(part.shape) else 1 for part in parts])
        return Made(tuple([dotted(path) for path, _ in group.members]), tuple([key for key, _ in given]), sizes)


class _Join(Exchange):
    """Several tensors become one."""

    __slots__ = ("_sources", "_target")
    fields = ("sources", "target", "dim")
    defaults: ClassVar[Mapping[str, object]] = {"dim": 0}

    def __init__(self, *arguments: Any, is_optional: bool = False) -> None:
        super().__init__(*arguments, is_optional=is_optional)
        self._sources = [Pattern(text) for text in arguments[0]]
        self._target = Pattern(arguments[1])
        names = set(self._sources[0].names)
        if any(set(source.names) != names for source in self._sources):
            raise RuleError(f"{one_line(self)}: all sources must have the same names in braces")
        self._target.check_names(names)

    def renamed(self, key: str) -> str:
        """The key of what it becomes a part of."""
        for source in self._sources:
            values = source.match(key)
            if values is not None:
                return self._target.fill(values)
        return key

    def groups(self, tensors: Mapping[str, tuple[Path, TensorEntry]]) -> list[Group]:
        """The tensors by the values of their names, one of each source."""
        found: dict[tuple[tuple[str, str], ...], dict[int, tuple[Path, TensorEntry]]] = {}
        for key, item in tensors.items():
            for at, source in enumerate(self._sources):
                values = source.match(key)
                if values is None:
                    continue
                members = found.setdefault(tuple(sorted(values.items())), {})
                if at in members:
                    twice = listed([dotted(members[at][0]), key])
                    hint = "Name what differs in braces: 'layers.{n}.w'"
                    raise RuleError(f"{one_line(self)}: two tensors for one place: {twice}", hint=hint)
                members[at] = item
        missing = [
            self._sources[at].fill(dict(values))
            for values, members in found.items()
            for at in range(len(self._sources))
            if at not in members
        ]
        if missing:
            raise RuleError(f"{one_line(self)}: parts are missing: {listed(missing)}")
        return [Group(tuple([members[at] for at in range(len(members))]), dict(v)) for v, members in found.items()]

    def given(self, group: Group, draft: Draft) -> list[tuple[str, TensorEntry]]:
        """The joined tensor."""
        entries = [entry for _, entry in group.members]
        same_dtype(entries)
        made = self.joined(entries, draft)
        return [(self._target.fill(group.values), made)]

    def joined(self, entries: Sequence[TensorEntry], draft: Draft) -> TensorEntry:
        """The entry of the joined tensor."""
        raise NotImplementedError

    def undone(self, made: Sequence[Made]) -> tuple[Rule, ...] | None:
        """Its opposite, with the sizes that the parts had."""
        names = self._target.names
        plain = all(_is_plain(pattern, names) for pattern in (*self._sources, self._target))
        if not plain or len({each.sizes for each in made}) > 1:
            return tuple([self.opposite(each.given[0], each.taken, each.sizes) for each in made])
        return (self.opposite(self.arguments[1], self.arguments[0], made[0].sizes),)

    def opposite(self, whole: str, parts: tuple[str, ...], sizes: tuple[int, ...]) -> Rule:
        """The rule that takes the whole apart into parts of these sizes."""
        raise NotImplementedError


def _is_plain(pattern: Pattern, names: Sequence[str]) -> bool:
    """Whether the keys of the pattern are told by these names as they are, so that it can be a source too."""
    shifts = pattern.shifted()
    return shifts is not None and set(shifts) == set(names) and not any(shifts.values())


def same_dtype(entries: Sequence[TensorEntry]) -> None:
    """Raise ``RuleError`` unless all are strided tensors of one dtype of whole bytes."""
    kinds = list(dict.fromkeys([str(entry.dtype) for entry in entries]))
    if len(kinds) > 1:
        raise RuleError(
            "tensors of different dtypes", found=", ".join(kinds), hint="Cast them first: cast(glob, dtype)"
        )
    for entry in entries:
        seen(entry, entry.shape, strides_of(entry))


def joined_by(kind: str, entries: Sequence[TensorEntry], dim: int, draft: Draft) -> TensorEntry:
    """The tensor that the recipe of that name makes of these, along a dimension counted from the front."""
    from statedict.recipes import joining

    make: Callable[..., Recipe] = getattr(joining, kind)
    key = (kind, dim, tuple([identity_of(entry) for entry in entries]))
    return draft.computed_once(key, entries[0], lambda: make([draft.lazy(entry) for entry in entries], dim))


class Concat(_Join):
    """Tensors one behind the other along a dimension."""

    __slots__ = ()
    name = "concat"

    def joined(self, entries: Sequence[TensorEntry], draft: Draft) -> TensorEntry:
        """A computed tensor; its recipe checks the other dimensions."""
        return joined_by("Concat", entries, dim_of(self.arguments[2], len(entries[0].shape)), draft)

    def opposite(self, whole: str, parts: tuple[str, ...], sizes: tuple[int, ...]) -> Rule:
        """``split``."""
        return Split(whole, parts, sizes, self.arguments[2])


class Interleave(_Join):
    """Tensors mixed along a dimension: the first index of each, then the second of each …"""

    __slots__ = ()
    name = "interleave"

    def joined(self, entries: Sequence[TensorEntry], draft: Draft) -> TensorEntry:
        """A computed tensor."""
        return joined_by("Interleave", entries, dim_of(self.arguments[2], len(entries[0].shape)), draft)

    def opposite(self, whole: str, parts: tuple[str, ...], sizes: tuple[int, ...]) -> Rule:
        """``deinterleave``."""
        return Deinterleave(whole, parts, self.arguments[2])


class _Part(Exchange):
    """One tensor becomes several, all of them views of it."""

    __slots__ = ("_source", "_targets")

    def __init__(self, *arguments: Any, is_optional: bool = False) -> None:
        super().__init__(*arguments, is_optional=is_optional)
        self._source = Pattern(arguments[0])
        self._targets = [Pattern(text) for text in arguments[1]]
        for target in self._targets:
            target.check_names(self._source.names)

    def groups(self, tensors: Mapping[str, tuple[Path, TensorEntry]]) -> list[Group]:
        """Each tensor by itself."""
        found = [(item, self._source.match(key)) for key, item in tensors.items()]
        groups = [Group((item,), values) for item, values in found if values is not None]
        if len(groups) > 1 and not self._source.is_template:
            raise RuleError(
                f"{one_line(self)} gives several tensors the same names", hint="Name what differs: 'layers.{n}.w'"
            )
        return groups

    def given(self, group: Group, draft: Draft) -> list[tuple[str, TensorEntry]]:
        """The parts."""
        entry = group.members[0][1]
        names = [target.fill(group.values) for target in self._targets]
        return list(zip(names, self.parted(entry)))

    def parted(self, entry: TensorEntry) -> list[TensorEntry]:
        """The parts of one tensor."""
        raise NotImplementedError

    def undone(self, made: Sequence[Made]) -> tuple[Rule, ...] | None:
        """Its opposite."""
        if not all(_is_plain(target, self._source.names) for target in self._targets):
            return tuple([self.opposite(each.given, each.taken[0]) for each in made])
        return (self.opposite(self.arguments[1], self.arguments[0]),)

    def opposite(self, parts: tuple[str, ...], whole: str) -> Rule:
        """The rule that puts the parts together."""
        raise NotImplementedError


class Split(_Part):
    """One tensor cut along a dimension into parts of these sizes, or into equal ones."""

    __slots__ = ()
    name = "split"
    fields = ("source", "targets", "sizes", "dim")
    defaults: ClassVar[Mapping[str, object]] = {"sizes": None, "dim": 0}

    def parted(self, entry: TensorEntry) -> list[TensorEntry]:
        """Views of the ranges."""
        _, targets, sizes, dim = self.arguments
        dim = dim_of(dim, len(entry.shape))
        whole = entry.shape[dim]
        if sizes is None:
            if whole % len(targets):
                hint = "Say how they are cut: sizes=[…]"
                raise RuleError(
                    f"dimension {dim} has no {len(targets)} equal parts", found=f"{list(entry.shape)}", hint=hint
                )
            sizes = (whole // len(targets),) * len(targets)
        if sum(sizes) != whole:
            raise RuleError(f"the sizes don't make dimension {dim}", expected=f"{whole}", found=f"{list(sizes)}")
        stride, first, parts = strides_of(entry), 0, []
        for size in sizes:
            shape = (*entry.shape[:dim], size, *entry.shape[dim + 1 :])
            parts.append(seen(entry, shape, stride, first * stride[dim]))
            first += size
        return parts

    def inverse(self) -> Rule:
        """``concat``."""
        return Concat(self.arguments[1], self.arguments[0], self.arguments[3])

    def opposite(self, parts: tuple[str, ...], whole: str) -> Rule:
        """``concat``."""
        return Concat(parts, whole, self.arguments[3])


class Deinterleave(_Part):
    """One tensor taken apart along a dimension: every so manieth index to each part in turn."""

    __slots__ = ()
    name = "deinterleave"
    fields = ("source", "targets", "dim")
    defaults: ClassVar[Mapping[str, object]] = {"dim": 0}

    def parted(self, entry: TensorEntry) -> list[TensorEntry]:
        """Views with a longer stride."""
        dim, count = dim_of(self.arguments[2], len(entry.shape)), len(self.arguments[1])
        if entry.shape[dim] % count:
            raise RuleError(f"dimension {dim} is no multiple of {count}", found=f"{list(entry.shape)}")
        stride = strides_of(entry)
        shape = (*entry.shape[:dim], entry.shape[dim] // count, *entry.shape[dim + 1 :])
        steps = (*stride[:dim], stride[dim] * count, *stride[dim + 1 :])
        return [seen(entry, shape, steps, at * stride[dim]) for at in range(count)]

    def inverse(self) -> Rule:
        """``interleave``."""
        return Interleave(self.arguments[1], self.arguments[0], self.arguments[2])

    def opposite(self, parts: tuple[str, ...], whole: str) -> Rule:
        """``interleave``."""
        return Interleave(parts, whole, self.arguments[2])
