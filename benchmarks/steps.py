"""Steps on disk: a durable save beside the raw durable write of as many bytes, and ``latest()`` among 1,000 steps.

    .venv/torch/bin/python benchmarks/steps.py [FOLDER] [MIB]

The raw write: six threads, O_DIRECT, 4 MiB at a time, fsync, rename, fsync of the folder; nothing is hashed. Both take turns.
"""

from __future__ import annotations

import mmap
import os
import shutil
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy

from statedict.checkpoint import of_memory
from statedict.runs.pieces import Captured
from statedict.runs.run import RunFolder

ROUNDS = 5
STEPS = 1000
BLOCK_NBYTES = 4 << 20


def raw(folder: str, nbytes: int, block: memoryview) -> float:
    """Seconds that as many bytes take to be durable under a name."""
    start = time.perf_counter()
    fd = os.open(f"{folder}/raw.tmp", os.O_WRONLY | os.O_CREAT | os.O_DIRECT, 0o666)
    os.posix_fallocate(fd, 0, nbytes)
    with ThreadPoolExecutor(6) as threads:
        list(threads.map(lambda offset: os.pwritev(fd, [block], offset), range(0, nbytes, BLOCK_NBYTES)))
    os.fsync(fd)
    os.close(fd)
    os.rename(f"{folder}/raw.tmp", f"{folder}/raw")
    home = os.open(folder, os.O_RDONLY)
    os.fsync(home)
    os.close(home)
    took = time.perf_counter() - start
    os.unlink(f"{folder}/raw")
    return took


def saves(folder: str, nbytes: int) -> None:
    """The durable save beside the raw write."""
    block = memoryview(mmap.mmap(-1, BLOCK_NBYTES))
    block[:] = os.urandom(BLOCK_NBYTES)
    rows = nbytes // 4 // 32
    model = {f"layers.{at}.weight": numpy.random.default_rng(at).standard_normal(rows, dtype="f4") for at in range(32)}
    raws, ours = [], []
    with RunFolder(f"{folder}/run") as run:
        for step in range(ROUNDS):
            raws.append(raw(folder, nbytes, block))
            for array in model.values():
                array[0] += 1  # nothing stands still
            start = time.perf_counter()
            written = run.write(step, Captured({"model": of_memory(model)}))
            ours.append(time.perf_counter() - start)
            shutil.rmtree(written.path)
    first, second = statistics.median(raws), statistics.median(ours)
    print(f"raw durable write {first:.3f} s ({min(raws):.3f} to {max(raws):.3f})")
    print(f"a step            {second:.3f} s ({min(ours):.3f} to {max(ours):.3f}), {second / first:.2f} x")


def listing(folder: str) -> None:
    """``latest()`` and ``steps()`` of a run that was opened anew."""
    with RunFolder(f"{folder}/long") as run:
        for step in range(STEPS):
            pieces = {"model": of_memory({f"w{at}": numpy.full(4, step) for at in range(20)})}
            run.write(step, Captured(pieces), metrics={"loss": 1 / (step + 1)})
    for ask in ("latest", "steps"):
        took = []
        for _ in range(ROUNDS):
            fresh = RunFolder(f"{folder}/long")
            start = time.perf_counter()
            getattr(fresh, ask)()
            took.append((time.perf_counter() - start) * 1e3)
        print(f"{ask}() of {STEPS:,} steps {statistics.median(took):.1f} ms")


def main() -> None:
    """All figures, in a folder of their own that is removed again."""
    folder = os.path.join(sys.argv[1] if len(sys.argv) > 1 else ".", "bench-steps.tmp")
    nbytes = (int(sys.argv[2]) if len(sys.argv) > 2 else 1024) << 20
    os.makedirs(folder)
    try:
        saves(folder, nbytes)
        listing(folder)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
