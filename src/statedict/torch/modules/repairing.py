"""Loading with the rules that make a checkpoint fit: ``rules="auto"``, and what an error says of them."""

from __future__ import annotations

from typing import NamedTuple

import torch

from statedict.checkpoint import Checkpoint
from statedict.collecting import uncollected
from statedict.errors import KeyMismatch, SpecMismatch, StateDictError
from statedict.manifest import Finding
from statedict.ops.load_report import LoadReport
from statedict.ops.state_items import state_items, tensor_shapes
from statedict.prefixes import Repair, containers_of, find_repair
from statedict.rules import Rules, apply
from statedict.torch.modules.fitting import Choices
from statedict.torch.modules.loading import load_module
from statedict.torch.modules.targets import Target

__all__ = ["advice", "load_repaired"]


class _Way(NamedTuple):
    """Rules that bring the tensors ``made`` of a checkpoint to a module, and what is left on both sides."""

    rules: Rules
    made: int
    kept: frozenset[str]
    dropped: tuple[str, ...]
    findings: tuple[Finding, ...]
    is_whole: bool
    sentence: str


def load_repaired(module: torch.nn.Module, checkpoint: Checkpoint, choices: Choices) -> LoadReport:
    """Load with the rules that make the names fit: prefixes where those are all that differs, else what aligning finds.

    Aligning is begun only where the module can't be filled otherwise. Raises what loading raises, with what was found instead.
    """
    target = Target(module)
    repair = _repair(checkpoint, target)
    if repair is not None and repair.candidates:
        raise KeyMismatch("the weights in the file aren't certain", hint=repair.advice)
    rules = Rules() if repair is None else repair.rules
    seen = apply(checkpoint, rules) if rules else checkpoint
    found: _Way | None = None
    try:
        if choices.strict or _fills(module, seen, choices):
            return _reported(load_module(module, seen, choices, rules=rules), _notes(repair))
    except (KeyMismatch, SpecMismatch) as error:
        found = _aligned(checkpoint, seen, repair, target)
        if not found.is_whole:
            raise _told(error, found.sentence) from error.__cause__
    found = found or _aligned(checkpoint, seen, repair, target)
    if not found.is_whole and found.made <= len(_rehearsed(module, seen, choices).loaded):
        return _reported(load_module(module, seen, choices, rules=rules), _notes(repair))
    choices = choices._replace(kept=found.kept)
    report = load_module(module, apply(checkpoint, found.rules), choices, rules=found.rules)
    report.unexpected = (*report.unexpected, *found.dropped)
    return _reported(report, found.findings)


def _notes(repair: Repair | None) -> tuple[Finding, ...]:
    return () if repair is None else tuple(Finding("repair", "info", note) for note in repair.notes)


def _reported(report: LoadReport, findings: tuple[Finding, ...]) -> LoadReport:
    report.findings = (*report.findings, *findings)
    return report


def _fills(module: torch.nn.Module, checkpoint: Checkpoint, choices: Choices) -> bool:
    """Whether loading what fits leaves nothing of the module out."""
    return not _rehearsed(module, checkpoint, choices).untouched


def _rehearsed(module: torch.nn.Module, checkpoint: Checkpoint, choices: Choices) -> LoadReport:
    return load_module(module, checkpoint, choices._replace(dry_run=True, check=False, allow_empty=True))


def _repair(checkpoint: Checkpoint, target: Target) -> Repair | None:
    """The prefixes by which more of the names fit, if there are such."""
    shapes = tensor_shapes(state_items(checkpoint, target.slots))
    return find_repair(shapes, target.shapes, containers=containers_of(checkpoint.manifest.structure))


def _aligned(checkpoint: Checkpoint, seen: Checkpoint, repair: Repair | None, target: Target) -> _Way:
    """What aligning finds in the checkpoint as it is, and where that is no whole plan, in it under the rules that are known."""
    way = _way(checkpoint, Rules(), target)
    if way.is_whole or repair is None or not repair.rules:
        return way
    other = _way(seen, repair.rules, target, _beside(repair))
    return other if other.is_whole or other.made > way.made else way


def _way(checkpoint: Checkpoint, rules: Rules, target: Target, outside: frozenset[str] = frozenset()) -> _Way:
    from statedict.torch.modules.realigning import realigned  # only what doesn't fit waits for that

    with uncollected():
        found = realigned(checkpoint, target, outside)
    made = Rules([*rules, *found.rules])
    return _Way(made, len(found.made), found.kept, found.dropped, tuple(found.findings), found.is_whole, found.sentence)


def _beside(repair: Repair) -> frozenset[str]:
    """The names, after the repair, of what stands beside the part whose prefix it takes away: a loss, another model."""
    at = next((number for number, rule in enumerate(repair.rules) if rule.name == "strip_prefix"), None)
    if at is None:
        return frozenset()
    prefix, before = str(repair.rules[at].arguments[0]), Rules(repair.rules[:at])
    return frozenset(name for key, name in repair.names.items() if not str(before.renamed(key)).startswith(prefix))


def _told(error: StateDictError, sentence: str) -> StateDictError:
    """The error with what was found in front of its advice."""
    error.hint = f"{sentence} {error.hint}" if error.hint else sentence
    error.args = (error.message,)
    return error


def advice(checkpoint: Checkpoint, module: torch.nn.Module) -> str | None:
    """What to type where the names don't fit, or why nothing would help; None where there is nothing to say."""
    target = Target(module)
    repair = _repair(checkpoint, target)
    if repair is not None and (repair.candidates or repair.matches == repair.wanted):
        return repair.advice
    seen = checkpoint if repair is None else apply(checkpoint, repair.rules)
    way = _aligned(checkpoint, seen, repair, target)
    if way.is_whole:
        return f'{way.sentence} Pass rules="auto"'
    return repair.advice if repair is not None else way.sentence
