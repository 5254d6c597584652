"""A plan put together: what values prove, what names say, and what both come to once the obligations are checked."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from statedict.aligning import align
from statedict.aligning.alignment import CLAIMS, PROVEN, Alignment, Mapped, Side
from statedict.ops.diagnosing.evidence import Evidence
from statedict.ops.diagnosing.obligations import Broken, kept, left_over

__all__ = ["Settled", "settled"]


class Settled(NamedTuple):
    """The plan, what it broke before it was put right, and the elements of used tensors that are left over."""

    alignment: Alignment
    broken: tuple[Broken, ...]
    left_over: Mapping[str, int]


def settled(source: Side, target: Side, evidence: Evidence) -> Settled:
    """The plan for two sides of which the values are known as far as they prove anything. Reads nothing."""
    found = align(source, target, known=evidence.known)
    entries = {mapped.target: mapped for mapped in found.mapped}
    entries.update({mapped.target: mapped for mapped in evidence.known})
    for key, first in evidence.alike.items():
        same = entries.get(first)
        mine = entries.get(key)
        if same is not None and same.tier == PROVEN and same.sources and not (mine is not None and mine.is_claim):
            entries[key] = same._replace(
                target=key,
                op="tie",
                args={"to": same.args.get("to", first) if same.op == "tie" else first},
                reasons=(f"the same values as '{first}'",),
            )
    for group in target.tied:
        _tie(group, entries, found.refusal)
    ordered = tuple([entries[key] for key in target.tensors if key in entries])
    made, wrong = kept(found._replace(mapped=_sliced(ordered, source, target)), source, target)
    return Settled(made, tuple(wrong), left_over(made, source, target))


def _tie(group: Sequence[str], entries: dict[str, Mapped], refusal: str) -> None:
    """Give the keys of one tensor of the target what one of them gets."""
    claimed = [key for key in group if key in entries and entries[key].is_claim]
    if not claimed or refusal:
        return
    first = next((entries[key] for key in claimed if entries[key].op != "tie"), entries[claimed[0]])
    for key in group:
        if key not in claimed:
            reason = f"one tensor with '{first.target}' in the target"
            entries[key] = first._replace(
                target=key, op="tie", args={"to": first.target}, reasons=(reason,), alternatives=(), question=""
            )


def _sliced(entries: Iterable[Mapped], source: Side, target: Side) -> tuple[Mapped, ...]:
    """A range of a tensor of which the rest goes nowhere is a slice, and no split."""
    taken: dict[str, int] = {}
    parts = list(entries)
    for mapped in parts:
        if mapped.op in ("split", "slice") and mapped.tier in CLAIMS and len(mapped.sources) == 1:
            taken[mapped.sources[0]] = taken.get(mapped.sources[0], 0) + _numel(target, mapped.target)
    made = []
    for mapped in parts:
        key = mapped.sources[0] if len(mapped.sources) == 1 else ""
        if mapped.op in ("split", "slice") and mapped.tier in CLAIMS and key in source.tensors:
            mapped = mapped._replace(op="split" if taken[key] >= _numel(source, key) else "slice")
        made.append(mapped)
    return tuple(made)


def _numel(side: Side, key: str) -> int:
    count = 1
    for size in side.tensors[key].shape:
        count *= size
    return count
