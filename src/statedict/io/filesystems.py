"""What kind of file system a file lies on, as far as that decides how it is read and written."""

from __future__ import annotations

import os
import re
from functools import lru_cache

__all__ = ["MEMORY", "NETWORK", "filesystem_of", "is_memory", "is_network"]

# What the kernel calls the file systems whose bytes come over a network, or through another process: each page fault of a mapped
# file is a round trip there (85 MB/s against 956 MB/s read in large pieces was reported for safetensors, issue 736).
NETWORK = frozenset(
    {
        "9p",
        "afs",
        "beegfs",
        "ceph",
        "cifs",
        "fhgfs",
        "gpfs",
        "lustre",
        "ncpfs",
        "nfs",
        "nfs4",
        "smb3",
        "smbfs",
        "vboxsf",
        "virtiofs",
    }
)
# Those whose files are memory already.
MEMORY = frozenset({"hugetlbfs", "ramfs", "tmpfs"})
_OCTAL = re.compile(r"\\([0-7]{3})")


def is_network(kind: str) -> bool:
    """Whether files of this kind are far away; FUSE counts as that, whatever is behind it."""
    return kind in NETWORK or kind.startswith("fuse")


def is_memory(kind: str) -> bool:
    """Whether files of this kind are in memory."""
    return kind in MEMORY


def filesystem_of(path: str) -> str:
    """The kernel's name of the file system that an existing file or folder is on (``ext4``, ``nfs4``); ``unknown`` elsewhere.

    By the device number, and where that isn't in the table of mounts (btrfs, overlays) by the longest mount point above it.
    """
    try:
        real = os.path.realpath(path)
        device = os.stat(real).st_dev
    except (OSError, ValueError):
        return "unknown"
    mounts = _mounts()
    number = f"{os.major(device)}:{os.minor(device)}"
    same = [kind for mounted, _, kind in mounts if mounted == number]
    if same:
        return same[-1]
    above = [
        (len(point), kind) for _, point, kind in mounts if real == point or real.startswith(point.rstrip("/") + "/")
    ]
    return max(above)[1] if above else "unknown"


def _mounts() -> list[tuple[str, str, str]]:
    """Device number, mount point and file system of each mount, in the order of mounting."""
    try:
        with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
            text = file.read()
    except OSError:
        return []
    return _parsed(text)


@lru_cache(maxsize=4)
def _parsed(text: str) -> list[tuple[str, str, str]]:
    """The lines of ``/proc/self/mountinfo`` (``man 5 proc_pid_mountinfo``): fields 3 and 5, and the first behind the dash."""
    found = []
    for line in text.splitlines():
        before, dash, after = line.partition(" - ")
        fields = before.split(" ")
        if dash and len(fields) > 4 and after:
            point = _OCTAL.sub(lambda match: chr(int(match[1], 8)), fields[4])
            found.append((fields[2], point, after.split(" ")[0]))
    return found
