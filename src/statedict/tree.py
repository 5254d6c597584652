"""What many keys have in common: equal siblings folded once with a count, and the tree of keys with its totals.

The keys of a network repeat: ``layers.0.mlp.weight``, ``layers.1.mlp.weight`` … Keys whose numbers alone differ, and whose
facts (shape, dtype …) agree, become one line: ``layers.{0…31}.mlp.weight``. A folded line stands for exactly the keys
that its ranges multiply to. Everything here is linear in the number of keys.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable, Iterator, Sequence
from itertools import product
from typing import NamedTuple

from statedict.keys import template

__all__ = ["Branch", "Group", "Leaf", "branches", "fold", "ranges"]

# Numbers that vary in one key. Real keys have three (block, layer, expert); more is left unfolded.
_MOST_VARYING = 8
# Components of a key that become levels of the tree; the rest stays in one name. Real keys have fewer than 20.
_MOST_LEVELS = 64
# Runs and numbers that a range lists before it leaves out its middle.
_MOST_RUNS = 6


class Group(NamedTuple):
    """Keys folded into one: how they are written together, and the positions of their rows, ascending."""

    key: str
    members: tuple[int, ...]

    @property
    def times(self) -> int:
        """Rows that the group stands for."""
        return len(self.members)


def fold(rows: Iterable[tuple[str, Hashable]]) -> list[Group]:
    """The rows (a key, and facts that must agree) folded, in the order of their first keys.

    A group with one member has that key. Keys that differ in numbers alone stay together: an exception follows the rest.
    Rows that share a key are never folded.
    """
    alike: dict[tuple[str, int, Hashable], list[tuple[tuple[int, ...], int]]] = {}
    keys: list[str] = []
    order: list[int] = []
    first: dict[tuple[str, int], int] = {}
    for at, (key, facts) in enumerate(rows):
        # A key with a brace of its own could be taken for another's template: it stays as it is.
        name, numbers = (key, ()) if "{" in key else template(key)
        keys.append(key)
        order.append(first.setdefault((name, len(numbers)), at))
        alike.setdefault((name, len(numbers), facts), []).append((numbers, at))
    groups: list[Group] = []
    for (name, count, _), members in alike.items():
        if len(members) == 1 or not count:
            groups.extend(Group(keys[at], (at,)) for _, at in members)
        else:
            groups.extend(_folded(name, members, keys))
    groups.sort(key=lambda group: (order[group.members[0]], group.members[0]))
    return groups


def _folded(name: str, members: Sequence[tuple[tuple[int, ...], int]], keys: Sequence[str]) -> Iterator[Group]:
    """The members of one template as boxes of ranges: each box is the product of one set of numbers per position."""
    columns = list(zip(*[numbers for numbers, _ in members]))
    varying = [at for at, column in enumerate(columns) if len(set(column)) > 1]
    rows = {tuple([numbers[at] for at in varying]): row for numbers, row in members}
    if len(rows) < len(members) or len(varying) > _MOST_VARYING:
        yield from (Group(keys[row], (row,)) for _, row in members)
        return
    pieces = name.split("{}")
    for box in _boxes(rows):
        found = sorted([rows[numbers] for numbers in product(*box)])
        if len(found) == 1:
            yield Group(keys[found[0]], tuple(found))
            continue
        shown = [str(column[0]) for column in columns]
        for at, numbers in zip(varying, box):
            shown[at] = ranges(numbers)
        text = "".join([piece + number for piece, number in zip(pieces, shown)]) + pieces[-1]
        yield Group(text, tuple(found))


def _boxes(rows: Collection[tuple[int, ...]]) -> list[tuple[tuple[int, ...], ...]]:
    """The tuples as disjoint products of sets: first numbers with the same rests belong together."""
    first = next(iter(rows))
    if len(first) == 1:
        return [(tuple(sorted([row[0] for row in rows])),)]
    rests: dict[int, list[tuple[int, ...]]] = {}
    for row in rows:
        rests.setdefault(row[0], []).append(row[1:])
    same: dict[frozenset[tuple[int, ...]], list[int]] = {}
    for number, rest in rests.items():
        same.setdefault(frozenset(rest), []).append(number)
    return [(tuple(sorted(numbers)), *box) for rest, numbers in same.items() for box in _boxes(rest)]


def ranges(numbers: Iterable[int]) -> str:
    """Ascending numbers as people write them: ``{0…31}``, ``{0,2,5}``, ``{0…3,7}``; one alone is itself."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    if len(runs) == 1 and runs[0][0] == runs[0][1]:
        return str(runs[0][0])
    pieces = [piece for low, high in runs for piece in _run(low, high)]
    if len(pieces) > _MOST_RUNS:
        pieces = [*pieces[:3], "…", pieces[-1]]
    return "{" + ",".join(pieces) + "}"


