"""torch's zip archives of every age are read as torch reads them, and only as far as they are asked for."""

from __future__ import annotations

import io
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import statedict
from statedict.errors import CorruptFile, StateDictError, UnknownFormat, Unsupported
from statedict.io.ranges import LocalFile

torch = pytest.importorskip("torch")

from saved_values import facts, found, packed, saved  # noqa: E402

Records = list[tuple[str, bytes]]


def state_dict() -> dict[str, Any]:
    """Fifteen storages, so that their names sort otherwise as texts than as numbers; one of them is empty."""
    state: dict[str, Any] = {"a": torch.arange(6.0).reshape(2, 3), "b": [torch.ones(3, dtype=torch.int16), 1]}
    state["c"] = torch.zeros(0)
    return state | {f"k{i}": torch.full((3,), float(i)) for i in range(12)}


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Records:
    """The records of a file of torch's, in its order, with names below the top folder ``m/``."""
    with zipfile.ZipFile(saved(state_dict(), tmp_path_factory.mktemp("base") / "m.pt")) as archive:
        return [(info.filename, archive.read(info)) for info in archive.infolist()]


def archive(records: Records, method: int = zipfile.ZIP_STORED, *, wide: bool = False) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as made:
        for name, data in records:
            info = zipfile.ZipInfo(name)
            info.compress_type = method
            with made.open(info, "w", force_zip64=wide) as entry:
                entry.write(data)
    return out.getvalue()


def without(records: Records, *names: str) -> Records:
    return [(name, data) for name, data in records if name.removeprefix("m/") not in names]


def under(prefix: str) -> Callable[[Records], bytes]:
    return lambda records: archive([(prefix + name.removeprefix("m/"), data) for name, data in records])


def swapped(records: Records) -> Records:
    """Every storage in the other byte order, and said so."""
    turned = []
    for name, data in records:
        size = 2 if name == "m/data/1" else 4
        if "/data/" in name:
            data = b"".join(data[i : i + size][::-1] for i in range(0, len(data), size))
        turned.append((name, b"big" if name == "m/byteorder" else data))
    return turned


def commented(records: Records) -> bytes:
    out = io.BytesIO(archive(records))
    with zipfile.ZipFile(out, "a") as made:
        made.comment = b"a comment with PK\x05\x06 in it"
    return out.getvalue()


def with_folders(records: Records) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as made:
        made.writestr("m/", b"")
        for name, data in records:
            made.writestr(name, data)
    return out.getvalue()


