"""A module's own loading, carried out on a copy without memory: what it would copy where, before anything is changed.

Hooks, migrations of old versions, lazy and parametrised modules and classes that override loading make of a state dict what they
like. The copy shares the module's code and attributes, and has parameters on the meta device; its hooks are bound to it. What its
``load_state_dict`` says is missing, unexpected or of another size is what the module's would say.

Source: torch 2.13 ``nn/modules/module.py`` (``load_state_dict``, ``_load_from_state_dict``, ``_WrappedHook``), ``nn/modules/lazy.py``.
"""

from __future__ import annotations

import copy
import functools
import re
import types
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from statedict.errors import StateDictError, one_line
from statedict.torch.modules.lazy_parameters import LazyParameter

__all__ = ["Rehearsal", "is_plain", "is_sharded", "rehearse"]

_SIZES = re.compile(
    r"size mismatch for (?P<key>.+?): copying a param with shape torch\.Size\((?P<found>\[.*?\])\) from checkpoint, "
    r"the shape in current model is torch\.Size\((?P<expected>\[.*?\])\)\."
)
# The tables of a module that are copied with it, and not shared.
_TABLES = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set", "_load_state_dict_pre_hooks",
           "_load_state_dict_post_hooks", "_state_dict_hooks", "_state_dict_pre_hooks")  # fmt: skip


class Rehearsal(NamedTuple):
    """What the module's loading would do."""

    copies: list[tuple[torch.Tensor, LazyParameter]]  # the module's own tensor, and what would be copied to it
    computed: list[torch.Tensor]  # the module's own tensors that get what its code computes of the file's
    missing: list[str]
    unexpected: list[str]
    mismatched: dict[str, tuple[str, str]]  # by key: the shape in the module, the shape in the file
    problems: list[str]  # everything else that it says


def is_plain(module: torch.nn.Module) -> bool:
    """Whether loading into the module is nothing but a copy by name."""
    plain = torch.nn.Module
    if type(module).load_state_dict is not plain.load_state_dict:
        return False
    for each in module.modules():
        kind = type(each)
        if (
            kind._load_from_state_dict is not plain._load_from_state_dict
            or kind.set_extra_state is not plain.set_extra_state
        ):
            return False
        if (
            each._load_state_dict_pre_hooks
            or each._load_state_dict_post_hooks
            or kind.state_dict is not plain.state_dict
        ):
            return False
        if isinstance(each, torch.jit.ScriptModule) or any(
            value is not None and torch.nn.parameter.is_lazy(value) for value in each._parameters.values()
        ):
            return False
    return True


def is_sharded(module: torch.nn.Module) -> bool:
    """Whether its parameters are parts of flat ones (FSDP1), which only its own loading can unfold."""
    return any(
        base.__name__ == "FullyShardedDataParallel" and base.__module__.startswith("torch.distributed.fsdp")
        for each in module.modules()
        for base in type(each).__mro__
    )


def rehearse(module: torch.nn.Module, values: Mapping[str, Any], metadata: Any) -> Rehearsal:
    """Load the values into a copy without memory. The module is not changed; lazy values are recorded and not read.

    Raises ``StateDictError`` where the module can't be copied so, or its own code raises.
    """
    copies: list[tuple[torch.Tensor, LazyParameter]] = []
    computed: list[torch.Tensor] = []
    hooked = True
    mismatched: dict[str, tuple[str, str]] = {}
    problems: list[str] = []
    pending = dict(values)
    while True:
        copies.clear()
        computed.clear()
        skeleton = _Skeleton(module, hooked=hooked)
        for value in pending.values():
            if isinstance(value, LazyParameter):
                value.mover = skeleton.recorder(copies, computed)
        try:
            keys, message = _attempt(skeleton.root, pending, metadata)
        except StateDictError:
            if not hooked:
                raise
            # What runs after loading looks at values, of which there are none here: once more without it.
            hooked = False
            continue
        found = {match["key"]: (match["expected"], match["found"]) for match in _SIZES.finditer(message)}
        known = {key: sizes for key, sizes in found.items() if key in pending}
        problems += [] if found or not message else [message]
        mismatched |= found
        if not known:
            missing = [key for key in keys[0] if key not in mismatched]
            return Rehearsal(list(copies), list(computed), missing, list(keys[1]), mismatched, problems)
        # torch says nothing of missing keys where a size differs: once more without those.
        pending = {key: value for key, value in pending.items() if key not in known}


