"""The weights of a training checkpoint as the file that people publish: one flat state dict of plain tensors.

    {"epoch": 3, "model": {"module.fc.weight": …}, "ema": {…}, "optimizer": {…}}   →   {"fc.weight": …}

Everything beside the weights is left out and named. Wrappers lose their component where nothing else can be meant: those that
begin with an underscore wherever they stand; ``module.`` and, in a file of Lightning's, the attribute that holds the model, where every
key begins so. Nothing is read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import NamedTuple

from statedict.checkpoint import Checkpoint
from statedict.errors import KeyMismatch, KeyNotFound, StateDictError, one_line
from statedict.keys import Path, dotted
from statedict.manifest import Container, Finding, Node, ObjectEntry, TensorEntry
from statedict.nodes import components, walk
from statedict.ops.findings import named
from statedict.ops.flattening import Flat
from statedict.ops.models import StateDict, state_dicts_of
from statedict.ops.shadows import by_order, in_order, inner_averages, matched
from statedict.prefixes.wrappers import COUNTER
from statedict.report.units import human_bytes, plural
from statedict.rules import Rules

__all__ = ["LeftOut", "Publication", "published"]

# A part beside weights under a known name is no second model below this share of their bytes (statistics of the data, say).
_SMALL_SHARE = 100
# Models that averages are compared with: real files have two or three.
_MOST_MODELS = 64
# Parts that an error lists.
_LISTED = 8


class LeftOut(NamedTuple):
    """Something of the source that isn't in the result: its key there, and what it holds."""

    key: str
    tensors: int
    values: int  # that are no tensors
    nbytes: int

    def to_dict(self) -> dict[str, object]:
        """The facts, JSON-ready."""
        return self._asdict()


class Publication(NamedTuple):
    """The weights alone, over the same open files, and what was done to get there."""

    checkpoint: Checkpoint
    weights: str  # the key under which they stand; empty where they are the whole file
    left_out: tuple[LeftOut, ...]
    findings: tuple[Finding, ...]


def published(checkpoint: Checkpoint, *, ema: bool = False, spared: Rules | None = None) -> Publication:
    """The weights of a checkpoint, with ``ema`` the averaged ones, as a flat state dict.

    ``spared`` are rules that come after: a wrapper that one of them takes away is left to it. Raises ``KeyMismatch`` where several
    models could be meant, and where averages can't be told apart, ``KeyNotFound`` where there are no weights, or no averages.
    """
    try:
        return _published(checkpoint, ema, spared or Rules())
    except StateDictError as error:
        raise error.located(checkpoint.source) from error.__cause__


class _Taken(NamedTuple):
    """The tensors that are taken, and the parts that they come from."""

    flat: Flat
    tensors: dict[str, TensorEntry]
    used: tuple[StateDict, ...]
    notes: tuple[Finding, ...] = ()
    own: Flat | None = None  # the averages, where they are a state dict of their own
    rest: str = ""  # what is left of the state dict, if not its own key


def _published(source: Checkpoint, ema: bool, spared: Rules) -> Publication:
    root = source.manifest.structure
    parts = state_dicts_of(root)
    averages = [part for part in parts if part.is_average]
    models = [part for part in parts if not part.is_average]
    make = partial(Flat, source=source, spared=spared)
    if not models and averages:
        taken = _only_averages(_one(averages, "averaged weights", root), make)
    elif ema and averages:
        taken = _averaged(models, _one(averages, "averaged weights", root), make)
    else:
        flat = make(_model(models, root, bool(averages)))
        taken = _averaged_inside(flat, root) if ema else _trained(flat)
    others = [_key(part) for part in averages if part not in taken.used and not ema]
    notes = [*taken.notes, *([_passed_over(*others)] if others else [])]
    findings = [*taken.flat.findings, *notes, *_devices(taken.tensors), *_empty(taken.tensors)]
    left_out = [*_beside(root, taken.used), *_within(taken)]
    made = source.with_root(taken.flat.node(taken.tensors))
    return Publication(made, _key(taken.used[-1]), tuple(left_out), tuple(findings))


