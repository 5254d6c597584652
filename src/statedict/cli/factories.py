"""``package.module:name`` on the command line: code of the user's own, which is imported and called because it was named there.

It is the one thing on the command line that runs code from outside, and only that which is named by hand, never by a file. The current
folder comes last on the import path meanwhile, so that nothing in it can stand before a module that is installed.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from importlib import import_module
from typing import TYPE_CHECKING, Any

from statedict import bridge
from statedict.errors import StateDictError, one_line

if TYPE_CHECKING:
    from statedict.cli.output import Console

__all__ = ["is_named", "made_model", "made_probe"]

# As entry points are written.
_NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")


def is_named(text: str) -> bool:
    """Whether the text names something in a module, and no file of that name is there."""
    return _NAME.fullmatch(text) is not None and not os.path.lexists(text)


def made_model(text: str, console: Console) -> object:
    """The module, optimizer or scheduler of that name, or that the function of that name returns.

    Raises ``StateDictError``, in one line, for whatever the code raises, and for what it gives that is none.
    """
    made = _named(text, console, _is_target)
    if not _is_target(made):
        raise StateDictError(
            "it gives no model", path=text, expected="a module, an optimizer or a scheduler", found=type(made).__name__
        )
    return made


def made_probe(text: str, console: Console) -> object:
    """The inputs of that name, or that the function of that name returns; a function of one argument is the probe itself."""
    return _named(text, console, lambda value: not callable(value) or _takes_a_model(value))


def _is_target(value: object) -> bool:
    return bridge.is_module(value) or bridge.is_optimizer(value) or bridge.is_scheduler(value)


def _takes_a_model(value: Any) -> bool:
    code = getattr(value, "__code__", None)
    return code is not None and code.co_argcount == 1


def _named(text: str, console: Console, is_made: Callable[[Any], bool]) -> Any:
    """What has the name; called, unless it is what was wanted."""
    console.note(f"this runs your code: {text}")
    name, _, path = text.partition(":")
    with _guarded(text), _current_folder_last(), redirect_stdout(sys.stderr):
        value: Any = import_module(name)
        for part in path.split("."):
            value = getattr(value, part)
        return value if is_made(value) or not callable(value) else value()


@contextmanager
def _guarded(text: str) -> Iterator[None]:
    """A block in which anything that the code raises becomes one line."""
    try:
        yield
    except (Exception, SystemExit) as error:
        what = f"{type(error).__name__}: {one_line(error)}" if str(error) else type(error).__name__
        hint = "Start in the folder that it is in, or install it" if isinstance(error, ImportError) else None
        raise StateDictError(
            f"your code can't be run: {what}", path=text, hint=hint or "--debug shows where"
        ) from error


@contextmanager
def _current_folder_last() -> Iterator[None]:
    """A block in which modules of the current folder are found, if there is no other of their name."""
    folder = os.getcwd()
    if folder in sys.path:
        yield
        return
    sys.path.append(folder)
    try:
        yield
    finally:
        if folder in sys.path:
            sys.path.remove(folder)
