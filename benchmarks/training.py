"""Saving and restoring a training of 1 GiB: how long training stands still, what it is slowed by meanwhile, how long the rest takes.

    .venv/torch/bin/python benchmarks/training.py [--mib 1024] [--rounds 5] [--folder .]

All in one process, taking turns: the copy of as much memory into memory that was touched before (``copy_``, torch's threads), the
async and the durable save, ``torch.distributed.checkpoint.async_save``, ``torch.save`` with fsync, the raw durable write; then
restoring beside ``load``. Every round changes every tensor. The step that is timed is a matmul on all of torch's threads.
"""

from __future__ import annotations

import argparse
import mmap
import os
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp

import statedict
from statedict.doors import TrainingState
from statedict.runs import TrainingRun

BLOCK_NBYTES = 4 << 20
# What is compared, each with what was measured in the same round.
RATIOS = {
    "async save, blocked": "copy",
    "step beside the write": "step alone",
    "durable save": "raw durable write",
    "restore": "load",
}


class Model(torch.nn.Module):
    """So many MiB of parameters in 64 tensors."""

    def __init__(self, mib: int) -> None:
        super().__init__()
        made = [torch.nn.Parameter(torch.randn(mib * 4, 1024), requires_grad=False) for _ in range(64)]
        self.layers = torch.nn.ParameterList(made)


def timed(work: Callable[[], Any]) -> float:
    """Seconds."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def raw(path: str, nbytes: int, block: memoryview) -> None:
    """The durable write of as many bytes: six threads, past the page cache."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_DIRECT, 0o666)
    os.posix_fallocate(fd, 0, nbytes)
    with ThreadPoolExecutor(6) as threads:
        list(threads.map(lambda offset: os.pwritev(fd, [block], offset), range(0, nbytes, BLOCK_NBYTES)))
    os.fsync(fd)
    os.close(fd)


def synced(state: Any, path: str) -> None:
    """``torch.save``, on the disk."""
    with open(path, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())


class Steps:
    """Steps of a training of some milliseconds, on every thread that torch has."""

    def __init__(self) -> None:
        self._a, self._b = torch.randn(2, 1024, 1024).unbind()

    def until(self, done: Callable[[], bool], least: int) -> list[float]:
        """Seconds of each step, until something is done, and of at least so many."""
        found: list[float] = []
        while not done() or len(found) < least:
            found.append(timed(lambda: self._a @ self._b))
        return found


class Bench:
    """The figures, by name."""

    def __init__(self, folder: str, mib: int) -> None:
        self.folder = folder
        self.nbytes = mib << 20
        self.figures: dict[str, list[float]] = {}
        self.model = Model(mib)
        self.state = TrainingState(model=self.model)
        self.steps = Steps()
        self.block = memoryview(mmap.mmap(-1, BLOCK_NBYTES))
        self.block[:] = os.urandom(BLOCK_NBYTES)
        self.copies = [torch.zeros_like(param) for param in self.model.parameters()]

    def note(self, name: str, seconds: float) -> None:
        """One more."""
        self.figures.setdefault(name, []).append(seconds)

    def change(self) -> None:
        """A step of training."""
        for param in self.model.parameters():
            param.add_(1)
        os.sync()

    def saves(self, run: TrainingRun, number: int) -> None:
        """One round of saving."""
        self.change()
        alone = self.steps.until(lambda: True, 60)
        self.copy()  # as warm as the buffers of the save are
        self.note("copy", timed(self.copy))
        saved = run.save(2 * number, self.state, wait=False)
        beside = self.steps.until(lambda: saved.is_done, 1)
        saved.wait()
        self.note("async save, blocked", saved.blocked_ms / 1e3)
        self.note("step alone", statistics.mean(alone))
        self.note("step beside the write", statistics.mean(beside))
        print({name: f"{phase.seconds * 1e3:.0f} ms" for name, phase in saved.phases.items()}, flush=True)
        self.change()
        saved = run.save(2 * number + 1, self.state)
        self.note("durable save", saved.blocked_ms / 1e3 - saved.phases["prune"].seconds)
        self.change()
        path = str(Path(self.folder, "raw"))
        self.note("raw durable write", timed(lambda: raw(path, self.nbytes, self.block)))
        os.remove(path)

    def copy(self) -> None:
        """The copy of all parameters into memory that was touched before."""
        for copy, param in zip(self.copies, self.model.parameters(), strict=True):
            copy.copy_(param)

    def rivals(self) -> None:
        """One round of the others."""
        path = str(Path(self.folder, "dcp"))
        self.change()
        start = time.perf_counter()
        future = dcp.async_save({"model": self.model.state_dict()}, checkpoint_id=path)
        self.note("dcp.async_save, blocked", time.perf_counter() - start)
        beside = self.steps.until(future.done, 1)
        future.result()
        self.note("step beside dcp", statistics.mean(beside))
        shutil.rmtree(path)
        self.change()
        file = str(Path(self.folder, "rival.pth"))
        self.note("torch.save, fsync", timed(lambda: synced({"model": self.model.state_dict()}, file)))
        os.remove(file)

    def restores(self, run: TrainingRun) -> None:
        """One round of reading."""
        latest = run.latest()
        assert latest is not None
        file = str(Path(latest.path, "model.safetensors"))
        self.note("load", timed(lambda: statedict.load(file, mmap=False)))
        self.note("restore", timed(lambda: run.restore(self.state)))
        self.note("load_into", timed(lambda: statedict.load_into(self.model, file)))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--mib", type=int, default=1024, help="size of the model in MiB, any number")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", default=".", help="where the files are written")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        bench = Bench(folder, options.mib)
        with TrainingRun(Path(folder, "run"), keep=2) as run:
            for number in range(options.rounds):
                bench.saves(run, number)
                bench.rivals()
            for _ in range(options.rounds):
                bench.restores(run)
    for name, other in RATIOS.items():
        pairs = zip(bench.figures[name], bench.figures[other], strict=True)
        print(f"{name} / {other}: {statistics.median([one / two for one, two in pairs]):.2f}")
    for name, seconds in bench.figures.items():
        shown = " ".join(f"{each * 1e3:.1f}" for each in seconds)
        print(f"{name:24} median {statistics.median(seconds) * 1e3:8.1f} ms   {shown}")


if __name__ == "__main__":
    main()
