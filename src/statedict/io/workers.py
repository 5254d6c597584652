"""Threads that do one thing together, and have ended when it is done, however it ends."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from threading import Thread

__all__ = ["Workers"]


class Workers:
    """Runs one function in several threads, the caller's among them, until all have returned; the first error is raised."""

    def __init__(self, count: int) -> None:
        self.stopped = False
        self._count = count
        self._error: BaseException | None = None

    def run(self, work: Callable[[], None]) -> None:
        """Returns, or raises, when every thread has ended: Ctrl-C only makes them end earlier."""
        threads = [
            Thread(target=self._guarded, args=(work,), name="statedict-reader", daemon=True)
            for _ in range(self._count - 1)
        ]
        started = []
        try:
            for thread in threads:
                try:
                    thread.start()
                except RuntimeError:
                    break  # the system grants no more threads: fewer will do, or none
                started.append(thread)
            self._guarded(work)
        finally:
            self._end(started)
        if self._error is not None:
            raise self._error

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            self.stopped = True
            self._error = self._error or error

    def _end(self, threads: Sequence[Thread]) -> None:
        """Wait for the threads, however often Ctrl-C is pressed meanwhile: the memory that they fill is let go of next."""
        interrupt: BaseException | None = None
        while any(thread.is_alive() for thread in threads):
            try:
                for thread in threads:
                    thread.join()
            except BaseException as error:  # noqa: PERF203
                self.stopped = True
                interrupt = error
        if interrupt is not None:
            raise interrupt
