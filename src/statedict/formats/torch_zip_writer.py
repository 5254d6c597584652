"""What a written ``.pth`` will be: the archive that ``torch.load(weights_only=True, mmap=True)`` reads, byte for byte laid out
as torch lays it out.

    data.pkl · .format_version · .storage_alignment · byteorder · data/0 … data/N · version · .statedict · .data/serialization_id

Every entry is stored, its bytes begin at a multiple of 64 by padding in the local header's extra field ``FB``, and a data
descriptor follows them (none after an empty one): with ``.format_version`` 1, torch may compute where a storage lies from
just that. Its sizes and sum are zero in the local header, as torch's writer leaves them. The 64-bit end record is always
there. ``.statedict`` is ours: the file's metadata and a digest for each storage, as JSON. Sources: torch 2.13
``serialization.py`` (``_save``, ``_get_offset``), ``caffe2/serialize/inline_container.cc`` (``getPadding``), miniz
``mz_zip_writer_add_mem_ex_v2``, PKWARE APPNOTE.TXT 6.3.10 section 4.3.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from typing import NamedTuple
from zlib import crc32

from statedict.formats.layout import lay_out
from statedict.formats.pickle_writer import PickleWriter
from statedict.formats.zips import CENTRAL, END, END64, LOCAL, LOCATOR64
from statedict.io.plans import Later, Literal, Payload, Segment, Source, Sum, WritePlan
from statedict.manifest import Finding, Node, TensorEntry
from statedict.nodes import every_tensor
from statedict.report.units import plural

__all__ = ["TorchZipWriter"]

_ALIGNMENT = 64
# The folder in the archive. torch names it after the file; one name for all gives the same bytes under every path.
_FOLDER = "archive"
_MOST_32 = 0xFFFFFFFF
# Names are UTF-8; sizes and CRC stand in a descriptor behind the bytes.
_UTF8, _DESCRIPTOR = 0x800, 0x008
# The digits that torch's own writer gives the record: 20 of a hash of the names, 20 of a sum of the contents.
_ID_DIGITS = 40


class _Entry(NamedTuple):
    """One entry of the archive: where its local header begins, and the CRC-32 of its bytes where that is known."""

    name: bytes
    nbytes: int
    offset: int
    crc: int | None

    @property
    def record(self) -> str:
        """Its name below the archive's folder."""
        return self.name.partition(b"/")[2].decode("utf-8")

    @property
    def is_long(self) -> bool:
        """Whether its numbers need 64 bits."""
        return self.nbytes >= _MOST_32 or self.offset >= _MOST_32

    @property
    def flags(self) -> int:
        return _UTF8 | (_DESCRIPTOR if self.nbytes else 0)

    def crc_of(self, sums: Mapping[str, Sum]) -> int:
        """The CRC-32, of a storage once its bytes were copied."""
        if self.crc is not None:
            return self.crc
        crc = sums[self.record].crc
        assert crc is not None
        return crc


