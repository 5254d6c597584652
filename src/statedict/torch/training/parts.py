"""The kinds of things that a training state consists of: what is captured of each, and how it is checked and given back. Here are those
that have a state dict; the others are in ``plain_parts.py``.

    module      ``state_dict()``, without the wrappers of DDP and ``torch.compile``     checked by ``load_into``
    optimizer   its state by the names of the parameters                                checked by ``load_into``
    stateful    ``state_dict()`` of anything else that has ``load_state_dict`` too      loaded, and rolled back if another fails
    loader      the place in the epoch of a ``DataLoader``                              tried
    sampler     its epoch and its generator                                             tried
    generator   the state of a random generator                                         tried
    value       numbers, texts, lists, dicts, tensors                                   the type alone

``check`` reads what it needs and changes nothing; ``commit`` changes, and comes after the ``check`` of all.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple, Protocol

import torch

from statedict.checkpoint import Checkpoint
from statedict.errors import StateDictError, one_line
from statedict.io.engine import AUTOMATIC
from statedict.ops.load_report import LoadReport
from statedict.torch.loading import load_into
from statedict.torch.optimizers.loading import load_optimizer, named_state_dict
from statedict.torch.reading import load_tree
from statedict.torch.storages import Options
from statedict.torch.training.environment import Difference

__all__ = [
    "ModulePart",
    "OptimizerPart",
    "Part",
    "StatefulPart",
    "Wishes",
    "bare",
    "hyperparameter_differences",
    "is_stateful",
    "value_of",
]

# Attributes of torch's schedulers that are learning rates (optim/lr_scheduler.py), and what else of a group is one.
_RATES = ("base_lrs", "_last_lr")


class Wishes(NamedTuple):
    """What the caller wants of restoring."""

    rules: Any = ()
    keep: tuple[str, ...] = ()  # hyperparameters that stay


class Part(Protocol):
    """One component, or something that belongs to one."""

    kind: str

    @property
    def visible(self) -> Any:
        """What the training state's attribute of this name gives."""

    def value(self) -> Any:
        """What is captured, over live memory."""

    def check(self, piece: Checkpoint, key: str, wishes: Wishes) -> list[Difference]:
        """Whether a saved piece fits; what is another. Changes nothing. Raises ``StateDictError``."""

    def commit(self) -> LoadReport | None:
        """Take over what was checked. Raises ``StateDictError`` where the object's own code refuses."""


def value_of(piece: Checkpoint) -> Any:
    """The nested value of a piece, its tensors read. Their digests were compared when the step was opened."""
    return load_tree(piece, "cpu", Options(False, False, AUTOMATIC))


def is_stateful(value: object) -> bool:
    """Whether it says of itself how it is captured and brought back."""
    return callable(getattr(value, "state_dict", None)) and callable(getattr(value, "load_state_dict", None))


def bare(module: torch.nn.Module) -> torch.nn.Module:
    """The module inside the wrappers of ``torch.compile``, DataParallel and DistributedDataParallel."""
    while True:
        if isinstance(module, (torch.nn.DataParallel, torch.nn.parallel.DistributedDataParallel)):
            module = module.module
        elif "_orig_mod" in module._modules:
            module = module._modules["_orig_mod"]  # type: ignore[assignment]
        else:
            return module


# -------------------------------------------------------------------- modules and optimizers


class ModulePart:
    """A module by its state dict."""

    kind = "module"

    def __init__(self, module: torch.nn.Module) -> None:
        self.visible = module
        self.module = bare(module)
        self._checked: tuple[Checkpoint, Any] | None = None

    def value(self) -> Any:
        """Its state dict."""
        return self.module.state_dict()

    def check(self, piece: Checkpoint, key: str, wishes: Wishes) -> list[Difference]:
        """A dry run of ``load_into``."""
        rules = wishes.rules.get(key, ()) if isinstance(wishes.rules, Mapping) else wishes.rules
        load_into(self.module, piece, rules=rules, check=False, dry_run=True)
        self._checked = (piece, rules)
        return []

    def commit(self) -> LoadReport | None:
        """``load_into``."""
        assert self._checked is not None
        (piece, rules), self._checked = self._checked, None
        return load_into(self.module, piece, rules=rules, check=False)