def _trained(flat: Flat) -> _Taken:
    """The weights as they were trained, without averages that stand among them."""
    inner = inner_averages(flat.tensors)
    if inner is None:
        return _Taken(flat, flat.tensors, (flat.part,))
    where = f"{inner.prefix}*"
    return _Taken(flat, inner.weights, (flat.part,), (_passed_over(where),), rest=where)


def _only_averages(average: StateDict, make: Callable[[StateDict], Flat]) -> _Taken:
    key = one_line(_key(average))
    if average.is_list:
        raise _no_names(average, "there is no model beside them")
    flat = make(average)
    note = Finding("averages-taken", "info", f"it holds averaged weights only: those under '{key}' are taken")
    return _Taken(flat, flat.tensors, (average,), (note,))


def _averaged_inside(flat: Flat, root: Node) -> _Taken:
    """The averages that stand among the weights themselves, in their places; or the whole state dict of an AveragedModel."""
    inner = inner_averages(flat.tensors)
    if inner is not None:
        note = _said(f"{inner.prefix}*", inner.averages, inner.weights)
        return _Taken(flat, {**inner.weights, **inner.averages}, (flat.part,), (note,))
    if flat.counters:
        return _Taken(flat, flat.tensors, (flat.part,), (_said(_key(flat.part), flat.tensors, flat.tensors),))
    raise _none("averaged weights", root)


def _averaged(models: Sequence[StateDict], average: StateDict, make: Callable[[StateDict], Flat]) -> _Taken:
    """The model that the averages are of, with the averages in their places; or these alone, where no model is sure to be it."""
    if len(models) > _MOST_MODELS:
        raise _several(models, "weights", "")
    own = None if average.is_list else make(average)
    fitting: list[tuple[Flat, dict[str, TensorEntry]]] = []
    for flat in map(make, models):
        if own is not None:
            found = matched(own.tensors, flat.tensors)
        elif len(models) > 1:
            found = in_order(_entries(average), flat.tensors)
        else:
            found = by_order(_entries(average), flat.tensors, _key(average))
        fitting += [(flat, found)] if found is not None else []
    if len(fitting) == 1:
        flat, found = fitting[0]
        used = (average,) if len(found) == len(flat.tensors) else (flat.part, average)
        flat.findings += [each for each in (own.findings if own else ()) if each not in flat.findings]
        return _Taken(flat, {**flat.tensors, **found}, used, (_said(_key(average), found, flat.tensors),), own)
    if own is None:
        raise _no_names(average, "it isn't sure which of the models they are of")
    return _Taken(own, own.tensors, (average,), (_said(_key(average), own.tensors, own.tensors),))


def _entries(part: StateDict) -> list[TensorEntry]:
    return [child for child in part.node.children if isinstance(child, TensorEntry)]


# ---------------------------------------------------------------- which part


def _key(part: StateDict) -> str:
    return dotted(part.path)


def _model(models: Sequence[StateDict], root: Node, has_averages: bool) -> StateDict:
    """The one model among the parts."""
    known = [part for part in models if part.is_known]
    if len(models) > 1 and len(known) == 1:
        rest = [part for part in models if part is not known[0]]
        if all(_SMALL_SHARE * part.nbytes < known[0].nbytes for part in rest):
            return known[0]
    return _one(models, "weights", root, ", or --ema for the averages" if has_averages else "")


def _one(parts: Sequence[StateDict], what: str, root: Node, otherwise: str = "") -> StateDict:
    """The only part. Raises ``KeyNotFound`` if there is none, ``KeyMismatch`` if there are several."""
    if not parts:
        raise _none(what, root)
    if len(parts) > 1:
        raise _several(parts, what, otherwise)
    return parts[0]


def _several(parts: Sequence[StateDict], what: str, otherwise: str) -> KeyMismatch:
    shown = [f"'{one_line(_key(part))}' ({_size(part)})" for part in parts[:_LISTED]]
    more = f" and {len(parts) - _LISTED} more" if len(parts) > _LISTED else ""
    hint = f"Say which is meant: --at {one_line(_key(parts[0]))}{otherwise}"
    return KeyMismatch(f"it holds {what} of several models: {', '.join(shown)}{more}", hint=hint)


def _none(what: str, root: Node) -> KeyNotFound:
    there = ", ".join(_shown(root))
    hint = f"There is: {there}" if there else "It is a single value"
    return KeyNotFound(f"it holds no {what} that stand alone", hint=hint)


