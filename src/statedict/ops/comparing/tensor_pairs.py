"""Two tensors side by side: what differs between them, told by the least that must be read.

Shape and dtype come first, then bytes, and numbers only where bytes differ. Both tensors are read in blocks that fit the
cache, so memory stays bounded; elements that lie scattered are gathered in the pieces that ``LazyTensor.blocks`` gives.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import isfinite
from typing import TYPE_CHECKING, NamedTuple

from statedict.checkpoint import Checkpoint
from statedict.lazy_tensor import LazyTensor
from statedict.manifest import TensorEntry
from statedict.numerics.tolerances import Tolerances
from statedict.ops.comparing.permutations import has_same_bytes, may_be_equal, transposition
from statedict.ops.comparing.walks import Room, Side, Walk
from statedict.views import packed_stride

if TYPE_CHECKING:
    from statedict.numerics.differences import Affine, Difference

__all__ = ["TRANSPOSED", "WITHIN", "Outcome", "TensorPair", "described"]

# The verdicts of numbers that differ by less than was allowed, and of dimensions that changed places.
WITHIN = "within tolerance"
TRANSPOSED = "equal after transpose"
# Zero points are numbers of the stored type, of 32 bits at most.
_ZERO_POINTS = range(-(2**31), 2**31)
# A fact of a sparse tensor's representation that says nothing about its values.
_NO_VALUE = "is_coalesced"

IsEqual = Callable[[object, object], bool]


class Outcome(NamedTuple):
    """What was found. ``kind`` is that of the record; empty where the tensors are equal."""

    kind: str  # "" | "shape" | "dtype" | "value"
    verdict: str
    difference: Difference | None = None  # the numbers, where they were compared
    first: tuple[int, ...] | None = None  # the index of the first mismatch that was met
    order: tuple[int, ...] | None = None  # the order of a's dimensions in which it is b
    unread: bool = False  # equal by the digests that both files record, or by showing the same memory


def described(entry: TensorEntry) -> str:
    """A tensor in a few words: ``float32 [4, 3]``, with its layout where that is unusual."""
    layout = f", {entry.layout}" if entry.layout != "strided" else ""
    return f"{entry.dtype} {list(entry.shape)}{layout}"


class TensorPair:
    """Two tensors to compare. ``is_equal`` compares the facts that belong to quantised tensors and their like."""

    def __init__(self, a: Side, b: Side, tolerances: Tolerances, is_equal: IsEqual, room: Room | None = None) -> None:
        self._a, self._b, self._is_equal = a, b, is_equal
        self._tolerances, self._room = tolerances, Room() if room is None else room
        self._rule = tolerances.rule(a.entry.dtype, b.entry.dtype)

    def outcome(self, *, has_same_bytes: bool | None = None) -> Outcome:
        """What differs. ``has_same_bytes`` is the answer where ``is_told_by_bytes``, if it is known already.

        Raises what reading raises.
        """
        a, b = self._a.entry, self._b.entry
        if a.shape != b.shape:
            return self._reshaped(a, b)
        if a.layout != b.layout:
            return Outcome("dtype", "another layout")
        if not (_has_values(a) and _has_values(b)):
            return self._without_values(a, b)
        if a.dtype is not b.dtype:
            return self._recast(a, b)
        if a.view is None or b.view is None:
            return self._parts(a, b)
        return self._values(a, b, has_same_bytes)

    @property
    def is_told_by_bytes(self) -> bool:
        """Whether all else is the same, so that both have to be read to see whether their bytes are."""
        a, b = self._a.entry, self._b.entry
        if a.shape != b.shape or a.layout != b.layout or a.dtype is not b.dtype or a.view is None or b.view is None:
            return False
        return bool(a.numel) and self._is_same_if_bytes_are(a) and not self._is_known(a, b)

    def _reshaped(self, a: TensorEntry, b: TensorEntry) -> Outcome:
        """What two tensors of different shapes have in common."""
        if a.dtype is not b.dtype:
            return Outcome("shape", "another shape and dtype")
        if a.view is None or b.view is None or not a.numel or not b.numel:
            return Outcome("shape", "another shape")
        order = transposition(self._a, self._b)
        if order is not None:
            return Outcome("shape", TRANSPOSED, order=order)
        if a.numel == b.numel and self._has_same_order(b):
            return Outcome("shape", "equal after reshape")
        rows = self._common_rows(a, b)
        return Outcome("shape", f"the first {rows:,} rows are equal" if rows else "another shape")

    def _has_same_order(self, b: TensorEntry) -> bool:
        """Whether the values are the same in reading order, where ``a`` can be seen in ``b``'s shape."""
        entry = self._a.entry
        if entry.dtype.bits % 8 or not LazyTensor(entry, self._a.checkpoint).is_plain or entry.view is None:
            return False
        view = entry.view._replace(stride=packed_stride(b.shape))
        seen = self._a._replace(entry=entry._replace(shape=b.shape, view=view, digest=None, memory_stride=None))
        return may_be_equal(seen, self._b) and has_same_bytes(seen, self._b)

    def _common_rows(self, a: TensorEntry, b: TensorEntry) -> int:
        """How many rows both have, if those are equal and one has more; 0 for all else."""
        if a.shape[1:] != b.shape[1:] or len(a.shape) != len(b.shape) or len(a.shape) < 2 or a.dtype.bits % 8:
            return 0
        rows = min(a.shape[0], b.shape[0])
        one, two = (
            side._replace(entry=LazyTensor(side.entry, side.checkpoint)[:rows].entry) for side in (self._a, self._b)
        )
        return rows if may_be_equal(one, two) and has_same_bytes(one, two) else 0

    def _without_values(self, a: TensorEntry, b: TensorEntry) -> Outcome:
        if a.dtype is not b.dtype:
            return Outcome("dtype", "no values to compare")
        if _has_values(a) == _has_values(b) or not a.numel:
            return Outcome("", "no values to compare")
        return Outcome("value", f"no values in {'b' if _has_values(a) else 'a'}")

    def _recast(self, a: TensorEntry, b: TensorEntry) -> Outcome:
        from statedict.numerics.differences import is_comparable

        if a.view is None or b.view is None or not is_comparable(a.dtype, b.dtype):
            return Outcome("dtype", "differs")
        found = self._numbers()
        if not (found.difference and found.difference.recast):
            return found._replace(kind="dtype", verdict="equal after cast")
        is_near = not self._rule.is_exact and not found.difference.mismatched
        return found._replace(kind="dtype", verdict=WITHIN if is_near else "differs")

    def _values(self, a: TensorEntry, b: TensorEntry, is_same: bool | None) -> Outcome:
        if self._is_same_if_bytes_are(a):
            if not a.numel or _are_one(a, b, self._a.checkpoint, self._b.checkpoint):
                return Outcome("", "identical", unread=True)
            if a.digest is not None and a.digest == b.digest:
                return Outcome("", "identical", unread=True)
            if is_same is None:
                is_same = not self._is_known(a, b) and has_same_bytes(self._a, self._b)
            if is_same:
                return Outcome("", "identical")
        found = self._numbers()
        if found.kind == "value" and found.verdict != WITHIN:
            order = transposition(self._a, self._b)
            return found if order is None else found._replace(verdict=TRANSPOSED, order=order)
        return found

    def _is_same_if_bytes_are(self, a: TensorEntry) -> bool:
        """Whether equal bytes are equal values: a NaN that isn't itself makes a tensor differ from its own bytes."""
        return self._rule.equal_nan or a.dtype.kind not in ("float", "complex")

    def _is_known(self, a: TensorEntry, b: TensorEntry) -> bool:
        """Whether it is sure without reading that the bytes are the same, or that they are not."""
        scheme = [digest.partition(":")[0] for digest in (a.digest, b.digest) if digest is not None]
        if len(scheme) == 2 and scheme[0] == scheme[1]:
            return True
        return _are_one(a, b, self._a.checkpoint, self._b.checkpoint)

    def _numbers(self, affine: tuple[Affine, Affine] | None = None) -> Outcome:
        from statedict.numerics.differences import Difference

        walk = Walk(self._a, self._b)
        found = Difference(self._a.entry.dtype, self._b.entry.dtype, self._rule, affine)
        for one, two, count in walk.blocks(room=self._room):
            found.add(one, two, count)
        found.repeated(walk.repeats)
        first = None if found.first is None else walk.index(found.first)
        return _judged(found, first)

    # ---------------------------------------------------------------- quantised, sparse and nested tensors

    def _parts(self, a: TensorEntry, b: TensorEntry) -> Outcome:
        """The tensors that the two are made of, one by one; counts are of the numbers in all parts."""
        if a.parts.keys() != b.parts.keys():
            return Outcome("value", "made of other parts")
        scales = _affine(a), _affine(b)
        if scales[0] is not None and scales[1] is not None:
            return self._quantized(a, b, (scales[0], scales[1]))
        total: Difference | None = None
        unread, verdicts = False, []
        for name in a.parts:
            pair = TensorPair(self._side(self._a, name), self._side(self._b, name), self._tolerances, self._is_equal)
            found = pair.outcome()
            verdicts.append(found.verdict)
            unread = unread or bool(found.kind and found.difference is None)
            if found.difference is not None:
                total = found.difference if total is None else total
                if total is not found.difference:
                    total.merge(found.difference)
        if unread:
            return Outcome("value", "made of other parts")
        if not self._has_same_facts(a, b):
            return Outcome("value", "other parameters", total)
        if total is None:
            return Outcome("", "no values to compare" if "no values to compare" in verdicts else "identical")
        return _judged(total, None)

    def _quantized(self, a: TensorEntry, b: TensorEntry, affine: tuple[Affine, Affine]) -> Outcome:
        """Two tensors that are each quantised as a whole, by the numbers that they stand for."""
        one, two = self._side(self._a, "int_repr"), self._side(self._b, "int_repr")
        pair = TensorPair(one, two, self._tolerances, self._is_equal)
        is_same = self._has_same_facts(a, b)
        if is_same:
            found = pair.outcome()
            if not found.kind and found.difference is None:
                return found
        found = pair._numbers(affine)
        if is_same or found.kind:
            return found
        return found._replace(kind="value", verdict="other parameters")

    def _has_same_facts(self, a: TensorEntry, b: TensorEntry) -> bool:
        """Whether scales, axes and the like are equal."""
        return self._is_equal(_facts(a.attributes), _facts(b.attributes))

    def _side(self, side: Side, part: str) -> Side:
        return Side(side.entry.parts[part], side.checkpoint)


