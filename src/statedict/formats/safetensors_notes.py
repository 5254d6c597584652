"""What a safetensors file can't hold, kept as JSON in its ``__metadata__`` under ``statedict``, and read back.

    {"version": 1,
     "names": CRC-32 of the names, dtypes and shapes in the header: notes that a program carried over to another file don't fit
     "flat": "dict" | "OrderedDict", "attributes": {…}, "keys": [name, …]      a flat state dict; all may be absent
     "tree": …                                                                 else the nesting (``typed_json``)
     "defaults": {"device": "cpu", "requires_grad": false, "kind": "Tensor"}   of every tensor that doesn't say otherwise
     "tensors": {name: {facts}}                                                what the header doesn't say of a tensor
     "digests": "…"}                                                           xxh3-128 of each tensor of the header, by name

The facts of a tensor: ``of`` (the tensor of the header that holds its bytes), ``offset`` and ``view`` (elements and strides in
it, for a tensor that shares bytes with others), ``bits`` of such a view, ``dtype`` and ``shape`` where the header has others,
``stride`` (its strides in memory), ``layout`` and ``parts``, ``device``, ``requires_grad``, ``kind``, ``attributes``. A name in
the tree that has facts ``of`` another tensor and is itself in the header is there for other programs, as a copy.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from math import prod
from typing import Any
from zlib import crc32

from statedict.dtypes import BY_TORCH, DType
from statedict.formats.records import MappingRecord
from statedict.formats.typed_json import decode
from statedict.formats.value_tree import Tree, TreeBuilder
from statedict.limits import Limits
from statedict.manifest import StorageView, TensorEntry
from statedict.views import packed_stride, reach

__all__ = ["DIGEST_CHARACTERS", "NOTES_VERSION", "UnfitNotes", "apply_notes", "fingerprint"]

NOTES_VERSION = 1
# Hexadecimal digits of an xxh3-128.
DIGEST_CHARACTERS = 32


class UnfitNotes(Exception):
    """The notes are not about this file: another program wrote it, or changed it."""


def fingerprint(header: Mapping[str, tuple[str, tuple[int, ...]]]) -> int:
    """What the notes remember of the header: its names with their dtype codes and shapes, in whatever order."""
    lines = sorted([f"{name}\0{code}\0{shape}" for name, (code, shape) in header.items()])
    return crc32("\n".join(lines).encode("utf-8", "surrogatepass"))


def _parsed(text: str) -> dict[str, Any]:
    """The notes as an object. Raises ``UnfitNotes``."""
    try:
        notes = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UnfitNotes("they are no JSON") from error
    if not isinstance(notes, dict) or type(notes.get("version")) is not int:
        raise UnfitNotes("they are of no known form")
    if notes["version"] != NOTES_VERSION:
        raise UnfitNotes(f"they are of version {notes['version']}, this program knows version {NOTES_VERSION}")
    return notes


def _recorded_digests(notes: Mapping[str, Any], names: list[str]) -> dict[str, str]:
    """The digest of each tensor of the header; none where none was recorded."""
    text = notes.get("digests")
    if text is None:
        return {}
    if not isinstance(text, str) or len(text) != DIGEST_CHARACTERS * len(names):
        raise UnfitNotes("they have another number of digests")
    found = {}
    for at, name in enumerate(sorted(names)):
        found[name] = f"xxh3-128:{text[at * DIGEST_CHARACTERS : (at + 1) * DIGEST_CHARACTERS]}"
    return found


def apply_notes(
    text: str,
    codes: Mapping[str, tuple[str, tuple[int, ...]]],
    header: Mapping[str, TensorEntry],
    limits: Limits,
    path: str,
) -> Tree:
    """The tree that was saved, of the header's tensors and the notes. ``codes`` is what ``fingerprint`` is made of.

    Raises ``UnfitNotes`` where the notes don't fit the header, and what ``TreeBuilder`` raises. No tensor byte is read.
    """
    notes = _parsed(text)
    if notes.get("names") != fingerprint(codes):
        raise UnfitNotes("the tensors are others than when they were written")
    digests = _recorded_digests(notes, list(header))
    try:
        resolver = _Resolver(notes, header, digests)
        value = resolver.value()
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, OverflowError, RecursionError) as error:
        raise UnfitNotes("they are of no known form") from error
    return TreeBuilder(_no_storage, limits, path=path).build(value)


def _no_storage(ref: object) -> Any:
    raise UnfitNotes("they name a storage")


class _Resolver:
    """From the names in the notes to tensors."""

    def __init__(self, notes: dict[str, Any], header: Mapping[str, TensorEntry], digests: Mapping[str, str]) -> None:
        self._notes = notes
        self._header = {name: _digested(entry, digests.get(name)) for name, entry in header.items()}
        self._facts: dict[str, dict[str, Any]] = notes.get("tensors", {})
        defaults: dict[str, Any] = notes.get("defaults", {})
        self._device = _text_or_none(defaults.get("device"))
        self._requires_grad = _bool_or_none(defaults.get("requires_grad"))
        self._kind = str(defaults.get("kind", "Tensor"))
        self._within = False  # whether a tensor that belongs to another is being resolved

    def value(self) -> object:
        """The nested value with entries as its tensors."""
        if "tree" in self._notes:
            return decode(self._notes["tree"], self.entry)
        keys = self._notes.get("keys")
        keys = list(self._header) if keys is None else [str(key) for key in keys]
        kind = self._notes.get("flat", "dict")
        if kind not in ("dict", "OrderedDict"):
            raise ValueError("a flat state dict of another kind")
        made: dict[object, object] = {} if kind == "dict" else MappingRecord(kind)
        for key in keys:
            made[key] = self.entry(key)
        if isinstance(made, MappingRecord):
            attributes = self._notes.get("attributes", {})
            made.attributes = {str(name): decode(item, self.entry) for name, item in attributes.items()}
        return made

    def entry(self, name: object) -> TensorEntry:
        """The tensor of that name in the notes."""
        if not isinstance(name, str):
            raise ValueError("a tensor without a name")
        facts = self._facts.get(name)
        stored = self._header.get(name)
        if facts is None:
            if stored is None:
                raise ValueError("a tensor that isn't there")
            return stored._replace(device=self._device, requires_grad=self._requires_grad, kind=self._kind)
        stored = self._header[facts["of"]] if "of" in facts else stored
        made = self._described(name, facts, stored)
        if "parts" in facts:
            parts = {str(part): self._inner(ref) for part, ref in facts["parts"].items()}
            made = made._replace(parts=parts)
        if "attributes" in facts:
            attributes = {str(key): decode(item, self._inner) for key, item in facts["attributes"].items()}
            made = made._replace(attributes=attributes)
        return made

    def _inner(self, name: object) -> TensorEntry:
        """A tensor that belongs to another. It has none of its own: a few notes could name each other without end."""
        if not isinstance(name, str) or "parts" in self._facts.get(name, {}) or self._within:
            raise ValueError("a part made of parts")
        self._within = True
        try:
            return self.entry(name)
        finally:
            self._within = False

    def _described(self, name: str, facts: dict[str, Any], stored: TensorEntry | None) -> TensorEntry:
        dtype = BY_TORCH[facts["dtype"]] if "dtype" in facts else _dtype_of(stored)
        shape = _sizes(facts["shape"]) if "shape" in facts else _shape_of(stored)
        stride = _sizes(facts["stride"]) if "stride" in facts else None
        if stride is not None and len(stride) != len(shape):
            raise ValueError("strides of another number of dimensions")
        view = None if stored is None else _view(facts, stored, dtype, shape)
        same = stored is not None and view == stored.view and dtype == stored.dtype and shape == stored.shape
        return TensorEntry(
            (name,),
            dtype,
            shape,
            view,
            layout=str(facts.get("layout", "strided")),
            device=_text_or_none(facts.get("device", self._device)),
            requires_grad=_bool_or_none(facts.get("requires_grad", self._requires_grad)),
            kind=str(facts.get("kind", self._kind)),
            digest=stored.digest if same and stored is not None else None,
            memory_stride=stride,
        )


def _digested(entry: TensorEntry, digest: str | None) -> TensorEntry:
    if digest is None or entry.view is None:
        return entry
    return entry._replace(digest=digest, view=entry.view._replace(storage=entry.view.storage._replace(digest=digest)))


def _view(facts: dict[str, Any], stored: TensorEntry, dtype: DType, shape: tuple[int, ...]) -> StorageView:
    """The view of a tensor in the storage of the header's tensor that holds its bytes."""
    assert stored.view is not None
    storage = stored.view.storage
    stride = _sizes(facts["view"]) if "view" in facts else packed_stride(shape)
    offset = facts.get("offset", 0)
    bits = facts.get("bits", "")
    if type(offset) is not int or offset < 0 or len(stride) != len(shape) or bits not in ("", "c", "n", "cn"):
        raise ValueError("a view that can't be")
    if "view" not in facts and dtype.nbytes(prod(shape)) != storage.nbytes:
        raise ValueError("a tensor of another size than its bytes")
    if dtype.nbytes(offset + reach(shape, stride)) > storage.nbytes:
        raise ValueError("a view that ends outside its bytes")
    return StorageView(storage, offset, stride, bits)


def _dtype_of(stored: TensorEntry | None) -> DType:
    if stored is None:
        raise ValueError("a tensor without a dtype")
    return stored.dtype


def _shape_of(stored: TensorEntry | None) -> tuple[int, ...]:
    if stored is None:
        raise ValueError("a tensor without a shape")
    return stored.shape


def _sizes(value: object) -> tuple[int, ...]:
    if not isinstance(value, list) or not all(type(item) is int and 0 <= item < 1 << 63 for item in value):
        raise ValueError("sizes that can't be")
    return tuple(value)


def _text_or_none(value: object) -> str | None:
    if value is not None and not isinstance(value, str):
        raise ValueError("a device that is no text")
    return value


def _bool_or_none(value: object) -> bool | None:
    if value is not None and not isinstance(value, bool):
        raise ValueError("a flag that is neither true nor false")
    return value
