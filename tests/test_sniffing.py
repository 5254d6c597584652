"""The format of a file is told by its content; a name that says otherwise is a finding."""

from __future__ import annotations

import io
import pickle
import tarfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save

import statedict
from statedict.errors import UnknownFormat, Unsupported
from statedict.formats import sniff
from statedict.io.ranges import LocalFile, MemoryFile


def kind_of(data: bytes, name: str = "file") -> str:
    return sniff(MemoryFile(data, name))


def written(write: Callable[[io.BytesIO], object]) -> bytes:
    stream = io.BytesIO()
    write(stream)
    return stream.getvalue()


def zipped(*names: str, data: bytes = b"abc") -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name in names:
            archive.writestr(name, data)
    return stream.getvalue()


def tarred(*names: str) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for name in names:
            archive.addfile(tarfile.TarInfo(name))
    return stream.getvalue()


def torch_file(value: object, **options: Any) -> bytes:
    torch = pytest.importorskip("torch")
    return written(lambda stream: torch.save(value, stream, **options))


WEIGHTS = {"w": np.ones((2, 3), "f4")}
SAFETENSORS = save(WEIGHTS)
NPY = written(lambda stream: np.save(stream, WEIGHTS["w"]))
NPZ = written(lambda stream: np.savez(stream, **WEIGHTS))
PICKLE = pickle.dumps(WEIGHTS)


@pytest.mark.parametrize("name", ["file", "m.pth", "m.safetensors", "m.npz", "m.txt"])
@pytest.mark.parametrize(
    ("data", "kind"), [(SAFETENSORS, "safetensors"), (NPY, "npy"), (NPZ, "npz"), (PICKLE, "pickle")]
)
def test_the_content_decides_and_not_the_name(data: bytes, kind: str, name: str) -> None:
    assert kind == kind_of(data, name)


@pytest.mark.parametrize("protocol", [1, 2, 3, 4, 5])
def test_a_stream_of_torch_is_told_in_every_protocol(protocol: int) -> None:
    torch = pytest.importorskip("torch")
    value = {"w": torch.ones(3)}

    assert "torch-legacy" == kind_of(torch_file(value, _use_new_zipfile_serialization=False, pickle_protocol=protocol))
    assert "torch-zip" == kind_of(torch_file(value, pickle_protocol=protocol))


def test_torchscript_is_one_of_torchs_zip_archives(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    with pytest.warns(DeprecationWarning):
        torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "s.pt")

    assert "torch-zip" == sniff(LocalFile(str(tmp_path / "s.pt")))


def test_a_pickle_that_begins_with_torchs_number_but_goes_on_is_a_pickle() -> None:
    assert "pickle" == kind_of(pickle.dumps([0x1950A86A20F9469CFC6C, WEIGHTS]))


VALUES: list[object] = [
    WEIGHTS,
    OrderedDict(WEIGHTS),
    [np.ones(2)],
    (np.ones(2), 1),
    np.ones(2),
    np.float32(3),
    {},
    [],
    (),
    1.5,
    7,
    None,
    True,
    "a text",
    b"bytes",
    {1, 2},
    pickle.PickleError("x"),
    10**30,
]


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("value", VALUES, ids=[f"{at}" for at in range(len(VALUES))])
def test_a_pickle_is_told_in_every_protocol(value: object, protocol: int) -> None:
    assert "pickle" == kind_of(pickle.dumps(value, protocol))


def test_a_long_pickle_is_not_interpreted_to_its_end_to_be_told() -> None:
    assert "pickle" == kind_of(pickle.dumps((1,) * 1_100_000, 0)[:-1])


@pytest.mark.parametrize(
    "text",
    [
        "cat\ndog\nbird\n",
        "checkpoint\nmodel.bin\n",
        "class Net(nn.Module):\n    pass\n",
        "copy_reg is a module\n",
        "(c) 2024 by me.\n",
        "(dp is a name)\n",
        "I am a text.\n",
        "I1 2\n.",
        "Very short note.",
        "Vx\n. and more",
        "No.",
        "]q\n",
        "}\n",
        ")",
        "import torch\n",
        "learning_rate: 0.1\n",
        "key = 'value'\n",
    ],
)
def test_a_text_is_no_pickle(text: str) -> None:
    with pytest.raises(UnknownFormat, match="this is a text"):
        kind_of(text.encode())


@pytest.mark.parametrize("names", [("x.npy",), ("x.npy", "info.txt"), ("a/x.npy", "a/")])
def test_an_archive_of_arrays_is_told_by_its_entries(names: tuple[str, ...]) -> None:
    assert "npz" == kind_of(zipped(*names))


@pytest.mark.parametrize("names", [("m/data.pkl",), ("m/data/0", "m/version"), ("m/x", "m/data.pkl", "m/y.npy")])
def test_an_archive_of_torch_is_told_by_its_entries(names: tuple[str, ...]) -> None:
    assert "torch-zip" == kind_of(zipped(*names))


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (("[Content_Types].xml", "word/document.xml"), "a Word document"),
        (("xl/workbook.xml",), "an Excel workbook"),
        (("ppt/presentation.xml",), "a PowerPoint presentation"),
        (("mimetype", "content.xml"), "an OpenDocument file or an e-book"),
        (("META-INF/MANIFEST.MF", "a.class"), "a Java archive"),
        (("AndroidManifest.xml", "META-INF/MANIFEST.MF"), "an Android package"),
        (("pkg/__init__.py", "pkg-1.0.dist-info/WHEEL"), "a Python wheel"),
        (("metadata.json", "config.json", "model.weights.h5"), "a model of Keras"),
        (("model/saved_model.pb", "model/variables/variables.index"), "a packed SavedModel of TensorFlow"),
        (("a.txt",), "a zip archive of 1 file (a.txt)"),
        (("d/", "d/a", "d/b", "d/c", "d/e"), "a zip archive of 4 files (d/a, d/b, d/c, …)"),
        (("a\x1b[2J\n",), "a zip archive of 1 file (a\\x1b[2J\\n)"),
        (("code.py", "test.npy", "more.py"), "a zip archive of 3 files"),
    ],
)
def test_another_zip_archive_is_named(names: tuple[str, ...], said: str) -> None:
    with pytest.raises(UnknownFormat) as error:
        kind_of(zipped(*names), "m.zip")

    assert f"m.zip: this is {said}" in str(error.value)


