"""Tensors that hold several others: one behind the other (fused) or along a dimension of their own (stacked)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

from statedict.aligning.alignment import AMBIGUOUS
from statedict.aligning.blocks import chain
from statedict.aligning.board import Board
from statedict.aligning.families import Unit, units
from statedict.aligning.layouts import Match, join, layouts_of, split
from statedict.aligning.lists import Forest, Path
from statedict.aligning.naming import meaning
from statedict.aligning.opposites import opposed
from statedict.aligning.parts import Parts, parts_of
from statedict.aligning.voting import Context

__all__ = ["fuse"]


def fuse(board: Board, sources: Forest, targets: Forest, context: Context) -> int:
    """Claims splits, concatenations, stacks and unstacks; gives how many."""
    count = 0
    for is_split in (True, False):
        sides = (sources, board.open_source), (targets, board.open_target)
        (wholes, whole_keys), (pieces, piece_keys) = sides if is_split else sides[::-1]
        large, small = units(wholes, whole_keys, whole=False), units(pieces, piece_keys, whole=False)
        # What is fused on both sides is carried over as it is.
        both = {unit.leaves[0].signature for unit in small if parts_of(unit.path[-1])}
        large = [unit for unit in large if unit.leaves[0].signature not in both]
        found = _unrivalled(list(_matches(context, wholes, large, pieces, small, is_split)))
        turned = {match.whole.path[:-1] for match in found if all(layout.is_transposed for layout in match.layouts)}
        for match in found:
            count += _claim(board, context, match, is_split, match.whole.path[:-1] in turned)
    return count


def _matches(
    context: Context, wholes: Forest, large: Sequence[Unit], pieces: Forest, small: Sequence[Unit], is_split: bool
) -> Iterator[Match]:
    """Wholes and groups of parts in places that can be the same, where the shapes of the parts make up that of the whole."""
    groups = _by_role(small)
    chains = {path: chain(pieces, (*path, "")) for path, _ in groups}
    for unit in large:
        listed = parts_of(unit.path[-1]) or (Parts((unit.meaning.role,), True) if unit.meaning.role else None)
        if not listed:
            continue
        inside = chain(wholes, unit.path)
        for (parent, leaf), members in groups.items():
            if unit.leaves[0].leaf and leaf and leaf != unit.leaves[0].leaf:
                continue
            if any(role not in members for role in listed.roles):
                continue
            pair = (inside, chains[parent]) if is_split else (chains[parent], inside)
            if not context.pairing.allows(*pair):
                continue
            parts = tuple(members[role].leaves[0] for role in listed.roles)
            layouts = tuple(layouts_of(unit.leaves[0], parts))
            likeness = _likeness(context, unit.path[:-1], parent, is_split)
            if layouts and likeness is not None:
                yield Match(unit.leaves[0], parts, layouts, listed.is_ordered, likeness)


def _by_role(small: Sequence[Unit]) -> dict[tuple[Path, str], dict[str, Unit]]:
    """The units of each module and leaf by their roles; a role that two of them have is left out."""
    groups: dict[tuple[Path, str], dict[str, Unit]] = defaultdict(dict)
    twice: set[tuple[Path, str, str]] = set()
    for unit in small:
        home, leaf = unit.path[:-1], unit.leaves[0].leaf
        roles = ("fc1", "up") if unit.meaning.role == "fc1" else (unit.meaning.role,)
        for role in roles if unit.meaning.role else ():
            if role in groups[home, leaf]:
                twice.add((home, leaf, role))
            groups[home, leaf][role] = unit
    for home, leaf, role in twice:
        del groups[home, leaf][role]
    return groups


def _likeness(context: Context, one: Path, two: Path, is_split: bool) -> float | None:
    """How alike the places of the whole and its parts are; None where their words exclude each other."""
    first, second = {*meaning(one).words}, {*meaning(two).words}
    if opposed(first, second):
        return None
    words = len(first & second) / len(first | second) if first | second else 1.0
    return words + max(0.0, context.links.vote(*(one, two) if is_split else (two, one)))


def _unrivalled(found: Sequence[Match]) -> list[Match]:
    """The matches whose whole and parts have no other that is as alike."""
    by_whole: dict[object, list[Match]] = defaultdict(list)
    by_part: dict[object, list[Match]] = defaultdict(list)
    for match in found:
        by_whole[match.whole.keys].append(match)
        for part in match.parts:
            by_part[part.keys].append(match)
    chosen = []
    for match in found:
        rivals = [r for r in by_whole[match.whole.keys] if r is not match] + [
            r for part in match.parts for r in by_part[part.keys] if r is not match
        ]
        if all(match.likeness > rival.likeness + 0.05 for rival in rivals):
            chosen.append(match)
    return chosen


def _claim(board: Board, context: Context, match: Match, is_split: bool, is_turned: bool) -> int:
    """Claims a match, or asks what would decide it."""
    made = list(split(match, match.layouts[0]) if is_split else join(match, match.layouts[0]))
    name = match.whole.path[-1]
    question = ""
    if not match.is_ordered:
        question = f"In which order does {name} hold {', '.join(part.path[-1] for part in match.parts)}?"
    elif len(match.layouts) > 1 and _is_unclear(context, match, is_turned):
        question = f"Is {name} stored transposed? The shapes of its parts allow both."
    for mapped in made:
        if question:
            board.doubts[mapped.target] = mapped._replace(tier=AMBIGUOUS, question=question)
        else:
            board.claim(mapped)
    return 0 if question else len(made)


def _is_unclear(context: Context, match: Match, is_turned: bool) -> bool:
    """Whether nothing says which of several layouts it is. Parts along the first dimension are the rule, where nothing is transposed."""
    first = match.layouts[0]
    if is_turned or context.is_turned or first.is_transposed:
        return True
    return first.dim != 0 and not context.is_straight
