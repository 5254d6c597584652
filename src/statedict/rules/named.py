"""The rule sets that the package comes with, as rules: from one well-known layout to another."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from statedict.errors import RuleError, one_line
from statedict.keys import near
from statedict.rules.patterns import Pattern
from statedict.rules.rule import Rule
from statedict.rules.ruleset import Rules
from statedict.rules.tables import rule_of_table

if TYPE_CHECKING:
    from statedict.knowledge.rulesets import RuleSet

__all__ = ["made_of", "shipped", "typed"]


def shipped(name: str, **values: int) -> Rules:
    """The rules of that name: ``shipped("timm-vit-to-hf-vit")``, ``shipped("meta-llama-to-hf-llama", head_dim=128)``.

    The values are the numbers that a rule set needs and no key says. Raises ``RuleError`` for an unknown name, with the nearest ones, and
    for a number that is missing or can't be.
    """
    from statedict.knowledge.rulesets import rule_sets

    found = rule_sets().get(name)
    if found is None:
        names = near(name, rule_sets()) or list(rule_sets())
        raise RuleError("no rules of this name are shipped", found=one_line(name), hint=f"There are {', '.join(names)}")
    return made_of(found, values)


def typed(text: str) -> Rules:
    """The rules of a file, or the shipped ones: ``NAME``, or ``NAME:head_dim=128`` where they need a number.

    A file of that name goes before. Raises ``FileError`` and ``RuleError``.
    """
    from statedict.knowledge.rulesets import rule_sets

    name, _, rest = text.partition(":")
    is_path = os.sep in text or text.endswith((".toml", ".json"))
    if os.path.lexists(text) or (is_path and name not in rule_sets()):
        return Rules.from_file(text)
    values: dict[str, int] = {}
    for each in rest.split(",") if rest else []:
        word, _, digits = each.partition("=")
        if not (digits.isascii() and digits.isdigit() and len(digits) < 10):
            raise RuleError("what the rules need is written NAME:word=number", found=one_line(text))
        values[word] = int(digits)
    return shipped(name, **values)


def made_of(found: RuleSet, values: Mapping[str, int]) -> Rules:
    """The rules of a set with these numbers. Raises ``RuleError`` for one that is missing, unknown, or can't be."""
    unknown = [word for word in values if word not in found.parameters]
    if unknown:
        known = f"There is {', '.join(found.parameters)}" if found.parameters else "They need none"
        raise RuleError(f"the rules '{found.name}' take no such number", found=one_line(unknown[0]), hint=known)
    for word, each in found.parameters.items():
        if word not in values:
            hint = f"It is {each.about}. Write {found.name}:{word}=NUMBER, or in Python shipped('{found.name}', {word}=NUMBER)"
            raise RuleError(f"the rules '{found.name}' need {word}", hint=hint)
        value = values[word]
        if type(value) is not int or value <= 0 or value % each.multiple_of:
            expected = f"a multiple of {each.multiple_of}"
            raise RuleError(f"{word} can't be this", expected=expected, found=one_line(repr(value)))
    texts = {word: str(value) for word, value in values.items()}
    rules = [rule_of_table(_filled(table, texts)) for table in found.tables]
    return Rules([_undone(rule, found.name) for rule in reversed(rules)] if found.is_reversed else rules)


def _undone(rule: Rule, name: str) -> Rule:
    """The rule that takes this one back; what may match nothing, may so on the way back."""
    back = rule.inverse()
    if back is None:
        raise RuleError(f"there are no rules '{name}': {one_line(rule)} can't be taken back")
    return back.optional() if rule.is_optional else back


def _filled(table: Mapping[str, Any], values: Mapping[str, str]) -> dict[str, Any]:
    """The table with numbers in place of what stands for them: texts in braces in lists of numbers."""
    return {
        name: [_number(each, values) for each in value] if name in ("view", "sizes", "shape") else value
        for name, value in table.items()
    }


def _number(value: Any, values: Mapping[str, str]) -> Any:
    return int(Pattern(value).fill(values)) if isinstance(value, str) else value
