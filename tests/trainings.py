"""A small training in which every kind of state matters: leave one out, and what follows is another."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy
import torch
from torch.utils.data import DataLoader, Dataset

from statedict.doors import TrainingState
from statedict.torch.training.rng import KINDS

EPOCHS = 3
SAMPLES = 23
BATCH = 3  # eight batches in an epoch, the last of them shorter
ACCUMULATED = 2


class Noisy(Dataset[Any]):
    """Samples with noise from each generator of the process that makes them: the training's own, or a worker's."""

    def __init__(self) -> None:
        made = torch.Generator().manual_seed(11)
        self._inputs = torch.randn(SAMPLES, 5, generator=made)
        self._labels = torch.randint(0, 3, (SAMPLES,), generator=made)

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        noise = 0.1 * torch.randn(5) + 0.1 * random.random()
        return self._inputs[index] + noise, self._labels[index]


class Training(NamedTuple):
    """Everything that a script of its own would make."""

    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: Any
    scaler: Any
    ema: torch.optim.swa_utils.AveragedModel
    loader: DataLoader[Any]
    noise: numpy.random.Generator

    @property
    def weights(self) -> list[torch.Tensor]:
        """What comes out of it in the end."""
        return [value.clone() for module in (self.model, self.ema) for value in module.state_dict().values()]


def make(seed: int, *, workers: int = 0, persistent: bool = True) -> Training:
    """What a new process has; with another seed, other random states and weights."""
    torch.manual_seed(seed)
    random.seed(seed)
    numpy.random.seed(seed)
    norm = torch.nn.BatchNorm1d(8)
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        norm.register_buffer(name, getattr(norm, name), persistent=persistent)
    model = torch.nn.Sequential(torch.nn.Linear(5, 8), norm, torch.nn.Dropout(0.3), torch.nn.Linear(8, 3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    generator = torch.Generator().manual_seed(seed)
    return Training(
        model,
        optimizer,
        torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 9),
        torch.amp.GradScaler("cpu", init_scale=3.0, growth_factor=1.3, growth_interval=2),
        torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)),
        DataLoader(Noisy(), BATCH, shuffle=True, num_workers=workers, generator=generator),
        numpy.random.default_rng(seed),
    )


def state_of(training: Training, *, without: Sequence[str] = (), **options: Any) -> TrainingState:
    """The training state, less some of its components, or some random generators."""
    kinds = [kind for kind in KINDS if kind not in without]
    parts = {name: value for name, value in training._asdict().items() if name not in without}
    return TrainingState(rng=kinds, **parts, **options)


Hook = Callable[[int], None]


def train(training: Training, state: Any, *, until: int | None = None, after: Hook = lambda step: None) -> list[float]:
    """Train to the end, or until a micro-step; the losses. ``after`` is called behind every micro-step with its number."""
    losses = []
    for epoch in range(state.epoch, EPOCHS):
        state.epoch = epoch
        for inputs, labels in getattr(state, "loader", training.loader):
            scale = 1 + 0.1 * numpy.random.rand() + 0.1 * training.noise.random() + 0.1 * random.random()
            loss = scale * torch.nn.functional.cross_entropy(training.model(inputs), labels)
            training.scaler.scale(loss / ACCUMULATED).backward()
            losses.append(loss.item())
            state.step += 1
            if state.step % ACCUMULATED == 0:
                training.scaler.step(training.optimizer)
                training.scaler.update()
                training.optimizer.zero_grad()
                training.ema.update_parameters(training.model)
                training.scheduler.step()
            after(state.step)
            if state.step == until:
                return losses
    return losses
