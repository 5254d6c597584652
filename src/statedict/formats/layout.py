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

__all__ = ["Layout", "Place", "Target", "lay_out", "leaves"]

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
    by_storage: dict[int, list[TensorEntry]] = {}
    for entry in leaves(entries):
        assert entry.view is not None
        by_storage.setdefault(entry.view.storage.id, []).append(entry)
    layout = Layout([], {}, 0)
    saved = 0
    for group in by_storage.values():
        storage = _storage(group[0])
        first = len(layout.targets)
        if keep_storages:
            _place_range(layout, group, 0, storage.nbytes)
        else:
            for cluster, low, high in _clusters(group):
                _place_cluster(layout, cluster, low, high)
        saved += max(0, storage.nbytes - sum(target.nbytes for target in layout.targets[first:]))
    return layout._replace(saved_nbytes=saved)


def _storage(entry: TensorEntry) -> Storage:
    assert entry.view is not None
    return entry.view.storage


def _span(entry: TensorEntry) -> tuple[int, int]:
    """The bytes of its storage that an entry reaches: from, to."""
    view = entry.view
    assert view is not None
    first = entry.dtype.nbytes(view.offset)
    return first, entry.dtype.nbytes(view.offset + reach(entry.shape, view.stride))


def _clusters(group: Sequence[TensorEntry]) -> list[tuple[list[TensorEntry], int, int]]:
    """The views of one storage, those that overlap together, with the bytes that each cluster reaches."""
    if len(group) == 1:
        return [([group[0]], *_span(group[0]))]
    clusters: list[tuple[list[TensorEntry], int, int]] = []
    for entry in sorted(group, key=_span):
        low, high = _span(entry)
        if clusters and (low < clusters[-1][2] and low < high):
            members, first, last = clusters[-1]
            members.append(entry)
            clusters[-1] = (members, first, max(last, high))
        else:
            clusters.append(([entry], low, high))
    # The first tensor of the file gets the first storage.
    order = {id(entry): at for at, entry in enumerate(group)}
    return sorted(clusters, key=lambda cluster: min(order[id(entry)] for entry in cluster[0]))


def _place_cluster(layout: Layout, cluster: list[TensorEntry], low: int, high: int) -> None:
    entry = cluster[0]
    view = entry.view
    assert view is not None
    alone = all(other.view == view and other.shape == entry.shape for other in cluster)
    whole_bytes = entry.dtype.bits % 8 == 0
    if alone and whole_bytes and not is_dense(entry.shape, view.stride) and high - low > entry.nbytes:
        _place_packed(layout, cluster)
    elif not whole_bytes:
        _place_range(layout, cluster, 0, _storage(entry).nbytes)
    else:
        _place_range(layout, cluster, low, high)


def _place_packed(layout: Layout, cluster: list[TensorEntry]) -> None:
    """One tensor with gaps between its elements: written without them. Its conj and neg bits are carried out."""
    entry = cluster[0]
    layout.targets.append(Target(entry, entry.nbytes, entry.device or "cpu"))
    place = Place(len(layout.targets) - 1, 0, packed_stride(entry.shape), "")
    layout.places.update((id(member), place) for member in cluster)


def _place_range(layout: Layout, cluster: list[TensorEntry], low: int, high: int) -> None:
    """A range of the storage as it is, seen by all of the cluster."""
    storage = _storage(cluster[0])
    dtypes = {entry.dtype for entry in cluster}
    if len(dtypes) > 1:
        low -= low % _LARGEST_ELEMENT
    dtype = _unit(storage, dtypes, cluster[0])
    numel = (high - low) * 8 // dtype.bits
    raw = TensorEntry(cluster[0].path, dtype, (numel,), StorageView(storage, low * 8 // dtype.bits, (1,)))
    layout.targets.append(Target(raw, high - low, cluster[0].device or "cpu"))
    number = len(layout.targets) - 1
    for entry in cluster:
        view = entry.view
        assert view is not None
        offset = view.offset - low * 8 // entry.dtype.bits if entry.numel else 0
        layout.places[id(entry)] = Place(number, offset, view.stride, view.bits)


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
