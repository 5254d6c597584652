"""The parts of a training state that have no state dict: loaders, samplers, random generators, and plain values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.utils.data import DataLoader, Sampler

from statedict.checkpoint import Checkpoint
from statedict.errors import SpecMismatch
from statedict.ops.load_report import LoadReport
from statedict.torch.training.environment import Difference
from statedict.torch.training.loaders import ResumableLoader
from statedict.torch.training.parts import Part, Wishes, value_of
from statedict.torch.training.rng import attempt, source_of

__all__ = ["GeneratorPart", "LoaderPart", "SamplerPart", "ValuePart"]


class LoaderPart:
    """A plain DataLoader, wrapped."""

    kind = "loader"

    def __init__(self, loader: ResumableLoader) -> None:
        self.visible = loader
        self._checked: Any = None
        self.after: Mapping[str, Any] = {}  # the states of the process's generators in the same step

    @classmethod
    def of(cls, loader: DataLoader[Any], epoch: Part) -> LoaderPart:
        """The part of a loader whose epoch is counted by another part."""
        return cls(ResumableLoader(loader, lambda: epoch.visible))

    def value(self) -> Any:
        """Its place in the epoch, and its generators."""
        return self.visible.state()

    def check(self, piece: Checkpoint, key: str, wishes: Wishes) -> list[Difference]:
        """Try every state in it."""
        self._checked = value_of(piece)
        return self.visible.check(self._checked, key)

    def commit(self) -> LoadReport | None:
        """Go on there when it is iterated."""
        self.visible.restore(self._checked, self.after)
        self._checked = None
        return None


class SamplerPart:
    """A sampler without a state dict: the epoch of a DistributedSampler, the generator of the others."""

    kind = "sampler"

    def __init__(self, sampler: Sampler[Any]) -> None:
        self.visible: Any = sampler
        self._checked: Any = None

    def _generator(self) -> torch.Generator | None:
        found = getattr(self.visible, "generator", None)
        return found if isinstance(found, torch.Generator) else None

    def value(self) -> Any:
        """Both, where it has them."""
        generator = self._generator()
        state = None if generator is None else source_of(generator).get()
        return {"epoch": getattr(self.visible, "epoch", None), "generator": state}

    def check(self, piece: Checkpoint, key: str, wishes: Wishes) -> list[Difference]:
        """Try the generator's state."""
        self._checked = value_of(piece)
        generator = self._generator()
        if not isinstance(self._checked, Mapping) or (generator is None) != (self._checked.get("generator") is None):
            raise SpecMismatch("this is not the state of such a sampler", key=key)
        if generator is not None:
            attempt(source_of(generator).trial, self._checked["generator"], key)
        return []

    def commit(self) -> LoadReport | None:
        """Set both."""
        generator = self._generator()
        if generator is not None:
            attempt(source_of(generator).set, self._checked["generator"], "sampler")
        if self._checked.get("epoch") is not None:
            self.visible.epoch = self._checked["epoch"]
        self._checked = None
        return None


class GeneratorPart:
    """A random generator that the user has made."""

    kind = "generator"

    def __init__(self, generator: Any) -> None:
        self.visible = generator
        self._source = source_of(generator)
        self._checked: Any = None

    def value(self) -> Any:
        """Its state."""
        return {"type": type(self.visible).__name__, "state": self._source.get()}

    def check(self, piece: Checkpoint, key: str, wishes: Wishes) -> list[Difference]:
        """Try the state on another generator of its kind."""
        found = value_of(piece)
        kind = type(self.visible).__name__
        if not isinstance(found, Mapping) or found.get("type") != kind:
            there = found.get("type") if isinstance(found, Mapping) else type(found).__name__
            raise SpecMismatch("the state of another kind of random generator", key=key, expected=kind, found=there)
        self._checked = found.get("state")
        attempt(self._source.trial, self._checked, key)
        return []

    def commit(self) -> LoadReport | None:
        """Set the state."""
        attempt(self._source.set, self._checked, "generator")
        self._checked = None
        return None


class ValuePart:
    """A plain value. A list, dict or tensor stays the same object, with other contents: others may hold it."""

    kind = "value"

    def __init__(self, value: Any) -> None:
        self.visible = value
        self._checked: Any = None

    def value(self) -> Any:
        """The value."""
        return self.visible

    def check(self, piece: Checkpoint, key: str, wishes: Wishes) -> list[Difference]:
        """A tensor must have the shape and the dtype of the one that is here."""
        self._checked, here = value_of(piece), self.visible
        if isinstance(here, torch.Tensor):
            found = self._checked
            shown = f"{found.dtype} {list(found.shape)}" if isinstance(found, torch.Tensor) else type(found).__name__
            expected = f"{here.dtype} {list(here.shape)}"
            if shown != expected:
                raise SpecMismatch("the saved value doesn't fit", key=key, expected=expected, found=shown)
        return []

    def commit(self) -> LoadReport | None:
        """Change the contents, or take the saved value."""
        found, here = self._checked, self.visible
        self._checked = None
        if isinstance(here, torch.Tensor):
            with torch.no_grad():
                here.copy_(found)
        elif type(here) is list and type(found) is list:
            here[:] = found
        elif isinstance(here, dict) and type(found) is type(here):
            here.clear()
            here.update(found)
        else:
            self.visible = found
        return None
