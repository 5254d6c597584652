"""What every plan has to keep, whoever made it: nothing used twice, nothing lost without a word, every layer treated alike.

Pure checks over names and shapes. What a rule set owes besides (that it makes just this, that it can be taken back) is checked where
the rules are made (``ruling.py``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import prod
from typing import NamedTuple

from statedict.aligning.alignment import GUESS, PROVEN, Alignment, Left, Mapped, Side
from statedict.dtypes import BY_TORCH
from statedict.keys import template
from statedict.ops.diagnosing.carrying import Carried, Misfit, Step, carried, meant, order_of, steps_before, steps_on

__all__ = ["Broken", "broken", "kept", "left_over"]

# Kinds of numbers that a tensor may change between without another meaning: counters and masks.
_WHOLE = frozenset({"bool", "int", "uint"})


class Broken(NamedTuple):
    """An obligation that isn't kept, by which keys, and how.

    It is ``injective``, ``shapes``, ``numbers``, ``alike``, ``filled`` or ``accounted``.
    """

    obligation: str
    keys: tuple[str, ...]  # of the target; of the source for ``accounted``
    message: str


class _Use(NamedTuple):
    """A part of a source that a tensor of the target takes: a range of each dimension, in an order of its rows."""

    target: str
    order: object
    box: tuple[tuple[int, int], ...]

    @property
    def numel(self) -> int:
        """Elements in it."""
        return prod([stop - start for start, stop in self.box])


def broken(alignment: Alignment, source: Side, target: Side) -> list[Broken]:
    """Everything that the plan owes and doesn't keep."""
    claims = [mapped for mapped in alignment.mapped if mapped.is_claim]
    entries = {mapped.target: mapped for mapped in claims}
    found = list(_alone(alignment.mapped))
    ways: dict[str, Carried] = {}
    shapes = {key: spec.shape for key, spec in source.tensors.items()}
    for mapped in claims:
        spec = target.tensors.get(mapped.target)
        try:
            if spec is None:
                raise Misfit("the target has no such tensor")
            ways[mapped.target] = carried(meant(mapped, entries), shapes, spec.shape)
        except Misfit as error:
            found.append(Broken("shapes", (mapped.target,), str(error)))
    found += _numbers(claims, source, target)
    found += _injective(claims, ways, target)
    found += _alike(claims)
    found += _accounted(alignment, claims, source, target)
    return found


def _alone(mapped: Sequence[Mapped]) -> Iterator[Broken]:
    """Each key of the target has one entry at most."""
    seen: set[str] = set()
    for each in mapped:
        if each.target in seen:
            yield Broken("injective", (each.target,), "it is made twice")
        seen.add(each.target)


def _numbers(claims: Sequence[Mapped], source: Side, target: Side) -> Iterator[Broken]:
    """A float is made of floats: integers in its place are quantised weights."""
    for mapped in claims:
        wanted = _kind(target, mapped.target)
        for key in mapped.sources:
            kind = _kind(source, key)
            if wanted is not None and kind is not None and kind != wanted and not {kind, wanted} <= _WHOLE:
                yield Broken("numbers", (mapped.target,), f"'{key}' holds other numbers: {kind} for {wanted}")
                break


def _kind(side: Side, key: str) -> str | None:
    spec = side.tensors.get(key)
    dtype = None if spec is None else BY_TORCH.get(spec.dtype)
    return None if dtype is None else dtype.kind


def _injective(claims: Sequence[Mapped], ways: Mapping[str, Carried], target: Side) -> Iterator[Broken]:
    """No element of the source goes to two tensors, but to those that are one."""
    one = _representatives(target)
    uses: dict[str, list[_Use]] = {}
    for mapped in claims:
        if mapped.op != "tie" and mapped.target in ways:
            if len(set(mapped.sources)) < len(mapped.sources):
                yield Broken("injective", (mapped.target,), "it uses a tensor twice")
            for key, use in _uses(mapped, ways[mapped.target]):
                uses.setdefault(key, []).append(use)
    for key, taken in uses.items():
        taken.sort(key=lambda use: (str(use.order), use.box))
        for at, first in enumerate(taken):
            for second in taken[at + 1 :]:
                if one.get(first.target, first.target) == one.get(second.target, second.target):
                    continue
                if _overlap(first, second):
                    yield Broken("injective", (first.target, second.target), f"both use '{key}'")
                elif first.order == second.order and second.box[0][0] >= first.box[0][1]:
                    break  # sorted by their first range: no later one begins before it either


def _representatives(side: Side) -> dict[str, str]:
    return {key: group[0] for group in side.tied for key in group}


def _overlap(one: _Use, two: _Use) -> bool:
    if one.order != two.order:
        return True
    return all(
        first < other_stop and other_first < stop for (first, stop), (other_first, other_stop) in zip(one.box, two.box)
    )


def _uses(mapped: Mapped, way: Carried) -> Iterator[tuple[str, _Use]]:
    """What a tensor takes of each of its sources."""
    for key, steps in way.sources:
        chain = [*steps[1:], *(way.then if not way.join else ())]
        yield key, _use(mapped.target, steps[0].before, chain)


