"""Checkpoints in several files, as the hub's libraries lay them out: what they hold, and where index and shards disagree."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import statedict
from statedict import Limits
from statedict.errors import CorruptFile, FileError, LimitExceeded, StateDictError, UnknownFormat, Unsupported
from statedict.io import pools
from statedict.io.pools import open_files

Array = np.ndarray[Any, Any]

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
INDEX = "model.safetensors.index.json"
TENSORS = {
    "embed.weight": np.arange(12, dtype="f4").reshape(4, 3),
    "layer.0.weight": np.arange(6, dtype="i8"),
    "layer.1.weight": np.ones((2, 2), "f2"),
    "head.bias": np.array(1.5, "f4"),
}
PLACES = {"embed.weight": SHARDS[0], "layer.0.weight": SHARDS[0], "layer.1.weight": SHARDS[1], "head.bias": SHARDS[1]}


def total(tensors: dict[str, Array]) -> int:
    return sum(values.nbytes for values in tensors.values())


def write_index(folder: Path, weight_map: object, name: str = INDEX, **metadata: object) -> Path:
    path = folder / name
    path.write_text(json.dumps({"metadata": metadata, "weight_map": weight_map}, indent=2, sort_keys=True) + "\n")
    return path


def write_shards(folder: Path, places: dict[str, str] = PLACES) -> None:
    for name in dict.fromkeys(places.values()):
        part = {key: values for key, values in TENSORS.items() if places[key] == name}
        save_file(part, folder / name, metadata={"format": "pt"})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint as huggingface_hub writes it."""
    write_shards(tmp_path)
    write_index(tmp_path, PLACES, total_size=total(TENSORS))
    return tmp_path


def values_of(path: Path) -> dict[str, list[Any]]:
    with statedict.open(path) as checkpoint:
        return {key: checkpoint[key].numpy().tolist() for key in checkpoint}


EXPECTED = {key: values.tolist() for key, values in TENSORS.items()}


@pytest.mark.parametrize("name", ["", INDEX])
def test_a_folder_and_its_index_are_one_checkpoint(name: str, folder: Path) -> None:
    found = statedict.inspect(folder / name)

    assert EXPECTED == values_of(folder / name)
    assert ("sharded", total(TENSORS), []) == (found.format, found.totals.nbytes, list(found.findings))
    assert {"shards": "2", "total_size": str(total(TENSORS)), "format": "pt"} == dict(found.metadata)


def test_a_part_of_a_folder_is_a_source(folder: Path) -> None:
    with statedict.open(f"{folder}#layer") as checkpoint:
        assert {"0.weight", "1.weight"} == set(checkpoint)
        assert [2, 3] == checkpoint["0.weight"][2:4].numpy().tolist()


def test_the_index_has_a_name_of_any_kind(folder: Path) -> None:
    (folder / INDEX).rename(folder / "weights.json")

    assert EXPECTED == values_of(folder / "weights.json")


def test_an_index_without_a_path_is_told_what_to_do(folder: Path) -> None:
    with (folder / INDEX).open("rb") as file, pytest.raises(Unsupported, match="several files"):
        statedict.open(file)


