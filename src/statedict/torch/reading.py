"""``load``: the nested value that was saved, with tensors of torch's, on the device that was asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from statedict.checkpoint import Checkpoint
from statedict.checkpoint import open as open_checkpoint
from statedict.collecting import uncollected
from statedict.dtypes import DType
from statedict.errors import CorruptFile, StateDictError, Unsupported, one_line
from statedict.formats.records import MappingRecord
from statedict.io.engine import AUTOMATIC, Engine
from statedict.keys import Path
from statedict.lazy_tensor import LazyTensor
from statedict.limits import Limits
from statedict.manifest import Finding, NumpyScalar, ObjectEntry, Opaque, TensorEntry, TorchValue
from statedict.nodes import every_tensor, fold, rebuilt
from statedict.ops.transfers import ReadReport
from statedict.torch.building import TensorBuilder
from statedict.torch.locations import MapLocation, destination_of, is_random_state, marked_random_states, relocated
from statedict.torch.storages import Options, StorageSet, load_storages

__all__ = ["load", "load_tree", "to_value"]


def load(
    source: Any,
    *,
    map_location: MapLocation = "cpu",
    at: str | Path | None = None,
    mmap: bool | None = None,
    rules: Any = (),
    check: bool = True,
    limits: Limits | None = None,
    engine: Engine | None = None,
    on_report: Callable[[ReadReport], None] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Any:
    """The value that was saved. What it does is said where users find it: ``statedict.load``."""
    options = Options(mmap, bool(check), (engine or AUTOMATIC).check(), on_progress)
    with uncollected():
        checkpoint = open_checkpoint(source, at=at, limits=limits)
        try:
            return load_tree(_ruled(checkpoint, rules), map_location, options, on_report)
        finally:
            if not isinstance(source, Checkpoint):
                checkpoint.close()


def _ruled(checkpoint: Checkpoint, rules: Any) -> Checkpoint:
    if isinstance(rules, str):
        hint = 'rules="auto" is for load_into, which knows the target'
        raise StateDictError("load takes rules, not a word", found=rules, hint=hint)
    if not rules:
        return checkpoint
    from statedict.rules import apply

    return apply(checkpoint, rules)


def load_tree(
    checkpoint: Checkpoint,
    map_location: MapLocation,
    options: Options,
    on_report: Callable[[ReadReport], None] | None = None,
) -> Any:
    """The nested value of a checkpoint, with its tensors read."""
    try:
        with uncollected():
            return _Loading(checkpoint, map_location, options).run(on_report)
    except StateDictError as error:
        raise error.located(checkpoint.source) from error.__cause__


class _Loading:
    def __init__(self, checkpoint: Checkpoint, map_location: MapLocation, options: Options) -> None:
        self._checkpoint = checkpoint
        self._map_location = map_location
        self._options = options
        self._marked = marked_random_states(checkpoint.metadata)
        self._kept: list[str] = []
        self._findings: list[Finding] = []
        self._known: dict[str | None, str] = {}

    def run(self, on_report: Callable[[ReadReport], None] | None) -> Any:
        manifest = self._checkpoint.manifest
        entries = [entry for entry in every_tensor(manifest.structure) if entry.kind != "ndarray"]
        self._refuse(entries)
        loaded = load_storages(self._checkpoint.reader, entries, self._destination, self._options)
        if callable(self._map_location):
            self._relocate(loaded, entries, self._map_location)
        builder = TensorBuilder(loaded.place)

        def leaf(entry: TensorEntry | ObjectEntry) -> Any:
            if isinstance(entry, ObjectEntry):
                return to_value(entry.value, self._tensor(builder))
            return self._tensor(builder)(entry)

        made = fold(manifest.structure, leaf, rebuilt)
        if on_report is not None:
            on_report(self._report(loaded))
        return made

    def _tensor(self, builder: TensorBuilder) -> Callable[[TensorEntry], Any]:
        def make(entry: TensorEntry) -> Any:
            if entry.kind == "ndarray":
                return LazyTensor(entry, self._checkpoint).numpy()
            return builder.build(entry)

        return make

    def _refuse(self, entries: Sequence[TensorEntry]) -> None:
        """All tensors at once that torch has no like of, before anything is read."""
        known = {dtype for dtype in {entry.dtype for entry in entries} if _is_in_torch(dtype)}
        bad = [
            entry
            for entry in entries
            if (entry.dtype not in known and entry.layout == "strided") or entry.layout == "wrapper"
        ]
        if bad:
            shown = ", ".join(f"'{one_line(entry.key)}'" for entry in bad[:5])
            more = f" and {len(bad) - 5} more" if len(bad) > 5 else ""
            kinds = ", ".join(sorted({str(entry.dtype) if entry.layout == "strided" else entry.kind for entry in bad}))
            raise Unsupported(
                f"torch has no tensors of {kinds}: {shown}{more}",
                key=bad[0].key,
                hint="Load the rest by rules, at= or statedict.open, which gives their bytes and parts",
            )

    def _destination(self, entry: TensorEntry) -> str:
        if self._map_location != "cpu" and is_random_state(entry, self._marked):
            self._kept.append(entry.key)
            return "cpu"
        if entry.device not in self._known:
            self._known[entry.device] = destination_of(self._map_location, entry.device)
        return self._known[entry.device]

    def _relocate(
        self, loaded: StorageSet, entries: Iterable[TensorEntry], function: Callable[[Any, str], Any]
    ) -> None:
        kept = set(self._kept)
        loaded.relocate(
            entries, lambda storage, entry: storage if entry.key in kept else relocated(storage, entry.device, function)
        )

    def _report(self, loaded: StorageSet) -> ReadReport:
        manifest = self._checkpoint.manifest
        return ReadReport(
            source=self._checkpoint.source,
            format=manifest.format,
            tensors=len(manifest.tensors),
            objects=len(manifest.objects),
            method=loaded.facts,
            unchecked=loaded.unchecked,
            kept_on_cpu=self._kept,
            findings=[*manifest.notes, *self._findings],
        )


def _is_in_torch(dtype: DType) -> bool:
    return isinstance(getattr(torch, dtype.torch, None), torch.dtype)


def to_value(value: Any, tensor: Callable[[TensorEntry], Any], depth: int = 0) -> Any:
    """A value beside the tensors as Python, torch and numpy have it. Records of unknown objects stay records.

    Raises ``CorruptFile`` for a dtype, device or number that isn't one.
    """
    if isinstance(value, TensorEntry):
        return tensor(value)
    if isinstance(value, TorchValue):
        return _torch_value(value)
    if isinstance(value, NumpyScalar):
        return np.frombuffer(value.data, np.dtype(value.dtype).newbyteorder("<"))[0].astype(np.dtype(value.dtype))
    if isinstance(value, Opaque):
        made = Opaque(value.module, value.name, to_value(value.args, tensor), to_value(value.state, tensor))
        made.items = [to_value(item, tensor) for item in value.items]
        made.pairs = [(to_value(key, tensor), to_value(item, tensor)) for key, item in value.pairs]
        return made
    if type(value) in (list, tuple, set, frozenset):
        return type(value)([to_value(item, tensor) for item in value])
    if isinstance(value, MappingRecord):
        return SimpleNamespace(**{str(key): to_value(item, tensor) for key, item in value.items()})
    if isinstance(value, dict) and value:
        made_dict = type(value)()
        dict.update(made_dict, {to_value(key, tensor): to_value(item, tensor) for key, item in value.items()})
        return made_dict
    return value


def _torch_value(value: TorchValue) -> Any:
    found: Any = None
    try:
        if value.kind == "Size":
            found = torch.Size(value.value)  # type: ignore[arg-type]
        elif value.kind == "device":
            found = torch.device(str(value.value))
        else:
            found = getattr(torch, str(value.value).removeprefix("torch."), None)
    except (RuntimeError, TypeError, ValueError, OverflowError):
        found = None
    if not isinstance(
        found,
        {
            "Size": torch.Size,
            "device": torch.device,
            "dtype": torch.dtype,
            "layout": torch.layout,
            "qscheme": torch.qscheme,
            "memory_format": torch.memory_format,
        }[value.kind],
    ):
        raise CorruptFile(f"torch has no {value.kind} of this name", found=one_line(value.value))
    return found
