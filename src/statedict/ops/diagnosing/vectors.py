"""Vectors that are part of others, or several one behind the other: biases of fused layers. They are compared as bytes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from statedict.aligning.alignment import PROVEN, Mapped
from statedict.dtypes import BY_CODE
from statedict.ops.diagnosing.layouts import Laid

__all__ = ["vectors_of"]

# Vectors by dtype.
_ByDType = dict[str, list[Laid]]


def vectors_of(source: Sequence[Laid], target: Sequence[Laid]) -> list[Mapped]:
    """The vectors of the target that are a range of one of the source, or several of those one behind the other."""
    here, there = _grouped(source), _grouped(target)
    found: list[Mapped] = []
    for dtype, wanted in there.items():
        wholes = here.get(dtype, [])
        begins = _begins(wholes, dtype)
        for laid in wanted:
            made = _range(laid, wholes, dtype) or _joined(laid, begins, dtype)
            if made is not None:
                found.append(made)
    return found


def _grouped(vectors: Sequence[Laid]) -> _ByDType:
    groups: _ByDType = {}
    for laid in vectors:
        if laid.data and len(laid.form.long) == 1:
            groups.setdefault(laid.dtype, []).append(laid)
    return groups


def _range(laid: Laid, wholes: Sequence[Laid], dtype: str) -> Mapped | None:
    """The range of one longer vector that a vector is; None where there is no such, or where there are several."""
    if laid.is_constant:
        return None
    size = BY_CODE[dtype].itemsize
    places = [
        (whole, at)
        for whole in wholes
        if len(whole.data) > len(laid.data)
        for at in _places(whole.data, laid.data, size)
    ]
    if len(places) != 1:
        return None
    whole, at = places[0]
    start, stop = at // size, (at + len(laid.data)) // size
    args = {"dim": whole.form.dim(0), "start": start, "stop": stop}
    reason = f"the same values: elements {start:,} to {stop - 1:,}"
    return Mapped(laid.key, "split", (whole.key,), PROVEN, (reason,), args)


def _places(data: bytes, part: bytes, size: int) -> Iterator[int]:
    """Where the part stands in the data, at whole elements."""
    at = data.find(part)
    while at >= 0:
        if at % size == 0:
            yield at
        at = data.find(part, at + 1)


def _begins(parts: Sequence[Laid], dtype: str) -> Mapping[bytes, list[Laid]]:
    """The vectors by their first element."""
    size = BY_CODE[dtype].itemsize
    found: dict[bytes, list[Laid]] = {}
    for laid in parts:
        found.setdefault(laid.data[:size], []).append(laid)
    return found


def _joined(laid: Laid, begins: Mapping[bytes, list[Laid]], dtype: str) -> Mapped | None:
    """The vectors that one consists of. Constant ones among them could be any: they leave it open."""
    size, at, parts = BY_CODE[dtype].itemsize, 0, []
    while at < len(laid.data):
        fitting = [
            part
            for part in begins.get(laid.data[at : at + size], [])
            if laid.data.startswith(part.data, at) and part not in parts and len(part.data) < len(laid.data)
        ]
        if len(fitting) != 1 or fitting[0].is_constant:
            return None
        parts.append(fitting[0])
        at += len(fitting[0].data)
    dims = {part.form.dim(0) for part in parts}
    if len(dims) != 1 or len({len(part.form.shape) for part in parts}) != 1:
        return None
    reason = f"the same values: those of {len(parts):,} tensors, one behind the other"
    return Mapped(laid.key, "concat", tuple([part.key for part in parts]), PROVEN, (reason,), {"dim": dims.pop()})
