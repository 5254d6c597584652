"""Whole processes that convert 1 GiB, with digests, against ``cp`` and fsync of the same file.

    python benchmarks/converting.py [--mib 1024] [--rounds 9] [--folder .] [--sparse-gib 10]

Converted from format to format, with keys renamed and dropped, and cast from float32 to bfloat16 (looked at before, as always). With
``--sparse-gib``, a sparse file of that size is cast once, for the peak memory.

Page cache warm, a ``sync`` before each, each way at each place of the order as often as the others: a disk may be faster on blocks
that were freed just before. The time of ``statedict convert`` is that of the whole process; beside it stands the time
without the comparison at its end, which reads what was written once more. Peak memory is that of the largest process.
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
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

# As for a user: Python keeps what it has compiled.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
STATEDICT = str(Path(sys.executable).with_name("statedict"))
MAKE = """\
import sys, torch
path, rows = sys.argv[1], int(sys.argv[2])
torch.save({f"layers.{i}.weight": torch.randn(rows, 1024, 256) for i in range(64)}, path)
"""
CHANGES = ("--drop", "layers.63.*", "--rename", r"^layers\.(\d+)\.=blocks.\1.attn.")
FSYNC = "import os, sys; fd = os.open(sys.argv[1], os.O_RDWR); os.fsync(fd)"


class Run(NamedTuple):
    """One finished process."""

    seconds: float
    checking: float  # seconds of the comparison in it
    peak_mib: float


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--mib", type=int, default=1024, help="size of the file in MiB, a multiple of 64")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--folder", default=".", help="where the files are written")
    parser.add_argument("--sparse-gib", type=int, default=0, help="size of a sparse file to cast as well, in GiB")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        pth, safetensors = Path(name, "source.pth"), Path(name, "source.safetensors")
        subprocess.run([sys.executable, "-c", MAKE, str(pth), str(options.mib // 64)], check=True)
        subprocess.run(
            [STATEDICT, "convert", str(pth), str(safetensors)], check=True, stdout=subprocess.DEVNULL, env=ENVIRONMENT
        )
        ways: list[tuple[str, Callable[[], Run]]] = [
            ("cp + fsync", lambda: copied(pth, Path(name, "copy"))),
            ("convert .pth to .safetensors", lambda: converted(pth, Path(name, "target.safetensors"))),
            ("convert .safetensors to .pth", lambda: converted(safetensors, Path(name, "target.pth"))),
            ("rename and drop", lambda: converted(pth, Path(name, "target.safetensors"), *CHANGES)),
            ("cast to bfloat16", lambda: converted(pth, Path(name, "target.safetensors"), "--dtype", "bfloat16")),
        ]
        rows: dict[str, list[Run]] = {title: [] for title, _ in ways}
        for turn in range(options.rounds * len(ways)):
            title, way = ways[(turn + turn // len(ways)) % len(ways)]
            rows[title].append(way())
        report(rows)
        for title, less in (("the whole process", 0), ("without the comparison", 1)):
            seconds = statistics.median(run.seconds - less * run.checking for run in rows["cast to bfloat16"])
            sys.stdout.write(
                f"cast to bfloat16: {options.mib * 2**20 / seconds / 1e9:.2f} GB of input a second, {title}\n"
            )
        if options.sparse_gib:
            large = sparse(Path(name, "large.safetensors"), options.sparse_gib)
            run = converted(large, Path(name, "target.safetensors"), "--dtype", "bfloat16")
            sys.stdout.write(
                f"cast of {options.sparse_gib} GiB, sparse: {run.seconds:.1f} s, peak {run.peak_mib:.0f} MiB\n"
            )


def sparse(path: Path, gib: int) -> Path:
    """A safetensors file of zeros that takes no room: its header, and a hole."""
    size = 128 * 2**20
    names = [f"layers.{at}.weight" for at in range(gib * 8)]
    header = {
        name: {"dtype": "F32", "shape": [size // 4096, 1024], "data_offsets": [at * size, (at + 1) * size]}
        for at, name in enumerate(names)
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(path, 8 + len(text) + len(names) * size)
    return path


def copied(source: Path, target: Path) -> Run:
    """What ``cp`` takes, made durable."""
    script = f'cp "$0" "$1" && "{sys.executable}" -c "{FSYNC}" "$1"'
    seconds, _ = timed(["sh", "-c", script, str(source), str(target)])
    return Run(seconds, 0.0, 0.0)


def timed(command: list[str]) -> tuple[float, float]:
    """Seconds, and the peak memory in MiB, of one process; the last argument is the file that it writes, removed after."""
    os.sync()
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, env=ENVIRONMENT)
    output = process.stdout.read() if process.stdout else b""
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{command[0]} failed")
    os.unlink(command[-1])
    Path(os.path.dirname(command[-1]), "output").write_bytes(output)
    return seconds, usage.ru_maxrss / 1024


def converted(source: Path, target: Path, *options: str) -> Run:
    """One conversion."""
    seconds, peak = timed([STATEDICT, "convert", *options, "--format", "json", str(source), str(target)])
    result = json.loads(Path(target.parent, "output").read_bytes())
    return Run(seconds, float(result["seconds"]["check"]), peak)


def report(rows: dict[str, list[Run]]) -> None:
    """A line for each way: median seconds with and without the comparison, the ratio of those to cp and fsync, peak memory."""
    base = statistics.median(run.seconds for run in rows["cp + fsync"])
    for name, runs in rows.items():
        whole = statistics.median(run.seconds for run in runs)
        without = statistics.median(run.seconds - run.checking for run in runs)
        peak = max(run.peak_mib for run in runs)
        ends = f"{min(run.seconds for run in runs):.2f} to {max(run.seconds for run in runs):.2f}"
        line = f"{name:30}{whole:6.2f} s ({ends}), without the comparison {without:5.2f} s, {without / base:5.2f} x cp + fsync"
        sys.stdout.write(f"{line}{f', peak {peak:.0f} MiB' if peak else ''}\n")


if __name__ == "__main__":
    main()
