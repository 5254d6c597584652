"""The votes: which prefixes of the source, and which of the target, make most names fit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import NamedTuple

from statedict.prefixes.wrappers import COUNTER, WRAPPERS, Wrappers, pattern, stripped

__all__ = ["Pair", "Search", "Shapes", "Votes"]

# Leading components of a source key that can be a prefix, and of all target keys. Real ones have fewer than six.
_MOST_LEADING = 24
_MOST_TARGET = 6

Shapes = Mapping[str, tuple[int, ...]]
# A prefix that source keys lose, and one that they then get; both empty or with their dot.
Pair = tuple[str, str]


class Votes(NamedTuple):
    """The source keys that fit for each pair of a source prefix and a target prefix, and how many have the name alone."""

    keys: dict[Pair, list[str]]
    named: Counter[Pair]

    def best(self) -> list[Pair]:
        """The pairs with most votes, one for the same keys: that with the shortest prefixes."""
        most = max(map(len, self.keys.values()), default=0)
        pairs = [pair for pair, keys in self.keys.items() if len(keys) == most]
        pairs.sort(key=_length)
        if len(pairs) == 1:
            return pairs
        found: dict[tuple[str, ...], Pair] = {}
        for pair in pairs:
            found.setdefault(tuple(self.keys[pair]), pair)
        return list(found.values())


class Search:
    """The two sides, and what is asked about them more than once."""

    def __init__(self, source: Shapes, target: Shapes, containers: Collection[str]) -> None:
        self.source = source
        self.target = target
        self.containers = containers = frozenset(containers)
        self._targets: dict[tuple[str, ...], dict[str, tuple[int, ...]]] = {}
        # Where the flat key begins in each source key. Containers are no wrappers: select goes through them.
        self.starts = {key: len(next(_above(key, containers), "")) for key in source} if containers else {}
        # The source keys in each container.
        self._sizes = Counter(prefix[:-1] for key in self.starts for prefix in _above(key, containers))

    def canonical_source(self, words: Sequence[str]) -> Iterator[tuple[str, str]]:
        """Each source key with its canonical form: without those components, but where they name containers."""
        found, starts = pattern(words), self.starts
        for key in self.source:
            at = starts.get(key, 0)
            yield key, key[:at] + found.sub("", key[at:]) if found else key

    def canonical_target(self, words: tuple[str, ...]) -> dict[str, tuple[int, ...]]:
        """The shapes of the target by its keys without those components."""
        if words not in self._targets:
            self._targets[words] = dict(zip(stripped(self.target, words), self.target.values()))
        return self._targets[words]

    def votes(self, wrappers: Wrappers) -> Votes:
        """Each source key's votes, with those wrappers taken out of both sides."""
        shapes = self.canonical_target(wrappers.target)
        rests = _rests(shapes)
        keys: dict[Pair, list[str]] = {}
        named: Counter[Pair] = Counter()
        for key, name in self.canonical_source(wrappers.source):
            shape = self.source[key]
            for rest, prefix in _ways(name, rests):
                wanted = shapes.get(prefix + rest)
                if wanted is not None:
                    pair = (name[: len(name) - len(rest)], prefix)
                    named[pair] += 1
                    if wanted == shape:
                        keys.setdefault(pair, []).append(key)
        return Votes(keys, named)

    def is_likely(self, pair: Pair, votes: Votes) -> bool:
        """Whether at least half of the target, or of the part of the source, has the names: a few may be chance."""
        container = self.container(pair[0])
        size = self._sizes[container] if container else len(self.source)
        return 2 * votes.named[pair] >= min(len(self.target), size)

    def least(self, keys: Sequence[str], wrappers: Wrappers) -> tuple[Wrappers, Pair]:
        """The fewest wrappers with which the same keys fit, and the prefixes with them."""
        pair = self._pair(keys, Wrappers())
        if pair is not None:
            return Wrappers(), pair
        pair = self._pair(keys, wrappers)
        for word in reversed(WRAPPERS):
            for tried in wrappers.without(word):
                found = self._pair(keys, tried) if tried != wrappers else None
                if found is not None:
                    wrappers, pair = tried, found
                    break
        assert pair is not None
        return wrappers, pair

    def _pair(self, keys: Sequence[str], wrappers: Wrappers) -> Pair | None:
        """The prefixes with which all these keys fit, if there are any: those of the first, as long as the others agree."""
        shapes = self.canonical_target(wrappers.target)
        found, starts = pattern(wrappers.source), self.starts
        pairs: list[Pair] | None = None
        for key in keys:
            at = starts.get(key, 0)
            name = key[:at] + found.sub("", key[at:]) if found else key
            if pairs is None:
                ways = _ways(name, _rests(shapes))
                pairs = [(name[: len(name) - len(rest)], prefix) for rest, prefix in ways]
            shape = self.source[key]
            pairs = [
                pair
                for pair in pairs
                if name.startswith(pair[0]) and shapes.get(pair[1] + name[len(pair[0]) :]) == shape
            ]
            if not pairs:
                return None
        return min(pairs or (), key=_length, default=None)

    def shown(self, pair: Pair, votes: Votes, wrappers: Wrappers) -> str:
        """The key that a part has in the source, wrappers and all: the shortest one."""
        key = votes.keys[pair][0]
        start = self.starts.get(key, 0)
        at = min(start, len(pair[0]))
        while key[: min(at, start)] + _without_all(key[min(at, start) : at], wrappers.source) != pair[0]:
            at = key.index(".", at) + 1
        return key[:at].removesuffix(".")

    def container(self, prefix: str) -> str:
        """The deepest container that the prefix leads through; empty if there is none."""
        return next(_above(prefix, self.containers), "")[:-1]

    def part(self, container: str) -> list[str]:
        """The source keys in a container; all where it is empty."""
        return [key for key in self.source if key.startswith(f"{container}.")] if container else list(self.source)


