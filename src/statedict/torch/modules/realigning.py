"""What makes a checkpoint fit a module whose names it doesn't have: the whole plan as rules, or the words that say why there is none.

Only what is sure and loses nothing is carried out: every tensor of the module gets its own, or has its values already (a counter, a
table of indices), and every weight of the source is used, or stands outside of the part that is meant. One doubt, and nothing is loaded.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

from statedict.aligning.alignment import Side
from statedict.aligning.recognising import is_recomputable
from statedict.checkpoint import Checkpoint
from statedict.errors import one_line
from statedict.manifest import Finding
from statedict.ops.diagnosing.evidence import Evidence
from statedict.ops.diagnosing.outline import Outline
from statedict.ops.diagnosing.ruling import Ruling, ruled
from statedict.ops.diagnosing.settling import Settled, settled
from statedict.ops.diagnosing.weights import Weights, weights_of
from statedict.ops.diagnosing.wording import question_of, sentence_of
from statedict.ops.mismatches import listed
from statedict.ops.state_items import state_items
from statedict.report.units import plural
from statedict.rules import Rules
from statedict.torch.modules.targets import Target
from statedict.torch.targets import side_of_module

__all__ = ["Realigned", "realigned"]

# What loses numbers is a person's decision: a slice leaves the rest out.
_LOSSLESS = frozenset({"copy", "split", "unstack", "concat", "stack", "transpose", "squeeze", "permute", "tie"})


# A model that is to be filled has no values of its own that could prove anything.
_NOTHING_KNOWN = Evidence((), {}, False, 0, ())


class Realigned(NamedTuple):
    """What aligning a checkpoint with a module came to.

    ``rules`` make the tensors ``made`` of the module. ``kept`` are tensors of the module that stay as it made them, ``dropped`` tensors of
    the source that it has no place for. ``is_whole``: nothing else is left on either side. ``sentence`` says what was found.
    """

    rules: Rules
    made: tuple[str, ...]
    kept: frozenset[str]
    dropped: tuple[str, ...]
    is_whole: bool
    sentence: str

    @property
    def findings(self) -> list[Finding]:
        """What a report says of it besides the rules."""
        found = [Finding("realigned", "info", self.sentence)]
        if self.dropped:
            what = f"the model has no place for {plural(len(self.dropped), 'tensor')} of the source: {listed(self.dropped)}"
            found.append(Finding("left-out", "info", what, self.dropped))
        return found


def realigned(checkpoint: Checkpoint, target: Target, outside: Collection[str] = ()) -> Realigned:
    """The plan for the module, by names, shapes and order. Reads no tensor. ``outside`` are keys beside the part that is meant."""
    weights = weights_of(checkpoint)
    side = side_of_module(target.module, target)
    plan = settled(weights.side, side, _NOTHING_KNOWN)
    claims = [mapped for mapped in plan.alignment.mapped if mapped.is_claim and mapped.op in _LOSSLESS]
    shapes = {key: entry.shape for key, entry in weights.checkpoint_tensors().items()}
    others = [key for key in state_items(weights.checkpoint) if key not in shapes]
    ruling = ruled(claims, shapes, target.shapes, place=weights.place, others=others)
    made = set(ruling.made)
    kept = _kept(target, side, made)
    unfilled = [key for key in side.tensors if key not in made and key not in kept and not _has_twin(target, key, made)]
    used = {key for mapped in claims for key in mapped.sources}
    dropped = [key for key in weights.side.tensors if key not in used]
    strays = [key for key in _strays(dropped, used, weights) if key not in outside]
    outline = _outline(weights.side, side, plan, ruling)
    whole = not (unfilled or strays or ruling.problem)
    return Realigned(ruling.rules, ruling.made, kept, tuple(dropped), whole, _said(outline, [] if unfilled else strays))


def _outline(source: Side, target: Side, plan: Settled, ruling: Ruling) -> Outline:
    return Outline(
        source=source,
        target=target,
        mapped=plan.alignment.mapped,
        dropped=plan.alignment.dropped,
        unfilled=plan.alignment.unfilled,
        refusal=plan.alignment.refusal,
        evidence=_NOTHING_KNOWN,
        broken=plan.broken,
        left_over=plan.left_over,
        rules=ruling.rules,
        problem=ruling.problem,
        remade=target.buffers,
    )


def _kept(target: Target, side: Side, made: Iterable[str]) -> frozenset[str]:
    """Tensors that the model makes again, as long as they have values here."""
    left = side.buffers - set(made)
    return frozenset(key for key in left if (value := target.slots[key].tensor) is not None and not value.is_meta)


def _has_twin(target: Target, key: str, made: set[str]) -> bool:
    return any(other in made for other in target.tied_with(key))


def _strays(dropped: Sequence[str], used: Iterable[str], weights: Weights) -> list[str]:
    """Tensors of the source that may not be left out: what stands in the part that is used, and is no counter, table or alias."""
    twins = {key: group for group in weights.side.tied for key in group}
    taken = set(used)
    part = _part(taken)
    return [
        key
        for key in dropped
        if not is_recomputable(key)
        and not (part and not key.startswith(part))
        and not any(other in taken for other in twins.get(key, ()))
    ]


def _part(used: Iterable[str]) -> str:
    """The names that all used keys have in front, with their dot; empty where there are none, or where these end in a number."""
    parts: list[str] | None = None
    for key in used:
        own = key.split(".")[:-1]
        if parts is None:
            parts = own
        same = 0
        while same < min(len(parts), len(own)) and parts[same] == own[same]:
            same += 1
        parts = parts[:same]
    while parts and parts[-1].isdigit():
        parts.pop()
    return ".".join(parts) + "." if parts else ""


def _said(outline: Outline, strays: Sequence[str]) -> str:
    """The doctor's first sentence, and what else keeps it from being loaded."""
    words = [sentence_of(outline)]
    if strays and not outline.refusal:
        words.append(f"The model has no place for {listed(strays)}.")
    question = question_of(outline.mapped)
    return " ".join([*words, one_line(question)] if question and not outline.refusal else words)
