"""What each value of the interpreter's is: its kind, what it shows if it is a container, and its like in plain Python."""

from __future__ import annotations

from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Mapping
from typing import Any

from statedict.formats.records import ArrayRecord, Global, MappingRecord, NumpyDType, StorageRef, TensorRecord
from statedict.manifest import NumpyScalar, Opaque, TorchValue

__all__ = ["Opened", "dict_like", "hashed", "kind_of", "letters_of", "of_storage", "opened"]

_NOTHING: Mapping[str, object] = {}


def of_storage(ref: StorageRef) -> TensorRecord:
    """A storage that stands for itself, as a tensor of all its elements."""
    record = TensorRecord(ref, ref.dtype, 0, (ref.numel,), (1,))
    record.kind = "Storage"
    return record


def letters_of(dtype: NumpyDType | None) -> str | None:
    """numpy's letters of a dtype, with a sign before them where its bytes are big-endian."""
    if dtype is None:
        return None
    return f">{dtype.letters}" if dtype.byteorder == "big" else dtype.letters


def hashed(make: Callable[[Any], object], items: list[Any], name: str) -> object:
    """The mapping or set of the items; a record of it where one of them, a tensor, can't be a key."""
    try:
        return make(items)
    except TypeError:
        return Opaque("builtins", name, (items,))


def dict_like(record: dict[object, object]) -> Callable[[Any], object]:
    """What makes the mapping that a record stands for, from pairs."""
    return lambda pairs: _like(record, dict(pairs))


def _like(record: dict[object, object], items: dict[object, object]) -> dict[object, object]:
    """The items in the standard library's mapping that the record stands for."""
    if not isinstance(record, MappingRecord):
        return items
    if record.kind == "OrderedDict":
        return OrderedDict(items)
    if record.kind in ("Counter", "defaultdict"):
        made: dict[object, object] = Counter() if record.kind == "Counter" else defaultdict()  # type: ignore[assignment]
        dict.update(made, items)  # a Counter's own update adds
        return made
    copy = MappingRecord(record.kind, record.type)
    copy.update(items)
    return copy


# What a container shows: kind, keys, children, attributes, class.
Opened = tuple[str, list[object], list[object], Mapping[str, object], str]


def opened(item: object) -> Opened | None:
    """The container as kind, keys, children, attributes and class; None for a value that is no container."""
    if isinstance(item, MappingRecord):
        return item.kind, list(item), list(item.values()), item.attributes, item.type
    kind = type(item)
    if kind is dict:
        return "dict", list(item), list(item.values()), _NOTHING, ""  # type: ignore[call-overload, attr-defined]
    if kind in (list, tuple, set, frozenset):
        values = list(item)  # type: ignore[call-overload]
        return kind.__name__, list(range(len(values))), values, _NOTHING, ""
    if isinstance(item, Opaque):
        return _open_opaque(item)
    if isinstance(item, ArrayRecord) and isinstance(item.data, list):
        # An array of objects.
        return (
            "opaque",
            ["args", "state"],
            [(item.shape, letters_of(item.dtype)), item.data],
            {"fields": False},
            "numpy.ndarray",
        )
    return None


def _open_opaque(item: Opaque) -> Opened | None:
    """An unknown object: its fields, if it has nothing but fields; else what each way of filling it gave."""
    groups: dict[object, object] = {}
    if item.args and item.args != ({},):
        groups["args"] = item.args
    if item.state is not None:
        groups["state"] = item.state
    if item.items:
        groups["items"] = item.items
    if item.pairs:
        groups["pairs"] = [list(pair) for pair in item.pairs]
    if set(groups) == {"state"} and isinstance(item.state, dict) and item.state:
        return "opaque", list(item.state), list(item.state.values()), {"fields": True}, item.type
    if not groups:
        return None
    return "opaque", list(groups), list(groups.values()), {"fields": False}, item.type


def kind_of(item: object) -> str:
    """The kind of an object entry."""
    if isinstance(item, TorchValue):
        return f"torch.{item.kind}"
    if isinstance(item, NumpyScalar):
        return f"numpy.{item.dtype}"
    if isinstance(item, MappingRecord):
        return item.kind
    if isinstance(item, (Opaque, Global, ArrayRecord, NumpyDType)):
        return "opaque"
    return type(item).__name__
