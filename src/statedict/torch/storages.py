"""The bytes of a checkpoint as storages of torch's, on any device: planned whole, then read in the order of the files.

A storage is read whole, so that its digest or CRC is checked on the way; where its views reach less than three quarters of it, only
what they reach. Storages of a file are seen in windows (``io/arenas.py``): neighbours are read at once and nothing is copied twice.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch

from statedict.errors import StateDictError, Unsupported, one_line
from statedict.formats.layout import by_storage, clusters, leaves
from statedict.io.arenas import Arena, Piece, Window, allocate, plan_windows
from statedict.io.engine import AUTOMATIC, Engine, Reading, choose_reading
from statedict.io.filesystems import filesystem_of, is_network
from statedict.io.filling import Job, fill
from statedict.io.ranges import File, LocalFile, blocks
from statedict.io.storages import StorageReader
from statedict.io.sums import Checked, SumCheck, is_checkable
from statedict.manifest import Storage, TensorEntry
from statedict.recipes.derived import DerivedFile
from statedict.torch.devices import Ring, Upload, as_bytes, backend_of

__all__ = ["Options", "StorageSet", "load_storages", "untyped"]

# A file of at least this many bytes is worth mapping: below, reading it takes no longer than the faults of its pages.
_MAPPED_NBYTES = 64 * 1024 * 1024


class Options(NamedTuple):
    """How storages are loaded."""

    mmap: bool | None = None  # None: mapped where that costs nothing
    check: bool = True
    engine: Engine = AUTOMATIC
    on_progress: Callable[[int, int], None] | None = None


class _Wanted(NamedTuple):
    """A range of a storage of the manifest, and the tensors that are views of it."""

    storage: Storage
    low: int
    nbytes: int
    entries: Sequence[TensorEntry]
    itemsize: int  # of the largest element that is seen in it, which its address must suit
    piece: Piece | None  # where its bytes are, if they are in a file as they are

    @classmethod
    def of(cls, storage: Storage, low: int, high: int, entries: Sequence[TensorEntry], itemsize: int) -> _Wanted:
        """The range from ``low`` to ``high``, in bytes of the storage."""
        extent = storage.extent
        piece = None
        if extent is not None and storage.data is None and extent.codec == "raw":
            piece = Piece(extent.file, extent.offset + low, high - low, itemsize)
        return cls(storage, low, high - low, entries, itemsize, piece)

    @property
    def is_whole(self) -> bool:
        """Whether it is all of its storage."""
        return self.nbytes == self.storage.nbytes


class StorageSet:
    """The loaded storages. ``facts`` say how they were read; ``unchecked`` names the tensors whose bytes had no check."""

    def __init__(self) -> None:
        self.facts: dict[str, object] = {}
        self.unchecked: list[str] = []
        self._places: dict[int, int] = {}  # by id() of the entry
        self._loaded: list[tuple[torch.UntypedStorage, int]] = []

    def place(self, entry: TensorEntry) -> tuple[torch.UntypedStorage, int]:
        """The storage that the tensor is a view of, and the byte of the manifest's storage that it begins at."""
        return self._loaded[self._places[id(entry)]]

    def relocate(
        self,
        entries: Iterable[TensorEntry],
        function: Callable[[torch.UntypedStorage, TensorEntry], torch.UntypedStorage],
    ) -> None:
        """Put what the function gives in the place of each storage; it is called once for each, with its first tensor."""
        seen: set[int] = set()
        for entry in leaves(entries):
            number = self._places[id(entry)]
            if number not in seen:
                seen.add(number)
                storage, low = self._loaded[number]
                self._loaded[number] = (function(storage, entry), low)


def load_storages(
    reader: StorageReader,
    entries: Iterable[TensorEntry],
    destination: Callable[[TensorEntry], str],
    options: Options,
) -> StorageSet:
    """The storages of the tensors, and of the parts of those that are made of parts.

    ``destination`` is the device that a tensor's storage goes to; ``meta`` takes no bytes. Everything is allocated before the
    first byte is read. Raises ``CorruptFile`` for bytes that aren't those that were written, ``StateDictError`` where there is
    no memory.
    """
    return _Loading(reader, options).run(
        [wanted for group in by_storage(leaves(entries)) for wanted in _ranges(group)], destination
    )


