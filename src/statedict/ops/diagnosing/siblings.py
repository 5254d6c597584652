"""What a module's proven tensors say of its others: a bias goes where its weight went, cut and ordered alike, if the values agree.

Of itself a constant bias proves nothing; with its weight's way known, and the same values at its end, nothing else is left.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from statedict.aligning.alignment import CORROBORATED, PROVEN, Mapped
from statedict.lazy_tensor import LazyTensor
from statedict.ops.diagnosing.carrying import Misfit, carried
from statedict.ops.diagnosing.weights import Weights
from statedict.ops.diagnosing.windows import is_readable

__all__ = ["by_siblings"]

# Elements of a tensor that is compared one by one.
_MOST_ELEMENTS = 128 * 1024


def by_siblings(known: Sequence[Mapped], source: Weights, target: Weights) -> list[Mapped]:
    """The mappings of small tensors that follow from those of the same module, and whose values agree. Reads them."""
    taken = {mapped.target for mapped in known}
    used = {key for mapped in known if mapped.op in ("copy", "squeeze", "permute") for key in mapped.sources}
    modules: dict[str, list[Mapped]] = {}
    for mapped in known:
        modules.setdefault(_module(mapped.target), []).append(mapped)
    found: list[Mapped] = []
    for key in target.entries:
        siblings = modules.get(_module(key), []) if key not in taken else []
        for sibling in siblings:
            made = _like(key, sibling, source, target)
            if made is not None and not used & set(made.sources):
                found.append(made)
                break
    return found


def _module(key: str) -> str:
    return key.rpartition(".")[0]


def _like(key: str, sibling: Mapped, source: Weights, target: Weights) -> Mapped | None:
    """The tensor made as its sibling was, of what stands beside the sibling's sources; None where that isn't so."""
    leaf, its = key.rpartition(".")[2], sibling.target.rpartition(".")[2]
    entry = target.entries[key]
    ends = [name.endswith(its) for name in sibling.sources]
    if not all(ends) or entry.numel > _MOST_ELEMENTS or not is_readable(key, target):
        return None
    names = tuple([name[: len(name) - len(its)] + leaf for name in sibling.sources])
    if any(name not in source.entries or not is_readable(name, source) for name in names):
        return None
    if any(source.entries[name].dtype is not entry.dtype for name in names):
        return None
    args = sibling.args if len(entry.shape) > 1 else _of_vectors(sibling)
    if args is None:
        return None
    op = sibling.op if sibling.op not in ("transpose", "squeeze") or len(entry.shape) > 1 else "copy"
    made = sibling._replace(target=key, sources=names, args=args, op=op, alternatives=(), question="")
    is_constant = _agrees(made, source, target)
    if is_constant is None:
        return None
    along = f"made as '{sibling.target}' beside it, which the values prove"
    same = "the same values, which are all equal" if is_constant else "the same values"
    return made._replace(tier=CORROBORATED if is_constant else PROVEN, reasons=(along, same))


def _of_vectors(sibling: Mapped) -> Mapping[str, object] | None:
    """The arguments of an op on matrices for the vectors beside them; None where it has none."""
    args: dict[str, Any] = {}
    for name, value in sibling.args.items():
        if name in ("then", "each"):
            steps = [_of_vector(step) for step in value if step["op"] not in ("transpose", "squeeze")]  # type: ignore[attr-defined]
            if steps:
                args[name] = steps
        elif name not in ("dims", "shape"):
            args[name] = value
    return args if sibling.op in ("stack", "unstack") else _of_vector(args)


def _of_vector(step: Mapping[str, Any]) -> dict[str, Any]:
    """A step along the only dimension."""
    return {name: 0 if name == "dim" else value for name, value in step.items()}


def _agrees(mapped: Mapped, source: Weights, target: Weights) -> bool | None:
    """Whether the target holds what the mapping makes: None if it doesn't, else whether all its elements are equal."""
    entry = target.entries[mapped.target]
    shapes = {key: source.entries[key].shape for key in mapped.sources}
    try:
        way = carried(mapped, shapes, entry.shape)
    except Misfit:
        return None
    size = entry.dtype.itemsize
    wanted = bytes(LazyTensor(entry, target.checkpoint).read())
    data = {key: bytes(LazyTensor(source.entries[key], source.checkpoint).read()) for key in mapped.sources}
    if mapped.op == "copy":
        made = data[mapped.sources[0]]
    else:
        places = [way.origin(place) for place in range(entry.numel)]
        made = b"".join([data[key][at * size : (at + 1) * size] for key, at in places])
    return made == wanted[:size] * entry.numel if made == wanted else None
