"""The figures of a checkpoint's values: every byte is read once, in blocks that fit the cache, by two threads.

Tied tensors are read once. Of dimensions that only repeat (a stride of 0) one step is read, so that a view that claims a
terabyte costs what it holds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from math import prod
from threading import Lock, Thread
from typing import TYPE_CHECKING, NamedTuple

from statedict.checkpoint import Checkpoint
from statedict.errors import StateDictError
from statedict.io.ranges import read_many
from statedict.keys import Path
from statedict.lazy_tensor import LazyTensor
from statedict.manifest import Finding, TensorEntry
from statedict.ops.findings import named
from statedict.report.units import plural

if TYPE_CHECKING:
    from statedict.numerics import Scratch, Tally

__all__ = ["Progress", "statistics_of"]

# Both cores of the smallest machine; more threads wait for the interpreter.
_THREADS = 2
# Bytes that a thread takes at a time: of one large tensor, or of many small ones.
_PIECE_NBYTES = 8 * 1024 * 1024
# Bytes up to which a tensor is read together with its neighbours: each read of its own costs more than its bytes.
_SMALL_NBYTES = 64 * 1024

Figures = Mapping[str, object]
Progress = Callable[[int, int], None]


class _Item:
    """One distinct tensor: the paths that show it, what is read of it, and how often each value stands for itself."""

    __slots__ = ("entry", "paths", "repeats", "scale", "tallies", "tensor", "zero")

    def __init__(self, path: Path, entry: TensorEntry, checkpoint: Checkpoint) -> None:
        self.paths = [path]
        self.scale = 1.0
        self.zero = 0
        if entry.layout == "quantized":
            self.scale, self.zero, entry = _quantized(entry)
        repeated = entry.view.stride if entry.view is not None else ()
        shape = tuple(1 if step == 0 and size else size for size, step in zip(entry.shape, repeated)) or entry.shape
        self.repeats = prod(entry.shape) // prod(shape) if prod(shape) else 1
        self.entry = entry._replace(shape=shape)
        self.tensor = LazyTensor(self.entry, checkpoint)
        self.tallies: dict[int, Tally] = {}  # by the offset of the piece

    @property
    def is_raw(self) -> bool:
        """Whether its values are a range of a file as they are."""
        view = self.entry.view
        extent = view.storage.extent if view is not None else None
        return self.tensor.is_plain and extent is not None and extent.codec == "raw" and self.entry.numel > 0

    @property
    def place(self) -> tuple[int, int]:
        """The number of the file, and the offset in it, of such a range."""
        view = self.entry.view
        assert view is not None and view.storage.extent is not None
        return view.storage.extent.file, view.storage.extent.offset + self.tensor.plain_range()[0]

    def figures(self, empty: Tally) -> dict[str, object]:
        """The figures of all pieces together, in their order: the same whichever thread was faster."""
        for _, tally in sorted(self.tallies.items()):
            empty.merge(tally)
        made = empty.figures()
        for name in ("zeros", "nan", "inf"):
            made[name] *= self.repeats
        if self.entry.dtype.kind == "quantized" and empty.count:
            for name in ("min", "max", "mean"):
                made[name] = (made[name] - self.zero) * self.scale
            made["std"] *= self.scale
        return made


class _Piece(NamedTuple):
    """A range of a tensor's packed bytes; the whole of one that must be gathered."""

    item: _Item
    offset: int
    nbytes: int


def statistics_of(
    checkpoint: Checkpoint, on_progress: Progress | None = None
) -> tuple[dict[Path, Figures], tuple[Finding, ...]]:
    """min, max, mean, std, zeros, nan and inf of every tensor by path, and findings about tensors without.

    Minimum and maximum are of all values but NaN, mean and std (of the population) of the finite ones. Raises what reading
    raises: a file that ends too early, for example.
    """
    from statedict.numerics import Tally

    items, findings = _items(checkpoint)
    _Workers(items, checkpoint, on_progress).run()
    found: dict[Path, Figures] = {}
    for item in items:
        figures = item.figures(Tally(item.entry.dtype, item.zero))
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
        item = _Item(path, entry, checkpoint)
        try:
            item.tensor.check_readable()
        except StateDictError as error:
            without.setdefault(error.what, []).append(key)
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
        per_tensor = (
            isinstance(entry.attributes.get("scale"), float) and type(entry.attributes.get("zero_point")) is int
        )
        known = per_tensor and "int_repr" in entry.parts and entry.parts["int_repr"].dtype.numpy
        return "" if known else "quantized, with a scale for each channel or numbers smaller than a byte"
    if entry.view is None:
        return f"{entry.layout}: look at its parts"
    return "" if entry.dtype.numpy else f"no arrays of {entry.dtype}"


