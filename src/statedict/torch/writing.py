"""``save``: a state dict, module, optimizer or any tree of them as a file, complete or not at all."""

from __future__ import annotations

import io
import json
import os
import time
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, BinaryIO

import torch

from statedict.checkpoint import Checkpoint, of_memory
from statedict.errors import StateDictError, UnsafeContent, Unsupported, one_line
from statedict.io.durable import check_target
from statedict.io.engine import AUTOMATIC, Engine
from statedict.io.writers import Progress, Written, execute, execute_to_stream
from statedict.keys import dotted
from statedict.lazy_tensor import LazyTensor
from statedict.limits import DEFAULT_LIMITS, Limits
from statedict.memory import is_foreign
from statedict.ops.sources import source_of
from statedict.ops.transfers import SaveReport
from statedict.ops.writing import Prepared, Tree, format_of, prepare, removed_nbytes
from statedict.torch.locations import RNG_NOTE, is_random_state

__all__ = ["captured", "save"]

_FORMATS = ("torch-zip", "safetensors")


def save(
    obj: Any,
    path: str | os.PathLike[str] | BinaryIO,
    *,
    metadata: Mapping[str, str] | None = None,
    durable: bool = True,
    digests: bool = True,
    format: str | None = None,
    limits: Limits | None = None,
    engine: Engine | None = None,
    on_progress: Progress | None = None,
) -> SaveReport:
    """Write the value. What it does is said where users find it: ``statedict.save``."""
    start = time.perf_counter()
    stream = path if hasattr(path, "write") else None
    name = str(getattr(path, "name", "<stream>")) if stream is not None else os.fspath(path)  # type: ignore[arg-type]
    kind = _format(name, format, stream is not None)
    if stream is None:
        check_target(name, overwrite=True)
    try:
        checkpoint = of_memory(captured(obj), limits or DEFAULT_LIMITS, still=True)
        facts = _metadata(checkpoint, metadata or {})
        tree = Tree(checkpoint.manifest.structure, facts, lambda entry: source_of(entry, checkpoint))
        prepared = prepare(tree, name, digests=digests, format=kind)
        written = _carry_out(prepared, name, stream, durable, (engine or AUTOMATIC).check(), on_progress)  # type: ignore[arg-type]
    except StateDictError as error:
        raise error.located(name) from error.__cause__
    return _report(checkpoint, prepared, written, name, digests, time.perf_counter() - start)


def _carry_out(
    prepared: Prepared,
    name: str,
    stream: BinaryIO | None,
    durable: bool,
    engine: Engine,
    on_progress: Progress | None,
) -> Written:
    if stream is None:
        return execute(prepared.plan, name, overwrite=True, durable=durable, on_progress=on_progress, engine=engine)
    if isinstance(stream, io.TextIOBase):  # type: ignore[unreachable]
        raise StateDictError("the file object takes text", path=name, hint="Open it for bytes: open(path, 'wb')")
    return execute_to_stream(prepared.plan, stream, on_progress=on_progress)


def _format(name: str, format: str | None, is_stream: bool) -> str:
    """The format by its name, by the suffix, or torch's for a stream without one."""
    if format is not None:
        if format not in _FORMATS:
            raise Unsupported(
                "there is no such format to write", path=name, expected=" or ".join(_FORMATS), found=format
            )
        return format
    try:
        return format_of(name)
    except Unsupported:
        if not is_stream:
            raise
        return "torch-zip"


def _report(
    checkpoint: Checkpoint, prepared: Prepared, written: Written, name: str, digests: bool, seconds: float
) -> SaveReport:
    manifest = checkpoint.manifest
    return SaveReport(
        path=name,
        format=prepared.plan.format,
        tensors=len(manifest.tensors),
        objects=len(manifest.objects),
        nbytes=written.nbytes,
        removed_nbytes=removed_nbytes(manifest, prepared.plan),
        digests=digests,
        atomic=written.atomic,
        durable=written.durable,
        method={**written.method, **(written.writing._asdict() if written.writing is not None else {})},
        seconds=seconds,
        findings=prepared.notes,
    )


