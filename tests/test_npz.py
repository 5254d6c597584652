"""Arrays of numpy's: what numpy writes is read bit by bit, and what isn't numbers is shown for what it is."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

import statedict
from statedict import Limits
from statedict.errors import CorruptFile, LimitExceeded, Unsupported
from statedict.manifest import Opaque

Array = np.ndarray[Any, Any]

NUMBERS = ("i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "f2", "f4", "f8", "c8", "c16")
LETTERS = ["?", *(f"{order}{letters}" for letters in NUMBERS for order in "<>")]


def npy(values: Array) -> bytes:
    stream = io.BytesIO()
    np.save(stream, values)
    return stream.getvalue()


def saved_npy(path: Path, **arrays: Array) -> Path:
    np.save(path, arrays["x"])
    return path


def saved_npz(path: Path, **arrays: Array) -> Path:
    np.savez(path, **arrays)
    return path


def saved_compressed(path: Path, **arrays: Array) -> Path:
    np.savez_compressed(path, **arrays)
    return path


WRITERS: list[tuple[str, Callable[..., Path]]] = [
    ("x.npy", saved_npy),
    ("stored.npz", saved_npz),
    ("deflated.npz", saved_compressed),
]
IDS = [name for name, _ in WRITERS]


def bits(values: Array) -> tuple[str, tuple[int, ...], bytes]:
    """The dtype without its byte order, the shape, and the bytes in reading order, little-endian."""
    little = values.astype(values.dtype.newbyteorder("<"))
    return little.dtype.str, values.shape, little.tobytes()


def read(path: Path) -> Array:
    """The one array of a file."""
    with statedict.open(path) as checkpoint:
        (key,) = checkpoint
        found: Array = checkpoint[key].numpy()
        return found


def codes(path: Path) -> list[str]:
    return [finding.code for finding in statedict.inspect(path).findings]


def with_header(text: str, data: bytes = b"", version: bytes = b"\x01\x00") -> bytes:
    """An array file with that header; numpy's own writer makes no wrong ones."""
    length = len(text).to_bytes(2 if version == b"\x01\x00" else 4, "little")
    return b"\x93NUMPY" + version + length + text.encode("latin-1") + data


@pytest.mark.parametrize(("name", "save"), WRITERS, ids=IDS)
@pytest.mark.parametrize("letters", LETTERS)
def test_every_dtype_and_byte_order_comes_back(
    letters: str, name: str, save: Callable[..., Path], tmp_path: Path
) -> None:
    raw = np.arange(12 * np.dtype(letters).itemsize, dtype="u1") & (1 if letters == "?" else 255)
    values = raw.view(letters).reshape(3, 4)
    path = save(tmp_path / name, x=values)

    assert bits(values) == bits(read(path))


