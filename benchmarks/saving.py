"""Saves of 1 GiB in 64 tensors in fresh processes: torch, safetensors and ours, durable and not.

    python benchmarks/saving.py [--mib 1024] [--rounds 9] [--folder .]

Durable means that fsync came back; ours writes digests in both cases, and a ``.pth`` has a CRC-32 of each record besides. Each run
writes a new file, after a ``sync``; that of the run before is removed seconds earlier. Beside them stands what the disk takes
past the page cache. ``processes.py`` says how a run is made.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

from processes import Way, run, table

# What an earlier run left is removed while there is time for the disk to free its blocks.
FRESH = "if os.path.exists(sys.argv[1]):\n    os.remove(sys.argv[1])\n"
DATA = (
    FRESH
    + "import torch\nstate = {f'layers.{i}.weight': torch.randn(int(sys.argv[2]), 1024, 256) for i in range(64)}\n"
)
TORCH = DATA + "measured(lambda: torch.save(state, sys.argv[1]))"
TORCH_SYNCED = (
    DATA
    + """\
def work():
    with open(sys.argv[1], "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
measured(work)
"""
)
SAFETENSORS = "from safetensors.torch import save_file\n" + DATA + "measured(lambda: save_file(state, sys.argv[1]))"
OURS = DATA + "from statedict import save\nmeasured(lambda: save(state, sys.argv[1], durable=DURABLE))"
AGAIN = OURS.replace("measured", "save({'w': torch.ones(1)}, sys.argv[1])\nos.remove(sys.argv[1])\nmeasured")
DIRECT = (
    FRESH
    + """\
import mmap
nbytes = int(sys.argv[2]) << 26
memory = mmap.mmap(-1, 1 << 26, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
memory.madvise(mmap.MADV_HUGEPAGE)
memory.write(os.urandom(1 << 26))
fd = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_DIRECT)
os.posix_fallocate(fd, 0, nbytes)
places = iter(range(0, nbytes, 1 << 23))
lock = threading.Lock()
def write(number):
    view = memoryview(memory)[number << 23:(number + 1) << 23]
    while True:
        with lock:
            place = next(places, None)
        if place is None:
            return
        os.pwritev(fd, [view], place)
def work():
    threads = [threading.Thread(target=write, args=(number,)) for number in range(2)]
    [thread.start() for thread in threads], [thread.join() for thread in threads]
    os.fsync(fd)
measured(work)
"""
)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--mib", type=int, default=1024, help="size of the tensors in MiB, a multiple of 64")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--folder", default=".", help="where the files are written")
    options = parser.parse_args()
    nbytes, rows = options.mib << 20, str(options.mib // 64)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:

        def way(title: str, code: str, name: str) -> Way:
            path = str(Path(folder, name))
            return Way(title, code, (path, rows), os.sync)

        print("\ndurable")
        durable = [
            way("O_DIRECT write, 2 threads, fsync", DIRECT, "direct.bin"),
            way("torch.save, fsync", TORCH_SYNCED, "torch.pth"),
            way("ours, .pth", OURS.replace("DURABLE", "True"), "ours.pth"),
            way("ours, .safetensors", OURS.replace("DURABLE", "True"), "ours.safetensors"),
            way("ours, .pth, not the first save", AGAIN.replace("DURABLE", "True"), "ours.pth"),
            way("ours, .safetensors, not the first save", AGAIN.replace("DURABLE", "True"), "ours.safetensors"),
        ]
        table(run(durable, options.rounds), nbytes, ["torch.save, fsync", "O_DIRECT write, 2 threads, fsync"])
        print("\nnot durable")
        hasty = [
            way("torch.save", TORCH, "torch.pth"),
            way("safetensors save_file", SAFETENSORS, "hub.safetensors"),
            way("ours, .pth", OURS.replace("DURABLE", "False"), "ours.pth"),
            way("ours, .safetensors", OURS.replace("DURABLE", "False"), "ours.safetensors"),
        ]
        table(run(hasty, options.rounds), nbytes, ["torch.save", "safetensors save_file"])


if __name__ == "__main__":
    main()
