"""Carries out a ``WritePlan``: the caller's thread reads and sums, others write, in a few reused buffers (``engine.py`` says how many)."""

from __future__ import annotations

import errno
import io
import os
from collections.abc import Callable, Mapping
from functools import partial
from queue import Queue, SimpleQueue
from threading import Lock, Thread
from types import TracebackType
from typing import BinaryIO, NamedTuple

from statedict.errors import FileError
from statedict.io.arenas import aligned
from statedict.io.assembly import Assembly
from statedict.io.durable import PAGE_NBYTES, DurableFile
from statedict.io.engine import AUTOMATIC, Engine, Writing, choose_writing
from statedict.io.plans import Later, Payload, Sum, WritePlan
from statedict.io.ranges import BLOCK_NBYTES, LocalFile, blocks

__all__ = ["Check", "Progress", "Writers", "Written", "execute", "execute_to_stream"]

# Bytes that one thread copies inside the kernel at a time.
_COPY_NBYTES = 16 * 1024 * 1024

Progress = Callable[[int, int], None]
Check = Callable[[LocalFile, Mapping[str, Sum]], None]


class Written(NamedTuple):
    """What was written, and how."""

    nbytes: int
    sums: Mapping[str, Sum]  # of every payload, by key
    atomic: bool  # it appeared at once, complete
    durable: bool  # it outlives a power cut
    method: Mapping[str, int]  # bytes by the way they took: "buffered", "kernel copy", "direct write", "stream"
    writing: Writing | None = None  # how; None for a stream


def execute(
    plan: WritePlan,
    path: str | os.PathLike[str],
    *,
    overwrite: bool,
    durable: bool = True,
    on_progress: Progress | None = None,
    check: Check | None = None,
    engine: Engine = AUTOMATIC,
) -> Written:
    """Write the plan to a file, atomically. ``on_progress`` is told the bytes handed on, and the bytes in all.

    ``check`` is given the finished file and the sums before the file takes its name; what it raises leaves nothing behind.

    Raises what ``DurableFile`` does, and whatever a source raises, unchanged. Nothing is left behind then. Buffers
    of 4 MiB are in use, two for each thread and one more, whatever the size; the threads have ended when this returns or raises.
    """
    writing = choose_writing(os.path.dirname(os.path.realpath(path)), plan.nbytes, engine, durable=durable)
    with DurableFile(path, overwrite=overwrite, nbytes=plan.nbytes, durable=durable) as file:
        direct = writing.direct and file.open_direct()
        with Writers(file, writing, direct=direct) as writers:
            assembly = Assembly(plan, writers, on_progress=on_progress)
            assembly.run()
        for offset, later in assembly.unwritten:
            file.write_at(offset, [assembly.rendered(later)])
        if check is not None:
            written = file.reopened()
            try:
                check(written, assembly.sums)
            finally:
                written.close()
    copied, past = sum(writers.copied), sum(writers.direct)
    method = {"buffered": plan.nbytes - copied - past, "kernel copy": copied}
    if past:
        method["direct write"] = past
    return Written(plan.nbytes, assembly.sums, True, file.durable, method, writing)


def execute_to_stream(plan: WritePlan, stream: BinaryIO, *, on_progress: Progress | None = None) -> Written:
    """Write the plan to an open binary file object, in order: neither atomic nor durable.

    Where bytes depend on payloads that come after them (digests in a header), the payloads are read twice.
    """
    sums: Mapping[str, Sum] = {}
    if _looks_ahead(plan):
        summing = Assembly(plan, _Nowhere())
        summing.run()
        sums = summing.sums
    sink = _Stream(stream)
    assembly = Assembly(plan, sink, sums=sums, on_progress=on_progress)
    assembly.run()
    sink.flush()
    return Written(plan.nbytes, assembly.sums, False, False, {"stream": plan.nbytes})


def _looks_ahead(plan: WritePlan) -> bool:
    """Whether some bytes depend on payloads that come after them."""
    every = frozenset(segment.key for segment in plan.segments if isinstance(segment, Payload))
    seen: set[str] = set()
    for segment in plan.segments:
        if isinstance(segment, Payload):
            seen.add(segment.key)
        elif isinstance(segment, Later) and not seen.issuperset(every if segment.needs is None else segment.needs):
            return True
    return False


