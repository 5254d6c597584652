"""Keys of mappings and members of sets, refused where a file chose them so that looking them up takes time without bound."""

from __future__ import annotations

from typing import NoReturn

from statedict.errors import CorruptFile

__all__ = ["KeyGuard"]

# CPython hashes a number to its rest by this one (``sys.hash_info.modulus`` of a 64-bit build): numbers below it are their own
# hash, larger ones can be chosen to share one.
_MODULUS = 2**61 - 1
# Members of one container that may share a hash: -1 and -2 do, and so do tuples of them.
_MOST_ALIKE = 64
# Hashing a tuple visits all that is in it, once for every time that it stands there.
_DEEPEST = 100
# Visits that are always fine, and how many more for every byte of the pickle.
_FREE_VISITS = 1_000_000
_VISITS_PER_BYTE = 16
_PLAIN = frozenset({str, bytes, float, bool, type(None)})


class KeyGuard:
    """Watches the keys of one pickle.

    A text's hash is secret, so nobody can choose two alike. Numbers and tuples are hashed the same on every machine: a few
    thousand that share one hash would be compared each with all others.
    """

    def __init__(self) -> None:
        self._visits = 0
        self._alike: dict[tuple[int, int], int] = {}

    def checked(self, target: object, key: object, nbytes: int = 0) -> object:
        """The key, once it is sure that hashing and finding it in the target takes bounded time.

        ``nbytes`` is how much of the pickle has been read. Raises ``CorruptFile``.
        """
        kind = type(key)
        if kind in _PLAIN or (kind is int and -_MODULUS < key < _MODULUS):  # type: ignore[operator]
            return key
        self._visit(key, _FREE_VISITS + _VISITS_PER_BYTE * nbytes)
        try:
            mark = (id(target), hash(key))
        except TypeError as error:
            raise CorruptFile(f"the pickle uses a {kind.__name__} as a key") from error
        count = self._alike[mark] = self._alike.get(mark, 0) + 1
        if count > _MOST_ALIKE:
            _bad("keys of a mapping are chosen to be found slowly")
        return key

    def _visit(self, key: object, most: int) -> None:
        pending = [(key, 0)]
        while pending:
            item, depth = pending.pop()
            self._visits += 1
            if depth > _DEEPEST or self._visits > most:
                _bad("a key of a mapping is nested too deeply")
            if isinstance(item, tuple):
                pending.extend((part, depth + 1) for part in item)
            elif isinstance(item, (list, dict, set, bytearray)):
                _bad(f"the pickle uses a {type(item).__name__} as a key")


def _bad(what: str) -> NoReturn:
    raise CorruptFile(what)
