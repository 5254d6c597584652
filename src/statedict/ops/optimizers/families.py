"""What torch's own optimizers keep for a parameter, by class: the names that tell one from another.

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

from collections.abc import Collection, Mapping
from typing import NamedTuple

__all__ = ["FAMILIES", "GENERIC", "Family", "likely"]

# Hyperparameters that many classes have, that schedulers add, or that choose how and not what is computed.
GENERIC = frozenset(
    {"lr", "initial_lr", "swa_lr", "max_lr", "min_lr", "base_momentum", "max_momentum"}
    | {"weight_decay", "decoupled_weight_decay", "maximize", "foreach", "capturable", "differentiable", "fused"}
    | {"params", "param_names"}
)


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


def likely(hyperparameters: Collection[str], states: Collection[str]) -> str | None:
    """The class of torch whose names are most like these; None where none is shared."""
    names = (set(hyperparameters) | set(states)) - GENERIC

    def likeness(family: Family) -> float:
        known = family.hyperparameters | family.required
        return len(names & (known | family.optional)) / len(names | known)

    best = max(FAMILIES, key=lambda name: likeness(FAMILIES[name])) if names else None
    return best if best is not None and likeness(FAMILIES[best]) > 0 else None