class Writers:
    """Threads that write into one file what they are handed. A plan of one block is written by the caller's own."""

    def __init__(self, file: DurableFile, writing: Writing, *, direct: bool = False) -> None:
        self.copied: list[int] = []  # bytes that the kernel copied, a number per call
        self.direct: list[int] = []  # bytes that went past the page cache, a number per call
        self.alignment = PAGE_NBYTES if direct else 1
        self._file = file
        self._buffer_nbytes = writing.block_nbytes
        # One being filled, one a thread being written, one a thread waiting.
        self._most_buffers = 1 + 2 * writing.threads
        self._write_back_nbytes = writing.write_back_nbytes
        self._made = 0
        self._free: SimpleQueue[memoryview] = SimpleQueue()
        self._jobs: Queue[tuple[Callable[[], None], memoryview | None] | None] = Queue(2 * self._most_buffers)
        self._dirty = 0
        self._writing_back = Lock()
        self._stopped = False
        self._error: BaseException | None = None
        self._threads = [
            Thread(target=self._work, name="statedict-writer", daemon=True) for _ in range(writing.threads)
        ]

    def __enter__(self) -> Writers:
        try:
            for thread in self._threads:
                thread.start()
        except RuntimeError:
            # The system grants no more threads: fewer will do, or none.
            self._threads = [thread for thread in self._threads if thread.ident is not None]
        except BaseException:
            self._end(stop=True)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end(stop=kind is not None)
        if kind is None and self._error is not None:
            raise self._error

    def buffer(self) -> memoryview:
        """An empty buffer, once there is one."""
        if self._made < self._most_buffers and self._free.empty():
            self._made += 1
            return aligned(self._buffer_nbytes) if self.alignment > 1 else memoryview(bytearray(self._buffer_nbytes))
        return self._free.get()

    def write(self, offset: int, data: memoryview, buffer: memoryview | None) -> None:
        """Have the data written, and then the buffer given back."""
        self._submit(partial(self._write, offset, data), len(data), buffer)

    def _write(self, offset: int, data: memoryview) -> None:
        if self.alignment > 1:
            # The last block is rarely whole pages: its pages go past the cache, its end doesn't.
            whole = len(data) - len(data) % PAGE_NBYTES
            if whole and self._file.write_direct(offset, data[:whole]):
                self.direct.append(whole)
                offset, data = offset + whole, data[whole:]
        if len(data):
            self._file.write_at(offset, [data])

    def copy(self, offset: int, file: LocalFile, source_offset: int, nbytes: int) -> bool:
        """Have the range copied, by the kernel where it can."""
        for first, count in blocks(0, nbytes, _COPY_NBYTES):
            self._submit(partial(self._copy, offset + first, file, source_offset + first, count), count)
        return True

    def _copy(self, offset: int, file: LocalFile, source_offset: int, nbytes: int) -> None:
        done = self._file.copy_at(offset, file.fileno(), source_offset, nbytes)
        self.copied.append(done)
        if done == nbytes:
            return
        buffer = memoryview(bytearray(min(BLOCK_NBYTES, nbytes - done)))
        for first, count in blocks(done, nbytes - done, BLOCK_NBYTES):
            file.read_into(source_offset + first, buffer[:count])
            self._file.write_at(offset + first, [buffer[:count]])

    def _submit(self, run: Callable[[], None], nbytes: int, buffer: memoryview | None = None) -> None:
        if self._error is not None:
            raise self._error
        if not self._threads:
            self._do(run, buffer)
            return
        self._jobs.put((run, buffer))
        self._dirty += nbytes
        if self._write_back_nbytes and self._dirty >= self._write_back_nbytes:
            self._dirty = 0
            self._jobs.put((self._write_back, None))

    def _write_back(self) -> None:
        if self._writing_back.acquire(blocking=False):
            try:
                self._file.write_back()
            finally:
                self._writing_back.release()

    def _do(self, run: Callable[[], None], buffer: memoryview | None) -> None:
        try:
            if not self._stopped:
                run()
        finally:
            if buffer is not None:
                self._free.put(buffer)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            self._attempt(*job)

    def _attempt(self, run: Callable[[], None], buffer: memoryview | None) -> None:
        try:
            self._do(run, buffer)
        except BaseException as error:
            self._error = self._error or error
            self._stopped = True

    def _end(self, *, stop: bool) -> None:
        """Wait for the threads, however often Ctrl-C is pressed meanwhile: the file that they use is closed next."""
        self._stopped = self._stopped or stop
        interrupt: BaseException | None = None
        started = [thread for thread in self._threads if thread.ident is not None]
        untold = len(started)
        while untold or any(thread.is_alive() for thread in started):
            try:
                while untold:
                    self._jobs.put(None)
                    untold -= 1
                for thread in started:
                    thread.join()
            except BaseException as error:  # noqa: PERF203
                self._stopped = True
                interrupt = error
        if interrupt is not None:
            raise interrupt


class _Stream:
    """An open file object that is written in order, by the caller's thread."""

    alignment = 1

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._buffer = memoryview(bytearray(BLOCK_NBYTES))

    def buffer(self) -> memoryview:
        """The one buffer: it is free again when ``write`` returns."""
        return self._buffer

    def write(self, offset: int, data: memoryview, buffer: memoryview | None) -> None:
        """Write all of the data; a raw stream may take several calls."""
        while len(data):
            count = self._call(partial(self._stream.write, data))
            if count is None and isinstance(self._stream, io.RawIOBase):
                raise FileError("can't be written: it takes no bytes now", errno=errno.EAGAIN, path=self._name)
            data = data[len(data) if count is None else count :]

    def copy(self, offset: int, file: LocalFile, source_offset: int, nbytes: int) -> bool:
        """Not possible."""
        return False

    def flush(self) -> None:
        """Hand on what the stream itself keeps back."""
        flush = getattr(self._stream, "flush", None)
        if flush is not None:
            self._call(flush)

    @property
    def _name(self) -> str:
        name = getattr(self._stream, "name", None)
        return name if isinstance(name, str) else "<stream>"

    def _call(self, function: Callable[[], object]) -> int | None:
        try:
            result = function()
        except OSError as error:
            raise FileError.of(error, self._name, "can't be written") from error
        except ValueError as error:
            raise FileError(f"can't be written: {error}", path=self._name) from error
        return result if isinstance(result, int) else None


class _Nowhere:
    """Takes everything and keeps nothing: for a pass that only sums."""

    alignment = 1

    def __init__(self) -> None:
        self._buffer = memoryview(bytearray(BLOCK_NBYTES))

    def buffer(self) -> memoryview:
        """The one buffer."""
        return self._buffer

    def write(self, offset: int, data: memoryview, buffer: memoryview | None) -> None:
        """Nothing."""

    def copy(self, offset: int, file: LocalFile, source_offset: int, nbytes: int) -> bool:
        """Done: nobody asks for these bytes' sums."""
        return True
