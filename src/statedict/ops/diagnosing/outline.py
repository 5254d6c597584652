"""All that is known of two checkpoints once they are aligned: what sentences, findings and figures are made from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from statedict.aligning.alignment import Left, Mapped, Side
from statedict.ops.diagnosing.evidence import Evidence
from statedict.ops.diagnosing.obligations import Broken
from statedict.ops.load_report import Coverage
from statedict.rules import Rules

__all__ = ["Outline"]


class Outline(NamedTuple):
    """The two sides, the plan, the rules, and what was found on the way.

    ``remade`` are keys of the target that a model makes again by itself, ``casts`` those whose sources have another dtype, with both.
    ``problem`` says why there are no rules, where there are none; ``only_once``, that they must not be applied to their own result.
    """

    source: Side
    target: Side
    mapped: tuple[Mapped, ...]
    dropped: tuple[Left, ...]
    unfilled: tuple[Left, ...]
    refusal: str
    evidence: Evidence
    broken: tuple[Broken, ...]
    left_over: Mapping[str, int]
    rules: Rules
    problem: str
    remade: frozenset[str]
    only_once: bool = False

    @property
    def claims(self) -> list[Mapped]:
        """The mappings that are sure enough to be carried out."""
        return [mapped for mapped in self.mapped if mapped.is_claim]

    @property
    def fits(self) -> bool:
        """Whether the source has all of the target as it is, in name and shape."""
        same = [mapped.op == "copy" and mapped.sources == (mapped.target,) for mapped in self.claims]
        return all(same) and not self.rules_change and not self.open_keys and bool(same)

    @property
    def rules_change(self) -> bool:
        """Whether the rules do more than leave keys out."""
        return any(rule.name != "drop" for rule in self.rules)

    @property
    def open_keys(self) -> tuple[str, ...]:
        """The keys of the target that nothing fills and no model makes again."""
        return tuple([left.key for left in self.unfilled if left.key not in self.remade])

    @property
    def casts(self) -> dict[str, tuple[str, str]]:
        """The keys whose sources have another dtype: that and their own."""
        found = {}
        for mapped in self.claims:
            pair = self.source.tensors[mapped.sources[0]].dtype, self.target.tensors[mapped.target].dtype
            if pair[0] != pair[1]:
                found[mapped.target] = pair
        return found

    @property
    def resized(self) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
        """The keys of the target that the source has in another size: both shapes."""
        left = {each.key for each in self.dropped}
        names = {each.target: each.sources[0] for each in self.mapped if each.op == "resize" and each.sources}
        names |= {each.key: each.key for each in self.unfilled if each.key in left and each.key not in names}
        shapes = {key: (self.source.tensors[old].shape, self.target.tensors[key].shape) for key, old in names.items()}
        return {key: pair for key, pair in shapes.items() if pair[0] != pair[1]}

    def coverage(self) -> Coverage:
        """The share of the target that is made: of its keys, of their elements, of their bytes."""
        filled = {mapped.target for mapped in self.claims}
        sums = [[0, 0, 0], [0, 0, 0]]
        for key, spec in self.target.tensors.items():
            numel = 1
            for size in spec.shape:
                numel *= size
            for number, is_in in enumerate((key in filled, True)):
                for at, value in enumerate((1, numel, numel * _itembits(spec.dtype))):
                    sums[number][at] += value * is_in
        shares = [part / whole if whole else 1.0 for part, whole in zip(*sums)]
        return Coverage(*shares)


def _itembits(dtype: str) -> int:
    from statedict.dtypes import BY_TORCH

    known = BY_TORCH.get(dtype)
    return 8 if known is None else known.bits
