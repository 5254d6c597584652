"""A forked child under strace from a known moment on: its calls are counted, and one is made to fail or to kill.

strace counts each system call by its name, and for each thread: ``inject=fsync:signal=KILL:when=3`` ends the process at
the third fsync of whichever thread gets there first. So every call is met by going through the names, and for each
through the numbers, until the child ends by itself.
"""

from __future__ import annotations

import ctypes
import os
import re
import select
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from trial import Forked, Impossible

__all__ = ["Call", "Report", "calls_of", "check_tracing", "met", "traced"]

# prctl: let any process of this user trace this one, where the system asks (yama).
_SET_TRACER, _ANY = 0x59616D61, -1
# Seconds in which strace must have begun.
_PATIENCE_S = 20.0
# What the child waits in for its sign.
_GATE = ("poll", "ppoll", "restart_syscall")
_LINE = re.compile(r"^(\d+) +(\w+)\(", re.MULTILINE)

Report = Callable[[str], None]
Call = tuple[str, str]  # thread, name


def check_tracing(folder: Path) -> None:
    """Raise ``Impossible`` where nothing can be traced."""
    if shutil.which("strace") is None:
        raise Impossible("strace isn't installed")
    code, _ = traced(lambda report: os.unlink(folder / "not there"), ["inject=?unlink,?unlinkat:signal=KILL:when=1"])
    if code != -9:
        raise Impossible("strace can't trace a process here")


def traced(
    work: Callable[[Report], None],
    expressions: Sequence[str],
    *,
    before: Callable[[], None] | None = None,
    log: Path | None = None,
) -> tuple[int, list[str]]:
    """Run ``before``, untraced, and ``work`` in a child under strace's ``-e`` expressions; its exit code, and what it said."""
    waiting, go = os.pipe()
    reading, ready = os.pipe()

    def child(report: Report) -> None:
        os.close(go)
        ctypes.CDLL(None).prctl(_SET_TRACER, _ANY, 0, 0, 0)
        if before is not None:
            before()
        os.write(ready, b"x")
        gate = select.poll()
        gate.register(waiting, select.POLLIN)
        gate.poll()
        work(report)

    made = Forked(child)
    os.close(waiting)
    os.close(ready)
    options = [option for expression in expressions for option in ("-e", expression)]
    try:
        os.read(reading, 1)
        tracer = subprocess.Popen(
            ["strace", "-f", "-qq", "-o", os.devnull if log is None else str(log), *options, "-p", str(made.pid)]
        )
        _await_tracer(made.pid, tracer)
        os.write(go, b"x")
        found = made.lines()
        tracer.wait()
    except BaseException:
        made.kill()
        made.lines()
        raise
    finally:
        os.close(go)
        os.close(reading)
    return found


def _await_tracer(pid: int, tracer: subprocess.Popen[bytes]) -> None:
    """Wait until the process is traced and waits for its sign; raise ``Impossible`` where that doesn't come."""
    until = time.monotonic() + _PATIENCE_S
    while time.monotonic() < until:
        status = Path(f"/proc/{pid}/status").read_text()
        if "TracerPid:\t0\n" not in status:
            return
        if tracer.poll() is not None:
            raise Impossible("strace can't trace a process here")
        time.sleep(0.001)
    raise Impossible("strace hasn't begun")


def calls_of(work: Callable[[Report], None], folder: Path, before: Callable[[], None] | None = None) -> list[Call]:
    """Every system call of ``work``, in order."""
    log = folder / "calls"
    code, lines = traced(work, ["trace=all"], before=before, log=log)
    if code:
        raise RuntimeError(f"what is to be traced fails by itself: {code}, {lines}")
    return [call for call in _LINE.findall(log.read_text(errors="replace")) if call[1] not in _GATE]


def met(calls: Sequence[Call]) -> int:
    """How many of these calls the numbers reach: where two threads make the same call, the later of two equal numbers isn't."""
    reached: set[tuple[str, int]] = set()
    counts: dict[Call, int] = {}
    for call in calls:
        counts[call] = counts.get(call, 0) + 1
        reached.add((call[1], counts[call]))
    return len(reached)
