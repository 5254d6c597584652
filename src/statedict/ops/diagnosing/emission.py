"""Rules written one after the other, each for as many keys as a template stands for, over the keys that there are at that point."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from statedict import rules as language
from statedict.ops.diagnosing.carrying import Step, order_of
from statedict.ops.diagnosing.renaming import renamed_by
from statedict.ops.diagnosing.templates import Folded, folded, glob_of
from statedict.rules import Rule
from statedict.rules.patterns import Pattern

__all__ = ["Emission"]

_Parts = Sequence[tuple[str, Step]]

# Components of a key that are looked at: real keys have fewer than 20.
_MOST_LEVELS = 24


class Emission:
    """The rules so far, and the keys that they leave. ``exact``: every key is named by itself."""

    def __init__(self, keys: Iterable[str], *, exact: bool) -> None:
        self.rules: list[Rule] = []
        self._keys = dict.fromkeys(keys)
        self._exact = exact

    def fresh(self, key: str) -> str:
        """A key like this one that there isn't yet."""
        while key in self._keys:
            key += "_"
        return key

    def _folded(self, instances: Sequence[tuple[str, ...]], plain: int = 1) -> list[Folded]:
        """Templates that match the keys meant, in their first ``plain`` places, and no other."""
        if self._exact:
            return [Folded(keys, (keys,)) for keys in instances]
        return folded(instances, plain=plain, is_exact=lambda found: self._is_exact(found, plain))

    def _is_exact(self, found: Folded, plain: int) -> bool:
        for at in range(plain):
            pattern = Pattern(found.templates[at])
            if {key for key in self._keys if pattern.match(key) is not None} != {keys[at] for keys in found.members}:
                return False
        return True

    def _became(self, old: Iterable[str], new: Iterable[str]) -> None:
        for key in old:
            self._keys.pop(key, None)
        self._keys.update(dict.fromkeys(new))

    def drop(self, keys: Sequence[str]) -> None:
        """Leave these keys out."""
        globs: list[str] = []
        left = list(keys)
        for glob in () if self._exact else _wide(keys, self._keys):
            pattern = Pattern(glob)
            meant = {key for key in left if pattern.match(key) is not None}
            globs += [glob] if meant else []
            left = [key for key in left if key not in meant]
        globs += [_named(each.templates[0], each) for each in self._folded([(key,) for key in left])]
        self.rules += [language.drop(_glob(glob)) for glob in globs]
        self._became(keys, ())

    def renamed(self, rules: Sequence[Rule], names: Iterable[str]) -> None:
        """Take in rules that give all keys these names."""
        self.rules += rules
        self._keys = dict.fromkeys(names)

    def move(self, names: Mapping[str, str], *, fold: bool = False) -> None:
        """Give some keys other names."""
        changed = {old: new for old, new in names.items() if old != new}
        if changed:
            stay = {key: key for key in self._keys if key not in changed}
            self.rules += renamed_by({**stay, **changed}, (), exact=self._exact or not fold).rules
            self._became(changed, changed.values())

    def each(self, steps: Mapping[str, Step]) -> None:
        """A step on each of these tensors, which keep their names."""
        kinds: dict[str, list[str]] = {}
        made = {key: _rules_of(step) for key, step in steps.items()}
        for key, makers in made.items():
            kinds.setdefault(str(makers), []).append(key)
        for keys in kinds.values():
            step = steps[keys[0]]
            for each in self._folded([(key,) for key in keys]):
                glob = _named(each.templates[0], each)
                self.rules += _in_ranges(self, each, step) if "ranges" in step.args else _made(glob, _rules_of(step))

    def split(self, sources: Sequence[tuple[str, _Parts]]) -> None:
        """Cut tensors into parts along a dimension; what is left in between is left out."""
        kinds: dict[tuple[int, tuple[int, ...]], list[tuple[str, ...]]] = {}
        unused: list[str] = []
        for name, parts in sources:
            dim = int(parts[0][1].args["dim"])
            ranges = {(step.args["start"], step.args["stop"]): target for target, step in parts}
            whole = parts[0][1].before[dim]
            names: list[str] = []
            sizes: list[int] = []
            for start, stop in _covering(ranges, whole):
                given = ranges.get((start, stop)) or self.fresh(f"{name}.unused.{len(names)}")
                unused += [] if (start, stop) in ranges else [given]
                names.append(given)
                sizes.append(stop - start)
            kinds.setdefault((dim, tuple(sizes)), []).append((name, *names))
        for (dim, cut), instances in kinds.items():
            for found in self._folded(instances):
                source, *targets = found.templates
                equal = None if len(set(cut)) == 1 else cut
                self.rules.append(language.split(_named(source, found), targets, equal, dim))
            self._became([keys[0] for keys in instances], [key for keys in instances for key in keys[1:]])
        self.drop(unused)

    def unstack(self, sources: Sequence[tuple[str, Step]]) -> None:
        """One tensor for each index, under the name of the whole and the index."""
        kinds: dict[int, list[tuple[str, int]]] = {}
        for name, step in sources:
            dim = step.args["dim"]
            kinds.setdefault(dim, []).append((name, step.before[dim % len(step.before)]))
        for dim, found in kinds.items():
            for each in self._folded([(name,) for name, _ in found]):
                [template] = each.templates
                self.rules.append(language.unstack(_named(template, each), f"{template}.{{index}}", dim))
            made = [f"{name}.{at}" for name, count in found for at in range(count)]
            self._became([name for name, _ in found], made)

    def concat(self, joins: Sequence[tuple[tuple[str, ...], str]], dim: int) -> None:
        """Tensors one behind the other."""
        counts = sorted({len(keys) for keys, _ in joins})
        for count in counts:
            instances = [(*keys, target) for keys, target in joins if len(keys) == count]
            for each in self._folded(instances, plain=count):
                *sources, target = each.templates
                self.rules.append(language.concat([_named(source, each) for source in sources], target, dim))
            self._became([key for keys in instances for key in keys[:-1]], [keys[-1] for keys in instances])

    def stack(self, joins: Sequence[tuple[tuple[str, ...], str]], dim: int) -> None:
        """Tensors along a new dimension, by the number that their names differ in; where there is none, they get names with one."""
        instances: list[tuple[str, str]] = []
        odd: dict[str, str] = {}
        for keys, target in joins:
            name = _numbered(keys)
            if name is None:
                odd.update({key: f"{target}.{at}" for at, key in enumerate(keys)})
                name = f"{target}.\0"
            instances.append((name, target))
        self.move(odd)
        real = self._keys
        shown = {name.replace("\0", "0"): name for name, _ in instances}
        indexed = {
            key
            for keys, target in joins
            for key in (keys if not odd else (f"{target}.{at}" for at in range(len(keys))))
        }
        self._keys = dict.fromkeys([key for key in real if key not in indexed] + list(shown.values()))
        for each in self._folded(instances):
            source, target = each.templates
            self.rules.append(language.stack(_named(source, each).replace("\0", "{index}"), target, dim))
        self._keys = real
        gone = [key for keys, _ in joins for key in keys]
        self._became([*gone, *odd.values()], [target for _, target in joins])

    def tie(self, key: str, to: str) -> None:
        """Another name of a tensor."""
        self.rules.append(language.tie(key, to))
        self._became((), (key,))


