"""What an ``.npz`` of ours is: numpy reads it without pickles, and it has the bytes that numpy's own writer gives."""

from __future__ import annotations

import struct
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from safetensors.numpy import save_file

import statedict
from statedict import Unsupported
from statedict.formats.npz_writer import NpzWriter
from statedict.io import writers
from statedict.io.plans import Payload, Source
from statedict.manifest import Container, Storage, StorageView, TensorEntry

Array = np.ndarray[Any, Any]

LETTERS = ("?", "i1", "u1", "<i2", "<u2", "<i4", "<u4", "<i8", "<u8", "<f2", "<f4", "<f8", "<c8", "<c16", ">f4", ">i8")


def loaded(path: Path) -> dict[str, Array]:
    with np.load(path, allow_pickle=False) as arrays:
        return {key: arrays[key] for key in arrays}


def bits(values: Array) -> tuple[str, tuple[int, ...], bytes]:
    little = values.astype(values.dtype.newbyteorder("<"))
    return little.dtype.str, values.shape, little.tobytes()


def entries(path: Path) -> dict[str, bytes]:
    """The files in the archive; reading them checks their CRCs."""
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.mark.parametrize("letters", LETTERS)
def test_numpy_reads_every_dtype_that_it_has(letters: str, tmp_path: Path) -> None:
    values = np.arange(24).reshape(2, 3, 4).astype(letters)
    statedict.convert(
        {"x": values, "turned": values.T, "empty": values[:0], "one": values[0, 0, 0:1].reshape(())}, tmp_path / "m.npz"
    )
    found = loaded(tmp_path / "m.npz")

    assert bits(values) == bits(found["x"])
    assert bits(values.T.copy()) == bits(found["turned"])
    assert ((0, 3, 4), ()) == (found["empty"].shape, found["one"].shape)


def test_the_arrays_are_the_very_bytes_that_numpy_writes(tmp_path: Path) -> None:
    arrays = {"x": np.ones((3, 4), "<f4"), "y": np.zeros((0, 5), "i1"), "z": np.array(2.5), "w": np.ones(12345, "?")}
    np.savez(tmp_path / "numpy.npz", **arrays)
    statedict.convert(arrays, tmp_path / "ours.npz")

    assert entries(tmp_path / "numpy.npz") == entries(tmp_path / "ours.npz")


def test_the_archive_is_stored_and_its_elements_are_aligned(tmp_path: Path) -> None:
    statedict.convert({f"layer.{at}": np.ones(at, "<f4") for at in range(9)}, tmp_path / "m.npz")
    with zipfile.ZipFile(tmp_path / "m.npz") as archive:
        infos = archive.infolist()
        damaged = archive.testzip()
    raw = (tmp_path / "m.npz").read_bytes()
    starts = [info.header_offset + 30 + sum(struct.unpack_from("<HH", raw, info.header_offset + 26)) for info in infos]

    assert None is damaged
    assert {0} == {start % 64 for start in starts}
    assert {zipfile.ZIP_STORED} == {info.compress_type for info in infos}
    assert [(info.CRC, info.file_size) for info in infos] == [
        struct.unpack_from("<I4xI", raw, info.header_offset + 14) for info in infos
    ]


def test_numbers_and_texts_become_arrays_without_dimensions(tmp_path: Path) -> None:
    values = {"x": np.ones(1), "n": 3, "big": 2**64 - 1, "f": 1.5, "c": 1 + 2j, "b": True, "t": "hé\ud800", "empty": ""}
    statedict.convert({**values, "scalar": np.float16(2)}, tmp_path / "m.npz")
    found = loaded(tmp_path / "m.npz")

    assert values | {"x": 1} == {key: found[key].item() for key in values}
    assert (np.dtype("f2"), 2.0) == (found["scalar"].dtype, found["scalar"].item())


def test_what_would_need_a_pickle_is_left_out_and_said(tmp_path: Path) -> None:
    value = {"x": np.ones(2), "nothing": None, "list": [1, 2], "huge": 2**70, "bytes": b"a\0", "cut": "a\0"}
    result = statedict.convert(value, tmp_path / "m.npz")

    assert ["x"] == list(loaded(tmp_path / "m.npz"))
    assert [("left-out", ("nothing", "list", "huge", "bytes", "cut"))] == [(f.code, f.keys) for f in result.findings]


def test_texts_of_the_metadata_are_left_out_and_said(tmp_path: Path) -> None:
    for name, metadata in (("plain", {"format": "pt"}), ("texts", {"format": "pt", "license": "MIT"})):
        save_file({"x": np.ones(1)}, tmp_path / f"{name}.safetensors", metadata=metadata)
    plain = statedict.convert(tmp_path / "plain.safetensors", tmp_path / "plain.npz")
    texts = statedict.convert(tmp_path / "texts.safetensors", tmp_path / "texts.npz")

    assert [[], ["left-out"]] == [[finding.code for finding in result.findings] for result in (plain, texts)]


