"""What goes: steps that nothing keeps, what dead writers have left, and damaged steps out of the way.

A step is deleted in three moves: its folder is renamed to ``.trash-…``, the run's folder is synced, its files are unlinked. So no
power cut leaves half a step under its name. Never deleted: the newest step, the last one that is known to be whole, a step that a reader
holds, and whatever isn't a whole step.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Sequence
from contextlib import suppress

from statedict.errors import RunError
from statedict.formats.step import MANIFEST_NAME, step_name
from statedict.runs.catalogue import DAMAGED_MARK, TMP, TRASH, Catalogue, Step
from statedict.runs.locks import Hold, is_no_locks
from statedict.runs.policies import Keep
from statedict.runs.storage import Storage
from statedict.runs.writing import remove_folder

__all__ = ["lease", "leftovers", "prune", "set_aside", "spared", "surplus", "sweep"]

_MOST_ASIDE = 10_000


def surplus(steps: Sequence[Step], keep: Keep, now: float) -> list[Step]:
    """The steps that nothing keeps, the oldest first. ``steps`` are ascending."""
    if not steps:
        return []
    kept = keep.keeps([step.record for step in steps], now) | {steps[-1].step}
    return [step for step in steps if step.step not in kept]


def spared(
    steps: Sequence[Step], victims: Sequence[Step], is_known: Callable[[Step], bool], is_whole: Callable[[Step], bool]
) -> list[Step]:
    """The victims that may go: all, once a step that stays is known to be whole.

    A verified step goes only where another verified one stays. ``is_known`` says that this process has written or read all of a step;
    ``is_whole`` reads it, the newest first, where nothing else tells. If none is whole, the last verified one stays; without one, all.
    """
    stay = [step for step in steps if step not in victims]
    verified = [step for step in victims if step.verified]
    if any(step.verified for step in stay) or (not verified and any(is_known(step) for step in stay)):
        return list(victims)
    if any(is_whole(step) for step in reversed(stay)):
        return list(victims)
    return [step for step in victims if step is not verified[-1]] if verified else []


def prune(catalogue: Catalogue, steps: Sequence[Step]) -> list[Step]:
    """Delete these steps, but those that a reader holds; gives those that are gone. Raises ``RunError``."""
    storage, folder = catalogue.storage, catalogue.folder
    moved: list[tuple[Step, str]] = []
    try:
        for step in steps:
            trash = os.path.join(folder, f"{TRASH}{step.step}-{os.urandom(8).hex()}")
            if _move(storage, step.path, trash):
                moved.append((step, trash))
        if moved:
            storage.fsync_folder(folder)
        for _, trash in moved:
            remove_folder(storage, trash)
    except OSError as error:
        raise RunError.of(error, folder, "old steps can't be deleted", "What was kept is whole") from error
    return [step for step, _ in moved]


def _move(storage: Storage, path: str, trash: str) -> bool:
    """Rename a step out of the way, unless a reader holds it."""
    holding: Hold | None = None
    try:
        holding = storage.hold(os.path.join(path, MANIFEST_NAME), exclusive=True)
        if holding is None:
            return False
    except FileNotFoundError:
        return False  # somebody else was faster
    except OSError as error:
        if not is_no_locks(error):
            raise
    try:
        storage.rename(path, trash)
    finally:
        if holding is not None:
            holding.let_go()
    return True


def lease(storage: Storage, path: str) -> Hold | None:
    """Keep a step from being deleted while it is read; None where there are no locks. Raises ``FileNotFoundError`` where it is gone."""
    try:
        holding = storage.hold(os.path.join(path, MANIFEST_NAME), exclusive=False)
    except FileNotFoundError:
        raise
    except OSError:
        return None
    if holding is None:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)  # it is being deleted
    return holding


def leftovers(catalogue: Catalogue) -> list[str]:
    """The names of what was never finished, or never quite deleted."""
    return sorted([name for name in catalogue.names() if name.startswith((TMP, TRASH))])


def sweep(catalogue: Catalogue) -> list[str]:
    """Remove them; the caller holds the run's lock, so that nobody is working on them. Gives what is gone; what can't be removed stays."""
    names = leftovers(catalogue)
    return [name for name in names if remove_folder(catalogue.storage, os.path.join(catalogue.folder, name))]


def set_aside(catalogue: Catalogue, step: int) -> str | None:
    """Rename a damaged step to ``step-….damaged``, so that its number is free; its new path, None where that can't be done."""
    storage, path = catalogue.storage, catalogue.path_of(step)
    for number in range(1, _MOST_ASIDE):
        name = step_name(step) + DAMAGED_MARK + (f"-{number}" if number > 1 else "")
        target = os.path.join(catalogue.folder, name)
        try:
            storage.rename_noreplace(path, target)
        except OSError as error:
            if error.errno in (errno.EEXIST, errno.ENOTEMPTY):
                continue
            return None
        with suppress(OSError):
            storage.fsync_folder(catalogue.folder)
        return target
    return None