def _ranges(group: Sequence[TensorEntry]) -> list[_Wanted]:
    """What to load of one storage: all of it, or the ranges that its views reach where that is much less."""
    view = group[0].view
    assert view is not None
    storage = view.storage
    if len(group) == 1 and group[0].nbytes >= storage.nbytes:
        # The usual case, of which there may be 100,000.
        return [_Wanted.of(storage, 0, storage.nbytes, group, group[0].dtype.bits // 8 or 1)]
    found = clusters(group)
    covered = sum([cluster.high - cluster.low for cluster in found])
    wide = max([entry.dtype.itemsize or 1 for entry in group])
    if 4 * covered >= 3 * storage.nbytes or any(entry.dtype.bits % 8 for entry in group):
        return [_Wanted.of(storage, 0, storage.nbytes, group, wide)]
    return [_Wanted.of(storage, each.low - each.low % wide, each.high, each.members, wide) for each in found]


class _Loading:
    def __init__(self, reader: StorageReader, options: Options) -> None:
        self._reader = reader
        self._options = options
        self._set = StorageSet()
        self._wanted: list[_Wanted] = []
        self._found: dict[int, torch.UntypedStorage] = {}
        self._devices: list[str] = []

    def run(self, wanted: list[_Wanted], destination: Callable[[TensorEntry], str]) -> StorageSet:
        self._wanted = wanted
        self._devices = [destination(each.entries[0]) for each in wanted]
        in_files, others = [], []
        for number, each in enumerate(wanted):
            if self._devices[number] == "meta":
                self._found[number] = untyped(each.nbytes, "meta")
            elif not each.nbytes:
                self._found[number] = untyped(0, self._devices[number])
            elif each.piece is not None:
                in_files.append(number)
            else:
                others.append(number)
        mapped = self._map(in_files)
        self._read([number for number in in_files if number not in mapped])
        for number in others:
            self._found[number] = self._one(number)
        self._finish(mapped)
        return self._set

    def _piece(self, number: int) -> Piece:
        piece = self._wanted[number].piece
        assert piece is not None
        return piece

    def _checked(self, number: int, start: int) -> Sequence[Checked]:
        each = self._wanted[number]
        storage = each.storage
        if storage.digest is None and storage.crc is None:
            return ()
        if not self._options.check or each.nbytes != storage.nbytes:
            return ()
        return (Checked(storage, start, each.entries[0]),)

    # ---------------------------------------------------------------- mapped

    def _map(self, numbers: Sequence[int]) -> set[int]:
        """Those of the storages that are views of the mapped file."""
        # What is computed as it is read lies in no file.
        stored = [n for n in numbers if not isinstance(self._reader.files[self._piece(n).file], DerivedFile)]
        usable = [
            n for n in stored if self._devices[n] == "cpu" and self._piece(n).offset % self._wanted[n].itemsize == 0
        ]
        if not usable or not self._wants_mapping(stored):
            return set()
        bases: dict[int, torch.UntypedStorage] = {}
        for number in usable:
            piece = self._piece(number)
            if piece.file not in bases:
                bases[piece.file] = self._mapping(piece.file)
            self._found[number] = bases[piece.file][piece.offset : piece.offset + piece.nbytes]
        return set(usable)

    def _wants_mapping(self, numbers: Sequence[int]) -> bool:
        chosen = self._options.mmap
        files = {self._piece(number).file for number in numbers}
        local = all(isinstance(self._reader.files[file], LocalFile) for file in files)
        if chosen is not None or not local:
            if chosen and not local:
                raise Unsupported("only a file on a disk can be mapped", hint="Leave mmap out")
            return bool(chosen)
        # A file that says how to check its bytes is read: a mapped one is seen unchecked, whenever that may be.
        checks = self._options.check and any(is_checkable(self._wanted[number].storage) for number in numbers)
        large = sum(self._wanted[number].nbytes for number in numbers) >= _MAPPED_NBYTES
        return (
            large and not checks and not any(is_network(filesystem_of(self._reader.files[file].path)) for file in files)
        )

    def _mapping(self, number: int) -> torch.UntypedStorage:
        """The whole file, privately: what is written to its tensors never reaches the file."""
        file = self._reader.files[number]
        assert isinstance(file, LocalFile)
        try:
            memory = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        except (OSError, ValueError) as error:
            raise StateDictError(
                f"the file can't be mapped: {error}", path=file.path, hint="Pass mmap=False"
            ) from error
        return torch.frombuffer(memory, dtype=torch.uint8).untyped_storage()

    # ---------------------------------------------------------------- read

    def _read(self, numbers: Sequence[int]) -> None:
        if not numbers:
            return
        by_device: dict[str, list[int]] = {}
        for number in numbers:
            by_device.setdefault(self._devices[number], []).append(number)
        files = [self._reader.files[self._piece(number).file] for number in numbers[:1]]
        total = sum(self._wanted[number].nbytes for number in numbers)
        first = files[0] if isinstance(files[0], LocalFile) else None
        reading = choose_reading(first, total, self._options.engine)
        self._set.facts.update(reading._asdict())
        for device, group in by_device.items():
            windows = plan_windows([self._piece(number) for number in group])
            if device == "cpu":
                self._to_memory(windows, group, reading)
            else:
                self._to_device(windows, group, torch.device(device), reading)

    def _to_memory(self, windows: Sequence[Window], numbers: Sequence[int], reading: Reading) -> None:
        arenas = list(allocate(windows, huge_pages=reading.huge_pages))
        fill(
            [self._job(window, memory, numbers) for arena in arenas for window, memory in arena.views()],
            reading,
            self._options.on_progress,
        )
        for arena in arenas:
            self._slice(arena, numbers)

    def _job(self, window: Window, memory: memoryview, numbers: Sequence[int]) -> Job:
        file = self._reader.files[window.file]
        checked: list[Checked] = []
        if self._options.check:
            for at, place in window.members:
                checked += self._checked(numbers[at], place)
        return Job(file, window.offset, memory[: window.extent(file.nbytes)], checked)

    def _slice(self, arena: Arena, numbers: Sequence[int]) -> None:
        base = torch.frombuffer(arena.memory, dtype=torch.uint8).untyped_storage()
        for window, start in arena.windows:
            start += arena.start
            for at, place in window.members:
                number = numbers[at]
                self._found[number] = base[start + place : start + place + self._wanted[number].nbytes]

    def _to_device(
        self, windows: Sequence[Window], numbers: Sequence[int], device: torch.device, reading: Reading
    ) -> None:
        """Through a pinned ring of fixed size: a block is read while the one before it is copied."""
        with Upload(Ring(backend_of(device))) as upload:
            for window in windows:
                base = untyped(window.nbytes, str(device))
                self._upload(upload, base, window, numbers)
                for at, place in window.members:
                    self._found[numbers[at]] = base[place : place + self._wanted[numbers[at]].nbytes]

    def _upload(self, upload: Upload, base: torch.UntypedStorage, window: Window, numbers: Sequence[int]) -> None:
        file = self._reader.files[window.file]
        sums = [
            (item, SumCheck(file, item)) for at, place in window.members for item in self._checked(numbers[at], place)
        ]
        extent = window.extent(file.nbytes)
        position = 0

        def read(memory: memoryview) -> None:
            nonlocal position
            file.read_into(window.offset + position, memory)
            for item, each in sums:
                first, last = item.start - position, item.start + item.storage.nbytes - position
                each.update(memory[max(0, first) : max(0, last)])
            position += len(memory)

        upload.write(base, 0, read, extent)
        for _, each in sums:
            each.finish()

    def _one(self, number: int) -> torch.UntypedStorage:
        """A storage that is compressed, or in memory: copied by itself."""
        each = self._wanted[number]
        [arena] = allocate([Window(-1, 0, each.nbytes, ())], huge_pages=self._options.engine.huge_pages is not False)
        for _, memory in arena.views():
            summed = [SumCheck(self._file_of(each.storage), item) for item in self._checked(number, 0)]
            for start, count in blocks(0, each.nbytes):
                part = memory[start : start + count]
                self._reader.read_into(each.storage, each.low + start, part)
                for sums in summed:
                    sums.update(part)
            for sums in summed:
                sums.finish()
        base = torch.frombuffer(arena.memory, dtype=torch.uint8).untyped_storage()
        made = base[arena.start : arena.start + each.nbytes]
        return made if self._devices[number] == "cpu" else _moved(made, self._devices[number])

    def _file_of(self, storage: Storage) -> File:
        assert storage.extent is not None
        return self._reader.files[storage.extent.file]

    # ---------------------------------------------------------------- the end

    def _finish(self, mapped: set[int]) -> None:
        made, check = self._set, self._options.check
        for number, each in enumerate(self._wanted):
            storage, meta = self._found[number], self._devices[number] == "meta"
            if each.storage.byteorder == "big" and not meta:
                _turn(storage, each)
            made._loaded.append((storage, each.low))
            for entry in each.entries:
                made._places[id(entry)] = number
            if (number in mapped or not check or not each.is_whole) and not meta and is_checkable(each.storage):
                made.unchecked += [entry.key for entry in each.entries]
        made.facts["mapped_nbytes"] = sum([self._wanted[number].nbytes for number in mapped])
        made.facts["nbytes"] = sum([each.nbytes for each in self._wanted])


def untyped(nbytes: int, device: str = "cpu") -> torch.UntypedStorage:
    """A storage of that many bytes, whatever they are. Raises ``StateDictError`` where the device has no room."""
    try:
        return torch.UntypedStorage(nbytes, device=device)  # type: ignore[no-untyped-call]
    except (RuntimeError, MemoryError) as error:
        raise StateDictError(f"there is no room for {nbytes:,} bytes on {device}: {one_line(error)}") from error


def _moved(storage: torch.UntypedStorage, device: str) -> torch.UntypedStorage:
    return as_bytes(storage).to(device).untyped_storage()


def _turn(storage: torch.UntypedStorage, wanted: _Wanted) -> None:
    """Turn big-endian bytes in place. Raises ``Unsupported`` where tensors of different element sizes see them."""
    sizes = {entry.dtype.swap for entry in wanted.entries}
    if len(sizes) > 1:
        hint = "Load them one by one: at=KEY"
        raise Unsupported("tensors of different dtypes share big-endian bytes", key=wanted.entries[0].key, hint=hint)
    size = sizes.pop()
    if size > 1:
        pairs = as_bytes(storage).view(-1, size)
        pairs.copy_(pairs.flip(1))
