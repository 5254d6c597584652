"""What a training checkpoint is made of: the subtree of the weights, the optimizers, and how far the training was.

An optimizer's state dict (torch ``optim/optimizer.py``, ``state_dict``) is ``{"state": {id: {name: value}}, "param_groups":
[{…, "params": [id …], "param_names": [name …]}]}``: ids count the parameters of all groups in order, and ``param_names``
is there when the optimizer was given named parameters. Fully sharded training writes names for the ids.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from statedict.keys import Path, dotted
from statedict.manifest import Manifest, ObjectEntry, TensorEntry, tied_groups

__all__ = ["Optimizer", "Training", "buffers_of", "training_of"]

# What people call the weights inside a training checkpoint, the likeliest first.
_WEIGHTS = ("model_state_dict", "state_dict", "model_state", "model", "module", "net", "network", "weights", "params")
_AVERAGES = ("ema", "model_ema", "ema_model", "ema_state_dict", "model_ema_state_dict", "averaged_model")
_PROGRESS = (
    "epoch",
    "current_epoch",
    "step",
    "global_step",
    "iteration",
    "iter",
    "last_epoch",
    "epochs_completed",
    "num_updates",
)
_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


class Optimizer(NamedTuple):
    """One optimizer's state: where it is, whose state each tensor is, how that is known, and its learning rates."""

    path: Path
    parameters: Mapping[Path, str]  # of each tensor of the state; empty where it can't be said
    proof: str  # "param_names", "keys", "shapes", or "" where it can't be said
    rates: tuple[object, ...]


class Training(NamedTuple):
    """The parts of a training checkpoint; all empty for a plain state dict."""

    weights: Path | None
    averages: Path | None
    optimizers: tuple[Optimizer, ...]
    progress: Mapping[str, object]

    @property
    def is_checkpoint(self) -> bool:
        """Whether there is more than weights: an optimizer, or a count of steps beside them."""
        return bool(self.optimizers) or (self.weights is not None and bool(self.progress))


def buffers_of(tensors: Mapping[Path, TensorEntry]) -> set[Path]:
    """The tensors that are known to be buffers: marked so, or the statistics of a batch norm."""
    marked = {path for path, entry in tensors.items() if entry.kind == "Buffer"}
    norms: dict[tuple[Path, str], dict[str, Path]] = {}
    for path in tensors:
        last = path[-1] if path else ""
        if isinstance(last, str) and last.endswith(_BUFFERS):
            owner, _, name = last.rpartition(".")
            if name in _BUFFERS:
                norms.setdefault((path[:-1], owner), {})[name] = path
    for names in norms.values():
        if "running_mean" in names and "running_var" in names:
            marked.update(names.values())
    return marked


def training_of(manifest: Manifest) -> Training:
    """The parts of a training checkpoint, as far as names and shapes show them."""
    groups = _param_groups(manifest.objects)
    weights = _subtree(manifest, _WEIGHTS, groups)
    averages = _subtree(manifest, _AVERAGES, groups)
    if weights is None and groups:
        weights = _largest(manifest, groups)
    progress = {
        str(path[-1]): entry.value
        for path, entry in manifest.objects.items()
        if len(path) == 1
        and path[0] in _PROGRESS
        and isinstance(entry.value, (int, float))
        and not isinstance(entry.value, bool)
    }
    states = _states(manifest.tensors, groups)
    optimizers = tuple(_optimizer(manifest, path, facts, states[path], weights) for path, facts in groups.items())
    return Training(weights, averages, optimizers, progress)


_Groups = dict[int, dict[str, dict[int, object]]]


def _param_groups(objects: Mapping[Path, ObjectEntry]) -> dict[Path, _Groups]:
    """Of each optimizer: its groups by number, and in each the lists ``params``, ``param_names`` and the number ``lr``."""
    found: dict[Path, _Groups] = {}
    for path, entry in objects.items():
        if "param_groups" not in path:
            continue
        at = path.index("param_groups")
        rest = path[at + 1 :]
        if len(rest) < 2 or not isinstance(rest[0], int) or rest[1] not in ("params", "param_names", "lr"):
            continue
        values = found.setdefault(path[:at], {}).setdefault(rest[0], {}).setdefault(rest[1], {})
        if len(rest) == 2 and isinstance(entry.value, (list, tuple)):
            # A list without tensors in it is one value.
            values.update(enumerate(entry.value))
        elif len(rest) < 4 and isinstance(rest[-1], int):
            values[rest[-1]] = entry.value
        else:
            values[0] = entry.value
    return {path: groups for path, groups in found.items() if any("params" in group for group in groups.values())}


