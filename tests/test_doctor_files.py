"""What the doctor says about files that aren't what their names promise, are cut short, or were damaged."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from statedict import FileError, KeyNotFound, StateDictError
from statedict.formats.remains import remains_of
from statedict.io.ranges import MemoryFile
from statedict.manifest import Finding
from statedict.ops.diagnosing.contents import examine

torch = pytest.importorskip("torch")

from safetensors.torch import save_file  # noqa: E402

STATE = {f"layers.{at}.weight": torch.randn(100, 100, generator=torch.Generator().manual_seed(at)) for at in range(10)}
OID = "sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393"


def torch_zip(path: Path) -> None:
    torch.save(STATE, path)


def legacy(path: Path) -> None:
    torch.save(STATE, path, _use_new_zipfile_serialization=False)


def safetensors(path: Path) -> None:
    save_file(STATE, path)


WRITERS: dict[str, Callable[[Path], None]] = {"zip.pth": torch_zip, "old.pth": legacy, "m.safetensors": safetensors}


def one(path: Path) -> Finding:
    """The only finding about a file that can't be opened."""
    examination = examine(path)
    (finding,) = examination.findings

    assert not examination.facts["readable"]
    assert "error" == finding.level
    return finding


# -------------------------------------------------------------------- no checkpoints


@pytest.mark.parametrize("name", ["model.pth", "model.safetensors"])
def test_a_git_lfs_pointer_is_said_with_the_size_and_name_of_the_real_file(name: str, tmp_path: Path) -> None:
    text = f"version https://git-lfs.github.com/spec/v1\noid {OID}\nsize 391000000\n"
    (tmp_path / name).write_text(text, encoding="utf-8")
    finding = one(tmp_path / name)

    assert "pointer-file" == finding.code
    assert f"this file of {len(text)} bytes is a git-lfs pointer, not weights" in finding.message
    assert all(word in finding.message for word in ("391 MB", "`git lfs pull`", OID))


OTHERS = {
    "web-page": b"\n<!DOCTYPE html><html><head><title>Google Drive - Virus scan warning</title></head></html>",
    "text-file": b'{"error":"Repository not found"}',
    "all-zeros": bytes(4096),
    "empty-file": b"",
    "other-format": b"\x89HDF\r\n\x1a\n" + bytes(100),
}


@pytest.mark.parametrize("code", OTHERS)
def test_files_of_other_kinds_are_named(code: str, tmp_path: Path) -> None:
    (tmp_path / "model.pth").write_bytes(OTHERS[code])

    assert code == one(tmp_path / "model.pth").code


def test_a_page_is_quoted_by_its_title_and_an_error_by_its_words(tmp_path: Path) -> None:
    for name, code in (("page.pth", "web-page"), ("error.bin", "text-file")):
        (tmp_path / name).write_bytes(OTHERS[code])

    assert "Google Drive - Virus scan warning" in one(tmp_path / "page.pth").message
    assert "Repository not found" in one(tmp_path / "error.bin").message


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress])
def test_a_compressed_file_is_to_be_unpacked(pack: Callable[[bytes], bytes], tmp_path: Path) -> None:
    torch_zip(tmp_path / "plain.pth")
    (tmp_path / "model.pth.x").write_bytes(pack((tmp_path / "plain.pth").read_bytes()))
    finding = one(tmp_path / "model.pth.x")

    assert "still-packed" == finding.code
    assert "Unpack it" in finding.message


def test_archives_are_to_be_unpacked(tmp_path: Path) -> None:
    torch_zip(tmp_path / "plain.pth")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.write(tmp_path / "plain.pth", "plain.pth")
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.add(tmp_path / "plain.pth", "plain.pth")

    assert ["still-packed"] * 2 == [one(tmp_path / name).code for name in ("a.zip", "a.tar")]


def test_the_extension_of_another_format_is_said(tmp_path: Path) -> None:
    safetensors(tmp_path / "model.pth")

    assert ["extension"] == [finding.code for finding in examine(tmp_path / "model.pth").wrong]


# -------------------------------------------------------------------- cut short


