"""Texts that stand for many keys: globs, and templates whose braces name what differs from key to key.

    layers.{n}.attn.weight   →   blocks.{n+1}.attention.weight

``{n}`` stands for one or more characters without a dot; ``{rest...}`` for any text, dots too. In a result, names may be
reckoned with: ``{n+1}``, ``{n-1}``, ``{2*n}``, ``{n//2}``, ``{n%2}``; then ``n`` has to be a number.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Iterable, Mapping, Sequence

from statedict.errors import RuleError, one_line
from statedict.keys import matches

__all__ = ["Pattern", "Values", "is_template", "listed"]

Values = Mapping[str, str]

_FIELD = re.compile(r"\{([^{}]*)\}")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_OPERATIONS: Mapping[type, Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
# Digits of a number that is reckoned with, and nodes of an expression: nothing in a key is worth more.
_MOST_DIGITS = 18
_MOST_NODES = 40


def is_template(text: str) -> bool:
    """Whether the text has a name, or a sum of names, between braces; ``{2}`` of a regular expression is none."""
    return any(_NAME.search(field) for field in _FIELD.findall(text))


class Pattern:
    """One text that stands for keys; a template if it has names in braces, else a glob that matches whole keys."""

    __slots__ = ("_fields", "_pieces", "_regex", "names", "text")

    def __init__(self, text: str) -> None:
        """Raises ``RuleError`` for braces that make no sense."""
        self.text = text
        self._pieces: list[str] = [text]
        self._fields: list[str] = []
        self._regex: re.Pattern[str] | None = None
        if is_template(text):
            parts = _FIELD.split(text)
            self._pieces, self._fields = parts[::2], [field.strip() for field in parts[1::2]]
        self.names = tuple(dict.fromkeys([name for field in self._fields for name in _NAME.findall(field)]))

    def __str__(self) -> str:
        return self.text

    @property
    def is_template(self) -> bool:
        """Whether it has names."""
        return bool(self._fields)

    def match(self, key: str) -> Values | None:
        """What the names stand for in a key; None if it isn't one of those meant."""
        if not self._fields:
            return {} if matches(key, self.text) else None
        if self._regex is None:
            self._regex = self._compiled()
        found = self._regex.fullmatch(key)
        return None if found is None else found.groupdict()

    def _compiled(self) -> re.Pattern[str]:
        made, seen = re.escape(self._pieces[0]), set()
        for field, after in zip(self._fields, self._pieces[1:]):
            name = field.removesuffix("...")
            if not _NAME.fullmatch(name):
                hint = "Reckon in the result: rename('layers.{n}.w', 'blocks.{n+1}.w')"
                raise RuleError(f"'{{{field}}}' can't be matched in a key", found=one_line(self.text), hint=hint)
            # Without a dot there is one way to cut the text, and with one two names never stand side by side.
            shape = ".+" if field.endswith("...") else r"[^.]+"
            made += f"(?P={name})" if name in seen else f"(?P<{name}>{shape})"
            made += re.escape(after)
            seen.add(name)
        return re.compile(made, re.DOTALL)

    def fill(self, values: Values) -> str:
        """The key that the template makes of these values. Raises ``RuleError`` for a name without one."""
        made = self._pieces[0]
        for field, after in zip(self._fields, self._pieces[1:]):
            made += _computed(field.removesuffix("..."), values, self.text) + after
        return made

    def check_names(self, known: Iterable[str]) -> None:
        """Raise ``RuleError`` if this result uses names that the source doesn't have."""
        unknown = [name for name in self.names if name not in set(known)]
        if unknown:
            raise RuleError(f"nothing gives '{{{unknown[0]}}}' a value", found=one_line(self.text))

    def shifted(self) -> Mapping[str, int] | None:
        """How much is added to each name, where that is all that this result does with each of them, once; else None."""
        found: dict[str, int] = {}
        for field in self._fields:
            sum_of = re.fullmatch(r"([A-Za-z_]\w*)(\.\.\.)?\s*(?:([+-])\s*(\d{1,18}))?", field)
            if sum_of is None or sum_of[1] in found:
                return None
            found[sum_of[1]] = int(f"{sum_of[3]}{sum_of[4]}") if sum_of[4] else 0
        return found

    def with_shifts(self, shifts: Mapping[str, int], *, sign: int) -> str:
        """The template with that much added to each name, or nothing at all for a ``sign`` of 0."""
        made = self._pieces[0]
        for field, after in zip(self._fields, self._pieces[1:]):
            found = _NAME.match(field)
            name = found[0] if found is not None else field
            shift = sign * shifts.get(name, 0)
            rest = "..." if field.endswith("...") else ""
            made += f"{{{name}{rest}}}" if not shift else f"{{{name}{shift:+d}}}"
            made += after
        return made


def _computed(field: str, values: Values, text: str) -> str:
    """What a field of a template comes to."""
    if field in values:
        return values[field]
    try:
        tree = ast.parse(field, mode="eval").body
    except (SyntaxError, ValueError) as error:
        raise RuleError(f"'{{{field}}}' is no sum of numbers", found=one_line(text)) from error
    if sum(1 for _ in ast.walk(tree)) > _MOST_NODES:
        raise RuleError("a sum in braces is too long", found=one_line(text))
    made = _value(tree, values, text)
    if made < 0:
        raise RuleError(f"'{{{field}}}' comes to {made}, and no key has such a number", found=one_line(text))
    return str(made)


def _value(node: ast.expr, values: Values, text: str) -> int:
    if isinstance(node, ast.Constant) and type(node.value) is int and abs(node.value) < 10**_MOST_DIGITS:
        return node.value
    if isinstance(node, ast.Name):
        if node.id not in values:
            raise RuleError(f"nothing gives '{{{node.id}}}' a value", found=one_line(text))
        digits = values[node.id]
        if not (digits.isascii() and digits.isdigit() and len(digits) <= _MOST_DIGITS):
            raise RuleError(
                f"'{{{node.id}}}' is '{one_line(digits)}', and no number to reckon with", found=one_line(text)
            )
        return int(digits)
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATIONS:
        one, two = _value(node.left, values, text), _value(node.right, values, text)
        try:
            return _OPERATIONS[type(node.op)](one, two)
        except ZeroDivisionError as error:
            raise RuleError("a sum in braces divides by zero", found=one_line(text)) from error
    raise RuleError("braces take names, numbers, + - * // and %", found=one_line(text))


def listed(keys: Sequence[str], most: int = 8) -> str:
    """The first of some keys for a message, and how many more there are."""
    more = f" and {len(keys) - most} more" if len(keys) > most else ""
    return ", ".join(f"'{one_line(key)}'" for key in keys[:most]) + more