def _use(target: str, shape: tuple[int, ...], chain: Sequence[Step]) -> _Use:
    """The part of a tensor that is left after some steps. What comes behind a change of shape is taken for the whole."""
    box = [(0, size) for size in shape]
    dims: list[int] = list(range(len(shape)))
    order: object = None
    for step in chain:
        if step.op == "squeeze":
            if step.before != step.after:
                break
        elif step.op == "transpose":
            dims = [dims[dim] for dim in order_of(step.args, step.before)]
        elif step.op == "permute":
            dim = dims[step.args["dim"] % len(step.before)]
            if box[dim] != (0, shape[dim]) or order is not None:
                break
            order = dim, str(step.args.get("view")), str(step.args.get("order")), str(step.args.get("ranges"))
        else:
            at = step.args["dim"] % len(step.before)
            first = box[dims[at]][0]
            index = step.args.get("index")
            start, stop = (step.args["start"], step.args["stop"]) if index is None else (index, index + 1)
            box[dims[at]] = first + start, first + stop
            if index is not None:
                dims.pop(at)
    whole = all(each == (0, size) for each, size in zip(box, shape))
    return _Use(target, None if whole else order, tuple(box))


def _alike(claims: Sequence[Mapped]) -> Iterator[Broken]:
    """All layers of a template are made by the same op. What values prove may differ: then the layers do."""
    layers: dict[str, dict[object, list[Mapped]]] = {}
    for mapped in claims:
        form, numbers = template(mapped.target)
        if numbers:
            layers.setdefault(form, {}).setdefault(_manner(mapped), []).append(mapped)
    for manners in layers.values():
        if len(manners) > 1:
            unsure = [each for members in manners.values() for each in members if each.tier != PROVEN]
            proven = [manner for manner, members in manners.items() if any(each.tier == PROVEN for each in members)]
            wrong = [each for each in unsure if proven != [_manner(each)]]
            if wrong:
                others = f"other layers of '{wrong[0].target}' are made otherwise"
                yield Broken("alike", tuple([each.target for each in wrong]), others)


def _manner(mapped: Mapped) -> object:
    """What the layers of a template have in common: the ops, but not where they cut."""
    own = "copy" if mapped.op == "tie" else mapped.op
    before, after = ([str(step["op"]) for step in steps] for steps in (steps_before(mapped), steps_on(mapped)))
    return own, tuple(before), tuple(after), str(mapped.args.get("dim")), str(mapped.args.get("dims"))


def _accounted(alignment: Alignment, claims: Sequence[Mapped], source: Side, target: Side) -> Iterator[Broken]:
    """Every key of both sides is used or filled, or listed with a reason."""
    used = {key for mapped in claims for key in mapped.sources}
    filled = {mapped.target for mapped in claims}
    listed = (
        {left.key for left in alignment.dropped if left.reason},
        {left.key for left in alignment.unfilled if left.reason},
    )
    for key in source.tensors:
        if key not in used and key not in listed[0]:
            yield Broken("accounted", (key,), "nothing says what becomes of it")
    for key in target.tensors:
        if key not in filled and key not in listed[1]:
            yield Broken("filled", (key,), "nothing says why it isn't filled")


def kept(alignment: Alignment, source: Side, target: Side) -> tuple[Alignment, list[Broken]]:
    """The plan without the claims that break an obligation: they become guesses. With it, what was broken.

    What isn't listed is listed. Of two claims on one tensor the proven one stays, if only one is.
    """
    entries = {mapped.target: mapped for mapped in alignment.mapped}
    wrong: list[Broken] = []
    for fault in broken(alignment, source, target):
        if fault.obligation in ("accounted", "filled"):
            continue
        wrong.append(fault)
        proven = [key for key in fault.keys if key in entries and entries[key].tier == PROVEN]
        for key in fault.keys:
            if key in entries and entries[key].is_claim and proven != [key]:
                mapped = entries[key]
                entries[key] = mapped._replace(tier=GUESS, reasons=(*mapped.reasons, f"but {fault.message}"))
    claims = [mapped for mapped in entries.values() if mapped.is_claim]
    used = {key for mapped in claims for key in mapped.sources}
    filled = {mapped.target for mapped in claims}
    why = {left.key: left.reason for left in alignment.dropped}, {left.key: left.reason for left in alignment.unfilled}
    dropped = [
        Left(key, why[0].get(key) or "nothing in the target takes it") for key in source.tensors if key not in used
    ]
    unfilled = [Left(key, why[1].get(key) or _why(entries.get(key))) for key in target.tensors if key not in filled]
    ordered = tuple([entries[key] for key in target.tensors if key in entries])
    return alignment._replace(mapped=ordered, dropped=tuple(dropped), unfilled=tuple(unfilled)), wrong


def _why(mapped: Mapped | None) -> str:
    if mapped is None or not mapped.sources:
        return "nothing in the source fits"
    return mapped.question or (mapped.reasons[-1] if mapped.reasons else "not sure enough")


def left_over(alignment: Alignment, source: Side, target: Side) -> dict[str, int]:
    """The elements of each used tensor of the source that no claim takes, where there are any."""
    shapes = {key: spec.shape for key, spec in source.tensors.items()}
    taken: dict[str, dict[object, int]] = {}
    for mapped in alignment.mapped:
        if mapped.is_claim and mapped.op != "tie":
            way = carried(mapped, shapes, target.tensors[mapped.target].shape)
            for key, use in _uses(mapped, way):
                taken.setdefault(key, {})[use.box, use.order] = use.numel
    rest = {key: prod(shapes[key]) - sum(boxes.values()) for key, boxes in taken.items()}
    return {key: count for key, count in rest.items() if count > 0}
