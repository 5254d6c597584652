"""Digests and CRCs of storages, compared with those that their file records."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from statedict.errors import CorruptFile
from statedict.io.crc import crc32
from statedict.io.ranges import File
from statedict.manifest import Storage, TensorEntry

__all__ = ["Checked", "SumCheck", "check_all", "is_checkable"]

_DAMAGED = "The file is damaged: download or copy it again. check=False loads it as it is"


class Checked(NamedTuple):
    """A storage whose bytes are read, and where they are in the job's memory."""

    storage: Storage
    start: int
    entry: TensorEntry  # a tensor that it belongs to, for the message


def is_checkable(storage: Storage) -> bool:
    """Whether the file records a digest or a CRC of this storage."""
    return storage.digest is not None or storage.crc is not None


class _Sum(Protocol):
    def update(self, data: memoryview) -> None:
        """Take in the next bytes."""

    def matches(self) -> bool:
        """Whether the sum is the one that the file records."""


class _Digest:
    def __init__(self, storage: Storage) -> None:
        from xxhash import xxh3_128

        self._expected = storage.digest
        self._state = xxh3_128()
        self.update = self._state.update

    def matches(self) -> bool:
        return f"xxh3-128:{self._state.hexdigest()}" == self._expected


class _Crc:
    def __init__(self, storage: Storage) -> None:
        self._expected = storage.crc
        self._state = 0

    def update(self, data: memoryview) -> None:
        self._state = crc32(data, self._state)

    def matches(self) -> bool:
        return self._state == self._expected


class SumCheck:
    """The sum of one storage, taken in piece by piece: the digest where the file has one, else the CRC."""

    def __init__(self, file: File, item: Checked) -> None:
        self._file = file
        self._item = item
        self._sum: _Sum = _Digest(item.storage) if item.storage.digest is not None else _Crc(item.storage)

    def update(self, data: memoryview) -> None:
        """Take in the next bytes."""
        self._sum.update(data)

    def finish(self) -> None:
        """Raise ``CorruptFile`` if the sum isn't the one that the file records."""
        if not self._sum.matches():
            raise _differs(self._file, self._item)


def _differs(file: File, item: Checked) -> CorruptFile:
    storage = item.storage
    kind = "digest" if storage.digest is not None else "CRC-32"
    return CorruptFile(
        f"the bytes of storage '{storage.name}' are not those that were written: their {kind} differs",
        path=file.path,
        key=item.entry.key,
        offset=storage.extent.offset if storage.extent is not None else None,
        hint=_DAMAGED,
    )


def check_all(file: File, memory: memoryview, checked: Sequence[Checked]) -> None:
    """Compare the sums of storages that lie in this memory, of which there may be 2,000 of 1 KiB. Raises ``CorruptFile``."""
    from xxhash import xxh3_128_hexdigest

    for item in checked:
        storage = item.storage
        data = memory[item.start : item.start + storage.nbytes]
        if storage.digest is not None:
            good = storage.digest == f"xxh3-128:{xxh3_128_hexdigest(data)}"
        else:
            good = storage.crc == crc32(data)
        if not good:
            raise _differs(file, item)
