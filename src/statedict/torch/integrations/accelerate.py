"""Accelerate's saved states, committed as a training step is: written beside, sealed, and renamed last.

    states = SealedStates(accelerator, "states", keep=3)
    resumed = states.load()                       # None on a first run
    for step in range(resumed.step + 1 if resumed else 1, 10_001):
        ...
        if step % 1000 == 0:
            states.save(step)

``accelerator.save_state`` writes under the final name, without fsync, and ``total_limit`` deletes older states before it begins
(accelerate/accelerator.py, 1.15). Here it writes to ``.tmp-checkpoint_N``; every file and folder is brought to the disk and listed with
its digest, then the folder gets its name, and only then older ones go.

Loading is ``accelerator.load_state`` behind a look at every digest. It unpickles the states of registered objects; one that holds more
than plain values is refused before. What it says of random states that can't be restored, it says to its log only.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from statedict.checkpoint import open as open_checkpoint
from statedict.errors import MissingDependency, RunError, StateDictError, UnsafeContent, one_line
from statedict.runs.catalogue import TMP, Step
from statedict.runs.policies import Keep
from statedict.runs.sealed_folders import SealedFolders, make_folders
from statedict.runs.sealing import Seal, check_sealed
from statedict.runs.storage import LocalStorage
from statedict.runs.writing import step_exists
from statedict.torch.integrations.plain import opaque_keys

try:
    from accelerate import Accelerator
    from accelerate.utils import broadcast_object_list
except ImportError as error:
    raise MissingDependency(
        "SealedStates needs accelerate, which can't be imported here",
        hint="Install it: pip install 'statedict[transformers]'",
    ) from error

__all__ = ["SealedStates"]

# Accelerate's own names (accelerate/accelerator.py, save_state, and accelerate/checkpointing.py, save_custom_state), so that
# load_state finds what is here without us.
_PREFIX = "checkpoint_"
_CUSTOM = "custom_checkpoint_"

_T = TypeVar("_T")


class SealedStates:
    """The saved states of an accelerator in a folder. ``keep`` says which stay (None: all), as in ``TrainingRun``.

    All processes call the same methods; one of them seals, reads digests and deletes, on storage that all of them see. An error of
    that one is raised by all.
    """

    def __init__(
        self, accelerator: Accelerator, folder: str | os.PathLike[str], *, keep: Keep | int | None = None
    ) -> None:
        self.folder = os.fspath(folder)
        self._accelerator = accelerator
        self._folders = SealedFolders(folder, _PREFIX, keep=keep)
        if accelerator.project_configuration.automatic_checkpoint_naming:
            hint = "Leave automatic_checkpoint_naming and total_limit out of the ProjectConfiguration"
            raise StateDictError("accelerate names and deletes checkpoints itself", hint=hint)

    def __repr__(self) -> str:
        return f"SealedStates({self.folder!r})"

    def steps(self) -> list[Step]:
        """The sealed states, ascending. Reads their seals, and no other file."""
        return self._folders.steps()

    def save(self, step: int, *, metrics: Mapping[str, float] | None = None, **options: Any) -> Seal:
        """``accelerator.save_state``, committed: when this returns the state outlives a power cut. ``options`` are handed on.

        Raises ``StepExists`` for a number that is taken, ``FileError`` where the disk refuses; the states that were there stay.
        """
        final = self._folders.path_of(step)
        temporary = os.path.join(self.folder, f"{TMP}{os.path.basename(final)}")
        self._as_one(lambda: self._begin(step, final))
        self._accelerator.save_state(temporary, **options)
        self._accelerator.wait_for_everyone()
        return self._as_one(lambda: self._commit(step, temporary, final, metrics or {}))

    def load(self, step: int | None = None) -> Seal | None:
        """``accelerator.load_state`` of the newest whole state, or of one number; None where none was ever sealed.

        What is passed over is said on stderr: a state without a seal, and a damaged one, which is renamed to ``checkpoint_N.damaged``.
        Raises ``RunError`` where all are damaged, ``CorruptFile`` for one of that number, ``UnsafeContent`` for a registered object whose
        state isn't plain. None of them has changed the accelerator.
        """
        found = self._as_one(lambda: self._found(step))
        if found is not None:
            self._accelerator.load_state(found.path)
        return found

    def _begin(self, step: int, final: str) -> None:
        from shutil import rmtree

        make_folders(self.folder)
        if os.path.lexists(final):
            raise step_exists(step, final)
        for name in os.listdir(self.folder):
            if name.startswith(f"{TMP}{_PREFIX}"):
                rmtree(os.path.join(self.folder, name))  # of a process that was killed

    def _commit(self, step: int, temporary: str, final: str, metrics: Mapping[str, float]) -> Seal:
        storage = LocalStorage()
        made = self._folders.seal(step, metrics=metrics, path=temporary)
        storage.rename_noreplace(temporary, final)
        durable = storage.fsync_folder(self.folder)
        self._folders.prune()
        return made._replace(path=final, durable=made.durable and durable)

    def _found(self, step: int | None) -> Seal | None:
        if step is None:
            found = self._folders.newest()
        else:
            check = check_sealed(self._folders.path_of(step), first=True)
            if check.errors:
                raise check.errors[0]
            found = check.seal
        if found is not None:
            _refuse_opaque(found)
        return found

    def _as_one(self, work: Callable[[], _T]) -> _T:
        """What one process has done, on all of them; its error too."""
        made: list[Any] = [None, None]
        error: StateDictError | None = None
        if self._accelerator.is_main_process:
            try:
                made[0] = work()
            except StateDictError as refusal:
                error = refusal
            except OSError as refusal:
                error = RunError.of(refusal, self.folder, "the state can't be saved")
            made[1] = None if error is None else str(error)
        broadcast_object_list(made)
        if error is not None:
            raise error
        if made[1] is not None:
            raise RunError(f"the main process has met an error: {made[1]}", path=self.folder)
        done: _T = made[0]
        return done


def _refuse_opaque(sealed: Seal) -> None:
    """Registered objects are the files that accelerate unpickles without a list of what it may build."""
    for name in sealed.files:
        if not name.startswith(_CUSTOM):
            continue
        path = os.path.join(sealed.path, name)
        with open_checkpoint(path) as opened:
            found = opaque_keys(opened)
        if found:
            key, kind = next(iter(found.items()))
            what = f"a registered object's state wants '{one_line(kind)}' built, which runs its code"
            hint = "If you trust it: accelerator.load_state(path)"
            raise UnsafeContent(what, globals=list(found.values()), path=path, key=key, hint=hint)
