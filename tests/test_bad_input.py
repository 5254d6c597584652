"""What isn't a checkpoint, or not a whole one: one plain sentence, never another exception, memory or time without end."""

from __future__ import annotations

import bz2
import contextlib
import functools
import gzip
import importlib.util
import io
import json
import lzma
import os
import pickle
import re
import shutil
import socket
import tarfile
import tempfile
import tracemalloc
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from safetensors.numpy import save

import statedict
from statedict.cli import main
from statedict.errors import CorruptFile, StateDictError, UnsafeContent, Unsupported

# -------------------------------------------------------------------- what it is, on the command line


def zipped(*names: str) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name in names:
            archive.writestr(name, b"abc")
    return stream.getvalue()


def tarred(name: str) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        archive.addfile(tarfile.TarInfo(name))
    return stream.getvalue()


INDEX = json.dumps({"metadata": {"total_size": 8}, "weight_map": {"w": "model-00001-of-00002.safetensors"}}, indent=2)
LFS = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'a' * 64}\nsize 438007537\n"
PAGE = "\n<!DOCTYPE html>\n<html><head><title>Sign\n in \x1b[2J</title></head><body></body></html>"
S3 = '<?xml version="1.0"?><Error><Code>AccessDenied</Code><Message>Request has expired</Message></Error>'
TABLE = bytes(40) + b"\x01\x57\xfb\x80\x8b\x24\x75\x47\xdb"

