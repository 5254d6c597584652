"""torch's zip format, the one that ``torch.save`` writes since 1.6, and TorchScript archives.

    NAME/data.pkl            the object, a pickle whose storages are persistent ids ("storage", class, key, location, numel)
    NAME/byteorder           "little" or "big"; absent in old files, which are little-endian
    NAME/data/KEY            the bytes of one storage, aligned to 64 by padding in the local header
    NAME/version             "3"; required by torch
    NAME/.statedict          only in files of this program: metadata and digests, as JSON
    NAME/constants.pkl, code/…   only in TorchScript archives

All names share one top folder, which is the first entry's. Source: torch 2.13 ``serialization.py`` (``_save``, ``_load``,
``_legacy_zip`` constants), ``caffe2/serialize/inline_container.cc``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from statedict.errors import CorruptFile, Unsupported
from statedict.formats import zips
from statedict.formats.pickles import Machine
from statedict.formats.records import StorageRef, shown
from statedict.formats.tensor_constructors import storage_dtype
from statedict.formats.torchscript import class_sources
from statedict.formats.value_tree import Tree, TreeBuilder
from statedict.io.ranges import File, MemoryFile
from statedict.limits import DEFAULT_LIMITS, Limits
from statedict.manifest import FileFact, Finding, Manifest, Storage

__all__ = ["name_of", "read_manifest", "storage_ref"]

# What torch aligns storages to. A file without it can't be mapped well.
_ALIGNMENT = 64
# Keys of storages are numbers or addresses, devices short words.
_LONGEST_NAME = 1000
# torch counts elements in int64.
_MOST = 2**63 - 1
_DAMAGED = "The file is damaged: download or copy it again"


def read_manifest(files: Sequence[File], limits: Limits = DEFAULT_LIMITS) -> Manifest:
    """What the archive holds. Reads its directory, ``data.pkl``, small records and the storages' local headers.

    Raises ``CorruptFile`` where a record is missing or has another size than its storage, ``Unsupported`` for encryption.
    """
    file = files[0]
    directory = zips.read_directory(file, limits)
    records = _records(file, directory)
    data = records.get("data.pkl")
    if data is None:
        raise CorruptFile("the archive has no data.pkl", path=file.path, hint="This zip file is no torch checkpoint")
    refs: dict[str, StorageRef] = {}

    def persistent(pid: object) -> StorageRef:
        ref = storage_ref(pid, fields=5)
        known = refs.setdefault(ref.key, ref)
        return known if known.dtype is ref.dtype else ref

    pickle = MemoryFile(zips.read_entry(file, data, limits, limit="pickle_bytes"), f"{file.path}:{data.name}")
    value = Machine(pickle, persistent=persistent, limits=limits).run()
    byteorder = _byteorder(file, records, limits)
    metadata, digests, stale = _own_record(file, records, limits)
    storages = _storages(file, records, refs, byteorder, digests)
    sources = class_sources(file, records, limits) if "constants.pkl" in records else {}
    builder = TreeBuilder(lambda ref: _storage(file, ref, storages), limits, path=file.path, sources=sources)
    tree = builder.build(value)
    return Manifest(
        "torchscript" if "constants.pkl" in records else "torch-zip",
        (FileFact(file.path, file.nbytes),),
        tuple(storages.values()),
        tree.tensors,
        tree.objects,
        tree.root,
        metadata,
        (*stale, *tree.notes, *_notes(records, storages, tree)),
        _container(file, records, limits),
    )


def _records(file: File, directory: zips.ZipDirectory) -> dict[str, zips.ZipEntry]:
    """The entries by their name below the top folder."""
    if not directory.entries:
        return {}
    top = directory.entries[0].name.partition("/")[0] + "/"
    records = {}
    for entry in directory.entries:
        if not entry.name.startswith(top):
            raise CorruptFile(
                f"entry '{entry.name}' is outside the archive's folder '{top}'",
                path=file.path,
                offset=entry.header_offset,
            )
        records[entry.name[len(top) :]] = entry
    return records


def storage_ref(pid: object, *, fields: int) -> StorageRef:
    """The reference in a persistent id of that many fields.

    Python 2 wrote its texts as bytes. The class may be ``torch.cuda.FloatStorage`` in old files.
    """
    if not isinstance(pid, tuple) or len(pid) != fields or pid[0] not in ("storage", b"storage"):
        raise CorruptFile(
            "a persistent id is none of a storage", expected=f"('storage', class, key, device, length), {fields} fields"
        )
    _, storage_class, name, device, numel = pid[:5]
    dtype = storage_dtype(storage_class)
    if dtype is None:
        raise Unsupported(f"a storage is of the unknown class {shown(storage_class)}")
    # The usual case without a call: 100,000 tensors come this way.
    key = name if type(name) is str and len(name) <= _LONGEST_NAME else name_of(name)
    if type(numel) is not int or numel < 0 or numel > _MOST:
        raise CorruptFile(f"storage '{key}' has no proper length", found=shown(numel))
    return StorageRef(key, dtype, numel, device if device == "cpu" else name_of(device))


def name_of(value: object) -> str:
    """The key or device of a storage: a text, the bytes of a Python 2 text, or a number (Python 2's keys).

    Raises ``CorruptFile`` for anything else.
    """
    if type(value) is int:
        return str(value)
    if not isinstance(value, (str, bytes)) or len(value) > _LONGEST_NAME:
        raise CorruptFile("a storage has no proper name or device", found=shown(value))
    return value.decode("latin-1") if isinstance(value, bytes) else value


def _byteorder(file: File, records: dict[str, zips.ZipEntry], limits: Limits) -> str:
    if "byteorder" not in records:
        return "little"
    limits = limits._replace(header_bytes=min(limits.header_bytes, 4096))
    text = zips.read_entry(file, records["byteorder"], limits).decode("latin-1").strip()
    if text not in ("little", "big"):
        raise CorruptFile("the record 'byteorder' is wrong", path=file.path, expected="little or big", found=text)
    return text


def _storages(
    file: File,
    records: dict[str, zips.ZipEntry],
    refs: dict[str, StorageRef],
    byteorder: str,
    digests: Mapping[str, str],
) -> dict[str, Storage]:
    """The storage of every reference whose record is there, numbered in the order of the pickle."""
    found = {key: records[f"data/{key}"] for key in refs if f"data/{key}" in records}
    if len(found) < len(refs):
        # torch finds records without regard to case (miniz); names that differ only so were refused with the directory.
        folded = {name.lower(): entry for name, entry in records.items()}
        names = {key: f"data/{key}".lower() for key in refs}
        found = {key: folded[name] for key, name in names.items() if name in folded}
    offsets = zips.data_offsets(file, list(found.values()))
    storages = {}
    for number, ((key, entry), offset) in enumerate(zip(found.items(), offsets)):
        nbytes = refs[key].nbytes
        if entry.nbytes != nbytes:
            raise CorruptFile(
                f"storage '{key}' has another size than its record",
                path=file.path,
                offset=offset,
                expected=f"{nbytes} bytes",
                found=entry.nbytes,
                hint=_DAMAGED,
            )
        crc = entry.crc or None
        extent, name = zips.extent(entry, offset), f"data/{key}"
        storages[key] = Storage(number, nbytes, extent, None, byteorder, crc, name, digests.get(key))
    return storages


def _storage(file: File, ref: StorageRef, storages: dict[str, Storage]) -> Storage:
    storage = storages.get(ref.key)
    if storage is not None and storage.nbytes == ref.nbytes:
        return storage
    if ref.device == "meta" or ref.numel == 0:
        # Neither has bytes, and torch may give several empty storages one key.
        return Storage(-1, 0, None, b"", "little", None, f"data/{ref.key}")
    raise CorruptFile(
        f"the record of storage 'data/{ref.key}' is missing or of another size", path=file.path, hint=_DAMAGED
    )


def _own_record(
    file: File, records: dict[str, zips.ZipEntry], limits: Limits
) -> tuple[dict[str, str], dict[str, str], list[Finding]]:
    """What this program has written beside the records: the metadata, a digest for each storage, and what is odd."""
    entry = records.get(".statedict")
    if entry is None:
        return {}, {}, []
    import json

    try:
        facts = json.loads(zips.read_entry(file, entry, limits))
        metadata, digests = dict(facts.get("metadata", {})), facts.get("digests", "")
        known = all(isinstance(text, str) for text in (*metadata, *metadata.values(), digests))
    except (ValueError, TypeError, AttributeError, RecursionError):
        known = False
    stored = sum(name.startswith("data/") for name in records)
    if not known or len(digests) not in (0, 32 * stored):
        message = "statedict's own record is left aside: it isn't about these storages"
        return {}, {}, [Finding("stale-notes", "warning", message)]
    each = {str(at): f"xxh3-128:{digests[32 * at : 32 * at + 32]}" for at in range(len(digests) // 32)}
    return metadata, each, []


def _container(file: File, records: dict[str, zips.ZipEntry], limits: Limits) -> dict[str, str]:
    """The small text records of the archive, as they are."""
    limits = limits._replace(header_bytes=min(limits.header_bytes, 4096))
    found = {}
    for name in ("version", ".format_version", "byteorder", ".storage_alignment", ".data/serialization_id"):
        if name in records:
            text = zips.read_entry(file, records[name], limits).decode("latin-1").strip()
            found[name.rpartition("/")[2].lstrip(".")] = text
    return found


def _notes(records: dict[str, zips.ZipEntry], storages: dict[str, Storage], tree: Tree) -> list[Finding]:
    notes = []
    orphans: list[str] = []
    if sum([name.startswith("data/") for name in records]) > len(storages):
        named = {storage.name.lower() for storage in storages.values()}
        orphans = [name for name in records if name.startswith("data/") and name.lower() not in named]
    if orphans:
        nbytes = sum(records[name].nbytes for name in orphans)
        notes.append(
            Finding(
                "orphan-records",
                "warning",
                f"{len(orphans)} records ({nbytes:,} bytes) belong to no tensor",
                tuple(orphans[:20]),
            )
        )
    if "version" not in records and ".data/version" not in records:
        notes.append(
            Finding(
                "no-version",
                "warning",
                "the archive has no version record: torch.load refuses it; convert it to repair that",
            )
        )
    full = [storage for storage in storages.values() if storage.nbytes]
    bare = sum(storage.crc is None for storage in full)
    if bare:
        notes.append(
            Finding("no-crc", "info", f"{bare} of {len(full)} storages have no CRC-32: damage to them can't be seen")
        )
    askew = sum(storage.extent.offset % _ALIGNMENT != 0 for storage in full if storage.extent is not None)
    if askew:
        notes.append(
            Finding("alignment", "info", f"{askew} of {len(full)} storages are not aligned to {_ALIGNMENT} bytes")
        )
    packed = sum(storage.extent.codec != "raw" for storage in full if storage.extent is not None)
    if packed:
        notes.append(
            Finding(
                "compressed",
                "info",
                f"{packed} of {len(full)} storages are compressed: torch.load(mmap=True) reads them wrong",
            )
        )
    return notes
