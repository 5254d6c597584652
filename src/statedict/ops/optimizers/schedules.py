"""Why the state of one learning rate scheduler is another's: ``load_state_dict`` takes over every value of it, whatever its class.

Source: torch 2.13 ``optim/lr_scheduler.py``: ``state_dict`` is the scheduler's ``__dict__`` without the optimizer, ``load_state_dict`` is
``self.__dict__.update``. ``SequentialLR`` and ``ChainedScheduler`` keep those of others under ``_schedulers``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from statedict.errors import one_line
from statedict.manifest import Finding

__all__ = ["likely_schedule", "schedule_differences"]

# What each class has besides what all have.
_CLASSES = {
    "StepLR": {"step_size", "gamma"},
    "MultiStepLR": {"milestones", "gamma"},
    "ExponentialLR": {"gamma"},
    "ConstantLR": {"factor", "total_iters"},
    "LinearLR": {"start_factor", "end_factor", "total_iters"},
    "CosineAnnealingLR": {"T_max", "eta_min"},
    "CosineAnnealingWarmRestarts": {"T_0", "T_i", "T_mult", "T_cur", "eta_min"},
    "PolynomialLR": {"total_iters", "power"},
    "CyclicLR": {"max_lrs", "total_size", "step_ratio", "mode", "cycle_momentum", "use_base_momentum", "gamma"},
    "OneCycleLR": {"total_steps", "_schedule_phases", "_anneal_func_type", "cycle_momentum"},
    "ReduceLROnPlateau": {"patience", "cooldown", "threshold", "best", "num_bad_epochs", "mode", "factor"},
    "LambdaLR": {"lr_lambdas"},
    "SequentialLR": {"_schedulers", "_milestones"},
    "ChainedScheduler": {"_schedulers"},
}
# How far it is: what a resumed training is meant to take over.
_PROGRESS = frozenset(
    {"last_epoch", "_step_count", "_last_lr", "best", "num_bad_epochs", "cooldown_counter", "T_cur", "T_i"}
)
# What every scheduler has, or one version of torch and not another.
_COMMON = frozenset(
    {"last_epoch", "_step_count", "base_lrs", "_last_lr", "verbose", "_get_lr_called_within_step", "_is_initial"}
)


def likely_schedule(names: frozenset[str] | set[str]) -> str:
    """The class of torch whose attributes are most like these; empty where none is shared."""
    own = set(names) - _COMMON
    best = max(_CLASSES, key=lambda name: len(own & _CLASSES[name]) / len(own | _CLASSES[name]))
    return best if own & _CLASSES[best] else ""


def schedule_differences(
    source: Mapping[str, object], target: Mapping[str, object], kind: str = ""
) -> Iterator[Finding]:
    """What is to be said of loading the state ``source`` into a scheduler with the state ``target``, of the class ``kind``."""
    theirs, ours = set(map(str, source)) - _COMMON, set(map(str, target)) - _COMMON
    was, now = likely_schedule(theirs), kind or likely_schedule(ours)
    foreign = sorted(theirs - ours)
    if foreign and not theirs <= ours:
        lacking = sorted(ours - theirs)
        more = f", and keeps its own {', '.join(map(one_line, lacking))}" if lacking else ""
        message = (
            f"the state is that of {was or 'another class'}, the scheduler is {now or 'another'}: torch loads it without a word. "
            f"It would get {', '.join(map(one_line, foreign))}, which mean nothing to it{more}"
        )
        yield Finding("scheduler-other-class", "error", message, tuple(foreign))
    yield from _rates(source.get("base_lrs"), target.get("base_lrs"))
    changed = [
        name for name in sorted(theirs & ours - _PROGRESS) if _is_plain(source[name]) and source[name] != target[name]
    ]
    if changed:
        said = ", ".join(
            f"{one_line(name)} {one_line(repr(target[name]))} → {one_line(repr(source[name]))}" for name in changed[:6]
        )
        message = f"arguments of this run are replaced by those of the file: {said}. Set them again after loading"
        yield Finding("scheduler-overrides", "warning", message, tuple(changed))


def _rates(theirs: object, ours: object) -> Iterator[Finding]:
    """Base learning rates that the file replaces, or that are not those of as many groups."""
    if not (isinstance(theirs, (list, tuple)) and isinstance(ours, (list, tuple))) or list(theirs) == list(ours):
        return
    if len(theirs) != len(ours):
        message = (
            f"the state has learning rates for {len(theirs)} parameter groups, and the optimizer has {len(ours)} groups"
        )
        yield Finding("scheduler-groups", "error", message, ("base_lrs",))
        return
    was, now = one_line(list(theirs)), one_line(list(ours))
    message = f"the base learning rates become those of the file, {was}: a rate that was changed for this run, {now}, has no effect"
    yield Finding("scheduler-base-lrs", "warning", message, ("base_lrs",))


def _is_plain(value: object) -> bool:
    return isinstance(value, (bool, int, float, str)) or (
        isinstance(value, (list, tuple)) and all(map(_is_plain, value))
    )
