"""What a state dict of a module leaves out: gradients that wait for the next step, and buffers that aren't persistent.

A gradient that an optimizer has used up is not captured: the loop is going to zero it. It is known by the version that its memory had
behind the step (``Tensor._version`` counts changes in place); one that was changed since, or never used, is captured.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from statedict.checkpoint import Checkpoint
from statedict.errors import SpecMismatch
from statedict.ops.load_report import LoadReport
from statedict.torch.training.environment import Difference
from statedict.torch.training.parts import Wishes, value_of

__all__ = ["BufferPart", "GradientPart", "mark_used"]

# An attribute of a gradient: the version of it that an optimizer has used.
_USED = "_statedict_used"


def mark_used(optimizer: torch.optim.Optimizer) -> None:
    """Note that the optimizer's step has used the gradients as they are."""
    for group in optimizer.param_groups:
        for param in group["params"]:
            grad = param.grad
            if grad is not None:
                setattr(grad, _USED, grad._version)


def _is_used(grad: torch.Tensor) -> bool:
    return getattr(grad, _USED, None) == grad._version


class _Named:
    """Tensors of a module by name, that are brought back as they were."""

    kind = ""

    def __init__(self, module: torch.nn.Module) -> None:
        self.visible = module
        self._found: Mapping[str, torch.Tensor] = {}

    def _targets(self) -> dict[str, torch.Tensor]:
        raise NotImplementedError

    def check(self, piece: Checkpoint, key: str, wishes: Wishes) -> list[Difference]:
        """Every name must be there, with the shape and dtype."""
        found, targets = value_of(piece), self._targets()
        if not isinstance(found, dict):
            raise SpecMismatch("these are no tensors by name", key=key, found=type(found).__name__)
        for name, value in found.items():
            here = targets.get(name)
            expected = "nothing of that name" if here is None else f"{here.dtype} {list(here.shape)}"
            shown = f"{value.dtype} {list(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__
            if expected != shown:
                hint = "Leave it out with only=" if here is None else None
                raise SpecMismatch(
                    "the saved value doesn't fit", key=f"{key}.{name}", expected=expected, found=shown, hint=hint
                )
        self._found = found
        return []


class GradientPart(_Named):
    """The gradients that were accumulated and not used yet. Those that the step doesn't hold become None."""

    kind = "gradients"

    def __init__(self, module: torch.nn.Module, *, used: bool) -> None:
        super().__init__(module)
        self._used = used  # capture those too that were used

    def _targets(self) -> dict[str, torch.Tensor]:
        return dict(self.visible.named_parameters())

    def value(self) -> Any:
        """The gradients by the names of their parameters."""
        found = {name: param.grad for name, param in self.visible.named_parameters() if param.grad is not None}
        # Without the mark, which would be kept with the tensor.
        return {name: grad.detach() for name, grad in found.items() if self._used or not _is_used(grad)}

    def commit(self) -> LoadReport | None:
        """Give each parameter its gradient."""
        for name, param in self._targets().items():
            grad = self._found.get(name)
            param.grad = None if grad is None else grad.to(param.device)
        self._found = {}
        return None


class BufferPart(_Named):
    """The buffers that aren't in the state dict."""

    kind = "buffers"

    def _targets(self) -> dict[str, torch.Tensor]:
        kept = self.visible.state_dict(keep_vars=True)
        return {name: value for name, value in self.visible.named_buffers() if name not in kept}

    def value(self) -> Any:
        """The buffers by name."""
        return self._targets()

    def commit(self) -> LoadReport | None:
        """Change them in place."""
        with torch.no_grad():
            for name, target in self._targets().items():
                if name in self._found:
                    target.copy_(self._found[name])
        self._found = {}
        return None
