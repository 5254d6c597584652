"""``statedict compare``: what differs between two checkpoints."""

from __future__ import annotations

from argparse import ArgumentParser, ArgumentTypeError, Namespace
from typing import TYPE_CHECKING

from statedict.cli.parser import add_limit, limits_of

if TYPE_CHECKING:
    from statedict.cli.output import Console
    from statedict.rules import RulesLike

__all__ = ["configure", "run"]

_ABOUT = """\
Show what differs between two checkpoints of any formats: keys, shapes, dtypes, values, ties, and everything beside the tensors.
Tensors that were renamed, transposed, split, fused or stacked are found by their content. Nothing of the files is run.
Exit code 0 says equal, 1 different.
"""

_EXAMPLES = """\
examples:
  statedict compare before.pth after.safetensors
  statedict compare run.ckpt#model_state_dict model.safetensors --close
  statedict compare old.pth new.pth --export-rules renames.toml
  statedict compare a.pth b.pth --ignore 'optimizer.*' --format markdown -o comparison.md

git diff shows what changed in a checkpoint after these two:
  echo '*.pth diff=statedict' >> .gitattributes
  git config diff.statedict.textconv 'statedict inspect --flat --stats --format markdown'
"""


def configure(parser: ArgumentParser) -> None:
    """Gives the parser the verb's words."""
    parser.description, parser.epilog = _ABOUT, _EXAMPLES
    parser.add_argument("source", metavar="A", help="a file; FILE#KEY is the part under a key")
    parser.add_argument("target", metavar="B", help="what it is compared with")
    group = parser.add_argument_group("what counts as equal")
    about = "numbers that differ by at most ATOL + X * |b|"
    group.add_argument("--rtol", metavar="X", type=_number, help=about)
    group.add_argument("--atol", metavar="X", type=_number, help="numbers that differ by at most X + RTOL * |b|")
    group.add_argument(
        "--ulp", metavar="N", type=_count, help="floats with fewer than N representable ones between them"
    )
    group.add_argument("--close", action="store_true", help="the tolerances of torch.testing.assert_close by dtype")
    group.add_argument("--nan-differs", action="store_true", help="NaN differs from NaN")
    parser.add_argument(
        "--rules", metavar="FILE", help="rules (TOML or JSON, or shipped ones by name) to apply to A first"
    )
    about = "leave out the keys that match as a whole; may be given again"
    parser.add_argument("--ignore", metavar="GLOB", action="append", default=[], help=about)
    parser.add_argument("--no-renames", action="store_true", help="don't search for renamed tensors: reads less")
    about = "write the rules (TOML or JSON) that give A the names and shapes of B"
    parser.add_argument("--export-rules", metavar="FILE", help=about)
    parser.add_argument("--overwrite", action="store_true", help="replace the files of -o and --export-rules")
    add_limit(parser)


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not value >= 0:
        raise ArgumentTypeError(f"'{text}' is no number of at least 0")
    return value


def _count(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 20):
        raise ArgumentTypeError(f"'{text}' is no whole number of at least 0")
    return int(text)


def _check_export(options: Namespace) -> None:
    """Raises ``TargetExists``, or ``FileError`` if the rules would take the place of a file that is compared."""
    import os

    from statedict.errors import FileError
    from statedict.io.durable import check_target

    check_target(options.export_rules, overwrite=options.overwrite)
    for path in (options.source, options.target):
        if os.path.realpath(options.export_rules) in (
            os.path.realpath(path),
            os.path.realpath(path.rpartition("#")[0]),
        ):
            raise FileError("the rules can't take the place of this file", path=path, hint="Name another file")


def run(options: Namespace, console: Console) -> int:
    """Shows the comparison. The exit code is 0 where both are equal, else 1."""
    from statedict.ops.compare import compare

    rules: RulesLike = ()
    if options.rules is not None:
        from statedict.rules.named import typed

        rules = typed(options.rules)
    if options.export_rules is not None:
        _check_export(options)
    with console.progress("comparing") as progress:
        result = compare(
            options.source,
            options.target,
            rtol=options.rtol,
            atol=options.atol,
            equal_nan=not options.nan_differs,
            rules=rules,
            ignore=options.ignore,
            ulp=options.ulp,
            close=options.close,
            renames=not options.no_renames,
            limits=limits_of(options),
            on_progress=progress,
        )
    if options.export_rules is not None:
        result.rules.to_file(options.export_rules, overwrite=options.overwrite)
        console.note(f"the rules are written to {options.export_rules}")
    console.show(result)
    return 0 if result else 1
