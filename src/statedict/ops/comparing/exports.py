"""What turns the tensors of A into those of B, as rules: renames, other orders of dimensions, parts, ties and casts.

What only values say can't be a rule: a comparison with changed values has rules that make the names and shapes B's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from statedict.dtypes import BY_TORCH
from statedict.keys import template
from statedict.ops.comparing.changes import Change
from statedict.ops.comparing.fusions import Fusion
from statedict.ops.comparing.renames import Rename

if TYPE_CHECKING:
    from statedict.rules import Rules

__all__ = ["Step", "rules_of", "steps_of"]


class Step(NamedTuple):
    """One rule before it is made: the name of its function in ``statedict.rules``, and what that is given."""

    name: str
    arguments: tuple[object, ...]
    options: Mapping[str, object] = {}


def rules_of(steps: Sequence[Step]) -> Rules:
    """The rules. Raises what ``statedict.rules`` raises."""
    from statedict import rules

    return rules.Rules([getattr(rules, step.name)(*step.arguments, **step.options) for step in steps])


def steps_of(
    changed: Sequence[Change], renamed: Sequence[Rename], keys: tuple[Collection[str], Collection[str]]
) -> list[Step]:
    """The steps in the order in which they apply; ``keys`` are all tensors of A, and of B."""
    made: list[Step] = []
    fused = [(rename.fusion, len(rename.b) == 1) for rename in renamed if rename.fusion is not None]
    for fusion, is_joined in _by_layers(fused, keys[0]):
        made += _fused(fusion, is_joined=is_joined)
    plain = [rename for rename in renamed if rename.fusion is None]
    made += _renamed({rename.a[0]: rename.b[0] for rename in plain}, keys[0])
    turns = [(rename.b[0], rename.order) for rename in plain] + [(change.key, change.order) for change in changed]
    made += _each([(key, step) for key, order in turns for step in _turned(order)], keys[1])
    shapes = [(rename.b[0], rename.shape) for rename in plain]
    shapes += [(each.key, tuple(each.b)) for each in changed if _is_reshaped(each) and isinstance(each.b, list)]
    made += _each([(key, Step("reshape", (shape,))) for key, shape in shapes if shape is not None], keys[1])
    casts = [(each.key, Step("cast", (each.b,))) for each in changed if _is_cast(each)]
    return [*made, *_each(casts, keys[1]), *_tied(changed)]


def _is_reshaped(change: Change) -> bool:
    return change.kind == "shape" and change.verdict == "equal after reshape"


def _is_cast(change: Change) -> bool:
    """Whether it is one between floats, which is what the rule casts."""
    both = [BY_TORCH.get(str(name)) for name in (change.a, change.b)]
    return change.verdict == "equal after cast" and all(each is not None and each.kind == "float" for each in both)


def _glob(key: str) -> str:
    """The pattern that matches this key alone; a template as it is."""
    return key if "{n}" in key else "".join([f"[{letter}]" if letter in "*?[" else letter for letter in key])


def _turned(order: tuple[int, ...] | None) -> list[Step]:
    if order is None:
        return []
    swapped = [dim for dim, old in enumerate(order) if dim != old]
    if len(swapped) != 2:
        return [Step("permute", order)]
    return [Step("transpose", () if swapped == [len(order) - 2, len(order) - 1] else tuple(swapped))]


def _each(steps: Sequence[tuple[str, Step]], keys: Collection[str]) -> list[Step]:
    """Steps of single keys, with a template in place of those keys of all layers that one can stand for."""
    groups: dict[object, list[str]] = {}
    for key, step in steps:
        groups.setdefault((_layered(key)[0], step.name, step.arguments), []).append(key)
    made, here = [], Counter([_layered(key)[0] for key in keys])
    for key, step in steps:
        form = _layered(key)[0]
        members = groups[form, step.name, step.arguments]
        if len(members) > 1 and here[form] == len(members):
            made.append(step._replace(arguments=(form, *step.arguments)))
        else:
            made.append(step._replace(arguments=(_glob(key), *step.arguments)))
    return list({(step.name, step.arguments): step for step in made}.values())


def _layered(key: str) -> tuple[str, int]:
    """The key with ``{n}`` in place of its first number, and that number; -1 where it has none, or braces of its own."""
    form, numbers = template(key)
    if not numbers or "{" in key:
        return key, -1
    form = form.replace("{}", "{n}", 1)
    for number in numbers[1:]:
        form = form.replace("{}", str(number), 1)
    return form, numbers[0]


def _by_layers(fused: Sequence[tuple[Fusion, bool]], keys: Collection[str]) -> Iterator[tuple[Fusion, bool]]:
    """The fusions, with one in place of those of all layers that templates can stand for."""
    groups: dict[tuple[Fusion, bool], list[tuple[Fusion, bool]]] = {}
    for fusion, is_joined in fused:
        names = [_layered(key) for key in (fusion.whole, *fusion.parts)]
        is_layer = len({number for _, number in names}) == 1 and names[0][1] >= 0
        form = fusion._replace(whole=names[0][0], parts=tuple([name for name, _ in names[1:]])) if is_layer else fusion
        groups.setdefault((form, is_joined), []).append((fusion, is_joined))
    here = Counter([_layered(key)[0] for key in keys])
    for (form, is_joined), members in groups.items():
        sources = form.parts if is_joined else (form.whole,)
        if len(members) > 1 and all(here[source] == len(members) for source in sources):
            yield form, is_joined
        else:
            yield from members


def _renamed(names: Mapping[str, str], keys: Collection[str]) -> list[Step]:
    """The renames: a prefix, or a template for layers that agree, where it would rename nothing else; the rest name by name."""
    prefix = _prefix(names, keys)
    if prefix:
        return [Step("strip_prefix", (prefix,))]
    groups: dict[tuple[str, str, int], list[str]] = {}
    for old, new in names.items():
        (form, number), (other, moved) = _layered(old), _layered(new)
        if number >= 0 and moved >= 0:
            groups.setdefault((form, other, moved - number), []).append(old)
    made, rest = [], dict(names)
    here = Counter([_layered(key)[0] for key in keys])
    for (form, other, shift), members in groups.items():
        if len(members) > 1 and here[form] == len(members):
            made.append(Step("rename", (form, other.replace("{n}", f"{{n{shift:+d}}}") if shift else other)))
            for old in members:
                del rest[old]
    return [*made, Step("rename", (rest,))] if rest else made


def _prefix(names: Mapping[str, str], keys: Collection[str]) -> str:
    """What all keys begin with that the new ones lack; empty where that isn't all that is renamed."""
    prefixes = {old.removesuffix(new) for old, new in names.items() if old.endswith(f".{new}")}
    if len(names) < 2 or len(prefixes) != 1:
        return ""
    (prefix,) = prefixes
    is_all = all(old == prefix + new for old, new in names.items())
    return prefix if is_all and sum(key.startswith(prefix) for key in keys) == len(names) else ""


