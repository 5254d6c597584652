"""Nested values as JSON that keeps their types, and back. What JSON lacks becomes an object with one telling name.

    null true false 1 1.5 "text" [list]        as they are
    {"float": "nan"}                           also "inf", "-inf", and the 16 hexadecimal digits of another NaN's bits
    {"dict": {…}}  {"dict": [[key, value], …]} the second where a key is no text; so OrderedDict, Counter, defaultdict,
                                               Namespace, with "type" and "attributes" where there are any
    {"tuple": […]} {"set": […]} {"frozenset": […]} {"bytes": base64} {"bytearray": base64} {"complex": [re, im]}
    {"torch": "dtype", "value": "float32"}     also device, Size, layout, qscheme, memory_format
    {"numpy": "f8", "bytes": base64}           one number, little-endian
    {"opaque": "package.Class", …}             a record of something that nobody builds: args, state, items, pairs
    {"tensor": name}                           whatever the caller makes of a tensor
    {"datetime": […]} {"Decimal": "1.5"} …     the standard library's small values

The same value always gives the same JSON. Decoding builds plain values and the records of ``records.py``, nothing else.
"""

from __future__ import annotations

from base64 import b64decode, b64encode
from collections.abc import Callable, Iterable, Mapping
from math import isfinite
from struct import pack, unpack
from typing import Any

from statedict.errors import Unsupported
from statedict.formats.records import MappingRecord
from statedict.manifest import Container, Node, NumpyScalar, ObjectEntry, Opaque, TensorEntry, TorchValue
from statedict.nodes import fold

__all__ = ["decode", "encode", "encode_value"]

# Levels of containers. JSON's own readers recurse; Python's ends at about 500 levels of the form above.
_MOST_DEPTH = 200
_MAPPINGS = ("dict", "OrderedDict", "Counter", "defaultdict", "Namespace")
_SEQUENCES = {"tuple": tuple, "set": set, "frozenset": frozenset}
# The bits of the NaN that arithmetic gives.
_NAN = "7ff8000000000000"
_TORCH = ("dtype", "device", "Size", "layout", "qscheme", "memory_format")

Encoder = Callable[[TensorEntry], object]
Decoder = Callable[[object], object]


def encode(root: Node, tensor: Encoder) -> object:
    """The tree as JSON-ready values; ``tensor`` gives what stands for a tensor.

    Raises ``Unsupported`` for values of other types, and for trees deeper than 200 levels.
    """

    def leaf(entry: TensorEntry | ObjectEntry) -> object:
        if len(entry.path) > _MOST_DEPTH:
            raise Unsupported("it is nested too deeply to be written as JSON", key=entry.key)
        if isinstance(entry, TensorEntry):
            return {"tensor": tensor(entry)}
        if entry.kind in _MAPPINGS and isinstance(entry.value, dict):
            return _mapping(entry.kind, list(entry.value.items()), tensor)
        return encode_value(entry.value, tensor, entry.key)

    return fold(root, leaf, lambda node, children: _container(node, children, tensor))


def _container(node: Container, children: list[object], tensor: Encoder) -> object:
    kind = node.kind
    if kind == "opaque":
        if node.attributes.get("fields"):
            return {"opaque": node.type, "state": _pairs("dict", list(zip(node.keys, children)), tensor)}
        return {"opaque": node.type, **{str(key): child for key, child in zip(node.keys, children)}}
    if kind == "list":
        return children
    if kind in _SEQUENCES:
        return {kind: _sorted(children) if kind != "tuple" else children}
    made = _pairs(kind, list(zip(node.keys, children)), tensor)
    if node.type:
        made["type"] = node.type
    if node.attributes:
        made["attributes"] = {name: encode_value(value, tensor) for name, value in node.attributes.items()}
    return made


def _pairs(kind: str, pairs: list[tuple[object, object]], tensor: Encoder) -> dict[str, object]:
    """A mapping whose values are encoded already."""
    if all(type(key) is str for key, _ in pairs):
        return {kind: dict(pairs)}
    return {kind: [[encode_value(key, tensor), value] for key, value in pairs]}


def _mapping(kind: str, pairs: list[tuple[object, object]], tensor: Encoder) -> dict[str, object]:
    return _pairs(kind, [(key, encode_value(value, tensor)) for key, value in pairs], tensor)


def _sorted(items: Iterable[object]) -> list[object]:
    """A set in an order that doesn't depend on the process."""
    import json

    return sorted(items, key=lambda item: json.dumps(item))


