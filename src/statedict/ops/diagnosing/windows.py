"""A first look at values: the first few elements of each tensor, which say whether reading all of it can prove anything.

Two checkpoints of one training, or of one conversion, hold the same numbers; two trainings hold none that are the same. A tensor that
was renamed, transposed, split or stacked begins, along one of its dimensions, as that which it came from began along its last.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from statedict.manifest import StorageView, TensorEntry
from statedict.ops.comparing.walks import Side
from statedict.ops.diagnosing.weights import Weights

__all__ = ["is_readable", "touched"]

# Elements that are looked at, one behind the other.
_ELEMENTS = 8
_LENGTHS = (8, 4, 2)
# Bytes of a window: fewer are too often the same by chance.
_FEWEST_NBYTES = 8
# Tensors of the target that are looked at along every dimension before the others are left alone.
_SAMPLE = 256

_Window = tuple[str, bytes]


def is_readable(key: str, weights: Weights) -> bool:
    """Whether it is a tensor with whole bytes of its own to read, and no view that unfolds into more than is allowed."""
    entry = weights.entries[key]
    if entry.view is None or not entry.numel or entry.dtype.bits % 8:
        return False
    return entry.nbytes - entry.view.storage.nbytes <= weights.checkpoint.limits.expanded_bytes


def touched(source: Weights, target: Weights) -> tuple[list[str], list[str]]:
    """The keys of both sides that begin with the same elements. Reads a few elements of each tensor; raises what reading raises.

    Where none does, some rows that don't come first are looked at: those that change places with them.
    """
    keys = [key for key in target.entries if is_readable(key, target)]
    sample = dict.fromkeys(keys[:: max(1, len(keys) // _SAMPLE)])
    found, hit = _known(source, target, keys, sample, inside=False)
    if not hit:
        found, hit = _known(source, target, list(sample), sample, inside=True)
    return [key for key in source.entries if key in found], [key for key in target.entries if key in hit]


def _known(
    source: Weights, target: Weights, keys: Sequence[str], sample: Collection[str], *, inside: bool
) -> tuple[set[str], set[str]]:
    """The keys of the source and of the target that share a window.

    First those of the sample are looked at along every dimension, then, if any of these is known, the others too.
    """
    there: dict[_Window, list[str]] = {}
    for key in source.entries:
        if is_readable(key, source):
            tensor = source.tensor(key)
            for row in _rows(tensor, (0, 1, 2)) if inside else (0,):
                for window in _windows(tensor, row, along_all=False):
                    there.setdefault(window, []).append(key)
    found: set[str] = set()
    hit: set[str] = set()
    for key in [*sample, *[key for key in keys if key not in sample]]:
        tensor = target.tensor(key)
        for row in _rows(tensor, (0, 2, 3)) if inside else (0,):
            for window in _windows(tensor, row, along_all=key in sample or bool(hit)):
                names = there.get(window)
                if names:
                    hit.add(key)
                    found.update(names)
    return found, hit


def _rows(tensor: Side, places: Sequence[int]) -> set[int]:
    """Some of the first row, the second, the one in the middle, and the last."""
    count = tensor.entry.shape[0] if tensor.entry.shape else 1
    return {(0, min(1, count - 1), count // 2, count - 1)[place] for place in places}


def _windows(tensor: Side, row: int, *, along_all: bool) -> Iterator[_Window]:
    """The first elements of a row in reading order, and those along each dimension; not those that are all equal."""
    entry, view = tensor.entry, tensor.entry.view
    long = [dim for dim, size in enumerate(entry.shape) if size > 1]
    if view is None or not long:
        return
    for dim in long if along_all else long[-1:]:
        first = row if dim or not row else 0
        count, step = min(_ELEMENTS, entry.shape[dim]), view.stride[dim]
        data = _read(tensor, view._replace(offset=view.offset + first * view.stride[0]), count, step)
        size = entry.dtype.itemsize
        # What is split or joined along that dimension is shorter or longer on the other side.
        for some in _LENGTHS:
            part = data[: some * size]
            if some <= count and len(part) >= _FEWEST_NBYTES and part != part[:size] * some:
                yield entry.dtype.code, part


def _read(tensor: Side, view: StorageView, count: int, step: int) -> bytes:
    """So many elements from the first on, as they would lie packed."""
    from statedict.lazy_tensor import LazyTensor

    entry: TensorEntry = tensor.entry
    size = entry.dtype.itemsize
    if step == 1 and not view.bits and view.storage.byteorder == "little":
        return bytes(tensor.checkpoint.reader.read(view.storage, view.offset * size, count * size))
    parts = []
    for at in range(count):
        element = view._replace(offset=view.offset + at * step, stride=())
        one = entry._replace(shape=(), view=element, digest=None, memory_stride=None)
        parts.append(bytes(LazyTensor(one, tensor.checkpoint).read()))
    return b"".join(parts)
