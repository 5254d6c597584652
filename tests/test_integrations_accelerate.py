"""Accelerate's saved states, committed by rename, found when damaged, and looked at before anything of them is unpickled."""

from __future__ import annotations

import os
import random
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("accelerate")

from accelerate import Accelerator  # noqa: E402
from accelerate.utils import ProjectConfiguration  # noqa: E402
from torch.utils.data import DataLoader, TensorDataset  # noqa: E402

from statedict.errors import CorruptFile, FileError, RunError, StateDictError, StepExists, UnsafeContent  # noqa: E402
from statedict.runs.sealing import check_sealed  # noqa: E402
from statedict.torch.integrations.accelerate import SealedStates  # noqa: E402

BATCHES = 6  # in an epoch
STEPS = 15


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors this small are computed on one thread; on a busy machine a second one only waits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Counter:
    """An object of the user's, registered for checkpointing."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def state_dict(self) -> dict[str, Any]:
        return {"losses": list(self.losses)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.losses = list(state["losses"])


class Training:
    """What a script that uses accelerate has."""

    def __init__(self, folder: Path, *, seed: int = 1, **options: Any) -> None:
        random.seed(seed)
        numpy.random.seed(seed)
        torch.manual_seed(seed)
        self.accelerator = Accelerator(cpu=True)
        made = torch.Generator().manual_seed(7)
        inputs, labels = (
            torch.randn(BATCHES * 4, 5, generator=made),
            torch.randint(0, 3, (BATCHES * 4,), generator=made),
        )
        model = torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.Dropout(0.3), torch.nn.Linear(8, 3))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        # With a generator of its own an iterator draws nothing from torch's, which is restored before there is one.
        loader = DataLoader(TensorDataset(inputs, labels), 4, generator=torch.Generator())
        self.model, self.optimizer, self.schedule, self.loader = self.accelerator.prepare(
            model, optimizer, schedule, loader
        )
        self.counter = Counter()
        self.accelerator.register_for_checkpointing(self.counter)
        self.states = SealedStates(self.accelerator, folder, **options)

    def train(self, *, until: int = STEPS, every: int = 4) -> None:
        """Go on from the newest state; a state every few steps."""
        resumed = self.states.load()
        step = resumed.step or 0 if resumed else 0
        while step < until:
            skipped = self.accelerator.skip_first_batches(self.loader, step % BATCHES)
            for inputs, labels in skipped:
                loss = torch.nn.functional.cross_entropy(self.model(inputs), labels) + 0.1 * numpy.random.rand()
                self.accelerator.backward(loss)
                self.optimizer.step()
                self.schedule.step()
                self.optimizer.zero_grad()
                self.counter.losses.append(loss.item() + random.random())
                step += 1
                if step % every == 0:
                    self.states.save(step, metrics={"loss": loss.item()})
                if step == until:
                    return

    @property
    def outcome(self) -> tuple[list[float], list[list[float]]]:
        return self.counter.losses, [value.flatten().tolist() for value in self.model.state_dict().values()]


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


@pytest.fixture
def whole(tmp_path: Path) -> Any:
    """What comes out of a training that nothing happens to."""
    training = Training(tmp_path / "whole")
    training.train(every=99)
    return training.outcome


def test_a_training_that_was_stopped_and_resumed_equals_the_uninterrupted_one(tmp_path: Path, whole: Any) -> None:
    Training(tmp_path / "states").train(until=9)
    rest = Training(tmp_path / "states", seed=2)
    rest.train()

    assert whole == rest.outcome
    assert [4, 8, 12] == [step.step for step in rest.states.steps()]


KILLED = r"""
import os, sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
import test_integrations_accelerate as tests

tests.torch.set_num_threads(1)
fsync, count = os.fsync, []

def killing(fd):
    count.append(fd)
    if len(count) == int(sys.argv[3]):
        os.kill(os.getpid(), 9)
    fsync(fd)

