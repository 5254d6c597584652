"""A checkpoint's tensors into a module, once it is sure that all of it fits."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from statedict.checkpoint import Checkpoint
from statedict.dtypes import DType
from statedict.errors import StateDictError, one_line
from statedict.lazy_tensor import LazyTensor
from statedict.manifest import Finding
from statedict.ops.load_report import Coverage, LoadReport
from statedict.ops.mismatches import listed
from statedict.torch.modules.fitting import Choices, Fit, Fitting, Hint, State, dtype_after
from statedict.torch.modules.lazy_parameters import LazyParameter
from statedict.torch.modules.placing import Placement, check_before, copy_into, make_tensors, place
from statedict.torch.modules.targets import Slot, Target, replace_tensors

__all__ = ["load_module"]


def load_module(
    module: torch.nn.Module,
    checkpoint: Checkpoint,
    choices: Choices,
    *,
    rules: Sequence[object] = (),
    hint: Hint = None,
) -> LoadReport:
    """Load, or raise and leave the module as it is. ``hint`` gives the words that help where names don't fit."""
    return _ModuleLoading(module, checkpoint, choices).run(rules, hint)


class _ModuleLoading:
    def __init__(self, module: torch.nn.Module, checkpoint: Checkpoint, choices: Choices) -> None:
        self._module = module
        self._checkpoint = checkpoint
        self._choices = choices
        self._target = Target(module)
        self._state = State(checkpoint, self._target.slots)
        self._fit = Fit(self._target, self._state, choices)
        self._findings: list[Finding] = []
        self._method: dict[str, object] = {}
        self._made: dict[int, object] = {}  # by id of a tensor that was made from the file: the path of what it is

    def run(self, rules: Sequence[object], hint: Hint) -> LoadReport:
        """Fit, check, load, report."""
        fitting = self._fit.fit()
        self._fit.refuse(fitting, hint)
        sources = list(fitting.pairs.values())
        if self._choices.check in ("before", True):
            checked = check_before(self._checkpoint, [source.entry for source in sources], self._choices.engine)
            self._method["checked_nbytes"] = checked
        self._fit.check_ties(fitting)
        if self._choices.dry_run:
            return self._report(fitting, rules)
        if self._fit.is_sharded:
            # Its hooks unfold the parameters, which are copied to then, and fold them again.
            self._load_properly(fitting, set())
        elif self._choices.assign:
            self._assign(fitting)
        else:
            self._fill(fitting)
        return self._report(fitting, rules)

    # ---------------------------------------------------------------- the loading itself

    def _fill(self, fitting: Fitting) -> None:
        pairs = self._once(fitting)
        self._materialise(pairs)
        slots = self._target.slots
        placements = []
        for key, source in pairs.items():
            tensor = slots[key].tensor
            if tensor is not None and not slots[key].is_lazy:
                placements.append(Placement(key, tensor, source))
        placements = [each for each in placements if id(each.target) not in self._made]
        method = place(placements, self._checkpoint, check=self._choices.check == "while", engine=self._choices.engine)
        self._method = {**method, **self._method}
        if not self._fit.is_plain:
            done: set[tuple[int, object]] = {(id(each.target), each.source.entry.path) for each in placements}
            done |= {(made, path) for made, path in self._made.items()}
            self._load_properly(fitting, done)

    def _once(self, fitting: Fitting) -> dict[str, LazyTensor]:
        """Each tensor of the target once, by the first of its keys that the file has."""
        chosen: dict[str, LazyTensor] = {}
        for key, source in fitting.pairs.items():
            if not any(other in chosen for other in self._target.tied_with(key)):
                chosen[key] = source
        return chosen

    def _materialise(self, pairs: Mapping[str, LazyTensor]) -> None:
        """Make the tensors that are on the meta device, straight from the file, and put them where those were."""
        slots = self._target.slots
        empty = [(key, source) for key, source in pairs.items() if _is_meta(slots[key])]
        if not empty:
            return
        device = self._choices.device or self._usual_device()
        made, facts = make_tensors(
            empty, self._checkpoint, device=device, check=self._choices.check == "while", engine=self._choices.engine
        )
        self._method = {**facts, **self._method}
        new: dict[int, torch.Tensor] = {}
        for (key, source), tensor in zip(empty, made):
            old = slots[key].tensor
            assert old is not None
            wanted = dtype_after(slots[key], source, self._choices)
            new[id(old)] = _as_parameter(_cast(tensor, _in_torch(wanted, tensor), old.shape), old)
            self._made[id(new[id(old)])] = source.entry.path
        replace_tensors(self._module, new)
        self._target = Target(self._module)

    def _usual_device(self) -> str:
        """The one device that the rest of the model is on; the CPU where there is no such."""
        devices = {str(each.device) for each in self._module.parameters() if not each.is_meta}
        return devices.pop() if len(devices) == 1 else "cpu"

    def _assign(self, fitting: Fitting) -> None:
        """New parameters, with the dtype of the file; those that are tied share one."""
        pairs = self._once(fitting)
        wanted = list(pairs.items())
        device = self._choices.device or "cpu"
        made, facts = make_tensors(
            wanted, self._checkpoint, device=device, check=self._choices.check == "while", engine=self._choices.engine
        )
        self._method = {**facts, **self._method}
        new: dict[int, torch.Tensor] = {}
        for (key, source), tensor in zip(wanted, made):
            old = self._target.slots[key].tensor
            assert old is not None
            dtype = dtype_after(self._target.slots[key], source, self._choices)
            new[id(old)] = _as_parameter(_cast(tensor, _in_torch(dtype, tensor), tensor.shape), old)
        if self._fit.is_plain:
            replace_tensors(self._module, new)
            return
        lazy = {id(slot.tensor) for slot in self._target.slots.values() if slot.is_lazy}
        replace_tensors(self._module, {old: tensor for old, tensor in new.items() if old not in lazy})
        self._target = Target(self._module)
        self._load_properly(
            fitting, {(id(tensor), pairs[key].entry.path) for (key, _), tensor in zip(wanted, new.values())}
        )

    def _load_properly(self, fitting: Fitting, done: set[tuple[int, object]]) -> None:
        """The module's own ``load_state_dict``, with its hooks; what is in its place already is not copied again."""
        skipped = set(fitting.found.sizes)

        def move(target: torch.Tensor, value: LazyParameter) -> None:
            if (id(target), value.tensor.entry.path) not in done:
                copy_into(target, value.tensor)

        values = {key: value for key, value in self._state.values(reads=True).items() if key not in skipped}
        for value in values.values():
            if isinstance(value, LazyParameter):
                value.mover = move
        state: Any = OrderedDict(values)
        metadata = self._state.metadata()
        if metadata is not None:
            state._metadata = metadata
        try:
            self._module.load_state_dict(state, strict=False)
        except StateDictError:
            raise
        except Exception as error:
            raise StateDictError(
                f"the module's own loading fails: {type(error).__name__}: {one_line(error)}",
                path=self._checkpoint.source,
                hint=f"These are changed already: {listed(fitting.pairs)}",
            ) from error

    # ---------------------------------------------------------------- the report

    def _report(self, fitting: Fitting, rules: Sequence[object]) -> LoadReport:
        slots, found = self._target.slots, fitting.found
        loaded = [key for key in slots if key in fitting.pairs or key in fitting.values]
        filled = set(loaded) | set(fitting.tied)
        tied = [key for key in slots if len(self._target.tied_with(key)) > 1]
        details = dict(fitting.cast)
        details |= {key: f"{pair.found} in the file, {pair.expected} here" for key, pair in found.sizes.items()}
        left = self._target.left_on_meta
        if left:
            self._findings.append(
                Finding(
                    "left-on-meta",
                    "warning",
                    f"buffers that no state dict holds are still without memory: {listed(left)}",
                    tuple(left),
                )
            )
        untouched = [key for key in slots if key not in filled]
        return LoadReport(
            source=self._checkpoint.source,
            target=self._target.name,
            loaded=loaded,
            missing=found.missing,
            unexpected=found.unexpected,
            mismatched=[*found.sizes, *(key for key in found.problems if key in slots)],
            cast=fitting.cast,
            tied=tied,
            untouched=untouched,
            coverage=_coverage(slots.values(), filled),
            rules=rules,
            details=details,
            findings=[*self._checkpoint.manifest.notes, *self._findings],
            method=self._method,
        )


