"""Memory of devices as files to read, and as a place to write to, through two pinned buffers of fixed size.

    DeviceFile.read_into    device ── to_host ──→ buffer ── copied ──→ the caller's memory
    Upload.write            device ←─ to_device ── buffer ←── filled ── the caller's file

While one buffer is filled or emptied by the processor, the device copies from or to the other. A buffer is touched again only
after the mark behind its last copy was waited for. Sizes and offsets are bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Condition
from types import TracebackType

import torch

from statedict.errors import CorruptFile, StateDictError
from statedict.io.ranges import blocks
from statedict.torch.backends import Backend, as_bytes, backend_of

__all__ = ["RING_BLOCK_NBYTES", "Backend", "DeviceFile", "Ring", "Upload", "as_bytes", "backend_of"]

# Long enough that starting a copy costs nothing beside it (0.3 ms at 25 GB/s), and a power of two, as torch's pinned memory is.
RING_BLOCK_NBYTES = 8 * 1024 * 1024
# One for the device, one for the processor.
_BUFFERS = 2


class _Slot:
    """A host buffer, its last copy, and which bytes of a file it holds that were read ahead."""

    __slots__ = ("_backend", "_buffer", "_mark", "end", "file", "is_copying", "memory", "reached", "start")

    def __init__(self, backend: Backend, nbytes: int) -> None:
        self._backend = backend
        self._buffer = backend.pinned(nbytes)
        self._mark: object = None
        self.memory = self._buffer.numpy().data
        self.is_copying = False
        self.file: DeviceFile | None = None
        self.start = self.reached = self.end = 0

    @property
    def is_free(self) -> bool:
        """Whether nobody waits for its copy and nobody wants its bytes."""
        return self.file is None and not self.is_copying

    def holds(self, file: DeviceFile, offset: int) -> bool:
        """Whether that byte is here and wasn't read yet: what was read once may have changed on the device since."""
        return self.file is file and self.reached <= offset < self.end

    def receive(self, file: DeviceFile, data: torch.Tensor, offset: int) -> None:
        """Begin to copy these bytes of the device, which are the file's from that offset."""
        self.settle()
        self.file = None
        self.is_copying = True  # before it is: a Ctrl-C on the way must not leave a copy that nobody waits for
        self._backend.to_host(self._buffer[: len(data)], data)
        self._mark = self._backend.record()
        self.file, self.start, self.reached, self.end = file, offset, offset, offset + len(data)

    def take(self, offset: int, room: memoryview) -> int:
        """Copy the bytes from that offset into the room, as many as are here; their number."""
        self.settle()
        count = min(len(room), self.end - offset)
        # Beside two busy threads on two cores this copies 24 GB/s, numpy 7 and torch 1.5: the one waits for the interpreter to have
        # it back, the other's own threads for a core each. Nobody else runs Python meanwhile, for 0.3 ms a block.
        place = offset - self.start
        room[:count] = self.memory[place : place + count]
        self.reached = offset + count
        if self.reached == self.end:
            self.file = None
        return count

    def send(self, target: torch.Tensor) -> None:
        """Begin to copy the first bytes of the buffer to the device."""
        self.is_copying = True
        self._backend.to_device(target, self._buffer[: len(target)])
        self._mark = self._backend.record()

    def settle(self) -> None:
        """Wait until the device is done with the buffer."""
        if self.is_copying:
            self._backend.wait(self._backend.record() if self._mark is None else self._mark)
            self.is_copying, self._mark = False, None


class Ring:
    """Two host buffers, shared by everything that is read from or written to one device: 16 MiB, however large the tensors.

    With ``ahead``, a file that is read in order is copied one block ahead of its reader: for memory that doesn't change until all
    is read. Without, every read sees what the device has then. The buffers are allocated when they are first needed.
    """

    def __init__(self, backend: Backend, block_nbytes: int = RING_BLOCK_NBYTES, *, ahead: bool = True) -> None:
        self.backend = backend
        self.block_nbytes = block_nbytes
        self.ahead = ahead
        self._made = 0
        self._idle: list[_Slot] = []  # the longest idle first
        self._reader: DeviceFile | None = None  # who asked last
        self._is_alone = False  # and asked before that too
        self._changed = Condition()

    @contextmanager
    def slot(self, file: DeviceFile | None = None, offset: int = 0) -> Iterator[_Slot]:
        """A buffer for the caller alone: the one that holds that byte of the file, else any, once there is one."""
        with self._changed:
            self._is_alone, self._reader = self._reader is file, file
            while (slot := self._choose(file, offset)) is None:
                self._changed.wait()
        try:
            yield slot
        finally:
            self._give_back(slot)

    def read_ahead(self, file: DeviceFile, data: torch.Tensor, offset: int) -> None:
        """Begin to copy the file's bytes from that offset, if they are not on their way and a buffer is to spare."""
        with self._changed:
            if any(slot.holds(file, offset) for slot in self._idle):
                return
            # Two files that take turns don't throw away what the other has read ahead; one that is read no longer gives way.
            slot = self._free() or (self._idle.pop(0) if self._idle and self._is_alone else None)
        if slot is not None:
            try:
                slot.receive(file, data, offset)
            finally:
                self._give_back(slot)

    def forget(self, file: DeviceFile) -> None:
        """Let go of what was read ahead of that file."""
        with self._changed:
            for slot in self._idle:
                if slot.file is file:
                    slot.file = None
            if self._reader is file:
                self._reader = None

    def _choose(self, file: DeviceFile | None, offset: int) -> _Slot | None:
        held = next((slot for slot in self._idle if file is not None and slot.holds(file, offset)), None)
        if held is not None:
            self._idle.remove(held)
            return held
        return self._free() or (self._idle.pop(0) if self._idle else None)

    def _free(self) -> _Slot | None:
        """A buffer that nobody needs, or a new one while there may be more. Raises ``StateDictError`` if there is none at all."""
        free = next((slot for slot in self._idle if slot.is_free), None)
        if free is not None:
            self._idle.remove(free)
        elif self._made < _BUFFERS:
            try:
                free = _Slot(self.backend, self.block_nbytes)
            except RuntimeError as error:
                if self._made:
                    return None  # one will do: slower, and nothing else
                raise StateDictError(f"the system has no memory for a buffer of {self.block_nbytes:,} bytes") from error
            self._made += 1
        return free

    def _give_back(self, slot: _Slot) -> None:
        with self._changed:
            self._idle.append(slot)
            self._changed.notify()


