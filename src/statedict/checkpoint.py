"""The two nouns that read: a ``Checkpoint`` is a mapping of keys to ``LazyTensor``, over a manifest and its files."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from math import prod
from typing import TYPE_CHECKING, Any

from statedict.errors import KeyNotFound, LimitExceeded, StateDictError, Unsupported
from statedict.io.ranges import BLOCK_NBYTES, File, LocalFile, close_all
from statedict.io.storages import StorageReader
from statedict.keys import Path, display, dotted, escaped, near
from statedict.limits import DEFAULT_LIMITS, Limits
from statedict.manifest import Container, Manifest, TensorEntry, tied_groups
from statedict.nodes import find, fold, rebased
from statedict.views import boxes, is_packed, sliced

if TYPE_CHECKING:
    from statedict.numerics import Array

__all__ = ["Checkpoint", "LazyTensor", "open"]

# A tensor whose elements lie scattered is gathered in pieces of this size: each piece may walk its whole storage.
_SCATTERED_NBYTES = 64 * 1024 * 1024


class LazyTensor:
    """A tensor of a checkpoint whose bytes are read when they are asked for, and only those.

    Slicing gives another ``LazyTensor``; ``numpy()`` and ``read()`` read. Nothing is cached.
    """

    __slots__ = ("_checkpoint", "entry")

    def __init__(self, entry: TensorEntry, checkpoint: Checkpoint) -> None:
        self.entry = entry
        self._checkpoint = checkpoint

    @property
    def shape(self) -> tuple[int, ...]:
        """Elements along each dimension."""
        return self.entry.shape

    @property
    def dtype(self) -> str:
        """As torch spells it, without the prefix: ``float32``, ``bfloat16``, ``float8_e4m3fn``."""
        return self.entry.dtype.torch

    @property
    def nbytes(self) -> int:
        """Bytes of the values, packed; for sparse and quantised tensors those of all their parts."""
        return self.entry.nbytes

    @property
    def numel(self) -> int:
        """Elements that the shape counts."""
        return self.entry.numel

    @property
    def device(self) -> str | None:
        """The device that the file names (``cuda:0``); None where its format has none."""
        return self.entry.device

    @property
    def requires_grad(self) -> bool | None:
        """As the file has it; None where its format doesn't say."""
        return self.entry.requires_grad

    @property
    def stride(self) -> tuple[int, ...]:
        """Elements from one index to the next along each dimension, as the tensor was in memory."""
        return self.entry.stride

    @property
    def layout(self) -> str:
        """``strided``, or what the tensor's parts make: ``sparse_coo``, ``quantized``, ``nested`` …"""
        return self.entry.layout

    @property
    def parts(self) -> dict[str, LazyTensor]:
        """The tensors that a sparse, quantised or nested one is made of, by name; none for a strided one."""
        return {name: LazyTensor(part, self._checkpoint) for name, part in self.entry.parts.items()}

    @property
    def tied_with(self) -> tuple[str, ...]:
        """The other keys that show the very same elements."""
        return self._checkpoint._tied(self.entry)

    def __len__(self) -> int:
        if not self.shape:
            raise TypeError("a tensor without dimensions has no length")
        return self.shape[0]

    def __repr__(self) -> str:
        return f"LazyTensor({self.entry.key!r}, {self.dtype}, {list(self.shape)})"

    def __getitem__(self, index: object) -> LazyTensor:
        """A part of the tensor, by integers, slices with a positive step, and ``...``; nothing is read yet."""
        entry = self.entry
        if entry.view is None or entry.dtype.bits % 8:
            raise self._unsupported("can't be sliced", "Read it whole, or slice its parts")
        offset, shape, stride = sliced(entry.shape, entry.view.stride, index)
        view = entry.view._replace(offset=entry.view.offset + offset, stride=stride)
        return LazyTensor(entry._replace(shape=shape, view=view, digest=None, memory_stride=None), self._checkpoint)

    def read(self, out: Any = None) -> memoryview:
        """The values as packed little-endian bytes in reading order, in ``out`` if it is given.

        ``out`` is a writable buffer of exactly ``nbytes`` bytes. Without it, memory of its own is made. Reads the bytes of
        this tensor only (packed), else the ranges that its elements reach over.
        """
        buffer = memoryview(bytearray(self.nbytes) if out is None else out).cast("B")
        if buffer.nbytes != self.nbytes:
            raise StateDictError(
                "the buffer is of another size",
                key=self.entry.key,
                expected=f"{self.nbytes} bytes",
                found=buffer.nbytes,
            )
        done = 0
        for block in self.blocks():
            buffer[done : done + len(block)] = block
            done += len(block)
        return buffer

    def blocks(self, nbytes: int = BLOCK_NBYTES) -> Iterator[memoryview]:
        """The same bytes in pieces of whole elements, each valid until the next is asked for; memory stays bounded."""
        entry = self._readable()
        if not entry.numel:
            return
        if self.is_plain:
            yield from self._plain_blocks(entry, nbytes)
        else:
            yield from self._gathered_blocks(entry)

    @property
    def is_plain(self) -> bool:
        """Whether the values are one run of bytes of the storage, in order, ready to be copied."""
        view = self.entry.view
        if view is None or view.bits or not is_packed(self.shape, view.stride):
            return False
        return view.storage.byteorder == "little" or self.entry.dtype.swap == 1

    def plain_range(self) -> tuple[int, int]:
        """Offset and length of that run, in bytes of the storage. Only where ``is_plain``."""
        view = self.entry.view
        assert view is not None
        return self.entry.dtype.nbytes(view.offset), self.nbytes

    def _plain_blocks(self, entry: TensorEntry, nbytes: int) -> Iterator[memoryview]:
        assert entry.view is not None
        reader, storage = self._checkpoint.reader, entry.view.storage
        first, total = self.plain_range()
        if storage.data is not None:
            yield memoryview(storage.data)[first : first + total]
            return
        buffer = memoryview(bytearray(min(nbytes, total)))
        for start in range(0, total, nbytes):
            piece = buffer[: min(nbytes, total - start)]
            reader.read_into(storage, first + start, piece)
            yield piece

    def _gathered_blocks(self, entry: TensorEntry) -> Iterator[memoryview]:
        """Pieces of a scattered tensor, cut along its first dimensions so that each fits."""
        from statedict.numerics import to_packed_bytes

        for index in _pieces(entry.shape, max(1, _SCATTERED_NBYTES // max(entry.dtype.itemsize, 1))):
            part = self[index] if entry.shape else self
            yield to_packed_bytes(part._gather())

    def numpy(self) -> Array:
        """The values as an array of its own memory, in reading order.

        bfloat16 and the eight-bit floats get ml_dtypes' types; ``float4_e2m1fn_x2`` stays pairs in ``uint8``; complex32
        becomes a structured array. Raises ``Unsupported`` for sparse, quantised, nested and meta tensors.
        """
        from statedict.numerics import array

        entry = self._readable()
        if not self.is_plain and entry.numel:
            return self._gather()
        return array(self.read(), entry.dtype, entry.shape)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        made = self.numpy()
        return made if dtype is None else made.astype(dtype)

    def _gather(self) -> Array:
        """The values of a scattered tensor: read in file order in boxes, each put where it belongs."""
        from statedict.numerics import empty, gather

        entry = self.entry
        view, dtype = entry.view, entry.dtype
        assert view is not None
        out = empty(dtype, entry.shape)
        size = dtype.itemsize
        reader = self._checkpoint.reader
        for box in boxes(entry.shape, view.stride, max(BLOCK_NBYTES // size, 1)):
            raw = reader.read(view.storage, (view.offset + box.offset) * size, box.reach * size)
            target = out[box.where] if entry.shape else out
            gather(raw, dtype, box.shape, box.stride, byteorder=view.storage.byteorder, bits=view.bits, out=target)
        return out

    def _readable(self) -> TensorEntry:
        """The entry, once it is sure that its values can be read and don't unfold into more than is allowed."""
        entry = self.entry
        if entry.view is None:
            if entry.device == "meta":
                raise self._unsupported("has no values: it was saved from the meta device", "Load real weights for it")
            raise self._unsupported(f"is {entry.layout}", "Its parts can be read: .parts")
        if entry.dtype.bits % 8 and not (is_packed(entry.shape, entry.view.stride) and entry.view.offset == 0):
            raise self._unsupported("is a view of numbers smaller than a byte", "Read the whole tensor")
        extra = entry.nbytes - entry.view.storage.nbytes
        most = self._checkpoint.limits.expanded_bytes
        if extra > most:
            raise LimitExceeded(
                f"the tensor claims {entry.nbytes:,} bytes, of which the file holds {entry.view.storage.nbytes:,}",
                limit="expanded_bytes",
                most=most,
                path=self._checkpoint.source,
                key=entry.key,
            )
        return entry

    def _unsupported(self, what: str, hint: str) -> Unsupported:
        return Unsupported(f"the tensor {what}", path=self._checkpoint.source, key=self.entry.key, hint=hint)


def _pieces(shape: tuple[int, ...], most: int) -> Iterator[tuple[slice | int, ...]]:
    """Indices that cut a tensor into pieces of at most ``most`` elements that follow one another in reading order."""
    if prod(shape) <= most or not shape:
        yield (slice(None),) * min(1, len(shape))
        return
    row = prod(shape[1:])
    if row <= most:
        for first in range(0, shape[0], most // row):
            yield (slice(first, first + most // row),)
        return
    for first in range(shape[0]):
        for rest in _pieces(shape[1:], most):
            yield (first, *rest)


class Checkpoint(Mapping[str, LazyTensor]):
    """The tensors of a file by key, read when they are used. A context manager; reading a closed one is an error.

    Keys are dotted (``optimizer.state.0.exp_avg``). Where two paths read alike, both are shown escaped and the dotted form
    raises ``KeyNotFound``; a path (a tuple) always works.
    """

    def __init__(
        self, manifest: Manifest, files: Sequence[File], *, source: str, limits: Limits = DEFAULT_LIMITS
    ) -> None:
        self.manifest = manifest
        self.source = source
        self.limits = limits
        self.reader = StorageReader(files)
        self._paths = display(manifest.tensors)
        self._ties: dict[Path, tuple[str, ...]] | None = None

    @property
    def format(self) -> str:
        """``torch-zip``, ``torch-legacy``, ``torch-tar``, ``torchscript``, ``safetensors``, ``npz``, ``npy`` or ``pickle``."""
        return self.manifest.format

    @property
    def metadata(self) -> Mapping[str, str]:
        """The texts that the file carries beside its tensors."""
        return self.manifest.metadata

    @property
    def objects(self) -> dict[str, object]:
        """Everything that is no tensor, by key: numbers, texts, dates … and inert records of unknown objects."""
        entries = self.manifest.objects
        return {key: entries[path].value for key, path in display(entries).items()}

    def __getitem__(self, key: str | Path) -> LazyTensor:
        return LazyTensor(self.manifest.tensors[self.path_of(key)], self)

    def __iter__(self) -> Iterator[str]:
        return iter(self._paths)

    def __len__(self) -> int:
        return len(self._paths)

    def __contains__(self, key: object) -> bool:
        return key in self._paths or (isinstance(key, tuple) and key in self.manifest.tensors)

    def __repr__(self) -> str:
        return f"Checkpoint({self.source!r}, {self.format}, {len(self)} tensors)"

    def path_of(self, key: str | Path) -> Path:
        """The path of a tensor's key. Raises ``KeyNotFound`` with the nearest keys, or with those that it could mean."""
        if isinstance(key, tuple):
            if key in self.manifest.tensors:
                return key
            raise KeyNotFound("there is no such tensor", path=self.source, key=dotted(key))
        found = self._paths.get(key)
        if found is not None:
            return found
        alike = [path for path in self.manifest.tensors if dotted(path) == key]
        if alike:
            names = ", ".join(escaped(path) for path in alike)
            raise KeyNotFound(
                "this key could mean several tensors", path=self.source, key=key, hint=f"Say which: {names}"
            )
        if any(dotted(path) == key for path in self.manifest.objects):
            raise KeyNotFound("this is no tensor", path=self.source, key=key, hint="Its value is in .objects")
        guesses = near(key, self._paths)
        hint = (
            f"Did you mean {', '.join(guesses)}"
            if guesses
            else f"There are {len(self)} tensors: list them with statedict inspect"
        )
        raise KeyNotFound("there is no such tensor", path=self.source, key=key, hint=hint)

    def at(self, key: str | Path) -> Checkpoint:
        """The part under a key as a checkpoint of its own, over the same open files.

        A dotted key, a path, or the common prefix of flat keys. Raises ``KeyNotFound``.
        """
        try:
            root, tensors, objects = rebased(find(self.manifest.structure, key))
        except StateDictError as error:
            raise error.located(self.source) from None
        used = {entry.view.storage.id for entry in tensors.values() if entry.view is not None}
        used |= {
            part.view.storage.id for entry in tensors.values() for part in entry.parts.values() if part.view is not None
        }
        storages = tuple(storage for storage in self.manifest.storages if storage.id in used)
        manifest = self.manifest._replace(tensors=tensors, objects=objects, structure=root, storages=storages)
        name = key if isinstance(key, str) else escaped(key)
        return Checkpoint(manifest, self.reader.files, source=f"{self.source}#{name}", limits=self.limits)

    def tree(self) -> Any:
        """The nested Python value that was saved, with a ``LazyTensor`` for every tensor.

        Dicts, lists and tuples come back as themselves, an OrderedDict with its ``_metadata``; unknown objects as ``Opaque``.
        """
        return fold(
            self.manifest.structure, lambda e: LazyTensor(e, self) if isinstance(e, TensorEntry) else e.value, _rebuilt
        )

    def _tied(self, entry: TensorEntry) -> tuple[str, ...]:
        if self._ties is None:
            names = {path: key for key, path in self._paths.items()}
            groups = tied_groups(self.manifest.tensors)
            self._ties = {
                path: tuple(names[other] for other in group if other != path) for group in groups for path in group
            }
        known = self.manifest.tensors.get(entry.path)
        return self._ties.get(entry.path, ()) if known is entry else ()

    def close(self) -> None:
        """Close the files."""
        close_all(self.reader.files)

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _rebuilt(node: Container, children: list[Any]) -> Any:
    """The Python container that a node stands for."""
    kind = node.kind
    if kind in ("list", "tuple", "set", "frozenset"):
        return {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}[kind](children)
    pairs = zip(node.keys, children)
    if kind == "Namespace":
        from types import SimpleNamespace

        return SimpleNamespace(**{str(key): value for key, value in pairs})
    if kind == "opaque":
        from statedict.manifest import Opaque

        module, _, name = node.type.rpartition(".")
        fields = dict(pairs)
        if node.attributes.get("fields"):
            return Opaque(module, name, (), fields)
        made = Opaque(module, name, fields.get("args", ()), fields.get("state"))
        made.items = list(fields.get("items", ()))
        made.pairs = [(key, value) for key, value in fields.get("pairs", ())]
        return made
    import collections

    made_dict: Any = {
        "OrderedDict": collections.OrderedDict,
        "Counter": collections.Counter,
        "defaultdict": collections.defaultdict,
    }.get(kind, dict)()
    made_dict.update(pairs) if kind != "Counter" else dict.update(made_dict, pairs)
    for name, value in node.attributes.items():
        if kind == "OrderedDict" and name == "_metadata":
            made_dict._metadata = value
    return made_dict


def open(source: Any, *, at: str | Path | None = None, limits: Limits | None = None) -> Checkpoint:
    """A checkpoint, opened without being run: its header is read, its tensors are not.

    ``source`` is a path (``PATH#KEY`` selects a part) or a ``Checkpoint``. Reads
    with positioned reads; the file stays open until the checkpoint is closed.

    Raises ``FileError`` (it can't be opened), ``UnknownFormat`` (it is no checkpoint, and what it is), ``CorruptFile``,
    ``Unsupported``, ``LimitExceeded`` and ``KeyNotFound`` (nothing under ``at``).
    """
    limits = limits or DEFAULT_LIMITS
    if isinstance(source, Checkpoint):
        return source if at is None else source.at(at)
    if not isinstance(source, (str, os.PathLike)):
        raise Unsupported(f"a {type(source).__name__} can't be opened", hint="Give a path or a Checkpoint")
    path = os.fspath(source)
    if at is None and "#" in path and not os.path.lexists(path):
        path, _, at = path.rpartition("#")
    made = _open_file(path, limits)
    if at is None:
        return made
    try:
        return made.at(at)
    except BaseException:
        made.close()
        raise


def _open_file(path: str, limits: Limits) -> Checkpoint:
    from statedict.formats import read_manifest

    if "://" in path:
        raise Unsupported("addresses can't be opened yet", path=path, hint="Download the file first")
    file = LocalFile(path)
    try:
        return Checkpoint(read_manifest([file], limits), [file], source=path, limits=limits)
    except BaseException as error:
        file.close()
        if isinstance(error, StateDictError):
            raise error.located(path) from error.__cause__
        raise
