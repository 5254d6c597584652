"""The directory of a zip archive, read as torch reads it and refused where two readers would differ.

    [local header · name · extra · bytes · (data descriptor)]…  [central directory]  [EOCD64 · locator]  EOCD · comment

The central directory decides; a local header only says where the bytes of its entry begin. Source of every field:
PKWARE APPNOTE.TXT 6.3.10, sections 4.3 and 4.4; what torch accepts: ``caffe2/serialize/inline_container.cc``.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from typing import NamedTuple

from statedict.errors import CorruptFile, Unsupported
from statedict.io.crc import crc32
from statedict.io.ranges import File, read_many
from statedict.limits import DEFAULT_LIMITS, Limits
from statedict.manifest import Extent

__all__ = [
    "CENTRAL",
    "DEFLATED",
    "END",
    "END64",
    "LOCAL",
    "LOCATOR64",
    "STORED",
    "ZipDirectory",
    "ZipEntry",
    "data_offset",
    "data_offsets",
    "extent",
    "read_directory",
    "read_entry",
]

STORED, DEFLATED = 0, 8
# The fixed parts of the records (APPNOTE 4.3.12, 4.3.7, 4.3.16, 4.3.14, 4.3.15), each beginning with its magic.
CENTRAL = struct.Struct("<4s6H3I5H2I")
LOCAL = struct.Struct("<4s5H3I2H")
END = struct.Struct("<4s4H2IH")
END64 = struct.Struct("<4sQ2H2I4Q")
LOCATOR64 = struct.Struct("<4sIQI")
# DEFLATE can't make more of a byte than this (RFC 1951: 258 bytes from two codes of one bit each).
_MOST_RATIO = 1032
_CUT = "The file was cut short or damaged: download or copy it again"


class ZipEntry(NamedTuple):
    """One entry, as the central directory has it."""

    name: str
    method: int  # STORED or DEFLATED
    flags: int
    crc: int  # CRC-32 of the unwrapped bytes; 0 also means that none was computed
    packed_nbytes: int  # bytes in the file
    nbytes: int  # bytes unwrapped
    header_offset: int  # bytes from the start of the file to the local header


class ZipDirectory(NamedTuple):
    """All entries in the order of the central directory, and where that begins (bytes)."""

    entries: list[ZipEntry]
    offset: int


def read_directory(file: File, limits: Limits = DEFAULT_LIMITS, *, fold: bool = True) -> ZipDirectory:
    """The entries of the archive that the file is.

    Reads the last 64 KiB and the central directory. Raises ``CorruptFile`` for a damaged or ambiguous one (names that
    two readers would resolve differently, entries that overlap), ``Unsupported`` for encryption and odd compression.
    With ``fold``, names that differ in case alone count as one, as they do in torch.
    """
    offset, nbytes, count = _locate(file)
    if count > nbytes // CENTRAL.size:
        raise CorruptFile(
            "the zip directory claims more entries than it has room for", path=file.path, offset=offset, found=count
        )
    limits.check("nodes", count, "too many entries in the zip directory", path=file.path)
    limits.check("header_bytes", nbytes, "the zip directory is too long", path=file.path)
    data = file.read(offset, nbytes)
    entries: list[ZipEntry] = []
    pos = 0
    try:
        for _ in range(count):
            entry, pos = _entry(data, pos)
            entries.append(entry)
    except (struct.error, IndexError, UnicodeDecodeError) as error:
        raise CorruptFile("the zip directory is damaged", path=file.path, offset=offset + pos, hint=_CUT) from error
    _check(file, entries, offset, fold)
    return ZipDirectory(entries, offset)


def _locate(file: File) -> tuple[int, int, int]:
    """Offset, length and number of entries of the central directory."""
    start = max(0, file.nbytes - 65536 - END.size - 64)
    tail = file.read(start, file.nbytes - start)
    at = tail.rfind(b"PK\x05\x06")
    while at >= 0 and (at + END.size > len(tail) or at + END.size + tail[at + 20] + tail[at + 21] * 256 > len(tail)):
        at = tail.rfind(b"PK\x05\x06", 0, at)
    if at < 0:
        raise CorruptFile("the zip archive has no end record", path=file.path, offset=file.nbytes, hint=_CUT)
    _, _, _, _, count, nbytes, offset, _ = END.unpack_from(tail, at)
    if at >= LOCATOR64.size and tail[at - LOCATOR64.size : at - LOCATOR64.size + 4] == b"PK\x06\x07":
        _, _, end64, _ = LOCATOR64.unpack_from(tail, at - LOCATOR64.size)
        count, nbytes, offset = _resolve64(file, end64, (count, nbytes, offset))
    if offset + nbytes > start + at:
        raise CorruptFile("the zip directory lies outside the file", path=file.path, offset=offset, hint=_CUT)
    return offset, nbytes, count


def _resolve64(file: File, end64: int, short: tuple[int, int, int]) -> tuple[int, int, int]:
    """The 64-bit end record's values, once they agree with the short one's wherever that has room for them."""
    raw = file.read(end64, END64.size)
    magic, _, _, _, _, _, _, count, nbytes, offset = END64.unpack(raw)
    if magic != b"PK\x06\x06":
        raise CorruptFile("the zip archive's 64-bit end record is missing", path=file.path, offset=end64, hint=_CUT)
    for value, long, full in zip(short, (count, nbytes, offset), (0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF)):
        if value not in (long, full):
            raise CorruptFile(
                "the zip archive's two end records disagree", path=file.path, offset=end64, expected=value, found=long
            )
    return count, nbytes, offset


def _entry(data: bytes, pos: int) -> tuple[ZipEntry, int]:
    (magic, _, _, flags, method, _, _, crc, packed, nbytes, n_name, n_extra, n_comment, _, _, _, offset) = (
        CENTRAL.unpack_from(data, pos)
    )
    if magic != b"PK\x01\x02":
        raise IndexError("no entry here")
    first = pos + CENTRAL.size
    name = data[first : first + n_name].decode("utf-8" if flags & 0x800 else "cp437")
    if nbytes == 0xFFFFFFFF or packed == 0xFFFFFFFF or offset == 0xFFFFFFFF:
        extra = data[first + n_name : first + n_name + n_extra]
        nbytes, packed, offset = _extra64(extra, (nbytes, packed, offset))
    return ZipEntry(name, method, flags, crc, packed, nbytes, offset), first + n_name + n_extra + n_comment


def _extra64(extra: bytes, values: tuple[int, int, int]) -> tuple[int, int, int]:
    """The sizes and offset, with those that didn't fit taken from the ZIP64 field (id 1, in that order)."""
    pos = 0
    while pos + 4 <= len(extra):
        field, length = struct.unpack_from("<HH", extra, pos)
        if field == 1:
            at = pos + 4
            out = []
            for value in values:
                if value == 0xFFFFFFFF:
                    (value,) = struct.unpack_from("<Q", extra, at)
                    at += 8
                out.append(value)
            return out[0], out[1], out[2]
        pos += 4 + length
    return values