def _coverage(slots: Iterable[Slot], filled: set[str]) -> Coverage:
    """The shares of what was filled; one tensor under several keys counts once by its elements and bytes."""
    keys = [0, 0]
    numbers, sizes = [0, 0], [0, 0]
    seen: set[int] = set()
    for slot in slots:
        loaded = slot.key in filled
        keys[0] += loaded
        keys[1] += 1
        if slot.tensor is None or slot.is_lazy or id(slot.tensor) in seen:
            continue
        seen.add(id(slot.tensor))
        numel = slot.tensor.numel()
        nbytes = numel * slot.tensor.element_size()
        numbers = [numbers[0] + loaded * numel, numbers[1] + numel]
        sizes = [sizes[0] + loaded * nbytes, sizes[1] + nbytes]
    return Coverage(*[part / whole if whole else 1.0 for part, whole in (keys, numbers, sizes)])


def _in_torch(dtype: DType | None, tensor: torch.Tensor) -> torch.dtype:
    """torch's dtype; the tensor's own where the target has none."""
    found: torch.dtype = tensor.dtype if dtype is None else getattr(torch, dtype.torch)
    return found


def _is_meta(slot: Slot) -> bool:
    return slot.tensor is not None and slot.tensor.is_meta and not slot.is_lazy


def _cast(tensor: torch.Tensor, dtype: torch.dtype, shape: Sequence[int]) -> torch.Tensor:
    made = tensor if tensor.dtype == dtype else tensor.to(dtype)
    return made if tuple(made.shape) == tuple(shape) else made.view(tuple(shape))


def _as_parameter(tensor: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
    """The tensor as what the old one was: a parameter of its class, with its attributes and ``requires_grad``."""
    if not isinstance(old, torch.nn.Parameter):
        return tensor
    keeps = old.requires_grad and (tensor.is_floating_point() or tensor.is_complex())
    made = torch.nn.Parameter(tensor, requires_grad=keeps)
    if type(old) is not torch.nn.Parameter:
        made = torch.Tensor._make_subclass(type(old), tensor, keeps)
    made.__dict__.update(old.__dict__)
    return made
