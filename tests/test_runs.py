"""A run on disk: what is committed, listed, opened, verified and kept, and who may write to it."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy
import pytest
import safetensors.numpy

import statedict
from statedict.checkpoint import of_memory
from statedict.errors import CorruptFile, KeyNotFound, RunError, StateDictError, StepExists, StepNotFound, Uncommitted
from statedict.runs import Best, Latest, Minutes, Steps, TrainingRun
from statedict.runs.pieces import Captured, OpenedStep
from statedict.runs.run import RunFolder

BACKBONE = numpy.arange(1 << 19, dtype="float32")


def captured(step: int, **more: object) -> Captured:
    """A model and an optimizer whose values tell the step."""
    model = {"fc.weight": numpy.full((3, 4), step, "float32"), "fc.bias": numpy.zeros(3, "float16")}
    optimizer = {"state": {0: {"step": step, "m": numpy.full(5, step)}}, "groups": [{"lr": 0.1, "betas": (0.9, 0.999)}]}
    pieces = {"model": of_memory(model), "optimizer": of_memory(optimizer), "plain": of_memory({"epoch": step, **more})}
    return Captured(pieces, {"progress": {"step": step}})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "run"


@pytest.fixture
def run(folder: Path) -> Iterator[RunFolder]:
    with RunFolder(folder) as made:
        yield made


def numbers(run: RunFolder) -> list[int]:
    return [step.step for step in run.steps()]


def flip(path: Path, at: int) -> None:
    """Turn one bit around."""
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(bytes(data))


# -------------------------------------------------------------------- saving and opening


def test_a_step_comes_back_as_it_was(run: RunFolder) -> None:
    run.write(7, captured(7), metrics={"loss": numpy.float32(0.5), "nan": float("nan")})
    opened = run.open_step()
    assert opened is not None
    with opened:
        tree = opened.piece("optimizer").tree()
        tree["state"][0]["m"] = tree["state"][0]["m"].numpy().tolist()
        found = (opened.step, opened.names, opened.facts, opened.metrics["loss"], tree, opened.piece("plain").objects)

    groups = [{"lr": 0.1, "betas": (0.9, 0.999)}]
    expected = {"state": {0: {"step": 7, "m": [7.0] * 5}}, "groups": groups}
    assert (7, ["model", "optimizer", "plain"], {"progress": {"step": 7}}, 0.5, expected, {"epoch": 7}) == found
    assert opened.metrics["nan"] != opened.metrics["nan"]


def test_the_safetensors_library_reads_the_files_of_a_step(run: RunFolder) -> None:
    written = run.write(7, captured(7))
    found = safetensors.numpy.load_file(os.path.join(written.path, "model.safetensors"))

    assert {"fc.weight": [[7.0] * 4] * 3, "fc.bias": [0.0] * 3} == {name: found[name].tolist() for name in found}


def test_a_written_step_is_durable_and_says_what_it_took(run: RunFolder) -> None:
    written = run.write(7, captured(7))
    sizes = sum(os.path.getsize(os.path.join(written.path, name)) for name in written.manifest.files)

    assert (True, sizes, 0) == (written.durable, written.nbytes, written.linked_nbytes)
    assert {"plan", "write", "fsync", "commit"} == written.phases.keys()
    assert {"manifest.json", "model.safetensors", "optimizer.safetensors", "state.json"} == set(
        os.listdir(written.path)
    )


def test_a_step_is_a_checkpoint_by_its_folder_and_by_its_number(run: RunFolder, folder: Path) -> None:
    run.write(1000, captured(3))
    keys = ["model.fc.weight", "model.fc.bias", "optimizer.state.0.m"]
    with statedict.open(f"{folder}#1000") as one, statedict.open(folder / "step-00001000") as other:
        assert [keys, keys, "step"] == [list(one), list(other), one.format]
    with statedict.open(f"{folder}#1000.model") as part:
        assert ["fc.weight", "fc.bias"] == list(part)


def test_compare_takes_two_steps(run: RunFolder, folder: Path) -> None:
    run.write(1, captured(1))
    run.write(2, captured(2))
    found = statedict.compare(f"{folder}#1", f"{folder}#2").to_dict()

    changed: Any = found["changed"]
    assert {"model.fc.weight", "optimizer.state.0.m", "optimizer.state.0.step", "plain.epoch"} == {
        each["key"] for each in changed
    }


def test_a_run_itself_is_no_checkpoint_and_a_step_that_is_not_there_is_named(run: RunFolder, folder: Path) -> None:
    run.write(5, captured(5))

    with pytest.raises(StateDictError, match=r"training run.*run#5"):
        statedict.open(folder)
    with pytest.raises(StepNotFound, match="no step 6"):
        statedict.open(f"{folder}#6")


def test_a_number_is_never_written_twice(run: RunFolder) -> None:
    run.write(5, captured(5))
    before = sorted(os.listdir(run.folder))

    with pytest.raises(StepExists):
        run.write(5, captured(6))
    assert before == sorted(os.listdir(run.folder))


@pytest.mark.parametrize("step", [-1, True, 1.5, "3", 10**18])
def test_what_is_no_number_of_a_step_is_refused(run: RunFolder, step: Any) -> None:
    with pytest.raises(StateDictError, match="number of a step"):
        run.write(step, captured(1))


def test_a_component_or_a_value_that_cannot_be_written_leaves_nothing(run: RunFolder) -> None:
    with pytest.raises(StateDictError, match="called so"):
        run.write(1, Captured({"../x": of_memory({"w": numpy.ones(1)})}))
    with pytest.raises(StateDictError, match="plain JSON"):
        run.write(1, Captured({}, {"when": object()}))
    with pytest.raises(StateDictError, match="number"):
        run.write(1, captured(1), metrics={"loss": "low"})  # type: ignore[dict-item]
    assert [".lock"] == os.listdir(run.folder)


def test_tied_overlapping_and_odd_tensors_come_back(run: RunFolder) -> None:
    torch = pytest.importorskip("torch")
    base = torch.arange(12.0).reshape(3, 4)
    value = {
        "a": base, "tied": base, "turned": base.t(), "bf": torch.ones(2, dtype=torch.bfloat16), "empty": torch.ones(0, 2),
        "z": torch.ones(2, dtype=torch.complex128), "sparse": torch.eye(3).to_sparse(), "a.b": torch.ones(1), 3: {"x": None},
    }  # fmt: skip
    run.write(1, Captured({"model": of_memory(value)}))
    opened = run.open_step()
    assert opened is not None
    with opened:
        found = statedict.load(opened.piece("model"))

    assert list(value) == list(found)
    assert (12, (1, 4)) == (found["turned"].untyped_storage().nbytes() // 4, found["turned"].stride())
    assert found["a"].data_ptr() == found["tied"].data_ptr() == found["turned"].data_ptr()
    assert all(torch.equal(value[key].to_dense(), found[key].to_dense()) for key in value if key != 3)


# -------------------------------------------------------------------- what hasn't changed


def test_a_component_that_stands_still_is_linked(run: RunFolder) -> None:
    frozen = of_memory({"w": BACKBONE})
    first = run.write(1, Captured({"frozen": frozen, **captured(1).pieces}))
    second = run.write(2, Captured({"frozen": frozen, **captured(2).pieces}))
    name = "frozen.safetensors"

    assert os.path.samefile(os.path.join(first.path, name), os.path.join(second.path, name))
    assert (0, os.path.getsize(os.path.join(first.path, name))) == (first.linked_nbytes, second.linked_nbytes)


def adapted(step: int) -> Captured:
    model = {"base": BACKBONE, "lora.a": numpy.full(8, step, "float32"), "tied": BACKBONE}
    return Captured({"model": of_memory(model)})


def test_a_part_that_stands_still_is_split_off_and_linked_from_then_on(folder: Path) -> None:
    with RunFolder(folder, keep=1) as run:
        written = [run.write(step, adapted(step)) for step in (1, 2, 3, 4)]
        opened = run.open_step()
        assert opened is not None
        with opened:
            model = opened.piece("model")
            found = (list(model), model["lora.a"].numpy().tolist(), model["tied"].tied_with)
            same = numpy.array_equal(model["base"].numpy(), BACKBONE)

        assert (["base", "lora.a", "tied"], [4.0] * 8, ("base",), True) == (*found, same)
        assert [0, 0] == [each.linked_nbytes for each in written[:2]]
        assert all(each.linked_nbytes > BACKBONE.nbytes for each in written[2:])
        assert ([4], True) == (numbers(run), run.verify().ok)


def test_bytes_that_nobody_has_compared_are_not_handed_on(folder: Path) -> None:
    with RunFolder(folder) as run:
        run.write(1, captured(1))
        run.write(2, Captured({"frozen": of_memory({"w": BACKBONE})}))
    with RunFolder(folder) as again:
        assert 0 == again.write(3, Captured({"frozen": of_memory({"w": BACKBONE})})).linked_nbytes
    with RunFolder(folder) as third:
        third.verify(3)
        assert third.write(4, Captured({"frozen": of_memory({"w": BACKBONE})})).linked_nbytes


# -------------------------------------------------------------------- damage


def damage(run: RunFolder, step: int, name: str = "model.safetensors", at: int = -1) -> None:
    flip(Path(run.catalogue.path_of(step), name), at)


def test_a_damaged_step_is_set_aside_said_and_never_counted(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    for step in (1, 2, 3):
        run.write(step, captured(step))
    damage(run, 3)
    opened = run.open_step()
    assert opened is not None
    opened.close()

    assert (2, [3], [1, 2]) == (opened.step, [each.step for each in opened.fell_back], numbers(run))
    assert "step 3 can't be used" in capsys.readouterr().err
    assert os.path.isdir(run.catalogue.path_of(3) + ".damaged")
    assert run.write(3, captured(3)).durable


def test_retention_never_takes_a_damaged_step_for_one(folder: Path) -> None:
    with RunFolder(folder, keep=2) as run:
        for step in (1, 2, 3):
            run.write(step, captured(step))
        damage(run, 3)
        assert not run.repair().ok
        run.write(4, captured(4))
        run.write(5, captured(5))

        assert [4, 5] == numbers(run)
        assert os.path.isdir(run.catalogue.path_of(3) + ".damaged")


def test_none_is_only_for_a_run_without_steps(run: RunFolder) -> None:
    assert (None, None, []) == (run.open_step(), run.latest(), run.steps())
    run.write(1, captured(1))
    damage(run, 1)

    for _ in range(2):
        with pytest.raises(RunError, match="none of them is whole"):
            run.open_step()


def test_a_damaged_step_of_a_given_number_is_an_error(run: RunFolder) -> None:
    run.write(1, captured(1))
    run.write(2, captured(2))
    damage(run, 2, "state.json", 40)

    with pytest.raises(CorruptFile, match=r"state\.json"):
        run.open_step(2)
    with pytest.raises(StepNotFound, match="no step 2"):
        run.open_step(2)


def test_verify_names_every_tensor_that_differs(run: RunFolder) -> None:
    run.write(1, Captured({"model": of_memory({"a": numpy.ones(4), "b": numpy.ones(4), "c": numpy.ones(4)})}))
    damage(run, 1, at=-1)
    damage(run, 1, at=-96)
    found = run.verify()

    assert [["a"], ["c"]] == sorted([list(finding.keys) for finding in found.findings])
    assert (False, "statedict.verification/1") == (bool(found), found.to_dict()["schema"])
    assert "damaged" in str(found) and "<table" in found.to_html()


def test_every_bit_flip_and_cut_is_found_and_never_loaded(folder: Path) -> None:
    with RunFolder(folder) as run:
        run.write(
            1, Captured({"m": of_memory({"w": numpy.arange(3, dtype="int16")}), "s": of_memory({"e": 1})}, {"f": 1})
        )
        step, missed = Path(run.catalogue.path_of(1)), []
        for path in sorted(step.iterdir()):
            data = path.read_bytes()
            changes = [data[:at] + bytes([data[at] ^ 1 << at % 8]) + data[at + 1 :] for at in range(len(data))]
            changes += [data[:cut] for cut in range(0, len(data), 7)] + [data + b"\0"]
            for number, changed in enumerate(changes):
                path.write_bytes(changed)
                missed += [(path.name, number)] if run.verify().ok or is_loaded(run, step) else []
            path.write_bytes(data)

        assert [] == missed
        assert run.verify().ok


def is_loaded(run: RunFolder, step: Path) -> bool:
    """Whether a step is opened; one that is set aside in vain comes back to its place."""
    try:
        opened = run.open_step(1)
    except StateDictError:
        Path(f"{step}.damaged").rename(step)
        return False
    assert opened is not None
    opened.close()
    return True


def test_a_file_of_another_step_and_two_that_changed_places_are_found(run: RunFolder) -> None:
    for step in (1, 2):
        run.write(step, Captured({"a": of_memory({"w": numpy.full(4, step)}), "b": of_memory({"w": numpy.full(4, 9)})}))
    one, two = (Path(run.catalogue.path_of(step)) for step in (1, 2))
    (two / "a.safetensors").write_bytes((one / "a.safetensors").read_bytes())
    assert [True, False] == [step.ok for step in run.verify().steps]
    (two / "state.json").write_bytes((one / "state.json").read_bytes())
    assert 2 == len(run.verify(2).findings)
    (one / "a.safetensors").rename(one / "c")
    (one / "b.safetensors").rename(one / "a.safetensors")
    (one / "c").rename(one / "b.safetensors")

    assert 2 == len(run.verify(1).findings)


def test_a_copy_under_a_higher_number_is_no_step(run: RunFolder) -> None:
    import shutil

    run.write(1, captured(1))
    shutil.copytree(run.catalogue.path_of(1), run.catalogue.path_of(9))

    assert ([1], 1) == (numbers(run), run.latest().step)  # type: ignore[union-attr]
    assert [True, False] == [step.ok for step in run.verify().steps]
    with pytest.raises(CorruptFile, match="copy of step 1"):
        statedict.open(run.catalogue.path_of(9))


@pytest.mark.parametrize(
    "change",
    [
        {"step": "1"}, {"files": {}}, {"files": {"../x": {}}}, {"components": {"m": ["gone"]}}, {"metrics": {"a": "b"}},
        {"schema": "statedict.step/9"}, {"time": None}, {"inventory": 3}, {"metrics": {"x": {"float": "zz"}}},
    ],
    ids=str,
)  # fmt: skip
def test_a_manifest_with_a_right_digest_and_wrong_facts_is_refused(
    run: RunFolder, change: Mapping[str, object]
) -> None:
    from xxhash import xxh3_128_hexdigest

    run.write(1, captured(1))
    path = Path(run.catalogue.path_of(1), "manifest.json")
    body = {**json.loads(path.read_bytes()), **change}
    del body["digest"]
    rest = json.dumps(body)[1:].encode()
    path.write_bytes(b'{"digest":"xxh3-128:' + xxh3_128_hexdigest(rest).encode() + b'",' + rest)

    assert [] == run.steps()
    with pytest.raises(CorruptFile):
        run.open_step(1)


# -------------------------------------------------------------------- retention, leftovers, readers


def test_the_newest_and_what_keep_names_stay(folder: Path) -> None:
    with RunFolder(folder, keep=Best("val_loss", 2)) as run:
        for step, loss in enumerate((0.9, 0.3, 0.5, 0.4, 0.7), 1):
            run.write(step, captured(step), metrics={"val_loss": loss})

        assert ([2, 4, 5], 2) == (numbers(run), run.best("val_loss").step)  # type: ignore[union-attr]
        opened = run.open_step("best")
        assert opened is not None and 2 == opened.step
        opened.close()


def test_a_step_that_is_read_is_not_deleted_until_it_is_let_go(folder: Path) -> None:
    with RunFolder(folder, keep=1) as run:
        run.write(1, captured(1))
        opened = run.open_step()
        assert opened is not None
        run.write(2, captured(2))
        assert [1, 2] == numbers(run)
        assert [1.0] * 5 == opened.piece("optimizer")["state.0.m"].numpy().tolist()
        opened.close()

        assert ([1], [2]) == ([step.step for step in run.prune()], numbers(run))


def test_the_last_verified_step_stays_until_another_is(folder: Path) -> None:
    with RunFolder(folder) as run:
        for step in (1, 2):
            run.write(step, captured(step))
        assert run.verify(1).ok
        damage(run, 2)
    with RunFolder(folder, keep=1) as run:
        assert ([], [(1, True), (2, False)]) == (run.prune(), [(step.step, step.verified) for step in run.steps()])
        run.write(3, captured(3))

        assert [(3, True)] == [(step.step, step.verified) for step in run.steps()]


def test_nothing_is_deleted_where_no_step_is_known_to_be_whole(folder: Path) -> None:
    with RunFolder(folder) as run:
        for step in (1, 2):
            run.write(step, captured(step))
        damage(run, 2)
    with RunFolder(folder, keep=1) as run:
        assert ([], [1, 2]) == (run.prune(), numbers(run))
        run.repair()

        assert [1] == numbers(run)


def test_what_a_dead_writer_left_is_ignored_and_swept(run: RunFolder, folder: Path) -> None:
    run.write(1, captured(1))
    for name in (".tmp-2-0123456789abcdef", ".trash-0-0123456789abcdef"):
        (folder / name).mkdir()
        (folder / name / "model.safetensors").write_bytes(b"half")
    assert [1] == numbers(run)
    with pytest.raises(Uncommitted, match="never committed"):
        run.open_step(2)
    assert 2 == len(run.verify().leftovers)
    run.write(2, captured(2))

    assert {".lock", "step-00000001", "step-00000002"} == set(os.listdir(folder))


def test_a_finished_run_is_read_where_nothing_can_be_written(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with RunFolder(folder) as run:
        run.write(1, captured(1))
        run.write(2, captured(2))
    damage(run, 2)

    def refuse(*arguments: object, **more: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    finished = RunFolder(folder)
    for name in ("mkdir", "rename", "rename_noreplace", "unlink", "open_new", "fsync_folder", "link"):
        monkeypatch.setattr(finished.catalogue.storage, name, refuse)
    assert [True, False] == [step.ok for step in finished.verify().steps]
    opened = finished.open_step()
    assert opened is not None and 1 == opened.step
    opened.close()
    with pytest.raises(RunError) as caught:
        finished.write(3, captured(3))

    assert errno.EROFS == caught.value.errno


# -------------------------------------------------------------------- two writers

WRITER = """
import sys, numpy
from statedict.checkpoint import of_memory
from statedict.runs.pieces import Captured
from statedict.runs.run import RunFolder
run = RunFolder(sys.argv[1])
run.write(int(sys.argv[2]), Captured({"m": of_memory({"w": numpy.ones(3)})}))
print("written", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def writer(folder: Path) -> Iterator[Callable[[int], subprocess.Popen[str]]]:
    """Starts a process that writes a step and then holds the run until its stdin is closed."""
    started: list[subprocess.Popen[str]] = []

    def start(step: int) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", WRITER, str(folder), str(step)]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout is not None
        assert "written\n" == process.stdout.readline()
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_a_second_writer_is_told_who_the_first_is_and_a_dead_one_blocks_nobody(
    folder: Path, writer: Callable[[int], subprocess.Popen[str]]
) -> None:
    other = writer(1)
    with RunFolder(folder) as run:
        assert [1] == numbers(run)
        with pytest.raises(RunError, match=f"process {other.pid} on"):
            run.write(2, captured(2))
        other.kill()
        other.wait()

        assert run.write(2, captured(2)).durable


def test_runs_of_one_process_take_turns(folder: Path) -> None:
    with RunFolder(folder) as one, RunFolder(folder) as other:
        one.write(1, captured(1))
        other.write(2, captured(2))
        one.close()
        other.write(3, captured(3))

        assert [1, 2, 3] == numbers(one)


def test_a_forked_child_holds_nothing_and_cannot_write(folder: Path) -> None:
    run = RunFolder(folder)
    run.write(1, captured(1))
    (told, tell), (over, end) = os.pipe(), os.pipe()
    child = os.fork()
    if not child:
        answer = b"wrote"
        try:
            run.write(2, captured(2))
        except RunError:
            answer = b"refused"
        os.write(tell, answer)
        os.read(over, 1)
        os._exit(0)
    assert b"refused" == os.read(told, 20)
    run.close()
    # The child lives still, and the lock is free.
    with RunFolder(folder) as again:
        assert again.write(3, captured(3)).durable
    os.write(end, b"x")

    assert 0 == os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    for fd in (told, tell, over, end):
        os.close(fd)


def test_threads_may_use_one_run(folder: Path) -> None:
    from threading import Thread

    with RunFolder(folder, keep=Latest(3)) as run:
        threads = [Thread(target=run.write, args=(step, captured(step))) for step in range(1, 9)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

        assert 8 in numbers(run) and run.verify().ok


# -------------------------------------------------------------------- the training's side


class State:
    """A training state without torch: one array, and what was asked of it."""

    def __init__(self) -> None:
        self.step = 0
        self.weights = numpy.zeros(4)

    def capture(self) -> Captured:
        return Captured({"model": of_memory({"w": self.weights.copy()}), "plain": of_memory({"step": self.step})})

    def apply(self, step: OpenedStep, *, only: Any, keep_hyperparameters: Any) -> object:
        self.weights = step.piece("model")["w"].numpy()
        if only is None:
            self.step = int(str(step.piece("plain").objects["step"]))
        return {"only": only}


@pytest.mark.parametrize("wait", [True, False])
def test_a_training_goes_on_where_it_stood(folder: Path, wait: bool) -> None:
    state = State()
    with TrainingRun(folder, every=Steps(2)) as run:
        assert run.restore(state) is None
        for state.step in range(1, 6):
            state.weights += 1
            if run.should_save(state.step):
                saved = run.save(state.step, state, metrics={"loss": 1 / state.step}, wait=wait)
    assert saved.wait().durable and saved.nbytes and saved.blocked_ms > 0 and "capture" in saved.phases
    fresh = State()
    with TrainingRun(folder) as again:
        restored = again.restore(fresh)
        assert restored is not None

        assert (4, 4, [4.0] * 4, {"loss": 0.25}) == (
            restored.step,
            fresh.step,
            fresh.weights.tolist(),
            restored.metrics,
        )
        with pytest.raises(KeyNotFound, match="no such component"):
            again.restore(fresh, only=["modle"])


def test_an_error_of_a_save_in_the_background_surfaces_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = TrainingRun(folder)
    state = State()

    def refuse(path: str) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO), path)

    monkeypatch.setattr(run.catalogue.storage, "mkdir", refuse)
    run.save(1, state, wait=False)
    with pytest.raises(RunError) as caught:
        run.save(2, state, wait=False)
    monkeypatch.undo()
    run.save(2, state, wait=False)
    run.close()

    assert (errno.EIO, [2]) == (caught.value.errno, numbers(run))


