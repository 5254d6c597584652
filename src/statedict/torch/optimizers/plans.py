"""What loading a state dict into an optimizer will do, decided and checked before anything changes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch

from statedict.errors import KeyMismatch, SpecMismatch, one_line
from statedict.manifest import Finding
from statedict.ops.optimizers.families import FAMILIES, GENERIC, likely
from statedict.ops.optimizers.saved import SavedOptimizer
from statedict.report.units import plural
from statedict.torch.optimizers.families import Problem, describe, family_of, state_problems
from statedict.torch.optimizers.matching import Match, Slot, match, merge_groups, slots_of

__all__ = ["Plan", "Wishes", "class_name", "make_plan"]

# Hyperparameters that a class got later than others: its __setstate__ adds them. A file that has no `foreach` (torch 1.11)
# and no `maximize` (1.10) either is older.
_LATER = frozenset({"amsgrad", "nesterov", "momentum", "centered"})
_SINCE = frozenset({"foreach", "maximize"})
_ALL_HYPERPARAMETERS = frozenset().union(*(family.hyperparameters for family in FAMILIES.values()))
_ALL_STATES = frozenset().union(*(family.states for family in FAMILIES.values()))
# The lists in the state of LBFGS; the rest are numbers, vectors and None (optim/lbfgs.py, step).
_LISTS = frozenset({"old_dirs", "old_stps", "ro", "al"})
# Problems that one message lists.
_LISTED = 200


class Wishes(NamedTuple):
    """What the caller wants of loading."""

    strict: bool = True
    allow_empty: bool = False
    keep: Sequence[str] = ()  # hyperparameters that stay as the optimizer has them


class Plan(NamedTuple):
    """The state and hyperparameters that an optimizer is to get. Positions count its parameters through all groups."""

    slots: Sequence[Slot]
    saved: SavedOptimizer
    match: Match
    states: Mapping[int, Mapping[str, object]]  # by position, as the file has them
    groups: Sequence[dict[str, object]]
    mismatched: Mapping[int, str]  # by position: matched, and left out because the state doesn't fit
    findings: Sequence[Finding]

    @property
    def loaded(self) -> list[int]:
        """The positions of the parameters that are loaded."""
        return [at for at in self.match.found if at not in self.mismatched]


def class_name(optimizer: torch.optim.Optimizer) -> str:
    """The optimizer's class with its module."""
    return f"{type(optimizer).__module__}.{type(optimizer).__qualname__}"


def make_plan(
    optimizer: torch.optim.Optimizer, saved: SavedOptimizer, model: torch.nn.Module | None, wishes: Wishes
) -> Plan:
    """The plan. Raises ``SpecMismatch`` or ``KeyMismatch`` that lists all that doesn't fit."""
    _check_class(optimizer, saved)
    slots = slots_of(optimizer, model)
    matched = match(slots, saved, groups=len(optimizer.param_groups), allow_empty=wishes.allow_empty)
    groups, problems, findings = merge_groups(optimizer, slots, matched, saved, wishes.keep)
    states, misfits = _states(optimizer, slots, matched, saved, groups)
    lenient = not wishes.strict and matched.by == "name" and not isinstance(optimizer, torch.optim.LBFGS)
    problems += [] if lenient else [problem for each in misfits.values() for problem in each]
    if problems:
        raise _mismatch(problems, matched.by)
    if matched.by == "position":
        findings.append(_by_position(slots, saved))
    return Plan(
        slots,
        saved,
        matched,
        {at: state for at, state in states.items() if at not in misfits},
        groups,
        {at: "; ".join(map(str, each)) for at, each in misfits.items()},
        [*_class_findings(optimizer, saved, groups), *findings],
    )


def _mismatch(problems: Sequence[Problem], by: str) -> SpecMismatch:
    first, *others = problems
    hint = "strict=False leaves out parameters whose state doesn't fit"
    if by == "position":
        hint = "The order of the parameters may be another: save with names, and give model="
    if others:
        more = f"; and {len(others) - _LISTED} more" if len(others) > _LISTED else ""
        hint = f"Also {'; '.join(one_line(problem) for problem in others[:_LISTED])}{more}. {hint}"
    return SpecMismatch(
        f"{plural(len(problems), 'saved value')} {'do' if others else 'does'}n't fit this optimizer",
        key=first.key,
        expected=first.expected,
        found=first.found,
        hint=hint,
    )


def _by_position(slots: Sequence[Slot], saved: SavedOptimizer) -> Finding:
    lacking = (
        "the optimizer's parameters have no names (model= gives them)" if saved.has_names else "the file has no names"
    )
    message = f"{plural(len(slots), 'parameter')} matched by position, because {lacking}; parameters of equal shape can't be told apart"
    return Finding("matched-by-position", "warning", message)


# -------------------------------------------------------------------- the class


def _check_class(optimizer: torch.optim.Optimizer, saved: SavedOptimizer) -> None:
    """Raise ``SpecMismatch`` where hyperparameters or state are those of another class."""
    name = type(optimizer).__name__
    if _is_class(optimizer, saved.optimizer_class):
        return
    stock = family_of(optimizer)
    theirs = saved.hyperparameters - GENERIC
    ours = frozenset(optimizer.defaults) - GENERIC
    here = ours.union(*optimizer.param_groups)
    lacking = (ours - theirs if saved.hyperparameters else frozenset()) - (
        frozenset() if _SINCE & saved.hyperparameters else _LATER
    )
    foreign = (theirs & _ALL_HYPERPARAMETERS) - here
    states = (saved.states & _ALL_STATES) - stock.states if stock is not None else frozenset()
    # A class of someone else's may have got hyperparameters since: it keeps its own.
    strange = bool(lacking) if stock is not None else bool(lacking) and not theirs & ours
    if not (strange or foreign or states):
        return
    guess = (saved.optimizer_class or "").rpartition(".")[2] or likely(theirs, saved.states) or "another"
    shown = ", ".join(sorted(map(one_line, theirs | saved.states))) or "no hyperparameters"
    raise SpecMismatch(
        "saved by another class of optimizer",
        expected=f"{name} ({', '.join(sorted(ours))})",
        found=f"{one_line(guess)}-like ({shown})",
        hint="Make an optimizer of that class, or start without its state",
    )


