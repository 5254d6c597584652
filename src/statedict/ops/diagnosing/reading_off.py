"""From where the rows of a tensor were found to the op that made it: split, joined, stacked, turned, reordered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from statedict.numerics.rows import Cut
from statedict.numerics.sequences import grid_of, ranges_of

__all__ = ["Form", "Found", "read_off"]

# Ranges of rows that a reordering may consist of, where it is no regular one.
_MOST_RANGES = 16

_Step = Mapping[str, Any]


class Form(NamedTuple):
    """The shape of a tensor, and the same without dimensions of size 1, which is what rows are counted in."""

    shape: tuple[int, ...]
    long: tuple[int, ...]

    @classmethod
    def of(cls, shape: tuple[int, ...]) -> Form:
        """That of a tensor of this shape."""
        return cls(shape, tuple([size for size in shape if size != 1]))

    def dim(self, at: int) -> int:
        """The dimension of the tensor itself that is one of ``long``."""
        return [dim for dim, size in enumerate(self.shape) if size != 1][at]

    def rows(self, cut: Cut) -> int:
        """How many rows it has."""
        count = 1
        for dim in cut:
            count *= self.long[dim]
        return count


class Found(NamedTuple):
    """An op, and its arguments."""

    op: str
    args: dict[str, Any]


def read_off(target: Form, cut: Cut, sources: Sequence[Form], of: Cut, rows: Sequence[int]) -> Found | None:
    """The op that makes the target, whose rows, cut in that way, are these ``rows`` of the sources, cut ``of`` theirs.

    The rows of several sources are counted on from one to the next. None where no op of ours does it.
    """
    total = sum([source.rows(of) for source in sources])
    is_run = rows[-1] - rows[0] == len(rows) - 1 and all(row == rows[0] + at for at, row in enumerate(rows))
    if len(sources) == 1:
        if len(cut) > 1 or len(of) > 1:
            return _of_boxes(target, cut, sources[0], of, rows) if is_run else None
        return _of_one(target, cut, sources[0], of, rows, is_run=is_run)
    if len(rows) != total:
        return None
    if is_run and len(cut) == 2:
        return _stacked(target, cut, sources, of)
    if of == ():
        return Found("stack", {"dim": target.dim(cut[0])}) if is_run and len(cut) == 1 else None
    if len(cut) != 1 or len(of) != 1:
        return None
    return _joined(target, cut, sources, of, None if is_run else rows)


def _made(steps: Sequence[_Step], target: Form, source: Form) -> Found:
    """One source and the steps on it as an op: the first step, and the others behind it."""
    if not steps:
        same = target.shape == source.shape
        return Found("copy", {}) if same else Found("squeeze", {"shape": list(target.shape)})
    first, *rest = steps
    args = {name: value for name, value in first.items() if name != "op"}
    return Found(str(first["op"]), {**args, **({"then": rest} if rest else {})})


def _reshaped(shape: tuple[int, ...]) -> _Step:
    return {"op": "squeeze", "shape": list(shape)}


def _range(dim: int, start: int, stop: int, size: int) -> list[_Step]:
    """The step that takes a range of a dimension, if it isn't all of it."""
    return [] if stop - start == size else [{"op": "split", "dim": dim, "start": start, "stop": stop}]


def _of_one(target: Form, cut: Cut, source: Form, of: Cut, rows: Sequence[int], *, is_run: bool) -> Found | None:
    """Rows along one dimension of both; a vector has none, and is a row itself."""
    if cut == ():
        if of == ():
            return _made([], target, source)
        index = {"dim": source.dim(of[0]), "index": rows[0]}
        return Found("unstack", index) if len(source.long) == 2 else None
    if of == ():
        return None
    dim, count = source.dim(of[0]), source.rows(of)
    steps: list[_Step] = []
    if is_run:
        steps += _range(dim, rows[0], rows[-1] + 1, count)
    else:
        reordered = _reordered(dim, rows, count)
        if reordered is None:
            return None
        steps += reordered
    turned = _turned(target, cut[0], source, of[0])
    return None if turned is None else _made([*steps, *turned], target, source)


def _reordered(dim: int, rows: Sequence[int], count: int) -> list[_Step] | None:
    """The steps that put the rows of one dimension into another order, and take those that are meant."""
    grid = grid_of(rows, count)
    if grid is not None:
        step = {"op": "permute", "dim": dim, "view": list(grid.view), "order": list(grid.order)}
        return [step, *_range(dim, grid.start, grid.start + len(rows), count)]
    ranges = ranges_of(rows, _MOST_RANGES) if len(rows) == count else None
    return None if ranges is None else [{"op": "permute", "dim": dim, "ranges": [list(each) for each in ranges]}]


def _turned(target: Form, at: int, source: Form, of: int) -> list[_Step] | None:
    """The steps that bring the dimension ``of`` of a source to the place ``at`` in the target."""
    order = [dim for dim in range(len(source.long)) if dim != of]
    place = at if len(target.long) == len(source.long) else 0 if at == 0 else len(order)
    if len(target.long) != len(source.long) and at not in (0, len(target.long) - 1):
        return None
    order.insert(place, of)
    steps: list[_Step] = []
    if order != sorted(order):
        # Dimensions of size 1 are left out of the order, so that it doesn't matter where they stand.
        steps.append({"op": "transpose", "dims": order})
    if len(target.long) != len(source.long):
        steps.append(_reshaped(target.shape))
    return steps


