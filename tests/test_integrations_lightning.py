"""Lightning's trainer with checkpoints that are written durably, read without running them, and found when damaged."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("lightning")

import lightning.pytorch as lightning  # noqa: E402
from lightning.fabric import Fabric  # noqa: E402
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO  # noqa: E402
from lightning.pytorch.callbacks import ModelCheckpoint  # noqa: E402
from torch.utils.data import DataLoader, TensorDataset  # noqa: E402

import statedict  # noqa: E402
from statedict.errors import FileError, RunError, UnsafeContent, Unsupported  # noqa: E402
from statedict.torch.integrations import lightning as integration  # noqa: E402
from statedict.torch.integrations.lightning import StateDictCheckpointIO, newest_whole  # noqa: E402

pytestmark = [
    # Few workers, no validation data, a folder that isn't empty: what Lightning has to say about trainings as small as these.
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated"),
]

STEPS = 8  # in an epoch


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors this small are computed on one thread; on a busy machine a second one only waits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Small(lightning.LightningModule):
    """A module with buffers, two kinds of state beside it, and hyperparameters."""

    def __init__(self, width: int = 8, rate: float = 0.02, **others: Any) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = torch.nn.Sequential(
            torch.nn.Linear(5, width), torch.nn.BatchNorm1d(width), torch.nn.ReLU(), torch.nn.Linear(width, 3)
        )
        self.losses: list[float] = []

    def training_step(self, batch: Any, index: int) -> Any:
        loss = torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        self.losses.append(loss.item())
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.hparams["rate"])
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8)]


def data() -> Any:
    made = torch.Generator().manual_seed(11)
    inputs, labels = torch.randn(STEPS * 4, 5, generator=made), torch.randint(0, 3, (STEPS * 4,), generator=made)
    return DataLoader(TensorDataset(inputs, labels), 4)


def fit(folder: Path, *, epochs: int, plugin: Any = None, resume: Any = None, **checkpoints: Any) -> Small:
    """Train a new module; a checkpoint every epoch."""
    torch.manual_seed(1 if resume is None else 2)
    module = checkpoints.pop("module", Small)()
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        plugins=[StateDictCheckpointIO() if plugin is None else plugin],
        callbacks=[ModelCheckpoint(folder, filename="{step}", **{"save_top_k": -1, **checkpoints})],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, data(), ckpt_path=resume)
    return module


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def flip(path: Path, offset: int | None = None) -> None:
    """Change one bit of the first weight, or of the byte that is said."""
    content = bytearray(path.read_bytes())
    weight = torch.load(path, weights_only=True)["state_dict"]["net.0.weight"] if offset is None else None
    content[offset if weight is None else content.index(weight.numpy().tobytes())] ^= 4
    path.write_bytes(content)


def fingerprint(value: Any) -> str:
    """The text of a checkpoint, its tensors written out."""
    with torch._tensor_str.printoptions(profile="full", precision=17):
        return repr(value)


def is_equal(one: Small, other: Small) -> bool:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


# -------------------------------------------------------------------- a training


@pytest.mark.parametrize("wait", [True, False])
def test_a_training_that_was_stopped_and_resumed_equals_the_uninterrupted_one(tmp_path: Path, wait: bool) -> None:
    whole = fit(tmp_path / "whole", epochs=4)
    first = fit(tmp_path / "parts", epochs=2, plugin=StateDictCheckpointIO(wait=wait))
    rest = fit(
        tmp_path / "parts", epochs=4, plugin=StateDictCheckpointIO(wait=wait), resume=newest_whole(tmp_path / "parts")
    )

    assert [f"step={step}.ckpt" for step in (16, 24, 32, 8)] == names(tmp_path / "parts")
    assert whole.losses == first.losses + rest.losses
    assert is_equal(whole, rest)


KILLED = r"""
import sys, os, signal
sys.path.insert(0, sys.argv[1])
from pathlib import Path
import test_integrations_lightning as tests

class Killed(tests.Small):
    def training_step(self, batch, index):
        if self.global_step == 20:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().training_step(batch, index)

