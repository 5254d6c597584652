"""The one way from the rest of the program to ``statedict.torch``, taken late: when a value of torch's was handed in, or asked for.

What a value is, is told by its type's own modules; that imports nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from statedict.errors import MissingDependency
from statedict.manifest import Storage, TensorEntry, TorchValue

if TYPE_CHECKING:
    import torch

__all__ = [
    "StorageOf",
    "entry_of",
    "examine_live",
    "is_module",
    "is_optimizer",
    "is_scheduler",
    "is_tensor",
    "need_torch",
    "probed",
    "side_of_module",
    "small_value",
    "state_dict",
    "to_torch",
]

# Gives the storage of a key; the object keeps its memory, and the function gives bytes and byte order when it is new. It is given
# a dict for what the storages of one gathering share.
StorageOf = Callable[[object, object, Callable[["dict[object, Any]"], "tuple[Any, str]"]], Storage]


def need_torch(what: str, hint: str) -> None:
    """Raise ``MissingDependency`` where torch can't be imported, with what needs it and what else could be done."""
    try:
        import statedict.torch.tensors  # noqa: F401
    except ImportError as error:
        raise MissingDependency(
            f"{what} torch, which can't be imported here", hint=f"Install it: pip install 'statedict[torch]'{hint}"
        ) from error


def _is_a(value: object, module: str, name: str) -> bool:
    return any(base.__name__ == name and base.__module__ == module for base in type(value).__mro__)


def is_tensor(value: object) -> bool:
    """Whether the value is a tensor of torch's."""
    return _is_a(value, "torch", "Tensor")


def is_module(value: object) -> bool:
    """Whether the value is a module of torch's."""
    return _is_a(value, "torch.nn.modules.module", "Module")


def is_optimizer(value: object) -> bool:
    """Whether the value is an optimizer of torch's, or of a class that inherits from it."""
    return _is_a(value, "torch.optim.optimizer", "Optimizer")


def is_scheduler(value: object) -> bool:
    """Whether the value is a learning rate scheduler of torch's, or of a class that inherits from one."""
    return _is_a(value, "torch.optim.lr_scheduler", "LRScheduler") or _is_a(
        value, "torch.optim.lr_scheduler", "ReduceLROnPlateau"
    )


def state_dict(module: Any) -> object:
    """The module's state dict."""
    return module.state_dict()


def entry_of(tensor: Any, storage_of: StorageOf) -> TensorEntry:
    """A tensor of torch's as an entry over its own memory."""
    from statedict.torch.tensors import entry_of

    return entry_of(tensor, storage_of)


def small_value(value: object) -> TorchValue | None:
    """A dtype, device, size, layout, qscheme or memory format of torch's; None for another value."""
    from statedict.torch.tensors import small_value

    return small_value(value)


def to_torch(tensor: Any) -> torch.Tensor:
    """A ``LazyTensor`` as one of torch's, in memory of its own. Raises ``MissingDependency`` where torch isn't installed."""
    need_torch("tensors of torch need", ", or use .numpy()")
    from statedict.torch.tensors import to_torch

    made: torch.Tensor = to_torch(tensor)
    return made


def side_of_module(module: Any) -> Any:
    """What a module wants to be filled, as a ``statedict.aligning.Side``: names, shapes, ties, classes, buffers of its own."""
    from statedict.torch.targets import side_of_module

    return side_of_module(module)


def probed(module: Any, source: Any, alignment: Any, probe: object) -> Any:
    """A plan tried on a copy of a module: ``.alignment`` with what that decides, and ``.findings``. ``source`` are ``Weights``."""
    from statedict.torch.probing.probing import probed

    return probed(module, source, alignment, probe)


def examine_live(target: Any, source: Any) -> Any:
    """What is to be said of loading a checkpoint's state into an optimizer or a scheduler: an ``Examination``. Nothing is changed."""
    from statedict.torch.optimizers.diagnosing import examine_optimizer, examine_scheduler

    return (examine_optimizer if is_optimizer(target) else examine_scheduler)(target, source)
