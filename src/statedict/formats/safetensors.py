"""The safetensors format: [0, 8) header length n, u64 LE · [8, 8+n) JSON · the tensors' bytes.

Offsets in the header are relative to 8+n. Source: the README of safetensors, "Format", and its ``tensor.rs``. What this
program notes in ``__metadata__`` beside the tensors is in ``safetensors_notes.py``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

from statedict.dtypes import BY_CODE
from statedict.errors import CorruptFile
from statedict.io.ranges import File
from statedict.keys import Path, dotted
from statedict.limits import DEFAULT_LIMITS, Limits
from statedict.manifest import Container, Extent, FileFact, Finding, Manifest, Storage, StorageView, TensorEntry
from statedict.views import packed_stride

__all__ = ["read_manifest"]

_DAMAGED = "The file was cut short or damaged: download or copy it again"


def read_manifest(files: Sequence[File], limits: Limits = DEFAULT_LIMITS) -> Manifest:
    """What the header says; no tensor byte is read.

    Raises ``CorruptFile`` if a range overlaps another, leaves a hole, ends outside the file or has another size than its
    shape, and if two tensors have one name.
    """
    file = files[0]
    header, start = _header(file, limits)
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CorruptFile("'__metadata__' holds something other than texts", path=file.path, offset=8)
    tensors: dict[Path, TensorEntry] = {}
    for number, (name, info) in enumerate(header.items()):
        tensors[(name,)] = _tensor(file, number, name, info, start)
    entries = list(tensors.values())
    _check_ranges(file, entries, start)
    manifest = Manifest(
        "safetensors",
        (FileFact(file.path, file.nbytes),),
        tuple(entry.view.storage for entry in entries if entry.view is not None),
        tensors,
        {},
        Container("dict", list(header), entries),
        metadata,
    )
    return manifest if "statedict" not in metadata else _noted(manifest, header, limits)


def _noted(manifest: Manifest, header: Mapping[str, Any], limits: Limits) -> Manifest:
    """The manifest as its notes describe it; as it was, with a finding, where they are about another file."""
    from statedict.formats.safetensors_notes import UnfitNotes, apply_notes

    metadata = dict(manifest.metadata)
    text = metadata.pop("statedict")
    codes = {name: (str(info["dtype"]), tuple(info["shape"])) for name, info in header.items()}
    entries = {str(entry.path[0]): entry for entry in manifest.tensors.values()}
    try:
        tree = apply_notes(text, codes, entries, limits, manifest.files[0].path)
    except UnfitNotes as error:
        message = f"statedict's notes in the metadata are left aside: {error}. Shown are the tensors of the header"
        return manifest._replace(metadata=metadata, notes=(Finding("stale-notes", "warning", message),))
    aliases = {dotted(path) for path in tree.tensors} - set(header)
    metadata = {key: value for key, value in metadata.items() if key not in aliases}
    return manifest._replace(
        storages=tuple(tree.storages),
        tensors=tree.tensors,
        objects=tree.objects,
        structure=tree.root,
        metadata=metadata,
        notes=tuple(tree.notes),
    )


def _header(file: File, limits: Limits) -> tuple[dict[str, object], int]:
    length = int.from_bytes(file.read(0, 8), "little")
    if length > file.nbytes - 8:
        raise CorruptFile(
            "the file ends inside its header",
            path=file.path,
            offset=8,
            expected=f"{length} bytes",
            found=file.nbytes - 8,
            hint=_DAMAGED,
        )
    limits.check("header_bytes", length, "the header is too long", path=file.path)
    raw = file.read(8, length)
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise CorruptFile(f"the header is no JSON: {error}", path=file.path, offset=8, hint=_DAMAGED) from error
    if not isinstance(header, dict):
        raise CorruptFile("the header is no JSON object", path=file.path, offset=8)
    return header, 8 + length


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    made = dict(pairs)
    if len(made) != len(pairs):
        # Readers differ in which of the two they take.
        raise ValueError("a name stands twice")
    return made


def _refuse(text: str) -> object:
    raise ValueError(f"{text} is no JSON number")


def _tensor(file: File, number: int, name: str, info: object, start: int) -> TensorEntry:
    facts = info if isinstance(info, dict) else {}
    dtype = BY_CODE.get(str(facts.get("dtype")))
    shape: Any = facts.get("shape")
    span: Any = facts.get("data_offsets")
    if dtype is None or not (dtype.safetensors or dtype.code == "F4"):
        raise CorruptFile("the dtype is unknown", path=file.path, key=name, offset=8, found=facts.get("dtype"))
    if not _is_numbers(shape) or not _is_numbers(span) or len(span) != 2:
        raise CorruptFile("the shape or the offsets are wrong", path=file.path, key=name, offset=8, found=repr(info))
    if dtype.code == "F4" and shape and shape[-1] % 2 == 0:
        # torch stores pairs: its last dimension is half as long.
        dtype, shape = BY_CODE["F4_X2"], [*shape[:-1], shape[-1] // 2]
    first, last = span
    bits = prod(shape) * dtype.bits
    if last - first != bits // 8 or bits % 8 or start + last > file.nbytes:
        raise CorruptFile(
            "the bytes are others than the shape takes, or lie outside the file",
            path=file.path,
            key=name,
            offset=start + first,
            expected=f"{bits / 8:g} bytes of {max(0, file.nbytes - start - first)} that are left",
            found=last - first,
            hint=_DAMAGED,
        )
    storage = Storage(number, last - first, Extent(0, start + first, last - first), None, "little", None, name)
    view = StorageView(storage, 0, packed_stride(shape))
    return TensorEntry((name,), dtype, tuple(shape), view, device=None)


def _is_numbers(value: object) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 1 << 63 for item in value)


def _check_ranges(file: File, entries: list[TensorEntry], start: int) -> None:
    end = start
    extents = [(entry.view.storage.extent, entry.key) for entry in entries if entry.view is not None]
    for offset, nbytes, key in sorted((extent.offset, extent.nbytes, key) for extent, key in extents if extent):
        if offset != end:
            what = "overlaps another" if offset < end else "leaves a hole before it"
            raise CorruptFile(f"the range of the tensor {what}", path=file.path, key=key, offset=offset, expected=end)
        end = offset + nbytes
    if end != file.nbytes:
        raise CorruptFile(
            "bytes behind the last tensor belong to nothing", path=file.path, offset=end, found=file.nbytes - end
        )