class OptimizerPart:
    """An optimizer of torch's by the names of its parameters in the modules of the same state."""

    kind = "optimizer"

    def __init__(self, optimizer: torch.optim.Optimizer, modules: list[torch.nn.Module]) -> None:
        self.visible = optimizer
        self._modules = modules
        self._checked: tuple[Any, Checkpoint, tuple[str, ...], str] | None = None

    def value(self) -> Any:
        """Its state dict with names."""
        return named_state_dict(self.visible, self._modules)

    def _model(self) -> torch.nn.Module | None:
        params = {id(param) for group in self.visible.param_groups for param in group["params"]}
        whole = [module for module in self._modules if params <= {id(param) for param in module.parameters()}]
        return whole[0] if whole else None

    def check(self, piece: Checkpoint, key: str, wishes: Wishes) -> list[Difference]:
        """A dry run of loading it."""
        # A learning rate that stays is what a scheduler begins with, too.
        keep = (*wishes.keep, *(["initial_lr"] if "lr" in wishes.keep else []))
        self._checked = (value_of(piece), piece, keep, key)
        self._load(dry_run=True)
        return []

    def _load(self, *, dry_run: bool) -> LoadReport:
        assert self._checked is not None
        saved, piece, keep, _ = self._checked
        return load_optimizer(
            self.visible,
            saved,
            model=self._model(),
            source=piece.source,
            allow_empty=True,
            keep_hyperparameters=keep,
            dry_run=dry_run,
            adopt=True,
        )

    def commit(self) -> LoadReport | None:
        """Load it; the hyperparameters that the step has changed are in the report's ``overridden``."""
        try:
            return self._load(dry_run=False)
        finally:
            self._checked = None


# -------------------------------------------------------------------- what loads itself


class StatefulPart:
    """Anything with ``state_dict`` and ``load_state_dict``: schedulers, scalers, averages."""

    kind = "stateful"

    def __init__(self, target: Any) -> None:
        self.visible = target
        self._is_scheduler = isinstance(target, torch.optim.lr_scheduler.LRScheduler)
        self._checked: tuple[Any, str] | None = None
        self._before: Any = None

    def value(self) -> Any:
        """Its state dict. Functions in that of a scheduler are left out: its constructor makes them, as those of ``LambdaLR``."""
        found = self.visible.state_dict()
        if self._is_scheduler and isinstance(found, dict):
            return {name: item for name, item in found.items() if not callable(item)}
        return found

    def check(self, piece: Checkpoint, key: str, wishes: Wishes) -> list[Difference]:
        """Read it. Only its own code could say whether it fits."""
        value = value_of(piece)
        if self._is_scheduler and "lr" in wishes.keep and isinstance(value, dict):
            own = self.visible.state_dict()
            value = {**value, **{name: own[name] for name in _RATES if name in own and name in value}}
        self._checked = (value, key)
        return []

    def commit(self) -> LoadReport | None:
        """Load it, remembering what it was before."""
        assert self._checked is not None
        (value, key), self._checked = self._checked, None
        try:
            self._before = copy.deepcopy(self.visible.state_dict())
            self.visible.load_state_dict(value)
        except StateDictError:
            raise
        except Exception as error:
            name = type(self.visible).__name__
            what = f"{name}.load_state_dict failed with {type(error).__name__}: {one_line(error)}"
            raise StateDictError(what, key=key, hint="Nothing else was changed; only= leaves it out") from error
        return None

    def roll_back(self) -> None:
        """Give it back what it was before ``commit``."""
        if self._before is not None:
            self.visible.load_state_dict(self._before)
        self._before = None

    def forget(self) -> None:
        """Let go of what it was before."""
        self._before = None


def hyperparameter_differences(key: str, report: LoadReport | None) -> Collection[Difference]:
    """The hyperparameters that the step has changed."""
    changed = report.overridden if report is not None else {}
    return [Difference(f"{key}.{name}", saved, here) for name, (here, saved) in changed.items()]
