"""A model filled as a plan says, in memory: each tensor made of those of the source by the steps of its mapping."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch

from statedict.aligning.alignment import Mapped
from statedict.ops.diagnosing.carrying import Carried, Step, carried, order_of
from statedict.ops.diagnosing.weights import Weights
from statedict.torch.modules.targets import Target, replace_tensors

__all__ = ["Filling"]


class Filling:
    """A copy of a model, the source that it is filled from, and which of its keys have been filled."""

    def __init__(self, model: torch.nn.Module, weights: Weights) -> None:
        self.model = model
        self.target = Target(model)
        self.loaded: dict[str, Mapped] = {}
        self._weights = weights
        self._shapes = {key: spec.shape for key, spec in weights.side.tensors.items()}
        self._read: tuple[str, torch.Tensor] | None = (
            None  # the source that was read last: parts of one follow each other
        )

    def fill(self, entries: Iterable[Mapped]) -> None:
        """Give each target its values. Raises ``Misfit`` where a mapping makes another shape, and what reading raises."""
        for mapped in entries:
            tensor = self._made_room(mapped.target)
            if tensor is None:
                continue
            way = carried(mapped, self._shapes, tuple(tensor.shape))
            with torch.no_grad():
                tensor.copy_(_made(way, self._source))
            self.loaded[mapped.target] = mapped

    def values_of(self, keys: Iterable[str]) -> dict[str, torch.Tensor]:
        """Copies of these tensors, to be put back; one without memory stands for itself."""
        slots = self.target.slots
        found = {key: value for key in keys if key in slots and (value := slots[key].tensor) is not None}
        return {key: value if value.is_meta else value.detach().clone() for key, value in found.items()}

    def put_back(self, values: Mapping[str, torch.Tensor]) -> None:
        """Undo the filling of these tensors."""
        for key, value in values.items():
            tensor = self.target.slots[key].tensor
            self.loaded.pop(key, None)
            if tensor is None or tensor is value:
                continue
            if value.is_meta:
                replace_tensors(self.model, {id(tensor): value})
                self.target = Target(self.model)
            else:
                with torch.no_grad():
                    tensor.copy_(value)

    @property
    def empty(self) -> list[str]:
        """The parameters and buffers that have no memory, so that the model can't be run."""
        named = [*self.model.named_parameters(), *self.model.named_buffers()]
        return [name for name, tensor in named if tensor.is_meta]

    def _made_room(self, key: str) -> torch.Tensor | None:
        """The tensor of that key, with memory where it had none."""
        slot = self.target.slots.get(key)
        if slot is None or slot.tensor is None or slot.is_lazy:
            return None
        old = slot.tensor
        if old.is_meta:
            new = torch.empty(old.shape, dtype=old.dtype)
            made = torch.nn.Parameter(new, requires_grad=False) if slot.is_parameter else new
            replace_tensors(self.model, {id(old): made})
            self.target = Target(self.model)
            return made
        return old

    def _source(self, key: str) -> torch.Tensor:
        if self._read is None or self._read[0] != key:
            self._read = (key, self._weights.checkpoint[key].torch())
        return self._read[1]


def _made(way: Carried, read: object) -> torch.Tensor:
    """The tensor that a way makes."""
    assert callable(read)
    parts = [_stepped(read(key), steps) for key, steps in way.sources]
    if way.grouped:
        groups = [parts[at : at + way.group] for at in range(0, len(parts), way.group)]
        parts = [_stepped(torch.cat(group, way.group_dim), steps) for group, steps in zip(groups, way.grouped)]
    whole = parts[0]
    if way.join:
        whole = torch.stack(parts, way.dim) if way.join == "stack" else torch.cat(parts, way.dim)
    return _stepped(whole, way.then)


def _stepped(tensor: torch.Tensor, steps: Sequence[Step]) -> torch.Tensor:
    for step in steps:
        tensor = _step(tensor, step.op, step.args, step)
    return tensor


def _step(tensor: torch.Tensor, op: str, args: Mapping[str, object], step: Step) -> torch.Tensor:
    if op == "squeeze":
        return tensor.reshape(step.after)
    if op == "transpose":
        return tensor.permute(order_of(step.args, step.before))
    dim = int(step.args["dim"]) % tensor.dim()
    if op == "unstack":
        return tensor.select(dim, int(step.args["index"]))
    if op == "permute":
        return tensor.index_select(dim, _rows(step))
    return tensor.narrow(dim, int(step.args["start"]), int(step.args["stop"]) - int(step.args["start"]))


def _rows(step: Step) -> torch.Tensor:
    """The rows in their new order."""
    if "ranges" in step.args:
        return torch.cat([torch.arange(start, stop) for start, stop in step.args["ranges"]])
    size = step.before[int(step.args["dim"]) % len(step.before)]
    return torch.arange(size).view(tuple(step.args["view"])).permute(tuple(step.args["order"])).reshape(-1)
