"""Whether enough speaks for a pair against each other way to pair the same units."""

from __future__ import annotations

from typing import NamedTuple

from statedict.aligning.voting import Ballot, Candidate, Context, contrast, sequence

__all__ = ["Election", "Verdict"]

_NOTHING = Ballot(0.0, 0.0, 0.0, 0.0, 0.0, 0.0)


_SLIGHT = 0.02  # a margin of words that says nothing


class Verdict(NamedTuple):
    """How much speaks for a pair against its rivals, and what; ``against`` where a signal prefers a rival."""

    strength: int
    against: bool
    reasons: tuple[str, ...]


class Election(NamedTuple):
    """Units of equal shapes, the votes on each pair of them (None: impossible), and the pairs for which most speaks."""

    context: Context
    old: list[Candidate]
    new: list[Candidate]
    votes: list[list[Ballot | None]]
    pairs: list[tuple[int, int]]

    def verdict(self, at: int, to: int) -> Verdict:
        """The weakest case for one of the pairs against any other way."""
        mine = self.votes[at][to]
        if mine is None or mine.role < 0:
            return Verdict(0, True, ())
        rivals = [self._against_target(mine, at, to, other) for other in range(len(self.new)) if other != to]
        rivals += [self._against_source(mine, at, to, other) for other in range(len(self.old)) if other != at]
        found = [rival for rival in rivals if rival]
        if not found:
            return _alone(self.context, self.old[at], self.new[to], mine)
        return min(found, key=lambda verdict: (not verdict.against, verdict.strength))

    def _against_target(self, mine: Ballot, at: int, to: int, other: int) -> Verdict | None:
        """Against the source's going to another target, whose own source then comes here, if it can."""
        swapped = self.votes[at][other]
        if swapped is None:
            return None
        holder = next((row for row, column in self.pairs if column == other), None)
        crossed = None if holder is None else self.votes[holder][to]
        if holder is None or crossed is None:
            return _compare(self.context, mine, swapped)
        theirs = self.votes[holder][other] or _NOTHING
        both = (self.old[at].unit, self.old[holder].unit), (self.new[to].unit, self.new[other].unit)
        margins = Ballot(*(a + c - b - d for a, b, c, d in zip(mine, swapped, theirs, crossed)))
        return _weighed(self.context, mine, margins, sequence(self.context, *both), contrast(*both))

    def _against_source(self, mine: Ballot, at: int, to: int, other: int) -> Verdict | None:
        """Against another source's coming here, if it has no place of its own."""
        swapped = self.votes[other][to]
        if swapped is None or any(row == other for row, _ in self.pairs):
            return None
        return _compare(self.context, mine, swapped)


def _compare(context: Context, mine: Ballot, swapped: Ballot) -> Verdict:
    return _weighed(context, mine, Ballot(*(a - b for a, b in zip(mine, swapped))), 0, False)


def _weighed(context: Context, mine: Ballot, margins: Ballot, order: int, is_contrast: bool) -> Verdict:
    """What the signals come to that prefer a pair to another way by these margins."""
    certain = margins.role >= 2
    named = _sign(margins.words) + _sign(margins.spelling)
    torn = _sign(margins.words) < 0 or _sign(margins.spelling) < 0
    against = (
        margins.role < 0
        or margins.link < 0
        or (not certain and (order < 0 or named < 0 or (torn and margins.words < 0)))
    )
    gained = [(2 if certain else 1, "both names say the same part")] if margins.role > 0 else []
    if named > 0 and not torn:
        gained.append((1 + (mine.spelling == 1.0) + is_contrast, "the words of the names agree best"))
    if margins.link > 0:
        # The words of where it stands and where its neighbours go are one signal, unless its own name agrees as well.
        apart = margins.tail > 0 or named <= 0 or mine.spelling == 1.0
        gained.append((int(apart), "its neighbours go there as well"))
    if order > 0:
        gained.append((order, "they come in the same order"))
    strength = sum(weight for weight, _ in gained)
    if margins.straight and context.is_straight != context.is_turned:
        if (margins.straight > 0) != context.is_straight:
            against = True
        strength += 2
        gained.append(
            (2, f"the matrices beside it are {'not transposed' if context.is_straight else 'transposed too'}")
        )
    elif margins.straight < 0 and strength < 2:
        against = True
    return Verdict(strength, against, tuple(reason for _, reason in gained))


def _sign(margin: float) -> int:
    return (margin > _SLIGHT) - (margin < -_SLIGHT)


def _alone(context: Context, old: Candidate, new: Candidate, vote: Ballot) -> Verdict:
    """No rival by shape and place: one more signal is enough."""
    reasons = ["nothing else has these shapes there"]
    joined = context.pairing.joins(old.chain, new.chain)
    named = vote.words >= (0.3 if joined else 0.5) or vote.role > 0 or (vote.spelling >= 0.3 and joined)
    if (joined and old.chain[-1] in context.balanced) or (not old.chain and not new.chain and () in context.balanced):
        reasons.append("all that is left there agrees in shape")
    elif joined and named:
        reasons.append("it stands in the same blocks")
    if named:
        reasons.append("the names say the same")
    if vote.link > 0:
        reasons.append("its neighbours go there as well")
    return Verdict(len(reasons), vote.role < 0 or vote.link < 0, tuple(reasons))
