"""How much of each source a mean is made of."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite
from typing import NamedTuple

from statedict.errors import RuleError
from statedict.manifest import Finding
from statedict.report.units import plural

__all__ = ["Shares", "shares_of"]

# How far the sum of weights may be from 1 to pass for it: what is lost in writing thirds with four digits.
_TOLERANCE = 1e-3


class Shares(NamedTuple):
    """The weight of each source, which add up to 1, and how they came to be."""

    weights: tuple[float, ...]
    ema: float | None
    findings: tuple[Finding, ...] = ()


def shares_of(count: int, weights: Sequence[float] | None, ema: float | None) -> Shares:
    """The weights of so many sources. Raises ``RuleError`` where they make no mean."""
    if weights is not None and ema is not None:
        raise RuleError("weights and the decay of a moving average were both given", hint="Give one of the two")
    if ema is not None:
        if not 0 <= ema < 1:
            raise RuleError("this is no decay of a moving average", expected="0 or more, and below 1", found=ema)
        # mean = ema * mean + (1 - ema) * next, from the first source on, written out.
        last = count - 1
        return Shares((ema**last, *[(1 - ema) * ema ** (last - at) for at in range(1, count)]), ema)
    if weights is None:
        return Shares((1 / count,) * count, None)
    numbers = [float(weight) for weight in weights]
    total = sum(numbers) if all(map(isfinite, numbers)) else 0.0
    if len(numbers) != count or not (total > 0 and isfinite(total)):
        found = ", ".join([f"{number:g}" for number in numbers[:8]]) or "none"
        raise RuleError(
            "these weights make no mean", expected=f"{plural(count, 'number')} with a sum above 0", found=found
        )
    findings: tuple[Finding, ...] = ()
    if abs(total - 1) > _TOLERANCE:
        findings = (Finding("average-weights", "info", f"the weights were divided by their sum, {total:g}"),)
    return Shares(tuple([number / total for number in numbers]), None, findings)
