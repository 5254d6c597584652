"""What a written ``.npz`` will be: a zip archive of ``.npy`` files as ``numpy.savez`` makes them, which needs no pickle to be read.

    [local header · key.npy · padding · \\x93NUMPY header · the elements]…  central directory  (EOCD64 · locator)  EOCD

Nothing is compressed. The elements begin at a multiple of 64, by padding in the extra field of the local header, so that they can
be mapped. The format knows arrays by name and nothing else: nesting becomes dotted keys, ties become copies, numbers and
texts become arrays without dimensions, and what would need a pickle is left out; each of these is said in a finding. Sources:
numpy ``lib/_format_impl.py`` and ``lib/_npyio_impl.py``; PKWARE APPNOTE.TXT 6.3.10 section 4.3.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from statedict.dtypes import BY_NUMPY, DType
from statedict.errors import Unsupported, one_line
from statedict.formats.zips import CENTRAL, END, END64, LOCAL, LOCATOR64
from statedict.io.plans import Later, MemorySource, Payload, Segment, Source, Sum, WritePlan
from statedict.io.ranges import File
from statedict.keys import display
from statedict.manifest import (
    Container,
    Finding,
    Node,
    NumpyScalar,
    ObjectEntry,
    Opaque,
    Storage,
    StorageView,
    TensorEntry,
)
from statedict.nodes import every_tensor, walk
from statedict.report.units import plural
from statedict.views import packed_stride

__all__ = ["NpzWriter"]

_ALIGNMENT = 64
# The digits that numpy leaves room for in a header, so that an array can grow in place (its GROWTH_AXIS_MAX_DIGITS).
_GROWTH_DIGITS = 21
# numpy's own bound, NPY_MAXDIMS.
_MOST_DIMENSIONS = 64
_LETTERS = re.compile(r"[iufc]\d{1,2}|b1")
_MOST_16, _MOST_32 = 0xFFFF, 0xFFFFFFFF
# The name is UTF-8.
_UTF8 = 0x800
# 1 January 1980, the first day that a zip archive knows: the same input gives the same bytes.
_DAY = 1 << 5 | 1
# An extra field that readers skip (APPNOTE 4.5: fields of unknown ids), as torch pads its archives.
_PADDING = b"FB"
# Keys that a sentence lists.
_LISTED = 5


class _Array(NamedTuple):
    """One array of the archive."""

    name: str
    descr: str
    shape: tuple[int, ...]
    nbytes: int
    source: Source
    dtype: DType | None  # None for a text


class _Entry(NamedTuple):
    """One entry of the archive: where its local header begins, and how many bytes the unpacked file has."""

    key: str  # of its payload
    name: bytes
    nbytes: int
    offset: int

    @property
    def extra(self) -> bytes:
        """The ZIP64 field of the directory, with the numbers that need 64 bits."""
        numbers = [self.nbytes, self.nbytes] if self.nbytes >= _MOST_32 else []
        numbers += [self.offset] if self.offset >= _MOST_32 else []
        return struct.pack(f"<HH{len(numbers)}Q", 1, 8 * len(numbers), *numbers) if numbers else b""


class _Npy:
    """The bytes of an ``.npy`` file: a header, and the elements behind it. One source, so that one CRC is that of both."""

    __slots__ = ("_head", "_rest")

    def __init__(self, head: bytes, rest: Source) -> None:
        self._head = head
        self._rest = rest

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill the buffer with the bytes from that offset."""
        part = self._head[offset : offset + len(buffer)]
        buffer[: len(part)] = part
        if len(part) < len(buffer):
            self._rest.read_into(offset + len(part) - len(self._head), buffer[len(part) :])

    def extent(self) -> tuple[File, int] | None:
        """They lie nowhere in one piece."""
        return None


