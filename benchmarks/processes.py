"""Fresh processes that do one thing each, measured inside: what the benchmarks of saving and loading share.

A process imports what it needs, makes its data, says that it is ready, and is measured from when it is told to go on. A virtual
machine gives free memory back to its host within seconds, and getting it again costs more than a copy: so before
each run the parent takes 3 GiB, touches them, and lets go of them when the process is ready. All ways find the same.
"""

from __future__ import annotations

import mmap
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

# As for a user: Python keeps what it has compiled.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
BALLAST_NBYTES = 3 << 30
HEAD = """\
import os, sys, threading, time
def measured(work):
    import resource
    print("ready", flush=True)
    sys.stdin.readline()
    before = peak()
    start = time.perf_counter()
    kept = work()
    print(time.perf_counter() - start, peak() - before, flush=True)
    sys.stdin.readline()
    os._exit(0)
def peak():
    for line in open("/proc/self/status"):
        if line.startswith("VmHWM"):
            return int(line.split()[1]) / 1024
"""


class Way(NamedTuple):
    """One way: its title, and the code of its process, which ends in ``measured(work)``."""

    title: str
    code: str
    arguments: tuple[str, ...] = ()
    prepare: Callable[[], None] | None = None  # before each run, once the process is ready


class Figure(NamedTuple):
    """The runs of one way: seconds, and MiB by which the peak of its memory grew."""

    title: str
    seconds: list[float]
    grown_mib: list[float]

    @property
    def median(self) -> float:
        """Of the seconds."""
        return statistics.median(self.seconds)


def run(ways: Sequence[Way], rounds: int, *, ballast: bool = True) -> dict[str, Figure]:
    """Every way ``rounds`` times, taking turns, each at each place of the order as often as the others."""
    figures = {way.title: Figure(way.title, [], []) for way in ways}
    for turn in range(rounds * len(ways)):
        way = ways[(turn + turn // len(ways)) % len(ways)]
        seconds, grown = once(way, ballast)
        figures[way.title].seconds.append(seconds)
        figures[way.title].grown_mib.append(grown)
    return figures


def once(way: Way, ballast: bool) -> tuple[float, float]:
    """One process."""
    weight = touched(BALLAST_NBYTES) if ballast else None
    process = subprocess.Popen(
        [sys.executable, "-c", HEAD + way.code, *way.arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    )
    assert process.stdin is not None and process.stdout is not None
    if process.stdout.readline().strip() != "ready":
        raise SystemExit(f"benchmark: {way.title} failed")
    if way.prepare is not None:
        way.prepare()
    if weight is not None:
        weight.close()
    process.stdin.write("go\n")
    process.stdin.flush()
    seconds, grown = map(float, process.stdout.readline().split())
    process.communicate("end\n")
    return seconds, grown


def touched(nbytes: int) -> mmap.mmap:
    """Memory of which every page was written to."""
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    for place in range(0, nbytes, 4096):
        memory[place] = 1
    return memory


def table(figures: dict[str, Figure], nbytes: int, against: Sequence[str]) -> None:
    """Print the medians, their spread, the rate, and the ratio to each of some of the ways."""
    print(f"{'':44} {'median':>9} {'of all runs':>17} {'GB/s':>6}  " + "  ".join(f"to {name[:22]}" for name in against))
    for figure in figures.values():
        ratios = "  ".join(
            f"{figure.median / figures[name].median:>{len(name[:22]) + 3}.2f}" for name in against if name in figures
        )
        spread = f"{min(figure.seconds):.3f} to {max(figure.seconds):.3f}"
        print(f"{figure.title:44} {figure.median:8.3f}s {spread:>17} {nbytes / figure.median / 1e9:6.2f}  {ratios}")