def _of_boxes(target: Form, cut: Cut, source: Form, of: Cut, rows: Sequence[int]) -> Found | None:
    """Rows that two dimensions count, in the target, in the source, or in both; they follow one another."""
    start, stop = rows[0], rows[-1] + 1
    steps: list[_Step] = []
    if len(of) == 2:
        inner = source.long[of[1]]
        first, last = source.dim(0), (stop - 1) // inner
        if start // inner == last and len(cut) == 1 and len(target.long) == 2:
            # Inside one index of the first dimension.
            steps.append({"op": "unstack", "dim": first, "index": last})
            rest = Form.of((*source.shape[:first], *source.shape[first + 1 :]))
            # What was counted second is the first of the two that are left, or the second.
            side = of[1] - 1
            if len(rest.long) != 2:
                return None
            steps += _range(rest.dim(side), start - last * inner, stop - last * inner, inner)
            turned = _turned(target, cut[0], rest, side)
            return None if turned is None else _made([*steps, *turned], target, source)
        if start % inner or stop % inner:
            return None
        steps += _range(first, start // inner, stop // inner, source.long[0])
        if of == (0, 2):
            steps.append({"op": "transpose", "dims": [0, 2, 1]})
    else:
        steps += _range(source.dim(of[0]), start, stop, source.rows(of))
        if of[0] != 0:
            steps.append({"op": "transpose", "dims": [1, 0]} if len(source.long) == 2 else {})
            if not steps[-1]:
                return None
    return _boxed(steps, target, cut, source, len(rows), of)


def _boxed(steps: list[_Step], target: Form, cut: Cut, source: Form, count: int, of: Cut) -> Found | None:
    """The rows, each with its content behind it, as the target has them."""
    numel = 1
    for size in target.long:
        numel *= size
    content = numel // count
    if len(cut) == 1:
        if cut[0] == 0:
            return _made([*steps, _reshaped(target.shape)], target, source)
        turned = [_reshaped((count, content)), {"op": "transpose", "dims": [1, 0]}]
        return _made([*steps, *turned], target, source) if len(target.long) == 2 else None
    if cut == (0, 2):
        if len(of) == 2:
            steps = [*steps, {"op": "transpose", "dims": [0, 2, 1]}]
            steps = steps[:-2] if len(steps) > 1 and steps[-2] == steps[-1] else steps
        else:
            rows_first = (target.long[0], target.long[2], target.long[1])
            steps = [*steps, _reshaped(rows_first), {"op": "transpose", "dims": [0, 2, 1]}]
    elif len(of) != 2:
        steps = [*steps, _reshaped(target.shape)]
    return _made(steps, target, source)


def _stacked(target: Form, cut: Cut, sources: Sequence[Form], of: Cut) -> Found | None:
    """Whole sources, one behind the other, as the indices of a dimension of the target; or several sources for each of them."""
    if len(of) != 1 or any(len(source.long) != 2 for source in sources):
        return None
    wanted, sizes = target.long[cut[1]], [source.rows(of) for source in sources]
    group, total = 0, 0
    while total < wanted:
        total += sizes[group]
        group += 1
    fits = total == wanted and len(sources) == group * target.long[0]
    if not fits or any(sizes[at] != sizes[at % group] for at in range(len(sizes))):
        return None
    each: list[_Step] = [{"op": "concat", "dim": sources[0].dim(of[0])}] if group > 1 else []
    if of[0] != cut[1] - 1:
        each.append({"op": "transpose", "dims": [1, 0]})
    args: dict[str, Any] = {"dim": target.dim(0)}
    return Found("stack", {**args, **({"each": each} if each else {}), **({"group": group} if group > 1 else {})})


def _joined(target: Form, cut: Cut, sources: Sequence[Form], of: Cut, rows: Sequence[int] | None) -> Found | None:
    """Whole sources one behind the other along a dimension, their rows then perhaps in another order."""
    whole = sum([source.rows(of) for source in sources])
    first = sources[0]
    like = Form.of((*first.shape[: first.dim(of[0])], whole, *first.shape[first.dim(of[0]) + 1 :]))
    if any(len(source.long) != len(first.long) or len(source.shape) != len(first.shape) for source in sources):
        return None
    turned = _turned(target, cut[0], like, of[0])
    if turned is None:
        return None
    args: dict[str, Any] = {"dim": first.dim(of[0])}
    if rows is None and len(turned) == 1 and turned[0]["op"] == "transpose" and len(target.shape) == len(first.shape):
        # Each is turned, then they are joined: as a person would say it.
        return Found("concat", {"dim": target.dim(cut[0]), "each": turned})
    then = list(turned)
    if rows is not None:
        reordered = _reordered(args["dim"], rows, whole)
        if reordered is None:
            return None
        then = [*reordered, *turned]
    return Found("concat", {**args, **({"then": then} if then else {})})
