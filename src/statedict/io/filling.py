"""Fills memory from files with a few threads, and checks digests and CRCs of what was read in passing."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from threading import Lock
from typing import NamedTuple

from statedict.io.arenas import PAGE_NBYTES, aligned
from statedict.io.engine import Reading
from statedict.io.ranges import File, LocalFile, blocks
from statedict.io.storages import StorageReader
from statedict.io.sums import Checked, SumCheck, check_all
from statedict.io.workers import Workers

__all__ = ["Job", "fill", "verify"]

# Threads that read into a buffer of their own, only to sum it: what they take together stays bounded.
_MOST_VERIFYING = 8


class Job(NamedTuple):
    """A range of a file and the memory (of bytes) that it goes to; and the storages in it that are to be checked."""

    file: File
    offset: int
    memory: memoryview
    checked: Sequence[Checked] = ()


class _Chain:
    """The sum of a storage that several threads read in blocks: whoever has read the next block sums, and those behind it."""

    def __init__(self, job: Job, block_nbytes: int, count: int) -> None:
        item = job.checked[0]
        self._bytes = job.memory[item.start : item.start + item.storage.nbytes]
        self._start = item.start
        self._block = block_nbytes
        self._last = count - 1  # the number of the last block, which is longer or shorter
        self._sum = SumCheck(job.file, item)
        self._lock = Lock()
        self._read: set[int] = set()
        self._next = 0
        self._busy = False

    def finished(self, index: int) -> None:
        with self._lock:
            self._read.add(index)
            if self._busy:
                return
            self._busy = True
        while True:
            with self._lock:
                if self._next not in self._read:
                    self._busy = False
                    return
                at = self._next
                self._next += 1
            first = max(0, at * self._block - self._start)
            last = max(0, (at + 1) * self._block - self._start) if at < self._last else len(self._bytes)
            self._sum.update(self._bytes[first:last])
            if at == self._last:
                self._sum.finish()


class _Task(NamedTuple):
    """What one thread does at a time: read a block, then sum what is complete."""

    job: Job
    start: int
    nbytes: int
    chain: _Chain | None
    block: int


def fill(jobs: Sequence[Job], reading: Reading, on_progress: Callable[[int, int], None] | None = None) -> None:
    """Carry out all jobs; the first error ends them and is raised, the caller's own Ctrl-C too. The threads have ended then.

    A job is cut into blocks of ``reading.block_nbytes``. Raises ``CorruptFile`` where a file ends first or a sum differs,
    ``FileError`` where the system can't read.
    """
    _Filling(jobs, reading, on_progress).run()


def verify(reader: StorageReader, items: Sequence[Checked], reading: Reading) -> None:
    """Read every storage and compare its sum with the file's, in blocks that are forgotten again; each thread takes a storage."""
    ordered = sorted(items, key=lambda item: item.storage.extent.offset if item.storage.extent is not None else 0)
    pending = iter(ordered)
    lock = Lock()
    ahead = _Ahead([_range(reader, item) for item in ordered], reading.ahead_nbytes)
    direct = _Direct() if reading.direct else None
    most = min(reading.block_nbytes, max([item.storage.nbytes for item in ordered], default=1)) or 1

    def work() -> None:
        # Past the page cache whole pages are read: the range begins inside the first and ends inside the last.
        buffer = memoryview(bytearray(most)) if direct is None else aligned(most + 2 * PAGE_NBYTES)
        while True:
            with lock:
                item = next(pending, None)
            if item is None:
                return
            extent = item.storage.extent
            assert extent is not None
            file = reader.files[extent.file]
            sums = SumCheck(file, item)
            past = direct if extent.codec == "raw" else None
            for start, count in blocks(0, item.storage.nbytes, most):
                ahead.announce(file, extent.offset + start)
                skip = (extent.offset + start) % PAGE_NBYTES
                whole = skip + count + -(skip + count) % PAGE_NBYTES
                if past is not None and past.read_into(file, extent.offset + start - skip, buffer[:whole]):
                    sums.update(buffer[skip : skip + count])
                else:
                    reader.read_into(item.storage, start, buffer[:count])
                    sums.update(buffer[:count])
            sums.finish()

    try:
        Workers(min(reading.threads, _MOST_VERIFYING, max(1, len(ordered)))).run(work)
    finally:
        if direct is not None:
            direct.close()


def _range(reader: StorageReader, item: Checked) -> tuple[File, int, int]:
    extent = item.storage.extent
    assert extent is not None
    return reader.files[extent.file], extent.offset, extent.nbytes


