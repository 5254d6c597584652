"""The tables of a file of rules as rules: each is given to the function of its name."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

from statedict.errors import RuleError, StateDictError, one_line
from statedict.rules import makers
from statedict.rules.files import read_tables
from statedict.rules.rule import Rule

__all__ = ["rule_of_table", "rules_of"]


def rules_of(path: str | os.PathLike[str]) -> list[Rule]:
    """The rules of a file. Raises ``FileError`` and ``RuleError``, with the number of the rule."""
    return [_numbered(number, table, os.fspath(path)) for number, table in enumerate(read_tables(path), 1)]


def _numbered(number: int, table: Mapping[str, Any], path: str) -> Rule:
    try:
        return rule_of_table(table)
    except StateDictError as error:
        error.what = f"rule {number}: {error.what}"
        raise error.located(path) from error.__cause__


def _rename(pattern: str = "", replacement: str | None = None, pairs: Mapping[str, str] | None = None) -> Rule:
    return makers.rename(pattern if pairs is None else pairs, replacement)


# What a table of a file may ask for, by name.
_MAKERS: Mapping[str, Callable[..., Rule]] = {
    "add_prefix": makers.add_prefix,
    "cast": makers.cast,
    "concat": makers.concat,
    "deinterleave": makers.deinterleave,
    "drop": makers.drop,
    "fold_batch_norm": makers.fold_batch_norm,
    "fold_pruning": makers.fold_pruning,
    "fold_scale": makers.fold_scale,
    "fold_spectral_norm": makers.fold_spectral_norm,
    "fold_weight_norm": makers.fold_weight_norm,
    "interleave": makers.interleave,
    "keep": makers.keep,
    "merge_lora": makers.merge_lora,
    "pad": makers.pad,
    "select": makers.select,
    "slice": makers.slice,
    "split": makers.split,
    "squeeze": makers.squeeze,
    "stack": makers.stack,
    "strip_prefix": makers.strip_prefix,
    "strip_wrapper": makers.strip_wrapper,
    "tie": makers.tie,
    "transpose": makers.transpose,
    "unsqueeze": makers.unsqueeze,
    "unstack": makers.unstack,
    "untie": makers.untie,
    "add_wrapper": lambda word, modules: makers.add_wrapper(word, *modules),
    "reorder": makers.reorder,
    "permute": lambda glob, dims: makers.permute(glob, dims),
    "rename": _rename,
    "reshape": lambda glob, shape: makers.reshape(glob, shape),
}


def rule_of_table(table: Mapping[str, Any]) -> Rule:
    """The rule of one table of a file. Raises ``RuleError``."""
    arguments = dict(table)
    name, is_optional = arguments.pop("rule", None), arguments.pop("optional", False)
    maker = _MAKERS.get(name) if isinstance(name, str) else None
    if maker is None:
        known = ", ".join(sorted(_MAKERS))
        raise RuleError("there is no such rule", found=one_line(repr(name)), hint=f"There is {known}")
    try:
        rule = maker(**arguments)
    except TypeError as error:
        what = str(error).split("() ", 1)[-1]
        raise RuleError(f"{name} {one_line(what)}", found=one_line(repr(arguments))) from error
    return rule.optional() if is_optional is True else rule
