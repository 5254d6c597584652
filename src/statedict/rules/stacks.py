"""Rules between one tensor and as many as one of its dimensions has indices: stacked and unstacked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any, ClassVar

from statedict.errors import RuleError, one_line
from statedict.keys import Path
from statedict.manifest import TensorEntry
from statedict.rules.drafts import Draft
from statedict.rules.each import dim_of, seen, strides_of
from statedict.rules.joins import Exchange, Group, Made, joined_by, same_dtype
from statedict.rules.patterns import Pattern, listed
from statedict.rules.rule import Rule

__all__ = ["Stack", "Unstack"]

# Missing parts that an error names.
_LISTED = 8


class Stack(Exchange):
    """Tensors of one shape along a new dimension, in the order of the number that only their names have."""

    __slots__ = ("_index", "_source", "_target")
    name = "stack"
    fields = ("source", "target", "dim")
    defaults: ClassVar[Mapping[str, object]] = {"dim": 0}

    def __init__(self, *arguments: Any, is_optional: bool = False) -> None:
        super().__init__(*arguments, is_optional=is_optional)
        self._source, self._target = Pattern(arguments[0]), Pattern(arguments[1])
        self._index = _index(self, self._source, self._target)

    def renamed(self, key: str) -> str:
        """The key of what it becomes a part of."""
        values = self._source.match(key)
        return key if values is None else self._target.fill(values)

    def groups(self, tensors: Mapping[str, tuple[Path, TensorEntry]]) -> list[Group]:
        """The tensors by their number, from 0 on without a gap."""
        found: dict[tuple[tuple[str, str], ...], dict[int, tuple[Path, TensorEntry]]] = {}
        for key, item in tensors.items():
            values = self._source.match(key)
            if values is not None:
                rest = tuple([(name, value) for name, value in sorted(values.items()) if name != self._index])
                found.setdefault(rest, {})[_number(self, values[self._index], key)] = item
        count = 1 + max([max(members) for members in found.values()], default=-1)
        for shared, members in found.items():
            # As many as are looked for are listed; an index of a thousand million makes no long list.
            missing = list(islice((at for at in range(count) if at not in members), _LISTED))
            if missing:
                names = [self._source.fill({**dict(shared), self._index: str(at)}) for at in missing]
                lacking = count - len(members)
                raise RuleError(f"{one_line(self)}: {lacking} of {count} parts are missing: {listed(names)}")
        return [Group(tuple([members[at] for at in range(len(members))]), dict(v)) for v, members in found.items()]

    def given(self, group: Group, draft: Draft) -> list[tuple[str, TensorEntry]]:
        """The stacked tensor."""
        entries = [entry for _, entry in group.members]
        same_dtype(entries)
        dim = dim_of(self.arguments[2], len(entries[0].shape) + 1)
        raised = []
        for entry in entries:
            stride = strides_of(entry)
            shape = (*entry.shape[:dim], 1, *entry.shape[dim:])
            raised.append(seen(entry, shape, (*stride[:dim], 1, *stride[dim:])))
        return [(self._target.fill(group.values), joined_by("Concat", raised, dim, draft))]

    def inverse(self) -> Rule:
        """``unstack``."""
        return Unstack(self.arguments[1], self.arguments[0], self.arguments[2])

    def undone(self, made: Sequence[Made]) -> tuple[Rule, ...]:
        """``unstack``."""
        return (self.inverse(),)


class Unstack(Exchange):
    """One tensor becomes as many as a dimension has indices, without that dimension."""

    __slots__ = ("_index", "_source", "_target")
    name = "unstack"
    fields = ("source", "target", "dim")
    defaults: ClassVar[Mapping[str, object]] = {"dim": 0}

    def __init__(self, *arguments: Any, is_optional: bool = False) -> None:
        super().__init__(*arguments, is_optional=is_optional)
        self._source, self._target = Pattern(arguments[0]), Pattern(arguments[1])
        self._index = _index(self, self._target, self._source)

    def groups(self, tensors: Mapping[str, tuple[Path, TensorEntry]]) -> list[Group]:
        """Each tensor by itself."""
        found = [(item, self._source.match(key)) for key, item in tensors.items()]
        return [Group((item,), values) for item, values in found if values is not None]

    def given(self, group: Group, draft: Draft) -> list[tuple[str, TensorEntry]]:
        """Views of each index."""
        entry = group.members[0][1]
        dim = dim_of(self.arguments[2], len(entry.shape))
        stride = strides_of(entry)
        shape, steps = entry.shape[:dim] + entry.shape[dim + 1 :], stride[:dim] + stride[dim + 1 :]
        return [
            (self._target.fill({**group.values, self._index: str(at)}), seen(entry, shape, steps, at * stride[dim]))
            for at in range(entry.shape[dim])
        ]

    def inverse(self) -> Rule:
        """``stack``."""
        return Stack(self.arguments[1], self.arguments[0], self.arguments[2])

    def undone(self, made: Sequence[Made]) -> tuple[Rule, ...]:
        """``stack``."""
        return (self.inverse(),)


def _index(rule: Rule, many: Pattern, one: Pattern) -> str:
    """The name that only the tensors that are many have."""
    extra: list[str] = [name for name in many.names if name not in one.names]
    if len(extra) != 1 or any(name not in many.names for name in one.names):
        hint = "As in stack('experts.{e}.w', 'experts.w')"
        raise RuleError(f"{one_line(rule)}: the names of the many must have one more in braces than the one", hint=hint)
    return extra[0]


def _number(rule: Rule, text: str, key: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 10 and str(int(text)) == text):
        raise RuleError(f"{one_line(rule)}: '{one_line(text)}' is no index", key=key)
    return int(text)