def _metadata(checkpoint: Checkpoint, given: Mapping[str, str]) -> dict[str, str]:
    """The caller's texts, and which tensors are random states where their names don't say so."""
    for name, text in given.items():
        if not isinstance(name, str) or not isinstance(text, str):
            raise StateDictError("metadata are texts by name", found=f"{type(name).__name__}: {type(text).__name__}")
    marked = [
        entry.key
        for entry in checkpoint.manifest.tensors.values()
        if entry.dtype.code == "U8"
        and not is_random_state(entry)
        and _is_generator_state(LazyTensor(entry, checkpoint))
    ]
    return {**given, RNG_NOTE: json.dumps(marked)} if marked else dict(given)


def _is_generator_state(tensor: LazyTensor) -> bool:
    """Whether the bytes are those of a generator of the CPU: torch checks them when it takes them."""
    if tensor.shape != tuple(torch.get_rng_state().shape) or tensor.device == "meta":
        return False
    try:
        torch.Generator().set_state(tensor.torch())
    except (RuntimeError, TypeError):
        return False
    return True


# -------------------------------------------------------------------- what is saved of a live object


def captured(obj: Any) -> Any:
    """The value with every module, optimizer and scheduler in it replaced by its state dict; nothing given is modified.

    Optimizers get the names of their parameters, from the modules of the same tree. Raises ``UnsafeContent`` with the keys of
    all objects that no reader could build without running code.
    """
    capture = _Capture(obj)
    made = capture.value(obj, ())
    if capture.foreign:
        shown = ", ".join(f"'{one_line(key)}' ({kind})" for key, kind in list(capture.foreign.items())[:5])
        more = f" and {len(capture.foreign) - 5} more" if len(capture.foreign) > 5 else ""
        raise UnsafeContent(
            f"these can't be saved, only their code could bring them back: {shown}{more}",
            globals=dict.fromkeys(capture.foreign.values()),
            key=next(iter(capture.foreign)),
            hint="Save plain values of them, or their state_dict()",
        )
    return made


class _Capture:
    def __init__(self, root: Any) -> None:
        self.foreign: dict[str, str] = {}
        self._above: set[int] = set()
        self._models = _modules(root)

    def value(self, item: Any, path: tuple[Any, ...]) -> Any:
        if isinstance(item, torch.nn.Module):
            return self.value(item.state_dict(), path)
        if isinstance(item, torch.optim.Optimizer):
            # A third of the start of a save, of which a plain state dict needs nothing.
            from statedict.torch.optimizers.loading import named_state_dict

            return self.value(named_state_dict(item, self._models), path)
        if isinstance(item, torch.optim.lr_scheduler.LRScheduler):
            return self.value(item.state_dict(), path)
        if type(item) in (dict, OrderedDict, list, tuple):
            return self._container(item, path)
        if not isinstance(item, torch.Tensor) and is_foreign(item):
            self.foreign[dotted(tuple(part if isinstance(part, (str, int)) else repr(part) for part in path))] = (
                f"{type(item).__module__}.{type(item).__qualname__}"
            )
        return item

    def _container(self, item: Any, path: tuple[Any, ...]) -> Any:
        if id(item) in self._above:
            return item  # it contains itself: refused with the tree
        if len(path) > DEFAULT_LIMITS.depth // 4:
            return item
        self._above.add(id(item))
        try:
            if isinstance(item, dict):
                made = {key: self.value(child, (*path, key)) for key, child in item.items()}
                changed = any(made[key] is not child for key, child in item.items())
                return _like(item, made) if changed else item
            values = [self.value(child, (*path, at)) for at, child in enumerate(item)]
            changed = any(new is not old for new, old in zip(values, item))
            return type(item)(values) if changed else item
        finally:
            self._above.discard(id(item))


def _like(item: Any, made: dict[Any, Any]) -> Any:
    """The items in a mapping of the same kind, with its ``_metadata``."""
    if type(item) is dict:
        return made
    copy = OrderedDict(made)
    copy.__dict__.update(vars(item))
    return copy


def _modules(root: Any) -> list[torch.nn.Module]:
    """The modules of a tree, each once."""
    found: dict[int, torch.nn.Module] = {}
    pending, seen = [root], set()
    while pending:
        item = pending.pop()
        if isinstance(item, torch.nn.Module):
            found.setdefault(id(item), item)
        elif type(item) in (dict, OrderedDict, list, tuple) and id(item) not in seen:
            seen.add(id(item))
            pending.extend(item.values() if isinstance(item, dict) else item)
    return list(found.values())
