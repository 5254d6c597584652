"""What the next step of an optimizer of torch's needs: the names, the shapes and the dtypes of its state.

The classes and their names are drawn in ``ops/optimizers/families.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import torch

from statedict.ops.optimizers.families import FAMILIES, Family

__all__ = [
    "Problem",
    "describe",
    "family_behind",
    "family_of",
    "state_dtype",
    "state_problems",
]

_SCALARS = frozenset({"step", "mu_product", "eta", "mu"})
_HALF = (torch.bfloat16, torch.float16)


class Problem(NamedTuple):
    """Something of the source that the target can't take."""

    key: str
    expected: str
    found: str

    def __str__(self) -> str:
        return f"{self.key} (expected {self.expected}, found {self.found})"


def family_of(optimizer: torch.optim.Optimizer) -> Family | None:
    """The facts of the class of torch whose step this optimizer takes; None for a step of someone else's.

    The function says whose it is. The first instance of a class gets the step that it has inherited as an attribute of the
    class itself (``optim/optimizer.py``, ``_patch_step_function``), wrapped and with the name that it had.
    """
    step = type(optimizer).step
    return FAMILIES.get(step.__qualname__.rpartition(".")[0]) if _is_torchs(step) else None


def family_behind(optimizer: torch.optim.Optimizer) -> Family | None:
    """The same, or for a step of its own, which may end in the inherited one, the class of torch that it inherits from."""
    bases = (FAMILIES.get(cls.__name__) for cls in type(optimizer).__mro__ if _is_torchs(cls))
    return family_of(optimizer) or next((family for family in bases if family is not None), None)


def _is_torchs(what: Callable[..., object]) -> bool:
    return f"{what.__module__}.".startswith("torch.optim.")


def describe(value: object) -> str:
    """A value of a state in a few words: a tensor's shape, or a type."""
    if isinstance(value, torch.Tensor):
        return f"[{', '.join(str(size) for size in value.shape)}]"
    return "nothing" if value is None else type(value).__name__


# -------------------------------------------------------------------- shapes


def state_problems(
    key: str, param: torch.Tensor, state: Mapping[str, object], group: Mapping[str, object], family: Family | None
) -> Iterator[Problem]:
    """What of a parameter's state its optimizer's next step could not use: names that it lacks, shapes, kinds.

    ``group`` has the hyperparameters that will hold. Without a family, the step is unknown: then names that are
    torch's must fit, and where tensors have dimensions, at least one must have the parameter's shape.
    """
    if family is None:
        yield from _foreign_problems(key, param, state)
        return
    needed = family.required | _needed(param, group, family)
    if state:
        for name in sorted(needed - set(state)):
            yield Problem(f"{key}.{name}", _shown(expected_shape(name, param)), "nothing")
    for name, value in state.items():
        if name in family.states:
            yield from _value_problems(f"{key}.{name}", name, param, value, may_lack=name not in needed)


def _needed(param: torch.Tensor, group: Mapping[str, object], family: Family) -> frozenset[str]:
    """The names that the hyperparameters or the number of dimensions ask for."""
    if family is FAMILIES["Adafactor"]:
        return frozenset({"row_var", "col_var"} if param.dim() > 1 else {"variance"})
    needed = {"max_exp_avg_sq"} if family is FAMILIES["Adam"] and group.get("amsgrad") else set()
    if family is FAMILIES["RMSprop"]:
        needed |= {"momentum_buffer"} if group.get("momentum") else set()
        needed |= {"grad_avg"} if group.get("centered") else set()
    return frozenset(needed)


def expected_shape(name: str, param: torch.Tensor) -> tuple[int, ...]:
    """The shape that torch gives to the state of this name, () for the numbers."""
    shape = tuple(param.shape)
    if name in _SCALARS:
        return ()
    if name == "row_var":
        return (*shape[:-1], 1)
    if name == "col_var":
        return (*shape[:-2], 1, *shape[-1:])
    return shape


def _value_problems(key: str, name: str, param: torch.Tensor, value: object, *, may_lack: bool) -> Iterator[Problem]:
    expected = expected_shape(name, param)
    if isinstance(value, torch.Tensor):
        if value.numel() != 1 if name in _SCALARS else tuple(value.shape) != expected:
            yield Problem(key, _shown(expected), describe(value))
        elif (value.is_complex() and not param.is_complex()) or value.dtype == torch.bool:
            yield Problem(key, _bare(param.dtype), _bare(value.dtype))
        elif value.layout != torch.strided or (value.is_meta and not param.is_meta):
            found = "a tensor without values" if value.is_meta else f"one of layout {_bare(value.layout)}"
            yield Problem(key, "a dense tensor", found)
    elif not (value is None and may_lack) and not (name in _SCALARS and isinstance(value, (int, float))):
        yield Problem(key, _shown(expected), describe(value))


def _bare(name: torch.dtype | torch.layout) -> str:
    return str(name).removeprefix("torch.")


def _foreign_problems(key: str, param: torch.Tensor, state: Mapping[str, object]) -> Iterator[Problem]:
    """Shapes that no step of a parameter like this has made. A tensor of other dimensions beside one that fits is the class's matter."""
    tensors = {name: value for name, value in state.items() if isinstance(value, torch.Tensor) and value.dim()}
    if any(_fits(str(name), value, param) for name, value in tensors.items()):
        tensors = {name: value for name, value in tensors.items() if name in _PARAMETER_SHAPED}
    for name, value in tensors.items():
        if not _fits(str(name), value, param):
            yield Problem(f"{key}.{name}", describe(param), describe(value))


_PARAMETER_SHAPED = (
    frozenset().union(*(family.states for name, family in FAMILIES.items() if name != "LBFGS"))
    - _SCALARS
    - {
        "row_var",
        "col_var",
        "variance",
    }
)


def _fits(name: str, value: torch.Tensor, param: torch.Tensor) -> bool:
    """The parameter's shape, or what factored methods keep of it: rows without the last dimension, columns without the one before."""
    shape, found = tuple(param.shape), tuple(value.shape)
    if param.dim() > 1 and "row" in name:
        return found in (shape[:-1], (*shape[:-1], 1))
    if param.dim() > 1 and "col" in name:
        return found in ((*shape[:-2], shape[-1]), (*shape[:-2], 1, shape[-1]))
    return found == shape


def _shown(shape: tuple[int, ...]) -> str:
    return f"[{', '.join(str(size) for size in shape)}]"


# -------------------------------------------------------------------- dtypes


def state_dtype(
    name: object, value: torch.Tensor, param: torch.Tensor, group: Mapping[str, object], family: Family | None
) -> torch.dtype:
    """The dtype in which a state tensor is loaded.

    torch casts every tensor but ``step`` to the dtype of a floating-point parameter (``optim/optimizer.py``,
    ``_process_value_according_to_param_policy``), and so are they cast here, unless that loses what the step can use:
    the numbers keep their dtype; float32 state of half-precision parameters stays where the class's step takes it; a step
    that isn't torch's gets what it saved, integers and 8-bit floats included, widened at most to the parameter's dtype.
    """
    if not param.is_floating_point():
        return value.dtype
    if family is None:
        narrow = value.dtype in _HALF or value.dtype == torch.float32
        return param.dtype if narrow and value.element_size() < param.element_size() else value.dtype
    if name in _SCALARS and family is not FAMILIES["LBFGS"]:
        return value.dtype
    stays = family.takes_float32 and value.dtype == torch.float32 and param.dtype in _HALF and not group.get("fused")
    return value.dtype if stays else param.dtype
