"""What ``TrainingRun.save`` gives back at once, and the one thread that writes a step while training goes on."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from threading import Event, Thread, get_native_id

from statedict.errors import one_line
from statedict.report.units import human_bytes
from statedict.runs.writing import Phase, Written

__all__ = ["Saved", "duration"]

# How far the thread that writes stands back: 5 changes nothing, and at 19 a busy machine lets it wait for ten seconds.
_NICE = 10


class Saved:
    """A save: done, or under way in a thread of its own.

    ``step``, ``path``; ``blocked_ms`` (how long training stood still); once it is done ``durable``, ``nbytes``, ``linked_nbytes`` and
    ``phases`` (seconds, bytes and GB/s of ``capture``, ``plan``, ``write``, ``fsync``, ``commit``, ``prune``).
    """

    def __init__(self, step: int, path: str) -> None:
        self.step = step
        self.path = path
        self.durable = False
        self.blocked_ms = 0.0
        self.nbytes = 0
        self.linked_nbytes = 0
        self.phases: Mapping[str, Phase] = {}
        self.notes: tuple[object, ...] = ()
        self._captured = Phase(0.0, 0)
        self._done = Event()
        self._error: BaseException | None = None
        self._was_raised = False

    def __repr__(self) -> str:
        state = "durable" if self.durable else "failed" if self._error else "done" if self.is_done else "under way"
        return f"Saved({self.step}, {self.path!r}, {state})"

    def __str__(self) -> str:
        """``step 1000: 1.20 GB in 0.9 s (1.33 GB/s), blocked 80 ms, durable``."""
        if not self.is_done:
            return f"step {self.step}: under way, blocked {duration(self.blocked_ms / 1e3)}"
        if self._error is not None:
            return f"step {self.step}: failed, {one_line(self._error)}"
        seconds = sum([phase.seconds for phase in self.phases.values()])
        linked = f", {human_bytes(self.linked_nbytes)} of it linked," if self.linked_nbytes else ""
        rate = Phase(seconds, self.nbytes - self.linked_nbytes).gb_per_s
        fate = "durable" if self.durable else "not durable: the file system can't say"
        took = f"{human_bytes(self.nbytes)}{linked} in {duration(seconds)} ({rate:.3g} GB/s)"
        return f"step {self.step}: {took}, blocked {duration(self.blocked_ms / 1e3)}, {fate}"

    @property
    def is_done(self) -> bool:
        """Whether it has ended, well or not."""
        return self._done.is_set()

    def wait(self) -> Saved:
        """Wait until the step is durable. Raises what made the save fail."""
        self._done.wait()
        if self._error is not None:
            self._was_raised = True
            raise self._error
        return self

    def raise_unseen(self) -> None:
        """Wait, and raise the error that nobody has met yet."""
        self._done.wait()
        if not self._was_raised:
            self.wait()

    def captured_in(self, seconds: float, nbytes: int) -> None:
        """Note what the copy of the state took."""
        self._captured = Phase(seconds, nbytes)

    def run(self, write: Callable[[], Written]) -> Saved:
        """Write here and now. Raises what ``write`` does."""
        self._carry_out(write)
        return self.wait()

    def start(self, write: Callable[[], Written]) -> None:
        """Write in a thread. It isn't a daemon: an interpreter that ends waits for the step."""
        Thread(target=self._in_background, args=(write,), name="statedict-save", daemon=False).start()

    def _in_background(self, write: Callable[[], Written]) -> None:
        if sys.platform == "linux":
            # There a thread has a priority of its own, and those that it starts have it too: training takes the processor first.
            # Measured on two cores, 1 GiB: a step beside the write takes 1.2 times as long as alone, not 1.5; the write 1.4 s, not 0.6.
            with suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, get_native_id(), _NICE)
        self._carry_out(write)

    def _carry_out(self, write: Callable[[], Written]) -> None:
        try:
            written = write()
            self.durable = written.durable
            self.nbytes = written.nbytes
            self.linked_nbytes = written.linked_nbytes
            self.notes = written.notes
            self.phases = {"capture": self._captured, **written.phases}
        except BaseException as error:
            self._error = error
        finally:
            self._done.set()


def duration(seconds: float) -> str:
    """A duration as people read it: ``80 ms``, ``0.9 s``, ``75 s``."""
    return f"{seconds * 1e3:.0f} ms" if seconds < 0.1 else f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
