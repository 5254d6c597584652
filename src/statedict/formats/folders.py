"""Which checkpoint a folder is, told by the names in it as the hub's libraries give them.

    model.safetensors.index.json         the index of a checkpoint in shards (``pytorch_model.bin.index.json`` with torch's)
    model.safetensors                    one file (``pytorch_model.bin`` with torch's)
    anything.pth                         the only checkpoint in the folder

Source of the names: ``constants.py`` of huggingface_hub, and what transformers, diffusers and peft save.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import islice
from typing import NamedTuple

from statedict.errors import one_line
from statedict.manifest import Finding

__all__ = ["Choice", "choose"]

# Names of a folder that are looked at.
_MOST_NAMES = 10_000
# Names that a finding lists.
_LISTED = 5
# What is opened if it is there, the first before those behind it; other names only where they are alone.
_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_FILES = (
    "model.safetensors",
    "pytorch_model.bin",
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.bin",
    "adapter_model.safetensors",
    "adapter_model.bin",
)
_ENDS = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".th", ".npz", ".npy")
# The indexes of other libraries' formats: TensorFlow's and Flax's.
_FOREIGN = (".h5.index.json", ".msgpack.index.json")


class Choice(NamedTuple):
    """What is opened of a folder, and what should be known about the rest."""

    path: str
    notes: tuple[Finding, ...]


def choose(folder: str) -> Choice | None:
    """The index or the file that a folder stands for; None where it could be several, or none.

    Looks at the first 10,000 names. Empty files are none that could be meant: a crash leaves such behind.
    """
    names = _names(folder)
    indexes = [name for name in names if name.endswith(".index.json") and not name.endswith(_FOREIGN)]
    files = [name for name in names if name.lower().endswith(_ENDS)]
    index = _one_of(indexes, _INDEXES)
    if index is not None:
        others = [name for name in indexes if name != index] + [name for name in files if name in _FILES]
        return Choice(os.path.join(folder, index), _besides(index, others))
    file = None if indexes else _one_of(files, _FILES)
    if file is None:
        return None
    return Choice(os.path.join(folder, file), _besides(file, [name for name in files if name != file]))


def _names(folder: str) -> list[str]:
    """The names of the files in a folder that aren't empty or hidden, sorted; none where it can't be read."""
    try:
        with os.scandir(folder) as entries:
            found = [entry for entry in islice(entries, _MOST_NAMES) if not entry.name.startswith(".")]
            return sorted(entry.name for entry in found if entry.is_file() and entry.stat().st_size)
    except OSError:
        return []


def _one_of(names: Sequence[str], preferred: Sequence[str]) -> str | None:
    """The first preferred name that is there, or the only name."""
    known = next((name for name in preferred if name in names), None)
    return known if known is not None or len(names) != 1 else names[0]


def _besides(chosen: str, others: Sequence[str]) -> tuple[Finding, ...]:
    if not others:
        return ()
    shown = ", ".join([f"'{one_line(name)}'" for name in others[:_LISTED]])
    more = f" and {len(others) - _LISTED:,} more" if len(others) > _LISTED else ""
    message = f"of this folder '{one_line(chosen)}' is opened, not {shown}{more}. Name another by its path"
    return (Finding("other-checkpoints", "info", message),)
