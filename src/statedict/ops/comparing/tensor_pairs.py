"""Two tensors side by side: what differs between them, told by the least that must be read.

Shape and dtype come first, then bytes, and numbers only where bytes differ. Both tensors are read in blocks that fit the
cache, so memory stays bounded; elements that lie scattered are gathered in the pieces that ``LazyTensor.blocks`` gives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from math import isfinite, prod
from typing import TYPE_CHECKING, NamedTuple

from statedict.checkpoint import Checkpoint
from statedict.io.plans import MemorySource
from statedict.manifest import StorageView, TensorEntry
from statedict.ops.sources import source_of
from statedict.views import is_dense, is_packed

if TYPE_CHECKING:
    from statedict.numerics.differences import Affine, Difference, Rule

__all__ = ["Outcome", "Side", "TensorPair", "described"]

# Bytes of one side that are looked at together: both sides and what is computed of them fit a second-level cache of 1 MiB.
_BLOCK_NBYTES = 256 * 1024
# Zero points are numbers of the stored type, of 32 bits at most.
_ZERO_POINTS = range(-(2**31), 2**31)
# A fact of a sparse tensor's representation that says nothing about its values.
_NO_VALUE = "is_coalesced"

IsEqual = Callable[[object, object], bool]


class Side(NamedTuple):
    """One of the two tensors, and the checkpoint that it is read from."""

    entry: TensorEntry
    checkpoint: Checkpoint


class Outcome(NamedTuple):
    """What was found. ``kind`` is that of the record; empty where the tensors are equal."""

    kind: str  # "" | "shape" | "dtype" | "value"
    verdict: str
    difference: Difference | None = None  # the numbers, where they were compared
    first: tuple[int, ...] | None = None  # the index of the first mismatch that was met


def described(entry: TensorEntry) -> str:
    """A tensor in a few words: ``float32 [4, 3]``, with its layout where that is unusual."""
    layout = f", {entry.layout}" if entry.layout != "strided" else ""
    return f"{entry.dtype} {list(entry.shape)}{layout}"


class TensorPair:
    """Two tensors to compare. ``is_equal`` compares the facts that belong to quantised tensors and their like."""

    def __init__(self, a: Side, b: Side, rule: Rule, is_equal: IsEqual) -> None:
        self._a, self._b, self._rule, self._is_equal = a, b, rule, is_equal

    def outcome(self) -> Outcome:
        """What differs. Raises what reading raises."""
        a, b = self._a.entry, self._b.entry
        if a.shape != b.shape:
            return Outcome("shape", "another shape" if a.dtype is b.dtype else "another shape and dtype")
        if a.layout != b.layout:
            return Outcome("dtype", "another layout")
        if not (_has_values(a) and _has_values(b)):
            return self._without_values(a, b)
        if a.dtype is not b.dtype:
            return self._recast(a, b)
        return self._values(a, b) if a.view is not None and b.view is not None else self._parts(a, b)

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
        return found._replace(kind="dtype", verdict="within tolerance" if is_near else "differs")

    def _values(self, a: TensorEntry, b: TensorEntry) -> Outcome:
        # A NaN that isn't itself makes a tensor differ from its own bytes.
        if self._rule.equal_nan or a.dtype.kind not in ("float", "complex"):
            if not a.numel or _are_one(a, b, self._a.checkpoint, self._b.checkpoint):
                return Outcome("", "identical")
            if a.digest is not None and a.digest == b.digest:
                return Outcome("", "identical")
            if self._is_known_to_differ(a, b):
                return self._numbers()
            if self._has_same_bytes():
                return Outcome("", "identical")
        return self._numbers()

    def _is_known_to_differ(self, a: TensorEntry, b: TensorEntry) -> bool:
        scheme = [digest.partition(":")[0] for digest in (a.digest, b.digest) if digest is not None]
        return len(scheme) == 2 and scheme[0] == scheme[1]

    def _has_same_bytes(self) -> bool:
        from statedict.numerics.differences import are_same_bytes

        walk = _Walk(self._a, self._b)
        return all(are_same_bytes(one, two) for one, two, _ in walk.blocks())

    def _numbers(self, affine: tuple[Affine, Affine] | None = None) -> Outcome:
        from statedict.numerics.differences import Difference

        walk = _Walk(self._a, self._b)
        found = Difference(self._a.entry.dtype, self._b.entry.dtype, self._rule, affine)
        for one, two, count in walk.blocks():
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
            pair = TensorPair(self._side(self._a, name), self._side(self._b, name), self._rule, self._is_equal)
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
        pair = TensorPair(one, two, self._rule, self._is_equal)
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
    return Outcome("value", "changed" if found.mismatched else "within tolerance", found, first)


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


class _Walk:
    """Both tensors in blocks of as many elements.

    Dimensions that both only repeat (a stride of 0) are taken once. Where both are dense in the same order, they are read
    in that order, as their storages have them.
    """

    def __init__(self, a: Side, b: Side) -> None:
        self._shape = a.entry.shape
        one, two = _steps(a.entry), _steps(b.entry)
        repeated = [size > 1 and s == 0 == t for size, s, t in zip(self._shape, one, two)]
        self.repeats = prod([size for size, only in zip(self._shape, repeated) if only])
        shape = tuple([1 if only else size for size, only in zip(self._shape, repeated)])
        self._order = shape
        self._steps: tuple[int, ...] | None = None  # of the order in which they are read, if it isn't the usual one
        if one == two and not is_packed(shape, one) and is_dense(shape, one):
            self._steps, shape = one, (prod(shape),)
        self._a, self._b = self._flattened(a, shape), self._flattened(b, shape)

    def _flattened(self, side: Side, shape: tuple[int, ...]) -> Side:
        entry = side.entry
        if shape == entry.shape or entry.view is None:
            return side
        stride = entry.view.stride if self._steps is None else (1,)
        return side._replace(entry=entry._replace(shape=shape, view=entry.view._replace(stride=stride)))

    def blocks(self) -> Iterator[tuple[memoryview, memoryview, int]]:
        """The elements as packed little-endian bytes of both, each valid until the next, and their number."""
        numel = self._a.entry.numel
        if not numel:
            return
        bits = max(self._a.entry.dtype.bits, self._b.entry.dtype.bits)
        # Whole bytes of any dtype: elements of 2, 4 and 6 bits fill them in groups of 4 at most.
        most = _BLOCK_NBYTES * 8 // bits & ~15
        a, b = _Reading(self._a, min(most, numel)), _Reading(self._b, min(most, numel))
        for first in range(0, numel, most):
            count = min(most, numel - first)
            yield a.read(first, count), b.read(first, count), count

    def index(self, position: int) -> tuple[int, ...]:
        """The index of the element that is read at that position."""
        if self._steps is not None:
            return tuple([position // max(step, 1) % size for step, size in zip(self._steps, self._order)])
        found = []
        for size in reversed(self._order):
            position, at = divmod(position, size)
            found.append(at)
        return tuple(reversed(found))


def _steps(entry: TensorEntry) -> tuple[int, ...]:
    view: StorageView | None = entry.view
    return () if view is None else view.stride


class _Reading:
    """The packed bytes of one tensor, from the first to the last."""

    def __init__(self, side: Side, most: int) -> None:
        self._dtype = side.entry.dtype
        self._source = source_of(side.entry, side.checkpoint)
        self._data = self._source.data if isinstance(self._source, MemorySource) else None
        self._buffer = memoryview(b"" if self._data is not None else bytearray(self._dtype.nbytes(most)))

    def read(self, first: int, count: int) -> memoryview:
        """That many elements; ``first`` is a multiple of 16."""
        start, nbytes = first * self._dtype.bits // 8, self._dtype.nbytes(count)
        if self._data is not None:
            return self._data[start : start + nbytes]
        buffer = self._buffer[:nbytes]
        self._source.read_into(start, buffer)
        return buffer
