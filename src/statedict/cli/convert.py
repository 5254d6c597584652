"""``statedict convert``: a checkpoint written again, in another format or without what it doesn't need."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from typing import TYPE_CHECKING

from statedict.cli.parser import add_limit, limits_of

if TYPE_CHECKING:
    from statedict.cli.output import Console

__all__ = ["configure", "run"]

_ABOUT = """\
Write a checkpoint again. The suffix of TARGET says how: .safetensors, or .pth .pt .bin .ckpt for PyTorch.
Nothing of the file is run; the source is never modified; the target appears whole or not at all.
Nesting, values beside the tensors, ties and strides are kept, in both formats.
"""

_EXAMPLES = """\
examples:
  statedict convert model.pth model.safetensors
  statedict convert run.ckpt weights.safetensors --at model_state_dict
  statedict convert old.pth compact.pth --dry-run
"""


def configure(parser: ArgumentParser) -> None:
    """Gives the parser the verb's words."""
    parser.description, parser.epilog = _ABOUT, _EXAMPLES
    parser.add_argument("source", metavar="SOURCE", help="a file; FILE#KEY is the part under a key")
    parser.add_argument("target", metavar="TARGET", help="the file to write")
    parser.add_argument("--at", metavar="KEY", help="write only the part under this key")
    parser.add_argument("--dry-run", action="store_true", help="say what would be written, and write nothing")
    parser.add_argument("--overwrite", action="store_true", help="replace TARGET, and the file of -o")
    parser.add_argument("--keep-storages", action="store_true", help="write storages whole, with what no tensor shows")
    parser.add_argument("--no-digests", action="store_true", help="record no digest of each tensor: faster")
    add_limit(parser)


def run(options: Namespace, console: Console) -> int:
    """Converts, and shows what was written."""
    from statedict.ops.convert import convert

    with console.progress("converting") as progress:
        result = convert(
            options.source,
            options.target,
            at=options.at,
            overwrite=options.overwrite,
            dry_run=options.dry_run,
            digests=not options.no_digests,
            keep_storages=options.keep_storages,
            limits=limits_of(options),
            on_progress=progress,
        )
    console.show(result)
    return 0
