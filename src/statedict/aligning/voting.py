"""The signals: each says of two candidate pairs which it prefers, by itself and without regard to the others."""

from __future__ import annotations

from typing import NamedTuple

from statedict.aligning.blocks import Pairing
from statedict.aligning.board import Links
from statedict.aligning.families import Unit
from statedict.aligning.lists import Path
from statedict.aligning.naming import numbers_in
from statedict.aligning.opposites import opposed
from statedict.knowledge import vocabulary

__all__ = ["Ballot", "Candidate", "Context", "ballot", "contrast", "sequence"]

_KINDRED = {
    frozenset({"fc1", "up"}),
    frozenset({"norm", "norm 1"}),
    frozenset({"norm", "norm 2"}),
    frozenset({"norm", "norm 3"}),
}


class Candidate(NamedTuple):
    """A unit with the stacks of blocks that it is in."""

    unit: Unit
    chain: tuple[Path, ...]

    @property
    def inside(self) -> Path:
        """Its name inside its innermost stack of blocks."""
        return self.unit.path[len(self.chain[-1]) :] if self.chain else self.unit.path


class Context(NamedTuple):
    """What all votes of a round look at.

    ``balanced`` are the stacks of blocks of the source that have the same shapes open as their partners, in one way only.
    ``is_straight`` and ``is_turned`` where matrices that aren't square were claimed as they are, or transposed.
    """

    pairing: Pairing
    links: Links
    ordered: tuple[bool, bool]
    balanced: frozenset[Path]
    is_straight: bool
    is_turned: bool


class Ballot(NamedTuple):
    """What each signal says of one pair, from -1 to 1."""

    role: float
    words: float
    spelling: float
    link: float
    straight: float
    tail: float

    @property
    def gain(self) -> float:
        return 3 * self.role + 2 * self.words + self.spelling + 2 * self.link + self.straight


def ballot(context: Context, old: Candidate, new: Candidate) -> Ballot | None:
    """The votes on a pair; None where the two can't be the same."""
    one, two = old.unit, new.unit
    if any(a.leaf and b.leaf and a.leaf != b.leaf for a, b in zip(one.leaves, two.leaves)):
        return None
    if not context.pairing.allows(old.chain, new.chain):
        return None
    if any((a, b) in vocabulary().backwards for a in one.path for b in two.path):
        return None
    role = _role(one.meaning.role, two.meaning.role)
    if "fused" in (one.meaning.role, two.meaning.role) and role <= 0 and one.meaning.role and two.meaning.role:
        return None
    first, second = {*one.meaning.words}, {*two.meaning.words}
    if opposed(first, second):
        return None
    words = len(first & second) / len(first | second) if first | second else 0.0
    named = role > 0 and words > 0.99
    if not named and any(
        not {a.leaf, b.leaf}.isdisjoint({"bias"}) and a.leaf != b.leaf for a, b in zip(one.leaves, two.leaves)
    ):
        return None
    if not named and context.links.parts(one.path, two.path):
        return None
    spelling = _spelling(context, old, new)
    link = context.links.vote(one.path, two.path) or context.links.vote(one.path[:-1], two.path[:-1])
    straight = float(all(a.shapes == b.shapes for a, b in zip(one.leaves, two.leaves)))
    tail = float(bool({*one.meaning.tail} & {*two.meaning.tail}))
    return Ballot(role, words, spelling, link, straight, tail)


def _role(one: str, two: str) -> float:
    if not one or not two:
        return 0.0
    if one == two:
        return 0.0 if one == "norm" else 1.0
    return 0.0 if frozenset({one, two}) in _KINDRED else -1.0


def _spelling(context: Context, old: Candidate, new: Candidate) -> float:
    """1 for the same name inside the blocks or one that is the end of the other, less where only the last components are the same."""
    if old.inside == new.inside and (context.pairing.joins(old.chain, new.chain) or old.unit.path == new.unit.path):
        return 1.0
    one, two = old.unit.path, new.unit.path
    short, long = sorted((one, two), key=len)
    if len(short) > 1 and long[len(long) - len(short) :] == short:
        return 1.0
    same = 0
    while same < min(len(one), len(two)) and one[-1 - same] == two[-1 - same]:
        same += 1
    return min(0.9, 0.3 * same)


def contrast(old: tuple[Unit, Unit], new: tuple[Unit, Unit]) -> bool:
    """Whether each of two pairs shares a word that the other pair hasn't, in both of its names."""
    (a, c), (b, d) = [[{*unit.meaning.words} for unit in pair] for pair in (old, new)]
    return bool(a & b - c - d) and bool(c & d - a - b)


def sequence(context: Context, old: tuple[Unit, Unit], new: tuple[Unit, Unit]) -> int:
    """Whether two units come in the same order on both sides: 1, or 2 where both names count; negative where not; 0 unknown.

    The order of names that differ in a number is that of the numbers; otherwise that of a model's registration, where there is one.
    """
    first, counted = _direction(old, context.ordered[0])
    second, also = _direction(new, context.ordered[1])
    if not first or not second:
        return 0
    return first * second * (2 if counted and also else 1)


def _direction(pair: tuple[Unit, Unit], is_ordered: bool) -> tuple[int, bool]:
    one, two = pair
    first, second = numbers_in(one.path), numbers_in(two.path)
    if first[0] == second[0] and first[1] != second[1]:
        return (1 if first[1] < second[1] else -1), True
    if not is_ordered:
        return 0, False
    return (1 if one.place < two.place else -1), False
