"""Tensors of a checkpoint that a module's own ``load_state_dict`` can be given before a byte of them is read.

A module may do anything while it loads: rename keys, migrate old versions, materialise lazy parameters, compute one tensor from
another. All of that goes through ``load_state_dict`` and its hooks, so they are given tensors that know their shape and dtype.
``param.copy_(tensor)`` asks the *mover*; whatever else is done with one reads it, and gives a plain tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from statedict.lazy_tensor import LazyTensor
from statedict.torch.building import dtype_in_torch

__all__ = ["Derived", "LazyParameter", "Mover"]

# Asked for each parameter that a lazy tensor is copied to.
Mover = Callable[[torch.Tensor, "LazyParameter"], None]

# What can be asked of a tensor without its values.
_FACTS = frozenset(
    {"dim", "dtype", "device", "element_size", "grad", "is_complex", "is_floating_point", "is_leaf", "is_meta", "is_quantized",
     "is_sparse", "itemsize", "layout", "nbytes", "ndim", "nelement", "numel", "requires_grad", "shape", "size", "stride",
     "is_cpu", "is_cuda", "is_contiguous", "is_nested", "is_mkldnn", "names", "ndimension", "__len__", "__hash__", "__repr__"}
)  # fmt: skip


class LazyParameter(torch.Tensor):
    """A tensor on the meta device that stands for one in a checkpoint."""

    key: str
    tensor: LazyTensor
    mover: Mover
    reads: bool  # whether other operations may read the values; else they are done without values

    @staticmethod
    def of(key: str, tensor: LazyTensor, mover: Mover, *, reads: bool) -> LazyParameter:
        """The stand-in of a strided tensor."""
        entry = tensor.entry
        empty = torch.empty(entry.shape, dtype=dtype_in_torch(entry), device="meta")
        made: LazyParameter = torch.Tensor._make_subclass(LazyParameter, empty)
        made.key, made.tensor, made.mover, made.reads = key, tensor, mover, reads
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Copies go to the mover, questions about the form are answered, everything else gets plain tensors."""
        kwargs = kwargs or {}
        if (
            func is torch.Tensor.copy_
            and len(args) > 1
            and isinstance(args[1], LazyParameter)
            and not isinstance(args[0], LazyParameter)
        ):
            args[1].mover(args[0], args[1])
            return args[0]
        name = getattr(func, "__name__", "")
        if name in ("__get__", "__set__"):
            name = getattr(getattr(func, "__self__", None), "__name__", "")
        if name in _FACTS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        return _computed(func, args, kwargs)


class Derived(torch.Tensor):
    """What is computed, without values, of tensors that aren't read: a copy of it is noted like one of theirs."""

    mover: Any

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """As ``LazyParameter`` does, on the meta device."""
        if (
            func is torch.Tensor.copy_
            and len(args) > 1
            and isinstance(args[1], Derived)
            and not isinstance(args[0], Derived)
        ):
            args[1].mover(args[0], args[1])
            return args[0]
        return _computed(func, args, kwargs or {})


def _computed(func: Any, args: Any, kwargs: Any) -> Any:
    """The function's result on plain tensors; marked as derived if one of them has no values."""
    given = [*args, *kwargs.values()]
    inner = [item for each in given for item in (each if type(each) in (list, tuple) else (each,))]
    unread = [
        each for each in inner if isinstance(each, Derived) or (isinstance(each, LazyParameter) and not each.reads)
    ]
    with torch._C.DisableTorchFunctionSubclass():
        result = func(*[_plain(each) for each in args], **{key: _plain(each) for key, each in kwargs.items()})
        return _derived(result, unread[0].mover) if unread else result


def _derived(value: Any, mover: Any) -> Any:
    if isinstance(value, torch.Tensor):
        made: Any = value.as_subclass(Derived)
        made.mover = mover
        return made
    return type(value)(_derived(item, mover) for item in value) if type(value) in (list, tuple) else value


def _plain(value: Any) -> Any:
    """The value with plain tensors in the place of lazy ones."""
    if isinstance(value, LazyParameter) and value.reads:
        return value.tensor.torch()
    if isinstance(value, (LazyParameter, Derived)):
        return value.as_subclass(torch.Tensor)
    if type(value) in (list, tuple):
        return type(value)(_plain(item) for item in value)
    return value
