"""One tree of tensors and values written to one file: planned, carried out, read back and compared, and only then named."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

from statedict.dtypes import BY_CODE
from statedict.errors import CorruptFile, StateDictError, Unsupported
from statedict.formats.layout import identity, in_memory_order
from statedict.io.plans import Payload, Source, Sum, WritePlan
from statedict.io.ranges import LocalFile
from statedict.io.writers import Progress, Written, execute
from statedict.limits import DEFAULT_LIMITS, Limits
from statedict.manifest import Extent, Finding, Manifest, Node, Storage, TensorEntry
from statedict.nodes import every_tensor

__all__ = [
    "UNLIMITED",
    "Prepared",
    "Tree",
    "compare_bytes",
    "difference",
    "format_of",
    "prepare",
    "removed_nbytes",
    "write",
]

_SUFFIXES = {
    ".safetensors": "safetensors",
    ".pth": "torch-zip",
    ".pt": "torch-zip",
    ".bin": "torch-zip",
    ".ckpt": "torch-zip",
    ".npz": "npz",
}
# Bytes that each of the threads reads at a time that compare what was written.
_BLOCK_NBYTES = 2 * 1024 * 1024
# What a reader may need to see of a file that this program has just written itself: its size was never in doubt.
UNLIMITED = Limits(*[max(value, 1 << 62) for value in DEFAULT_LIMITS])


class Tree(NamedTuple):
    """What is to be written: the nesting, the texts beside it, and where each tensor's bytes are."""

    root: Node
    metadata: Mapping[str, str]
    source_of: Callable[[TensorEntry], Source]


class Prepared(NamedTuple):
    """What is planned to the last byte, one file or several, and what is to be known about it."""

    tree: Tree
    plan: WritePlan  # of several files, one after the other: for what is counted
    notes: tuple[Finding, ...]
    files: tuple[tuple[str, WritePlan], ...] = ()  # the names and plans of several files, the index last


def format_of(path: str) -> str:
    """The format that the suffix of a target asks for. Raises ``Unsupported`` for one that isn't written."""
    suffix = os.path.splitext(path)[1].lower()
    if suffix not in _SUFFIXES:
        known = ", ".join(_SUFFIXES)
        raise Unsupported(
            f"files ending in '{suffix}' can't be written"
            if suffix
            else "the target has no suffix to tell its format by",
            path=path,
            hint=f"End its name in one of {known}",
        )
    return _SUFFIXES[suffix]


def prepare(
    tree: Tree, path: str, *, digests: bool, keep_storages: bool = False, format: str | None = None
) -> Prepared:
    """The plan of the file, in the format of its suffix if none is named. Reads what the plan needs, writes nothing.

    Raises ``Unsupported``, ``UnsafeContent`` or ``LimitExceeded``, naming the keys, for what the format can't take.
    """
    try:
        # Each format's code is loaded when it is written.
        if (format or format_of(path)) == "torch-zip":
            from statedict.formats.torch_zip_writer import TorchZipWriter

            zipped = TorchZipWriter(tree.root, tree.metadata, digests=digests, keep_storages=keep_storages)
            return Prepared(tree, zipped.plan(tree.source_of), tuple(zipped.notes))
        if keep_storages:
            raise Unsupported(
                "only a .pth holds the storages that tensors are views of",
                hint="Leave --keep-storages out, or write a .pth",
            )
        if (format or format_of(path)) == "npz":
            from statedict.formats.npz_writer import NpzWriter

            arrays = NpzWriter(tree.root, tree.metadata)
            plan = arrays.plan(tree.source_of)
            return Prepared(tree._replace(root=arrays.root), plan, tuple(arrays.notes))
        from statedict.formats.safetensors_writer import SafetensorsWriter

        writer = SafetensorsWriter(tree.root, tree.metadata, digests=digests)
        return Prepared(tree, writer.plan(tree.source_of), tuple(writer.notes))
    except StateDictError as error:
        raise error.located(path) from error.__cause__


def removed_nbytes(manifest: Manifest, plan: WritePlan) -> int:
    """Bytes of the storages that tensors are views of, beyond what is written of them."""
    used = {
        part.view.storage.id: part.view.storage.nbytes
        for entry in manifest.tensors.values()
        for part in (entry, *entry.parts.values())
        if part.view is not None
    }
    written = sum([segment.nbytes for segment in plan.segments if isinstance(segment, Payload)])
    return max(0, sum(used.values()) - written)