@pytest.mark.parametrize("name", WRITERS)
def test_what_is_still_whole_of_a_truncated_file_is_counted(name: str, tmp_path: Path) -> None:
    WRITERS[name](tmp_path / "whole")
    data = (tmp_path / "whole").read_bytes()
    (tmp_path / name).write_bytes(data[: len(data) // 2])
    finding = one(tmp_path / name)

    assert "truncated" == finding.code
    assert f"the file ends at byte {len(data) // 2:,}" in finding.message
    assert "4 of 10 tensors are still whole" in finding.message
    assert 6 == len(finding.keys)


@pytest.mark.parametrize("name", WRITERS)
def test_a_file_that_ends_in_its_header_is_truncated(name: str, tmp_path: Path) -> None:
    WRITERS[name](tmp_path / "whole")
    (tmp_path / name).write_bytes((tmp_path / "whole").read_bytes()[:300])

    assert "truncated" == one(tmp_path / name).code


@pytest.mark.parametrize("name", WRITERS)
@settings(max_examples=30)
@given(share=st.floats(0, 1))
def test_the_remains_are_exactly_the_tensors_whose_bytes_are_there(name: str, share: float) -> None:
    data = written(name)
    file = MemoryFile(data[: int(len(data) * share)])
    found = remains_of(file)
    if found is not None:
        there = {key for key, tensor in STATE.items() if tensor.numpy().tobytes() in data[: file.nbytes]}

        assert there == set(found.whole)
        assert set(STATE) == there | set(found.lost)


_WRITTEN: dict[str, bytes] = {}


def written(name: str) -> bytes:
    """The bytes of the file that torch or safetensors writes, made once."""
    if name not in _WRITTEN:
        import tempfile

        with tempfile.TemporaryDirectory() as folder:
            WRITERS[name](Path(folder) / "file")
            _WRITTEN[name] = (Path(folder) / "file").read_bytes()
    return _WRITTEN[name]


@settings(max_examples=60)
@given(
    name=st.sampled_from(sorted(WRITERS)),
    at=st.integers(0, 2000),
    value=st.integers(0, 255),
    length=st.integers(0, 500_000),
)
def test_no_damage_ends_in_another_exception(name: str, at: int, value: int, length: int) -> None:
    data = bytearray(written(name)[: max(length, at + 1)])
    data[min(at, len(data) - 1)] = value

    remains_of(MemoryFile(bytes(data)))


# -------------------------------------------------------------------- bits that changed


@pytest.mark.parametrize("bit", [0, 3, 7])
def test_a_flipped_bit_is_found_by_the_check_sum(bit: int, tmp_path: Path) -> None:
    data = bytearray(written("zip.pth"))
    at = data.find(STATE["layers.3.weight"].numpy().tobytes())
    data[at + 1001] ^= 1 << bit
    (tmp_path / "model.pth").write_bytes(data)
    findings = [finding for finding in examine(tmp_path / "model.pth").findings if finding.code == "damaged-tensors"]

    assert [("layers.3.weight",)] == [finding.keys for finding in findings]


@pytest.mark.parametrize("state", [STATE, {"fc.weight": torch.randn(4, 4)}])
def test_a_file_without_check_sums_is_not_called_damaged(state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(state, tmp_path / "model.pth")
    finally:
        torch.serialization.set_crc32_options(True)
    examination = examine(tmp_path / "model.pth")

    assert not examination.wrong
    assert "no-crc" in {finding.code for finding in examination.findings}


# -------------------------------------------------------------------- several files


def sharded(folder: Path) -> Path:
    """Ten layers in two shards with their index."""
    names = list(STATE)
    shards = {"model-00001-of-00002.safetensors": names[:6], "model-00002-of-00002.safetensors": names[6:]}
    for shard, keys in shards.items():
        save_file({key: STATE[key] for key in keys}, folder / shard)
    weight_map = {key: shard for shard, keys in shards.items() for key in keys}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def test_a_missing_shard_is_named_with_the_layers_that_are_in_it(tmp_path: Path) -> None:
    (sharded(tmp_path) / "model-00002-of-00002.safetensors").unlink()
    finding = one(tmp_path)

    assert "missing-shards" == finding.code
    assert "'layers.{6…9}.weight'" in finding.message
    assert tuple(list(STATE)[6:]) == finding.keys


def test_all_shards_together_are_fine(tmp_path: Path) -> None:
    assert not examine(sharded(tmp_path)).wrong


def test_one_shard_alone_is_said_to_be_one_of_several(tmp_path: Path) -> None:
    codes = {finding.code for finding in examine(sharded(tmp_path) / "model-00001-of-00002.safetensors").wrong}

    assert {"one-shard"} == codes


def test_one_slice_of_a_parallel_model_is_said_where_the_others_lie_beside_it(tmp_path: Path) -> None:
    for rank in range(2):
        torch.save(STATE, tmp_path / f"consolidated.0{rank}.pth")

    assert {"one-slice"} == {finding.code for finding in examine(tmp_path / "consolidated.00.pth").wrong}


def test_a_folder_of_deepspeed_is_to_be_made_one_file(tmp_path: Path) -> None:
    (tmp_path / "global_step100").mkdir()
    (tmp_path / "latest").write_text("global_step100")
    finding = one(tmp_path)

    assert "deepspeed-folder" == finding.code
    assert "zero_to_fp32.py" in finding.message


# -------------------------------------------------------------------- not the file's fault


def test_a_file_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileError):
        examine(tmp_path / "nothing.pth")


def test_a_key_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    torch_zip(tmp_path / "model.pth")
    with pytest.raises(KeyNotFound):
        examine(tmp_path / "model.pth", at="nothing")


def test_an_object_that_is_no_source_is_an_error() -> None:
    with pytest.raises(StateDictError):
        examine(3)


SMALL = {
    "layers.0.weight": torch.ones(3, 4),
    "layers.1.weight": torch.randn(4, 4),
    "norm.num_batches_tracked": torch.tensor(3),
}


@settings(max_examples=200)
@given(
    name=st.sampled_from(sorted(WRITERS)), at=st.integers(0, 5000), value=st.integers(0, 255), cut=st.integers(0, 3000)
)
def test_the_doctor_of_any_damaged_file_says_something_or_refuses(
    name: str, at: int, value: int, cut: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("damaged")
    if name == "m.safetensors":
        save_file(SMALL, folder / name)
    else:
        torch.save(SMALL, folder / name, _use_new_zipfile_serialization=name == "zip.pth")
    data = bytearray((folder / name).read_bytes())
    data[at % len(data)] = value
    (folder / name).write_bytes(data[: len(data) - cut] if cut < len(data) else data)
    try:
        examine(folder / name).document()
    except StateDictError:
        pass


def test_a_name_of_many_components_costs_no_more_than_others() -> None:
    examine({"0." * 100_000 + "weight": torch.randn(3, 3), "a.0.w": torch.ones(2), "a.999999.w": torch.ones(2)})
