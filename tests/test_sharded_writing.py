"""A checkpoint written in several files: what other readers find in them, and what a failure leaves behind."""

from __future__ import annotations

import errno
import json
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

import statedict
from statedict import FileError, TargetExists, Unsupported
from statedict.errors import CorruptFile, StateDictError
from statedict.io import durable_folders
from statedict.ops.shards import parse_size, shard_target

INDEX = "model.safetensors.index.json"


def shard(number: int, count: int, stem: str = "model") -> str:
    return f"{stem}-{number:05d}-of-{count:05d}.safetensors"


def sized(*counts: int) -> dict[str, Any]:
    """Tensors of so many bytes each, named in their order."""
    return {f"t{at}": np.full(count, at, "u1") for at, count in enumerate(counts)}


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def state_of(folder: Path) -> dict[str, bytes]:
    """Every file below a folder and its bytes."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def weight_map(folder: Path, name: str = INDEX) -> dict[str, str]:
    found: dict[str, str] = json.loads((folder / name).read_text())["weight_map"]
    return found


def by_library(folder: Path, name: str = INDEX) -> dict[str, Any]:
    """What the safetensors library finds in the shards of an index."""
    found: dict[str, Any] = {}
    for each in sorted(set(weight_map(folder, name).values())):
        with safe_open(folder / each, "np") as file:
            keys = list(file.keys())
            found.update({key: file.get_tensor(key) for key in keys})
    return found


# -------------------------------------------------------------------- what is written


@pytest.mark.parametrize(
    ("counts", "most", "groups"),
    [
        ([4, 4, 4], 8, [["t0", "t1"], ["t2"]]),
        ([4, 4, 4], 7, [["t0"], ["t1"], ["t2"]]),
        ([3, 9, 3, 3], 8, [["t1"], ["t0", "t2"], ["t3"]]),
        ([9, 9], 8, [["t0"], ["t1"]]),
        ([0, 8, 0, 1], 8, [["t0", "t1", "t2"], ["t3"]]),
    ],
)
def test_tensors_are_cut_in_order_and_a_large_one_stands_alone(
    counts: list[int], most: int, groups: list[list[str]], tmp_path: Path
) -> None:
    # What huggingface_hub's split_torch_state_dict_into_shards gives for these sizes.
    tensors = sized(*counts)
    statedict.convert(tensors, tmp_path / "out", max_shard_size=most)
    found = weight_map(tmp_path / "out")
    files = [shard(at, len(groups)) for at in range(1, len(groups) + 1)]

    assert [*files, INDEX] == names(tmp_path / "out")
    assert {key: files[at] for at, group in enumerate(groups) for key in group} == found
    assert sorted(found) == list(found)
    assert {key: value.tolist() for key, value in tensors.items()} == {
        key: value.tolist() for key, value in by_library(tmp_path / "out").items()
    }
    with statedict.open(tmp_path / "out") as checkpoint:
        assert list(tensors) == list(checkpoint)


def test_the_index_is_as_the_hub_writes_it(tmp_path: Path) -> None:
    statedict.convert(sized(4, 4, 9), tmp_path / "out", max_shard_size=8)
    text = (tmp_path / "out" / INDEX).read_text()
    found = json.loads(text)

    assert json.dumps(found, indent=2, sort_keys=True) + "\n" == text
    assert {"metadata", "weight_map"} == set(found)
    assert 17 == found["metadata"]["total_size"]
    for name in set(found["weight_map"].values()):
        with safe_open(tmp_path / "out" / name, "np") as file:
            assert "pt" == file.metadata()["format"]
            assert {key for key, home in found["weight_map"].items() if home == name} == set(file.keys())


@pytest.mark.parametrize(
    ("target", "size", "files"),
    [
        ("out/", 8, [f"out/{shard(1, 2)}", f"out/{shard(2, 2)}", f"out/{INDEX}"]),
        ("out", 8, [f"out/{shard(1, 2)}", f"out/{shard(2, 2)}", f"out/{INDEX}"]),
        ("out/", None, ["out/model.safetensors"]),
        ("m.safetensors", "12B", ["m.safetensors"]),
        ("m.safetensors", 8, [shard(1, 2, "m"), shard(2, 2, "m"), "m.safetensors.index.json"]),
        ("m.safetensors.index.json", 8, [shard(1, 2, "m"), shard(2, 2, "m"), "m.safetensors.index.json"]),
        ("m.safetensors.index.json", None, [shard(1, 1, "m"), "m.safetensors.index.json"]),
        ("m.index.json", 8, [shard(1, 2, "m"), shard(2, 2, "m"), "m.index.json"]),
    ],
)
def test_the_target_says_what_the_files_are_called(
    target: str, size: int | str | None, files: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = statedict.convert(sized(4, 4, 4), target, max_shard_size=size)

    assert files == sorted(state_of(tmp_path))
    assert sum(len(data) for data in state_of(tmp_path).values()) == result.nbytes
    assert "sharded" if len(files) > 1 else "safetensors" == result.target_format
    with statedict.open(files[-1]) as checkpoint:
        assert [4, 4, 4] == [checkpoint[key].nbytes for key in checkpoint]


def test_an_existing_folder_is_written_into(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    statedict.convert(sized(4, 4), tmp_path, max_shard_size=4)

    assert ["config.json", shard(1, 2), shard(2, 2), INDEX] == names(tmp_path)


@pytest.mark.parametrize("name", ["m.pth", "m.npz", "m.txt", "m.bin.index.json", ".index.json"])
def test_other_formats_are_not_cut(name: str, tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match="as safetensors only"):
        statedict.convert(sized(1), tmp_path / name, max_shard_size=8)
    assert [] == names(tmp_path)


@pytest.mark.parametrize(
    ("size", "nbytes"),
    [
        (5, 5), ("5", 5), ("5B", 5), ("5GB", 5 * 10**9), ("5gb", 5 * 10**9), ("5GiB", 5 * 2**30), ("1.5MB", 1_500_000),
        ("0.5KiB", 512), ("2 TB", 2 * 10**12), (" 7K ", 7000), ("500M", 5 * 10**8),
    ],
)  # fmt: skip
def test_a_size_is_a_number_or_a_text(size: int | str, nbytes: int) -> None:
    assert nbytes == parse_size(size)


@pytest.mark.parametrize("size", [0, -1, "", "GB", "5XB", "-5GB", "0GB", "5iB", "1e9", "٥GB", True, "9" * 400, "5GB5"])
def test_what_is_no_size_is_refused(size: Any) -> None:
    with pytest.raises(StateDictError, match="no size of a shard"):
        parse_size(size)


def test_a_size_without_a_target_for_it_changes_nothing() -> None:
    assert [None, None] == [shard_target("m.pth", None), shard_target("", "5GB")]


def test_a_dry_run_counts_every_file_and_writes_none(tmp_path: Path) -> None:
    result = statedict.convert(sized(4, 4, 4), tmp_path / "out", max_shard_size=8, dry_run=True)
    real = statedict.convert(sized(4, 4, 4), tmp_path / "real", max_shard_size=8)

    assert (result.nbytes, "sharded") == (real.nbytes, result.target_format)
    assert ["real"] == names(tmp_path)


def test_the_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        statedict.convert(sized(4, 9, 4), tmp_path / name, max_shard_size=8)

    assert state_of(tmp_path / "a") == state_of(tmp_path / "b")


def test_progress_is_counted_over_all_files(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    result = statedict.convert(
        sized(40, 90, 4), tmp_path / "out", max_shard_size=80, on_progress=lambda done, of: seen.append((done, of))
    )

    assert sorted(seen) == seen
    assert {result.nbytes} == {of for _, of in seen}
    assert result.nbytes == seen[-1][0]


def test_the_mode_follows_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        statedict.convert(sized(4, 4), tmp_path / "out", max_shard_size=4)
    finally:
        os.umask(before)

    assert 0o750 == stat.S_IMODE((tmp_path / "out").stat().st_mode)
    assert {0o640} == {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "out").iterdir()}


# -------------------------------------------------------------------- nothing is lost


def test_torch_has_back_what_it_had_saved(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    weight = torch.randn(40, 10)
    model = torch.nn.Sequential(torch.nn.Linear(10, 4), torch.nn.BatchNorm1d(4))
    value = {
        "model": model.state_dict(),
        "tied": weight,
        "again": weight,
        "turned": weight[:7].t(),
        "complex": torch.randn(3, dtype=torch.complex128),
        "sparse": torch.eye(3).to_sparse(),
        "state": {0: {"step": torch.tensor(3.0)}, "lr": 0.1},
        "steps": [1, (2, None)],
        "bfloat16": torch.randn(9).bfloat16(),
    }
    torch.save(value, tmp_path / "source.pth")
    statedict.convert(tmp_path / "source.pth", tmp_path / "single.safetensors")
    statedict.convert(tmp_path / "single.safetensors", tmp_path / "direct.pth")
    statedict.convert(tmp_path / "source.pth", tmp_path / "out", max_shard_size=100)
    statedict.convert(tmp_path / "out", tmp_path / "back.pth")

    assert len(names(tmp_path / "out")) > 5
    assert (tmp_path / "direct.pth").read_bytes() == (tmp_path / "back.pth").read_bytes()


def test_a_tied_tensor_is_in_one_shard_and_its_alias_named_there(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    weight = torch.randn(4, 4)
    statedict.convert(
        {"embed.weight": weight, "b": torch.ones(8), "head.weight": weight}, tmp_path / "out", max_shard_size=64
    )
    with safe_open(tmp_path / "out" / shard(1, 2), "pt") as file:
        first = file.metadata()
    with safe_open(tmp_path / "out" / shard(2, 2), "pt") as file:
        second = file.metadata()
    found = statedict.load(tmp_path / "out")

    assert {"embed.weight", "b"} == set(weight_map(tmp_path / "out"))
    assert ("embed.weight", False) == (first["head.weight"], "head.weight" in second)
    assert found["embed.weight"].data_ptr() == found["head.weight"].data_ptr()
    assert {"format": "pt"} == dict(statedict.open(tmp_path / "out").metadata)


def test_texts_of_the_metadata_are_in_every_shard(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    save_file(sized(4, 4), tmp_path / "a.safetensors", metadata={"format": "pt", "license": "MIT"})
    statedict.convert(tmp_path / "a.safetensors", tmp_path / "out", max_shard_size=4)
    with safe_open(tmp_path / "out" / shard(2, 2), "np") as file:
        assert "MIT" == file.metadata()["license"]
    with statedict.open(tmp_path / "out") as checkpoint:
        assert {"format": "pt", "license": "MIT"} == dict(checkpoint.metadata)


def test_a_changed_byte_is_found_in_a_shard(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    tensors = {name: torch.from_numpy(values) for name, values in sized(400, 400).items()}
    statedict.convert(tensors, tmp_path / "out", max_shard_size=400)
    path = tmp_path / "out" / shard(2, 2)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)

    with pytest.raises(CorruptFile, match="t1") as caught:
        statedict.load(tmp_path / "out")
    assert str(path) == caught.value.path


def test_a_shard_of_ours_is_a_checkpoint_by_itself(tmp_path: Path) -> None:
    statedict.convert({"model": sized(4, 4)}, tmp_path / "out", max_shard_size=4)
    with statedict.open(tmp_path / "out" / shard(2, 2)) as checkpoint:
        entry = checkpoint["model.t1"].entry

        assert ["model.t1"] == list(checkpoint)
        assert entry.digest is not None
        assert () == checkpoint.manifest.notes


def test_without_digests_none_is_in_a_shard(tmp_path: Path) -> None:
    statedict.convert(sized(4, 4), tmp_path / "out", max_shard_size=4, digests=False)
    with safe_open(tmp_path / "out" / shard(1, 2), "np") as file:
        assert {"format": "pt"} == file.metadata()


def test_an_index_that_another_program_made_anew_still_opens(tmp_path: Path) -> None:
    statedict.convert(sized(4, 4, 4), tmp_path / "out", max_shard_size=8)
    path = tmp_path / "out" / INDEX
    path.write_text(json.dumps({"metadata": {"total_size": 12}, "weight_map": weight_map(tmp_path / "out")}))
    with statedict.open(tmp_path / "out") as checkpoint:
        assert (["t0", "t1", "t2"], ()) == (list(checkpoint), checkpoint.manifest.notes)


def test_a_tree_without_tensors_has_an_index_too(tmp_path: Path) -> None:
    statedict.convert({"epoch": 3}, tmp_path / "m.safetensors.index.json")
    with statedict.open(tmp_path / "m.safetensors.index.json") as checkpoint:
        assert {"epoch": 3} == checkpoint.objects


# -------------------------------------------------------------------- what is there already


@pytest.mark.parametrize("there", [INDEX, "model.safetensors", shard(2, 2)])
def test_nothing_is_replaced_unasked(there: str, tmp_path: Path) -> None:
    (tmp_path / there).write_bytes(b"precious")

    with pytest.raises(TargetExists) as caught:
        statedict.convert(sized(4, 4), tmp_path, max_shard_size=4)
    assert str(tmp_path / there) == caught.value.path
    assert {there: b"precious"} == state_of(tmp_path)


def test_the_old_checkpoint_goes_when_it_may_be_replaced(tmp_path: Path) -> None:
    statedict.convert(sized(4, 4, 4), tmp_path, max_shard_size=4)
    (tmp_path / "other-00001-of-00001.safetensors").write_bytes(b"another's")
    statedict.convert(sized(5, 5), tmp_path, max_shard_size=5, overwrite=True)
    two = names(tmp_path)
    statedict.convert(sized(6), tmp_path, overwrite=True)
    one = names(tmp_path)
    statedict.convert(sized(7, 7), tmp_path, max_shard_size=7, overwrite=True)

    assert [shard(1, 2), shard(2, 2), INDEX, "other-00001-of-00001.safetensors"] == two
    assert ["model.safetensors", "other-00001-of-00001.safetensors"] == one
    assert two == names(tmp_path)
    assert [7, 7] == [value.nbytes for value in by_library(tmp_path).values()]


def test_shards_are_never_converted_in_their_own_place(tmp_path: Path) -> None:
    statedict.convert(sized(4, 4), tmp_path / "out", max_shard_size=4)
    before = state_of(tmp_path)

    for size in (4, 100):
        with pytest.raises(FileError, match="its own place"):
            statedict.convert(tmp_path / "out", tmp_path / "out", max_shard_size=size, overwrite=True)
    assert before == state_of(tmp_path)


@pytest.mark.parametrize("kind", ["file", "parent", "link", "folder"])
def test_a_place_that_can_not_be_written_is_named(kind: str, tmp_path: Path) -> None:
    target = tmp_path / "out"
    if kind == "file":
        target.write_bytes(b"x")
    elif kind == "link":
        target.mkdir()
        (target / shard(1, 2)).symlink_to(tmp_path / "elsewhere")
    elif kind == "folder":
        (target / shard(1, 2)).mkdir(parents=True)
    path = tmp_path / "missing" / "out" if kind == "parent" else target
    before = state_of(tmp_path)

    with pytest.raises(FileError) as caught:
        statedict.convert(sized(4, 4), f"{path}/", max_shard_size=4, overwrite=True)
    assert str(path) in str(caught.value.path)
    assert before == state_of(tmp_path)


# -------------------------------------------------------------------- what a failure leaves


def fail(monkeypatch: pytest.MonkeyPatch, name: str, at: int, error: BaseException) -> None:
    """Let the ``at``-th call of that function of ``os`` fail."""
    real: Callable[..., Any] = getattr(os, name)
    calls = 0

    def failing(*args: object, **kwargs: object) -> Any:
        nonlocal calls
        calls += 1
        if calls == at:
            raise error
        return real(*args, **kwargs)

    monkeypatch.setattr(os, name, failing)


FAILURES = [("fsync", at) for at in range(1, 13)] + [("rename", at) for at in range(1, 6)] + [
    ("link", at) for at in range(1, 8)] + [("mkdir", 1), ("mkdir", 2), ("pwritev", 1), ("posix_fallocate", 2)]  # fmt: skip


@pytest.mark.parametrize("error", [OSError(errno.EIO, "failing"), KeyboardInterrupt()], ids=["error", "interrupt"])
@pytest.mark.parametrize("state", ["new", "empty", "replaced"])
@pytest.mark.parametrize(("name", "at"), FAILURES)
def test_a_failure_at_any_step_leaves_what_was_there(
    name: str, at: int, state: str, error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "out"
    if state == "empty":
        target.mkdir()
    elif state == "replaced":
        statedict.convert(sized(8, 8), target, max_shard_size=8)
    before, folders = state_of(tmp_path), sorted(tmp_path.rglob("*"))
    fail(monkeypatch, name, at, error)
    try:
        statedict.convert(sized(4, 4, 4), target, max_shard_size=8, overwrite=state == "replaced")
    except (FileError, KeyboardInterrupt) as caught:
        monkeypatch.undo()
        assert before == state_of(tmp_path)
        assert folders == sorted(tmp_path.rglob("*"))
        assert isinstance(caught, KeyboardInterrupt) or str(target) in str(caught.path)
        assert "statedict-tmp" not in str(caught)
    else:
        monkeypatch.undo()
        assert [4, 4, 4] == [value.nbytes for value in by_library(target).values()]


def test_a_file_system_without_hard_links_will_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*args: object, **kwargs: object) -> None:
        raise OSError(errno.EPERM, "no links here")

    statedict.convert(sized(8, 8), tmp_path, max_shard_size=8)
    monkeypatch.setattr(os, "link", no_links)
    statedict.convert(sized(4, 4), tmp_path, max_shard_size=4, overwrite=True)

    assert [4, 4] == [value.nbytes for value in by_library(tmp_path).values()]
    assert 3 == len(names(tmp_path))


def test_a_file_that_appears_meanwhile_is_never_clobbered(tmp_path: Path) -> None:
    def appear(done: int, of: int) -> None:
        (tmp_path / shard(2, 2)).write_bytes(b"precious")

    with pytest.raises(TargetExists):
        statedict.convert(sized(4, 4), tmp_path, max_shard_size=4, on_progress=appear)
    assert {shard(2, 2): b"precious"} == state_of(tmp_path)


def test_bytes_that_the_disk_has_changed_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwritev

    def damaging(fd: int, buffers: list[memoryview], offset: int) -> int:
        changed = [bytearray(buffer) for buffer in buffers]
        if offset == 0 and changed[0][-4:] == bytes([1] * 4):
            changed[0][-1] ^= 1
        return real(fd, changed, offset)

    monkeypatch.setattr(os, "pwritev", damaging)
    with pytest.raises(CorruptFile, match="other bytes than were written") as caught:
        statedict.convert(sized(4, 4), tmp_path / "out", max_shard_size=4)
    assert (str(tmp_path / "out" / shard(2, 2)), []) == (caught.value.path, names(tmp_path))


KILLED = """
import os, sys
import numpy as np
import statedict
name, at = sys.argv[2], int(sys.argv[3])
real, calls = getattr(os, name), 0
def dying(*args, **kwargs):
    global calls
    calls += 1
    if calls == at:
        os._exit(9)
    return real(*args, **kwargs)
