"""Which saved parameter is which of an optimizer's, and which hyperparameters each of its groups gets."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch

from statedict.errors import KeyMismatch, one_line
from statedict.manifest import Finding
from statedict.ops.optimizers.saved import SavedOptimizer, SavedParameter
from statedict.report.units import plural
from statedict.torch.optimizers.families import Problem

__all__ = ["Match", "Names", "Slot", "is_same", "match", "merge_groups", "parameter_names", "slots_of"]

# Components that wrappers put into a parameter's name: DataParallel and DDP, torch.compile, FSDP, activation checkpointing.
_WRAPPERS = frozenset({"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
# Hyperparameters of torch's classes that are yes, no, or None for a choice of its own.
_FLAGS = frozenset({"foreach", "fused", "capturable", "differentiable", "maximize", "decoupled_weight_decay"})
# Names that one sentence lists.
_NAMED = 3


class Slot(NamedTuple):
    """One parameter of the optimizer: the group it is in, every name that it is known by, and what reports call it."""

    param: torch.Tensor
    group: int
    names: tuple[str, ...]
    label: str


class Names(NamedTuple):
    """The names of an optimizer's parameters, a list for each group; None, and why, where they aren't known."""

    groups: list[list[str]] | None
    finding: Finding | None = None


class Match(NamedTuple):
    """The saved parameter of each of the optimizer's, by position in it; ``by`` is "name" or "position"."""

    found: Mapping[int, SavedParameter]
    by: str


# -------------------------------------------------------------------- names


def parameter_names(optimizer: torch.optim.Optimizer, models: Sequence[torch.nn.Module] = ()) -> Names:
    """The optimizer's own names, or else those of the model that has its parameters; none where that is not certain.

    Of several models, the first one that has all parameters names them; where it takes more than one, their names are
    used as long as no two parameters get the same.
    """
    own = _own_names(optimizer)
    if own is not None:
        return Names(own)
    if not models:
        return Names(None)
    groups = [group["params"] for group in optimizer.param_groups]
    tables = [{id(param): name for name, param in model.named_parameters()} for model in models]
    together = {key: name for table in reversed(tables) for key, name in table.items()}
    for table in [*tables, together]:
        if all(id(param) in table for params in groups for param in params):
            names = [[table[id(param)] for param in params] for params in groups]
            if len({name for each in names for name in each}) < len({id(p) for params in groups for p in params}):
                return Names(None, _nameless("the models give the same name to several of its parameters"))
            return Names(names)
    return Names(None, _nameless("not all of its parameters belong to a model that is saved with it"))


def _nameless(why: str) -> Finding:
    message = f"the optimizer is saved without the names of its parameters: {why}. Build it from named_parameters()"
    return Finding("optimizer-without-names", "warning", message)


def _own_names(optimizer: torch.optim.Optimizer) -> list[list[str]] | None:
    names = [group.get("param_names") for group in optimizer.param_groups]
    parallel = all(
        each is not None and len(each) == len(group["params"]) for each, group in zip(names, optimizer.param_groups)
    )
    return [[str(name) for name in each] for each in names if each is not None] if parallel else None


def slots_of(optimizer: torch.optim.Optimizer, model: torch.nn.Module | None) -> list[Slot]:
    """The optimizer's parameters in its order. A tied parameter has each of its names in the model."""
    known: dict[int, list[str]] = {}
    for name, param in model.named_parameters(remove_duplicate=False) if model is not None else ():
        known.setdefault(id(param), []).append(name)
    own = _own_names(optimizer)
    slots: list[Slot] = []
    for number, group in enumerate(optimizer.param_groups):
        for at, param in enumerate(group["params"]):
            names = (*known.get(id(param), ()), *([own[number][at]] if own is not None else ()))
            slots.append(Slot(param, number, tuple(dict.fromkeys(names)), names[0] if names else f"param {len(slots)}"))
    return slots


# -------------------------------------------------------------------- matching


