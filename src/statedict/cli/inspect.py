"""``statedict inspect``: what a checkpoint holds."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from typing import TYPE_CHECKING

from statedict.cli.parser import add_limit, limits_of

if TYPE_CHECKING:
    from statedict.cli.output import Console

__all__ = ["configure", "run"]

_ABOUT = """\
Show what a checkpoint holds: its tensors, everything beside them, and what is odd about it.
Only the header is read (with --stats also the values), and nothing of the file is run. Layers that look alike share a line.
"""

_EXAMPLES = """\
examples:
  statedict inspect model.pth
  statedict inspect model.pth --stats
  statedict inspect run.ckpt --at model_state_dict --tree
  statedict inspect run.ckpt#model_state_dict --match '*.bias' --flat
  statedict inspect model.safetensors --format html -o model.html
"""


def configure(parser: ArgumentParser) -> None:
    """Gives the parser the verb's words."""
    parser.description, parser.epilog = _ABOUT, _EXAMPLES
    parser.add_argument("source", metavar="SOURCE", help="a file; FILE#KEY is the part under a key")
    parser.add_argument("--at", metavar="KEY", help="show only the part under this key")
    parser.add_argument("--match", metavar="GLOB", help="show only the keys that match as a whole, such as '*.bias'")
    about = "min, max, mean, std, zeros, NaN and Inf of the values: reads every byte once"
    parser.add_argument("--stats", action="store_true", help=about)
    view = parser.add_mutually_exclusive_group()
    view.add_argument("--flat", action="store_true", help="a line for every tensor")
    view.add_argument("--tree", action="store_true", help="the keys as a tree, with totals")
    parser.add_argument("--overwrite", action="store_true", help="replace the file of -o")
    add_limit(parser)


def run(options: Namespace, console: Console) -> int:
    """Shows the inspection. What it finds does not change the exit code."""
    from statedict.ops.inspect import inspect

    with console.progress("reading") as progress:
        limits = limits_of(options)
        result = inspect(options.source, stats=options.stats, at=options.at, limits=limits, on_progress=progress)
    if options.match is not None:
        result = result.matching(options.match)
        if not result.tensors and not result.objects:
            console.note(f"no key matches '{options.match}'")
    usual = "complete" if options.format == "html" else "folded"
    console.show(result, view="flat" if options.flat else "tree" if options.tree else usual)
    return 0
