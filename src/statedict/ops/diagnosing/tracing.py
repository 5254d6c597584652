"""Rules tried out without values: every element of the source is a number of its own, and says in the result where it came from."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from math import prod

from statedict.checkpoint import Checkpoint
from statedict.dtypes import BY_CODE
from statedict.errors import RuleError
from statedict.manifest import (
    Container,
    Extent,
    FileFact,
    Manifest,
    Node,
    ObjectEntry,
    Storage,
    StorageView,
    TensorEntry,
)
from statedict.ops.diagnosing.carrying import Carried
from statedict.rules import Rule, plan
from statedict.views import packed_stride

__all__ = ["Tracer"]

_WORD = 8
# Elements that are looked at in each tensor besides its first and its last.
_PROBES = 3
_GOLDEN = 0x9E3779B97F4A7C15


class Tracer:
    """A checkpoint with the names and shapes of another, whose elements are numbered through."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], others: Sequence[str]) -> None:
        self._keys = list(shapes)
        self._starts: list[int] = []
        nodes: list[Node] = []
        storages: list[Storage] = []
        end = 0
        for number, (key, shape) in enumerate(shapes.items()):
            numel = prod(shape)
            self._starts.append(end)
            storage = Storage(number, numel * _WORD, Extent(0, end * _WORD, numel * _WORD), name=key)
            storages.append(storage)
            view = StorageView(storage, 0, packed_stride(shape))
            nodes.append(TensorEntry((key,), BY_CODE["I64"], tuple(shape), view))
            end += numel
        nodes += [ObjectEntry((key,), "int", 0) for key in others]
        root = Container("dict", [*self._keys, *others], nodes)
        tensors = {node.path: node for node in nodes if isinstance(node, TensorEntry)}
        objects = {node.path: node for node in nodes if isinstance(node, ObjectEntry)}
        files = (FileFact("numbers", end * _WORD),)
        manifest = Manifest("memory", files, tuple(storages), tensors, objects, root)
        self._checkpoint = Checkpoint(manifest, [_Counting(end)], source="the plan", owns_files=False)

    def problem(self, rules: Sequence[Rule], ways: Mapping[str, Carried]) -> str:
        """What the rules make otherwise than the ways say, in a few words; empty where all is as it should be. Raises ``RuleError``."""
        made = plan(self._checkpoint, rules).checkpoint if rules else self._checkpoint
        if set(made) != set(ways):
            more = [key for key in made if key not in ways] or [key for key in ways if key not in made]
            return f"the rules don't give the keys of the plan: '{more[0]}'"
        for key, way in ways.items():
            if made[key].shape != way.shape:
                return f"'{key}' gets the shape {list(made[key].shape)}"
            if any(self._origin(made, key, place) != way.origin(place) for place in _places(prod(way.shape))):
                return f"'{key}' gets other elements than the plan says"
        return ""

    def changes_again(self, rules: Sequence[Rule]) -> bool:
        """Whether the rules, applied to what they have made, would change it once more, rather than be refused or do nothing."""
        return "would change" in plan(self._checkpoint, rules).again()

    def _origin(self, made: Checkpoint, key: str, place: int) -> tuple[str, int]:
        """The source, and the place in it, of one element of a result."""
        entry = made[key].entry
        view = entry.view
        if view is None:
            raise RuleError("the rules make a tensor without values", key=key)
        offset = view.offset
        for size, step in zip(reversed(entry.shape), reversed(view.stride)):
            place, at = divmod(place, size)
            offset += at * step
        number = int.from_bytes(made.reader.read(view.storage, offset * _WORD, _WORD), "little")
        source = bisect_right(self._starts, number) - 1
        while prod(self._checkpoint[self._keys[source]].shape) == 0:
            source -= 1
        return self._keys[source], number - self._starts[source]


def _places(numel: int) -> Iterator[int]:
    """A few places, the first and the last among them."""
    found = {0, numel - 1, *[number * _GOLDEN % numel for number in range(1, _PROBES + 1)]} if numel else set()
    yield from sorted(found)


class _Counting:
    """A file of so many words, each of which is its number."""

    def __init__(self, words: int) -> None:
        self.path = "numbers"
        self.nbytes = words * _WORD

    def read(self, offset: int, nbytes: int) -> bytes:
        """Those bytes."""
        first, last = offset // _WORD, -(-(offset + nbytes) // _WORD)
        data = b"".join([number.to_bytes(_WORD, "little") for number in range(first, last)])
        return data[offset - first * _WORD :][:nbytes]

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Those bytes, into a buffer."""
        buffer[:] = self.read(offset, len(buffer))

    def close(self) -> None:
        """There is nothing to close."""
