"""The weights of a checkpoint that is to be aligned with another: found by structure, with what is known of their order and ties."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from statedict.aligning.alignment import Side, Spec
from statedict.checkpoint import Checkpoint
from statedict.keys import Path, dotted, escaped
from statedict.manifest import TensorEntry, tied_groups
from statedict.ops.comparing import walks
from statedict.ops.models import StateDict, state_dicts_of

__all__ = ["Weights", "weights_of"]

# Bits of the largest element: the safetensors library sorts by dtype, and its dtypes by their size, before the names.
_MOST_BITS = 128


class Weights(NamedTuple):
    """The tensors that are meant, by key.

    ``at`` is the part of the checkpoint that they are, ``checkpoint`` that part. Where several state dicts could be meant, ``at`` is the
    whole file and the keys have their names in front. ``beside`` are the keys of the whole file's tensors that are no weights.
    """

    checkpoint: Checkpoint
    entries: Mapping[str, TensorEntry]
    at: Path
    side: Side
    beside: tuple[str, ...]

    @property
    def prefix(self) -> str:
        """What stands before the keys in the whole file, with its dot."""
        return f"{dotted(self.at)}." if self.at else ""

    @property
    def place(self) -> str:
        """The part, as it is typed behind a ``#``; empty where it is the whole file."""
        return escaped(self.at) if self.at and dotted(self.at) != escaped(self.at) else dotted(self.at)

    def checkpoint_tensors(self) -> Mapping[str, TensorEntry]:
        """All tensors of the part, those that are no weights too."""
        return (
            {key: self.checkpoint[key].entry for key in self.checkpoint}
            if self.beside and not self.at
            else self.entries
        )

    def tensor(self, key: str) -> walks.Side:
        """A tensor, to be read."""
        return walks.Side(self.entries[key], self.checkpoint)


def weights_of(checkpoint: Checkpoint, *, wanted: bool = False) -> Weights:
    """The weights in a checkpoint; all of its tensors where no part of it looks like a state dict. Reads nothing.

    ``wanted`` says that it is the checkpoint which others are to fit: of several parts the one that is no average is meant then.
    """
    parts = [part for part in state_dicts_of(checkpoint.manifest.structure) if part.tensors and not part.is_list]
    if wanted and len(parts) > 1:
        trained = [part for part in parts if not part.is_average]
        parts = trained if len(trained) == 1 else parts
    at = parts[0].path if len(parts) == 1 else ()
    part = checkpoint.at(at) if at else checkpoint
    inside = {key: part[key].entry for key in part}
    beside: list[str] = []
    if at:
        beside = [key for key in checkpoint if checkpoint.path_of(key)[: len(at)] != at]
    elif len(parts) > 1:
        kept = {key: entry for key, entry in inside.items() if _is_in(entry.path, parts)}
        beside = [key for key in inside if key not in kept]
        inside = kept
    return Weights(part, inside, at, _side(part, inside), tuple(beside))


def _is_in(path: Path, parts: Sequence[StateDict]) -> bool:
    return any(path[: len(part.path)] == part.path for part in parts)


def _side(part: Checkpoint, entries: Mapping[str, TensorEntry]) -> Side:
    names = {entry.path: key for key, entry in entries.items()}
    ties = tied_groups({entry.path: entry for entry in entries.values()})
    return Side(
        {key: Spec(entry.shape, entry.dtype.torch) for key, entry in entries.items()},
        not _is_sorted(list(entries.items())),
        tuple([tuple([names[path] for path in group]) for group in ties]),
    )


def _is_sorted(items: Sequence[tuple[str, TensorEntry]]) -> bool:
    """Whether the order is one that a program sorts names into, so that it says nothing about the model."""
    keys = [key for key, _ in items]
    if len(keys) < 3:
        return False
    by_size = [(_MOST_BITS - entry.dtype.bits, entry.dtype.code, key) for key, entry in items]
    return keys == sorted(keys) or keys == [key for _, _, key in sorted(by_size)]
