"""The words of the command line. Only the verb that is asked for is imported."""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NoReturn

from statedict.limits import DEFAULT_LIMITS, Limits

if TYPE_CHECKING:
    from statedict.cli.output import Console

__all__ = ["FORMATS", "Parser", "add_common", "add_limit", "limits_of", "parse"]

FORMATS = ("text", "json", "html", "markdown")

# Every verb, in the order of the help. The module of a verb has ``configure(parser)`` and ``run(options, console)``.
VERBS = {
    "inspect": "show what a checkpoint holds, without running anything of it",
    "compare": "show what differs between two checkpoints",
    "convert": "write a checkpoint again, as .safetensors or .pth",
    "average": "write the mean of several checkpoints",
    "doctor": "say what is wrong with a checkpoint, and what makes it fit",
    "runs": "show the steps of a training run, verify, prune and repair them",
}

_HELP = """\
usage: statedict VERB …

Open any PyTorch or safetensors checkpoint without running a byte of it.

verbs:
{verbs}

examples:
  statedict inspect model.pth
  statedict inspect run.ckpt --at model_state_dict --tree
  statedict compare before.pth after.pth
  statedict convert model.pth model.safetensors
  statedict average epoch-8.pth epoch-9.pth -o mean.safetensors
  statedict doctor model.pth
  statedict runs run verify

statedict VERB --help says more; statedict --version, the version.
"""

# Options that every verb has may also stand before it.
_EARLY = ("-q", "--quiet", "--no-color", "--debug")

Run = Callable[[Namespace, "Console"], int]


class Parser(ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        from statedict.report.escape import visible

        self.exit(2, f"statedict: {visible(message, 2000)}. See {self.prog} --help\n")


def parse(arguments: list[str]) -> tuple[Run, Namespace]:
    """What the arguments ask for. Help and errors leave by ``SystemExit``, as argparse does."""
    early: list[str] = []
    while arguments and arguments[0] in _EARLY:
        early.append(arguments.pop(0))
    word = arguments[0] if arguments else "--help"
    if word in ("-h", "--help", "help"):
        sys.stdout.write(_HELP.format(verbs="\n".join([f"  {name:<10}{about}" for name, about in VERBS.items()])))
        raise SystemExit(0)
    if word == "--version":
        from statedict import __version__

        sys.stdout.write(f"statedict {__version__}\n")
        raise SystemExit(0)
    if word not in VERBS:
        _unknown(word)
    return _verb(word, early + arguments[1:])


def _verb(name: str, arguments: list[str]) -> tuple[Run, Namespace]:
    from importlib import import_module

    module = import_module(f"statedict.cli.{name}")
    parser = Parser(prog=f"statedict {name}", formatter_class=RawDescriptionHelpFormatter, allow_abbrev=False)
    module.configure(parser)
    more = getattr(module, "FORMATS", ())
    add_common(parser, takes_output=getattr(module, "TAKES_OUTPUT", False), formats=(*FORMATS, *more))
    run: Run = module.run
    return run, parser.parse_args(arguments)


def _unknown(word: str) -> NoReturn:
    from statedict.keys import near
    from statedict.report.escape import visible

    if word.startswith("-"):
        sys.stderr.write(f"statedict: the verb comes first, then {visible(word)}. See statedict --help\n")
        raise SystemExit(2)
    guesses = near(word, VERBS, 1)
    hint = f"Did you mean statedict {guesses[0]}?" if guesses else f"There is: {', '.join(VERBS)}. See statedict --help"
    sys.stderr.write(f"statedict: there is no verb '{visible(word)}'. {hint}\n")
    raise SystemExit(2)


def add_common(parser: ArgumentParser, *, takes_output: bool = False, formats: Sequence[str] = FORMATS) -> None:
    """The options that every verb has. ``takes_output`` leaves -o to the verb: its result goes to stdout."""
    group = parser.add_argument_group("output")
    group.add_argument("--format", choices=formats, default="text", help="how the result is shown (text)")
    if takes_output:
        parser.set_defaults(output="-")
    else:
        group.add_argument("-o", "--output", metavar="FILE", default="-", help="where the result goes; - is stdout (-)")
    group.add_argument("-q", "--quiet", action="store_true", help="say nothing on stderr but errors")
    group.add_argument("--no-color", action="store_true", help="no colours, as the variable NO_COLOR does")
    group.add_argument("--debug", action="store_true", help="show the traceback of an error")


def add_limit(parser: ArgumentParser) -> None:
    """``--limit NAME=N``, as often as wanted."""
    names = ", ".join(Limits._fields)
    about = f"how much the file may ask for; an error says which to raise ({names})"
    parser.add_argument("--limit", metavar="NAME=N", action="append", default=[], type=_limit, help=about)


def _limit(text: str) -> tuple[str, int]:
    from argparse import ArgumentTypeError

    name, _, number = text.partition("=")
    if name not in Limits._fields:
        raise ArgumentTypeError(f"there is no limit '{name}'; there is {', '.join(Limits._fields)}")
    digits = number.replace("_", "").replace(",", "")
    if not (digits.isascii() and digits.isdigit() and len(digits) < 20):
        raise ArgumentTypeError(f"'{number}' is no number of the kind that {name} takes")
    return name, int(digits)


def limits_of(options: Namespace) -> Limits:
    """The limits, as far as they were not raised or lowered by ``--limit``."""
    changed: dict[str, int] = dict(options.limit)
    return DEFAULT_LIMITS._replace(**changed)
