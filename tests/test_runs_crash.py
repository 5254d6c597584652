"""Power cuts: in every state that a crash may leave, the newest durable step is there, whole, and nothing else passes for one."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import numpy
import pytest
from crash_storage import Crash, CrashStorage, Op, crashes

from statedict.checkpoint import of_memory
from statedict.runs.pieces import Captured
from statedict.runs.policies import Latest
from statedict.runs.run import RunFolder
from statedict.runs.verification import check_step

LEAST_STATES = 3000
STEPS = 5
FROZEN = numpy.arange(300, dtype="float32")


def captured(step: int) -> Captured:
    """A model of which one tensor stands still, an optimizer, and a value: five files at most."""
    model = {"head": numpy.full(200, step, "float32"), "step": step}
    return Captured({"frozen": of_memory({"w": FROZEN}), "model": of_memory(model)}, {"step": step})


def run_of(storage: CrashStorage) -> RunFolder:
    return RunFolder("/run", keep=Latest(2), storage=storage)


def recorded() -> list[Op]:
    """What three saves do to the disk; the third deletes the first."""
    storage = CrashStorage()
    run = run_of(storage)
    for step in range(1, STEPS + 1):
        run.write(step, captured(step), on_phase=None)
        position = next(at for at in range(len(storage.log) - 1, -1, -1) if _commits(storage.log[at], step))
        storage.log.insert(position + 2, Op("ack", step))
    return storage.log


def _commits(op: Op, step: int) -> bool:
    return op.kind == "name" and op.name == f"step-{step:08d}"


class Checker:
    """Looks at disks after a crash through the code that a user has; what was seen before isn't looked at again."""

    def __init__(self) -> None:
        self.known: dict[object, tuple[int | None, str]] = {}

    def __call__(self, crash: Crash) -> str:
        """What is wrong; empty if nothing is."""
        signature = crash.disk.signature()
        if signature not in self.known:
            self.known[signature] = self._look(crash)
        newest, wrong = self.known[signature]
        if wrong:
            return wrong
        if crash.acknowledged >= 0 and (newest is None or newest < crash.acknowledged):
            return f"step {crash.acknowledged} was durable, and {newest} is the newest"
        return ""

    def _look(self, crash: Crash) -> tuple[int | None, str]:
        storage = CrashStorage(crash.disk)
        storage._next = 1 << 20
        run = run_of(storage)
        for number in run.catalogue.numbers():
            if not check_step(run.catalogue, number).ok:
                return None, f"half of step {number} is there under its name"
        latest = run.latest()
        try:
            opened = run.open_step()
        except Exception as error:
            return None, f"nothing can be opened: {error}"
        if opened is None or latest is None:
            return None, "" if opened is latest is None else "latest() and open_step() differ"
        expected = {"head": [float(opened.step)] * 200, "step": opened.step}
        tree = opened.piece("model").tree()
        found = {"head": tree["head"].numpy().tolist(), "step": tree["step"]}
        same = numpy.array_equal(opened.piece("frozen")["w"].numpy(), FROZEN)
        if opened.step != latest.step or found != expected or not same:
            return None, f"step {opened.step} holds something else"
        return opened.step, ""


@pytest.fixture(scope="module")
def log() -> list[Op]:
    return recorded()


@pytest.fixture(scope="module")
def checker() -> Checker:
    return Checker()


def first_violation(log: Sequence[Op], checker: Checker, first: int = 0) -> str:
    return next((f"{wrong} ({crash.how})" for crash in crashes(log, first) if (wrong := checker(crash))), "")


def test_no_power_cut_loses_a_durable_step_or_shows_half_of_one(log: list[Op], checker: Checker) -> None:
    states = list(crashes(log))
    wrong = [f"after op {crash.after}, {crash.how}: {found}" for crash in states if (found := checker(crash))]
    sys.stdout.write(
        f"{len(states):,} states after {len(log)} operations, {len(checker.known):,} differ, {len(wrong)} violations\n"
    )

    assert [] == wrong[:5]
    assert len(states) >= LEAST_STATES


def test_every_fsync_is_needed(log: list[Op], checker: Checker) -> None:
    syncs = [at for at, op in enumerate(log) if op.kind in ("fsync", "fsync_folder")]
    missed = [at for at in syncs if not first_violation([*log[:at], *log[at + 1 :]], checker, at)]
    sys.stdout.write(f"{len(syncs)} fsyncs, each left out once, {len(syncs) - len(missed)} caught\n")

    assert [] == [(at, log[at]) for at in missed]


def test_every_order_that_matters_is_needed(log: list[Op], checker: Checker) -> None:
    pairs = [at for at in range(len(log) - 1) if not is_indifferent(log, at)]
    swapped = [[*log[:at], log[at + 1], log[at], *log[at + 2 :]] for at in pairs]
    missed = [at for at, each in zip(pairs, swapped) if not first_violation(each, checker, max(0, at))]
    sys.stdout.write(f"{len(log) - 1} pairs, {len(pairs)} whose order matters, {len(pairs) - len(missed)} caught\n")

    assert [] == [(log[at]._replace(data=b""), log[at + 1]._replace(data=b"")) for at in missed]


def is_indifferent(log: Sequence[Op], at: int) -> bool:
    """Whether two ops in a row may change places: each way the same is durable when the next thing happens that anybody sees."""
    one, other = log[at], log[at + 1]
    seen = {"ack"} | {op.kind for op in (one, other) if op.kind == "name" and op.gone and op.name}
    if one.kind in seen and other.kind in seen:
        return True
    if _impossible(one, other) or (other.is_folder and one.folder != other.folder):
        return True  # a new folder, which nobody looks into
    is_building = all(op.kind in ("write", "fsync", "name") and not (op.gone and op.name) for op in (one, other))
    if is_building and one.node != other.node:
        return True
    # The last file and its folder: both are on the disk before the folder gets its name.
    return one.kind == "fsync" and other.kind == "fsync_folder"


def _impossible(one: Op, other: Op) -> bool:
    """Whether the second can't be done before the first: a file is written once it is there, a folder goes once it is empty."""
    made = one.kind == "name" and one.name and not one.gone
    emptied = one.kind == other.kind == "name" and other.gone and not other.name and one.folder == other.node
    return bool(made and (other.node == one.node or other.folder == one.node)) or emptied


def test_the_model_sees_what_other_managers_lose(checker: Checker) -> None:
    """Negative control: files written and renamed without any fsync, as several managers do it."""
    naive = [op for op in recorded() if op.kind not in ("fsync", "fsync_folder")]

    assert first_violation(naive, checker)
