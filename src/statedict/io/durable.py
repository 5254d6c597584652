"""The only way anything is written: a file appears under its name complete, or not at all.

What ``DurableFile`` does, in this order: a temporary sibling is opened in the final file's real folder, preallocated
and written by position; it is fsynced, renamed onto the final name, and the folder is fsynced. Without the second
fsync a power cut leaves the temporary's name; without the first, a file of the right size full of zeros. The file that
was there before is kept under a second name until the folder's fsync has come back, so that a failure puts it back.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from collections.abc import Callable, Sequence
from types import TracebackType

from statedict.errors import FileError, StateDictError, TargetExists
from statedict.io.ranges import LocalFile
from statedict.io.temporaries import backup_name, lock, remove, sweep, temporary_name

__all__ = ["PAGE_NBYTES", "DurableFile", "check_target", "preallocate", "write_bytes"]

# What offsets, lengths and addresses of writes past the page cache are multiples of.
PAGE_NBYTES = 4096

# Buffers of one system call: IOV_MAX of Linux and macOS.
_MOST_BUFFERS = 1024
# What a file system answers that has no such operation.
_NOT_SUPPORTED = frozenset({errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP})
_NO_HARD_LINKS = _NOT_SUPPORTED | {errno.EPERM, errno.EMLINK, errno.EXDEV}
_NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT})


class DurableFile:
    """A file being written, which takes its final name when the ``with`` block ends well, and vanishes when it doesn't.

    A symbolic link stays a link; the file that it names is replaced. The mode follows the umask, or is that of the file
    replaced. ``durable=False`` leaves the fsyncs out. Every refusal of the system is a ``FileError`` with its errno and
    the final path, never the temporary's; ``TargetExists`` comes before any work. After the block, ``durable`` says
    whether both fsyncs were made (some network file systems have none for folders).
    """

    def __init__(self, path: str | os.PathLike[str], *, overwrite: bool, nbytes: int = 0, durable: bool = True) -> None:
        self.path = os.fspath(path)
        self.nbytes = nbytes  # the size that will be written, reserved at the start
        self.durable = durable
        self._overwrite = overwrite
        self._final = self._temporary = self._backup = ""
        self._fd = self._folder = self._direct = -1
        self._can_undo = True
        self._stays = False

    def __enter__(self) -> DurableFile:
        self._final, mode = _target(self.path, self._overwrite)
        try:
            self._open(mode)
        except OSError as error:
            self._discard()
            raise self._error(error) from error
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
            raise self._error(refusal) from refusal
        finally:
            self._discard()

    def open_direct(self) -> bool:
        """Have aligned writes go past the page cache from now on; False where this file system can't."""
        try:
            self._direct = os.open(self._temporary, os.O_WRONLY | os.O_DIRECT | os.O_CLOEXEC)
        except (OSError, AttributeError):
            return False
        return True

    def write_direct(self, offset: int, data: memoryview) -> bool:
        """Write past the page cache, if offset, length and address are aligned as that takes; else False, and nothing is written."""
        if self._direct < 0 or offset % PAGE_NBYTES or len(data) % PAGE_NBYTES:
            return False
        done = 0
        while done < len(data):
            try:
                count = os.pwritev(self._direct, [data[done:]], offset + done)
            except OSError as error:
                if error.errno in _NOT_SUPPORTED:
                    return False  # what was written so far is written again
                raise self._error(error) from error
            if count == 0 or count % PAGE_NBYTES:
                return False
            done += count
        return True

    def write_at(self, offset: int, buffers: Sequence[bytes | memoryview]) -> None:
        """Write all of the buffers one after the other, the first at ``offset``; several threads may do so at once."""
        pending = [memoryview(buffer).cast("B") for buffer in buffers if len(buffer)]
        while pending:
            try:
                count = os.pwritev(self._fd, pending[:_MOST_BUFFERS], offset)
            except OSError as error:
                raise self._error(error) from error
            if count == 0:
                raise FileError("can't be written: the system takes no more bytes", errno=errno.EIO, path=self.path)
            offset += count
            pending = _after(pending, count)

    def copy_at(self, offset: int, source: int, source_offset: int, nbytes: int) -> int:
        """Copy from the open file ``source`` inside the kernel; returns how many of the first bytes were copied.

        Fewer than asked where this pair of files can't be copied so, or a side fails: reading and writing the rest says
        which, and why.
        """
        done = 0
        try:
            while done < nbytes:
                count = os.copy_file_range(source, self._fd, nbytes - done, source_offset + done, offset + done)
                if count == 0:
                    break
                done += count
        except (OSError, AttributeError):
            # AttributeError: systems other than Linux have no such call.
            return done
        return done

    def reopened(self) -> LocalFile:
        """What was written so far as a file to be read, before it has its name. Its messages name the final path."""
        file = LocalFile(self._temporary)
        file.path = self.path
        return file

    def write_back(self) -> None:
        """Have what was written so far go to the disk now, so that less is left to wait for at the end."""
        if self.durable and hasattr(os, "fdatasync"):
            try:
                self._sync(self._fd, os.fdatasync)
            except OSError as error:
                raise self._error(error) from error

    def _open(self, mode: int | None) -> None:
        folder, name = os.path.split(self._final)
        sweep(folder, name)
        if self.durable:
            self._folder = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._temporary = os.path.join(folder, temporary_name(name))
        self._fd = os.open(self._temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        lock(self._fd)
        if mode is not None and mode != stat.S_IMODE(os.fstat(self._fd).st_mode):
            os.fchmod(self._fd, mode)
        if self.nbytes:
            preallocate(self._fd, self.nbytes)

    def _commit(self) -> None:
        if self.durable:
            self._sync(self._fd)
        placed = os.fstat(self._fd)
        try:
            if self._overwrite:
                self._keep_old()
                os.replace(self._temporary, self._final)
            else:
                self._claim_name()
            if self.durable:
                self._sync(self._folder)
            self._close_file()
        except BaseException:
            self._undo(placed)
            raise
        self._temporary = ""

    def _sync(self, fd: int, how: Callable[[int], None] | None = None) -> None:
        """fsync, once: a failure drops the unwritten pages, and a second one would say that all is well."""
        try:
            (how or os.fsync)(fd)
        except OSError as error:
            if error.errno not in _NOT_SUPPORTED:
                raise
            self.durable = False

    def _keep_old(self) -> None:
        backup = backup_name(self._temporary)
        try:
            os.link(self._final, backup)
        except FileNotFoundError:
            return
        except OSError:
            self._can_undo = False
            return
        self._backup = backup

    def _claim_name(self) -> None:
        """Give the temporary the final name, unless someone else has taken it meanwhile."""
        try:
            os.link(self._temporary, self._final)
        except FileExistsError as error:
            raise _exists(self.path) from error
        except OSError as error:
            if error.errno not in _NO_HARD_LINKS:
                raise
            self._claim_without_links()
        else:
            os.unlink(self._temporary)

    def _claim_without_links(self) -> None:
        try:
            os.close(os.open(self._final, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666))
        except FileExistsError as error:
            raise _exists(self.path) from error
        try:
            os.replace(self._temporary, self._final)
        except BaseException:
            remove(self._final)
            raise

    def _undo(self, placed: os.stat_result) -> None:
        """Put back what was there, if the new file stands under its name already."""
        try:
            if not os.path.samestat(os.stat(self._final), placed):
                return
            self._stays = True
            if self._backup:
                os.replace(self._backup, self._final)
            elif self._can_undo:
                os.unlink(self._final)
            self._stays = not self._can_undo
        except OSError:
            return

    def _discard(self) -> None:
        for name in (self._temporary, self._backup):
            if name:
                remove(name)
        try:
            self._close_file()
        except OSError:
            pass
        if self._folder >= 0:
            os.close(self._folder)
            self._folder = -1

    def _close_file(self) -> None:
        direct, self._direct = self._direct, -1
        if direct >= 0:
            os.close(direct)
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def _error(self, error: OSError) -> FileError:
        hint = None
        if error.errno in _NO_ROOM:
            hint = f"It needs {self.nbytes} bytes: make room, or write elsewhere" if self.nbytes else "Make room"
        elif self._stays:
            hint = "The new file is complete and in its place, but may not outlive a power cut"
        return FileError.of(error, self.path, "can't be written", hint)


def check_target(path: str | os.PathLike[str], *, overwrite: bool) -> None:
    """Raise ``FileError`` where no file can be put, ``TargetExists`` where one may not be replaced. Writes nothing."""
    _target(os.fspath(path), overwrite)


def write_bytes(path: str | os.PathLike[str], data: bytes, *, overwrite: bool, durable: bool = True) -> None:
    """Write a small file whole: a report, an index. Raises as ``DurableFile`` does."""
    with DurableFile(path, overwrite=overwrite, nbytes=len(data), durable=durable) as file:
        file.write_at(0, [data])


def _target(path: str, overwrite: bool) -> tuple[str, int | None]:
    """The real path of the file of this name, and the permission bits of the one that is there, if one is."""
    if not os.path.basename(path):
        raise FileError("can't be written: this names a folder, not a file", errno=errno.EISDIR, path=path)
    final = path
    try:
        final = os.path.realpath(path)
        mode = os.stat(final).st_mode
    except FileNotFoundError:
        return _new_target(path, final), None
    except OSError as error:
        raise FileError.of(error, path, "can't be written") from error
    except ValueError as error:
        what = "can't be written: the name holds a NUL character"
        raise FileError(what, errno=errno.EINVAL, path=path) from error
    if stat.S_ISDIR(mode):
        raise FileError("can't be written: a folder is there", errno=errno.EISDIR, path=path, hint="Name a file in it")
    if not stat.S_ISREG(mode):
        what = "can't be replaced: a device, pipe or socket is there"
        raise FileError(what, errno=errno.EINVAL, path=path, hint="Name a regular file")
    if not overwrite:
        raise _exists(path)
    return final, stat.S_IMODE(mode)


def _new_target(path: str, final: str) -> str:
    folder = os.path.dirname(final)
    if not os.path.isdir(folder):
        what = "can't be written: its folder doesn't exist"
        raise FileError(what, errno=errno.ENOENT, path=path, hint=f"Make the folder first: {folder}")
    return final


def _exists(path: str) -> TargetExists:
    hint = "Name another, or allow it to be replaced: --overwrite, overwrite=True"
    return TargetExists("the output is there already", errno=errno.EEXIST, path=path, hint=hint)


def _after(buffers: list[memoryview], count: int) -> list[memoryview]:
    """The buffers without their first ``count`` bytes."""
    for i, buffer in enumerate(buffers):
        if count < len(buffer):
            return [buffer[count:], *buffers[i + 1 :]]
        count -= len(buffer)
    return []


def preallocate(fd: int, nbytes: int) -> None:
    """Reserve the room where the file system can, so that a full disk is reported before anything is written."""
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    # Where the file system can't, the C library writes a byte into every block instead: slower than the copy itself. It
    # refuses to (EBADF) for a file opened for appending; a true reservation doesn't mind.
    fcntl.fcntl(fd, fcntl.F_SETFL, flags | os.O_APPEND)
    try:
        os.posix_fallocate(fd, 0, nbytes)
    except OSError as error:
        if error.errno not in _NOT_SUPPORTED | {errno.EBADF, errno.ENODEV}:
            raise
    except AttributeError:
        # macOS has no such call.
        pass
    finally:
        fcntl.fcntl(fd, fcntl.F_SETFL, flags)