def _no_names(average: StateDict, why: str) -> KeyMismatch:
    key = one_line(_key(average))
    hint = f"They can be had without names: --at {key}"
    return KeyMismatch(f"the averages under '{key}' have no names, and {why}", hint=hint)


def _shown(root: Node) -> list[str]:
    keys = [str(part) for part in components(root.keys)] if isinstance(root, Container) else []
    more = [f"and {len(keys) - _LISTED} more"] if len(keys) > _LISTED else []
    return [f"'{one_line(key)}'" for key in keys[:_LISTED]] + more


def _size(part: StateDict) -> str:
    return f"{plural(part.tensors, 'tensor')}, {human_bytes(part.nbytes)}"


def _said(where: str, found: Mapping[str, TensorEntry], weights: Mapping[str, TensorEntry]) -> Finding:
    without = [name for name in weights if name not in found]
    place = f" under '{one_line(where)}'" if where else ""
    message = f"the averaged weights{place} are taken, {plural(len(found), 'tensor')}"
    if without:
        message += f"; {plural(len(without), 'tensor')} without an average come from the model as it was trained: {named(without)}"
    return Finding("averages-taken", "info", message, tuple(without))


def _passed_over(*where: str) -> Finding:
    message = f"there are averaged weights too, under {named(where)}, which are left out: --ema takes them instead"
    return Finding("averages-left-out", "info", message, where)


def _devices(tensors: dict[str, TensorEntry]) -> Iterator[Finding]:
    """That tensors were marked for devices, and are marked for the CPU now."""
    devices = {entry.device: None for entry in tensors.values() if entry.device not in (None, "cpu", "meta")}
    if devices:
        shown = ", ".join([one_line(device) for device in devices])
        yield Finding("device-dropped", "info", f"tensors were marked for {shown}, and are for the CPU now")


def _empty(tensors: dict[str, TensorEntry]) -> Iterator[Finding]:
    """That weights have no elements, as in the model file that DeepSpeed's ZeRO-3 writes beside the shards of the weights."""
    empty = tuple([name for name, entry in tensors.items() if not entry.numel])
    if empty:
        message = (
            f"{plural(len(empty), 'tensor')} of the weights have no elements, as ZeRO-3 leaves them: {named(empty)}"
        )
        yield Finding("empty-weights", "warning", message, empty)


# ---------------------------------------------------------------- what is left out


def _beside(root: Node, used: Sequence[StateDict]) -> Iterator[LeftOut]:
    """Everything beside the parts that are used, by the highest key that holds nothing of them."""
    paths = {part.path for part in used}
    above = {path[:at] for path in paths for at in range(len(path))}
    pending: list[tuple[Path, Node]] = [((), root)]
    while pending:
        path, node = pending.pop()
        if path in above and path not in paths and isinstance(node, Container):
            pairs = list(zip(components(node.keys), node.children))
            pending += [((*path, part), child) for part, child in reversed(pairs)]
        elif path not in paths:
            yield _left_out(dotted(path), [leaf for _, leaf in walk(node)])


def _left_out(key: str, leaves: Sequence[Node]) -> LeftOut:
    sizes = [leaf.nbytes for leaf in leaves if isinstance(leaf, TensorEntry)]
    return LeftOut(key, len(sizes), len(leaves) - len(sizes), sum(sizes))


def _within(taken: _Taken) -> Iterator[LeftOut]:
    """What stands in the state dicts themselves and isn't taken: values, counters, weights whose averages are, or averages."""
    for flat in (taken.flat, taken.own):
        if flat is None or flat.part not in taken.used:
            continue
        prefix = f"{_key(flat.part)}." if flat.part.path else ""
        for path, leaf in walk(flat.part.node):
            if isinstance(leaf, ObjectEntry):
                yield _left_out(prefix + dotted(path), [leaf])
        if flat.counters:
            yield _left_out(prefix + COUNTER, flat.counters)
        kept = {id(entry) for entry in taken.tensors.values()}
        rest = [entry for entry in flat.tensors.values() if id(entry) not in kept]
        if rest:
            yield _left_out(prefix + taken.rest if taken.rest else _key(flat.part) or "*", rest)
