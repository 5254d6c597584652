"""The code of the tutorial chapter on state dicts, typed out, with only the import changed; and where its own versions break."""

from __future__ import annotations

import datetime
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest

import statedict
from statedict import KeyMismatch, StateDictError

torch = pytest.importorskip("torch")
nn = torch.nn


def make_model() -> Any:
    class SimpleNet(nn.Module):  # type: ignore[name-defined, misc]
        def __init__(self, hidden: int = 8) -> None:
            super().__init__()
            self.fc1 = nn.Linear(4, hidden)
            self.bn = nn.BatchNorm1d(hidden)
            self.fc2 = nn.Linear(hidden, 2)

        def forward(self, x: Any) -> Any:
            return self.fc2(torch.relu(self.bn(self.fc1(x))))

    return SimpleNet


def trained(model: Any) -> tuple[Any, Any]:
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(16, 4, generator=torch.Generator().manual_seed(1))).square().sum().backward()
        optimizer.step()
    return model, optimizer


def equal(one: Any, other: Any) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values()))


def test_the_chapter_runs_with_only_the_import_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    SimpleNet = make_model()
    # ---- the chapter, from here
    from statedict import (
        compare_state_dicts,
        filter_state_dict,
        inspect_state_dict,
        load_model_safely,
        load_training_state,
        save_training_state,
    )

    model = SimpleNet()
    model, optimizer = trained(model)
    inspect_state_dict(model.state_dict())
    torch.save(model.state_dict(), "model_weights.pth")

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    loaded = load_model_safely(SimpleNet, "model_weights.pth", device)
    assert compare_state_dicts(model.state_dict(), loaded.state_dict())

    save_training_state(model, optimizer, 5, 0.125, "checkpoint.pth", best_accuracy=0.9)
    new_model = SimpleNet()
    new_optimizer = torch.optim.Adam(new_model.parameters(), lr=0.5)
    checkpoint = load_training_state(new_model, new_optimizer, "checkpoint.pth", device)
    print(f"Resuming from epoch {checkpoint['epoch']}, best accuracy {checkpoint['best_accuracy']}")

    pretrained = torch.load("model_weights.pth", weights_only=True)
    bigger = SimpleNet(hidden=8)
    bigger.fc2 = nn.Linear(8, 10)
    filtered = filter_state_dict(pretrained, bigger)
    bigger.load_state_dict(filtered, strict=False)
    # ---- to here
    said = capsys.readouterr().out

    assert equal(model, new_model) and 0.01 == new_optimizer.param_groups[0]["lr"]
    assert {"fc2.weight", "fc2.bias"} == set(pretrained) - set(filtered)
    for words in ("fc1.weight", "checkpoint.pth", "epoch 5", "loss 0.125", "skipped fc2.weight: shape [2, 8]"):
        assert words in said


def test_a_training_state_has_the_chapter_s_keys(tmp_path: Path) -> None:
    model, optimizer = trained(make_model()())
    statedict.save_training_state(model, optimizer, 3, torch.tensor(0.5), tmp_path / "x.pth", note="hello")
    state = torch.load(tmp_path / "x.pth", weights_only=True)

    assert [
        "model_state_dict", "optimizer_state_dict", "epoch", "loss", "pytorch_version", "timestamp", "note"
    ] == list(state)  # fmt: skip
    assert str is type(state["pytorch_version"]) and torch.__version__ == state["pytorch_version"]
    assert datetime.datetime.fromisoformat(state["timestamp"]).tzinfo is not None
    torch.optim.Adam(make_model()().parameters()).load_state_dict(state["optimizer_state_dict"])


def test_training_goes_on_where_it_stopped(tmp_path: Path) -> None:
    model, optimizer = trained(make_model()())
    statedict.save_training_state(model, optimizer, 3, 0.5, tmp_path / "x.pth")
    other = make_model()()
    resumed = torch.optim.Adam(reversed(list(other.parameters())))
    statedict.load_training_state(other, resumed, tmp_path / "x.pth")
    for net, steps in ((model, optimizer), (other, resumed)):
        steps.zero_grad()
        net(torch.ones(4, 4)).sum().backward()
        steps.step()

    assert equal(model, other)


