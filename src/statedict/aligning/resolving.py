"""Units that could be each other by shape, told apart: accepted where two signals agree and none objects."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

from statedict.aligning.alignment import CORROBORATED, GUESS, PROVEN, Mapped
from statedict.aligning.assignment import assign
from statedict.aligning.blocks import chain
from statedict.aligning.board import Board
from statedict.aligning.families import Family, Unit, units
from statedict.aligning.judging import Election
from statedict.aligning.lists import Forest
from statedict.aligning.shapes import SAME, SQUEEZED, View, between, seen
from statedict.aligning.voting import Ballot, Candidate, Context, ballot

__all__ = ["resolve"]

_LARGEST = 80  # members of a class; a larger one is left to its names


def resolve(
    board: Board, sources: Forest, targets: Forest, context: Context, view: View = SAME, *, whole: bool = False
) -> int:
    """Claims what can be told apart among open units of equal shapes. Gives how many pairs that were."""
    old = _classes(sources, board.open_source, view, whole=whole)
    new = _classes(targets, board.open_target, view, whole=whole)
    count = 0
    for signature, members in old.items():
        count += _settle(board, context, view, members, new.get(signature, []))
    return count


def _classes(trees: Forest, keys: Mapping[str, None], view: View, *, whole: bool) -> dict[object, list[Candidate]]:
    found: dict[object, list[Candidate]] = defaultdict(list)
    for unit in units(trees, keys, whole=whole):
        if whole and len(unit.leaves) == 1 and len(unit.leaves[0].shapes[0]) == 2:
            continue  # a matrix by itself may also be another one transposed
        if not whole and _waits(trees, unit.leaves[0], keys):
            continue
        signature = unit.signature if whole else seen(view, unit.leaves[0])
        if signature is not None:
            found[signature].append(Candidate(unit, chain(trees, unit.path)))
    return found


def _waits(trees: Forest, family: Family, keys: Mapping[str, None]) -> bool:
    """Whether it is a bias or statistic whose weight is still open: a module stays together, and the weight says more."""
    if family.leaf in ("", "weight"):
        return False
    weight = family.keys[0].removesuffix(family.leaf) + "weight"
    return weight in keys and trees.paths.get(weight) == family.path


def _settle(board: Board, context: Context, view: View, old: list[Candidate], new: list[Candidate]) -> int:
    """Pairs the members of a class so that most speaks for it, and claims the pairs that stand against every other way."""
    if max(len(old), len(new)) > _LARGEST:
        old, new = _named_alike(old, new)
    if not old or not new:
        return 0
    votes = [[_vote(context, one, two) for two in new] for one in old]
    gains = [
        [-50.0 if vote is None else vote.gain + _tie(at, to, len(old), len(new)) for to, vote in enumerate(row)]
        for at, row in enumerate(votes)
    ]
    pairs = [(at, to) for at, to in assign(gains) if votes[at][to] is not None]
    election = Election(context, old, new, votes, pairs)
    count = 0
    for at, to in pairs:
        verdict = election.verdict(at, to)
        if verdict.against or not _is_seen(view, old[at].unit, new[to].unit):
            continue
        if verdict.strength >= 2:
            only = len(old) == len(new) == 1 and context.pairing.joins(old[at].chain, new[to].chain)
            _claim(board, old[at].unit, new[to].unit, verdict.reasons, PROVEN if only else CORROBORATED)
            count += 1
        elif verdict.strength == 1:
            _note(board, old[at].unit, new[to].unit, verdict.reasons)
    return count


def _vote(context: Context, old: Candidate, new: Candidate) -> Ballot | None:
    """The votes on a pair; none where no view makes them the same."""
    if any(between(one, two) is None for one, two in zip(old.unit.leaves, new.unit.leaves)):
        return None
    return ballot(context, old, new)


def _is_seen(view: View, old: Unit, new: Unit) -> bool:
    """Whether a pair is looked for now: squeezed ones apart, for which the others are rivals."""
    return all((between(one, two) is SQUEEZED) == (view is SQUEEZED) for one, two in zip(old.leaves, new.leaves))


def _claim(board: Board, old: Unit, new: Unit, reasons: tuple[str, ...], tier: str) -> None:
    for one, two in zip(old.leaves, new.leaves):
        view = between(one, two) or SAME
        board.pair(one, two, view, (*reasons, view.reason) if view.reason else reasons, tier)


def _note(board: Board, old: Unit, new: Unit, reasons: tuple[str, ...]) -> None:
    for one, two in zip(old.leaves, new.leaves):
        view = between(one, two) or SAME
        for source, target in zip(one.keys, two.keys):
            board.doubts[target] = Mapped(target, view.op, (source,), GUESS, reasons, view.args)


def _tie(at: int, to: int, rows: int, columns: int) -> float:
    return 0.05 * (1 - abs(at / max(1, rows) - to / max(1, columns)))


def _named_alike(old: list[Candidate], new: list[Candidate]) -> tuple[list[Candidate], list[Candidate]]:
    """Those of a large class whose words and numbers are unique on both sides and the same."""

    def by_words(side: list[Candidate]) -> dict[object, list[Candidate]]:
        found: dict[object, list[Candidate]] = defaultdict(list)
        for one in side:
            found[one.unit.meaning.words, one.unit.meaning.numbers, one.unit.leaves[0].leaf].append(one)
        return found

    first, second = by_words(old), by_words(new)
    both = [key for key in first if len(first[key]) == 1 == len(second.get(key, ()))]
    return [first[key][0] for key in both][:_LARGEST], [second[key][0] for key in both][:_LARGEST]
