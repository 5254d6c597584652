"""Rules: changes of keys as data. They can be shown, compared, taken back, and applied to a checkpoint without reading it.

    apply(checkpoint, [select("model_state_dict"), strip_prefix("module.")])

A rule sees keys in their dotted form, whatever containers they stand in: ``strip_prefix("a.b.")`` makes ``c`` of ``a.b.c``,
whether that is one flat key, a tensor in nested dicts, or something between. The containers follow their content: what
stood in ``a`` and in its ``b`` is lifted to the top, and what else is in ``a`` stays there. Where two containers become one,
the outer one's kind and attributes stay, unless all that is left came from the inner one. A list that loses elements
becomes a dict, so that the rest keep their names. The ``_metadata`` of a state dict is renamed with it, in a copy.

A rule that matches nothing is an error, and so are two keys that would get one name.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Union, overload

from statedict.checkpoint import Checkpoint
from statedict.errors import RuleError, StateDictError, one_line
from statedict.keys import Path
from statedict.manifest import Node, Storage
from statedict.nodes import every_tensor, rebased
from statedict.rules.kinds import AddPrefix, AddWrapper, Drop, Keep, Rule, Select, StripPrefix, StripWrapper

__all__ = [
    "Rule",
    "Rules",
    "RulesLike",
    "add_prefix",
    "add_wrapper",
    "apply",
    "drop",
    "keep",
    "select",
    "strip_prefix",
    "strip_wrapper",
]


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

    @property
    def lossless(self) -> bool:
        """Whether all tensors and objects are still there afterwards."""
        return all(rule.lossless for rule in self._rules)

    def inverse(self) -> Rules | None:
        """The rules that undo these, where each of these concerned every key; None if one of them can't be undone."""
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
    ``RuleError`` for a rule that matches nothing and for keys that would get one name.
    """
    found = Rules.of(rules)
    root = checkpoint.manifest.structure
    try:
        for rule in found:
            root = rule.applied(root)
    except StateDictError as error:
        raise error.located(checkpoint.source) from None
    root, tensors, objects = rebased(root)
    storages = checkpoint.manifest.storages if found.lossless else _shown(root, checkpoint.manifest.storages)
    manifest = checkpoint.manifest._replace(tensors=tensors, objects=objects, structure=root, storages=storages)
    files, source, limits = checkpoint.reader.files, checkpoint.source, checkpoint.limits
    return Checkpoint(manifest, files, source=source, limits=limits, owns_files=False)


def _shown(root: Node, storages: Sequence[Storage]) -> tuple[Storage, ...]:
    """The storages that a tensor of the tree shows."""
    entries = [part for entry in every_tensor(root) for part in (entry, *entry.parts.values())]
    used = {entry.view.storage.id for entry in entries if entry.view is not None}
    return tuple(storage for storage in storages if storage.id in used)


def select(key: str | Path) -> Rule:
    """Only the part under a key, without that key: a subtree, or the flat keys that begin with it and a dot."""
    return Select(_text("select", key) if isinstance(key, str) else key)


def strip_prefix(prefix: str) -> Rule:
    """Keys that begin with the prefix (its dot is part of it) lose it; others stay as they are."""
    return StripPrefix(_text("strip_prefix", prefix))


def add_prefix(prefix: str) -> Rule:
    """Every key gets the prefix (its dot is part of it). A nested tree is put into containers of these names."""
    return AddPrefix(_text("add_prefix", prefix))


def strip_wrapper(word: str) -> Rule:
    """The component of that name is taken out wherever it stands in a key, but not where it is the last one.

    ``strip_wrapper("_orig_mod")`` makes ``blocks.0.weight`` of ``_orig_mod.blocks.0._orig_mod.weight``.
    """
    return StripWrapper(_component("strip_wrapper", word))


def add_wrapper(word: str, *modules: str) -> Rule:
    """Keys get that component behind the path of each of these modules, ``""`` being the whole model.

    The paths are those of the result: ``add_wrapper("_orig_mod", "", "_orig_mod.blocks.0")`` undoes what ``strip_wrapper`` has
    as its example.
    """
    if not modules:
        raise RuleError("add_wrapper needs modules to wrap", hint='Name them by their paths; "" is the whole model')
    return AddWrapper(_component("add_wrapper", word), *modules)


def drop(glob: str) -> Rule:
    """All keys but those that the glob matches as a whole, tensors and objects."""
    return Drop(_text("drop", glob))


def keep(glob: str) -> Rule:
    """Only the keys that the glob matches as a whole, tensors and objects."""
    return Keep(_text("keep", glob))


def _text(name: str, value: object) -> str:
    if not isinstance(value, str) or not value:
        raise RuleError(f"{name} takes a text that isn't empty", found=one_line(repr(value)))
    return value


def _component(name: str, value: object) -> str:
    if "." in (word := _text(name, value)):
        raise RuleError(f"{name} takes the name of one component, without a dot", found=one_line(repr(word)))
    return word
