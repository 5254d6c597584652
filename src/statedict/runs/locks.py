"""Who may write to a run, and who is reading a step: locks of the kernel's, which end with their process, however that ends.

    run/.lock                          {"host", "pid", "started", "token"} of the writer, who holds it (flock) while the run is open
    run/step-00001000/manifest.json    a reader holds it shared; retention takes only what it can hold alone

A forked child closes what its parent holds; so a worker of a data loader that outlives the training blocks nobody. Several runs of
one process on one folder share the lock, and write one after the other. Where the file system has no locks, the owner's file
tells: an owner that lives on this machine, or whose file is younger than ten minutes on another, is believed.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import time
from contextlib import suppress
from threading import RLock
from typing import NamedTuple

from statedict.errors import RunError, one_line

__all__ = ["LOCK_NAME", "Hold", "RunLock", "hold", "is_no_locks"]

LOCK_NAME = ".lock"
# Seconds. Where the file system has no locks, an owner on another machine whose file is older than this is taken for dead.
_SILENT_AGE = 600
# Bytes of an owner's file that are read.
_MOST_NBYTES = 4096
_NO_LOCKS = frozenset({errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL})

# Descriptors that are held, so that a forked child can close them.
_held: set[int] = set()
_watching = False


def is_no_locks(error: OSError) -> bool:
    """Whether the system says that this file system has no locks."""
    return error.errno in _NO_LOCKS


class Hold:
    """A lock that is held until it is let go."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._pid = os.getpid()
        _watch()
        _held.add(fd)

    def let_go(self) -> None:
        """Let go; a second time does nothing, and so does a forked child, which holds nothing."""
        fd, self._fd = self._fd, -1
        if fd >= 0 and self._pid == os.getpid():
            _held.discard(fd)
            with suppress(OSError):
                fcntl.flock(fd, fcntl.LOCK_UN)  # a child that was forked a moment ago has the descriptor still
            with suppress(OSError):
                os.close(fd)  # some file systems report here what went wrong elsewhere: the lock is gone all the same

    def __del__(self) -> None:
        self.let_go()


def hold(path: str, *, exclusive: bool) -> Hold | None:
    """A lock on this file; None where somebody's stands against it. The file is opened for reading, so a read-only mount will do.

    Raises ``OSError`` where the file can't be opened, and where its system has no locks (``is_no_locks``).
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        fcntl.flock(fd, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
        if not os.path.samestat(os.fstat(fd), os.stat(path)):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)  # it was replaced meanwhile
    except BlockingIOError:
        os.close(fd)
        return None
    except BaseException:
        os.close(fd)
        raise
    return Hold(fd)


def _watch() -> None:
    global _watching
    if not _watching:
        _watching = True
        os.register_at_fork(after_in_child=_forget)


def _forget() -> None:
    """In a forked child: close the descriptors, which doesn't end the parent's locks."""
    for fd in list(_held):
        with suppress(OSError):
            os.close(fd)
    _held.clear()
    _shared.clear()


class _Owner(NamedTuple):
    host: str
    pid: int
    started: str
    token: str


class _Shared:
    """The lock of one folder, for all runs of this process on it."""

    def __init__(self, fd: int, holding: Hold) -> None:
        self.fd = fd
        self.holding = holding
        self.users = 0
        self.turn = RLock()  # whose turn it is to write


# By the device and inode of the lock's file.
_shared: dict[tuple[int, int], _Shared] = {}
_sharing = RLock()


class RunLock:
    """The right to write to a run, from ``take`` on until ``let_go``; ``with lock:`` is this thread's turn."""

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._mine: _Shared | None = None
        self._key = (0, 0)
        self._pid = 0

    def take(self) -> None:
        """Take the lock, if this run hasn't it yet. Raises ``RunError`` with the owner where another process has it."""
        with _sharing:
            if self._mine is not None and self._pid == os.getpid():
                return
            path = os.path.join(self._folder, LOCK_NAME)
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            facts = os.fstat(fd)
            self._key, self._pid = (facts.st_dev, facts.st_ino), os.getpid()
            known = _shared.get(self._key)
            if known is None:
                known = self._first(fd, path)
            else:
                os.close(fd)
            known.users += 1
            self._mine = known

    def _first(self, fd: int, path: str) -> _Shared:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = _read(fd)
            os.close(fd)
            raise self._refused(owner) from None
        except OSError as error:
            owner = _read(fd)
            if not is_no_locks(error) or (owner is not None and _may_live(owner, path)):
                os.close(fd)
                if not is_no_locks(error):
                    raise
                raise self._refused(owner) from error
        made = _Shared(fd, Hold(fd))
        _shared[self._key] = made
        with suppress(OSError):
            _write(fd)
        return made

    def _refused(self, owner: _Owner | None) -> RunError:
        who = "another process" if owner is None else f"process {owner.pid} on {one_line(owner.host)}"
        hint = "One writer at a time: end it, or write to another folder. Reading needs no lock"
        return RunError(f"{who} is writing to this run", errno=errno.EWOULDBLOCK, path=self._folder, hint=hint)

    def touch(self) -> None:
        """Say that the owner lives, for those who can't see its lock."""
        if self._mine is not None:
            with suppress(OSError):
                os.utime(self._mine.fd)

    def __enter__(self) -> RunLock:
        self.take()
        assert self._mine is not None
        self._mine.turn.acquire()
        return self

    def __exit__(self, *exc: object) -> None:
        assert self._mine is not None
        self._mine.turn.release()

    def let_go(self) -> None:
        """Give the lock back; the last run of this process on the folder ends it."""
        with _sharing:
            mine, self._mine = self._mine, None
            if mine is None or self._pid != os.getpid():
                return
            mine.users -= 1
            if mine.users == 0:
                _shared.pop(self._key, None)
                with suppress(OSError):
                    os.ftruncate(mine.fd, 0)
                mine.holding.let_go()

    def __del__(self) -> None:
        self.let_go()


def _write(fd: int) -> None:
    owner = _Owner(os.uname().nodename, os.getpid(), _started(os.getpid()), os.urandom(8).hex())
    data = json.dumps(owner._asdict()).encode("ascii")
    os.ftruncate(fd, 0)
    os.pwrite(fd, data, 0)


def _read(fd: int) -> _Owner | None:
    try:
        found = json.loads(os.pread(fd, _MOST_NBYTES, 0))
        return _Owner(str(found["host"]), int(found["pid"]), str(found["started"]), str(found["token"]))
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _started(pid: int) -> str:
    """When a process of this machine began, in the kernel's ticks since the start; numbers are given again, this pair isn't."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()[19].decode("ascii")
    except (OSError, IndexError):
        return ""


def _may_live(owner: _Owner, path: str) -> bool:
    """Whether the owner of a file may be alive, where there are no locks to tell."""
    if owner.host != os.uname().nodename:
        return time.time() - os.stat(path).st_mtime < _SILENT_AGE
    if owner.pid == os.getpid():
        return False
    try:
        os.kill(owner.pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return _started(owner.pid) in ("", owner.started)
