"""``load_into``: what is loaded into what, and through which rules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from statedict.checkpoint import Checkpoint
from statedict.checkpoint import open as open_checkpoint
from statedict.errors import KeyMismatch, StateDictError, one_line
from statedict.io.engine import AUTOMATIC, Engine
from statedict.keys import Path, escaped
from statedict.limits import Limits
from statedict.ops.load_report import LoadReport
from statedict.ops.optimizers.places import is_optimizer, one_optimizer, optimizer_paths
from statedict.rules import Rules, apply, select
from statedict.torch.modules.fitting import Choices
from statedict.torch.modules.loading import load_module
from statedict.torch.modules.repairing import advice, load_repaired
from statedict.torch.reading import load_tree
from statedict.torch.storages import Options

__all__ = ["load_into"]


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
    model: torch.nn.Module | None = None,
    keep_hyperparameters: Sequence[str] = (),
    dry_run: bool = False,
    limits: Limits | None = None,
    engine: Engine | None = None,
) -> LoadReport:
    """Load into a module or an optimizer. What it does is said where users find it: ``statedict.load_into``."""
    if check not in ("before", "while", True, False):
        raise StateDictError('check is "before", "while" or False', found=one_line(check))
    if isinstance(rules, str) and rules != "auto":
        raise StateDictError('rules are rules, or the word "auto"', found=rules)
    choices = Choices(
        strict, assign, _dtype(dtype), _device(device), check, allow_empty, (engine or AUTOMATIC).check(), dry_run
    )
    checkpoint = open_checkpoint(source, at=at, limits=limits)
    try:
        if isinstance(target, torch.optim.Optimizer):
            return _into_optimizer(target, checkpoint, rules, choices, model, keep_hyperparameters)
        if isinstance(target, torch.nn.Module):
            return _into_module(target, checkpoint, rules, choices)
        raise StateDictError("only a module or an optimizer can be loaded into", found=type(target).__name__)
    except StateDictError as error:
        raise error.located(checkpoint.source) from error.__cause__
    finally:
        if not isinstance(source, Checkpoint):
            checkpoint.close()


def _dtype(value: Any) -> torch.dtype | None:
    found = getattr(torch, value.removeprefix("torch."), None) if isinstance(value, str) else value
    if found is not None and not isinstance(found, torch.dtype):
        raise StateDictError("dtype is a torch.dtype or its name", found=one_line(value))
    if value is not None and (found is None or not found.is_floating_point):
        raise StateDictError("parameters can only be made of floating-point numbers", found=one_line(value))
    return found


def _device(value: Any) -> str | None:
    try:
        return None if value is None else str(torch.device(value))
    except (RuntimeError, TypeError) as error:
        raise StateDictError("device is a torch.device or its name", found=one_line(value)) from error


# -------------------------------------------------------------------- modules


def _into_module(module: torch.nn.Module, checkpoint: Checkpoint, rules: Any, choices: Choices) -> LoadReport:
    if rules == "auto":
        return load_repaired(module, checkpoint, choices)
    applied = Rules.of(rules)
    checkpoint = apply(checkpoint, applied) if applied else checkpoint
    return load_module(module, checkpoint, choices, rules=applied, hint=lambda: advice(checkpoint, module))


# -------------------------------------------------------------------- optimizers


def _into_optimizer(
    optimizer: torch.optim.Optimizer,
    checkpoint: Checkpoint,
    rules: Any,
    choices: Choices,
    model: torch.nn.Module | None,
    keep_hyperparameters: Sequence[str],
) -> LoadReport:
    from statedict.torch.optimizers.loading import load_optimizer

    applied: list[object] = []
    if rules == "auto":
        path = one_optimizer(checkpoint)
        if path:
            applied = [select(path)]
            checkpoint = checkpoint.at(path)
    elif rules:
        checkpoint, applied = apply(checkpoint, rules), list(Rules.of(rules))
    else:
        _expect_optimizer(checkpoint)
    saved = load_tree(checkpoint, "cpu", Options(False, choices.check is not False, choices.engine))
    report = load_optimizer(
        optimizer,
        saved,
        model=model,
        strict=choices.strict,
        source=checkpoint.source,
        allow_empty=choices.allow_empty,
        keep_hyperparameters=keep_hyperparameters,
        dry_run=choices.dry_run,
    )
    report.rules = tuple(applied)
    return report


def _expect_optimizer(checkpoint: Checkpoint) -> None:
    if is_optimizer(checkpoint.manifest.structure):
        return
    found = optimizer_paths(checkpoint.manifest.structure)
    words = f'Pass at={escaped(found[0])!r}, or rules="auto"' if len(found) == 1 else None
    raise KeyMismatch("this is no state dict of an optimizer: it has no 'param_groups'", hint=words)
