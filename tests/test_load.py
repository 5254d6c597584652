"""``load`` against ``torch.load``: the same values, wherever they go and however they are read."""

from __future__ import annotations

import io
import os
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings

import statedict
from statedict import CorruptFile, Engine, KeyNotFound, StateDictError, Unsupported

torch = pytest.importorskip("torch")
saved_trees = pytest.importorskip("saved_trees")
saved_values = pytest.importorskip("saved_values")
safetensors = pytest.importorskip("safetensors.torch")
MIB = 1 << 20
# torch says of complex32 that it is experimental, and of CSR tensors that they are in beta.
pytestmark = pytest.mark.filterwarnings(
    "ignore:ComplexHalf support", "ignore:Sparse CSR", "ignore:torch.quantize_per", "ignore:TypedStorage"
)


@settings(max_examples=150)
@given(saved_trees.trees())
def test_what_torch_saved_is_loaded_as_torch_loads_it(tmp_path_factory: pytest.TempPathFactory, value: Any) -> None:
    path = saved_values.saved(value, tmp_path_factory.mktemp("load") / "tree.pth")
    expected, found = torch.load(path, weights_only=True), statedict.load(path)

    assert saved_values.facts(expected) == saved_values.facts(found)
    assert saved_trees.memory_overlaps(expected) == saved_trees.memory_overlaps(found)


@settings(max_examples=50)
@given(saved_trees.trees(new_dtypes=False))
def test_the_old_stream_of_torch_is_loaded_too(tmp_path_factory: pytest.TempPathFactory, value: Any) -> None:
    path = saved_values.saved(value, tmp_path_factory.mktemp("load") / "tree.pth", zipped=False)
    expected, found = torch.load(path, weights_only=True), statedict.load(path)

    assert saved_values.facts(expected) == saved_values.facts(found)


def state() -> dict[str, Any]:
    return {
        "large": torch.arange(3 * MIB, dtype=torch.float32),
        "half": torch.arange(MIB, dtype=torch.float32).to(torch.bfloat16),
        **{f"small.{at}": torch.full((at + 1,), float(at)) for at in range(100)},
        "odd": torch.arange(7, dtype=torch.uint8),
        "double": torch.arange(5, dtype=torch.float64),
        "empty": torch.empty(0, 3),
    }


def same(one: Any, other: Any) -> bool:
    return list(one) == list(other) and all(torch.equal(one[key], other[key]) for key in one)


