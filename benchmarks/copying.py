"""The time to write a plan of 200 payloads with digests, against ``cp`` and fsync of a file of the same size.

    python benchmarks/copying.py [--mib 1024] [--rounds 5] [--folder .]

Every round runs every way once, page cache warm, after a ``sync``; the medians of all rounds are printed, the ratio to ``cp``
of the same round, and the peak memory of this process, which holds no data but the writer's buffers.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

from statedict.io.plans import FileSource, Later, Payload, Segment, WritePlan
from statedict.io.ranges import LocalFile
from statedict.io.writers import execute

PAYLOADS = 200


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--mib", type=int, default=1024, help="size of the file in MiB")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", default=".", help="where the files are written")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        source = os.path.join(folder, "source")
        make_source(source, options.mib)
        ways = {
            "cp + fsync": lambda out: copy(source, out),
            "digests": lambda out: write(source, out, digest=True),
            "digests and CRCs": lambda out: write(source, out, digest=True, crc=True),
            "no sums (kernel copy)": lambda out: write(source, out),
        }
        report(measure(ways, os.path.join(folder, "target"), options.rounds), options.mib)


def make_source(path: str, mib: int) -> None:
    """Random bytes, a MiB at a time, so that this process stays small."""
    with open(path, "wb") as file:
        for _ in range(mib):
            file.write(os.urandom(1024 * 1024))
    os.sync()


def copy(source: str, target: str) -> None:
    """What ``cp`` does, made durable."""
    subprocess.run(["cp", source, target], check=True)
    fd = os.open(target, os.O_RDWR)
    os.fsync(fd)
    os.close(fd)


def write(source: str, target: str, *, digest: bool = False, crc: bool = False) -> None:
    """The same bytes in 200 payloads behind a header that holds the sums."""
    file = LocalFile(source)
    each = file.nbytes // PAYLOADS
    payloads = [Payload(str(i), each, FileSource(file, i * each), digest, crc) for i in range(PAYLOADS)]
    header = Later(PAYLOADS * 48, lambda sums: "".join(f"{s.digest or '':48}" for s in sums.values()).encode())
    segments: list[Segment] = [header, *payloads]
    execute(WritePlan("benchmark", segments), target, overwrite=False)
    file.close()


def measure(ways: dict[str, Callable[[str], None]], target: str, rounds: int) -> dict[str, list[float]]:
    """Seconds of every way in every round."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            os.sync()
            start = time.perf_counter()
            way(target)
            seconds[name].append(time.perf_counter() - start)
            os.unlink(target)
    return seconds


def report(seconds: dict[str, list[float]], mib: int) -> None:
    """A line for each way."""
    reference = next(iter(seconds.values()))
    for name, values in seconds.items():
        ratio = statistics.median(value / base for value, base in zip(values, reference))
        middle = statistics.median(values)
        sys.stdout.write(f"{name:24}{middle:6.2f} s {mib / 1024 / middle:6.2f} GiB/s {ratio:6.2f} x cp\n")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    sys.stdout.write(f"peak memory {peak:.0f} MiB\n")


if __name__ == "__main__":
    main()
