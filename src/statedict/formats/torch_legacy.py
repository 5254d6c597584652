"""torch's first stream format, written by default until 1.5: pickles one behind the other, then the storages.

    pickle  0x1950A86A20F9469CFC6C   magic number
    pickle  1001                     protocol version
    pickle  {protocol_version, little_endian, type_sizes}
    pickle  the object; its storages are ("storage", class, key, location, numel, view or None)
    pickle  [key, …]
    then for each key: int64 numel · the bytes

A plain pickle (``pickle.dump`` of arrays, tensors or anything) is the same without the rest. Source: torch 2.13
``serialization.py``, ``_legacy_save`` and ``_legacy_load``. The recorded byte order is ignored there, and here.
"""

from __future__ import annotations

from collections.abc import Sequence

from statedict.errors import CorruptFile
from statedict.formats.pickles import Machine
from statedict.formats.records import Blob, Global, StorageRef, Unfit, shown
from statedict.formats.torch_zip import name_of, storage_ref
from statedict.formats.value_tree import TreeBuilder
from statedict.io.ranges import File, MemoryFile, Slice
from statedict.limits import DEFAULT_LIMITS, Limits
from statedict.manifest import Extent, FileFact, Finding, Manifest, Storage

__all__ = ["MAGIC", "PROTOCOL", "read_manifest", "read_pickle_manifest"]

MAGIC = 0x1950A86A20F9469CFC6C
PROTOCOL = 1001
_DAMAGED = "The file was cut short or damaged: download or copy it again"


class _Stream:
    """The pickles of one legacy file, and what their persistent ids named."""

    def __init__(self, file: File, limits: Limits) -> None:
        self.file = file
        self.limits = limits
        self.offset = 0
        self.refs: dict[str, StorageRef] = {}
        self.sources: dict[str, str] = {}

    def next(self) -> object:
        """The value of the next pickle."""
        machine = Machine(self.file, offset=self.offset, persistent=self._persistent, limits=self.limits)
        value = machine.run()
        self.offset = machine.offset
        return value

    def header(self) -> dict[object, object]:
        """The system information, once the magic number and the version are right."""
        for name, wanted in (("magic number", MAGIC), ("protocol version", PROTOCOL)):
            found = self.next()
            if found != wanted:
                raise CorruptFile(
                    f"the {name} of the stream is wrong", path=self.file.path, expected=wanted, found=shown(found)
                )
        info = self.next()
        return info if isinstance(info, dict) else {}

    def _persistent(self, pid: object) -> object:
        if isinstance(pid, tuple) and len(pid) > 1 and pid[0] in ("module", b"module"):
            # ("module", class, source file, source text): the text is kept to be searched.
            if isinstance(pid[1], Global) and isinstance(pid[-1], str):
                self.sources[pid[1].type] = pid[-1]
            return pid[1]
        view = pid[5] if isinstance(pid, tuple) and len(pid) == 6 else None
        ref = storage_ref(pid, fields=6)
        root = self.refs.setdefault(ref.key, ref)
        if view is None:
            return root
        if not isinstance(view, tuple) or len(view) != 3 or type(view[1]) is not int or not 0 <= view[1] < 2**63:
            raise CorruptFile(f"storage '{ref.key}' is seen through a view that can't be", found=shown(view))
        return StorageRef(ref.key, ref.dtype, ref.numel, ref.device, view[1])

    def storages(self) -> dict[str, Storage]:
        """Every storage behind the pickles, in the order of the file. Reads eight bytes of each."""
        keys = self.next()
        if not isinstance(keys, (list, tuple)):
            raise CorruptFile("the list of storages is none", path=self.file.path, offset=self.offset, hint=_DAMAGED)
        found: dict[str, Storage] = {}
        for number, key in enumerate(keys):
            name = name_of(key)
            ref = self.refs.get(name)
            if ref is None or name in found:
                what = "twice" if ref is not None else "but no tensor uses it"
                raise CorruptFile(
                    f"storage '{name}' is listed, {what}", path=self.file.path, offset=self.offset, hint=_DAMAGED
                )
            numel = int.from_bytes(self.file.read(self.offset, 8), "little", signed=True)
            if numel != ref.numel:
                raise CorruptFile(
                    f"storage '{name}' has another length than its tensors say",
                    path=self.file.path,
                    offset=self.offset,
                    expected=f"{ref.numel} elements",
                    found=numel,
                    hint=_DAMAGED,
                )
            nbytes = ref.nbytes
            if self.offset + 8 + nbytes > self.file.nbytes:
                raise CorruptFile(
                    f"the file ends inside storage '{name}'",
                    path=self.file.path,
                    offset=self.offset + 8,
                    expected=f"{nbytes} bytes",
                    found=self.file.nbytes - self.offset - 8,
                    hint=_DAMAGED,
                )
            found[name] = Storage(number, nbytes, Extent(0, self.offset + 8, nbytes), None, "little", None, name)
            self.offset += 8 + nbytes
        return found


