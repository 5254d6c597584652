"""Two checkpoints side by side: which keys both have, and what differs under each."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

from statedict.checkpoint import Checkpoint
from statedict.checkpoint import open as open_checkpoint
from statedict.errors import StateDictError
from statedict.keys import Path, display, matches
from statedict.limits import Limits
from statedict.manifest import Container, Finding, Node, ObjectEntry, TensorEntry, tied_groups
from statedict.nodes import components
from statedict.ops.comparison import WITHIN, Change, Comparison
from statedict.ops.findings import named
from statedict.ops.tensor_pairs import Outcome, Side, TensorPair, described
from statedict.ops.value_pairs import are_equal, described_pair
from statedict.ops.values import brief
from statedict.report.units import plural

if TYPE_CHECKING:
    from statedict.numerics.differences import Rule
    from statedict.rules import RulesLike

__all__ = ["compare"]

# Keys of a group of tied tensors that a record names.
_MOST_TIED = 32

_UNSEEN = "no values to compare"


def compare(
    a: object,
    b: object,
    *,
    rtol: float | None = None,
    atol: float | None = None,
    equal_nan: bool = True,
    rules: RulesLike = (),
    ignore: str | Iterable[str] = (),
    limits: Limits | None = None,
) -> Comparison:
    """What differs between two checkpoints, whatever each is: a path, a ``Checkpoint``, a mapping of tensors, or a module.

    Equal means the same keys, shapes, dtypes, values and ties. -0 equals 0, and NaN equals NaN at the same place unless ``equal_nan``
    is False. Strides, devices, ``requires_grad`` and which container holds the keys don't matter. With ``rtol`` or ``atol``, numbers are
    equal where ``|a - b| <= atol + rtol * |b|`` (the one not given is 0); values that are no tensors are compared exactly.

    Of each tensor shape and dtype are compared, then bytes, and numbers only where bytes differ. Nothing is read where both show
    the same memory, or both files record the same digest. A tensor without values (of the meta device) equals another such
    of its shape and dtype, and differs from one with values: a record of kind ``value`` without numbers.

    ``rules`` are applied to ``a`` first. ``ignore`` are globs; keys that one of them matches as a whole are left out. Memory stays
    bounded. Raises what ``open``, reading and the rules raise.
    """
    from statedict.numerics.differences import Rule

    rule = Rule(_tolerance("rtol", rtol), _tolerance("atol", atol), equal_nan)
    with ExitStack() as stack:
        one, two = (_opened(source, limits, stack) for source in (a, b))
        if rules != ():
            from statedict.rules import apply

            one = apply(one, rules)
        globs = (ignore,) if isinstance(ignore, str) else tuple(ignore)
        return _Comparing(_Contents(one, globs), _Contents(two, globs), rule).result()


def _tolerance(name: str, value: float | None) -> float:
    if value is None:
        return 0.0
    if not isinstance(value, (int, float)) or not value >= 0:
        raise StateDictError(f"{name} is no tolerance", expected="a number of at least 0", found=value)
    return float(value)


def _opened(source: object, limits: Limits | None, stack: ExitStack) -> Checkpoint:
    """The checkpoint, closed with the stack unless it was passed in: then its owner closes it."""
    checkpoint = open_checkpoint(source, limits=limits)
    if not isinstance(source, Checkpoint):
        stack.callback(checkpoint.close)
    return checkpoint


class _Contents:
    """One checkpoint by key: its leaves, the classes of its records, and its ties."""

    def __init__(self, checkpoint: Checkpoint, globs: Sequence[str]) -> None:
        manifest = checkpoint.manifest
        leaves: dict[Path, TensorEntry | ObjectEntry] = {**manifest.tensors, **manifest.objects}
        shown = display(leaves)
        self.checkpoint = checkpoint
        self.ignored = sum(_is_ignored(key, globs) for key in shown)
        self.leaves = {key: leaves[path] for key, path in shown.items() if not _is_ignored(key, globs)}
        classes = _classes(manifest.structure)
        self.classes = {key: classes[path] for key, path in display(classes).items() if not _is_ignored(key, globs)}

    def rename(self, old: str, new: str) -> None:
        """Show a leaf under another key."""
        self.leaves[new] = self.leaves.pop(old)

    def side(self, entry: TensorEntry) -> Side:
        """A tensor of this checkpoint, to be compared."""
        return Side(entry, self.checkpoint)

    def ties(self, common: Iterable[str]) -> dict[str, frozenset[str]]:
        """The whole group of each of those keys that is tied with others of them."""
        keys = {entry.path: key for key in common if isinstance(entry := self.leaves[key], TensorEntry)}
        tied: dict[str, frozenset[str]] = {}
        for paths in tied_groups({path: self.checkpoint.manifest.tensors[path] for path in keys}):
            group = frozenset([keys[path] for path in paths])
            tied.update(dict.fromkeys(group, group))
        return tied


def _is_ignored(key: str, globs: Sequence[str]) -> bool:
    return any(matches(key, glob) for glob in globs)


def _classes(root: Node) -> dict[Path, str]:
    """The class of each record of an object whose content has keys of its own."""
    found: dict[Path, str] = {}
    pending: list[tuple[Path, Node]] = [((), root)]
    while pending:
        path, node = pending.pop()
        if isinstance(node, Container):
            if node.kind == "opaque":
                found[path] = node.type
            parts = components(node.keys)
            pending.extend([(*path, part), child] for part, child in zip(parts, node.children))  # type: ignore[misc]
    return found


class _Comparing:
    """One comparison on its way."""

    def __init__(self, a: _Contents, b: _Contents, rule: Rule) -> None:
        self._a, self._b, self._rule = a, b, rule
        self._changed: dict[str, Change] = {}
        self._unseen: list[str] = []
        self._verdicts = {"identical": 0, "equal": 0, WITHIN: 0, _UNSEEN: 0}
        self._tensors = self._objects = 0

    def result(self) -> Comparison:
        """Everything that differs."""
        a, b = self._a, self._b
        self._match_by_path()
        common = [key for key in a.leaves if key in b.leaves]
        for key in common:
            self._leaf(key, a.leaves[key], b.leaves[key])
        for key, name in a.classes.items():
            if b.classes.get(key, name) != name:
                self._changed[key] = Change(key, "object", "another class", name, b.classes[key])
        self._ties(common)
        only = [key for key in a.leaves if key not in b.leaves], [key for key in b.leaves if key not in a.leaves]
        sources = a.checkpoint.source, b.checkpoint.source
        return Comparison(sources, list(self._changed.values()), only, self._counts(only), self._findings())

    def _match_by_path(self) -> None:
        """Pair leaves of one path that are shown under two keys, as where only one side has another path that reads alike."""
        alone = {self._b.leaves[key].path: key for key in self._b.leaves if key not in self._a.leaves}
        for key in [key for key in self._a.leaves if key not in self._b.leaves]:
            other = alone.get(self._a.leaves[key].path)
            if other is not None:
                self._b.rename(other, key)

    def _leaf(self, key: str, a: TensorEntry | ObjectEntry, b: TensorEntry | ObjectEntry) -> None:
        if isinstance(a, TensorEntry) and isinstance(b, TensorEntry):
            self._tensors += 1
            self._tensor(key, a, b)
        elif isinstance(a, ObjectEntry) and isinstance(b, ObjectEntry):
            self._objects += 1
            if not self._is_equal(a.value, b.value):
                verdict = "changed" if a.kind == b.kind else "another type"
                self._changed[key] = Change(key, "object", verdict, *described_pair(a.value, b.value))
        else:
            self._objects += 1
            one, two = (described(leaf) if isinstance(leaf, TensorEntry) else brief(leaf.value) for leaf in (a, b))
            self._changed[key] = Change(key, "object", "a tensor in one only", one, two)

    def _tensor(self, key: str, a: TensorEntry, b: TensorEntry) -> None:
        found = self._outcome(a, b)
        if found.verdict in self._verdicts and found.kind in ("", "value"):
            self._verdicts[found.verdict] += 1
        if found.verdict.startswith("no values"):
            self._unseen.append(key)
        if found.kind:
            self._changed[key] = _change(key, found, a, b)

    def _outcome(self, a: TensorEntry, b: TensorEntry) -> Outcome:
        return TensorPair(self._a.side(a), self._b.side(b), self._rule, self._is_equal).outcome()

    def _is_equal(self, a: object, b: object) -> bool:
        return are_equal(a, b, self._is_same_tensor, equal_nan=self._rule.equal_nan)

    def _is_same_tensor(self, a: TensorEntry, b: TensorEntry) -> bool:
        return not self._outcome(a, b).kind

    def _ties(self, common: Sequence[str]) -> None:
        """A record for each key that is tied with other keys here than there, if it has none yet."""
        one, two = self._a.ties(common), self._b.ties(common)
        numbers: dict[frozenset[str], int] = {}
        for groups in (one, two):
            for group in groups.values():
                numbers.setdefault(group, len(numbers))
        for key in common:
            here, there = one.get(key, frozenset()), two.get(key, frozenset())
            if here is there or numbers.get(here) == numbers.get(there) or key in self._changed:
                continue
            if _has_memory(self._a.leaves[key]) and _has_memory(self._b.leaves[key]):
                verdict = "tied otherwise" if here and there else f"tied in {'a' if here else 'b'} only"
                self._changed[key] = Change(key, "aliasing", verdict, _others(here, key), _others(there, key))

    def _counts(self, only: tuple[Sequence[str], Sequence[str]]) -> dict[str, int]:
        kinds = [change.kind for change in self._changed.values() if not change.is_equal]
        counts = {"tensors": self._tensors, "objects": self._objects, "identical": self._verdicts["identical"]}
        counts |= {"equal": self._verdicts["equal"], "within_tolerance": self._verdicts[WITHIN]}
        counts["without_values"] = self._verdicts[_UNSEEN]
        counts |= {kind: kinds.count(kind) for kind in ("shape", "dtype", "value", "object", "aliasing")}
        counts |= {"only_in_a": len(only[0]), "only_in_b": len(only[1]), "renamed": 0}
        return {**counts, "ignored": self._a.ignored + self._b.ignored}

    def _findings(self) -> list[Finding]:
        keys = tuple(self._unseen)
        if not keys:
            return []
        text = f"the values of {plural(len(keys), 'tensor')} were not compared, one or both have none: {named(keys)}"
        return [Finding("no-values", "info", text, keys)]


def _change(key: str, found: Outcome, a: TensorEntry, b: TensorEntry) -> Change:
    shown: tuple[object, object] = described(a), described(b)
    if found.kind == "shape":
        shown = list(a.shape), list(b.shape)
    elif found.kind == "dtype":
        shown = _typed(a), _typed(b)
    numbers = found.difference
    if numbers is None:
        # Nothing says that any of them is equal.
        unknown = (a.numel, a.numel) if found.kind == "value" else (None, None)
        return Change(key, found.kind, found.verdict, *shown, *unknown)
    return Change(
        key,
        found.kind,
        found.verdict,
        *shown,
        numel=numbers.numel,
        mismatched=numbers.mismatched,
        max_abs=numbers.max_abs,
        max_rel=numbers.max_rel,
        cosine=numbers.cosine,
        first=found.first,
    )


def _typed(entry: TensorEntry) -> str:
    return str(entry.dtype) if entry.layout == "strided" else f"{entry.dtype}, {entry.layout}"


def _has_memory(leaf: TensorEntry | ObjectEntry) -> bool:
    return isinstance(leaf, TensorEntry) and leaf.view is not None


def _others(group: Iterable[str], key: str) -> list[str]:
    """The other keys of a group, the first few of a very large one."""
    return sorted(other for other in group if other != key)[:_MOST_TIED]
