"""Where tensors go when they are loaded: ``map_location`` as torch has it, and what never moves.

Source: torch 2.13 ``serialization.py``, ``_get_restore_location`` and ``default_restore_location``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Union

import torch

from statedict.errors import StateDictError, Unsupported, one_line
from statedict.manifest import TensorEntry
from statedict.torch.devices import as_bytes

__all__ = ["RNG_NOTE", "MapLocation", "destination_of", "is_random_state", "marked_random_states", "relocated"]

MapLocation = Union[str, torch.device, Mapping[str, Any], Callable[[torch.UntypedStorage, str], Any], None]

# Under this name of a file's metadata stand the keys of its random states whose names don't say so.
RNG_NOTE = "statedict.rng"
# What random states are called: torch_rng_state, cuda_rng_state, rng_states.cuda.0, random_state, generator …
_RANDOM = re.compile(
    r"(?:^|_)rng(?:s|_|$)|^random_(?:state|states)$|^(?:generator|cpu_generator|cuda_generator)(?:_state|_states)?$"
)


def is_random_state(entry: TensorEntry, marked: Iterable[str] = ()) -> bool:
    """Whether a tensor is the state of a random generator: bytes under a name that says so, or that the file marks.

    Such a state is useless anywhere but on the CPU: ``set_rng_state`` takes no other, of a CUDA generator neither.
    """
    if entry.dtype.code != "U8" or len(entry.shape) != 1:
        return False
    if any(
        isinstance(part, str) and any(_RANDOM.search(name) for name in part.lower().split(".")) for part in entry.path
    ):
        return True
    return any(key == entry.key or key.endswith(f".{entry.key}") for key in marked)


def marked_random_states(metadata: Mapping[str, str]) -> tuple[str, ...]:
    """The keys that the file marks as random states."""
    try:
        keys = json.loads(metadata.get(RNG_NOTE, "[]"))
    except (ValueError, RecursionError):
        return ()
    return tuple(key for key in keys if isinstance(key, str)) if isinstance(keys, list) else ()


def destination_of(map_location: MapLocation, tag: str | None) -> str:
    """The device that a storage with this tag goes to; ``cpu`` where a function decides later.

    Raises ``Unsupported`` for a device that isn't there, ``StateDictError`` for what is no ``map_location``.
    """
    tag = tag or "cpu"
    if map_location is None:
        return _present(tag, tag)
    if isinstance(map_location, (str, torch.device)):
        return _present(str(map_location), tag)
    if isinstance(map_location, Mapping):
        return _present(str(map_location.get(tag, tag)), tag)
    if callable(map_location):
        return "cpu"
    raise StateDictError(
        "map_location must be a device, its name, a dict of such, or a function", found=type(map_location).__name__
    )


def relocated(
    storage: torch.UntypedStorage, tag: str | None, function: Callable[[Any, str], Any]
) -> torch.UntypedStorage:
    """What the caller's function makes of a storage; where it gives None, the storage on the device of its tag."""
    tag = tag or "cpu"
    moved = function(storage, tag)
    if moved is None:
        moved = storage if tag == "cpu" else _to(storage, _present(tag, tag))
    moved = getattr(moved, "_untyped_storage", moved)
    if not isinstance(moved, torch.UntypedStorage) or moved.nbytes() != storage.nbytes():
        raise StateDictError("map_location must return the storage, or one of its size", found=type(moved).__name__)
    return moved


def _to(storage: torch.UntypedStorage, device: str) -> torch.UntypedStorage:
    return as_bytes(storage).to(device).untyped_storage()


def _present(wanted: str, tag: str) -> str:
    """The device, once it is sure that it is there."""
    if wanted in ("cpu", "meta"):
        return wanted
    try:
        device = torch.device(wanted)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, ImportError, NotImplementedError, TypeError, ValueError) as error:
        what = f"there is no device '{one_line(wanted)}' here ({one_line(error).split('. ')[0]})"
        hint = (
            "Leave map_location out: everything is loaded to the CPU" if wanted == tag else "Name another map_location"
        )
        raise Unsupported(what, hint=hint) from error
    return str(device)
