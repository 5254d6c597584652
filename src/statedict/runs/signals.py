"""The wish of the system that training ends soon: SIGTERM and SIGUSR1 set a flag, and training saves at its next step."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from types import FrameType
from typing import Any

__all__ = ["StopFlag"]

# What spot machines and cluster schedulers send before they end a job; SIGUSR1 is SLURM's ``--signal``.
_SIGNALS = ("SIGTERM", "SIGUSR1")


class StopFlag:
    """``is_set`` once one of the signals has come. The handlers that were there are called too, and come back with ``close``.

    Handlers can be set in the main thread only; elsewhere nothing is done, and the flag stays down.
    """

    def __init__(self) -> None:
        self.is_set = False
        self._before: dict[int, Any] = {}
        self._pid = os.getpid()

    def watch(self) -> None:
        """Set the handlers."""
        for name in _SIGNALS:
            number = getattr(signal, name, None)
            if number is None or number in self._before:
                continue
            try:
                self._before[number] = signal.signal(number, self._met)
            except ValueError:
                return  # not the main thread

    def _met(self, number: int, frame: FrameType | None) -> None:
        before: Callable[[int, FrameType | None], object] | int | None = self._before.get(number)
        if os.getpid() != self._pid and not callable(before):
            # A worker that was forked has nothing to save: it ends as it would have.
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        self.is_set = True
        if callable(before):
            before(number, frame)

    def close(self) -> None:
        """Bring back the handlers that were there, unless somebody has put others in the place of ours."""
        for number, before in self._before.items():
            if signal.getsignal(number) == self._met:
                signal.signal(number, signal.SIG_DFL if before is None else before)
        self._before.clear()
