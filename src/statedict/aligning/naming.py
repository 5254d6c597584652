"""What a name says: its components, the field's words in them, and the part that it plays in a block."""

from __future__ import annotations

import functools
import re
from typing import NamedTuple

from statedict.knowledge import vocabulary

__all__ = ["AXIS", "Meaning", "Spot", "component_words", "meaning", "numbers_in", "spot", "stem_and_number"]

AXIS = "#"  # stands for the number of a list

_LEAVES = frozenset({"weight", "bias", "running_mean", "running_var", "num_batches_tracked"})
_FLAT = re.compile(r"(.+)_(weight|bias)")
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
_NUMBERED = re.compile(r"(.*?)_?(\d{1,9})")
_PARTS = frozenset({("q",), ("k",), ("v",), ("gate",), ("up",), ("down",), ("fc1",), ("mlp", "fc1")})
_DIGITS = re.compile(r"\d{1,9}")
_TF_LEAVES = {"gamma": "weight", "beta": "bias"}


class Spot(NamedTuple):
    """Where a tensor is: the components of its module's name, and which of the module's tensors it is.

    ``in_proj_weight`` is the weight of ``in_proj``. A tensor that is no weight or bias of anything, such as ``cls_token``, is a module
    by itself, and its leaf is empty.
    """

    module: tuple[str, ...]
    leaf: str


@functools.lru_cache(maxsize=65536)
def numbers_in(path: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """A name without its numbers, and the numbers: what differs in them alone has an order."""
    return tuple(_DIGITS.sub("", part) for part in path), tuple(int(n) for part in path for n in _DIGITS.findall(part))


class Meaning(NamedTuple):
    """The words of a module's name, without those that stand everywhere.

    ``role`` is what it does in its block: ``q``, ``o``, ``fc1``, ``norm1``; empty where the name doesn't say. ``numbers`` are those in
    its last component.
    """

    words: tuple[str, ...]
    tail: tuple[str, ...]
    numbers: tuple[int, ...]
    role: str


def spot(key: str) -> Spot:
    """The module and the leaf of a key."""
    parts = tuple(key.split("."))
    if len(parts) > 1 and parts[-1] in _LEAVES:
        return Spot(parts[:-1], parts[-1])
    if len(parts) > 1 and parts[-1] in _TF_LEAVES and "norm" in component_words(parts[-2]):
        return Spot(parts[:-1], _TF_LEAVES[parts[-1]])
    flat = _FLAT.fullmatch(parts[-1])
    if flat:
        return Spot((*parts[:-1], flat[1]), flat[2])
    return Spot(parts, "")


def stem_and_number(component: str) -> tuple[str, int] | None:
    """``("layer", 1)`` for ``layer1`` and ``layer_1``; None where it doesn't end in a number, or is one."""
    found = _NUMBERED.fullmatch(component)
    return (found[1], int(found[2])) if found and found[1] else None


@functools.lru_cache(maxsize=65536)
def component_words(component: str) -> tuple[str, ...]:
    """The field's words for one component, neutral ones left out; numbers stay, as text."""
    known = vocabulary()
    if component in known.components:
        return known.components[component]
    found: list[str] = []
    for raw in _WORD.findall(component):
        word = raw.lower()
        found += known.words.get(word, (word,))
    plain = [word for word in found if word not in known.neutral]
    if "norm" in plain and "post" in plain:
        # What comes after something isn't of it: post_attention_layernorm may well be the norm of the feed-forward.
        place = "".join(word for word in plain if word not in ("norm", "post", "self"))
        return ("after " + place, "norm")
    return tuple(plain)


@functools.lru_cache(maxsize=65536)
def meaning(module: tuple[str, ...], siblings: frozenset[str] = frozenset()) -> Meaning:
    """What the name of a module says; ``siblings`` are the last components of those beside it."""
    each = [component_words(part) for part in module]
    words: list[str] = []
    for part in each:
        words += [word for word in part if not word.isdigit() and word not in words]
    tail = each[-1] if each else ()
    numbers = tuple(int(word) for word in tail if word.isdigit() and len(word) < 10)
    return Meaning(tuple(words), tuple(w for w in tail if not w.isdigit()), numbers, _role(module, each, siblings))


def _role(module: tuple[str, ...], each: list[tuple[str, ...]], siblings: frozenset[str]) -> str:
    raw = module[-1].lower() if module else ""
    at = len(each) - 1
    while at > 0 and not [word for word in each[at] if not word.isdigit()]:
        at -= 1
    tail = tuple(word for word in each[at] if not word.isdigit()) if each else ()
    around = {word for part in each for word in part}
    if "norm" in tail:
        return _norm_role(module[at], each[at], siblings)
    if tail in _PARTS:
        return tail[-1]
    plain = _plain_role(raw, tail, siblings)
    if plain:
        return plain
    in_attn, in_mlp = "attn" in around, bool({"mlp", "experts"} & around)
    if tail == ("out",) and raw == "output" and len(module) < 3 and AXIS not in module:
        return "head"
    if tail in (("out",), ("attn",), ("self", "attn"), ("cross", "attn")):
        if in_attn or module[at] in ("o", "o_proj", "wo"):
            return "o" if at < len(each) - 1 or tail == ("out",) else ""
        return "down" if module[at] == "output" else ""
    if tail == ("mlp",) and at < len(each) - 1:
        return "fc1" if module[at].lower() == "intermediate" else "down" if raw == "c_proj" else ""
    if in_mlp and not in_attn and raw == "c_proj":
        return "down"
    if tail == ("fc",) and AXIS not in module and not in_attn and not in_mlp:
        return "head"
    return _outer_role(tail, around)


def _plain_role(raw: str, tail: tuple[str, ...], siblings: frozenset[str]) -> str:
    known = vocabulary()
    if raw in known.fused or raw in known.fused_unordered or "".join(tail) in known.fused:
        return "fused"
    if raw in known.gated:
        gated = {"w1", "w2", "w3"} <= siblings
        return known.gated[raw] if gated else {"w1": "fc1", "w2": "down"}.get(raw, "")
    if raw in known.numbered:
        return {"1": "fc1", "2": "down"}[known.numbered[raw]]
    return ""


def _norm_role(name: str, tail: tuple[str, ...], siblings: frozenset[str]) -> str:
    """Which of a block's norms it is, counted from its beginning, as far as the name says so."""
    for part in ("q", "k", "v"):
        if part in tail:
            return part + " norm"
    known = vocabulary()
    if name in known.norms:
        return "norm " + known.norms[name]
    words = set(tail)
    if any(word.startswith("after ") for word in tail):
        # The norm after attention is the second one where the first is before it, and the feed-forward has none of its own.
        return (
            "norm 2"
            if name in known.second_norms and siblings & known.first_norms and not siblings & known.other_norms
            else "norm"
        )
    if words & {"1", "before", "input", "pre"} and not words & {"attn", "mlp"}:
        return "norm 1"
    if words & {"2", "after"} and "attn" not in words:
        return "norm 2"
    return "norm 3" if "3" in words else "norm"


def _outer_role(tail: tuple[str, ...], around: set[str]) -> str:
    words = set(tail)
    if {"cls", "token"} <= words:
        return "cls token"
    if "patch" in words and "embed" in around:
        return "patch embed"
    if {"pos", "embed"} <= words:
        return "pos embed"
    if {"token", "embed"} <= words:
        return "token embed"
    if "head" in words:
        return "head"
    return ""
