"""Inert values of a checkpoint as JSON, and in a few words. A value may be hostile: depth, width and length are capped."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from math import isfinite

from statedict.manifest import NumpyScalar, Opaque, TensorEntry, TorchValue

__all__ = ["brief", "exact", "json_value"]

# Levels of nesting, items of one container, nodes of one value, characters of one text, bytes shown of binary data.
_DEPTH = 8
_ITEMS = 1_000
_NODES = 10_000
_TEXT = 2_000
_HEX = 32
# Bits of an integer that is written out; Python refuses to print one of more than 4300 digits.
_BITS = 8_192
# Characters of a value in a table, and items of a list that it names.
_BRIEF = 60
_BRIEF_ITEMS = 8


def json_value(value: object) -> object:
    """The value in JSON's types. Numbers that JSON lacks become texts (``"nan"``); what is cut says how long it was.

    Sets, bytes, records of unknown classes and the like become an object with one telling key: ``{"opaque": "a.B", …}``.
    """
    return _converted(value, _DEPTH, [_NODES])


def _converted(value: object, depth: int, budget: list[int]) -> object:
    budget[0] -= 1
    if value is None or isinstance(value, (bool, int, float, complex, str)):
        return _scalar(value)
    if isinstance(value, (bytes, bytearray, memoryview)):
        return _binary(value)
    small = _small(value)
    if small is not None:
        return small
    if depth == 0 or budget[0] < 0:
        return {"cut": type(value).__name__}
    if isinstance(value, Opaque):
        return _opaque(value, depth, budget)
    if isinstance(value, slice):
        return {"slice": _list((value.start, value.stop, value.step), depth, budget)}
    if isinstance(value, Mapping):
        return _mapping(value, depth, budget)
    if isinstance(value, (set, frozenset)):
        return {"set": _list(value, depth, budget)}
    if isinstance(value, Collection):
        return _list(value, depth, budget)
    return {"type": type(value).__name__}


def _scalar(value: object) -> object:
    if isinstance(value, float):
        return float(value) if isfinite(value) else str(float(value))
    if isinstance(value, complex):
        return {"complex": [_scalar(value.real), _scalar(value.imag)]}
    if isinstance(value, str):
        return str(value) if len(value) <= _TEXT else {"text": value[:_TEXT], "characters": len(value)}
    if isinstance(value, int) and value.bit_length() > _BITS:
        return {
            "integer": f"{'-' if value < 0 else ''}0x{abs(value) >> (value.bit_length() - 64):x}…",
            "bits": value.bit_length(),
        }
    return value


def exact(value: int) -> str:
    """The number with its thousands marked; of an absurd one, its size."""
    return f"{value:,}" if value.bit_length() <= _BITS else f"over 2^{value.bit_length() - 1}"


def _binary(value: bytes | bytearray | memoryview) -> object:
    view = memoryview(value).cast("B")
    shown = bytes(view[:_HEX]).hex()
    return {"bytes": shown if view.nbytes <= _HEX else shown + "…", "nbytes": view.nbytes}


def _small(value: object) -> object:
    """Values without anything inside; None for all others."""
    if isinstance(value, TorchValue):
        if value.kind == "Size" and isinstance(value.value, tuple):
            return {"torch.Size": [_scalar(size) for size in value.value[:_ITEMS]]}
        text = str(value.value)
        return f"torch.{text}" if value.kind == "dtype" else text
    if isinstance(value, NumpyScalar):
        return (
            _scalar(value.value)
            if value.value is not None
            else {"numpy": value.dtype, "bytes": value.data[:_HEX].hex()}
        )
    if isinstance(value, TensorEntry):
        return {"tensor": value.dtype.torch, "shape": list(value.shape)}
    if value is Ellipsis:
        return "..."
    if isinstance(value, range):
        return {"range": [_scalar(value.start), _scalar(value.stop), _scalar(value.step)]}
    return _standard(value)


def _standard(value: object) -> object:
    """The standard library's dates, decimals and paths, told by their modules: importing those would cost more."""
    kind = type(value)
    if kind.__module__ == "datetime":
        return value.isoformat() if hasattr(value, "isoformat") else str(value)
    if kind.__module__ in ("decimal", "fractions", "pathlib", "pathlib._local", "uuid"):
        return _scalar(str(value))
    return None


def _list(values: Collection[object], depth: int, budget: list[int]) -> list[object]:
    out: list[object] = []
    for at, value in enumerate(values):
        if at == _ITEMS or budget[0] < 0:
            out.append({"cut": len(values) - at})
            break
        out.append(_converted(value, depth - 1, budget))
    return out


def _mapping(value: Mapping[object, object], depth: int, budget: list[int]) -> object:
    if len(value) <= _ITEMS and all(isinstance(key, str) and len(key) <= _TEXT for key in value):
        return {str(key): _converted(child, depth - 1, budget) for key, child in value.items()}
    return {"pairs": _list(value.items(), depth, budget)}


def _opaque(value: Opaque, depth: int, budget: list[int]) -> object:
    made: dict[str, object] = {"opaque": _scalar(value.type)}
    inside = {"args": value.args, "state": value.state, "items": value.items, "pairs": value.pairs}
    for name, content in inside.items():
        if content is not None and content != () and content != []:
            made[name] = _converted(content, depth - 1, budget)
    return made


def brief(value: object, most: int = _BRIEF) -> str:
    """The value in a few words, for a table."""
    if isinstance(value, str):
        shown = f"'{value[: most + 1]}'"
    elif isinstance(value, (bytes, bytearray, memoryview)):
        shown = f"{memoryview(value).nbytes:,} bytes"
    elif isinstance(value, Opaque):
        shown = f"{value.type}(…)"
    elif isinstance(value, float):
        shown = f"{value:.10g}"
    elif isinstance(value, (list, tuple)) and len(value) > _BRIEF_ITEMS:
        shown = f"{len(value):,} items: {_written(_converted(value[:3], 3, [40]))[1:-1]}, …"
    elif type(value) is tuple:
        shown = f"({_written(_converted(value, 3, [40]))[1:-1]})"
    else:
        shown = _written(_converted(value, 3, [40]))
    return shown if len(shown) <= most else shown[: most - 1] + "…"


def _written(value: object) -> str:
    """A JSON value as Python would write it; its depth is capped already."""
    if isinstance(value, list):
        return f"[{', '.join([_written(item) for item in value])}]"
    if isinstance(value, dict):
        if len(value) == 1 and "cut" in value:
            return "…"
        if "opaque" in value:
            return f"{value['opaque']}(…)"
        return "{" + ", ".join([f"{key}: {_written(item)}" for key, item in value.items()]) + "}"
    return f"{value:.10g}" if isinstance(value, float) else str(value)
