"""TorchScript archives and models saved whole show the keys of their state dicts; none of their code is there, or runs."""

from __future__ import annotations

import io
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import statedict
from statedict.errors import LimitExceeded
from statedict.formats.modules import module_state
from statedict.limits import DEFAULT_LIMITS
from statedict.manifest import Opaque

torch = pytest.importorskip("torch")

from saved_values import packed, saved  # noqa: E402
from torch import nn  # noqa: E402

SCRIPTING = "ignore:`torch.jit:DeprecationWarning"


class Block(nn.Module):
    """Parameters, a persistent and another buffer, absent ones, and plain attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 2)
        self.register_buffer("kept", torch.ones(2))
        self.register_buffer("left", torch.zeros(2), persistent=False)
        self.register_buffer("absent", None)
        self.register_parameter("nothing", None)
        self.norm = nn.BatchNorm1d(2)
        self.weight = nn.Parameter(torch.full((2,), 2.0))
        self.plain = torch.full((2,), 7.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[name-defined]
        return self.norm(self.fc(x)) * self.weight


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 3)
        self.out = nn.Linear(3, 5, bias=False)
        self.out.weight = self.embedding.weight
        self.blocks = nn.ModuleList([Block(), Block()])
        self.first = self.blocks[0]
        self.named = nn.ModuleDict({"x": nn.Linear(2, 2)})
        self.loose = nn.ParameterList([nn.Parameter(torch.ones(1))])
        self.pairs = nn.ParameterDict({"p": nn.Parameter(torch.ones(1))})


def contents(state: dict[str, Any]) -> dict[str, bytes]:
    return {key: packed(value) for key, value in state.items()}


def shown(path: Path, at: str | None = None) -> dict[str, bytes]:
    with statedict.open(path, at=at) as checkpoint:
        return {key: bytes(checkpoint[key].read()) for key in checkpoint}


def notes(path: Path) -> set[str]:
    with statedict.open(path) as checkpoint:
        return {note.code for note in checkpoint.manifest.notes}


MODELS = {
    "buffers and absent ones": Block,
    "tied and nested": Tied,
    "Sequential": lambda: nn.Sequential(Block(), nn.ReLU(), nn.Conv2d(1, 2, 3)),
    "DataParallel": lambda: nn.DataParallel(Block()),
    "LSTM": lambda: nn.LSTM(3, 4, 2, bidirectional=True),
    "Transformer": lambda: nn.TransformerEncoderLayer(8, 2),
    "averaged": lambda: torch.optim.swa_utils.AveragedModel(Block()),
    "PReLU": nn.PReLU,
    "no parameters": nn.ReLU,
}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("kind", MODELS)
def test_a_model_saved_whole_shows_its_state_dict(kind: str, zipped: bool, tmp_path: Path) -> None:
    model = MODELS[kind]()
    path = saved(model, tmp_path / "m.pt", zipped=zipped)

    assert list(contents(model.state_dict()).items()) == list(shown(path).items())
    assert "whole-module" in notes(path)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_protocol_gives_the_same_keys(protocol: int, tmp_path: Path) -> None:
    model = Tied()
    path = saved(model, tmp_path / "m.pt", pickle_protocol=protocol)

    assert contents(model.state_dict()) == shown(path)


@pytest.mark.parametrize(
    ("wrap", "at"),
    [
        (lambda model: {"model": model, "step": 3}, "model"),
        (lambda model: [model], "0"),
        (lambda model: {"a": {"b": nn.DataParallel(model)}}, "a.b.module"),
        (lambda model: {"ema": model, "model": model}, "ema"),
    ],
)
def test_a_model_inside_something_shows_its_state_dict(wrap: Any, at: str, tmp_path: Path) -> None:
    model = Block()
    path = saved(wrap(model), tmp_path / "m.pt")

    assert contents(model.state_dict()) == shown(path, at)


def test_tied_parameters_of_a_model_are_tied(tmp_path: Path) -> None:
    with statedict.open(saved(Tied(), tmp_path / "m.pt")) as checkpoint:
        assert ("out.weight",) == checkpoint["embedding.weight"].tied_with
        assert ("first.fc.weight",) == checkpoint["blocks.0.fc.weight"].tied_with
        assert ("Parameter", "Buffer") == (checkpoint["first.weight"].entry.kind, checkpoint["first.kept"].entry.kind)


THEIRS = """
import torch, sys
class Theirs(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1 = torch.nn.Linear(2, 2)
        self.helper = Helper(torch.ones(3))
    def get_extra_state(self):
        return {"v": 1}
class Helper:
    def __init__(self, tensor):
        self.tensor = tensor
        open("ran", "a").close()
    def __setstate__(self, state):
        open("ran", "a").close()
Theirs.__module__ = Helper.__module__ = "a_module_of_another_machine"
sys.modules["a_module_of_another_machine"] = sys.modules["__main__"]
model = Theirs()
torch.save(model, "whole.pt")
torch.save({"model": model, "helper": Helper(torch.full((2,), 5.0))}, "wrapped.pt")
torch.save(model.state_dict(), "state.pt")
"""


def test_a_class_that_does_not_exist_here_is_no_obstacle(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-W", "ignore", "-c", THEIRS], cwd=tmp_path, check=True)
    (tmp_path / "ran").unlink()
    expected = torch.load(tmp_path / "state.pt", weights_only=True)
    expected.pop("_extra_state")
    assert contents(expected) == shown(tmp_path / "whole.pt")
    assert contents(expected) == shown(tmp_path / "wrapped.pt", "model")
    with statedict.open(tmp_path / "wrapped.pt") as checkpoint:
        assert [5.0, 5.0] == checkpoint["helper.tensor"].numpy().tolist()
    assert "unseen-code" in notes(tmp_path / "whole.pt")
    assert not (tmp_path / "ran").exists()


class Overriding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(2, 2)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        return {"other": self.a.weight}


@pytest.mark.parametrize(("zipped", "code"), [(True, "unseen-code"), (False, "custom-state-dict")])
def test_a_class_that_may_save_other_keys_is_a_finding(zipped: bool, code: str, tmp_path: Path) -> None:
    path = saved(Overriding(), tmp_path / "m.pt", zipped=zipped)
    with statedict.open(path) as checkpoint:
        (note,) = [note for note in checkpoint.manifest.notes if note.code == code]

        assert ["a.weight", "a.bias"] == list(checkpoint)
        assert "may differ" in note.message and "Overriding" in note.message


def test_classes_of_torch_alone_raise_no_doubt(tmp_path: Path) -> None:
    assert {"whole-module"} == notes(saved(nn.Sequential(nn.Linear(1, 1)), tmp_path / "m.pt"))


def hook(*args: Any) -> None:
    """Does nothing; that it is there is enough."""


def test_a_hook_on_the_state_dict_is_a_finding(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    model.register_state_dict_post_hook(hook)

    assert "custom-state-dict" in notes(saved(model, tmp_path / "m.pt"))


@pytest.mark.filterwarnings("ignore")
def test_packed_weights_of_quantised_modules_are_reachable(tmp_path: Path) -> None:
    model = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(3, 2)), {nn.Linear})
    path = saved(model, tmp_path / "m.pt")
    with statedict.open(path) as checkpoint:
        (key,) = [key for key in checkpoint if checkpoint[key].layout == "quantized"]
        weight = model[0].weight()

        assert key.startswith("0._packed_params._packed_params.")
        assert packed(weight.int_repr()) == bytes(checkpoint[key].parts["int_repr"].read())
    assert "custom-state-dict" in notes(path)


def test_a_parameter_that_is_no_tensor_yet_is_not_lost(tmp_path: Path) -> None:
    with statedict.open(saved(nn.LazyLinear(3), tmp_path / "m.pt")) as checkpoint:
        found = {path[0] for path in checkpoint.manifest.objects}

        assert {"weight", "bias"} == found


# ------------------------------------------------------------------------- TorchScript


@pytest.mark.filterwarnings(SCRIPTING)
@pytest.mark.parametrize("how", ["script", "trace"])
@pytest.mark.parametrize("kind", ["buffers and absent ones", "Sequential of blocks"])
def test_an_archive_shows_its_weights(kind: str, how: str, tmp_path: Path) -> None:
    model = Block().eval() if kind.startswith("buffers") else nn.Sequential(Block(), nn.ReLU(), nn.Linear(2, 2)).eval()
    made = torch.jit.script(model) if how == "script" else torch.jit.trace(model, torch.ones(2, 3))
    path = tmp_path / "m.pt"
    torch.jit.save(made, str(path))
    expected = torch.jit.load(str(path)).state_dict()
    found = shown(path)

    assert list(expected) == list(found)
    assert contents(expected) == found
    with statedict.open(path) as checkpoint:
        assert "torchscript" == checkpoint.format


@pytest.mark.filterwarnings(SCRIPTING)
def test_scripted_weights_that_are_tied_are_tied(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    model[1].weight = model[0].weight
    torch.jit.save(torch.jit.script(model), str(tmp_path / "m.pt"))
    with statedict.open(tmp_path / "m.pt") as checkpoint:
        assert ("1.weight",) == checkpoint["0.weight"].tied_with


@pytest.mark.filterwarnings(SCRIPTING)
def test_the_code_of_an_archive_is_data(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(nn.Linear(1, 1)), buffer)
    path = tmp_path / "m.pt"
    path.write_bytes(buffer.getvalue())

    assert {"weight", "bias"} == set(shown(path))


# ------------------------------------------------------------------------- made to harm


def module_record(children: dict[str, Opaque]) -> Opaque:
    return Opaque("some", "Module", (), {"_parameters": {}, "_buffers": {}, "_modules": children})


def test_modules_that_hold_each_other_twice_are_refused() -> None:
    module = module_record({})
    for _ in range(60):
        module = module_record({"a": module, "b": module})

    with pytest.raises(LimitExceeded):
        module_state(module, DEFAULT_LIMITS, {})


def test_a_module_inside_itself_is_refused(tmp_path: Path) -> None:
    model = nn.Sequential()
    model.add_module("inner", nn.Sequential())
    model.inner.add_module("outer", model)
    (tmp_path / "m.pkl").write_bytes(pickle.dumps(model))

    with pytest.raises(LimitExceeded):
        statedict.open(tmp_path / "m.pkl")
