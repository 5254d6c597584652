"""Rule sets that the package comes with: what makes the tensors of one well-known layout of those of another.

Each file of the folder ``rulesets`` is a file of rules, with names for the two layouts (``from``, ``to``), the keys that a checkpoint of
the one must have (``requires``) and what the result has (``gives``). It goes both ways, unless it says ``one_way``; what is only left
out, because a model makes it again, is no part of the way back. A number that no key says is a parameter: in the rules it is a text in
braces, such as ``"{head_dim//2}"``, and ``tensors`` of that many elements (``times`` a number) tell it where they are there.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from importlib import resources
from typing import Any, NamedTuple

from statedict.keys import matches

__all__ = ["Parameter", "RuleSet", "candidates", "rule_sets"]


class Parameter(NamedTuple):
    """A number that a rule set needs: what it is, what it is a multiple of, and 1-D tensors of whose size it is ``times`` as much."""

    about: str
    multiple_of: int
    tensors: tuple[str, ...]
    times: int


class RuleSet(NamedTuple):
    """Rules from one layout to another: ``tables`` as a file of rules has them, to be turned round where ``is_reversed``.

    ``requires`` are globs; a checkpoint of the first layout has a key for each.
    """

    name: str
    about: str
    requires: tuple[str, ...]
    parameters: Mapping[str, Parameter]
    tables: tuple[Mapping[str, Any], ...]
    is_reversed: bool

    def is_of(self, keys: Collection[str]) -> bool:
        """Whether the keys have all that a checkpoint of the first layout must have."""
        return all(glob in keys or any(matches(key, glob) for key in keys) for glob in self.requires)

    def values(self, shapes: Mapping[str, Sequence[int]]) -> dict[str, int] | None:
        """The parameters, as tensors of these shapes tell them; None where one isn't told, or is told differently."""
        found = {}
        for name, each in self.parameters.items():
            told = {shapes[key][0] * each.times for key in each.tensors if key in shapes and len(shapes[key]) == 1}
            if len(told) != 1:
                return None
            found[name] = told.pop()
        return found


def candidates(source_keys: Collection[str]) -> list[RuleSet]:
    """The rule sets that begin with a checkpoint which has these keys, dotted."""
    keys = frozenset(source_keys)
    return [found for found in rule_sets().values() if found.is_of(keys)]


@functools.lru_cache(maxsize=1)
def rule_sets() -> Mapping[str, RuleSet]:
    """All rule sets by name: ``timm-vit-to-hf-vit`` and, where there is a way back, ``hf-vit-to-timm-vit``."""
    folder = resources.files("statedict.knowledge").joinpath("rulesets")
    texts = {file.name: file.read_text(encoding="utf-8") for file in folder.iterdir() if file.name.endswith(".toml")}
    return {found.name: found for name in sorted(texts) for found in _read(texts[name])}


def _read(text: str) -> Iterator[RuleSet]:
    """What one file holds: a rule set, and the same the other way."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    table = tomllib.loads(text)
    one, other, about = table["from"], table["to"], table["about"]
    parameters = {
        name: Parameter(each["about"], each.get("multiple_of", 1), tuple(each.get("tensors", ())), each.get("times", 1))
        for name, each in table.get("parameters", {}).items()
    }
    rules = tuple(table["rules"])
    yield RuleSet(f"{one}-to-{other}", about, tuple(table["requires"]), parameters, rules, False)
    if not table.get("one_way", False):
        kept = tuple([each for each in rules if each["rule"] != "drop"])
        back = f"the way back: {about}"
        yield RuleSet(f"{other}-to-{one}", back, tuple(table["gives"]), parameters, kept, True)
