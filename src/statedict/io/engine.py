"""How bytes are moved between files and memory: chosen here, in one place, from the file system, the size and the machine.

Measured on two shared cores, ext4, 1 GiB (GB/s; a copy between touched buffers reaches 12.6):

- warm, into fresh memory: one thread 1.8, two 3.2; in huge pages one 6.9, two 11.9, four 11.0; blocks of 2 to 16 MiB alike
- cold, in a fresh process: O_DIRECT with sixteen threads 2.6, and 2.4 where digests are checked, with eight 2.4 and 2.0, with four
  1.7; buffered, with the kernel told 128 MiB ahead what comes next, 1.1 to 1.7, and without that less; the disk itself, into memory
  that was touched before, 2.6 by four threads and by sixteen. A thread that makes pages or sums keeps the disk waiting, so there
  are many. What O_DIRECT has read isn't in the page cache for the next reader; where it isn't used, the kernel is told ahead

Durable writes of 1 GiB: O_DIRECT from 4 MiB buffers in huge pages 0.32 s by six threads, 0.34 by three, 0.41 by two; buffered, with
the disk set to work after every 64 MiB, 0.48 s; the disk itself takes 0.31 s. The copy into aligned buffers is done while it writes;
from buffers in pages of 4 KiB, O_DIRECT was no faster than the page cache. ``copy_file_range`` takes 2.7 s by one thread, 1.6 s by
two. Not durable, from memory: 0.205 s by one thread beside the one that sums, 0.22 by two, 0.225 by three.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import NamedTuple

from statedict.errors import StateDictError
from statedict.io.filesystems import filesystem_of, is_memory, is_network
from statedict.io.ranges import BLOCK_NBYTES, LocalFile

__all__ = ["AUTOMATIC", "Engine", "Reading", "Writing", "choose_reading", "choose_writing", "cpus"]

_MIB = 1024 * 1024
# What is read at a time, and by how many threads at most: more only wait for the memory.
_BLOCK_NBYTES = 8 * _MIB
_MOST_THREADS = 8
# Past the page cache, where a thread waits for the disk most of the time.
_DIRECT_READERS = 16
_DIRECT_WRITERS = 6
# Over a network many requests have to be under way at once.
_NETWORK_THREADS = 16
# Below this many bytes one thread is done before a second has started.
_ONE_THREAD_NBYTES = 8 * _MIB
# How far ahead of the reads the kernel is told what comes next, where the file is not in the page cache.
_AHEAD_NBYTES = 128 * _MIB
# From this many bytes on, durable files are written and uncached ones read past the page cache, on the file systems where that is
# the disk's own speed.
_DIRECT_NBYTES = 64 * _MIB
_DIRECT = frozenset({"ext4", "xfs"})
# Bytes written after which the disk is set to work.
_WRITE_BACK_NBYTES = 64 * _MIB
# Places of a file that are asked whether they are in the page cache.
_PROBES = 8


class Engine(NamedTuple):
    """How bytes are to be moved; what is None is chosen from the file system and the size. What was used is in the result."""

    threads: int | None = None
    block_nbytes: int | None = None  # bytes read or written at a time
    direct: bool | None = None  # past the page cache (O_DIRECT), where the file system can
    huge_pages: bool | None = None  # ask for memory in pages of 2 MiB
    ahead_nbytes: int | None = None  # how far ahead the kernel is told what will be read; 0: not at all

    def check(self) -> Engine:
        """This engine, if its numbers make sense; else ``StateDictError``."""
        for name in ("threads", "block_nbytes"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise StateDictError(f"Engine({name}=…) must be a positive number", found=value)
        if self.block_nbytes is not None and self.block_nbytes % 4096:
            raise StateDictError("Engine(block_nbytes=…) must be a multiple of 4096", found=self.block_nbytes)
        return self


AUTOMATIC = Engine()


class Writing(NamedTuple):
    """How one file is written."""

    threads: int
    block_nbytes: int
    direct: bool
    write_back_nbytes: int  # bytes after which the disk is set to work; 0 where there is none
    filesystem: str


class Reading(NamedTuple):
    """How one load reads: the choice, and why it could be made."""

    threads: int
    block_nbytes: int
    direct: bool
    huge_pages: bool
    ahead_nbytes: int
    filesystem: str
    cached: bool  # most of what was asked is in the page cache


def cpus() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def choose_reading(file: LocalFile | None, nbytes: int, engine: Engine = AUTOMATIC) -> Reading:
    """How ``nbytes`` of this file are read; of None, of what is no file of this machine's."""
    kind = filesystem_of(file.path) if file is not None else "unknown"
    cached = file is None or is_memory(kind) or nbytes <= _ONE_THREAD_NBYTES or _is_cached(file)
    threads = _NETWORK_THREADS if is_network(kind) else min(_MOST_THREADS, max(2, cpus()))
    direct = not cached and kind in _DIRECT and nbytes >= _DIRECT_NBYTES if engine.direct is None else engine.direct
    if nbytes <= _ONE_THREAD_NBYTES:
        threads = 1
    elif not cached and not is_network(kind):
        threads = max(threads, _DIRECT_READERS if direct else 4)
    return Reading(
        threads if engine.threads is None else engine.threads,
        engine.block_nbytes or _BLOCK_NBYTES,
        direct,
        engine.huge_pages is not False,
        (0 if cached or direct else _AHEAD_NBYTES) if engine.ahead_nbytes is None else engine.ahead_nbytes,
        kind,
        cached,
    )


def choose_writing(folder: str, nbytes: int, engine: Engine = AUTOMATIC, *, durable: bool = True) -> Writing:
    """How a file of ``nbytes`` in this folder is written."""
    kind = filesystem_of(folder)
    direct = durable and nbytes >= _DIRECT_NBYTES and kind in _DIRECT if engine.direct is None else engine.direct
    # Two to write, while the third waits for the disk. Over a network, more that wait; where none waits, as many as there are
    # processors beside the caller's own, which sums.
    threads = 3 if durable else min(3, max(1, cpus() - 1))
    if is_network(kind):
        threads = _NETWORK_THREADS // 2
    elif direct:
        threads = _DIRECT_WRITERS
    block = engine.block_nbytes or BLOCK_NBYTES
    return Writing(
        threads=(0 if nbytes <= block else threads) if engine.threads is None else engine.threads,
        block_nbytes=max(1, min(block, nbytes)) if not direct else block,
        direct=direct,
        write_back_nbytes=0 if is_memory(kind) or direct else _WRITE_BACK_NBYTES,
        filesystem=kind,
    )


def _is_cached(file: LocalFile) -> bool:
    """Whether most of the file is in the page cache, by a look at a few places that reads nothing from the disk."""
    if not hasattr(os, "RWF_NOWAIT") or not file.nbytes:
        return True
    places: Sequence[int] = [file.nbytes * at // _PROBES for at in range(_PROBES)]
    byte = bytearray(1)
    found = 0
    for place in places:
        try:
            found += os.preadv(file.fileno(), [byte], place, os.RWF_NOWAIT)
        except BlockingIOError:  # noqa: PERF203
            continue
        except OSError:
            return True  # this file system can't say
    return 2 * found > len(places)
