"""``statedict doctor``: what a checkpoint really is, what looks wrong in it, and what makes it fit another."""

from __future__ import annotations

import os
from argparse import ArgumentParser, Namespace
from typing import TYPE_CHECKING

from statedict.cli.parser import add_limit, limits_of

if TYPE_CHECKING:
    from statedict.cli.output import Console
    from statedict.ops.diagnosing.examination import Examination

__all__ = ["configure", "run", "target_of"]

_ABOUT = """\
Say what a file really is, where its weights are, what it was saved from, and what looks wrong in it. With --for: why it doesn't fit
another, and what makes it fit. The header is read, and every value (not with --quick); nothing of the file is run, and it stays as it is.
--for package.module:callable imports and calls your own code, the current folder last on the path.
Exit code 0 says that nothing looks wrong or has to change (notes may still be worth reading), 1 that something does, 2 that it couldn't
be looked at, or that --fix couldn't write.
"""

_EXAMPLES = """\
examples:
  statedict doctor model.pth
  statedict doctor run.ckpt --at model_state_dict
  statedict doctor huge.safetensors --quick
  statedict doctor run.ckpt --fix weights.safetensors
  statedict doctor old.pth --for new.safetensors --fix fixed.safetensors
  statedict doctor old.pth --for project.models:build
"""
# Counters that a profiler left, which belong to no model.
_LITTER = ("*total_ops", "*total_params")


def configure(parser: ArgumentParser) -> None:
    """Gives the parser the verb's words."""
    parser.description, parser.epilog = _ABOUT, _EXAMPLES
    parser.add_argument("source", metavar="SOURCE", help="a file or folder; FILE#KEY is the part under a key")
    about = "another checkpoint, which it is to fit, or package.module:callable that returns a model"
    parser.add_argument("--for", dest="target", metavar="TARGET", help=about)
    about = "package.module:name of inputs for the model, or of a function that returns some"
    parser.add_argument("--probe", metavar="NAME", help=about)
    about = "write what can be repaired for certain: with --for the target's tensors, else the weights alone, without wrappers"
    parser.add_argument("--fix", metavar="OUT", help=about)
    parser.add_argument("--at", metavar="KEY", help="look only at the part under this key")
    parser.add_argument("--quick", action="store_true", help="read the header alone, no values; not with --for")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT, and the file of -o")
    add_limit(parser)


def run(options: Namespace, console: Console) -> int:
    """Shows what was found, then writes what was asked for. The exit code is 1 where something is wrong or doesn't fit."""
    if options.fix is not None:
        _check_out(options)
    return _alone(options, console) if options.target is None else _for_target(options, console)


def target_of(text: str, console: Console) -> object:
    """What the text behind ``--for`` names: a checkpoint's path, or the model that ``package.module:callable`` makes."""
    from statedict.cli.factories import is_named, made_model

    return made_model(text, console) if is_named(text) else text


def _check_out(options: Namespace) -> None:
    """Raise ``TargetExists`` or ``FileError`` for a file that mustn't be written, before any work is done."""
    from statedict.errors import FileError
    from statedict.io.durable import check_target

    check_target(options.fix, overwrite=options.overwrite)
    for path in (options.source, options.target or ""):
        if os.path.realpath(options.fix) in (os.path.realpath(path), os.path.realpath(path.rpartition("#")[0] or path)):
            raise FileError(
                "the repaired checkpoint can't take the place of this one", path=path, hint="Name another file"
            )


def _alone(options: Namespace, console: Console) -> int:
    from statedict.ops.diagnosing.contents import examine

    limits = limits_of(options)
    with console.progress("examining") as progress:
        result = examine(options.source, at=options.at, quick=options.quick, limits=limits, on_progress=progress)
    console.show(result)
    if options.fix is not None:
        _write_weights(options, console, result)
    return 0 if result else 1


def _write_weights(options: Namespace, console: Console, result: Examination) -> None:
    """The weights alone, without what wrappers and profilers put among them. Raises ``KeyMismatch`` where that repairs nothing."""
    from statedict import rules
    from statedict.errors import KeyMismatch
    from statedict.ops.convert import convert

    grave = [finding.code for finding in result.findings if finding.level == "error"]
    if grave:
        raise KeyMismatch(f"nothing was written: no renaming repairs this ({', '.join(grave)})", path=options.source)
    litter = any(finding.code == "profiler-litter" for finding in result.findings)
    drops = [rules.optional(rules.drop(glob)) for glob in _LITTER] if litter else []
    with console.progress("writing") as progress:
        convert(
            options.source,
            options.fix,
            at=options.at,
            weights_only=True,
            rules=drops,
            overwrite=options.overwrite,
            limits=limits_of(options),
            on_progress=progress,
        )
    console.note(f"the weights are written to {options.fix}")


def _probe_of(text: str, console: Console) -> object:
    """The inputs that ``package.module:name`` are or makes. Raises ``Unsupported`` for another text."""
    from statedict.cli.factories import is_named, made_probe
    from statedict.errors import Unsupported

    if not is_named(text):
        raise Unsupported(
            "a probe is named as package.module:name",
            path=text,
            hint="Name a tensor, or a function that returns inputs",
        )
    return made_probe(text, console)


def _for_target(options: Namespace, console: Console) -> int:
    from statedict.ops.diagnose import diagnose

    source = options.source if options.at is None else f"{options.source}#{options.at}"
    target = target_of(options.target, console)
    probe = None if options.probe is None else _probe_of(options.probe, console)
    with console.progress("comparing"):
        result = diagnose(source, target, probe=probe, limits=limits_of(options))
    console.show(result)
    if options.fix is not None:
        with console.progress("writing"):
            result.fix(options.fix, overwrite=options.overwrite)
        console.note(f"the repaired checkpoint is written to {options.fix}")
    return 0 if result else 1
