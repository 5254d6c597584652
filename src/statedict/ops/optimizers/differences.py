"""Why the state of one optimizer doesn't fit another, or fits and means something else: torch compares the sizes of groups and no more.

``load_state_dict`` of torch (2.13, ``optim/optimizer.py``) goes by position. It raises where the number of groups or their sizes differ.
Shapes, names and the class are not looked at: state of another shape fails at the next step, state of another parameter never.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from statedict.errors import one_line
from statedict.keys import folded
from statedict.manifest import Finding
from statedict.ops.optimizers.facts import OptimizerFacts, Shape, SlotFacts
from statedict.ops.optimizers.families import FAMILIES, GENERIC
from statedict.report.units import plural

__all__ = ["differences"]

# Names or positions that one sentence lists.
_LISTED = 6
_FLAGS = ("fused", "capturable", "foreach", "differentiable", "maximize")
_LOAD = "statedict.load_into(optimizer, file, model=model)"


def differences(source: OptimizerFacts, target: OptimizerFacts, *, accelerated: bool = False) -> Iterator[Finding]:
    """What is to be said of loading the one into the other. ``accelerated``: the target's parameters are on a device of their own."""
    other_class = list(_class(source, target))
    yield from other_class
    yield from _groups(source, target)
    yield from _order(source, target)
    yield from _flags(source, target, accelerated)
    if not other_class:
        yield from _overridden(source, target)


# -------------------------------------------------------------------- the class


def _class(source: OptimizerFacts, target: OptimizerFacts) -> Iterator[Finding]:
    if not source.kind or not target.kind or source.kind == target.kind:
        return
    theirs, ours = FAMILIES.get(source.kind), FAMILIES.get(target.kind)
    if theirs is not None and theirs == ours:
        message = f"the state is that of {source.kind}, the optimizer is {target.kind}: it fits, and the weight decay works otherwise"
        yield Finding("optimizer-other-class", "warning", message)
        return
    lacking = sorted(((ours.hyperparameters if ours is not None else frozenset()) - GENERIC) - _names(source))
    loses = f", which would lose {', '.join(lacking)}" if lacking else ""
    message = (
        f"the state is that of {one_line(source.kind)}, the optimizer is {one_line(target.kind)}{loses}: torch would load it all the same. "
        f"Build one of that class, or start without its state"
    )
    yield Finding("optimizer-other-class", "error", message)


def _names(facts: OptimizerFacts) -> set[str]:
    return {str(name) for group in facts.groups for name in group}


# -------------------------------------------------------------------- groups and slots


def _groups(source: OptimizerFacts, target: OptimizerFacts) -> Iterator[Finding]:
    """Another number of groups, or groups of other sizes, and which slots one side has and the other hasn't."""
    if len(source.groups) != len(target.groups):
        message = (
            f"the file has {plural(len(source.groups), 'parameter group')} ({_numbers(source.sizes)} parameters), the optimizer "
            f"{plural(len(target.groups), 'group')} ({_numbers(target.sizes)}): torch refuses it"
        )
        yield Finding("optimizer-groups", "error", f"{message}. {_remedy(source, target)}")
    elif source.sizes != target.sizes:
        at = next(number for number, pair in enumerate(zip(source.sizes, target.sizes)) if pair[0] != pair[1])
        theirs, ours = source.sizes[at], target.sizes[at]
        message = (
            f"group {at} has {plural(theirs, 'parameter')} in the file and {ours} in the optimizer: torch refuses it"
        )
        yield Finding("optimizer-group-size", "error", f"{message}. {_remedy(source, target)}")
    if len(source.slots) != len(target.slots):
        yield from _extra(source, target)


def _numbers(sizes: Sequence[int]) -> str:
    return ", ".join(map(str, sizes[:_LISTED]))


def _remedy(source: OptimizerFacts, target: OptimizerFacts) -> str:
    if source.has_names:
        return f"The file has names: {_LOAD} goes by them"
    return "Build the optimizer from the same parameters as then, in the same groups and order"


