"""The Hugging Face Trainer with checkpoints that are sealed, found when damaged, and deleted only behind a newer one."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments  # noqa: E402

from statedict.errors import RunError, StateDictError  # noqa: E402
from statedict.runs import Best, Latest  # noqa: E402
from statedict.runs.sealing import check_sealed, read_seal  # noqa: E402
from statedict.torch.integrations.transformers import SealCheckpoints, newest_whole  # noqa: E402

SAMPLES = 24  # six steps in an epoch


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors this small are computed on one thread; on a busy machine a second one only waits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Noted(TrainerCallback):
    """The losses of all steps."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **rest: Any) -> None:
        if "loss" in logs:
            self.losses.append(logs["loss"])


class Stopper(TrainerCallback):
    """Ends a training behind a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        control.should_training_stop |= state.global_step == self.step


class Killer(TrainerCallback):
    """Ends the process before a step, or between a checkpoint and its seal."""

    def __init__(self, step: int, *, in_checkpoint: bool) -> None:
        self.step = step
        self.in_checkpoint = in_checkpoint

    def on_step_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        if state.global_step == self.step and not self.in_checkpoint:
            os.kill(os.getpid(), 9)

    def on_save(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        if state.global_step == self.step:
            os.kill(os.getpid(), 9)


def make(folder: Path, *callbacks: Any, steps: int = 10, seed: int = 3, **options: Any) -> tuple[Trainer, Noted]:
    """A trainer of a very small model with dropout; a checkpoint every two steps."""
    torch.manual_seed(seed)
    shape = {"vocab_size": 17, "n_positions": 8, "n_embd": 8, "n_layer": 1, "n_head": 2}
    model = GPT2LMHeadModel(GPT2Config(bos_token_id=0, eos_token_id=0, **shape))
    ids = torch.randint(0, 17, (SAMPLES, 8), generator=torch.Generator().manual_seed(5))
    data: Any = [{"input_ids": row, "labels": row} for row in ids]
    given = {"save_steps": 2, "logging_steps": 1, "max_steps": steps, "seed": 3, **options}
    arguments = TrainingArguments(
        str(folder),
        per_device_train_batch_size=4,
        learning_rate=0.01,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **given,  # type: ignore[arg-type]
    )
    noted = Noted()
    return Trainer(model, arguments, train_dataset=data, eval_dataset=data[:4], callbacks=[noted, *callbacks]), noted


def weights(trainer: Trainer) -> list[Any]:
    return [value.clone() for value in trainer.model.state_dict().values()]


def is_equal(one: list[Any], other: list[Any]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def checkpoints(folder: Path) -> list[str]:
    return sorted([name for name in os.listdir(folder) if "checkpoint" in name])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


@pytest.fixture
def whole(tmp_path: Path) -> tuple[list[float], list[Any]]:
    """The losses and weights of a training that nothing happens to."""
    trainer, noted = make(tmp_path / "whole", save_strategy="no")
    trainer.train()
    return noted.losses, weights(trainer)


def test_a_training_that_was_stopped_and_resumed_equals_the_uninterrupted_one(tmp_path: Path, whole: Any) -> None:
    losses = []
    for seed, stop in ((3, 4), (4, 7), (5, 99)):
        trainer, noted = make(tmp_path / "out", Stopper(stop), SealCheckpoints(), seed=seed)
        trainer.train(resume_from_checkpoint=newest_whole(tmp_path / "out"))
        losses += noted.losses

    assert whole[0] == losses[:7] + losses[8:], "step 7 was trained twice: its checkpoint is that of step 6"
    assert is_equal(whole[1], weights(trainer))


KILLED = r"""
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
import test_integrations_transformers as tests

