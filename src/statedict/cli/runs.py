"""``statedict runs``: the steps of a training run."""

from __future__ import annotations

from argparse import ArgumentParser, ArgumentTypeError, Namespace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from statedict.cli.output import Console
    from statedict.runs.policies import Keep
    from statedict.runs.run import RunFolder

__all__ = ["configure", "run"]

_ABOUT = """\
Show the steps of a training run, how its model has moved over them, read every byte of them, delete those that nobody
keeps, or set damaged ones aside. Exit code 0 says that all is well, 1 that steps are damaged or have NaN or Inf.
"""

_EXAMPLES = """\
examples:
  statedict runs run
  statedict runs run verify
  statedict runs run show 1000
  statedict runs run trend --last 20 --only 'encoder.*'
  statedict runs run prune --latest 3 --best val_loss:2 --dry-run
  statedict runs run repair
  statedict compare run#1000 run#2000
"""

_ACTIONS = ("list", "verify", "prune", "show", "repair", "trend")


def configure(parser: ArgumentParser) -> None:
    """Gives the parser the verb's words."""
    parser.description, parser.epilog = _ABOUT, _EXAMPLES
    parser.add_argument("source", metavar="FOLDER", help="the folder of a run, with its step-… folders")
    parser.add_argument("action", nargs="?", choices=_ACTIONS, default="list", help="what to do (list)")
    parser.add_argument("step", nargs="?", metavar="STEP", type=_count, help="the step to show, or to verify alone")
    group = parser.add_argument_group("what prune keeps: all that any of these name, and the newest step")
    group.add_argument("--latest", metavar="N", type=_count, help="the newest N steps")
    group.add_argument("--best", metavar="METRIC[:N]", action="append", default=[], help="the N best by a metric (1)")
    group.add_argument(
        "--mode", choices=("min", "max"), help="which way the metric is better, if its name doesn't tell"
    )
    group.add_argument("--every", metavar="N", type=_count, help="the steps whose number is a multiple of N")
    group.add_argument("--within", metavar="HOURS", type=_hours, help="the steps of the last hours")
    group = parser.add_argument_group("what trend looks at: all floating numbers of the model, at every step")
    about = "only the tensors whose key matches as a whole, such as '*.bias'; can be given again"
    group.add_argument("--only", metavar="GLOB", action="append", default=[], help=about)
    group.add_argument("--last", metavar="N", type=_count, help="the newest N steps")
    group.add_argument("--component", metavar="NAME", help="another component than the model, such as ema")
    parser.add_argument("--dry-run", action="store_true", help="delete nothing; show what prune would delete")
    parser.add_argument("--overwrite", action="store_true", help="replace the file of -o")


def _count(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 19):
        raise ArgumentTypeError(f"'{text}' is no whole number of at least 0")
    return int(text)


def _hours(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < float("inf"):
        raise ArgumentTypeError(f"'{text}' is no number of hours above 0")
    return value


def run(options: Namespace, console: Console) -> int:
    """Does what was asked for. The exit code is 1 where steps are damaged."""
    from statedict.errors import RunError
    from statedict.runs.run import RunFolder

    keep = _keep(options)
    with RunFolder.existing(options.source, keep=keep) as folder:
        if options.action == "show":
            if options.step is None:
                raise RunError(
                    "nothing says which step is to be shown", path=options.source, hint="Type: runs FOLDER show STEP"
                )
            return _show(folder, options.step, console)
        if options.action in ("verify", "repair"):
            with console.progress("verifying") as progress:
                if options.action == "repair":
                    result = folder.repair(on_progress=progress)
                else:
                    result = folder.verify(options.step, on_progress=progress)
            console.show(result)
            return 0 if result else 1
        if options.action == "prune":
            return _prune(folder, options, console)
        if options.action == "trend":
            return _trend(folder, options, console)
        from statedict.runs.overview import overview

        found = overview(folder)
        console.show(found)
        return 1 if found.damaged else 0


def _keep(options: Namespace) -> Keep | None:
    from statedict.runs.policies import AnyKeep, Best, Every, Latest, Within

    policies: list[Keep] = []
    if options.latest is not None:
        policies.append(Latest(options.latest))
    for text in options.best:
        metric, colon, count = text.rpartition(":")
        numbered = bool(colon) and count.isascii() and count.isdigit()
        policies.append(Best(metric if numbered else text, int(count) if numbered else 1, mode=options.mode))
    if options.every is not None:
        policies.append(Every(options.every))
    if options.within is not None:
        policies.append(Within(hours=options.within))
    return AnyKeep(policies) if policies else None


def _show(folder: RunFolder, step: int, console: Console) -> int:
    from statedict.ops.inspect import inspect

    opened = folder.open_step(step, check=False)
    assert opened is not None
    with opened:
        console.show(inspect(opened.path), view="folded")
    return 0


def _trend(folder: RunFolder, options: Namespace, console: Console) -> int:
    from statedict.ops.trend import trend

    with console.progress("reading") as progress:
        only, last, component = options.only, options.last, options.component
        found = trend(folder, only=only, last=last, component=component, on_progress=progress)
    console.show(found)
    return 0 if found else 1


def _prune(folder: RunFolder, options: Namespace, console: Console) -> int:
    from statedict.errors import RunError
    from statedict.runs.overview import Deletion

    if folder.keep is None:
        hint = "--latest 3, --best val_loss:2, --every 10000, --within 24: the steps that any of them names stay"
        raise RunError("nothing says which steps stay", path=options.source, hint=hint)
    gone = folder.surplus() if options.dry_run else folder.prune()
    console.show(Deletion(folder.folder, gone))
    return 0
