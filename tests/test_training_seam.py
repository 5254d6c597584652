"""Where a run and a training state meet: what a save reads, what it has recorded, and whose memory a restore hands over."""

from __future__ import annotations

import errno
import os
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from statedict.checkpoint import of_memory  # noqa: E402
from statedict.doors import TrainingState  # noqa: E402
from statedict.errors import RunError, StateDictError  # noqa: E402
from statedict.runs import TrainingRun  # noqa: E402
from statedict.runs.catalogue import NEXT_STEP_NAME  # noqa: E402
from statedict.runs.pieces import Captured  # noqa: E402
from statedict.runs.run import RunFolder  # noqa: E402
from statedict.runs.saving import duration  # noqa: E402
from statedict.torch.optimizers.loading import load_optimizer  # noqa: E402
from statedict.torch.training.environment import Difference  # noqa: E402


def make(seed: int) -> tuple[Any, Any, Any]:
    """A model, its optimizer after one step, and the state of both."""
    torch.manual_seed(seed)
    model = torch.nn.Linear(4, 3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    state = TrainingState(model=model, optimizer=optimizer)
    step(model, optimizer)
    return model, optimizer, state


def step(model: Any, optimizer: Any) -> None:
    """One step on random inputs."""
    optimizer.zero_grad()
    model(torch.randn(2, 4)).square().sum().backward()
    optimizer.step()


def saved_weights(folder: Path, number: int) -> list[list[float]]:
    with RunFolder(folder) as run:
        opened = run.open_step(number)
        assert opened is not None
        with opened:
            found: list[list[float]] = opened.piece("model")["weight"].numpy().tolist()
            return found


def while_writing(run: TrainingRun, act: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Have something done at the moment at which a save begins to write."""
    mkdir = run.catalogue.storage.mkdir

    def acting(path: str) -> None:
        act()
        mkdir(path)

    monkeypatch.setattr(run.catalogue.storage, "mkdir", acting)


# -------------------------------------------------------------------- live memory


def test_a_save_that_waits_makes_no_copy_and_one_that_does_not_wait_makes_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _, state = make(0)

    def refuse() -> None:
        raise StateDictError("the state was copied")

    monkeypatch.setattr(type(state), "capture", lambda self: refuse())
    with TrainingRun(tmp_path / "run") as run:
        assert run.save(1, state).durable
        with pytest.raises(StateDictError, match="the state was copied"):
            run.save(2, state, wait=False)

    assert model.weight.tolist() == saved_weights(tmp_path / "run", 1)


def test_what_a_save_that_waits_reads_is_the_parameters_own_memory() -> None:
    model, _, state = make(0)
    with state.still() as live:
        place = model.weight.data_ptr()

        assert address(live.pieces["model"]) == place != address(state.capture().pieces["model"])


def address(piece: Any) -> int:
    """Where the bytes of the weight lie."""
    view = piece["weight"].entry.view
    return int(torch.frombuffer(view.storage.data, dtype=torch.uint8).data_ptr())


@pytest.mark.parametrize("wait", [True, False])
def test_a_step_of_another_thread_waits_for_a_save_that_waits_and_for_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wait: bool
) -> None:
    model, optimizer, state = make(0)
    before = model.weight.tolist()
    thread = threading.Thread(target=step, args=(model, optimizer))
    seen: list[list[list[float]]] = []

    def act() -> None:
        thread.start()
        thread.join(0.2 if wait else 60.0)
        seen.append(model.weight.tolist())

    with TrainingRun(tmp_path / "run") as run:
        while_writing(run, act, monkeypatch)
        run.save(1, state, wait=wait).wait()
        thread.join()

    assert before == saved_weights(tmp_path / "run", 1) != model.weight.tolist()
    assert wait == (seen == [before])


# -------------------------------------------------------------------- the step that follows


def record(folder: Path, *, follows: bool = True) -> None:
    """A run with one step, and in memory the one that follows."""
    model, optimizer, state = make(0)
    with TrainingRun(folder) as run:
        run.save(1, state)
        if follows:
            step(model, optimizer)


def test_a_save_has_the_step_that_follows_recorded_and_a_restore_compares(tmp_path: Path) -> None:
    record(tmp_path / "run")
    model, optimizer, state = make(1)
    with TrainingRun(tmp_path / "run") as run:
        restored = run.restore(state, verify_next_step=True)
    step(model, optimizer)

    assert restored is not None
    assert [] == [found.name for found in restored.differences]
    assert (tmp_path / "run" / "step-00000001" / NEXT_STEP_NAME).is_file()


def test_a_step_that_follows_otherwise_raises(tmp_path: Path) -> None:
    record(tmp_path / "run")
    model, optimizer, state = make(1)
    with TrainingRun(tmp_path / "run") as run:
        run.restore(state, verify_next_step=True)
    torch.manual_seed(99)
    with pytest.raises(StateDictError, match="the step after 1 doesn't come to the parameters"):
        step(model, optimizer)


def test_where_no_step_followed_that_is_a_difference(tmp_path: Path) -> None:
    record(tmp_path / "run", follows=False)
    model, optimizer, state = make(1)
    with TrainingRun(tmp_path / "run") as run:
        restored = run.restore(state, verify_next_step=True)
    torch.manual_seed(99)
    step(model, optimizer)

    assert restored is not None
    assert ["next_step"] == [found.name for found in restored.differences]


class Handing:
    """A state that goes on only when a step of another thread, which waited for the save, is over."""

    def __init__(self, state: Any, thread: threading.Thread) -> None:
        self._state, self._thread = state, thread
        self.record_next_step = state.record_next_step

    @contextmanager
    def still(self) -> Iterator[Any]:
        with self._state.still() as live:
            yield live
        self._thread.join()


def test_the_step_that_waited_for_a_save_is_the_one_that_follows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, optimizer, state = make(0)
    thread = threading.Thread(target=step, args=(model, optimizer))
    with TrainingRun(tmp_path / "run") as run:
        while_writing(run, thread.start, monkeypatch)
        run.save(1, Handing(state, thread))  # type: ignore[arg-type]

    assert (tmp_path / "run" / "step-00000001" / NEXT_STEP_NAME).is_file()


def test_verify_knows_what_was_recorded_and_no_other_file(tmp_path: Path) -> None:
    record(tmp_path / "run")
    with RunFolder(tmp_path / "run") as run:
        known = run.verify()
        (tmp_path / "run" / "step-00000001" / "next-step.txt").write_text("")
        strange = run.verify()

    assert (True, ()) == (known.ok, known.findings)
    assert ["unknown-file"] == [found.code for found in strange.findings]


# -------------------------------------------------------------------- whose memory it is


def tensors_of(optimizer: Any) -> list[Any]:
    return [value for state in optimizer.state.values() for value in state.values() if isinstance(value, torch.Tensor)]


def shared(one: Any, other: Any) -> int:
    """How many tensors of the state of one optimizer lie in the memory of the other's."""
    places = {value.untyped_storage().data_ptr() for value in tensors_of(other)}
    return sum(value.untyped_storage().data_ptr() in places for value in tensors_of(one))


def test_a_step_restored_twice_gives_two_optimizers_states_of_their_own(tmp_path: Path) -> None:
    _, first, state = make(0)
    (_, second, other), (third_model, third, another) = make(1), make(2)
    with TrainingRun(tmp_path / "run") as run:
        run.save(1, state)
        run.restore(other)
        run.restore(another)

    assert [value.tolist() for value in tensors_of(first)] == [value.tolist() for value in tensors_of(second)]
    assert (0, 0, 0) == (shared(second, third), shared(second, first), shared(third, first))

    before = [value.clone() for value in tensors_of(second)]
    step(third_model, third)

    assert all(torch.equal(one, two) for one, two in zip(before, tensors_of(second), strict=True))
    assert not any(torch.equal(one, two) for one, two in zip(before, tensors_of(third), strict=True))


@pytest.mark.parametrize("adopt", [True, False])
def test_state_that_is_handed_over_is_the_optimizers_and_else_it_is_copied(adopt: bool) -> None:
    (model, source, _), (_, first, _), (_, second, _) = make(0), make(1), make(2)
    given = source.state_dict()
    for optimizer in (first, second):
        load_optimizer(optimizer, given, model=None, adopt=adopt)

    # Six tensors: step, exp_avg and exp_avg_sq of the weight and of the bias.
    assert (6 if adopt else 0) == shared(first, second) == shared(first, source)
    assert model.weight.shape == next(iter(first.state)).shape


# -------------------------------------------------------------------- in one line


class Plain:
    """A state without torch's parts: 4 MB that never change."""

    def __init__(self) -> None:
        self.still_weights = of_memory({"w": torch.zeros(1_000_000)})
        self.differences = [Difference(f"group.{number}", 1, 2) for number in range(5)]

    def capture(self) -> Captured:
        return Captured({"model": self.still_weights})

    def apply(self, step: Any, **options: Any) -> Plain:
        return self


def test_a_save_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started = threading.Event()
    with TrainingRun(tmp_path / "run") as run:
        first = str(run.save(1, Plain()))  # type: ignore[arg-type]
        second = str(run.save(2, Plain()))  # type: ignore[arg-type]
        while_writing(run, lambda: await_event(started), monkeypatch)
        saving = run.save(3, Plain(), wait=False)  # type: ignore[arg-type]
        under_way = str(saving)
        started.set()
        saving.wait()
        while_writing(run, refuse, monkeypatch)
        failing = run.save(4, Plain(), wait=False)  # type: ignore[arg-type]
        with pytest.raises(RunError):
            failing.wait()
    speed = r"in [\d.]+ m?s \([\d.e+-]+ GB/s\), blocked [\d.]+ m?s, durable"

    assert re.fullmatch(rf"step 1: 4\.00 MB {speed}", first)
    assert re.fullmatch(rf"step 2: 4\.00 MB, 4\.00 MB of it linked, {speed}", second)
    assert re.fullmatch(r"step 3: under way, blocked [\d.]+ m?s", under_way)
    assert str(failing).startswith("step 4: failed, ") and "No space left" in str(failing)


def await_event(event: threading.Event) -> None:
    assert event.wait(60.0)


def refuse() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_restore_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = Plain()
    with TrainingRun(tmp_path / "run") as run:
        for number in (1, 2):
            run.save(number, state)  # type: ignore[arg-type]
        path = tmp_path / "run" / "step-00000002" / "state.json"
        path.write_bytes(path.read_bytes().swapcase())
        fallen = str(run.restore(state))  # type: ignore[arg-type]
        state.differences = []
        plain = str(run.restore(state))  # type: ignore[arg-type]
    took = r"step 1: 4\.00 MB restored in [\d.]+ m?s \([\d.e+-]+ GB/s\)"

    assert re.fullmatch(took, plain)
    assert re.fullmatch(
        took + r", 5 differences \(group\.0, group\.1, group\.2 and 2 more\), fell back from step 2", fallen
    )


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.0, "0 ms"), (0.0804, "80 ms"), (0.1, "0.1 s"), (0.94, "0.9 s"), (75.2, "75 s")]
)
def test_a_duration_is_short(seconds: float, text: str) -> None:
    assert text == duration(seconds)