def test_torch_shards_keep_their_ties_and_order(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    weight = torch.arange(6.0)
    names = ("pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin")
    torch.save({"z": weight, "a": weight, "part": weight[2:4]}, tmp_path / names[0])
    torch.save(OrderedDict(b=torch.ones(2, dtype=torch.bfloat16), extra=b"\1"), tmp_path / names[1])
    weight_map = {"z": names[0], "a": names[0], "part": names[0], "b": names[1], "extra": names[1]}
    write_index(tmp_path, weight_map, "pytorch_model.bin.index.json", total_size=52)
    found = statedict.load(tmp_path)
    with statedict.open(tmp_path) as checkpoint:
        ties = checkpoint["z"].tied_with

    assert ["z", "a", "part", "b", "extra"] == list(found)
    assert ("a",) == ties
    assert found["z"].data_ptr() == found["a"].data_ptr() == found["part"].data_ptr() - 8
    assert (b"\1", [1.0, 1.0]) == (found["extra"], found["b"].tolist())


def test_a_module_is_loaded_from_shards(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file as save_torch

    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    state = model.state_dict()
    places = {key: SHARDS[key.startswith("1")] for key in state}
    for name in SHARDS:
        save_torch({key: value for key, value in state.items() if places[key] == name}, tmp_path / name)
    write_index(tmp_path, places)
    other = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    statedict.load_into(other, tmp_path)

    assert all(torch.equal(value, other.state_dict()[key]) for key, value in state.items())


def test_tensors_inside_of_attributes_belong_to_their_own_shard(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    names = ("m-1.bin", "m-2.bin")
    for at, name in enumerate(names):
        value = torch.nn.Parameter(torch.full((3,), float(at)))
        value.beside = torch.full((2,), 10.0 + at)
        value.note = {"inside": torch.full((2,), 10.0 + at)}
        torch.save({f"p{at}": value, f"s{at}": torch.eye(2 + at).to_sparse()}, tmp_path / name)
    write_index(tmp_path, {"p0": names[0], "s0": names[0], "p1": names[1], "s1": names[1]})
    found = statedict.load(tmp_path)

    assert [[0.0] * 3, [1.0] * 3] == [found[f"p{at}"].tolist() for at in (0, 1)]
    assert [2.0, 3.0] == [found[f"s{at}"].to_dense().sum().item() for at in (0, 1)]
    assert [[10.0] * 2, [11.0] * 2] == [found[f"p{at}"].beside.tolist() for at in (0, 1)]
    with statedict.open(tmp_path) as checkpoint:
        inside: Any = [checkpoint[f"p{at}"].entry.attributes["note"] for at in (0, 1)]
        assert [0, 1] == [note["inside"].view.storage.extent.file for note in inside]


# -------------------------------------------------------------------- which of the files


def test_the_index_is_taken_before_its_shards_and_other_indexes(folder: Path) -> None:
    write_index(folder, PLACES, "pytorch_model.bin.index.json")
    (folder / "optimizer.pt").write_bytes(b"x")
    found = statedict.inspect(folder)

    assert EXPECTED == values_of(folder)
    assert ["other-checkpoints"] == [finding.code for finding in found.findings]
    assert "pytorch_model.bin.index.json" in found.findings[0].message


@pytest.mark.parametrize(
    ("names", "opened"),
    [
        (["model.safetensors"], "model.safetensors"),
        (["anything.safetensors", "config.json"], "anything.safetensors"),
        (["model.safetensors", "optimizer.pt", "pytorch_model.bin"], "model.safetensors"),
        (["model.safetensors", ".hidden.safetensors"], "model.safetensors"),
        (["a.safetensors", "b.safetensors"], None),
        (["x.safetensors.index.json", "y.safetensors.index.json"], None),
        (["tf_model.h5.index.json"], None),
    ],
)
def test_a_folder_stands_for_the_one_checkpoint_in_it(names: list[str], opened: str | None, tmp_path: Path) -> None:
    for name in names:
        save_file({"name": np.array([names.index(name)])}, tmp_path / name)
    if opened is None:
        with pytest.raises(UnknownFormat, match="this is a directory"):
            statedict.open(tmp_path)
    else:
        assert {"name": [names.index(opened)]} == values_of(tmp_path)
        assert len(names) > 2 or not statedict.inspect(tmp_path).findings


def test_the_links_of_the_hub_cache_are_followed(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    blobs = tmp_path_factory.mktemp("blobs")
    for at, name in enumerate((*SHARDS, INDEX)):
        (folder / name).rename(blobs / str(at))
        (folder / name).symlink_to(blobs / str(at))

    assert EXPECTED == values_of(folder)


# -------------------------------------------------------------------- the index against its shards


def test_missing_shards_are_all_named(folder: Path) -> None:
    for name in SHARDS:
        (folder / name).unlink()

    with pytest.raises(FileError, match=rf"2 of 2 are missing: '{SHARDS[0]}', '{SHARDS[1]}'"):
        statedict.open(folder)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"ghost": SHARDS[0]}, r"1 tensor that the shard doesn't hold: 'ghost'.*it in no shard"),
        ({"head.bias": SHARDS[0]}, rf"'head.bias'.*expected it in '{SHARDS[0]}', found it in '{SHARDS[1]}'"),
    ],
)
def test_a_tensor_that_is_not_where_the_index_says_is_named(changes: dict[str, str], words: str, folder: Path) -> None:
    write_index(folder, {**PLACES, **changes})

    with pytest.raises(CorruptFile, match=words) as caught:
        statedict.open(folder)
    assert (str(folder / INDEX), next(iter(changes))) == (caught.value.path, caught.value.key)


def test_a_tensor_in_two_shards_is_refused(folder: Path) -> None:
    save_file({"layer.1.weight": np.ones(2), "head.bias": np.ones(1), "embed.weight": np.ones(3)}, folder / SHARDS[1])

    with pytest.raises(CorruptFile, match=r"two shards hold the tensor.*'embed.weight'"):
        statedict.open(folder)


