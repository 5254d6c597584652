"""What shipped rules say where names and shapes leave a question open: is this square matrix transposed, do those rows lie in pairs?

A rule set is believed only where it explains everything: the source has the names that it begins with, its rules make all of the target's
names and shapes and no others, the numbers that it needs are told by the tensors, and no sure mapping says otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import TYPE_CHECKING, Any

from statedict.aligning.alignment import AMBIGUOUS, CORROBORATED, UNDECIDABLE, Mapped, Side
from statedict.aligning.recognising import is_recomputable
from statedict.errors import RuleError
from statedict.keys import matches
from statedict.knowledge.rulesets import RuleSet, candidates
from statedict.ops.diagnosing.obligations import kept, left_over
from statedict.ops.diagnosing.settling import Settled
from statedict.rules import Rule, Rules
from statedict.rules import plan as planned
from statedict.rules.named import made_of
from statedict.rules.patterns import Pattern

if TYPE_CHECKING:
    from statedict.ops.diagnosing.weights import Weights

__all__ = ["answered"]

_Shapes = Mapping[str, tuple[int, ...]]
# Rules through which one tensor is followed. What another one concerns isn't answered here.
_NAMES = ("rename", "drop")
_LAYOUTS = ("transpose", "reorder")


def answered(plan: Settled, source: Weights, target: Side) -> Settled:
    """The plan with the open questions answered that shipped rules answer, all by the same set; else the plan as it is. Reads nothing."""
    mapped, refusal = plan.alignment.mapped, plan.alignment.refusal
    asked = {each.target for each in mapped if each.tier in (AMBIGUOUS, UNDECIDABLE)}
    if not asked or refusal or source.beside:
        return plan
    shapes = {key: spec.shape for key, spec in source.side.tensors.items()}
    wanted = {key: spec.shape for key, spec in target.tensors.items()}
    for found in candidates(shapes):
        values = found.values({**wanted, **shapes})
        rules = None if values is None else _rules(found, values)
        if rules is None or not _makes(rules, source, target):
            continue
        said = _said(found, rules, shapes, wanted)
        if all(_agree(each, said.get(each.target)) for each in mapped if each.is_claim):
            made = [said.get(each.target, each) if each.target in asked else each for each in mapped]
            after, broken = kept(plan.alignment._replace(mapped=tuple(made)), source.side, target)
            return plan if broken else Settled(after, plan.broken, left_over(after, source.side, target))
    return plan


def _rules(found: RuleSet, values: Mapping[str, int]) -> Rules | None:
    """The rules with these numbers; None where these can't be."""
    try:
        return made_of(found, values)
    except RuleError:
        return None


def _makes(rules: Rules, source: Weights, target: Side) -> bool:
    """Whether the rules make just the target's names and shapes. What a model makes again by itself doesn't count, nor do other names."""
    try:
        made = planned(source.checkpoint, rules).checkpoint
    except RuleError:
        return False
    wanted = {key: spec.shape for key, spec in target.tensors.items()}
    fits = {key for key in made if wanted.get(key) == made[key].shape}
    twins = {key for group in target.tied if fits.intersection(group) for key in group}
    remade = {key for key in wanted if is_recomputable(key)} | target.buffers
    return wanted.keys() <= fits | twins | remade and all(key in fits or is_recomputable(key) for key in made)


def _said(found: RuleSet, rules: Rules, shapes: _Shapes, wanted: _Shapes) -> dict[str, Mapped]:
    """What makes each tensor of the target that the rules make of a single one, by new names and other layouts alone."""
    reason = f"the shipped rules '{found.name}' make exactly these names and shapes"
    made: dict[str, Mapped] = {}
    for key, shape in shapes.items():
        way = _way(rules, key, shape)
        if way is not None and way[0] in wanted:
            name, steps = way
            first: dict[str, Any] = steps[0] if steps else {"op": "copy"}
            args = {word: value for word, value in first.items() if word != "op"}
            more = {"then": steps[1:]} if len(steps) > 1 else {}
            made[name] = Mapped(name, first["op"], (key,), CORROBORATED, (reason,), {**args, **more})
    return made


def _way(rules: Rules, key: str, shape: tuple[int, ...]) -> tuple[str, list[dict[str, Any]]] | None:
    """The name that the rules give a tensor, and the steps on the way; None for one that is left out, or that another rule concerns."""
    steps: list[dict[str, Any]] = []
    for rule in rules:
        if rule.name in _LAYOUTS:
            if matches(key, rule.arguments[0]):
                steps.append(_step(rule, shape))
                shape = shape[::-1] if rule.name == "transpose" else shape
        elif rule.name not in _NAMES:
            if any(Pattern(text).match(key) is not None for text in rule.arguments[:1] if isinstance(text, str)):
                return None
        elif (name := rule.renamed(key)) is not None:
            key = name
        else:
            return None
    return key, steps


def _step(rule: Rule, shape: tuple[int, ...]) -> dict[str, Any]:
    """The rule as a step of a plan, on a tensor of this shape."""
    if rule.name == "transpose":
        return {"op": "transpose", "dims": [1, 0]}
    _, view, order, dim = rule.arguments
    rest = shape[dim] // prod([size for size in view if size >= 0])
    return {"op": "permute", "dim": dim, "view": [rest if size < 0 else size for size in view], "order": list(order)}


def _agree(claim: Mapped, said: Mapped | None) -> bool:
    """Whether a sure mapping is what the rules say, as far as they were followed; a tied name says nothing of its own."""
    if said is None or claim.op == "tie":
        return True
    return (claim.op, claim.sources) == (said.op, said.sources)