def encode_value(value: object, tensor: Encoder, key: str = "") -> object:
    """One inert value as JSON-ready values. A file's own nesting is in its containers, so values nest little."""
    kind = type(value)
    if value is None or kind in (bool, int, str):
        return value
    if kind is float:
        number = _float(value)  # type: ignore[arg-type]
        return number if type(number) is float else {"float": number}
    if kind is list:
        return [encode_value(item, tensor, key) for item in value]  # type: ignore[attr-defined]
    if kind in (tuple, set, frozenset):
        items = [encode_value(item, tensor, key) for item in value]  # type: ignore[attr-defined]
        return {kind.__name__: items if kind is tuple else _sorted(items)}
    if isinstance(value, dict):
        name = value.kind if isinstance(value, MappingRecord) else kind.__name__
        return _mapping(name if name in _MAPPINGS else "dict", list(value.items()), tensor)
    if isinstance(value, TensorEntry):
        return {"tensor": tensor(value)}
    if isinstance(value, Opaque):
        return _opaque(value, tensor, key)
    made = _small(value)
    if made is None:
        raise Unsupported(
            f"a value of type {kind.__module__}.{kind.__name__} can't be written as JSON", key=key or None
        )
    return made


def _float(value: float) -> float | str:
    """The number, or a text for one that JSON lacks. A NaN has a sign and further bits, which are kept."""
    if isfinite(value):
        return value
    bits = pack(">d", value).hex()
    return str(value) if value == value or bits == _NAN else bits


def _opaque(value: Opaque, tensor: Encoder, key: str) -> object:
    made: dict[str, object] = {"opaque": value.type}
    if value.args != ():
        made["args"] = encode_value(value.args, tensor, key)
    if value.state is not None:
        made["state"] = encode_value(value.state, tensor, key)
    if value.items:
        made["items"] = encode_value(value.items, tensor, key)
    if value.pairs:
        made["pairs"] = [encode_value(list(pair), tensor, key) for pair in value.pairs]
    return made


def _small(value: Any) -> dict[str, object] | None:
    """Values without anything inside. None for a type that isn't known."""
    kind = type(value)
    if kind in (bytes, bytearray):
        return {kind.__name__: b64encode(value).decode("ascii")}
    if kind is complex:
        return {"complex": [_float(value.real), _float(value.imag)]}
    if kind is TorchValue:
        return {"torch": value.kind, "value": list(value.value) if value.kind == "Size" else value.value}
    if kind is NumpyScalar:
        return {"numpy": value.dtype, "bytes": b64encode(value.data).decode("ascii")}
    if value is Ellipsis or value is NotImplemented:
        return {"constant": "Ellipsis" if value is Ellipsis else "NotImplemented"}
    if kind in (slice, range):
        parts = [value.start, value.stop, value.step]
        return {kind.__name__: parts} if all(part is None or type(part) is int for part in parts) else None
    return _standard(value, kind.__module__, kind.__name__)


def _standard(value: Any, module: str, name: str) -> dict[str, object] | None:
    """The standard library's values, told by their modules: importing those would cost more than the rest."""
    if module == "datetime":
        if name == "timedelta":
            return {name: [value.days, value.seconds, value.microseconds]}
        if name == "timezone":
            offset = value.utcoffset(None)
            return {name: [offset.days, offset.seconds, offset.microseconds, value.tzname(None)]}
        if name == "date":
            return {name: [value.year, value.month, value.day]}
        if name in ("datetime", "time"):
            zone = None if value.tzinfo is None else _standard(value.tzinfo, type(value.tzinfo).__module__, "timezone")
            day = [value.year, value.month, value.day] if name == "datetime" else []
            return {name: [*day, value.hour, value.minute, value.second, value.microsecond, value.fold, zone]}
    if module == "decimal" or (module.startswith("pathlib") and name.startswith("Pure")):
        return {name: str(value)}
    return None


# -------------------------------------------------------------------- back


def decode(value: object, tensor: Decoder) -> object:
    """The nested value that ``encode`` was given, its containers as the interpreter of pickles makes them.

    ``tensor`` gives the tensor for what stands in its place. Raises ``ValueError`` or ``TypeError`` for anything else than
    what ``encode`` writes.
    """
    return _decoded(value, tensor, 0)


