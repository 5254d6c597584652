"""Two checkpoints side by side: which keys both have, and what differs under each."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

from statedict.checkpoint import Checkpoint
from statedict.checkpoint import open as open_checkpoint
from statedict.collecting import uncollected
from statedict.errors import StateDictError
from statedict.limits import Limits
from statedict.manifest import Finding, ObjectEntry, TensorEntry
from statedict.numerics.tolerances import Tolerances
from statedict.ops.comparing.changes import Change, Found
from statedict.ops.comparing.comparison import Comparison
from statedict.ops.comparing.evidence import Evidence
from statedict.ops.comparing.fingerprints import fingerprints
from statedict.ops.comparing.keyed import Keyed
from statedict.ops.comparing.renames import renames_of
from statedict.ops.comparing.scans import Progress, pairs_with_same_bytes
from statedict.ops.comparing.tensor_pairs import WITHIN, Outcome, TensorPair, described
from statedict.ops.comparing.training_changes import training_changes
from statedict.ops.comparing.value_pairs import are_equal, described_pair
from statedict.ops.comparing.walks import Room, Side
from statedict.ops.findings import named
from statedict.ops.values import brief
from statedict.report.units import plural

if TYPE_CHECKING:
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
    ulp: int | None = None,
    close: bool = False,
    renames: bool = True,
    limits: Limits | None = None,
    on_progress: Progress | None = None,
) -> Comparison:
    """What differs between two checkpoints, whatever each is: a path, a ``Checkpoint``, a mapping of tensors, or a module.

    Equal means the same keys, shapes, dtypes, values and ties. -0 equals 0, and NaN equals NaN at the same place unless ``equal_nan``
    is False. Strides, devices, ``requires_grad`` and which container holds the keys don't matter. With ``rtol`` or ``atol``, numbers are
    equal where ``|a - b| <= atol + rtol * |b|`` (the one not given is 0), with ``ulp`` also floats of one dtype that are at most so many
    representable numbers apart; ``close`` takes the rtol and atol of ``torch.testing.assert_close`` for each dtype where none is given.
    Values that are no tensors are compared exactly.

    Of each tensor shape and dtype are compared, then bytes, and numbers only where bytes differ. Nothing is read where both show
    the same memory, or both files record the same digest. A tensor without values (of the meta device) equals another such
    of its shape and dtype, and differs from one with values: a record of kind ``value`` without numbers.

    Tensors that only one side has are searched for on the other, by their content (not with ``renames=False``): under another name,
    transposed, split, fused or stacked. ``rules`` are applied to ``a`` first. ``ignore`` are globs; keys that one of them matches as a
    whole are left out. Memory stays bounded. Raises what ``open``, reading and the rules raise.
    """
    tolerances = Tolerances(_tolerance("rtol", rtol), _tolerance("atol", atol), equal_nan, _ulp(ulp), close)
    with ExitStack() as stack:
        one, two = (_opened(source, limits, stack) for source in (a, b))
        if rules != ():
            from statedict.rules import apply

            one = apply(one, rules)
        globs = (ignore,) if isinstance(ignore, str) else tuple(ignore)
        with uncollected():
            comparing = _Comparing(Keyed(one, globs), Keyed(two, globs), tolerances)
            return comparing.result(renames, on_progress)


def _tolerance(name: str, value: float | None) -> float | None:
    if value is None:
        return None
    if not isinstance(value, (int, float)) or not value >= 0:
        raise StateDictError(f"{name} is no tolerance", expected="a number of at least 0", found=value)
    return float(value)


def _ulp(value: int | None) -> int:
    if value is None:
        return 0
    if type(value) is not int or value < 0:
        raise StateDictError("ulp is no tolerance", expected="a whole number of at least 0", found=value)
    return min(value, 2**63)


def _opened(source: object, limits: Limits | None, stack: ExitStack) -> Checkpoint:
    """The checkpoint, closed with the stack unless it was passed in: then its owner closes it."""
    checkpoint = open_checkpoint(source, limits=limits)
    if not isinstance(source, Checkpoint):
        stack.callback(checkpoint.close)
    return checkpoint


class _Comparing:
    """One comparison on its way."""

    def __init__(self, a: Keyed, b: Keyed, tolerances: Tolerances) -> None:
        self._a, self._b, self._tolerances = a, b, tolerances
        self._room = Room()
        self._changed: dict[str, Change] = {}
        self._unseen: list[str] = []
        self._moved: list[str] = []  # equal, with other strides
        self._verdicts = {"identical": 0, "equal": 0, WITHIN: 0, _UNSEEN: 0}
        self._tensors = self._objects = self._digests = 0

    def result(self, renames: bool, on_progress: Progress | None) -> Comparison:
        """Everything that differs."""
        a, b = self._a, self._b
        self._match_by_path()
        common = [key for key in a.leaves if key in b.leaves]
        known = self._bytewise(common, on_progress)
        for key in common:
            self._leaf(key, a.leaves[key], b.leaves[key], known.get(key))
        for key, name in a.classes.items():
            if b.classes.get(key, name) != name:
                self._changed[key] = Change(key, "object", "another class", name, b.classes[key])
        self._ties(common)
        only = [key for key in a.leaves if key not in b.leaves], [key for key in b.leaves if key not in a.leaves]
        found = renames_of(a, b, only, {key for key in common if key not in self._changed}) if renames else None
        renamed = found.renamed if found is not None else []
        for side, keys in enumerate(only):
            taken = {key for rename in renamed for key in rename.keys(side)}
            keys[:] = [key for key in keys if key not in taken]
        changed = list(self._changed.values())
        evidence = Evidence(a, b, changed, only, renamed)
        findings = [*training_changes(evidence), *fingerprints(evidence), *self._findings()]
        findings += found.findings if found is not None else []
        sources = a.checkpoint.source, b.checkpoint.source
        counts = {**self._counts(only), "renamed": len(renamed)}
        return Comparison(
            sources, Found(changed, only, renamed, counts, (tuple(a.tensors), tuple(b.tensors)), tuple(findings))
        )

    def _bytewise(self, common: Sequence[str], on_progress: Progress | None) -> dict[str, bool]:
        """Whether the bytes are the same, of each key where that has to be read."""
        keys, pairs = [], []
        for key in common:
            one, two = self._a.leaves[key], self._b.leaves[key]
            if isinstance(one, TensorEntry) and isinstance(two, TensorEntry):
                a, b = self._a.side(key), self._b.side(key)
                if self._pair(a, b).is_told_by_bytes:
                    keys.append(key)
                    pairs.append((a, b))
        return dict(zip(keys, pairs_with_same_bytes(pairs, on_progress)))

    def _match_by_path(self) -> None:
        """Pair leaves of one path that are shown under two keys, as where only one side has another path that reads alike."""
        alone = {self._b.leaves[key].path: key for key in self._b.leaves if key not in self._a.leaves}
        for key in [key for key in self._a.leaves if key not in self._b.leaves]:
            other = alone.get(self._a.leaves[key].path)
            if other is not None:
                self._b.rename(other, key)

    def _leaf(
        self, key: str, a: TensorEntry | ObjectEntry, b: TensorEntry | ObjectEntry, has_same_bytes: bool | None
    ) -> None:
        if isinstance(a, TensorEntry) and isinstance(b, TensorEntry):
            self._tensors += 1
            self._tensor(key, a, b, has_same_bytes)
        elif isinstance(a, ObjectEntry) and isinstance(b, ObjectEntry):
            self._objects += 1
            if not self._is_equal(a.value, b.value):
                verdict = "changed" if a.kind == b.kind else "another type"
                self._changed[key] = Change(key, "object", verdict, *described_pair(a.value, b.value))
        else:
            self._objects += 1
            one, two = (described(leaf) if isinstance(leaf, TensorEntry) else brief(leaf.value) for leaf in (a, b))
            self._changed[key] = Change(key, "object", "a tensor in one only", one, two)

    def _tensor(self, key: str, a: TensorEntry, b: TensorEntry, has_same_bytes: bool | None) -> None:
        found = self._pair(self._a.side(key), self._b.side(key)).outcome(has_same_bytes=has_same_bytes)
        if found.verdict in self._verdicts and found.kind in ("", "value"):
            self._verdicts[found.verdict] += 1
        if found.verdict.startswith("no values"):
            self._unseen.append(key)
        self._digests += found.unread and a.digest is not None and a.digest == b.digest
        if found.kind:
            self._changed[key] = _change(key, found, a, b)
        elif a.stride != b.stride and max(a.shape, default=0) > 1 and a.numel:
            self._moved.append(key)

    def _pair(self, a: Side, b: Side) -> TensorPair:
        return TensorPair(a, b, self._tolerances, self._is_equal, self._room)

    def _is_equal(self, a: object, b: object) -> bool:
        return are_equal(a, b, self._is_same_tensor, equal_nan=self._tolerances.equal_nan)

    def _is_same_tensor(self, a: TensorEntry, b: TensorEntry) -> bool:
        return not self._pair(Side(a, self._a.checkpoint), Side(b, self._b.checkpoint)).outcome().kind

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
        counts |= {"by_digest": self._digests, "equal": self._verdicts["equal"]}
        counts |= {"within_tolerance": self._verdicts[WITHIN], "without_values": self._verdicts[_UNSEEN]}
        counts |= {"other_strides": len(self._moved)}
        counts |= {kind: kinds.count(kind) for kind in ("shape", "dtype", "value", "object", "aliasing")}
        counts |= {"only_in_a": len(only[0]), "only_in_b": len(only[1])}
        return {**counts, "ignored": self._a.ignored + self._b.ignored}

    def _findings(self) -> list[Finding]:
        found = []
        if self._digests:
            what = "was" if self._digests == 1 else "were"
            text = f"{plural(self._digests, 'tensor')} {what} not read: both files record the same digest of its bytes"
            found.append(Finding("same-digests", "info", text))
        if self._moved:
            keys = tuple(self._moved)
            text = f"the same values lie in another order in memory, in {plural(len(keys), 'tensor')}: {named(keys)}"
            found.append(Finding("other-strides", "info", text, keys))
        keys = tuple(self._unseen)
        if keys:
            text = (
                f"the values of {plural(len(keys), 'tensor')} were not compared, one or both have none: {named(keys)}"
            )
            found.append(Finding("no-values", "info", text, keys))
        return found


def _change(key: str, found: Outcome, a: TensorEntry, b: TensorEntry) -> Change:
    shown: tuple[object, object] = described(a), described(b)
    if found.kind == "shape":
        shown = list(a.shape), list(b.shape)
    elif found.kind == "dtype":
        shown = _typed(a), _typed(b)
    numbers = found.difference
    if numbers is None:
        # Nothing says that any of them is equal.
        numel = a.numel if found.kind == "value" else None
        return Change(key, found.kind, found.verdict, *shown, numel, numel)._replace(order=found.order)
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
        mean=numbers.mean,
        first=found.first,
        order=found.order,
    )


def _typed(entry: TensorEntry) -> str:
    return str(entry.dtype) if entry.layout == "strided" else f"{entry.dtype}, {entry.layout}"


def _has_memory(leaf: TensorEntry | ObjectEntry) -> bool:
    return isinstance(leaf, TensorEntry) and leaf.view is not None


def _others(group: Iterable[str], key: str) -> list[str]:
    """The other keys of a group, the first few of a very large one."""
    return sorted(other for other in group if other != key)[:_MOST_TIED]
