"""New names for many keys in as few rules as say it: prefixes and wrappers first, then templates, and single keys last."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from graphlib import CycleError, TopologicalSorter

from statedict import rules as language
from statedict.ops.diagnosing.templates import Folded, folded
from statedict.prefixes import WRAPPERS
from statedict.rules import Rule
from statedict.rules.patterns import Pattern

__all__ = ["Renaming", "renamed_by"]

# Components that one prefix takes away or adds.
_MOST_COMPONENTS = 6


class Renaming:
    """The rules that give keys their names, and what becomes of those that have no name to get."""

    def __init__(self, rules: Sequence[Rule], names: Mapping[str, str]) -> None:
        self.rules = tuple(rules)
        self.names = dict(names)


def renamed_by(wanted: Mapping[str, str], free: Sequence[str], *, exact: bool = False) -> Renaming:
    """The rules that rename the keys of ``wanted``; ``free`` are keys beside them that may get any name of their own.

    ``exact`` names every key by itself.
    """
    names = {key: key for key in (*wanted, *free)}
    rules: list[Rule] = []
    if not exact:
        for rule in _prefixes(wanted):
            trial = {key: str(rule.renamed(name)) for key, name in names.items()}
            if len(set(trial.values())) == len(trial):
                names = trial
                rules.append(rule)
    left = {names[key]: new for key, new in wanted.items()}
    fixed = [names[key] for key in free]
    changed = {old: new for old, new in left.items() if old != new}
    if changed:
        templates = None if exact else _templates(left, fixed)
        rules += templates if templates is not None else [language.rename(changed)]
    return Renaming(rules, {key: wanted.get(key, names[key]) for key in names})


def _prefixes(wanted: Mapping[str, str]) -> list[Rule]:
    """The prefixes and wrappers without which, or with which, at least half of the names are right."""
    rules: list[Rule] = []
    names = {key: key for key in wanted}
    for word in WRAPPERS:
        # One that stands before all names is a prefix.
        inside = any(f".{word}." in name for name in names.values())
        if inside and not any(f".{word}." in f".{new}" for new in wanted.values()):
            rules.append(language.strip_wrapper(word))
            names = {key: str(rules[-1].renamed(name)) for key, name in names.items()}
    prefixes = _best_prefixes({names[key]: new for key, new in wanted.items()})
    if prefixes is not None:
        strip, add = prefixes
        rules += [language.strip_prefix(strip)] if strip else []
        rules += [language.add_prefix(add)] if add else []
    before = sum([key == new for key, new in wanted.items()])
    after = sum([_through(rules, key) == new for key, new in wanted.items()])
    return rules if after > before and 2 * after >= len(wanted) else []


def _through(rules: Sequence[Rule], key: str) -> str:
    for rule in rules:
        key = str(rule.renamed(key))
    return key


def _best_prefixes(wanted: Mapping[str, str]) -> tuple[str, str] | None:
    """The prefix to take away and the one to add with which most names are right."""
    votes: Counter[tuple[str, str]] = Counter()
    for old, new in wanted.items():
        one, two = old.split("."), new.split(".")
        same = 0
        while same < min(len(one), len(two)) and one[-1 - same] == two[-1 - same]:
            same += 1
        heads = one[: len(one) - same], two[: len(two) - same]
        if same and max(map(len, heads)) <= _MOST_COMPONENTS:
            votes["".join([f"{word}." for word in heads[0]]), "".join([f"{word}." for word in heads[1]])] += 1
    if not votes:
        return None
    (strip, add), count = votes.most_common(1)[0]
    if (strip, add) == ("", "") or 2 * count < len(wanted):
        return None
    # A prefix that comes to every key must be meant for every key.
    if add and not all(new.startswith(add) for new in wanted.values()):
        return None
    return strip, add


def _templates(wanted: Mapping[str, str], fixed: Sequence[str]) -> list[Rule] | None:
    """Templates that rename these keys and leave the fixed ones alone; None where no order of them does."""
    keys = [*wanted, *fixed]
    goal = {**{key: key for key in fixed}, **wanted}

    def is_exact(found: Folded) -> bool:
        return _is_right(found.templates[0], found.templates[1], keys, goal)

    pairs = [(old, new) for old, new in wanted.items() if old != new]
    groups = folded(pairs, plain=1, is_exact=is_exact)
    groups = _merged(groups, keys, goal)
    made = [each for each in groups if each.templates != each.members[0] or len(each.members) > 1]
    single = {each.members[0][0]: each.members[0][1] for each in groups if each not in made}
    rules = [language.rename(*each.templates) for each in made]
    moved = [list(each.members) for each in made]
    if single:
        rules.append(language.rename(single))
        moved.append(list(single.items()))
    ordered = _ordered(rules, moved)
    if ordered is None or any(_through(ordered, key) != goal[key] for key in keys):
        return None
    return ordered


def _is_right(old: str, new: str, keys: Sequence[str], goal: Mapping[str, str]) -> bool:
    """Whether a template gives every key that it matches the name that it is to have."""
    pattern, result = Pattern(old), Pattern(new)
    for key in keys:
        values = pattern.match(key)
        if values is not None and result.fill(values) != goal[key]:
            return False
    return True


def _merged(groups: Sequence[Folded], keys: Sequence[str], goal: Mapping[str, str]) -> list[Folded]:
    """Templates that end alike as one, the rest of the key being anything."""
    left = list(groups)
    made: list[Folded] = []
    for size in range(_MOST_COMPONENTS, 0, -1):
        heads: dict[tuple[str, str], list[Folded]] = {}
        for each in left:
            old, new = (template.split(".") for template in each.templates)
            if len(old) > size and len(new) > size and old[-size:] == new[-size:]:
                heads.setdefault((".".join(old[:-size]), ".".join(new[:-size])), []).append(each)
        for (old_head, new_head), parts in heads.items():
            templates = f"{old_head}.{{rest...}}", f"{new_head}.{{rest}}"
            if _shared(parts, left) > 1 and _is_right(*templates, keys, goal):
                members = tuple([member for part in left if _matches(templates[0], part) for member in part.members])
                made.append(Folded(templates, members))
                left = [part for part in left if not _matches(templates[0], part)]
    return made + left


def _shared(parts: Sequence[Folded], left: Sequence[Folded]) -> int:
    return len([part for part in parts if part in left])


def _matches(template: str, part: Folded) -> bool:
    pattern = Pattern(template)
    return all(pattern.match(member[0]) is not None for member in part.members)


def _ordered(rules: Sequence[Rule], moved: Sequence[Sequence[tuple[str, ...]]]) -> list[Rule] | None:
    """The rules in an order in which none changes what another one has made; None where there is none."""
    graph: dict[int, set[int]] = {at: set() for at in range(len(rules))}
    for at, pairs in enumerate(moved):
        for other, rule in enumerate(rules):
            if other != at and any(rule.renamed(pair[1]) != pair[1] for pair in pairs):
                graph[at].add(other)
    try:
        return [rules[at] for at in TopologicalSorter(graph).static_order()]
    except CycleError:
        return None