def _judged(found: Difference, first: tuple[int, ...] | None) -> Outcome:
    if not found.different:
        return Outcome("", "equal", found)
    return Outcome("value", "changed" if found.mismatched else WITHIN, found, first)


def _has_values(entry: TensorEntry) -> bool:
    """Whether there is anything to read; a tensor of the meta device has nothing."""
    return entry.view is not None or (entry.layout != "strided" and bool(entry.parts))


def _facts(attributes: Mapping[str, object]) -> dict[str, object]:
    return {name: value for name, value in attributes.items() if name != _NO_VALUE}


def _affine(entry: TensorEntry) -> Affine | None:
    """What the integers of a tensor mean that is quantised as a whole; None for all others."""
    from statedict.numerics.differences import Affine

    scale, zero, stored = (
        entry.attributes.get("scale"),
        entry.attributes.get("zero_point"),
        entry.parts.get("int_repr"),
    )
    if entry.layout != "quantized" or stored is None or not isinstance(scale, float) or type(zero) is not int:
        return None
    return Affine(scale, zero) if isfinite(scale) and zero in _ZERO_POINTS else None


def _are_one(a: TensorEntry, b: TensorEntry, of_a: Checkpoint, of_b: Checkpoint) -> bool:
    """Whether the two show the very same elements of one storage, in memory or in an open file."""
    one, two = a.view, b.view
    if one is None or two is None or one.stride != two.stride or one.bits != two.bits:
        return False
    storage, other = one.storage, two.storage
    if one.offset != two.offset or storage.byteorder != other.byteorder or storage.nbytes != other.nbytes:
        return False
    if storage.data is not None and other.data is not None:
        from statedict.numerics.differences import address

        return address(storage.data) == address(other.data)
    here, there = storage.extent, other.extent
    if here is None or there is None or here[1:] != there[1:]:
        return False
    return of_a.reader.files[here.file] is of_b.reader.files[there.file]
