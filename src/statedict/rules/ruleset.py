"""Rules in the order in which they are applied, and applying them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Union, overload

from statedict.checkpoint import Checkpoint
from statedict.errors import RuleError, one_line
from statedict.rules.plans import Plan, planned
from statedict.rules.rule import Rule

__all__ = ["Rules", "RulesLike", "apply", "plan"]


class Rules(Sequence[Rule]):
    """Rules in the order in which they are applied; the sequence never changes."""

    __slots__ = ("_rules",)

    def __init__(self, rules: Iterable[Rule] = ()) -> None:
        self._rules = tuple(rules)

    @classmethod
    def of(cls, rules: object) -> Rules:
        """The rules that someone gave: one, several, or ``Rules``. Raises ``RuleError`` for anything else."""
        if isinstance(rules, Rules):
            return rules
        if isinstance(rules, Rule):
            return cls([rules])
        found: list[Rule] = []
        for rule in rules if isinstance(rules, Iterable) and not isinstance(rules, str) else [rules]:
            if not isinstance(rule, Rule):
                hint = "Make one with a function of statedict.rules, such as strip_prefix('module.')"
                raise RuleError("this is no rule", found=one_line(repr(rule)), hint=hint)
            found.append(rule)
        return cls(found)

    @overload
    def __getitem__(self, index: int) -> Rule: ...

    @overload
    def __getitem__(self, index: slice) -> Rules: ...

    def __getitem__(self, index: int | slice) -> Rule | Rules:
        return Rules(self._rules[index]) if isinstance(index, slice) else self._rules[index]

    def __len__(self) -> int:
        return len(self._rules)

    def __eq__(self, other: object) -> bool:
        return self._rules == other._rules if isinstance(other, Rules) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._rules)

    def __str__(self) -> str:
        return ", ".join(map(str, self._rules))

    def __repr__(self) -> str:
        return f"Rules([{self}])"

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> Rules:
        """The rules of a file, TOML or JSON by its suffix. Nothing in it is run. Raises ``FileError`` and ``RuleError``."""
        from statedict.rules.tables import rules_of

        return cls(rules_of(path))

    def to_file(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Write the rules as TOML or JSON, by the suffix; the file appears whole or not at all. Raises ``FileError``."""
        from statedict.io.durable import write_bytes
        from statedict.rules.files import rendered

        write_bytes(path, rendered(self.to_dict(), path), overwrite=overwrite)

    def to_dict(self) -> list[dict[str, object]]:
        """Each rule as a table, JSON-ready."""
        return [rule.to_dict() for rule in self._rules]

    @property
    def lossless(self) -> bool:
        """Whether all values are still there afterwards, whatever they are applied to."""
        return all(rule.lossless for rule in self._rules)

    def inverse(self, source: Checkpoint | None = None) -> Rules | None:
        """The rules that undo these; None if one of them can't be undone.

        Without a source, those that hold for every one: where each of these concerned all keys. With it, those that make this very
        checkpoint again of what these rules make of it: the shapes, sizes, dtypes and names that it has are filled in.
        """
        if source is not None:
            back = planned(source, self._rules).inverse()
            return None if back is None else Rules(back)
        found = [rule.inverse() for rule in reversed(self._rules)]
        return None if None in found else Rules([rule for rule in found if rule is not None])

    def renamed(self, key: str) -> str | None:
        """What becomes of a dotted key: its new name, or None if it is left out."""
        name: str | None = key
        for rule in self._rules:
            if name is None:
                break
            name = rule.renamed(name)
        return name


RulesLike = Union[Rule, Iterable[Rule]]


def apply(checkpoint: Checkpoint, rules: RulesLike) -> Checkpoint:
    """The checkpoint that the rules make, over the same open files; nothing is read or copied.

    It is for as long as the checkpoint that it comes from is open, and closing it closes nothing. Ties stay. Raises
    ``RuleError`` for a rule that matches nothing, keys that would get one name, and tensors that don't fit together.
    """
    return planned(checkpoint, Rules.of(rules)).checkpoint


def plan(checkpoint: Checkpoint, rules: RulesLike) -> Plan:
    """The same, with what each rule concerned, which keys none did, and the rules that take it back."""
    return planned(checkpoint, Rules.of(rules))
