"""Wrappers: the components that they put into keys, where these can be told, and keys without them."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

__all__ = ["COUNTER", "WRAPPERS", "Wrappers", "in_source", "in_target", "pattern", "stripped"]

# The attribute in which each wrapper holds what it wraps. torch.compile: torch/_dynamo/eval_frame.py, OptimizedModule;
# FSDP: torch/distributed/fsdp/_common_utils.py; activation checkpointing: torch/distributed/algorithms/_checkpoint/
# checkpoint_wrapper.py; Lightning with DeepSpeed: lightning/fabric/wrappers.py; DataParallel, DDP and AveragedModel: module.
# The one that people also use for modules of their own comes last.
WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module", "module")
# The counter that an AveragedModel has beside ``module`` (torch/optim/swa_utils.py).
COUNTER = "n_averaged"


class Wrappers(NamedTuple):
    """The wrappers that are looked through in the keys of the source and of the target."""

    source: tuple[str, ...] = ()
    target: tuple[str, ...] = ()

    def without(self, word: str) -> Iterator[Wrappers]:
        """Fewer by one word: on both sides, on the source's, on the target's."""
        source = tuple(other for other in self.source if other != word)
        target = tuple(other for other in self.target if other != word)
        yield from (Wrappers(source, target), Wrappers(source, self.target), Wrappers(self.source, target))


def in_source(keys: Collection[str], starts: Mapping[str, int]) -> tuple[str, ...]:
    """Those that can be taken out of the source's keys behind where each starts; ``module`` only where it stands alone."""
    sure = [word for word in _present(keys) if word != "module" or _stands_alone(word, keys, starts)]

    def canonical(words: Sequence[str]) -> list[str]:
        found = pattern(words)
        if found is None:
            return list(keys)
        return [key[: (at := starts.get(key, 0))] + found.sub("", key[at:]) for key in keys]

    return _injective(sure, canonical)


def in_target(keys: Collection[str]) -> tuple[str, ...]:
    """Those that can be put into keys as the target has them: all that is in the module of a wrapper is in the wrapper."""
    present = [word for word in _present(keys) if _stands_alone(word, keys, {})]
    return _injective(present, lambda words: stripped(keys, words))


def _present(keys: Iterable[str]) -> list[str]:
    text = "\n.".join(keys)
    return [word for word in WRAPPERS if f".{word}." in f".{text}"]


def _stands_alone(word: str, keys: Iterable[str], starts: Mapping[str, int]) -> bool:
    """Whether nothing stands beside a component of that name, as it is with wrappers; but for a counter of averages."""
    middle = f".{word}."
    parents: set[str] = set()
    for key in keys:
        at = f".{key}".find(middle, starts.get(key, 0))
        while at >= 0:
            parents.add(key[:at])
            at = f".{key}".find(middle, at + 1)
    names = sorted(keys)
    return all(
        _below(names, parent)
        == _below(names, f"{parent}{word}.") + _has(names, parent + word) + _has(names, parent + COUNTER)
        for parent in parents
    )


def _below(names: Sequence[str], prefix: str) -> int:
    """How many of the sorted names begin with the prefix, which is empty or ends in a dot ("/" comes next to it)."""
    return bisect_left(names, f"{prefix[:-1]}/") - bisect_left(names, prefix) if prefix else len(names)


def _has(names: Sequence[str], name: str) -> int:
    """1 if the name is among the sorted ones, else 0."""
    at = bisect_left(names, name)
    return int(names[at : at + 1] == [name])


def _injective(words: Sequence[str], canonical: Callable[[Sequence[str]], Collection[str]]) -> tuple[str, ...]:
    """Those of the words that can be taken out together, so that all keys stay different."""

    def is_injective(tried: Sequence[str]) -> bool:
        names = canonical(tried)
        return len(set(names)) == len(names)

    if is_injective(words):
        return tuple(words)
    found: tuple[str, ...] = ()
    for word in words:
        found = (*found, word) if is_injective((*found, word)) else found
    return found


def pattern(words: Iterable[str]) -> re.Pattern[str] | None:
    """What finds those components in a key, but for the last one, which names a tensor; None if there are none."""
    shown = "|".join(map(re.escape, words))
    return re.compile(rf"(?<![^.])(?:{shown})\.") if shown else None


def stripped(keys: Iterable[str], words: Sequence[str]) -> list[str]:
    """The keys without those components, but for the last one of each."""
    found = pattern(words)
    return [found.sub("", key) for key in keys] if found is not None else list(keys)
