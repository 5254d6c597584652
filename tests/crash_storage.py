"""A disk that loses power: what a run does to it is logged, and every state that a crash could leave is given, one after the other.

What is durable: the bytes of a file once it was fsynced, a name in a folder (a file's, a link's, a folder's, a rename, a removal)
once that folder was fsynced. Everything else is volatile: after a crash it may be there or not, each for itself. Bytes that are lost
leave a file that is too short, or one of the right size full of zeros, as ext4 does; the last write may be torn at a sector or page.
"""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from statedict.errors import FileError
from statedict.io.assembly import Assembly
from statedict.io.plans import Sum, WritePlan
from statedict.io.ranges import File, MemoryFile
from statedict.runs.locks import Hold, RunLock

SECTOR, PAGE = 512, 4096
RANDOM_SUBSETS = 30


class Op(NamedTuple):
    """One thing done to the disk. ``node`` is the file or folder that it is about, ``folder`` the one whose names it changes."""

    kind: str  # "write" "fsync" "name" "fsync_folder" "ack"
    node: int = 0
    folder: int = 0
    gone: str = ""  # the name that is taken away
    name: str = ""  # the name that is given
    offset: int = 0
    data: bytes = b""
    is_folder: bool = False  # a new folder: where its name comes to the disk, it is there, however empty


class Disk:
    """Files and folders by number; folder 1 is the root."""

    def __init__(self) -> None:
        self.files: dict[int, bytearray] = {}
        self.folders: dict[int, dict[str, int]] = {1: {}}

    def apply(self, op: Op) -> None:
        """Carry out one op. A name that is to be taken away may never have come to the disk."""
        if op.kind == "write":
            data = self.files.setdefault(op.node, bytearray())
            data.extend(bytes(max(0, op.offset + len(op.data) - len(data))))
            data[op.offset : op.offset + len(op.data)] = op.data
        elif op.kind == "name":
            names = self.folders.setdefault(op.folder, {})
            names.pop(op.gone, None)
            if op.name:
                names[op.name] = op.node

    def signature(self) -> object:
        """What two disks have in common that look the same from the root."""
        return self._seen(1)

    def _seen(self, node: int) -> object:
        if node in self.folders:
            return tuple(sorted([(name, self._seen(child)) for name, child in self.folders[node].items()]))
        return bytes(self.files.get(node, b""))


class _NoLock(RunLock):
    """One process, one run: nobody else writes."""

    def take(self) -> None:
        pass

    def touch(self) -> None:
        pass

    def __enter__(self) -> _NoLock:
        return self

    def __exit__(self, *exc: object) -> None:
        pass


class _Sink:
    alignment = 1

    def __init__(self, storage: CrashStorage, node: int) -> None:
        self._storage = storage
        self._node = node

    def buffer(self) -> memoryview:
        return memoryview(bytearray(64 * 1024))

    def write(self, offset: int, data: memoryview, buffer: memoryview | None) -> None:
        self._storage.do(Op("write", self._node, offset=offset, data=bytes(data)))

    def copy(self, *arguments: object) -> bool:
        return False


class _NewFile:
    def __init__(self, storage: CrashStorage, path: str, node: int) -> None:
        self._storage, self._path, self._node = storage, path, node
        self._kept = False

    def fill(self, plan: WritePlan, *, on_progress: object = None) -> Mapping[str, Sum]:
        assembly = Assembly(plan, _Sink(self._storage, self._node))
        assembly.run()
        for offset, later in assembly.unwritten:
            self._storage.do(Op("write", self._node, offset=offset, data=assembly.rendered(later)))
        return assembly.sums

    def fsync(self) -> bool:
        self._storage.do(Op("fsync", self._node))
        return True

    def keep(self) -> None:
        self._kept = True

    def discard(self) -> None:
        if not self._kept:
            self._storage.unlink(self._path)