def match(slots: Sequence[Slot], saved: SavedOptimizer, *, groups: int, allow_empty: bool) -> Match:
    """By name where both sides have names, else by position. Raises ``KeyMismatch`` where neither is possible."""
    if saved.has_names and any(slot.names for slot in slots):
        found = _by_name(slots, saved.parameters)
        if not found and not allow_empty:
            raise _nothing_matched(slots, saved)
        return Match(found, "name")
    problems = list(_position_problems(slots, saved, groups))
    if problems:
        raise KeyMismatch(
            "the parameters can only be matched by position, and " + "; ".join(problems),
            hint="Give model=, or build the optimizer from named_parameters(), and save with names",
        )
    return Match(dict(enumerate(saved.parameters)), "position")


def _by_name(slots: Sequence[Slot], parameters: Sequence[SavedParameter]) -> dict[int, SavedParameter]:
    named = [(at, name) for at, slot in enumerate(slots) for name in slot.names]
    saved = [(number, each.name or "") for number, each in enumerate(parameters)]
    bare_named, bare_saved = _without_wrappers(named), _without_wrappers(saved)
    if bare_named is None or bare_saved is None:
        bare_named, bare_saved = {name: at for at, name in named}, {name: number for number, name in saved}
    found: dict[int, SavedParameter] = {}
    for name, number in bare_saved.items():
        if name in bare_named:
            found.setdefault(bare_named[name], parameters[number])
    return dict(sorted(found.items()))


def _without_wrappers(names: Iterable[tuple[int, str]]) -> dict[str, int] | None:
    """The names without the components of wrappers; None where that makes two things one."""
    bare: dict[str, int] = {}
    for number, name in names:
        short = ".".join(part for part in name.split(".") if part not in _WRAPPERS) or name
        if bare.setdefault(short, number) != number:
            return None
    return bare


def _nothing_matched(slots: Sequence[Slot], saved: SavedOptimizer) -> KeyMismatch:
    missing = [slot.label for slot in slots]
    unexpected = [str(each.name) for each in saved.parameters]
    return KeyMismatch(
        "no parameter of the optimizer has a name of the file's",
        missing=missing,
        unexpected=unexpected,
        expected=", ".join(missing[:_NAMED]) + (", …" if len(missing) > _NAMED else ""),
        found=", ".join(unexpected[:_NAMED]) + (", …" if len(unexpected) > _NAMED else "") or "no parameter",
        hint="Give as model= the module whose named_parameters() are called so, or allow_empty=True",
    )


def _position_problems(slots: Sequence[Slot], saved: SavedOptimizer, groups: int) -> Iterator[str]:
    if not saved.is_grouped:
        yield "a flattened state dict has no positions, only names"
        return
    sizes = [sum(slot.group == number for slot in slots) for number in range(groups)]
    there = [sum(each.group == number for each in saved.parameters) for number in range(len(saved.groups))]
    if len(sizes) != len(there):
        yield f"the optimizer has {plural(len(sizes), 'group')}, the file {plural(len(there), 'group')}"
    if sum(sizes) != sum(there):
        yield f"the optimizer has {plural(sum(sizes), 'parameter')}, the file {plural(sum(there), 'parameter')}"
    elif len(sizes) == len(there) and sizes != there:
        yield f"the groups of the optimizer have {_listed(sizes)} parameters, those of the file {_listed(there)}"


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(str(number) for number in numbers)


# -------------------------------------------------------------------- hyperparameters


def merge_groups(
    optimizer: torch.optim.Optimizer,
    slots: Sequence[Slot],
    matched: Match,
    saved: SavedOptimizer,
    keep: Collection[str],
) -> tuple[list[dict[str, object]], list[Problem], list[Finding]]:
    """The hyperparameters of each of the optimizer's groups, without ``params``; what doesn't fit; what to say.

    A group takes those of the saved groups that its parameters come from, as far as these agree, and keeps its own
    where they don't, where they have none (``initial_lr`` of a scheduler), and those in ``keep``.
    """
    made: list[dict[str, object]] = []
    problems: list[Problem] = []
    findings: list[Finding] = []
    origins: list[dict[int, None]] = [{} for _ in optimizer.param_groups]
    for at, each in matched.found.items():
        origins[slots[at].group][each.group] = None
    for number, group in enumerate(optimizer.param_groups):
        own = {name: value for name, value in group.items() if name != "params"}
        offered, torn = _agreed([saved.groups[origin] for origin in origins[number]])
        for name, value in offered.items():
            if name not in keep:
                misfit = list(_hyperparameter_problems(name, f"param_groups.{number}.{name}", own.get(name), value))
                problems += misfit
                own[name] = own.get(name) if misfit else _like(own.get(name), value)
        torn = [name for name in torn if name in group and name not in keep]
        if torn:
            what = f"group {number} has parameters of several saved groups, which differ in {', '.join(map(one_line, torn))}"
            keys = tuple(f"param_groups.{number}.{name}" for name in torn)
            findings.append(Finding("regrouped", "warning", f"{what}: it keeps its own", keys))
        findings += _capturable(number, own, group)
        made.append(own)
    return made, problems, findings


