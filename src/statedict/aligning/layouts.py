"""How parts lie in a tensor that holds them, and the operations that take them out or put them together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from statedict.aligning.alignment import CORROBORATED, Mapped
from statedict.aligning.families import Family

__all__ = ["Layout", "Match", "join", "layouts_of", "split"]

Shape = tuple[int, ...]


class Layout(NamedTuple):
    """How the parts lie in the whole, as of the whole's dimensions (of one member, if it is a stack)."""

    dim: int
    is_stacked: bool
    is_transposed: bool


class Match(NamedTuple):
    """A whole on one side and its parts on the other, in the order in which they lie in it."""

    whole: Family
    parts: tuple[Family, ...]
    layouts: tuple[Layout, ...]
    is_ordered: bool
    likeness: float


def layouts_of(whole: Family, parts: Sequence[Family]) -> Iterator[Layout]:
    """The ways in which the shapes of the parts make up that of the whole, for each of its members."""
    is_stacked = len(parts[0].lengths) == len(whole.lengths) + 1
    pairs = _stacked(whole, parts) if is_stacked else _beside(whole, parts)
    for is_transposed in (False, True):
        for dim in range(len(pairs[0][0]) if pairs else 0):
            if (len(parts) > 1 or dim == 0) and all(_fits(outer, inner, dim, is_transposed) for outer, inner in pairs):
                yield Layout(dim, is_stacked, is_transposed)


def _beside(whole: Family, parts: Sequence[Family]) -> list[tuple[Shape, list[Shape]]]:
    """For each member of the whole its shape, and those of its parts."""
    if len(parts) < 2 or not all(part.aligns(whole) for part in parts):
        return []
    return [(outer, [part.shapes[at] for part in parts]) for at, outer in enumerate(whole.shapes)]


def _stacked(whole: Family, parts: Sequence[Family]) -> list[tuple[Shape, list[Shape]]]:
    """The same for parts that have one list more: the shape of one layer of the whole, if all layers are alike."""
    count = parts[0].lengths[-1]
    places = tuple((*place, n) for place in whole.places for n in range(count))
    if any(
        part.places != places or part.lengths != (*whole.lengths, count) or part.kind != whole.kind for part in parts
    ):
        return []
    found = []
    for at, outer in enumerate(whole.shapes):
        inner = [part.shapes[at * count : (at + 1) * count] for part in parts]
        if outer[:1] != (count,) or any(len({*shapes}) > 1 for shapes in inner):
            return []
        found.append((outer[1:], [shapes[0] for shapes in inner]))
    return found


def _fits(whole: tuple[int, ...], parts: Sequence[tuple[int, ...]], dim: int, is_transposed: bool) -> bool:
    if is_transposed:
        if any(len(part) != 2 for part in parts):
            return False
        parts = [part[::-1] for part in parts]
    if any(len(part) != len(whole) or dim >= len(part) for part in parts):
        return False
    rest = {part[:dim] + part[dim + 1 :] for part in parts}
    return rest == {whole[:dim] + whole[dim + 1 :]} and sum(part[dim] for part in parts) == whole[dim]


def _reasons(match: Match) -> tuple[str, ...]:
    sizes = "the sizes of the parts add up to it" if len(match.parts) > 1 else "there are as many as it has layers"
    return (
        f"the name lists the parts: {', '.join(part.path[-1] for part in match.parts)}",
        sizes,
        "they stand in the same place",
    )


def split(match: Match, layout: Layout) -> Iterator[Mapped]:
    """The parts taken out of the whole, member by member."""
    for at, source in enumerate(match.whole.keys):
        start = 0
        for part in match.parts:
            count = part.lengths[-1] if layout.is_stacked else 1
            shape = part.shapes[at * count]
            size = shape[::-1][layout.dim] if layout.is_transposed else shape[layout.dim]
            cut: dict[str, object] = {"dim": layout.dim, "start": start, "stop": start + size}
            turn = [{"op": "transpose", "dims": [1, 0]}] if layout.is_transposed else []
            for n in range(count):
                target = part.keys[at * count + n]
                if layout.is_stacked:
                    then = ([{"op": "split", **cut}] if len(match.parts) > 1 else []) + turn
                    args: dict[str, object] = {"dim": 0, "index": n, **({"then": then} if then else {})}
                else:
                    args = {**cut, **({"then": turn} if turn else {})}
                yield Mapped(
                    target, "unstack" if layout.is_stacked else "split", (source,), CORROBORATED, _reasons(match), args
                )
            start += size


def join(match: Match, layout: Layout) -> Iterator[Mapped]:
    """The whole put together of its parts, member by member."""
    turn = [{"op": "transpose", "dims": [1, 0]}] if layout.is_transposed else []
    for at, target in enumerate(match.whole.keys):
        if not layout.is_stacked:
            args: dict[str, object] = {"dim": layout.dim, **({"each": turn} if turn else {})}
            yield Mapped(
                target, "concat", tuple(part.keys[at] for part in match.parts), CORROBORATED, _reasons(match), args
            )
            continue
        count = match.parts[0].lengths[-1]
        keys = tuple(part.keys[at * count + n] for n in range(count) for part in match.parts)
        each = turn + ([{"op": "concat", "dim": layout.dim}] if len(match.parts) > 1 else [])
        args = {"dim": 0}
        if each:
            args["each"] = each
        if len(match.parts) > 1:
            args["group"] = len(match.parts)
        yield Mapped(target, "stack", keys, CORROBORATED, _reasons(match), args)
