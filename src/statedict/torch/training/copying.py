"""Copies of what was captured, in host memory that is used again and again: what a save writes while training goes on.

Memory is taken once, in huge pages, and touched by the first copy: 1 GiB of fresh pages costs ten times what its copy does. The
copies themselves are torch's, on as many threads as torch has, and on the streams of the devices.
"""

from __future__ import annotations

import ctypes
import time
import weakref
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch

from statedict.checkpoint import Checkpoint
from statedict.formats.layout import by_storage, clusters, leaves
from statedict.io.arenas import HUGE_NBYTES, aligned
from statedict.io.ranges import File
from statedict.manifest import Container, Manifest, Node, ObjectEntry, Storage, TensorEntry
from statedict.nodes import every_tensor, fold
from statedict.torch.devices import DeviceFile, as_bytes

__all__ = ["HostCopies"]

# Bytes that the address of a copy is a multiple of: torch's own memory is.
_ALIGNMENT = 64
# Devices whose copies are begun on a stream, all of them before one is waited for.
_STREAMED = frozenset({"cuda", "xpu"})
# Seconds from when a save says that it is done to when its thread has ended, generously.
_LETTING_GO_S = 0.02


class _Wanted(NamedTuple):
    """A storage that is seen, the ranges of it that are, and where in the buffer it goes. Bytes all."""

    storage: Storage
    files: tuple[File, ...]
    ranges: tuple[tuple[int, int], ...]
    place: int


class HostCopies:
    """Copies of checkpoints in memory, in one buffer that is used again as soon as nobody has the last copies any more."""

    def __init__(self) -> None:
        self._buffer: _Buffer | None = None
        self._users: list[weakref.ref[Checkpoint]] = []

    def copied(self, pieces: Mapping[str, Checkpoint]) -> dict[str, Checkpoint]:
        """The same checkpoints over memory of their own, which doesn't change until they are let go of."""
        wanted, nbytes = _plan(pieces)
        buffer = self._taken(nbytes, pinned=_is_on_gpu(wanted))
        waiting: set[torch.device] = set()
        for group in wanted.values():
            for each in group:
                device = _copy(each, buffer)
                if device is not None:
                    waiting.add(device)
        for device in waiting:
            module: Any = getattr(torch, device.type)
            module.current_stream(device).synchronize()
        made = {name: _moved(piece, wanted[name], buffer) for name, piece in pieces.items()}
        self._users = [weakref.ref(piece) for piece in made.values()]
        return made

    def prepare(self, pieces: Mapping[str, Checkpoint]) -> int:
        """Take and touch the memory that copies of these will need; its bytes."""
        wanted, nbytes = _plan(pieces)
        self._taken(nbytes, pinned=_is_on_gpu(wanted)).bytes.zero_()
        return nbytes

    def _taken(self, nbytes: int, *, pinned: bool) -> _Buffer:
        """The buffer of the last time if it is large enough and free; else another, and the old one goes with its last user."""
        buffer = self._buffer
        is_free = self._is_free()
        if buffer is None or not is_free or buffer.nbytes < nbytes or (pinned and not buffer.is_pinned):
            if is_free:
                self._buffer = None  # not both at once
                del buffer
            buffer = self._buffer = _Buffer(max(1, nbytes), pinned=pinned)
        return buffer

    def _is_free(self) -> bool:
        """Whether nobody has the last copies. A thread that has just written them may be about to let go of them."""
        until = time.monotonic() + _LETTING_GO_S
        while any(user() is not None for user in self._users):
            if time.monotonic() > until:
                return False
            time.sleep(0.0005)
        return True


class _Buffer:
    """Memory of the host, pinned where GPUs copy to it and the system allows it."""

    def __init__(self, nbytes: int, *, pinned: bool) -> None:
        self.nbytes = nbytes + -nbytes % HUGE_NBYTES
        self.memory = aligned(self.nbytes)
        self.bytes = torch.frombuffer(self.memory, dtype=torch.uint8)
        self.is_pinned = pinned
        if pinned:
            address = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
            cuda: Any = torch.cuda
            runtime = cuda.cudart()
            # Not possible where the system limits locked memory: the copies are slower then, and nothing else.
            if int(runtime.cudaHostRegister(address, self.nbytes, 0)) == 0:
                weakref.finalize(self, runtime.cudaHostUnregister, address)


