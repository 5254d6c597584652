"""The few things that are done to the disk under a run, behind one protocol, so that a test can lose any of them.

What is volatile until when: the bytes of a file until its ``fsync``, the names in a folder until ``fsync_folder``.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, Protocol

from statedict.io.engine import AUTOMATIC, Engine
from statedict.io.new_files import NewFile
from statedict.io.plans import Sum, WritePlan
from statedict.io.ranges import File, LocalFile
from statedict.runs.locks import Hold, RunLock, hold

__all__ = ["LocalStorage", "Progress", "Storage", "StorageFile"]

Progress = Callable[[int, int], None]

# renameat2 (Linux 3.15): fail where the new name is taken.
_NOREPLACE = 1
_HERE = -100  # AT_FDCWD
_NO_SUCH_CALL = frozenset({errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP})
_NO_FOLDER_SYNC = frozenset({errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP})


class StorageFile(Protocol):
    """A new file that is written once."""

    def fill(self, plan: WritePlan, *, on_progress: Progress | None = None) -> Mapping[str, Sum]:
        """Write the whole plan; gives the sums of its payloads."""

    def fsync(self) -> bool:
        """Make the bytes outlive a power cut; False where there is no such thing. Never called twice."""

    def keep(self) -> None:
        """Close the file."""

    def discard(self) -> None:
        """Close and remove the file, unless it was kept."""


class Storage(Protocol):
    """A place for runs. Every method raises ``OSError`` where the system refuses; ``open_new`` and ``open_file`` a ``FileError``."""

    def open_new(self, path: str, shown: str, nbytes: int) -> StorageFile:
        """A new file of that size; ``shown`` is the path that errors name."""

    def open_file(self, path: str) -> File:
        """A file, for reading by position."""

    def facts(self, path: str) -> tuple[str, int, object]:
        """What is there, without following a link: ``file``, ``folder`` or ``other``; its bytes; and what changes when it does."""

    def listdir(self, path: str) -> list[str]:
        """The names in a folder."""

    def mkdir(self, path: str) -> None:
        """Make a folder."""

    def rename(self, old: str, new: str) -> None:
        """Give a file or folder another name."""

    def rename_noreplace(self, old: str, new: str) -> None:
        """The same, with ``FileExistsError`` where the name is taken."""

    def link(self, old: str, new: str) -> None:
        """Give a file a second name."""

    def unlink(self, path: str) -> None:
        """Take away a name of a file."""

    def rmdir(self, path: str) -> None:
        """Remove an empty folder."""

    def fsync_folder(self, path: str) -> bool:
        """Make the names in a folder outlive a power cut; False where there is no such thing."""

    def free_nbytes(self, path: str) -> int | None:
        """Bytes that can still be written there; None where nobody knows."""

    def hold(self, path: str, *, exclusive: bool) -> Hold | None:
        """A lock on a file that is there, if nobody's stands against it. Raises ``OSError`` where there are no locks."""

    def lock(self, folder: str) -> RunLock:
        """The right to write to a run, not yet taken."""


class LocalStorage:
    """The file system of this machine."""

    def __init__(self, engine: Engine = AUTOMATIC) -> None:
        self._engine = engine

    def open_new(self, path: str, shown: str, nbytes: int) -> StorageFile:
        """A new file, preallocated."""
        file = _Engined(path, shown, nbytes, self._engine)
        file.create()
        return file

    def open_file(self, path: str) -> File:
        """A file by position."""
        return LocalFile(path)

    def facts(self, path: str) -> tuple[str, int, object]:
        """By ``lstat``."""
        found = os.lstat(path)
        kind = "file" if stat.S_ISREG(found.st_mode) else "folder" if stat.S_ISDIR(found.st_mode) else "other"
        return kind, found.st_size, (found.st_dev, found.st_ino, found.st_mtime_ns, found.st_size)

    def listdir(self, path: str) -> list[str]:
        """The names."""
        return os.listdir(path)

    def mkdir(self, path: str) -> None:
        """Make a folder."""
        os.mkdir(path)

    def rename(self, old: str, new: str) -> None:
        """Rename."""
        os.rename(old, new)

    def rename_noreplace(self, old: str, new: str) -> None:
        """By renameat2 where the system has it, else by a look first: the run's lock keeps other writers away meanwhile."""
        call = _renameat2()
        number = errno.ENOSYS if call is None else call(old, new)
        if number == 0:
            return
        if number not in _NO_SUCH_CALL:
            raise OSError(number, os.strerror(number), old, None, new)
        if os.path.lexists(new):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), new)
        os.rename(old, new)

    def link(self, old: str, new: str) -> None:
        """A hard link."""
        os.link(old, new)

    def unlink(self, path: str) -> None:
        """Unlink."""
        os.unlink(path)

    def rmdir(self, path: str) -> None:
        """Remove."""
        os.rmdir(path)

    def fsync_folder(self, path: str) -> bool:
        """fsync of the folder's descriptor."""
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        except OSError as error:
            if error.errno not in _NO_FOLDER_SYNC:
                raise
            return False
        finally:
            os.close(fd)
        return True

    def free_nbytes(self, path: str) -> int | None:
        """What statvfs says is left for this user; None where it says nothing sensible."""
        try:
            found = os.statvfs(path)
        except (OSError, AttributeError):
            return None
        return found.f_bavail * found.f_frsize if found.f_blocks else None

    def hold(self, path: str, *, exclusive: bool) -> Hold | None:
        """flock."""
        return hold(path, exclusive=exclusive)

    def lock(self, folder: str) -> RunLock:
        """A lock of the kernel's."""
        return RunLock(folder)


class _Engined(NewFile):
    """A new file that is written as the storage's engine says."""

    def __init__(self, path: str, shown: str, nbytes: int, engine: Engine) -> None:
        super().__init__(path, shown, nbytes)
        self._engine = engine

    def fill(
        self, plan: WritePlan, *, engine: Engine | None = None, on_progress: Progress | None = None
    ) -> Mapping[str, Sum]:
        return super().fill(plan, engine=engine or self._engine, on_progress=on_progress)


@lru_cache(maxsize=1)
def _renameat2() -> Callable[[str, str], int] | None:
    """The system's call, as a function that gives 0 or the errno; None where there is none."""
    # A millisecond, which only a save needs.
    import ctypes

    try:
        call: Any = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError, TypeError):
        return None
    call.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint]
    call.restype = ctypes.c_int

    def rename(old: str, new: str) -> int:
        failed = call(_HERE, os.fsencode(old), _HERE, os.fsencode(new), _NOREPLACE)
        return ctypes.get_errno() if failed else 0

    return rename
