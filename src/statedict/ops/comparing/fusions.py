"""Tensors that are made of others: fused or stacked ones, told by the digests of rows.

A tensor can be cut into rows along its first dimension, along its second, or along both at once; a part can be one row, or
many. Where the rows of one tensor, in order, are all rows of several others, it was made of them, and it could be cut into them.
Rows of one element say little alone, but a part has to be there as a whole, and one whose elements are all equal is
no part of anything.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

from statedict.ops.comparing.digests import row_digests
from statedict.ops.comparing.permutations import permuted
from statedict.ops.comparing.walks import Side

__all__ = ["Fusion", "fusions"]

# Rows whose digests are kept, of all tensors together: 8 bytes each.
_MOST_ROWS = 4_000_000
# Elements of a vector from which on it is taken to be made of others: fewer can be put together by chance.
_FEWEST_ELEMENTS = 8

_Group = tuple[str, tuple[int, ...]]


class Fusion(NamedTuple):
    """A tensor, and the parts that it is made of, in order.

    Of ``stacked`` parts each is one index of the dimension ``dim``, of others a range of it. ``turned`` ones have their first two
    dimensions swapped before. ``flat`` says that the result has two dimensions where the parts have one: it's reshaped.
    """

    whole: str
    parts: tuple[str, ...]
    dim: int
    stacked: bool
    turned: bool
    flat: bool
    sizes: tuple[int, ...]  # rows of each part along that dimension
    shape: tuple[int, ...]  # of the whole


class _Facet(NamedTuple):
    """A tensor cut into rows in one way."""

    key: str
    form: str  # "rows" | "columns" | "flat" | "one" | "turned"
    rows: int
    group: _Group  # dtype, and shape of a row

    @property
    def is_turned(self) -> bool:
        return self.form in ("columns", "turned")


def fusions(
    wholes: Mapping[str, Side], parts: Mapping[str, Side], is_constant: Callable[[str], bool]
) -> Iterator[Fusion]:
    """The tensors of ``wholes`` that are two or more of ``parts`` together; a part is used once. Raises what reading raises.

    ``is_constant`` says of a part whether all its elements are equal.
    """
    search = _Search(wholes, parts, is_constant)
    for key in wholes:
        found = search.explained(key)
        if found is not None:
            yield found


class _Search:
    def __init__(
        self, wholes: Mapping[str, Side], parts: Mapping[str, Side], is_constant: Callable[[str], bool]
    ) -> None:
        self._wholes, self._parts, self._is_constant = wholes, parts, is_constant
        self._used: set[str] = set()
        self._rows = 0
        self._digests: dict[tuple[str, str], array[int]] = {}
        self._groups: dict[_Group, list[_Facet]] = {}
        for key, side in parts.items():
            for facet in _part_facets(key, side):
                self._groups.setdefault(facet.group, []).append(facet)

    def explained(self, key: str) -> Fusion | None:
        """The parts of one tensor."""
        for facet in _whole_facets(key, self._wholes[key]):
            forms: dict[str, list[_Facet]] = {}
            for part in self._groups.get(facet.group, []):
                if part.key not in self._used and part.rows < facet.rows:
                    forms.setdefault(part.form, []).append(part)
            for form, candidates in forms.items():
                if sum([part.rows for part in candidates]) >= facet.rows:
                    found = self._covered(facet, [part for part in candidates if not self._is_constant(part.key)])
                    if found:
                        self._used.update([part.key for part in found])
                        return self._fusion(facet, form, found)
        return None

    def _fusion(self, facet: _Facet, form: str, found: Sequence[_Facet]) -> Fusion:
        """What it means that the rows of parts, cut in that form, are the rows of a tensor."""
        is_across = facet.form == "columns"
        return Fusion(
            facet.key,
            tuple([part.key for part in found]),
            dim=1 if is_across else 0,
            stacked=form in ("one", "turned"),
            turned=form in (("rows", "turned") if is_across else ("columns", "turned")),
            flat=facet.form == "flat",
            sizes=tuple([part.rows for part in found]),
            shape=self._wholes[facet.key].entry.shape,
        )

    def _covered(self, facet: _Facet, candidates: Sequence[_Facet]) -> list[_Facet]:
        """The parts whose rows are all rows of the tensor, one behind the other; none where some row is of no part."""
        wanted = self._of(self._wholes[facet.key], facet)
        firsts: dict[int, list[tuple[_Facet, array[int]]]] = {}
        for part in candidates:
            rows = self._of(self._parts[part.key], part)
            if rows:
                firsts.setdefault(rows[0], []).append((part, rows))
        found: list[_Facet] = []
        at = 0
        while at < len(wanted):
            fitting = [
                (part, rows)
                for part, rows in firsts.get(wanted[at], [])
                if part not in found and wanted[at : at + len(rows)] == rows
            ]
            if not fitting:
                return []
            part, rows = max(fitting, key=lambda pair: len(pair[1]))
            found.append(part)
            at += len(rows)
        return found

    def _of(self, side: Side, facet: _Facet) -> array[int]:
        """The digests of the rows; none where there would be too many."""
        # No key is on both sides.
        name = facet.key, facet.form
        known = self._digests.get(name)
        if known is None:
            if self._rows + facet.rows > _MOST_ROWS:
                return array("Q")
            self._rows += facet.rows
            turned = side._replace(entry=permuted(side.entry, _swap(side))) if facet.is_turned else side
            known = self._digests[name] = row_digests(turned, facet.rows)
        return known


def _swap(side: Side) -> tuple[int, ...]:
    return (1, 0, *range(2, len(side.entry.shape)))


def _whole_facets(key: str, side: Side) -> Iterator[_Facet]:
    """The ways to cut a tensor that others may be parts of."""
    code, shape = side.entry.dtype.code, side.entry.shape
    if len(shape) > 1 or side.entry.numel >= _FEWEST_ELEMENTS:
        yield _Facet(key, "rows", shape[0], (code, shape[1:]))
    if len(shape) > 1:
        yield _Facet(key, "columns", shape[1], (code, (shape[0], *shape[2:])))
    if len(shape) > 2:
        yield _Facet(key, "flat", shape[0] * shape[1], (code, shape[2:]))


def _part_facets(key: str, side: Side) -> Iterator[_Facet]:
    """The ways in which a tensor can be a part: as one row, or by rows of its own."""
    code, shape = side.entry.dtype.code, side.entry.shape
    if not shape:
        return
    yield _Facet(key, "one", 1, (code, shape))
    yield _Facet(key, "rows", shape[0], (code, shape[1:]))
    if len(shape) > 1:
        yield _Facet(key, "turned", 1, (code, (shape[1], shape[0], *shape[2:])))
        yield _Facet(key, "columns", shape[1], (code, (shape[0], *shape[2:])))
