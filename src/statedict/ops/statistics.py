"""The figures of a checkpoint's values: every byte is read once, in blocks that fit the cache, by two threads.

Tied tensors are read once. The order of the values doesn't matter here, so the dimensions of a view are taken in the order of
its storage: a transposed tensor is read as if it weren't. Of dimensions that only repeat (a stride of 0) one step is
read, so that a view that claims a terabyte costs what it holds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from math import isfinite, prod
from threading import Lock, Thread
from typing import TYPE_CHECKING, NamedTuple

from statedict.checkpoint import Checkpoint
from statedict.io.ranges import read_many
from statedict.io.storages import StorageReader
from statedict.keys import Path
from statedict.manifest import Finding, TensorEntry
from statedict.ops.findings import named
from statedict.report.units import plural
from statedict.views import boxes, is_packed, packed_stride

if TYPE_CHECKING:
    from statedict.numerics.tallies import Scratch, Tally

__all__ = ["Progress", "statistics_of"]

# Both cores of the smallest machine; more threads wait for the interpreter.
_THREADS = 2
# Bytes that a thread takes at a time: of one large tensor, or of many small ones.
_PIECE_NBYTES = 8 * 1024 * 1024
# Bytes up to which a tensor is read together with its neighbours: each read of its own costs more than its bytes.
_SMALL_NBYTES = 64 * 1024
# Zero points are numbers of the stored type, of 32 bits at most.
_ZERO_POINTS = range(-(2**31), 2**31)

# Why a view whose elements overlap too often isn't counted.
_UNFOLDED = "it unfolds into more bytes than the limit expanded_bytes allows"

Figures = Mapping[str, object]
Progress = Callable[[int, int], None]


class _Item:
    """One distinct tensor: the paths that show it, what is read of it, and how often each value stands for itself.

    ``shape`` and ``stride`` (elements) have the longest stride first, ``(n,)`` and ``(1,)`` where the values are one run.
    """

    __slots__ = (
        "bits",
        "dtype",
        "nbytes",
        "offset",
        "paths",
        "repeats",
        "scale",
        "shape",
        "storage",
        "stride",
        "tallies",
        "zero",
    )

    def __init__(self, path: Path, entry: TensorEntry) -> None:
        self.paths = [path]
        self.scale, self.zero = 1.0, 0
        if entry.layout == "quantized":
            self.scale, self.zero, entry = _quantized(entry)
        view = entry.view
        assert view is not None
        self.dtype = entry.dtype
        self.storage, self.offset, self.bits = view.storage, view.offset, view.bits
        once = [(step, size) for step, size in zip(view.stride, entry.shape) if size == 0 or (step and size > 1)]
        once.sort(reverse=True)
        self.stride, self.shape = tuple(step for step, _ in once), tuple(size for _, size in once)
        numel = prod(self.shape)
        self.nbytes = numel * self.dtype.itemsize
        self.repeats = entry.numel // numel if numel else 1
        if is_packed(self.shape, self.stride):
            self.shape, self.stride = (numel,), (1,)
        self.tallies: dict[int, Tally] = {}  # by the number of the piece

    @property
    def is_run(self) -> bool:
        """Whether the values are one run of bytes of the storage, save for their byte order."""
        return self.stride == (1,) and not self.bits

    @property
    def is_wrapped(self) -> bool:
        """Whether the storage is compressed, so that it can be read forwards only."""
        extent = self.storage.extent
        return self.storage.data is None and extent is not None and extent.codec != "raw"

    @property
    def is_near(self) -> bool:
        """Whether it is a small run of a file's own bytes, to be read together with its neighbours."""
        here = self.storage.extent is not None and not self.is_wrapped
        return self.is_run and here and 0 < self.nbytes <= _SMALL_NBYTES

    @property
    def place(self) -> tuple[int, int, int]:
        """File, position of the storage in it, and offset in the storage in bytes: what is read in this order is read forwards."""
        extent = self.storage.extent
        first = self.offset * self.dtype.itemsize
        return (-1, 0, first) if extent is None else (extent.file, extent.offset, first)

    def figures(self, tally: Tally) -> dict[str, object]:
        """The figures of all pieces, put together in an empty tally by number: the same whichever thread was faster."""
        for _, part in sorted(self.tallies.items()):
            tally.merge(part)
        made = tally.figures()
        for name in ("zeros", "nan", "inf"):
            made[name] *= self.repeats
        if self.dtype.kind == "quantized" and tally.count:
            for name in ("min", "max", "mean"):
                made[name] = (made[name] - self.zero) * self.scale
            made["std"] *= self.scale
        return made


