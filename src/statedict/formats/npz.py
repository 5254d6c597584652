"""numpy's formats: one array in an ``.npy`` file, and an ``.npz`` zip archive of such files.

    0 · 6      b"\\x93NUMPY"
    6 · 2      version: 1.0, 2.0 or 3.0
    8 · 2 / 4  length n of the header, little-endian: 2 bytes in version 1.0, else 4
    then n     a Python dict as text, padded by spaces: {'descr': '<f4', 'fortran_order': False, 'shape': (3, 4), }
    rest       the elements, packed, last index fastest, or first index fastest in Fortran order

The text is latin-1, and UTF-8 in version 3.0. Source: numpy ``lib/_format_impl.py`` (its docstring is NEP 1), and for the
keys of an archive (an entry's name without ``.npy``) ``lib/_npyio_impl.py``, ``NpzFile``.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Sequence
from functools import lru_cache
from math import prod
from typing import NamedTuple

from statedict.dtypes import BY_NUMPY, DType
from statedict.errors import CorruptFile, Unsupported, one_line
from statedict.formats import zips
from statedict.io.ranges import File
from statedict.keys import Path
from statedict.limits import DEFAULT_LIMITS, Limits
from statedict.manifest import (
    Container,
    Extent,
    FileFact,
    Finding,
    Manifest,
    Node,
    ObjectEntry,
    Opaque,
    Storage,
    StorageView,
    TensorEntry,
)
from statedict.views import packed_stride

__all__ = ["read_npy_manifest", "read_npz_manifest"]

_MAGIC = b"\x93NUMPY"
# Bytes read at first: numpy pads the header of a plain array to 128 or less.
_FIRST_NBYTES = 256
# The longest header that is parsed; numpy refuses longer ones too, unless it is told otherwise.
_MOST_HEADER = 10_000
# numpy's own bound, NPY_MAXDIMS.
_MOST_DIMENSIONS = 64
# numpy counts bytes in a signed 64-bit number, even where a dimension of zero makes them none.
_MOST_NBYTES = 2**63 - 1
# Keys that a finding lists.
_LISTED = 20
_CUT = "The file was cut short or damaged: download or copy it again"
_PLAIN = re.compile(r"[<>|=]?(?:[iufc]\d{1,2}|b1|\?)")
# Python 2 wrote long integers with an L.
_TOKEN = re.compile(
    r"\s*(?:(?P<word>[][(){},:]|True\b|False\b|None\b)|(?P<text>'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\")|(?P<number>-?\d+)L?\b)",
    re.DOTALL,
)
_JSON = {"(": "[", ")": "]", "True": "true", "False": "false", "None": "null"}

_NOTES = {
    "object-array": (
        "warning",
        "hold Python objects, as a pickle that is not read",
        "Save the numbers as an array of their own dtype",
    ),
    "unnamed-dtype": (
        "warning",
        "are of a dtype that numpy writes without its name, bfloat16 or a float8 of ml_dtypes as a rule, and are not read",
        "numpy gives their values by array.view(ml_dtypes.bfloat16)",
    ),
    "opaque-array": ("info", "hold texts, dates or records and are not read", ""),
    "long-header": ("warning", f"have a header above {_MOST_HEADER:,} bytes, which is not parsed", ""),
    "trailing-bytes": ("warning", "are followed by bytes that belong to nothing", ""),
}


class _Header(NamedTuple):
    """What stands before the elements of one array."""

    start: int  # bytes from the start of the array's file to its first element
    descr: object  # the dtype as numpy wrote it: a text, or a list of fields; None if the header was not parsed
    fortran: bool
    shape: tuple[int, ...]


class _Source(NamedTuple):
    """The file of one array: a whole ``.npy``, or an entry of an archive."""

    key: str  # for messages; "" for an .npy
    path: str
    offset: int  # where its first byte lies in the file, wrapped or not
    nbytes: int  # unwrapped
    first: Callable[[int], bytes]  # its first bytes, so many
    entry: zips.ZipEntry | None

    def bad(self, what: str, **facts: object) -> CorruptFile:
        """The error of that array."""
        return CorruptFile(what, path=self.path, key=self.key or None, offset=self.offset, **facts)  # type: ignore[arg-type]


def read_npy_manifest(files: Sequence[File], limits: Limits = DEFAULT_LIMITS) -> Manifest:
    """The array of an ``.npy`` file, under the empty path; its header is read, its elements are not.

    An array of objects, texts, dates or records is an ``ObjectEntry`` without values. Raises ``CorruptFile`` where the header
    can't be or the file ends before the elements do.
    """
    file = files[0]
    source = _Source("", file.path, 0, file.nbytes, lambda count: file.read(0, count), None)
    notes = _Notes()
    node = _node(source, (), 0, notes, limits)
    return _manifest("npy", file, [node], node, notes.findings())


def read_npz_manifest(files: Sequence[File], limits: Limits = DEFAULT_LIMITS) -> Manifest:
    """The arrays of an ``.npz`` archive by name. Reads its directory, and the header of each array.

    The storage of a compressed array is its whole unpacked entry, the header included. Entries that are no arrays become a
    finding. Raises ``CorruptFile`` as ``read_npy_manifest`` and ``zips.read_directory`` do.
    """
    file = files[0]
    entries = zips.read_directory(file, limits, fold=False).entries
    arrays = [entry for entry in entries if entry.name.endswith(".npy")]
    others = [entry.name for entry in entries if not entry.name.endswith((".npy", "/"))]
    notes = _Notes()
    nodes: list[TensorEntry | ObjectEntry] = []
    for number, (entry, offset) in enumerate(zip(arrays, zips.data_offsets(file, arrays))):
        key = entry.name.removesuffix(".npy")
        source = _Source(key, file.path, offset, entry.nbytes, _beginning(file, entry, offset), entry)
        nodes.append(_node(source, (key,), number, notes, limits))
    findings = notes.findings()
    if others:
        message = f"the archive also has entries that are no arrays and are not shown: {_named(others)}"
        findings.append(Finding("other-entries", "warning", message))
    root = Container("dict", [str(node.path[0]) for node in nodes], nodes)
    return _manifest("npz", file, nodes, root, findings)


def _manifest(
    kind: str, file: File, nodes: Sequence[TensorEntry | ObjectEntry], root: Node, notes: list[Finding]
) -> Manifest:
    tensors = {node.path: node for node in nodes if isinstance(node, TensorEntry)}
    objects = {node.path: node for node in nodes if isinstance(node, ObjectEntry)}
    storages = tuple(entry.view.storage for entry in tensors.values() if entry.view is not None)
    return Manifest(kind, (FileFact(file.path, file.nbytes),), storages, tensors, objects, root, {}, tuple(notes))


class _Notes:
    """What is odd about arrays, by code."""

    def __init__(self) -> None:
        self._keys: dict[str, list[str]] = {}

    def add(self, code: str, key: str) -> None:
        """Note it about the array of that key."""
        self._keys.setdefault(code, []).append(key)

    def findings(self) -> list[Finding]:
        """One finding for each code."""
        found = []
        for code, keys in self._keys.items():
            level, what, hint = _NOTES[code]
            message = f"arrays {what}: {_named(keys)}" if any(keys) else f"the elements {what}"
            found.append(Finding(code, level, f"{message}. {hint}" if hint else message, tuple(filter(None, keys))))
        return found


def _named(names: Sequence[str]) -> str:
    shown = ", ".join([f"'{one_line(name)}'" for name in names[:_LISTED]])
    return f"{shown} and {len(names) - _LISTED:,} more" if len(names) > _LISTED else shown


def _beginning(file: File, entry: zips.ZipEntry, offset: int) -> Callable[[int], bytes]:
    """Reads the first bytes of an entry, unpacking no more than those."""
    if entry.method == zips.STORED:
        return lambda count: file.read(offset, count)

    def first(count: int) -> bytes:
        unwrap = zlib.decompressobj(-15)
        data, position = b"", 0
        try:
            while len(data) < count and position < entry.packed_nbytes and not unwrap.eof:
                packed = file.read(offset + position, min(4096, entry.packed_nbytes - position))
                position += len(packed)
                data += unwrap.decompress(unwrap.unconsumed_tail + packed, count - len(data))
        except zlib.error as error:
            raise CorruptFile(
                f"entry '{one_line(entry.name)}' can't be unpacked: {error}", path=file.path, offset=offset, hint=_CUT
            ) from error
        return data

    return first


# -------------------------------------------------------------------- one array


def _node(source: _Source, path: Path, number: int, notes: _Notes, limits: Limits) -> TensorEntry | ObjectEntry:
    header = _header(source, limits)
    dtype = _dtype(header.descr)
    if dtype is None:
        notes.add(_oddity(header.descr), source.key)
        descr = header.descr if header.descr is None or isinstance(header.descr, str) else repr(header.descr)
        return ObjectEntry(path, "opaque", Opaque("numpy", "ndarray", (header.shape, descr)))
    nbytes = dtype.nbytes(prod(header.shape))
    left = source.nbytes - header.start
    if nbytes > left:
        raise source.bad(
            "the array is cut short",
            expected=f"{nbytes} bytes for {dtype} {list(header.shape)} behind the header of {header.start}",
            found=f"{left}",
            hint=_CUT,
        )
    if nbytes < left:
        notes.add("trailing-bytes", source.key)
    view = _view(source, header, dtype, number)
    return TensorEntry(path, dtype, header.shape, view, device=None, kind="ndarray")


def _view(source: _Source, header: _Header, dtype: DType, number: int) -> StorageView:
    entry, start = source.entry, header.start
    nbytes = dtype.nbytes(prod(header.shape))
    byteorder = "big" if str(header.descr).startswith(">") and dtype.swap > 1 else "little"
    offset, crc = 0, None
    extent = Extent(0, source.offset + start, nbytes)
    if entry is not None and entry.method == zips.DEFLATED:
        offset, odd = divmod(start, dtype.itemsize)
        if odd:
            raise Unsupported(
                f"the compressed array has a header of {start} bytes, which is no multiple of its elements' "
                f"{dtype.itemsize}",
                path=source.path,
                key=source.key,
                hint="Save it again with numpy.savez, or unpack the archive",
            )
        # The check sum is that of the whole entry, and so is this storage.
        extent, nbytes, crc = zips.extent(entry, source.offset), entry.nbytes, entry.crc or None
    shape = header.shape
    stride = packed_stride(shape[::-1])[::-1] if header.fortran else packed_stride(shape)
    name = "array" if entry is None else entry.name
    return StorageView(Storage(number, nbytes, extent, None, byteorder, crc, name), offset, stride)


def _dtype(descr: object) -> DType | None:
    """The dtype of plain numbers; None for everything else, and for a header that was not parsed."""
    if not isinstance(descr, str) or not _PLAIN.fullmatch(descr):
        return None
    return BY_NUMPY.get(descr.lstrip("<>|="))


def _oddity(descr: object) -> str:
    if descr is None:
        return "long-header"
    # numpy looks for objects in the fields of a record as well; the letter stands at the end of a field's dtype.
    text = descr if isinstance(descr, str) else repr(descr)
    if re.search(r"(?:^|')[<>|=]?O(?:8)?(?:'|$)", text):
        return "object-array"
    return "unnamed-dtype" if re.fullmatch(r"[<>|=]V[12]", text) else "opaque-array"


# -------------------------------------------------------------------- the header


def _header(source: _Source, limits: Limits) -> _Header:
    """The header of an array, whose length is checked before it is read. Raises ``CorruptFile`` if it can't be one."""
    data = source.first(min(_FIRST_NBYTES, source.nbytes))
    if data[: len(_MAGIC)] != _MAGIC[: len(data)]:
        raise source.bad(
            "this is no array of numpy's", expected=repr(_MAGIC), found=repr(data[: len(_MAGIC)]), hint=_CUT
        )
    version = data[6:8]
    wide = 2 if version == b"\x01\x00" else 4
    if len(version) == 2 and version not in (b"\x01\x00", b"\x02\x00", b"\x03\x00"):
        raise source.bad(
            "the version of the array's format is unknown",
            expected="1.0, 2.0 or 3.0",
            found=f"{version[0]}.{version[1]}",
            hint="The file is damaged, or newer than this program",
        )
    start = 8 + wide + int.from_bytes(data[8 : 8 + wide], "little")
    if len(data) < 8 + wide or start > source.nbytes:
        raise source.bad(
            "the array's header is cut short", expected=f"{max(start, 8 + wide)} bytes", found=source.nbytes, hint=_CUT
        )
    limits.check("header_bytes", start, "the array's header is too long", path=source.path, key=source.key or None)
    if start > _MOST_HEADER:
        return _Header(start, None, False, ())
    data = data if start <= len(data) else source.first(start)
    try:
        text = data[8 + wide : start].decode("utf-8" if version == b"\x03\x00" else "latin-1")
        return _Header(start, *_facts(text))
    except (ValueError, RecursionError) as error:
        reason = one_line(error) if type(error) is ValueError else type(error).__name__
        raise source.bad(f"the array's header can't be: {reason}", hint=_CUT) from error


