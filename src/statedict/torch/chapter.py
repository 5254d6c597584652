"""The functions of the tutorial chapter on state dicts that need torch. Each is a thin call of ``save``, ``load`` and ``load_into``."""

from __future__ import annotations

import os
from collections.abc import Mapping
from datetime import datetime, timezone
from typing import Any

import torch

from statedict.errors import KeyNotFound, StateDictError, one_line
from statedict.torch.loading import load_into
from statedict.torch.modules.targets import Target
from statedict.torch.optimizers.loading import named_state_dict
from statedict.torch.reading import load
from statedict.torch.training.rng import KINDS, check_states, plain_states, set_states
from statedict.torch.writing import save

__all__ = ["filter_state_dict", "load_model_safely", "load_training_state", "save_training_state"]

# Where the states of random generators stand.
_RNG = "rng_states"


def filter_state_dict(state_dict: Mapping[str, Any], model: torch.nn.Module) -> dict[str, Any]:
    """The entries that the model has a place for, by name and shape; says what was left out and why."""
    if not isinstance(state_dict, Mapping):
        raise StateDictError("a state dict is a mapping of names to tensors", found=type(state_dict).__name__)
    slots = Target(model).slots
    kept: dict[str, Any] = {}
    for key, value in state_dict.items():
        slot = slots.get(key)
        if slot is None:
            print(f"skipped {one_line(key)}: the model has no such key")
        elif slot.tensor is None or slot.is_lazy:
            kept[key] = value
        elif not hasattr(value, "shape"):
            print(f"skipped {one_line(key)}: {type(value).__name__} in the state dict, a tensor in the model")
        elif tuple(value.shape) != slot.shape:
            print(f"skipped {one_line(key)}: shape {list(value.shape)}, in the model {list(slot.shape)}")
        else:
            kept[key] = value
    print(f"kept {len(kept)} of {len(state_dict)} entries; the model has {len(slots)}")
    return kept


def load_model_safely(model_class: Any, weights_path: Any, device: Any, *args: Any, **kwargs: Any) -> torch.nn.Module:
    """A model of the class with the weights of the file, on the device, its parameters trainable as its class makes them."""
    model: torch.nn.Module = model_class(*args, **kwargs)
    report = load_into(model, weights_path, rules="auto")
    model.to(device)
    print(f"loaded {len(report.loaded)} tensors of {one_line(os.fspath(weights_path))} on {device}")
    return model


def save_training_state(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer | None,
    epoch: Any,
    loss: Any,
    path: Any,
    *,
    rng: Any = False,
    **kwargs: Any,
) -> None:
    """Everything that it takes to go on, in one file; an older one stays as it is until this is complete."""
    if rng is not True and rng is not False:
        kwargs["rng"] = rng  # a value of the caller's, under the name that it has in the chapter
    state: dict[str, Any] = {"model_state_dict": model.state_dict()}
    if optimizer is not None:
        state["optimizer_state_dict"] = named_state_dict(optimizer, [model])
    state |= {
        "epoch": epoch,
        "loss": loss,
        "pytorch_version": str(torch.__version__),
        "timestamp": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        **kwargs,
    }
    if rng is True:
        state[_RNG] = plain_states()
    save(state, path)
    print(f"saved the training state to {one_line(os.fspath(path))}")


def load_training_state(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer | None, path: Any, device: Any = None
) -> dict[str, Any]:
    """Put a saved training state into the model and the optimizer; gives everything that the file holds.

    Nothing is changed unless the model's part fits. The tensors of the result are on ``device`` (the CPU where it is None).
    """
    state = load(path, map_location="cpu" if device is None else device)
    if not isinstance(state, dict) or "model_state_dict" not in state:
        raise KeyNotFound(
            "this is no training state",
            path=os.fspath(path),
            key="model_state_dict",
            hint="load_into takes any other file",
        )
    saved = state.get("optimizer_state_dict")
    chance = _chance(state.get(_RNG))
    # All are checked before one of them changes.
    check_states(chance, _RNG)
    load_into(model, state["model_state_dict"], rules="auto", dry_run=True)
    if optimizer is not None and saved is not None:
        load_into(optimizer, saved, model=model)
    elif optimizer is not None:
        print("the file has no state of an optimizer: this one stays as it is")
    load_into(model, state["model_state_dict"], rules="auto")
    if chance:
        set_states(chance, _RNG)
        print(f"restored the random states of {', '.join(chance)}")
    print(f"loaded epoch {one_line(state.get('epoch'))}, loss {one_line(_number(state.get('loss')))}")
    return state


def _chance(found: Any) -> Mapping[str, Any]:
    """The random states of the file, if that is what stands under their key: in the chapter any keyword may."""
    return found if isinstance(found, Mapping) and found and set(found) <= set(KINDS) else {}


def _number(value: Any) -> Any:
    return value.item() if isinstance(value, torch.Tensor) and value.numel() == 1 else value
