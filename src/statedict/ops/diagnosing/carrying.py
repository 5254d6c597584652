"""A mapping carried out on shapes: what comes of it, and which element of which source each element of the result is.

``op`` and ``args`` of a mapping are a small tree: steps on each source, one that joins them, steps on what comes of it. Nothing is read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any, NamedTuple

from statedict.aligning.alignment import Mapped

__all__ = ["Carried", "Misfit", "Step", "carried", "meant", "order_of", "steps_before", "steps_on"]

# Ops that one source has, with the step that each is; the first of them change nothing but names.
_UNCHANGED = frozenset({"copy", "tie"})
_SINGLE = frozenset({"split", "slice", "unstack", "transpose", "squeeze", "permute"})


class Misfit(Exception):
    """A mapping that can't be carried out on these shapes, in a few words."""


class Step(NamedTuple):
    """One change of one tensor: an op, its arguments, and the shapes before and after."""

    op: str
    args: Mapping[str, Any]
    before: tuple[int, ...]
    after: tuple[int, ...]

    def back(self, place: int) -> int:
        """Where the element that comes to be at that place, in reading order, was before."""
        if self.op == "squeeze":
            return place
        if self.op == "transpose":
            order = order_of(self.args, self.before)
            index = _index(place, [self.before[dim] for dim in order])
            return _place([index[order.index(dim)] for dim in range(len(order))], self.before)
        index, dim = _index(place, self.after), self.args["dim"] % len(self.before)
        if self.op == "unstack":
            index.insert(dim, self.args["index"])
        elif self.op == "permute":
            index[dim] = _row_before(index[dim], self.args)
        else:
            index[dim] += self.args["start"]
        return _place(index, self.before)


def _row_before(row: int, args: Mapping[str, Any]) -> int:
    """The row that comes to be at that place."""
    if "ranges" in args:
        for start, stop in args["ranges"]:
            if row < stop - start:
                return int(start + row)
            row -= stop - start
        raise Misfit("its ranges have too few rows")
    view, order = args["view"], args["order"]
    index = _index(row, [view[at] for at in order])
    return _place([index[order.index(at)] for at in range(len(order))], view)


class Carried(NamedTuple):
    """What a mapping comes to.

    ``sources`` with the steps that each goes through first; ``groups`` of so many consecutive sources are concatenated along
    ``group_dim`` and go through ``grouped``; these are joined (``concat`` or ``stack`` along ``dim``, or nothing for one), then ``then``.
    """

    sources: tuple[tuple[str, tuple[Step, ...]], ...]
    group: int
    group_dim: int
    grouped: tuple[tuple[Step, ...], ...]
    join: str
    dim: int
    sizes: tuple[tuple[int, ...], ...]  # shapes of what is joined
    then: tuple[Step, ...]
    shape: tuple[int, ...]

    def origin(self, place: int) -> tuple[str, int]:
        """The source, and the place in it, of the element at a place of the result; places are in reading order."""
        for step in reversed(self.then):
            place = step.back(place)
        at, place = _parted(self.join, self.dim, self.sizes, place)
        if self.grouped:
            for step in reversed(self.grouped[at]):
                place = step.back(place)
            first = at * self.group
            members = self.sources[first : first + self.group]
            shapes = [_last(key_steps) for key_steps in members]
            inner, place = _parted("concat", self.group_dim, shapes, place)
            at = first + inner
        key, steps = self.sources[at]
        for step in reversed(steps[1:]):
            place = step.back(place)
        return key, place


def _last(source: tuple[str, tuple[Step, ...]]) -> tuple[int, ...]:
    return source[1][-1].after


def _parted(join: str, dim: int, shapes: Sequence[tuple[int, ...]], place: int) -> tuple[int, int]:
    """The number of the part that an element of the joined tensor comes from, and its place in that."""
    if not join:
        return 0, place
    first = shapes[0]
    if join == "stack":
        index = _index(place, (*first[:dim], len(shapes), *first[dim:]))
        at = index.pop(dim)
        return at, _place(index, first)
    total = sum([shape[dim] for shape in shapes])
    index = _index(place, (*first[:dim], total, *first[dim + 1 :]))
    at = 0
    while index[dim] >= shapes[at][dim]:
        index[dim] -= shapes[at][dim]
        at += 1
    return at, _place(index, shapes[at])


def meant(mapped: Mapped, entries: Mapping[str, Mapped]) -> Mapped:
    """How a tensor is made that is another name of one of the target's: as that is; any other as it says itself."""
    home = entries.get(str(mapped.args.get("to", ""))) if mapped.op == "tie" else None
    return mapped if home is None or home.op == "tie" else home._replace(target=mapped.target)


def steps_before(mapped: Mapped) -> list[Mapping[str, Any]]:
    """The steps that each source, or each group of them, goes through before they are joined."""
    found: Any = mapped.args.get("each", ())
    return list(found)


def steps_on(mapped: Mapped) -> list[Mapping[str, Any]]:
    """The steps on one source, or on what the sources make together."""
    after: Any = mapped.args.get("then", ())
    if mapped.op in _SINGLE:
        own = {name: value for name, value in mapped.args.items() if name not in ("then", "each")}
        return [{"op": mapped.op, **own}, *after]
    return list(after)