def read_manifest(files: Sequence[File], limits: Limits = DEFAULT_LIMITS) -> Manifest:
    """What the stream holds. Reads its pickles and the length of each storage; no tensor byte.

    Raises ``CorruptFile`` where the stream ends early or a storage is missing or of another length.
    """
    file = files[0]
    stream = _Stream(file, limits)
    info = stream.header()
    value = stream.next()
    storages = stream.storages()
    tree = TreeBuilder(lambda ref: _storage(file, ref, storages), limits, path=file.path, sources=stream.sources).build(
        value
    )
    notes = [
        *tree.notes,
        Finding("no-crc", "info", "the legacy format has no checksums: damage to the values can't be seen"),
    ]
    return Manifest(
        "torch-legacy",
        (FileFact(file.path, file.nbytes),),
        tuple(storages.values()),
        tree.tensors,
        tree.objects,
        tree.root,
        {},
        (*notes, *_trailing(file, stream.offset)),
        {str(key): str(value) for key, value in info.items() if type(value) in (int, bool)},
    )


def _storage(file: File, ref: StorageRef, storages: dict[str, Storage]) -> Storage:
    storage = storages.get(ref.key)
    if storage is not None and storage.nbytes >= ref.nbytes:
        return storage
    if ref.numel == 0 or ref.device == "meta":
        return Storage(-1, 0, None, b"", "little", None, ref.key)
    raise CorruptFile(f"the bytes of storage '{ref.key}' are missing", path=file.path, hint=_DAMAGED)


def _trailing(file: File, offset: int) -> list[Finding]:
    rest = file.nbytes - offset
    return [Finding("trailing-bytes", "warning", f"{rest:,} bytes behind the end belong to nothing")] if rest else []


def read_pickle_manifest(files: Sequence[File], limits: Limits = DEFAULT_LIMITS) -> Manifest:
    """What a plain pickle holds. Long byte strings stay in the file and are read when their array is."""
    file = files[0]

    def nested(args: tuple[object, ...]) -> StorageRef:
        return _nested_storage(file, args, limits)

    machine = Machine(
        file,
        persistent=_refuse,
        extra={("torch.storage", "_load_from_bytes"): nested},
        limits=limits,
        keep_blobs=True,
    )
    value = machine.run()
    tree = TreeBuilder(lambda ref: _storage(file, ref, {}), limits, path=file.path).build(value)
    return Manifest(
        "pickle",
        (FileFact(file.path, file.nbytes),),
        tuple(tree.storages),
        tree.tensors,
        tree.objects,
        tree.root,
        {},
        (*tree.notes, *_trailing(file, machine.offset)),
    )


def _refuse(pid: object) -> object:
    raise CorruptFile("the pickle names a value outside itself (a persistent id), and there is none", found=shown(pid))


def _nested_storage(file: File, args: tuple[object, ...], limits: Limits) -> StorageRef:
    """``torch.storage._load_from_bytes(bytes)``: a storage as a whole legacy stream inside the pickle."""
    data = args[0] if len(args) == 1 else None
    if isinstance(data, Blob):
        inner: File = Slice(file, data.offset, data.nbytes, "storage")
    elif isinstance(data, bytes):
        inner = MemoryFile(data, f"{file.path}:storage")
    else:
        raise Unfit
    stream = _Stream(inner, limits)
    stream.header()
    ref = stream.next()
    if not isinstance(ref, StorageRef):
        raise Unfit
    extent = stream.storages()[ref.key].extent
    assert extent is not None
    made = StorageRef(ref.key, ref.dtype, ref.numel, ref.device, ref.view_offset)
    made.data = (
        Blob(data.offset + extent.offset, extent.nbytes)
        if isinstance(data, Blob)
        else inner.read(extent.offset, extent.nbytes)
    )
    return made
