"""The kinds of rules: what each does to a key, and to the path behind it.

Two methods say the same thing twice, and must: ``renamed`` of the dotted key, which is what people and reports see, and
``moved`` of the path, which decides the containers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, ClassVar

from statedict.errors import KeyNotFound, RuleError, one_line
from statedict.keys import Path, dotted, matches, near, parse_escaped
from statedict.manifest import Node
from statedict.nodes import find
from statedict.rules.regrowing import Moved, Tree, grown

__all__ = ["AddPrefix", "AddWrapper", "Drop", "Keep", "Rule", "Select", "StripPrefix", "StripWrapper"]

# Pairs of keys, or beginnings of keys, that an error lists.
_LISTED = 8


class Rule:
    """One change of the keys of a checkpoint; it never changes itself. Its ``str`` is what one types to have it.

    ``lossless`` says whether all tensors and objects are still there afterwards.
    """

    __slots__ = ("arguments",)

    name: ClassVar[str] = ""
    lossless: ClassVar[bool] = True

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments

    def __str__(self) -> str:
        return f"{self.name}({', '.join(map(repr, self.arguments))})"

    __repr__ = __str__

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Rule):
            return NotImplemented
        return (self.name, self.arguments) == (other.name, other.arguments)

    def __hash__(self) -> int:
        return hash((self.name, self.arguments))

    def renamed(self, key: str) -> str | None:
        """What becomes of a dotted key: its new name, itself if the rule doesn't concern it, None if it is left out."""
        raise NotImplementedError

    def inverse(self) -> Rule | None:
        """The rule that undoes this one, where it concerned every key; None if there is none."""
        return None

    def applied(self, root: Node) -> Node:
        """The tree with this rule applied; the old one stays as it is. Raises ``RuleError``."""
        raise NotImplementedError


class Select(Rule):
    """The part under a key, as ``Checkpoint.at`` has it."""

    __slots__ = ()
    name = "select"
    lossless = False

    def renamed(self, key: str) -> str | None:
        """The key without that of the part."""
        wanted = self.arguments[0]
        if isinstance(wanted, tuple):
            wanted = dotted(wanted)
        elif "\\" in wanted or wanted.startswith("."):
            wanted = dotted(parse_escaped(wanted))
        if key == wanted:
            return ""
        return key[len(wanted) + 1 :] if key.startswith(f"{wanted}.") else None

    def applied(self, root: Node) -> Node:
        """The node of the part."""
        try:
            return find(root, self.arguments[0])
        except KeyNotFound as error:
            raise RuleError(f"{self} matches nothing", hint=error.hint) from None


class _Filter(Rule):
    """Only some keys are left, in the containers that they stood in."""

    __slots__ = ()
    lossless = False

    keeps: ClassVar[bool]  # what the glob matches, or what it doesn't

    def renamed(self, key: str) -> str | None:
        """The key, if it is left."""
        return key if matches(key, self.arguments[0]) == self.keeps else None

    def applied(self, root: Node) -> Node:
        """The tree with the keys that are left."""
        tree = Tree(root)
        names = [dotted(path) for path, _ in tree.leaves]
        left = [self.renamed(name) is not None for name in names]
        if not any(is_left == self.keeps for is_left in left):
            raise _matches_nothing(self, self.arguments[0], names)
        return grown(tree, [Moved(path, path, leaf) for (path, leaf), is_left in zip(tree.leaves, left) if is_left])


class Drop(_Filter):
    """What the glob matches is left out."""

    __slots__ = ()
    name = "drop"
    keeps = False


class Keep(_Filter):
    """What the glob doesn't match is left out."""

    __slots__ = ()
    name = "keep"
    keeps = True


class _Renaming(Rule):
    """The rules that give keys other names and leave none out."""

    __slots__ = ()

    def moved(self, path: Path, tree: Tree) -> Path:
        """The path that a leaf gets; its dotted form is what ``renamed`` says."""
        raise NotImplementedError

    def applied(self, root: Node) -> Node:
        """The tree with the new names."""
        tree = Tree(root)
        leaves = [Moved(path, self.moved(path, tree), leaf) for path, leaf in tree.leaves]
        if all(leaf.old == leaf.new for leaf in leaves):
            raise _matches_nothing(self, str(self.arguments[-1]), [dotted(path) for path, _ in tree.leaves])
        _refuse_collisions(self, leaves)
        return grown(tree, leaves, lambda path: self.moved(path, tree))


class StripPrefix(_Renaming):
    """What begins with the prefix loses it."""

    __slots__ = ()
    name = "strip_prefix"

    def renamed(self, key: str) -> str:
        """The key without the prefix."""
        prefix = self.arguments[0]
        return key[len(prefix) :] if key.startswith(prefix) and len(key) > len(prefix) else key

    def inverse(self) -> Rule:
        """``add_prefix``."""
        return AddPrefix(*self.arguments)

    def moved(self, path: Path, tree: Tree) -> Path:
        """The path without the components of the prefix, and without the rest of it in the next one."""
        rest: str = self.arguments[0]
        key = dotted(path)
        if not key.startswith(rest) or len(key) == len(rest):
            return path
        at = 0
        while len(rest) > len(word := str(path[at])):  # the whole component and the dot behind it
            rest, at = rest[len(word) + 1 :], at + 1
        return (word[len(rest) :], *path[at + 1 :]) if rest else path[at:]


