"""What torch wrote is read back bit by bit, by readers that never run it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import statedict

torch = pytest.importorskip("torch")

DTYPES = [
    "float32",
    "float64",
    "float16",
    "bfloat16",
    "int64",
    "int32",
    "int8",
    "uint8",
    "bool",
    "complex64",
    "float8_e4m3fn",
]


def raw(tensor: Any) -> bytes:
    flat = tensor.contiguous().reshape(-1)
    return bytes(flat.view(torch.uint8).numpy().tobytes()) if flat.numel() else b""


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("name", DTYPES)
def test_every_value_is_read_bit_by_bit(name: str, zipped: bool, tmp_path: Path) -> None:
    if name.startswith("float8") and not zipped:
        pytest.skip("torch itself can't load what it writes there")
    values = (torch.randn(5, 7) * 3).to(getattr(torch, name))
    torch.save({"a": values}, tmp_path / "m.pt", _use_new_zipfile_serialization=zipped)

    with statedict.open(tmp_path / "m.pt") as found:
        assert raw(values) == bytes(found["a"].read())


@pytest.mark.parametrize("zipped", [True, False])
def test_views_are_gathered_and_ties_are_kept(zipped: bool, tmp_path: Path) -> None:
    base = torch.arange(60.0).reshape(6, 10)
    saved = {"t": base.t(), "rows": base[2:4], "columns": base[:, 3:5], "one": base[0], "same": base[0]}
    torch.save(saved, tmp_path / "m.pt", _use_new_zipfile_serialization=zipped)

    with statedict.open(tmp_path / "m.pt") as found:
        assert {key: raw(value) for key, value in saved.items()} == {key: bytes(found[key].read()) for key in found}
        assert ("same",) == found["one"].tied_with
        assert base.t()[3:5].numpy().tolist() == found["t"][3:5].numpy().tolist()


class Net(torch.nn.Module):  # type: ignore[misc, name-defined]
    def __init__(self) -> None:
        super().__init__()
        self.fc1 = torch.nn.Linear(3, 4)
        self.norm = torch.nn.BatchNorm1d(4)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("zipped", [True, False])
def test_a_whole_model_shows_the_keys_of_its_state_dict(zipped: bool, tmp_path: Path) -> None:
    model = Net()
    torch.save(model, tmp_path / "m.pt", _use_new_zipfile_serialization=zipped)

    with statedict.open(tmp_path / "m.pt") as found:
        assert list(model.state_dict()) == list(found)
