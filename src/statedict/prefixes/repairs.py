"""A repair: the rules that were found, what they do to each name, and the words to type."""

from __future__ import annotations

import glob
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from statedict.errors import one_line
from statedict.prefixes.search import Pair, Search
from statedict.prefixes.wrappers import COUNTER, Wrappers, stripped
from statedict.rules import Rule, Rules, add_prefix, add_wrapper, drop, select, strip_prefix, strip_wrapper

__all__ = ["Repair", "built"]


class Repair(NamedTuple):
    """Rules that make more of the names fit, or the parts among which one must be chosen.

    ``names`` are the target's names by source key, for every source key in the part that the rules are about: those that
    the target doesn't have are among them. ``matches`` of ``wanted`` keys of the target then have a source of the same shape;
    by plain names it were ``plain``. ``notes`` say what was left out or passed over. Where several parts fit equally well,
    ``candidates`` are their keys, and there are no rules and no names.
    """

    rules: Rules
    names: Mapping[str, str]
    matches: int
    plain: int
    wanted: int
    notes: tuple[str, ...] = ()
    candidates: tuple[str, ...] = ()

    @property
    def is_ambiguous(self) -> bool:
        """Whether several parts of the source fit equally well."""
        return bool(self.candidates)

    @property
    def words(self) -> str:
        """What to type: ``at='model_state_dict'`` where that is all, else ``rules="auto"``."""
        if self.candidates:
            return f"at={self.candidates[0]!r}"
        if len(self.rules) == 1 and self.rules[0].name == "select":
            return f"at={self.rules[0].arguments[0]!r}"
        return 'rules="auto"'

    @property
    def advice(self) -> str:
        """The repair in one sentence, with the words to type."""
        if self.candidates:
            shown = ", ".join(f"'{one_line(key)}'" for key in self.candidates[:6])
            return f"Several parts of it fit equally well ({shown}): say which, as in {one_line(self.words)}"
        fits = f"{self.matches} of {self.wanted} tensors fit with {one_line(self.rules)}"
        return f"{fits}: pass {one_line(self.words)}"


def built(
    search: Search, wrappers: Wrappers, pair: Pair, keys: Sequence[str], plain: int, notes: list[str]
) -> Repair | None:
    """The rules, once it is sure that they do what the votes promised: no two keys with one name, and more that fit."""
    container = search.container(pair[0])
    part = search.part(container)
    rules: list[Rule] = [select(container)] if container else []
    for counter in _counters(search, part, keys):
        rules.append(drop(glob.escape(counter[len(container) + 1 if container else 0 :])))
        notes = [*notes, f"'{counter}', the counter of an AveragedModel, is left out"]
    rules += [strip_wrapper(word) for word in wrappers.source]
    prefix = pair[0][len(container) + 1 :] if container else pair[0]
    rules += [strip_prefix(prefix)] if prefix else []
    rules += [add_prefix(pair[1])] if pair[1] else []
    rules += _wrapping(search, wrappers.target)
    made = Rules(rules)
    names = {key: name for key in part if (name := made.renamed(key)) is not None}
    matches = sum(1 for key, name in names.items() if search.target.get(name) == search.source[key])
    if len(set(names.values())) < len(names) or matches < len(keys):
        return None
    return Repair(made, names, matches, plain, len(search.target), tuple(notes))


def _counters(search: Search, part: Iterable[str], keys: Sequence[str]) -> Iterator[str]:
    """The counters of the AveragedModels whose weights are among the keys, where the target has none."""
    if any(key.rpartition(".")[2] == COUNTER for key in search.target):
        return
    for counter in part:
        above, _, last = counter.rpartition(".")
        if last == COUNTER:
            module = f"{above}.module." if above else "module."
            if any(key.startswith(module) for key in keys):
                yield counter


def _wrapping(search: Search, words: Sequence[str]) -> Iterator[Rule]:
    """The rules that put the wrappers back in which the target has, one after the other."""
    for at, word in enumerate(words):
        modules: dict[str, None] = {}
        for name in stripped(search.target, words[at + 1 :]):
            here = name.split(".")
            modules |= {".".join(here[:i]): None for i in range(len(here) - 1) if here[i] == word}
        yield add_wrapper(word, *modules)
