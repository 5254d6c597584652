"""The state dict of a model that was saved whole, taken from the record of the object without its class.

A pickled ``nn.Module`` is an object whose state holds ``_parameters``, ``_buffers``, ``_modules`` and
``_non_persistent_buffers_set`` (torch ``nn/modules/module.py``, ``state_dict``: own parameters, own persistent buffers,
then the children in order). A scripted module is an object of a ``__torch__`` class whose state holds its attributes.
"""

from __future__ import annotations

from collections.abc import Iterator

from statedict.errors import LimitExceeded
from statedict.formats.records import MappingRecord, TensorRecord
from statedict.limits import Limits
from statedict.manifest import Finding, Opaque

__all__ = ["is_module", "module_state"]

# Packages of torch whose modules write more, or other, keys than their parameters and buffers.
_OTHER_KEYS = (
    "torch.ao.nn.",
    "torch.nn.quantized.",
    "torch.nn.qat.",
    "torch.nn.intrinsic.",
    "torch.ao.quantization.",
    "torch.quantization.",
)
# Methods with which a class changes what its state dict holds.
_OVERRIDES = ("def state_dict(", "def _save_to_state_dict(", "def get_extra_state(", "register_state_dict_post_hook(")


def is_module(value: object) -> bool:
    """Whether the record is of a module: an eager one's state, or a scripted one's class."""
    if not isinstance(value, Opaque) or not isinstance(value.state, dict):
        return False
    if value.module.startswith("__torch__"):
        return True
    return isinstance(value.state.get("_parameters"), dict) and isinstance(value.state.get("_modules"), dict)


def module_state(module: Opaque, limits: Limits, sources: dict[str, str]) -> tuple[MappingRecord, list[Finding]]:
    """The flat state dict of a module record, and what to know about it.

    ``sources`` is the source text of classes by dotted name, where the file carries it (it is searched, never run).
    """
    record = MappingRecord("OrderedDict")
    scripted = module.module.startswith("__torch__")
    classes: dict[str, None] = {}
    hooked = False
    pending: list[tuple[str, Opaque, int]] = [("", module, 0)]
    while pending:
        prefix, here, depth = pending.pop()
        limits.check("depth", depth, "modules are nested too deeply")
        if len(classes) + len(record) > limits.nodes:
            raise LimitExceeded("modules inside modules without end", limit="nodes", most=limits.nodes)
        classes[here.type] = None
        state = here.state if isinstance(here.state, dict) else {}
        hooked = hooked or bool(state.get("_state_dict_hooks"))
        for name, tensor in _own(state, scripted):
            record[f"{prefix}{name}"] = tensor
        children = [(f"{prefix}{name}.", child, depth + 1) for name, child in _children(state, scripted)]
        pending.extend(reversed(children))
    return record, [_whole(module), *_doubts(classes, hooked, sources)]


def _own(state: dict[object, object], scripted: bool) -> Iterator[tuple[str, object]]:
    if scripted:
        yield from ((str(name), value) for name, value in state.items() if isinstance(value, TensorRecord))
        return
    skipped = state.get("_non_persistent_buffers_set")
    transient = skipped if isinstance(skipped, (set, frozenset)) else frozenset()
    for table, kind in (("_parameters", "Parameter"), ("_buffers", "Buffer")):
        named = state.get(table)
        for name, value in named.items() if isinstance(named, dict) else ():
            if isinstance(value, TensorRecord) and not (kind == "Buffer" and name in transient):
                if kind == "Buffer" and value.kind == "Tensor":
                    value.kind = kind
                yield str(name), value


def _children(state: dict[object, object], scripted: bool) -> Iterator[tuple[str, Opaque]]:
    named = state if scripted else state.get("_modules")
    for name, value in named.items() if isinstance(named, dict) else ():
        if isinstance(value, Opaque) and is_module(value):
            yield str(name), value


def _whole(module: Opaque) -> Finding:
    what = "a TorchScript archive" if module.module.startswith("__torch__") else "a whole model saved as an object"
    return Finding(
        "whole-module",
        "info",
        f"{what} of class {module.type}: shown are the keys of its state dict; nothing of its code was run",
    )


def _doubts(classes: dict[str, None], hooked: bool, sources: dict[str, str]) -> list[Finding]:
    overriding = [name for name in classes if name.startswith(_OTHER_KEYS)]
    overriding += [name for name in classes if any(mark in sources.get(name, "") for mark in _OVERRIDES)]
    if not overriding and not hooked:
        return []
    who = ", ".join(dict.fromkeys(overriding)) if overriding else "a state-dict hook"
    return [
        Finding(
            "custom-state-dict",
            "warning",
            f"the model's own code ({who}) changes what its state dict holds: its real keys may differ from those shown",
        )
    ]
