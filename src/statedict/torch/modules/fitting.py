"""What of a state dict goes where in a module, and everything that doesn't fit; nothing is changed, and no tensor read for it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Container, Iterable, Sequence
from typing import Any, NamedTuple, Union

import torch

from statedict.checkpoint import Checkpoint
from statedict.dtypes import BY_TORCH, DType
from statedict.errors import StateDictError, one_line
from statedict.io.engine import AUTOMATIC, Engine
from statedict.lazy_tensor import LazyTensor
from statedict.manifest import Node, ObjectEntry, TensorEntry
from statedict.nodes import fold, rebuilt
from statedict.ops.casts import refusal
from statedict.ops.mismatches import Mismatches, SizePair
from statedict.ops.state_items import metadata_of, state_items
from statedict.torch.modules.lazy_parameters import LazyParameter
from statedict.torch.modules.rehearsal import is_plain, is_sharded, rehearse
from statedict.torch.modules.targets import Slot, Target
from statedict.torch.reading import to_value

__all__ = ["Choices", "Fit", "Fitting", "Hint", "State", "dtype_after"]

# Gives the words that help where names don't fit.
Hint = Union[Callable[[], "str | None"], None]


class Choices(NamedTuple):
    """How a module is loaded."""

    strict: bool = True
    assign: bool = False
    dtype: torch.dtype | None = None
    device: str | None = None
    check: str | bool = "before"
    allow_empty: bool = False
    engine: Engine = AUTOMATIC
    dry_run: bool = False
    kept: frozenset[str] = frozenset()  # keys of the target that may stay as they are, whatever ``strict`` says


class Fitting(NamedTuple):
    """What goes where, and what doesn't fit."""

    pairs: dict[str, LazyTensor]  # of the target's keys
    values: dict[str, Any]  # other values, of the target's keys
    found: Mismatches
    cast: dict[str, str]
    tied: list[str]


class State:
    """A checkpoint as a state dict, as it is compared with a module and given to it."""

    def __init__(self, checkpoint: Checkpoint, whole: Container[str]) -> None:
        """``whole`` are the keys under which a container is one value."""
        self.source = checkpoint.source
        self.items = state_items(checkpoint, whole)
        self._checkpoint = checkpoint

    def lazy(self, entry: TensorEntry) -> LazyTensor:
        """The tensor, to be read when it is asked for."""
        return LazyTensor(entry, self._checkpoint)

    def metadata(self) -> Any:
        """A copy of the versions that the state dict records; the caller's is never handed out."""
        found = metadata_of(self._checkpoint)
        return None if found is None else _copied(found)

    def values(self, *, reads: bool) -> dict[str, Any]:
        """What the module's own loading is given: tensors that aren't read yet, and values as they are."""
        return {key: self._value(key, node, reads) for key, node in self.items.items()}

    def _value(self, key: str, node: Node, reads: bool) -> Any:
        if isinstance(node, TensorEntry) and node.layout == "strided" and node.kind != "ndarray":
            return LazyParameter.of(key, self.lazy(node), lambda target, value: None, reads=reads)

        def leaf(entry: TensorEntry | ObjectEntry) -> Any:
            if isinstance(entry, ObjectEntry):
                return to_value(entry.value, lambda inner: LazyTensor(inner, self._checkpoint).torch())
            return LazyTensor(entry, self._checkpoint).torch()

        return fold(node, leaf, rebuilt)


def dtype_after(slot: Slot, source: LazyTensor, choices: Choices) -> DType | None:
    """The dtype that the tensor has when it is loaded."""
    made_here = choices.assign or (slot.tensor is not None and slot.tensor.is_meta)
    wanted = choices.dtype
    if made_here and wanted is not None and source.entry.dtype.kind == "float":
        return BY_TORCH[str(wanted).removeprefix("torch.")]
    if choices.assign or (slot.is_lazy and slot.dtype is None):
        return source.entry.dtype
    return slot.dtype