class _Piece(NamedTuple):
    """A part of an item that is read by one thread: its number, and the view that it is."""

    item: _Item
    number: int
    offset: int
    shape: tuple[int, ...]
    nbytes: int


def statistics_of(
    checkpoint: Checkpoint, on_progress: Progress | None = None
) -> tuple[dict[Path, Figures], tuple[Finding, ...]]:
    """min, max, mean, std, zeros, nan and inf of every tensor by path, and findings about tensors without.

    Minimum and maximum are of all values but NaN, mean and std (of the population) of the finite ones. Raises what reading
    raises: a file that ends too early, for example.
    """
    from statedict.numerics.tallies import Tally

    items, findings = _items(checkpoint)
    _Workers(items, checkpoint, on_progress).run()
    found: dict[Path, Figures] = {}
    for item in items:
        figures = item.figures(Tally(item.dtype, item.zero))
        found.update((path, figures) for path in item.paths)
    return found, findings


def _items(checkpoint: Checkpoint) -> tuple[list[_Item], tuple[Finding, ...]]:
    """The distinct tensors with values, and a finding for each reason why one has none."""
    seen: dict[object, _Item] = {}
    without: dict[str, list[str]] = {}
    for key in checkpoint:
        path = checkpoint.path_of(key)
        entry = checkpoint.manifest.tensors[path]
        view = entry.view
        mark = (
            id(entry)
            if view is None
            else (view.storage.id, view.offset, view.stride, view.bits, entry.shape, entry.dtype)
        )
        if mark in seen:
            seen[mark].paths.append(path)
            continue
        reason = _reason(entry)
        if reason:
            without.setdefault(reason, []).append(key)
            continue
        item = _Item(path, entry)
        if item.nbytes - item.storage.nbytes > checkpoint.limits.expanded_bytes:
            without.setdefault(_UNFOLDED, []).append(key)
        else:
            seen[mark] = item
    findings = tuple(
        Finding(
            "no-stats", "info", f"no figures of {plural(len(keys), 'tensor')} ({reason}): {named(keys)}", tuple(keys)
        )
        for reason, keys in without.items()
    )
    return list(seen.values()), findings


def _reason(entry: TensorEntry) -> str:
    """Why a tensor has no figures; empty where it has."""
    if entry.device == "meta" and entry.view is None:
        return "saved from the meta device, without values"
    if entry.layout == "quantized":
        scale, zero = entry.attributes.get("scale"), entry.attributes.get("zero_point")
        part = entry.parts.get("int_repr")
        if not isinstance(scale, float) or type(zero) is not int or not _has_values(part):
            return "quantized, with a scale for each channel or numbers smaller than a byte"
        return "" if isfinite(scale) and scale > 0 and zero in _ZERO_POINTS else "quantized, with an impossible scale"
    if entry.view is None:
        return f"{entry.layout}: look at its parts"
    return "" if _has_values(entry) else f"no arrays of {entry.dtype}"


def _has_values(entry: TensorEntry | None) -> bool:
    return entry is not None and entry.view is not None and entry.dtype.numpy != ""


def _quantized(entry: TensorEntry) -> tuple[float, int, TensorEntry]:
    """Scale, zero point and the stored integers of a tensor that is quantised as a whole."""
    scale, zero = entry.attributes["scale"], entry.attributes["zero_point"]
    assert isinstance(scale, float) and isinstance(zero, int)
    return scale, zero, entry.parts["int_repr"]


def _small_jobs(items: list[_Item]) -> Iterator[list[_Piece]]:
    """Many small tensors at a time."""
    job: list[_Piece] = []
    nbytes = 0
    for item in items:
        job.append(_Piece(item, 0, item.offset, item.shape, item.nbytes))
        nbytes += item.nbytes
        if nbytes >= _PIECE_NBYTES:
            yield job
            job, nbytes = [], 0
    if job:
        yield job


