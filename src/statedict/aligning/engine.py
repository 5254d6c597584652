"""The steps of an alignment, certain and cheap ones first."""

from __future__ import annotations

from collections.abc import Sequence

from statedict.aligning.alignment import Alignment, Mapped, Side
from statedict.aligning.blocks import balanced, pair_blocks
from statedict.aligning.board import Board
from statedict.aligning.fusing import fuse
from statedict.aligning.leftovers import offer_resizes, summed_up
from statedict.aligning.lists import Forest, Grain, forest, names_of
from statedict.aligning.prefixing import claim_equal_names, claim_rewritten
from statedict.aligning.recognising import tells_order
from statedict.aligning.refusal import refusal
from statedict.aligning.resolving import resolve
from statedict.aligning.shapes import SAME, SQUEEZED
from statedict.aligning.ties import claim_ties, offer_ties
from statedict.aligning.twins import ask, twins_of, without
from statedict.aligning.voting import Context
from statedict.aligning.withdrawing import withdraw
from statedict.collecting import uncollected

__all__ = ["align"]

# From the coarsest view of the lists to the finest. What a coarse one finds holds for more layers at once.
_GRAINS = (Grain(1, 2), Grain(2, 2), Grain(3, 3), Grain(3, 0), Grain(2, 0))


def align(source: Side, target: Side, *, known: Sequence[Mapped] = ()) -> Alignment:
    """For each tensor of the target, how it is made of the source's.

    ``known`` is what their values prove. It is taken as it is, what goes beside it is found with its help, and with it nothing is
    refused. Takes time in proportion to the number of keys, and to the square of that of templates of equal shapes.
    """
    with uncollected():
        return _aligned(source, target, tuple(mapped for mapped in known if mapped.is_claim))


def _aligned(source: Side, target: Side, proven: tuple[Mapped, ...]) -> Alignment:
    twins = () if proven else twins_of(source, target)
    board = Board(without(source, twins) if twins else source, target)
    for mapped in proven:
        board.claim(mapped)
    claim_equal_names(board)
    claim_rewritten(board)
    sources, targets = _search(board)
    claim_ties(board)
    withdraw(board, targets, frozenset(mapped.target for mapped in proven))
    offer_resizes(board, sources, targets)
    offer_ties(board)
    refused = "" if proven else refusal(board, sources, targets)
    if twins and not refused:
        ask(board, source, twins)
    return summed_up(board, refused)


def _search(board: Board) -> tuple[Forest, Forest]:
    """Looks for what is open, list by list and then name by name. Gives both sides' names as its first steps saw them."""
    names = names_of(board.source), names_of(board.target)
    sources, targets = (forest(each, _GRAINS[0]) for each in names)
    coarse = sources, targets
    for number, grain in enumerate(_GRAINS):
        finer = (
            [forest(each, grain) for each in names]
            if number and board.open_source and board.open_target
            else [sources, targets]
        )
        if number and finer[0].paths == sources.paths and finer[1].paths == targets.paths:
            continue  # no list is seen otherwise
        sources, targets = finer
        coarse = (sources, targets) if number < 2 else coarse
        while board.open_source and board.open_target and _round(board, sources, targets):
            pass
    return coarse


def _round(board: Board, sources: Forest, targets: Forest) -> int:
    """One pass over what is open; gives how much it claimed."""
    pairing = pair_blocks(board, sources, targets)
    context = Context(
        pairing,
        board.links(sources, targets),
        (tells_order(board.source), tells_order(board.target)),
        balanced(board, sources, targets, pairing),
        *board.turns(),
    )
    found = fuse(board, sources, targets, context) + resolve(board, sources, targets, context, whole=True)
    return found + sum(resolve(board, sources, targets, context, view) for view in (SAME, SQUEEZED))