def _literal(text: str) -> object:
    """The Python literal in a text, of dicts, lists, tuples (as lists), texts, whole numbers, True, False and None.

    It is rewritten as JSON, whose parser has no surprises: Python's own warns about odd literals, on a stream that isn't ours,
    and may need a stack that isn't there. An escape inside a text stays as it is written. Raises ``ValueError``.
    """
    # Needed for numpy's formats only.
    import json

    out: list[str] = []
    position, text = 0, text.strip()
    while position < len(text):
        token = _TOKEN.match(text, position)
        if token is None:
            raise ValueError(f"{text[position : position + 20]!r} is not what stands there")
        position = token.end()
        if token["text"] is not None:
            out.append(json.dumps(token["text"][1:-1]))
        elif token["number"] is not None:
            out.append(token["number"])
        else:
            word = _JSON.get(token["word"], token["word"])
            if word in ("]", "}") and out and out[-1] == ",":
                out.pop()
            out.append(word)
    try:
        return json.loads("".join(out))
    except ValueError as error:
        raise ValueError("it is no Python dict") from error


# The layers of a model have headers alike: remembering the last ones made opening 10,000 arrays twice as fast.
@lru_cache(maxsize=32)
def _facts(text: str) -> tuple[object, bool, tuple[int, ...]]:
    """Descr, Fortran order and shape in the text of a header. Raises ``ValueError``."""
    facts = _literal(text)
    if not isinstance(facts, dict) or set(facts) != {"descr", "fortran_order", "shape"}:
        raise ValueError("it must have the keys descr, fortran_order and shape, and no others")
    descr, fortran, shape = facts["descr"], facts["fortran_order"], facts["shape"]
    if type(fortran) is not bool:
        raise ValueError("fortran_order must be True or False")
    if not isinstance(descr, (str, list)):
        raise ValueError("descr must be a text or a list of fields")
    if not isinstance(shape, list) or not all(type(size) is int and size >= 0 for size in shape):
        raise ValueError("shape must be a tuple of sizes")
    dtype = _dtype(descr)
    extent = prod(filter(None, shape)) * (dtype.itemsize if dtype is not None else 1)
    if len(shape) > _MOST_DIMENSIONS or extent > _MOST_NBYTES:
        raise ValueError(f"no array has the shape {one_line(shape)}")
    return descr, fortran, tuple(shape)
