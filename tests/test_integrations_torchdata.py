"""torchdata's loader, which keeps its own place, in a training state: with workers and without, in the middle of an epoch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("torchdata.stateful_dataloader")

from torch.utils.data import IterableDataset, get_worker_info  # noqa: E402
from torchdata.stateful_dataloader import StatefulDataLoader  # noqa: E402
from trainings import BATCH, SAMPLES, Noisy, make, state_of, train  # noqa: E402

from statedict.doors import TrainingState  # noqa: E402
from statedict.runs import TrainingRun  # noqa: E402

pytestmark = pytest.mark.filterwarnings(
    "ignore:'set_vital' is deprecated:UserWarning"
)  # torchdata 0.11 with torch 2.13

# Eight batches in an epoch, two in a step of the optimizer.
STOPS = {"mid-epoch, mid-accumulation": 11, "mid-epoch": 4, "last batch": 8, "first batch": 17}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors this small are computed on one thread; on a busy machine a second one only waits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Quiet(Noisy):
    """Samples without noise: torchdata's loader makes no batch again, so that its workers have other random states."""

    def __getitem__(self, index: int) -> Any:
        return self._inputs[index], self._labels[index]


def train_some(folder: Path, seed: int, workers: int, until: int | None) -> tuple[list[float], list[Any]]:
    """Go on from the run's newest step, until a micro-step, which is saved; or to the end."""
    training = make(seed)
    loader = StatefulDataLoader(
        Quiet(), BATCH, shuffle=True, num_workers=workers, generator=torch.Generator().manual_seed(seed)
    )
    training = training._replace(loader=loader)
    state = state_of(training)
    with TrainingRun(folder) as run:
        run.restore(state)
        losses = train(training, state, until=until)
        if until is not None:
            run.save(until, state)
    return losses, training.weights


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("stop", STOPS.values(), ids=list(STOPS))
def test_a_training_that_was_stopped_and_resumed_equals_the_uninterrupted_one(
    tmp_path: Path, stop: int, workers: int
) -> None:
    whole = train_some(tmp_path / "whole", 1, workers, None)
    first = train_some(tmp_path / "run", 1, workers, stop)
    rest = train_some(tmp_path / "run", 2, workers, None)

    assert whole[0] == first[0] + rest[0]
    assert all(torch.equal(a, b) for a, b in zip(whole[1], rest[1], strict=True))


class Stream(IterableDataset[int]):
    """Numbers that each worker has a share of, and its own place in."""

    def __init__(self) -> None:
        self.at = 0

    def __iter__(self) -> Iterator[int]:
        worker = get_worker_info()
        number, count = (0, 1) if worker is None else (worker.id, worker.num_workers)
        while self.at < SAMPLES:
            self.at += 1
            if self.at % count == number:
                yield self.at
        self.at = 0

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.at = state["at"]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_goes_on_where_its_workers_were(tmp_path: Path, workers: int) -> None:
    def numbers(until: int | None) -> list[list[int]]:
        state = TrainingState(loader=StatefulDataLoader(Stream(), 3, num_workers=workers))
        found = []
        with TrainingRun(tmp_path / "run") as run:
            run.restore(state)
            for batch in state.loader:
                found.append(batch.tolist())
                if len(found) == until:
                    run.save(until, state)
                    break
        return found

    whole = [batch.tolist() for batch in StatefulDataLoader(Stream(), 3, num_workers=workers)]

    assert whole == numbers(3) + numbers(None)
