"""torch's oldest format, before 0.1.10: a tar archive of four members, of which three are read.

    storages   pickle n · n × { pickle (key, location, class) · int64 numel · the bytes } · pickle [(view, root, offset, numel)]
    tensors    pickle n · n × { pickle (key, storage key, class) · int32 ndim · 4 bytes · ndim × int64 size ·
               ndim × int64 stride · int64 offset }
    pickle     the object; persistent ids are keys of tensors and storages, or ("module", class, source file, source)

torch itself reads it only by running its pickles (``weights_only=True`` refuses it). Source: torch 2.13 ``serialization.py``,
``legacy_load``.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from itertools import islice
from typing import cast

from statedict.errors import CorruptFile, one_line
from statedict.formats.pickles import Machine
from statedict.formats.records import Global, StorageRef, TensorRecord, shown
from statedict.formats.tensor_constructors import storage_dtype
from statedict.formats.torch_zip import name_of
from statedict.formats.value_tree import TreeBuilder
from statedict.io.ranges import File, Slice
from statedict.limits import DEFAULT_LIMITS, Limits
from statedict.manifest import Extent, FileFact, Manifest, Storage

__all__ = ["members", "read_manifest"]

# A checkpoint has four.
_MOST_MEMBERS = 1000
_DAMAGED = "The archive was cut short or damaged: download or copy it again"


class _Reader(io.RawIOBase):
    """A file as the stream that ``tarfile`` wants."""

    def __init__(self, file: File) -> None:
        self._file = file
        self._pos = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        self._pos = max(0, offset + (0, self._pos, self._file.nbytes)[whence])
        return self._pos

    def tell(self) -> int:
        return self._pos

    def read(self, size: int | None = -1) -> bytes:
        left = max(0, self._file.nbytes - self._pos)
        count = left if size is None or size < 0 else min(size, left)
        data = self._file.read(self._pos, count) if count else b""
        self._pos += count
        return data


def members(file: File) -> dict[str, tuple[int, int]]:
    """The regular members of a tar archive: name, offset and length in bytes. The first 1,000 are looked at.

    Raises ``CorruptFile`` if it can't be read as one.
    """
    import tarfile

    found: dict[str, tuple[int, int]] = {}
    try:
        with tarfile.open(fileobj=cast("io.BufferedReader", _Reader(file)), mode="r:") as archive:
            # Members are counted, not names: a size below zero leads back to a header that was there before.
            for member in islice(archive, _MOST_MEMBERS):
                if member.isreg() and not member.issparse():
                    found.setdefault(member.name.removeprefix("./"), (member.offset_data, member.size))
    except (tarfile.TarError, ValueError, OverflowError, EOFError, RecursionError) as error:
        # tarfile recurses where one header belongs to the next one.
        reason = "its headers are nested" if isinstance(error, RecursionError) else one_line(error)
        raise CorruptFile(
            f"the tar archive can't be read: {reason}", path=file.path, found=f"{file.nbytes} bytes", hint=_DAMAGED
        ) from error
    return found


def read_manifest(files: Sequence[File], limits: Limits = DEFAULT_LIMITS) -> Manifest:
    """What the archive holds. Reads its members' headers and pickles; no tensor byte.

    Raises ``CorruptFile`` where a member is missing, ends early, or refers to something that isn't there.
    """
    file = files[0]
    places = members(file)
    parts = {}
    for name in ("storages", "tensors", "pickle"):
        if name not in places:
            raise CorruptFile(
                f"the tar archive has no member '{name}'",
                path=file.path,
                found=f"an archive of {file.nbytes} bytes",
                hint=_DAMAGED,
            )
        parts[name] = (Slice(file, *places[name], name), places[name][0])
    storages, refs = _Storages(*parts["storages"], limits).read()
    tensors = _read_tensors(parts["tensors"][0], refs, limits)
    sources: dict[str, str] = {}

    def persistent(pid: object) -> object:
        if isinstance(pid, tuple):
            if pid and isinstance(pid[0], Global) and isinstance(pid[-1], str):
                sources[pid[0].type] = pid[-1]
            return pid[0] if pid else None
        name = name_of(pid)
        found = tensors.get(name) or refs.get(name)
        if found is None:
            raise CorruptFile(f"there is no tensor '{name}'", hint=_DAMAGED)
        return found

    value = Machine(parts["pickle"][0], persistent=persistent, limits=limits).run()
    tree = TreeBuilder(lambda ref: storages[ref.key], limits, path=file.path, sources=sources).build(value)
    facts = (FileFact(file.path, file.nbytes),)
    return Manifest(
        "torch-tar", facts, tuple(storages.values()), tree.tensors, tree.objects, tree.root, {}, tuple(tree.notes)
    )


class _Storages:
    """The member ``storages``."""

    def __init__(self, file: File, base: int, limits: Limits) -> None:
        self._file = file
        self._base = base  # of the member in the archive
        self._limits = limits
        self._offset = 0

    def _next(self) -> object:
        machine = Machine(self._file, offset=self._offset, persistent=_none, limits=self._limits)
        value = machine.run()
        self._offset = machine.offset
        return value

    def read(self) -> tuple[dict[str, Storage], dict[str, StorageRef]]:
        """The storages by key, and a reference for every key and view."""
        storages: dict[str, Storage] = {}
        refs: dict[str, StorageRef] = {}
        for number in range(_count(self._next(), self._file)):
            facts = self._next()
            dtype = storage_dtype(facts[2]) if isinstance(facts, tuple) and len(facts) == 3 else None
            if not isinstance(facts, tuple) or dtype is None:
                raise CorruptFile(
                    "a storage is described wrongly", path=self._file.path, offset=self._offset, hint=_DAMAGED
                )
            key, device = name_of(facts[0]), name_of(facts[1])
            numel = int.from_bytes(self._file.read(self._offset, 8), "little", signed=True)
            refs[key] = StorageRef(key, dtype, numel, device)
            nbytes = refs[key].nbytes
            if numel < 0 or self._offset + 8 + nbytes > self._file.nbytes:
                raise CorruptFile(
                    f"storage '{key}' has no proper length", path=self._file.path, offset=self._offset, found=numel
                )
            extent = Extent(0, self._base + self._offset + 8, nbytes)
            storages[key] = Storage(number, nbytes, extent, None, "little", None, key)
            self._offset += 8 + nbytes
        self._read_views(refs)
        return storages, refs

    def _read_views(self, refs: dict[str, StorageRef]) -> None:
        views = self._next()
        for view in views if isinstance(views, (list, tuple)) else ():
            target, root, offset, numel = view if isinstance(view, (list, tuple)) and len(view) == 4 else (None,) * 4
            base = refs.get(name_of(root)) if root is not None else None
            if base is None or type(offset) is not int or type(numel) is not int or offset < 0 or numel < 0:
                raise CorruptFile("a view of a storage is described wrongly", path=self._file.path, offset=self._offset)
            refs[name_of(target)] = StorageRef(base.key, base.dtype, numel, base.device, base.view_offset + offset)


def _none(pid: object) -> object:
    raise CorruptFile("a persistent id stands where none can be", found=shown(pid))


def _count(value: object, file: File) -> int:
    """A number of records, each of which takes at least one byte."""
    if type(value) is not int or not 0 <= value <= file.nbytes:
        raise CorruptFile("a member begins with no proper count", path=file.path, found=shown(value), hint=_DAMAGED)
    return value


def _read_tensors(file: File, refs: dict[str, StorageRef], limits: Limits) -> dict[str, TensorRecord]:
    machine = Machine(file, persistent=_none, limits=limits)
    count = _count(machine.run(), file)
    offset = machine.offset
    tensors: dict[str, TensorRecord] = {}
    for _ in range(count):
        machine = Machine(file, offset=offset, persistent=_none, limits=limits)
        facts = machine.run()
        offset = machine.offset
        if not isinstance(facts, tuple) or len(facts) != 3:
            raise CorruptFile("a tensor is described wrongly", path=file.path, offset=offset, hint=_DAMAGED)
        key, storage_key = name_of(facts[0]), name_of(facts[1])
        ndim = int.from_bytes(file.read(offset, 4), "little", signed=True)
        if ndim < 0 or offset + 8 + 16 * ndim + 8 > file.nbytes:
            raise CorruptFile(
                f"tensor '{key}' has no proper number of dimensions", path=file.path, offset=offset, found=ndim
            )
        raw = file.read(offset + 8, 16 * ndim + 8)
        numbers = [int.from_bytes(raw[i : i + 8], "little", signed=True) for i in range(0, len(raw), 8)]
        offset += 8 + len(raw)
        ref = refs.get(storage_key)
        if ref is None or min(numbers) < 0:
            raise CorruptFile(
                f"tensor '{key}' is no view of a storage of the archive", path=file.path, offset=offset, hint=_DAMAGED
            )
        shape, stride = tuple(numbers[:ndim]), tuple(numbers[ndim : 2 * ndim])
        tensors[key] = TensorRecord(ref, ref.dtype, numbers[-1], shape, stride)
    return tensors
