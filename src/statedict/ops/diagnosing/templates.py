"""Many keys in one rule: what keys that differ in their numbers have in common, and how the numbers of one follow from another's."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

__all__ = ["Folded", "folded", "glob_of", "is_sayable"]

# Names of what differs, in the order in which they are given away.
_NAMES = ("n", "m", "k", "i", "j", "h", "l", "p")
_ANY_NUMBER = re.compile(r"(?<![0-9])(0|[1-9][0-9]{0,8})(?![0-9])")
_WHOLE_NUMBER = re.compile(r"(?<![^.])(0|[1-9][0-9]{0,8})(?![^.])")

_Keys = tuple[str, ...]


class Folded(NamedTuple):
    """A template for each of several keys that belong together, and the keys that it stands for; without names it is one of these."""

    templates: _Keys
    members: tuple[_Keys, ...]


def folded(instances: Sequence[_Keys], *, plain: int, is_exact: Callable[[Folded], bool]) -> list[Folded]:
    """As few templates as stand for these tuples of keys.

    The first key of each says the numbers; the others may have a number added to them, but not the first ``plain`` ones. ``is_exact`` says
    whether a template means what it stands for and nothing else.
    """
    made: list[Folded] = []
    left = list(instances)
    for numbers in (_ANY_NUMBER, _WHOLE_NUMBER):
        groups: dict[object, list[_Keys]] = {}
        for keys in left:
            groups.setdefault(tuple([tuple(numbers.split(key)[::2]) for key in keys]), []).append(keys)
        left = []
        for members in groups.values():
            if len(members) == 1:
                left += members
                continue
            found, rest = _of_group(members, numbers, plain, is_exact)
            made += found
            left += rest
    return made + [Folded(keys, (keys,)) for keys in left]


def _of_group(
    members: Sequence[_Keys], numbers: re.Pattern[str], plain: int, is_exact: Callable[[Folded], bool]
) -> tuple[list[Folded], list[_Keys]]:
    """The templates of keys that differ in numbers alone, and the keys that none stands for."""
    whole = _template(members, numbers, plain)
    if whole is not None and is_exact(whole):
        return [whole], []
    # One number may mean something else for each of its values: the others are folded then.
    values = [[tuple(map(int, numbers.findall(key))) for key in keys] for keys in members]
    for at in range(len(values[0][0])):
        parts: dict[int, list[_Keys]] = {}
        for keys, found in zip(members, values):
            parts.setdefault(found[0][at], []).append(keys)
        if not 1 < len(parts) < len(members):
            continue
        made = {value: _template(part, numbers, plain) for value, part in parts.items() if len(part) > 1}
        fitting = {value: each for value, each in made.items() if each is not None and is_exact(each)}
        if len(fitting) == len(parts):
            return list(fitting.values()), []
    return [], list(members)


def _template(members: Sequence[_Keys], numbers: re.Pattern[str], plain: int) -> Folded | None:
    """The one template of keys that differ in numbers alone; None where a number doesn't follow from those of the first key."""
    values = [[tuple(map(int, numbers.findall(key))) for key in keys] for keys in members]
    columns = [list(column) for column in zip(*[found[0] for found in values])]
    names: dict[int, str] = {}
    for at, column in enumerate(columns):
        same = next((names[other] for other in range(at) if other in names and columns[other] == column), None)
        if len(set(column)) > 1:
            if same is None and len(set(names.values())) == len(_NAMES):
                return None
            names[at] = same or _NAMES[len(set(names.values()))]
    made = []
    for number, first in enumerate(members[0]):
        fields = []
        for at, theirs in enumerate(zip(*[found[number] for found in values])):
            field = _field(list(theirs), at, columns, names, shifted=number >= plain)
            if field is None:
                return None
            fields.append(field)
        pieces = numbers.split(first)[::2]
        made.append(pieces[0] + "".join([field + piece for field, piece in zip(fields, pieces[1:])]))
    return Folded(tuple(made), tuple(members))


def _field(
    column: list[int], at: int, columns: Sequence[list[int]], names: dict[int, str], *, shifted: bool
) -> str | None:
    """What a number is: itself where it is always the same, else one of the first key's, plus something."""
    if len(set(column)) == 1:
        return str(column[0])
    for other in sorted(names, key=lambda each: each != at):
        shift = column[0] - columns[other][0]
        if (not shift or shifted) and all(two - one == shift for one, two in zip(columns[other], column)):
            return f"{{{names[other]}{shift:+d}}}" if shift else f"{{{names[other]}}}"
    return None


def glob_of(key: str) -> str:
    """A glob that matches this key alone."""
    return "".join([f"[{letter}]" if letter in "*?[" else letter for letter in key])


def is_sayable(keys: Iterable[str]) -> bool:
    """Whether keys can be named in rules: those with braces would be taken for templates."""
    return not any("{" in key or "}" in key or not key for key in keys)