def _run(low: int, high: int) -> list[str]:
    if high - low < 2:
        return [str(number) for number in range(low, high + 1)]
    return [f"{low}…{high}"]


class Leaf(NamedTuple):
    """A tensor as the tree sees it: its key, facts that make it equal to others, its elements and bytes."""

    key: str
    facts: Hashable
    numel: int
    nbytes: int


class Branch(NamedTuple):
    """One line of the tree. The totals are of all copies: of a folded branch, and of the branches that it stands in."""

    rails: str  # the lines that lead to it: "│  ├─ "
    label: str
    facts: Hashable | None  # of the tensor of that very key; None where there is none
    copies: int  # that its label stands for: 32 in ``layers.{0…31}``
    tensors: int
    numel: int
    nbytes: int


class _Node:
    """One component of the keys, with the totals of what is below it."""

    __slots__ = ("children", "facts", "nbytes", "numel", "signature", "tensors")

    def __init__(self) -> None:
        self.children: dict[str, _Node] = {}
        self.facts: Hashable | None = None
        self.tensors = 0
        self.numel = 0
        self.nbytes = 0
        self.signature = 0


def branches(leaves: Iterable[Leaf]) -> list[Branch]:
    """The tree of the keys from the top, in the order of the keys; names that stand alone share a line.

    Numbered siblings with the same content are one branch, ``layers.{0…31}``.
    """
    root = _Node()
    for leaf in leaves:
        _insert(root, leaf)
    _sign(root, {})
    out: list[Branch] = []
    _emit(root, 1, "", out)
    return out


def _insert(root: _Node, leaf: Leaf) -> None:
    node = root
    for name in leaf.key.split(".", _MOST_LEVELS):
        child = node.children.get(name)
        if child is None:
            child = node.children[name] = _Node()
        node = child
        node.tensors += 1
        node.numel += leaf.numel
        node.nbytes += leaf.nbytes
    node.facts = leaf.facts


def _sign(node: _Node, known: dict[Hashable, int]) -> int:
    """Gives nodes with the same content the same number. The depth is bounded by ``_MOST_LEVELS``."""
    below = tuple([(name, _sign(child, known)) for name, child in node.children.items()])
    node.signature = known.setdefault((node.facts, below), len(known))
    return node.signature


def _siblings(node: _Node) -> list[tuple[str, _Node, int]]:
    """The children: label, the node that shows what is below, and how many are folded in it."""
    out: list[tuple[list[int] | str, _Node]] = []
    folded: dict[int, list[int]] = {}
    for name, child in node.children.items():
        if not (name.isascii() and name.isdigit() and len(name) < 10) or (name[0] == "0" and name != "0"):
            out.append((name, child))
        elif child.signature in folded:
            folded[child.signature].append(int(name))
        else:
            folded[child.signature] = numbers = [int(name)]
            out.append((numbers, child))
    return [
        (name, child, 1) if isinstance(name, str) else (ranges(sorted(name)), child, len(name)) for name, child in out
    ]


def _emit(node: _Node, copies: int, rails: str, out: list[Branch], top: bool = True) -> None:
    siblings = _siblings(node)
    for at, (label, child, count) in enumerate(siblings):
        last = at == len(siblings) - 1
        while child.facts is None and len(only := _siblings(child)) == 1:
            name, child, more = only[0]
            label, count = f"{label}.{name}", count * more
        times = copies * count
        here = "" if top else rails + ("└─ " if last else "├─ ")
        below = "" if top else rails + ("   " if last else "│  ")
        out.append(
            Branch(here, label, child.facts, count, child.tensors * times, child.numel * times, child.nbytes * times)
        )
        _emit(child, times, below, out, top=False)