setattr(os, name, dying)
statedict.convert({f"t{at}": np.full(4, at, "u1") for at in range(3)}, sys.argv[1], max_shard_size=4, overwrite=True)
"""


@pytest.mark.parametrize("state", ["new", "replaced"])
@pytest.mark.parametrize(
    ("name", "at"), [("fsync", 1), ("fsync", 7), ("rename", 2), ("rename", 4), ("link", 5), ("link", 6)]
)
def test_what_a_killed_process_left_is_put_right_by_the_next(name: str, at: int, state: str, tmp_path: Path) -> None:
    target = tmp_path / "out"
    if state == "replaced":
        statedict.convert(sized(8, 8, 8), target, max_shard_size=8)
    before = state_of(target)
    run = subprocess.run([sys.executable, "-c", KILLED, str(target), name, str(at)], check=False)
    # One folder, whatever is in it.
    left = [path for path in tmp_path.rglob("*-tmp") if not path.parent.name.endswith("-tmp")]
    durable_folders.sweep(tmp_path, "out")
    if target.is_dir():
        durable_folders.sweep(target, INDEX)
    after = state_of(target) if target.is_dir() else {}

    assert run.returncode in (0, 9)
    assert len(left) <= 1
    assert [] == list(tmp_path.rglob("*-tmp"))
    if run.returncode == 9:
        assert before == {key: after[key] for key in before}
    statedict.convert(sized(5, 5), target, max_shard_size=5, overwrite=True)
    assert [5, 5] == [value.nbytes for value in by_library(target).values()]


def test_what_was_put_back_goes_when_it_may_be_replaced(tmp_path: Path) -> None:
    statedict.convert(sized(8, 8, 8, 8), tmp_path, max_shard_size=8)
    subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), "link", "6"], check=False)
    torn = names(tmp_path)
    with pytest.raises(TargetExists):
        statedict.convert(sized(5, 5), tmp_path, max_shard_size=5)
    statedict.convert(sized(5, 5), tmp_path, max_shard_size=5, overwrite=True)

    assert INDEX not in torn
    assert {INDEX, shard(1, 2), shard(2, 2)} == {name for name in names(tmp_path) if "-of-00003" not in name}
