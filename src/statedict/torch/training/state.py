"""``TrainingState``: everything that the next step of a training depends on, captured as pieces and brought back from them.

    NAME              each component                    NAME.gradients    of a module, those that wait for the next step
    rng               generators of the process         NAME.buffers      of a module, those that aren't persistent (``buffers="all"``)

The facts of a step, beside the pieces: the environment, which kind each component was, epoch and batches.
"""

from __future__ import annotations

import weakref
from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch.utils.data import DataLoader, Sampler

from statedict import doors
from statedict.checkpoint import Checkpoint, of_memory
from statedict.collecting import uncollected
from statedict.errors import StateDictError, UnsafeContent, one_line
from statedict.formats.step import is_plain_name
from statedict.keys import dotted
from statedict.manifest import Container, ObjectEntry, Opaque
from statedict.nodes import components as components_of
from statedict.runs.pieces import Captured, OpenedStep
from statedict.torch.training import environment, rng
from statedict.torch.training.copying import HostCopies
from statedict.torch.training.gradients import BufferPart, GradientPart, mark_used
from statedict.torch.training.guard import Guard
from statedict.torch.training.next_step import Evidence, SavedStep
from statedict.torch.training.parts import ModulePart, OptimizerPart, Part, StatefulPart, is_stateful
from statedict.torch.training.plain_parts import GeneratorPart, LoaderPart, SamplerPart, ValuePart
from statedict.torch.training.restoring import Applied, Restoring

__all__ = ["TorchTrainingState"]

_SCHEMA = "statedict.training-state/1"
_GRADIENTS = ("unused", "all", "none")
_BUFFERS = ("persistent", "all")


