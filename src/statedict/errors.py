"""Every exception that leaves this package, and the exit code that the command line gives for it.

    StateDictError                       2   the base: catching it catches everything
    ├── FormatError (ValueError)         2   the bytes are not what they should be
    │   ├── UnknownFormat                2   no checkpoint at all: the message says what the file is
    │   ├── CorruptFile                  2   a checkpoint, but damaged: path, byte offset, what
    │   ├── Unsupported                  2   well formed, but this feature can't be done: what to do instead
    │   └── LimitExceeded                2   larger than a limit allows: its name, how to raise it
    ├── UnsafeContent                    3   refused: it would have to be built by running code from the file
    ├── KeyNotFound (KeyError)           2   no such key: the nearest ones
    ├── KeyMismatch (LookupError)        2   keys missing, unexpected, near misses
    ├── SpecMismatch (ValueError)        2   a shape or dtype that differs: key, expected, found
    ├── RuleError (ValueError)           2   rules that collide or match nothing
    ├── FileError (OSError)              2   the system said no: errno and the path
    │   ├── TargetExists                 2   the output is there already
    │   └── RunError                     2   a folder of training steps
    │       ├── StepNotFound             2
    │       ├── StepExists               2
    │       └── Uncommitted              2
    └── MissingDependency (ImportError)  2   what to install

A message is one line: ``path: what is wrong (at byte N, tensor 'k'): expected X, found Y. What to do.``
The same values are attributes, so that a program need not read the sentence.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

__all__ = [
    "CorruptFile",
    "FileError",
    "FormatError",
    "KeyMismatch",
    "KeyNotFound",
    "LimitExceeded",
    "MissingDependency",
    "RuleError",
    "RunError",
    "SpecMismatch",
    "StateDictError",
    "StepExists",
    "StepNotFound",
    "TargetExists",
    "Uncommitted",
    "UnknownFormat",
    "UnsafeContent",
    "Unsupported",
    "one_line",
]

# A hostile key may be megabytes long: no message repeats more of it than this many characters.
_LONGEST_QUOTE = 200


def one_line(text: object) -> str:
    """The text with every control, bidi and line character escaped, cut to 200 characters."""
    shown = _escaped(str(text))
    return shown if len(shown) <= _LONGEST_QUOTE else shown[: _LONGEST_QUOTE - 1] + "…"


def _escaped(text: str) -> str:
    """The text with every character escaped that doesn't show as itself."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


class StateDictError(Exception):
    """The base of all errors of this package.

    Attributes: ``what`` (the defect in a few words), ``path`` (the file, or None), ``key`` (the tensor or
    object, or None), ``offset`` (bytes from the start of the file, or None), ``expected``, ``found``, ``hint``
    (what to do, or None).
    """

    exit_code = 2

    def __init__(
        self,
        what: str,
        *,
        path: str | os.PathLike[str] | None = None,
        key: str | None = None,
        offset: int | None = None,
        expected: object = None,
        found: object = None,
        hint: str | None = None,
    ) -> None:
        self.what = what
        self.path = None if path is None else os.fspath(path)
        self.key = key
        self.offset = offset
        self.expected = expected
        self.found = found
        self.hint = hint
        super().__init__(self.message)
        # An ImportError has a path of its own, which its constructor has just cleared.
        self.path = None if path is None else os.fspath(path)

    @property
    def message(self) -> str:
        """The whole sentence, on one line, safe to print on a terminal."""
        place = [f"at byte {self.offset}"] if self.offset is not None else []
        place += [f"tensor '{one_line(self.key)}'"] if self.key is not None else []
        text = _escaped(self.what) + (f" ({', '.join(place)})" if place else "")
        facts = [f"expected {one_line(self.expected)}"] if self.expected is not None else []
        facts += [f"found {one_line(self.found)}"] if self.found is not None else []
        text += f": {', '.join(facts)}" if facts else ""
        text += f". {_escaped(self.hint)}" if self.hint else ""
        return f"{one_line(self.path)}: {text}" if self.path is not None else text

    def __str__(self) -> str:
        return self.message

    def located(self, path: str | os.PathLike[str] | None) -> StateDictError:
        """This error, with the file named if no one has named it yet."""
        if self.path is None and path is not None:
            self.path = os.fspath(path)
        return self


class FormatError(StateDictError, ValueError):
    """The bytes are not what a checkpoint of their format must be."""


class UnknownFormat(FormatError):
    """The file is no checkpoint; the message says what it is and what to do."""


class CorruptFile(FormatError):
    """The file is a checkpoint, but damaged or cut short."""


class Unsupported(FormatError):
    """Well formed, but this feature can't be read, written or built; ``hint`` is the way out."""


class LimitExceeded(FormatError):
    """The file asks for more than a limit allows. ``limit`` is the name of the field of ``Limits``."""

    def __init__(self, what: str, *, limit: str, most: int, found: object = None, **where: object) -> None:
        self.limit = limit
        hint = f"If you trust the file, raise it: --limit {limit}=N, or open(..., limits=Limits({limit}=N))"
        super().__init__(what, expected=f"at most {most}", found=found, hint=hint, **where)  # type: ignore[arg-type]


class UnsafeContent(StateDictError):
    """Refused, because doing it would need code that the file names to be run.

    ``globals`` are the dotted names that the file holds.
    """

    exit_code = 3

    def __init__(self, what: str, *, globals: Iterable[str] = (), **where: object) -> None:
        self.globals = tuple(globals)
        super().__init__(what, **where)  # type: ignore[arg-type]


class KeyNotFound(StateDictError, KeyError):
    """There is no such key. A ``KeyError``, so that a ``Mapping`` behaves."""


class KeyMismatch(StateDictError, LookupError):
    """The keys of a state dict and of its target differ. ``missing`` and ``unexpected`` hold them."""

    def __init__(
        self, what: str, *, missing: Iterable[str] = (), unexpected: Iterable[str] = (), **where: object
    ) -> None:
        self.missing = tuple(missing)
        self.unexpected = tuple(unexpected)
        super().__init__(what, **where)  # type: ignore[arg-type]


class SpecMismatch(StateDictError, ValueError):
    """A tensor has another shape or dtype than its target: ``key``, ``expected``, ``found``."""


class RuleError(StateDictError, ValueError):
    """Rules that can't be applied: two sources for one key, or a rule that matches nothing."""


class FileError(StateDictError, OSError):
    """The system refused: ``errno`` is its number, ``path`` the final path (never a temporary's)."""

    def __init__(self, what: str, *, errno: int | None = None, **where: object) -> None:
        super().__init__(what, **where)  # type: ignore[arg-type]
        self.errno = errno

    @classmethod
    def of(cls, error: OSError, path: str | os.PathLike[str], doing: str, hint: str | None = None) -> FileError:
        """The error of the system as ours: ``doing`` is what was tried, such as "can't be opened"."""
        reason = os.strerror(error.errno) if error.errno else type(error).__name__
        return cls(f"{doing}: {reason}", errno=error.errno, path=path, hint=hint)


class TargetExists(FileError):
    """The output is there already, and nobody said that it may be replaced."""


class RunError(FileError):
    """Something about a folder of training steps."""


class StepNotFound(RunError):
    """No committed step of that number."""


class StepExists(RunError):
    """A step of that number is committed already."""


class Uncommitted(RunError):
    """The step was begun, but never committed."""


class MissingDependency(StateDictError, ImportError):
    """A package that this needs is not installed; ``hint`` is the command that installs it."""
