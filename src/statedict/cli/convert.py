"""``statedict convert``: a checkpoint written again, in another format, changed, or without what it doesn't need."""

from __future__ import annotations

from argparse import Action, ArgumentParser, Namespace
from collections.abc import Sequence
from typing import TYPE_CHECKING

from statedict.cli.parser import add_limit, limits_of

if TYPE_CHECKING:
    from statedict.cli.output import Console
    from statedict.rules import Rules

__all__ = ["configure", "run"]

_ABOUT = """\
Write a checkpoint again. The suffix of TARGET says how: .safetensors, or .pth .pt .bin .ckpt for PyTorch.
Nothing of the file is run; the source is never modified; the target appears whole or not at all.
Nesting, values beside the tensors, ties and strides are kept, in both formats.
Changes are made in this order: --at, then --weights-only or --ema, then the rules as they stand on the command line, then --dtype.
"""

_EXAMPLES = """\
examples:
  statedict convert model.pth model.safetensors
  statedict convert run.ckpt weights.safetensors --weights-only --dtype bfloat16
  statedict convert run.ckpt weights.safetensors --ema
  statedict convert run.ckpt part.pth --at model_state_dict --strip-prefix module. --drop 'head.*'
  statedict convert old.pth new.pth --rename '^layers\\.(\\d+)\\.=blocks.\\1.' --dry-run

In --rename, the first '=' outside of brackets parts the regex from what is put in its place; write \\= for one in the regex.
"""


def configure(parser: ArgumentParser) -> None:
    """Gives the parser the verb's words."""
    parser.description, parser.epilog = _ABOUT, _EXAMPLES
    parser.add_argument("source", metavar="SOURCE", help="a file; FILE#KEY is the part under a key")
    parser.add_argument("target", metavar="TARGET", help="the file to write")
    parser.add_argument("--at", metavar="KEY", help="write only the part under this key")
    parser.add_argument(
        "--weights-only",
        "--strip-optimizer",
        action="store_true",
        help="write only the weights, as one flat state dict: no optimizer, no scheduler, no wrapper's prefix",
    )
    parser.add_argument("--ema", action="store_true", help="write only the averaged weights, in the same way")
    _add_rules(parser)
    parser.add_argument(
        "--dtype", metavar="D", help="cast floats to this dtype, such as bfloat16; all else stays as it is"
    )
    parser.add_argument("--allow-overflow", action="store_true", help="cast also where numbers become Inf")
    parser.add_argument(
        "--max-shard-size", metavar="SIZE", help="split TARGET into files of at most this size, such as 5GB"
    )
    parser.add_argument("--dry-run", action="store_true", help="say what would be written, and write nothing")
    parser.add_argument("--overwrite", action="store_true", help="replace TARGET, and the file of -o")
    parser.add_argument("--keep-storages", action="store_true", help="write storages whole, with what no tensor shows")
    parser.add_argument("--no-digests", action="store_true", help="record no digest of each tensor: faster")
    add_limit(parser)


def _add_rules(parser: ArgumentParser) -> None:
    """The options that are rules: each as often as wanted, applied in the order in which they stand."""
    group = parser.add_argument_group(
        "rules, applied in the order in which they stand; a rule that matches nothing is an error"
    )
    parser.set_defaults(rules=[])
    for name, metavar, about in (
        ("strip-prefix", "P", "take this beginning, with its dot, away from the keys that have it"),
        ("add-prefix", "P", "put this before every key"),
        ("rename", "REGEX=REPL", "replace in every key what the regex matches, as re.sub does"),
        ("drop", "GLOB", "leave out the keys that match as a whole"),
        ("keep", "GLOB", "leave out all other keys"),
        ("transpose", "GLOB", "exchange the last two dimensions of these tensors"),
        ("rules", "FILE", "the rules of a .toml or .json file, or shipped ones by their name"),
    ):
        group.add_argument(f"--{name}", metavar=metavar, action=_Rule, help=about)


class _Rule(Action):
    """Puts its name and argument at the end of the one list of rules."""

    def __call__(
        self, parser: ArgumentParser, namespace: Namespace, values: object, option_string: str | None = None
    ) -> None:
        word = self.option_strings[0].removeprefix("--")
        namespace.rules = [*namespace.rules, (word, str(values))]


def _rules_of(options: Sequence[tuple[str, str]]) -> Rules:
    """The rules that the options are. Raises ``RuleError``."""
    from statedict import rules
    from statedict.errors import RuleError
    from statedict.rules.named import typed

    made: list[rules.Rule] = []
    for word, text in options:
        if word == "rules":
            made += typed(text)
        elif word == "rename":
            pattern, replacement = _parted(text)
            if replacement is None:
                hint = "Write REGEX=REPL; the '=' must stand outside of brackets, and without a backslash before it"
                raise RuleError(
                    "--rename has no '=' between the regex and what is put in its place", found=text, hint=hint
                )
            made.append(rules.rename(pattern, replacement))
        else:
            make = {
                "strip-prefix": rules.strip_prefix,
                "add-prefix": rules.add_prefix,
                "drop": rules.drop,
                "keep": rules.keep,
                "transpose": rules.transpose,
            }[word]
            made.append(make(text))
    return rules.Rules(made)


def _parted(text: str) -> tuple[str, str | None]:
    """The regex and the replacement: parted at the first '=' outside of (…) and […] that has no backslash before it."""
    depth, in_class, at = 0, False, 0
    while at < len(text):
        letter = text[at]
        if letter == "\\":
            at += 1
        elif in_class:
            in_class = letter != "]"
        elif letter == "[":
            in_class = True
            # A bracket that comes first in a class is one of its characters.
            at += 1 if text[at + 1 : at + 2] == "]" else 2 if text[at + 1 : at + 3] == "^]" else 0
        elif letter in "()":
            depth += 1 if letter == "(" else -1
        elif letter == "=" and depth <= 0:
            return text[:at], text[at + 1 :]
        at += 1
    return text, None


def run(options: Namespace, console: Console) -> int:
    """Converts, and shows what was written."""
    from statedict.ops.convert import convert

    rules = _rules_of(options.rules)
    with console.progress("converting") as progress:
        result = convert(
            options.source,
            options.target,
            rules=rules,
            dtype=options.dtype,
            at=options.at,
            max_shard_size=options.max_shard_size,
            overwrite=options.overwrite,
            dry_run=options.dry_run,
            digests=not options.no_digests,
            keep_storages=options.keep_storages,
            allow_overflow=options.allow_overflow,
            weights_only=options.weights_only,
            ema=options.ema,
            limits=limits_of(options),
            on_progress=progress,
        )
    console.show(result)
    return 0