# The name of a file, its bytes, and the words that say what it is and what to do.
BAD: list[tuple[str, bytes, list[str]]] = [
    ("empty.pth", b"", ["the file is empty", "Download or copy it again"]),
    ("m.bin", LFS.encode(), ["a git-lfs pointer to a file of 438,007,537 bytes", "git lfs pull"]),
    ("m.bin", b"/annex/objects/SHA256E-s5--abc.bin\n", ["a git-annex pointer", "git annex get m.bin"]),
    ("m.pth", PAGE.encode(), ['a web page ("Sign in \\x1b[2J")', "login"]),
    ("m.pth", b"<html><body>no title", ["a web page, not a checkpoint"]),
    ("m.pth", S3.encode(), ['an XML text ("Request has expired")']),
    ("m.pth", b'{"error":"Repository not found"}', ['a JSON text with a message ("Repository not found")']),
    ("m.pth", b'{"error":{"code":404,"message":"no such\\nthing"}}', ['"no such\\nthing"']),
    ("config.json", b'{"architectures": ["Bert"]}', ["a JSON text", "architectures", "the weights"]),
    ("model.safetensors.index.json", INDEX.encode(), ["several files", "'model-00001-of-00002.safetensors'"]),
    ("m.pth.gz", gzip.compress(b"x"), ["a gzip file", "gzip -dc m.pth.gz > m.pth"]),
    ("m.tar.gz", gzip.compress(b"x"), ["a gzip file", "tar xf m.tar.gz"]),
    ("my m.pth", gzip.compress(b"x"), ["a gzip file", "gzip -dc 'my m.pth' > 'my m.pth.unpacked'"]),
    ("m.pth.bz2", bz2.compress(b"x"), ["a bzip2 file", "bzip2 -dc m.pth.bz2 > m.pth"]),
    ("m.pth.xz", lzma.compress(b"x"), ["an xz file", "xz -dc m.pth.xz > m.pth"]),
    ("m.pth.zst", b"\x28\xb5\x2f\xfd\x24\x01", ["a zstd file", "zstd -dc m.pth.zst > m.pth"]),
    ("m.pth.lz4", b"\x04\x22\x4d\x18\x64\x40", ["an lz4 file", "lz4 -dc m.pth.lz4 > m.pth"]),
    ("m.7z", b"7z\xbc\xaf\x27\x1c\x00\x04", ["a 7z archive", "7z x m.7z"]),
    ("m.rar", b"Rar!\x1a\x07\x01\x00", ["a RAR archive", "unrar x m.rar"]),
    ("m.tar", tarred("a/model.pth"), ["a tar archive of 1 file", "'a/model.pth': tar xf m.tar"]),
    ("m.zip", zipped("a/model.pth"), ["a zip archive of 1 file (a/model.pth)", "unzip m.zip"]),
    ("m.npz", zipped(), ["an empty zip archive"]),
    ("m.keras", zipped("config.json", "model.weights.h5"), ["a model of Keras"]),
    ("m.h5", b"\x89HDF\r\n\x1a\n" + bytes(20), ["an HDF5 file", "h5py"]),
    ("m.gguf", b"GGUF\x03\x00\x00\x00", ["a GGUF file", "can't be read yet"]),
    ("m.bin", b"tjgg\x03\x00\x00\x00", ["a GGML file"]),
    ("m.onnx", b"\x08\x08\x12\x07pytorch\x1a\x052.1.0", ["an ONNX model, written by pytorch"]),
    ("saved_model.pb", b"\x08\x01\x12\xf5\x03\x0a", ["TensorFlow"]),
    ("variables.index", TABLE, ["TensorFlow"]),
    ("variables.data-00000-of-00001", b"\x11\x22\xff\xfe", ["TensorFlow"]),
    ("m.tflite", b"\x1c\x00\x00\x00TFL3\x14\x00", ["a TensorFlow Lite model"]),
    ("m.msgpack", b"\x81\xa6params\x82\xa6kernel", ["a msgpack file, as Flax writes it"]),
    ("m.joblib", b"\x78\x9c\x4b\x04\x00", ["compressed by zlib, as joblib"]),
    ("m.parquet", b"PAR1\x15\x04", ["a Parquet table"]),
    ("m.mat", b"MATLAB 5.0 MAT-file, Platform: x", ["a MATLAB file", "scipy.io.loadmat"]),
    ("m.png", b"\x89PNG\r\n\x1a\n\x00", ["a PNG image"]),
    ("m.jpg", b"\xff\xd8\xff\xe0\x00\x10JFIF", ["a JPEG image"]),
    ("m.pdf", b"%PDF-1.7\n", ["a PDF document"]),
    ("m.so", b"\x7fELF\x02\x01\x01", ["a program or library (ELF)"]),
    ("m.exe", b"MZ\x90\x00\x03\x00", ["a Windows program"]),
    ("m.dylib", b"\xcf\xfa\xed\xfe\x07\x00", ["a program or library (Mach-O)"]),
    ("m.db", b"SQLite format 3\x00\x10", ["an SQLite database"]),
    ("m.safetensors", bytes(2000), ["holds only zeros: 2,000 bytes", "crash"]),
    ("m.pth", bytes(100_000), ["the first 16,384 bytes are zeros"]),
    ("m.pth", b"Entry not found", ['a text ("Entry not found")']),
    ("m.pth", "Bitte anmelden".encode("utf-16"), ['a text ("Bitte anmelden")']),
    ("m.pth", ("é" * 20_000).encode(), ['a text ("éé']),
    ("m.txt", b"\n\n  \n", ["white space alone"]),
    ("m.pth", b"P", ["cut short", "a zip archive", "found 1 bytes"]),
    ("m.npy", b"\x93NUM", ["cut short", "an array of numpy's", "found 4 bytes"]),
    ("m.safetensors", b"\x40\x00\x00", ["cut short", "a safetensors file", "found 3 bytes"]),
    ("m.safetensors", b"\x40" + bytes(7), ["cut short", "inside its header", "expected 64 bytes, found 0"]),
    ("m.safetensors", b"\x40" + bytes(7) + b'{"w":', ["cut short", "expected 64 bytes, found 5"]),
    ("m.safetensors", b"\xff" * 8 + b'{"w":', ["inside its header", "found 5"]),
    ("m.pkl", b"\x80", ["cut short", "at byte 1"]),
    ("m.pth", b"\xf1\x02\x03\xff" * 9, ["no checkpoint of a known format", r"b'\xf1\x02", "Readable are .pth"]),
    ("m.pth.crdownload", b"\xf1\x02\x03\xff" * 9, ["the download isn't finished"]),
    ("m.safetensors.part", save({"w": np.ones(99)})[:200], ["expected", "the download isn't finished"]),
]


