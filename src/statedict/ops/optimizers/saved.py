"""The state dict of an optimizer as it was saved, in each of its three forms, as one list of parameters.

    torch            {"state": {id: {name: value}}, "param_groups": [{…, "params": [id, …], "param_names": [name, …]}]}
                     ids count the parameters through all groups; ``param_names`` may be absent (``optim/optimizer.py``, ``state_dict``)
    by name          the same with the parameters' names for ids (``distributed/checkpoint/state_dict.py``, ``get_optimizer_state_dict``)
    flattened        {"state.<name>.<key>": value, "param_groups.<name>.<key>": value}: no groups, each parameter with the
                     hyperparameters of its own (there, ``_flatten_optim_state_dict``)

A file of this package is of torch's form, with ``param_names``, and with the class under ``optimizer_class``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, TypeGuard

from statedict.errors import SpecMismatch

__all__ = ["CLASS_KEY", "SavedOptimizer", "SavedParameter", "read_saved"]

# torch's load_state_dict reads "state" and "param_groups" and leaves other keys alone.
CLASS_KEY = "optimizer_class"

_KNOWN = {"state", "param_groups", CLASS_KEY}
_HINT = "Give the part of the checkpoint that is the optimizer's state dict: at=KEY"


class SavedParameter(NamedTuple):
    """One parameter: its name where the file has one, its group, and its state (empty where it has none)."""

    name: str | None
    group: int
    state: Mapping[str, object]


class SavedOptimizer(NamedTuple):
    """All that a state dict says. ``groups`` are hyperparameters alone; ``loose`` is state that belongs to no parameter."""

    parameters: tuple[SavedParameter, ...]
    groups: tuple[Mapping[str, object], ...]
    optimizer_class: str | None
    loose: Mapping[str, object]
    strays: tuple[str, ...]  # state of parameters that are in no group
    extra: Mapping[object, object]  # what else stood beside "state" and "param_groups"
    is_grouped: bool

    @property
    def has_names(self) -> bool:
        """Whether every parameter has a name, and each another."""
        names = [each.name for each in self.parameters]
        return None not in names and len(set(names)) == len(names)

    @property
    def hyperparameters(self) -> frozenset[str]:
        """The names of all hyperparameters of all groups."""
        return frozenset(str(name) for group in self.groups for name in group)

    @property
    def states(self) -> frozenset[str]:
        """The names of everything in any parameter's state."""
        return frozenset(str(name) for each in self.parameters for name in each.state)


def read_saved(saved: Mapping[object, object], source: str = "") -> SavedOptimizer:
    """The state dict's facts, whatever its form; no tensor is copied. Raises ``SpecMismatch`` where it is none."""
    try:
        if isinstance(saved, Mapping):
            if "param_groups" in saved:
                return _grouped(saved)
            if saved and any(str(key).startswith(("state.", "param_groups.")) for key in saved):
                return _flattened(saved)
        raise _wrong("", "a dict with 'state' and 'param_groups'", saved)
    except SpecMismatch as error:
        raise error.located(source or None) from None


def _wrong(key: str, expected: str, found: object) -> SpecMismatch:
    shown = type(found).__name__
    if isinstance(found, Mapping):
        shown = f"a dict with {', '.join(repr(each) for each in list(found)[:3]) or 'nothing'}"
    return SpecMismatch("no state dict of an optimizer", key=key or None, expected=expected, found=shown, hint=_HINT)


def _class_of(saved: Mapping[object, object]) -> str | None:
    name = saved.get(CLASS_KEY)
    return name if isinstance(name, str) else None


# -------------------------------------------------------------------- with groups


def _grouped(saved: Mapping[object, object]) -> SavedOptimizer:
    groups, states = saved["param_groups"], saved.get("state")
    if not isinstance(groups, (list, tuple)):
        raise _wrong("param_groups", "a list", groups)
    if not isinstance(states, Mapping):
        raise _wrong("state", "a dict", states)
    parameters: list[SavedParameter] = []
    ids: set[object] = set()
    for number, group in enumerate(groups):
        for each, name in _members(number, group):
            parameters.append(SavedParameter(name, number, _state(each, states.get(each, {}))))
            ids.add(each)
    by_name = any(isinstance(each, str) for each in ids)
    rest = {key: value for key, value in states.items() if key not in ids}
    loose = {} if by_name else {key: value for key, value in rest.items() if isinstance(key, str)}
    return SavedOptimizer(
        tuple(parameters),
        tuple({key: item for key, item in group.items() if key not in ("params", "param_names")} for group in groups),
        _class_of(saved),
        loose,
        tuple(str(key) if by_name else f"state.{key}" for key in rest if key not in loose),
        {key: value for key, value in saved.items() if key not in _KNOWN},
        True,
    )


def _members(number: int, group: object) -> Iterator[tuple[int | str, str | None]]:
    """The ids of a group's parameters, each with its name if there is one for each."""
    if not isinstance(group, Mapping):
        raise _wrong(f"param_groups.{number}", "a dict", group)
    ids = group.get("params")
    if not isinstance(ids, (list, tuple)):
        raise _wrong(f"param_groups.{number}.params", "a list", ids)
    known: object = group.get("param_names")
    names: Sequence[str | None] = known if _is_texts(known) and len(known) == len(ids) else [None] * len(ids)
    for each, name in zip(ids, names):
        if not isinstance(each, (int, str)):
            raise _wrong(f"param_groups.{number}.params", "numbers or names", each)
        yield each, each if isinstance(each, str) else name


def _is_texts(names: object) -> TypeGuard[Sequence[str]]:
    return isinstance(names, (list, tuple)) and all(isinstance(name, str) for name in names)


def _state(each: object, state: object) -> Mapping[str, object]:
    if not isinstance(state, Mapping):
        raise _wrong(f"state.{each}", "a dict", state)
    return state


# -------------------------------------------------------------------- without groups


def _flattened(saved: Mapping[object, object]) -> SavedOptimizer:
    states: dict[str, dict[str, object]] = {}
    groups: dict[str, dict[str, object]] = {}
    extra: dict[object, object] = {}
    for key, value in saved.items():
        part, _, rest = str(key).partition(".")
        name, dot, last = rest.rpartition(".")
        if part in ("state", "param_groups") and dot:
            (states if part == "state" else groups).setdefault(name, {})[last] = value
        elif key != CLASS_KEY:
            extra[key] = value
    names = list(groups) + [name for name in states if name not in groups]
    parameters = [SavedParameter(name, number, states.get(name, {})) for number, name in enumerate(names)]
    hyperparameters: Sequence[Mapping[str, object]] = [groups.get(name, {}) for name in names]
    return SavedOptimizer(tuple(parameters), tuple(hyperparameters), _class_of(saved), {}, (), extra, False)
