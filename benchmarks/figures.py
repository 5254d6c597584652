"""The rate of ``inspect --stats``: every byte of a file of 1 GiB read and counted, page cache warm, and the machine's own copy rate.

    python benchmarks/figures.py [--mib 1024] [--rounds 7] [--folder .]

A line for each dtype: the median rate of file bytes of the pass alone, and of the whole process that shows them. Last, the time for
100,000 tensors of 1 KiB.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

import statedict
from statedict.ops.statistics import statistics_of

# As for a user: Python keeps what it has compiled.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
STATEDICT = str(Path(sys.executable).with_name("statedict"))
DTYPES = ("float32", "bfloat16", "float16", "float8_e4m3fn", "int64")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--mib", type=int, default=1024, help="size of each file in MiB")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--folder", default=".", help="where the files are written")
    options = parser.parse_args()
    nbytes = options.mib * 1024 * 1024
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        for name in DTYPES:
            path = Path(folder, f"{name}.pth")
            write(path, name, [nbytes // 16] * 16)
            inside = median(lambda path=path: count(path), options.rounds)  # type: ignore[misc]
            whole = median(lambda path=path: show(path), options.rounds)  # type: ignore[misc]
            line = f"{name:16}{nbytes / inside / 1e9:6.2f} GB/s, whole process {nbytes / whole / 1e9:6.2f} GB/s"
            sys.stdout.write(f"{line}\n")
            path.unlink()
        path = Path(folder, "many.pth")
        write(path, "float32", [1024] * 100_000)
        seconds = median(lambda: show(path), 3)
        sys.stdout.write(f"100,000 tensors of 1 KiB: {seconds:.2f} s, whole process\n")
    one, two = np.ones(64 * 1024 * 1024, np.float32), np.ones(64 * 1024 * 1024, np.float32)
    seconds = median(lambda: np.copyto(one, two), options.rounds)
    sys.stdout.write(f"copy between two arrays of 256 MiB, one thread: {one.nbytes / seconds / 1e9:.2f} GB/s\n")


def write(path: Path, name: str, sizes: list[int]) -> None:
    """A file of tensors of that dtype with those sizes in bytes: normal values about 0.01, spread 0.02."""
    kind = getattr(torch, name)
    values = torch.randn(max(sizes) // kind.itemsize) * 0.02 + 0.01
    values = (values * 1000 if name == "int64" else values).to(kind)
    torch.save(
        {
            f"layers.{at // 10}.block_{at % 10}": values[: size // kind.itemsize].clone()
            for at, size in enumerate(sizes)
        },
        path,
    )


def count(path: Path) -> None:
    """The pass alone."""
    with statedict.open(path) as checkpoint:
        statistics_of(checkpoint)


def show(path: Path) -> None:
    """The whole process."""
    subprocess.run([STATEDICT, "inspect", "--stats", str(path)], check=True, stdout=subprocess.DEVNULL, env=ENVIRONMENT)


def median(way: Callable[[], object], rounds: int) -> float:
    """Seconds, after one time to warm up."""
    way()
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        way()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


if __name__ == "__main__":
    main()