def _attempt(
    skeleton: torch.nn.Module, values: Mapping[str, Any], metadata: Any
) -> tuple[tuple[list[str], list[str]], str]:
    """Missing and unexpected keys, and what torch's error says; one of the two is empty."""
    state: Any = OrderedDict(values)
    if metadata is not None:
        state._metadata = copy.deepcopy(metadata)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = skeleton.load_state_dict(state, strict=False)
    except RuntimeError as error:
        if "Error(s) in loading state_dict" in str(error):
            return ([], []), str(error)
        raise StateDictError(f"the module's own loading fails: {one_line(error)}") from error
    except Exception as error:
        raise StateDictError(f"the module's own loading fails: {type(error).__name__}: {one_line(error)}") from error
    return (list(result.missing_keys), list(result.unexpected_keys)), ""


class _Skeleton:
    """The copy, and which of its tensors stands for which of the module's."""

    def __init__(self, module: torch.nn.Module, *, hooked: bool) -> None:
        self._hooked = hooked  # whether hooks run after loading
        self._modules: dict[int, torch.nn.Module] = {}
        self._tensors: dict[int, torch.Tensor] = {}  # ours by id of the module's
        self._originals: dict[int, torch.Tensor] = {}  # the module's by id of ours
        for each in module.modules():
            self._modules[id(each)] = _bare(each)
        for each in module.modules():
            self._fill(each, self._modules[id(each)])
        self.root = self._modules[id(module)]

    def recorder(
        self, copies: list[tuple[torch.Tensor, LazyParameter]], computed: list[torch.Tensor]
    ) -> Callable[[torch.Tensor, LazyParameter], None]:
        """A mover that notes what would be copied, under the module's own tensor."""

        def record(target: torch.Tensor, value: torch.Tensor) -> None:
            original = self._originals.get(id(target))
            if original is not None and isinstance(value, LazyParameter):
                copies.append((original, value))
            elif original is not None:
                computed.append(original)

        return record

    def _fill(self, module: torch.nn.Module, made: torch.nn.Module) -> None:
        state = made.__dict__
        state["_parameters"] = {name: self._tensor(value) for name, value in module._parameters.items()}
        state["_buffers"] = {name: self._tensor(value) for name, value in module._buffers.items()}
        state["_modules"] = {
            name: None if child is None else self._modules[id(child)] for name, child in module._modules.items()
        }
        for table in _TABLES[4:]:
            hooks = state.get(table)
            if table == "_load_state_dict_post_hooks" and not self._hooked:
                state[table] = OrderedDict()
            elif hooks:
                state[table] = OrderedDict((number, self._bound(hook)) for number, hook in hooks.items())

    def _tensor(self, value: torch.Tensor | None) -> torch.Tensor | None:
        if value is None:
            return None
        made = self._tensors.get(id(value))
        if made is None:
            made = self._tensors[id(value)] = _without_memory(value)
            self._originals[id(made)] = value
        return made

    def _bound(self, hook: Any) -> Any:
        """The hook, acting on the copy where it acted on the module."""
        if isinstance(hook, types.MethodType) and id(hook.__self__) in self._modules:
            return types.MethodType(hook.__func__, self._modules[id(hook.__self__)])
        if isinstance(hook, functools.partial):
            return functools.partial(self._bound(hook.func), *hook.args, **hook.keywords)
        if hasattr(hook, "hook") and hasattr(hook, "with_module"):
            made = copy.copy(hook)
            made.__dict__.update(hook.__dict__)
            made.hook = self._bound(hook.hook)
            if hook.with_module:
                here = self._modules.get(id(hook.module()))
                made.module = weakref.ref(here) if here is not None else hook.module
            return made
        return hook


def _bare(module: torch.nn.Module) -> torch.nn.Module:
    """A module of the same class with the same attributes. Those of a class that restores extra state are copied too."""
    if isinstance(module, torch.jit.ScriptModule):
        raise StateDictError("a scripted module can't be copied without its memory")
    made: torch.nn.Module = object.__new__(type(module))
    state = dict(module.__dict__)
    if type(module).set_extra_state is not torch.nn.Module.set_extra_state:
        own = {name: value for name, value in state.items() if not name.startswith("_") or name not in _TABLES}
        state.update(
            {name: _copied(value) for name, value in own.items() if not isinstance(value, dict) or name[:1] != "_"}
        )
    made.__dict__.update(state)
    return made


def _copied(value: Any) -> Any:
    try:
        return copy.deepcopy(value)
    except Exception:
        return value


def _without_memory(value: torch.Tensor) -> torch.Tensor:
    """A parameter or buffer of the same form on the meta device."""
    for kind in (torch.nn.parameter.UninitializedParameter, torch.nn.parameter.UninitializedBuffer):
        if isinstance(value, kind):
            # Any: the stubs of these classes lack their constructors' arguments.
            make: Any = kind
            lazy: torch.Tensor = make(value.requires_grad, device="meta", dtype=value.dtype)
            return lazy
    made = torch.empty(value.shape, dtype=value.dtype, device="meta")
    return torch.nn.Parameter(made, value.requires_grad) if isinstance(value, torch.nn.Parameter) else made
