"""Whether the bytes are those that were written, as far as the file records sums of them: a flipped bit loads without a word."""

from __future__ import annotations

from collections.abc import Iterator

from statedict.errors import CorruptFile
from statedict.io.ranges import BLOCK_NBYTES
from statedict.io.sums import Checked, SumCheck, is_checkable
from statedict.manifest import Finding, Storage, TensorEntry
from statedict.ops.diagnosing.subject import Subject
from statedict.ops.findings import named
from statedict.report.units import plural

__all__ = ["integrity_faults"]


def integrity_faults(subject: Subject) -> Iterator[Finding]:
    """Storages whose digest or CRC-32 isn't the recorded one. Reads every storage that has one. Raises what reading raises."""
    owners: dict[int, list[TensorEntry]] = {}
    storages: dict[int, Storage] = {}
    for entry in subject.checkpoint.manifest.tensors.values():
        for each in (entry, *entry.parts.values()):
            storage = each.view.storage if each.view is not None else None
            if storage is not None and is_checkable(storage) and storage.nbytes and storage.extent is not None:
                storages[storage.id] = storage
                owners.setdefault(storage.id, []).append(entry)
    bad = [storage for storage in storages.values() if not _is_whole(subject, storage, owners[storage.id][0])]
    if not bad:
        return
    hurt = [entry for storage in bad for entry in owners[storage.id]]
    message = (
        f"the bytes of {plural(len(hurt), 'tensor')} are not those that were written, their check sums differ: "
        f"{named(subject.keys(hurt))}. torch.load doesn't look at these sums and would load them. Download or copy "
        "the file again; if it happens twice, look at the disk"
    )
    yield Finding("damaged-tensors", "error", message, subject.keys(hurt))


def _is_whole(subject: Subject, storage: Storage, entry: TensorEntry) -> bool:
    extent = storage.extent
    assert extent is not None
    reader = subject.checkpoint.reader
    check = SumCheck(reader.files[extent.file], Checked(storage, 0, entry))
    buffer = memoryview(bytearray(min(storage.nbytes, BLOCK_NBYTES)))
    for start in range(0, storage.nbytes, BLOCK_NBYTES):
        piece = buffer[: min(BLOCK_NBYTES, storage.nbytes - start)]
        reader.read_into(storage, start, piece)
        check.update(piece)
    try:
        check.finish()
    except CorruptFile:
        return False
    return True
