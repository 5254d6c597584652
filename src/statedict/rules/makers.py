"""The functions that make rules, as people type them; each checks what it is given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from statedict.errors import RuleError, one_line
from statedict.keys import Path
from statedict.rules import each, folds, joins, orders, products, stacks, ties
from statedict.rules.kinds import AddPrefix, AddWrapper, Drop, Keep, Select, StripPrefix, StripWrapper
from statedict.rules.renaming import Rename
from statedict.rules.rule import Rule

__all__ = [
    "add_prefix",
    "add_wrapper",
    "cast",
    "concat",
    "deinterleave",
    "drop",
    "fold_batch_norm",
    "fold_pruning",
    "fold_scale",
    "fold_spectral_norm",
    "fold_weight_norm",
    "interleave",
    "keep",
    "merge_lora",
    "optional",
    "pad",
    "permute",
    "rename",
    "reorder",
    "reshape",
    "select",
    "slice",
    "split",
    "squeeze",
    "stack",
    "strip_prefix",
    "strip_wrapper",
    "tie",
    "transpose",
    "unsqueeze",
    "unstack",
    "untie",
]


def optional(rule: Rule) -> Rule:
    """The same rule, which is left out where it matches nothing."""
    return rule.optional()


def select(key: str | Path) -> Rule:
    """Only the part under a key, without that key: a subtree, or the flat keys that begin with it and a dot."""
    return Select(_text("select", key) if isinstance(key, str) else key)


def strip_prefix(prefix: str) -> Rule:
    """Keys that begin with the prefix (its dot is part of it) lose it; others stay as they are."""
    return StripPrefix(_text("strip_prefix", prefix))


def add_prefix(prefix: str) -> Rule:
    """Every key gets the prefix (its dot is part of it). A nested tree is put into containers of these names."""
    return AddPrefix(_text("add_prefix", prefix))


def strip_wrapper(word: str) -> Rule:
    """The component of that name is taken out wherever it stands in a key, but not where it is the last one.

    ``strip_wrapper("_orig_mod")`` makes ``blocks.0.weight`` of ``_orig_mod.blocks.0._orig_mod.weight``.
    """
    return StripWrapper(_component("strip_wrapper", word))


def add_wrapper(word: str, *modules: str) -> Rule:
    """Keys get that component behind the path of each of these modules, ``""`` being the whole model.

    The paths are those of the result: ``add_wrapper("_orig_mod", "", "_orig_mod.blocks.0")`` undoes what ``strip_wrapper`` has
    as its example.
    """
    if not modules:
        raise RuleError("add_wrapper needs modules to wrap", hint='Name them by their paths; "" is the whole model')
    return AddWrapper(_component("add_wrapper", word), *modules)


def drop(glob: str) -> Rule:
    """All keys but those that the glob matches as a whole, tensors and objects."""
    return Drop(_text("drop", glob))


def keep(glob: str) -> Rule:
    """Only the keys that the glob matches as a whole, tensors and objects."""
    return Keep(_text("keep", glob))


def rename(pattern: str | Mapping[str, str], replacement: str | None = None) -> Rule:
    """New names for keys: by a template, by a regular expression, or one by one.

    ``rename("layers.{n}.a", "blocks.{n+1}.b")`` is a template: it matches whole keys. Without a name in braces it is a regular
    expression, whose every match in a key is replaced as ``re.sub`` does it: ``rename(r"^net\\.(\\d+)", r"layers.\\1")``. A mapping
    names old and new keys, and all of them must be there.
    """
    if isinstance(pattern, Mapping):
        if replacement is not None or not pattern:
            raise RuleError("rename takes a pattern and a replacement, or one mapping of old keys to new ones")
        pairs = {_text("rename", old): _text("rename", new) for old, new in pattern.items()}
        return Rename(MappingProxyType(pairs))
    if not isinstance(replacement, str):
        raise RuleError("rename needs what takes the pattern's place", found=one_line(repr(replacement)))
    return Rename(_text("rename", pattern), replacement)


def cast(glob: str, dtype: str) -> Rule:
    """Floating-point tensors in another dtype (``bfloat16``, ``float16`` …), rounded as torch rounds; others are left alone."""
    return each.Cast(_text("cast", glob), dtype)


def transpose(glob: str, dim0: int = -2, dim1: int = -1) -> Rule:
    """Two dimensions change places. Nothing is copied."""
    return each.Transpose(_text("transpose", glob), _int("transpose", dim0), _int("transpose", dim1))


def permute(glob: str, *dims: int | Sequence[int]) -> Rule:
    """The dimensions in another order. Nothing is copied."""
    return each.Permute(_text("permute", glob), _ints("permute", dims))


def reshape(glob: str, *shape: int | Sequence[int]) -> Rule:
    """The elements in reading order under another shape, of which one size may be -1. Nothing is copied where they lie packed."""
    return each.Reshape(_text("reshape", glob), _ints("reshape", shape))


def reorder(glob: str, view: Sequence[int], order: Sequence[int], dim: int = 0) -> Rule:
    """The indices of a dimension in another order: seen as ``view`` (one size may be -1), whose parts change places as ``order`` says.

    ``reorder("layers.{n}.wq.weight", (heads, -1, 2), (0, 2, 1))`` makes halves of rotary pairs that lie side by side.
    """
    sizes, places = _ints("reorder", (view,)), _ints("reorder", (order,))
    if sorted(places) != list(range(len(sizes))) or sizes.count(-1) > 1 or any(not size or size < -1 for size in sizes):
        raise RuleError("reorder takes sizes and an order of as many places", found=f"{list(sizes)}, {list(places)}")
    return orders.Reorder(_text("reorder", glob), sizes, places, _int("reorder", dim))


def squeeze(glob: str, dim: int) -> Rule:
    """A dimension of size 1 is taken out."""
    return each.Squeeze(_text("squeeze", glob), _int("squeeze", dim))


def unsqueeze(glob: str, dim: int) -> Rule:
    """A dimension of size 1 is put in."""
    return each.Unsqueeze(_text("unsqueeze", glob), _int("unsqueeze", dim))


def slice(glob: str, dim: int, start: int | None = 0, stop: int | None = None) -> Rule:
    """The indices from ``start`` to before ``stop`` of a dimension; negative ones count from the end."""
    first = None if start is None else _int("slice", start)
    return each.Slice(_text("slice", glob), _int("slice", dim), first, None if stop is None else _int("slice", stop))


def pad(glob: str, dim: int, size: int, value: float = 0) -> Rule:
    """A dimension grows to a size; the new elements, at its end, have the value."""
    return each.Pad(_text("pad", glob), _int("pad", dim), _int("pad", size), _number("pad", value))


def split(source: str, targets: Sequence[str], sizes: Sequence[int] | None = None, dim: int = 0) -> Rule:
    """One tensor cut along a dimension into several, of these sizes or equal ones.

    ``split("{m}.qkv.weight", ["{m}.q.weight", "{m}.k.weight", "{m}.v.weight"])``. Nothing is copied.
    """
    cut = None if sizes is None else _ints("split", (sizes,))
    return joins.Split(_text("split", source), _texts("split", targets), cut, _int("split", dim))


def concat(sources: Sequence[str], target: str, dim: int = 0) -> Rule:
    """Several tensors one behind the other along a dimension: what undoes ``split``. All parts must be there."""
    return joins.Concat(_texts("concat", sources), _text("concat", target), _int("concat", dim))


def interleave(sources: Sequence[str], target: str, dim: int = 0) -> Rule:
    """Several tensors mixed along a dimension: the first index of each in turn, then the second of each …"""
    return joins.Interleave(_texts("interleave", sources), _text("interleave", target), _int("interleave", dim))


def deinterleave(source: str, targets: Sequence[str], dim: int = 0) -> Rule:
    """What undoes ``interleave``. Nothing is copied."""
    return joins.Deinterleave(_text("deinterleave", source), _texts("deinterleave", targets), _int("deinterleave", dim))


def stack(source: str, target: str, dim: int = 0) -> Rule:
    """Tensors of one shape along a new dimension: ``stack("experts.{e}.w", "experts.w")``.

    The number that only the source has says the order; from 0 on, none may be missing.
    """
    return stacks.Stack(_text("stack", source), _text("stack", target), _int("stack", dim))


def unstack(source: str, target: str, dim: int = 0) -> Rule:
    """One tensor becomes as many as a dimension has indices: ``unstack("experts.w", "experts.{e}.w")``. Nothing is copied."""
    return stacks.Unstack(_text("unstack", source), _text("unstack", target), _int("unstack", dim))


def tie(key: str, to: str) -> Rule:
    """``key`` becomes another name of the tensor under ``to``; where it is there already, its values must be the same."""
    return ties.Tie(_text("tie", key), _text("tie", to))


def untie(key: str) -> Rule:
    """The key gets a tensor of its own, with the values that it shares now."""
    return ties.Untie(_text("untie", key))


def fold_weight_norm(glob: str = "*") -> Rule:
    """``weight_g`` and ``weight_v`` (or torch's parametrization) become ``weight`` in the modules that the glob matches."""
    return folds.FoldWeightNorm(_text("fold_weight_norm", glob))


def fold_batch_norm(conv: str, bn: str, eps: float = 1e-5, transposed: bool = False) -> Rule:
    """Batch normalisations go into the weights before them: ``fold_batch_norm("layer{n}.conv1", "layer{n}.bn1")``.

    Both are modules. ``eps`` is that of the normalisation, which no file records; ``transposed`` is for transposed convolutions.
    """
    names = _text("fold_batch_norm", conv), _text("fold_batch_norm", bn)
    return folds.FoldBatchNorm(*names, _number("fold_batch_norm", eps), bool(transposed))


def fold_pruning(glob: str = "*") -> Rule:
    """``weight_orig`` and ``weight_mask``, as torch's pruning names them, become ``weight`` in the modules that the glob matches."""
    return products.FoldPruning(_text("fold_pruning", glob))


def fold_spectral_norm(glob: str = "*", dim: int = 0) -> Rule:
    """``weight_orig``, ``weight_u`` and ``weight_v`` (or torch's parametrization) become ``weight``, as it is in evaluation.

    ``dim`` is that of the output channels: 1 for transposed convolutions.
    """
    return products.FoldSpectralNorm(_text("fold_spectral_norm", glob), _int("fold_spectral_norm", dim))


def fold_scale(
    weight: str, scale: str, factor: float = 1.0, block: Sequence[int] | None = None, dtype: str | None = None
) -> Rule:
    """Quantised weights become floats: ``fold_scale("{m...}.weight", "{m...}.weight_scale_inv")`` multiplies each with its scales.

    A scale is that of the whole weight, of a row, or of a block of it; ``block`` are the sizes of a block where the shapes don't say them.
    ``factor`` is one more number: 1/127 for the ``SCB`` of bitsandbytes. ``dtype`` is that of the result, else that of the scale.
    """
    sizes = None if block is None else _ints("fold_scale", (block,))
    if sizes is not None and any(size < 1 for size in sizes):
        raise RuleError("fold_scale takes sizes of blocks of at least 1", found=list(sizes))
    names = _text("fold_scale", weight), _text("fold_scale", scale)
    named = None if dtype is None else _text("fold_scale", dtype)
    return products.FoldScale(*names, _number("fold_scale", factor), sizes, named)


def merge_lora(glob: str = "*", scaling: float | None = None, alpha: float | None = None) -> Rule:
    """Low-rank changes (``lora_A``, ``lora_B``) go into their weights: ``weight + scaling · B A`` in the modules that the glob matches.

    ``alpha`` says the scaling as training does: alpha / rank. One of the two is needed; no tensor records it.
    """
    if (scaling is None) == (alpha is None):
        hint = "adapter_config.json has lora_alpha: merge_lora(alpha=16)"
        raise RuleError("merge_lora needs either scaling or alpha", hint=hint)
    values = [None if value is None else _number("merge_lora", value) for value in (scaling, alpha)]
    return folds.MergeLora(_text("merge_lora", glob), *values)


def _text(name: str, value: object) -> str:
    if not isinstance(value, str) or not value:
        raise RuleError(f"{name} takes a text that isn't empty", found=one_line(repr(value)))
    return value


def _component(name: str, value: object) -> str:
    if "." in (word := _text(name, value)):
        raise RuleError(f"{name} takes the name of one component, without a dot", found=one_line(repr(word)))
    return word


def _texts(name: str, values: object) -> tuple[str, ...]:
    if isinstance(values, str) or not isinstance(values, Sequence) or not values:
        raise RuleError(f"{name} takes a list of names", found=one_line(repr(values)))
    made = tuple([_text(name, value) for value in values])
    if len(set(made)) < len(made):
        raise RuleError(f"{name} takes names that are all different", found=one_line(repr(values)))
    return made


def _int(name: str, value: object) -> int:
    if type(value) is not int:
        raise RuleError(f"{name} takes a whole number", found=one_line(repr(value)))
    return value


def _ints(name: str, values: Sequence[Any]) -> tuple[int, ...]:
    found = values[0] if len(values) == 1 and not isinstance(values[0], int) else values
    if not isinstance(found, Sequence) or isinstance(found, str):
        raise RuleError(f"{name} takes whole numbers", found=one_line(repr(found)))
    return tuple([_int(name, value) for value in found])


def _number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise RuleError(f"{name} takes a number", found=one_line(repr(value)))
    return value
