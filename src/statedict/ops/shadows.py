"""Averaged weights brought under the names of the model that they are averages of.

Trainers keep averages in three ways: as a state dict of their own, which may lack the buffers; as tensors of the same state dict
behind a prefix (``model_ema.``), whose names may have lost their dots (latent diffusion's ``LitEma``); as a list in the order of
``model.parameters()`` (``shadow_params`` of torch_ema and diffusers, ``optimizer.ema`` of NeMo). A tensor is matched by name and shape,
a list by all shapes one to one; what isn't sure is no match. mmcv's ``ema_backbone_conv1_weight`` are none: its hook exchanges them
with the weights before a file is written.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from statedict.errors import KeyMismatch, one_line
from statedict.keys import Path
from statedict.manifest import TensorEntry, tied_groups
from statedict.ops.models import averages_by_name
from statedict.ops.training import buffers_of

__all__ = ["Inner", "by_order", "in_order", "inner_averages", "matched"]

Tensors = Mapping[str, TensorEntry]

# Counters and rates that stand among averages.
_COUNTERS = frozenset({"decay", "num_updates", "n_averaged", "initted", "step", "steps"})
# Beginnings of names that are tried as those of averages: real files have one.
_MOST_PREFIXES = 8


class Inner(NamedTuple):
    """Averages among the tensors of a flat state dict.

    ``averages`` are by the names of the weights that they are averages of, ``weights`` is the state dict without them, and ``prefix``
    is what stands before them.
    """

    prefix: str
    averages: dict[str, TensorEntry]
    weights: dict[str, TensorEntry]


def matched(averages: Tensors, weights: Tensors) -> dict[str, TensorEntry] | None:
    """The averages by the names that the weights have; None unless every one is sure to have its weight, of its shape."""
    wanted = {name: entry for name, entry in averages.items() if not (name in _COUNTERS and entry.numel == 1)}
    behind: dict[str, list[str]] = {"": list(weights)}  # what stands behind each first component
    for name in weights:
        prefix, dot, rest = name.partition(".")
        if dot:
            behind.setdefault(f"{prefix}.", []).append(rest)
    found: list[dict[str, TensorEntry]] = []
    for prefix, names in behind.items():
        fitting = _fitting(wanted, weights, prefix, names) if len(names) >= len(wanted) else {}
        if fitting and not prefix:
            return fitting
        found += [fitting] if fitting else []
    return found[0] if len(found) == 1 else None


def _fitting(averages: Tensors, weights: Tensors, prefix: str, names: Sequence[str]) -> dict[str, TensorEntry]:
    """The averages as those of the weights behind a prefix; empty where they aren't."""
    for form in _FORMS:
        forms = {form(name): prefix + name for name in names}
        if len(forms) == len(names) and all(
            name in forms and weights[forms[name]].shape == entry.shape for name, entry in averages.items()
        ):
            return {forms[name]: entry for name, entry in averages.items()}
    return {}


_FORMS: tuple[Callable[[str], str], ...] = (
    lambda name: name,
    lambda name: name.replace(".", ""),
)


def inner_averages(tensors: Tensors) -> Inner | None:
    """The averages among the tensors of one state dict; None unless they are sure to be averages of the others."""
    for prefix in _prefixes(tensors):
        averages = {name[len(prefix) :]: entry for name, entry in tensors.items() if name.startswith(prefix)}
        weights = {name: entry for name, entry in tensors.items() if not name.startswith(prefix)}
        for inner in ("", "module."):
            if all(name.startswith(inner) or name in _COUNTERS for name in averages):
                found = matched({name.removeprefix(inner): entry for name, entry in averages.items()}, weights)
                if found is not None:
                    return Inner(prefix, found, weights)
    return None


def _prefixes(tensors: Tensors) -> Sequence[str]:
    """The beginnings of names that may stand before averages, not more than are worth a look."""
    dotted = {f"{name.partition('.')[0]}." for name in tensors if "." in name}
    return sorted([prefix for prefix in dotted if averages_by_name(prefix)])[:_MOST_PREFIXES]


def in_order(averages: Sequence[TensorEntry], weights: Tensors) -> dict[str, TensorEntry] | None:
    """A list of averages by the names of the parameters, which come in the order of the state dict.

    None unless there are as many as parameters, and all shapes agree one to one.
    """
    names = _parameters(weights)
    same = [entry.shape for entry in averages] == [weights[name].shape for name in names]
    return dict(zip(names, averages)) if same else None


def by_order(averages: Sequence[TensorEntry], weights: Tensors, where: str) -> dict[str, TensorEntry]:
    """The same for the only model there is. Raises ``KeyMismatch`` where they don't agree."""
    found = in_order(averages, weights)
    if found is not None:
        return found
    names = _parameters(weights)
    pairs = [(at, name, entry.shape) for at, (name, entry) in enumerate(zip(names, averages))]
    other = next(((at, name, shape) for at, name, shape in pairs if weights[name].shape != shape), None)
    where, first = one_line(where), ""
    if other is not None:
        at, name, shape = other
        first = f"; number {at} is {list(shape)}, '{one_line(name)}' {list(weights[name].shape)}"
    raise KeyMismatch(
        f"the averages under '{where}' have no names, and aren't as the parameters are one to one",
        expected=f"{len(names)} parameters",
        found=f"{len(averages)} averages{first}",
        hint=f"They can be had without names: --at {where}",
    )


def _parameters(weights: Tensors) -> list[str]:
    """What ``model.parameters()`` gives: no buffers that are known as such, nothing but floats, tied ones once."""
    by_path: dict[Path, TensorEntry] = {(name,): entry for name, entry in weights.items()}
    left_out = buffers_of(by_path)
    for group in tied_groups(by_path):
        left_out.update(group[1:])
    return [
        name for name, entry in weights.items() if (name,) not in left_out and entry.dtype.kind in ("float", "complex")
    ]
