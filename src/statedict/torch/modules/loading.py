"""A checkpoint's tensors into a module, once it is sure that all of it fits."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Union

import torch

from statedict.checkpoint import Checkpoint
from statedict.errors import StateDictError, one_line
from statedict.io.engine import AUTOMATIC, Engine
from statedict.lazy_tensor import LazyTensor
from statedict.manifest import Finding, Node, ObjectEntry, TensorEntry
from statedict.nodes import fold, rebuilt
from statedict.ops.casts import refusal
from statedict.ops.load_report import Coverage, LoadReport
from statedict.ops.mismatches import Mismatches, SizePair, listed
from statedict.ops.state_items import metadata_of, state_items
from statedict.torch.modules.lazy_parameters import LazyParameter
from statedict.torch.modules.placing import Placement, check_before, copy_into, make_tensors, place
from statedict.torch.modules.rehearsal import Rehearsal, is_plain, is_sharded, rehearse
from statedict.torch.modules.targets import Slot, Target, replace_tensors
from statedict.torch.reading import to_value

__all__ = ["Choices", "load_module"]


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


class Fitting(NamedTuple):
    """What goes where, and what doesn't fit."""

    pairs: dict[str, LazyTensor]  # of the target's keys
    values: dict[str, Any]  # other values, of the target's keys
    found: Mismatches
    cast: dict[str, str]
    tied: list[str]


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
        self._items = state_items(checkpoint, self._target.slots)
        self._sharded = is_sharded(module)
        self._plain = is_plain(module)
        self._findings: list[Finding] = []
        self._method: dict[str, object] = {}
        self._rehearsal: Rehearsal | None = None

    def run(self, rules: Sequence[object], hint: Hint) -> LoadReport:
        fitting = self._fit()
        self._refuse(fitting, hint)
        sources = list(fitting.pairs.values())
        if self._choices.check in ("before", True):
            checked = check_before(self._checkpoint, [source.entry for source in sources], self._choices.engine)
            self._method["checked_nbytes"] = checked
        self._check_ties(fitting)
        if self._choices.dry_run:
            return self._report(fitting, rules)
        if self._sharded:
            # Its hooks unfold the parameters, which are copied to then, and fold them again.
            self._load_properly(fitting, set())
        elif self._choices.assign:
            self._assign(fitting)
        else:
            self._fill(fitting)
        return self._report(fitting, rules)

    # ---------------------------------------------------------------- what fits

    def _fit(self) -> Fitting:
        if self._plain or self._sharded:
            return self._fit_by_name()
        return self._fit_by_rehearsal()

    def _fit_by_name(self) -> Fitting:
        """Loading is a copy by name: torch's own rules without its code."""
        pairs: dict[str, LazyTensor] = {}
        sizes: dict[str, SizePair] = {}
        problems: dict[str, str] = {}
        for key, node in self._items.items():
            slot = self._target.slots.get(key)
            if slot is None:
                continue
            if not isinstance(node, TensorEntry) or slot.tensor is None:
                problems[key] = "a tensor was expected, and the file has a value of another kind"
                continue
            source = LazyTensor(node, self._checkpoint)
            if slot.shape == () and source.shape == (1,):
                source = source[0]  # torch before 0.4 had no tensors without dimensions
            if source.shape != slot.shape:
                sizes[key] = SizePair(_size(slot.shape), _size(source.shape))
            else:
                pairs[key] = source
        missing = [key for key in self._target.slots if key not in self._items]
        unexpected = [key for key in self._items if key not in self._target.slots]
        return self._finished(pairs, {}, Mismatches(missing, unexpected, sizes, {}, problems))

    def _fit_by_rehearsal(self) -> Fitting:
        values = self._values(reads=False)
        rehearsal = self._rehearsal = rehearse(self._module, values, self._metadata())
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
            after = self._dtype_after(self._target.slots[key], source)
            if after is None or source.entry.dtype == after:
                continue
            why = refusal(
                key, source.entry.dtype, after, is_parameter=self._target.slots[key].is_parameter, keys=self._items
            )
            if why is not None:
                refused[key] = f"{source.dtype} can't become {after}: {why}"
            cast[key] = f"{source.dtype} → {after}"
        return Fitting(pairs, values, found._replace(missing=missing, refused=refused), cast, tied)

    def _dtype_after(self, slot: Slot, source: LazyTensor) -> Any:
        """The dtype that the tensor has when it is loaded."""
        from statedict.dtypes import BY_TORCH

        made_here = self._choices.assign or (slot.tensor is not None and slot.tensor.is_meta)
        wanted = self._choices.dtype
        if made_here and wanted is not None and source.entry.dtype.kind == "float":
            return BY_TORCH[str(wanted).removeprefix("torch.")]
        if self._choices.assign or (slot.is_lazy and slot.dtype is None):
            return source.entry.dtype
        return slot.dtype

    # ---------------------------------------------------------------- what is refused

    def _refuse(self, fitting: Fitting, hint: Hint) -> None:
        found = fitting.found
        if not self._choices.strict:
            # What the module's own code would raise for is no gap that can be left.
            beyond = {key: pair for key, pair in found.sizes.items() if key not in self._items}
            found = Mismatches(sizes=beyond, refused=found.refused, problems={} if self._plain else found.problems)
        if found:
            words = hint() if hint is not None and (found.missing or found.unexpected) else None
            raise found.error(self._checkpoint.source, self._target.name, words or _advice(found))
        if not fitting.pairs and not fitting.values and self._target.slots and not self._choices.allow_empty:
            every = Mismatches(list(self._target.slots), list(self._items))
            words = hint() if hint is not None else None
            raise every.error(
                self._checkpoint.source,
                self._target.name,
                words or "Nothing would be loaded; allow_empty=True permits that",
            )
        self._refuse_placement(fitting)

    def _refuse_placement(self, fitting: Fitting) -> None:
        """dtype= and device= are for tensors that are made here: those that are there stay what they are."""
        if self._sharded and (self._choices.assign or self._choices.dtype or self._choices.device):
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
                    path=self._checkpoint.source,
                    hint="Move the model first (model.to(...)), or pass assign=True for new parameters",
                )

    def _check_ties(self, fitting: Fitting) -> None:
        """Two keys of one tensor must have the same values in the file: torch would keep the last of them, silently."""
        for key, source in fitting.pairs.items():
            others = [other for other in self._target.tied_with(key) if other != key and other in fitting.pairs]
            for other in others:
                if other > key and not _equal(source, fitting.pairs[other]):
                    raise Mismatches(
                        problems={
                            key: f"it is one tensor with '{one_line(other)}' in the model, and another in the file"
                        }
                    ).error(
                        self._checkpoint.source, self._target.name, "Untie them in the model, or drop one of the two"
                    )

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
        if not self._plain:
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

    _made: dict[int, object]

    def _materialise(self, pairs: Mapping[str, LazyTensor]) -> None:
        """Make the tensors that are on the meta device, straight from the file, and put them where those were."""
        self._made = {}
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
            wanted = self._dtype_after(slots[key], source)
            new[id(old)] = _as_parameter(_cast(tensor, getattr(torch, wanted.torch), old.shape), old)
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
            dtype = self._dtype_after(self._target.slots[key], source)
            new[id(old)] = _as_parameter(_cast(tensor, getattr(torch, dtype.torch), tensor.shape), old)
        if self._plain:
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

        values = {key: value for key, value in self._values(reads=True).items() if key not in skipped}
        for value in values.values():
            if isinstance(value, LazyParameter):
                value.mover = move
        state: Any = OrderedDict(values)
        metadata = self._metadata()
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

    # ---------------------------------------------------------------- values for the module's own code

    def _metadata(self) -> Any:
        """A copy of the versions that the state dict records; the caller's is never handed out."""
        found = metadata_of(self._checkpoint)
        return None if found is None else _copied(found)

    def _values(self, *, reads: bool) -> dict[str, Any]:
        return {key: self._value(key, node, reads) for key, node in self._items.items()}

    def _value(self, key: str, node: Node, reads: bool) -> Any:
        if isinstance(node, TensorEntry) and node.layout == "strided" and node.kind != "ndarray":
            return LazyParameter.of(key, LazyTensor(node, self._checkpoint), lambda target, value: None, reads=reads)

        def leaf(entry: TensorEntry | ObjectEntry) -> Any:
            if isinstance(entry, ObjectEntry):
                return to_value(entry.value, lambda inner: LazyTensor(inner, self._checkpoint).torch())
            return LazyTensor(entry, self._checkpoint).torch()

        return fold(node, leaf, rebuilt)

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


def _advice(found: Mismatches) -> str | None:
    if found.refused:
        return "Convert it first, or give the model the dtype of the file"
    return "strict=False loads what fits" if found.sizes or found.missing or found.unexpected else None


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


def _size(shape: Sequence[int]) -> str:
    return str(list(shape))


def _is_meta(slot: Slot) -> bool:
    return slot.tensor is not None and slot.tensor.is_meta and not slot.is_lazy


def _same_device(device: torch.device, name: str) -> bool:
    wanted = torch.device(name)
    return device.type == wanted.type and (wanted.index is None or device.index in (None, wanted.index))


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
