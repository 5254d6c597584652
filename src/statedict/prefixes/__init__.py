"""The search for the rules that make a state dict fit a model, by names and shapes alone: what ``rules="auto"`` does.

Three things keep names apart that belong together, in any number and order:

- where the weights stand: under a key of a training checkpoint, or under the name that a larger model has for them
- wrappers, each of which puts a component of its own into the keys below it (``WRAPPERS``), on either side
- the name of a larger model in front of all keys of the target

A source key votes: wherever what is left of it behind a dot is a key of the target with the same shape, it votes for the prefix
before that dot. The prefix with most votes is the repair, if they are more than the names that fit as they are. That is linear
in the number of keys. Wrappers are looked through on both sides first; those that the result doesn't need are then put
back, so that a module that is really called ``module`` stays. Nothing is guessed: where several parts of the source fit
equally well, the result names them and has no rules.
"""

from __future__ import annotations

import re
from collections.abc import Collection

from statedict.keys import Path, dotted
from statedict.manifest import Container, Node
from statedict.nodes import components
from statedict.prefixes.repairs import Repair, built
from statedict.prefixes.search import Search, Shapes
from statedict.prefixes.wrappers import WRAPPERS, Wrappers, in_source, in_target
from statedict.rules import Rules

__all__ = ["WRAPPERS", "Repair", "containers_of", "find_repair"]

# Words that say of a part that it holds averages of the weights.
_AVERAGES = {"averaged", "average", "avg", "ema", "polyak", "shadow", "swa"}
_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+")


def find_repair(source: Shapes, target: Shapes, *, containers: Collection[str] = ()) -> Repair | None:
    """The lossless rules by which most tensors of the source fit the target in name and shape.

    Both are shapes by dotted key; ``containers`` are the keys of the containers that the source is nested in
    (``containers_of``), so that a part of a training checkpoint can be told from a prefix of flat keys.
    None if no rules make more of the names fit than already do, or if those that would look like chance.
    """
    plain = sum(1 for key, shape in source.items() if target.get(key) == shape)
    if plain == min(len(source), len(target)):
        return None
    search = Search(source, target, containers)
    everything = Wrappers(in_source(source, search.starts), in_target(target))
    votes = search.votes(everything)
    pairs = [pair for pair in votes.best() if len(votes.keys[pair]) > plain and search.is_likely(pair, votes)]
    pairs = [pair for pair in pairs if not pair[0]] or pairs
    averages = [pair for pair in pairs if _is_average(pair[0])]
    chosen = [pair for pair in pairs if not _is_average(pair[0])] or averages
    if not chosen:
        return None
    if len(chosen) > 1:
        names = [search.shown(pair, votes, everything) for pair in chosen]
        return Repair(Rules(), {}, plain, plain, len(target), (), tuple(names))
    keys = votes.keys[chosen[0]]
    passed = [search.shown(pair, votes, everything) for pair in averages if pair != chosen[0]]
    notes = [f"the averaged weights under '{name}' fit as well: at={name!r} takes them instead" for name in passed]
    return built(search, *search.least(keys, everything), keys, plain, notes)


def containers_of(root: Node) -> frozenset[str]:
    """The dotted keys of all containers in a tree."""
    found: set[str] = set()
    pending: list[tuple[Path, Node]] = [((), root)]
    while pending:
        path, node = pending.pop()
        if isinstance(node, Container):
            found.add(dotted(path))
            nested = [(part, child) for part, child in zip(components(node.keys), node.children)]
            pending.extend([((*path, part), child) for part, child in nested if isinstance(child, Container)])
    return frozenset(found - {""})


def _is_average(prefix: str) -> bool:
    """Whether a part is named for the averages of weights that it holds."""
    return any(word.lower() in _AVERAGES for word in _WORD.findall(prefix))