@pytest.fixture(params=["pth", "safetensors", "statedict.pth"])
def file(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A flat state dict as each library writes it."""
    path = tmp_path / f"x.{request.param}"
    if request.param == "pth":
        torch.save(state(), path)
    elif request.param == "safetensors":
        safetensors.save_file(state(), path)
    else:
        statedict.save(state(), path, durable=False)
    return path


@pytest.mark.parametrize(
    "engine",
    [
        Engine(),
        Engine(threads=1),
        Engine(threads=7, block_nbytes=4096),
        Engine(direct=True),
        Engine(direct=True, block_nbytes=8192, threads=3),
        Engine(huge_pages=False, ahead_nbytes=1 << 20),
    ],
)
@pytest.mark.parametrize("check", [True, False])
def test_every_way_of_reading_gives_the_same(file: Path, engine: Engine, check: bool) -> None:
    found = statedict.load(file, mmap=False, check=check, engine=engine)

    assert {key: saved_values.packed(value) for key, value in state().items()} == {
        key: saved_values.packed(value) for key, value in found.items()
    }


@pytest.mark.parametrize("mmap", [None, True, False])
def test_tensors_are_aligned_and_can_be_written_to(file: Path, mmap: bool | None) -> None:
    before = file.read_bytes()
    found = statedict.load(file, mmap=mmap)
    for tensor in found.values():
        tensor.zero_()

    assert {0} == {tensor.data_ptr() % tensor.element_size() for tensor in found.values()}
    assert before == file.read_bytes()


def test_what_is_read_stays_when_the_file_goes(file: Path) -> None:
    found = statedict.load(file, mmap=False)
    file.write_bytes(b"")

    assert torch.equal(state()["large"], found["large"])


def test_a_mapped_file_is_told_from_one_that_is_read(file: Path) -> None:
    reports: list[Any] = []
    statedict.load(file, mmap=True, on_report=reports.append)
    statedict.load(file, mmap=False, on_report=reports.append)

    assert reports[0].method["mapped_nbytes"] > 12 * MIB and 0 == reports[1].method["mapped_nbytes"]
    assert [] == list(reports[1].unchecked)
    assert "statedict.read-report/1" == reports[0].to_dict()["schema"] and "Loaded" in str(reports[0])


def test_a_large_file_is_mapped_where_there_is_nothing_to_check(tmp_path: Path) -> None:
    value = {"w": torch.zeros(17 * MIB)}
    safetensors.save_file(value, tmp_path / "hub.safetensors")
    torch.save(value, tmp_path / "torch.pth")
    mapped = []
    for name, options in (("hub.safetensors", {}), ("torch.pth", {}), ("torch.pth", {"check": False})):
        statedict.load(
            tmp_path / name, on_report=lambda report: mapped.append(report.method["mapped_nbytes"]), **options
        )

    assert [True, False, True] == [nbytes > 0 for nbytes in mapped]


@pytest.mark.parametrize("how", ["pth", "safetensors"])
@pytest.mark.parametrize("mmap", [False, True])
def test_a_flipped_bit_is_found_when_the_bytes_are_read(how: str, mmap: bool, tmp_path: Path) -> None:
    path = tmp_path / f"x.{how}"
    statedict.save({"small": torch.ones(10), "large": torch.ones(5 * MIB)}, path)
    raw = bytearray(path.read_bytes())
    raw[-9 * MIB] ^= 1
    path.write_bytes(raw)
    if mmap:
        reports: list[Any] = []
        statedict.load(path, mmap=True, on_report=reports.append)

        assert {"small", "large"} == set(reports[0].unchecked)
    else:
        with pytest.raises(CorruptFile) as caught:
            statedict.load(path, mmap=False)

        assert "large" == caught.value.key and str(path) == caught.value.path
        assert 1 == (statedict.load(path, mmap=False, check=False)["large"] != 1).sum()


def test_torchs_own_crc_is_checked(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(1000)}, tmp_path / "x.pth")
    raw = bytearray((tmp_path / "x.pth").read_bytes())
    raw[raw.index(torch.ones(4).numpy().tobytes()) + 2] ^= 4
    (tmp_path / "x.pth").write_bytes(raw)
    with pytest.raises(CorruptFile, match="CRC-32"):
        statedict.load(tmp_path / "x.pth")


def test_only_the_bytes_of_the_part_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from statedict.io.ranges import LocalFile

    value = {"model": {"w": torch.ones(1000)}, "optimizer": {"state": {0: {"exp_avg": torch.ones(4 * MIB)}}}}
    torch.save(value, tmp_path / "x.pth")
    read: list[int] = []
    original = LocalFile.read_into
    monkeypatch.setattr(
        LocalFile, "read_into", lambda self, at, buffer: (read.append(len(buffer)), original(self, at, buffer))[1]
    )
    found = statedict.load(tmp_path / "x.pth", at="model")

    assert torch.equal(torch.ones(1000), found["w"]) and sum(read) < MIB
    assert [1.0] * 3 == statedict.load(f"{tmp_path / 'x.pth'}#model.w")[:3].tolist()
    with pytest.raises(KeyNotFound):
        statedict.load(tmp_path / "x.pth", at="modle")


def test_of_a_large_storage_only_what_its_views_show_is_loaded(tmp_path: Path) -> None:
    base = torch.arange(1000.0)
    torch.save({"a": base[10:20], "b": base[15:25], "c": base[900:].view(10, 10)[:, 3]}, tmp_path / "x.pth")
    reports: list[Any] = []
    found = statedict.load(tmp_path / "x.pth", on_report=reports.append)

    assert [list(range(10, 20)), list(range(15, 25))] == [found[key].long().tolist() for key in "ab"]
    assert [903 + 10 * at for at in range(10)] == found["c"].long().tolist()
    assert found["a"].untyped_storage().nbytes() < 100 and {"a", "b", "c"} == set(reports[0].unchecked)
    found["a"][5:] = 0
    assert 0 == found["b"][:5].sum()


# -------------------------------------------------------------------- where tensors go


@pytest.mark.parametrize("where", ["meta", torch.device("meta"), {"cpu": "meta"}])
def test_nothing_is_read_for_the_meta_device(where: Any, tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2, 3).t(), "n": 1}, tmp_path / "x.pth")
    expected = torch.load(tmp_path / "x.pth", map_location=where)
    found = statedict.load(tmp_path / "x.pth", map_location=where)

    assert saved_values.facts(expected) == saved_values.facts(found)


def test_a_function_sees_each_storage_once_with_its_tag(tmp_path: Path) -> None:
    base = torch.arange(4.0)
    torch.save({"a": base, "b": base[1:], "c": torch.ones(2)}, tmp_path / "x.pth")
    calls: dict[str, list[Any]] = {"torch": [], "ours": []}

    def note(name: str) -> Any:
        return lambda storage, tag: (calls[name].append((type(storage), storage.nbytes(), tag)), storage)[1]

    expected = torch.load(tmp_path / "x.pth", map_location=note("torch"))
    found = statedict.load(tmp_path / "x.pth", map_location=note("ours"))

    assert sorted(calls["torch"], key=str) == sorted(calls["ours"], key=str)
    assert saved_values.facts(expected) == saved_values.facts(found)
    assert torch.equal(base, statedict.load(tmp_path / "x.pth", map_location=lambda storage, tag: None)["a"])


@pytest.fixture
def tagged(tmp_path: Path) -> Path:
    """A file of tensors that were on cuda:1, made by torch from CPU tensors whose tag was changed."""
    path = tmp_path / "gpu.pth"
    original = torch.serialization.location_tag
    torch.serialization.location_tag = lambda storage: "cuda:1"
    try:
        torch.save({"w": torch.arange(3.0), "cuda_rng_state": torch.arange(16, dtype=torch.uint8)}, path)
    finally:
        torch.serialization.location_tag = original
    return path


def test_a_file_of_a_gpu_loads_to_the_cpu(tagged: Path) -> None:
    found = statedict.load(tagged)

    assert ("cpu", [0.0, 1.0, 2.0]) == (str(found["w"].device), found["w"].tolist())
    assert "meta" == str(statedict.load(tagged, map_location={"cuda:1": "meta"})["w"].device)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
@pytest.mark.parametrize("where", [None, "cuda", "cuda:3", {"cpu": "cpu"}, lambda storage, tag: None])
def test_a_device_that_is_not_there_is_said_in_one_sentence(where: Any, tagged: Path) -> None:
    with pytest.raises(RuntimeError, match="CUDA"):
        torch.load(tagged, map_location=where)
    with pytest.raises(Unsupported, match="there is no device 'cuda") as caught:
        statedict.load(tagged, map_location=where)

    assert "map_location" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("where", [3, [1], object()])
def test_what_is_no_device_is_refused(where: Any, tmp_path: Path) -> None:
    torch.save({"w": torch.ones(1)}, tmp_path / "x.pth")
    with pytest.raises(StateDictError, match="map_location"):
        statedict.load(tmp_path / "x.pth", map_location=where)


@pytest.mark.parametrize("end", ["pth", "safetensors"])
def test_random_states_stay_on_the_cpu_and_are_listed(end: str, tmp_path: Path) -> None:
    value = {
        "w": torch.ones(2),
        "bytes": torch.zeros(5056, dtype=torch.uint8),
        "torch_rng_state": torch.get_rng_state(),
        "mine": [torch.Generator().manual_seed(3).get_state()],
        "cuda_rng_states": [torch.arange(16, dtype=torch.uint8)],
    }
    statedict.save(value, tmp_path / f"x.{end}")
    reports: list[Any] = []
    found = statedict.load(tmp_path / f"x.{end}", map_location="meta", on_report=reports.append)

    assert {"torch_rng_state", "mine.0", "cuda_rng_states.0"} == set(reports[0].kept_on_cpu)
    assert ("meta", "meta") == (found["w"].device.type, found["bytes"].device.type)
    assert torch.equal(value["mine"][0], found["mine"][0])


# -------------------------------------------------------------------- other values


def test_values_beside_tensors_come_as_they_were(tmp_path: Path) -> None:
    value = {
        "dtype": torch.bfloat16, "size": torch.Size([1, 2]), "device": torch.device("cuda:1"), "layout": torch.sparse_coo,
        "t": (1, 2.5, "x"), "set": {1, 2}, "od": OrderedDict(a=1), 3: None, "b": b"\0", "list": [[torch.float16], []],
    }  # fmt: skip
    torch.save(value, tmp_path / "x.pth")

    assert value == statedict.load(tmp_path / "x.pth") == torch.load(tmp_path / "x.pth")


def test_numpy_values_come_as_numpy_values(tmp_path: Path) -> None:
    import numpy as np

    value = {"a": np.arange(4.0).reshape(2, 2).T, "s": np.float32(0.5), "i": np.int64(-3)}
    torch.save(value, tmp_path / "x.pth")
    found = statedict.load(tmp_path / "x.pth")

    assert np.array_equal(value["a"], found["a"]) and value["a"].dtype == found["a"].dtype
    assert (np.float32, np.int64) == (type(found["s"]), type(found["i"])) and (0.5, -3) == (found["s"], found["i"])


class Config:
    """Unknown to whoever loads."""

    def __init__(self) -> None:
        self.depth = 3
        self.weight = torch.ones(2)


def test_unknown_objects_stay_records_with_their_tensors(tmp_path: Path) -> None:
    torch.save({"config": Config(), "w": torch.zeros(1)}, tmp_path / "x.pth")
    found = statedict.load(tmp_path / "x.pth")["config"]

    assert "test_load.Config" == found.type and 3 == found.state["depth"]
    assert torch.equal(torch.ones(2), found.state["weight"])


def test_a_whole_saved_model_gives_its_state_dict(tmp_path: Path) -> None:
    module = torch.nn.Linear(2, 3)
    torch.save(module, tmp_path / "x.pth")
    found = statedict.load(tmp_path / "x.pth")

    assert same({key: value.detach() for key, value in found.items()}, module.state_dict())


def test_layouts_other_than_strided_come_back(tmp_path: Path) -> None:
    dense = torch.eye(4)
    value = {
        "coo": dense.to_sparse(),
        "csr": dense.to_sparse_csr(),
        "per_tensor": torch.quantize_per_tensor(torch.arange(6.0), 0.5, 3, torch.quint8),
        "per_channel": torch.quantize_per_channel(
            torch.arange(6.0).view(2, 3), torch.tensor([0.5, 0.25]), torch.tensor([0, 1]), 0, torch.qint8
        ),
        "meta": torch.empty(2, 3, device="meta").t(),
    }
    torch.save(value, tmp_path / "x.pth")

    assert saved_values.facts(torch.load(tmp_path / "x.pth")) == saved_values.facts(statedict.load(tmp_path / "x.pth"))


def test_tensors_that_torch_has_none_of_are_all_named(tmp_path: Path) -> None:
    header = b'{"a":{"dtype":"F6_E2M3","shape":[4],"data_offsets":[0,3]},"b":{"dtype":"U8","shape":[1],"data_offsets":[3,4]}}'
    (tmp_path / "x.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 4)
    with pytest.raises(Unsupported, match="'a'"):
        statedict.load(tmp_path / "x.safetensors")


def test_python_attributes_come_back_unless_they_hide_a_method(tmp_path: Path) -> None:
    tensor = torch.ones(2)
    tensor.tag, tensor.numpy = "mine", 3  # type: ignore[method-assign, assignment]
    torch.save({"w": tensor}, tmp_path / "x.pth")
    found = statedict.load(tmp_path / "x.pth")["w"]

    assert "mine" == found.tag and [1.0, 1.0] == found.numpy().tolist()


def test_an_open_file_and_bytes_in_memory_are_read(tmp_path: Path) -> None:
    stream = io.BytesIO(b"before")
    stream.seek(6)
    torch.save({"w": torch.arange(3)}, stream)
    stream.seek(6)
    torch.save({"w": torch.arange(3)}, tmp_path / "x.pth")
    with open(tmp_path / "x.pth", "rb") as file:
        found = [statedict.load(stream)["w"].tolist(), statedict.load(file)["w"].tolist()]

    assert [[0, 1, 2]] * 2 == found


def test_a_mapping_in_memory_is_copied(tmp_path: Path) -> None:
    value = {"a": torch.ones(2), "n": [1]}
    found = statedict.load(value)
    found["a"].zero_()

    assert [1.0, 1.0] == value["a"].tolist() and [1] == found["n"]


def test_every_real_file_is_loaded_as_torch_loads_it(shared: Path) -> None:
    for path in sorted((shared / "data" / "real").iterdir()):
        if path.suffix == ".md":
            continue
        try:
            expected = torch.load(path, map_location="cpu", weights_only=True)
        except Exception:  # an object that only its code brings back
            statedict.load(path)
            continue

        assert saved_values.facts(expected) == saved_values.facts(statedict.load(path)), path.name


@pytest.mark.parametrize("engine", [Engine(threads=0), Engine(block_nbytes=1000), Engine(threads="2")])  # type: ignore[arg-type]
def test_an_engine_that_makes_no_sense_is_refused(engine: Engine, tmp_path: Path) -> None:
    torch.save({"w": torch.ones(1)}, tmp_path / "x.pth")
    with pytest.raises(StateDictError, match="Engine"):
        statedict.load(tmp_path / "x.pth", engine=engine)


def test_a_file_that_is_cut_short_meanwhile_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    safetensors.save_file({"w": torch.ones(3 * MIB)}, path)
    with statedict.open(path) as checkpoint:
        os.truncate(path, 5 * MIB)
        with pytest.raises(CorruptFile):
            statedict.load(checkpoint, mmap=False)


def test_a_file_that_is_not_cached_is_read_past_the_page_cache(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    value = {"w": torch.arange(17 * MIB, dtype=torch.int32), "b": torch.arange(5)}
    safetensors.save_file(value, path)
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)
    reports: list[Any] = []
    found = statedict.load(path, mmap=False, on_report=reports.append)

    assert same(value, {key: found[key] for key in value})
    method = reports[0].method
    assert method["direct"] == (not method["cached"] and method["filesystem"] in ("ext4", "xfs"))


def test_progress_ends_at_the_total(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(5 * MIB)}, tmp_path / "x.pth")
    seen: list[tuple[int, int]] = []
    statedict.load(tmp_path / "x.pth", on_progress=lambda done, total: seen.append((done, total)))

    assert len(seen) > 1 and seen[-1][0] == seen[-1][1] >= 20 * MIB


@pytest.mark.parametrize("extra", [0, 1, 1000, 1024, 3000, 4096])
def test_a_short_rest_is_read_and_checked_with_the_block_before_it(extra: int, tmp_path: Path) -> None:
    tensor = torch.arange(2 * 4096 + extra, dtype=torch.uint8)
    path = tmp_path / "a.safetensors"
    statedict.save({"t": tensor, "u": tensor.flip(0)}, path)
    engine = Engine(threads=2, block_nbytes=4096)

    assert torch.equal(tensor, statedict.load(path, mmap=False, engine=engine)["t"])

    data = bytearray(path.read_bytes())
    data[-tensor.numel() - 1] ^= 1  # the last byte of the first tensor
    path.write_bytes(data)
    with pytest.raises(CorruptFile):
        statedict.load(path, mmap=False, engine=engine)
