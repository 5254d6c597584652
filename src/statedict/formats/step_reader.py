"""Reading a committed step: its manifest, the headers of its files, and the trees of its components over their bytes.

Headers, ``state.json`` and the manifest are compared with their digests when they are read; the bytes of tensors have theirs in the
``Storage`` records, so that whoever loads them can compare. ``step.py`` draws the layout.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

from statedict.errors import CorruptFile, FileError, StepNotFound, Uncommitted, Unsupported, one_line
from statedict.formats.merging import Part
from statedict.formats.safetensors import read_manifest as read_safetensors
from statedict.formats.step import (
    BEGIN,
    DAMAGED,
    MANIFEST_NAME,
    STATE_NAME,
    STATE_SCHEMA,
    FileRecord,
    StepManifest,
    digest_of,
    parse_step,
    step_name,
    step_number,
)
from statedict.formats.typed_json import decode
from statedict.formats.value_tree import TreeBuilder
from statedict.io.ranges import File, LocalFile, close_all
from statedict.limits import DEFAULT_LIMITS, Limits
from statedict.manifest import Extent, FileFact, Manifest, Storage, TensorEntry

__all__ = ["Stored", "check_state", "is_step", "locate_step", "open_step", "read_step", "refuse_run", "stored_in"]

OpenFile = Callable[[str], File]


class Stored(NamedTuple):
    """One tensor of a file of a step: its name in the header, where its bytes lie, and the digest that they must have."""

    name: str
    storage: Storage


def is_step(folder: str) -> bool:
    """Whether the folder has the manifest of a step. Reads its first bytes."""
    try:
        file = LocalFile(os.path.join(folder, MANIFEST_NAME))
    except (FileError, ValueError):
        return False
    try:
        return file.read(0, min(len(BEGIN), file.nbytes)) == BEGIN
    finally:
        file.close()


def locate_step(folder: str, key: str) -> tuple[str, str | None] | None:
    """The step's folder and the key in it that ``run#1000`` or ``run#1000.model`` names; None where no run's step is meant.

    Raises ``StepNotFound`` for a number that isn't there, with those that are, and ``Uncommitted`` where it was only begun.
    """
    number, _, rest = key.partition(".")
    if not (number.isascii() and number.isdecimal()) or not os.path.isdir(folder):
        return None
    try:
        names = os.listdir(folder)
    except OSError:
        return None
    steps = sorted([step for step in map(step_number, names) if step is not None])
    begun = any(name.startswith(".tmp-") and name.split("-")[1] == number.lstrip("0") for name in names)
    if int(number) in steps:
        return os.path.join(folder, step_name(int(number))), rest or None
    if begun:
        raise Uncommitted(f"step {int(number)} was begun, but never committed", path=folder, hint=_listed(steps))
    return _not_there(folder, int(number), steps) if steps else None


def refuse_run(folder: str) -> None:
    """Raise ``Unsupported`` if the folder holds the steps of a run, naming the newest."""
    try:
        steps = [step for step in map(step_number, os.listdir(folder)) if step is not None]
    except OSError:
        return
    if steps:
        hint = f"Name a step: {one_line(folder)}#{max(steps)}. statedict runs shows them all"
        raise Unsupported("this is the folder of a training run, not a checkpoint", path=folder, hint=hint)


def _not_there(folder: str, number: int, steps: Sequence[int]) -> NoReturn:
    raise StepNotFound(f"there is no step {number}", path=folder, hint=_listed(steps))


def _listed(steps: Sequence[int]) -> str:
    if not steps:
        return "There is no committed step"
    shown = ", ".join([str(step) for step in steps[-5:]])
    return f"There is {shown}" if len(steps) <= 5 else f"There are {len(steps):,}, the last of them {shown}"


def open_step(folder: str, limits: Limits = DEFAULT_LIMITS) -> tuple[Manifest, list[File]]:
    """A step of this machine as one checkpoint whose top-level keys are its components, and its open files.

    Raises ``CorruptFile`` where the manifest, a size, a header or ``state.json`` isn't as it was written. No tensor is read.
    """
    manifest = LocalFile(os.path.join(folder, MANIFEST_NAME))
    try:
        limits.check("header_bytes", manifest.nbytes, "the manifest is too long", path=manifest.path)
        step = parse_step(manifest.read(0, manifest.nbytes), manifest.path, limits)
    finally:
        manifest.close()
    _check_folder(folder, step)
    return read_step(step, lambda name: LocalFile(os.path.join(folder, name)), limits)


def _check_folder(folder: str, step: StepManifest) -> None:
    """A step under the name of another is a copy that somebody has made: which of the two counts isn't ours to say."""
    number = step_number(os.path.basename(os.path.realpath(folder)))
    if number is not None and number != step.step:
        what = f"this is a copy of step {step.step} under the number of another"
        raise CorruptFile(what, path=folder, expected=f"step {number}", found=step.step, hint=DAMAGED)