def _extra(source: OptimizerFacts, target: OptimizerFacts) -> Iterator[Finding]:
    """The slots that one side has more, by name where both have names, else by the order of the shapes."""
    if source.has_names and target.has_names:
        theirs, ours = {slot.name for slot in source.slots}, {slot.name for slot in target.slots}
        more = [slot for slot in source.slots if slot.name not in ours]
        less = [slot for slot in target.slots if slot.name not in theirs]
        sure = True
    else:
        many, few = sorted((source.slots, target.slots), key=len, reverse=True)
        found = _left_out([slot.shape for slot in many], [slot.shape for slot in few])
        if found is None:
            return
        chosen, sure = found
        slots = [many[at] for at in chosen]
        more, less = (slots, []) if many is source.slots else ([], slots)
    for where, other, slots in (("the file", "the optimizer", more), ("the optimizer", "the file", less)):
        if slots:
            facts = source if where == "the file" else target
            verb = "are" if sure else "may be (others of the same shape are next to them)"
            message = f"by the order of the shapes, what {where} has more than {other} {verb}"
            message = f"what {where} has more than {other} is" if source.has_names and target.has_names else message
            names = tuple(_label(facts, slot) for slot in slots)
            yield Finding("optimizer-extra-slots", "warning", f"{message}: {_listed([*_said(facts, slots)])}", names)


def _said(facts: OptimizerFacts, slots: Sequence[SlotFacts]) -> Iterator[str]:
    for slot in slots:
        yield f"{one_line(_label(facts, slot))} {slot.shown}"


def _label(facts: OptimizerFacts, slot: SlotFacts) -> str:
    return slot.name or f"parameter {next(at for at, each in enumerate(facts.slots) if each is slot)}"


def _listed(words: Sequence[str]) -> str:
    shown = list(words) if len(words) <= _LISTED else folded(words)
    more = f" and {len(shown) - _LISTED} more" if len(shown) > _LISTED else ""
    return ", ".join(shown[:_LISTED]) + more


def _left_out(many: Sequence[Shape | None], few: Sequence[Shape | None]) -> tuple[list[int], bool] | None:
    """The places of the longer row that are left out to get the shorter, and whether no others would do; None where none do."""
    if None in few and all(shape is None for shape in few):
        return None
    first = _embedded(many, few)
    last = _embedded(many[::-1], few[::-1])
    if first is None or last is None:
        return None
    backwards = [len(many) - 1 - at for at in reversed(last)]
    kept = set(first)
    return [at for at in range(len(many)) if at not in kept], first == backwards


def _embedded(many: Sequence[Shape | None], few: Sequence[Shape | None]) -> list[int] | None:
    """The first places of the longer row at which the shorter is found in order; an unknown shape is any."""
    found: list[int] = []
    at = 0
    for shape in few:
        while at < len(many) and not _may_be(many[at], shape):
            at += 1
        if at == len(many):
            return None
        found.append(at)
        at += 1
    return found


def _may_be(one: Shape | None, other: Shape | None) -> bool:
    return one is None or other is None or one == other


# -------------------------------------------------------------------- order


