"""Tar archives of torch before 0.1.10, which torch reads only by running their pickles, are read without that."""

from __future__ import annotations

import io
import pickle
import struct
import tarfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest

import statedict
from statedict.errors import CorruptFile, StateDictError, UnknownFormat

torch = pytest.importorskip("torch")

from saved_values import facts, found, found_sharing, sharing  # noqa: E402

# (key, storage key, sizes, strides, offset) of each tensor
Tensors = list[tuple[int, int, tuple[int, ...], tuple[int, ...], int]]


def storage(key: int, kind: str, raw: bytes, size: int, device: str = "cpu") -> bytes:
    described = pickle.dumps((key, device, getattr(torch, kind)), protocol=2)
    return described + struct.pack("<q", len(raw) // size) + raw


def storages_member(storages: list[bytes], views: list[tuple[int, int, int, int]] | None = None) -> bytes:
    return pickle.dumps(len(storages), protocol=2) + b"".join(storages) + pickle.dumps(views or [], protocol=2)


def tensors_member(tensors: Tensors) -> bytes:
    out = pickle.dumps(len(tensors), protocol=2)
    for key, storage_key, sizes, strides, offset in tensors:
        out += pickle.dumps((key, storage_key, torch.FloatTensor), protocol=2)
        out += struct.pack("<i4x", len(sizes))
        out += struct.pack(f"<{2 * len(sizes) + 1}q", *sizes, *strides, offset)
    return out


class Place:
    """Stands in a value for the tensor of that key."""

    def __init__(self, key: int) -> None:
        self.key = key


class Class:
    """Stands for a class of modules with its source, as torch wrote it."""


class Pickler(pickle._Pickler):  # type: ignore[name-defined, misc]
    def persistent_id(self, value: Any) -> object:
        if isinstance(value, Place):
            return str(value.key)
        if value is Class:
            return torch.nn.Linear, "", ""
        return None


def pickle_member(value: object) -> bytes:
    out = io.BytesIO()
    Pickler(out, protocol=2).dump(value)
    return out.getvalue()


def archive(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as out:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            out.addfile(info, io.BytesIO(data))
    return path


SIX = struct.pack("<6f", *range(6))
LONGS = struct.pack("<3q", 1, -2, 2**40)
STORAGES = [storage(10, "FloatStorage", SIX, 4), storage(11, "LongStorage", LONGS, 8)]
TENSORS: Tensors = [
    (1, 10, (2, 3), (3, 1), 0),
    (2, 10, (3, 2), (1, 3), 0),
    (3, 11, (3,), (1,), 0),
    (4, 12, (2,), (1,), 1),
    (5, 10, (), (), 4),
]
VIEWS = [(12, 10, 2, 3)]
VALUE = OrderedDict(a=Place(1), t=Place(2), longs=Place(3), view=Place(4), again=Place(1), nested={"n": [Place(5), 3]})
MEMBERS = {
    "sys_info": pickle.dumps({"protocol_version": 1000}, protocol=2),
    "storages": storages_member(STORAGES, VIEWS),
    "tensors": tensors_member(TENSORS),
    "pickle": pickle_member(VALUE),
}


def test_an_archive_is_read_as_torch_reads_it(tmp_path: Path) -> None:
    path = archive(tmp_path / "m.pth", MEMBERS)
    expected = torch.load(path, weights_only=False)
    with statedict.open(path) as checkpoint:
        assert ("torch-tar", sharing(expected)) == (checkpoint.format, found_sharing(checkpoint.tree()))
    assert facts(expected) == found(path)


def test_weights_only_refuses_what_is_read_here(tmp_path: Path) -> None:
    path = archive(tmp_path / "m.pth", MEMBERS)
    with pytest.raises(RuntimeError, match=r"legacy \.tar"):
        torch.load(path, weights_only=True)

    assert {"a", "t", "longs", "view", "again", "nested"} == {found(path)[1][i][0][1] for i in range(6)}  # type: ignore[index]


@pytest.mark.parametrize("order", [["pickle", "tensors", "storages"], ["./storages", "./tensors", "./pickle"]])
def test_the_members_may_come_in_any_order(order: list[str], tmp_path: Path) -> None:
    path = archive(tmp_path / "m.pth", {name: MEMBERS[name.removeprefix("./")] for name in order})
    expected = torch.load(archive(tmp_path / "plain.pth", MEMBERS), weights_only=False)

    assert facts(expected) == found(path)


def test_a_class_with_its_source_is_a_name(tmp_path: Path) -> None:
    path = archive(tmp_path / "m.pth", MEMBERS | {"pickle": pickle_member({"class": Class, "w": Place(1)})})
    expected = torch.load(path, weights_only=False)
    with statedict.open(path) as checkpoint:
        (opaque,) = checkpoint.objects.values()

        assert (torch.nn.Linear, "torch.nn.modules.linear.Linear") == (expected["class"], opaque.type)  # type: ignore[attr-defined]
        assert expected["w"].tolist() == checkpoint["w"].numpy().tolist()


def test_the_device_of_a_storage_is_shown(tmp_path: Path) -> None:
    storages = storages_member([storage(10, "FloatStorage", SIX, 4, "cuda:1")])
    members = MEMBERS | {
        "storages": storages,
        "tensors": tensors_member(TENSORS[:1]),
        "pickle": pickle_member(Place(1)),
    }
    with statedict.open(archive(tmp_path / "m.pth", members)) as checkpoint:
        assert "cuda:1" == checkpoint[()].device


BAD: dict[str, dict[str, bytes]] = {
    "a member missing": {},
    "a count that is none": {"storages": pickle.dumps("many", protocol=2)},
    "a count of 2**40": {"storages": pickle.dumps(2**40, protocol=2)},
    "fewer storages than said": {"storages": pickle.dumps(3, protocol=2) + b"".join(STORAGES)},
    "a storage beyond the member": {"storages": storages_member([STORAGES[0][:-1]])},
    "a storage of 2**60": {
        "storages": storages_member([STORAGES[0].replace(struct.pack("<q", 6), b"\0" * 7 + b"\x10")])
    },
    "a storage of -1": {"storages": storages_member([STORAGES[0].replace(struct.pack("<q", 6), b"\xff" * 8)])},
    "a view of nothing": {"storages": storages_member(STORAGES, [(12, 99, 0, 1)])},
    "a view with a negative offset": {"storages": storages_member(STORAGES, [(12, 10, -1, 1)])},
    "a tensor of no storage": {"tensors": tensors_member([(1, 99, (1,), (1,), 0)])},
    "a tensor beyond its storage": {"tensors": tensors_member([(1, 10, (7,), (1,), 0), *TENSORS[1:]])},
    "a negative stride": {"tensors": tensors_member([(1, 10, (2,), (-1,), 2), *TENSORS[1:]])},
    "2**31 dimensions": {"tensors": tensors_member(TENSORS).replace(struct.pack("<i", 2), b"\xff\xff\xff\x7f", 1)},
    "a tensor that isn't there": {"tensors": tensors_member(TENSORS[1:])},
    "a persistent id in the wrong place": {"tensors": pickle_member(Place(1))},
}


@pytest.mark.parametrize("defect", BAD)
def test_a_damaged_archive_is_refused(defect: str, tmp_path: Path) -> None:
    members = MEMBERS | BAD[defect]
    if not BAD[defect]:
        del members["tensors"]
    path = archive(tmp_path / "m.pth", members)
    with pytest.raises(CorruptFile) as caught:
        statedict.open(path)

    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


def test_an_archive_cut_anywhere_is_refused(tmp_path: Path) -> None:
    whole = archive(tmp_path / "whole.pth", MEMBERS).read_bytes()
    end = len(whole.rstrip(b"\0"))
    path = tmp_path / "cut.pth"
    opened = []
    for nbytes in range(0, end, 61):
        path.write_bytes(whole[:nbytes])
        try:
            statedict.open(path).close()
            opened.append(nbytes)
        except StateDictError:
            continue

    assert [] == opened


def test_an_archive_of_headers_inside_headers_is_refused(tmp_path: Path) -> None:
    long_name = tarfile.TarInfo("././@LongLink")
    long_name.type, long_name.size = tarfile.GNUTYPE_LONGNAME, 5
    header = long_name.tobuf(format=tarfile.GNU_FORMAT) + b"name\0".ljust(512, b"\0")
    (tmp_path / "m.pth").write_bytes(header * 2000)

    with pytest.raises(CorruptFile):
        statedict.open(tmp_path / "m.pth")


def test_an_archive_that_leads_back_to_its_beginning_is_refused(tmp_path: Path) -> None:
    info = tarfile.TarInfo("storages")
    raw = bytearray(info.tobuf(format=tarfile.GNU_FORMAT))
    raw[124:136] = b"\xff" * 10 + b"\xfe\x00"  # a size of -512 in base 256
    raw[148:156] = b"        "
    raw[148:156] = b"%06o\0 " % sum(raw)
    (tmp_path / "m.pth").write_bytes(bytes(raw) * 3)

    with pytest.raises(CorruptFile):
        statedict.open(tmp_path / "m.pth")


def test_a_tar_of_something_else_says_so(tmp_path: Path) -> None:
    with pytest.raises(UnknownFormat, match=r"this is a tar archive of 1 file.*Unpack it: tar xf"):
        statedict.open(archive(tmp_path / "weights.tar", {"readme.txt": b"hello"}))
