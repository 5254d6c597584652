"""The functions that need torch, as users call them: here they can be named, and their help read, without it.

Each asks for torch when it is called, and says what to install where it is missing. With torch's million objects in memory one
search for cycles takes as long as a third of our own modules, so there is none while they are imported.

Where torch is there already when a name is taken from here, so is soon what saves and loads: a program that begins with
``import torch`` and ``from statedict import save`` pays for its imports there, not in its first save.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, BinaryIO

from statedict.bridge import need_torch
from statedict.collecting import uncollected
from statedict.keys import Path
from statedict.limits import Limits

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    import torch

    from statedict.io.engine import Engine
    from statedict.io.writers import Progress
    from statedict.ops.load_report import LoadReport
    from statedict.ops.transfers import ReadReport, SaveReport
    from statedict.runs.pieces import Captured, OpenedStep

__all__ = [
    "TrainingState",
    "filter_state_dict",
    "load",
    "load_into",
    "load_model_safely",
    "load_training_state",
    "save",
    "save_training_state",
]


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
    """Write a state dict, a module, an optimizer, or any nested tree of them and of plain values.

    The suffix says how: ``.pth .pt .bin .ckpt`` for ``torch.load(weights_only=True, mmap=True)``, ``.safetensors`` for any reader of
    that format; ``format`` ("torch-zip", "safetensors") where there is no suffix. Both give back with ``load`` exactly what was
    saved: nesting, order, ties, views (without the bytes that none of them shows), strides, ``requires_grad``, ``_metadata``, values
    beside the tensors. Modules stand for their state dicts; optimizers too, with the names of their parameters where a module
    of the same tree or the optimizer itself has them. ``metadata`` are texts of yours, kept beside the tensors.

    The file appears complete under its name, or not at all: an older one stays as it is until then, and survives every error, a full
    disk, Ctrl-C. ``durable`` waits until it outlives a power cut. ``digests`` records an xxh3-128 of each tensor. An open binary
    file is written in order, neither atomic nor durable. Memory stays bounded; tensors of the CPU are written from where they
    are, and must not change meanwhile.

    Returns what was written. Raises ``UnsafeContent`` with the keys of objects that could only be loaded by running code,
    ``Unsupported`` for what the format has no form of, ``FileError`` where the system refuses.
    """
    need_torch("save needs", ", or write arrays with statedict.convert")
    with uncollected():
        from statedict.torch.writing import save

    return save(
        obj,
        path,
        metadata=metadata,
        durable=durable,
        digests=digests,
        format=format,
        limits=limits,
        engine=engine,
        on_progress=on_progress,
    )


def load(
    path: Any,
    *,
    map_location: Any = "cpu",
    at: str | Path | None = None,
    mmap: bool | None = None,
    rules: Any = (),
    check: bool = True,
    limits: Limits | None = None,
    engine: Engine | None = None,
    on_report: Callable[[ReadReport], None] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Any:
    """The value that was saved, from any format that ``open`` reads; nothing of the file is run.

    Objects of unknown classes come as inert records, as ``open`` shows them. ``at`` loads the part under a key, and reads no other
    bytes. ``map_location`` is a device, its name, a dict of such by tag, a function ``(storage, tag)``, or None for the devices
    that the file names, as in ``torch.load``; states of random generators stay on the CPU.

    ``mmap=True`` maps the file instead of reading it: what isn't touched is never read, and the file must not be changed in place
    as long as a tensor lives. None maps a file of 64 MiB and more on a disk of this machine that has nothing to check. With
    ``mmap=False`` the tensors have memory of their own. ``check`` compares what is read with the digests or CRCs that the file
    has; what was not read whole, or mapped, isn't checked, and ``on_report`` is told which. ``rules`` change keys first;
    ``engine`` says how bytes are moved where the choice doesn't suit you.

    Raises what ``open`` raises, ``CorruptFile`` for bytes that aren't those that were written, ``Unsupported`` for tensors that torch
    has none of, and for a device that isn't there.
    """
    need_torch("load gives tensors of", ", or use statedict.open, which doesn't need it")
    with uncollected():
        from statedict.torch.reading import load

    return load(
        path,
        map_location=map_location,
        at=at,
        mmap=mmap,
        rules=rules,
        check=check,
        limits=limits,
        engine=engine,
        on_report=on_report,
        on_progress=on_progress,
    )


def load_into(
    target: Any,
    source: Any,
    *,
    strict: bool = True,
    rules: Any = (),
    at: str | Path | None = None,
    assign: bool = False,
    dtype: Any = None,
    device: Any = None,
    check: str | bool = "before",
    allow_empty: bool = False,
    model: Any = None,
    keep_hyperparameters: Sequence[str] = (),
    dry_run: bool = False,
    limits: Limits | None = None,
    engine: Engine | None = None,
) -> LoadReport:
    """Load into a module, or into an optimizer (then ``model`` has the names of its parameters).

    Names, shapes, dtypes, ranges and, with ``check="before"``, digests are checked first. Everything that doesn't fit is said in
    one error, and nothing is changed then. ``check="while"`` compares digests as the bytes are read, without a pass of its own;
    False doesn't. ``source`` is whatever ``open`` takes; it is never changed.

    - ``strict=False`` loads what fits, leaves out what doesn't (another shape too), and reports it. Nothing at all is an error
      unless ``allow_empty``.
    - ``rules="auto"`` finds the weights inside a training checkpoint, and takes off or puts on the prefixes of wrappers
      (``module.``, ``_orig_mod.`` …), where that is unambiguous and makes more names fit. Or give rules of ``statedict.rules``.
    - The module's own loading runs: hooks, migrations of old versions, extra state, lazy and parametrised modules.
    - Parameters stay the same objects, their values are cast to their dtype, which is reported. Complex to real, quantised
      weights to floats, and float8 to larger floats are refused. ``assign=True`` makes new parameters with the file's dtype.
    - Parameters on the meta device are made from the file, in one copy, on ``device`` and as ``dtype`` if those are given.
    - Tied weights stay tied; a file that has one of two names has both.

    An optimizer is loaded by the names of parameters: another order, other groups, frozen and added parameters are no problem and
    reported. Shapes and class are checked. A file without names is matched by position if all shapes agree, and the report
    says so. Hyperparameters come from the file, each change is in ``overridden``; those in ``keep_hyperparameters`` stay. Moments of
    another dtype than their parameters stay as they are where the optimizer's step takes that; torch's own Adam doesn't.

    ``dry_run`` checks all of it and changes nothing.

    Raises ``KeyMismatch``, ``SpecMismatch``, ``RuleError``, and what ``open`` raises.
    """
    need_torch("load_into needs", "")
    with uncollected():
        from statedict.torch.loading import load_into

    return load_into(
        target,
        source,
        strict=strict,
        rules=rules,
        at=at,
        assign=assign,
        dtype=dtype,
        device=device,
        check=check,
        allow_empty=allow_empty,
        model=model,
        keep_hyperparameters=keep_hyperparameters,
        dry_run=dry_run,
        limits=limits,
        engine=engine,
    )


def filter_state_dict(state_dict: Mapping[str, Any], model: Any) -> dict[str, Any]:
    """The entries of a state dict that a model has a place for, by name and shape.

    Prints what was left out, and why. The entries are the ones that were given, not copies.
    """
    need_torch("filter_state_dict needs", "")
    from statedict.torch.chapter import filter_state_dict

    return filter_state_dict(state_dict, model)


def load_model_safely(model_class: Any, weights_path: Any, device: Any, *args: Any, **kwargs: Any) -> torch.nn.Module:
    """``model_class(*args, **kwargs)`` with the weights of the file, on the device.

    As ``load_into(model, weights_path, rules="auto")`` on the CPU; raises what that raises, before the model goes to the device.
    """
    need_torch("load_model_safely needs", "")
    from statedict.torch.chapter import load_model_safely

    return load_model_safely(model_class, weights_path, device, *args, **kwargs)


def save_training_state(
    model: Any, optimizer: Any, epoch: Any, loss: Any, path: Any, *, rng: Any = False, **kwargs: Any
) -> None:
    """Save a model, an optimizer (or None), and where the training stands; prints the path.

    The file holds ``model_state_dict``, ``optimizer_state_dict`` (not where the optimizer is None), ``epoch``, ``loss``,
    ``pytorch_version`` and ``timestamp`` (ISO 8601, UTC) as texts, and every further keyword. With ``rng=True`` it holds the states of
    Python's, numpy's and torch's random generators too, under ``rng_states``. Atomic and durable, as ``save``.
    """
    need_torch("save_training_state needs", "")
    from statedict.torch.chapter import save_training_state

    save_training_state(model, optimizer, epoch, loss, path, rng=rng, **kwargs)


def load_training_state(model: Any, optimizer: Any, path: Any, device: Any = None) -> dict[str, Any]:
    """Put what ``save_training_state`` saved into the model and the optimizer (or None); prints epoch and loss.

    Gives everything that the file holds, its tensors on ``device`` or the CPU. Neither is changed unless both fit. Random states
    that were saved with ``rng=True`` are restored last, which is printed too.
    """
    need_torch("load_training_state needs", "")
    from statedict.torch.chapter import load_training_state

    return load_training_state(model, optimizer, path, device)


class TrainingState:
    """Everything that the next step of a training depends on, for ``TrainingRun.save`` and ``restore``.

        state = TrainingState(model=model, optimizer=optimizer, scheduler=scheduler, loader=loader, best_loss=1e9)
        run.restore(state)
        for epoch in range(state.epoch, 10):
            state.epoch = epoch
            for batch in state.loader:
                ...

    Components are modules; optimizers (by the names of their parameters); anything with ``state_dict`` and ``load_state_dict``; random
    generators of torch, numpy and Python; samplers; a plain ``DataLoader``, whose place in the epoch is kept if ``state.loader`` is
    iterated; and plain values: numbers, texts, lists, dicts, tensors, arrays. Each is an attribute, values can be set. ``epoch`` and
    ``step`` are there unasked.

    Captured besides: ``rng``, the generators of Python, numpy's legacy functions, torch's of the CPU and of every device in use (False,
    or some of "python", "numpy", "torch", "cuda", "mps", "xpu"); ``gradients`` that no step has used yet ("all": those too that one has,
    for loops that never zero them; "none"); with ``buffers="all"`` those of modules that aren't persistent; the environment.

    Nothing is changed by restoring unless everything fits. Random states are restored last, and none is skipped in silence.
    """

    if TYPE_CHECKING:

        def __init__(
            self,
            *,
            rng: bool | Collection[str] = True,
            gradients: str = "unused",
            buffers: str = "persistent",
            **components: Any,
        ) -> None: ...

        def __getattr__(self, name: str) -> Any: ...

        def __setattr__(self, name: str, value: Any) -> None: ...

        def capture(self) -> Captured:
            """A copy of everything in memory of the host."""

        def apply(
            self,
            step: OpenedStep,
            *,
            only: Collection[str] | None = None,
            keep_hyperparameters: Collection[str] = (),
            rules: Any = (),
            verify_next_step: bool = False,
        ) -> Any:
            """Take over what a step holds."""

        def prepare(self) -> int:
            """Take the memory that ``capture`` needs; its bytes."""

        def updating(self) -> AbstractContextManager[None]:
            """A block in which no other thread captures."""

    def __new__(cls, *args: Any, **components: Any) -> TrainingState:
        """The state, of a class that knows torch. Raises ``MissingDependency`` without it."""
        if cls is not TrainingState:
            return object.__new__(cls)
        need_torch("TrainingState needs", "")
        with uncollected():
            from statedict.torch.training.state import TorchTrainingState

        return object.__new__(TorchTrainingState)


def _make_ready() -> None:
    """Import what saves and loads, if torch is imported; not in the middle of that. 15 to 20 ms, of the 300 that saving 1 GiB takes."""
    torch = sys.modules.get("torch")
    if torch is None or getattr(torch.__spec__, "_initializing", False):
        return
    with uncollected(), suppress(ImportError):  # what is wrong with an older torch is said when a function is called
        import statedict.torch.reading
        import statedict.torch.writing  # noqa: F401


_make_ready()
