"""Where a model parts from one that is right: the first of its modules whose output is another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from statedict.torch.probing.running import copied, is_close, recorded, run

__all__ = ["Trace", "first_difference", "traced"]

# Bytes of outputs that are kept of a reference; what comes after is not compared.
_MOST_NBYTES = 2 << 30
# The share of modules that must have a namesake, so that namesakes are compared and no others.
_ALIKE = 0.9

# The outputs of modules by path, in the order in which they finish; of one that runs several times, each.
Trace = Sequence[tuple[str, torch.Tensor]]


def traced(reference: torch.nn.Module, inputs: Any) -> tuple[Trace, Any]:
    """What each module of a reference gives, and what the whole gives. The reference is not changed."""
    model = copied(reference)
    found: list[tuple[str, torch.Tensor]] = []
    nbytes = 0

    def see(path: str, tensor: torch.Tensor) -> None:
        nonlocal nbytes
        nbytes += tensor.nbytes
        if nbytes <= _MOST_NBYTES and tensor.is_floating_point():
            found.append((path, tensor.to("cpu", copy=True)))

    with recorded(model, see):
        output = run(model, inputs)
    return found, output


def first_difference(model: torch.nn.Module, inputs: Any, right: Trace) -> str | None:
    """The path of the first module whose output isn't what the reference has; None where there is no such.

    Where the modules are called alike, namesakes are compared. Otherwise each output is looked for among all of its shape, and the module
    is meant that finishes after the last one that was found: from there on nothing comes out right again.
    """
    by_path: dict[str, list[torch.Tensor]] = {}
    by_shape: dict[tuple[int, ...], list[torch.Tensor]] = {}
    for path, tensor in right:
        by_path.setdefault(path, []).append(tensor)
        by_shape.setdefault(tuple(tensor.shape), []).append(tensor)
    paths = [path for path, _ in model.named_modules() if path]
    if paths and sum(path in by_path for path in paths) >= _ALIKE * len(paths):
        return _by_name(model, inputs, by_path)
    return _by_value(model, inputs, by_shape)


def _by_name(model: torch.nn.Module, inputs: Any, right: Mapping[str, Sequence[torch.Tensor]]) -> str | None:
    seen: dict[str, int] = {}
    different: list[str] = []

    def see(path: str, tensor: torch.Tensor) -> None:
        number = seen[path] = seen.get(path, -1) + 1
        known = right.get(path, ())
        if number < len(known) and not different and not is_close(tensor, known[number]):
            different.append(path)

    with recorded(model, see):
        run(model, inputs)
    return different[0] if different else None


def _by_value(
    model: torch.nn.Module, inputs: Any, right: Mapping[tuple[int, ...], Sequence[torch.Tensor]]
) -> str | None:
    order: list[tuple[str, bool]] = []

    def see(path: str, tensor: torch.Tensor) -> None:
        known = right.get(tuple(tensor.shape), ())
        if known:
            order.append((path, any(is_close(tensor, each) for each in known)))

    with recorded(model, see):
        run(model, inputs)
    last = max((at for at, (_, agrees) in enumerate(order) if agrees), default=-1)
    return order[last + 1][0] if last + 1 < len(order) else None