class CrashStorage:
    """A ``Storage`` in memory that logs what is done to it."""

    def __init__(self, disk: Disk | None = None) -> None:
        self.disk = disk or Disk()
        self.log: list[Op] = []
        self._next = 2

    def do(self, op: Op) -> None:
        self.log.append(op)
        self.disk.apply(op)

    def acknowledge(self, step: int) -> None:
        """Note that the caller was told: this step is durable."""
        self.log.append(Op("ack", step))

    def _at(self, path: str) -> tuple[int, str]:
        """The folder that a path stands in, and its name there."""
        parts = [part for part in path.split("/") if part]
        node = 1
        for part in parts[:-1]:
            node = self.disk.folders.get(node, {}).get(part, 0)
        if node not in self.disk.folders:
            raise _no(errno.ENOENT, path)
        return node, parts[-1] if parts else ""

    def _node(self, path: str) -> int:
        folder, name = self._at(path)
        node = self.disk.folders[folder].get(name, 0) if name else 1
        if not node:
            raise _no(errno.ENOENT, path)
        return node

    def _new(self, path: str) -> tuple[int, str, int]:
        folder, name = self._at(path)
        if name in self.disk.folders[folder]:
            raise _no(errno.EEXIST, path)
        self._next += 1
        return folder, name, self._next

    def open_new(self, path: str, shown: str, nbytes: int) -> _NewFile:
        folder, name, node = self._new(path)
        self.disk.files[node] = bytearray()
        self.do(Op("name", node, folder, name=name))
        return _NewFile(self, path, node)

    def open_file(self, path: str) -> File:
        try:
            node = self._node(path)
        except OSError as error:
            raise FileError.of(error, path, "can't be opened") from error
        return MemoryFile(bytes(self.disk.files.get(node, b"")), path)

    def facts(self, path: str) -> tuple[str, int, object]:
        node = self._node(path)
        if node in self.disk.folders:
            return "folder", 0, node
        data = self.disk.files.get(node, bytearray())
        return "file", len(data), (node, bytes(data))

    def listdir(self, path: str) -> list[str]:
        node = self._node(path)
        if node not in self.disk.folders:
            raise _no(errno.ENOTDIR, path)
        return list(self.disk.folders[node])

    def mkdir(self, path: str) -> None:
        folder, name, node = self._new(path)
        self.disk.folders[node] = {}
        self.do(Op("name", node, folder, name=name, is_folder=True))

    def rename(self, old: str, new: str) -> None:
        (folder, gone), (target, name) = self._at(old), self._at(new)
        assert folder == target, "the protocol renames within one folder only"
        self.do(Op("name", self._node(old), folder, gone, name))

    def rename_noreplace(self, old: str, new: str) -> None:
        self._new(new)
        self.rename(old, new)

    def link(self, old: str, new: str) -> None:
        folder, name, _ = self._new(new)
        self.do(Op("name", self._node(old), folder, name=name))

    def unlink(self, path: str) -> None:
        folder, name = self._at(path)
        self.do(Op("name", self._node(path), folder, gone=name))

    def rmdir(self, path: str) -> None:
        node = self._node(path)
        if self.disk.folders[node]:
            raise _no(errno.ENOTEMPTY, path)
        self.unlink(path)

    def fsync_folder(self, path: str) -> bool:
        self.do(Op("fsync_folder", self._node(path)))
        return True

    def free_nbytes(self, path: str) -> int | None:
        return None

    def hold(self, path: str, *, exclusive: bool) -> Hold | None:
        self._node(path)
        raise _no(errno.ENOLCK, path)

    def lock(self, folder: str) -> RunLock:
        return _NoLock(folder)


def _no(number: int, path: str) -> OSError:
    return OSError(number, os.strerror(number), path)


# -------------------------------------------------------------------- crashes


class Crash(NamedTuple):
    """A disk after a crash: when it was, what had been acknowledged then, and how the volatile ops fared."""

    after: int  # ops
    acknowledged: int  # the last step that the caller was told is durable; -1 before the first
    how: str
    disk: Disk


def _split(log: Sequence[Op]) -> tuple[list[Op], list[Op]]:
    """The durable ops, and the volatile ones, in order."""
    durable_until: dict[tuple[str, int], int] = {}
    for at, op in enumerate(log):
        if op.kind in ("fsync", "fsync_folder"):
            durable_until[(op.kind, op.node)] = at
    durable, volatile = [], []
    for at, op in enumerate(log):
        if op.kind in ("write", "name"):
            key = ("fsync", op.node) if op.kind == "write" else ("fsync_folder", op.folder)
            (durable if durable_until.get(key, -1) > at else volatile).append(op)
    return durable, volatile


def _subsets(volatile: Sequence[Op], chance: random.Random) -> Iterator[tuple[str, list[Op | None]]]:
    """Which of the volatile ops come to the disk, in ways that differ in kind."""
    count = len(volatile)
    everything: list[Op | None] = list(volatile)
    yield "all lost", [None] * count
    if not count:
        return
    yield "all kept", everything
    for at in range(count):
        yield f"only op {at} kept", [op if at == number else None for number, op in enumerate(volatile)]
        yield f"only op {at} lost", [None if at == number else op for number, op in enumerate(volatile)]
    yield "names before bytes", [op if op.kind == "name" else None for op in volatile]
    yield "names, and zeros for bytes", [op if op.kind == "name" else _zeros(op) for op in volatile]
    yield "bytes before names", [op if op.kind == "write" else None for op in volatile]
    last = max([at for at, op in enumerate(volatile) if op.kind == "write"], default=None)
    if last is not None:
        data = volatile[last].data
        for cut in sorted({len(data) // unit * unit for unit in (SECTOR, PAGE)} | {SECTOR}):
            torn = volatile[last]._replace(data=data[:cut])
            yield f"torn after {cut} bytes", [torn if at == last else op for at, op in enumerate(volatile)]
    for number in range(RANDOM_SUBSETS if count > 2 else 0):
        yield f"random {number}", [op if chance.random() < 0.5 else None for op in volatile]


def _zeros(op: Op) -> Op:
    return op._replace(data=bytes(len(op.data)))


def crashes(log: Sequence[Op], first: int = 0) -> Iterator[Crash]:
    """Every crash after the op of number ``first`` and those behind it."""
    for after in range(first, len(log) + 1):
        done = log[:after]
        acknowledged = max([op.node for op in done if op.kind == "ack"], default=-1)
        durable, volatile = _split(done)
        for how, kept in _subsets(volatile, random.Random(after)):
            disk = Disk()
            order = {id(op): at for at, op in enumerate(done)}
            chosen = [(order[id(op)], op) for op in durable]
            chosen += [(order[id(was)], op) for was, op in zip(volatile, kept) if op is not None]
            disk.folders.update({op.node: {} for op in done if op.is_folder})
            for _, op in sorted(chosen, key=lambda pair: pair[0]):
                disk.apply(op)
            yield Crash(after, acknowledged, how, disk)