def test_without_an_optimizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = make_model()()
    statedict.save_training_state(model, None, 1, None, tmp_path / "x.pth")
    other = make_model()()
    state = statedict.load_training_state(other, None, tmp_path / "x.pth")
    statedict.load_training_state(other, torch.optim.SGD(other.parameters(), lr=1), tmp_path / "x.pth")

    assert equal(model, other) and state.get("optimizer_state_dict") is None
    assert "no state of an optimizer" in capsys.readouterr().out


def test_files_that_the_chapter_s_own_code_wrote_load_too(tmp_path: Path) -> None:
    model, optimizer = trained(make_model()())
    torch.save(
        {
            "epoch": 2,
            "model_state_dict": model.state_dict(),
            "optimizer_state_dict": optimizer.state_dict(),
            "loss": 0.25,
            "pytorch_version": torch.__version__,
            "timestamp": datetime.datetime(2024, 5, 1, 12),
        },
        tmp_path / "x.pth",
    )
    other = make_model()()
    resumed = torch.optim.Adam(other.parameters())
    state = statedict.load_training_state(other, resumed, tmp_path / "x.pth")

    assert equal(model, other) and (2, 0.25, str(torch.__version__)) == (
        state["epoch"], state["loss"], state["pytorch_version"]
    )  # fmt: skip


@pytest.mark.parametrize("fault", ["model", "optimizer"])
def test_neither_changes_unless_both_fit(fault: str, tmp_path: Path) -> None:
    model, optimizer = trained(make_model()())
    statedict.save_training_state(model, optimizer, 3, 0.5, tmp_path / "x.pth")
    other = make_model()(hidden=8 if fault == "optimizer" else 6)
    resumed: Any = torch.optim.SGD(other.parameters(), lr=1.0, momentum=0.9)
    before = [value.detach().clone() for value in other.state_dict().values()]
    with pytest.raises(StateDictError):
        statedict.load_training_state(other, resumed, tmp_path / "x.pth")

    assert all(torch.equal(one, two) for one, two in zip(before, other.state_dict().values()))
    assert {} == dict(resumed.state) and 1.0 == resumed.param_groups[0]["lr"]


def test_a_file_of_another_architecture_is_refused(tmp_path: Path) -> None:
    torch.save(nn.Conv2d(1, 2, 3).state_dict(), tmp_path / "x.pth")
    with pytest.raises(KeyMismatch):
        statedict.load_model_safely(make_model(), tmp_path / "x.pth", "cpu", hidden=4)
    with pytest.raises(StateDictError, match="no training state"):
        statedict.load_training_state(make_model()(), None, tmp_path / "x.pth")


def test_a_loaded_model_can_be_trained(tmp_path: Path) -> None:
    torch.save({"state_dict": make_model()(hidden=5).state_dict()}, tmp_path / "x.pth")
    model = statedict.load_model_safely(make_model(), tmp_path / "x.pth", "cpu", hidden=5)
    trained(model)

    assert all(each.requires_grad for each in model.parameters())


def test_filtering_keeps_the_entries_themselves(capsys: pytest.CaptureFixture[str]) -> None:
    module = nn.Sequential(nn.Linear(2, 3), nn.LazyLinear(1))
    state = OrderedDict(
        [
            ("0.weight", torch.ones(3, 2)),
            ("0.bias", "text"),
            ("1.weight", torch.ones(1, 9)),
            ("evil\x1b[2J", torch.ones(1)),
        ]
    )
    kept = statedict.filter_state_dict(state, module)
    said = capsys.readouterr().out

    assert {"0.weight", "1.weight"} == set(kept) and kept["0.weight"] is state["0.weight"]
    assert "skipped 0.bias: str" in said and "\x1b" not in said and "kept 2 of 4" in said
