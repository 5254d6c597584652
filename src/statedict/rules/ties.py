"""``tie`` and ``untie``: whether two keys are one tensor."""

from __future__ import annotations

from typing import TYPE_CHECKING

from statedict.errors import RuleError, one_line
from statedict.io.ranges import BLOCK_NBYTES, blocks
from statedict.keys import dotted
from statedict.manifest import TensorEntry
from statedict.rules.drafts import Draft, identity_of
from statedict.rules.kinds import Drop
from statedict.rules.patterns import listed
from statedict.rules.regrowing import Moved, Tree, grown, placed
from statedict.rules.rule import Rule, Step, matches_nothing

if TYPE_CHECKING:
    from statedict.recipes.derived import Recipe

__all__ = ["Tie", "Untie"]


class Tie(Rule):
    """A key becomes another name of the tensor under a second key. One that is there already must hold the same values."""

    __slots__ = ()
    name = "tie"
    fields = ("key", "to")

    def applied(self, draft: Draft) -> Step:
        """The tree with one entry more, or with one that has another storage. Reads both where they are two."""
        key, to = self.arguments
        tree = Tree(draft.root)
        found = {dotted(path): (path, leaf) for path, leaf in tree.leaves if isinstance(leaf, TensorEntry)}
        if to not in found:
            raise matches_nothing(self, to, list(found))
        home, entry = found[to]
        if key not in found:
            new = placed(home, key, tree)
            leaves = [Moved(path, path, leaf) for path, leaf in tree.leaves] + [Moved(home, new, entry)]
            touched = frozenset([home, new])
            return Step(grown(tree, leaves), 1, touched, created=(key,), inverse=(Drop(_literal(key)),))
        path, old = found[key]
        self._check(old, entry, draft)
        leaves = [Moved(at, at, _tied(old, entry) if at == path else leaf) for at, leaf in tree.leaves]
        was_tied = identity_of(old) == identity_of(entry)
        return Step(grown(tree, leaves), 1, frozenset([path, home]), inverse=() if was_tied else (Untie(key),))

    def _check(self, old: TensorEntry, entry: TensorEntry, draft: Draft) -> None:
        from statedict.recipes.derived import Packed

        if (old.dtype, old.shape) != (entry.dtype, entry.shape):
            shown = [f"{each.dtype} {list(each.shape)}" for each in (entry, old)]
            raise RuleError(
                f"{one_line(self)}: they can't be one tensor", key=old.key, expected=shown[0], found=shown[1]
            )
        if identity_of(old) == identity_of(entry):
            return
        one, two = Packed(draft.lazy(old)), Packed(draft.lazy(entry))
        pairs = (
            (_bytes(one, start, count), _bytes(two, start, count))
            for start, count in blocks(0, old.nbytes, BLOCK_NBYTES)
        )
        if any(mine != its for mine, its in pairs):
            hint = f"Drop the one that isn't meant first: drop({old.key!r})"
            raise RuleError(f"{one_line(self)}: their values differ", key=old.key, hint=hint)


def _bytes(source: Recipe, start: int, count: int) -> bytearray:
    buffer = bytearray(count)
    source.read_into(start, memoryview(buffer))
    return buffer


def _tied(old: TensorEntry, entry: TensorEntry) -> TensorEntry:
    return old._replace(view=entry.view, digest=entry.digest, memory_stride=entry.memory_stride)


def _literal(key: str) -> str:
    """A glob that matches this key alone."""
    return "".join([f"[{letter}]" if letter in "*?[" else letter for letter in key])


class Untie(Rule):
    """A key gets a tensor of its own, with the values that it had."""

    __slots__ = ()
    name = "untie"
    fields = ("key",)

    def applied(self, draft: Draft) -> Step:
        """The tree with a storage more."""
        [key] = self.arguments
        tree = Tree(draft.root)
        tensors = {dotted(path): (path, leaf) for path, leaf in tree.leaves if isinstance(leaf, TensorEntry)}
        if key not in tensors:
            raise matches_nothing(self, key, list(tensors))
        path, entry = tensors[key]
        others = [
            name for name, (_, leaf) in tensors.items() if name != key and identity_of(leaf) == identity_of(entry)
        ]
        if not others:
            raise matches_nothing(self, key, [])
        leaves = [Moved(at, at, draft.untied(entry) if at == path else leaf) for at, leaf in tree.leaves]
        note = f"'{one_line(key)}' was tied with {listed(others)}"
        return Step(grown(tree, leaves), 1, frozenset([path]), notes=(note,), inverse=(Tie(key, others[0]),))