NEWER = ("byteorder", ".format_version", ".storage_alignment", ".data/serialization_id")
# What older and other writers made of the same records.
VARIANTS: dict[str, Callable[[Records], bytes]] = {
    "as zipfile writes it": archive,
    "deflated": lambda r: archive(r, zipfile.ZIP_DEFLATED),
    "64-bit sizes in small entries": lambda r: archive(r, wide=True),
    "sorted as texts": lambda r: archive(sorted(r, key=lambda each: (each[0] != "m/data.pkl", each[0]))),
    "version first": lambda r: archive(sorted(r, key=lambda each: each[0] != "m/version")),
    "torch 1.6: no newer records": lambda r: archive(without(r, *NEWER)),
    "version below .data": lambda r: archive([(name.replace("m/version", "m/.data/version"), d) for name, d in r]),
    "names in capitals": lambda r: archive([(name.replace("data/0", "DATA/0"), d) for name, d in r]),
    "big-endian": lambda r: archive(swapped(r)),
    "big-endian, not said: little": lambda r: archive(without(swapped(r), "byteorder")),
    "a comment behind the end": commented,
    "zeros behind the end": lambda r: archive(r) + bytes(100),
    "anything behind the end": lambda r: archive(r) + b"junk" * 100,
    "folders as entries": with_folders,
    "folder x": under("x/"),
    "folder that is no ASCII": under("é/"),
    "folder with a space": under("a b/"),
    "folder above": under("../"),
    "folder with a suffix": under("archive.pt/"),
    "folder that is a number": under("0/"),
    "folder named data": under("data/"),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_archive_is_read_as_torch_reads_it(variant: str, records: Records, tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    path.write_bytes(VARIANTS[variant](records))

    assert facts(torch.load(path, weights_only=True)) == found(path)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_protocol_that_torch_may_be_told_is_read(protocol: int, tmp_path: Path) -> None:
    path = saved(state_dict(), tmp_path / "m.pt", pickle_protocol=protocol)

    assert facts(torch.load(path, weights_only=False)) == found(path)


@pytest.fixture
def no_crc() -> Iterator[None]:
    from torch.serialization import get_crc32_options, set_crc32_options

    before = get_crc32_options()
    set_crc32_options(False)
    yield
    set_crc32_options(before)


def test_a_file_without_checksums_is_read_and_said(no_crc: None, tmp_path: Path) -> None:
    path = saved(state_dict(), tmp_path / "m.pt")
    with statedict.open(path) as checkpoint:
        codes = {note.code for note in checkpoint.manifest.notes}

    assert facts(state_dict()) == found(path)
    assert "no-crc" in codes


@pytest.mark.filterwarnings("ignore:ComplexHalf")
@pytest.mark.parametrize("name", ["float32", "complex64", "complex128", "int16", "float8_e5m2", "bool", "complex32"])
def test_big_endian_values_are_turned_for_every_width(name: str, tmp_path: Path) -> None:
    values = (torch.randn(6) + 2).to(getattr(torch, name))
    size = values.element_size() // (2 if values.is_complex() else 1)
    with zipfile.ZipFile(saved(values, tmp_path / "little.pt")) as file:
        parts = [(info.filename, file.read(info)) for info in file.infolist()]
    turned = []
    for entry, data in parts:
        if entry.endswith("/data/0"):
            data = b"".join(data[i : i + size][::-1] for i in range(0, len(data), size))
        turned.append((entry, b"big" if entry.endswith("byteorder") else data))
    (tmp_path / "big.pt").write_bytes(archive(turned))
    with statedict.open(tmp_path / "big.pt") as checkpoint:
        read = bytes(checkpoint[()].read()), bytes(checkpoint[()].numpy().tobytes())

    assert (packed(values),) * 2 == read


def sparse_archive(path: Path, nbytes: int) -> None:
    """An archive of more than 4 GiB, of which the disk holds a few KiB: a hole as one storage, and one behind it.

    Written by hand after APPNOTE.TXT 4.3, because ``zipfile`` would write the zeros.
    """
    state = {"hole": torch.zeros(2), "behind": torch.arange(3.0)}
    with zipfile.ZipFile(saved(state, path)) as small:
        parts = {info.filename.partition("/")[2]: small.read(info) for info in small.infolist()}
    # A numel of 2 becomes the hole's: BININT1 2 becomes LONG1.
    pickle = parts["data.pkl"].replace(b"K\x02tq", b"\x8a\x05" + (nbytes // 4).to_bytes(5, "little") + b"tq", 1)
    pickle = pickle.replace(b"K\x02\x85q", b"\x8a\x05" + (nbytes // 4).to_bytes(5, "little") + b"\x85q", 1)
    central = b""
    with path.open("wb") as out:
        for name in ("data.pkl", "data/0", "data/1", "version"):
            data = pickle if name == "data.pkl" else parts[name]
            size = nbytes if name == "data/0" else len(data)
            entry, offset = f"m/{name}".encode(), out.tell()
            sizes = struct.pack("<HHQQ", 1, 16, size, size)
            wide = 0xFFFFFFFF
            head = struct.pack("<4s5H3I2H", b"PK\x03\x04", 45, 0, 0, 0, 0, 0, wide, wide, len(entry), len(sizes))
            out.write(head + entry + sizes)
            if name == "data/0":
                out.seek(nbytes, io.SEEK_CUR)
            else:
                out.write(data)
            extra = struct.pack("<HHQQQ", 1, 24, size, size, offset)
            fields = (b"PK\x01\x02", 45, 45, 0, 0, 0, 0, 0, wide, wide, len(entry), len(extra), 0, 0, 0, 0, wide)
            central += struct.pack("<4s6H3I5H2I", *fields) + entry + extra
        start = out.tell()
        ends = struct.pack("<4sQ2H2I4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, 4, 4, len(central), start)
        locator = struct.pack("<4sIQI", b"PK\x06\x07", 0, start + len(central), 1)
        out.write(central + ends + locator + struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, 4, 4, wide, wide, 0))


def test_offsets_beyond_4_gib_are_followed(tmp_path: Path) -> None:
    nbytes = (4 << 30) + 4096
    sparse_archive(tmp_path / "m.pt", nbytes)
    expected = torch.load(tmp_path / "m.pt", mmap=True, weights_only=True)
    with statedict.open(tmp_path / "m.pt") as checkpoint:
        hole = checkpoint["hole"]

        assert expected["behind"].tolist() == checkpoint["behind"].numpy().tolist()
        assert (nbytes, tuple(expected["hole"].shape)) == (hole.nbytes, hole.shape)
        assert [0.0, 0.0] == hole[-2:].numpy().tolist()


# ------------------------------------------------------------------------- refused

BAD: dict[str, tuple[Callable[[Records], bytes], type[StateDictError]]] = {
    "no folder": (lambda r: archive([(name.removeprefix("m/"), d) for name, d in r]), CorruptFile),
    "an entry outside the folder": (lambda r: archive([*r, ("evil/x", b"")]), CorruptFile),
    "two names that differ in case": (lambda r: archive([*r, ("m/DATA/0", b"other")]), CorruptFile),
    "a byte order that doesn't exist": (
        lambda r: archive([(name, b"middle" if name == "m/byteorder" else d) for name, d in r]),
        CorruptFile,
    ),
    "a storage missing": (lambda r: archive(without(r, "data/3")), CorruptFile),
    "a storage too short": (lambda r: archive([(n, d[:-1] if n == "m/data/3" else d) for n, d in r]), CorruptFile),
    "a storage too long": (lambda r: archive([(n, d + b"x" if n == "m/data/3" else d) for n, d in r]), CorruptFile),
    "no data.pkl": (lambda r: archive(without(r, "data.pkl")), CorruptFile),
    "an unknown compression": (lambda r: archive(r, zipfile.ZIP_BZIP2), Unsupported),
    "empty": (lambda r: archive([]), UnknownFormat),
    "something before the beginning": (lambda r: b"xx" + archive(r), UnknownFormat),
    "too much behind the end": (lambda r: archive(r) + bytes(70_000), CorruptFile),
}


@pytest.mark.parametrize("defect", BAD)
def test_an_ambiguous_or_damaged_archive_is_refused(defect: str, records: Records, tmp_path: Path) -> None:
    make, kind = BAD[defect]
    path = tmp_path / "m.pt"
    path.write_bytes(make(records))
    with pytest.raises(kind) as caught:
        statedict.open(path)

    assert str(caught.value).startswith(f"{path}") and "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_two_entries_of_one_name_are_refused(records: Records, tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    path.write_bytes(archive([*records, ("m/data/0", bytes(24))]))

    with pytest.raises(CorruptFile, match="both named"):
        statedict.open(path)


def test_a_flipped_bit_in_the_pickle_of_an_archive_is_refused(tmp_path: Path) -> None:
    path = saved({"epoch": 3, "w": torch.ones(2)}, tmp_path / "m.pt")
    data = bytearray(path.read_bytes())
    data[data.index(b"epoch")] ^= 1
    path.write_bytes(data)

    with pytest.raises(CorruptFile, match=r"entry 'm/data.pkl' isn't as it was written: its CRC-32 differs"):
        statedict.open(path)


def test_an_archive_without_a_version_is_read_and_said(records: Records, tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    path.write_bytes(archive(without(records, "version")))
    with statedict.open(path) as checkpoint:
        codes = {note.code for note in checkpoint.manifest.notes}

    assert facts(state_dict()) == found(path)
    assert "no-version" in codes


def test_an_archive_cut_anywhere_is_refused(tmp_path: Path) -> None:
    whole = saved({"a": torch.arange(3.0)}, tmp_path / "whole.pt").read_bytes()
    path = tmp_path / "cut.pt"
    opened = []
    for nbytes in range(0, len(whole), 7):
        path.write_bytes(whole[:nbytes])
        try:
            statedict.open(path).close()
            opened.append(nbytes)
        except StateDictError:
            continue

    assert [] == opened


# ------------------------------------------------------------------------- how much is read


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Every range that is read of a file, as (offset, bytes)."""
    ranges: list[tuple[int, int]] = []
    read, read_into = LocalFile.read, LocalFile.read_into

    def counted_read(self: LocalFile, offset: int, nbytes: int) -> bytes:
        ranges.append((offset, nbytes))
        return read(self, offset, nbytes)

    def counted_read_into(self: LocalFile, offset: int, buffer: memoryview) -> None:
        ranges.append((offset, len(buffer)))
        read_into(self, offset, buffer)

    monkeypatch.setattr(LocalFile, "read", counted_read)
    monkeypatch.setattr(LocalFile, "read_into", counted_read_into)
    return ranges


def test_opening_reads_the_header_and_no_tensor(reads: list[tuple[int, int]], tmp_path: Path) -> None:
    path = saved({f"k{i}": torch.zeros(1 << 18) for i in range(8)}, tmp_path / "m.pt")
    statedict.open(path).close()

    assert sum(nbytes for _, nbytes in reads) < 100_000 < path.stat().st_size


def test_rows_of_a_packed_tensor_are_read_alone(reads: list[tuple[int, int]], tmp_path: Path) -> None:
    values = torch.arange(100_000.0).reshape(1000, 100)
    with statedict.open(saved({"a": values}, tmp_path / "m.pt")) as checkpoint:
        reads.clear()
        rows = checkpoint["a"][10:20].numpy()

    assert values[10:20].tolist() == rows.tolist()
    assert 10 * 100 * 4 == sum(nbytes for _, nbytes in reads)


def test_a_strided_part_reads_the_smallest_range_that_covers_it(reads: list[tuple[int, int]], tmp_path: Path) -> None:
    values = torch.arange(100_000.0).reshape(1000, 100)
    with statedict.open(saved({"a": values.t()}, tmp_path / "m.pt")) as checkpoint:
        reads.clear()
        part = checkpoint["a"][10:20, 30:40].numpy()

    assert values.t()[10:20, 30:40].tolist() == part.tolist()
    # From element (10, 30) to element (19, 39) of the transposed view: nine rows of the base, and ten of its elements.
    assert (9 * 100 + 10) * 4 == sum(nbytes for _, nbytes in reads)


def test_one_element_reads_its_bytes_alone(reads: list[tuple[int, int]], tmp_path: Path) -> None:
    values = torch.arange(100_000, dtype=torch.float64)
    with statedict.open(saved({"a": values}, tmp_path / "m.pt")) as checkpoint:
        reads.clear()
        one = checkpoint["a"][777].numpy()

    assert (777.0, [8]) == (float(one), [nbytes for _, nbytes in reads])