def _is_class(optimizer: torch.optim.Optimizer, recorded: str | None) -> bool:
    """Whether that is the class's name. Inside torch.optim only its last part counts: the modules have moved."""
    own = class_name(optimizer)
    name = recorded or ""
    inside = name.startswith("torch.optim.") and own.startswith("torch.optim.")
    return name == own or (inside and name.rpartition(".")[2] == type(optimizer).__name__)


def _class_findings(
    optimizer: torch.optim.Optimizer, saved: SavedOptimizer, groups: Sequence[Mapping[str, object]]
) -> Iterator[Finding]:
    recorded = saved.optimizer_class
    if recorded is not None and not _is_class(optimizer, recorded):
        message = f"saved by {one_line(recorded)}, loaded into {class_name(optimizer)}, whose state has the same names"
        yield Finding("another-class", "warning", message)
    for number, (group, own) in enumerate(zip(groups, optimizer.param_groups)):
        key = "decoupled_weight_decay"
        if bool(group.get(key)) != bool(own.get(key)):
            there = "AdamW" if group.get(key) else "Adam"
            message = f"group {number} was saved with the weight decay of {there}: {key}={group.get(key)!r}"
            yield Finding("weight-decay-differs", "warning", message, (f"param_groups.{number}.{key}",))


# -------------------------------------------------------------------- state


def _states(
    optimizer: torch.optim.Optimizer,
    slots: Sequence[Slot],
    matched: Match,
    saved: SavedOptimizer,
    groups: Sequence[Mapping[str, object]],
) -> tuple[dict[int, Mapping[str, object]], dict[int, list[Problem]]]:
    """The state of each matched parameter, by position, and what of it doesn't fit."""
    if isinstance(optimizer, torch.optim.LBFGS):
        return _joint_state(slots, matched, saved)
    family = family_of(optimizer)
    states = {at: each.state for at, each in matched.found.items()}
    problems: dict[int, list[Problem]] = {}
    for at, state in states.items():
        slot = slots[at]
        found = list(state_problems(slot.label, slot.param, state, groups[slot.group], family))
        if found:
            problems[at] = found
    return states, problems


def _joint_state(
    slots: Sequence[Slot], matched: Match, saved: SavedOptimizer
) -> tuple[dict[int, Mapping[str, object]], dict[int, list[Problem]]]:
    """The state of LBFGS: vectors over all parameters one after the other, turned into the optimizer's order."""
    if not matched.found:
        return {}, {}
    if not len(matched.found) == len(slots) == len(saved.parameters):
        names = {each.name for each in matched.found.values()}
        raise KeyMismatch(
            "the state of LBFGS is that of all its parameters together",
            missing=[slot.label for at, slot in enumerate(slots) if at not in matched.found],
            unexpected=[str(each.name) for each in saved.parameters if each.name not in names],
            expected=plural(len(slots), "parameter"),
            found=f"{len(saved.parameters)}, of which {len(matched.found)} match",
        )
    order = {id(each): number for number, each in enumerate(saved.parameters)}
    places = {order[id(each)]: at for at, each in matched.found.items()}
    # A complex number counts as two elements there (optim/lbfgs.py, _numel).
    numels = [slot.param.numel() * (2 if slot.param.is_complex() else 1) for slot in slots]
    state = saved.parameters[0].state
    problems = list(_joint_problems(state, sum(numels)))
    if problems:
        return {}, {0: problems}
    there = [places[number] for number in range(len(places))]
    return {0: {name: _reordered(value, there, numels) for name, value in state.items()}}, {}


def _joint_problems(state: Mapping[str, object], numel: int) -> Iterator[Problem]:
    for name, value in state.items():
        items: Sequence[object] = value if isinstance(value, (list, tuple)) else [value]
        if (name in _LISTS) != isinstance(value, list):
            yield Problem(f"state.{name}", "a list" if name in _LISTS else "a number or a vector", describe(value))
            continue
        for item in items:
            is_vector = isinstance(item, torch.Tensor) and (not item.dim() or tuple(item.shape) == (numel,))
            if not is_vector and not isinstance(item, (int, float, type(None))):
                yield Problem(f"state.{name}", f"[{numel}]", describe(item))


def _reordered(value: object, there: Sequence[int], numels: Sequence[int]) -> object:
    """A vector, or each of a list, whose pieces belong to the parameters ``there``, in the order of the parameters."""
    if isinstance(value, (list, tuple)):
        return [_turned(item, there, numels) for item in value]
    return _turned(value, there, numels)


def _turned(value: object, there: Sequence[int], numels: Sequence[int]) -> object:
    if not isinstance(value, torch.Tensor) or not value.dim() or list(there) == sorted(there):
        return value
    pieces = dict(zip(there, torch.split(value, [numels[at] for at in there])))
    return torch.cat([pieces[at] for at in range(len(numels))])
