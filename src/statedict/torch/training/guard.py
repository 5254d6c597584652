"""Keeps a capture and a change of the state apart: neither begins while the other is under way in another thread.

    Guard.updating      around a change: a capture of another thread waits for its end
    Guard.capturing     around a capture: a change of another thread waits for its end
    Guard.watch         makes every ``step()`` of an optimizer such a change, by its hooks (``torch.optim.Optimizer``, torch 2.1 and later)

A step that ended in an error has no end: its hook isn't called. A capture says so then instead of saving half a step.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from statedict.errors import StateDictError

__all__ = ["Guard"]

# Seconds that a capture waits for a step of another thread before it takes it for one that will never end.
_PATIENCE_S = 300.0
_TORN = "the optimizer's step has not ended: the state is half of one step and half of the next"

Hook = Callable[[torch.optim.Optimizer], None]


class Guard:
    """One for each training state."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._updating: dict[object, int] = {}  # the thread of each change that is under way
        self._capturing: list[int] = []  # the threads of the captures that are under way

    @contextmanager
    def updating(self) -> Iterator[None]:
        """A change of the state."""
        mark = object()
        self._begin(mark)
        try:
            yield
        finally:
            self._end(mark)

    @contextmanager
    def capturing(self) -> Iterator[None]:
        """A capture, or loading. Raises ``StateDictError`` where a step has begun and can't end."""
        here = threading.get_ident()
        with self._changed:
            self._await_updates(here)
            self._capturing.append(here)
        try:
            yield
        finally:
            with self._changed:
                self._capturing.remove(here)
                self._changed.notify_all()

    def _await_updates(self, here: int) -> None:
        until = time.monotonic() + _PATIENCE_S
        while self._updating:
            alive = {thread.ident for thread in threading.enumerate()}
            stuck = any(thread == here or thread not in alive for thread in self._updating.values())
            if stuck or time.monotonic() > until:
                hint = "Load the last step that was saved; outside of optimizer.step() any moment will do"
                raise StateDictError(_TORN, hint=hint)
            self._changed.wait(1.0)

    def _begin(self, mark: object) -> None:
        here = threading.get_ident()
        with self._changed:
            while any(thread != here for thread in self._capturing):
                self._changed.wait()
            self._updating[mark] = here

    def _end(self, mark: object) -> None:
        with self._changed:
            self._updating.pop(mark, None)
            self._changed.notify_all()

    def watch(self, optimizer: torch.optim.Optimizer, after: Hook) -> list[Any]:
        """Hook into the steps of an optimizer; ``after`` is called behind each. Gives the handles that undo it."""
        mark = id(optimizer)

        def begin(*_: object) -> None:
            self._begin(mark)

        def end(done: torch.optim.Optimizer, *_: object) -> None:
            self._end(mark)
            after(done)

        return [optimizer.register_step_pre_hook(begin), optimizer.register_step_post_hook(end)]
