"""Where the command line writes: results to stdout or a file, everything else to stderr."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

from statedict.errors import FileError, StateDictError
from statedict.report.result import Result

if TYPE_CHECKING:
    from argparse import Namespace
    from typing import TextIO

    from statedict.cli.progress import ProgressBar

__all__ = ["Console"]


class Console:
    """The two streams of one command, and what was said about them: quiet, colour, a file for the result."""

    def __init__(self, *, debug: bool = False) -> None:
        self.debug = debug
        self.quiet = False
        self.format = "text"
        self.output = "-"
        self.overwrite = False
        self.color = True
        for stream in (sys.stdout, sys.stderr):
            # A terminal that isn't UTF-8 gets escapes instead of an error.
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="backslashreplace")

    def configure(self, options: Namespace) -> None:
        """Takes over the options that all commands share. Raises ``TargetExists`` before any work is done."""
        self.quiet = options.quiet
        self.format = options.format
        self.output = options.output
        self.overwrite = getattr(options, "overwrite", False)
        self.color = not options.no_color and not os.environ.get("NO_COLOR")
        if self.output != "-":
            from statedict.io.durable import check_target

            check_target(self.output, overwrite=self.overwrite)
            self._spare([str(getattr(options, name, "")) for name in ("source", "target")])

    def _spare(self, paths: list[str]) -> None:
        """Raises ``FileError`` if the report would take the place of a file that it is about."""
        output = os.path.realpath(self.output)
        for path in paths:
            if path and output in (os.path.realpath(path), os.path.realpath(path.rpartition("#")[0] or path)):
                raise FileError(
                    "the report can't take the place of this file", path=path, hint="Name another file with -o"
                )

    def show(self, result: Result, **view: object) -> None:
        """Writes the result in the format asked for. ``view`` goes to its ``document``, where that is what is shown."""
        if self.output != "-":
            from statedict.io.durable import write_bytes

            data = self._rendered(result, view, None).encode("utf-8", "backslashreplace")
            write_bytes(self.output, data, overwrite=self.overwrite)
            self.note(f"written to {self.output}")
        else:
            sys.stdout.write(self._rendered(result, view, sys.stdout))

    def _rendered(self, result: Result, view: dict[str, object], stream: TextIO | None) -> str:
        if self.format == "json":
            import json

            return json.dumps(result.to_dict(), indent=2, allow_nan=False) + "\n"
        document = result.document(**view)
        if self.format == "html":
            from statedict.report.html import page

            return page(document)
        if self.format == "markdown":
            from statedict.report import markdown

            return markdown.render(document)
        from statedict.report import text

        terminal = stream is not None and stream.isatty()
        return text.render(document, color=terminal and self._colorful(), columns=_columns() if terminal else None)

    def _colorful(self) -> bool:
        return self.color and os.environ.get("TERM") != "dumb"

    def note(self, text: str) -> None:
        """Says something on stderr that isn't the result; not with ``-q``."""
        if not self.quiet:
            self.say(text)

    def progress(self, title: str) -> ProgressBar:
        """A bar for long work; nothing is shown with ``-q``, or where stderr is no terminal."""
        from statedict.cli.progress import ProgressBar

        return ProgressBar(title, shown=not self.quiet and sys.stderr.isatty(), color=self._colorful())

    def say(self, text: str) -> None:
        """Says something on stderr, on one line."""
        from statedict.report.escape import visible

        try:
            print(f"statedict: {visible(text, 4000)}", file=sys.stderr, flush=True)
        except OSError:
            # Nobody listens on stderr; the exit code still says it.
            pass

    def failed(self, error: Exception) -> int:
        """Says what went wrong and gives the exit code. ``--debug`` adds the traceback."""
        if self.debug:
            import traceback

            traceback.print_exception(error)
        if isinstance(error, StateDictError):
            self.say(str(error))
            return error.exit_code
        reason = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        if isinstance(error, MemoryError):
            self.say("there isn't enough memory for this")
        elif isinstance(error, OSError):
            # Of stdout, such as a full disk behind it: the rest of it would fail once more when Python ends.
            self.abandon()
            self.say(reason)
        else:
            self.say(f"internal error: {reason}. Please report it with what --debug prints")
        return 2

    def flush(self) -> None:
        """Sends out what is still held back, so that an error of the pipe is met here."""
        sys.stdout.flush()

    def abandon(self) -> None:
        """Nobody reads any more: stdout goes nowhere, so that Python's own last flush stays silent."""
        try:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, sys.stdout.fileno())
        except (OSError, ValueError):
            # No real file behind stdout: there is nothing to be flushed later.
            pass


def _columns() -> int:
    from shutil import get_terminal_size

    return max(get_terminal_size((100, 24)).columns, 40)
