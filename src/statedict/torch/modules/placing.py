"""Brings the bytes of a checkpoint into tensors that are there already, or makes those that are not.

Where the file holds a tensor as the target has it in memory, it is read straight into that memory, several at once, in the order
of the file. Everything else goes through a piece of memory of bounded size, and torch's own ``copy_`` casts and moves it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch

from statedict.checkpoint import Checkpoint
from statedict.errors import StateDictError
from statedict.io.engine import AUTOMATIC, Engine, choose_reading
from statedict.io.filling import Job, fill, verify
from statedict.io.ranges import File, LocalFile
from statedict.io.sums import Checked, SumCheck, is_checkable
from statedict.lazy_tensor import LazyTensor
from statedict.manifest import Storage, TensorEntry
from statedict.torch.building import TensorBuilder, dtype_in_torch
from statedict.torch.devices import Ring, Upload, as_bytes, backend_of
from statedict.torch.storages import Options, load_storages, untyped
from statedict.views import is_dense, is_packed

__all__ = ["Placement", "check_before", "make_tensors", "place"]

# Bytes that are cast at a time.
_CAST_NBYTES = 8 * 1024 * 1024

Progress = Callable[[int, int], None]


class Placement(NamedTuple):
    """A tensor of the target by its key, and the one of the checkpoint that it gets the values of."""

    key: str
    target: torch.Tensor
    source: LazyTensor


def check_before(checkpoint: Checkpoint, entries: Iterable[TensorEntry], engine: Engine = AUTOMATIC) -> int:
    """Read what the tensors are views of, and compare it with the digests and CRCs of the file; the bytes so checked.

    Storages without either are not read. Raises ``CorruptFile`` for the first that differs.
    """
    storages: dict[int, tuple[Storage, TensorEntry]] = {}
    for entry in entries:
        for part in (entry, *entry.parts.values()):
            if part.view is not None and part.view.storage.extent is not None and is_checkable(part.view.storage):
                storages.setdefault(part.view.storage.id, (part.view.storage, entry))
    items = [Checked(storage, 0, entry) for storage, entry in storages.values()]
    total = sum(item.storage.nbytes for item in items)
    verify(checkpoint.reader, items, choose_reading(_file(checkpoint), total, engine))
    return total


def _file(checkpoint: Checkpoint) -> LocalFile | None:
    files = checkpoint.reader.files
    return files[0] if files and isinstance(files[0], LocalFile) else None


def place(
    placements: Sequence[Placement], checkpoint: Checkpoint, *, check: bool, engine: Engine = AUTOMATIC
) -> dict[str, object]:
    """Fill every target; ``check`` compares the digests of what is read in passing. Gives how it was read.

    An error says which targets had been changed by then.
    """
    found = [(job, each) for each in placements if (job := _job(each, checkpoint, check)) is not None]
    straight = {id(each) for _, each in found}
    direct = [(job, each) for job, each in found if isinstance(job, Job)]
    uploads = [(job, each) for job, each in found if isinstance(job, _Upload)]
    reading = choose_reading(_file(checkpoint), sum(len(job.memory) for job, _ in direct), engine)
    changed: list[str] = []
    try:
        changed += [each.key for _, each in direct]
        fill([job for job, _ in sorted(direct, key=lambda pair: pair[0].offset)], reading)
        changed += [each.key for _, each in uploads]
        _upload([job for job, _ in sorted(uploads, key=lambda pair: pair[0].offset)])
        for _, each in found:
            torch.autograd.graph.increment_version(each.target)
        for each in placements:
            if id(each) not in straight:
                changed.append(each.key)
                copy_into(each.target, each.source)
    except StateDictError as error:
        raise _half_done(error, changed) from error
    counts = {"straight": len(direct), "uploaded": len(uploads), "copied": len(placements) - len(found)}
    return {**reading._asdict(), **counts}


def _half_done(error: StateDictError, changed: Sequence[str]) -> StateDictError:
    names = ", ".join(changed[:8]) + (f" and {len(changed) - 8} more" if len(changed) > 8 else "")
    error.hint = f"{error.hint + '. ' if error.hint else ''}These may have been changed already: {names}"
    error.args = (error.message,)
    return error


class _Upload(NamedTuple):
    """A range of a file, the bytes of a device that it goes to, and the storage to be checked, if it is."""

    file: File
    offset: int
    target: torch.Tensor
    checked: Sequence[Checked]


def is_device(tensor: torch.Tensor) -> bool:
    """Whether the tensor's memory is another than the processor's."""
    return tensor.device.type not in ("cpu", "meta")


def _upload(jobs: Sequence[_Upload]) -> None:
    """Read each range into the pinned ring of its device, and from there to its place, one block ahead of the other."""
    rings: dict[torch.device, Ring] = {}
    for job in jobs:
        device = job.target.device
        if device not in rings:
            rings[device] = Ring(backend_of(device))
        sums = [SumCheck(job.file, item) for item in job.checked]
        position = job.offset

        def read(memory: memoryview, job: _Upload = job, sums: Sequence[SumCheck] = sums) -> None:
            nonlocal position
            job.file.read_into(position, memory)
            position += len(memory)
            for each in sums:
                each.update(memory)

        with Upload(rings[device]) as upload:
            upload.write(job.target, 0, read, len(job.target))
        for each in sums:
            each.finish()


def _job(each: Placement, checkpoint: Checkpoint, check: bool) -> Job | _Upload | None:
    """The read that fills the target's own memory; None where the file holds the tensor in another form."""
    entry, target = each.source.entry, each.target
    view = entry.view
    if view is None or view.bits or entry.memory_stride is not None or not entry.numel or type(target) not in _DENSE:
        return None
    if target.is_meta or target.layout != torch.strided or target.is_conj() or target.is_neg():
        return None
    extent = view.storage.extent
    if view.storage.data is not None or extent is None or extent.codec != "raw":
        return None
    if target.dtype != dtype_in_torch(entry) or (view.storage.byteorder == "big" and entry.dtype.swap > 1):
        return None
    packed = target.is_contiguous() and is_packed(entry.shape, view.stride)
    alike = tuple(target.stride()) == view.stride and is_dense(entry.shape, view.stride)
    if not (packed or alike) or tuple(target.shape) != entry.shape:
        return None
    first = entry.dtype.nbytes(view.offset)
    whole = check and first == 0 and entry.nbytes == view.storage.nbytes and is_checkable(view.storage)
    checked = [Checked(view.storage, 0, entry)] if whole else []
    file = checkpoint.reader.files[extent.file]
    if is_device(target):
        start = target.storage_offset() * target.element_size()
        place = as_bytes(target.untyped_storage())[start : start + entry.nbytes]
        return _Upload(file, extent.offset + first, place, checked)
    return Job(file, extent.offset + first, memory_of(target), checked)


