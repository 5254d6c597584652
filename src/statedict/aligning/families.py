"""Keys that differ in the numbers of lists alone, as one family: what is found for it holds for all its layers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import NamedTuple

from statedict.aligning.alignment import Spec
from statedict.aligning.lists import Forest, Path
from statedict.aligning.naming import Meaning, meaning

__all__ = ["Family", "Signature", "Unit", "signature_of", "units"]

Index = tuple[int, ...]
Signature = tuple[tuple[int, ...], str, int, int, frozenset[tuple[int, ...]]]


class Family(NamedTuple):
    """The tensors of one template, in the order of their indices.

    ``places`` are their places in the lists of the template, counted from 0 whatever the names count from; lists of one are left out.
    Families of equal ``signature`` have, but for a collision of hashes, the same lists, the same members in them, and the same shape
    for each; ``aligns`` and equal shapes say it for certain.
    """

    path: Path
    leaf: str
    keys: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    places: tuple[Index, ...]
    lengths: tuple[int, ...]
    kind: str
    first: int
    signature: Signature

    @property
    def numel(self) -> int:
        return sum(_product(shape) for shape in self.shapes)

    def aligns(self, other: Family) -> bool:
        """Whether both have the same members in lists of the same lengths."""
        return self.lengths == other.lengths and self.places == other.places and self.kind == other.kind


class Unit(NamedTuple):
    """What is aligned in one piece: a module with all its tensors, or one tensor of it."""

    path: Path
    meaning: Meaning
    leaves: tuple[Family, ...]

    @property
    def place(self) -> int:
        return min(leaf.first for leaf in self.leaves)

    @property
    def signature(self) -> tuple[object, ...]:
        return tuple((leaf.leaf, leaf.signature) for leaf in self.leaves)


def _kind(spec: Spec) -> str:
    """``real`` for numbers with a fraction, which are weights; ``whole`` for counters, masks and tables of indices."""
    return "whole" if spec.dtype.startswith(("int", "uint", "bool")) else "real"


def units(trees: Forest, keys: Iterable[str], *, whole: bool) -> list[Unit]:
    """The units of some keys: modules, or each leaf by itself."""
    grouped: dict[tuple[Path, str], list[str]] = defaultdict(list)
    for key in keys:
        grouped[trees.paths[key], trees.spots[key].leaf].append(key)
    modules: dict[Path, list[Family]] = defaultdict(list)
    for (path, leaf), members in grouped.items():
        entire = len(members) == len(trees.members[path, leaf])
        known: Family | None = trees.families.get((path, leaf)) if entire else None
        family = known or _family(trees, path, leaf, members)
        if entire:
            trees.families[path, leaf] = family
        modules[path].append(family)
    found = []
    for path, leaves in modules.items():
        said = meaning(path, trees.beside.get(path[:-1], frozenset()))
        leaves.sort(key=lambda leaf: leaf.leaf)
        groups = [tuple(leaves)] if whole else [(leaf,) for leaf in leaves]
        found += [Unit(path, said, group) for group in groups]
    return found


def _family(trees: Forest, path: Path, leaf: str, keys: list[str]) -> Family:
    lists = [name for name, _ in trees.indices[keys[0]]]
    long = [at for at, name in enumerate(lists) if len(trees.ranks[name]) > 1]
    placed = sorted(
        (
            tuple(trees.ranks[lists[at]][trees.indices[key][at][1]] for at in long),
            tuple(n for _, n in trees.indices[key]),
            key,
        )
        for key in keys
    )
    specs = [trees.side.tensors[key] for _, _, key in placed]
    shapes = tuple(spec.shape for spec in specs)
    places = tuple(place for place, _, _ in placed)
    lengths = tuple(len(trees.ranks[lists[at]]) for at in long)
    kind = "".join(sorted({_kind(spec) for spec in specs}))
    return Family(
        path,
        leaf,
        tuple(key for _, _, key in placed),
        shapes,
        places,
        lengths,
        kind,
        min(trees.places[key] for key in keys),
        signature_of(lengths, kind, places, shapes),
    )


def signature_of(
    lengths: tuple[int, ...], kind: str, places: tuple[Index, ...], shapes: tuple[tuple[int, ...], ...]
) -> Signature:
    """What is equal for families that have the same members with the same shapes; quickly compared."""
    return (lengths, kind, hash(places), hash(shapes), frozenset(shapes))


def _product(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total