def _decoded(value: Any, tensor: Decoder, depth: int) -> object:
    if depth > 2 * _MOST_DEPTH:
        raise ValueError("nested too deeply")
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, list):
        return [_decoded(item, tensor, depth + 1) for item in value]
    if not isinstance(value, dict) or not value:
        raise ValueError("an object without a name")
    tag = next(iter(value))
    body = value[tag]
    if tag in _MAPPINGS:
        return _decoded_mapping(tag, value, tensor, depth + 1)
    if tag in _SEQUENCES and isinstance(body, list):
        return _SEQUENCES[tag]([_decoded(item, tensor, depth + 1) for item in body])
    if tag == "tensor":
        return tensor(body)
    if tag == "opaque":
        return _decoded_opaque(value, tensor, depth + 1)
    return _decoded_small(tag, value)


def _decoded_mapping(kind: str, value: dict[str, Any], tensor: Decoder, depth: int) -> object:
    body = value[kind]
    made: dict[object, object] = {} if kind == "dict" else MappingRecord(kind, str(value.get("type", "")))
    if isinstance(body, dict):
        made.update({key: _decoded(item, tensor, depth) for key, item in body.items()})
    else:
        for key, item in body:
            made[_decoded(key, tensor, depth)] = _decoded(item, tensor, depth)
    attributes: dict[str, object] = value.get("attributes", {})
    if attributes and isinstance(made, MappingRecord):
        made.attributes = {str(name): _decoded(item, tensor, depth) for name, item in attributes.items()}
    return made


def _decoded_opaque(value: dict[str, Any], tensor: Decoder, depth: int) -> Opaque:
    module, _, name = str(value["opaque"]).rpartition(".")
    inside: Mapping[str, Any] = {key: _decoded(item, tensor, depth) for key, item in value.items() if key != "opaque"}
    made = Opaque(module, name, inside.get("args", ()), inside.get("state"))
    made.items = list(inside.get("items", ()))
    made.pairs = [(key, item) for key, item in inside.get("pairs", ())]
    return made


def _decoded_small(tag: str, value: dict[str, Any]) -> object:
    body = value[tag]
    if tag == "float" and isinstance(body, str):
        return _decoded_float(body)
    if tag in ("bytes", "bytearray"):
        data = b64decode(body, validate=True)
        return data if tag == "bytes" else bytearray(data)
    if tag == "complex":
        real, imag = body
        return complex(_decoded_float(real), _decoded_float(imag))
    if tag == "torch" and body in _TORCH:
        inner = value["value"]
        if body == "Size":
            inner = tuple(_integers(inner))
        elif not isinstance(inner, str):
            raise ValueError("a value of torch's that is no text")
        return TorchValue(body, inner)
    if tag == "numpy":
        return NumpyScalar.of(str(body), b64decode(value["bytes"], validate=True))
    if tag == "constant":
        return {"Ellipsis": Ellipsis, "NotImplemented": NotImplemented}[body]
    if tag in ("slice", "range"):
        start, stop, step = body
        if not all(part is None or type(part) is int for part in body):
            raise ValueError("bounds that are no integers")
        return slice(start, stop, step) if tag == "slice" else range(start, stop, step)
    return _decoded_standard(tag, body)


def _decoded_float(value: object) -> float:
    if type(value) is float:
        return value
    if value in ("nan", "inf", "-inf"):
        return float(str(value))
    if not isinstance(value, str) or len(value) != 16:
        raise ValueError("a number that is none")
    made: float = unpack(">d", bytes.fromhex(value))[0]
    return made


def _integers(value: object) -> list[int]:
    if not isinstance(value, list) or not all(type(item) is int for item in value):
        raise ValueError("a list of other things than integers")
    return value


def _decoded_standard(tag: str, body: Any) -> object:
    if tag in ("timedelta", "date", "datetime", "time", "timezone"):
        import datetime

        if tag == "timedelta":
            return datetime.timedelta(*_integers(body))
        if tag == "date":
            return datetime.date(*_integers(body))
        if tag == "timezone":
            made = datetime.timezone(datetime.timedelta(*_integers(body[:3])), str(body[3]))
            return (
                datetime.timezone.utc if repr(made) == repr(datetime.timezone(datetime.timedelta(0), "UTC")) else made
            )
        *numbers, fold, zone = body
        tzinfo: Any = None if zone is None else _decoded_standard("timezone", zone["timezone"])
        return getattr(datetime, tag)(*_integers(numbers), tzinfo, fold=fold)
    if tag == "Decimal":
        import decimal

        return decimal.Decimal(str(body))
    if tag in ("PurePosixPath", "PureWindowsPath"):
        import pathlib

        return getattr(pathlib, tag)(str(body))
    raise ValueError(f"an object of the unknown kind '{tag}'")
