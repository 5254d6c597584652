"""Every bit of a small step is flipped; its files are cut at every byte, lengthened, zeroed, swapped and taken away.

    python soak/bit_rot.py [--short]

After each damage ``verify`` must call the step damaged, in a process that has never seen the run and in one that has
read it while it was whole; and a restore of the newest step must give the step before, say so, and rename the damaged
one: never the damaged bytes, and never nothing.

Every file of the step's manifest, and the manifest. What else may lie in a step (``verified.json``, ``next-step.json``)
are notes, and no part of it: they are damaged too, and the step must stay as it is.

It proves that no such damage is taken for the step that was saved. What is read is what the kernel gives: pages that it
holds in memory may be whole while the disk's aren't. Damage of several bits is only sampled: that two different
contents have one digest of 128 bits is left to chance.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import random
from collections.abc import Iterator
from pathlib import Path

from trial import KEPT, SmallState, Tally, carry_out, options, prepared

from statedict.errors import StateDictError
from statedict.runs.catalogue import NEXT_STEP_NAME, VERIFIED_NAME
from statedict.runs.training_run import TrainingRun

# Floats of the part that changes. The other part is linked to the step before, so only a copy of the whole run can be damaged.
NUMEL = 40
SECTOR = 512
# Damages of many bits, for each file.
BURSTS = 300
# What lies in a step and is no part of it.
NOTES = (VERIFIED_NAME, NEXT_STEP_NAME)
Damage = tuple[str, bytes | None]  # what was done, and what the file is now; None: gone


def flips(data: bytes, every: int) -> Iterator[Damage]:
    """Each bit turned around."""
    for bit in range(0, 8 * len(data), every):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        yield f"bit {bit % 8} of byte {bit // 8} is flipped", bytes(damaged)


def cuts(data: bytes, every: int) -> Iterator[Damage]:
    """Cut at each byte, and longer by something."""
    for nbytes in range(0, len(data), every):
        yield f"it is cut to {nbytes} bytes", data[:nbytes]
    for more in (b"\0", b"\n", data[-1:], data, bytes(4096)):
        yield f"it is longer by {len(more)} bytes", data + more


def losses(data: bytes, others: dict[str, bytes], chance: random.Random, bursts: int) -> Iterator[Damage]:
    """What disks and file systems do: zeros, sectors that are lost or another's, files that are another's or gone."""
    yield "it is gone", None
    yield "it is all zeros", bytes(len(data))
    for start in range(0, len(data), SECTOR):
        zeroed = data[:start] + bytes(len(data[start : start + SECTOR])) + data[start + SECTOR :]
        yield f"the sector at byte {start} is zeros", zeroed
    for name, other in others.items():
        yield f"it is {name}", other
        yield f"it begins as {name}", other[: len(data) // 2] + data[len(data) // 2 :]
    for number in range(bursts):
        start = chance.randrange(len(data))
        burst = chance.randbytes(min(chance.choice((2, 4, 8, 64)), len(data) - start))
        yield f"burst {number} of {len(burst)} bytes at byte {start}", data[:start] + burst + data[start + len(burst) :]


class Victim:
    """The newest step of a run, of which one file at a time is another."""

    def __init__(self, run_folder: Path) -> None:
        self.run_folder = run_folder
        self.folder = run_folder / f"step-{KEPT:08d}"
        self.aside = run_folder / f"step-{KEPT:08d}.damaged"
        self.seen = TrainingRun(run_folder)
        self.seen.verify()

    def put(self, name: str, data: bytes | None) -> None:
        """Have the file be this, with the times that it had: damage doesn't change them."""
        path = self.folder / name
        if data is None:
            path.unlink(missing_ok=True)
            return
        facts = path.stat() if path.exists() else None
        with open(path, "r+b" if facts else "wb") as file:
            file.write(data)
            file.truncate()
        if facts:
            os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))

    def wrong_verdict(self) -> str:
        """What is wrong with what ``verify`` says, and a restore gives."""
        for who, run in (("a new process", TrainingRun(self.run_folder)), ("a process that knows it", self.seen)):
            found = run.verify(KEPT)
            if found.ok or not found.findings:
                return f"verify of {who} finds nothing"
        return self.wrong_restore()

    def wrong_restore(self) -> str:
        """What is wrong with a restore; the step is called as before when this returns."""
        said, state = io.StringIO(), SmallState(numel=NUMEL)
        try:
            with contextlib.redirect_stderr(said), TrainingRun(self.run_folder) as run:
                restored = run.restore(state)
        finally:
            if self.aside.exists():
                self.aside.rename(self.folder)
                aside = True
            else:
                aside = False
        if restored is None or restored.step != KEPT - 1 or not state.is_of(KEPT - 1):
            return "the damaged step is loaded"
        fell = [each.step for each in restored.fell_back]
        if fell != [KEPT] or f"step {KEPT} can't be used" not in said.getvalue() or not aside:
            return f"the older step is loaded, and that isn't said: {fell}, {said.getvalue()!r}, {aside}"
        return ""

    def wrong_note(self) -> str:
        """What is wrong where only a note beside the step is damaged."""
        state = SmallState(numel=NUMEL)
        with TrainingRun(self.run_folder) as run:
            run.steps()
            restored = run.restore(state)
            is_whole = run.verify(KEPT).ok
        is_right = restored is not None and not restored.fell_back and state.is_of(KEPT)
        return "" if is_whole and is_right else "a damaged note damages the step"


