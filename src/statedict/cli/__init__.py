"""The command line: ``statedict VERB …``. The only place with printing, environment variables and exit codes.

Exit codes: 0 fine · 1 differences or findings · 2 could not do it · 3 refused as unsafe · 130 interrupted · 143 ended by
SIGTERM.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from statedict.cli.output import Console

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and gives its exit code. Nothing is raised; with ``--debug`` a failure prints its traceback."""
    import gc
    import sys

    from statedict.cli.output import Console

    arguments = list(sys.argv[1:] if argv is None else argv)
    console = Console(debug="--debug" in arguments)
    # A manifest has hundreds of thousands of objects and no cycles: looking for some took 40% of an inspection.
    collecting = gc.isenabled()
    gc.disable()
    restore = _end_on_sigterm()
    try:
        return _run(arguments, console)
    except SystemExit as stop:
        # argparse's way out after --help and after an error that it has printed.
        return stop.code if isinstance(stop.code, int) else 2
    except BrokenPipeError:
        console.abandon()
        return 0
    except KeyboardInterrupt:
        console.say("interrupted")
        return 130
    except Exception as error:
        return console.failed(error)
    finally:
        restore()
        if collecting:
            gc.enable()


def _end_on_sigterm() -> Callable[[], object]:
    """Have SIGTERM end the work as an error does, so that a half-written file is removed. Gives the way back."""
    import signal

    def end(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    try:
        before = signal.signal(signal.SIGTERM, end)
    except ValueError:
        # Not the main thread: whoever runs it there decides about signals.
        return lambda: None
    return lambda: signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)


def _run(arguments: list[str], console: Console) -> int:
    from statedict.cli.parser import parse

    run, options = parse(arguments)
    console.configure(options)
    code = run(options, console)
    console.flush()
    return code
