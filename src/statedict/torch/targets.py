"""A live module as one side of an alignment: what it wants to be filled, in the order in which it was built, and what it is made of."""

from __future__ import annotations

from collections.abc import Collection, Iterator

import torch
from torch.nn.utils import parametrize

from statedict.aligning.alignment import Side, Spec
from statedict.prefixes import WRAPPERS
from statedict.torch.modules.targets import Slot, Target

__all__ = ["can_make_again", "side_of_module"]


def side_of_module(module: torch.nn.Module, target: Target | None = None) -> Side:
    """The tensors of the module's state dict, through its hooks, with ties, classes, and the buffers that it can make again.

    Works on the meta device too. Nothing is copied or changed; only buffers of indices are read. ``target`` saves asking the module
    again. Tensors of lazy modules have no shape yet and are left out, as are values that are no tensors.
    """
    found = target or Target(module)
    slots = {key: slot for key, slot in found.slots.items() if slot.tensor is not None and not slot.is_lazy}
    groups = dict.fromkeys(group for key, group in found.ties.items() if key in slots)
    return Side(
        {key: Spec(slot.shape, _dtype(slot)) for key, slot in slots.items()},
        is_ordered=True,
        tied=tuple(groups),
        classes=dict(_classes(module, slots)),
        buffers=frozenset(key for key, slot in slots.items() if can_make_again(slot)),
    )


def _dtype(slot: Slot) -> str:
    assert slot.tensor is not None
    return str(slot.tensor.dtype).removeprefix("torch.")


def _classes(module: torch.nn.Module, keys: Collection[str]) -> Iterator[tuple[str, str]]:
    """The class of each module by the path that it has in keys.

    A class that parametrisation made is named as it was before. A wrapper whose hook takes its own name out of the keys is not there.
    """
    homes = {key[:at] for key in keys for at in range(len(key)) if key[at] == "."}
    for path, each in module.named_modules(remove_duplicate=False):
        name = parametrize.type_before_parametrizations(each).__name__
        if path in homes or not path:
            yield path, name
            continue
        bare = ".".join(part for part in path.split(".") if part not in WRAPPERS)
        if bare in homes:
            yield bare, name


def can_make_again(slot: Slot) -> bool:
    """Whether the model has the right values of a tensor without any file: a counter, a mask, a table of indices.

    Their dtypes are ``int64`` and ``bool``. An index lies between 0 and the number of elements; packed weights don't. On the meta
    device, where there are no values, the dtype decides.
    """
    tensor = slot.tensor
    if tensor is None or slot.is_parameter or tensor.dtype not in (torch.int64, torch.bool):
        return False
    if tensor.dtype == torch.bool or tensor.is_meta or tensor.numel() < 2 or tensor.layout != torch.strided:
        return True
    low, high = torch.aminmax(tensor)
    return int(low) >= 0 and int(high) <= tensor.numel()