def damage(victim: Victim, name: str, whole: bytes, damages: Iterator[Damage], tally: Tally) -> None:
    """One damage after the other, each undone."""
    is_note = name in NOTES
    for what, data in damages:
        if data == whole:
            continue  # another's bytes may be the same
        victim.put(name, data)
        try:
            wrong = victim.wrong_note() if is_note else victim.wrong_verdict()
        except (StateDictError, OSError) as error:
            wrong = f"{type(error).__name__}: {error}"
        tally.add(f"{name}: {what}", wrong)
        victim.put(name, whole)


def independent(run_folder: Path) -> None:
    """Give every file of the newest step bytes of its own, where it has them in common with the step before."""
    for path in (run_folder / f"step-{KEPT:08d}").iterdir():
        data = path.read_bytes()
        path.unlink()
        path.write_bytes(data)


def trial(chosen: argparse.Namespace, folder: Path, tally: Tally) -> None:
    """Every file of the step."""
    prepared(folder / "run", KEPT, NUMEL)
    independent(folder / "run")
    victim = Victim(folder / "run")
    (victim.folder / NEXT_STEP_NAME).write_text(
        f'{{"digest":"xxh3-128:{"0" * 32}","schema":"statedict.next-step/1","step":{KEPT}}}\n'
    )
    chance = random.Random(chosen.seed)
    before = {
        f"{path.name} of the step before": path.read_bytes() for path in (folder / "run" / "step-00000001").iterdir()
    }
    files = {path.name: path.read_bytes() for path in sorted(victim.folder.iterdir())}
    every = 211 if chosen.short else 1
    # Notes first: verify takes the note back that a damaged step has been found whole.
    for name, data in sorted(files.items(), key=lambda item: item[0] not in NOTES):
        others = {} if name in NOTES else {other: files[other] for other in files if other != name} | before
        bursts = 3 if chosen.short else BURSTS
        for damages in (flips(data, every), cuts(data, every), losses(data, others, chance, bursts)):
            damage(victim, name, data, damages, tally)
    if not victim.seen.verify().ok:
        tally.add("in the end", "a step that is whole again is called damaged")
    tally.note(f"{len(files)} files of {sum(map(len, files.values())):,} bytes")


if __name__ == "__main__":
    carry_out(options(__doc__), trial)
