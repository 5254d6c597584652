"""The archive of a .pth larger than 32-bit numbers can say, laid out sparsely and read by torch and by zipfile."""

from __future__ import annotations

import zipfile
from pathlib import Path
from zlib import crc32

import pytest

import statedict
from statedict.dtypes import BY_CODE
from statedict.formats.torch_zip_writer import TorchZipWriter
from statedict.io.plans import Later, Literal, MemorySource, Payload, Sum, WritePlan
from statedict.manifest import Container, Storage, StorageView, TensorEntry

GIB = 1 << 30


def tensor(number: int, key: str, nbytes: int) -> TensorEntry:
    storage = Storage(number, nbytes, None, b"", name=key)
    return TensorEntry((key,), BY_CODE["U8"], (nbytes,), StorageView(storage, 0, (1,)))


def laid_out(plan: WritePlan, path: Path) -> None:
    """The file without the bytes of its storages, which stay holes. The CRC of the large one is said to be 1."""
    payloads = [segment for segment in plan.segments if isinstance(segment, Payload)]
    sums = {each.key: Sum(None, crc32(bytes(each.nbytes)) if each.nbytes < GIB else 1) for each in payloads}
    offset = 0
    with open(path, "wb") as file:
        for segment in plan.segments:
            file.seek(offset)
            if isinstance(segment, Literal):
                file.write(segment.data)
            elif isinstance(segment, Later):
                data = segment.render(sums)
                assert segment.nbytes == len(data)
                file.write(data)
            offset += segment.nbytes
        file.truncate(offset)


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """Four storages: a small one, one of over 4 GiB, and two behind it, of which one is empty."""
    sizes = {"small": 100, "large": 4 * GIB + 3, "behind": 200, "empty": 0}
    entries = [tensor(number, key, size) for number, (key, size) in enumerate(sizes.items())]
    root = Container("dict", list(sizes), entries)
    plan = TorchZipWriter(root, {}, digests=False).plan(lambda entry: MemorySource(b""))
    laid_out(plan, tmp_path / "large.pth")
    return tmp_path / "large.pth"


def test_zipfile_finds_every_entry_at_its_place(large: Path) -> None:
    with zipfile.ZipFile(large) as archive:
        found = {info.filename: (info.file_size, info.CRC) for info in archive.infolist()}
        head = archive.open("archive/data/2").read(3)

    assert (4 * GIB + 3, 1) == found["archive/data/1"]
    assert ((200, crc32(bytes(200))), b"\0\0\0") == (found["archive/data/2"], head)


def test_our_reader_finds_every_storage(large: Path) -> None:
    with statedict.open(large) as found:
        sizes = {key: found[key].nbytes for key in found}
        offsets = [found[key].entry.view.storage.extent for key in ("small", "large", "behind")]  # type: ignore[union-attr]

    assert {"small": 100, "large": 4 * GIB + 3, "behind": 200, "empty": 0} == sizes
    assert all(extent is not None and extent.offset % 64 == 0 for extent in offsets)


def test_torch_maps_it_and_computes_the_same_offsets(large: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    from torch.utils.serialization import config

    monkeypatch.setenv("TORCH_SERIALIZATION_DEBUG", "1")
    with config.patch({"load.calculate_storage_offsets": True}):
        found = torch.load(large, weights_only=True, mmap=True)

    assert {"small": 100, "large": 4 * GIB + 3, "behind": 200, "empty": 0} == {k: v.numel() for k, v in found.items()}