def _states(tensors: Mapping[Path, TensorEntry], groups: Mapping[Path, _Groups]) -> dict[Path, dict[Path, TensorEntry]]:
    """The tensors ``state.<id>.<name>`` of each optimizer."""
    found: dict[Path, dict[Path, TensorEntry]] = {path: {} for path in groups}
    sizes = {len(path) for path in groups}
    for path, entry in tensors.items():
        for size in sizes:
            if len(path) >= size + 3 and path[size] == "state" and path[:size] in found:
                found[path[:size]][path] = entry
    return found


def _optimizer(
    manifest: Manifest, path: Path, groups: _Groups, state: Mapping[Path, TensorEntry], weights: Path | None
) -> Optimizer:
    ids = [value for _, group in sorted(groups.items()) for _, value in sorted(group.get("params", {}).items())]
    names = [value for _, group in sorted(groups.items()) for _, value in sorted(group.get("param_names", {}).items())]
    rates = tuple(dict.fromkeys(group["lr"][0] for group in groups.values() if _is_number(group.get("lr", {}).get(0))))
    by_id: dict[object, str] = {}
    proof = ""
    if not all(isinstance(each, (int, str)) for each in ids):
        ids = []
    if ids and len(names) == len(ids) and all(isinstance(name, str) for name in names):
        by_id, proof = {each: str(name) for each, name in zip(ids, names)}, "param_names"
    elif ids and all(isinstance(each, str) for each in ids):
        by_id, proof = {each: str(each) for each in ids}, "keys"
    elif weights is not None and len(groups) == 1:
        by_id = _by_shapes(ids, state, len(path), _parameters(manifest.tensors, weights))
        proof = "shapes" if by_id else ""
    place = len(path) + 1
    owners = {each: by_id[each[place]] for each in state if each[place] in by_id}
    return Optimizer(path, owners, proof if owners else "", rates)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _parameters(tensors: Mapping[Path, TensorEntry], weights: Path) -> list[tuple[str, tuple[int, ...]]]:
    """The names and shapes that an optimizer would count: no buffers, tied ones once, nothing that isn't trained."""
    inside = {path: entry for path, entry in tensors.items() if path[: len(weights)] == weights}
    left_out = buffers_of(inside)
    for group in tied_groups(inside):
        left_out.update(group[1:])
    return [
        (dotted(path[len(weights) :]), entry.shape)
        for path, entry in inside.items()
        if path not in left_out and entry.dtype.kind in ("float", "complex")
    ]


def _by_shapes(
    ids: Sequence[object],
    state: Mapping[Path, TensorEntry],
    size: int,
    parameters: Sequence[tuple[str, tuple[int, ...]]],
) -> dict[object, str]:
    """The parameters in order, if there are as many as ids and each state has a tensor of its parameter's shape."""
    if len(ids) != len(parameters) or len(set(ids)) != len(ids):
        return {}
    shapes: dict[object, set[tuple[int, ...]]] = {}
    for path, entry in state.items():
        shapes.setdefault(path[size + 1], set()).add(entry.shape)
    if not shapes:
        return {}
    if any(each in shapes and shape not in shapes[each] for each, (_, shape) in zip(ids, parameters)):
        return {}
    return {each: name for each, (name, _) in zip(ids, parameters)}


def _subtree(manifest: Manifest, names: Sequence[str], optimizers: Mapping[Path, object]) -> Path | None:
    """The first of the names that is a top-level container with tensors in it, and no optimizer."""
    tops = {path[0] for path in manifest.tensors if len(path) > 1}
    for name in names:
        if name in tops and not any(path[:1] == (name,) for path in optimizers):
            return (name,)
    return None


def _largest(manifest: Manifest, optimizers: Mapping[Path, object]) -> Path | None:
    """The top-level container that holds more than half of the bytes that belong to no optimizer."""
    nbytes: dict[Path, int] = {}
    taken = {path[:1] for path in optimizers}
    for path, entry in manifest.tensors.items():
        if path[:1] not in taken:
            top = path[:1] if len(path) > 1 else ()
            nbytes[top] = nbytes.get(top, 0) + entry.nbytes
    best = max(nbytes, key=nbytes.__getitem__, default=())
    return best if best and 2 * nbytes[best] > sum(nbytes.values()) else None
