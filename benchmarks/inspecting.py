"""Whole processes that look into a checkpoint: ``statedict inspect``, against a bare interpreter and against torch.

    python benchmarks/inspecting.py [--runs 9] [--folder .]

Files of 300 tensors (200 MB, and 20 GB with holes), and of 1,000 to 100,000 tensors. Each command is run once to warm up, then
``--runs`` times in turn with the others; the medians and the largest peak memory of a process are printed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

STATEDICT = str(Path(sys.executable).with_name("statedict"))
# As for a user: Python keeps what it has compiled.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
LOAD = "import sys, torch; torch.load(sys.argv[1], mmap=True, weights_only=True)"


class Run(NamedTuple):
    """One finished process."""

    seconds: float
    peak_mib: float


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--folder", default=".", help="where the files are written")
    parser.add_argument("--write", nargs=3, metavar=("PATH", "COUNT", "NBYTES"), help="only write one file")
    options = parser.parse_args()
    if options.write:
        path, count, nbytes = options.write
        write(Path(path), int(count), int(nbytes))
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        few = [
            written(folder / "300 tensors, 200 MB.pth", 300, 200 * 10**6),
            written(folder / "300 tensors, 20 GB.pth", 300, 20 * 10**9),
            written(folder / "300 tensors, 200 MB.safetensors", 300, 200 * 10**6),
            written(folder / "300 tensors, 20 GB.safetensors", 300, 20 * 10**9),
        ]
        ways = {"bare interpreter": [sys.executable, "-c", "pass"]}
        ways |= {f"inspect, {path.name}": [STATEDICT, "inspect", str(path)] for path in few}
        ways["torch.load(mmap=True), 200 MB.pth"] = [sys.executable, "-c", LOAD, str(few[0])]
        report(measure(ways, options.runs))
        many = {}
        for count in (1_000, 10_000, 100_000):
            for suffix in (".pth", ".safetensors"):
                path = written(folder / f"{count} tensors{suffix}", count, 4 * count)
                many[f"inspect, {path.name}"] = [STATEDICT, "inspect", str(path)]
        report(measure(many, options.runs))


def written(path: Path, count: int, nbytes: int) -> Path:
    """The file, written by a process of its own: a child's peak memory is never below that of its parent."""
    subprocess.run([sys.executable, __file__, "--write", str(path), str(count), str(nbytes)], check=True)
    return path


def write(path: Path, count: int, nbytes: int) -> None:
    """A file of that many float32 tensors, in layers of ten, whose bytes are holes."""
    keys = [f"layers.{i // 10}.block_{i % 10}.weight" for i in range(count)]
    numel = nbytes // count // 4
    if path.suffix == ".pth":
        import torch

        with torch.serialization.skip_data():
            torch.save({key: torch.empty(numel) for key in keys}, path)
        return
    size = 4 * numel
    header = {
        key: {"dtype": "F32", "shape": [numel], "data_offsets": [at * size, (at + 1) * size]}
        for at, key in enumerate(keys)
    }
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + count * size)


def once(command: Sequence[str]) -> Run:
    """Run it to its end; what it prints goes nowhere."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=ENVIRONMENT)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{command[0]} failed")
    return Run(seconds, usage.ru_maxrss / 1024)


def measure(ways: dict[str, list[str]], runs: int) -> dict[str, list[Run]]:
    """Every command once to warm up, then all of them in turn."""
    for command in ways.values():
        once(command)
    found: dict[str, list[Run]] = {name: [] for name in ways}
    for _ in range(runs):
        for name, command in ways.items():
            found[name].append(once(command))
    return found


def report(found: dict[str, list[Run]]) -> None:
    """A line for each way: median, the ratio to the first of the same round, peak memory."""
    first = next(iter(found.values()))
    for name, runs in found.items():
        middle = statistics.median(run.seconds for run in runs)
        ratio = statistics.median(run.seconds / base.seconds for run, base in zip(runs, first))
        peak = max(run.peak_mib for run in runs)
        sys.stdout.write(f"{name:44}{middle * 1000:8.0f} ms {ratio:7.1f} x {peak:7.0f} MiB\n")
    sys.stdout.write("\n")


if __name__ == "__main__":
    main()
