"""What is wrong with a checkpoint, and what makes it fit another: ``diagnose``."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

from statedict import bridge
from statedict.aligning.alignment import Mapped
from statedict.checkpoint import Checkpoint
from statedict.checkpoint import open as open_checkpoint
from statedict.collecting import uncollected
from statedict.errors import FormatError, LimitExceeded, Unsupported
from statedict.keys import display
from statedict.ops.diagnosing.diagnosis import Diagnosis
from statedict.rules import Rules

if TYPE_CHECKING:
    from statedict.aligning.alignment import Alignment
    from statedict.limits import Limits
    from statedict.manifest import Finding
    from statedict.ops.diagnosing.examination import Examination
    from statedict.ops.diagnosing.outline import Outline
    from statedict.ops.diagnosing.ruling import Ruling
    from statedict.ops.diagnosing.weights import Weights

__all__ = ["Diagnosis", "diagnose"]


def diagnose(source: object, target: object = None, *, probe: object = None, limits: Limits | None = None) -> Diagnosis:
    """What a checkpoint is and what looks wrong in it; with a target, what makes the target's tensors of the source's.

    Both are what ``open`` takes; the target may be a live module too, on the meta device or not, an optimizer or a scheduler. ``probe`` are
    inputs for a module (or a ``Probe``): a copy of it is filled and run, to say which tensors matter and whether the output is right.

    Of a training checkpoint the weights are meant. The first few values of every tensor are looked at; where
    they are the same on both sides, the tensors are read once, and what the values prove is certain: new names, transposed, split, fused,
    stacked and reordered tensors. Names, shapes and order decide the rest, or leave it open with the question that would decide it.
    Nothing is guessed: ``rules`` and ``fix`` carry out what is proven or corroborated. Without a target every value is read once.

    Memory stays bounded, nothing of the files is run, and nothing is written. Raises what ``open`` raises; a source that is no checkpoint,
    or a damaged one, is a finding.
    """
    if bridge.is_optimizer(target) or bridge.is_scheduler(target):
        return _of_live(source, target, limits)
    module = target if bridge.is_module(target) else None
    if probe is not None and module is None:
        raise Unsupported("a probe needs a model that can be run", hint="Give the module as the target")
    from statedict.ops.diagnosing.contents import examine

    if target is None:
        found = examine(source, limits=limits)
        return Diagnosis(source, found.source, examination=found)
    with ExitStack() as stack:
        wanted = _opened(target, limits, stack)
        try:
            given = _opened(source, limits, stack)
        except LimitExceeded:
            raise
        except FormatError:
            found = examine(source, quick=True, limits=limits)
            return Diagnosis(source, found.source, examination=found, target=wanted.source)
        states = None if module is not None else _of_states(given, wanted)
        if states is not None:
            return Diagnosis(source, given.source, examination=states, target=wanted.source)
        with uncollected():
            outline, tried = _outline(given, wanted, module, probe)
        noted = _notes(given.source, tried)
        return Diagnosis(source, given.source, wanted=target, target=wanted.source, outline=outline, examination=noted)


def _notes(source: str, tried: Sequence[Finding]) -> Examination | None:
    """What a probe has shown, as a part of a diagnosis."""
    from statedict.ops.diagnosing.examination import Examination

    return Examination(source, tried, {}) if tried else None


def _of_live(source: object, target: object, limits: Limits | None) -> Diagnosis:
    """What is to be said of loading a state into an optimizer or a scheduler."""
    with ExitStack() as stack:
        given = _opened(source, limits, stack)
        found = bridge.examine_live(target, given)
        return Diagnosis(source, given.source, examination=found, target=type(target).__name__)


def _of_states(given: Checkpoint, wanted: Checkpoint) -> Examination | None:
    """What is to be said of two states of optimizers or of schedulers; None where it is weights that are compared."""
    from statedict.ops.optimizers.diagnosing import optimizers_of_files, schedules_of_files

    found = optimizers_of_files(given, wanted)
    return found if found is not None else schedules_of_files(given, wanted)


def _opened(source: object, limits: Limits | None, stack: ExitStack) -> Checkpoint:
    """The checkpoint, closed with the stack unless it was passed in: then its owner closes it."""
    checkpoint = open_checkpoint(source, limits=limits)
    if not isinstance(source, Checkpoint):
        stack.callback(checkpoint.close)
    return checkpoint


def _outline(given: Checkpoint, wanted: Checkpoint, module: object, probe: object) -> tuple[Outline, Sequence[Finding]]:
    """Everything about two checkpoints, or one and a module, and what a probe has shown. Source keys are those of the whole file."""
    from statedict.aligning.recognising import is_recomputable
    from statedict.ops.diagnosing.evidence import evidence_of
    from statedict.ops.diagnosing.outline import Outline
    from statedict.ops.diagnosing.settling import settled
    from statedict.ops.diagnosing.weights import weights_of
    from statedict.ops.hypotheses import answered

    source, target = weights_of(given), weights_of(wanted, wanted=True)
    if module is not None:
        target = target._replace(side=bridge.side_of_module(module))
    evidence = evidence_of(source, target)
    plan = answered(settled(source.side, target.side, evidence), source, target.side)
    tried: Sequence[Finding] = ()
    if probe is not None:
        probed = bridge.probed(module, source, plan.alignment, probe)
        plan, tried = plan._replace(alignment=probed.alignment), probed.findings
    ruling = _ruling(plan.alignment, source, target)
    remade = frozenset([key for key in target.side.tensors if is_recomputable(key) or key in target.side.buffers])
    named = _with_prefix(plan.alignment, source)
    side = source.side._replace(tensors={source.prefix + key: spec for key, spec in source.side.tensors.items()})
    outline = Outline(
        side,
        target.side,
        named.mapped,
        named.dropped,
        named.unfilled,
        named.refusal,
        evidence,
        plan.broken,
        {source.prefix + key: count for key, count in plan.left_over.items()},
        ruling.rules,
        ruling.problem,
        remade,
        ruling.only_once,
    )
    return outline, tried


def _ruling(alignment: Alignment, source: Weights, target: Weights) -> Ruling:
    """The rules of the sure part of a plan; none where nothing has to change."""
    from statedict.ops.diagnosing.ruling import Ruling, ruled

    claims = [mapped for mapped in alignment.mapped if mapped.is_claim]
    shapes = {key: entry.shape for key, entry in source.checkpoint_tensors().items()}
    objects = list(display(source.checkpoint.manifest.objects))
    wanted = {key: spec.shape for key, spec in target.side.tensors.items()}
    if not claims:
        return Ruling(Rules(), ())
    return ruled(claims, shapes, wanted, place=source.place, others=objects)


def _with_prefix(alignment: Alignment, source: Weights) -> Alignment:
    """The plan with the names that the source's tensors have in the whole file."""
    prefix = source.prefix
    if not prefix:
        return alignment
    return alignment._replace(
        mapped=tuple([_named(mapped, prefix) for mapped in alignment.mapped]),
        dropped=tuple([left._replace(key=prefix + left.key) for left in alignment.dropped]),
    )


def _named(mapped: Mapped, prefix: str) -> Mapped:
    return mapped._replace(
        sources=tuple([prefix + key for key in mapped.sources]),
        alternatives=tuple([tuple([prefix + key for key in keys]) for keys in mapped.alternatives]),
    )