class Fit:
    """Compares one state with one module."""

    def __init__(self, target: Target, state: State, choices: Choices) -> None:
        self._module = target.module
        self._target = target
        self._state = state
        self._choices = choices
        self.is_sharded = is_sharded(target.module)
        self.is_plain = is_plain(target.module)

    def fit(self) -> Fitting:
        """What goes where, and what doesn't fit. Changes and reads nothing."""
        if self.is_plain or self.is_sharded:
            return self._fit_by_name()
        return self._fit_by_rehearsal()

    def _fit_by_name(self) -> Fitting:
        """Loading is a copy by name: torch's own rules without its code."""
        pairs: dict[str, LazyTensor] = {}
        sizes: dict[str, SizePair] = {}
        problems: dict[str, str] = {}
        for key, node in self._state.items.items():
            slot = self._target.slots.get(key)
            if slot is None:
                continue
            if not isinstance(node, TensorEntry) or slot.tensor is None:
                problems[key] = "a tensor was expected, and the file has a value of another kind"
                continue
            source = self._state.lazy(node)
            if slot.shape == () and source.shape == (1,):
                source = source[0]  # torch before 0.4 had no tensors without dimensions
            if source.shape != slot.shape:
                sizes[key] = SizePair(_size(slot.shape), _size(source.shape))
            else:
                pairs[key] = source
        missing = [key for key in self._target.slots if key not in self._state.items]
        unexpected = [key for key in self._state.items if key not in self._target.slots]
        return self._finished(pairs, {}, Mismatches(missing, unexpected, sizes, {}, problems))

    def _fit_by_rehearsal(self) -> Fitting:
        values = self._state.values(reads=False)
        rehearsal = rehearse(self._module, values, self._state.metadata())
        keys = {id(slot.tensor): slot.key for slot in self._target.slots.values() if slot.tensor is not None}
        pairs: dict[str, LazyTensor] = {}
        for tensor, value in rehearsal.copies:
            key = value.key if self._is_slot(value.key, tensor) else keys.get(id(tensor))
            if key is not None:
                pairs[key] = value.tensor
        sizes = {key: SizePair(*pair) for key, pair in rehearsal.mismatched.items()}
        missing = [key for key in rehearsal.missing if key not in pairs]
        others = {key: value for key, value in values.items() if key in self._target.slots and key not in pairs}
        others = {key: value for key, value in others.items() if key not in sizes and key not in missing}
        others |= {keys[id(tensor)]: tensor for tensor in rehearsal.computed if id(tensor) in keys}
        problems = {f"problem {at + 1}": one_line(text) for at, text in enumerate(rehearsal.problems)}
        return self._finished(pairs, others, Mismatches(missing, rehearsal.unexpected, sizes, {}, problems))

    def _is_slot(self, key: str, tensor: torch.Tensor) -> bool:
        slot = self._target.slots.get(key)
        return slot is not None and slot.tensor is tensor

    def _finished(self, pairs: dict[str, LazyTensor], values: dict[str, Any], found: Mismatches) -> Fitting:
        """Ties fill each other's gaps; casts are looked at."""
        loaded = {other for key in pairs for other in self._target.tied_with(key)}
        tied = [key for key in found.missing if key in loaded]
        missing = [key for key in found.missing if key not in loaded]
        refused: dict[str, str] = {}
        cast: dict[str, str] = {}
        for key, source in pairs.items():
            after = dtype_after(self._target.slots[key], source, self._choices)
            if after is None or source.entry.dtype == after:
                continue
            why = refusal(
                key,
                source.entry.dtype,
                after,
                is_parameter=self._target.slots[key].is_parameter,
                keys=self._state.items,
            )
            if why is not None:
                refused[key] = f"{source.dtype} can't become {after}: {why}"
            cast[key] = f"{source.dtype} → {after}"
        return Fitting(pairs, values, found._replace(missing=missing, refused=refused), cast, tied)

    # ---------------------------------------------------------------- what is refused

    def refuse(self, fitting: Fitting, hint: Hint) -> None:
        """Raise the one error that says everything that doesn't fit, if something doesn't."""
        found = fitting.found
        if not self._choices.strict:
            # What the module's own code would raise for is no gap that can be left.
            beyond = {key: pair for key, pair in found.sizes.items() if key not in self._state.items}
            found = Mismatches(sizes=beyond, refused=found.refused, problems={} if self.is_plain else found.problems)
        found = found._replace(missing=[key for key in found.missing if key not in self._choices.kept])
        if found:
            words = hint() if hint is not None and (found.missing or found.unexpected or found.sizes) else None
            raise found.error(self._state.source, self._target.name, words or _advice(found))
        if not fitting.pairs and not fitting.values and self._target.slots and not self._choices.allow_empty:
            every = Mismatches(list(self._target.slots), list(self._state.items))
            words = hint() if hint is not None else None
            raise every.error(
                self._state.source,
                self._target.name,
                words or "Nothing would be loaded; allow_empty=True permits that",
            )
        self._refuse_placement(fitting)

    def _refuse_placement(self, fitting: Fitting) -> None:
        """dtype= and device= are for tensors that are made here: those that are there stay what they are."""
        if self.is_sharded and (self._choices.assign or self._choices.dtype or self._choices.device):
            raise StateDictError(
                "parameters of a sharded model stay what they are", hint="Leave assign=, dtype= and device= out"
            )
        if self._choices.assign or (self._choices.dtype is None and self._choices.device is None):
            return
        dtype, device = self._choices.dtype, self._choices.device
        for key in fitting.pairs:
            tensor = self._target.slots[key].tensor
            if tensor is None or tensor.is_meta or self._target.slots[key].is_lazy:
                continue
            wrong = dtype is not None and tensor.is_floating_point() and tensor.dtype != dtype
            if wrong or (device is not None and not _same_device(tensor.device, device)):
                raise StateDictError(
                    f"'{one_line(key)}' is there already, as {tensor.dtype} on {tensor.device}, and stays what it is",
                    path=self._state.source,
                    hint="Move the model first (model.to(...)), or pass assign=True for new parameters",
                )

    def check_ties(self, fitting: Fitting) -> None:
        """Two keys of one tensor must have the same values in the file: torch would keep the last of them, silently."""
        for key, source in fitting.pairs.items():
            others = [other for other in self._target.tied_with(key) if other != key and other in fitting.pairs]
            for other in others:
                if other > key and not _equal(source, fitting.pairs[other]):
                    raise Mismatches(
                        problems={
                            key: f"it is one tensor with '{one_line(other)}' in the model, and another in the file"
                        }
                    ).error(self._state.source, self._target.name, "Untie them in the model, or drop one of the two")