def _covering(ranges: Iterable[tuple[int, int]], whole: int) -> Iterator[tuple[int, int]]:
    """The ranges in order, and those between them, up to the end."""
    at = 0
    for start, stop in sorted(ranges):
        if start > at:
            yield at, start
        yield start, stop
        at = stop
    if at < whole:
        yield at, whole


def _named(template: str, found: Folded) -> str:
    """A template as it is, or the glob of a single key."""
    return template if len(found.members) > 1 else glob_of(template)


def _glob(template: str) -> str:
    """A template as a glob: rules that leave keys out take no templates."""
    pieces, inside = [], template
    while "{" in inside:
        before, _, rest = inside.partition("{")
        pieces += [glob_of(before), "*"]
        inside = rest.partition("}")[2]
    return "".join([*pieces, inside if not pieces else glob_of(inside)])


def _wide(keys: Sequence[str], there: Iterable[str]) -> list[str]:
    """Globs for all that stands in one module, or has one last name, where all of that is among the keys."""
    wanted, present = Counter(_shared(keys)), Counter(_shared(there))
    whole = {glob for glob, count in wanted.items() if count > 1 and present[glob] == count}
    return sorted(whole, key=lambda glob: (-wanted[glob], len(glob)))


def _shared(keys: Iterable[str]) -> Iterator[str]:
    """For each key the globs of the modules that it is in, and of its last name."""
    for key in keys:
        words = key.split(".")
        for at in range(1, min(len(words), _MOST_LEVELS)):
            yield f"{glob_of('.'.join(words[:at]))}.*"
        if len(words) > 1:
            yield f"*.{glob_of(words[-1])}"


def _numbered(keys: Sequence[str]) -> str | None:
    """The key with a zero byte for the number that counts these from 0 on; None where none does."""
    import re

    parts = [re.split(r"(?<![0-9])(\d+)(?![0-9])", key) for key in keys]
    if len({len(part) for part in parts}) > 1 or len(keys) < 2:
        return None
    columns = [[part[at] for part in parts] for at in range(len(parts[0]))]
    differing = [at for at, column in enumerate(columns) if len(set(column)) > 1]
    if len(differing) != 1 or columns[differing[0]] != [str(at) for at in range(len(keys))]:
        return None
    made = list(parts[0])
    made[differing[0]] = "\0"
    return "".join(made)


def _rules_of(step: Step) -> list[tuple[str, tuple[Any, ...]]]:
    """The names of the rules that carry out a step, with their arguments behind the glob."""
    args, before = step.args, step.before
    if step.op == "squeeze":
        return [("reshape", step.after)]
    if step.op == "transpose":
        order = order_of(args, before)
        moved = [dim for dim, at in enumerate(order) if dim != at]
        if len(moved) == 2 and order[moved[0]] == moved[1]:
            last_two = moved == [len(before) - 2, len(before) - 1]
            return [("transpose", () if last_two else tuple(moved))]
        return [("permute", tuple(order))]
    if step.op == "permute":
        if "ranges" in args:
            return [("ranges", (args["dim"], tuple(map(tuple, args["ranges"]))))]
        return [("reorder", (tuple(args["view"]), tuple(args["order"]), args["dim"]))]
    if step.op == "unstack":
        return [("slice", (args["dim"], args["index"], args["index"] + 1)), ("squeeze", (args["dim"],))]
    return [("slice", (args["dim"], args["start"], args["stop"]))]


def _made(glob: str, makers: Sequence[tuple[str, tuple[Any, ...]]]) -> list[Rule]:
    return [getattr(language, name)(glob, *arguments) for name, arguments in makers]


def _in_ranges(out: Emission, found: Folded, step: Step) -> list[Rule]:
    """The rules that put ranges of a dimension into another order: cut, and put together again."""
    [template] = found.templates
    dim, ranges = step.args["dim"], [tuple(each) for each in step.args["ranges"]]
    in_order = sorted(ranges)
    parts = {each: f"{template}.part.{at}" for at, each in enumerate(in_order)}
    sizes = [stop - start for start, stop in in_order]
    cut = language.split(_named(template, found), [parts[each] for each in in_order], sizes, dim)
    return [cut, language.concat([parts[each] for each in ranges], template, dim)]