_DENSE = (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)


def memory_of(tensor: torch.Tensor) -> memoryview:
    """The bytes of a dense tensor of the CPU, to be written to."""
    raw = as_bytes(tensor.untyped_storage())
    first = tensor.storage_offset() * tensor.element_size()
    memory: Any = raw.numpy()
    return memoryview(memory)[first : first + tensor.numel() * tensor.element_size()]


def copy_into(target: torch.Tensor, source: LazyTensor) -> None:
    """Give a tensor the values of one in a checkpoint, cast and moved as torch does it."""
    with torch.no_grad():
        seen = in_memory(source.entry, source)
        if seen is not None:
            target.copy_(seen.view_as(target) if seen.shape != target.shape else seen)
        elif source.is_plain and target.is_contiguous() and type(target) in _DENSE and source.nbytes > _CAST_NBYTES:
            _copy_in_pieces(target, source)
        else:
            made = source.torch()
            target.copy_(made.view_as(target) if made.shape != target.shape else made)


def in_memory(entry: TensorEntry, source: LazyTensor) -> torch.Tensor | None:
    """The tensor over the memory that it is in; None where it is in a file."""

    def place(part: TensorEntry) -> tuple[torch.UntypedStorage, int]:
        assert part.view is not None
        found = storage_in_memory(part.view.storage, source)
        assert found is not None
        return found, 0

    parts = [part for part in (entry, *entry.parts.values()) if part.view is not None]
    if not parts or entry.layout != "strided" or entry.dtype.bits % 8 or entry.memory_stride is not None:
        return None
    if any(storage_in_memory(part.view.storage, source) is None for part in parts if part.view is not None):
        return None
    return TensorBuilder(place).build(entry._replace(kind="Tensor", requires_grad=False, attributes={}, parts={}))


def storage_in_memory(storage: Storage, source: LazyTensor) -> torch.UntypedStorage | None:
    """The storage over the memory that its bytes are in, on whatever device; None where they are in a file."""
    if storage.byteorder == "big":
        return None
    if storage.data is not None:
        data = memoryview(storage.data)
        if not data.nbytes or data.readonly:
            return untyped(0) if not data.nbytes else None
        return torch.frombuffer(data, dtype=torch.uint8).untyped_storage()
    if storage.extent is None:
        return None
    held = getattr(source.origin.reader.files[storage.extent.file], "storage", None)
    return held if isinstance(held, torch.UntypedStorage) else None


def _copy_in_pieces(target: torch.Tensor, source: LazyTensor) -> None:
    """A large tensor, so many bytes at a time that they are still near the processor when they are cast."""
    view = source.entry.view
    assert view is not None
    first, nbytes = source.plain_range()
    size = source.entry.dtype.itemsize
    step = _CAST_NBYTES // size
    piece = torch.empty(step, dtype=dtype_in_torch(source.entry))
    memory = memory_of(piece)
    flat = target.view(-1)
    for start in range(0, nbytes // size, step):
        count = min(step, nbytes // size - start)
        source.origin.reader.read_into(view.storage, first + start * size, memory[: count * size])
        flat[start : start + count].copy_(piece[:count])


def make_tensors(
    wanted: Sequence[tuple[str, LazyTensor]],
    checkpoint: Checkpoint,
    *,
    device: str,
    check: bool,
    engine: Engine = AUTOMATIC,
) -> tuple[list[torch.Tensor], dict[str, object]]:
    """New tensors of the checkpoint's, in memory of their own: one copy, from the file to where they stay.

    Of a source in memory, they are the source's own. Two that share bytes in the file don't share them here, unless they are
    the very same entry.
    """
    found: dict[int, torch.Tensor] = {}
    entries: dict[int, TensorEntry] = {}
    for number, (_, source) in enumerate(wanted):
        seen = in_memory(source.entry, source)
        if seen is not None:
            found[number] = seen.to(device)
        else:
            # A copy, so that two keys of one entry get memory of their own.
            entries[number] = source.entry._replace(kind="Tensor", requires_grad=False)
    loaded = load_storages(
        checkpoint.reader, entries.values(), lambda entry: device, Options(False, check, engine, None)
    )
    builder = TensorBuilder(loaded.place)
    used: set[int] = set()
    for number, entry in entries.items():
        made = builder.build(entry)
        if made.layout == torch.strided and made.device.type != "meta":
            storage = made.untyped_storage()
            if storage.data_ptr() in used or storage.nbytes() > entry.nbytes:
                made = made.clone(memory_format=torch.preserve_format)
            used.add(storage.data_ptr())
        found[number] = made
    return [found[number] for number in range(len(wanted))], loaded.facts
