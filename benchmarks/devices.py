"""The rate at which a file reaches a CUDA device through ``Upload``, against the rate of the copy from pinned memory alone.

    python benchmarks/devices.py [--mib 1024] [--rounds 7] [--threads 4] [--folder .]

The file is in the page cache. Every round runs every way once; the medians of all rounds are printed, and the ratio to the
pinned copy of the same round. Without a CUDA device nothing is measured.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

from statedict.io.ranges import LocalFile, blocks
from statedict.torch.devices import Ring, Upload, as_bytes, backend_of


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--mib", type=int, default=1024, help="size of the file in MiB")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=4, help="threads that read a block of the file")
    parser.add_argument("--folder", default=".", help="where the file is made")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.stdout.write("no CUDA device: nothing measured\n")
        return
    device = torch.device("cuda", torch.cuda.current_device())
    with tempfile.TemporaryDirectory(dir=options.folder) as folder, ThreadPoolExecutor(options.threads) as pool:
        path = os.path.join(folder, "source")
        make_source(path, options.mib)
        file = LocalFile(path)
        target = torch.UntypedStorage(file.nbytes, device=device)
        pinned = torch.empty(file.nbytes, dtype=torch.uint8, pin_memory=True)
        # Warm: the page cache, and the bytes that both ways must bring over.
        file.read_into(0, pinned.numpy().data)
        ring = Ring(backend_of(device))
        ways: dict[str, Callable[[], None]] = {
            "pinned copy alone": lambda: copy(target, pinned),
            "Upload, 1 thread": lambda: upload(ring, target, file, None, 1),
            f"Upload, {options.threads} threads": lambda: upload(ring, target, file, pool, options.threads),
        }
        report(measure(ways, target, pinned, options.rounds), file.nbytes, torch.cuda.get_device_name(device))
        file.close()


def make_source(path: str, mib: int) -> None:
    """Random bytes, a MiB at a time."""
    with open(path, "wb") as file:
        for _ in range(mib):
            file.write(os.urandom(1024 * 1024))


def copy(target: torch.UntypedStorage, pinned: torch.Tensor) -> None:
    """The copy that nothing can outrun."""
    as_bytes(target).copy_(pinned, non_blocking=True)
    torch.cuda.synchronize()


def upload(
    ring: Ring, target: torch.UntypedStorage, file: LocalFile, pool: ThreadPoolExecutor | None, threads: int
) -> None:
    """The same bytes from the file, each block read by that many threads."""
    position = 0

    def fill(memory: memoryview) -> None:
        nonlocal position
        parts = [(start, memory[start : start + n]) for start, n in blocks(0, len(memory), -(-len(memory) // threads))]
        if pool is None:
            file.read_into(position, memory)
        else:
            for job in [pool.submit(file.read_into, position + start, part) for start, part in parts]:
                job.result()
        position += len(memory)

    with Upload(ring) as writing:
        writing.write(target, 0, fill, file.nbytes)


def measure(
    ways: dict[str, Callable[[], None]], target: torch.UntypedStorage, pinned: torch.Tensor, rounds: int
) -> dict[str, list[float]]:
    """Seconds of every way in every round, behind one round that isn't counted; each must bring over every byte."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, way in ways.items():
            as_bytes(target).zero_()
            torch.cuda.synchronize()
            start = time.perf_counter()
            way()
            taken = time.perf_counter() - start
            if not torch.equal(as_bytes(target).cpu(), pinned):
                raise SystemExit(f"{name}: other bytes arrived")
            if number:
                seconds[name].append(taken)
    return seconds


def report(seconds: dict[str, list[float]], nbytes: int, device: str) -> None:
    """A line for each way."""
    sys.stdout.write(f"{device}, {nbytes / 2**20:.0f} MiB in the page cache\n")
    reference = next(iter(seconds.values()))
    for name, values in seconds.items():
        ratio = statistics.median(base / value for value, base in zip(values, reference))
        middle = statistics.median(values)
        sys.stdout.write(
            f"{name:24}{middle * 1000:8.1f} ms {nbytes / middle / 1e9:7.2f} GB/s {ratio:6.2f} x the pinned copy\n"
        )


if __name__ == "__main__":
    main()
