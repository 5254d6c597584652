"""The unwrapped bytes of storages by range, whatever they are wrapped in and wherever they lie."""

from __future__ import annotations

import threading
import zlib
from collections.abc import Sequence

from statedict.errors import CorruptFile
from statedict.io.ranges import BLOCK_NBYTES, File
from statedict.manifest import Extent, Storage

__all__ = ["StorageReader"]


class StorageReader:
    """Reads storages of the files of one manifest. Safe to use from several threads."""

    def __init__(self, files: Sequence[File]) -> None:
        self.files = files
        self._lock = threading.Lock()
        # The last compressed storage that was read from, and where in it: the next range is usually the next bytes.
        self._inflater: tuple[int, _Inflater] | None = None

    def read(self, storage: Storage, offset: int, nbytes: int) -> bytes | memoryview:
        """That range of the storage's bytes; a view of memory where they are in memory, else a copy."""
        if storage.data is not None:
            return memoryview(storage.data)[offset : offset + nbytes]
        extent = storage.extent
        if extent is not None and extent.codec == "raw":
            return self.files[extent.file].read(extent.offset + offset, nbytes)
        buffer = bytearray(nbytes)
        self.read_into(storage, offset, memoryview(buffer))
        return memoryview(buffer)

    def read_into(self, storage: Storage, offset: int, buffer: memoryview) -> None:
        """Fill the buffer (of bytes) with the storage's bytes from that offset.

        Raises ``CorruptFile`` where the file ends first, or its compressed bytes can't be unwrapped.
        """
        extent = storage.extent
        if storage.data is not None:
            buffer[:] = memoryview(storage.data)[offset : offset + len(buffer)]
        elif extent is None:
            raise CorruptFile(f"storage '{storage.name}' has no bytes")
        elif extent.codec == "raw":
            self.files[extent.file].read_into(extent.offset + offset, buffer)
        else:
            with self._lock:
                self._inflate(storage, extent, offset, buffer)

    def _inflate(self, storage: Storage, extent: Extent, offset: int, buffer: memoryview) -> None:
        kept = self._inflater
        if kept is None or kept[0] != storage.id or kept[1].position > offset:
            kept = (storage.id, _Inflater(self.files[extent.file], extent, storage))
        self._inflater = None
        kept[1].skip_to(offset)
        kept[1].read_into(buffer)
        self._inflater = kept


class _Inflater:
    """A DEFLATE stream that is read forwards, in bounded memory."""

    def __init__(self, file: File, extent: Extent, storage: Storage) -> None:
        self.position = 0  # unwrapped bytes given so far
        self._file = file
        self._extent = extent
        self._storage = storage
        self._offset = 0  # wrapped bytes taken so far
        self._stream = zlib.decompressobj(-15)

    def skip_to(self, offset: int) -> None:
        """Unwrap and forget everything before that offset."""
        while self.position < offset:
            self._next(min(BLOCK_NBYTES, offset - self.position))

    def read_into(self, buffer: memoryview) -> None:
        """Fill the buffer with the next bytes."""
        done = 0
        while done < len(buffer):
            data = self._next(min(BLOCK_NBYTES, len(buffer) - done))
            buffer[done : done + len(data)] = data
            done += len(data)

    def _next(self, most: int) -> bytes:
        """At least one and at most that many of the next bytes."""
        extent = self._extent
        while True:
            pending = self._stream.unconsumed_tail
            if not pending and not self._stream.eof:
                count = min(256 * 1024, extent.nbytes - self._offset)
                pending = self._file.read(extent.offset + self._offset, count)
                self._offset += count
            try:
                data = self._stream.decompress(pending, most)
            except zlib.error as error:
                raise self._bad(f"can't be unpacked: {error}") from error
            if data:
                self.position += len(data)
                return data
            if self._stream.eof or (not pending and self._offset == extent.nbytes):
                raise self._bad("unpacks to fewer bytes than it should")

    def _bad(self, what: str) -> CorruptFile:
        return CorruptFile(
            f"storage '{self._storage.name}' {what}",
            path=self._file.path,
            offset=self._extent.offset,
            expected=f"{self._storage.nbytes} bytes",
            found=self.position,
            hint="The file is damaged: download or copy it again",
        )