def test_a_tensor_that_the_index_does_not_list_is_shown_and_said(folder: Path) -> None:
    write_index(folder, {key: name for key, name in PLACES.items() if key != "head.bias"}, total_size=1)
    found = statedict.inspect(folder)

    assert EXPECTED == values_of(folder)
    assert [("unlisted-keys", ("head.bias",)), ("index-total-size", ())] == [(f.code, f.keys) for f in found.findings]


def test_what_is_odd_about_several_shards_is_said_once(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    names = [f"m-{at}.safetensors" for at in range(3)]
    for at, name in enumerate(names):
        torch.save({f"x{at}": torch.ones(1)}, tmp_path / name)
    write_index(tmp_path, {f"x{at}": name for at, name in enumerate(names)})
    (finding,) = statedict.inspect(tmp_path).findings

    assert "extension" == finding.code
    assert finding.message.startswith("in 'm-0.safetensors', ")
    assert finding.message.endswith("; so in 2 other shards")


def test_a_nested_value_that_is_cut_in_two_is_refused(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    torch.save({"model": {"a": torch.ones(1)}}, tmp_path / "1.bin")
    torch.save({"model": {"b": torch.ones(1)}}, tmp_path / "2.bin")
    torch.save([torch.ones(1)], tmp_path / "3.bin")
    write_index(tmp_path, {"model.a": "1.bin", "model.b": "2.bin"})
    write_index(tmp_path, {"0": "3.bin"}, "list.json")

    with pytest.raises(Unsupported, match="parts of one nested value"):
        statedict.open(tmp_path)
    with pytest.raises(Unsupported, match=r"'3\.bin' holds no state dict"):
        statedict.open(tmp_path / "list.json")


# -------------------------------------------------------------------- hostile indexes

OUTSIDE = "model-00001-of-00002.safetensors"
NAMES = [
    f"../{OUTSIDE}",
    f"sub/../../{OUTSIDE}",
    f"./{OUTSIDE}",
    f"sub//{OUTSIDE}",
    f"..\\{OUTSIDE}",
    "C:model.safetensors",
    "https://example.org/model.safetensors",
    "file:///etc/passwd",
    "/etc/passwd",
    "//host/share",
    "",
    ".",
    "..",
    "a\0b",
    "a\nb",
    "\u202ea",
    INDEX,
    "out/x.safetensors",
]


@pytest.mark.parametrize("name", NAMES)
def test_a_shard_outside_of_the_folder_is_never_opened(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    for path in (inside, outside):
        path.mkdir()
    save_file({"w": np.ones(1)}, tmp_path / OUTSIDE)
    save_file({"w": np.ones(1)}, outside / "x.safetensors")
    (inside / "out").symlink_to(outside)
    (inside / "sub").mkdir()
    index = write_index(inside, {"w": name})
    opened: list[str] = []
    real = os.open
    monkeypatch.setattr(os, "open", lambda path, *rest, **more: opened.append(str(path)) or real(path, *rest, **more))

    with pytest.raises(CorruptFile, match="the index names a shard whose name") as caught:
        statedict.open(inside)
    assert str(caught.value).isprintable()
    assert [str(index)] == opened


def test_a_shard_may_lie_in_a_folder_of_its_own(folder: Path) -> None:
    (folder / "sub").mkdir()
    (folder / SHARDS[1]).rename(folder / "sub" / SHARDS[1])
    write_index(folder, {key: name if name == SHARDS[0] else f"sub/{name}" for key, name in PLACES.items()})

    assert EXPECTED == values_of(folder)


@pytest.mark.parametrize(
    "text",
    [
        '{"weight_map": []}',
        '{"weight_map": "x"}',
        '{"weight_map": {"a": 1}}',
        '{"weight_map": {"a": null}}',
        '{"weight_map": {"a": ["x"]}}',
        '{"weight_map": {"a": "m.safetensors", "a": "n.safetensors"}}',
        '{"weight_map": {}, "weight_map": {"a": "m.safetensors"}}',
        '{"weight_map": {"a": NaN}}',
        '{"weight_map": {"a": "m.safetensors"}} trailing',
        '{"weight_map": {"a": "m.safetensors"}',
        '{"metadata": ' + "[" * 100_000 + '"weight_map"',
        '{"weight_map": ' + '{"a":' * 100_000,
        '{"weight_map": {"a": ' + "9" * 10_000 + "}}",
        '{"weight_map": {"\\ud800": "\\udfff"}}',
    ],
    ids=range(14),
)
def test_an_index_that_is_none_is_refused_in_one_line(text: str, tmp_path: Path) -> None:
    (tmp_path / INDEX).write_text(text)
    save_file({"a": np.ones(1)}, tmp_path / "m.safetensors")

    with pytest.raises(CorruptFile) as caught:
        statedict.open(tmp_path / INDEX)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("size", ['"54"', "-1", "1e300", "[1]", "null", "true", "9" * 30])
def test_a_size_of_any_kind_is_no_error(size: str, folder: Path) -> None:
    path = folder / INDEX
    path.write_text('{"metadata": {"total_size": ' + size + '}, "weight_map": ' + json.dumps(PLACES) + "}")

    assert EXPECTED == values_of(folder)


def test_notes_that_do_not_fit_are_left_aside(folder: Path) -> None:
    for notes in ("", "[]", '{"version":1}', '{"version":99}', "[" * 10_000, '{"version":1,"names":0,"tree":[[]]}'):
        write_index(folder, PLACES, statedict=notes)

        assert EXPECTED == values_of(folder)
        assert ["stale-notes"] == [finding.code for finding in statedict.inspect(folder).findings]


def test_what_a_shard_is_not_is_refused(folder: Path) -> None:
    bad: list[Callable[[Path], object]] = [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"<html>"),
        lambda path: path.write_bytes((folder / INDEX).read_bytes()),
        lambda path: np.save(path.with_suffix(".npy"), np.ones(1)) or path.with_suffix(".npy").rename(path),  # type: ignore[func-returns-value]
        lambda path: (path.unlink(), path.mkdir()),
    ]
    for make in bad:
        make(folder / SHARDS[1])
        with pytest.raises(StateDictError) as caught:
            statedict.open(folder)
        assert str(folder / SHARDS[1]) == caught.value.path


def test_limits_hold_for_the_index(folder: Path) -> None:
    with pytest.raises(LimitExceeded, match="nodes"):
        statedict.open(folder, limits=Limits(nodes=3))
    with pytest.raises(StateDictError):
        statedict.open(folder, limits=Limits(header_bytes=100))


# -------------------------------------------------------------------- many files


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def many(folder: Path, count: int) -> None:
    names = [f"m-{at:05d}.safetensors" for at in range(count)]
    for at, name in enumerate(names):
        save_file({f"x{at}": np.array([at])}, folder / name)
    write_index(folder, {f"x{at}": name for at, name in enumerate(names)})


def test_many_shards_need_few_descriptors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pools, "_MOST_OPEN", 5)
    many(tmp_path, 40)
    before = open_descriptors()
    with statedict.open(tmp_path) as checkpoint:
        found = [checkpoint[f"x{at}"].numpy().item() for at in [*range(40), *range(39, -1, -1)]]
        during = open_descriptors()
    after = open_descriptors()

    assert [*range(40), *range(39, -1, -1)] == found
    assert during - before <= 6
    assert after == before
    with pytest.raises(FileError, match="closed"):
        checkpoint["x3"].numpy()


def test_as_many_shards_are_loaded_as_there_are(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    many(tmp_path, 100)
    program = (
        "import resource, sys, statedict\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (48, 48))\n"
        "found = statedict.load(sys.argv[1])\n"
        "print(sum(value.item() for value in found.values()))\n"
    )
    run = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=False)

    assert ("4950\n", "") == (run.stdout, run.stderr)


def test_a_shard_that_is_replaced_meanwhile_is_noticed(tmp_path: Path) -> None:
    paths = [tmp_path / f"{at}" for at in range(3)]
    for path in paths:
        path.write_bytes(b"0123456789")
    files = open_files([str(path) for path in paths], most=1)
    paths[0].unlink()
    paths[0].write_bytes(b"9876543210")

    assert b"345" == files[1].read(3, 3)
    with pytest.raises(CorruptFile, match="another file is there"):
        files[0].read(0, 1)


def test_a_file_that_is_missing_leaves_no_other_open(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x")
    before = open_descriptors()
    for most in (1, 10):
        with pytest.raises(FileError):
            open_files([str(tmp_path / "a"), str(tmp_path / "b")], most=most)

    assert before == open_descriptors()


def test_opening_an_index_imports_nothing_heavy(folder: Path) -> None:
    program = (
        "import sys, statedict\n"
        "statedict.open(sys.argv[1]).close()\n"
        "print([name for name in ('numpy', 'torch', 'xxhash', 'dataclasses', 'tempfile', 'pathlib') if name in sys.modules])\n"
    )
    command = [sys.executable, "-S", "-c", f"import sys; sys.path[:0] = {sys.path!r}\n{program}", str(folder)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)

    assert ("[]\n", "") == (run.stdout, run.stderr)
