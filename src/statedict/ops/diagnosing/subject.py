"""What the doctor looks at: a checkpoint, the state dicts in it by their flat names, and the figures of their values."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from statedict.checkpoint import Checkpoint
from statedict.errors import one_line
from statedict.keys import Path, display, dotted
from statedict.manifest import TensorEntry
from statedict.nodes import walk
from statedict.ops.findings import command
from statedict.ops.models import state_dicts_of
from statedict.ops.training import Training, training_of

__all__ = ["MOST_LEVELS", "Figures", "Part", "Subject", "subject_of"]

# Components of a name that are looked at one by one; the rest stays together. Real names have fewer than 20.
MOST_LEVELS = 64

# min, max, mean, std, zeros, nan and inf of one tensor, as ``ops.statistics`` counts them.
Figures = Mapping[str, object]


class Part(NamedTuple):
    """One state dict: its place, and its tensors by the names that they have in it, in the order of the file."""

    path: Path
    tensors: Mapping[str, TensorEntry]
    is_average: bool = False

    @property
    def key(self) -> str:
        """Where it stands; empty where it is the whole file."""
        return dotted(self.path)

    @property
    def where(self) -> str:
        """The words that say so in a sentence: ``under 'ema': ``, or nothing."""
        return f"under '{one_line(self.key)}': " if self.path else ""


class Subject(NamedTuple):
    """One checkpoint. ``figures`` are those of the values by path; empty where they weren't read."""

    checkpoint: Checkpoint
    names: Mapping[Path, str]  # the key that each tensor is shown as
    parts: tuple[Part, ...]
    training: Training
    figures: Mapping[Path, Figures]

    @property
    def source(self) -> str:
        """The checkpoint's name, as it is typed."""
        return self.checkpoint.source

    def keys(self, entries: Iterable[TensorEntry]) -> tuple[str, ...]:
        """The keys of these tensors as the file has them."""
        return tuple([self.names[entry.path] for entry in entries if entry.path in self.names])

    def command(self, *words: str) -> str:
        """A command line about this checkpoint, ``SOURCE`` in it, to type; what is in memory has no name to type."""
        source = self.source if self.checkpoint.manifest.files else "SOURCE"
        return command(*[source if word == "SOURCE" else word for word in words])

    def weights(self) -> Iterator[tuple[Part, str, TensorEntry]]:
        """Every tensor of every state dict, with its name in it."""
        for part in self.parts:
            for name, entry in part.tensors.items():
                yield part, name, entry

    def figure(self, entry: TensorEntry, name: str) -> object:
        """One figure of a tensor; None where there is none."""
        figures = self.figures.get(entry.path)
        return None if figures is None else figures.get(name)


def subject_of(checkpoint: Checkpoint, figures: Mapping[Path, Figures] | None = None) -> Subject:
    """The checkpoint with its state dicts; where there are none, and no optimizer either, all its tensors are taken for one."""
    manifest = checkpoint.manifest
    training = training_of(manifest)
    parts = []
    for found in state_dicts_of(manifest.structure):
        leaves = walk(found.node)
        tensors = {dotted(path): leaf for path, leaf in leaves if isinstance(leaf, TensorEntry)}
        parts.append(Part(found.path, tensors, found.is_average))
    if not parts and manifest.tensors and not training.optimizers:
        parts.append(Part((), {dotted(path): entry for path, entry in manifest.tensors.items()}))
    names = {path: key for key, path in display(manifest.tensors).items()}
    return Subject(checkpoint, names, tuple(parts), training, figures or {})
