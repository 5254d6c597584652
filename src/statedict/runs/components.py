"""The components of a step as files: which tensors go where, and which files of the step before hold them already.

A file whose tensors haven't changed is linked, not written. Where a part of a component stands still (a frozen backbone under
adapters), that part gets a file of its own the second time, and is linked from then on:

    step-00001000/model.safetensors                                           everything
    step-00002000/model.safetensors, model.frozen-00002000.safetensors        what has changed, and what hasn't
    step-00003000/model.safetensors, model.frozen-00002000.safetensors        the second is the same file on the disk

Each file has exactly one name for a tensor, and no tensor is in two. Links count in the file system, so that deleting a step takes nothing
from another. Whether a file is the same is told by its header, in which the digest of every tensor stands.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from statedict.checkpoint import Checkpoint
from statedict.errors import StateDictError
from statedict.formats.layout import identity
from statedict.formats.safetensors_writer import SafetensorsWriter
from statedict.formats.step import PROBE_NBYTES, FileRecord, StepManifest, digest_of, is_plain_name
from statedict.formats.typed_json import encode
from statedict.io.plans import FileSource, Later, MemorySource, Payload, Sum, WritePlan
from statedict.io.ranges import blocks
from statedict.manifest import Container, TensorEntry
from statedict.nodes import every_tensor
from statedict.ops.sources import source_of

__all__ = ["Component", "PlannedFile", "plan_component", "record_of"]

# Bytes. A part that stands still gets a file of its own from here on, and above this share of what would be written.
_FROZEN_NBYTES = 1024 * 1024
_FROZEN_SHARE = 4
# Files that one component is spread over; more are written as one again.
_MOST_FILES = 8
_BLOCK_NBYTES = 4 * 1024 * 1024
# Stands for the digest of a beginning that wasn't read.
_UNKNOWN = "0" * 32


class PlannedFile(NamedTuple):
    """A file of the new step: written by its plan, or a link to one of the step before."""

    name: str
    plan: WritePlan
    linked: FileRecord | None = None


class Component(NamedTuple):
    """A component, ready to be written."""

    name: str
    tree: object  # typed JSON, with the names of tensors
    files: tuple[PlannedFile, ...]
    inventory: Mapping[str, int]


def plan_component(name: str, piece: Checkpoint, step: int, before: StepManifest | None = None) -> Component:
    """The files of a component, and what stands in ``state.json`` for it. Tensors are read only to find those that ``before`` holds.

    Raises ``Unsupported`` for values that can't be written, naming the key.
    """
    if not is_plain_name(name):
        hint = "Letters, digits, dots, dashes and underscores; not at its beginning"
        raise StateDictError("a component can't be called so", key=name, hint=hint)
    try:
        tree, entries = _flat(piece)
        files = _Files(name, entries, piece, step, before).planned()
    except StateDictError as error:
        error.key = name if error.key is None else f"{name}.{error.key}"
        raise
    counts = {
        "tensors": len(entries),
        "objects": len(piece.manifest.objects),
        "nbytes": sum([entry.nbytes for entry in entries.values()]),
    }
    return Component(name, tree, tuple(files), counts)


def _flat(piece: Checkpoint) -> tuple[object, dict[str, TensorEntry]]:
    """The tree with names in the place of its tensors, and the tensors by name."""
    shown = {path: key for key, path in ((key, piece.path_of(key)) for key in piece)}
    named: dict[int, str] = {}
    entries: dict[str, TensorEntry] = {}

    def name_of(entry: TensorEntry) -> str:
        known = named.get(id(entry))
        if known is None:
            known = shown.get(entry.path) or "tensor"
            while known in entries:
                known += "'"
            named[id(entry)] = known
            entries[known] = entry._replace(path=(known,))
        return known

    return encode(piece.manifest.structure, name_of), entries


class _Files:
    def __init__(
        self, name: str, entries: Mapping[str, TensorEntry], piece: Checkpoint, step: int, before: StepManifest | None
    ) -> None:
        self._name = name
        self._entries = dict(entries)
        self._piece = piece
        self._step = step
        listed = () if before is None else before.components.get(name, ())
        self._before = [before.files[file] for file in listed] if before is not None else []
        self._same = _Same(self._before)
        self._taken: set[str] = set()

    def planned(self) -> list[PlannedFile]:
        if not self._entries:
            return []
        linked = list(self._links()) if self._before else []
        if len(linked) >= _MOST_FILES:
            return [self._written(self._entries, "")]
        held = {name for _, names in linked for name in names}
        self._taken = {file.name for file, _ in linked}
        rest = {name: entry for name, entry in self._entries.items() if name not in held}
        still = self._still(rest) if self._before else {}
        files = [file for file, _ in linked]
        if still:
            files.append(self._written(still, f".frozen-{self._step:08d}"))
        changed = {name: entry for name, entry in rest.items() if name not in still}
        return [*files, self._written(changed, "")] if changed else files

    def _plan(self, entries: Mapping[str, TensorEntry]) -> WritePlan:
        root = Container("dict", list(entries), list(entries.values()))
        writer = SafetensorsWriter(root, {}, digests=True)
        return writer.plan(lambda entry: source_of(entry, self._piece))

    def _written(self, entries: Mapping[str, TensorEntry], suffix: str) -> PlannedFile:
        name, number = f"{self._name}{suffix}.safetensors", 1
        while name in self._taken:
            number += 1
            name = f"{self._name}{suffix}.part-{number}.safetensors"
        self._taken.add(name)
        return PlannedFile(name, self._plan(entries))

    def _links(self) -> Iterable[tuple[PlannedFile, list[str]]]:
        """The files of the step before that are, byte for byte, what would be written now."""
        groups = _groups(self._entries)
        for record in self._before:
            homes = {name.partition("#")[0] for name in record.tensors}
            names = {name for group in groups if homes & set(group) for name in group}
            candidates = {name: entry for name, entry in self._entries.items() if name in names}
            if not candidates:
                continue
            plan = self._plan(candidates)
            if self._same.file(plan, record):
                yield PlannedFile(record.name, plan, record), list(candidates)

    def _still(self, rest: Mapping[str, TensorEntry]) -> dict[str, TensorEntry]:
        """The tensors that stand still, if it is worth a file of their own. What shares parts of its bytes counts as changed."""
        payloads = {part.key: part for part in self._plan(rest).segments if isinstance(part, Payload)}
        still: dict[str, TensorEntry] = {}
        for group in _groups(rest):
            entries = {name: rest[name] for name in group}
            stored = [payloads[name] for name in group if name in payloads]
            if any(entry.view is None for entry in entries.values()) or len(stored) != 1:
                continue
            is_one = len({identity(entry) for entry in entries.values()}) == 1
            if is_one and self._same.tensor(stored[0]):
                still |= entries
        nbytes = sum([payloads[name].nbytes for name in still if name in payloads])
        total = sum([payload.nbytes for payload in payloads.values()])
        is_worth = nbytes >= _FROZEN_NBYTES and nbytes * _FROZEN_SHARE >= total and len(still) < len(rest)
        return {name: entry for name, entry in rest.items() if name in still} if is_worth else {}


def _groups(entries: Mapping[str, TensorEntry]) -> list[list[str]]:
    """The names of tensors, those together that share storages, directly or through others."""
    above = {name: name for name in entries}

    def top(name: str) -> str:
        while above[name] != name:
            above[name] = name = above[above[name]]
        return name

    first: dict[int, str] = {}
    for name, entry in entries.items():
        for tensor in every_tensor(entry):
            for part in (tensor, *tensor.parts.values()):
                if part.view is not None:
                    above[top(name)] = top(first.setdefault(part.view.storage.id, name))
    groups: dict[str, list[str]] = {}
    for name in entries:
        groups.setdefault(top(name), []).append(name)
    return list(groups.values())


class _Same:
    """What is the same as in the files of the step before: told by size and beginning first, then by the whole digest."""

    def __init__(self, before: Sequence[FileRecord]) -> None:
        self._known = {name: pair for record in before for name, pair in record.tensors.items()}
        self._found: dict[str, bool] = {}

    def file(self, plan: WritePlan, record: FileRecord) -> bool:
        """Whether the plan would give that very file."""
        payloads = [segment for segment in plan.segments if isinstance(segment, Payload)]
        if plan.nbytes != record.nbytes or {payload.key for payload in payloads} != record.tensors.keys():
            return False
        if not all([self.tensor(payload) for payload in payloads]):  # noqa: C419 (each is asked about again)
            return False
        sums = {key: Sum(f"xxh3-128:{pair[0]}", None) for key, pair in record.tensors.items()}
        return digest_of(_header(plan, sums)) == record.digest

    def tensor(self, payload: Payload) -> bool:
        """Whether these bytes are those that stood under the same name."""
        found = self._found.get(payload.key)
        if found is None:
            pair = self._known.get(payload.key)
            found = (
                pair is not None and pair[1] != _UNKNOWN and pair[1] == _probe(payload) and pair[0] == _whole(payload)
            )
            self._found[payload.key] = found
        return found


def _header(plan: WritePlan, sums: Mapping[str, Sum]) -> bytes:
    first = plan.segments[0]
    assert isinstance(first, Later)
    return first.render(sums)


def _probe(payload: Payload) -> str:
    """The digest of a payload's beginning; of bytes that would have to be made first, none."""
    source = payload.source
    if not isinstance(source, (MemorySource, FileSource)):
        return _UNKNOWN
    buffer = bytearray(min(PROBE_NBYTES, payload.nbytes))
    source.read_into(0, memoryview(buffer))
    return digest_of(memoryview(buffer)).removeprefix("xxh3-128:")


def _whole(payload: Payload) -> str:
    from xxhash import xxh3_128

    state = xxh3_128()
    buffer = memoryview(bytearray(min(_BLOCK_NBYTES, payload.nbytes)))
    for offset, count in blocks(0, payload.nbytes, _BLOCK_NBYTES):
        if isinstance(payload.source, MemorySource):
            state.update(payload.source.data[offset : offset + count])
        else:
            payload.source.read_into(offset, buffer[:count])
            state.update(buffer[:count])
    return state.hexdigest()


def record_of(name: str, plan: WritePlan, sums: Mapping[str, Sum]) -> FileRecord:
    """What the manifest says of a file that was written by its plan."""
    header = _header(plan, sums)
    tensors = {}
    for segment in plan.segments:
        if isinstance(segment, Payload):
            digest = str(sums[segment.key].digest).removeprefix("xxh3-128:")
            tensors[segment.key] = (digest, digest if segment.nbytes <= PROBE_NBYTES else _probe(segment))
    return FileRecord(name, plan.nbytes, digest_of(header), len(header), tensors)
