"""Bringing a step back into the parts of a training state: all of it is checked, then it is changed, chance last."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import suppress
from typing import Any, NamedTuple

from statedict.errors import KeyMismatch, KeyNotFound, StateDictError
from statedict.keys import near
from statedict.ops.load_report import LoadReport
from statedict.runs.pieces import OpenedStep
from statedict.torch.training import environment, rng
from statedict.torch.training.environment import Difference
from statedict.torch.training.gradients import GradientPart
from statedict.torch.training.next_step import Evidence, read_digest
from statedict.torch.training.parts import (
    OptimizerPart,
    Part,
    StatefulPart,
    Wishes,
    hyperparameter_differences,
    value_of,
)
from statedict.torch.training.plain_parts import LoaderPart

__all__ = ["Applied", "Restoring"]

_NOTHING_SAVED = "nothing"


class Applied(NamedTuple):
    """What was brought back: the reports of modules and optimizers by component, and what is another here."""

    report: Mapping[str, LoadReport]
    differences: tuple[Difference, ...] = ()


class Restoring:
    """One step into one state."""

    def __init__(
        self,
        parts: Mapping[str, Part],
        hidden: Mapping[str, Part],
        kinds: Collection[str],
        step: OpenedStep,
        only: Collection[str] | None,
    ) -> None:
        self._step = step
        self._differences: list[Difference] = []
        self._chance: Mapping[str, Any] = {}
        self._parts = _wanted(parts, hidden, step, only)
        self._kinds = kinds if only is None or "rng" in only else ()
        self._is_whole = only is None
        if self._is_whole:
            strangers = [name for name in step.names if "." not in name and name not in parts and name != "rng"]
            self._differences += [Difference(name, "a component", _NOTHING_SAVED) for name in strangers]

    def run(self, rules: Any, keep: tuple[str, ...]) -> Applied:
        """Check, then change. Raises ``StateDictError``; where that is while checking, nothing has changed."""
        wishes = Wishes(rules, keep)
        try:
            if self._is_whole:
                self._check_environment()
            for name, part in self._parts.items():
                if name in self._step.names:
                    self._differences += part.check(self._step.piece(name), name, wishes)
            self._check_chance()
            report = self._commit()
        except StateDictError as error:
            raise error.located(self._step.path) from error.__cause__
        return Applied(report, tuple(self._differences))

    def _check_environment(self) -> None:
        saved = self._step.facts.get("environment")
        if isinstance(saved, Mapping):
            self._differences += environment.compare(saved, environment.record())

    def _check_chance(self) -> None:
        """Read the states of the process's generators, and try each."""
        if not self._kinds or "rng" not in self._step.names:
            if self._kinds:
                self._differences.append(Difference("rng", _NOTHING_SAVED, "captured"))
            return
        found = value_of(self._step.piece("rng"))
        if not isinstance(found, dict):
            raise StateDictError("these are no states of random generators", key="rng", found=type(found).__name__)
        self._chance = {kind: state for kind, state in found.items() if kind in self._kinds}
        absent = rng.check_states(self._chance)
        here = rng.states(self._kinds)
        for kind, state in self._chance.items():
            there = len(state) if isinstance(state, list) else 1
            found_here = 0 if kind in absent else len(here.get(kind, state)) if isinstance(state, list) else 1
            if there != found_here:
                self._differences.append(Difference(f"rng.{kind}", f"{there} generators", f"{found_here}"))

    def _commit(self) -> dict[str, LoadReport]:
        """What may refuse goes first, and is rolled back if it does; what was rehearsed follows; chance is last."""
        present = {
            name: part
            for name, part in self._parts.items()
            if name in self._step.names or isinstance(part, GradientPart)
        }
        stateful = [part for part in present.values() if isinstance(part, StatefulPart)]
        report: dict[str, LoadReport] = {}
        try:
            for name, part in sorted(present.items(), key=lambda item: _turn(item[1])):
                if isinstance(part, LoaderPart):
                    part.after = self._chance
                made = part.commit()
                if made is not None:
                    report[name] = made
        except BaseException:
            for part in reversed(stateful):
                with suppress(Exception):
                    part.roll_back()
            raise
        for part in stateful:
            part.forget()
        for name, made in report.items():
            self._differences += hyperparameter_differences(name, made)
        rng.set_states(self._chance)
        return {name: report[name] for name in present if name in report}

    def expect_next_step(self, applied: Applied, evidence: Evidence) -> Applied:
        """Have the next optimizer step compared with what was recorded; a difference where nothing was."""
        digest = read_digest(self._step.path, self._step.step)
        if digest is not None:
            evidence.expect(self._step.step, self._step.path, digest)
            return applied
        # Training ended before it.
        missing = Difference("next_step", "not recorded", "to be compared")
        return applied._replace(differences=(*applied.differences, missing))


def _turn(part: Part) -> int:
    """When a part is changed: those first whose own code may still refuse, each of which is then as it was."""
    return 0 if isinstance(part, StatefulPart) else 1 if isinstance(part, OptimizerPart) else 2


def _wanted(
    parts: Mapping[str, Part], hidden: Mapping[str, Part], step: OpenedStep, only: Collection[str] | None
) -> dict[str, Part]:
    """The parts to bring back. Raises ``KeyMismatch`` for those that the step doesn't have."""
    every = {**parts, **hidden}
    if only is None:
        wanted = every
    else:
        unknown = [name for name in only if name not in every and name != "rng"]
        if unknown:
            hint = f"It has: {', '.join(near(unknown[0], list(every)) or every)}"
            raise KeyNotFound("the training state has no such component", key=unknown[0], hint=hint)
        wanted = {name: part for name, part in every.items() if name in only or _owner(name) in only}
        wanted = {name: part for name, part in wanted.items() if name in only or not isinstance(part, GradientPart)}
    missing = [name for name, part in wanted.items() if name not in step.names and not isinstance(part, GradientPart)]
    if missing:
        there = [name for name in parts if name in step.names]
        raise KeyMismatch(
            f"the step has nothing for {', '.join(missing)}",
            path=step.path,
            missing=missing,
            hint=f"Say which to restore: only={there!r}",
        )
    return wanted


def _owner(name: str) -> str:
    """The component that a hidden part belongs to; empty for a component."""
    return name.rpartition(".")[0]