def _large_jobs(items: list[_Item]) -> Iterator[list[_Piece]]:
    """A part of a large tensor at a time; the whole of one that is compressed: each thread would unwrap what others read."""
    for item in items:
        if item.is_wrapped:
            yield [_Piece(item, 0, item.offset, item.shape, item.nbytes)]
            continue
        cut = _cut(item.shape, item.stride, _PIECE_NBYTES // item.dtype.itemsize)
        for number, (offset, shape) in enumerate(cut):
            yield [_Piece(item, number, item.offset + offset, shape, item.dtype.nbytes(prod(shape)))]


def _cut(shape: tuple[int, ...], stride: tuple[int, ...], most: int) -> Iterator[tuple[int, tuple[int, ...]]]:
    """A view in parts that show at most ``most`` elements: the offset of each in elements, and its shape."""
    for part in boxes(shape, packed_stride(shape), most):
        yield sum(place.start * step for place, step in zip(part.where, stride)), part.shape


class _Workers:
    """The threads, of which the caller's is one, and what they share."""

    def __init__(self, items: list[_Item], checkpoint: Checkpoint, on_progress: Progress | None) -> None:
        items = sorted(items, key=lambda item: item.place)
        large = [item for item in items if item.nbytes > _SMALL_NBYTES]
        # Small tensors cost the interpreter more than the arrays: two threads would only wait for each other.
        self._small = _small_jobs([item for item in items if item.nbytes <= _SMALL_NBYTES])
        self._large = _large_jobs(large)
        self._is_shared = sum(item.nbytes for item in large) > _PIECE_NBYTES
        self._total = sum(item.nbytes for item in items)
        self._files = checkpoint.reader.files
        self._on_progress = on_progress
        self._lock = Lock()
        self._done = 0
        self._error: BaseException | None = None

    def run(self) -> None:
        """Take in every piece. What one thread raises ends both."""
        count = _THREADS - 1 if self._is_shared else 0
        others = [Thread(target=self._quietly, name="statedict-figures", daemon=True) for _ in range(count)]
        for thread in others:
            thread.start()
        try:
            self._work(chain(self._small, self._large))
        except BaseException as error:
            self._error = self._error or error
            raise
        finally:
            for thread in others:
                thread.join()
        if self._error is not None:
            raise self._error

    def _quietly(self) -> None:
        try:
            self._work(self._large)
        except BaseException as error:
            self._error = self._error or error

    def _work(self, jobs: Iterator[list[_Piece]]) -> None:
        from statedict.numerics.tallies import Scratch, quiet

        # A reader of its own: it remembers how far the last compressed storage was unwrapped.
        reader, scratch = StorageReader(self._files), Scratch()
        with quiet():
            while self._error is None:
                with self._lock:
                    job = next(jobs, None)
                if job is None:
                    return
                _carry_out(job, reader, scratch)
                with self._lock:
                    self._done += sum(piece.nbytes for piece in job)
                    if self._on_progress is not None:
                        self._on_progress(self._done, self._total)


def _carry_out(job: list[_Piece], reader: StorageReader, scratch: Scratch) -> None:
    from statedict.numerics.tallies import Tally

    together = [piece for piece in job if piece.item.is_near] if len(job) > 1 else []
    near = dict(zip(map(id, together), _read(together, reader)))
    for piece in job:
        tally = Tally(piece.item.dtype, piece.item.zero)
        data = near.get(id(piece))
        for block in [_little(memoryview(data), piece.item)] if data else _blocks(piece, tally, reader, scratch):
            tally.add(block, scratch)
        piece.item.tallies[piece.number] = tally


def _read(pieces: list[_Piece], reader: StorageReader) -> list[bytes]:
    """The bytes of many small tensors, near ones read at once."""
    ranges: dict[int, list[tuple[int, int]]] = {}
    for piece in pieces:
        file, storage, first = piece.item.place
        ranges.setdefault(file, []).append((storage + first, piece.nbytes))
    found = {file: iter(read_many(reader.files[file], wanted)) for file, wanted in ranges.items()}
    return [next(found[piece.item.place[0]]) for piece in pieces]


def _blocks(piece: _Piece, tally: Tally, reader: StorageReader, scratch: Scratch) -> Iterator[memoryview]:
    """The values of a piece as packed little-endian bytes, in blocks for the tally; each valid until the next."""
    from statedict.numerics.arrays import empty, gather, to_packed_bytes

    item = piece.item
    storage, dtype, size = item.storage, item.dtype, item.dtype.itemsize

    def read(first: int, count: int) -> memoryview:
        if storage.data is not None:
            return memoryview(storage.data)[first * size : (first + count) * size]
        buffer = scratch.buffer[: count * size]
        reader.read_into(storage, first * size, buffer)
        return buffer

    most = tally.block_nbytes // size
    if item.is_run:
        (count,) = piece.shape
        for start in range(0, count, most):
            yield _little(read(piece.offset + start, min(most, count - start)), item)
        return
    for offset, shape in _cut(piece.shape, item.stride, most):
        for box in boxes(shape, item.stride, most):
            raw = read(piece.offset + offset + box.offset, box.reach)
            out = empty(dtype, box.shape)
            gather(raw, dtype, box.shape, box.stride, byteorder=storage.byteorder, bits=item.bits, out=out)
            yield to_packed_bytes(out)


def _little(data: memoryview, item: _Item) -> memoryview:
    """Values of a storage as little-endian ones."""
    from statedict.numerics.arrays import swapped

    return data if item.storage.byteorder == "little" or item.dtype.swap == 1 else swapped(data, item.dtype)
