"""What rules come to on one checkpoint: the checkpoint that they make, which keys they concerned, and what takes them back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from statedict.checkpoint import Checkpoint
from statedict.collecting import uncollected
from statedict.errors import RuleError, StateDictError, one_line
from statedict.keys import dotted
from statedict.manifest import TensorEntry
from statedict.nodes import walk
from statedict.report.units import plural
from statedict.rules.drafts import CastOf, Draft
from statedict.rules.rule import NoMatch, Rule, Step

__all__ = ["Coverage", "Plan", "RuleHits", "planned"]

# Keys that a line names.
_LISTED = 5


class RuleHits(NamedTuple):
    """What one rule came to."""

    rule: str  # as one types it
    matched: int  # keys that it concerned
    lossless: bool
    notes: tuple[str, ...] = ()  # what it has left alone

    def to_dict(self) -> dict[str, object]:
        """The facts, JSON-ready."""
        return {"rule": self.rule, "matched": self.matched, "lossless": self.lossless, "notes": list(self.notes)}


class Coverage(NamedTuple):
    """Which keys the rules concerned. Keys are dotted; those dropped and created are of any of the rules."""

    rules: tuple[RuleHits, ...]
    matched: int  # keys of the result that a rule concerned
    unmatched: tuple[str, ...]  # keys of the result that none concerned
    dropped: tuple[str, ...]  # keys that are gone, with their values
    created: tuple[str, ...]  # keys that were made of others

    def to_dict(self) -> dict[str, object]:
        """The facts, JSON-ready."""
        return {
            "rules": [hits.to_dict() for hits in self.rules],
            "matched": self.matched,
            "unmatched": len(self.unmatched),
            "unmatched_keys": list(self.unmatched),
            "dropped": list(self.dropped),
            "created": list(self.created),
        }

    def lines(self) -> list[str]:
        """The facts in sentences, one a rule and one for what is left."""
        made = []
        for hits in self.rules:
            notes = f"; {'; '.join(hits.notes)}" if hits.notes else ""
            loss = "" if hits.lossless else ", can't be taken back"
            made.append(f"{hits.rule}: {plural(hits.matched, 'key')}{loss}{notes}")
        if self.dropped:
            made.append(f"{plural(len(self.dropped), 'key')} left out: {_few(self.dropped)}")
        if self.unmatched:
            made.append(f"{plural(len(self.unmatched), 'key')} no rule concerns: {_few(self.unmatched)}")
        return made


def _few(keys: Sequence[str]) -> str:
    more = f" and {len(keys) - _LISTED:,} more" if len(keys) > _LISTED else ""
    return ", ".join([one_line(key) for key in keys[:_LISTED]]) + more


class Plan:
    """Rules applied to one checkpoint; nothing is read or copied yet.

    Attributes: ``checkpoint`` (what they make; lazy), ``rules`` (those given), ``coverage``, ``lossless`` (whether they can be
    taken back with every value), ``casts`` (the tensors that are cast, whose values may not survive it).
    """

    __slots__ = ("_steps", "casts", "checkpoint", "coverage", "rules")

    def __init__(
        self,
        checkpoint: Checkpoint,
        rules: Sequence[Rule],
        steps: Sequence[Step],
        coverage: Coverage,
        casts: Sequence[CastOf] = (),
    ) -> None:
        self.checkpoint = checkpoint
        self.rules = tuple(rules)
        self.coverage = coverage
        self.casts = tuple(casts)
        self._steps = tuple(steps)

    def __repr__(self) -> str:
        return f"Plan({', '.join(map(str, self.rules))}: {self.coverage.matched} keys)"

    @property
    def lossless(self) -> bool:
        """Whether ``inverse`` gives back every value."""
        return all(step.inverse is not None for step in self._steps)

    def inverse(self) -> tuple[Rule, ...] | None:
        """The rules that make the old checkpoint of the new one, for just these two; None where something is lost."""
        made: list[Rule] = []
        for step in reversed(self._steps):
            if step.inverse is None:
                return None
            made += step.inverse
        return tuple(made)

    def again(self) -> str:
        """What the same rules would do to the result, in a sentence: nothing, be refused, or change it once more."""
        try:
            second = planned(self.checkpoint, self.rules)
        except RuleError as error:
            return f"Applied to the result once more they are refused: {error.what}"
        if _shapes(second.checkpoint) == _shapes(self.checkpoint):
            return "Applied to the result once more they change nothing"
        return "Applied to the result once more they would change it again"


def _shapes(checkpoint: Checkpoint) -> Mapping[object, object]:
    return {
        path: (entry.dtype, entry.shape, None if entry.view is None else (entry.view.storage.extent, entry.view[1:]))
        for path, entry in checkpoint.manifest.tensors.items()
    }


def planned(checkpoint: Checkpoint, rules: Sequence[Rule], *, owns_files: bool = False) -> Plan:
    """Apply the rules one after the other. Raises ``RuleError``, with what there is, for the first that can't be."""
    draft = Draft(checkpoint)
    steps: list[Step] = []
    hits: list[RuleHits] = []
    touched: frozenset[object] = frozenset()
    try:
        with uncollected():
            for rule in rules:
                step = _step(rule, draft)
                touched |= step.touched
                draft.root = step.root
                draft.settle()
                steps.append(step)
                hits.append(RuleHits(str(rule), step.matched, step.inverse is not None, step.notes))
    except StateDictError as error:
        raise error.located(checkpoint.source) from error.__cause__
    made = draft.checkpoint(owns_files=owns_files)
    return Plan(made, rules, steps, _coverage(draft, hits, steps, touched), draft.casts)


def _step(rule: Rule, draft: Draft) -> Step:
    try:
        return rule.applied(draft)
    except NoMatch:
        if not rule.is_optional:
            raise
        return Step(draft.root, 0, inverse=())


def _coverage(draft: Draft, hits: Sequence[RuleHits], steps: Sequence[Step], touched: frozenset[object]) -> Coverage:
    left = [path for path, leaf in walk(draft.root) if isinstance(leaf, TensorEntry)]
    unmatched = tuple([dotted(path) for path in left if path not in touched])
    there = {dotted(path) for path in left}
    dropped = [key for step in steps for key in step.dropped]
    created = [key for step in steps for key in step.created if key in there]
    return Coverage(
        tuple(hits), len(left) - len(unmatched), unmatched, tuple(dict.fromkeys(dropped)), tuple(dict.fromkeys(created))
    )
