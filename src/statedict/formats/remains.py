"""What is left of a checkpoint that was cut short: which of its tensors are still whole.

The beginning of each format says what the whole file held: the first record of torch's zip is the pickle with all names and sizes, a
stream of torch's before 1.6 begins with its pickles, safetensors with its header. The records behind it are walked as they stand;
the directory at the end of a zip isn't needed. A zip record of torch's has its length and CRC-32 behind its bytes (PKWARE APPNOTE.TXT
6.3.10, 4.3.9, data descriptor), so lengths come from the pickle. Nothing but these lengths is read of the tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from statedict.errors import StateDictError
from statedict.formats.pickles import Machine
from statedict.formats.records import StorageRef
from statedict.formats.torch_legacy import MAGIC, PROTOCOL
from statedict.formats.torch_zip import name_of, storage_ref
from statedict.formats.value_tree import TreeBuilder
from statedict.formats.zips import LOCAL
from statedict.io.ranges import File
from statedict.keys import dotted
from statedict.limits import DEFAULT_LIMITS, Limits
from statedict.manifest import Storage, TensorEntry

__all__ = ["Remains", "remains_of"]

# A data descriptor with its magic and two lengths of four bytes, or of eight in a ZIP64 entry.
_DESCRIPTOR = b"PK\x07\x08"
_DESCRIPTOR_NBYTES = (16, 24)
# Small records of torch's (version, byte order, the padding behind each) end within so many bytes.
_SMALL_NBYTES = 64 * 1024


class Remains(NamedTuple):
    """The keys of the tensors that are whole, and of those that aren't.

    ``nbytes`` is how long the file was to be, at least where ``is_least``: a zip archive has padding and a directory beside its tensors.
    """

    whole: tuple[str, ...]
    lost: tuple[str, ...]
    nbytes: int
    is_least: bool = False


def remains_of(file: File, limits: Limits = DEFAULT_LIMITS) -> Remains | None:
    """What is left of the file; None where its beginning doesn't say what it held. Raises nothing that the file causes."""
    try:
        head = file.read(0, min(file.nbytes, 512))
        if head.startswith(b"PK\x03\x04"):
            return _zip(file, head, limits)
        if len(head) >= 9 and head[8:].lstrip(b" ")[:1] == b"{":
            return _safetensors(file, limits)
        return _legacy(file, limits)
    except StateDictError:
        return None


def _zip(file: File, head: bytes, limits: Limits) -> Remains | None:
    first = _header(file, 0)
    if first is None or not first[0].endswith("/data.pkl"):
        return None
    folder = first[0][: -len("data.pkl")]
    refs: dict[str, StorageRef] = {}
    value, end = _pickle(file, first[1], _refs(refs, 5), limits)
    nbytes = {f"{folder}data/{key}": ref.nbytes for key, ref in refs.items()}
    whole: set[str] = set()
    for name, start in _records(file, end, nbytes):
        if name in nbytes and start + nbytes[name] <= file.nbytes:
            whole.add(name[len(folder) + len("data/") :])
    least = end + sum(nbytes.values())
    return _sorted(file, value, refs, whole, least, limits)._replace(is_least=True)


def _records(file: File, at: int, nbytes: Mapping[str, int]) -> Iterator[tuple[str, int]]:
    """The name of each record and where its bytes begin, as far as they can be followed. ``at`` is the end of the one before."""
    while True:
        found = _behind(file, at)
        header = None if found is None else _header(file, found)
        if header is None:
            return
        yield header
        at = header[1] + nbytes.get(header[0], 0)


def _behind(file: File, at: int) -> int | None:
    """Where the local header begins that follows a record which ends at that byte or, if it is a small one, soon after."""
    window = file.read(at, max(0, min(_SMALL_NBYTES, file.nbytes - at))) if at < file.nbytes else b""
    mark = window.find(_DESCRIPTOR)
    # An entry that was written with its length in front has no descriptor.
    starts = [mark + size for size in _DESCRIPTOR_NBYTES] if mark >= 0 else [window.find(b"PK\x03\x04")]
    return next((at + start for start in starts if start >= 0 and window[start : start + 4] == b"PK\x03\x04"), None)


