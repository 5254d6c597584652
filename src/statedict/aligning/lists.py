"""The lists in the names of a side: which numbers are an index, and which are part of a name."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from statedict.aligning.alignment import Side
from statedict.aligning.naming import AXIS, Spot, spot, stem_and_number
from statedict.knowledge import vocabulary

__all__ = ["Forest", "Grain", "Names", "Path", "forest", "names_of"]

Path = tuple[str, ...]


class Names(NamedTuple):
    """The names of one side, taken apart once: each key's spot, and what follows each component of its module.

    In ``endings`` numbers are left out.
    """

    side: Side
    spots: Mapping[str, Spot]
    endings: Mapping[str, tuple[str, ...]]
    rests: Mapping[str, tuple[str, ...]]


class Forest(NamedTuple):
    """The names of one side with the lists in them found.

    ``paths`` and ``indices``: each key's template without its leaf, and its numbers in the lists that this is in. ``ranks``: of the
    numbers of each list. ``blocks``: lists whose members hold several modules. ``beside``: names in a module that change what others in
    it mean. ``members``: the keys of each template and leaf; ``families``: what ``units`` has made of all of them.
    """

    spots: Mapping[str, Spot]
    paths: Mapping[str, Path]
    indices: Mapping[str, tuple[tuple[Path, int], ...]]
    ranks: Mapping[Path, Mapping[int, int]]
    places: Mapping[str, int]
    blocks: frozenset[Path]
    beside: Mapping[Path, frozenset[str]]
    members: Mapping[tuple[Path, str], Sequence[str]]
    side: Side
    families: dict[tuple[Path, str], Any]


class Grain(NamedTuple):
    """How many modules the members of a list must hold for their numbers to be an index; in fewer, a number is part of the name.

    ``whole``: of components that are numbers (``blocks.0``); ``named``: of names that end in one (``layer1``), 0 for never.
    """

    whole: int
    named: int


def names_of(side: Side) -> Names:
    """The names of a side taken apart."""
    spots = {key: spot(key) for key in side.tensors}
    endings, rests = {}, {}
    for key, found in spots.items():
        bare = tuple(AXIS if part.isdigit() else part for part in found.module)
        rests[key] = _rests(found.module)
        endings[key] = rests[key] if bare == found.module else _rests(bare)
    return Names(side, spots, endings, rests)


def _rests(parts: Path) -> tuple[str, ...]:
    return tuple([sys.intern(".".join(parts[at:])) for at in range(1, len(parts) + 1)])


def forest(names: Names, grain: Grain) -> Forest:
    """The lists of a side."""
    growth = _Growth(dict.fromkeys(names.spots, ()), dict.fromkeys(names.spots, ()))
    groups: list[tuple[Path, list[str]]] = [((), list(names.spots))]
    while groups:
        groups = [below for parent, keys in groups for below in _descend(names, grain, parent, keys, growth)]
    paths, indices = growth
    values: dict[Path, set[int]] = defaultdict(set)
    inner: dict[Path, set[Path]] = defaultdict(set)
    for key, found in indices.items():
        for path, number in found:
            values[path].add(number)
            inner[path].add(paths[key])
    members: dict[tuple[Path, str], list[str]] = defaultdict(list)
    for key, path in paths.items():
        members[path, names.spots[key].leaf].append(key)
    known = vocabulary().neighbours
    beside: dict[Path, set[str]] = defaultdict(set)
    for path, _leaf in members:
        if path and path[-1] in known:
            beside[path[:-1]].add(path[-1])
    return Forest(
        names.spots,
        paths,
        indices,
        {path: {number: rank for rank, number in enumerate(sorted(found))} for path, found in values.items()},
        {key: place for place, key in enumerate(names.spots)},
        frozenset(path for path, below in inner.items() if len(below) > 1),
        {path: frozenset(found) for path, found in beside.items()},
        members,
        names.side,
        {},
    )


class _Growth(NamedTuple):
    """Templates and numbers of the keys, as far as they were taken."""

    paths: dict[str, Path]
    indices: dict[str, tuple[tuple[Path, int], ...]]


def _descend(
    names: Names, grain: Grain, parent: Path, keys: list[str], growth: _Growth
) -> list[tuple[Path, list[str]]]:
    """Takes the keys of a part of the tree one component further. Gives those that have more, by their new templates."""
    depth = len(parent)
    inner: dict[str, set[str]] = defaultdict(set)
    modules: dict[str, set[str]] = defaultdict(set)
    for key in keys:
        part = names.spots[key].module[depth]
        inner[part].add(names.endings[key][depth])
        modules[part].add(names.rests[key][depth])
    pooled = _pooled(inner, {part: len(found) for part, found in modules.items()}, grain)
    steps: dict[str, tuple[Path, tuple[Path, int] | None]] = {}
    for part in inner:
        token, number = pooled.get(part, (part, None))
        steps[part] = ((*parent, token), None if number is None else ((*parent, token), number))
    below: dict[Path, list[str]] = defaultdict(list)
    for key in keys:
        module = names.spots[key].module
        path, index = steps[module[depth]]
        growth.paths[key] = path
        if index:
            growth.indices[key] = (*growth.indices[key], index)
        if len(module) > depth + 1:
            below[path].append(key)
    return list(below.items())


def _pooled(inner: Mapping[str, set[str]], modules: Mapping[str, int], grain: Grain) -> dict[str, tuple[str, int]]:
    """Which of the components that stand beside each other are numbers of a list: what stands for them, and the number.

    ``inner`` has for each component what follows it in the names, ``modules`` how many modules it holds.
    """
    found: dict[str, tuple[str, int]] = {}
    stems: dict[str, list[tuple[str, int]]] = defaultdict(list)
    whole = [part for part in inner if part.isdigit() and len(part) < 10]
    if whole and any(modules[part] >= grain.whole for part in whole) and _overlap([inner[part] for part in whole]):
        found = {part: (AXIS, int(part)) for part in whole}
    for part in inner if grain.named else ():
        named = None if part.isdigit() else stem_and_number(part)
        if named:
            stems[named[0]].append((part, named[1]))
    for stem, parts in stems.items():
        sets = [inner[part] for part, _ in parts]
        if len(parts) > 1 and all(modules[part] >= grain.named for part, _ in parts) and _alike(sets):
            found |= {part: (stem + AXIS, number) for part, number in parts}
    return found


def _overlap(sets: list[set[str]]) -> bool:
    """Whether some have something in common; members of a sequence of different things haven't."""
    return len(sets) == 1 or len(set().union(*sets)) < sum(map(len, sets))


def _alike(sets: list[set[str]]) -> bool:
    """Whether most have most of what any has."""
    union = set().union(*sets)
    return all(2 * len(each) >= len(union) for each in sets)
