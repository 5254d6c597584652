"""Tensors of torch as sources, and lazy tensors as tensors of torch."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

import statedict
from statedict import MissingDependency

torch = pytest.importorskip("torch")

from saved_values import facts, packed, saved  # noqa: E402
from test_convert import rich  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:.*(beta state|TypedStorage is deprecated|quantiz).*")


@pytest.mark.parametrize("name", ["m.pth", "m.safetensors"])
def test_a_tree_in_memory_becomes_the_same_file_as_a_saved_one(name: str, tmp_path: Path) -> None:
    value = rich()
    saved(value, tmp_path / "saved.pth")
    (tmp_path / "a").mkdir()
    statedict.convert(tmp_path / "saved.pth", tmp_path / name)
    statedict.convert(value, tmp_path / "a" / name)

    assert (tmp_path / name).read_bytes() == (tmp_path / "a" / name).read_bytes()


def test_a_module_stands_for_its_state_dict(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    statedict.convert(model, tmp_path / "m.pth")

    assert facts(model.state_dict()) == facts(torch.load(tmp_path / "m.pth", weights_only=True))


def test_a_change_of_the_tensor_is_seen() -> None:
    tensor = torch.zeros(3)
    with statedict.open({"x": tensor}) as found:
        tensor[1] = 5

        assert [0, 5, 0] == found["x"].numpy().tolist()


def tensors(value: Any) -> dict[str, Any]:
    """The tensors at the top of the tree."""
    return {key: item for key, item in value.items() if isinstance(item, torch.Tensor)}


def test_a_lazy_tensor_becomes_the_tensor_that_was_saved(tmp_path: Path) -> None:
    expected = tensors(rich())
    del expected["windows"], expected["expanded"], expected["a.b"]  # strides with overlaps: see below
    saved(expected, tmp_path / "m.pth")
    with statedict.open(tmp_path / "m.pth") as found:
        made = {key: found[key].torch() for key in expected}
    loaded = torch.load(tmp_path / "m.pth", weights_only=True)

    assert set(loaded) == set(made)
    for key, tensor in made.items():
        wanted = loaded[key].detach()
        if wanted.layout == torch.strided and not wanted.is_quantized and wanted.device.type == "cpu":
            assert packed(wanted) == packed(tensor), key
        assert (wanted.dtype, wanted.shape, wanted.layout) == (tensor.dtype, tensor.shape, tensor.layout), key
    assert (1, 10) == made["transposed"].stride()
    assert loaded["channels last"].stride() == made["channels last"].stride()
    assert torch.equal(loaded["coo"].to_dense(), made["coo"].to_dense())
    assert torch.equal(loaded["bsr"].to_dense(), made["bsr"].to_dense())
    assert torch.equal(loaded["per channel"].dequantize(), made["per channel"].dequantize())


def test_views_with_repetitions_are_unfolded(tmp_path: Path) -> None:
    windows = torch.arange(10.0).as_strided((8, 3), (1, 1))
    saved({"w": windows, "e": torch.ones(1, 4).expand(3, 4)}, tmp_path / "m.pth")
    with statedict.open(tmp_path / "m.pth") as found:
        assert torch.equal(windows, found["w"].torch())
        assert torch.equal(torch.ones(3, 4), found["e"].torch())


def test_what_to_install_is_said_where_torch_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved({"x": torch.ones(2)}, tmp_path / "m.pth")
    monkeypatch.delitem(sys.modules, "statedict.torch.tensors", raising=False)
    monkeypatch.delitem(sys.modules, "statedict.torch", raising=False)
    monkeypatch.setitem(sys.modules, "torch", None)
    with statedict.open(tmp_path / "m.pth") as found, pytest.raises(MissingDependency, match=r"pip install"):
        found["x"].torch()