@settings(max_examples=60)
@given(
    values=hnp.arrays(
        dtype=st.sampled_from(LETTERS),
        shape=hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5),
    ),
    fortran=st.booleans(),
    compressed=st.booleans(),
)
def test_any_array_comes_back(
    values: Array, fortran: bool, compressed: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("any")
    array = np.array(values, order="F" if fortran else "C")
    path = (saved_compressed if compressed else saved_npz)(folder / "a.npz", x=array)

    assert bits(values) == bits(read(path)) == bits(read(saved_npy(folder / "x.npy", x=array)))


@pytest.mark.parametrize(("name", "save"), WRITERS, ids=IDS)
@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
def test_every_version_of_the_header_is_read(
    version: tuple[int, int], name: str, save: Callable[..., Path], tmp_path: Path
) -> None:
    values = np.arange(6, dtype="<f4").reshape(2, 3)
    stream = io.BytesIO()
    np.lib.format.write_array(stream, values, version=version)
    path = tmp_path / name
    if save is saved_npy:
        path.write_bytes(stream.getvalue())
    else:
        method = zipfile.ZIP_STORED if save is saved_npz else zipfile.ZIP_DEFLATED
        with zipfile.ZipFile(path, "w", method) as archive:
            archive.writestr("x.npy", stream.getvalue())

    assert bits(values) == bits(read(path))


def test_a_header_of_python_2_is_read(tmp_path: Path) -> None:
    path = tmp_path / "old.npy"
    path.write_bytes(with_header("{'descr': '<i2', 'fortran_order': False, 'shape': (2L, 3L), }\n", bytes(range(12))))

    assert [[256, 770, 1284], [1798, 2312, 2826]] == read(path).tolist()


def test_fortran_order_is_a_matter_of_strides(tmp_path: Path) -> None:
    values = np.asfortranarray(np.arange(24, dtype="<i4").reshape(2, 3, 4))
    path = saved_npz(tmp_path / "f.npz", x=values)
    with statedict.open(path) as checkpoint:
        assert (1, 2, 6) == checkpoint["x"].stride
        assert values[1:, ::2].tolist() == checkpoint["x"][1:, ::2].numpy().tolist()


def test_keys_are_the_names_without_their_ending(tmp_path: Path) -> None:
    names = ["W", "w", "layers/0/weight", "a.b", "ü", "x.npy"]
    path = saved_npz(tmp_path / "k.npz", **{name: np.full(2, at) for at, name in enumerate(names)})
    with statedict.open(path) as checkpoint:
        assert (names, "npz", {}) == (list(checkpoint), checkpoint.format, checkpoint.metadata)
        assert [[at, at] for at in range(len(names))] == [checkpoint[name].numpy().tolist() for name in names]


def test_a_single_array_is_the_whole_checkpoint(tmp_path: Path) -> None:
    path = saved_npy(tmp_path / "x.npy", x=np.arange(4))
    with statedict.open(path) as checkpoint:
        assert ("npy", [()]) == (checkpoint.format, list(checkpoint.manifest.tensors))
        assert [0, 1, 2, 3] == checkpoint.tree().numpy().tolist()


def test_entries_in_folders_and_other_files_become_a_finding(tmp_path: Path) -> None:
    path = saved_npz(tmp_path / "k.npz", x=np.ones(2), y=np.ones(2))
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("folder/", b"")
        archive.writestr("folder/z.npy", npy(np.zeros(3)))
        archive.writestr("readme\n.txt", b"hello")
    shown = statedict.inspect(path)
    (finding,) = [finding for finding in shown.findings if finding.code == "other-entries"]

    assert ["x", "y", "folder/z"] == [tensor.key for tensor in shown.tensors]
    assert "the archive also has entries that are no arrays and are not shown: 'readme\\n.txt'" == finding.message


@pytest.mark.parametrize(
    ("values", "descr", "code"),
    [
        (np.array(["a", "bcd"]), "<U3", "opaque-array"),
        (np.array([b"a", b"bcd"]), "|S3", "opaque-array"),
        (np.array(["2024-01-01"], "datetime64[D]"), "<M8[D]", "opaque-array"),
        (np.zeros(2, "<f4,<i8"), "[['f0', '<f4'], ['f1', '<i8']]", "opaque-array"),
        (np.zeros(2, "V7"), "|V7", "opaque-array"),
        (np.zeros(2, [("a", "O"), ("b", "<i4")]), "[['a', '|O'], ['b', '<i4']]", "object-array"),
        (np.array([{}, None]), "|O", "object-array"),
        (np.zeros(2, np.longdouble), np.dtype(np.longdouble).str, "opaque-array"),
    ],
    ids=["text", "bytes", "dates", "records", "void", "records of objects", "objects", "long double"],
)
@pytest.mark.parametrize(("name", "save"), WRITERS, ids=IDS)
def test_what_is_no_number_is_shown_but_not_read(
    values: Array, descr: str, code: str, name: str, save: Callable[..., Path], tmp_path: Path
) -> None:
    path = save(tmp_path / name, x=values)
    with statedict.open(path) as checkpoint:
        (value,) = checkpoint.objects.values()

        assert isinstance(value, Opaque)
        assert ("numpy.ndarray", (values.shape, descr)) == (value.type, value.args)
    assert [code] == codes(path)


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn"])
def test_a_dtype_of_ml_dtypes_has_lost_its_name(dtype: str, tmp_path: Path) -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    path = saved_npz(
        tmp_path / "b.npz", x=np.ones(2, getattr(ml_dtypes, dtype)), y=np.ones(2, getattr(ml_dtypes, dtype))
    )
    (finding,) = statedict.inspect(path).findings

    assert ("unnamed-dtype", ("x", "y")) == (finding.code, finding.keys)
    assert "array.view(ml_dtypes.bfloat16)" in finding.message


def test_a_header_too_long_to_be_parsed_is_kept_as_an_object(tmp_path: Path) -> None:
    values = np.zeros(1, [(f"field_{at}", "<f4") for at in range(1000)])
    path = saved_npz(tmp_path / "l.npz", x=values, y=np.ones(1))

    assert ["long-header"] == codes(path)
    assert ["y"] == [tensor.key for tensor in statedict.inspect(path).tensors]


@pytest.mark.parametrize(("name", "save"), WRITERS, ids=IDS)
def test_the_limit_on_headers_holds(name: str, save: Callable[..., Path], tmp_path: Path) -> None:
    path = save(tmp_path / name, x=np.ones(1))
    with pytest.raises(LimitExceeded) as error:
        statedict.open(path, limits=Limits(header_bytes=100))

    assert "header_bytes" == error.value.limit


def test_crc_covers_a_storage_only_where_it_is_that_of_the_same_bytes(tmp_path: Path) -> None:
    values = np.arange(1000, dtype="<f4")
    paths = [saved_npz(tmp_path / "s.npz", x=values), saved_compressed(tmp_path / "c.npz", x=values)]
    crcs = []
    for path in paths:
        with statedict.open(path) as checkpoint:
            (storage,) = checkpoint.manifest.storages
            crcs.append(storage.crc)
    with zipfile.ZipFile(paths[1]) as archive:
        assert [None, archive.getinfo("x.npy").CRC] == crcs


def test_reading_some_rows_of_a_compressed_array(tmp_path: Path) -> None:
    values = np.random.default_rng(0).standard_normal((1000, 100))
    path = saved_compressed(tmp_path / "c.npz", x=values)
    with statedict.open(path) as checkpoint:
        assert values[500:502].tolist() == checkpoint["x"][500:502].numpy().tolist()


def test_a_compressed_header_that_leaves_no_whole_elements_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "odd.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.npy", with_header("{'descr': '<f8', 'fortran_order': False, 'shape': (1,), }", bytes(8)))
    with pytest.raises(Unsupported, match=r"header of 67 bytes.*numpy\.savez"):
        statedict.open(path)