def _agreed(groups: Sequence[Mapping[str, object]]) -> tuple[dict[str, object], list[str]]:
    """What all the groups say alike, and the names of what they don't."""
    names = dict.fromkeys(name for group in groups for name in group)
    absent = object()
    alike = {
        name: all(is_same(group.get(name, absent), groups[0].get(name, absent)) for group in groups) for name in names
    }
    return {name: groups[0][name] for name in names if alike[name]}, [name for name in names if not alike[name]]


def is_same(first: object, second: object) -> bool:
    """Whether two values are equal: tensors by their elements, NaN to NaN, numbers to numbers of their own type."""
    if first is second:
        return True
    if isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor):
        return first.dtype == second.dtype and torch.equal(first.cpu(), second.cpu())
    if isinstance(first, torch.Tensor) or isinstance(second, torch.Tensor):
        return False
    if isinstance(first, (list, tuple)) and isinstance(second, (list, tuple)):
        return len(first) == len(second) and all(is_same(one, other) for one, other in zip(first, second))
    if isinstance(first, float) and first != first:
        return isinstance(second, float) and second != second
    return isinstance(first, bool) == isinstance(second, bool) and bool(first == second)


def _is_number(value: object) -> bool:
    if isinstance(value, torch.Tensor):
        return value.numel() == 1 and not value.is_complex() and value.dtype != torch.bool and not value.is_meta
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _hyperparameter_problems(name: str, key: str, own: object, value: object) -> Iterator[Problem]:
    """Values that can't take the place of the optimizer's own: no number for a number, another count for a pair."""
    found = type(value).__name__
    if name in _FLAGS or isinstance(own, bool):
        if not (value is None or (isinstance(value, (bool, int)) and value in (0, 1))):
            yield Problem(key, "True, False or None", found)
    elif _is_number(own) and not _is_number(value):
        yield Problem(key, "a number", found)
    elif isinstance(own, tuple) and not (isinstance(value, (list, tuple)) and len(value) == len(own)):
        yield Problem(key, f"a tuple of {len(own)}", found)
    elif isinstance(own, tuple) and isinstance(value, (list, tuple)):
        for at, (mine, other) in enumerate(zip(own, value)):
            if _is_number(mine) and not (other is None or _is_number(other)):
                yield Problem(f"{key}.{at}", "a number", type(other).__name__)


def _like(own: object, value: object) -> object:
    """The value as the optimizer has its own: a tensor on the same device, a tuple and not a list."""
    if isinstance(own, torch.Tensor) and isinstance(value, torch.Tensor):
        return value.to(own.device)
    return tuple(value) if isinstance(own, tuple) and isinstance(value, list) else value


def _capturable(number: int, own: dict[str, object], group: Mapping[str, object]) -> Iterator[Finding]:
    """``capturable`` of a file from a GPU is left off for parameters on the CPU: the next step would raise there."""
    on_cpu = any(param.device.type == "cpu" for param in group["params"])  # type: ignore[attr-defined]
    if own.get("capturable") is True and not group.get("capturable") and on_cpu:
        own["capturable"] = group.get("capturable", False)
        message = f"group {number} was capturable; its parameters are on the CPU here, so it isn't"
        yield Finding("capturable-left-off", "info", message, (f"param_groups.{number}.capturable",))
