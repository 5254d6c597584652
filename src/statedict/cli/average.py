"""``statedict average``: the mean of several checkpoints, written as one."""

from __future__ import annotations

from argparse import ArgumentParser, ArgumentTypeError, Namespace
from typing import TYPE_CHECKING

from statedict.cli.parser import add_limit, limits_of

if TYPE_CHECKING:
    from statedict.cli.output import Console

__all__ = ["TAKES_OUTPUT", "configure", "run"]

# Here -o names the checkpoint that is written; the report always goes to stdout.
TAKES_OUTPUT = True

_ABOUT = """\
Write the mean of checkpoints of one structure, whatever their formats are. The suffix of TARGET says how it is written.
Floats are averaged; integers and all that is no tensor are those of the last source, and the report says so.
Nothing of the files is run; the sources are never modified; the target appears whole or not at all.
"""

_EXAMPLES = """\
examples:
  statedict average epoch-8.pth epoch-9.pth epoch-10.pth -o mean.safetensors
  statedict average a.safetensors b.safetensors -o mixed.safetensors --weights 0.7,0.3
  statedict average step-*.ckpt -o ema.pth --ema 0.9 --at model_state_dict
"""


def configure(parser: ArgumentParser) -> None:
    """Gives the parser the verb's words."""
    parser.description, parser.epilog = _ABOUT, _EXAMPLES
    parser.add_argument("sources", metavar="SOURCE", nargs="+", help="files; FILE#KEY is the part under a key")
    parser.add_argument("-o", dest="target", metavar="TARGET", required=True, help="the file to write")
    shares = parser.add_mutually_exclusive_group()
    shares.add_argument(
        "--weights", metavar="W,W…", type=_numbers, help="one number for each source; they are divided by their sum"
    )
    shares.add_argument(
        "--ema", metavar="DECAY", type=float, help="the moving average over the sources in order, with this decay"
    )
    parser.add_argument("--at", metavar="KEY", help="take only the part under this key of each source")
    parser.add_argument("--dtype", metavar="D", help="cast the mean to this dtype, such as bfloat16")
    parser.add_argument(
        "--accumulate",
        choices=("float32", "float64"),
        help="keep sums in this dtype (float32 for dtypes of up to 16 bits, else float64)",
    )
    parser.add_argument("--allow-overflow", action="store_true", help="cast also where numbers become Inf")
    parser.add_argument("--dry-run", action="store_true", help="say what would be written, and write nothing")
    parser.add_argument("--overwrite", action="store_true", help="replace TARGET")
    parser.add_argument("--no-digests", action="store_true", help="record no digest of each tensor: faster")
    add_limit(parser)


def run(options: Namespace, console: Console) -> int:
    """Averages, and shows what was written."""
    from statedict.ops.average import average

    with console.progress("averaging") as progress:
        result = average(
            options.sources,
            options.target,
            weights=options.weights,
            ema=options.ema,
            at=options.at,
            dtype=options.dtype,
            accumulate=options.accumulate,
            overwrite=options.overwrite,
            dry_run=options.dry_run,
            digests=not options.no_digests,
            allow_overflow=options.allow_overflow,
            limits=limits_of(options),
            on_progress=progress,
        )
    console.show(result)
    return 0


def _numbers(text: str) -> list[float]:
    try:
        return [float(number) for number in text.split(",")]
    except ValueError as error:
        raise ArgumentTypeError(f"'{text}' is no list of numbers such as 0.7,0.3") from error
