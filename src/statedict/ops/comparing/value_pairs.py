"""Whether two values that are no tensors are equal: by type and value, to the last level. Nothing recurses on their depth."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from statedict.manifest import NumpyScalar, Opaque, TensorEntry, TorchValue
from statedict.ops.values import brief

__all__ = ["are_equal", "described_pair"]

IsSame = Callable[[TensorEntry, TensorEntry], bool]

_SEQUENCES = (list, tuple)
_SETS = (set, frozenset)
_LEAVES = frozenset({type(None), bool, int, float, complex, str, bytes, bytearray})
# Characters of a record in a set that it is sorted by, to stand opposite its like.
_SORTED_BY = 200
# Characters or bytes that are shown from the first difference on.
_PIECE = 16


def are_equal(a: object, b: object, is_same_tensor: IsSame, *, equal_nan: bool = True) -> bool:
    """Whether the values are equal: ``True`` isn't 1, 1 isn't 1.0, NaN is NaN if ``equal_nan``, and -0.0 is 0.0.

    Which of the standard library's mappings, sequences or sets holds the items doesn't matter, nor the order of a mapping's
    keys. Records of unknown classes are compared by class and content, tensors inside by ``is_same_tensor``.
    """
    pending: list[tuple[Any, Any]] = [(a, b)]
    while pending:
        a, b = pending.pop()
        if isinstance(a, TensorEntry) and isinstance(b, TensorEntry):
            is_level = is_same_tensor(a, b)
        elif isinstance(a, Opaque) and isinstance(b, Opaque):
            pending += [(a.args, b.args), (a.state, b.state), (a.items, b.items), (a.pairs, b.pairs)]
            is_level = a.type == b.type
        elif isinstance(a, Mapping) and isinstance(b, Mapping):
            is_level = _open_mappings(a, b, pending)
        elif type(a) in _SEQUENCES and type(b) in _SEQUENCES:
            is_level = _open_sequences(a, b, pending)
        elif type(a) in _SETS and type(b) in _SETS:
            is_level = _open_sets(a, b, pending)
        elif type(a) is slice and type(b) is slice:
            pending += [(a.start, b.start), (a.step, b.step), (a.stop, b.stop)]
            is_level = True
        else:
            is_level = type(a) is type(b) and _is_equal_leaf(a, b, equal_nan)
        if not is_level:
            return False
    return True


def _open_sequences(a: Any, b: Any, pending: list[tuple[Any, Any]]) -> bool:
    """Put the items side by side. False where one has more."""
    pending += zip(a, b)
    return len(a) == len(b)


def _mark(key: Any) -> object:
    """What makes two keys the same: type and value, in tuples too; NaN is NaN."""
    if type(key) is tuple and not isinstance(key, (TorchValue, NumpyScalar)):
        return (tuple, *map(_mark_of_leaf, key))
    return _mark_of_leaf(key)


def _mark_of_leaf(key: Any) -> object:
    if isinstance(key, (float, complex)) and key != key:
        return type(key), "nan"
    if isinstance(key, (Opaque, TensorEntry)):
        return type(key), brief(key, _SORTED_BY)
    return type(key), key


def _open_mappings(a: Mapping[Any, Any], b: Mapping[Any, Any], pending: list[tuple[Any, Any]]) -> bool:
    """Put the values of equal keys side by side. False where keys differ."""
    if len(a) != len(b):
        return False
    others: dict[object, list[tuple[Any, Any]]] = {}
    for key, value in b.items():
        others.setdefault(_mark(key), []).append((key, value))
    for key, value in a.items():
        found = others.get(_mark(key))
        if not found:
            return False
        other, opposite = found.pop(0)
        pending.append((value, opposite))
        if isinstance(key, Opaque):
            pending.append((key, other))
    return True


def _open_sets(a: Any, b: Any, pending: list[tuple[Any, Any]]) -> bool:
    """Put what a set can't find by value side by side. False where the rest differs."""
    if len(a) != len(b):
        return False
    plain, other = ({_mark(item) for item in items if type(item) in _LEAVES} for items in (a, b))
    rest = [
        sorted([i for i in items if type(i) not in _LEAVES], key=lambda i: brief(i, _SORTED_BY)) for items in (a, b)
    ]
    pending += zip(*rest)
    return plain == other and len(rest[0]) == len(rest[1])


def _is_equal_leaf(a: Any, b: Any, equal_nan: bool) -> bool:
    """Whether two values of one type are equal that have nothing inside."""
    if isinstance(a, (float, complex)):
        return a == b or (equal_nan and a != a and b != b)
    if isinstance(a, NumpyScalar):
        if a.dtype != b.dtype:
            return False
        if isinstance(a.value, (float, complex)) and isinstance(b.value, type(a.value)):
            return _is_equal_leaf(a.value, b.value, equal_nan)
        return bool(a.data == b.data)
    if isinstance(a, TorchValue):
        return a.kind == b.kind and type(a.value) is type(b.value) and bool(a.value == b.value)
    if a is b:
        return True
    try:
        # An object of any class, held in memory, may give anything or nothing.
        return (a == b) is True or (equal_nan and (a != a) is True and (b != b) is True)
    except (ArithmeticError, RuntimeError, TypeError, ValueError):
        return False


def described_pair(a: object, b: object) -> tuple[str, str]:
    """Both values in a few words, with their types where that is the difference, or what follows the first difference."""
    one, two = brief(a), brief(b)
    if one != two:
        return one, two
    if type(a) is not type(b):
        return f"{type(a).__name__} {one}", f"{type(b).__name__} {two}"
    if isinstance(a, NumpyScalar):
        return repr(a), repr(b)
    if not isinstance(a, (str, bytes, bytearray)) or not isinstance(b, (str, bytes, bytearray)):
        return one, two
    at = next((at for at, (left, right) in enumerate(zip(a, b)) if left != right), min(len(a), len(b)))
    return f"{_piece(a, at)} at {at:,}", f"{_piece(b, at)} at {at:,}"


def _piece(value: str | bytes | bytearray, at: int) -> str:
    piece = value[at : at + _PIECE]
    return brief(piece) if isinstance(piece, str) else f"bytes {piece.hex(' ')}".rstrip()
