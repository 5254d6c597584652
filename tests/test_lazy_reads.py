"""What is read of a file: its header when it is opened, and of a tensor only what is asked for."""

from __future__ import annotations

import errno
import io
import os
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
import pytest
from safetensors.numpy import save_file

import statedict
from statedict.errors import FileError
from statedict.io.ranges import LocalFile

Ranges = list[tuple[int, int]]
T = TypeVar("T")


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> Ranges:
    """The ranges that are read of files: offset and length in bytes."""
    found: Ranges = []
    whole, into = LocalFile.read, LocalFile.read_into

    def watched(self: LocalFile, offset: int, nbytes: int) -> bytes:
        found.append((offset, nbytes))
        return whole(self, offset, nbytes)

    def watched_into(self: LocalFile, offset: int, buffer: memoryview) -> None:
        found.append((offset, len(buffer)))
        into(self, offset, buffer)

    monkeypatch.setattr(LocalFile, "read", watched)
    monkeypatch.setattr(LocalFile, "read_into", watched_into)
    return found


def total(ranges: Ranges) -> int:
    return sum(nbytes for _, nbytes in ranges)


def traced(way: Callable[[], T]) -> tuple[T, int]:
    """What it gives, and the most bytes that were allocated meanwhile."""
    tracemalloc.start()
    try:
        return way(), tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """A safetensors file that claims 20 GB of float32 in rows of 1,000, whose bytes are holes but for a few."""
    rows = 5_000_000
    header = b'{"w":{"dtype":"F32","shape":[%d,1000],"data_offsets":[0,%d]}}' % (rows, 4000 * rows)
    path = tmp_path / "large.safetensors"
    with open(path, "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        start = file.tell()
        file.seek(start + 4000 * 1234)
        file.write(np.arange(1000, dtype="<f4").tobytes())
        file.truncate(start + 4000 * rows)
    return path


def test_opening_and_inspecting_read_the_header_alone(large: Path, read: Ranges) -> None:
    statedict.inspect(large)

    assert total(read) < 10_000


def test_the_memory_of_an_inspection_does_not_depend_on_the_files_size(large: Path) -> None:
    _, peak = traced(lambda: statedict.inspect(large))

    assert peak < 5_000_000


def test_rows_of_a_packed_tensor_are_read_alone(large: Path, read: Ranges) -> None:
    with statedict.open(large) as checkpoint:
        read.clear()
        rows = checkpoint["w"][1230:1240].numpy()

    assert 40_000 == total(read)
    assert (0.0, 999.0) == (rows[4, 0], rows[4, 999])


def test_one_number_is_read_alone(large: Path, read: Ranges) -> None:
    with statedict.open(large) as checkpoint:
        read.clear()

        assert 7.0 == checkpoint["w"][1234, 7].numpy()
    assert 4 == total(read)


def test_a_column_is_read_by_ranges_in_bounded_memory(tmp_path: Path, read: Ranges) -> None:
    values = np.arange(4_000_000, dtype=np.float32).reshape(2000, 2000)
    save_file({"w": values}, tmp_path / "m.safetensors")
    with statedict.open(tmp_path / "m.safetensors") as checkpoint:
        read.clear()
        column = checkpoint["w"][100:200, 3].numpy()

    assert np.array_equal(values[100:200, 3], column)
    assert total(read) <= 100 * 2000 * 4


def test_blocks_of_a_tensor_are_read_in_bounded_memory(tmp_path: Path) -> None:
    save_file({"w": np.zeros(20_000_000, np.float32)}, tmp_path / "m.safetensors")
    with statedict.open(tmp_path / "m.safetensors") as checkpoint:
        count, peak = traced(lambda: sum(len(block) for block in checkpoint["w"].blocks()))

    assert 80_000_000 == count
    assert peak < 10_000_000


def test_reading_into_a_buffer_makes_no_other(large: Path) -> None:
    with statedict.open(large) as checkpoint:
        part = checkpoint["w"][:5000]
        buffer = bytearray(part.nbytes)
        _, peak = traced(lambda: part.read(out=buffer))

    assert bytes(buffer[1234 * 4000 + 4 : 1234 * 4000 + 8]) == np.float32(1).tobytes()
    assert peak < 10_000_000


def test_a_zip_is_opened_by_its_directory_and_its_pickle(tmp_path: Path, read: Ranges) -> None:
    torch = pytest.importorskip("torch")
    torch.save({f"layers.{i}.w": torch.randn(1000, 100) for i in range(50)}, tmp_path / "m.pth")
    statedict.inspect(tmp_path / "m.pth")

    assert total(read) < 150_000 < (tmp_path / "m.pth").stat().st_size // 100


def test_a_compressed_record_is_unwrapped_in_bounded_memory(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    buffer = io.BytesIO()
    torch.save({"w": torch.zeros(10_000_000)}, buffer)
    with zipfile.ZipFile(buffer) as old, zipfile.ZipFile(tmp_path / "m.pth", "w", zipfile.ZIP_DEFLATED) as new:
        for info in old.infolist():
            new.writestr(info.filename, old.read(info), zipfile.ZIP_DEFLATED)
    with statedict.open(tmp_path / "m.pth") as checkpoint:
        count, peak = traced(lambda: sum(len(block) for block in checkpoint["w"].blocks()))

    assert 40_000_000 == count
    assert peak < 20_000_000


def test_a_file_cut_short_under_an_open_checkpoint_is_an_error(tmp_path: Path) -> None:
    import os

    save_file({"w": np.zeros(100_000)}, tmp_path / "m.safetensors")
    with statedict.open(tmp_path / "m.safetensors") as checkpoint:
        os.truncate(tmp_path / "m.safetensors", 1000)

        with pytest.raises(statedict.CorruptFile, match="ends too early"):
            checkpoint["w"].numpy()


def test_a_file_that_the_system_tells_nothing_about_is_an_error_of_ours_and_is_closed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"12345678")
    closed: list[int] = []

    def refuse(fd: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fstat", refuse)
        patched.setattr(os, "close", closed.append)
        try:
            LocalFile(str(path))
        except FileError as error:
            refusal = error

    assert errno.EIO == refusal.errno
    assert f"{path}: can't be opened: Input/output error" == str(refusal)
    assert 1 == len(closed)
