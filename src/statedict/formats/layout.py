"""Which bytes a written file gets: the storages of a tree, compacted, with every tie and overlap kept.

A view can keep a storage alive that is a thousand times larger than itself. Here each storage is cut down to what its views
reach: views that overlap stay together in one new storage with their strides, a view alone in its range is copied as it
is when its elements fill that range, and packed when they don't.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from statedict.dtypes import BY_CODE, DType
from statedict.errors import Unsupported
from statedict.manifest import Storage, StorageView, TensorEntry
from statedict.views import is_dense, packed_stride, reach

__all__ = [
    "Cluster",
    "Layout",
    "Place",
    "Target",
    "by_storage",
    "clusters",
    "identity",
    "in_memory_order",
    "lay_out",
    "leaves",
    "whole",
]

# The largest element is 16 bytes: a storage cut at a multiple of it suits every dtype that views it.
_LARGEST_ELEMENT = 16


class Target(NamedTuple):
    """A storage to be written: the entry whose packed bytes it gets, and its size."""

    entry: TensorEntry
    nbytes: int
    device: str


class Place(NamedTuple):
    """Where a written tensor is seen: the number of its storage, and the view. Offset and strides count elements."""

    target: int
    offset: int
    stride: tuple[int, ...]
    bits: str


class Layout(NamedTuple):
    """The storages to be written, in the order of their first tensor, and the place of each tensor by its identity."""

    targets: list[Target]
    places: dict[int, Place]  # by id() of the entry
    saved_nbytes: int  # bytes of the old storages that no view reaches


def leaves(entries: Iterable[TensorEntry]) -> list[TensorEntry]:
    """The entries that have bytes of their own: the tensors, and the parts of those that are made of parts."""
    found: list[TensorEntry] = []
    for entry in entries:
        found.extend(part for part in (entry, *entry.parts.values()) if part.view is not None)
    return found


def lay_out(entries: Iterable[TensorEntry], *, keep_storages: bool = False) -> Layout:
    """The storages that a file with these tensors gets. With ``keep_storages``, each one whole, as it was.

    Raises ``Unsupported`` for overlapping views of different dtypes in another byte order than this machine's.
    """
    layout = Layout([], {}, 0)
    saved = 0
    for group in by_storage(leaves(entries)):
        storage = _storage(group[0])
        first = len(layout.targets)
        if keep_storages:
            _place_range(layout, Cluster(group, 0, storage.nbytes))
        else:
            for cluster in clusters(group):
                _place_cluster(layout, cluster)
        saved += max(0, storage.nbytes - sum(target.nbytes for target in layout.targets[first:]))
    return layout._replace(saved_nbytes=saved)


def by_storage(entries: Iterable[TensorEntry]) -> list[list[TensorEntry]]:
    """The entries that have a view, those of one storage together."""
    groups: dict[object, list[TensorEntry]] = {}
    for entry in entries:
        if entry.view is not None:
            # Storages without bytes may share a number; they share nothing else.
            storage = entry.view.storage
            groups.setdefault(storage.id if storage.nbytes else id(entry), []).append(entry)
    return list(groups.values())


def _storage(entry: TensorEntry) -> Storage:
    assert entry.view is not None
    return entry.view.storage


def _span(entry: TensorEntry) -> tuple[int, int]:
    """The bytes of its storage that an entry reaches: from, to."""
    view = entry.view
    assert view is not None
    first = entry.dtype.nbytes(view.offset)
    return first, entry.dtype.nbytes(view.offset + reach(entry.shape, view.stride))


class Cluster(NamedTuple):
    """Views of one storage that overlap, directly or through others, and the bytes that they reach: from, to."""

    members: list[TensorEntry]
    low: int
    high: int


def clusters(group: Sequence[TensorEntry]) -> list[Cluster]:
    """The views of one storage, those that overlap together, in the order of their first members."""
    if len(group) == 1:
        return [Cluster([group[0]], *_span(group[0]))]
    found: list[Cluster] = []
    empty: list[Cluster] = []  # they overlap nothing, and part nothing that does
    for entry in sorted(group, key=_span):
        low, high = _span(entry)
        if low == high:
            empty.append(Cluster([entry], low, high))
        elif found and low < found[-1].high:
            members, first, last = found[-1]
            members.append(entry)
            found[-1] = Cluster(members, first, max(last, high))
        else:
            found.append(Cluster([entry], low, high))
    found += empty
    # The first tensor of the file gets the first storage.
    order = {id(entry): at for at, entry in enumerate(group)}
    for cluster in found:
        cluster.members.sort(key=lambda entry: order[id(entry)])
    return sorted(found, key=lambda cluster: order[id(cluster.members[0])])


def identity(entry: TensorEntry) -> tuple[object, ...]:
    """What two views of one storage have in common that are the same tensor."""
    view = entry.view
    assert view is not None
    return view.offset, view.stride, view.bits, entry.shape, entry.dtype.code, entry.memory_stride


def in_memory_order(entry: TensorEntry) -> TensorEntry | None:
    """The entry whose packed bytes are this tensor's storage in memory, without repetitions.

    None where the strides in memory leave gaps or overlap: such a tensor is written packed, or as a range.
    """
    view = entry.view
    assert view is not None
    stride = entry.stride
    order = sorted(range(len(stride)), key=lambda dim: -stride[dim])
    shape = [1 if stride[dim] == 0 else entry.shape[dim] for dim in order]
    if not is_dense(shape, [stride[dim] for dim in order]):
        return None
    view = view._replace(stride=tuple([view.stride[dim] for dim in order]))
    return entry._replace(shape=tuple(shape), view=view, memory_stride=None)


def _place_cluster(layout: Layout, cluster: Cluster) -> None:
    entry = cluster.members[0]
    view = entry.view
    assert view is not None
    alone = len({identity(member) for member in cluster.members}) == 1
    whole_bytes = entry.dtype.bits % 8 == 0
    ordered = in_memory_order(entry) if alone and whole_bytes and entry.memory_stride is not None else None
    if ordered is not None:
        _place_packed(layout, cluster.members, ordered, entry.stride)
    elif alone and whole_bytes and not is_dense(entry.shape, view.stride) and cluster.high - cluster.low > entry.nbytes:
        _place_packed(layout, cluster.members, entry, packed_stride(entry.shape))
    elif not whole_bytes:
        _place_range(layout, cluster._replace(low=0, high=_storage(entry).nbytes))
    else:
        _place_range(layout, cluster)


def _place_packed(layout: Layout, members: list[TensorEntry], entry: TensorEntry, stride: tuple[int, ...]) -> None:
    """One tensor whose values are written in the order of ``entry``. Its conj and neg bits are carried out."""
    layout.targets.append(Target(entry, entry.nbytes, entry.device or "cpu"))
    place = Place(len(layout.targets) - 1, 0, stride, "")
    layout.places.update((id(member), place) for member in members)


def _place_range(layout: Layout, cluster: Cluster) -> None:
    """A range of the storage as it is, seen by all of the cluster."""
    raw, low = whole(cluster)
    layout.targets.append(Target(raw, raw.nbytes, cluster.members[0].device or "cpu"))
    number = len(layout.targets) - 1
    for entry in cluster.members:
        view = entry.view
        assert view is not None
        offset = view.offset - low * 8 // entry.dtype.bits if entry.numel else 0
        layout.places[id(entry)] = Place(number, offset, view.stride, view.bits)


def whole(cluster: Cluster) -> tuple[TensorEntry, int]:
    """The cluster's bytes as one flat tensor, and where they begin in the storage, suited to every dtype that views them.

    Raises ``Unsupported`` for overlapping views of different dtypes in another byte order than this machine's.
    """
    storage = _storage(cluster.members[0])
    dtypes = {entry.dtype for entry in cluster.members}
    low = cluster.low - cluster.low % _LARGEST_ELEMENT if len(dtypes) > 1 else cluster.low
    dtype = _unit(storage, dtypes, cluster.members[0])
    numel = (cluster.high - low) * 8 // dtype.bits
    view = StorageView(storage, low * 8 // dtype.bits, (1,))
    return TensorEntry(cluster.members[0].path, dtype, (numel,), view), low


def _unit(storage: Storage, dtypes: set[DType], entry: TensorEntry) -> DType:
    """What the range is read as: bytes, unless their order must be turned, which takes the dtype."""
    if storage.byteorder == "little":
        return BY_CODE["U8"]
    if len({dtype.swap for dtype in dtypes}) > 1:
        raise Unsupported(
            "tensors of different dtypes share big-endian bytes",
            key=entry.key,
            hint="Convert them one by one: --at KEY",
        )
    return next(iter(dtypes))