def _header(file: File, at: int) -> tuple[str, int] | None:
    """The name of the record whose local header is at that byte, and where its bytes begin."""
    if at + LOCAL.size > file.nbytes:
        return None
    magic, _, _, method, _, _, _, _, _, n_name, n_extra = LOCAL.unpack(file.read(at, LOCAL.size))
    start = at + LOCAL.size + n_name + n_extra
    if magic != b"PK\x03\x04" or method or start > file.nbytes:
        return None
    return file.read(at + LOCAL.size, n_name).decode("utf-8", "replace"), start


def _legacy(file: File, limits: Limits) -> Remains | None:
    refs: dict[str, StorageRef] = {}
    persistent = _refs(refs, 6)
    at = 0
    for wanted in (MAGIC, PROTOCOL):
        found, at = _pickle(file, at, persistent, limits)
        if found != wanted:
            return None
    _, at = _pickle(file, at, persistent, limits)
    value, at = _pickle(file, at, persistent, limits)
    keys, at = _pickle(file, at, persistent, limits)
    whole: set[str] = set()
    for key in keys if isinstance(keys, (list, tuple)) else ():
        name = name_of(key)
        if name not in refs:
            return None
        at += 8 + refs[name].nbytes
        if at <= file.nbytes:
            whole.add(name)
    return _sorted(file, value, refs, whole, at, limits)


def _refs(refs: dict[str, StorageRef], fields: int) -> Callable[[object], object]:
    """What takes in the persistent ids of a pickle: references to storages, and the modules of old files."""

    def persistent(pid: object) -> object:
        if isinstance(pid, tuple) and len(pid) > 1 and pid[0] in ("module", b"module"):
            return pid[1]
        ref = storage_ref(pid, fields=fields)
        root = refs.setdefault(ref.key, ref)
        view = pid[5] if isinstance(pid, tuple) and len(pid) == 6 else None
        if isinstance(view, tuple) and len(view) == 3 and type(view[1]) is int and 0 <= view[1] < 2**63:
            return StorageRef(ref.key, ref.dtype, ref.numel, ref.device, view[1])
        return root

    return persistent


def _pickle(file: File, at: int, persistent: Callable[[object], object], limits: Limits) -> tuple[object, int]:
    machine = Machine(file, offset=at, persistent=persistent, limits=limits)
    value = machine.run()
    return value, machine.offset


def _sorted(
    file: File, value: object, refs: Mapping[str, StorageRef], whole: set[str], nbytes: int, limits: Limits
) -> Remains:
    """The tensors of the value by whether their storage is whole."""

    numbers = {key: number for number, key in enumerate(refs)}

    def storage(ref: StorageRef) -> Storage:
        nbytes = max(refs.get(ref.key, ref).nbytes, ref.nbytes)
        return Storage(numbers.get(ref.key, len(numbers)), nbytes, None, None, "little", None, ref.key)

    tree = TreeBuilder(storage, limits, path=file.path).build(value)
    keys: dict[bool, list[str]] = {True: [], False: []}
    for path, entry in tree.tensors.items():
        keys[all(name in whole for name in _storages(entry))].append(dotted(path))
    return Remains(tuple(keys[True]), tuple(keys[False]), nbytes)


def _storages(entry: TensorEntry) -> Iterator[str]:
    """The names of the storages of a tensor with bytes."""
    for part in (entry, *entry.parts.values()):
        if part.view is not None and part.view.storage.nbytes:
            yield part.view.storage.name


def _safetensors(file: File, limits: Limits) -> Remains | None:
    import json

    length = int.from_bytes(file.read(0, 8), "little")
    if length > file.nbytes - 8 or length > limits.header_bytes:
        return None
    try:
        header = json.loads(file.read(8, length))
        ends = {name: int(facts["data_offsets"][1]) for name, facts in header.items() if name != "__metadata__"}
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
        return None
    start = 8 + length
    whole = tuple([name for name, end in ends.items() if start + end <= file.nbytes])
    lost = tuple([name for name, end in ends.items() if start + end > file.nbytes])
    return Remains(whole, lost, start + max(ends.values(), default=0))
