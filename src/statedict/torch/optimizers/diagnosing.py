"""The state of an optimizer or scheduler in a checkpoint against a live one: why it doesn't fit, or fits and means something else."""

from __future__ import annotations

from typing import Any

import torch

from statedict.checkpoint import Checkpoint
from statedict.errors import KeyMismatch, SpecMismatch, StateDictError, Unsupported
from statedict.keys import Path
from statedict.lazy_tensor import LazyTensor
from statedict.manifest import Finding
from statedict.ops.diagnosing.examination import Examination
from statedict.ops.optimizers.diagnosing import examined, facts_about, saved_schedule
from statedict.ops.optimizers.differences import differences
from statedict.ops.optimizers.facts import OptimizerFacts, SlotFacts, facts_of
from statedict.ops.optimizers.places import one_optimizer
from statedict.ops.optimizers.saved import read_saved
from statedict.ops.optimizers.schedules import likely_schedule, schedule_differences
from statedict.torch.building import dtype_in_torch
from statedict.torch.optimizers.loading import load_optimizer
from statedict.torch.optimizers.matching import slots_of

__all__ = ["examine_optimizer", "examine_scheduler"]

# What loading says of things that are said here with more.
_SAID = frozenset({"matched-by-position", "weight-decay-differs", "another-class", "capturable-left-off"})
# Lists and dicts inside of each other that an optimizer's state has at most.
_DEEPEST = 32


def examine_optimizer(optimizer: torch.optim.Optimizer, source: Checkpoint) -> Examination:
    """What is to be said of loading the optimizer's state of a checkpoint. Nothing is changed, and no tensor read.

    Raises ``KeyMismatch`` where there is no such state in it, or several.
    """
    path: Path = one_optimizer(source)
    tree = (source.at(path) if path else source).tree()
    theirs, ours = facts_of(read_saved(tree, source.source)), _facts_of(optimizer)
    accelerated = all(slot.device not in ("cpu", "meta") for slot in ours.slots)
    found = list(differences(theirs, ours, accelerated=accelerated))
    if not any(finding.level == "error" for finding in found):
        found += _tried(optimizer, tree, source)
    return examined(source, found, facts_about(theirs))


def _facts_of(optimizer: torch.optim.Optimizer) -> OptimizerFacts:
    slots = slots_of(optimizer, None)
    groups = [
        {key: value for key, value in group.items() if key not in ("params", "param_names")}
        for group in optimizer.param_groups
    ]
    states = frozenset(str(name) for state in optimizer.state.values() if isinstance(state, dict) for name in state)
    return OptimizerFacts(
        type(optimizer).__name__,
        [
            SlotFacts(
                slot.names[0] if slot.names else None, slot.group, tuple(slot.param.shape), slot.param.device.type
            )
            for slot in slots
        ],
        groups,
        states,
    )


def _tried(optimizer: torch.optim.Optimizer, tree: Any, source: Checkpoint) -> list[Finding]:
    """What loading says of the shapes and kinds of the state, which is all that is left to be wrong."""
    try:
        report = load_optimizer(optimizer, _without_values(tree), source=source.source, dry_run=True, allow_empty=True)
    except (KeyMismatch, SpecMismatch, Unsupported) as error:
        return [Finding("optimizer-state", "error", _bare(error))]
    return [finding for finding in report.findings if finding.code not in _SAID]


def _bare(error: StateDictError) -> str:
    """The error without the file's name."""
    text = str(error)
    return text.removeprefix(f"{error.path}: ") if error.path else text


def _without_values(tree: Any, depth: int = 0) -> Any:
    """The state with zeros in the place of every tensor, which have no memory: shapes and dtypes are what is looked at."""
    if isinstance(tree, LazyTensor):
        return torch.zeros((), dtype=dtype_in_torch(tree.entry)).expand(tree.shape)
    if depth > _DEEPEST:
        return tree
    if isinstance(tree, dict):
        return {key: _without_values(value, depth + 1) for key, value in tree.items()}
    return type(tree)(_without_values(value, depth + 1) for value in tree) if type(tree) in (list, tuple) else tree


def examine_scheduler(scheduler: Any, source: Checkpoint) -> Examination:
    """What is to be said of loading the scheduler's state of a checkpoint. Nothing is changed.

    Raises ``KeyMismatch`` where there is no such state in it, or several.
    """
    theirs = saved_schedule(source)
    found = list(schedule_differences(theirs, scheduler.state_dict(), type(scheduler).__name__))
    return examined(source, found, {"scheduler": likely_schedule(set(theirs))})
