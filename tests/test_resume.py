"""A training that was stopped and resumed is bit for bit the one that wasn't; and not, if any kind of state is left out."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from trainings import Training, make, state_of, train  # noqa: E402

from statedict.errors import StateDictError  # noqa: E402
from statedict.runs import TrainingRun  # noqa: E402

# Eight batches in an epoch, two in a step of the optimizer: these stop in the middle of both, between the two, and at their ends.
MIDDLE = 11
STOPS = {"mid-epoch, mid-accumulation": MIDDLE, "mid-epoch": 4, "last batch": 8, "mid-accumulation, late": 23}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors this small are computed on one thread; on a busy machine a second one only waits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def resumed(
    folder: Path, stop: int, *, without: tuple[str, ...] = (), wait: bool = True, forget: Any = None, **options: Any
) -> tuple[list[float], list[Any]]:
    """The losses and the weights of a training that ends after ``stop`` micro-steps and goes on in a new process."""
    makes = {name: options.pop(name) for name in ("workers", "persistent") if name in options}
    first = make(1, **makes)
    with TrainingRun(folder) as run:
        state = state_of(first, without=without, **options)

        def save(step: int) -> None:
            if step == stop:
                run.save(step, state, wait=wait)

        losses = train(first, state, until=stop, after=save)
    second = make(2, **makes)
    state = state_of(second, without=without, **options)
    with TrainingRun(folder) as run:
        restored = run.restore(state)
    if forget is not None:
        forget(second, state)

    assert restored is not None
    assert stop == restored.step == state.step
    return losses + train(second, state), second.weights


def uninterrupted(**makes: Any) -> tuple[list[float], list[Any]]:
    training = make(1, **makes)
    return train(training, state_of(training)), training.weights


def is_equal(one: tuple[list[float], list[Any]], other: tuple[list[float], list[Any]]) -> bool:
    return one[0] == other[0] and all(torch.equal(a, b) for a, b in zip(one[1], other[1], strict=True))


@pytest.mark.parametrize("wait", [True, False])
@pytest.mark.parametrize("stop", STOPS.values(), ids=list(STOPS))
def test_a_resumed_training_equals_the_uninterrupted_one_bit_for_bit(tmp_path: Path, stop: int, wait: bool) -> None:
    assert is_equal(uninterrupted(), resumed(tmp_path / "run", stop, wait=wait))


@pytest.mark.parametrize("stop", [MIDDLE, 8])
def test_so_it_does_with_two_workers(tmp_path: Path, stop: int) -> None:
    assert is_equal(uninterrupted(workers=2), resumed(tmp_path / "run", stop, workers=2))


def test_buffers_that_are_not_persistent_come_back_if_asked_for(tmp_path: Path) -> None:
    assert is_equal(uninterrupted(persistent=False), resumed(tmp_path / "run", MIDDLE, persistent=False, buffers="all"))


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning")  # torchdata 0.11 with torch 2.13
@pytest.mark.parametrize("stop", [MIDDLE, 16])
def test_so_it_does_with_a_loader_that_keeps_its_own_state(tmp_path: Path, stop: int) -> None:
    stateful = pytest.importorskip("torchdata.stateful_dataloader").StatefulDataLoader

    def train_some(seed: int, until: int | None) -> tuple[list[float], list[Any]]:
        training = make(seed)
        loader = training.loader
        training = training._replace(loader=stateful(loader.dataset, 3, shuffle=True, generator=loader.generator))
        state = state_of(training)
        with TrainingRun(tmp_path / "run") as run:
            run.restore(state)
            losses = train(training, state, until=until)
            if until is not None:
                run.save(until, state)
        return losses, training.weights

    whole, first, rest = train_some(1, None), train_some(1, stop), train_some(2, None)

    assert is_equal(whole, (first[0] + rest[0], rest[1]))


def forget_position(training: Training, state: Any) -> None:
    state.loader.end_epoch()


def forget_sampler(training: Training, state: Any) -> None:
    training.loader.generator.manual_seed(99)


# What is left out, each by the means that a user has.
CONTROLS: dict[str, dict[str, Any]] = {
    "model": {"without": ("model",)},
    "buffers of batch norm": {"persistent": False},
    "optimizer": {"without": ("optimizer",)},
    "scheduler": {"without": ("scheduler",)},
    "scaler": {"without": ("scaler",)},
    "moving average": {"without": ("ema",)},
    "generator of the sampler": {"forget": forget_sampler},
    "position in the epoch": {"forget": forget_position},
    "accumulated gradients": {"gradients": "none"},
    "torch's generator": {"without": ("torch",)},
    "Python's generator": {"without": ("python",)},
    "numpy's generator": {"without": ("numpy",)},
    "a generator of the user's": {"without": ("noise",)},
    "the whole loader": {"without": ("loader",)},
}


@pytest.mark.parametrize("control", CONTROLS.values(), ids=list(CONTROLS))
def test_without_any_one_kind_of_state_it_does_not(tmp_path: Path, control: dict[str, Any]) -> None:
    assert not is_equal(uninterrupted(), resumed(tmp_path / "run", MIDDLE, **control))


def test_resuming_twice_equals_it_too(tmp_path: Path) -> None:
    training = make(1)
    folder = tmp_path / "run"
    losses: list[float] = []
    for number, stop in enumerate([5, 6, 13, None]):
        training = make(number + 1)
        state = state_of(training)
        with TrainingRun(folder) as run:
            restored = run.restore(state)

            assert (restored is None) == (number == 0)
            losses += train(training, state, until=stop)
            if stop is not None:
                run.save(stop, state)

    assert is_equal(uninterrupted(), (losses, training.weights))


def test_what_was_restored_can_be_saved_before_it_is_iterated(tmp_path: Path) -> None:
    first = make(1)
    with TrainingRun(tmp_path / "run") as run:
        state = state_of(first)
        losses = train(first, state, until=MIDDLE)
        run.save(MIDDLE, state)
    for seed, step in ((2, MIDDLE + 100), (3, None)):
        training = make(seed)
        state = state_of(training)
        with TrainingRun(tmp_path / "run") as run:
            run.restore(state)
            if step is not None:
                run.save(step, state)

    assert is_equal(uninterrupted(), (losses + train(training, state), training.weights))


def record(folder: Path) -> None:
    """A run whose step is followed by another, which is recorded."""
    first = make(1)
    with TrainingRun(folder) as run:
        state = state_of(first)

        def save(step: int) -> None:
            if step == MIDDLE:
                saved = run.save(step, state)
                state.record_next_step(saved)

        train(first, state, until=MIDDLE + 3, after=save)


def test_the_next_step_is_compared_with_what_it_was(tmp_path: Path) -> None:
    record(tmp_path / "run")
    second = make(2)
    state = state_of(second)
    with TrainingRun(tmp_path / "run") as run:
        restored = run.restore(state, verify_next_step=True)

    assert restored is not None
    assert 13 == len(train(second, state))


@pytest.mark.parametrize("culprit", ["weights", "data"])
def test_a_next_step_that_comes_to_something_else_raises(tmp_path: Path, culprit: str) -> None:
    record(tmp_path / "run")
    second = make(2)
    state = state_of(second)
    with TrainingRun(tmp_path / "run") as run:
        run.restore(state, verify_next_step=True)
    if culprit == "weights":
        with torch.no_grad():
            second.model[0].bias[0] += 1e-6
    else:
        state.loader.end_epoch()
    with pytest.raises(StateDictError, match="the step after 11 doesn't come to the parameters"):
        train(second, state)
