"""What torch's own optimizers keep for a parameter: the names, the shapes and the dtypes that their next step needs.

The names and shapes are those of ``torch/optim/*.py`` (torch 2.13, each class's ``_init_group`` and ``step``):

    class                  always                               sometimes
    SGD                                                         momentum_buffer
    Adam, AdamW            step exp_avg exp_avg_sq              max_exp_avg_sq (amsgrad)
    Adamax                 step exp_avg exp_inf
    NAdam                  step mu_product exp_avg exp_avg_sq
    RAdam, SparseAdam      step exp_avg exp_avg_sq
    RMSprop                step square_avg                      momentum_buffer (momentum > 0), grad_avg (centered)
    Rprop                  step prev step_size
    Adagrad                step sum                             from the start, not from the first step
    Adadelta               step square_avg acc_delta
    ASGD                   step eta mu ax
    Adafactor              step                                 row_var [.., n, 1], col_var [.., 1, m]; variance below two dimensions
    Muon                   momentum_buffer
    LBFGS                  everything in one state, that of the first parameter: vectors of all parameters' elements, and lists of them

``step``, ``mu_product``, ``eta`` and ``mu`` have one element; the rest has the parameter's shape. A parameter without a
gradient so far has no state.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import NamedTuple

import torch

__all__ = [
    "FAMILIES",
    "GENERIC",
    "Family",
    "Problem",
    "describe",
    "family_behind",
    "family_of",
    "likely",
    "state_dtype",
    "state_problems",
]

# Hyperparameters that many classes have, that schedulers add, or that choose how and not what is computed.
GENERIC = frozenset(
    {"lr", "initial_lr", "swa_lr", "max_lr", "min_lr", "base_momentum", "max_momentum"}
    | {"weight_decay", "decoupled_weight_decay", "maximize", "foreach", "capturable", "differentiable", "fused"}
    | {"params", "param_names"}
)
_SCALARS = frozenset({"step", "mu_product", "eta", "mu"})
_HALF = (torch.bfloat16, torch.float16)


class Family(NamedTuple):
    """One class of torch: what tells it from others."""

    hyperparameters: frozenset[str]  # those that are not generic
    required: frozenset[str]  # of a state that isn't empty
    optional: frozenset[str] = frozenset()
    # Its step computes with float32 state of bfloat16 and float16 parameters, in a loop and with foreach, and leaves the
    # state float32. Measured with torch 2.13; the others raise ("expected dtype float for `end`"), and so does fused.
    takes_float32: bool = False

    @property
    def states(self) -> frozenset[str]:
        """All names in a parameter's state."""
        return self.required | self.optional


def _family(hyperparameters: str, required: str, optional: str = "", takes_float32: bool = False) -> Family:
    return Family(
        frozenset(hyperparameters.split()), frozenset(required.split()), frozenset(optional.split()), takes_float32
    )


_ADAM = _family("betas eps amsgrad", "step exp_avg exp_avg_sq", "max_exp_avg_sq")
FAMILIES: Mapping[str, Family] = {
    "SGD": _family("momentum dampening nesterov", "", "momentum_buffer", True),
    "Adam": _ADAM,
    "AdamW": _ADAM,
    "Adamax": _family("betas eps", "step exp_avg exp_inf"),
    "NAdam": _family("betas eps momentum_decay", "step mu_product exp_avg exp_avg_sq"),
    "RAdam": _family("betas eps", "step exp_avg exp_avg_sq"),
    "SparseAdam": _family("betas eps", "step exp_avg exp_avg_sq", "", True),
    "RMSprop": _family("alpha eps momentum centered", "step square_avg", "momentum_buffer grad_avg"),
    "Rprop": _family("etas step_sizes", "step prev step_size", "", True),
    "Adagrad": _family("lr_decay eps initial_accumulator_value", "step sum", "", True),
    "Adadelta": _family("rho eps", "step square_avg acc_delta", "", True),
    "ASGD": _family("lambd alpha t0", "step eta mu ax", "", True),
    "Adafactor": _family("beta2_decay eps d", "step", "row_var col_var variance"),
    "Muon": _family("momentum nesterov ns_coefficients eps ns_steps adjust_lr_fn", "momentum_buffer"),
    "LBFGS": _family(
        "max_iter max_eval tolerance_grad tolerance_change history_size line_search_fn",
        "",
        "func_evals n_iter d t old_dirs old_stps ro al H_diag prev_flat_grad prev_loss",
    ),
}


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


def likely(hyperparameters: Collection[str], states: Collection[str]) -> str | None:
    """The class of torch whose names are most like these; None where none is shared."""
    names = (set(hyperparameters) | set(states)) - GENERIC

    def likeness(family: Family) -> float:
        known = family.hyperparameters | family.required
        return len(names & (known | family.optional)) / len(names | known)

    best = max(FAMILIES, key=lambda name: likeness(FAMILIES[name])) if names else None
    return best if best is not None and likeness(FAMILIES[best]) > 0 else None


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
    needed = {"max_exp_avg_sq"} if family is _ADAM and group.get("amsgrad") else set()
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
