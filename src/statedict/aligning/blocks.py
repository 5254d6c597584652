"""Which stack of blocks of the source is which of the target: by what is in them, then by their names."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from statedict.aligning.assignment import assign
from statedict.aligning.board import Board
from statedict.aligning.families import Family, Signature, units
from statedict.aligning.lists import Forest, Path
from statedict.aligning.naming import meaning
from statedict.aligning.opposites import opposed

__all__ = ["Pairing", "balanced", "chain", "pair_blocks"]


# Of equal tensors (twice their share) and claims (thrice) that two stacks must have in common.
_LEAST = 0.4


class Pairing(NamedTuple):
    """Stacks of blocks that belong together, in both directions."""

    forth: Mapping[Path, Path]
    back: Mapping[Path, Path]

    def allows(self, old: tuple[Path, ...], new: tuple[Path, ...]) -> bool:
        """Whether something in the blocks ``old`` of the source can be something in the blocks ``new`` of the target."""
        mine = next((path for path in reversed(old) if path in self.forth), None)
        theirs = next((path for path in reversed(new) if path in self.back), None)
        return not mine or not theirs or (self.forth[mine] in new and self.back[theirs] in old)

    def joins(self, old: tuple[Path, ...], new: tuple[Path, ...]) -> bool:
        """Whether the innermost blocks of both belong together."""
        return bool(old and new) and self.forth.get(old[-1]) == new[-1]


def balanced(board: Board, sources: Forest, targets: Forest, pairing: Pairing) -> frozenset[Path]:
    """Stacks of the source, and ``()`` for what is in none, with the same open shapes as their partners.

    None of those shapes is another one transposed.
    """
    old, new = _open(sources, board.open_source), _open(targets, board.open_target)
    forth = {**pairing.forth, (): ()}
    return frozenset(
        path for path, bag in old.items() if path in forth and bag == new.get(forth[path]) and not _is_turnable(bag)
    )


def _open(trees: Forest, keys: Iterable[str]) -> dict[Path, Counter[Signature]]:
    found: dict[Path, Counter[Signature]] = defaultdict(Counter)
    for unit in units(trees, keys, whole=False):
        for path in chain(trees, unit.path)[-1:] or ((),):
            found[path][unit.leaves[0].signature] += 1
    return found


def _is_turnable(bag: Counter[Signature]) -> bool:
    shapes = {shape for signature in bag for shape in signature[-1] if len(shape) == 2 and shape[0] != shape[1]}
    return any(shape[::-1] in shapes for shape in shapes)


class _Block(NamedTuple):
    path: Path
    length: int
    depth: int
    bag: Counter[object]  # of what is in it
    inner: Counter[object]  # the same with their names inside
    place: int


def chain(trees: Forest, path: Path) -> tuple[Path, ...]:
    """The stacks of blocks that a template is in, outermost first."""
    return tuple(path[:n] for n in range(1, len(path)) if path[:n] in trees.blocks)


def pair_blocks(board: Board, sources: Forest, targets: Forest) -> Pairing:
    """The stacks of both sides that hold the same, one to one; those that can't be told apart are left out."""
    old, new = _blocks(sources), _blocks(targets)
    anchors = _anchors(board, sources, targets)
    forth: dict[Path, Path] = {}
    for depth in sorted({block.depth for block in old}):
        left = [block for block in old if block.depth == depth and block.path not in forth]
        right = [block for block in new if block.depth == depth and block.path not in forth.values()]
        _pair(left, right, anchors, forth)
    return Pairing(forth, {new_path: old_path for old_path, new_path in forth.items()})


def _blocks(trees: Forest) -> list[_Block]:
    held: dict[Path, list[Family]] = defaultdict(list)
    for unit in units(trees, trees.spots, whole=False):
        for path in chain(trees, unit.path):
            held[path] += unit.leaves
    found = []
    for path, families in held.items():
        length = len(trees.ranks[path])
        depth = sum(1 for n in range(1, len(path) + 1) if path[:n] in trees.ranks and len(trees.ranks[path[:n]]) > 1)
        bag: Counter[object] = Counter()
        inner: Counter[object] = Counter()
        for family in families:
            bag[family.signature] += len(family.keys)
            inner[family.path[len(path) :], family.leaf, family.signature] += len(family.keys)
        found.append(_Block(path, length, depth, bag, inner, min(family.first for family in families)))
    return found


def _anchors(board: Board, sources: Forest, targets: Forest) -> Counter[tuple[Path, Path]]:
    count: Counter[tuple[Path, Path]] = Counter()
    seen: dict[tuple[Path, Path], int] = Counter()
    for mapped in board.claims.values():
        seen[sources.paths[mapped.sources[0]], targets.paths[mapped.target]] += 1
    for (old, new), times in seen.items():
        for first in chain(sources, old):
            for second in chain(targets, new):
                count[first, second] += times
    return count


def _overlap(one: Counter[object], two: Counter[object]) -> float:
    both = sum((one & two).values())
    return both / max(1, sum((one | two).values()))


def _pair(
    left: list[_Block], right: list[_Block], anchors: Counter[tuple[Path, Path]], forth: dict[Path, Path]
) -> None:
    if not left or not right or len(left) * len(right) > 10_000:
        return
    scores = [[_score(one, two, anchors, forth) for two in right] for one in left]
    totals = [[sum(score) if score else -100.0 for score in row] for row in scores]
    for at, to in assign(totals):
        if scores[at][to] and sum(scores[at][to][:2]) >= _LEAST and _stands_out(totals, at, to):
            forth[left[at].path] = right[to].path


def _score(
    one: _Block, two: _Block, anchors: Counter[tuple[Path, Path]], forth: Mapping[Path, Path]
) -> tuple[float, ...]:
    """How much speaks for a pair: claims that lead there, equal tensors, equal names inside, and the stack's own name."""
    anchored = anchors[one.path, two.path]
    structure = _overlap(one.bag, two.bag)
    if not anchored and (one.length != two.length or structure < 0.2):
        return ()
    for n in range(1, len(one.path)):
        if one.path[:n] in forth and forth[one.path[:n]] != two.path[: len(forth[one.path[:n]])]:
            return ()
    said, other = meaning(one.path).words, meaning(two.path).words
    if not anchored and opposed(said, other):
        return ()
    words = len({*said} & {*other}) / max(1, len({*said} | {*other})) if said or other else 1.0
    share = anchored / max(sum(one.bag.values()), sum(two.bag.values()))
    return (3 * share, 2 * structure, _overlap(one.inner, two.inner), words)


def _stands_out(totals: list[list[float]], at: int, to: int, by: float = 0.15) -> bool:
    best = totals[at][to]
    others = [value for n, value in enumerate(totals[at]) if n != to] + [
        row[to] for n, row in enumerate(totals) if n != at
    ]
    return all(best - value >= by for value in others)
