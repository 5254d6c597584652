"""What names and shapes leave open, tried out: of the ways that fit, the one that gives the right output."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from math import prod
from typing import NamedTuple

from statedict.aligning.alignment import AMBIGUOUS, PROVEN, UNDECIDABLE, Mapped
from statedict.keys import template
from statedict.knowledge import vocabulary

__all__ = ["Decided", "decide"]

# Ways that are tried at most: each is a run of the model.
_MOST = 256
# Rows of a head, at least.
_SMALLEST_HEAD = 4

Ways = Sequence[Mapped]  # all that one tensor may be


class Decided(NamedTuple):
    """The entries that a probe decided, of how many ways, and of how many of these the output is right."""

    entries: tuple[Mapped, ...]
    tried: int
    right: int


def decide(
    open_entries: Sequence[Mapped],
    shapes: dict[str, tuple[int, ...]],
    is_right: Callable[[Sequence[Mapped]], bool],
) -> Decided:
    """Tries the ways of all open tensors together; each template, or each kind of question, is decided alike in all layers.

    ``shapes`` are those of the target. Where exactly one combination is right, its entries are proven.
    """
    tensors = {entry.target: _ways(entry, shapes.get(entry.target, ())) for entry in open_entries}
    tensors = {key: ways for key, ways in tensors.items() if len(ways) > 1}
    if not tensors:
        return Decided((), 0, 0)
    by_key = {entry.target: entry for entry in open_entries}
    best = Decided((), 0, 0)
    for form in (_kind_of_question, _template):
        groups: dict[object, list[str]] = {}
        for key in tensors:
            groups.setdefault(form(by_key[key]), []).append(key)
        counts = [min(len(tensors[key]) for key in keys) for keys in groups.values()]
        if prod(counts) > _MOST:
            continue
        right = []
        for choice in product(*[range(count) for count in counts]):
            made = [tensors[key][at] for keys, at in zip(groups.values(), choice) for key in keys]
            if is_right(made):
                right.append(made)
        best = Decided(
            tuple(_proven(each, prod(counts)) for each in right[0]) if len(right) == 1 else (), prod(counts), len(right)
        )
        if right:
            break
    return best


def _proven(entry: Mapped, tried: int) -> Mapped:
    return entry._replace(
        tier=PROVEN,
        reasons=(f"of {tried} ways this one alone gives the expected output",),
        alternatives=(),
        question="",
    )


def _template(entry: Mapped) -> object:
    return template(entry.target)[0]


def _kind_of_question(entry: Mapped) -> object:
    """The question without the names of tensors in it, which have dots, and without numbers."""
    return re.sub(r"\S*\.\S*\w|\d+", "…", entry.question)


def _ways(entry: Mapped, shape: tuple[int, ...]) -> list[Mapped]:
    """All that the tensor may be, none twice."""
    if entry.tier == AMBIGUOUS:
        sources = dict.fromkeys([*([entry.sources] if entry.sources else []), *entry.alternatives])
        return [entry._replace(sources=keys) for keys in sources]
    if entry.tier != UNDECIDABLE or entry.op not in ("copy", "transpose", "permute") or not entry.sources:
        return []
    if _is_rotary(entry):
        return list(_turned(entry, shape))
    square = len(shape) == 2 and shape[0] == shape[1]
    return [entry._replace(op="copy", args={}), entry._replace(op="transpose", args={"dims": [1, 0]})] if square else []


def _is_rotary(entry: Mapped) -> bool:
    words = vocabulary()
    names = {part for key in (entry.target, *entry.sources) for part in key.split(".")}
    return bool(names & words.rotary_interleaved) and bool(names & words.rotary_halves)


def _turned(entry: Mapped, shape: tuple[int, ...]) -> Iterator[Mapped]:
    """Its rows as they are, and for each number of rows that a head may have, from pairs to halves and back."""
    yield entry._replace(op="copy", args={})
    rows = shape[0]
    for head in range(_SMALLEST_HEAD, rows + 1, 2):
        if rows % head == 0:
            for view in ([rows // head, head // 2, 2], [rows // head, 2, head // 2]):
                yield entry._replace(op="permute", args={"dim": 0, "view": view, "order": [0, 2, 1]})
