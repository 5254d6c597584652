"""The rules that give keys other names and leave none out; ``rename``: by template, by regular expression, or by pairs of keys."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from statedict.errors import RuleError, one_line
from statedict.keys import Path, dotted
from statedict.rules.drafts import Draft
from statedict.rules.patterns import Pattern, is_template
from statedict.rules.regrowing import INSIDE, Moved, Tree, grown, placed
from statedict.rules.rule import NoMatch, Rule, Step, matches_nothing, refuse_collisions

__all__ = ["Rename", "Renaming"]

# Seconds that a regular expression may take for one key, and for all: those that people mean take microseconds for one.
_MOST_SECONDS = 1.0
_MOST_SECONDS_IN_ALL = 20.0


class Renaming(Rule):
    """The rules that give keys other names and leave none out."""

    __slots__ = ()

    def moved(self, path: Path, tree: Tree) -> Path:
        """The path that a leaf gets; its dotted form is what ``renamed`` says."""
        raise NotImplementedError

    def applied(self, draft: Draft) -> Step:
        """The tree with the new names."""
        tree = Tree(draft.root)
        leaves = [Moved(path, self.moved(path, tree), leaf) for path, leaf in tree.leaves]
        changed = [leaf for leaf in leaves if leaf.old != leaf.new]
        if not changed:
            raise self._unmatched([dotted(path) for path, _ in tree.leaves])
        refuse_collisions(self, leaves)
        root = grown(tree, leaves, lambda path: self.moved(path, tree))
        touched = frozenset([leaf.new for leaf in changed])
        return Step(root, len(changed), touched, inverse=self._undone(leaves, changed))

    def _unmatched(self, names: Sequence[str]) -> NoMatch:
        return matches_nothing(self, str(self.arguments[-1]), names, whole=False)

    def _undone(self, leaves: Sequence[Moved], changed: Sequence[Moved]) -> tuple[Rule, ...]:
        """The rule that undoes this one if it gives back every key, else the pairs of keys themselves."""
        back = self.inverse()
        if back is not None and all(back.renamed(dotted(leaf.new)) == dotted(leaf.old) for leaf in leaves):
            return (back,)
        return (Rename({dotted(leaf.new): dotted(leaf.old) for leaf in changed}),)


class Rename(Renaming):
    """New names. The arguments are a pattern and what takes its place, or one mapping of old keys to new ones."""

    __slots__ = ("_modules", "_pattern", "_regex", "_result", "_spent")
    name = "rename"
    fields = ("pattern", "replacement")

    def __init__(self, *arguments: Any, is_optional: bool = False) -> None:
        super().__init__(*arguments, is_optional=is_optional)
        self._pattern: Pattern | None = None
        self._result: Pattern | None = None
        self._regex: Any = None
        self._spent = 0.0
        self._modules: Mapping[str, str] = {}
        if len(arguments) == 1:
            return
        pattern, replacement = arguments
        if is_template(pattern):
            self._pattern, self._result = Pattern(pattern), Pattern(replacement)
            self._pattern.match("")
            self._result.check_names(self._pattern.names)
        else:
            self._regex = _compiled(pattern, replacement)

    @property
    def _pairs(self) -> Mapping[str, str] | None:
        return self.arguments[0] if len(self.arguments) == 1 else None

    def __hash__(self) -> int:
        return hash(str(self))

    def to_dict(self) -> dict[str, object]:
        """With ``pairs`` where the keys themselves are named."""
        made = super().to_dict()
        if self._pairs is not None:
            made.pop("pattern")
            made["pairs"] = dict(self._pairs)
        return made

    def renamed(self, key: str) -> str:
        """The new name."""
        if self._pairs is not None:
            return self._pairs.get(key, key)
        if self._pattern is not None and self._result is not None:
            values = self._pattern.match(key)
            return key if values is None else self._result.fill(values)
        return self._replaced(key)

    def _replaced(self, key: str) -> str:
        from regex import error as RegexError

        start = time.monotonic()
        try:
            most = min(_MOST_SECONDS, max(0.001, _MOST_SECONDS_IN_ALL - self._spent))
            made: str = self._regex.sub(self.arguments[1], key, timeout=most)
        except TimeoutError as error:
            hint = "Write it without repetitions inside repetitions, or as a template: rename('a.{n}.b', 'c.{n}.b')"
            raise RuleError(
                f"{one_line(self)} takes too long: more than {most:g} s for one key", key=key, hint=hint
            ) from error
        except (RegexError, IndexError, ValueError) as error:
            raise RuleError(f"{one_line(self)} can't be carried out: {one_line(error)}", key=key) from error
        self._spent += time.monotonic() - start
        if not made and key:
            raise RuleError(
                f"{one_line(self)} leaves nothing of a key", key=key, hint="Drop it with drop(), if that is meant"
            )
        return made

    def inverse(self) -> Rule | None:
        """The pairs the other way round, or the template, where each name only has a number added; else None."""
        if self._pairs is not None:
            turned = {new: old for old, new in self._pairs.items()}
            return Rename(turned) if len(turned) == len(self._pairs) else None
        if self._pattern is None or self._result is None:
            return None
        shifts = self._result.shifted()
        if shifts is None or set(shifts) != set(self._pattern.names) or self._pattern.shifted() is None:
            return None
        return Rename(self._result.with_shifts(shifts, sign=0), self._pattern.with_shifts(shifts, sign=-1))

    def moved(self, path: Path, tree: Tree) -> Path:
        """Where the leaf goes, in containers as those that it stood in; a container goes where all of its leaves go."""
        key = dotted(path)
        known = self._modules.get(key)
        return placed(path, self.renamed(key) if known is None else known, tree)

    def applied(self, draft: Draft) -> Step:
        """The tree with the new names, and with the facts of ``_metadata`` under the names of the modules that moved."""
        tree = Tree(draft.root)
        absent = set(self._pairs or ()) - {dotted(path) for path, _ in tree.leaves}
        if absent and not self.is_optional:
            names = [dotted(path) for path, _ in tree.leaves]
            raise matches_nothing(Rename({old: self.arguments[0][old] for old in sorted(absent)}), min(absent), names)
        following = Rename(*self.arguments, is_optional=self.is_optional)
        following._modules = self._moved_modules(tree)
        return super(Rename, following).applied(draft)

    def _unmatched(self, names: Sequence[str]) -> NoMatch:
        return matches_nothing(self, str(self.arguments[0]), names)

    def _moved_modules(self, tree: Tree) -> dict[str, str]:
        """Modules all of whose leaves go to one other module under their own last names: key inside → key inside."""
        homes: dict[str, set[str | None]] = {}
        for path, _ in tree.leaves:
            old = dotted(path)
            module, _, last = old.rpartition(".")
            new_module, _, new_last = self.renamed(old).rpartition(".")
            homes.setdefault(module, set()).add(new_module if last == new_last else None)
        moved: dict[str, str] = {}
        for module, found in homes.items():
            [target, *others] = found
            if module and target and not others:
                moved[f"{module}.{INSIDE}"] = f"{target}.{INSIDE}"
        return moved


def _compiled(pattern: str, replacement: str) -> Any:
    # Unlike Python's own module, this one can be given a time; what people write for the one means the same in the other.
    import regex

    try:
        made = regex.compile(pattern)
        made.sub(replacement, "", timeout=_MOST_SECONDS)
    except (regex.error, IndexError, ValueError, TimeoutError, RecursionError) as error:
        hint = "A dot in a name is written \\. there; braces with a name make a template: rename('a.{n}', 'b.{n}')"
        raise RuleError(
            f"this is no regular expression: {one_line(error)}", found=one_line(pattern), hint=hint
        ) from error
    return made
