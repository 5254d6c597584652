"""What the field calls things, as data: words of names, wrappers, fused tensors. It is read once, when first asked for."""

from __future__ import annotations

import functools
import sys
from collections.abc import Mapping
from importlib import resources
from typing import NamedTuple

__all__ = ["Vocabulary", "vocabulary"]


class Vocabulary(NamedTuple):
    """The words of ``words.toml``. The file itself says what each table is."""

    wrappers: frozenset[str]
    foreign: frozenset[str]
    shadows: frozenset[str]
    neutral: frozenset[str]
    recomputable: frozenset[str]
    resizable: frozenset[str]
    rotary_interleaved: frozenset[str]
    rotary_halves: frozenset[str]
    backwards: frozenset[tuple[str, str]]
    choices: tuple[frozenset[str], ...]
    words: Mapping[str, tuple[str, ...]]
    components: Mapping[str, tuple[str, ...]]
    numbered: Mapping[str, str]
    fused: Mapping[str, tuple[str, ...]]
    fused_unordered: Mapping[str, tuple[str, ...]]
    gated: Mapping[str, str]
    norms: Mapping[str, str]
    first_norms: frozenset[str]
    second_norms: frozenset[str]
    other_norms: frozenset[str]

    @property
    def neighbours(self) -> frozenset[str]:
        """Names that change what a name beside them means."""
        return self.first_norms | self.other_norms | frozenset(self.gated)


@functools.lru_cache(maxsize=1)
def vocabulary() -> Vocabulary:
    """The vocabulary that the package comes with."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    table = tomllib.loads(resources.files(__name__).joinpath("words.toml").read_text(encoding="utf-8"))
    return Vocabulary(
        wrappers=frozenset(table["wrappers"]),
        foreign=frozenset(table["foreign"]),
        shadows=frozenset(table["shadows"]),
        neutral=frozenset(table["neutral"]),
        recomputable=frozenset(table["recomputable"]),
        resizable=frozenset(table["resizable"]),
        rotary_interleaved=frozenset(table["rotary_interleaved"]),
        rotary_halves=frozenset(table["rotary_halves"]),
        backwards=frozenset((one, two) for pair in table["backwards"] for one, two in (pair, pair[::-1])),
        choices=tuple(frozenset(choice) for choice in table["choices"]),
        words=_lists(table["words"]),
        components=_lists(table["components"]),
        numbered={name: number for number, names in table["numbered"].items() for name in names},
        fused=_lists(table["fused"]),
        fused_unordered=_lists(table["fused_unordered"]),
        gated=table["gated"],
        norms=table["norms"],
        first_norms=frozenset(table["norm_neighbours"]["first"]),
        second_norms=frozenset(table["norm_neighbours"]["second"]),
        other_norms=frozenset(table["norm_neighbours"]["other"]),
    )


def _lists(table: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    return {name: tuple(text.split()) for name, text in table.items()}
