"""Tensors of the target that share memory with another: filled with it."""

from __future__ import annotations

from statedict.aligning.alignment import GUESS, PROVEN, Mapped
from statedict.aligning.board import Board
from statedict.aligning.naming import meaning, spot

__all__ = ["claim_ties", "offer_ties"]


def claim_ties(board: Board) -> None:
    """Where a model says that two names are one tensor, what makes one makes the other."""
    for group in board.target.tied:
        filled = next((board.claims[key] for key in group if key in board.claims), None)
        for key in group:
            if (
                filled
                and key in board.open_target
                and board.target.tensors[key].shape == board.target.tensors[filled.target].shape
            ):
                board.claim(
                    Mapped(key, "tie", filled.sources, PROVEN, (f"the same tensor as {filled.target}",), filled.args)
                )


def offer_ties(board: Board) -> None:
    """A head without a source that has the shape of the token embedding: they may be tied, which only the model can say."""
    embeddings = [mapped for key, mapped in board.claims.items() if mapped.op == "copy" and _role(key) == "token embed"]
    for key in board.open_target:
        if key in board.doubts or not embeddings or _role(key) != "head":
            continue
        fits = [
            mapped
            for mapped in embeddings
            if board.target.tensors[mapped.target].shape == board.target.tensors[key].shape
        ]
        if len(fits) == 1:
            question = f"Is {key} the same tensor as {fits[0].target}? Many models tie them, and files then hold one."
            board.doubts[key] = Mapped(
                key, "tie", fits[0].sources, GUESS, ("it has the shape of the embedding",), question=question
            )


def _role(key: str) -> str:
    return meaning(spot(key).module).role if key.endswith("weight") else ""
