"""A real power cut: a file system of its own on a loop device is shut down under a save, mounted again, and looked at.

    python soak/power_cut.py [--short] [--filesystems ext4,xfs]          (root)

The shutdown (an ioctl that ext4 and xfs have in common) stops all writing at once: what the journal and the file
system's writeback haven't brought to the device by then is lost, and the next mount recovers the journal as after any
power cut. Cuts are made

- at every deed of a save on its storage: dropping the journal's tail, and writing the journal but no data (names
  without bytes);
- at every deed, some seconds later, when the journal has committed by itself and data has or hasn't been written back;
- 0 to 7 s after the save said that the step is durable, with what retention does then.

After each: every step that is there is whole, the newest is the one before or the new one (the new one, if the caller
was told), and the next writer sweeps and saves. Controls: a save without any fsync, and saves that lack the fsyncs of
one kind, are cut in the same way. If nothing were lost there, the trial would prove nothing: it fails.

It can't prove what a disk does that loses or reorders what it has acknowledged: the image's bytes are safe in this
machine's page cache. ``tests/test_runs_crash.py`` goes through every legal loss, in a model.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import shutil
import struct
import subprocess
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from trial import KEPT, Forked, Impossible, SmallState, Tally, carry_out, options, prepared, wrong_after

from statedict.runs.policies import Latest
from statedict.runs.run import RunFolder
from statedict.runs.storage import LocalStorage

# EXT4_IOC_SHUTDOWN and XFS_IOC_GOINGDOWN: _IOR('X', 125, __u32).
SHUTDOWN = 0x8004587D
# Freeze, so that all is written; write the journal, no data; write nothing (linux/fs/ext4/ext4.h, linux/fs/xfs/libxfs/xfs_fs.h).
FROZEN, JOURNAL_ONLY, NOTHING = 0, 1, 2
# MiB: the smallest that each makes.
SIZES = {"ext4": 64, "xfs": 320}
MOUNTS = {"ext4": ("", "noauto_da_alloc", "data=writeback"), "xfs": ("nouuid",)}
# Floats of the part that changes: bytes enough for many pages.
NUMEL = 60_000
# Seconds. The journal commits every five.
LATER = 6.0
AFTERWARDS = tuple(range(8))
# File systems that wait for their cut at the same time.
AT_ONCE = 10
DEEDS = (
    "open_new", "mkdir", "rename", "rename_noreplace", "link", "unlink", "rmdir", "fsync_folder",
    "fill", "fsync", "keep",
)  # fmt: skip


class Cut(NamedTuple):
    """When the power goes."""

    deed: int | None  # before the deed of that number; None: after the save
    delay: float  # seconds later
    flag: int
    without: tuple[str, ...] = ()  # the syncs that a control leaves out

    @property
    def shown(self) -> str:
        """For messages."""
        when = "after the save" if self.deed is None else f"at deed {self.deed}"
        return f"{when} + {self.delay:g} s, flag {self.flag}" + (
            f", without {'+'.join(self.without)}" if self.without else ""
        )


# -------------------------------------------------------------------- a storage that counts


class Counting(LocalStorage):
    """The file system of this machine; ``before(number, name)`` is called before every deed, and syncs can be left out."""

    def __init__(self, before: Callable[[int, str], None], without: Sequence[str] = ()) -> None:
        super().__init__()
        self.before = before
        self.without = without
        self.deeds: list[str] = []

    def __getattribute__(self, name: str) -> Any:
        found = super().__getattribute__(name)
        return self.counted(name, found) if name in DEEDS else found

    def counted(self, name: str, deed: Callable[..., Any]) -> Callable[..., Any]:
        """The deed, announced."""

        def do(*arguments: Any, **more: Any) -> Any:
            self.before(len(self.deeds), name)
            self.deeds.append(name)
            if name in self.without:
                return True
            made = deed(*arguments, **more)
            return _CountedFile(self, made) if name == "open_new" else made

        return do


class _CountedFile:
    def __init__(self, storage: Counting, file: Any) -> None:
        self._storage = storage
        self._file = file

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._file, name)
        return self._storage.counted(name, found) if name in DEEDS else found


def save(folder: Path, cut: Cut, report: Callable[[str], None]) -> None:
    """Save step 3 of the run in this folder, and cut its power when it is time."""
    mount = os.open(folder.parent, os.O_RDONLY | os.O_DIRECTORY)

    def cut_now() -> None:
        time.sleep(cut.delay)
        fcntl.ioctl(mount, SHUTDOWN, struct.pack("I", cut.flag))
        report("cut")
        os._exit(0)

    def before(number: int, name: str) -> None:
        if number == cut.deed:
            cut_now()

    storage = Counting(before, cut.without)
    run = RunFolder(folder, keep=Latest(KEPT), storage=storage)
    opened = run.open_step()
    assert opened is not None
    opened.close()
    storage.deeds.clear()
    if run.write(KEPT + 1, SmallState(KEPT + 1, NUMEL).capture()).durable:
        report("durable")
    report(" ".join(storage.deeds))
    cut_now()


# -------------------------------------------------------------------- file systems


class Images:
    """File systems in files: copies of one, which holds a run with two steps, mounted where they can be cut."""

    def __init__(self, folder: Path, kind: str, options: str) -> None:
        self._folder = folder
        self._options = f"loop,{options}" if options else "loop"
        self._template = folder / "template.img"
        folder.mkdir()
        if shutil.which(f"mkfs.{kind}") is None:
            raise Impossible(f"mkfs.{kind} isn't installed")
        with open(self._template, "wb") as image:
            image.truncate(SIZES[kind] << 20)
        quiet = ["-q", "-F"] if kind == "ext4" else ["-q", "-f"]
        _system("mkfs." + kind, *quiet, str(self._template))
        self.mount(self._template)
        try:
            prepared(folder / "template" / "run", KEPT, NUMEL)
        finally:
            self.unmount(self._template)

    def copy(self, name: str) -> Path:
        """Another image, mounted; the folder of its run."""
        image = self._folder / f"{name}.img"
        _system("cp", "--sparse=always", str(self._template), str(image))
        return self.mount(image) / "run"

    def mount(self, image: Path) -> Path:
        """Mount an image beside itself."""
        place = image.with_suffix("")
        place.mkdir(exist_ok=True)
        _system("mount", "-o", self._options, str(image), str(place))
        return place

    def unmount(self, image: Path) -> None:
        """Unmount it."""
        _system("umount", str(image.with_suffix("")))

    def recovered(self, name: str) -> Path:
        """Unmount what was shut down, and mount it again: the journal is recovered."""
        image = self._folder / f"{name}.img"
        self.unmount(image)
        return self.mount(image) / "run"

    def forget(self, name: str) -> None:
        """Take an image away, mounted or not."""
        image = self._folder / f"{name}.img"
        # What was shut down can't even be asked whether it is mounted.
        subprocess.run(["umount", "--lazy", str(image.with_suffix(""))], capture_output=True, check=False)
        image.unlink(missing_ok=True)


def _system(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Impossible(f"{command[0]} is refused: {done.stderr.strip()}")


def check_machine(folder: Path) -> None:
    """Raise ``Impossible`` where no file system can be mounted from a file and shut down."""
    if os.geteuid():
        raise Impossible("only root can mount file systems")
    images = Images(folder / "check", "ext4", "")
    try:
        run = images.copy("one")
        mount = os.open(run.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.ioctl(mount, SHUTDOWN, struct.pack("I", NOTHING))
        except OSError as error:
            raise Impossible(f"the shutdown of a file system is refused: {error}") from error
        finally:
            os.close(mount)
    finally:
        images.forget("one")


# -------------------------------------------------------------------- the cuts


def results(images: Images, cuts: Sequence[Cut]) -> list[tuple[Cut, str]]:
    """What is wrong after each cut. They wait for their moment together."""
    names = [str(number) for number in range(len(cuts))]
    try:
        runs = [images.copy(name) for name in names]
        children = [Forked(partial(save, run, cut)) for run, cut in zip(runs, cuts)]
        said = [child.lines() for child in children]
        found = []
        for name, cut, (code, lines) in zip(names, cuts, said):
            if code or "cut" not in lines:
                found.append((cut, f"the save that is to be cut fails by itself: {code}, {lines}"))
                continue
            run = images.recovered(name)
            found.append((cut, wrong_after(run, range(1, KEPT + 1), KEPT + 1, told="durable" in lines)))
        return found
    finally:
        for name in names:
            images.forget(name)


def deeds_of_a_save(images: Images) -> list[str]:
    """The deeds, in order."""
    try:
        run = images.copy("count")
        _, lines = Forked(lambda report: save(run, Cut(None, 0, FROZEN), report)).lines()
        return lines[1].split()
    finally:
        images.forget("count")


def cuts_of(deeds: Sequence[str], *, short: bool) -> list[Cut]:
    """All cuts for one file system."""
    if short:
        places = [at for at, deed in enumerate(deeds) if deed in ("rename_noreplace", "fsync_folder", "rename")]
        return [Cut(at, 0, NOTHING) for at in places] + [Cut(None, 0, NOTHING)]
    at_once = [Cut(at, 0, flag) for at in range(len(deeds)) for flag in (FROZEN, JOURNAL_ONLY, NOTHING)]
    later = [Cut(at, LATER, NOTHING) for at in range(len(deeds))]
    return at_once + later + [Cut(None, delay, flag) for delay in AFTERWARDS for flag in (JOURNAL_ONLY, NOTHING)]


# What is left out, by what it is called.
CONTROLS = {
    "no sync": ("fsync", "fsync_folder"),
    "no sync of files": ("fsync",),
    "no sync of folders": ("fsync_folder",),
}


def check_controls(images: Images, where: str, deeds: Sequence[str], tally: Tally) -> None:
    """Saves that lack syncs must lose something to some cut."""
    places = [at for at, deed in enumerate(deeds) if deed in ("rename", "unlink")]
    for name, without in CONTROLS.items():
        moments = [(None, 0.0), (None, LATER), *[(at, 0.0) for at in places]]
        cuts = [Cut(at, delay, flag, without) for at, delay in moments for flag in (JOURNAL_ONLY, NOTHING)]
        caught = sum(bool(wrong) for _, wrong in results(images, cuts))
        tally.note(f"{where}, {name}: {caught} of {len(cuts)} cuts lose a step")
        if not caught:
            tally.add(f"{where}, {name}", "nothing is lost: these cuts prove nothing")


def trial(chosen: argparse.Namespace, folder: Path, tally: Tally) -> None:
    """Every file system, with every option."""
    check_machine(folder)
    for kind in ["ext4"] if chosen.short else chosen.filesystems.split(","):
        for mount in MOUNTS[kind][:1] if chosen.short else MOUNTS[kind]:
            where = f"{kind} ({mount})" if mount and mount != "nouuid" else kind
            try:
                images = Images(folder / f"{kind}-{mount}", kind, mount)
            except Impossible as error:
                tally.note(f"{where} skipped: {error}")
                continue
            deeds = deeds_of_a_save(images)
            cuts = sorted(cuts_of(deeds, short=chosen.short), key=lambda cut: cut.delay)
            for start in range(0, len(cuts), AT_ONCE):
                for cut, wrong in results(images, cuts[start : start + AT_ONCE]):
                    tally.add(f"{where}, {cut.shown} ({deeds[cut.deed] if cut.deed is not None else 'done'})", wrong)
            if not chosen.short:
                check_controls(images, where, deeds, tally)


if __name__ == "__main__":
    parser = options(__doc__)
    parser.add_argument("--filesystems", default="ext4,xfs", help="of these kinds")
    carry_out(parser, trial)