class TorchZipWriter:
    """The plan of one file. After ``plan``: ``notes`` are findings about what is written in another form."""

    def __init__(self, root: Node, metadata: Mapping[str, str], *, digests: bool, keep_storages: bool = False) -> None:
        self.notes: list[Finding] = []
        self._root = root
        self._metadata = dict(metadata)
        self._digests = digests
        self._keep_storages = keep_storages
        self._segments: list[Segment] = []
        self._entries: list[_Entry] = []
        self._position = 0
        # What gives the bytes of the records that depend on the storages, by name.
        self._late: dict[str, Callable[[Mapping[str, Sum]], bytes]] = {}

    def plan(self, source_of: Callable[[TensorEntry], Source]) -> WritePlan:
        """The file as segments.

        Raises ``UnsafeContent`` and ``Unsupported`` as ``PickleWriter`` does, for leaves that torch's weights-only reader
        doesn't take.
        """
        tensors = every_tensor(self._root)
        layout = lay_out(tensors, keep_storages=self._keep_storages)
        pickle = PickleWriter(layout).write(self._root)
        self._say(tensors)
        for name, data in (
            ("data.pkl", pickle),
            (".format_version", b"1"),
            (".storage_alignment", b"%d" % _ALIGNMENT),
            ("byteorder", b"little"),
        ):
            self._literal(name, data)
        for number, target in enumerate(layout.targets):
            self._storage(f"data/{number}", target.nbytes, source_of(target.entry))
        self._literal("version", b"3\n")
        self._own_record(len(layout.targets))
        self._serialization_id()
        self._directory()
        return WritePlan("torch-zip", self._segments)

    def _say(self, tensors: list[TensorEntry]) -> None:
        arrays = tuple(entry.key for entry in tensors if entry.kind == "ndarray")
        if arrays:
            what = (
                f"{plural(len(arrays), 'numpy array')} written as a tensor: torch's weights-only reader takes no arrays"
            )
            self.notes.append(Finding("arrays-as-tensors", "info", what, arrays))

    # ---------------------------------------------------------------- entries

    def _header(self, name: str, nbytes: int, crc: int | None) -> _Entry:
        """The local header, padded so that the bytes behind it are aligned."""
        entry = _Entry(f"{_FOLDER}/{name}".encode(), nbytes, self._position, crc)
        extra = _extra64(entry)
        start = entry.offset + LOCAL.size + len(entry.name) + len(extra) + 4
        padding = -start % _ALIGNMENT
        extra += b"FB" + padding.to_bytes(2, "little") + b"Z" * padding
        local = LOCAL.pack(b"PK\x03\x04", 0, entry.flags, 0, 0, 0, 0, 0, 0, len(entry.name), len(extra))
        self._add(Literal(local + entry.name + extra))
        self._entries.append(entry)
        return entry

    def _add(self, segment: Segment) -> None:
        last = self._segments[-1] if self._segments else None
        if isinstance(segment, Literal) and isinstance(last, Literal):
            self._segments[-1] = Literal(last.data + segment.data)
        else:
            self._segments.append(segment)
        self._position += segment.nbytes

    def _literal(self, name: str, data: bytes) -> None:
        entry = self._header(name, len(data), crc32(data))
        self._add(Literal(data))
        if data:
            self._add(Literal(_descriptor(entry, crc32(data))))

    def _storage(self, name: str, nbytes: int, source: Source) -> None:
        entry = self._header(name, nbytes, None)
        self._add(Payload(name, nbytes, source, self._digests, True))
        if nbytes:
            size = len(_descriptor(entry, 0))
            self._add(Later(size, lambda sums: _descriptor(entry, entry.crc_of(sums)), (name,)))

    def _late_record(self, name: str, nbytes: int, render: Callable[[Mapping[str, Sum]], bytes]) -> None:
        """An entry whose bytes, and so its CRC, are known when all storages were copied."""
        entry = self._header(name, nbytes, None)
        size = len(_descriptor(entry, 0))

        def rendered(sums: Mapping[str, Sum]) -> bytes:
            data = render(sums)
            return data + _descriptor(entry, crc32(data))

        self._add(Later(nbytes + size, rendered))
        self._late[name] = render

    # ---------------------------------------------------------------- records that depend on the storages

    def _own_record(self, storages: int) -> None:
        if not self._metadata and not self._digests:
            return
        facts: dict[str, object] = {"version": 1}
        if self._metadata:
            facts["metadata"] = self._metadata
        head = json.dumps(facts, separators=(",", ":"))[:-1].encode("ascii")
        if not self._digests:
            self._literal(".statedict", head + b"}")
            return
        names = [f"data/{number}" for number in range(storages)]

        def render(sums: Mapping[str, Sum]) -> bytes:
            digests = "".join([str(sums[name].digest).removeprefix("xxh3-128:") for name in names])
            return head + b',"digests":"' + digests.encode("ascii") + b'"}'

        self._late_record(".statedict", len(head) + len(b',"digests":""}') + 32 * storages, render)

    def _serialization_id(self) -> None:
        """Names the content: the same tree gives the same digits."""
        names = b"\n".join([entry.name for entry in self._entries])
        first = crc32(names) << 32 | len(names)
        known = [entry for entry in self._entries if entry.record not in self._late]

        def render(sums: Mapping[str, Sum]) -> bytes:
            second = crc32(b"".join([entry.crc_of(sums).to_bytes(4, "little") for entry in known]))
            return f"{first % 10**20:020d}{second % 10**20:020d}".encode("ascii")

        self._late_record(".data/serialization_id", _ID_DIGITS, render)

    def _directory(self) -> None:
        entries = self._entries
        late = self._late
        start = self._position
        size = sum(CENTRAL.size + len(entry.name) + len(_extra64(entry)) for entry in entries)
        end64 = start + size
        tail = END64.pack(b"PK\x06\x06", END64.size - 12, 45, 45, 0, 0, len(entries), len(entries), size, start)
        tail += LOCATOR64.pack(b"PK\x06\x07", 0, end64, 1)
        count = min(len(entries), 0xFFFF)
        tail += END.pack(b"PK\x05\x06", 0, 0, count, count, min(size, _MOST_32), min(start, _MOST_32), 0)

        def render(sums: Mapping[str, Sum]) -> bytes:
            pieces = []
            for entry in entries:
                render_one = late.get(entry.record)
                pieces.append(_central(entry, entry.crc_of(sums) if render_one is None else crc32(render_one(sums))))
            return b"".join(pieces) + tail

        self._add(Later(size + len(tail), render))


def _extra64(entry: _Entry) -> bytes:
    """The ZIP64 field of an entry: its sizes if they need 64 bits, its offset if that does; none if neither."""
    if not entry.is_long:
        return b""
    numbers = [entry.nbytes, entry.nbytes] if entry.nbytes >= _MOST_32 else []
    numbers += [entry.offset] if entry.offset >= _MOST_32 else []
    return struct.pack(f"<HH{len(numbers)}Q", 1, 8 * len(numbers), *numbers)


def _descriptor(entry: _Entry, crc: int) -> bytes:
    """What follows the bytes of an entry: CRC and sizes, in 64 bits where the entry is long."""
    return struct.pack("<4sIQQ" if entry.is_long else "<4sIII", b"PK\x07\x08", crc, entry.nbytes, entry.nbytes)


def _central(entry: _Entry, crc: int) -> bytes:
    extra = _extra64(entry)
    nbytes, offset = min(entry.nbytes, _MOST_32), min(entry.offset, _MOST_32)
    needed = 45 if extra else 0
    head = CENTRAL.pack(
        b"PK\x01\x02", 0, needed, entry.flags, 0, 0, 0, crc, nbytes, nbytes, len(entry.name), len(extra), 0, 0, 0, 0, offset
    )  # fmt: skip
    return head + entry.name + extra
