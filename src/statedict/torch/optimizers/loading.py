"""State dicts of optimizers by the names of parameters: what is saved, and loading it where it belongs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from statedict.errors import KeyMismatch, SpecMismatch, Unsupported, one_line
from statedict.ops.load_report import Coverage, LoadReport
from statedict.ops.optimizers.saved import CLASS_KEY, read_saved
from statedict.torch.optimizers.families import family_behind, state_dtype
from statedict.torch.optimizers.matching import Slot, is_same, parameter_names
from statedict.torch.optimizers.plans import Plan, Wishes, class_name, make_plan

__all__ = ["load_optimizer", "named_state_dict"]

# Lists in lists of a state: torch's own copying of them is recursive.
_DEEPEST = 32


def named_state_dict(optimizer: torch.optim.Optimizer, models: Sequence[torch.nn.Module] = ()) -> dict[str, Any]:
    """The optimizer's ``state_dict()``, through its hooks, with ``param_names`` in each group and the class beside.

    The names are the optimizer's own or, by identity of the parameters, those of ``models``; where they aren't certain
    there are none (``parameter_names`` says why). The tensors are the optimizer's; its dicts are not changed.

    ``optimizer_class`` stands at the top: torch's ``load_state_dict`` reads two keys there and leaves others alone
    (torch 2.13). It takes ``param_names`` over into an optimizer built without names, as it does with names of its own.
    """
    made = dict(optimizer.state_dict())
    groups = made.get("param_groups")
    if not isinstance(groups, list) or "state" not in made:
        return made
    names = parameter_names(optimizer, models).groups
    made["param_groups"] = [dict(group) for group in groups]
    if names is not None and [len(each) for each in names] == [len(group["params"]) for group in groups]:
        for group, each in zip(made["param_groups"], names):
            group.setdefault("param_names", each)
    made.setdefault(CLASS_KEY, class_name(optimizer))
    return made


# -------------------------------------------------------------------- loading


def load_optimizer(
    optimizer: torch.optim.Optimizer,
    saved: Mapping[Any, Any],
    *,
    model: torch.nn.Module | None = None,
    strict: bool = True,
    source: str = "",
    allow_empty: bool = False,
    keep_hyperparameters: Sequence[str] = (),
    dry_run: bool = False,
    adopt: bool = False,
) -> LoadReport:
    """Load a state dict into an optimizer by the names of parameters; by position where there are none. Returns what was done.

    ``saved`` is torch's form, the form by name of ``torch.distributed.checkpoint.state_dict``, or its flattened form;
    it is not changed and its tensors are copied (``adopt``: they are the caller's to give away, and those that need no other dtype
    or device become the optimizer's). The optimizer's names are its own and those of ``model``. Order, groups
    and wrappers may differ. Parameters that the file has no state for (``missing``) are left as they are. Hyperparameters
    come from the file but for ``keep_hyperparameters``; each that changes is in ``overridden``.

    Raises ``SpecMismatch`` for another class's state or for shapes and values that don't fit (with ``strict=False``
    parameters whose state doesn't fit are left as they are, if matched by name), ``KeyMismatch`` where parameters can't be
    matched, ``Unsupported`` where the optimizer's own ``load_state_dict`` fails; the optimizer is then as it was. Hooks
    for loading run once and see a state dict in the optimizer's order. ``dry_run`` checks all of it and changes nothing.
    """
    found = read_saved(saved, source)
    try:
        plan = make_plan(optimizer, found, model, Wishes(strict, allow_empty, keep_hyperparameters))
        before = [dict(group) for group in optimizer.param_groups]
        cast = {} if dry_run else _commit(optimizer, plan, adopt=adopt)
    except (KeyMismatch, SpecMismatch, Unsupported) as error:
        raise error.located(source or None) from error.__cause__
    return _report(optimizer, plan, source, before, cast)


# -------------------------------------------------------------------- state


class _Copier:
    """Saved state as the optimizer will hold it, copied unless it is adopted; ``cast`` has what had another dtype."""

    def __init__(
        self, optimizer: torch.optim.Optimizer, groups: Sequence[Mapping[str, object]], *, adopt: bool
    ) -> None:
        self._adopt = adopt
        self._family = family_behind(optimizer)
        self._groups = groups  # the hyperparameters that will hold
        self.cast: dict[str, str] = {}

    def state(self, slot: Slot, state: Mapping[str, object]) -> dict[str, object]:
        """A parameter's whole state."""
        return {name: self._value(f"{slot.label}.{name}", name, value, slot, 0) for name, value in state.items()}

    def _value(self, key: str, name: object, value: object, slot: Slot, depth: int) -> object:
        if depth > _DEEPEST:
            raise Unsupported("lists within lists, too deep to be the state of an optimizer", key=key)
        if isinstance(value, torch.Tensor):
            return self._tensor(key, name, value, slot)
        if isinstance(value, dict):
            return {each: self._value(f"{key}.{each}", each, item, slot, depth + 1) for each, item in value.items()}
        if type(value) is list or type(value) is tuple:
            items = [self._value(f"{key}.{at}", None, item, slot, depth + 1) for at, item in enumerate(value)]
            return items if isinstance(value, list) else tuple(items)
        return value

    def _tensor(self, key: str, name: object, value: torch.Tensor, slot: Slot) -> torch.Tensor:
        group, param = self._groups[slot.group], slot.param
        device: torch.device | str = param.device
        dtype = value.dtype if name == "step" else state_dtype(name, value, param, group, self._family)
        if name == "step" and not (group.get("fused") or group.get("capturable")):
            device = "cpu" if self._family is not None else value.device
        if dtype != value.dtype:
            self.cast[key] = f"{value.dtype} in the source, {dtype} here".replace("torch.", "")
        return value.detach().to(device=device, dtype=dtype, copy=not self._adopt)


# -------------------------------------------------------------------- the change


def _commit(optimizer: torch.optim.Optimizer, plan: Plan, *, adopt: bool) -> dict[str, str]:
    """Hand the state dict, put together in the optimizer's order, to its ``load_state_dict``. Returns what was cast.

    torch casts all state to the parameters' dtype on the way. What is to stay as it is comes back behind that, in front of
    the caller's hooks, except what a hook has replaced. Whatever fails, the optimizer is as it was.
    """
    copier = _Copier(optimizer, plan.groups, adopt=adopt)
    made = _state_dict(optimizer, plan, copier)
    own = [value for state in made["state"].values() if isinstance(state, dict) for value in state.values()]
    ours = {id(value) for value in own if not isinstance(value, (bool, int, float, type(None)))}
    seen: list[Mapping[str, Any]] = []

    def see(_: object, state_dict: Mapping[str, Any]) -> None:
        seen.append(state_dict)

    def put_back(_: object) -> None:
        ids = [each for group in seen[-1]["param_groups"] for each in group["params"]]
        for each, slot in zip(ids, plan.slots):
            state = seen[-1]["state"].get(each, {})
            kept = {name: value for name, value in state.items() if name != "step" and id(value) in ours}
            if kept:
                optimizer.state[slot.param].update(kept)

    snapshot = _Snapshot(optimizer)
    hooks = [
        optimizer.register_load_state_dict_pre_hook(see),
        optimizer.register_load_state_dict_post_hook(put_back, prepend=True),
    ]
    try:
        optimizer.load_state_dict(made)
    except BaseException as error:
        snapshot.restore()
        if not isinstance(error, Exception):
            raise
        what = f"{type(optimizer).__name__}.load_state_dict failed with {type(error).__name__}: {one_line(error)}"
        raise Unsupported(what, hint="The optimizer is as it was before") from error
    finally:
        for hook in hooks:
            hook.remove()
    return copier.cast


def _state_dict(optimizer: torch.optim.Optimizer, plan: Plan, copier: _Copier) -> dict[Any, Any]:
    """The state dict for the optimizer's own method: parameters by position, state copied; what isn't loaded as it is."""
    states: dict[object, object] = {}
    loaded = set(plan.loaded)
    # Its constructor makes the state that its step reads.
    starts_with_state = isinstance(optimizer, torch.optim.Adagrad)
    for at, slot in enumerate(plan.slots):
        state = plan.states.get(at, {})
        if state:
            states[at] = copier.state(slot, state)
        elif slot.param in optimizer.state and (at not in loaded or starts_with_state):
            states[at] = optimizer.state[slot.param]
    states.update({key: value for key, value in optimizer.state.items() if not isinstance(key, torch.Tensor)})
    for key, value in plan.saved.loose.items():
        states[key] = value.detach().clone() if isinstance(value, torch.Tensor) else value
    groups: list[dict[str, object]] = []
    for number, group in enumerate(plan.groups):
        groups.append({**group, "params": [at for at, slot in enumerate(plan.slots) if slot.group == number]})
    return {**plan.saved.extra, "state": states, "param_groups": groups}


class _Snapshot:
    """An optimizer's attributes, state and groups: the same objects with the same contents, tensors not copied."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self._attributes = dict(vars(optimizer))
        self._state = dict(optimizer.state)
        self._states = [(state, dict(state)) for state in optimizer.state.values() if isinstance(state, dict)]
        self._group_list = list(optimizer.param_groups)
        self._groups = [(group, dict(group), list(group["params"])) for group in optimizer.param_groups]

    def restore(self) -> None:
        """Put everything back."""
        vars(self._optimizer).clear()
        vars(self._optimizer).update(self._attributes)
        for state, content in self._states:
            state.clear()
            state.update(content)
        self._optimizer.state.clear()
        self._optimizer.state.update(self._state)
        for group, content, params in self._groups:
            group.clear()
            group.update(content)
            group["params"][:] = params
        self._optimizer.param_groups[:] = self._group_list


# -------------------------------------------------------------------- the report


def _report(
    optimizer: torch.optim.Optimizer,
    plan: Plan,
    source: str,
    before: Sequence[Mapping[str, Any]],
    cast: Mapping[str, str],
) -> LoadReport:
    found, slots, loaded = plan.match.found, plan.slots, plan.loaded
    used = {id(each) for each in found.values()}
    mismatched = {slots[at].label: why for at, why in plan.mismatched.items()}
    unmatched = [slot.label for at, slot in enumerate(slots) if at not in found]
    renamed = {
        slots[at].label: f"{each.name} in the source"
        for at, each in found.items()
        if each.name not in (None, slots[at].label) and plan.match.by == "name"
    }
    return LoadReport(
        source=source,
        target=type(optimizer).__name__,
        loaded=[slots[at].label for at in loaded],
        missing=unmatched,
        unexpected=[*(str(each.name) for each in plan.saved.parameters if id(each) not in used), *plan.saved.strays],
        mismatched=mismatched,
        cast=cast,
        untouched=[*unmatched, *mismatched],
        coverage=_coverage(slots, loaded),
        details={**renamed, **cast, **mismatched},
        overridden=_overridden(before, optimizer.param_groups),
        matched_by=plan.match.by,
        findings=plan.findings,
    )


def _coverage(slots: Sequence[Slot], loaded: Sequence[int]) -> Coverage:
    def share(weights: Sequence[int]) -> float:
        return sum(weights[at] for at in loaded) / sum(weights) if sum(weights) else float(bool(loaded))

    numels = [slot.param.numel() for slot in slots]
    return Coverage(share([1] * len(slots)), share(numels), share([slot.param.nbytes for slot in slots]))


def _overridden(
    before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]]
) -> dict[str, tuple[object, object]]:
    """Each hyperparameter that is another now, as it was and is. One that is new was None."""
    changed = {}
    for number, (old, new) in enumerate(zip(before, after)):
        for name in dict.fromkeys([*old, *new]):
            if name not in ("params", "param_names") and not is_same(old.get(name), new.get(name)):
                changed[f"param_groups.{number}.{name}"] = (old.get(name), new.get(name))
    return changed
