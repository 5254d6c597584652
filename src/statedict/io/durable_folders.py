"""Files that take their names in one folder together, the last of them at the very end, or none of them.

They are written in a folder of their own, whose name nobody looks for. A folder that doesn't exist yet appears by one rename. In
one that exists, the index is the last to come: what it replaces is moved aside first, its old index before all else, so that
nobody ever finds old and new shards under one index; a failure puts everything back. After a kill the next write to the
same place does, or removes what was never finished.

    .model.safetensors.index.json.4711-0123456789abcdef.statedict-tmp/   a locked folder, in the target's or beside it
        model-00001-of-00002.safetensors …                               what is being written
        replaced/model.safetensors.index.json …                          what was moved aside, while names are given
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from types import TracebackType

from statedict.errors import FileError, StateDictError, TargetExists
from statedict.io.temporaries import lock, temporary_name

__all__ = ["DurableFolder", "check_folder", "sweep"]

_REPLACED = "replaced"
_SUFFIX = ".statedict-tmp"
# Seconds after which an unlocked folder is nobody's, though a process of its number lives here.
_UNLOCKED_AGE = 60
_NOT_SUPPORTED = frozenset({errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP})
_NO_HARD_LINKS = _NOT_SUPPORTED | {errno.EPERM, errno.EMLINK, errno.EXDEV}


class DurableFolder:
    """A set of files being written, which get their names in ``path`` when the ``with`` block ends well, and vanish when it doesn't.

    ``names`` are the files, the one that makes the others count last. ``old`` gives the names that go when the new ones come; it is
    asked once what a killed process left is put right. ``name`` is what all writers of the same files call them. Write each file
    in ``staging``, durably. After the block, ``durable`` says whether the folders were synced. Raises ``TargetExists`` where a
    name is taken and ``overwrite`` doesn't allow it, else ``FileError`` with the final path.
    """

    def __init__(
        self,
        path: str,
        names: Sequence[str],
        *,
        name: str,
        overwrite: bool,
        old: Callable[[], Sequence[str]] = tuple,
        durable: bool = True,
    ) -> None:
        self.path = path
        self.staging = ""
        self.durable = durable
        self._names = list(names)
        self._name = name
        self._ask_old = old
        self._old: list[str] = []
        self._overwrite = overwrite
        self._folder = os.path.realpath(path)
        self._is_new = False
        self._lock = -1
        self._moved: list[str] = []
        self._placed: list[str] = []

    def __enter__(self) -> DurableFolder:
        check_folder(self.path, [], overwrite=self._overwrite)
        self._is_new = not os.path.isdir(self._folder)
        home, name = os.path.split(self._folder) if self._is_new else (self._folder, self._name)
        try:
            sweep(home, name)
            self._old = [each for each in self._ask_old() if each not in self._names]
            check_folder(self.path, [*self._names, *self._old], overwrite=self._overwrite)
            self.staging = os.path.join(home, temporary_name(name))
            os.mkdir(self.staging)
            self._lock = os.open(self.staging, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            lock(self._lock)
        except StateDictError:
            self._discard()
            raise
        except OSError as error:
            self._discard()
            raise FileError.of(error, self.path, "can't be written") from error
        except BaseException:
            self._discard()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._commit()
        except StateDictError:
            raise
        except OSError as refusal:
            raise FileError.of(refusal, self.path, "can't be written") from refusal
        finally:
            self._discard()

    def final(self, path: str) -> str:
        """The final path of a file in ``staging``, for messages."""
        return os.path.join(self.path, os.path.basename(path)) if path.startswith(self.staging) else path

    def _commit(self) -> None:
        self._sync(self.staging)
        if self._is_new:
            self._appear()
            return
        try:
            self._move_aside()
            for name in self._names:
                self._place(name)
            self._sync(self._folder)
            # From here on what was replaced isn't put back any more.
            if self._moved:
                os.rename(os.path.join(self.staging, _REPLACED), os.path.join(self.staging, "gone"))
        except BaseException:
            self._undo()
            raise

    def _appear(self) -> None:
        try:
            os.rename(self.staging, self._folder)
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise _exists(self.path) from error
            raise
        try:
            self._sync(os.path.dirname(self._folder))
        except BaseException:
            os.rename(self._folder, self.staging)
            raise
        self.staging = ""

    def _move_aside(self) -> None:
        if not self._overwrite:
            return
        aside = os.path.join(self.staging, _REPLACED)
        # The index first: without it, shards are only files.
        names = [name for name in reversed([*self._old, *self._names]) if os.path.lexists(self._at(name))]
        if names:
            os.mkdir(aside)
        for name in names:
            with suppress(OSError):
                os.chmod(os.path.join(self.staging, name), stat.S_IMODE(os.stat(self._at(name)).st_mode))
            self._moved.append(name)
            os.rename(self._at(name), os.path.join(aside, name))

    def _place(self, name: str) -> None:
        """Give a file its name, unless someone else has taken it meanwhile."""
        source, target = os.path.join(self.staging, name), self._at(name)
        self._placed.append(name)
        try:
            os.link(source, target)
        except FileExistsError as error:
            self._placed.remove(name)
            raise _exists(os.path.join(self.path, name)) from error
        except OSError as error:
            if error.errno not in _NO_HARD_LINKS:
                raise
            os.rename(source, target)

    def _undo(self) -> None:
        for name in reversed(self._placed):
            with suppress(OSError):
                os.unlink(self._at(name))
        _put_back(self.staging, self._folder, reversed(self._moved))

    def _at(self, name: str) -> str:
        return os.path.join(self._folder, name)

    def _sync(self, folder: str) -> None:
        if not self.durable:
            return
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        except OSError as error:
            if error.errno not in _NOT_SUPPORTED:
                raise
            self.durable = False
        finally:
            os.close(fd)

    def _discard(self) -> None:
        if self.staging:
            _remove_all(self.staging)
        fd, self._lock = self._lock, -1
        if fd >= 0:
            os.close(fd)


def check_folder(path: str, names: Sequence[str], *, overwrite: bool) -> None:
    """Raise ``FileError`` where no files of these names can be put, ``TargetExists`` where one may not be replaced. Writes nothing."""
    folder = os.path.realpath(path)
    try:
        mode = os.stat(folder).st_mode
    except FileNotFoundError:
        home = os.path.dirname(folder)
        if not os.path.isdir(home):
            what = "can't be written: its folder doesn't exist"
            raise FileError(what, errno=errno.ENOENT, path=path, hint=f"Make the folder first: {home}") from None
        return
    except (OSError, ValueError) as error:
        facts = error if isinstance(error, OSError) else OSError(errno.EINVAL, "the name holds a NUL character")
        raise FileError.of(facts, path, "can't be written") from error
    if not stat.S_ISDIR(mode):
        raise FileError("can't be written: a file is there, not a folder", errno=errno.ENOTDIR, path=path)
    for name in names:
        place = os.path.join(path, name)
        if os.path.islink(place) or (os.path.lexists(place) and not os.path.isfile(place)):
            what = "can't be replaced: a link, a folder or a device is there"
            raise FileError(what, errno=errno.EINVAL, path=place, hint="Write to another folder")
        if os.path.lexists(place) and not overwrite:
            raise _exists(place)


def _exists(path: str) -> TargetExists:
    hint = "Name another, or allow it to be replaced: --overwrite, overwrite=True"
    return TargetExists("the output is there already", errno=errno.EEXIST, path=path, hint=hint)


def _put_back(staging: str, folder: str, names: Iterable[str]) -> None:
    """Give what was moved aside its names again, the index last."""
    for name in names:
        with suppress(OSError):
            os.rename(os.path.join(staging, _REPLACED, name), os.path.join(folder, name))


def sweep(home: str, name: str) -> None:
    """Put back or remove what a killed process has left of this target. What can't be removed stays."""
    sample = temporary_name(name)
    prefix = sample[: sample.rindex(".", 0, -len(_SUFFIX)) + 1]
    for leftover in os.listdir(home):
        number, _, token = leftover[len(prefix) : -len(_SUFFIX)].partition("-")
        if not (leftover.startswith(prefix) and leftover.endswith(_SUFFIX) and number.isdecimal() and token.isalnum()):
            continue
        path = os.path.join(home, leftover)
        try:
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            if _is_abandoned(fd, int(number)):
                aside = os.path.join(path, _REPLACED)
                names = os.listdir(aside) if os.path.isdir(aside) else []
                _put_back(path, home, sorted(names, key=lambda each: each.endswith(".json")))
                _remove_all(path)
        finally:
            os.close(fd)


def _is_abandoned(fd: int, number: int) -> bool:
    """Whether no process writes there any more; its lock ends with the process."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    if time.time() - os.fstat(fd).st_mtime > _UNLOCKED_AGE:
        return True
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):
        return False
    return False


def _remove_all(folder: str) -> None:
    """Remove a folder with its files, and those of the folders in it; not where something waits in it to be put back."""
    with suppress(OSError):
        if os.listdir(os.path.join(folder, _REPLACED)):
            return
    for here, folders, files in os.walk(folder, topdown=False):
        with suppress(OSError):
            for name in files:
                os.unlink(os.path.join(here, name))
            for name in folders:
                os.rmdir(os.path.join(here, name))
    with suppress(OSError):
        os.rmdir(folder)
