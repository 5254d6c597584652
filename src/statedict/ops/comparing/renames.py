"""Renames found by content: a tensor of one side only that is one, or several, of the other side only.

Two tensors with the same bytes are one under two names; also where its dimensions changed places or another shape was given to
it, and where several were fused or stacked into it. What is compared are digests, of tensors that could be meant by dtype and number of
elements. A tensor whose elements are all equal (fresh biases and norms, counters) proves nothing, and neither does one of several
equal ones: those are paired where their neighbours' names leave no choice, and else left alone, which a finding says.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from typing import NamedTuple

from statedict.manifest import Finding, TensorEntry
from statedict.ops.comparing.digests import Content, content_of
from statedict.ops.comparing.fusions import Fusion, fusions
from statedict.ops.comparing.keyed import Keyed
from statedict.ops.comparing.neighbours import Neighbours, paired_by_template
from statedict.ops.comparing.permutations import may_be_equal, orders, permuted
from statedict.ops.comparing.walks import Side
from statedict.ops.findings import named
from statedict.report.units import plural

__all__ = ["Rename", "Renames", "renames_of"]

# Candidates of which single elements are looked at before a transposed tensor is read.
_MOST_PROBED = 64
# Parts that a proof names.
_NAMED = 4

STRUCTURE = "same structure"


class Rename(NamedTuple):
    """A tensor, or parts, of A that is a tensor, or parts, of B; and what shows it.

    ``order`` is the order of A's dimensions that gives B's tensor, ``shape`` B's shape where another was given to the same elements, and
    ``fusion`` says how parts make a whole.
    """

    a: tuple[str, ...]
    b: tuple[str, ...]
    proof: str
    order: tuple[int, ...] | None = None
    shape: tuple[int, ...] | None = None
    fusion: Fusion | None = None

    def keys(self, side: int) -> tuple[str, ...]:
        """The keys of A (0) or of B (1)."""
        return self.b if side else self.a

    def to_dict(self) -> dict[str, object]:
        """The pair, JSON-ready: a key is a text, the keys of parts are a list."""
        a, b = (keys[0] if len(keys) == 1 else list(keys) for keys in (self.a, self.b))
        return {"a": a, "b": b, "proof": self.proof}


class _Class(NamedTuple):
    """Tensors of both sides that are equal, in the order of dimensions that is given for those of A."""

    old: list[str]
    new: list[str]
    is_constant: bool = False
    orders: Mapping[str, tuple[int, ...]] = {}

    @property
    def proof(self) -> str:
        """What their content shows."""
        if self.is_constant:
            return STRUCTURE
        return "same bytes, transposed" if self.orders else "same bytes"


class Renames(NamedTuple):
    """What was found, and what a person should know about the rest."""

    renamed: list[Rename]
    findings: list[Finding]


def renames_of(a: Keyed, b: Keyed, only: tuple[Sequence[str], Sequence[str]], same: Collection[str]) -> Renames:
    """The renames among the keys that only one side has; ``same`` are keys that both have with equal values.

    Reads the tensors that could be meant once or twice. Raises what reading raises.
    """
    search = _Search(a, b, only)
    if not (search.open[0] and search.open[1]):
        return Renames([], [])
    for key in same:
        search.neighbours.add(key, key)
    search.run()
    order = {key: at for at, key in enumerate(a.leaves)}
    return Renames(sorted(search.found, key=lambda rename: order[rename.a[0]]), list(search.findings()))


class _Search:
    """One search. ``open`` are the tensors of each side that were not found yet."""

    def __init__(self, a: Keyed, b: Keyed, only: tuple[Sequence[str], Sequence[str]]) -> None:
        self.open: tuple[dict[str, Side], dict[str, Side]] = (
            {key: a.side(key) for key in only[0] if _is_readable(a.leaves[key], a)},
            {key: b.side(key) for key in only[1] if _is_readable(b.leaves[key], b)},
        )
        self.found: list[Rename] = []
        self.neighbours = Neighbours()
        self._tied = a.ties(self.open[0]), b.ties(self.open[1])
        self._contents: tuple[dict[str, Content], dict[str, Content]] = ({}, {})
        self._unclear: list[_Class] = []

    def run(self) -> None:
        """The search, from what is certain to what follows from it."""
        self._read()
        self._exact(with_shape=True)
        self._exact(with_shape=False)
        self._transposed()
        self._fused()
        while self._decided(self.neighbours.named):
            pass
        self._fused_constants()
        while self._decided(self.neighbours.named) or self._decided(self.neighbours.left_over):
            pass

    def _take(self, old: str, new: str, proof: str, order: tuple[int, ...] | None = None) -> None:
        one, two = self.open[0].pop(old), self.open[1].pop(new)
        self.neighbours.add(old, new)
        reshaped = order is None and one.entry.shape != two.entry.shape
        if reshaped and proof != STRUCTURE:
            proof = f"{proof}, reshaped"
        self.found.append(Rename((old,), (new,), proof, order, two.entry.shape if reshaped else None))

    def _read(self) -> None:
        """The digests of all tensors for which the other side has one of the same dtype and number of elements."""
        sizes = [{_size(side) for side in sides.values()} for sides in self.open]
        for sides, contents, others in zip(self.open, self._contents, reversed(sizes)):
            known: dict[object, Content] = {}
            for key, side in sides.items():
                if _size(side) in others:
                    view = side.entry.view
                    assert view is not None
                    mark = view.storage.id, view.offset, view.stride, view.bits, side.entry.shape, side.entry.dtype.code
                    contents[key] = known[mark] = known.get(mark) or content_of(side)

    def _classes(self, with_shape: bool) -> dict[object, tuple[list[str], list[str]]]:
        """The keys of both sides by dtype, digest and shape."""
        classes: dict[object, tuple[list[str], list[str]]] = {}
        for number, (sides, contents) in enumerate(zip(self.open, self._contents)):
            for key, side in sides.items():
                if key in contents:
                    shape = side.entry.shape if with_shape else None
                    mark = side.entry.dtype.code, contents[key], shape
                    classes.setdefault(mark, ([], []))[number].append(key)
        return {mark: keys for mark, keys in classes.items() if keys[0] and keys[1]}

    def _exact(self, *, with_shape: bool) -> None:
        """Tensors with the same bytes, under another name and perhaps in another shape."""
        self._unclear = [] if with_shape else self._unclear
        for old, new in self._classes(with_shape).values():
            is_constant = self._contents[0][old[0]].is_constant
            if not is_constant:
                self._pair(_Class(old, new))
            elif with_shape:
                self._unclear.append(_Class(old, new, is_constant=True))

    def _pair(self, found: _Class) -> None:
        """Pair equal tensors where there is no choice, or where any choice would be right; else keep them for later."""
        old, new = found.old, found.new
        pairs = list(zip(old, new)) if self._is_one(0, old) and self._is_one(1, new) else paired_by_template(old, new)
        for one, two in pairs:
            self._take(one, two, found.proof, found.orders.get(one))
        if not pairs:
            self._unclear.append(found)

    def _is_one(self, number: int, keys: Sequence[str]) -> bool:
        """Whether the keys are of one tensor: there is one, or they are tied."""
        return len(keys) == 1 or self._tied[number].get(keys[0], frozenset()) >= set(keys)

    def _transposed(self) -> None:
        """Tensors whose dimensions changed places."""
        there: dict[tuple[str, tuple[int, ...]], list[str]] = {}
        for key, side in self.open[1].items():
            if key in self._contents[1] and not self._contents[1][key].is_constant:
                there.setdefault((side.entry.dtype.code, side.entry.shape), []).append(key)
        unclear: dict[tuple[str, ...], list[tuple[str, tuple[int, ...]]]] = {}
        for key, side in list(self.open[0].items()):
            if key not in self._contents[0] or self._contents[0][key].is_constant:
                continue
            for order, new in self._turned(side, there):
                unclear.setdefault(tuple(new), []).append((key, order))
                break
        for names, found in unclear.items():
            left = [name for name in names if name in self.open[1]]
            if left:
                self._pair(_Class([key for key, _ in found], left, orders=dict(found)))

    def _turned(
        self, side: Side, there: dict[tuple[str, tuple[int, ...]], list[str]]
    ) -> Iterator[tuple[tuple[int, ...], list[str]]]:
        """The orders of a tensor's dimensions that make it one of the other side, and the keys of those."""
        code = side.entry.dtype.code
        shapes = [shape for dtype, shape in there if dtype == code]
        for shape in shapes:
            for order in orders(side.entry.shape, shape):
                turned = side._replace(entry=permuted(side.entry, order))
                names = [name for name in there[code, shape] if name in self.open[1]]
                few = len(names) <= _MOST_PROBED
                if few and not any(may_be_equal(turned, self.open[1][name]) for name in names):
                    continue
                digest = content_of(turned).digest
                equal = [name for name in names if self._contents[1][name].digest == digest]
                if equal:
                    yield order, equal

    def _fused(self) -> None:
        """Tensors of one side that are several of the other."""
        for number in (1, 0):
            wholes, parts = self.open[number], self.open[1 - number]
            is_constant = partial(self._is_constant, 1 - number)
            for fusion in list(fusions(dict(wholes), dict(parts), is_constant)):
                self._take_fusion(fusion, number, "rows of")

    def _take_fusion(self, fusion: Fusion, number: int, proof: str) -> None:
        """Take in a tensor of side ``number`` and its parts on the other."""
        del self.open[number][fusion.whole]
        for part in fusion.parts:
            del self.open[1 - number][part]
        more = len(fusion.parts) - _NAMED
        names = ", ".join(fusion.parts[:_NAMED]) + (f" and {more} more" if more > 0 else "")
        if proof == "rows of":
            proof = f"rows of {names if number else fusion.whole}"
        a, b = (fusion.parts, (fusion.whole,)) if number else ((fusion.whole,), fusion.parts)
        self.found.append(Rename(a, b, proof, fusion=fusion))

    def _is_constant(self, number: int, key: str) -> bool:
        contents = self._contents[number]
        if key not in contents:
            contents[key] = content_of(self.open[number][key])
        return contents[key].is_constant

    def _decided(self, choose: Callable[[Sequence[str], Sequence[str]], list[tuple[str, str]]]) -> bool:
        """Pair equal tensors that their neighbours' names decide about; whether there were any."""
        before = len(self.found)
        for found in self._unclear:
            for one, two in choose(*self._left(found)):
                self._take(one, two, found.proof, found.orders.get(one))
        return len(self.found) > before

    def _left(self, found: _Class) -> tuple[list[str], list[str]]:
        """The keys of a class that were not paired yet."""
        return [key for key in found.old if key in self.open[0]], [key for key in found.new if key in self.open[1]]

    def _fused_constants(self) -> None:
        """Constant tensors beside fused ones: the biases of what was fused, by the same names."""
        for rename in [rename for rename in self.found if rename.fusion is not None]:
            fusion = rename.fusion
            assert fusion is not None
            number = 1 if len(rename.b) == 1 else 0
            if fusion.dim == 0 and not fusion.flat:
                for leaf in {key.rpartition(".")[2] for key in self.open[number]}:
                    self._fused_sibling(fusion, number, leaf)

    def _fused_sibling(self, fusion: Fusion, number: int, leaf: str) -> None:
        whole = f"{fusion.whole.rpartition('.')[0]}.{leaf}".lstrip(".")
        parts = tuple([f"{part.rpartition('.')[0]}.{leaf}".lstrip(".") for part in fusion.parts])
        sides = [self.open[1 - number].get(part) for part in parts]
        side = self.open[number].get(whole)
        entries = [each.entry for each in sides if each is not None]
        if side is None or len(entries) < len(parts) or len(set(parts)) < len(parts):
            return
        if not _fits(side.entry, entries, fusion.stacked):
            return
        firsts = {self._first(1 - number, part) for part in parts} | {self._first(number, whole)}
        if len(firsts) == 1 and None not in firsts:
            sizes = tuple([1 if fusion.stacked else entry.shape[0] for entry in entries])
            sibling = Fusion(whole, parts, 0, fusion.stacked, False, False, sizes, side.entry.shape)
            self._take_fusion(sibling, number, STRUCTURE)

    def _first(self, number: int, key: str) -> bytes | None:
        """The element that a tensor repeats; None where its elements aren't all equal."""
        if not self._is_constant(number, key):
            return None
        side = self.open[number][key]
        entry = side.entry
        first = entry._replace(shape=(), view=entry.view._replace(stride=()) if entry.view else None, digest=None)
        return content_of(side._replace(entry=first)).digest

    def findings(self) -> Iterator[Finding]:
        """What is left that has equals on the other side."""
        for is_constant, code in ((True, "constant-tensors"), (False, "equal-tensors")):
            keys: dict[str, None] = {}
            for found in self._unclear:
                here, there = self._left(found)
                if found.is_constant == is_constant and here and there:
                    keys.update(dict.fromkeys(here))
            if keys:
                why = "all their elements are equal" if is_constant else "each could be one of several"
                text = (
                    f"{plural(len(keys), 'tensor')} only in A {'equals' if len(keys) == 1 else 'equal'} some only in B, "
                    f"which proves no rename ({why}): {named(tuple(keys))}"
                )
                yield Finding(code, "info", text, tuple(keys))


def _fits(whole: TensorEntry, parts: Sequence[TensorEntry], stacked: bool) -> bool:
    """Whether the shapes and dtypes of the parts make the whole along the first dimension."""
    if any(part.dtype is not whole.dtype or not part.numel for part in parts):
        return False
    if stacked:
        return all(whole.shape == (len(parts), *part.shape) for part in parts)
    rest = {part.shape[1:] for part in parts if part.shape}
    return rest == {whole.shape[1:]} and sum([part.shape[0] for part in parts if part.shape]) == whole.shape[0]


def _size(side: Side) -> tuple[str, int]:
    return side.entry.dtype.code, side.entry.numel


def _is_readable(leaf: object, side: Keyed) -> bool:
    """Whether it is a tensor with whole bytes of its own to read, and no view that unfolds into more than is allowed."""
    if not isinstance(leaf, TensorEntry) or leaf.view is None or not leaf.numel or leaf.dtype.bits % 8:
        return False
    return leaf.nbytes - leaf.view.storage.nbytes <= side.checkpoint.limits.expanded_bytes
