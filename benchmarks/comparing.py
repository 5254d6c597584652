"""Compares two files of 1 GiB, identical and with one tensor changed, in fresh processes; the files are in the page cache.

    python benchmarks/comparing.py [--mib 1024] [--rounds 5] [--folder .] [--sparse-gib 0]

Beside ours stand the machine's read rate for both files together (two threads, blocks of 1 MiB into buffers that are used again),
``torch.load`` of both with ``torch.allclose`` of every tensor, and the same over memory maps. The peak is that of our whole process.
``--sparse-gib 10`` also compares two sparse files of that size. ``processes.py`` says how a run is made.
"""

from __future__ import annotations

import argparse
import json
import os
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from processes import Way, run, table

READ = """\
paths = sys.argv[1:3]
def work():
    fds = [os.open(path, os.O_RDONLY) for path in paths]
    nbytes = os.fstat(fds[0]).st_size
    places = iter([(fd, place) for place in range(0, nbytes, 8 << 20) for fd in fds])
    lock = threading.Lock()
    def read():
        block = memoryview(bytearray(1 << 20))
        while True:
            with lock:
                fd, place = next(places, (None, 0))
            if fd is None:
                return
            for start in range(place, min(place + (8 << 20), nbytes), 1 << 20):
                os.preadv(fd, [block], start)
    threads = [threading.Thread(target=read) for _ in range(2)]
    [thread.start() for thread in threads], [thread.join() for thread in threads]
measured(work)
"""
OURS = "from statedict.ops.compare import compare\nmeasured(lambda: compare(sys.argv[1], sys.argv[2]))"
TORCH = """\
import torch
def work():
    a, b = (torch.load(path, mmap=MMAP, weights_only=True) for path in sys.argv[1:3])
    return [key for key in a if not torch.allclose(a[key], b[key])]
measured(work)
"""
MAKE = """\
import sys, torch
torch.manual_seed(0)
state = {f"layers.{i}.weight": torch.randn(int(sys.argv[4]), 1024, 256) for i in range(64)}
torch.save(state, sys.argv[1]), torch.save(state, sys.argv[2])
state["layers.40.weight"][0, 5, 7] += 1
torch.save(state, sys.argv[3])
"""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--mib", type=int, default=1024, help="size of one file in MiB, a multiple of 64")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", default=".", help="where the files are written")
    parser.add_argument("--sparse-gib", type=int, default=0, help="size of two sparse files, in GiB")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        paths = [str(Path(folder, name)) for name in ("a.pth", "b.pth", "c.pth")]
        subprocess.run([sys.executable, "-c", MAKE, *paths, str(options.mib // 64)], check=True)
        for title, pair in (("identical", (paths[0], paths[1])), ("one tensor changed", (paths[0], paths[2]))):
            print(f"\n{title}")
            ways = [
                Way("read both, 2 threads", READ, pair),
                Way("ours", OURS, pair),
                Way("torch.load both, allclose", TORCH.replace("MMAP", "False"), pair),
                Way("torch.load(mmap=True) both, allclose", TORCH.replace("MMAP", "True"), pair),
            ]
            figures = run(ways, options.rounds, ballast=False)
            table(figures, 2 * options.mib << 20, ["read both, 2 threads", "torch.load both, allclose"])
            _command_line(pair)
        if options.sparse_gib:
            print(f"\nsparse, {options.sparse_gib} GiB each")
            _command_line(tuple(_sparse(Path(folder, f"{name}.safetensors"), options.sparse_gib) for name in "ab"))


def _command_line(pair: tuple[str, ...]) -> None:
    """The command line on the two files: seconds, and the peak of its memory."""
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "statedict", "compare", *pair], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.perf_counter() - start
    print(f"statedict compare: exit code {process.returncode}, {seconds:.3f}s, peak {usage.ru_maxrss / 1024:.0f} MiB")


def _sparse(path: Path, gib: int) -> str:
    """A safetensors file of zeros in 40 tensors that takes no room on the disk."""
    nbytes = (gib << 30) // 40 // 4096 * 4096
    header = {
        f"layers.{at}.weight": {
            "dtype": "F32",
            "shape": [nbytes // 4096, 1024],
            "data_offsets": [at * nbytes, (at + 1) * nbytes],
        }
        for at in range(40)
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + 40 * nbytes)
    return str(path)


if __name__ == "__main__":
    main()