def test_a_signal_asks_for_a_save_and_the_handlers_come_back(folder: Path) -> None:
    met: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: met.append(number))
    try:
        ours = signal.getsignal(signal.SIGUSR1)
        with TrainingRun(folder, every=Minutes(1000), signals=True) as run:
            assert not run.should_save(1)
            os.kill(os.getpid(), signal.SIGUSR1)
            assert (True, True, [signal.SIGUSR1]) == (run.should_stop, run.should_save(1), met)

        assert (ours, signal.SIG_DFL) == (signal.getsignal(signal.SIGUSR1), signal.getsignal(signal.SIGTERM))
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_an_error_in_the_block_saves_if_that_was_asked_for(folder: Path) -> None:
    state = State()
    with pytest.raises(ZeroDivisionError), TrainingRun(folder, save_on_exception=state):
        state.step = 3
        state.step //= 0
    with TrainingRun(folder) as run:
        assert [3] == numbers(run)


def test_should_save_is_never_true_for_a_committed_step(run: RunFolder) -> None:
    assert run.should_save(5)
    run.write(5, captured(5))

    assert (False, True) == (run.should_save(5), run.should_save(6))


def test_the_folder_is_made_if_its_parent_exists(tmp_path: Path) -> None:
    RunFolder(tmp_path / "a").close()
    assert (tmp_path / "a").is_dir()
    (tmp_path / "file").write_bytes(b"")
    for path in (tmp_path / "b" / "c", tmp_path / "file"):
        with pytest.raises(RunError):
            RunFolder(path)
