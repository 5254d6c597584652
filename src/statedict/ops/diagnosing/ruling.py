"""A plan as rules: what makes the tensors of the target of those of the source, in the language of ``statedict.rules``.

The rules come in a fixed order: the part with the weights, what nobody uses, new names, and then each op on the names that the tensors
have by then. Layers share a rule as far as templates say the same of all of them. The rules are tried on tensors whose elements are
their own numbers (``tracing.py``): if one element came from elsewhere than the plan says, every key is named by itself instead.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from statedict import rules as language
from statedict.aligning.alignment import Mapped
from statedict.errors import RuleError
from statedict.ops.diagnosing.carrying import Carried, Misfit, Step, carried, meant
from statedict.ops.diagnosing.emission import Emission
from statedict.ops.diagnosing.renaming import renamed_by
from statedict.ops.diagnosing.templates import is_sayable
from statedict.ops.diagnosing.tracing import Tracer
from statedict.rules import Rule, Rules

__all__ = ["Ruling", "ruled"]

_Shapes = Mapping[str, tuple[int, ...]]


class Ruling(NamedTuple):
    """The rules, and the keys of the target that they make. ``problem`` says why there are none, where there are none.

    ``is_folded``: layers share rules. ``only_once``: applied to their own result the rules would change it again.
    """

    rules: Rules
    made: tuple[str, ...]
    problem: str = ""
    is_folded: bool = True
    only_once: bool = False


class _Claim(NamedTuple):
    """A tensor of the target, and how it is made."""

    target: str
    way: Carried
    mapped: Mapped

    @property
    def chain(self) -> list[Step]:
        """The steps on a single source."""
        return [step for step in self.way.then if step.op != "squeeze" or step.before != step.after]


def ruled(
    claims: Sequence[Mapped], source: _Shapes, target: _Shapes, *, place: str = "", others: Sequence[str] = ()
) -> Ruling:
    """The rules that make these targets of a source with these tensors.

    ``place`` is the part of the checkpoint that the source's keys stand in, ``others`` are keys in it that are no tensors.
    """
    try:
        entries = {mapped.target: mapped for mapped in claims}
        ways = [carried(meant(mapped, entries), source, target[mapped.target]) for mapped in claims]
        found = [_Claim(mapped.target, way, mapped) for mapped, way in zip(claims, ways)]
    except Misfit as error:
        return Ruling(Rules(), (), f"the plan can't be carried out: {error}")
    if not found:
        return Ruling(Rules(), (), "nothing of the target can be made")
    if not is_sayable([*source, *others, *[each.target for each in found]]):
        return Ruling(Rules(), (), "keys with braces can't be named in rules")
    tracer = Tracer(source, others)
    problem = ""
    for exact in (False, True):
        try:
            rules = _Writer(found, source, others, exact=exact).rules()
            problem = tracer.problem(rules, {each.target: each.way for each in found})
        except (RuleError, _Unsayable) as error:
            problem = str(error)
        if not problem:
            first = [language.select(place)] if place else []
            made = tuple([each.target for each in found])
            return Ruling(Rules([*first, *rules]), made, "", not exact, tracer.changes_again(rules))
    return Ruling(Rules(), (), problem)


class _Unsayable(Exception):
    """A plan that no rules of ours carry out, in a few words."""


class _Writer:
    """Writes the rules of one plan. ``_at`` has the name under which each tensor stands at that point."""

    def __init__(self, claims: Sequence[_Claim], source: _Shapes, others: Sequence[str], *, exact: bool) -> None:
        self._claims = [each for each in claims if each.mapped.op != "tie"]
        self._ties = [each for each in claims if each.mapped.op == "tie"]
        self._source = source
        self._exact = exact
        used = {key for each in self._claims for key, _ in each.way.sources}
        self._out = Emission([*source, *others], exact=exact)
        self._out.drop([key for key in (*source, *others) if key not in used])
        self._targets = {each.target for each in claims}

    def rules(self) -> list[Rule]:
        """All of them, in order."""
        single = [each for each in self._claims if not each.way.join]
        joined = [each for each in self._claims if each.way.join]
        by_source: dict[str, list[_Claim]] = {}
        for each in single:
            by_source.setdefault(each.way.sources[0][0], []).append(each)
        joins = {key for each in joined for key, _ in each.way.sources}
        shared = [key for key in by_source if key in joins]
        if shared:
            raise _Unsayable(f"'{shared[0]}' is used whole and as a part")
        alone = {key: group[0] for key, group in by_source.items() if len(group) == 1}
        cut = {key: group for key, group in by_source.items() if len(group) > 1}
        names = self._rename({key: each.target for key, each in alone.items()}, [*cut, *sorted(joins)])
        self._steps({each.target: each.chain for each in alone.values()})
        self._cut([(names[key], [(each.target, each.chain) for each in group]) for key, group in cut.items()])
        self._join(joined, names)
        self._tie()
        return self._out.rules

    def _rename(self, wanted: Mapping[str, str], free: Sequence[str]) -> dict[str, str]:
        """New names for what stands alone; gives the names of all."""
        renaming = renamed_by(wanted, free, exact=self._exact)
        names = renaming.names
        self._out.renamed(renaming.rules, names.values())
        # What is cut or joined later must not stand where something else will.
        moved = {names[key]: self._out.fresh(f"{names[key]}.source") for key in free if names[key] in self._targets}
        self._out.move(moved)
        return {key: moved.get(name, name) if key in set(free) else name for key, name in names.items()}

    def _steps(self, chains: Mapping[str, Sequence[Step]]) -> None:
        """Steps on tensors that stand alone, the first of all of them, then the second."""
        for number in range(max(map(len, chains.values()), default=0)):
            self._out.each({key: chain[number] for key, chain in chains.items() if number < len(chain)})

    def _cut(self, sources: Sequence[tuple[str, list[tuple[str, list[Step]]]]]) -> None:
        """Tensors that several of the target are parts of: put in order, unstacked, split, and what comes then."""
        turned: dict[str, Step] = {}
        unstacked: list[tuple[str, list[tuple[str, list[Step]]]]] = []
        split: list[tuple[str, list[tuple[str, list[Step]]]]] = []
        for name, parts in sources:
            first = parts[0][1][0] if parts[0][1] else None
            if first is not None and first.op == "permute":
                if any(not steps or steps[0] != first for _, steps in parts):
                    raise _Unsayable(f"'{name}' is put into several orders")
                turned[name] = first
                parts = [(target, steps[1:]) for target, steps in parts]
            ops = {steps[0].op if steps else "" for _, steps in parts}
            if ops == {"unstack"}:
                unstacked.append((name, parts))
            elif ops <= {"split", "slice"} and len({steps[0].args["dim"] for _, steps in parts}) == 1:
                split.append((name, parts))
            else:
                raise _Unsayable(f"'{name}' is used in several ways")
        self._out.each(turned)
        split += self._unstack(unstacked)
        rest: dict[str, Sequence[Step]] = {}
        self._out.split([(name, [(target, steps[0]) for target, steps in parts]) for name, parts in split])
        for _, parts in split:
            rest.update({target: steps[1:] for target, steps in parts})
        self._steps(rest)

    def _unstack(
        self, sources: Sequence[tuple[str, list[tuple[str, list[Step]]]]]
    ) -> list[tuple[str, list[tuple[str, list[Step]]]]]:
        """Unstack these; gives those indices that are to be split."""
        self._out.unstack([(name, parts[0][1][0]) for name, parts in sources])
        split: list[tuple[str, list[tuple[str, list[Step]]]]] = []
        moved: dict[str, str] = {}
        rest: dict[str, Sequence[Step]] = {}
        unused: list[str] = []
        for name, parts in sources:
            first = parts[0][1][0]
            if any(steps[0].args["dim"] != first.args["dim"] for _, steps in parts):
                raise _Unsayable(f"'{name}' is unstacked along several dimensions")
            indices: dict[int, list[tuple[str, list[Step]]]] = {}
            for target, steps in parts:
                indices.setdefault(steps[0].args["index"], []).append((target, steps[1:]))
            for index in range(first.before[first.args["dim"] % len(first.before)]):
                inside = indices.get(index, [])
                if len(inside) == 1:
                    moved[f"{name}.{index}"] = inside[0][0]
                    rest[inside[0][0]] = inside[0][1]
                elif inside:
                    split.append((f"{name}.{index}", inside))
                else:
                    unused.append(f"{name}.{index}")
        self._out.drop(unused)
        if moved:
            self._out.move(moved, fold=True)
        self._steps(rest)
        return split

    def _join(self, claims: Sequence[_Claim], names: Mapping[str, str]) -> None:
        """Several tensors as one: the steps on each, groups of them, and the steps on the whole."""
        own: dict[str, Sequence[Step]] = {}
        for each in claims:
            for key, steps in each.way.sources:
                own[names[key]] = steps[1:]
        self._steps(own)
        groups: list[tuple[tuple[str, ...], str]] = []
        parts: dict[str, list[str]] = {}
        inside: dict[str, Sequence[Step]] = {}
        for each in claims:
            keys = [names[key] for key, _ in each.way.sources]
            if each.way.group > 1:
                made = [f"{each.target}.{at}" for at in range(len(keys) // each.way.group)]
                size = each.way.group
                groups += [(tuple(keys[at * size : (at + 1) * size]), name) for at, name in enumerate(made)]
                inside.update(zip(made, each.way.grouped))
                keys = made
            parts[each.target] = keys
        for dim in sorted({each.way.group_dim for each in claims if each.way.group > 1}):
            of_dim = {f"{each.target}." for each in claims if each.way.group > 1 and each.way.group_dim == dim}
            self._out.concat([(keys, name) for keys, name in groups if f"{name.rpartition('.')[0]}." in of_dim], dim)
        self._steps(inside)
        for join in ("concat", "stack"):
            for dim in sorted({each.way.dim for each in claims if each.way.join == join}):
                chosen = [
                    (tuple(parts[each.target]), each.target)
                    for each in claims
                    if (each.way.join, each.way.dim) == (join, dim)
                ]
                (self._out.concat if join == "concat" else self._out.stack)(chosen, dim)
        self._steps({each.target: each.chain for each in claims})

    def _tie(self) -> None:
        """Further names of tensors that have one."""
        whole = {each.mapped.sources: each.target for each in self._claims if each.mapped.op == "copy"}
        for each in self._ties:
            home = each.mapped.args.get("to") or whole.get(each.mapped.sources)
            if home not in {claim.target for claim in self._claims}:
                raise _Unsayable(f"'{each.target}' is tied with nothing that is made")
            self._out.tie(each.target, str(home))