class NpzWriter:
    """The plan of one file. After ``plan``: ``notes`` are findings, ``root`` the flat tree that a reader will see."""

    def __init__(self, root: Node, metadata: Mapping[str, str]) -> None:
        self.notes: list[Finding] = []
        self.root = root
        # "format": "pt" is what loaders of safetensors ask for, and says nothing here.
        self._metadata = {key: text for key, text in metadata.items() if key != "format"}
        self._taken: set[str] = set()
        self._segments: list[Segment] = []
        self._entries: list[_Entry] = []
        self._position = 0

    def plan(self, source_of: Callable[[TensorEntry], Source]) -> WritePlan:
        """The file as segments. Raises ``Unsupported``, naming the keys, for tensors of dtypes that numpy hasn't."""
        tree, leaves = self.root, dict(walk(self.root))
        names = display(leaves)
        self._refuse([leaf for leaf in leaves.values() if isinstance(leaf, TensorEntry)])
        arrays: list[_Array] = []
        left_out: list[str] = []
        for shown, path in names.items():
            leaf, name = leaves[path], self._unique(shown if path else "arr_0")
            made = _array(name, leaf, source_of) if isinstance(leaf, TensorEntry) else _scalar(name, leaf.value)
            if made is None:
                left_out.append(name)
            else:
                arrays.append(made)
        if not arrays:
            raise Unsupported("there is nothing in it that an .npz can hold", hint="Write a .pth or a .safetensors")
        for array in arrays:
            self._add(array)
        self._directory()
        self.root = _flat(arrays)
        self._say(tree, left_out)
        return WritePlan("npz", self._segments)

    def _unique(self, name: str) -> str:
        """The key as an archive can have it: UTF-8, and without the NUL that ends a name for Python's own reader."""
        name = name.encode("utf-8", "backslashreplace").decode("utf-8").replace("\0", "\\x00")
        while name in self._taken:
            name += "'"
        self._taken.add(name)
        return name

    def _refuse(self, tensors: Sequence[TensorEntry]) -> None:
        """All tensors at once that numpy has no like of."""
        bad = [entry for entry in tensors if _descr(entry.dtype) is None or entry.layout != "strided"]
        if bad:
            kinds = ", ".join(
                sorted({entry.layout if entry.layout != "strided" else entry.dtype.torch for entry in bad})
            )
            raise Unsupported(
                f"numpy has no arrays of {kinds}: {_named([entry.key for entry in bad])}",
                key=bad[0].key,
                hint="Cast them: --dtype float32, or leave them out: --drop GLOB",
            )
        deep = next((entry for entry in tensors if len(entry.shape) > _MOST_DIMENSIONS), None)
        if deep is not None:
            raise Unsupported(f"numpy's arrays have at most {_MOST_DIMENSIONS} dimensions", key=deep.key)

    def _say(self, tree: Node, left_out: Sequence[str]) -> None:
        tensors = every_tensor(tree)
        listed = {id(leaf) for _, leaf in walk(tree)}
        hidden = [entry for entry in tensors if id(entry) not in listed]
        numbers = [entry.view.storage.id for entry in tensors if entry.view is not None and entry.nbytes]
        if left_out:
            what = f"{plural(len(left_out), 'value')} that an .npz holds as a pickle only, left out: {_named(left_out)}"
            self.notes.append(Finding("left-out", "warning", what, tuple(left_out)))
        if hidden or self._metadata:
            parts = [plural(len(hidden), "tensor") + " inside of other values"] if hidden else []
            parts += ["the texts of the metadata"] if self._metadata else []
            self.notes.append(
                Finding("left-out", "warning", f"an .npz has no place for {' and '.join(parts)}, left out")
            )
        if not _is_flat(tree):
            self.notes.append(Finding("flattened", "info", "an .npz has no nesting: its arrays have the dotted keys"))
        if len(set(numbers)) != len(numbers):
            what = "tensors that share memory are written as copies: an .npz can't tie them"
            self.notes.append(Finding("untied", "info", what))

    # ---------------------------------------------------------------- entries

    def _add(self, array: _Array) -> None:
        head = _npy_header(array.descr, array.shape)
        name = f"{array.name}.npy".encode()
        if len(name) > _MOST_16:
            raise Unsupported("the key is too long for an archive", key=array.name)
        entry = _Entry(array.name, name, len(head) + array.nbytes, self._position)
        long = struct.pack("<HHQQ", 1, 16, entry.nbytes, entry.nbytes) if entry.nbytes >= _MOST_32 else b""
        start = entry.offset + LOCAL.size + len(name) + len(long)
        # A field has four bytes of its own; none is needed where the elements are aligned as it is.
        padding = b"" if start % _ALIGNMENT == 0 else _PADDING + struct.pack("<H", -(start + 4) % _ALIGNMENT)
        extra = long + padding + bytes(-(start + 4) % _ALIGNMENT if padding else 0)

        def local(sums: Mapping[str, Sum]) -> bytes:
            size = min(entry.nbytes, _MOST_32)
            needed = 45 if long else 20
            fields = (b"PK\x03\x04", needed, _UTF8, 0, 0, _DAY, _crc(entry, sums), size, size, len(name), len(extra))
            return LOCAL.pack(*fields) + name + extra

        self._entries.append(entry)
        self._put(Later(LOCAL.size + len(name) + len(extra), local, (entry.key,)))
        self._put(Payload(entry.key, entry.nbytes, _Npy(head, array.source), crc=True))

    def _put(self, segment: Segment) -> None:
        self._segments.append(segment)
        self._position += segment.nbytes

    def _directory(self) -> None:
        entries, start = self._entries, self._position
        size = sum(CENTRAL.size + len(entry.name) + len(entry.extra) for entry in entries)
        tail = b""
        if len(entries) >= _MOST_16 or start + size >= _MOST_32:
            tail = END64.pack(b"PK\x06\x06", END64.size - 12, 45, 45, 0, 0, len(entries), len(entries), size, start)
            tail += LOCATOR64.pack(b"PK\x06\x07", 0, start + size, 1)
        count = min(len(entries), _MOST_16)
        tail += END.pack(b"PK\x05\x06", 0, 0, count, count, min(size, _MOST_32), min(start, _MOST_32), 0)

        def render(sums: Mapping[str, Sum]) -> bytes:
            return b"".join([_central(entry, _crc(entry, sums)) for entry in entries]) + tail

        self._put(Later(size + len(tail), render))


