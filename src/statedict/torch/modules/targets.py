"""What a module has that can be loaded: its state dict's keys, the tensors behind them, who holds them, which are tied."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch

from statedict.dtypes import BY_TORCH, DType

__all__ = ["Slot", "Target", "replace_tensors"]


class Slot(NamedTuple):
    """One key of a module's state dict."""

    key: str
    tensor: torch.Tensor | None  # the parameter or buffer itself; None for a value that is no tensor
    shape: tuple[int, ...]
    dtype: DType | None
    is_lazy: bool = False  # its shape comes with the first input, or the file

    @property
    def is_parameter(self) -> bool:
        """Whether it is trained, or could be."""
        return isinstance(self.tensor, torch.nn.Parameter)


class Target:
    """The state dict of a module by key, and which of its keys are one tensor.

    The module's own ``state_dict`` says what the keys are, its hooks included. Nothing is copied or changed.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        self.module = module
        self.name = type(module).__name__
        self.slots = {key: _slot(key, value) for key, value in _own_state(module).items()}
        self.ties = _ties(self.slots.values())

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor by key."""
        return {key: slot.shape for key, slot in self.slots.items() if slot.tensor is not None and not slot.is_lazy}

    def tied_with(self, key: str) -> tuple[str, ...]:
        """All keys of the tensor of this one, itself among them."""
        return self.ties.get(key, (key,))

    @property
    def left_on_meta(self) -> list[str]:
        """Buffers that the state dict leaves out and that have no memory: they must be computed again."""
        return [name for name, value in self.module.named_buffers() if value.is_meta and name not in self.slots]


def _own_state(module: torch.nn.Module) -> Mapping[str, Any]:
    """The state dict with the parameters themselves in it."""
    found: Mapping[str, Any] = module.state_dict(keep_vars=True)
    return found


def _slot(key: str, value: Any) -> Slot:
    if not isinstance(value, torch.Tensor):
        return Slot(key, None, (), None)
    lazy = torch.nn.parameter.is_lazy(value)
    shape = () if lazy else tuple(value.shape)
    return Slot(key, value, shape, BY_TORCH.get(str(value.dtype).removeprefix("torch.")), lazy)


def _ties(slots: Iterable[Slot]) -> dict[str, tuple[str, ...]]:
    """The keys of each tensor that has several."""
    groups: dict[object, list[str]] = {}
    for slot in slots:
        tensor = slot.tensor
        if tensor is None or slot.is_lazy:
            continue
        mark: object = id(tensor)
        if tensor.layout == torch.strided and tensor.device.type != "meta" and tensor.numel():
            storage = tensor.untyped_storage()
            mark = (
                storage.data_ptr(),
                str(tensor.device),
                tensor.storage_offset(),
                slot.shape,
                tensor.stride(),
                tensor.dtype,
            )
        groups.setdefault(mark, []).append(slot.key)
    return {key: tuple(keys) for keys in groups.values() if len(keys) > 1 for key in keys}


def replace_tensors(module: torch.nn.Module, new: Mapping[int, torch.Tensor]) -> None:
    """Put other tensors in the place of parameters and buffers, by the ``id`` of the old one; wherever one stands, so that
    tied ones stay tied.
    """
    for owner in module.modules():
        for table in (owner._parameters, owner._buffers):
            for name, old in table.items():
                if old is not None and id(old) in new:
                    table[name] = new[id(old)]  # type: ignore[assignment]