def _order(source: OptimizerFacts, target: OptimizerFacts) -> Iterator[Finding]:
    """The same parameters in another order, which torch doesn't see; or shapes that can't be the same parameters."""
    pairs = list(zip(source.slots, target.slots))
    if source.has_names and target.has_names:
        moved = [theirs.name for theirs, ours in pairs if theirs.name != ours.name]
        same = {slot.name for slot in source.slots} == {slot.name for slot in target.slots}
        if moved and same:
            message = (
                f"{plural(len(moved), 'parameter')} stand in another order in the file: torch goes by position, and gives each the state "
                f"of another without a word. {_LOAD} goes by the names"
            )
            yield Finding("optimizer-order", "error", message, tuple(str(name) for name in moved))
        return
    if len(source.slots) != len(target.slots):
        return
    wrong = [at for at, (theirs, ours) in enumerate(pairs) if not _may_be(theirs.shape, ours.shape)]
    if wrong:
        theirs, ours = pairs[wrong[0]]
        places = tuple(_label(target, target.slots[at]) for at in wrong)
        known = [slot.shape for slot in source.slots], [slot.shape for slot in target.slots]
        turned = Counter(known[0]) == Counter(known[1])
        how = "the same shapes in another order" if turned else "other parameters"
        how += ", the reverse one" if known[0] == known[1][::-1] else ""
        message = (
            f"the state is of {how}: {one_line(places[0])} is {ours.shown}, and its state {theirs.shown}. "
            f"torch would load it and fail at the next step. {_remedy(source, target)}"
        )
        yield Finding("optimizer-order", "error", message, places)
    elif any(count > 1 for count in Counter(slot.shape for slot in target.slots).values()):
        lacking = "the optimizer's parameters have no names" if source.has_names else "the file has no names"
        message = f"parameters can only be told by position, as {lacking}: of equal shapes it isn't known whether the order is that of then"
        yield Finding("optimizer-by-position", "info", message)


# -------------------------------------------------------------------- hyperparameters


def _flags(source: OptimizerFacts, target: OptimizerFacts, accelerated: bool) -> Iterator[Finding]:
    """Flags that ask for a device, on parameters or counters that are elsewhere."""
    for number, group in enumerate(source.groups):
        if group.get("capturable") is True and not accelerated:
            message = (
                f"group {number} of the file is capturable, and the parameters are on the CPU: with torch's own loading the next step "
                "raises. load_into leaves the flag off"
            )
            yield Finding("optimizer-flags", "warning", message, (f"param_groups.{number}.capturable",))
        devices = {slot.device for slot in source.slots if slot.group == number} - {"", "cpu"}
        if devices and not group.get("capturable") and not group.get("fused"):
            message = (
                f"the step counters of group {number} were saved on {', '.join(sorted(devices))}, and the group is neither capturable nor "
                "fused: moved there again, the next step raises. load_into puts them on the CPU"
            )
            yield Finding("optimizer-flags", "info", message, (f"param_groups.{number}",))
    said = () if accelerated else ("capturable",)
    for number, (theirs, ours) in enumerate(zip(source.groups, target.groups)):
        both = [flag for flag in _FLAGS if flag in theirs and flag in ours and flag not in said]
        changed = [flag for flag in both if bool(theirs[flag]) != bool(ours[flag])]
        if changed:
            words = ", ".join(f"{flag} {theirs[flag]!r} for {ours[flag]!r}" for flag in changed)
            keys = tuple(f"param_groups.{number}.{flag}" for flag in changed)
            yield Finding("optimizer-flags", "info", f"the file changes flags of group {number}: {words}", keys)


def _overridden(source: OptimizerFacts, target: OptimizerFacts) -> Iterator[Finding]:
    """Hyperparameters that the file changes: loading takes its own, whatever the optimizer was built with."""
    said: list[str] = []
    keys: list[str] = []
    for number, (theirs, ours) in enumerate(zip(source.groups, target.groups)):
        for name in theirs:
            if name in ours and name not in _FLAGS and not _is_same(theirs[name], ours[name]):
                said.append(
                    f"{one_line(name)} {ours[name]!r} → {theirs[name]!r}" + (f" of group {number}" if number else "")
                )
                keys.append(f"param_groups.{number}.{name}")
    if said:
        message = f"the file's hyperparameters take the place of the optimizer's: {_listed([one_line(each) for each in said])}"
        names = sorted({key.rpartition(".")[2] for key in keys})
        yield Finding(
            "optimizer-overrides",
            "info",
            f"{message}. keep_hyperparameters={names[:_LISTED]!r} keeps its own",
            tuple(keys),
        )


def _is_same(one: object, other: object) -> bool:
    """Whether two values are equal; tensors aren't looked into, and a list is a tuple."""
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(_is_same(a, b) for a, b in zip(one, other))
    if hasattr(one, "shape") or hasattr(other, "shape"):
        return True
    return bool(one == other)