def test_nesting_becomes_dotted_keys_and_ties_become_copies(tmp_path: Path) -> None:
    shared = np.arange(6.0)
    value = OrderedDict(model={"a": shared, "b": shared, "part": shared[2:4]}, steps=[{"x": np.ones(1)}])
    result = statedict.convert(value, tmp_path / "m.npz")

    assert ["model.a", "model.b", "model.part", "steps.0.x"] == list(loaded(tmp_path / "m.npz"))
    assert ["flattened", "untied"] == [finding.code for finding in result.findings]


def test_dtypes_that_numpy_has_not_are_all_named(tmp_path: Path) -> None:
    value = {"x": np.ones(2), "a": np.ones(2, ml_dtypes.bfloat16), "b": np.ones(2, ml_dtypes.float8_e4m3fn)}

    with pytest.raises(Unsupported, match=r"bfloat16, float8_e4m3fn: 'a', 'b'.*--dtype float32"):
        statedict.convert(value, tmp_path / "m.npz")
    assert [] == list(tmp_path.iterdir())


def test_nothing_at_all_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match="nothing in it"):
        statedict.convert({"x": None}, tmp_path / "m.npz")


@pytest.mark.parametrize("key", ["", "a/b", "../x", "ü", "a.npy", "\ud800", "a\0b", "arr_0", "x" * 300])
def test_any_key_can_be_written(key: str, tmp_path: Path) -> None:
    statedict.convert({key: np.ones(3)}, tmp_path / "m.npz")
    (found,) = loaded(tmp_path / "m.npz")
    with statedict.open(tmp_path / "m.npz") as checkpoint:
        shown = list(checkpoint)

    assert [key.encode("utf-8", "backslashreplace").decode().replace("\0", "\\x00")] == [found] == shown


def test_the_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    value = {"x": np.ones(3), "n": 3}
    for name in ("a.npz", "b.npz"):
        statedict.convert(value, tmp_path / name)

    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


def test_an_archive_can_be_written_in_order(tmp_path: Path) -> None:
    with statedict.open({"x": np.arange(1000.0), "y": np.ones(3, "?")}) as checkpoint:
        from statedict.ops.sources import source_of

        plan = NpzWriter(checkpoint.manifest.structure, {}).plan(lambda entry: source_of(entry, checkpoint))
        with (tmp_path / "m.npz").open("wb") as file:
            writers.execute_to_stream(plan, file)

    assert 499500.0 == loaded(tmp_path / "m.npz")["x"].sum()


class Zeros:
    """A source of zeros without end."""

    def read_into(self, offset: int, buffer: memoryview) -> None:
        buffer[:] = bytes(len(buffer))

    def extent(self) -> None:
        return


def large_tree(numel: int) -> Container:
    from statedict.dtypes import BY_CODE

    view = StorageView(Storage(0, numel), 0, (1,))
    big = TensorEntry(("big",), BY_CODE["U8"], (numel,), view)
    small = TensorEntry(("small",), BY_CODE["U8"], (3,), view)
    return Container("dict", ["big", "small"], [big, small])


def test_sizes_and_offsets_above_four_gib_have_64_bits(tmp_path: Path) -> None:
    numel = 2**32 + 5
    source: Source = Zeros()
    plan = NpzWriter(large_tree(numel), {}).plan(lambda entry: source)
    from statedict.io.plans import Sum

    sums = {segment.key: Sum(None, 7) for segment in plan.segments if isinstance(segment, Payload)}
    # The literal parts stand where they belong; what is between them is a hole of the file.
    with (tmp_path / "m.npz").open("wb") as file:
        position = 0
        for segment in plan.segments:
            file.seek(position)
            if isinstance(segment, Payload):
                head = memoryview(bytearray(128))
                segment.source.read_into(0, head)
                file.write(head)
            else:
                file.write(segment.render(sums))  # type: ignore[union-attr]
            position += segment.nbytes
    with zipfile.ZipFile(tmp_path / "m.npz") as archive:
        infos = archive.infolist()
    with statedict.open(tmp_path / "m.npz") as checkpoint:
        shapes = [checkpoint[key].shape for key in checkpoint]

    assert [(numel,), (3,)] == shapes
    assert [numel + 128, 3 + 128] == [info.file_size for info in infos]
    assert infos[1].header_offset > 2**32


@settings(max_examples=40)
@given(
    st.dictionaries(
        st.text(min_size=1, max_size=8).filter(lambda key: "\0" not in key and key.isprintable()),
        hnp.arrays(
            st.sampled_from(LETTERS).map(np.dtype), hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4)
        ),
        min_size=1,
        max_size=5,
    )
)
def test_numpy_and_ours_read_whatever_was_written(
    tmp_path_factory: pytest.TempPathFactory, arrays: dict[str, Array]
) -> None:
    path = tmp_path_factory.mktemp("npz") / "m.npz"
    statedict.convert(arrays, path)
    found = loaded(path)
    with statedict.open(path) as checkpoint:
        ours = {key: bits(checkpoint[key].numpy()) for key in checkpoint}

    assert {key: bits(values) for key, values in arrays.items()} == ours
    assert ours == {key: bits(values) for key, values in found.items()}
