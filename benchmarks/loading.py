"""Full loads of 1 GiB in 64 tensors in fresh processes: torch, safetensors and ours, warm and cold; many tensors; a meta model.

    python benchmarks/loading.py [--mib 1024] [--rounds 9] [--folder .]

Warm: the page cache has the file. Cold: it was told to drop it before each run. The ceiling is a copy between two buffers that
were touched before. ``processes.py`` says how a run is made.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from processes import ENVIRONMENT, Way, run, table

MAKE = """\
import sys, torch, statedict
from safetensors.torch import save_file
folder, rows = sys.argv[1], int(sys.argv[2])
state = {f"layers.{i}.weight": torch.randn(rows, 1024, 256) for i in range(64)}
torch.save(state, f"{folder}/torch.pth")
save_file(state, f"{folder}/hub.safetensors")
statedict.save(state, f"{folder}/ours.pth")
statedict.save(state, f"{folder}/ours.safetensors")
statedict.save({"w": torch.ones(1)}, f"{folder}/tiny.safetensors")
torch.save({f"t.{i}": torch.randn(256) for i in range(100_000)}, f"{folder}/many.pth")
"""
TORCH = "import torch\nmeasured(lambda: torch.load(sys.argv[1]))"
CLONED = (
    "from safetensors.torch import load_file\n"
    "measured(lambda: {key: value.clone() for key, value in load_file(sys.argv[1]).items()})"
)
OURS = "import torch\nfrom statedict import load\nmeasured(lambda: load(sys.argv[1], mmap=False, check={check}))"
AGAIN = OURS.replace("measured", "load(sys.argv[2], mmap=False)\nmeasured")
COPY = """\
import numpy as np
one, other = np.ones(1 << 30, np.uint8), np.ones(1 << 30, np.uint8)
half = 1 << 29
def work():
    threads = [threading.Thread(target=np.copyto, args=(one[a:a + half], other[a:a + half])) for a in (0, half)]
    [thread.start() for thread in threads], [thread.join() for thread in threads]
measured(work)
"""
DIRECT = """\
import mmap
memory = mmap.mmap(-1, 1 << 26, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
memory.madvise(mmap.MADV_HUGEPAGE)
memory.write(bytes(1 << 26))
fd = os.open(sys.argv[1], os.O_RDONLY | os.O_DIRECT)
size = os.fstat(fd).st_size // (1 << 23) * (1 << 23)
places = iter(range(0, size, 1 << 23))
lock = threading.Lock()
def read(number):
    view = memoryview(memory)[number << 23:(number + 1) << 23]
    while True:
        with lock:
            place = next(places, None)
        if place is None:
            return
        os.preadv(fd, [view], place)
def work():
    threads = [threading.Thread(target=read, args=(number,)) for number in range(4)]
    [thread.start() for thread in threads], [thread.join() for thread in threads]
measured(work)
"""
META = """\
import torch, statedict
class Net(torch.nn.Module):
    def __init__(self, rows):
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Module() for _ in range(64))
        for layer in self.layers:
            layer.weight = torch.nn.Parameter(torch.empty(rows, 1024, 256))
with torch.device("meta"):
    net = Net(int(sys.argv[2]))
measured(lambda: (statedict.load_into(net, sys.argv[1], check={check}), net))
"""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--mib", type=int, default=1024, help="size of the tensors in MiB, a multiple of 64")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--folder", default=".", help="where the files are written")
    options = parser.parse_args()
    nbytes, rows = options.mib << 20, options.mib // 64
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        subprocess.run([sys.executable, "-c", MAKE, folder, str(rows)], check=True, env=ENVIRONMENT)
        os.sync()
        warm(folder, nbytes, options.rounds)
        cold(folder, nbytes, options.rounds)
        many(folder, options.rounds)
        meta(folder, nbytes, rows, options.rounds)


def ways(folder: str, prepare: Callable[[str], Callable[[], None]]) -> list[Way]:
    """The loads that are compared; ``prepare`` makes what is done before each run of a file."""

    def way(title: str, code: str, name: str) -> Way:
        path = str(Path(folder, name))
        return Way(title, code, (path,), prepare(path))

    return [
        way("torch.load", TORCH, "torch.pth"),
        way("safetensors load_file, clone", CLONED, "hub.safetensors"),
        way("ours, torch's .pth, check=False", OURS.format(check=False), "torch.pth"),
        way("ours, torch's .pth, CRC checked", OURS.format(check=True), "torch.pth"),
        way("ours, our .pth, digests checked", OURS.format(check=True), "ours.pth"),
        way("ours, .safetensors, check=False", OURS.format(check=False), "hub.safetensors"),
        way("ours, our .safetensors, digests checked", OURS.format(check=True), "ours.safetensors"),
    ]


def warm(folder: str, nbytes: int, rounds: int) -> None:
    """From the page cache."""
    print("\nwarm")
    figures = run([Way("copy between touched buffers, 2 threads", COPY), *ways(folder, reader)], rounds)
    table(figures, nbytes, ["torch.load", "safetensors load_file, clone"])


def cold(folder: str, nbytes: int, rounds: int) -> None:
    """From the disk, against what the disk gives past the page cache."""
    print("\ncold")
    direct = str(Path(folder, "hub.safetensors"))
    first = Way("O_DIRECT read, 4 threads", DIRECT, (direct,), dropper(direct))
    again = [
        Way(f"ours, {name}, check={check}, not the first load", AGAIN.format(check=check), (path, tiny), dropper(path))
        for name, check in (("hub.safetensors", False), ("ours.safetensors", True))
        for path, tiny in [(str(Path(folder, name)), str(Path(folder, "tiny.safetensors")))]
    ]
    figures = run([first, *ways(folder, dropper), *again], rounds)
    table(figures, nbytes, ["O_DIRECT read, 4 threads", "torch.load"])


def many(folder: str, rounds: int) -> None:
    """100,000 tensors of 1 KiB."""
    print("\n100,000 tensors of 1 KiB")
    path = str(Path(folder, "many.pth"))
    figures = run(
        [
            Way("torch.load", TORCH, (path,)),
            Way("ours, check=False", OURS.format(check=False), (path,)),
            Way("ours, CRC checked", OURS.format(check=True), (path,)),
        ],
        max(3, rounds // 2),
        ballast=False,
    )
    table(figures, 102_400_000, ["torch.load"])


def meta(folder: str, nbytes: int, rows: int, rounds: int) -> None:
    """A model on the meta device; how much its loading makes the peak of the process grow."""
    print("\nload_into a model on the meta device")
    path = str(Path(folder, "ours.safetensors"))
    figures = run(
        [
            Way(f"load_into, check={check!r}", META.format(check=repr(check)), (path, str(rows)))
            for check in ("before", "while", False)
        ],
        max(3, rounds // 2),
    )
    table(figures, nbytes, [])
    for figure in figures.values():
        print(f"{figure.title}: memory grew by {max(figure.grown_mib) * (1 << 20) / nbytes:.3f} x the model")


def reader(path: str) -> Callable[[], None]:
    """Reads the file into the page cache."""

    def read() -> None:
        with open(path, "rb") as file:
            while file.read(1 << 24):
                pass

    return read


def dropper(path: str) -> Callable[[], None]:
    """Has the page cache drop the file."""

    def drop() -> None:
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)

    return drop


if __name__ == "__main__":
    main()