def _crc(entry: _Entry, sums: Mapping[str, Sum]) -> int:
    crc = sums[entry.key].crc
    assert crc is not None
    return crc


def _central(entry: _Entry, crc: int) -> bytes:
    extra = entry.extra
    size, offset, needed = min(entry.nbytes, _MOST_32), min(entry.offset, _MOST_32), 45 if extra else 20
    fields = (
        b"PK\x01\x02",
        needed,
        needed,
        _UTF8,
        0,
        0,
        _DAY,
        crc,
        size,
        size,
        len(entry.name),
        len(extra),
        0,
        0,
        0,
        0,
        offset,
    )
    return CENTRAL.pack(*fields) + entry.name + extra


# -------------------------------------------------------------------- arrays


def _descr(dtype: DType) -> str | None:
    """numpy's name of a dtype in the header of an array; None for one that numpy itself hasn't."""
    letters = {"bool": "b1"}.get(dtype.torch, dtype.numpy.lstrip("<"))
    if not _LETTERS.fullmatch(letters) or BY_NUMPY.get(letters) is not dtype:
        return None
    return f"|{letters}" if dtype.bits == 8 else f"<{letters}"


def _array(name: str, entry: TensorEntry, source_of: Callable[[TensorEntry], Source]) -> _Array:
    descr = _descr(entry.dtype)
    assert descr is not None
    return _Array(name, descr, entry.shape, entry.nbytes, source_of(entry), entry.dtype)


def _scalar(name: str, value: object) -> _Array | None:
    """A number or a text as an array without dimensions; None for what numpy would pickle, or not give back."""
    dtype: str | None = None
    data = b""
    if isinstance(value, NumpyScalar):
        dtype, data = value.dtype, value.data
    elif type(value) is bool:
        dtype, data = "b1", struct.pack("<?", value)
    elif type(value) is int and -(1 << 63) <= value < 1 << 64:
        dtype, data = ("i8", struct.pack("<q", value)) if value < 1 << 63 else ("u8", struct.pack("<Q", value))
    elif type(value) is float:
        dtype, data = "f8", struct.pack("<d", value)
    elif type(value) is complex:
        dtype, data = "c16", struct.pack("<dd", value.real, value.imag)
    elif type(value) is str and not value.endswith("\0"):
        # numpy pads texts with NULs, and takes those at the end for padding.
        text = value.encode("utf-32-le", "surrogatepass") or bytes(4)
        return _Array(name, f"<U{len(text) // 4}", (), len(text), MemorySource(text), None)
    known = BY_NUMPY.get(dtype) if dtype is not None else None
    descr = None if known is None else _descr(known)
    return None if descr is None else _Array(name, descr, (), len(data), MemorySource(data), known)


def _npy_header(descr: str, shape: tuple[int, ...]) -> bytes:
    """The header as numpy writes it, version 1.0: as long as to end at a multiple of 64."""
    text = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}"
    if shape:
        text += " " * (_GROWTH_DIGITS - len(str(shape[0])))
    length = len(text) + 1
    length += -(10 + length) % _ALIGNMENT
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", length) + text.encode("latin-1").ljust(length - 1) + b"\n"


def _is_flat(tree: Node) -> bool:
    """Whether dotted keys are all that there is to say of the nesting."""
    if not isinstance(tree, Container) or tree.kind != "dict":
        return False
    return all(type(key) is str and not isinstance(child, Container) for key, child in zip(tree.keys, tree.children))


def _flat(arrays: Sequence[_Array]) -> Container:
    """The tree of the written archive, as far as its structure goes."""
    nodes: list[Node] = []
    for number, array in enumerate(arrays):
        path = (array.name,)
        if array.dtype is None:
            nodes.append(ObjectEntry(path, "opaque", Opaque("numpy", "ndarray", (array.shape, array.descr))))
            continue
        view = StorageView(Storage(number, array.nbytes), 0, packed_stride(array.shape))
        nodes.append(TensorEntry(path, array.dtype, array.shape, view, device=None, kind="ndarray"))
    return Container("dict", [array.name for array in arrays], nodes)


def _named(names: Sequence[str]) -> str:
    shown = ", ".join([f"'{one_line(name)}'" for name in names[:_LISTED]])
    return f"{shown} and {len(names) - _LISTED:,} more" if len(names) > _LISTED else shown
