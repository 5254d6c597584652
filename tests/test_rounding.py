"""The quick look at what a cast does finds what the thorough one finds, which is compared with torch elsewhere."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from statedict.dtypes import BY_TORCH
from statedict.numerics.casting import CastTally
from statedict.numerics.rounding import Rounding

PAIRS = [("float32", "bfloat16"), ("float32", "float16"), ("float64", "float32"), ("bfloat16", "float16")]


def facts(tally: CastTally) -> dict[str, object]:
    return {
        name: getattr(tally, name)
        for name in ("numel", "overflowed", "underflowed", "max_abs", "max_rel", "first_overflow")
    }


def both(data: bytes, before: str, after: str) -> tuple[dict[str, object], dict[str, object]]:
    """The facts of the thorough look and of the quick one; a second block stands behind the first."""
    dtypes = BY_TORCH[before], BY_TORCH[after]
    thorough, quick = CastTally(*dtypes), Rounding(*dtypes)
    for first in (0, len(data) // dtypes[0].itemsize):
        thorough.add(memoryview(data), first)
        quick.add(memoryview(data), first)
    return facts(thorough), facts(quick.tally)


@pytest.mark.parametrize(("before", "after"), PAIRS)
@pytest.mark.parametrize("scale", [0.0, 1.0, 1e-6, 1e-38, 1e-42, 1e4, 1e30])
def test_weights_of_every_size(before: str, after: str, scale: float) -> None:
    numbers = (np.random.default_rng(0).standard_normal(70_001) * scale).astype("f4")
    numbers[::7] = 0
    data = numbers.astype("f8").tobytes() if before == "float64" else numbers.tobytes()
    expected, found = both(data if before != "bfloat16" else numbers.view("u2")[1::2].tobytes(), before, after)

    assert expected == found


@pytest.mark.parametrize("special", [np.inf, -np.inf, np.nan, 3.4e38, -7e4, 1e-45, -0.0])
@pytest.mark.parametrize("after", ["bfloat16", "float16"])
def test_one_odd_number_among_many(after: str, special: float) -> None:
    numbers = np.random.default_rng(1).standard_normal(40_000).astype("f4")
    numbers[35_000] = special
    expected, found = both(numbers.tobytes(), "float32", after)

    assert expected == found


@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=50), st.sampled_from(["bfloat16", "float16"]))
def test_any_bits(bits: list[int], after: str) -> None:
    expected, found = both(np.array(bits, "u4").tobytes(), "float32", after)

    assert expected == found
