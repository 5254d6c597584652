"""The state dict of a model that was saved whole, taken from the record of the object without its class.

A pickled ``nn.Module`` is an object whose state holds ``_parameters``, ``_buffers``, ``_modules`` and
``_non_persistent_buffers_set`` (torch ``nn/modules/module.py``, ``state_dict``: own parameters, own persistent buffers,
then the children in order). A scripted module is an object of a ``__torch__`` class whose state holds its attributes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from statedict.errors import LimitExceeded
from statedict.formats.records import MappingRecord, TensorRecord
from statedict.formats.torchscript import declared_names
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
# Where a module keeps functions that change its state dict when it is made.
_HOOKS = ("_state_dict_hooks", "_state_dict_pre_hooks")
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

    ``sources`` is the source text of classes by dotted name, where the file carries it (it is searched, never run). A
    parameter or a child that is no record of one stays under its name as it is, so that nothing is lost.
    """
    record = MappingRecord("OrderedDict")
    scripted = module.module.startswith("__torch__")
    classes: dict[str, None] = {}
    hooked = False
    seen, sizes, visits = set(), 0, 0
    pending: list[tuple[str, Opaque, int]] = [("", module, 0)]
    while pending:
        prefix, here, depth = pending.pop()
        limits.check("depth", depth, "modules are nested too deeply")
        classes[here.type] = None
        state = here.state if isinstance(here.state, dict) else {}
        hooked = hooked or any(state.get(name) for name in _HOOKS)
        own = list(_scripted(state, sources.get(here.type, "")) if scripted else _own(state))
        children = list(_children(state, scripted))
        if here.type.startswith(_OTHER_KEYS):
            own += _attributes(state)
        size = 1 + len(own) + len(children)
        visits += size
        if id(here) not in seen:
            seen.add(id(here))
            sizes += size
        _check_visits(visits, sizes, limits)
        record.update((f"{prefix}{name}", value) for name, value in own)
        pending.extend((f"{prefix}{name}.", child, depth + 1) for name, child in reversed(children))
    return record, [_whole(module), *_doubts(classes, hooked, sources, scripted)]


def _check_visits(visits: int, distinct: int, limits: Limits) -> None:
    """A module that stands in two places is shown in both; many that hold each other twice would never end."""
    most = min(limits.nodes, 16 * distinct + 100_000)
    if visits > most:
        raise LimitExceeded("modules inside modules without end", limit="nodes", most=most)


def _scripted(state: dict[object, object], source: str) -> Iterator[tuple[str, object]]:
    """The parameters and buffers of a scripted module, as its class declares them; else all its tensors."""
    declared = declared_names(source)
    for name, value in state.items():
        if isinstance(value, TensorRecord) and (declared is None or name in declared):
            yield str(name), value


def _own(state: dict[object, object]) -> Iterator[tuple[str, object]]:
    skipped = state.get("_non_persistent_buffers_set")
    transient = skipped if isinstance(skipped, (set, frozenset)) else frozenset()
    for name, value in _named(state, "_parameters"):
        if value is not None:
            yield str(name), value
    for name, value in _named(state, "_buffers"):
        if value is not None and name not in transient:
            if isinstance(value, TensorRecord) and value.kind == "Tensor":
                value.kind = "Buffer"
            yield str(name), value
    for name, value in _named(state, "_modules"):
        if value is not None and not is_module(value):
            yield str(name), value


def _attributes(state: dict[object, object]) -> Iterator[tuple[str, object]]:
    """What a module has beside its tables: quantised modules of torch keep their packed weights there."""
    for name, value in state.items():
        if isinstance(value, TensorRecord) or (isinstance(value, Opaque) and not is_module(value)):
            yield str(name), value


def _named(state: dict[object, object], table: str) -> Iterable[tuple[object, object]]:
    named = state.get(table)
    return named.items() if isinstance(named, dict) else ()


def _children(state: dict[object, object], scripted: bool) -> Iterator[tuple[str, Opaque]]:
    for name, value in state.items() if scripted else _named(state, "_modules"):
        if isinstance(value, Opaque) and is_module(value):
            yield str(name), value


def _whole(module: Opaque) -> Finding:
    what = "a TorchScript archive" if module.module.startswith("__torch__") else "a whole model saved as an object"
    return Finding(
        "whole-module",
        "info",
        f"{what} of class {module.type}: shown are the keys of its state dict; nothing of its code was run",
    )


def _doubts(classes: dict[str, None], hooked: bool, sources: dict[str, str], scripted: bool) -> list[Finding]:
    overriding = [name for name in classes if name.startswith(_OTHER_KEYS)]
    if not scripted:
        overriding += [name for name in classes if any(mark in sources.get(name, "") for mark in _OVERRIDES)]
    if overriding or hooked:
        who = ", ".join(dict.fromkeys(overriding)) if overriding else "a state-dict hook"
        return [
            Finding(
                "custom-state-dict",
                "warning",
                f"the model's own code ({who}) changes what its state dict holds: its real keys may differ from those shown",
            )
        ]
    unseen = [name for name in classes if not name.startswith(("torch.", "__torch__")) and name not in sources]
    if scripted or not unseen:
        return []
    return [
        Finding(
            "unseen-code",
            "info",
            f"the code of {', '.join(unseen[:5])}{' …' if len(unseen) > 5 else ''} isn't in the file: if it changes what its "
            "state dict holds, the real keys may differ from those shown",
        )
    ]