def test_several_arrays_in_one_file_are_said(tmp_path: Path) -> None:
    path = tmp_path / "two.npy"
    path.write_bytes(npy(np.ones(3)) + npy(np.zeros(3)))

    assert ["trailing-bytes"] == codes(path)
    assert [1, 1, 1] == read(path).tolist()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "it is no Python dict"),
        ("{'descr': '<f4', 'fortran_order': False}", "keys descr, fortran_order and shape"),
        ("{'descr': '<f4', 'fortran_order': False, 'shape': (1,), 'x': 1}", "keys descr, fortran_order and shape"),
        ("{'descr': '<f4', 'fortran_order': 0, 'shape': (1,)}", "fortran_order"),
        ("{'descr': 4, 'fortran_order': False, 'shape': (1,)}", "descr"),
        ("{'descr': '<f4', 'fortran_order': False, 'shape': (-1,)}", "shape"),
        ("{'descr': '<f4', 'fortran_order': False, 'shape': (True,)}", "shape"),
        ("{'descr': '<f4', 'fortran_order': False, 'shape': 1}", "shape"),
        ("{'descr': '<f4', 'fortran_order': False, 'shape': (0, 4611686018427387904)}", "no array has the shape"),
        ("{'descr': '<f4', 'fortran_order': False, 'shape': (" + "1, " * 65 + ")}", "no array has the shape"),
        ("__import__('os').abort()", "is not what stands there"),
        ("{'descr': '<f4', 'fortran_order': False, 'shape': (1,)", "it is no Python dict"),
        ("[" * 9000, "RecursionError"),
        ("{'shape': " + "-" * 9000 + "1}", "is not what stands there"),
        ("{'descr': '\\d', 'fortran_order': False, 'shape': (9" + "9" * 5000 + ",)}", "it is no Python dict"),
    ],
)
def test_a_wrong_header_names_its_defect(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.npy"
    path.write_bytes(with_header(text, bytes(64), b"\x02\x00"))
    with pytest.raises(CorruptFile, match="the array's header can't be") as error:
        statedict.open(path)

    assert said in str(error.value)


def test_an_unknown_version_is_said(tmp_path: Path) -> None:
    path = tmp_path / "v.npy"
    path.write_bytes(b"\x93NUMPY\x04\x00" + bytes(100))
    with pytest.raises(CorruptFile, match=r"expected 1\.0, 2\.0 or 3\.0, found 4\.0"):
        statedict.open(path)


def test_a_shape_beyond_the_file_is_refused_before_anything_is_allocated(tmp_path: Path) -> None:
    path = tmp_path / "big.npy"
    path.write_bytes(with_header("{'descr': '<f8', 'fortran_order': False, 'shape': (1000000, 1000000), }", bytes(64)))
    with pytest.raises(CorruptFile, match=r"cut short.*expected 8000000000000 bytes .* found 64"):
        statedict.open(path)


def test_an_archive_converts(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.numpy")
    values = {"a.b": np.arange(6, dtype=">f4").reshape(2, 3), "c": np.asfortranarray(np.ones((3, 2), "<i8"))}
    statedict.convert(saved_compressed(tmp_path / "c.npz", **values), tmp_path / "c.safetensors")
    found = safetensors.load_file(tmp_path / "c.safetensors")

    assert {key: bits(value) for key, value in values.items()} == {key: bits(found[key]) for key in values}