class TorchTrainingState(doors.TrainingState):
    """What ``statedict.TrainingState(...)`` gives."""

    def __init__(
        self,
        *,
        rng: bool | Collection[str] = True,
        gradients: str = "unused",
        buffers: str = "persistent",
        **components: Any,
    ) -> None:
        self._kinds = _kinds(rng)
        if gradients not in _GRADIENTS or buffers not in _BUFFERS:
            expected = f"gradients one of {', '.join(_GRADIENTS)}; buffers one of {', '.join(_BUFFERS)}"
            raise StateDictError("there is no such choice", expected=expected, found=f"{gradients}, {buffers}")
        self._parts: dict[str, Part] = {}
        self._hidden: dict[str, Part] = {}  # what belongs to a component
        self._guard = Guard()
        self._evidence = Evidence()
        self._copies = HostCopies()
        named = {"epoch": 0, "step": 0, **components}
        for name in named:
            self._check_name(name)
        modules = [value for value in named.values() if isinstance(value, torch.nn.Module)]
        for name, value in named.items():
            self._parts[name] = self._part(value, modules)
        for name, part in self._parts.items():
            if isinstance(part, ModulePart):
                if gradients != "none":
                    self._hidden[f"{name}.gradients"] = GradientPart(part.module, used=gradients == "all")
                if buffers == "all":
                    self._hidden[f"{name}.buffers"] = BufferPart(part.module)
        self._watch(marks_gradients=gradients == "unused")

    def _check_name(self, name: str) -> None:
        if not is_plain_name(name) or name.startswith("_") or "." in name or hasattr(type(self), name) or name == "rng":
            hint = "Letters, digits and underscores, not those of a method or of 'rng'"
            raise StateDictError("a component can't be called so", key=name, hint=hint)

    def _part(self, value: Any, modules: list[torch.nn.Module]) -> Part:
        if isinstance(value, torch.nn.Module):
            return ModulePart(value)
        if isinstance(value, torch.optim.Optimizer):
            return OptimizerPart(value, [ModulePart(module).module for module in modules])
        if isinstance(value, DataLoader):
            return LoaderPart.of(value, self._parts["epoch"])
        if is_stateful(value):
            return StatefulPart(value)
        if isinstance(value, Sampler):
            return SamplerPart(value)
        return GeneratorPart(value) if rng.is_generator(value) else ValuePart(value)

    def _watch(self, *, marks_gradients: bool) -> None:
        """Hook into the optimizers, as long as this state lives."""
        modules, evidence = self._modules(), self._evidence

        def after(optimizer: torch.optim.Optimizer) -> None:
            if marks_gradients:
                mark_used(optimizer)
            evidence.after_step(modules)

        handles = []
        for part in self._parts.values():
            if isinstance(part, OptimizerPart):
                handles += self._guard.watch(part.visible, after)
        weakref.finalize(self, _remove, handles)

    def _modules(self) -> list[torch.nn.Module]:
        return [part.module for part in self._parts.values() if isinstance(part, ModulePart)]

    # ---------------------------------------------------------------- as attributes

    def __getattr__(self, name: str) -> Any:
        part = self.__dict__.get("_parts", {}).get(name)
        if part is None:
            raise AttributeError(f"the training state has no component '{name}'")
        return part.visible

    def __setattr__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            object.__setattr__(self, name, value)
            return
        part = self._parts.get(name)
        if not isinstance(part, ValuePart):
            why = "is none of the training state: name it when you make it" if part is None else f"is its {part.kind}"
            raise AttributeError(f"only values can be set, and '{name}' {why}")
        part.visible = value

    def __repr__(self) -> str:
        return f"TrainingState({', '.join(f'{name}: {part.kind}' for name, part in self._parts.items())})"

    # ---------------------------------------------------------------- captured

    def updating(self) -> AbstractContextManager[None]:
        """``with state.updating():`` around a change of the state that no optimizer's step makes: no capture of another thread sees
        half of it.
        """
        return self._guard.updating()

    @contextmanager
    def still(self) -> Iterator[Captured]:
        """What is captured, over live memory, which doesn't change until the block is left: steps of other threads wait."""
        with self._guard.capturing(), uncollected():
            yield Captured(self._pieces(), self._facts())

    def capture(self) -> Captured:
        """Everything, copied into buffers of the host that are used again once the last capture is gone. Training goes on meanwhile.

        Raises ``UnsafeContent`` with the keys of what could only be brought back by running code, ``StateDictError`` in the middle of
        an optimizer's step.
        """
        with self.still() as live:
            return Captured(self._copies.copied(live.pieces), live.facts)

    def prepare(self) -> int:
        """Take the memory that ``capture`` needs, so that the first one is as fast as the others; its bytes."""
        with self.still() as live:
            return self._copies.prepare(live.pieces)

    def record_next_step(self, saved: SavedStep) -> None:
        """Have the parameters after the next optimizer step recorded beside that save, for ``verify_next_step``."""
        self._evidence.record(saved)

    def _pieces(self) -> dict[str, Checkpoint]:
        self._evidence.flush()
        values: dict[str, Any] = {name: part.value() for name, part in self._parts.items()}
        for name, part in self._hidden.items():
            value = part.value()
            if value or not isinstance(part, GradientPart):
                values[name] = value
        if self._kinds:
            values["rng"] = rng.states(self._kinds)
        return {name: _piece(name, value) for name, value in values.items()}

    def _facts(self) -> dict[str, object]:
        loaders = {name: part.visible.consumed for name, part in self._parts.items() if isinstance(part, LoaderPart)}
        progress = {name: value for name in ("epoch", "step") if isinstance(value := getattr(self, name), (int, float))}
        return {
            "schema": _SCHEMA,
            "kinds": {name: part.kind for name, part in self._parts.items()},
            "progress": {**progress, "batches": loaders},
            "environment": environment.record(),
        }

    # ---------------------------------------------------------------- brought back

    def apply(
        self,
        step: OpenedStep,
        *,
        only: Collection[str] | None = None,
        keep_hyperparameters: Collection[str] = (),
        rules: Any = (),
        verify_next_step: bool = False,
    ) -> Applied:
        """Take over what a step holds. Everything is checked first; random states come last.

        ``only`` names components; without it, all that this state has must be in the step. ``rules`` are those of ``load_into``, for
        all modules, or a dict of such by component. ``keep_hyperparameters`` stay as they are here (``"lr"``: those of the schedulers
        too). ``verify_next_step``: the next optimizer step must come to the parameters that it came to then, else it raises.

        Returns ``Applied(report, differences)``. Raises ``KeyMismatch``, ``SpecMismatch`` and what ``load_into`` raises.
        """
        with self._guard.capturing():
            restoring = Restoring(self._parts, self._hidden, self._kinds, step, only)
            applied = restoring.run(rules, tuple(keep_hyperparameters))
            if only is None or "step" in only:
                self.step = step.step
            if verify_next_step:
                applied = restoring.expect_next_step(applied, self._evidence)
            return applied


