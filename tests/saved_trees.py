"""Random trees of everything that torch can save and load with ``weights_only=True``: dtypes, views, sharing, containers."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from hypothesis import strategies as st

__all__ = ["memory_overlaps", "trees", "walk"]

DTYPES = [
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool, torch.complex64, torch.complex128,
]  # fmt: skip
NEW_DTYPES = [
    torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.float8_e8m0fnu,
    torch.uint16, torch.uint32, torch.uint64, torch.complex32,
]  # fmt: skip
BASE_NUMEL = 48


def base(dtype: torch.dtype, seed: int) -> torch.Tensor:
    """A storage of 48 elements of random bytes, seen as that dtype."""
    raw = torch.randint(0, 256, (BASE_NUMEL * dtype.itemsize,), generator=torch.Generator().manual_seed(seed))
    if dtype == torch.bool:
        raw = raw % 2
    return raw.to(torch.uint8).view(dtype)


@st.composite
def views(draw: Any, bases: list[torch.Tensor]) -> torch.Tensor:
    """A tensor that shows some of one of the storages."""
    tensor = draw(st.sampled_from(bases))
    kind = draw(
        st.sampled_from(["whole", "rows", "columns", "transposed", "step", "expanded", "scalar", "empty", "windows"])
    )
    square = tensor[:48].view(6, 8)
    first = draw(st.integers(0, 5))
    made = {
        "whole": lambda: tensor,
        "rows": lambda: square[first : first + draw(st.integers(1, 3))],
        "columns": lambda: square[:, first : first + draw(st.integers(1, 2))],
        "transposed": lambda: square[first:].t(),
        "step": lambda: tensor[first :: draw(st.integers(1, 5))],
        "expanded": lambda: square[first].expand(draw(st.integers(1, 3)), 8),
        "scalar": lambda: tensor[first],
        "empty": lambda: square[first, :0],
        "windows": lambda: tensor.as_strided((draw(st.integers(1, 4)), 3), (1, 1), first),
    }[kind]()
    if draw(st.booleans()) and made.is_floating_point() and made.dtype in DTYPES:
        made = made.detach().requires_grad_(draw(st.booleans()))
    return made


def trees(*, new_dtypes: bool = True) -> st.SearchStrategy[Any]:
    """Nested values, with tensors that share storages among them."""
    dtypes = st.sampled_from(DTYPES + NEW_DTYPES if new_dtypes else DTYPES)
    storages = st.lists(st.builds(base, dtypes, st.integers(0, 1000)), min_size=1, max_size=3)
    return storages.flatmap(_values)


def _values(bases: list[torch.Tensor]) -> st.SearchStrategy[Any]:
    scalars = (
        st.none()
        | st.booleans()
        | st.integers(-(2**70), 2**70)
        | st.floats()
        | st.text(max_size=4)
        | st.binary(min_size=1, max_size=4)
        | st.complex_numbers()
        | st.sampled_from([torch.float32, torch.bfloat16, torch.Size([1, 2]), torch.device("cuda:1"), torch.sparse_coo])
    )
    leaves = st.one_of(views(bases), views(bases), scalars)
    keys = st.text(max_size=3) | st.integers(-3, 3) | st.tuples(st.integers(0, 3), st.text(max_size=1))
    return st.recursive(
        leaves,
        lambda inner: (
            st.lists(inner, max_size=4)
            | st.tuples(inner, inner)
            | st.dictionaries(keys, inner, max_size=4)
            | st.dictionaries(st.text(max_size=3), inner, min_size=1, max_size=4).map(OrderedDict)
        ),
        max_leaves=8,
    )


def walk(value: Any, path: tuple[object, ...] = ()) -> list[tuple[tuple[object, ...], Any]]:
    """The leaves of a tree with their paths."""
    if isinstance(value, dict):
        return [leaf for key, item in value.items() for leaf in walk(item, (*path, key))]
    if type(value) in (list, tuple):
        return [leaf for index, item in enumerate(value) for leaf in walk(item, (*path, index))]
    return [(path, value)]


def memory_overlaps(value: Any) -> set[frozenset[tuple[object, ...]]]:
    """The pairs of tensors of a tree whose ranges of memory have bytes in common."""
    spans = []
    for path, tensor in walk(value):
        if isinstance(tensor, torch.Tensor) and tensor.numel():
            reach = 1 + sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride()))
            spans.append((path, tensor.data_ptr(), tensor.data_ptr() + reach * tensor.element_size()))
    return {
        frozenset((one[0], other[0]))
        for at, one in enumerate(spans)
        for other in spans[at + 1 :]
        if one[1] < other[2] and other[1] < one[2]
    }
