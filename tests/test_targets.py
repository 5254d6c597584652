"""A live module as the target of a diagnosis: what it wants, and code that is named on the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import statedict
from statedict.cli import main

torch = pytest.importorskip("torch")
nn = torch.nn

from statedict.aligning.alignment import Spec  # noqa: E402
from statedict.torch.targets import side_of_module  # noqa: E402


class Net(nn.Module):  # type: ignore[name-defined, misc]
    """Everything that a module can have: a tied head, a norm, indices, a mask, packed weights."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 6, bias=False)
        self.embed = nn.Embedding(6, 4)
        self.head.weight = self.embed.weight
        self.norm = nn.BatchNorm1d(4)
        self.register_buffer("position_ids", torch.arange(6)[None])
        self.register_buffer("mask", torch.ones(3, 3, dtype=torch.bool).tril())
        self.register_buffer("packed", torch.tensor([123456789, -5, 7]))
        self.register_buffer("scratch", torch.zeros(3), persistent=False)


def test_the_tensors_come_in_the_order_of_the_state_dict_with_shapes_and_dtypes() -> None:
    module = Net()
    found = side_of_module(module)

    assert list(module.state_dict()) == list(found.tensors)
    assert Spec((1, 6), "int64") == found.tensors["position_ids"] and found.is_ordered
    assert "scratch" not in found.tensors


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_tied_tensors_and_classes_are_known_on_every_device(device: str) -> None:
    with torch.device(device):
        module = Net()
        module.head.weight = module.embed.weight
    found = side_of_module(module)

    assert [{"head.weight", "embed.weight"}] == [set(group) for group in found.tied]
    assert ("Net", "Embedding", "BatchNorm1d") == tuple(found.classes[path] for path in ("", "embed", "norm"))


def test_indices_masks_and_counters_are_what_a_model_makes_again_and_packed_weights_are_not() -> None:
    found = side_of_module(Net())

    assert {"position_ids", "mask", "norm.num_batches_tracked"} == found.buffers


def test_a_parametrised_module_has_the_name_that_its_class_had() -> None:
    found = side_of_module(nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(2, 3))))

    assert "0.parametrizations.weight.original0" in found.tensors
    assert "Linear" == found.classes["0"]


def test_what_a_wrapper_takes_out_of_the_keys_is_not_in_the_paths_of_classes() -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    found = side_of_module(nn.Sequential(checkpoint_wrapper(nn.Linear(2, 3)), nn.ReLU()))

    assert ["0.weight", "0.bias"] == list(found.tensors)
    assert not [path for path in found.classes if "_checkpoint_wrapped_module" in path]


def test_lazy_modules_have_no_shape_yet_and_are_left_out() -> None:
    assert [] == list(side_of_module(nn.LazyLinear(3)).tensors)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_module_is_a_target_of_diagnose(device: str) -> None:
    with torch.device(device):
        module = Net()
    state = {f"module.{key}": value for key, value in Net().state_dict().items()}
    before = dict(module.state_dict(keep_vars=True))
    found = statedict.diagnose(state, module)

    assert "DataParallel" in found.sentence and ["strip_prefix('module.')"] == [str(rule) for rule in found.rules]
    assert all(value is before[key] for key, value in module.state_dict(keep_vars=True).items())


# -------------------------------------------------------------------- the command line

CODE = """
import torch
print("the user's code prints")
class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = torch.nn.Linear(3, 4), torch.nn.Linear(4, 2)
    def forward(self, x):
        return self.b(self.a(x))
net = Net()
x = torch.ones(2, 3)
def inputs():
    return x
def fail():
    raise ValueError("two\\nlines")
def leave():
    raise SystemExit(0)
def number():
    return 3
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model's code and a file of its weights, which begin with ``module.``."""
    import sys

    (tmp_path / "its_model.py").write_text(CODE)
    shapes = {"a.weight": (4, 3), "a.bias": (4,), "b.weight": (2, 4), "b.bias": (2,)}
    torch.save({f"module.{key}": torch.randn(shape) for key, shape in shapes.items()}, tmp_path / "x.pth")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "its_model", raising=False)
    return tmp_path


@pytest.mark.parametrize("name", ["Net", "net"])
def test_a_model_is_named_by_its_module_and_the_callable(
    folder: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code = main(["doctor", "x.pth", "--for", f"its_model:{name}", "--format", "json"])
    streams = capsys.readouterr()
    found: dict[str, Any] = json.loads(streams.out)

    assert 1 == code and 4 == len(found["plan"])
    assert f"statedict: this runs your code: its_model:{name}" in streams.err
    assert "the user's code prints" in streams.err


@pytest.mark.parametrize("name", ["x", "inputs"])
def test_a_probe_is_named_the_same_way(folder: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    main(["doctor", "x.pth", "--for", "its_model:Net", "--probe", f"its_model:{name}", "--format", "json"])
    found = json.loads(capsys.readouterr().out)

    assert "probe-use" in [finding["code"] for finding in found["findings"]]


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("its_model:fail", "your code can't be run: ValueError: two"),
        ("its_model:leave", "your code can't be run: SystemExit: 0"),
        ("its_model:nothing", "AttributeError"),
        ("no_model_of_ours:build", "ModuleNotFoundError"),
        ("its_model:number", "it gives no model"),
    ],
)
def test_what_the_users_code_raises_is_one_line(
    folder: Path, target: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code = main(["doctor", "x.pth", "--for", target])
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("statedict: ") and target in line]

    assert (2, 2) == (code, len(lines))
    assert words in lines[-1]


def test_a_file_of_that_name_is_a_file(folder: Path) -> None:
    torch.save(torch.load("x.pth"), "its_model:Net")

    assert 0 == main(["doctor", "x.pth", "--for", "its_model:Net"])


def test_the_current_folder_is_not_before_what_is_installed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "colorsys.py").write_text("raise SystemExit('not this one')")
    main(["doctor", "x.pth", "--for", "colorsys:rgb_to_hls"])

    assert "TypeError" in capsys.readouterr().err