def _check(file: File, entries: list[ZipEntry], directory: int, fold: bool) -> None:
    names: set[str] = set()
    for entry in entries:
        name = entry.name.lower() if fold else entry.name
        if name in names:
            raise CorruptFile(
                f"two entries of the zip archive are both named '{entry.name}'",
                path=file.path,
                offset=entry.header_offset,
            )
        names.add(name)
        if entry.method == DEFLATED:
            if entry.nbytes > _MOST_RATIO * entry.packed_nbytes + 64:
                raise CorruptFile(
                    f"entry '{entry.name}' claims to expand further than DEFLATE can",
                    path=file.path,
                    offset=entry.header_offset,
                    expected=f"at most {_MOST_RATIO * entry.packed_nbytes} bytes",
                    found=entry.nbytes,
                )
        elif entry.method == STORED and entry.packed_nbytes != entry.nbytes:
            raise CorruptFile(f"entry '{entry.name}' has two sizes", path=file.path, offset=entry.header_offset)
    last = 0
    for entry in sorted(entries, key=lambda e: e.header_offset):
        if entry.header_offset < last:
            raise CorruptFile(
                f"entry '{entry.name}' overlaps the one before it", path=file.path, offset=entry.header_offset
            )
        last = entry.header_offset + LOCAL.size + entry.packed_nbytes
    if last > directory:
        raise CorruptFile("the last entry runs into the zip directory", path=file.path, offset=directory, hint=_CUT)


