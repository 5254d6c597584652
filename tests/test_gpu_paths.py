"""What a GPU would be given and asked for, through the same code: ``cpu:0`` stands for a device, and a fake one carries copies out late."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import statedict
from statedict import CorruptFile

torch = pytest.importorskip("torch")
test_devices = pytest.importorskip("test_devices")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
needs_two = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
MIB = 1 << 20


def state() -> dict[str, Any]:
    large = torch.arange(5 * MIB, dtype=torch.float32)
    return {
        "large": large,
        "view": large[7:9],
        "small": torch.arange(3.0),
        "cast": torch.ones(5, dtype=torch.bfloat16),
        "turned": torch.arange(6.0).view(2, 3).t(),
        "empty": torch.empty(0),
    }


def same(one: Any, other: Any) -> bool:
    return list(one) == list(other) and all(torch.equal(one[key].cpu(), other[key].cpu()) for key in one)


@pytest.fixture(params=["pth", "safetensors"])
def file(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / f"x.{request.param}"
    statedict.save(state(), path, durable=False)
    return path


@pytest.fixture(params=[False, True])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Nothing, or a device whose copies are carried out when they are waited for."""
    if request.param:
        from statedict.torch import storages, tensors
        from statedict.torch.modules import placing

        fake = test_devices.FakeBackend()
        for module in (storages, tensors, placing):
            monkeypatch.setattr(module, "backend_of", lambda device: fake)
        return fake
    return None


def test_a_device_gets_the_bytes_of_the_file(file: Path, backend: Any) -> None:
    found = statedict.load(file, map_location="cpu:0")

    assert same(state(), found) and (3, 1) != found["turned"].stride() == state()["turned"].stride()
    found["large"][7] = -1
    assert -1 == found["view"][0]


def test_damage_is_found_on_the_way_to_a_device(file: Path, backend: Any) -> None:
    raw = bytearray(file.read_bytes())
    raw[raw.index(torch.arange(5 * MIB, dtype=torch.float32)[-9:].numpy().tobytes())] ^= 2
    file.write_bytes(raw)
    with pytest.raises(CorruptFile) as caught:
        statedict.load(file, map_location="cpu:0")

    assert "large" == caught.value.key


class Net(torch.nn.Module):  # type: ignore[name-defined, misc]
    def __init__(self) -> None:
        super().__init__()
        self.large = torch.nn.Parameter(torch.zeros(5 * MIB))
        self.small = torch.nn.Parameter(torch.zeros(3))
        self.cast = torch.nn.Parameter(torch.zeros(5))
        self.turned = torch.nn.Parameter(torch.zeros(3, 2))


@pytest.mark.parametrize("check", ["before", "while", False])
def test_parameters_of_a_device_are_filled_through_the_ring(
    check: Any, file: Path, backend: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from statedict.torch.modules import placing

    monkeypatch.setattr(placing, "is_device", lambda tensor: True)
    net = Net()
    report = statedict.load_into(net, file, strict=False, check=check)

    assert 2 <= report.method["uploaded"] and 0 == report.method["straight"]
    assert torch.equal(state()["large"], net.large) and torch.equal(state()["turned"], net.turned)
    assert torch.equal(torch.ones(5), net.cast)


def test_memory_of_a_device_is_saved_through_the_ring(
    tmp_path: Path, backend: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from statedict.torch import tensors

    rings: list[Any] = []
    original = tensors.DeviceFile

    def on_device(storage: Any, shared: dict[object, Any]) -> Any:
        ring = shared.setdefault("ring", tensors.Ring(tensors.backend_of(storage.device), ahead=bool(shared["still"])))
        rings.append(ring)
        return original(storage, ring) if storage.nbytes() else b""

    monkeypatch.setattr(tensors, "_bytes", on_device)
    for end in ("pth", "safetensors"):
        statedict.save(state(), tmp_path / f"x.{end}", durable=False)

        assert same(state(), statedict.load(tmp_path / f"x.{end}"))
    assert 2 == len(set(map(id, rings))) and all(ring.ahead for ring in rings)
    if backend is not None:
        assert backend.host_nbytes <= 4 * tensors.Ring(backend).block_nbytes


@needs_cuda
@pytest.mark.parametrize("end", ["pth", "safetensors"])
def test_tensors_of_a_gpu_go_to_a_file_and_back(end: str, tmp_path: Path) -> None:
    value = {key: tensor.cuda() for key, tensor in state().items()}
    statedict.save(value, tmp_path / f"x.{end}")
    if end == "pth":
        assert same(value, torch.load(tmp_path / "x.pth"))
    for where, device in ((None, "cuda"), ("cpu", "cpu"), ("cuda", "cuda"), ({"cuda:0": "cpu"}, "cpu")):
        found = statedict.load(tmp_path / f"x.{end}", map_location=where)

        assert same(value, found) and {device} == {tensor.device.type for tensor in found.values()}


@needs_cuda
def test_random_states_stay_where_they_can_be_restored(tmp_path: Path) -> None:
    statedict.save(
        {"rng_state": torch.get_rng_state(), "cuda_rng_state": torch.cuda.get_rng_state()}, tmp_path / "x.pth"
    )
    found = statedict.load(tmp_path / "x.pth", map_location="cuda")
    torch.set_rng_state(found["rng_state"])
    torch.cuda.set_rng_state(found["cuda_rng_state"])


@needs_cuda
@pytest.mark.parametrize("meta", [False, True])
def test_a_model_on_a_gpu_is_filled(meta: bool, tmp_path: Path) -> None:
    statedict.save(state(), tmp_path / "x.pth")
    with torch.device("meta" if meta else "cuda"):
        net = Net()
    statedict.load_into(net, tmp_path / "x.pth", strict=False, device="cuda")

    assert {"cuda"} == {each.device.type for each in net.parameters()}
    assert torch.equal(state()["large"], net.large.cpu())


@needs_two
def test_a_file_of_one_gpu_goes_to_another(tmp_path: Path) -> None:
    statedict.save({"w": torch.arange(9.0, device="cuda:0")}, tmp_path / "x.pth")
    found = statedict.load(tmp_path / "x.pth", map_location={"cuda:0": "cuda:1"})["w"]

    assert ("cuda:1", list(range(9))) == (str(found.device), found.long().tolist())
