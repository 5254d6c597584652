"""What values prove: a tensor of the target whose rows are, in some order, rows of the source was made of them.

First a few elements of each tensor are looked at; only what they speak for is read. Each tensor that was read is cut into rows and
columns, and each of the target's is looked for among the source's rows (``numerics/rows.py``). Constant tensors prove nothing, and
of several equal ones it isn't known which was meant, unless they are one tensor or one of them has the very name.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from statedict.aligning.alignment import PROVEN, Mapped
from statedict.numerics.rows import Cut, RowIndex, Rows
from statedict.ops.comparing.permutations import transposition
from statedict.ops.comparing.walks import Side
from statedict.ops.diagnosing.layouts import Laid, laid_out
from statedict.ops.diagnosing.reading_off import Form, Found, read_off
from statedict.ops.diagnosing.siblings import by_siblings
from statedict.ops.diagnosing.vectors import vectors_of
from statedict.ops.diagnosing.weights import Weights
from statedict.ops.diagnosing.windows import is_readable, touched

__all__ = ["Evidence", "evidence_of"]

# Bytes that may be read to look for what the first elements didn't show, whatever they have shown.
_FREE_NBYTES = 256 * 1024 * 1024
# Rows that are kept of all tensors of a side together; 9 bytes each.
_MOST_ROWS = 16_000_000
# Tensors of one size that one is compared with, its dimensions in every order.
_MOST_TURNED = 256


class Evidence(NamedTuple):
    """What values have shown.

    ``known`` are the mappings that they prove. ``alike`` has, for keys of the target that hold what one before them does, that one.
    ``is_related``: some values are the same; ``nbytes`` were read. ``unread`` are keys of the target that weren't searched for.
    """

    known: tuple[Mapped, ...]
    alike: Mapping[str, str]
    is_related: bool
    nbytes: int
    unread: tuple[str, ...]


def evidence_of(source: Weights, target: Weights) -> Evidence:
    """Searches the source for the values of the target. Raises what reading raises."""
    first = touched(source, target)
    if not first[1]:
        return Evidence((), {}, False, 0, ())
    search = _Search(source, target)
    search.read(*first)
    search.explain()
    rest = [[key for key in side.entries if is_readable(key, side) and key not in laid] for side, laid in search.sides]
    more = search.worth_reading(rest[0], rest[1])
    unread: list[str] = []
    if search.fits_budget(*more):
        search.read(*more)
        search.explain()
    else:
        unread = more[1]
    known = [*search.known(), *search.of_vectors()]
    known += by_siblings(known, source, target)
    return Evidence(tuple(known), search.alike(), True, search.nbytes, tuple(unread))


class _Part(NamedTuple):
    """A tensor of the source in one cut."""

    laid: Laid
    cut: Cut


class _Search:
    """One search: what was read of both sides, and what was found. Of equal tensors the first stands for all."""

    def __init__(self, source: Weights, target: Weights) -> None:
        self._weights = source, target
        self._laid: tuple[dict[str, Laid], dict[str, Laid]] = ({}, {})
        self._classes: tuple[dict[object, list[str]], dict[object, list[str]]] = ({}, {})
        self._found: dict[str, tuple[Found, tuple[str, ...]]] = {}
        self._rows = [0, 0]
        self.nbytes = 0
        self._explained_nbytes = 0

    @property
    def sides(self) -> Iterator[tuple[Weights, dict[str, Laid]]]:
        """Each side with what was read of it."""
        return zip(self._weights, self._laid)

    def read(self, source: Iterable[str], target: Iterable[str]) -> None:
        """Read these tensors of both sides."""
        seen: dict[object, Laid] = {}
        for number, keys in enumerate((source, target)):
            weights, laid, classes = self._weights[number], self._laid[number], self._classes[number]
            for key in keys:
                if key in laid:
                    continue
                tensor = weights.tensor(key)
                mark = _identity(number, tensor)
                known = seen.get(mark)
                made = laid_out(key, tensor) if known is None else known._replace(key=key)
                if known is None:
                    self.nbytes += tensor.entry.nbytes
                    self._rows[number] += sum([len(rows) for rows in made.rows.values()])
                    if self._rows[number] > _MOST_ROWS:
                        made = made._replace(rows={})
                    seen[mark] = made
                laid[key] = made
                classes.setdefault(made.mark(), []).append(key)

    def explain(self) -> None:
        """Look for each tensor of the target that wasn't found yet."""
        groups = self._groups()
        indexes: dict[object, RowIndex] = {}
        for keys in self._classes[1].values():
            laid = self._laid[1][keys[0]]
            if keys[0] in self._found or laid.is_constant or len(laid.form.long) == 0:
                continue
            found = self._explained(laid, groups, indexes)
            if found is not None:
                self._found[keys[0]] = found
                self._explained_nbytes += self._weights[1].entries[keys[0]].nbytes
        self._turn()

    def _turn(self) -> None:
        """Look for tensors of three dimensions or more among those whose dimensions may have changed places otherwise."""
        left = [self._laid[1][keys[0]] for keys in self._classes[1].values() if keys[0] not in self._found]
        wanted = [laid for laid in left if len(laid.form.long) > 2 and not laid.is_constant]
        there: dict[object, list[str]] = {}
        for keys in self._classes[0].values() if wanted else ():
            laid = self._laid[0][keys[0]]
            if len(laid.form.long) > 2 and not laid.is_constant:
                there.setdefault((laid.dtype, tuple(sorted(laid.form.shape))), []).append(keys[0])
        for laid in wanted:
            equal = self._turned(laid.key, there.get((laid.dtype, tuple(sorted(laid.form.shape))), [])[:_MOST_TURNED])
            if len(equal) == 1:
                [(key, order)] = equal
                self._found[laid.key] = Found("transpose", {"dims": list(order)}), (key,)

    def _turned(self, key: str, candidates: Sequence[str]) -> list[tuple[str, tuple[int, ...]]]:
        """Those of the source that are the tensor with their dimensions in another order, each with that order."""
        source, target = self._weights
        orders = [(name, transposition(source.tensor(name), target.tensor(key))) for name in candidates]
        return [(name, order) for name, order in orders if order is not None]

    def _groups(self) -> dict[object, list[_Part]]:
        """The tensors of the source by dtype and the number of elements in a row."""
        groups: dict[object, list[_Part]] = {}
        for keys in self._classes[0].values():
            laid = self._laid[0][keys[0]]
            if not laid.is_constant:
                for cut in laid.rows:
                    groups.setdefault((laid.dtype, _content(laid, cut)), []).append(_Part(laid, cut))
        return groups

    def _explained(
        self, laid: Laid, groups: Mapping[object, list[_Part]], indexes: dict[object, RowIndex]
    ) -> tuple[Found, tuple[str, ...]] | None:
        for cut, rows in laid.rows.items():
            key = laid.dtype, _content(laid, cut)
            parts = groups.get(key)
            if parts is None:
                continue
            if key not in indexes:
                indexes[key] = RowIndex([part.laid.rows[part.cut] for part in parts])
            found = _made_of(laid.form, cut, rows, parts, indexes[key])
            if found is not None:
                return found
        return None

    def worth_reading(self, source: list[str], target: list[str]) -> tuple[list[str], list[str]]:
        """Those of the tensors that weren't read which may have to do with what was not explained, on either side."""
        taken: Counter[str] = Counter()
        for name, (_, keys) in self._found.items():
            for key in keys:
                whole = self._weights[0].entries[key].numel
                taken[key] += whole if len(keys) > 1 else self._weights[1].entries[name].numel
        left = [[laid for key, laid in self._laid[0].items() if taken[key] < self._weights[0].entries[key].numel]]
        left.append([laid for key, laid in self._laid[1].items() if key not in self._found and not laid.is_constant])
        sizes = [{self._numbers(number, key) for key in keys} for number, keys in enumerate((source, target))]
        there = [{(laid.dtype, _content(laid, cut)) for laid in each for cut in laid.rows} for each in left]
        # What is to be read on one side must have a likely partner on the other, read or not.
        wanted = [there[1] | set().union(*sizes[1]), there[0] | set().union(*sizes[0])]
        made = [[key for key in keys if self._numbers(n, key) & wanted[n]] for n, keys in enumerate((source, target))]
        return made[0], made[1]

    def _numbers(self, number: int, key: str) -> frozenset[tuple[str, int]]:
        """What a tensor's rows would have: dtype and number of elements, in each cut."""
        from statedict.numerics.rows import cuts_of

        entry = self._weights[number].entries[key]
        return frozenset([(entry.dtype.code, size) for size in cuts_of(Form.of(entry.shape).long or (1,)).values()])

    def fits_budget(self, source: Sequence[str], target: Sequence[str]) -> bool:
        """Whether reading these costs no more than what was explained so far, or little."""
        sizes = [self._weights[n].entries[key].nbytes for n, keys in enumerate((source, target)) for key in keys]
        return sum(sizes) <= max(_FREE_NBYTES, 2 * self._explained_nbytes)

    def known(self) -> Iterator[Mapped]:
        """What was found, for every key of the target that it holds for."""
        for keys in self._classes[1].values():
            found = self._found.get(keys[0])
            if found is not None:
                yield from self._spread(keys, *found)

    def _spread(self, keys: Sequence[str], found: Found, sources: Sequence[str]) -> Iterator[Mapped]:
        """One finding for equal tensors of the target, with the sources that are meant of equal ones there."""
        meant = [self._meant(key, keys) for key in sources]
        if any(key is None for key in meant):
            return
        names = tuple([str(key) for key in meant])
        if len(keys) == 1:
            yield _mapped(keys[0], found, names, self._laid[1][keys[0]])
            return
        same = [key for key in keys if (key,) == names]
        tied = any(set(group) >= set(keys) for group in self._weights[1].side.tied)
        if not same and not tied:
            return
        first = same[0] if same else keys[0]
        for key in keys:
            made = _mapped(key, found, names, self._laid[1][key])
            tie = made._replace(op="tie", args={"to": first}, reasons=(f"the same values as '{first}'",))
            yield made if key == first else tie

    def _meant(self, key: str, targets: Sequence[str]) -> str | None:
        """Which of the equal tensors of the source: the only one, one with the target's own name, or any where they are one tensor."""
        alike = self._classes[0][self._laid[0][key].mark()]
        if len(alike) == 1:
            return alike[0]
        same = [name for name in alike if name in targets]
        if len(same) == 1:
            return same[0]
        tied = any(set(group) >= set(alike) for group in self._weights[0].side.tied)
        return alike[0] if tied else None

    def of_vectors(self) -> list[Mapped]:
        """The vectors that are parts of others, or made of them."""
        taken = {key for _, keys in self._found.values() for key in keys}
        here = [self._laid[0][keys[0]] for keys in self._classes[0].values() if len(keys) == 1]
        there = [self._laid[1][keys[0]] for keys in self._classes[1].values() if len(keys) == 1]
        free = [laid for laid in here if laid.key not in taken]
        return vectors_of(free, [laid for laid in there if laid.key not in self._found])

    def alike(self) -> dict[str, str]:
        """The keys of the target that hold what another one before them does."""
        groups = [keys for keys in self._classes[1].values() if not self._laid[1][keys[0]].is_constant]
        return {key: keys[0] for keys in groups for key in keys[1:]}