def carried(mapped: Mapped, shapes: Mapping[str, tuple[int, ...]], wanted: tuple[int, ...]) -> Carried:
    """The mapping on sources of these shapes, for a target of the shape ``wanted``. Raises ``Misfit`` where it makes another."""
    if not mapped.sources:
        raise Misfit("it has no sources")
    missing = [key for key in mapped.sources if key not in shapes]
    if missing:
        raise Misfit(f"there is no '{missing[0]}'")
    try:
        return _carried(mapped, shapes, wanted)
    except (IndexError, KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise Misfit(f"its arguments make no sense ({type(error).__name__})") from error


def _carried(mapped: Mapped, shapes: Mapping[str, tuple[int, ...]], wanted: tuple[int, ...]) -> Carried:
    joins = mapped.op in ("concat", "stack")
    if not joins and (mapped.op not in _UNCHANGED | _SINGLE or len(mapped.sources) != 1):
        raise Misfit(f"'{mapped.op}' of {len(mapped.sources)} tensors can't be carried out")
    before = steps_before(mapped) if joins else []
    cat = next((at for at, step in enumerate(before) if step["op"] == "concat"), None)
    group = int(mapped.args.get("group", 1)) if cat is not None else 1  # type: ignore[call-overload]
    if group < 1 or len(mapped.sources) % group:
        raise Misfit("its sources make no whole groups")
    own = before if cat is None else before[:cat]
    sources = tuple([(key, (_start(shapes[key]), *_chain(own, shapes[key]))) for key in mapped.sources])
    parts = [_last(source) for source in sources]
    grouped: list[tuple[Step, ...]] = []
    group_dim = 0
    if cat is not None:
        group_dim = int(before[cat]["dim"])
        joined = [_join("concat", group_dim, parts[at : at + group]) for at in range(0, len(parts), group)]
        grouped = [_chain(before[cat + 1 :], shape) for shape in joined]
        parts = [steps[-1].after if steps else shape for steps, shape in zip(grouped, joined)]
    dim, join = 0, mapped.op if joins else ""
    shape = parts[0]
    if joins:
        dim = int(mapped.args.get("dim", 0))  # type: ignore[call-overload]
        dim %= len(shape) + (join == "stack")
        shape = _join(join, dim, parts)
    then = _chain(steps_on(mapped), shape)
    shape = then[-1].after if then else shape
    if shape != wanted:
        if prod(shape) != prod(wanted) or (mapped.op != "squeeze" and _without_ones(shape) != _without_ones(wanted)):
            raise Misfit(f"it makes {list(shape)}, and {list(wanted)} is wanted")
        then = (*then, Step("squeeze", {"shape": list(wanted)}, shape, wanted))
    return Carried(sources, group, group_dim, tuple(grouped), join, dim, tuple(parts), then, wanted)


def _start(shape: tuple[int, ...]) -> Step:
    """The source as it is: the first of its steps, which does nothing."""
    return Step("squeeze", {"shape": list(shape)}, shape, shape)


def _join(join: str, dim: int, shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    first = shapes[0]
    if join == "stack":
        if any(shape != first for shape in shapes):
            raise Misfit("tensors of different shapes can't be stacked")
        return (*first[:dim], len(shapes), *first[dim:])
    if any((*shape[:dim], *shape[dim + 1 :]) != (*first[:dim], *first[dim + 1 :]) for shape in shapes):
        raise Misfit("tensors of these shapes can't be concatenated")
    return (*first[:dim], sum([shape[dim] for shape in shapes]), *first[dim + 1 :])


def _chain(steps: Sequence[Mapping[str, Any]], shape: tuple[int, ...]) -> tuple[Step, ...]:
    made: list[Step] = []
    for each in steps:
        after = _after(each, shape)
        made.append(Step(str(each["op"]), each, shape, after))
        shape = after
    return tuple(made)


def _after(step: Mapping[str, Any], shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape that a step makes of another."""
    op = step["op"]
    if op == "squeeze":
        made = tuple([int(size) for size in step["shape"]]) if "shape" in step else _without_ones(shape)
        if prod(made) != prod(shape):
            raise Misfit(f"{list(shape)} can't be seen as {list(made)}")
        return made
    if op == "transpose":
        return tuple([shape[dim] for dim in order_of(step, shape)])
    if op not in _SINGLE:
        raise Misfit(f"there is no step '{op}'")
    dim = int(step["dim"]) % len(shape)
    if op == "permute":
        view = step.get("view")
        rows = prod(view) if view is not None else sum([stop - start for start, stop in step["ranges"]])
        if rows != shape[dim]:
            raise Misfit(f"{shape[dim]} rows can't be reordered as {rows}")
        return shape
    if op == "unstack":
        if not 0 <= step["index"] < shape[dim]:
            raise Misfit(f"there is no index {step['index']} in {list(shape)}")
        return (*shape[:dim], *shape[dim + 1 :])
    if not 0 <= step["start"] < step["stop"] <= shape[dim]:
        raise Misfit(f"there is no range {step['start']} to {step['stop']} in {list(shape)}")
    return (*shape[:dim], step["stop"] - step["start"], *shape[dim + 1 :])


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple([size for size in shape if size != 1])


def order_of(step: Mapping[str, Any], shape: tuple[int, ...]) -> list[int]:
    """The dimensions in their new order; where those of size 1 were left out, they stay where they are."""
    dims = [int(dim) for dim in step["dims"]]
    long = [dim for dim, size in enumerate(shape) if size != 1]
    if len(dims) != len(shape):
        if sorted(dims) != list(range(len(long))):
            raise Misfit(f"{dims} is no order of the dimensions of {list(shape)}")
        moved = iter([long[dim] for dim in dims])
        return [next(moved) if size != 1 else dim for dim, size in enumerate(shape)]
    if sorted(dims) != list(range(len(shape))):
        raise Misfit(f"{dims} is no order of the dimensions of {list(shape)}")
    return dims


def _index(place: int, shape: Sequence[int]) -> list[int]:
    found = []
    for size in reversed(shape):
        place, at = divmod(place, size)
        found.append(at)
    return found[::-1]


def _place(index: Sequence[int], shape: Sequence[int]) -> int:
    place = 0
    for at, size in zip(index, shape):
        place = place * size + at
    return place
