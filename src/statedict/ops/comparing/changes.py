"""What a comparison has found, as facts: the keys whose two values differ, and everything else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from statedict.manifest import Finding
from statedict.ops.comparing.renames import Rename
from statedict.ops.comparing.tensor_pairs import WITHIN
from statedict.ops.values import json_value

__all__ = ["Change", "Found"]


class Change(NamedTuple):
    """One key whose two values differ. The numbers are None where there are none, as of values that are no tensors.

    ``a`` and ``b`` are the two shapes (lists), dtypes (texts), values in brief (texts), or the other keys that each is tied
    with (lists), as the kind has it.
    """

    key: str
    kind: str  # "shape" | "dtype" | "value" | "object" | "aliasing"
    verdict: str
    a: object
    b: object
    numel: int | None = None  # elements that were compared
    mismatched: int | None = None  # of those, not equal and not within the tolerance
    max_abs: float | None = None  # the largest |a - b|; NaN where NaN stands against numbers only
    max_rel: float | None = None  # the largest |a - b| / |b| where b isn't 0
    cosine: float | None = None
    mean: float | None = None  # of |a - b| over all elements
    first: tuple[int, ...] | None = None  # the index of a mismatch: the first in the order of storage
    order: tuple[int, ...] | None = None  # the order of a's dimensions in which it is b

    @property
    def is_equal(self) -> bool:
        """Whether the two count as equal all the same: values within the tolerance."""
        return self.kind == "value" and self.verdict == WITHIN

    def to_dict(self) -> dict[str, object]:
        """The record, JSON-ready; of a value, ``mismatched``, ``numel`` and ``max_abs`` are always there."""
        made: dict[str, object] = {
            "key": self.key,
            "kind": self.kind,
            "verdict": self.verdict,
            "a": self.a,
            "b": self.b,
        }
        numbers = {
            name: getattr(self, name) for name in ("mismatched", "numel", "max_abs", "max_rel", "mean", "cosine")
        }
        for name, value in numbers.items():
            if value is not None or (self.kind == "value" and name in ("mismatched", "numel", "max_abs")):
                made[name] = json_value(value)
        if self.first is not None:
            made["first"] = list(self.first)
        if self.order is not None:
            made["order"] = list(self.order)
        return made


class Found(NamedTuple):
    """Everything that a comparison has found."""

    changed: Sequence[Change]
    only: tuple[Sequence[str], Sequence[str]]  # keys of A, of B
    renamed: Sequence[Rename]
    counts: Mapping[str, int]
    tensors: tuple[tuple[str, ...], tuple[str, ...]]  # the keys of A's tensors, of B's
    findings: tuple[Finding, ...] = ()
