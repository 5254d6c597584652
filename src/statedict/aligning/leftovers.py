"""What no claim uses or fills, and why."""

from __future__ import annotations

from statedict.aligning.alignment import GUESS, Alignment, Left, Mapped
from statedict.aligning.board import Board
from statedict.aligning.lists import Forest
from statedict.aligning.naming import meaning
from statedict.aligning.recognising import is_foreign, is_recomputable, is_resizable

__all__ = ["offer_resizes", "summed_up"]


def offer_resizes(board: Board, sources: Forest, targets: Forest) -> None:
    """A head, vocabulary or position table whose size alone differs: offered, never carried out unasked."""
    by_name: dict[object, list[str]] = {}
    for key in board.open_source:
        if is_resizable(key):
            by_name.setdefault(_name(sources, key), []).append(key)
    for key in board.open_target:
        fits = by_name.get(_name(targets, key), [])
        if key in board.doubts or len(fits) != 1:
            continue
        one, two = board.source.tensors[fits[0]].shape, board.target.tensors[key].shape
        if one != two and len(one) == len(two):
            reason = f"the same name, but {list(one)} in the source and {list(two)} in the target"
            board.doubts[key] = Mapped(key, "resize", (fits[0],), GUESS, (reason,))


def _name(trees: Forest, key: str) -> object:
    said = meaning(trees.paths[key])
    return (said.role or said.words, trees.spots[key].leaf)


def summed_up(board: Board, refused: str) -> Alignment:
    """The result: all entries in the target's order, and what is left on both sides."""
    if refused:
        return Alignment(
            (),
            tuple(Left(key, "different networks") for key in board.source.tensors),
            tuple(Left(key, "different networks") for key in board.target.tensors),
            refused,
        )
    entries = {**board.doubts, **board.claims}
    used = {key for mapped in board.claims.values() for key in mapped.sources}
    asked = {key for mapped in board.doubts.values() for keys in (mapped.sources, *mapped.alternatives) for key in keys}
    return Alignment(
        tuple(entries[key] for key in board.target.tensors if key in entries),
        tuple(Left(key, _why_dropped(board, key, asked)) for key in board.source.tensors if key not in used),
        tuple(Left(key, _why_unfilled(board, key)) for key in board.target.tensors if key not in board.claims),
    )


def _why_dropped(board: Board, key: str, asked: set[str]) -> str:
    if is_foreign(key):
        return "state of an optimizer or scheduler, no weights"
    if key in asked:
        return "not decided where it belongs"
    if is_recomputable(key):
        return "the model makes it again by itself"
    for group in board.source.tied:
        if key in group:
            return "the same tensor under another name: " + ", ".join(k for k in group if k != key)
    return "nothing in the target takes it"


def _why_unfilled(board: Board, key: str) -> str:
    doubt = board.doubts.get(key)
    if doubt and doubt.op == "resize":
        return "resize"
    if doubt:
        return doubt.question or f"one signal only: {doubt.sources[0]} would fit" if doubt.sources else "not decided"
    if key in board.target.buffers or is_recomputable(key):
        return "the model makes it again by itself"
    for group in board.target.tied:
        if key in group:
            return "the same tensor under another name: " + ", ".join(k for k in group if k != key)
    return "nothing in the source fits"