tests.torch.set_num_threads(1)
tests.fit(Path(sys.argv[2]), epochs=4, module=Killed, plugin=tests.StateDictCheckpointIO(wait=False))
"""


def test_so_does_one_that_was_killed_in_an_epoch(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore", "-c", KILLED, str(Path(__file__).parent), str(tmp_path / "run")]
    run = subprocess.run(command, capture_output=True, timeout=100, check=False)
    found = newest_whole(tmp_path / "run")
    rest = fit(tmp_path / "run", epochs=4, resume=found)
    whole = fit(tmp_path / "whole", epochs=4)
    # The save that was under way when the process was killed is there, or the one before.
    resumed = {str(tmp_path / "run" / f"step={step}.ckpt"): step for step in (8, 16)}

    assert -9 == run.returncode, run.stderr[-2000:]
    assert found in resumed
    assert whole.losses[resumed[found] :] == rest.losses
    assert is_equal(whole, rest)


def test_resuming_by_lightnings_own_words_works(tmp_path: Path) -> None:
    fit(tmp_path, epochs=1, save_last=True)
    rest = fit(tmp_path, epochs=2, save_last=True, resume="last")

    assert STEPS == len(rest.losses)


@pytest.mark.parametrize("wait", [True, False])
def test_only_the_newest_stay(tmp_path: Path, wait: bool) -> None:
    fit(tmp_path, epochs=4, plugin=StateDictCheckpointIO(wait=wait), save_top_k=2, monitor="step", mode="max")

    assert ["step=24.ckpt", "step=32.ckpt"] == names(tmp_path)


def test_other_readers_read_the_files(tmp_path: Path) -> None:
    trained = fit(tmp_path, epochs=1)
    path = tmp_path / "step=8.ckpt"
    plain = torch.load(path, weights_only=True)
    module = Small.load_from_checkpoint(path, weights_only=True)

    assert is_equal(trained, module)
    assert (8, {"width": 8, "rate": 0.02}) == (plain["global_step"], plain["hyper_parameters"])
    assert (
        plain["optimizer_states"][0]["state"].keys()
        == TorchCheckpointIO().load_checkpoint(path)["optimizer_states"][0]["state"].keys()
    )


def test_fabric_saves_and_loads_with_it(tmp_path: Path) -> None:
    fabric = Fabric(accelerator="cpu", plugins=[StateDictCheckpointIO()])
    model = torch.nn.Linear(3, 2)
    fabric.save(tmp_path / "deep" / "state.ckpt", {"model": model, "step": 5})
    other = torch.nn.Linear(3, 2)
    rest = fabric.load(tmp_path / "deep" / "state.ckpt", {"model": other})

    assert (True, {"step": 5}) == (torch.equal(model.weight, other.weight), rest)


# -------------------------------------------------------------------- damage


def test_a_damaged_newest_one_is_passed_over_loudly(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit(tmp_path, epochs=3)
    flip(tmp_path / "step=24.ckpt")
    found = newest_whole(tmp_path)

    assert str(tmp_path / "step=16.ckpt") == found
    assert "step=24.ckpt is passed over" in capsys.readouterr().err
    assert 16 == len(fit(tmp_path, epochs=4, resume=found).losses)


def test_no_bit_that_changes_anything_gets_through(tmp_path: Path) -> None:
    fit(tmp_path, epochs=1)
    path = tmp_path / "step=8.ckpt"
    content = path.read_bytes()
    expected = fingerprint(torch.load(path, weights_only=True))
    silent = []
    for offset in range(0, len(content), 41):
        flip(path, offset)
        try:
            if newest_whole(tmp_path) and fingerprint(StateDictCheckpointIO().load_checkpoint(path)) != expected:
                silent.append(offset)
        except statedict.StateDictError:
            pass
        path.write_bytes(content)

    assert [] == silent


@pytest.mark.parametrize("keep_nbytes", [0, 1, 1000, -1])
def test_one_that_was_cut_short_is_passed_over_too(tmp_path: Path, keep_nbytes: int) -> None:
    fit(tmp_path, epochs=2)
    path = tmp_path / "step=16.ckpt"
    path.write_bytes(path.read_bytes()[:keep_nbytes])

    assert str(tmp_path / "step=8.ckpt") == newest_whole(tmp_path)


def test_resuming_from_a_damaged_one_by_its_path_is_refused(tmp_path: Path) -> None:
    fit(tmp_path, epochs=1)
    flip(tmp_path / "step=8.ckpt")
    with pytest.raises(statedict.FormatError, match=r"step=8\.ckpt"):
        fit(tmp_path, epochs=2, resume=tmp_path / "step=8.ckpt")


def test_where_none_is_whole_it_raises(tmp_path: Path) -> None:
    fit(tmp_path, epochs=1)
    flip(tmp_path / "step=8.ckpt")
    with pytest.raises(RunError, match="none of them is whole"):
        newest_whole(tmp_path)


def test_where_there_is_none_yet_the_training_begins(tmp_path: Path) -> None:
    fit(tmp_path / "weights", epochs=1, save_weights_only=True)

    assert (None, None) == (newest_whole(tmp_path / "none"), newest_whole(tmp_path / "weights"))


def test_lightnings_own_checkpoints_are_candidates(tmp_path: Path) -> None:
    fit(tmp_path, epochs=1)
    fit(tmp_path, epochs=2, plugin=TorchCheckpointIO(), resume=newest_whole(tmp_path))
    rest = fit(tmp_path, epochs=3, resume=newest_whole(tmp_path))

    assert STEPS == len(rest.losses)


# -------------------------------------------------------------------- nothing is run


class Bomb:
    def __reduce__(self) -> Any:
        return os.mkdir, ("exploded",)


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    fit(tmp_path, epochs=1)
    checkpoint = torch.load(tmp_path / "step=8.ckpt", weights_only=True)
    torch.save({**checkpoint, "callbacks": {"bomb": Bomb()}}, tmp_path / "bomb.ckpt")
    with pytest.raises(UnsafeContent, match=r"'callbacks\.bomb' \((posix|os)\.mkdir\)"):
        StateDictCheckpointIO().load_checkpoint(tmp_path / "bomb.ckpt", weights_only=False)

    assert ["bomb.ckpt", "step=8.ckpt"] == names(tmp_path)


def test_inert_records_among_the_hyperparameters_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit(tmp_path, epochs=1)
    checkpoint = torch.load(tmp_path / "step=8.ckpt", weights_only=True)
    torch.save({**checkpoint, "hyper_parameters": {"thing": Bomb()}}, tmp_path / "old.ckpt")
    rest = fit(tmp_path, epochs=2, resume=tmp_path / "old.ckpt")

    assert STEPS == len(rest.losses)
    assert "'hyper_parameters.thing'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("value", "what"), [(Bomb(), r"hyper_parameters\.thing"), (torch.nn.ReLU(), r"ignore=\['thing'\]")]
)
@pytest.mark.filterwarnings("ignore:Attribute 'thing' is an instance of `nn.Module`")
def test_hyperparameters_that_only_code_could_bring_back_are_refused(tmp_path: Path, value: Any, what: str) -> None:
    def module() -> Small:
        made = Small()
        made.hparams["thing"] = value
        return made

    with pytest.raises(UnsafeContent, match=what):
        fit(tmp_path, epochs=1, module=module)

    assert [] == (names(tmp_path) if tmp_path.exists() else [])


# -------------------------------------------------------------------- the plugin alone


def test_a_link_is_replaced_and_what_it_names_stays(tmp_path: Path) -> None:
    plugin = StateDictCheckpointIO()
    plugin.save_checkpoint({"step": 1}, tmp_path / "best.ckpt")
    (tmp_path / "last.ckpt").symlink_to("best.ckpt")
    plugin.save_checkpoint({"step": 2}, tmp_path / "last.ckpt")

    assert ({"step": 1}, {"step": 2}) == (
        plugin.load_checkpoint(tmp_path / "best.ckpt"),
        plugin.load_checkpoint(tmp_path / "last.ckpt"),
    )
    assert ["best.ckpt", "last.ckpt"] == names(tmp_path)


def test_the_folders_of_a_checkpoint_are_made_and_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    fsync = os.fsync

    def noted(fd: int) -> None:
        synced.append(os.path.relpath(os.readlink(f"/proc/self/fd/{fd}"), tmp_path))
        fsync(fd)

    monkeypatch.setattr(os, "fsync", noted)
    StateDictCheckpointIO().save_checkpoint({"step": 1}, tmp_path / "a" / "b" / "last.ckpt")

    assert [".", "a"] == synced[:2]
    assert "a/b" == synced[-1]


@pytest.mark.parametrize("wait", [True, False])
def test_what_cannot_be_written_is_raised_and_the_older_one_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wait: bool
) -> None:
    plugin = StateDictCheckpointIO(wait=wait)
    plugin.save_checkpoint({"step": 1}, tmp_path / "old.ckpt")
    plugin.teardown()

    def full(*args: Any, **options: Any) -> Any:
        raise FileError("can't be written: No space left on device", errno=28, path="new.ckpt")

    monkeypatch.setattr(integration, "save", full)
    with pytest.raises(FileError, match="No space left"):
        plugin.save_checkpoint({"step": 2}, tmp_path / "new.ckpt")
        plugin.remove_checkpoint(tmp_path / "old.ckpt")
        plugin.teardown()
    plugin.teardown()

    assert ["old.ckpt"] == names(tmp_path)


def test_a_copy_is_written_that_training_does_not_change(tmp_path: Path) -> None:
    plugin = StateDictCheckpointIO(wait=False)
    weight, state = torch.ones(1000), {"list": [1]}
    for step in range(3):
        plugin.save_checkpoint(
            {"weight": weight, "tied": weight[:10], **state, "step": step}, tmp_path / f"{step}.ckpt"
        )
        weight += 1
        state["list"].append(step)
    plugin.teardown()
    found = [plugin.load_checkpoint(tmp_path / f"{step}.ckpt") for step in range(3)]

    assert [(1, [1], 0), (2, [1, 0], 1), (3, [1, 0, 1], 2)] == [
        (each["weight"].unique().item(), each["list"], each["step"]) for each in found
    ]
    assert found[0]["weight"].data_ptr() == found[0]["tied"].data_ptr()


def test_a_folder_of_another_strategy_is_removed(tmp_path: Path) -> None:
    (tmp_path / "sharded.ckpt").mkdir()
    (tmp_path / "sharded.ckpt" / "part").write_bytes(b"")
    plugin = StateDictCheckpointIO()
    plugin.remove_checkpoint(tmp_path / "sharded.ckpt")
    plugin.remove_checkpoint(tmp_path / "none.ckpt")

    assert [] == names(tmp_path)


def test_addresses_and_storage_options_are_refused(tmp_path: Path) -> None:
    plugin = StateDictCheckpointIO()
    with pytest.raises(Unsupported, match="addresses"):
        plugin.save_checkpoint({}, "s3://bucket/last.ckpt")
    with pytest.raises(Unsupported, match="storage options"):
        plugin.save_checkpoint({}, tmp_path / "last.ckpt", storage_options={})
