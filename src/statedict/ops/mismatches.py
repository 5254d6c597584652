"""Everything that keeps a state dict from fitting, collected, and said in one error."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from statedict.errors import KeyMismatch, SpecMismatch, StateDictError, one_line
from statedict.keys import folded

__all__ = ["Mismatches", "SizePair", "listed"]

# Keys of one kind that a message lists.
_LISTED = 8


class SizePair(NamedTuple):
    """A tensor of the target, and what the source has for it."""

    expected: str
    found: str


class Mismatches(NamedTuple):
    """What doesn't fit. ``sizes`` are by key; ``refused`` and ``problems`` are sentences by key."""

    missing: Sequence[str] = ()
    unexpected: Sequence[str] = ()
    sizes: Mapping[str, SizePair] = {}
    refused: Mapping[str, str] = {}
    problems: Mapping[str, str] = {}

    def __bool__(self) -> bool:
        return any(self)

    def error(self, source: str, target: str, hint: str | None) -> StateDictError:
        """The one error: ``KeyMismatch`` if keys are missing or unexpected, else ``SpecMismatch`` of the first tensor."""
        parts = []
        if self.missing:
            parts.append(f"{len(self.missing)} missing ({listed(self.missing)})")
        if self.unexpected:
            parts.append(f"{len(self.unexpected)} unexpected ({listed(self.unexpected)})")
        if self.sizes:
            parts.append(f"{len(self.sizes)} of another size ({self._sizes()})")
        for sentences in (self.refused, self.problems):
            shown = [f"'{one_line(key)}': {text}" for key, text in list(sentences.items())[:_LISTED]]
            parts += ["; ".join(shown) + _rest(len(sentences))] if shown else []
        what = f"the state dict doesn't fit {target}, nothing was changed: {'; '.join(parts)}"
        if self.missing or self.unexpected:
            return KeyMismatch(what, missing=self.missing, unexpected=self.unexpected, path=source, hint=hint)
        key = next(iter([*self.sizes, *self.refused, *self.problems]))
        pair = self.sizes.get(key)
        return SpecMismatch(
            what,
            path=source,
            key=key,
            expected=pair.expected if pair else None,
            found=pair.found if pair else None,
            hint=hint,
        )

    def _sizes(self) -> str:
        """The sizes, those of numbered siblings with the same pair of sizes folded."""
        groups: dict[SizePair, list[str]] = {}
        for key, pair in self.sizes.items():
            groups.setdefault(pair, []).append(key)
        shown = [
            f"'{one_line(key)}' is {pair.expected} in the model and {pair.found} in the file"
            for pair, keys in groups.items()
            for key in folded(keys)
        ]
        return "; ".join(shown[:_LISTED]) + _rest(len(shown))


def listed(keys: Iterable[str]) -> str:
    """The keys for a message: numbered siblings folded, the first few of them."""
    shown = folded(keys)
    return ", ".join(one_line(key) for key in shown[:_LISTED]) + _rest(len(shown))


def _rest(count: int) -> str:
    return f" and {count - _LISTED} more" if count > _LISTED else ""