def _plan(pieces: Mapping[str, Checkpoint]) -> tuple[dict[str, list[_Wanted]], int]:
    """What to copy of each checkpoint, and the bytes of the buffer. Memory that is seen by several is copied for each."""
    wanted: dict[str, list[_Wanted]] = {}
    end = 0
    for name, piece in pieces.items():
        wanted[name] = []
        for group in by_storage(leaves(every_tensor(piece.manifest.structure))):
            view = group[0].view
            assert view is not None
            if view.storage.nbytes:
                ranges = tuple([(low, high) for _, low, high in clusters(group) if high > low])
                wanted[name].append(_Wanted(view.storage, tuple(piece.reader.files), ranges, end))
                end += view.storage.nbytes
                end += -end % _ALIGNMENT
    return wanted, end


def _is_on_gpu(wanted: Mapping[str, list[_Wanted]]) -> bool:
    files = [file for group in wanted.values() for each in group[:1] for file in each.files]
    return any(isinstance(file, DeviceFile) and file.storage.device.type == "cuda" for file in files)


def _copy(wanted: _Wanted, buffer: _Buffer) -> torch.device | None:
    """Copy what is seen of one storage; its device if the copy may still be under way."""
    storage, place = wanted.storage, wanted.place
    file = wanted.files[storage.extent.file] if storage.extent is not None else None
    for low, high in wanted.ranges:
        target = buffer.bytes[place + low : place + high]
        if isinstance(file, DeviceFile):
            target.copy_(as_bytes(file.storage)[low:high], non_blocking=file.storage.device.type in _STREAMED)
        elif file is not None and storage.extent is not None:
            file.read_into(storage.extent.offset + low, buffer.memory[place + low : place + high])
        elif storage.data is not None:
            source = memoryview(storage.data)[low:high]
            if source.readonly:
                np.copyto(target.numpy(), np.frombuffer(source, np.uint8))
            else:
                # torch copies words a sixth faster than bytes.
                dtype = torch.uint8 if (low | high) % 8 else torch.int64
                target.view(dtype).copy_(torch.frombuffer(source, dtype=dtype))
    device = file.storage.device if isinstance(file, DeviceFile) else None
    return device if device is not None and device.type in _STREAMED else None


# -------------------------------------------------------------------- the tree over the copies


def _moved(piece: Checkpoint, wanted: list[_Wanted], buffer: _Buffer) -> Checkpoint:
    """The checkpoint with the copies in the place of its storages."""
    table = {
        each.storage.id: each.storage._replace(
            extent=None, data=buffer.memory[each.place : each.place + each.storage.nbytes]
        )
        for each in wanted
    }
    tensors: dict[Any, TensorEntry] = {}

    def leaf(entry: TensorEntry | ObjectEntry) -> Node:
        if isinstance(entry, ObjectEntry):
            return entry
        made = tensors[entry.path] = _entry(entry, table)
        return made

    def join(node: Container, children: list[Node]) -> Node:
        return Container(node.kind, node.keys, children, type=node.type, attributes=node.attributes)

    root: Node = fold(piece.manifest.structure, leaf, join)
    made = Manifest("memory", (), tuple(table.values()), tensors, piece.manifest.objects, root)
    return Checkpoint(made, (), source=piece.source, limits=piece.limits, owns_files=False)


def _entry(entry: TensorEntry, table: Mapping[int, Storage]) -> TensorEntry:
    view = entry.view
    if view is not None and view.storage.nbytes:
        view = view._replace(storage=table[view.storage.id])
    return entry._replace(view=view, parts={name: _entry(part, table) for name, part in entry.parts.items()})