def _quantized(entry: TensorEntry) -> tuple[float, int, TensorEntry]:
    """Scale, zero point and the stored integers of a tensor that is quantised as a whole."""
    scale, zero = entry.attributes["scale"], entry.attributes["zero_point"]
    assert isinstance(scale, float) and isinstance(zero, int)
    return scale, zero, entry.parts["int_repr"]


def _jobs(items: list[_Item]) -> Iterator[list[_Piece]]:
    """What a thread takes at a time."""
    small: list[_Piece] = []
    nbytes = 0
    for item in items:
        size = item.tensor.nbytes
        if size <= _SMALL_NBYTES:
            small.append(_Piece(item, 0, size))
            nbytes += size
            if nbytes >= _PIECE_NBYTES:
                yield small
                small, nbytes = [], 0
        elif item.tensor.is_plain:
            for offset in range(0, size, _PIECE_NBYTES):
                yield [_Piece(item, offset, min(_PIECE_NBYTES, size - offset))]
        else:
            yield [_Piece(item, 0, size)]
    yield small


class _Workers:
    """The threads, of which the caller's is one, and what they share."""

    def __init__(self, items: list[_Item], checkpoint: Checkpoint, on_progress: Progress | None) -> None:
        self._jobs = _jobs(items)
        self._total = sum(item.tensor.nbytes for item in items)
        self._reader = checkpoint.reader
        self._on_progress = on_progress
        self._lock = Lock()
        self._done = 0
        self._error: BaseException | None = None

    def run(self) -> None:
        """Take in every piece. What one thread raises ends both."""
        others = [Thread(target=self._quietly, name="statedict-figures", daemon=True) for _ in range(_THREADS - 1)]
        if self._total <= _PIECE_NBYTES:
            others = []
        for thread in others:
            thread.start()
        try:
            self._work()
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
            self._work()
        except BaseException as error:
            self._error = self._error or error

    def _work(self) -> None:
        from statedict.numerics import Scratch, quiet

        scratch = Scratch()
        with quiet():
            while self._error is None:
                with self._lock:
                    job = next(self._jobs, None)
                if job is None:
                    return
                self._carry_out(job, scratch)

    def _carry_out(self, job: list[_Piece], scratch: Scratch) -> None:
        from statedict.numerics import Tally

        together = (
            [piece for piece in job if piece.nbytes <= _SMALL_NBYTES and piece.item.is_raw] if len(job) > 1 else []
        )
        near = dict(zip(map(id, together), self._read(together)))
        for piece in job:
            tally = Tally(piece.item.entry.dtype, piece.item.zero)
            data = near.get(id(piece))
            if data is not None:
                tally.add(memoryview(data), scratch)
            elif piece.nbytes:
                self._take_in(piece, tally, scratch)
            piece.item.tallies[piece.offset] = tally
        with self._lock:
            self._done += sum(piece.nbytes for piece in job)
            done = self._done
        if self._on_progress is not None:
            self._on_progress(done, self._total)

    def _read(self, pieces: list[_Piece]) -> list[bytes]:
        """The bytes of many small tensors of one file, near ones read at once."""
        ranges: dict[int, list[tuple[int, int]]] = {}
        for piece in pieces:
            file, offset = piece.item.place
            ranges.setdefault(file, []).append((offset, piece.nbytes))
        found = {file: iter(read_many(self._reader.files[file], wanted)) for file, wanted in ranges.items()}
        return [next(found[piece.item.place[0]]) for piece in pieces]

    def _take_in(self, piece: _Piece, tally: Tally, scratch: Scratch) -> None:
        tensor = piece.item.tensor
        if not tensor.is_plain:
            for block in tensor.blocks():
                _add(tally, block, scratch)
            return
        view = tensor.entry.view
        assert view is not None
        first = tensor.plain_range()[0] + piece.offset
        if view.storage.data is not None:
            _add(tally, memoryview(view.storage.data)[first : first + piece.nbytes], scratch)
            return
        buffer = scratch.buffer[: tally.block_nbytes]
        for start in range(0, piece.nbytes, len(buffer)):
            part = buffer[: min(len(buffer), piece.nbytes - start)]
            self._reader.read_into(view.storage, first + start, part)
            tally.add(part, scratch)


def _add(tally: Tally, data: memoryview, scratch: Scratch) -> None:
    most = tally.block_nbytes
    for start in range(0, len(data), most):
        tally.add(data[start : start + most], scratch)