def said_of(path: str, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that the command line says of a file that it can't open."""
    code = main(["inspect", path])
    streams = capsys.readouterr()

    assert (2, "", 1) == (code, streams.out, streams.err.count("\n"))
    assert streams.err.startswith(f"statedict: {path}: ")
    assert streams.err.strip("\n").isprintable()
    return streams.err


@pytest.mark.parametrize(("name", "data", "words"), BAD, ids=[f"{at}-{name}" for at, (name, _, _) in enumerate(BAD)])
def test_a_file_that_is_no_checkpoint_is_named_in_one_line(
    name: str,
    data: bytes,
    words: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path(name).write_bytes(data)
    said = said_of(name, capsys)

    assert [] == [word for word in words if word not in said]


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ([], "It is empty"),
        (["readme.md"], "Nothing in it has the name of a checkpoint"),
        (["config.json", "pytorch_model.bin", "model.safetensors"], "model.safetensors, pytorch_model.bin"),
        ([f"{at}.pth" for at in range(7)], "0.pth, 1.pth, 2.pth, 3.pth, 4.pth and 2 more"),
        ([".metadata", "__0_0.distcp"], "It is a distributed checkpoint"),
        (["a\n\x1b[2J.pth"], "a\\n\\x1b[2J.pth"),
    ],
)
def test_a_folder_says_what_in_it_could_be_opened(
    names: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    for name in names:
        Path("folder", name).touch()

    assert f"this is a directory, not a file. {said}" in said_of("folder", capsys).replace(
        "In it could be opened: ", ""
    )


def a_pipe(path: Path) -> None:
    os.mkfifo(path)


def a_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(path.name)


def a_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize(
    ("make", "said"),
    [(a_pipe, "a named pipe"), (a_socket, "a socket"), (a_device, "a device")],
    ids=["pipe", "socket", "device"],
)
def test_what_is_no_file_is_named_and_never_waited_for(
    make: Callable[[Path], None],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    make(Path("special"))

    assert f"this is {said}, not a file" in said_of("special", capsys)


# -------------------------------------------------------------------- whole files of every format


class Net:
    """Stands for a class that doesn't exist on the machine that reads the file."""

    def __init__(self) -> None:
        self.weight = np.arange(6, dtype="f4").reshape(2, 3)
        self.name = "net"


def arrays() -> dict[str, np.ndarray]:  # type: ignore[type-arg]
    return {"w": np.arange(12, dtype="<f4").reshape(3, 4), "b": np.ones(5, ">i8"), "e": np.zeros((0, 2))}


def nested() -> dict[str, object]:
    return {"model": arrays(), "epoch": 3, "rates": [0.1, 1e-3], "name": "a\n", "net": Net(), "t": (None, True, {1, 2})}


def of_numpy() -> dict[str, bytes]:
    made = {}
    for name, write in (("stored.npz", np.savez), ("deflated.npz", np.savez_compressed)):
        stream = io.BytesIO()
        write(stream, **arrays(), text=np.array(["a", "b"]))
        made[name] = stream.getvalue()
    stream = io.BytesIO()
    np.save(stream, arrays()["w"].T)
    made["f.npy"] = stream.getvalue()
    return made


def of_pickle() -> dict[str, bytes]:
    return {f"p{protocol}.pkl": pickle.dumps(nested(), protocol) for protocol in (0, 1, 2, 4, 5)}


def deflated(data: bytes) -> bytes:
    """The same zip archive with its entries compressed."""
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as source, zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as target:
        for name in source.namelist():
            target.writestr(name, source.read(name))
    return stream.getvalue()


def of_torch() -> dict[str, bytes]:
    import torch

    def saved(value: object, **options: object) -> bytes:
        stream = io.BytesIO()
        torch.save(value, stream, **options)
        return stream.getvalue()

    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    weight = torch.arange(12.0).reshape(3, 4)
    value = {
        "model": model.state_dict(),
        "tied": [weight, weight.T, weight[1:]],
        "half": torch.ones(3, dtype=torch.bfloat16),
        "sparse": torch.eye(3).to_sparse(),
        "epoch": 3,
        "array": np.arange(3),
    }
    script = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(model), script)
    return {
        "zip.pth": saved(value),
        "deflated.pth": deflated(saved(value)),
        "legacy.pth": saved(value, _use_new_zipfile_serialization=False),
        "legacy4.pth": saved(value, _use_new_zipfile_serialization=False, pickle_protocol=4),
        "module.pth": saved(model),
        "module-legacy.pth": saved(model, _use_new_zipfile_serialization=False),
        "script.pt": script.getvalue(),
        "old.tar": old_tar(),
    }


def old_tar() -> bytes:
    """torch's oldest format as its reader describes it (``torch/serialization.py``, ``legacy_load``): no writer is left."""
    import torch

    class Pickler(pickle.Pickler):
        def persistent_id(self, item: object) -> object:
            return 7 if item is marker else None

    marker = object()
    tree = io.BytesIO()
    Pickler(tree, 2).dump({"w": marker})
    one = b"\x80\x02K\x01."
    storage = pickle.dumps((3, "cpu", torch.FloatStorage), 2) + (4).to_bytes(8, "little") + np.ones(4, "<f4").tobytes()
    numbers = (2, 2, 2, 1, 0)
    tensor = pickle.dumps((7, 3, torch.FloatTensor), 2) + (2).to_bytes(4, "little") + bytes(4)
    members = {
        "sys_info": pickle.dumps({"protocol_version": 1000, "little_endian": True}, 2),
        "pickle": tree.getvalue(),
        "tensors": one + tensor + np.array(numbers, "<i8").tobytes(),
        "storages": one + storage + b"\x80\x02].",
    }
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        # The blocks of zeros that follow are missed by nobody.
        end = archive.offset
    return stream.getvalue()[:end]


@functools.cache
def whole_files() -> dict[str, bytes]:
    """A small valid file of every format that this environment's libraries can write, by name."""
    made = {"m.safetensors": save({"w": np.ones((3, 4), "f4"), "b": np.ones(5, "i8")}, {"k": "v"})}
    made |= of_numpy() | of_pickle()
    return made | of_torch() if TORCH else made


TORCH = importlib.util.find_spec("torch") is not None
NUMPY_NAMES = ["m.safetensors", "stored.npz", "deflated.npz", "f.npy", "p0.pkl", "p1.pkl", "p2.pkl", "p4.pkl", "p5.pkl"]
TORCH_NAMES = [
    "zip.pth",
    "deflated.pth",
    "legacy.pth",
    "legacy4.pth",
    "module.pth",
    "module-legacy.pth",
    "script.pt",
    "old.tar",
]
NAMES = NUMPY_NAMES + (TORCH_NAMES if TORCH else [])


def use(path: Path) -> StateDictError | None:
    """Open, show, and read every tensor; the error that came, if one of ours did."""
    try:
        str(statedict.inspect(path))
        with statedict.open(path) as checkpoint:
            for key in checkpoint:
                read(checkpoint[key])
            checkpoint.tree()
    except StateDictError as error:
        assert str(error).isprintable()
        return error
    return None


def read(tensor: statedict.LazyTensor) -> None:
    """Every value, where the tensor has values of its own or parts that have."""
    for part in (tensor, *tensor.parts.values()):
        with contextlib.suppress(Unsupported):
            part.numpy()


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """A folder in memory where there is one: thousands of files are written."""
    made = Path(tempfile.mkdtemp(dir="/dev/shm" if os.path.isdir("/dev/shm") else None))
    yield made
    shutil.rmtree(made)


@pytest.mark.parametrize("name", NAMES)
def test_the_files_are_whole(name: str, folder: Path) -> None:
    path = folder / name
    path.write_bytes(whole_files()[name])

    assert None is use(path)
    assert [] == [finding.code for finding in statedict.inspect(path).findings if finding.code == "extension"]


# Bytes before which nothing tells the format: a pickle below protocol 2 begins as a text does, and the mark of a tar archive
# stands at 257.
UNTOLD = {"p0.pkl": 5, "p1.pkl": 3, "old.tar": 262}


@pytest.mark.parametrize("name", NAMES)
def test_a_file_cut_anywhere_is_called_cut(name: str, folder: Path) -> None:
    data = whole_files()[name]
    path = folder / name
    step = max(1, len(data) // 400)
    lengths = {*range(1, 64), *range(64, len(data), step), *range(len(data) - 40, len(data))}
    wrong = []
    for length in sorted(lengths):
        path.write_bytes(data[:length])
        error = use(path)
        told = isinstance(error, CorruptFile) and "cut short" in str(error)
        told = told and re.search(r" bytes|at byte \d", str(error)) is not None
        if error is None or not (told or length < UNTOLD.get(name, 0)):
            wrong.append((length, str(error)))

    assert [] == wrong


Edit = tuple[str, float, bytes]
EDITS = st.lists(
    st.tuples(
        st.sampled_from(["set", "insert", "delete", "flip"]),
        st.floats(0, 1, exclude_max=True),
        st.binary(min_size=1, max_size=4),
    ),
    min_size=1,
    max_size=4,
)


def edited(data: bytes, edits: list[Edit]) -> bytes:
    """The bytes after each edit: what is done, where (a part of the length), and the bytes to do it with."""
    made = bytearray(data)
    for what, where, new in edits:
        at = int(where * len(made))
        if what == "set":
            made[at : at + len(new)] = new
        elif what == "insert":
            made[at:at] = new
        elif what == "delete":
            del made[at : at + len(new)]
        elif made:
            made[at] ^= 1 << new[0] % 8
    return bytes(made)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=120, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(edits=EDITS)
def test_a_changed_file_is_read_or_refused(name: str, folder: Path, edits: list[Edit]) -> None:
    path = folder / name
    path.write_bytes(edited(whole_files()[name], edits))
    use(path)


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(first=st.sampled_from(NAMES), second=st.sampled_from(NAMES), cut=st.floats(0, 1), go_on=st.floats(0, 1))
def test_two_files_joined_are_read_or_refused(folder: Path, first: str, second: str, cut: float, go_on: float) -> None:
    files = whole_files()
    head, tail = files[first], files[second]
    path = folder / first
    path.write_bytes(head[: int(cut * len(head))] + tail[int(go_on * len(tail)) :])
    use(path)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(edits=EDITS)
def test_a_changed_file_takes_no_memory_that_it_does_not_justify(name: str, folder: Path, edits: list[Edit]) -> None:
    data = edited(whole_files()[name], edits)
    path = folder / name
    path.write_bytes(data)
    tracemalloc.start()
    try:
        use(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()

    assert peak <= 64 * 1024 * 1024 + 4 * len(data)


# -------------------------------------------------------------------- what no mutation is likely to hit


def header_only(**info: object) -> bytes:
    """A safetensors file of one tensor with that header; the library writes no such shapes."""
    header = json.dumps({"w": info}).encode()
    return len(header).to_bytes(8, "little") + header


@pytest.mark.parametrize("shape", [[0, 2**62], [2**62, 0, 2**62], [0] + [1] * 70], ids=["long", "longer", "deep"])
def test_a_shape_that_numpy_has_not_is_an_error_of_ours(shape: list[int], tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(header_only(dtype="F32", shape=shape, data_offsets=[0, 0]))
    with statedict.open(path) as checkpoint:
        assert b"" == bytes(checkpoint["w"].read())
        with pytest.raises(Unsupported, match="numpy has no array of this shape"):
            checkpoint["w"].numpy()


def test_the_stride_of_a_single_row_may_be_any(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    values = torch.arange(6.0).reshape(2, 3)
    torch.save(values.as_strided((1, 3, 2), (2**62, 1, 3)), tmp_path / "m.pth")
    with statedict.open(tmp_path / "m.pth") as checkpoint:
        assert [values.T.tolist()] == checkpoint[()].numpy().tolist()


def test_indices_outside_a_sparse_tensor_are_an_error_of_ours(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    stream = io.BytesIO()
    torch.save({"w": torch.eye(3).to_sparse()}, stream)
    indices = np.array([0, 1, 2, 0, 1, 2], "<i8").tobytes()
    path = tmp_path / "m.pth"
    path.write_bytes(stream.getvalue().replace(indices, indices[:-8] + (2**40).to_bytes(8, "little")))
    with statedict.open(path) as checkpoint, pytest.raises(CorruptFile, match="don't fit together"):
        checkpoint["w"].torch()


def test_an_unknown_object_in_the_attributes_of_a_dict_is_refused_on_conversion(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    value: OrderedDict[str, object] = OrderedDict(w=torch.ones(2))
    value._metadata = {"": {"net": Net()}}  # type: ignore[attr-defined]
    torch.save(value, tmp_path / "m.pth")
    with pytest.raises(UnsafeContent, match="Net"):
        statedict.convert(tmp_path / "m.pth", tmp_path / "n.pth")


def test_a_name_with_a_line_break_stays_on_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    data = bytearray(zipped("m/data.pkl", "m/a\n\x1b[2J"))
    data[data.rfind(b"PK\x01\x02") + 20] += 1  # the size of the second entry, packed
    Path("m.pth").write_bytes(data)

    assert "'m/a\\n\\x1b[2J' has two sizes" in said_of("m.pth", capsys)