def data_offset(file: File, entry: ZipEntry) -> int:
    """Bytes from the start of the file to the first byte of the entry."""
    return data_offsets(file, [entry])[0]


def data_offsets(file: File, entries: Sequence[ZipEntry]) -> list[int]:
    """The same for many entries; reads their local headers together."""
    names = [entry.name.encode("utf-8" if entry.flags & 0x800 else "cp437") for entry in entries]
    heads = read_many(file, [(entry.header_offset, LOCAL.size + len(name)) for entry, name in zip(entries, names)])
    out: list[int] = []
    unpack = LOCAL.unpack_from
    for entry, name, head in zip(entries, names, heads):
        magic, _, flags, method, _, _, _, _, _, n_name, n_extra = unpack(head)
        if magic != b"PK\x03\x04" or head[LOCAL.size :] != name or n_name != len(name) or method != entry.method:
            raise CorruptFile(
                f"the local header of entry '{entry.name}' is not what the zip directory says",
                path=file.path,
                offset=entry.header_offset,
                hint=_CUT,
            )
        if (flags | entry.flags) & 1:
            raise Unsupported(
                f"entry '{entry.name}' is encrypted", path=file.path, hint="Unpack the archive with its password first"
            )
        if method not in (STORED, DEFLATED):
            raise Unsupported(
                f"entry '{entry.name}' is compressed by method {method}",
                path=file.path,
                hint="Pack it again with deflate or without compression",
            )
        out.append(entry.header_offset + LOCAL.size + n_name + n_extra)
    return out


def extent(entry: ZipEntry, offset: int, file_index: int = 0) -> Extent:
    """The range of the entry's bytes; ``offset`` is where they begin."""
    return Extent(file_index, offset, entry.packed_nbytes, "deflate" if entry.method == DEFLATED else "raw")


def read_entry(file: File, entry: ZipEntry, limits: Limits = DEFAULT_LIMITS, *, limit: str = "header_bytes") -> bytes:
    """The unwrapped bytes of one entry, which the limit of that name bounds; its size and its CRC are checked.

    A CRC of 0 is one that the writer didn't compute (``torch.serialization.set_crc32_options(False)``).
    """
    limits.check(limit, entry.nbytes, f"entry '{entry.name}' is too long", path=file.path)
    offset = data_offset(file, entry)
    packed = file.read(offset, entry.packed_nbytes)
    if entry.method == STORED:
        return _checked(file, entry, packed)
    unwrap = zlib.decompressobj(-15)
    try:
        data = unwrap.decompress(packed, entry.nbytes + 1)
    except zlib.error as error:
        raise CorruptFile(
            f"entry '{entry.name}' can't be unpacked: {error}", path=file.path, offset=offset, hint=_CUT
        ) from error
    if len(data) != entry.nbytes:
        raise CorruptFile(
            f"entry '{entry.name}' unpacks to another size",
            path=file.path,
            offset=offset,
            expected=entry.nbytes,
            found=len(data),
        )
    return _checked(file, entry, data)


def _checked(file: File, entry: ZipEntry, data: bytes) -> bytes:
    if entry.crc and crc32(data) != entry.crc:
        what = f"entry '{entry.name}' isn't as it was written: its CRC-32 differs"
        raise CorruptFile(what, path=file.path, offset=entry.header_offset, hint=_CUT)
    return data
