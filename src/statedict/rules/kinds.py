"""The rules that only change names, or leave keys out: what each does to a key, and to the path behind it.

Two methods say the same thing twice, and must: ``renamed`` of the dotted key, which is what people and reports see, and
``moved`` of the path, which decides the containers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

from statedict.errors import KeyNotFound
from statedict.keys import Path, dotted, matches, parse_escaped
from statedict.nodes import find, walk
from statedict.rules.drafts import Draft
from statedict.rules.regrowing import Moved, Tree, grown
from statedict.rules.renaming import Renaming
from statedict.rules.rule import NoMatch, Rule, Step, matches_nothing

__all__ = ["AddPrefix", "AddWrapper", "Drop", "Keep", "Select", "StripPrefix", "StripWrapper"]


class Select(Rule):
    """The part under a key, as ``Checkpoint.at`` has it."""

    __slots__ = ()
    name = "select"
    fields = ("key",)
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

    def applied(self, draft: Draft) -> Step:
        """The node of the part."""
        try:
            root = find(draft.root, self.arguments[0])
        except KeyNotFound as error:
            raise NoMatch(f"{self} matches nothing", hint=error.hint) from None
        left = frozenset([path for path, _ in walk(root)])
        dropped = [key for path, _ in walk(draft.root) if self.renamed(key := dotted(path)) is None]
        return Step(root, len(left), left, tuple(dropped), inverse=None if dropped else self._inverse())

    def _inverse(self) -> tuple[Rule, ...]:
        key = self.arguments[0]
        return (AddPrefix(f"{key if isinstance(key, str) else dotted(key)}."),)


class _Filter(Rule):
    """Only some keys are left, in the containers that they stood in."""

    __slots__ = ()
    fields = ("glob",)
    lossless = False

    keeps: ClassVar[bool]  # what the glob matches, or what it doesn't

    def renamed(self, key: str) -> str | None:
        """The key, if it is left."""
        return key if matches(key, self.arguments[0]) == self.keeps else None

    def applied(self, draft: Draft) -> Step:
        """The tree with the keys that are left."""
        tree = Tree(draft.root)
        names = [dotted(path) for path, _ in tree.leaves]
        left = [self.renamed(name) is not None for name in names]
        matched = left.count(self.keeps)
        if not matched:
            raise matches_nothing(self, self.arguments[0], names)
        moved = [Moved(path, path, leaf) for (path, leaf), is_left in zip(tree.leaves, left) if is_left]
        dropped = tuple([name for name, is_left in zip(names, left) if not is_left])
        touched = frozenset([leaf.new for leaf in moved]) if self.keeps else frozenset()
        return Step(grown(tree, moved), matched, touched, dropped, inverse=None if dropped else ())


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


class StripPrefix(Renaming):
    """What begins with the prefix loses it."""

    __slots__ = ()
    name = "strip_prefix"
    fields = ("prefix",)

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


class AddPrefix(Renaming):
    """Every key gets the prefix."""

    __slots__ = ()
    name = "add_prefix"
    fields = ("prefix",)

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


class StripWrapper(Renaming):
    """A component is taken out wherever it stands, but not where it is the last one, which names a tensor."""

    __slots__ = ()
    name = "strip_wrapper"
    fields = ("word",)

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


class AddWrapper(Renaming):
    """A component is put behind the paths of modules."""

    __slots__ = ("_modules",)
    name = "add_wrapper"
    fields = ("word", "modules")

    def __init__(self, *arguments: Any, is_optional: bool = False) -> None:
        super().__init__(*arguments, is_optional=is_optional)
        self._modules = frozenset(arguments[1:])

    def to_dict(self) -> dict[str, object]:
        """With the modules as a list."""
        made = super().to_dict()
        return {**made, "modules": list(self.arguments[1:])}

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