def read_step(
    step: StepManifest, open_file: OpenFile, limits: Limits = DEFAULT_LIMITS, only: str | None = None
) -> tuple[Manifest, list[File]]:
    """All components of a step under their names, or the tree of one of them; and the files, which are the caller's to close.

    ``open_file`` gives a file of the step by its name. Raises as ``open_step`` does.
    """
    listed = step.components.values() if only is None else [step.components[only]]
    names = [name for part in listed for name in part]
    files: list[File] = []
    try:
        for name in [*names, STATE_NAME]:
            files.append(open_file(name))  # noqa: PERF401 (those before one that fails are closed)
        trees = check_state(step, files[-1], limits)
        entries = _entries(step, dict(zip(names, files)), limits)
        return _manifest(trees, entries, files, limits, only), files
    except BaseException:
        close_all(files)
        raise


def _entries(step: StepManifest, files: Mapping[str, File], limits: Limits) -> dict[str, dict[str, TensorEntry]]:
    """The tensors of each component by name, in storages that are numbered through."""
    entries: dict[str, dict[str, TensorEntry]] = {}
    first = 0
    for number, (name, file) in enumerate(files.items()):
        stored_in(step.files[name], file, limits)
        part = Part.of(name, number, read_safetensors([file], limits), first)
        first += len(part.manifest.storages)
        component = next(key for key, listed in step.components.items() if name in listed)
        for path, entry in part.manifest.tensors.items():
            if entries.setdefault(component, {}).setdefault(str(path[0]), entry) is not entry:
                raise CorruptFile("two files of the step hold the tensor", path=file.path, key=str(path[0]))
    return entries


def _manifest(
    trees: Mapping[str, object],
    entries: Mapping[str, Mapping[str, TensorEntry]],
    files: Sequence[File],
    limits: Limits,
    only: str | None,
) -> Manifest:
    state = files[-1].path
    try:
        values = {
            name: decode(tree, entries.get(name, {}).__getitem__)  # type: ignore[arg-type]
            for name, tree in trees.items()
            if only in (None, name)
        }
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, OverflowError, RecursionError) as error:
        raise CorruptFile("the values beside the tensors are of no known form", path=state, hint=DAMAGED) from error
    tree = TreeBuilder(_no_storage, limits, path=state).build(values if only is None else values[only])
    facts = tuple([FileFact(file.path, file.nbytes) for file in files])
    storages = tuple(tree.storages)
    return Manifest("step", facts, storages, tree.tensors, tree.objects, tree.root, notes=tuple(tree.notes)).validate(
        limits
    )


def _no_storage(ref: object) -> Any:
    raise CorruptFile("a value names a storage")


def check_state(step: StepManifest, file: File, limits: Limits = DEFAULT_LIMITS) -> dict[str, object]:
    """The trees of ``state.json`` by component, once the file is the one that was written, for this step."""
    record = step.files[STATE_NAME]
    _check_size(record, file)
    limits.check("header_bytes", record.nbytes, "the values beside the tensors are too long", path=file.path)
    data = file.read(0, record.nbytes)
    if digest_of(data) != record.digest:
        raise _differs(file.path, "the file isn't the one that was written")
    try:
        found = json.loads(data)
        trees = dict(found["components"])
        if found["schema"] != STATE_SCHEMA or found["step"] != step.step or trees.keys() != step.components.keys():
            raise ValueError("it belongs to another step")
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        what = f"the values beside the tensors are of no known form: {one_line(error)}"
        raise CorruptFile(what, path=file.path, hint=DAMAGED) from error
    return trees


def stored_in(record: FileRecord, file: File, limits: Limits = DEFAULT_LIMITS) -> list[Stored]:
    """The bytes of every tensor in a safetensors file of a step, once its header is the one that was written.

    They cover all bytes behind the header. Raises ``CorruptFile`` if the size or the header is another. Reads the header only.
    """
    _check_size(record, file)
    limits.check("header_bytes", record.header_nbytes, "the header is too long", path=file.path)
    header = file.read(0, record.header_nbytes)
    if digest_of(header) != record.digest or int.from_bytes(header[:8], "little") + 8 != len(header):
        raise _differs(file.path, "its header isn't the one that was written")
    read_safetensors([file], limits)  # the ranges lie in the file, without holes
    found: list[Stored] = []
    for name, info in json.loads(header[8:]).items():
        if name == "__metadata__":
            continue
        pair = record.tensors.get(name)
        if pair is None:
            raise _differs(file.path, f"the manifest has no digest of tensor '{one_line(name)}'")
        first, last = info["data_offsets"]
        extent = Extent(0, len(header) + first, last - first)
        found.append(Stored(name, Storage(len(found), last - first, extent, name=name, digest=f"xxh3-128:{pair[0]}")))
    return found


def _check_size(record: FileRecord, file: File) -> None:
    if file.nbytes != record.nbytes:
        raise CorruptFile(
            "the file has another size than when it was written",
            path=file.path,
            expected=f"{record.nbytes} bytes",
            found=file.nbytes,
            hint=DAMAGED,
        )


def _differs(path: str, what: str) -> CorruptFile:
    return CorruptFile(f"{what}: its digest differs", path=path, hint=DAMAGED)
