"""The doctor says nothing of healthy files: real ones, and models of every kind, new and trained."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from statedict.ops.diagnosing.contents import examine

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

REAL = (
    "allennlp-simple-tagger-best.th",
    "allennlp-training-state.th",
    "burn-legacy-shared-storage.pt",
    "captum-california.pt",
    "captum-titanic.pt",
    "facenet-pnet.pt",
    "lpips-v0.0-squeeze.pth",
    "lpips-v0.1-alex.pth",
    "picklescan-new-pytorch-model.bin",
    "torchtext-t5-output.pt",
    "udacity-cross-entropy.pth",
    "udacity-dqn.pth",
)


@pytest.mark.parametrize("name", REAL)
def test_real_files_are_healthy(name: str, shared: Path) -> None:
    assert [] == [finding.message for finding in examine(shared / "data" / "real" / name).wrong]


def test_all_real_files_are_looked_at(shared: Path) -> None:
    there = {path.name for path in (shared / "data" / "real").iterdir()} - {"README.md"}

    assert there == set(REAL)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "layers": lambda: nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10)),
    "one layer": lambda: nn.Linear(3, 2),
    "batch norm": lambda: nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.Conv2d(16, 32, 3), nn.BatchNorm2d(32)
    ),
    "group norm": lambda: nn.Sequential(nn.Conv2d(3, 16, 3), nn.GroupNorm(4, 16), nn.Conv2d(16, 32, 3)),
    "transformer": lambda: nn.Transformer(64, 4, 2, 2, 128, batch_first=True),
    "embedding": lambda: nn.Sequential(nn.Embedding(300, 64, padding_idx=0), nn.Linear(64, 300)),
    "lstm": lambda: nn.LSTM(64, 64, 2, bidirectional=True),
    "gru": lambda: nn.GRU(32, 64, 2),
    "no bias": lambda: nn.Sequential(nn.Linear(64, 64, bias=False), nn.RMSNorm(64), nn.Linear(64, 64, bias=False)),
    "half": lambda: nn.Sequential(nn.Linear(64, 128), nn.LayerNorm(128), nn.Linear(128, 10)).bfloat16(),
    "double": lambda: nn.Sequential(nn.Linear(64, 128), nn.Linear(128, 10)).double(),
    "complex": lambda: nn.Linear(8, 8, dtype=torch.complex64),
    "parameters": lambda: nn.ParameterDict(
        {"scale": nn.Parameter(torch.ones(3)), "zero": nn.Parameter(torch.zeros(4))}
    ),
    "instance norm": lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.InstanceNorm2d(8, affine=True)),
    "nothing": nn.Identity,
}
# What counts as untrained by its statistics; the others by their values alone, which is a note.
STATISTICS = {"batch norm"}


def made(name: str) -> nn.Module:
    torch.manual_seed(11)
    return MODELS[name]()


@pytest.mark.parametrize("name", [name for name in MODELS if name != "nothing"])
def test_a_new_model_has_at_most_the_finding_that_it_was_never_trained(name: str) -> None:
    examination = examine(made(name).state_dict())

    assert {"never-trained"} >= {finding.code for finding in examination.findings}
    assert bool(examination) is (name not in STATISTICS)


@pytest.mark.parametrize("name", ["layers", "batch norm", "group norm", "transformer", "lstm", "no bias"])
def test_a_new_model_is_told_by_its_values(name: str) -> None:
    assert ["never-trained"] == [finding.code for finding in examine(made(name).state_dict()).findings]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("how_much", [0.01, 1.0])
def test_a_trained_model_has_no_finding(name: str, how_much: float) -> None:
    state = made(name).state_dict()
    for key, tensor in state.items():
        if key.endswith("num_batches_tracked"):
            tensor.fill_(10)
        elif key.endswith("running_var"):
            tensor.uniform_(0.5, 1.5)
        else:
            tensor.add_(torch.randn_like(tensor) * how_much)

    assert [] == [finding.message for finding in examine(state).findings if finding.code != "no-tensors"]


def test_a_real_training_ends_the_word_of_never_trained() -> None:
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(20):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(torch.randn(32, 64)), torch.randint(0, 10, (32,))).backward()
        optimizer.step()

    assert [] == [finding.code for finding in examine(model.state_dict()).findings]
