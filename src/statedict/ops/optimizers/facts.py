"""An optimizer in facts: of a file, or a live one. Whose state each slot holds isn't known, but what shape it has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from statedict.ops.optimizers.families import likely
from statedict.ops.optimizers.saved import SavedOptimizer, SavedParameter

__all__ = ["OptimizerFacts", "SlotFacts", "facts_of"]

Shape = tuple[int, ...]

# State that has one element, whatever the parameter's shape, and state that has only a part of the shape.
_SCALARS = frozenset({"step", "mu_product", "eta", "mu"})
_PARTIAL = frozenset({"row_var", "col_var", "exp_avg_sq_row", "exp_avg_sq_col"})


class SlotFacts(NamedTuple):
    """A parameter's place: its name if it has one, its group, its shape if that is known, and the device of its counter."""

    name: str | None
    group: int
    shape: Shape | None
    device: str = ""

    @property
    def shown(self) -> str:
        """The shape in a few words."""
        return "unknown" if self.shape is None else str(list(self.shape))


class OptimizerFacts(NamedTuple):
    """Slots in order through all groups, the groups' hyperparameters, and the class, as far as it is known (``kind``: its last name)."""

    kind: str
    slots: Sequence[SlotFacts]
    groups: Sequence[Mapping[str, object]]
    states: frozenset[str]

    @property
    def sizes(self) -> list[int]:
        """The number of parameters in each group."""
        return [sum(slot.group == number for slot in self.slots) for number in range(len(self.groups))]

    @property
    def has_names(self) -> bool:
        """Whether every parameter has a name, and each another."""
        names = [slot.name for slot in self.slots]
        return None not in names and len(set(names)) == len(names)


def facts_of(saved: SavedOptimizer) -> OptimizerFacts:
    """What a state dict says. Tensors in it are anything with ``shape``."""
    recorded = (saved.optimizer_class or "").rpartition(".")[2]
    guessed = likely(saved.hyperparameters, saved.states) or ""
    decoupled = any(group.get("decoupled_weight_decay") for group in saved.groups)
    return OptimizerFacts(
        recorded or ("AdamW" if guessed == "Adam" and decoupled else guessed),
        [SlotFacts(each.name, each.group, _shape(each), _device(each)) for each in saved.parameters],
        saved.groups,
        saved.states,
    )


def _shape(saved: SavedParameter) -> Shape | None:
    """The parameter's shape, by the state that has it."""
    for name, value in saved.state.items():
        shape = getattr(value, "shape", None)
        if shape is not None and name not in _SCALARS | _PARTIAL:
            return tuple(shape)
    return None


def _device(saved: SavedParameter) -> str:
    step = saved.state.get("step")
    return str(getattr(step, "device", "") or "").partition(":")[0]
