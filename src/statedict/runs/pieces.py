"""What a step is made of while it is in memory, and what a committed one gives back: the seam between disk and training."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from types import TracebackType
from typing import NamedTuple, Protocol

from statedict.checkpoint import Checkpoint
from statedict.errors import KeyNotFound
from statedict.formats.step import StepManifest
from statedict.formats.step_reader import read_step
from statedict.io.ranges import File
from statedict.keys import near
from statedict.limits import DEFAULT_LIMITS, Limits

__all__ = ["Capturable", "Captured", "FellBack", "OpenedStep"]


class Captured(NamedTuple):
    """What one step holds, in memory that doesn't change until it is written.

    The tensors of ``pieces["model"]`` go to ``model.safetensors``, its nesting, order and other values to ``state.json``. ``facts``
    are JSON-ready: the environment, the progress, what was captured.
    """

    pieces: Mapping[str, Checkpoint]  # by the name of the component, each made by ``checkpoint.of_memory``
    facts: Mapping[str, object] = {}


class FellBack(NamedTuple):
    """A step that was asked for and couldn't be used."""

    step: int
    path: str  # where it is now: ``step-….damaged`` if it could be set aside
    reason: str


class Capturable(Protocol):
    """A training state: it can be captured, and be given what was captured."""

    def capture(self) -> Captured:
        """Everything that the next step of training depends on, in memory of its own."""

    def apply(self, step: OpenedStep, *, only: Collection[str] | None, keep_hyperparameters: Collection[str]) -> object:
        """Take over what a step holds; gives a report. Nothing is changed unless everything fits."""


class OpenedStep:
    """A committed step, opened for reading. A context manager: while it is open, retention leaves the step alone.

    ``step``, ``path``, ``metrics``, ``facts``, ``names`` (the components), ``fell_back`` (newer steps that couldn't be used).
    """

    def __init__(
        self,
        manifest: StepManifest,
        path: str,
        open_file: Callable[[str], File],
        *,
        let_go: Callable[[], None] | None = None,
        limits: Limits = DEFAULT_LIMITS,
    ) -> None:
        self.step = manifest.step
        self.path = path
        self.metrics: Mapping[str, float] = manifest.metrics
        self.facts: Mapping[str, object] = manifest.facts
        self.names = list(manifest.components)
        self.manifest = manifest
        self.fell_back: tuple[FellBack, ...] = ()
        self._open_file = open_file
        self._let_go = let_go
        self._limits = limits
        self._pieces: dict[str, Checkpoint] = {}

    def __repr__(self) -> str:
        return f"OpenedStep({self.step}, {self.path!r})"

    def piece(self, name: str) -> Checkpoint:
        """A component as it was captured: lazy tensors, the values beside them, their nesting. Digests are known, and compared
        by whoever loads the tensors. Raises ``KeyNotFound``, and ``CorruptFile`` for a header that isn't as it was written.
        """
        if name not in self.manifest.components:
            hint = f"There is: {', '.join(near(name, self.names) or self.names)}"
            raise KeyNotFound("the step has no such component", path=self.path, key=name, hint=hint)
        known = self._pieces.get(name)
        if known is None:
            manifest, files = read_step(self.manifest, self._open_file, self._limits, only=name)
            known = Checkpoint(manifest, files, source=f"{self.path}#{name}", limits=self._limits)
            self._pieces[name] = known
        return known

    def close(self) -> None:
        """Close the files; retention may take the step from now on."""
        pieces, self._pieces = list(self._pieces.values()), {}
        for piece in pieces:
            piece.close()
        let_go, self._let_go = self._let_go, None
        if let_go is not None:
            let_go()

    def __enter__(self) -> OpenedStep:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