class AddPrefix(_Renaming):
    """Every key gets the prefix."""

    __slots__ = ()
    name = "add_prefix"

    def renamed(self, key: str) -> str:
        """The key behind the prefix; a single value without a name is called as the prefix is."""
        prefix: str = self.arguments[0]
        return prefix + key if key else prefix.removesuffix(".")

    def inverse(self) -> Rule:
        """``strip_prefix``."""
        return StripPrefix(*self.arguments)

    def moved(self, path: Path, tree: Tree) -> Path:
        """The prefix as containers, or as text before flat keys."""
        prefix: str = self.arguments[0]
        if not path:
            return (prefix.removesuffix("."),)
        if not prefix.endswith(".") or (() in tree.flat and isinstance(path[0], str)):
            return (f"{prefix}{path[0]}", *path[1:])
        return (*prefix[:-1].split("."), *path)


class StripWrapper(_Renaming):
    """A component is taken out wherever it stands, but not where it is the last one, which names a tensor."""

    __slots__ = ()
    name = "strip_wrapper"

    def renamed(self, key: str) -> str:
        """The key without the component."""
        if self.arguments[0] not in key:
            return key
        *modules, last = key.split(".")
        return ".".join([*[word for word in modules if word != self.arguments[0]], last])

    def moved(self, path: Path, tree: Tree) -> Path:
        """The path without the component, whether it was one of a path or a part of a flat key."""
        out: list[str | int] = []
        for at, part in enumerate(path):
            words = str(part).split(".")
            last = [words.pop()] if at == len(path) - 1 else []
            kept = [word for word in words if word != self.arguments[0]] + last
            if kept:
                out.append(part if len(kept) == len(words) + len(last) else ".".join(kept))
        return tuple(out)


class AddWrapper(_Renaming):
    """A component is put behind the paths of modules."""

    __slots__ = ("_modules",)
    name = "add_wrapper"

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._modules = frozenset(arguments[1:])

    def renamed(self, key: str) -> str:
        """The key with the component in all its places."""
        if not key:
            return key
        words: list[str] = []
        for count, word in self._counted(key.split(".")):
            words += [self.arguments[0]] * count + [word]
        return ".".join(words)

    def inverse(self) -> Rule:
        """``strip_wrapper``; right where no key has had such a component before."""
        return StripWrapper(self.arguments[0])

    def _counted(self, words: Sequence[str]) -> Iterator[tuple[int, str]]:
        """The words of a key, each with how often the component comes before it."""
        here = ""
        for word in words:
            count = 0
            while here in self._modules:
                here, count = _joined(here, self.arguments[0]), count + 1
            yield count, word
            here = _joined(here, word)

    def moved(self, path: Path, tree: Tree) -> Path:
        """The path with the component in all its places: inside flat keys, else as a container of its own."""
        if not dotted(path):
            return path
        counted = self._counted([word for part in path for word in str(part).split(".")])
        out: list[str | int] = []
        for at, part in enumerate(path):
            words: list[str] = []
            for word in str(part).split("."):
                wrappers = [self.arguments[0]] * next(counted)[0]
                if words or (isinstance(part, str) and path[:at] in tree.flat):
                    words += wrappers
                else:
                    out += wrappers
                words.append(word)
            name = ".".join(words)
            out.append(part if name == str(part) else name)
        return tuple(out)


def _joined(here: str, word: str) -> str:
    return f"{here}.{word}" if here else word


def _matches_nothing(rule: Rule, typed: str, names: Sequence[str]) -> RuleError:
    """The error of a rule that concerns no key, with what may have been meant."""
    length = typed.rstrip(".").count(".") + 1
    if rule.name in ("keep", "drop"):
        known, words = list(names), "There are"
    else:
        known, words = list(dict.fromkeys(_beginnings(names, length))), "Keys begin with"
    guesses = near(typed, known)
    if guesses:
        hint = f"Did you mean {', '.join(one_line(repr(guess)) for guess in guesses)}"
    else:
        hint = (
            f"{words} {', '.join(one_line(repr(name)) for name in known[:_LISTED])}" if known else "There are no keys"
        )
    return RuleError(f"{one_line(rule)} matches nothing", hint=hint)


def _beginnings(names: Iterable[str], length: int) -> Iterator[str]:
    """The first so many components of each key, with their dot; the key itself where it has fewer."""
    for name in names:
        words = name.split(".", length)
        yield ".".join(words[:length]) + "." if len(words) > length else name


def _refuse_collisions(rule: Rule, leaves: Sequence[Moved]) -> None:
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
