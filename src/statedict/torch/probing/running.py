"""A model run on the inputs of a probe, and what comes out: without gradients, in evaluation, always with the same random numbers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from statedict.errors import StateDictError, one_line

__all__ = ["closeness", "copied", "is_close", "outputs_of", "recorded", "run", "tensors_in"]

# Random generators are set to this before each run: a model that draws numbers must draw the same ones.
_SEED = 20_11
# Containers inside of each other that an output is looked for tensors in.
_DEEPEST = 16
# How much of the largest number of an output two right models may differ: other kernels and orders of sums give 1e-6 in float32.
_TOLERANCE = 1e-3
_HALF_TOLERANCE = 2e-2


def copied(module: torch.nn.Module) -> torch.nn.Module:
    """A copy with memory of its own, set to evaluation. Raises ``StateDictError`` where the module can't be copied."""
    # The old weight_norm keeps the weight that it has computed as an attribute, which torch doesn't copy; it is computed anew.
    attributes = [value for each in module.modules() for value in vars(each).values()]
    computed = [value for value in attributes if isinstance(value, torch.Tensor) and not value.is_leaf]
    try:
        made = copy.deepcopy(module, {id(value): value.detach().clone() for value in computed})
    except Exception as error:
        raise StateDictError(
            f"the model can't be copied for a probe: {type(error).__name__}: {one_line(error)}",
            hint="Give a freshly built model",
        ) from error
    made.eval()
    return made.requires_grad_(False)


def run(model: torch.nn.Module, inputs: Any, *, gradients: bool = False) -> Any:
    """The model's output. ``inputs`` are not changed. Raises ``StateDictError`` for what the model's own code raises."""
    try:
        with torch.random.fork_rng(devices=[]), torch.set_grad_enabled(gradients):
            torch.manual_seed(_SEED)
            if not isinstance(inputs, torch.Tensor) and callable(inputs):
                return inputs(model)
            given = _cloned(inputs)
            if isinstance(given, Mapping):
                return model(**given)
            return model(*given) if isinstance(given, (tuple, list)) else model(given)
    except Exception as error:
        what = f"the model can't be run on the probe: {type(error).__name__}: {one_line(error)}"
        raise StateDictError(
            what, hint="Give inputs that the model takes: probe=tensor, tuple, dict, or a function of the model"
        ) from error


def _cloned(inputs: Any) -> Any:
    """Copies of the tensors, as layers that work in place would change them."""
    if isinstance(inputs, torch.Tensor):
        return inputs.detach().clone()
    if isinstance(inputs, Mapping):
        return {key: _cloned(value) for key, value in inputs.items()}
    if type(inputs) in (list, tuple):
        return type(inputs)(_cloned(value) for value in inputs)
    return inputs


def tensors_in(value: Any) -> list[torch.Tensor]:
    """The tensors in what a model returns, in order: of nested containers, and of records such as dataclasses."""
    found: list[torch.Tensor] = []
    pending: list[tuple[Any, int]] = [(value, 0)]
    while pending:
        item, depth = pending.pop()
        if isinstance(item, torch.Tensor):
            found.append(item)
        elif depth < _DEEPEST:
            inside: list[Any] = []
            if isinstance(item, Mapping):
                inside = list(item.values())
            elif isinstance(item, (list, tuple)):
                inside = list(item)
            elif hasattr(item, "__dataclass_fields__"):
                inside = [getattr(item, name) for name in item.__dataclass_fields__]
            pending += [(each, depth + 1) for each in reversed(inside)]
    return found


def outputs_of(model: torch.nn.Module, inputs: Any) -> list[torch.Tensor]:
    """The tensors that the model gives. Raises ``StateDictError`` where there are none."""
    found = [tensor.detach() for tensor in tensors_in(run(model, inputs))]
    if not found:
        raise StateDictError("the model returns no tensor, so a probe shows nothing")
    return [tensor.clone() for tensor in found]


# -------------------------------------------------------------------- comparing


def closeness(output: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, as a part of the largest number that was expected; infinite for another shape or NaN."""
    if output.numel() != expected.numel():
        return float("inf")
    one = output.detach().to("cpu", torch.complex128 if output.is_complex() else torch.float64).reshape(-1)
    other = expected.detach().to("cpu", one.dtype).reshape(-1)
    if not one.numel():
        return 0.0
    difference = float((one - other).abs().max())
    scale = float(other.abs().max())
    return float("inf") if difference != difference else difference / (scale or 1.0)


def is_close(output: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether the two are one answer, but for rounding."""
    half = any(each.dtype in (torch.float16, torch.bfloat16) for each in (output, expected))
    return closeness(output, expected) <= (_HALF_TOLERANCE if half else _TOLERANCE)


# -------------------------------------------------------------------- modules


@contextmanager
def recorded(model: torch.nn.Module, see: Callable[[str, torch.Tensor], None]) -> Iterator[None]:
    """A block in which ``see`` is given the path and the first tensor of the output of each module, as they finish."""
    handles = []

    def hook(path: str) -> Callable[[torch.nn.Module, Any, Any], None]:
        def after(_: torch.nn.Module, __: Any, output: Any) -> None:
            tensors = tensors_in(output)
            if tensors:
                see(path, tensors[0].detach())

        return after

    try:
        for path, module in model.named_modules():
            handles.append(module.register_forward_hook(hook(path)))
        yield
    finally:
        for handle in handles:
            handle.remove()
