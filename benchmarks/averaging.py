"""The mean of five checkpoints in fresh processes: ours, torch's loop over ``load``, and merely reading the five.

    python benchmarks/averaging.py [--mib 512] [--dtype float32] [--rounds 5] [--sparse-gib 0] [--folder .]

All files are in memory (the page cache); ours writes digests and syncs, torch's loop writes without either. ``--sparse-gib`` adds the
mean of five files of that size that are holes, to see the peak of memory on large inputs. ``processes.py`` says how a run is made.
"""

from __future__ import annotations

import argparse
import json
import os
import struct
import tempfile
from pathlib import Path

from processes import Way, run, table

COUNT = 5
FRESH = "target = sys.argv[1]\nif os.path.exists(target):\n    os.remove(target)\nsources = sys.argv[2:]\n"
TORCH = (
    FRESH
    + """\
import torch
from safetensors.torch import load_file, save_file
def work():
    total = {}
    for path in sources:
        for key, tensor in load_file(path).items():
            total[key] = total[key] + tensor.double() if key in total else tensor.double()
    save_file({key: (tensor / len(sources)).to(torch.DTYPE) for key, tensor in total.items()}, target)
measured(work)
"""
)
READING = (
    FRESH
    + """\
from concurrent.futures import ThreadPoolExecutor
def read(path):
    buffer = memoryview(bytearray(4 << 20))
    with open(path, "rb", buffering=0) as file:
        while file.readinto(buffer):
            pass
def work():
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(read, sources))
measured(work)
"""
)
OURS = FRESH + "from statedict.ops.average import average\nmeasured(lambda: average(sources, target, digests=DIGESTS))"


def main() -> None:
    """Write the sources, run the ways, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mib", type=int, default=512, help="of each of the five files")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sparse-gib", type=int, default=0, help="of each of five files of holes; 0 for none")
    parser.add_argument("--folder", type=Path, default=Path())
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        sources = written(folder, options.mib, options.dtype)
        arguments = (str(folder / "mean.safetensors"), *sources)
        ways = [
            Way("reading the five, two threads", READING, arguments),
            Way("ours", OURS.replace("DIGESTS", "True"), arguments),
            Way("ours, no digests", OURS.replace("DIGESTS", "False"), arguments),
            Way("torch: load, add, save", TORCH.replace("DTYPE", options.dtype), arguments),
        ]
        print(f"{COUNT} files of {options.mib} MiB, {options.dtype}")
        figures = run(ways, options.rounds, ballast=False)
        table(figures, COUNT * options.mib << 20, [ways[0].title, ways[3].title])
        for figure in figures.values():
            print(f"{figure.title:44} grows by {max(figure.grown_mib):.0f} MiB")
        if options.sparse_gib:
            holes(folder, options.sparse_gib)


def written(folder: Path, mib: int, dtype: str) -> list[str]:
    """Five files of random numbers in tensors of 16 MiB."""
    import torch
    from safetensors.torch import save_file

    paths = []
    for at in range(COUNT):
        kind = getattr(torch, dtype)
        numel = (16 << 20) // torch.empty(0, dtype=kind).element_size()
        state = {f"layers.{i}.weight": torch.randn(numel // 1024, 1024).to(kind) for i in range(max(1, mib // 16))}
        paths.append(str(folder / f"{at}.safetensors"))
        save_file(state, paths[-1])
    return paths


def holes(folder: Path, gib: int) -> None:
    """The peak of memory of a mean of files of holes: one tensor in each, and the target is sparse no more."""
    shape = [gib << 18, 1024]
    text = json.dumps({"w": {"dtype": "F32", "shape": shape, "data_offsets": [0, gib << 30]}}).encode()
    text += b" " * (-len(text) % 8)
    paths = [str(folder / f"holes-{at}.safetensors") for at in range(COUNT)]
    for path in paths:
        with open(path, "wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            file.truncate(8 + len(text) + (gib << 30))
    way = Way("ours, holes", OURS.replace("DIGESTS", "False"), (str(folder / "holes.safetensors"), *paths))
    figures = run([way], 1, ballast=False)
    table(figures, COUNT * gib << 30, [])
    print(f"{COUNT} files of {gib} GiB of holes: grows by {figures[way.title].grown_mib[0]:.0f} MiB")
    os.remove(folder / "holes.safetensors")


if __name__ == "__main__":
    main()