@pytest.mark.parametrize("inner", ["policy.pth", "model.safetensors", "run/pytorch_model.bin", "last.CKPT"])
@pytest.mark.parametrize(("pack", "command"), [(zipped, "unzip"), (tarred, "tar xf")])
def test_an_archive_around_a_checkpoint_is_to_be_unpacked(pack: Callable[..., bytes], command: str, inner: str) -> None:
    with pytest.raises(UnknownFormat) as error:
        kind_of(pack("readme.md", inner), "dir/my model")

    assert f"Unpack it, it holds '{inner}': {command} 'dir/my model'" == error.value.hint


def test_a_package_of_torch_is_named(tmp_path: Path) -> None:
    package = pytest.importorskip("torch.package")
    with package.PackageExporter(tmp_path / "p.pt") as exporter:
        exporter.save_pickle("model", "model.pkl", {"a": 1})
    with pytest.raises(Unsupported, match=r"torch\.package.*PackageImporter"):
        statedict.open(tmp_path / "p.pt")


@pytest.mark.parametrize(
    "names", [("e/data/weights/weight_0", "e/archive_format"), ("serialized_exported_program.json",)]
)
def test_an_exported_program_is_named(names: tuple[str, ...]) -> None:
    with pytest.raises(Unsupported, match=r"torch\.export"):
        kind_of(zipped(*names))


@pytest.mark.parametrize(
    ("names", "kind"), [(("sys_info", "pickle"), "torch-tar"), (("./a", "./storages", "./pickle"), "torch-tar")]
)
def test_a_tar_of_torch_is_told_by_its_members(names: tuple[str, ...], kind: str) -> None:
    assert kind == kind_of(tarred(*names))


def test_another_tar_archive_is_named() -> None:
    with pytest.raises(UnknownFormat, match=r"a tar archive of 2 files \(a\.txt, b\.txt\).*tar xf file"):
        kind_of(tarred("a.txt", "b.txt"))


def test_a_distributed_checkpoint_is_named(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    checkpoint = pytest.importorskip("torch.distributed.checkpoint")
    with pytest.warns(UserWarning, match="single process"):
        checkpoint.save({"a": torch.ones(2), "b": torch.ones(3)}, checkpoint_id=tmp_path / "d")
    for name, said in (
        ("", "It is a distributed checkpoint"),
        (".metadata", "dcp_to_torch"),
        ("__0_0.distcp", "dcp_to_torch"),
    ):
        with pytest.raises(UnknownFormat, match=said):
            statedict.open(tmp_path / "d" / name)


ORDINARY = [
    (PICKLE, "m.pkl m.pickle m.pth m.pt m.bin m.ckpt m.th m.model m.weights m.p m .pth m.v2 m.tar"),
    (SAFETENSORS, "m.safetensors M.SAFETENSORS m.sft m m.weights m.model .safetensors"),
    (NPZ, "m.npz m m.zip m.weights"),
    (NPY, "m.npy m m.dat"),
]
LYING = [
    (PICKLE, "m.safetensors m.sft m.npz m.npy m.h5 m.onnx m.gguf m.keras"),
    (SAFETENSORS, "m.pth m.PT m.bin m.ckpt m.pth.tar m.npz m.pkl m.h5 x.y/m.pth"),
    (NPZ, "m.npy m.pth m.safetensors"),
    (NPY, "m.npz m.pt m.safetensors"),
]


def extension_findings(data: bytes, name: str, folder: Path) -> list[tuple[str, str]]:
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)
    return [(each.level, each.message) for each in statedict.inspect(path).findings if each.code == "extension"]


@pytest.mark.parametrize(("data", "name"), [(data, name) for data, names in ORDINARY for name in names.split()])
def test_an_ordinary_name_is_no_finding(data: bytes, name: str, tmp_path: Path) -> None:
    assert [] == extension_findings(data, name, tmp_path)


@pytest.mark.parametrize(("data", "name"), [(data, name) for data, names in LYING for name in names.split()])
def test_a_name_that_lies_is_a_finding(data: bytes, name: str, tmp_path: Path) -> None:
    ((level, message),) = extension_findings(data, name, tmp_path)

    assert "warning" == level
    assert f"the name ends in .{name.rpartition('.')[2].lower()}, but the file is a" in message


def test_the_finding_says_what_breaks(tmp_path: Path) -> None:
    ((_, message),) = extension_findings(torch_file({"a": 1}), "m.safetensors", tmp_path)

    assert (
        "the name ends in .safetensors, but the file is a zip archive of torch.save: torch.load and other loaders take it "
        "for safetensors by its name and fail. Rename it to end in .pth"
    ) == message


@pytest.mark.parametrize("name", ["m.pth", "m.pt", "m.bin", "m.ckpt", "m.ptl", "m.th", "m.zip", "m.pth.tar"])
@pytest.mark.parametrize("zip_format", [True, False])
def test_torchs_own_names_are_no_finding(zip_format: bool, name: str, tmp_path: Path) -> None:
    data = torch_file({"a": 1}, _use_new_zipfile_serialization=zip_format)

    assert [] == extension_findings(data, name, tmp_path)
