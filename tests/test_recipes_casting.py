"""Casts to the bits that torch gives, and what is said about what they lose."""

from __future__ import annotations

from functools import cache
from itertools import product
from math import inf, nan
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from statedict.checkpoint import of_memory
from statedict.dtypes import BY_TORCH, DType
from statedict.lazy_tensor import LazyTensor
from statedict.numerics.casting import CastTally
from statedict.recipes.averaging import Mean
from statedict.recipes.casting import Cast
from statedict.recipes.derived import DerivedFile, Recipe

numpy = pytest.importorskip("numpy")
torch = pytest.importorskip("torch")

BITS = {
    "float64": 64,
    "float32": 32,
    "float16": 16,
    "bfloat16": 16,
    "float8_e4m3fn": 8,
    "float8_e5m2": 8,
    "float8_e4m3fnuz": 8,
    "float8_e5m2fnuz": 8,
    "float8_e8m0fnu": 8,
}
PAIRS = [(a, b) for a, b in product(BITS, BITS) if a != b]


def lazy(tensor: Any) -> LazyTensor:
    return of_memory({"t": tensor})["t"]


def computed(recipe: Recipe) -> Any:
    file = DerivedFile([recipe], "derived")
    return torch.frombuffer(bytearray(file.read(0, file.nbytes)), dtype=getattr(torch, str(recipe.dtype)))


@cache
def patterns(dtype: str) -> Any:
    """All numbers of a dtype of up to 16 bits; of wider ones every sign, exponent and leading bits, and what lies beside and between."""
    bits = BITS[dtype]
    if bits <= 16:
        made = numpy.arange(1 << bits, dtype=f"u{bits // 8}")
    else:
        kind = numpy.dtype(f"u{bits // 8}").type
        upper = numpy.arange(1 << 16, dtype=kind) << kind(bits - 16)
        half = kind(1 << (bits - 17))
        halves = numpy.arange(1 << 16, dtype=numpy.uint16).view(numpy.float16).astype(f"f{bits // 8}").view(kind)
        chance = numpy.random.default_rng(5).integers(0, 1 << bits, 200_000, kind)
        near = [
            upper,
            upper + kind(1),
            upper - kind(1),
            upper | half,
            (upper | half) + kind(1),
            (upper | half) - kind(1),
        ]
        made = numpy.concatenate([*near, halves, halves + kind(1), halves - kind(1), chance])
    return torch.from_numpy(made.view(numpy.uint8)).view(getattr(torch, dtype))


@pytest.mark.parametrize(("before", "after"), PAIRS)
def test_a_cast_has_the_bits_of_torchs_own(before: str, after: str) -> None:
    source = patterns(before)
    expected, found = source.to(getattr(torch, after)), computed(Cast(lazy(source), BY_TORCH[after]))
    are_nan = expected.double().isnan()

    assert torch.equal(are_nan, found.double().isnan())
    assert torch.equal(
        expected.view(torch.uint8).view(len(source), -1)[~are_nan],
        found.view(torch.uint8).view(len(source), -1)[~are_nan],
    )


@pytest.mark.parametrize(
    ("before", "after"), [("float32", "float16"), ("float32", "float8_e5m2"), ("float64", "float16")]
)
def test_a_nan_keeps_its_sign_and_what_fits_of_its_bits(before: str, after: str) -> None:
    source = patterns(before)[patterns(before).isnan()]
    expected = source.to(getattr(torch, after))

    assert torch.equal(expected.view(torch.uint8), computed(Cast(lazy(source), BY_TORCH[after])).view(torch.uint8))


# torch says once a process that its complex halves are experimental.
@pytest.mark.filterwarnings("ignore:ComplexHalf support")
@pytest.mark.parametrize(
    ("before", "after"), [("complex64", "complex128"), ("complex128", "complex64"), ("complex64", "complex32")]
)
def test_complex_numbers_are_cast_part_by_part(before: str, after: str) -> None:
    source = torch.view_as_complex(torch.randn(500, 2)).to(getattr(torch, before))
    expected = source.to(getattr(torch, after))

    assert torch.equal(torch.view_as_real(expected), torch.view_as_real(computed(Cast(lazy(source), BY_TORCH[after]))))