def _kinds(wanted: bool | Collection[str]) -> tuple[str, ...]:
    """The kinds of generators of the process that are captured."""
    if isinstance(wanted, bool):
        return rng.KINDS if wanted else ()
    unknown = [kind for kind in wanted if kind not in rng.KINDS] if not isinstance(wanted, str) else [wanted]
    if unknown:
        raise StateDictError(
            "there are no such random generators", expected=f"some of {', '.join(rng.KINDS)}", found=one_line(unknown)
        )
    return tuple(wanted)


def _remove(handles: list[Any]) -> None:
    for handle in handles:
        handle.remove()


def _piece(name: str, value: Any) -> Checkpoint:
    """The value as a checkpoint over its own memory. Raises ``UnsafeContent`` for what only its own code could bring back."""
    try:
        piece = of_memory(value, still=True)
    except StateDictError as error:
        error.key = name if error.key is None else f"{name}.{error.key}"
        raise
    foreign = [*_modules_in(value), *_foreign(piece)]
    if foreign:
        shown = ", ".join(f"'{one_line(f'{name}.{key}' if key else name)}' ({kind})" for key, kind in foreign[:5])
        more = f" and {len(foreign) - 5} more" if len(foreign) > 5 else ""
        raise UnsafeContent(
            f"these can't be saved, only their code could bring them back: {shown}{more}",
            globals=[kind for _, kind in foreign],
            key=name,
            hint="Give plain values, or things with state_dict and load_state_dict, each as a component of its own",
        )
    return piece


def _modules_in(value: Any) -> list[tuple[str, str]]:
    """The keys of modules and optimizers inside a value: as a value they would come back as records of their attributes."""
    found: list[tuple[str, str]] = []
    pending: list[tuple[tuple[Any, ...], Any]] = [((), value)]
    seen: set[int] = set()
    while pending:
        path, item = pending.pop()
        if isinstance(item, (torch.nn.Module, torch.optim.Optimizer)):
            found.append((dotted(path), f"{type(item).__module__}.{type(item).__qualname__}"))
        elif isinstance(item, (dict, list, tuple)) and id(item) not in seen:
            seen.add(id(item))
            keys = list(item) if isinstance(item, dict) else list(range(len(item)))
            children = list(item.values()) if isinstance(item, dict) else list(item)
            pending.extend(((*path, part), child) for part, child in zip(components_of(keys), children))
    return found[::-1]


def _foreign(piece: Checkpoint) -> list[tuple[str, str]]:
    """The keys of records of objects, with their classes."""
    found: list[tuple[str, str]] = []
    pending: list[tuple[tuple[Any, ...], object]] = [((), piece.manifest.structure)]
    while pending:
        path, node = pending.pop()
        if isinstance(node, ObjectEntry) and isinstance(node.value, Opaque):
            found.append((dotted(path), node.value.type))
        elif isinstance(node, Container) and node.kind == "opaque":
            found.append((dotted(path), node.type))
        elif isinstance(node, Container):
            pending.extend(((*path, part), child) for part, child in zip(components_of(node.keys), node.children))
    return found[::-1]
