"""What the parameters are after the step that follows a save: recorded beside the step, compared on resume.

    step-00001000/next-step.json    {"digest": "xxh3-128:…", "schema": "statedict.next-step/1", "step": 1000}

The digest is of the first 64 KiB of every parameter: a computation that isn't the same differs everywhere, and this costs
milliseconds. The file is evidence and no part of the step: it isn't in its manifest, and may be missing.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from contextlib import suppress
from typing import Any, Protocol

import torch

from statedict.errors import StateDictError
from statedict.runs.catalogue import NEXT_STEP_NAME
from statedict.torch.devices import as_bytes

__all__ = ["Evidence", "SavedStep", "digest_of", "read_digest"]

_SCHEMA = "statedict.next-step/1"
# Bytes of each parameter that the digest is of.
_SAMPLE_NBYTES = 64 * 1024
# Bytes that the file may have.
_MOST_NBYTES = 4096


class SavedStep(Protocol):
    """A save, done or under way."""

    step: int
    path: str

    @property
    def is_done(self) -> bool:
        """Whether it has ended."""


def digest_of(modules: Iterable[torch.nn.Module]) -> str:
    """The digest of the beginnings of all parameters, with their names and shapes."""
    from xxhash import xxh3_128

    state = xxh3_128()
    for module in modules:
        for name, param in module.named_parameters():
            state.update(f"{name} {tuple(param.shape)} {param.dtype}".encode())
            local: Any = getattr(param, "_local_tensor", param)
            if local.layout == torch.strided and not local.is_meta and local.numel():
                start = local.storage_offset() * local.element_size()
                data = as_bytes(local.untyped_storage())[start : start + min(_SAMPLE_NBYTES, local.nbytes)]
                state.update(data.cpu().numpy().data)
    return f"xxh3-128:{state.hexdigest()}"


def read_digest(path: str, step: int) -> str | None:
    """What was recorded for a step; None where nothing was, or nothing that can be read."""
    try:
        with open(os.path.join(path, NEXT_STEP_NAME), "rb") as file:
            found = json.loads(file.read(_MOST_NBYTES))
        if found["schema"] == _SCHEMA and found["step"] == step:
            return str(found["digest"])
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        pass
    return None


class Evidence:
    """What is still to be recorded, and to be compared, when the next step of an optimizer ends."""

    def __init__(self) -> None:
        self._saved: SavedStep | None = None
        self._ready: list[tuple[SavedStep, str]] = []
        self._expected: tuple[int, str, str] | None = None

    def record(self, saved: SavedStep) -> None:
        """The next step is the one after this save."""
        self._saved = saved
        self.flush()

    def expect(self, step: int, path: str, digest: str) -> None:
        """The next step must come to this digest."""
        self._expected = (step, path, digest)

    def after_step(self, modules: Iterable[torch.nn.Module]) -> None:
        """Record and compare. Raises ``StateDictError`` where the parameters are others than they were then."""
        if self._saved is None and self._expected is None:
            if self._ready:
                self.flush()
            return
        digest = digest_of(modules)
        saved, self._saved = self._saved, None
        if saved is not None:
            self._ready.append((saved, digest))
            self.flush()
        expected, self._expected = self._expected, None
        if expected is not None and expected[2] != digest:
            step, path, wanted = expected
            hint = "Restored.differences says what is another here; results of other machines or versions are close, not equal"
            what = f"the step after {step} doesn't come to the parameters that it came to before"
            raise StateDictError(what, path=path, expected=wanted, found=digest, hint=hint)

    def flush(self) -> None:
        """Write what is known about steps that are there by now."""
        waiting = []
        for saved, digest in self._ready:
            if not saved.is_done:
                waiting.append((saved, digest))
            else:
                _write(saved, digest)
        self._ready = waiting


def _write(saved: SavedStep, digest: str) -> None:
    """Put the file into the step, whole or not at all. A step that failed or is gone by now, or a full disk, is no failure of training."""
    body = json.dumps({"digest": digest, "schema": _SCHEMA, "step": saved.step}, separators=(",", ":"))
    path = os.path.join(saved.path, NEXT_STEP_NAME)
    temporary = f"{path}.{os.getpid()}"
    with suppress(OSError):
        try:
            with open(temporary, "x", encoding="ascii") as file:
                file.write(body + "\n")
            os.replace(temporary, path)
        except OSError:
            with suppress(OSError):
                os.unlink(temporary)
