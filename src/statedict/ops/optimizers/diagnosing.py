"""Optimizers and schedulers of two checkpoints, or of a checkpoint and something live: what differs, as an examination."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from statedict.checkpoint import Checkpoint
from statedict.manifest import Finding
from statedict.ops.diagnosing.examination import Examination
from statedict.ops.optimizers.differences import differences
from statedict.ops.optimizers.facts import OptimizerFacts, facts_of
from statedict.ops.optimizers.places import one_optimizer, one_schedule, optimizer_paths, schedule_paths
from statedict.ops.optimizers.saved import SavedOptimizer, read_saved
from statedict.ops.optimizers.schedules import likely_schedule, schedule_differences

__all__ = [
    "examined",
    "facts_about",
    "optimizers_of_files",
    "saved_optimizer",
    "saved_schedule",
    "schedules_of_files",
]


def saved_optimizer(checkpoint: Checkpoint) -> SavedOptimizer:
    """The state of the optimizer in a checkpoint; no tensor is read. Raises ``KeyMismatch`` where there is none or several."""
    path = one_optimizer(checkpoint)
    return read_saved((checkpoint.at(path) if path else checkpoint).tree(), checkpoint.source)


def saved_schedule(checkpoint: Checkpoint) -> Mapping[str, object]:
    """The state of the scheduler in a checkpoint. Raises ``KeyMismatch`` where there is none or several."""
    path = one_schedule(checkpoint)
    found: Any = (checkpoint.at(path) if path else checkpoint).tree()
    return {str(key): value for key, value in found.items()}


def examined(source: Checkpoint, findings: list[Finding], facts: Mapping[str, object]) -> Examination:
    """The findings about what fits what, as of one checkpoint."""
    known = {"readable": True, "format": source.format, "tensors": len(source), "read": "header"}
    return Examination(source.source, findings, {**known, **facts})


def optimizers_of_files(source: Checkpoint, target: Checkpoint) -> Examination | None:
    """What of the optimizer's state of one checkpoint differs from another's; None where either has none, or has weights besides."""
    pairs = [optimizer_paths(each.manifest.structure) for each in (source, target)]
    if not all(pairs) or pairs[0][0] or pairs[1][0]:
        return None
    theirs, ours = (facts_of(saved_optimizer(each)) for each in (source, target))
    return examined(source, list(differences(theirs, ours)), facts_about(theirs))


def facts_about(facts: OptimizerFacts) -> dict[str, object]:
    """The facts of an optimizer's state, JSON-ready."""
    return {"optimizer": facts.kind, "groups": facts.sizes, "has_names": facts.has_names}


def schedules_of_files(source: Checkpoint, target: Checkpoint) -> Examination | None:
    """The same of two schedulers' state dicts."""
    pairs = [schedule_paths(each.manifest.structure) for each in (source, target)]
    if pairs != [[()], [()]]:
        return None
    theirs, ours = saved_schedule(source), saved_schedule(target)
    return examined(source, list(schedule_differences(theirs, ours)), {"scheduler": likely_schedule(set(theirs))})
