"""Rules: changes of keys and tensors as data. They can be shown, compared, kept in files, taken back, and applied without reading.

    apply(checkpoint, [select("model_state_dict"), strip_prefix("module."), cast("*", "bfloat16")])

A rule sees keys in their dotted form, whatever containers they stand in: ``strip_prefix("a.b.")`` makes ``c`` of ``a.b.c``,
whether that is one flat key, a tensor in nested dicts, or something between. The containers follow their content: what
stood in ``a`` and in its ``b`` is lifted to the top, and what else is in ``a`` stays there. Where two containers become one,
the outer one's kind and attributes stay, unless all that is left came from the inner one. A list that loses elements
becomes a dict, so that the rest keep their names. The ``_metadata`` of a state dict is renamed with it, in a copy.

Which keys are meant is said by a glob that matches whole keys, or by a template: ``layers.{n}.weight``, where ``{n}`` stands for
text without a dot, and ``{n+1}`` may stand in the result (``patterns.py``). Only tensors are cast, transposed, joined and so on.

A rule that matches nothing is an error, unless it is ``optional(rule)``; so are two keys that would get one name, and a part that
is missing of several that belong together.
"""

from __future__ import annotations

import os

from statedict.rules.makers import (
    add_prefix,
    add_wrapper,
    cast,
    concat,
    deinterleave,
    drop,
    fold_batch_norm,
    fold_pruning,
    fold_scale,
    fold_spectral_norm,
    fold_weight_norm,
    interleave,
    keep,
    merge_lora,
    optional,
    pad,
    permute,
    rename,
    reorder,
    reshape,
    select,
    slice,
    split,
    squeeze,
    stack,
    strip_prefix,
    strip_wrapper,
    tie,
    transpose,
    unsqueeze,
    unstack,
    untie,
)
from statedict.rules.named import shipped
from statedict.rules.plans import Coverage, Plan
from statedict.rules.rule import Rule
from statedict.rules.ruleset import Rules, RulesLike, apply, plan

__all__ = [
    "Coverage",
    "Plan",
    "Rule",
    "Rules",
    "RulesLike",
    "add_prefix",
    "add_wrapper",
    "apply",
    "cast",
    "concat",
    "deinterleave",
    "drop",
    "fold_batch_norm",
    "fold_pruning",
    "fold_scale",
    "fold_spectral_norm",
    "fold_weight_norm",
    "from_file",
    "interleave",
    "keep",
    "merge_lora",
    "optional",
    "pad",
    "permute",
    "plan",
    "rename",
    "reorder",
    "reshape",
    "select",
    "shipped",
    "slice",
    "split",
    "squeeze",
    "stack",
    "strip_prefix",
    "strip_wrapper",
    "tie",
    "to_file",
    "transpose",
    "unsqueeze",
    "unstack",
    "untie",
]


def from_file(path: str | os.PathLike[str]) -> Rules:
    """The rules of a TOML or JSON file: ``Rules.from_file``."""
    return Rules.from_file(path)


def to_file(rules: RulesLike, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
    """Write rules to a TOML or JSON file: ``Rules.to_file``."""
    Rules.of(rules).to_file(path, overwrite=overwrite)
