"""What an alignment is: for each tensor of a target, how it is made of those of a source, how sure that is, and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

__all__ = [
    "AMBIGUOUS",
    "CLAIMS",
    "CORROBORATED",
    "GUESS",
    "PROVEN",
    "UNDECIDABLE",
    "Alignment",
    "Left",
    "Mapped",
    "Side",
    "Spec",
]

# How sure a mapping is. The first two are carried out; the rest is shown.
PROVEN = "proven"  # the same name and shape, no other way to place it, the same values, or a probe
CORROBORATED = "corroborated"  # at least two signals that don't depend on each other, and none against
GUESS = "guess"  # one signal
AMBIGUOUS = "ambiguous"  # several ways fit; the question says what would decide
UNDECIDABLE = "undecidable"  # names and shapes can't decide it
CLAIMS = (PROVEN, CORROBORATED)


class Spec(NamedTuple):
    """A tensor as far as names and shapes go: its shape, and its dtype as torch spells it without the prefix."""

    shape: tuple[int, ...]
    dtype: str


class Side(NamedTuple):
    """One of the two state dicts that are aligned.

    ``tensors`` by dotted key, in the order of the file or of the model. ``is_ordered``: whether that order says how the model is
    built (a file whose keys are sorted by name says nothing). ``tied`` are groups of keys that share their memory. ``classes`` are the
    class names of modules by dotted path, where there is a model; ``buffers`` keys that the model can make again by itself.
    """

    tensors: Mapping[str, Spec]
    is_ordered: bool = True
    tied: Sequence[Sequence[str]] = ()
    classes: Mapping[str, str] = {}
    buffers: frozenset[str] = frozenset()


class Mapped(NamedTuple):
    """A tensor of the target and what makes it.

    ``op`` is ``copy``, ``split``, ``slice``, ``unstack``, ``concat``, ``stack``, ``transpose``, ``squeeze``, ``permute``, ``tie``,
    ``fold`` or ``resize``; ``args`` are its arguments: ``dim``, ``start``, ``stop``, ``index``, ``dims``, ``view``, ``order``; ``then`` has
    further steps on the result, ``each`` a step on every source before the op. Without ``sources`` nothing makes it.
    ``reasons`` are short sentences. ``alternatives`` are sources, one tuple each, that would fit as well, ``question`` what decides.
    """

    target: str
    op: str
    sources: tuple[str, ...]
    tier: str
    reasons: tuple[str, ...] = ()
    args: Mapping[str, object] = {}
    alternatives: tuple[tuple[str, ...], ...] = ()
    question: str = ""

    @property
    def is_claim(self) -> bool:
        """Whether it is sure enough to be carried out."""
        return bool(self.sources) and self.tier in CLAIMS


class Left(NamedTuple):
    """A key that nothing uses, or that nothing fills, and why."""

    key: str
    reason: str


class Alignment(NamedTuple):
    """All that was found about two state dicts.

    ``mapped`` has one entry for each key of the target that something can be said about, in the target's order. ``dropped`` are keys of
    the source that no claim uses, ``unfilled`` keys of the target that no claim fills. ``refusal`` says in one sentence why nothing is
    mapped at all, where the two are different networks.
    """

    mapped: tuple[Mapped, ...]
    dropped: tuple[Left, ...]
    unfilled: tuple[Left, ...]
    refusal: str = ""
