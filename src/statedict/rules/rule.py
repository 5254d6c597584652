"""What a rule is: one change of a checkpoint as data, and what came of it on one checkpoint."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

from statedict.errors import RuleError, one_line
from statedict.keys import Path, dotted, near
from statedict.manifest import Node
from statedict.rules.drafts import Draft
from statedict.rules.regrowing import Moved

__all__ = ["NoMatch", "Rule", "Step", "matches_nothing", "refuse_collisions"]

# Keys, pairs of keys, or beginnings of keys that an error lists.
_LISTED = 8


class NoMatch(RuleError):
    """A rule concerns nothing; one that is optional may."""


class Step(NamedTuple):
    """What one rule came to on one checkpoint."""

    root: Node
    matched: int  # keys that it concerned
    touched: frozenset[Path] = frozenset()  # the paths in the result that come from those
    dropped: tuple[str, ...] = ()  # keys that are left out, their values lost
    created: tuple[str, ...] = ()  # keys that were computed of others
    notes: tuple[str, ...] = ()  # what it has left alone, in sentences
    inverse: tuple[Rule, ...] | None = None  # the rules that take it back, on what it made; None if nothing does


class Rule:
    """One change of the keys or tensors of a checkpoint; it never changes itself. Its ``str`` is what one types to have it.

    ``lossless`` says whether the values of all tensors and objects are still there afterwards; of those that decide it by the
    dtypes or sizes that they meet, it is False, and the ``Plan`` knows.
    """

    __slots__ = ("arguments", "is_optional")

    name: ClassVar[str] = ""
    fields: ClassVar[tuple[str, ...]] = ()  # the names of the arguments, as its function takes them
    defaults: ClassVar[Mapping[str, object]] = {}  # of those that may be left out
    lossless: ClassVar[bool] = True

    def __init__(self, *arguments: Any, is_optional: bool = False) -> None:
        self.arguments = arguments
        self.is_optional = is_optional

    def __str__(self) -> str:
        shown = []
        for field, value in self._named():
            if field in self.defaults:
                if value != self.defaults[field]:
                    shown.append(f"{field}={value!r}")
            else:
                shown.append(repr(_plain(value) if isinstance(value, Mapping) else value))
        made = f"{self.name}({', '.join(shown)})"
        return f"optional({made})" if self.is_optional else made

    def __repr__(self) -> str:
        return str(self)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Rule):
            return NotImplemented
        return (self.name, self.arguments, self.is_optional) == (other.name, other.arguments, other.is_optional)

    def __hash__(self) -> int:
        return hash(str(self))

    def _named(self) -> list[tuple[str, object]]:
        """The arguments with their names; those beyond the named ones share the last name."""
        last = self.fields[-1] if self.fields else ""
        return [(self.fields[at] if at < len(self.fields) else last, each) for at, each in enumerate(self.arguments)]

    def to_dict(self) -> dict[str, object]:
        """The rule as JSON and TOML have it: ``rule``, its name, and its arguments by theirs."""
        made: dict[str, object] = {"rule": self.name}
        made.update({field: _plain(value) for field, value in self._named() if not self._is_default(field, value)})
        if self.is_optional:
            made["optional"] = True
        return made

    def _is_default(self, field: str, value: object) -> bool:
        return value is None or (field in self.defaults and value == self.defaults[field])

    def optional(self) -> Rule:
        """The same rule, which may also match nothing."""
        return type(self)(*self.arguments, is_optional=True)

    def renamed(self, key: str) -> str | None:
        """What becomes of a dotted key: its new name, itself if the rule doesn't concern it, None if it is left out.

        Of a tensor that is made of several, each of these has its name.
        """
        return key

    def inverse(self) -> Rule | None:
        """The rule that undoes this one, where it concerned every key; None if that can't be said without a checkpoint."""
        return None

    def applied(self, draft: Draft) -> Step:
        """What the tree of the draft becomes; the old one stays as it is. Raises ``RuleError``."""
        raise NotImplementedError


def _plain(value: object) -> object:
    """A value that JSON has."""
    if isinstance(value, tuple):
        return [_plain(each) for each in value]
    return {str(key): _plain(each) for key, each in value.items()} if isinstance(value, Mapping) else value


def matches_nothing(rule: Rule, typed: str, names: Sequence[str], *, whole: bool = True) -> NoMatch:
    """The error of a rule that concerns no key, with what may have been meant: ``whole`` keys, or their beginnings."""
    if whole:
        known, words = list(names), "There are"
    else:
        known = list(dict.fromkeys(_beginnings(names, typed.rstrip(".").count(".") + 1)))
        words = "Keys begin with"
    guesses = near(typed, known)
    if guesses:
        hint = f"Did you mean {', '.join(one_line(repr(guess)) for guess in guesses)}"
    else:
        hint = (
            f"{words} {', '.join(one_line(repr(name)) for name in known[:_LISTED])}" if known else "There are no keys"
        )
    return NoMatch(f"{one_line(rule)} matches nothing", hint=hint)


def _beginnings(names: Iterable[str], length: int) -> Iterable[str]:
    """The first so many components of each key, with their dot; the key itself where it has fewer."""
    for name in names:
        words = name.split(".", length)
        yield ".".join(words[:length]) + "." if len(words) > length else name


def refuse_collisions(rule: Rule, leaves: Sequence[Moved]) -> None:
    """Raise ``RuleError`` if two keys would get one name, or a tensor that of a container with others in it.

    Two that were alike before the rule may stay so: their paths differ.
    """
    names: dict[str, Moved] = {}
    pairs: list[tuple[Moved, Moved]] = []
    paths = {leaf.new: leaf for leaf in leaves}
    for leaf in leaves:
        other = names.setdefault(dotted(leaf.new), leaf)
        if other is not leaf and (other.new == leaf.new or dotted(other.old) != dotted(leaf.old)):
            pairs.append((other, leaf))
        pairs += [(paths[leaf.new[:at]], leaf) for at in range(1, len(leaf.new)) if leaf.new[:at] in paths]
    if pairs:
        shown = [
            f"'{one_line(dotted(a.old))}' and '{one_line(dotted(b.old))}' as '{one_line(dotted(a.new))}'"
            for a, b in pairs[:_LISTED]
        ]
        more = f" and {len(pairs) - _LISTED} more" if len(pairs) > _LISTED else ""
        hint = "Select the part that is meant, or drop the rest first"
        raise RuleError(f"{one_line(rule)} gives two keys one name: {'; '.join(shown)}{more}", hint=hint)
