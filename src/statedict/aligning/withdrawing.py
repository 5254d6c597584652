"""Claims that names and shapes can't hold up after all: what looks the same and may be something else."""

from __future__ import annotations

from collections.abc import Mapping

from statedict.aligning.alignment import UNDECIDABLE, Mapped
from statedict.aligning.blocks import chain
from statedict.aligning.board import Board
from statedict.aligning.lists import Forest, Path
from statedict.aligning.parts import Parts, parts_of
from statedict.knowledge import vocabulary

__all__ = ["withdraw"]


def withdraw(board: Board, targets: Forest, known: frozenset[str]) -> None:
    """Takes back claims that are undecidable; those of ``known`` targets stay."""
    turned = {_home(targets, mapped.target): mapped for mapped in board.claims.values() if mapped.op == "transpose"}
    for key, mapped in list(board.claims.items()):
        if key in known:
            continue
        question = _turned(board, targets, mapped, turned) or _rotary(mapped) or _reordered(mapped)
        if question:
            del board.claims[key]
            board.leave(mapped._replace(tier=UNDECIDABLE, question=question))


def _turned(board: Board, targets: Forest, mapped: Mapped, turned: Mapping[Path, Mapped]) -> str:
    """A square matrix among transposed ones."""
    shape = board.target.tensors[mapped.target].shape
    if mapped.op != "copy" or len(shape) != 2 or shape[0] != shape[1] or targets.spots[mapped.target].leaf == "bias":
        return ""
    other = turned.get(_home(targets, mapped.target)) if turned else None
    if not other:
        return ""
    return f"Is {mapped.sources[0]} stored transposed, as {other.sources[0]} is? It is square, so its shape doesn't show it."


def _reordered(mapped: Mapped) -> str:
    """A tensor of several parts, which the two names list in another order, or only one of them lists in an order at all."""
    if mapped.op != "copy":
        return ""
    old, new = (_listed(key) for key in (mapped.sources[0], mapped.target))
    if old is None or new is None or old == new:
        return ""
    parts = " and ".join(new.roles) if len(new.roles) < 3 else ", ".join(new.roles)
    order = f"In which order does {mapped.sources[0]} hold its parts ({parts})?"
    return f"{order} {mapped.target} has the same shape and may have another one."


def _listed(key: str) -> Parts | None:
    """The parts that a name lists, in the last of its components that lists any."""
    return next((parts for part in reversed(key.split(".")) if (parts := parts_of(part)) is not None), None)


def _home(targets: Forest, key: str) -> Path:
    """The outermost stack of blocks that a tensor is in, or the first component of its name."""
    path = targets.paths[key]
    return (chain(targets, path) or (path[:1],))[0]


def _rotary(mapped: Mapped) -> str:
    """Query or key rows that one convention interleaves for rotary embeddings and the other keeps in halves."""
    known = vocabulary()
    here = {part for key in mapped.sources for part in key.split(".")[-3:]}
    there = set(mapped.target.split(".")[-3:])
    crossed = (here & known.rotary_interleaved and there & known.rotary_halves) or (
        here & known.rotary_halves and there & known.rotary_interleaved
    )
    if mapped.op == "copy" and crossed:
        return f"Are the rows of {mapped.sources[0]} interleaved for rotary embeddings (Meta's layout) or in halves? Both have this shape."
    return ""