def _identity(number: int, tensor: Side) -> object:
    """What tensors share that show the very same elements."""
    entry = tensor.entry
    view = entry.view
    assert view is not None
    return number, view.storage.id, view.offset, view.stride, view.bits, entry.shape, entry.dtype.code


def _content(laid: Laid, cut: Cut) -> int:
    """The elements of a row."""
    numel = 1
    for dim, size in enumerate(laid.form.long):
        numel *= size if dim not in cut else 1
    return numel


def _made_of(
    form: Form, cut: Cut, rows: Rows, parts: Sequence[_Part], index: RowIndex
) -> tuple[Found, tuple[str, ...]] | None:
    """The op and the sources that give a tensor with these rows."""
    if not index.has_all(rows):
        return None
    places = index.places(rows)
    # Rows of one element say nothing of where they come from.
    votes = Counter([parts[place[0]].cut for place in places if place is not None])
    for of, _ in votes.most_common():
        owners = {place[0] for place in places if place is not None and parts[place[0]].cut == of}
        settled = index.settled(rows, places, owners)
        if settled is None:
            continue
        order = list(dict.fromkeys([part for part, _ in settled]))
        starts, start = {}, 0
        for part in order:
            starts[part] = start
            start += len(parts[part].laid.rows[of])
        numbers = [starts[part] + row for part, row in settled]
        found = read_off(form, cut, [parts[part].laid.form for part in order], of, numbers)
        if found is not None:
            return found, tuple([parts[part].laid.key for part in order])
    return None


def _mapped(key: str, found: Found, sources: tuple[str, ...], laid: Laid) -> Mapped:
    return Mapped(key, found.op, sources, PROVEN, (_reason_of(found, len(sources), laid),), found.args)


def _reason_of(found: Found, count: int, laid: Laid) -> str:
    """What the values show, in a few words."""
    args = found.args
    size = f"{laid.form.shape[0]:,} rows" if laid.form.shape else "values"
    if found.op == "copy":
        return "the same values"
    if found.op == "squeeze":
        return "the same values in another shape"
    if found.op in ("split", "slice"):
        what = "rows" if args["dim"] == 0 else "columns" if args["dim"] == 1 else f"indices of dimension {args['dim']}"
        return f"the same values: {what} {args['start']:,} to {args['stop'] - 1:,}"
    if found.op == "unstack":
        return f"the same values: index {args['index']:,} of dimension {args['dim']}"
    if found.op in ("concat", "stack"):
        return f"the same values: those of {count:,} tensors, {'stacked' if found.op == 'stack' else 'one behind the other'}"
    if found.op == "transpose":
        return "the same values with the dimensions exchanged"
    return f"the same values, {size} in another order"