os.fsync = killing
tests.Training(Path(sys.argv[2])).train()
"""


# A state of five files is committed with nine fsyncs, and the first of all is that of the new folder: these are in the second state.
@pytest.mark.parametrize("fsync", range(11, 20, 4))
def test_so_does_one_that_was_killed_while_a_state_was_committed(tmp_path: Path, whole: Any, fsync: int) -> None:
    command = [sys.executable, "-W", "ignore", "-c", KILLED, str(Path(__file__).parent), str(tmp_path / "states")]
    run = subprocess.run([*command, str(fsync)], capture_output=True, timeout=100, check=False)
    left = names(tmp_path / "states")
    rest = Training(tmp_path / "states", seed=2)
    rest.train()

    assert -9 == run.returncode, run.stderr[-2000:]
    assert ".tmp-checkpoint_8" in left or "checkpoint_8" in left
    assert whole == rest.outcome
    assert ["checkpoint_12", "checkpoint_4", "checkpoint_8"] == names(tmp_path / "states")


def test_a_damaged_newest_one_is_passed_over_loudly(
    tmp_path: Path, whole: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    Training(tmp_path).train(until=13)
    flip(tmp_path / "checkpoint_12" / "random_states_0.pkl")
    rest = Training(tmp_path, seed=2)
    rest.train()

    assert whole == rest.outcome
    assert "checkpoint_12 is passed over, and is called checkpoint_12.damaged" in capsys.readouterr().err
    assert {"checkpoint_12", "checkpoint_12.damaged"} <= set(names(tmp_path))


def test_one_of_a_number_is_loaded_or_refused(tmp_path: Path) -> None:
    Training(tmp_path).train(until=9)
    training = Training(tmp_path, seed=2)
    found = training.states.load(4)
    flip(tmp_path / "checkpoint_8" / "model.safetensors")

    assert found is not None
    assert (4, 4) == (found.step, len(training.counter.losses))
    with pytest.raises(CorruptFile, match=r"model\.safetensors"):
        training.states.load(8)


def test_where_all_are_damaged_it_raises(tmp_path: Path) -> None:
    Training(tmp_path).train(until=5)
    flip(tmp_path / "checkpoint_4" / "optimizer.bin")
    with pytest.raises(RunError, match="none of them is whole"):
        Training(tmp_path).states.load()


def test_what_is_kept_stays_and_the_rest_goes(tmp_path: Path) -> None:
    Training(tmp_path, keep=2).train(every=2)

    assert ["checkpoint_12", "checkpoint_14"] == names(tmp_path)


def test_a_number_that_is_taken_is_refused(tmp_path: Path) -> None:
    training = Training(tmp_path)
    training.states.save(4)
    with pytest.raises(StepExists, match="checkpoint_4"):
        training.states.save(4)


def test_a_save_that_the_disk_refuses_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training = Training(tmp_path, keep=1)
    training.states.save(1)
    fsync = os.fsync

    def failing(fd: int) -> None:
        if "optimizer.bin" in os.readlink(f"/proc/self/fd/{fd}"):
            raise OSError(5, "Input/output error")
        fsync(fd)

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(FileError, match="Input/output error"):
        training.states.save(2)
    monkeypatch.undo()

    assert [1] == [step.step for step in training.states.steps()]
    assert () == check_sealed(tmp_path / "checkpoint_1").errors
    training.states.save(2)

    assert ["checkpoint_2"] == names(tmp_path)


class Bomb:
    def __reduce__(self) -> Any:
        return os.mkdir, ("exploded",)


def test_a_registered_object_that_would_run_code_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    training = Training(tmp_path / "states")
    training.counter.losses.append(Bomb())  # type: ignore[arg-type]
    training.states.save(1)
    before = training.outcome[1]
    with pytest.raises(UnsafeContent, match=r"(posix|os)\.mkdir"):
        training.states.load()

    assert (["states"], before) == (names(tmp_path), training.outcome[1])


def test_names_that_accelerate_gives_itself_are_refused(tmp_path: Path) -> None:
    accelerator = Accelerator(
        cpu=True, project_config=ProjectConfiguration(str(tmp_path), automatic_checkpoint_naming=True)
    )
    with pytest.raises(StateDictError, match="names and deletes checkpoints itself"):
        SealedStates(accelerator, tmp_path)


TWO = r"""
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
import test_integrations_accelerate as tests
from statedict.errors import StateDictError

tests.torch.set_num_threads(1)
folder = Path(sys.argv[2])
training = tests.Training(folder)
training.train(until=3, every=2)  # there are three batches for each
if training.accelerator.is_main_process:
    tests.flip(folder / "checkpoint_2" / "random_states_1.pkl")
training.accelerator.wait_for_everyone()
try:
    training.states.load()
except StateDictError as error:
    print("refused:", "none of them is whole" in str(error))
training.states.save(5)
print("loaded:", training.states.load().step)
training.accelerator.end_training()
"""


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def test_two_processes_agree(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore", "-c", TWO, str(Path(__file__).parent), str(tmp_path / "states")]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "1"}
    ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2"} for rank in range(2)]
    runs = [
        subprocess.Popen(command, env={**os.environ, **shared, **rank}, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for rank in ranks
    ]
    try:
        said = [run.communicate(timeout=100) for run in runs]
    finally:
        for run in runs:
            run.kill()

    assert ["refused: True\nloaded: 5\n"] * 2 == [out.decode() for out, _ in said], said
    assert ["checkpoint_2.damaged", "checkpoint_5"] == names(tmp_path / "states")
    assert {"random_states_0.pkl", "random_states_1.pkl"} <= set(names(tmp_path / "states" / "checkpoint_5"))