class DeviceFile:
    """The memory of a storage on a device, read as a file is, by several threads if need be.

    The storage is kept alive and is neither copied nor changed. The ring must be of the storage's device.
    """

    def __init__(self, storage: torch.UntypedStorage, ring: Ring) -> None:
        self.path = f"{storage.device} memory"
        self.nbytes = storage.nbytes()
        self.storage = storage
        self._bytes = as_bytes(storage)
        self._ring = ring
        self._next = 0  # where the last read ended

    def read(self, offset: int, nbytes: int) -> bytes:
        """Exactly that many bytes, or ``CorruptFile`` where the storage ends before them."""
        self._check(offset, nbytes)
        buffer = bytearray(nbytes)
        self.read_into(offset, memoryview(buffer))
        return bytes(buffer)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill the buffer from that position, in blocks of the ring; what fails on the device is raised as torch raises it."""
        self._check(offset, len(buffer))
        end = offset + len(buffer)
        is_in_order, self._next = offset == self._next, end
        limit = self.nbytes if self._ring.ahead and is_in_order else end
        is_kept = False
        try:
            while offset < end:
                offset += self._piece(offset, buffer[len(buffer) - (end - offset) :], limit)
            is_kept = self._ring.ahead
        finally:
            if not is_kept:
                self._ring.forget(self)

    def _piece(self, offset: int, room: memoryview, limit: int) -> int:
        """Fill the beginning of the room, with the next block on its way meanwhile; the number of bytes."""
        block_nbytes = self._ring.block_nbytes
        with self._ring.slot(self, offset) as slot:
            if not slot.holds(self, offset):
                slot.receive(self, self._bytes[offset : offset + min(block_nbytes, len(room))], offset)
            following = slot.end
            self._ahead(following, limit)
            count = slot.take(offset, room)
        if count == following - offset:
            # The other buffer may have been in use, and this one is free now.
            self._ahead(following, limit)
        return count

    def _ahead(self, offset: int, limit: int) -> None:
        if offset < limit:
            self._ring.read_ahead(self, self._bytes[offset : min(offset + self._ring.block_nbytes, limit)], offset)

    def _check(self, offset: int, nbytes: int) -> None:
        if offset < 0 or nbytes < 0 or offset + nbytes > self.nbytes:
            raise CorruptFile(
                "the storage ends too early",
                path=self.path,
                offset=offset,
                expected=f"{nbytes} bytes",
                found=max(0, self.nbytes - offset),
            )

    def close(self) -> None:
        """Let go of what was read ahead."""
        self._ring.forget(self)


class Upload:
    """Writes files into memory of a device. On leaving its block, and after an error, nothing is in flight any more."""

    def __init__(self, ring: Ring) -> None:
        self._ring = ring

    def __enter__(self) -> Upload:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.finish()

    def write(
        self, target: torch.UntypedStorage | torch.Tensor, offset: int, fill: Callable[[memoryview], None], nbytes: int
    ) -> None:
        """Write that many bytes from ``offset`` on of a storage, or of a view [n] of uint8 of one.

        ``fill`` is called once for each block, in order, with the host memory to put the block's bytes into: at most
        ``ring.block_nbytes``, and no longer its own once it has returned. The last copies may still be running at the end:
        ``finish`` waits for them. What ``fill`` raises is raised after waiting. Raises ``ValueError`` for a range outside the target.
        """
        memory = target if isinstance(target, torch.Tensor) else as_bytes(target)
        if memory.dtype != torch.uint8 or memory.dim() != 1 or not memory.is_contiguous():
            raise ValueError(f"the target must be bytes in one piece, not {memory.dtype} {tuple(memory.shape)}")
        if offset < 0 or nbytes < 0 or offset + nbytes > len(memory):
            raise ValueError(f"bytes {offset} to {offset + nbytes} don't lie in a target of {len(memory)}")
        try:
            for start, count in blocks(offset, nbytes, self._ring.block_nbytes):
                with self._ring.slot() as slot:
                    slot.settle()
                    slot.file = None
                    fill(slot.memory[:count])
                    slot.send(memory[start : start + count])
        except BaseException:
            self.finish()
            raise

    def finish(self) -> None:
        """Wait until everything written so far is on the device, for all its streams."""
        backend = self._ring.backend
        backend.wait(backend.record())
