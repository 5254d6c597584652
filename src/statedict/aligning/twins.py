"""Copies of a whole network in one file: the weights and their average, a teacher and a student."""

from __future__ import annotations

from collections import defaultdict

from statedict.aligning.alignment import AMBIGUOUS, Side
from statedict.aligning.board import Board
from statedict.aligning.recognising import is_foreign

__all__ = ["Twins", "ask", "twins_of", "without"]

_ALIKE = 0.8  # of the larger one's tensors that both must have

Twins = tuple[str, ...]


def twins_of(source: Side, target: Side) -> Twins:
    """Prefixes of the source that hold the same names and shapes, each more than half as many as the target has; usually none."""
    exact = sum(
        1 for key, spec in target.tensors.items() if key in source.tensors and source.tensors[key].shape == spec.shape
    )
    if 2 * exact > len(target.tensors):
        return ()
    found = _alike(source, len(target.tensors) // 2)
    return () if not found or _alike(target, len(target.tensors) // 3) else found


def _alike(side: Side, more_than: int) -> Twins:
    """Prefixes that hold nearly the same, each more than so many tensors. The members of a list aren't looked at."""
    trees: dict[str, set[tuple[str, tuple[int, ...]]]] = defaultdict(set)
    for key, spec in side.tensors.items():
        parts = key.split(".")
        for at in range(1, min(4, len(parts))):
            if not is_foreign(key) and not parts[at - 1].isdigit():
                trees[".".join(parts[:at])].add((".".join(parts[at:]), spec.shape))
    large = [prefix for prefix, tree in trees.items() if len(tree) > more_than]
    for prefix in large:
        alike = [
            other
            for other in large
            if not other.startswith(prefix + ".")
            and len(trees[prefix] & trees[other]) >= _ALIKE * max(len(trees[prefix]), len(trees[other]))
        ]
        if len(alike) > 1:
            return tuple(alike)
    return ()


def without(source: Side, twins: Twins) -> Side:
    """The source with the first twin alone."""
    others = tuple(twin + "." for twin in twins[1:])
    return source._replace(tensors={key: spec for key, spec in source.tensors.items() if not key.startswith(others)})


def ask(board: Board, source: Side, twins: Twins) -> None:
    """Turns all claims on the first twin into questions: each tensor could as well come from another."""
    question = f"Which weights are meant, those under {' or '.join(map(repr, twins))}? Both fit."
    for mapped in (*board.claims.values(), *board.doubts.values()):
        others = [tuple(twin + key.removeprefix(twins[0]) for key in mapped.sources) for twin in twins]
        fits = tuple(keys for keys in others if all(key in source.tensors for key in keys))
        if len(fits) > 1:
            board.claims.pop(mapped.target, None)
            board.doubts[mapped.target] = mapped._replace(
                tier=AMBIGUOUS,
                question=question,
                alternatives=fits,
                reasons=("several parts of the file fit equally well",),
            )
    board.source = source
