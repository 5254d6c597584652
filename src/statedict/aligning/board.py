"""What has been found so far: who makes whom, and what is still open on both sides."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from statedict.aligning.alignment import CORROBORATED, PROVEN, Mapped, Side
from statedict.aligning.families import Family
from statedict.aligning.lists import Forest, Path
from statedict.aligning.recognising import is_resizable
from statedict.aligning.shapes import SAME, View

__all__ = ["Board", "Links"]


class Board:
    """The state of an alignment.

    Attributes:
        source, target: the two sides.
        open_source, open_target: keys that no claim concerns, in the side's order.
        claims: by key of the target.
        doubts: what can be said of keys that no claim is made for.
        links: how many claims lie between a module (or part of a name) of the source and one of the target.
    """

    def __init__(self, source: Side, target: Side) -> None:
        self.source, self.target = source, target
        self.open_source = dict.fromkeys(source.tensors)
        self.open_target = dict.fromkeys(target.tensors)
        self.claims: dict[str, Mapped] = {}
        self.doubts: dict[str, Mapped] = {}

    def claim(self, mapped: Mapped) -> None:
        """Takes a claim; its keys are no longer open. A source that is used in parts is closed with its first part."""
        self.claims[mapped.target] = mapped
        self.open_target.pop(mapped.target, None)
        self.doubts.pop(mapped.target, None)
        for key in mapped.sources:
            self.open_source.pop(key, None)

    def pair(
        self, source: Family, target: Family, view: View, reasons: Sequence[str], tier: str = CORROBORATED
    ) -> None:
        """Claims that each tensor of a family is, seen so, that of the other at the same place."""
        for old, new in zip(source.keys, target.keys):
            tier = PROVEN if old == new and view is SAME else tier
            self.claim(Mapped(new, view.op, (old,), tier, tuple(reasons), view.args))

    def leave(self, mapped: Mapped, *alternatives: tuple[str, ...]) -> None:
        """Closes a tensor without a claim, and the sources that could have made it."""
        self.doubts[mapped.target] = mapped._replace(alternatives=alternatives)
        self.open_target.pop(mapped.target, None)
        for key in (*mapped.sources, *(key for keys in alternatives for key in keys)):
            self.open_source.pop(key, None)

    def turns(self) -> tuple[bool, bool]:
        """Whether matrices that aren't square were claimed as they are, and whether some were claimed transposed.

        Tables and what stands outside all blocks don't count: they say nothing of the matrices inside.
        """
        ops = set()
        for key, mapped in self.claims.items():
            shape = self.target.tensors[key].shape
            if (
                len(shape) == 2
                and shape[0] != shape[1]
                and any(map(str.isdigit, key.split(".")))
                and not is_resizable(key)
            ):
                ops.add(mapped.op)
        return "copy" in ops, "transpose" in ops

    def links(self, sources: Forest, targets: Forest) -> Links:
        """What the claims say about which parts of the names belong together."""
        whole = Counter((sources.paths[mapped.sources[0]], targets.paths[key]) for key, mapped in self.claims.items())
        pairs: Counter[tuple[Path, Path]] = Counter()
        for (old, new), count in whole.items():
            for i in range(1, len(old) + 1):
                for j in range(1, len(new) + 1):
                    if abs((len(old) - i) - (len(new) - j)) < 3:
                        pairs[old[:i], new[:j]] += count
        return Links(pairs)


class Links:
    """How often a part of the source's names goes with a part of the target's."""

    def __init__(self, pairs: Mapping[tuple[Path, Path], int]) -> None:
        self.pairs = pairs
        self.of_source: Counter[Path] = Counter()
        self.of_target: Counter[Path] = Counter()
        for (old, new), count in pairs.items():
            self.of_source[old] += count
            self.of_target[new] += count

    def parts(self, old: Path, new: Path) -> bool:
        """Whether the tensors of one of two modules go to others: a module stays together."""
        return bool((self.of_source[old] or self.of_target[new]) and not self.pairs.get((old, new)))

    def vote(self, old: Path, new: Path) -> float:
        """1 where claims go from the one to the other, -0.5 where both go elsewhere only, 0 where nothing is known."""
        if not old or not new:
            return 0.0
        if self.pairs.get((old, new)):
            return 1.0
        return -0.5 if self.of_source[old] and self.of_target[new] else 0.0
