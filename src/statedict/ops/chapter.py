"""The functions of the well-known tutorial chapter on state dicts, with its names and signatures.

Each calls the functions of this package and prints what they found.
"""

from __future__ import annotations

from collections.abc import Mapping

from statedict.ops.compare import compare
from statedict.ops.contents import TensorFacts
from statedict.ops.inspect import inspect
from statedict.ops.values import brief, exact
from statedict.report.escape import visible
from statedict.report.units import human_bytes, number, plural

__all__ = ["compare_state_dicts", "inspect_state_dict"]


def inspect_state_dict(state_dict: object) -> None:
    """Print each tensor's shape, dtype, parameters, size, device, min, max and mean, then the totals.

    Takes whatever ``inspect`` takes: a state dict, a module, a path. Values that are no tensors get a line too.
    """
    found = inspect(state_dict, stats=True)
    for tensor in found.tensors:
        print(f"{visible(tensor.key)}:")
        print(f"  {', '.join(_facts(tensor))}")
        figures = _figures(tensor.stats)
        if figures:
            print(f"  {figures}")
    for entry in found.objects:
        print(f"{visible(entry.key)}: {visible(entry.kind)}, {visible(brief(entry.value))}")
    totals = found.totals
    print(
        f"Total: {plural(totals.tensors, 'tensor')}, {exact(totals.parameters)} parameters, {human_bytes(totals.nbytes)}"
    )


def _facts(tensor: TensorFacts) -> list[str]:
    entry = tensor.entry
    made = [
        f"shape {list(entry.shape)}",
        entry.dtype.torch,
        f"{exact(tensor.numel)} parameter{'' if tensor.numel == 1 else 's'}",
    ]
    made += [human_bytes(tensor.nbytes), visible(entry.device or "cpu")]
    return made if entry.layout == "strided" else [*made, visible(entry.layout)]


def _figures(stats: Mapping[str, object] | None) -> str:
    """Minimum, maximum and mean, as far as the values have them."""
    known = [(name, (stats or {}).get(name)) for name in ("min", "max", "mean")]
    return ", ".join([f"{name} {number(value)}" for name, value in known if value is not None])


def compare_state_dicts(dict1: object, dict2: object, rtol: float = 1e-5, atol: float = 1e-8) -> bool:
    """Whether two state dicts have the same keys, shapes, dtypes and values; prints what differs, or that nothing does.

    Numbers are equal where ``|a - b| <= atol + rtol * |b|``, NaN where both have it. Copies are equal: which keys are tied is
    printed, and doesn't count. Takes whatever ``compare`` takes.
    """
    found = compare(dict1, dict2, rtol=rtol, atol=atol)
    print(found)
    changed = [change for change in found.changed if not change.is_equal and change.kind != "aliasing"]
    return not (changed or found.only_in_a or found.only_in_b)
