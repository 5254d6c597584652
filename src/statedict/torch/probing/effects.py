"""Which tensors of a model its output depends on: that of a tensor which nothing reads stays the same, whatever stands in it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from statedict.errors import StateDictError
from statedict.torch.probing.running import outputs_of, run, tensors_in

__all__ = ["without_effect"]

_SEED = 19


def without_effect(
    model: torch.nn.Module, tensors: Mapping[str, torch.Tensor], inputs: Any, outputs: Sequence[torch.Tensor]
) -> list[str]:
    """The keys whose tensors don't matter for the output, which is ``outputs`` as the model is.

    One backward pass clears most of them; the others are changed, one at a time, and the model is run again. All are bitwise as before
    afterwards. Tensors of integers are not looked at: another index is another element, or none.
    """
    left = {key: tensor for key, tensor in tensors.items() if tensor.is_floating_point() or tensor.is_complex()}
    used = _with_gradient(model, left, inputs)
    generator = torch.Generator().manual_seed(_SEED)
    return [
        key
        for key, tensor in left.items()
        if key not in used and not _matters(model, tensor, inputs, outputs, generator)
    ]


def _with_gradient(model: torch.nn.Module, tensors: Mapping[str, torch.Tensor], inputs: Any) -> set[str]:
    """The keys of parameters with a gradient that isn't zero; none where the model can't be differentiated."""
    params = {
        key: tensor for key, tensor in tensors.items() if isinstance(tensor, torch.nn.Parameter) and tensor.numel()
    }
    try:
        for tensor in params.values():
            tensor.requires_grad_(True)
        total = _weighted(tensors_in(run(model, inputs, gradients=True)))
        if total is None or not params:
            return set()
        found = torch.autograd.grad(total, list(params.values()), allow_unused=True)
        return {key for key, gradient in zip(params, found) if gradient is not None and _is_any(gradient)}
    except (RuntimeError, StateDictError):
        return set()  # a step without a derivative: what follows needs none
    finally:
        for tensor in params.values():
            tensor.requires_grad_(False)


def _is_any(gradient: torch.Tensor) -> bool:
    dense = gradient.to_dense() if gradient.layout != torch.strided else gradient
    return bool((dense != 0).any())


def _weighted(outputs: Iterable[torch.Tensor]) -> torch.Tensor | None:
    """One number that all outputs count in, each element with a weight of its own: probabilities add up to one whatever they are."""
    generator = torch.Generator().manual_seed(_SEED)
    total: torch.Tensor | None = None
    for output in outputs:
        if output.requires_grad and output.numel():
            real = torch.view_as_real(output) if output.is_complex() else output
            weights = torch.randn(real.shape, generator=generator).to(real.device, torch.float32)
            part = (real.float() * weights).sum()
            total = part if total is None else total + part
    return total


def _matters(
    model: torch.nn.Module,
    tensor: torch.Tensor,
    inputs: Any,
    outputs: Sequence[torch.Tensor],
    generator: torch.Generator,
) -> bool:
    """Whether another content changes the output."""
    before = tensor.detach().clone()
    noise = torch.randn(before.shape, generator=generator).to(before.device)
    scale = float(before.float().std()) if before.numel() > 1 and not before.is_complex() else 0.0
    try:
        with torch.no_grad():
            # Never below zero where it wasn't: variances stay variances.
            changed = before + noise.to(before.dtype) * (scale or 1.0)
            tensor.copy_(changed.abs() if not before.is_complex() and bool((before >= 0).all()) else changed)
        after = outputs_of(model, inputs)
    except StateDictError:
        return True  # it stops working: it matters
    finally:
        with torch.no_grad():
            tensor.copy_(before)
    return len(after) != len(outputs) or not all(torch.equal(one, other) for one, other in zip(after, outputs))