def _advice(found: Mismatches) -> str | None:
    if found.refused:
        return "Convert it first, or give the model the dtype of the file"
    return "strict=False loads what fits" if found.sizes or found.missing or found.unexpected else None


def _size(shape: Sequence[int]) -> str:
    return str(list(shape))


def _same_device(device: torch.device, name: str) -> bool:
    wanted = torch.device(name)
    return device.type == wanted.type and (wanted.index is None or device.index in (None, wanted.index))


def _copied(value: Any) -> Any:
    """A copy of nested mappings, with their classes."""
    if isinstance(value, dict):
        made: dict[Any, Any] = OrderedDict() if isinstance(value, OrderedDict) else {}
        made.update((key, _copied(item)) for key, item in value.items())
        return made
    return list(value) if isinstance(value, list) else value


def _equal(one: LazyTensor, other: LazyTensor) -> bool:
    """Whether two tensors of a checkpoint have the same bytes; the very same view, or equal digests, aren't read."""
    first, second = one.entry, other.entry
    if first.view is not None and second.view is not None:
        if first.view.storage.id == second.view.storage.id and first.view[1:] == second.view[1:]:
            return first.shape == second.shape
        if first.digest is not None and second.digest is not None:
            return first.digest == second.digest
    if first.shape != second.shape or first.dtype != second.dtype:
        return False
    return all(bytes(a) == bytes(b) for a, b in zip(_bytes(one), _bytes(other)))


def _bytes(tensor: LazyTensor) -> Iterable[memoryview]:
    for block in tensor.blocks():
        for start in range(0, len(block), 1 << 22):
            yield block[start : start + (1 << 22)]