class _Filling:
    def __init__(self, jobs: Sequence[Job], reading: Reading, on_progress: Callable[[int, int], None] | None) -> None:
        self._reading = reading
        self._on_progress = on_progress
        self._total = sum(len(job.memory) for job in jobs)
        self._done = 0
        self._tasks = self._cut(jobs)
        self._ahead = _Ahead([(job.file, job.offset, len(job.memory)) for job in jobs], reading.ahead_nbytes)
        self._direct = _Direct() if reading.direct else None
        self._lock = Lock()
        self._workers = Workers(reading.threads)

    def _cut(self, jobs: Sequence[Job]) -> Iterator[_Task]:
        size = self._reading.block_nbytes
        for job in jobs:
            # A short rest is read with the block before it: past the page cache, a page takes as long as a hundred.
            count = max(1, (len(job.memory) + size - size // 4) // size)
            chain = _Chain(job, size, count) if count > 1 and job.checked else None
            for index in range(count):
                end = len(job.memory) if index == count - 1 else (index + 1) * size
                yield _Task(job, index * size, end - index * size, chain, index)

    def run(self) -> None:
        try:
            self._workers.run(self._work)
        finally:
            if self._direct is not None:
                self._direct.close()

    def _work(self) -> None:
        while not self._workers.stopped:
            with self._lock:
                task = next(self._tasks, None)
            if task is None:
                return
            self._ahead.announce(task.job.file, task.job.offset + task.start)
            self._carry_out(task)

    def _carry_out(self, task: _Task) -> None:
        job = task.job
        memory = job.memory[task.start : task.start + task.nbytes]
        if self._direct is None or not self._direct.read_into(job.file, job.offset + task.start, memory):
            job.file.read_into(job.offset + task.start, memory)
        if task.chain is not None:
            task.chain.finished(task.block)
        elif job.checked:
            check_all(job.file, job.memory, job.checked)
        if self._on_progress is not None:
            with self._lock:
                self._done += task.nbytes
                self._on_progress(self._done, self._total)


class _Ahead:
    """Tells the kernel what will be read next, so that the disk is never idle."""

    def __init__(self, ranges: Sequence[tuple[File, int, int]], nbytes: int) -> None:
        self._nbytes = nbytes
        self._ranges = list(ranges) if nbytes else []
        self._at = 0
        self._told: tuple[File | None, int] = (None, 0)
        self._lock = Lock()

    def announce(self, file: File, offset: int) -> None:
        """A read of that place begins."""
        if not self._ranges:
            return
        with self._lock:
            while self._at < len(self._ranges):
                other, start, nbytes = self._ranges[self._at]
                if other is not file or start > offset + self._nbytes:
                    return
                if isinstance(other, LocalFile):
                    self._tell(other, start, nbytes, offset)
                    if self._told[1] < start + nbytes:
                        return
                self._at += 1

    def _tell(self, file: LocalFile, start: int, nbytes: int, offset: int) -> None:
        known = self._told[1] if self._told[0] is file else 0
        first = max(start, known)
        last = min(start + nbytes, offset + self._nbytes)
        if last > first:
            try:
                os.posix_fadvise(file.fileno(), first, last - first, os.POSIX_FADV_WILLNEED)
            except (OSError, AttributeError):
                self._ranges = []
                return
        self._told = (file, max(last, known))


class _Direct:
    """Reads past the page cache, where the file system, the offset and the address allow it."""

    def __init__(self) -> None:
        self._fds: dict[int, int] = {}
        self._lock = Lock()

    def read_into(self, file: File, offset: int, memory: memoryview) -> bool:
        """Fill the memory, or say that this can't be done so."""
        if not isinstance(file, LocalFile) or offset % PAGE_NBYTES or len(memory) % PAGE_NBYTES:
            return False
        fd = self._open(file)
        if fd < 0 or offset + len(memory) > file.nbytes:
            return False
        done = 0
        try:
            while done < len(memory):
                count = os.preadv(fd, [memory[done:]], offset + done)
                if count == 0 or count % PAGE_NBYTES:
                    return False
                done += count
        except OSError:
            return False
        return True

    def _open(self, file: LocalFile) -> int:
        with self._lock:
            fd = self._fds.get(file.fileno())
            if fd is None:
                try:
                    fd = os.open(f"/proc/self/fd/{file.fileno()}", os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
                except (OSError, AttributeError):
                    fd = -1
                self._fds[file.fileno()] = fd
            return fd

    def close(self) -> None:
        """Close what was opened."""
        for fd in self._fds.values():
            if fd >= 0:
                os.close(fd)
        self._fds.clear()