tests.torch.set_num_threads(1)
killer = tests.Killer(int(sys.argv[3]), in_checkpoint=sys.argv[4] == "True")
tests.make(Path(sys.argv[2]), killer, tests.SealCheckpoints())[0].train()
"""


@pytest.mark.parametrize(("step", "in_checkpoint", "newest"), [(7, False, 6), (6, True, 4)])
def test_so_does_one_that_was_killed(
    tmp_path: Path, whole: Any, capsys: pytest.CaptureFixture[str], step: int, in_checkpoint: bool, newest: int
) -> None:
    folder = tmp_path / "out"
    command = [sys.executable, "-W", "ignore", "-c", KILLED, str(Path(__file__).parent), str(folder), str(step)]
    run = subprocess.run([*command, str(in_checkpoint)], capture_output=True, timeout=100, check=False)
    capsys.readouterr()
    found = newest_whole(folder)
    trainer, rest = make(folder, SealCheckpoints(), seed=4)
    trainer.train(resume_from_checkpoint=found)

    assert -9 == run.returncode, run.stderr[-2000:]
    assert str(folder / f"checkpoint-{newest}") == found
    assert whole[0][newest:] == rest.losses
    assert is_equal(whole[1], weights(trainer))
    assert in_checkpoint == ("checkpoint-6 is passed over" in capsys.readouterr().err)
    assert all(check_sealed(folder / name).errors == () for name in checkpoints(folder))


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "rng_state.pth", "trainer_state.json"])
def test_a_damaged_newest_one_is_passed_over_loudly(
    tmp_path: Path, whole: Any, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    make(tmp_path / "out", SealCheckpoints(), save_steps=4)[0].train()
    flip(tmp_path / "out" / "checkpoint-10" / name)
    flip(tmp_path / "out" / "checkpoint-8" / name)
    capsys.readouterr()
    found = newest_whole(tmp_path / "out")
    said = capsys.readouterr().err
    trainer, _ = make(tmp_path / "out", SealCheckpoints(), seed=4, save_steps=4)
    trainer.train(resume_from_checkpoint=found)

    assert (str(tmp_path / "out" / "checkpoint-4"), 2) == (found, said.count("is passed over"))
    assert is_equal(whole[1], weights(trainer))
    assert ["checkpoint-10", "checkpoint-10.damaged", "checkpoint-4", "checkpoint-8", "checkpoint-8.damaged"] == (
        checkpoints(tmp_path / "out")
    )


def test_where_all_are_damaged_it_raises(tmp_path: Path) -> None:
    make(tmp_path / "out", SealCheckpoints(), steps=2)[0].train()
    flip(tmp_path / "out" / "checkpoint-2" / "model.safetensors")
    with pytest.raises(RunError, match="none of them is whole"):
        newest_whole(tmp_path / "out")


def test_a_trainer_without_the_callback_leaves_nothing_to_resume_from_and_that_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path / "out", steps=2)[0].train()

    assert newest_whole(tmp_path / "out") is None
    assert "checkpoint-2 is passed over" in capsys.readouterr().err


def test_what_is_kept_stays_and_the_rest_goes_behind_the_seal(tmp_path: Path) -> None:
    make(tmp_path / "out", SealCheckpoints(keep=2))[0].train()

    assert ["checkpoint-10", "checkpoint-8"] == checkpoints(tmp_path / "out")


def test_the_best_stays_by_the_metrics_of_its_step(tmp_path: Path) -> None:
    options = {"eval_strategy": "steps", "eval_steps": 2}
    make(tmp_path / "out", SealCheckpoints(keep=Latest(1) | Best("eval_loss", mode="max")), **options)[0].train()
    kept = [read_seal(tmp_path / "out" / name) for name in checkpoints(tmp_path / "out")]
    losses = {seal.step: seal.metrics["eval_loss"] for seal in kept}

    assert {2, 10} == losses.keys()
    assert losses[2] > losses[10]


def test_the_trainers_own_best_model_stays(tmp_path: Path) -> None:
    options = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "greater_is_better": True}
    trainer, _ = make(tmp_path / "out", SealCheckpoints(keep=1), metric_for_best_model="eval_loss", **options)
    trainer.train()

    assert str(tmp_path / "out" / "checkpoint-2") == trainer.state.best_model_checkpoint
    assert ["checkpoint-10", "checkpoint-2"] == checkpoints(tmp_path / "out")


def test_the_trainers_own_deleting_is_refused(tmp_path: Path) -> None:
    trainer, _ = make(tmp_path / "out", SealCheckpoints(), save_total_limit=3)
    with pytest.raises(StateDictError, match=r"SealCheckpoints\(keep=3\)"):
        trainer.train()


def test_a_seal_that_the_disk_refuses_ends_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, _ = make(tmp_path / "out", SealCheckpoints(keep=1), steps=4)
    fsync = os.fsync

    def failing(fd: int) -> None:
        if "checkpoint-4" in os.readlink(f"/proc/self/fd/{fd}"):
            raise OSError(5, "Input/output error")
        fsync(fd)

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(RunError, match="Input/output error"):
        trainer.train()

    assert str(tmp_path / "out" / "checkpoint-2") == newest_whole(tmp_path / "out")


TWO = r"""
import os, sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
import test_integrations_transformers as tests

tests.torch.set_num_threads(1)
trainer, _ = tests.make(Path(sys.argv[2]), tests.SealCheckpoints(keep=1), steps=4, ddp_backend="gloo")
trainer.train(resume_from_checkpoint=tests.newest_whole(sys.argv[2]))
tests.torch.distributed.barrier()
os._exit(0)  # gloo's threads may abort an interpreter that ends as usual
"""


def test_one_process_of_two_seals_what_both_have_written(tmp_path: Path) -> None:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    command = [sys.executable, "-W", "ignore", "-c", TWO, str(Path(__file__).parent), str(tmp_path / "out")]
    shared = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    ranks = [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2"} for rank in range(2)]
    runs = [subprocess.Popen(command, env=rank, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) for rank in ranks]
    try:
        said = [run.communicate(timeout=100)[0] for run in runs]
    finally:
        for run in runs:
            run.kill()

    assert [0, 0] == [run.returncode for run in runs], said
    assert ["checkpoint-4"] == checkpoints(tmp_path / "out")
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= read_seal(tmp_path / "out" / "checkpoint-4").files.keys()
    assert () == check_sealed(tmp_path / "out" / "checkpoint-4").findings