def write(
    prepared: Prepared,
    path: str,
    *,
    overwrite: bool,
    durable: bool = True,
    on_progress: Progress | None = None,
) -> tuple[Written, float]:
    """Carry the plan out: the file appears complete, read back and compared, or not at all.

    Gives what was written, and the seconds that the comparison took of the whole. Raises what ``execute`` raises, and
    ``CorruptFile`` if what is on the disk isn't what was meant.
    """
    took = [0.0]

    def check(file: LocalFile, sums: Mapping[str, Sum]) -> None:
        start = time.perf_counter()
        _compare(file, prepared, sums)
        took[0] = time.perf_counter() - start

    return execute(
        prepared.plan, path, overwrite=overwrite, durable=durable, on_progress=on_progress, check=check
    ), took[0]


def _compare(file: LocalFile, prepared: Prepared, sums: Mapping[str, Sum]) -> None:
    """Read the file back: its header must describe the tree that was meant, its bytes have the digests that were computed."""
    from statedict.formats import read_manifest

    found = read_manifest([file], UNLIMITED).structure
    wrong = difference(prepared.tree.root, found)
    if wrong:
        raise CorruptFile(
            f"the file that was written isn't what was meant: {wrong}",
            path=file.path,
            hint="Nothing was changed. Please report it",
        )
    compare_bytes(file, prepared.plan, sums)


def difference(meant: Node, found: Node) -> str:
    """What differs between the tree that was meant and the one that a reader sees; empty if nothing does."""
    from statedict.formats.typed_json import encode

    before, after = every_tensor(meant), every_tensor(found)
    if len(before) != len(after):
        return f"{len(before)} tensors were to be written, {len(after)} are there"
    if encode(meant, lambda entry: "") != encode(found, lambda entry: ""):
        return "the nesting, or a value that is no tensor, is another"
    first: dict[object, int] = {}
    second: dict[object, int] = {}
    for at, (one, other) in enumerate(zip(before, after)):
        if _facts(one, one) != _facts(other, one):
            return f"tensor '{one.key}' was {_facts(one, one)}, and is {_facts(other, one)}"
        if _tie(one, first, at) != _tie(other, second, at):
            return f"tensor '{one.key}' is tied to other tensors"
    return ""


def _facts(entry: TensorEntry, meant: TensorEntry) -> tuple[object, ...]:
    """What must be equal. Strides only where the tensor is written as it was in memory: gaps are left out."""
    stride = entry.stride if meant.view is not None and in_memory_order(meant) is not None else None
    kind = entry.kind if entry.kind not in ("Buffer", "ndarray") else "Tensor"
    return (
        entry.path,
        entry.dtype.code,
        entry.shape,
        stride,
        entry.layout,
        bool(entry.requires_grad),
        kind,
        tuple(entry.parts),
    )


def _tie(entry: TensorEntry, seen: dict[object, int], at: int) -> int:
    """The position of the first tensor that is the very same."""
    if entry.view is None or not entry.numel:
        return at
    return seen.setdefault((entry.view.storage.id, *identity(entry)), at)


def compare_bytes(file: LocalFile, plan: WritePlan, sums: Mapping[str, Sum]) -> None:
    """Every payload that has a digest, once more, and by its CRC where the format has no digests; without either, nothing is read."""
    # `save`, which compares nothing, is spared these.
    from statedict.io.engine import Engine, choose_reading
    from statedict.io.filling import verify
    from statedict.io.storages import StorageReader
    from statedict.io.sums import Checked

    items: list[Checked] = []
    offset = 0
    for segment in plan.segments:
        if isinstance(segment, Payload) and (segment.digest or plan.format == "npz"):
            written = sums[segment.key]
            where = Extent(0, offset, segment.nbytes)
            storage = Storage(
                len(items), segment.nbytes, where, crc=written.crc, digest=written.digest, name=segment.key
            )
            items.append(Checked(storage, 0, TensorEntry((segment.key,), BY_CODE["U8"], (segment.nbytes,), None)))
        offset += segment.nbytes
    reading = choose_reading(file, sum([item.storage.nbytes for item in items]), Engine(block_nbytes=_BLOCK_NBYTES))
    try:
        verify(StorageReader([file]), items, reading)
    except CorruptFile as error:
        raise CorruptFile(
            "the disk gives back other bytes than were written",
            path=file.path,
            key=error.key,
            offset=error.offset,
            hint="Nothing was changed. The disk or the memory is failing: write elsewhere",
        ) from error