def tally(tensor: LazyTensor, dtype: DType) -> CastTally:
    """What the cast does, found block by block."""
    found, size = CastTally(tensor.entry.dtype, dtype), tensor.entry.dtype.itemsize
    data = tensor.read()
    for start in range(0, len(data), 4096 * size):
        found.add(data[start : start + 4096 * size], start // size)
    return found


def test_a_tally_counts_what_overflows_and_what_vanishes() -> None:
    values = torch.tensor([1.0, 1e-9, -1e-30, 7e4, -inf, nan, -1e5, 0.0, 2049.0])
    found = tally(lazy(values), BY_TORCH["float16"])

    assert (9, 2, 3, 2) == (found.numel, found.overflowed, found.first_overflow, found.underflowed)
    assert 1.0 == found.max_abs
    assert 1.0 == found.max_rel


def test_a_tally_of_an_exact_cast_says_so() -> None:
    found = tally(lazy(torch.tensor([1.0, -2.5, inf, nan, 0.0])), BY_TORCH["bfloat16"])

    assert found.is_exact


def test_numbers_that_are_cut_to_the_largest_count_as_overflow() -> None:
    found = tally(lazy(torch.tensor([1.0, 448.0, 464.0, 465.0, -1e9, inf])), BY_TORCH["float8_e4m3fn"])

    assert (2, 3, 16.0) == (found.overflowed, found.first_overflow, found.max_abs)


def test_a_tally_of_complex_numbers_counts_their_parts() -> None:
    found = tally(lazy(torch.tensor([1 + 1j, 2 + 1e300j], dtype=torch.complex128)), BY_TORCH["complex64"])

    assert (4, 1, 1) == (found.numel, found.overflowed, found.first_overflow)


@given(
    st.integers(0, 2**32),
    st.sampled_from([("float32", "float16"), ("float64", "bfloat16"), ("bfloat16", "float8_e5m2")]),
)
def test_a_tally_is_what_torch_finds(seed: int, pair: tuple[str, str]) -> None:
    before, after = (getattr(torch, name) for name in pair)
    generator = torch.Generator().manual_seed(seed)
    values = (torch.randn(400, generator=generator) * 10.0 ** torch.randint(-12, 7, (400,), generator=generator)).to(
        before
    )
    wide, cast = values.double(), values.to(after).double()
    beyond = cast.isinf()
    apart = (wide - cast).abs()[~beyond]
    found = tally(lazy(values), BY_TORCH[pair[1]])

    assert int(beyond.sum()) == found.overflowed
    assert int(((cast == 0) & (wide != 0)).sum()) == found.underflowed
    assert found.max_abs == pytest.approx(float(apart.max()), rel=1e-6)
    assert found.max_rel == pytest.approx(float((apart / wide.abs()[~beyond]).nan_to_num(0).max()), rel=1e-6)


def test_a_tally_over_many_blocks_counts_positions_in_the_whole_tensor() -> None:
    values = torch.zeros(3_000_000)
    values[[17, 2_900_000]] = torch.tensor([1e30, 1e-30])
    found = tally(lazy(values), BY_TORCH["float16"])

    assert (3_000_000, 1, 17, 1) == (found.numel, found.overflowed, found.first_overflow, found.underflowed)


@given(
    st.data(),
    st.sampled_from(["float64", "float32", "float16", "bfloat16", "complex64"]),
    st.sampled_from(["float32", "float64"]),
)
def test_a_mean_is_what_torch_computes_in_float64(data: st.DataObject, dtype: str, accumulate: Any) -> None:
    count, seed = data.draw(st.integers(1, 5)), data.draw(st.integers(0, 2**32))
    generator = torch.Generator().manual_seed(seed)
    kind = getattr(torch, dtype)
    tensors = [
        torch.randn(5, 7, dtype=torch.complex128 if kind.is_complex else torch.float64, generator=generator)
        for _ in range(count)
    ]
    tensors = [tensor.to(kind).T for tensor in tensors]
    weights = torch.rand(count, generator=generator).double()
    expected = sum(
        tensor.to(torch.complex128 if kind.is_complex else torch.float64) * weight
        for tensor, weight in zip(tensors, weights)
    )
    found = computed(Mean([lazy(tensor) for tensor in tensors], weights.tolist(), accumulate)).reshape(7, 5)

    # float32 sums of wider numbers are as good as float32.
    wide = {"float64": torch.float32, "complex64": torch.complex64}.get(dtype, kind)
    torch.testing.assert_close(found.to(wide), expected.to(wide))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("accumulate", ["float32", "float64"])
def test_the_mean_of_a_tensor_with_itself_is_itself(dtype: str, accumulate: Any) -> None:
    if (dtype, accumulate) == ("float32", "float32"):
        accumulate = "float64"  # float32 alone may be off in its last bit
    values = torch.randn(2000).to(getattr(torch, dtype))
    found = computed(Mean([lazy(values)] * 3, [1 / 3] * 3, accumulate))

    assert torch.equal(values, found)
