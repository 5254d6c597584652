"""Many files at once: all of them open where they are few, else as many as a process may have open, one after the other."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from threading import Lock

from statedict.errors import CorruptFile, FileError
from statedict.io.ranges import File, LocalFile, close_all

__all__ = ["FilePool", "PooledFile", "open_files"]

# Files that are simply kept open. The largest checkpoints on the hub have about 200 shards; a process may have 1,024
# descriptors as a rule, and reading past the page cache or mapping takes a second one for each file.
_MOST_OPEN = 256
# The part of the process's descriptors that one checkpoint takes at most.
_SHARE = 4


class FilePool:
    """Keeps the files open that were read last, and closes those that were not."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._idle: dict[str, LocalFile] = {}  # the one that was used last comes last
        self._closed = False
        self._lock = Lock()

    def take(self, path: str) -> LocalFile:
        """The open file of that path, for the caller alone until it is given back. Raises as ``LocalFile`` does."""
        with self._lock:
            if self._closed:
                raise FileError("can't be read: the checkpoint is closed", errno=errno.EBADF, path=path)
            file = self._idle.pop(path, None)
        return LocalFile(path) if file is None else file

    def give(self, file: LocalFile) -> None:
        """Take a file back that was taken."""
        with self._lock:
            surplus = [self._idle.pop(file.path)] if file.path in self._idle else []
            self._idle[file.path] = file
            while len(self._idle) > (0 if self._closed else self._most):
                surplus.append(self._idle.pop(next(iter(self._idle))))
        close_all(surplus)

    def close(self) -> None:
        """Close what is idle, now, and what is being read, when it is given back."""
        with self._lock:
            self._closed = True
            files, self._idle = list(self._idle.values()), {}
        close_all(files)


class PooledFile:
    """A regular file that is open only while it is read, and for as long as its pool has room for it.

    It is no ``LocalFile``: there is no descriptor that could be mapped, or used in a copy inside the kernel.
    """

    def __init__(self, path: str, pool: FilePool) -> None:
        """Raises as ``LocalFile`` does."""
        self.path = path
        self._pool = pool
        file = pool.take(path)
        self.nbytes = file.nbytes
        self._facts = _facts(file)
        pool.give(file)

    def read(self, offset: int, nbytes: int) -> bytes:
        """Exactly that many bytes, or ``CorruptFile``."""
        file = self._file()
        try:
            return file.read(offset, nbytes)
        finally:
            self._pool.give(file)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill the buffer from that position; several threads may do so at once."""
        file = self._file()
        try:
            file.read_into(offset, buffer)
        finally:
            self._pool.give(file)

    def close(self) -> None:
        """Close the idle files of the pool, which all files of one checkpoint share."""
        self._pool.close()

    def _file(self) -> LocalFile:
        file = self._pool.take(self.path)
        if _facts(file) != self._facts:
            file.close()
            what = "another file is there than when it was opened, or it was changed"
            raise CorruptFile(what, path=self.path, hint="Open the checkpoint again")
        return file


def open_files(paths: Sequence[str], most: int | None = None) -> list[File]:
    """The files of these paths, in their order; above ``most`` of them, none of which stays open for good.

    ``most`` is a quarter of the descriptors that this process may have, and at most 256, if it isn't given. Raises as
    ``LocalFile`` does; then none is left open.
    """
    most = _most_open() if most is None else most
    pool = FilePool(most)
    files: list[File] = []
    try:
        files.extend(LocalFile(path) if len(paths) <= most else PooledFile(path, pool) for path in paths)
    except BaseException:
        close_all(files)
        raise
    return files


def _facts(file: LocalFile) -> tuple[object, ...]:
    """What two looks at one file have in common. The number of a removed file is soon another's."""
    return file.identity, file.nbytes, os.fstat(file.fileno()).st_mtime_ns


def _most_open() -> int:
    # Needed for checkpoints in several files only.
    import resource

    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = os.sysconf("SC_OPEN_MAX") if soft == resource.RLIM_INFINITY else soft
    return max(1, min(_MOST_OPEN, (limit if limit > 0 else _MOST_OPEN * _SHARE) // _SHARE))
