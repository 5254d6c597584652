"""Whole processes that convert 1 GiB, with digests, against ``cp`` and fsync of the same file.

    python benchmarks/converting.py [--mib 1024] [--runs 7] [--folder .]

Page cache warm, a ``sync`` before each. The time of ``statedict convert`` is that of the whole process; beside it stands the time
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
from pathlib import Path

# As for a user: Python keeps what it has compiled.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
STATEDICT = str(Path(sys.executable).with_name("statedict"))
MAKE = """\
import sys, torch
path, rows = sys.argv[1], int(sys.argv[2])
torch.save({f"layers.{i}.weight": torch.randn(rows, 1024, 256) for i in range(64)}, path)
"""
FSYNC = "import os, sys; fd = os.open(sys.argv[1], os.O_RDWR); os.fsync(fd)"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--mib", type=int, default=1024, help="size of the file in MiB, a multiple of 64")
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--folder", default=".", help="where the files are written")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        pth, safetensors = Path(name, "source.pth"), Path(name, "source.safetensors")
        subprocess.run([sys.executable, "-c", MAKE, str(pth), str(options.mib // 64)], check=True)
        subprocess.run(
            [STATEDICT, "convert", str(pth), str(safetensors)], check=True, stdout=subprocess.DEVNULL, env=ENVIRONMENT
        )
        rows: dict[str, list[tuple[float, float, float]]] = {}
        for _ in range(options.runs):
            base, _ = timed(
                ["sh", "-c", f'cp "$0" "$1" && "{sys.executable}" -c "{FSYNC}" "$1"', str(pth), f"{name}/copy"]
            )
            rows.setdefault("cp + fsync", []).append((base, base, 0.0))
            for source, suffix in ((pth, ".safetensors"), (safetensors, ".pth")):
                seconds, checking, peak = converted(source, Path(name, f"target{suffix}"))
                rows.setdefault(f"convert {source.suffix} to {suffix}", []).append((seconds, seconds - checking, peak))
        report(rows)


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


def converted(source: Path, target: Path) -> tuple[float, float, float]:
    """Seconds of the whole, seconds of the comparison in it, and peak memory in MiB, of one conversion."""
    seconds, peak = timed([STATEDICT, "convert", "--format", "json", str(source), str(target)])
    result = json.loads(Path(target.parent, "output").read_bytes())
    return seconds, float(result["seconds"]["check"]), peak


def report(rows: dict[str, list[tuple[float, float, float]]]) -> None:
    """A line for each way: medians of the seconds, ratio to cp and fsync of the same round, peak memory."""
    base = [seconds for seconds, _, _ in rows["cp + fsync"]]
    for name, runs in rows.items():
        whole = statistics.median(seconds for seconds, _, _ in runs)
        ratio = statistics.median(without / cp for (_, without, _), cp in zip(runs, base))
        peak = max(peak for _, _, peak in runs)
        line = f"{name:36}{whole:6.2f} s, without the comparison {ratio:5.2f} x cp + fsync"
        sys.stdout.write(f"{line}{f', peak {peak:.0f} MiB' if peak else ''}\n")


if __name__ == "__main__":
    main()