def _above(key: str, containers: Collection[str]) -> Iterator[str]:
    """The containers that a key stands in, each with its dot, the deepest first."""
    at = key.rfind(".") if containers else -1
    while at > 0:
        if key[:at] in containers:
            yield key[: at + 1]
        at = key.rfind(".", 0, at)


def _without_all(prefix: str, words: Sequence[str]) -> str:
    return "".join([f"{word}." for word in prefix.split(".")[:-1] if word not in words])


def _length(pair: Pair) -> tuple[int, int]:
    """How much a pair of prefixes takes away and adds."""
    return pair[0].count(".") + pair[1].count("."), pair[1].count(".")


def _rests(names: Collection[str]) -> dict[int, list[str]]:
    """The prefixes to try with what is left of a source key, by the dots in it: keys of the target have few lengths."""
    depths = {name.count(".") for name in names}
    found: dict[int, list[str]] = {}
    for prefix in ("", *_leading(names)):
        for depth in depths:
            if depth >= prefix.count("."):
                found.setdefault(depth - prefix.count("."), []).append(prefix)
    return found


def _ways(name: str, rests: Mapping[int, Sequence[str]]) -> Iterator[tuple[str, str]]:
    """What may be left of a source key, each with a prefix of the target to put before it."""
    dots = name.count(".")
    for depth, prefixes in rests.items():
        if 0 <= dots - depth <= _MOST_LEADING:
            rest = name.split(".", dots - depth)[-1]
            for prefix in prefixes:
                yield rest, prefix


def _leading(names: Collection[str]) -> Iterator[str]:
    """The prefixes that all names have, each with its dot; the counter of an AveragedModel stands beside them."""
    rest = [name for name in names if name != COUNTER]
    first, last = min(rest, default=""), max(rest, default="")  # what these two share, all share
    at = first.find(".") + 1
    for _ in range(_MOST_TARGET):
        if not at or not last.startswith(first[:at]):
            break
        yield first[:at]
        at = first.find(".", at) + 1