def _fused(fusion: Fusion, *, is_joined: bool) -> Iterator[Step]:
    """The steps of parts that became one, or of a tensor that became parts: the same ones backwards."""
    parts, whole, dim = fusion.parts, fusion.whole, fusion.dim
    pattern = _counted(parts) if fusion.stacked else ""
    turned = ([pattern] if pattern else [_glob(part) for part in parts]) if fusion.turned else []
    turns = [Step("transpose", (name, 0, 1)) for name in turned]
    if is_joined:
        yield from turns
        if pattern:
            yield Step("stack", (pattern, whole), {"dim": dim})
        else:
            yield from (Step("unsqueeze", (_glob(part), dim)) for part in parts if fusion.stacked)
            yield Step("concat", (list(parts), whole), {"dim": dim})
        if fusion.flat:
            yield Step("reshape", (_glob(whole), fusion.shape))
        return
    if fusion.flat:
        yield Step("reshape", (_glob(whole), (fusion.shape[0] * fusion.shape[1], *fusion.shape[2:])))
    if pattern:
        yield Step("unstack", (whole, pattern), {"dim": dim})
    else:
        yield Step("split", (whole, list(parts)), {"sizes": list(fusion.sizes), "dim": dim})
        yield from (Step("squeeze", (_glob(part), dim)) for part in parts if fusion.stacked)
    yield from turns


def _counted(parts: Sequence[str]) -> str:
    """The template of keys that count up from 0, such as ``experts.{i}.w``; empty for all others."""
    marked = [part.replace("{n}", "\0") for part in parts]
    forms = [template(part) for part in marked]
    if {form for form, _ in forms} != {forms[0][0]} or any("{" in part for part in marked):
        return ""
    columns = list(zip(*[numbers for _, numbers in forms]))
    counting = [at for at, column in enumerate(columns) if column == tuple(range(len(parts)))]
    if len(counting) != 1 or any(len(set(column)) > 1 for at, column in enumerate(columns) if at != counting[0]):
        return ""
    form = forms[0][0]
    for at, number in enumerate(forms[0][1]):
        form = form.replace("{}", "{i}" if at == counting[0] else str(number), 1)
    return form.replace("\0", "{n}")


def _tied(changed: Sequence[Change]) -> Iterator[Step]:
    """Ties that only B has, each to the first of its group, and those that only A has."""
    seen: set[str] = set()
    for change in changed:
        if change.kind != "aliasing" or change.key in seen:
            continue
        if change.verdict == "tied in b only" and isinstance(change.b, list):
            seen.update(change.b)
            yield from (Step("tie", (other, change.key)) for other in change.b)
        elif change.verdict == "tied in a only":
            yield Step("untie", (change.key,))
