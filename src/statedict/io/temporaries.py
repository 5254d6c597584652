"""The names of files that aren't finished yet, and the removal of those that a killed process has left.

A temporary of ``model.pth`` is called ``.model.pth.4711-0123456789abcdef.statedict-tmp``: the process number, and 16
random hexadecimal digits. Its writer holds a lock (flock) on it, which ends with the process, however that ends.
"""

from __future__ import annotations

import fcntl
import os
import stat
import time
from zlib import crc32

__all__ = ["backup_name", "lock", "remove", "sweep", "temporary_name"]

_SUFFIX = ".statedict-tmp"
# The longest file name of every common file system, in bytes.
_LONGEST_NAME = 255
# Two dots, a process number of up to 10 digits, a dash, and 17 hexadecimal digits.
_LONGEST_MARK = 30
# Seconds. A writer on another machine or in another container may bear the number of a living process here, or of none:
# a temporary that nobody holds a lock on is left for a minute if its number is alive, one that can't be locked for a
# day.
_UNLOCKED_AGE = 60
_UNLOCKABLE_AGE = 24 * 3600


def temporary_name(name: str) -> str:
    """A new name beside the file of that name, of at most 255 bytes."""
    return f".{_stem(name)}.{os.getpid()}-{os.urandom(8).hex()}{_SUFFIX}"


def backup_name(temporary: str) -> str:
    """The second name under which the file that a temporary replaces is kept meanwhile."""
    return temporary.removesuffix(_SUFFIX) + "0" + _SUFFIX


def _stem(name: str) -> str:
    """The final name as its temporaries hold it: shortened, with a checksum, where the whole would be too long."""
    encoded = os.fsencode(name)
    room = _LONGEST_NAME - len(_SUFFIX) - _LONGEST_MARK
    if len(encoded) <= room:
        return name
    return f"{encoded[: room - 9].decode('utf-8', 'ignore')}~{crc32(encoded):08x}"


def sweep(folder: str, name: str) -> None:
    """Remove the temporaries of this target that a killed process has left. What can't be removed stays."""
    prefix = f".{_stem(name)}."
    try:
        with os.scandir(folder) as entries:
            found = [e.name for e in entries if e.name.startswith(prefix) and e.name.endswith(_SUFFIX)]
    except OSError:
        return
    for leftover in found:
        number, _, token = leftover[len(prefix) : -len(_SUFFIX)].partition("-")
        if number.isdecimal() and token.isalnum():
            _remove_abandoned(os.path.join(folder, leftover), int(number))


def _remove_abandoned(path: str, number: int) -> None:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return
    try:
        if _is_abandoned(fd, number):
            remove(path)
    finally:
        os.close(fd)


def _is_abandoned(fd: int, number: int) -> bool:
    """Whether no process writes this temporary any more: its lock tells, across containers and restarts too."""
    facts = os.fstat(fd)
    age = time.time() - facts.st_mtime
    if not stat.S_ISREG(facts.st_mode):
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return age > _UNLOCKABLE_AGE and not _is_alive(number)
    return age > _UNLOCKED_AGE or not _is_alive(number)


def _is_alive(number: int) -> bool:
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True


def lock(fd: int) -> None:
    """Hold the file for as long as this process lives; where the file system has no locks, age must tell."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        pass


def remove(path: str) -> None:
    """Remove the file if that can be done."""
    try:
        os.unlink(path)
    except OSError:
        pass
