"""Reading every byte of steps, and saying which are not as they were written."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from statedict.dtypes import BY_CODE
from statedict.errors import CorruptFile, StateDictError
from statedict.formats.step import MANIFEST_NAME, STATE_NAME, FileRecord, StepManifest, step_number
from statedict.formats.step_reader import Stored, check_state, stored_in
from statedict.io.engine import choose_reading
from statedict.io.filling import verify as verify_sums
from statedict.io.ranges import File, LocalFile
from statedict.io.storages import StorageReader
from statedict.io.sums import Checked
from statedict.manifest import Finding, StorageView, TensorEntry
from statedict.report.document import Block, Column, Document, Facts, Table
from statedict.report.result import Result
from statedict.report.units import human_bytes, plural
from statedict.runs.catalogue import NEXT_STEP_NAME, VERIFIED_NAME, Catalogue

__all__ = ["Advance", "StepCheck", "Verification", "check_files", "check_step"]

# Bytes that are compared between two reports of how far it is.
_REPORTED_NBYTES = 256 * 1024 * 1024

# Told the bytes that were compared since it was told last.
Advance = Callable[[int], None]


class StepCheck(NamedTuple):
    """What was found about one step."""

    step: int
    path: str
    ok: bool
    files: int
    tensors: int
    nbytes: int  # read and compared
    findings: tuple[Finding, ...] = ()

    def to_dict(self) -> dict[str, object]:
        """The facts, JSON-ready."""
        found = [finding.to_dict() for finding in self.findings]
        return {**self._asdict(), "findings": found}


class Verification(Result):
    """What ``verify`` and ``repair`` have found. True where every step is whole.

    Attributes: ``source`` (the run's folder), ``steps`` (a ``StepCheck`` each), ``set_aside`` (paths of damaged steps that were renamed),
    ``swept`` (names of leftovers that were removed), ``leftovers`` (names that are still there), ``ok``.
    """

    schema = "statedict.verification/1"

    def __init__(
        self,
        source: str,
        steps: Sequence[StepCheck],
        *,
        leftovers: Sequence[str] = (),
        set_aside: Sequence[str] = (),
        swept: Sequence[str] = (),
    ) -> None:
        self.source = source
        self.steps = tuple(steps)
        self.leftovers = tuple(leftovers)
        self.set_aside = tuple(set_aside)
        self.swept = tuple(swept)

    @property
    def ok(self) -> bool:
        """Whether every step is whole."""
        return all(step.ok for step in self.steps)

    def __bool__(self) -> bool:
        return self.ok

    def __repr__(self) -> str:
        return f"Verification({self.source!r}, {plural(len(self.steps), 'step')}, {'ok' if self.ok else 'damaged'})"

    @property
    def findings(self) -> tuple[Finding, ...]:
        """The findings about all steps."""
        return tuple([finding for step in self.steps for finding in step.findings])

    def to_dict(self) -> dict[str, object]:
        """The facts, JSON-ready: ``statedict.verification/1``."""
        return {
            "schema": self.schema,
            "source": self.source,
            "ok": self.ok,
            "steps": [step.to_dict() for step in self.steps],
            "set_aside": list(self.set_aside),
            "swept": list(self.swept),
            "leftovers": list(self.leftovers),
        }

    def document(self) -> Document:
        """The facts as a document."""
        from statedict.ops.listing import notes_of  # only who shows it waits for that

        damaged = sum(not step.ok for step in self.steps)
        nbytes = sum(step.nbytes for step in self.steps)
        pairs = [
            ("steps", f"{plural(len(self.steps), 'step')}, {damaged or 'none'} damaged"),
            ("compared", f"{human_bytes(nbytes)}, by their digests"),
        ]
        pairs += [("set aside", ", ".join(self.set_aside))] if self.set_aside else []
        pairs += [("removed", ", ".join(self.swept))] if self.swept else []
        pairs += [("left over", ", ".join(self.leftovers))] if self.leftovers else []
        columns = [Column("step", "number"), Column("verdict"), Column("files", "number"), Column("tensors", "number")]
        rows = [
            (
                str(step.step),
                "whole" if step.ok else "damaged",
                str(step.files),
                f"{step.tensors:,}",
                human_bytes(step.nbytes),
            )
            for step in self.steps
        ]
        blocks: list[Block] = [Facts(pairs)]
        blocks += [Table([*columns, Column("size", "number")], rows)] if rows else []
        return Document(f"Verified {self.source}", [*blocks, *notes_of(self.findings)])


def check_step(catalogue: Catalogue, step: int, advance: Advance | None = None) -> StepCheck:
    """Read every byte of a step and compare. What is wrong becomes a finding; only what the system refuses is raised (``FileError``)."""
    path = catalogue.path_of(step)
    try:
        manifest = catalogue.manifest(step, anew=True)
    except CorruptFile as error:
        return StepCheck(step, path, False, 0, 0, 0, (_finding(error),))
    errors = check_files(catalogue, path, manifest, advance=advance)
    findings = [_finding(error) for error in errors] + _strangers(catalogue, path, manifest)
    tensors = sum([counts.get("tensors", 0) for counts in manifest.inventory.values()])
    return StepCheck(step, path, not errors, len(manifest.files), tensors, manifest.nbytes, tuple(findings))


def check_files(
    catalogue: Catalogue, path: str, manifest: StepManifest, *, first: bool = False, advance: Advance | None = None
) -> list[CorruptFile]:
    """What isn't as it was written, file by file and tensor by tensor; with ``first`` only the first of it."""
    errors: list[CorruptFile] = []
    for record in manifest.files.values():
        if errors and first:
            break
        try:
            file = catalogue.storage.open_file(os.path.join(path, record.name))
        except CorruptFile as error:
            errors.append(error)
            continue
        try:
            errors += _check_file(catalogue, manifest, record, file, advance)
        finally:
            file.close()
    return errors


def _check_file(
    catalogue: Catalogue, manifest: StepManifest, record: FileRecord, file: File, advance: Advance | None
) -> list[CorruptFile]:
    try:
        if not record.header_nbytes:
            if record.name != STATE_NAME:
                raise CorruptFile("a file of an unknown kind stands in the manifest", path=file.path)
            check_state(manifest, file, catalogue.limits)
            return []
        stored = stored_in(record, file, catalogue.limits)
    except StateDictError as error:
        return [_as_corrupt(error, file.path)]
    try:
        _verify(file, stored, advance)
    except CorruptFile as error:
        return [error, *_others(file, stored, error)]
    return []


def _as_corrupt(error: StateDictError, path: str) -> CorruptFile:
    """What the readers of the formats say about bytes that aren't theirs. Raises what the system has refused."""
    if isinstance(error, CorruptFile):
        return error
    if isinstance(error, OSError):
        raise error
    return CorruptFile(error.what, path=error.path or path, key=error.key, offset=error.offset)


def _verify(file: File, stored: Sequence[Stored], advance: Advance | None = None) -> None:
    items = [Checked(each.storage, 0, _entry(each)) for each in stored]
    nbytes = sum([each.storage.nbytes for each in stored])
    reading = choose_reading(file if isinstance(file, LocalFile) else None, nbytes)
    for some in _batches(items, nbytes if advance is None else _REPORTED_NBYTES):
        verify_sums(StorageReader([file]), some, reading)
        if advance is not None:
            advance(sum([item.storage.nbytes for item in some]))


def _batches(items: Sequence[Checked], most: int) -> Iterator[Sequence[Checked]]:
    """The storages in runs of about so many bytes."""
    first = nbytes = 0
    for at, item in enumerate(items):
        nbytes += item.storage.nbytes
        if nbytes >= most:
            yield items[first : at + 1]
            first, nbytes = at + 1, 0
    if first < len(items):
        yield items[first:]


def _others(file: File, stored: Sequence[Stored], first: CorruptFile) -> list[CorruptFile]:
    """The other tensors that differ, for whom the first wasn't enough."""
    errors = []
    for each in stored:
        if each.name != first.key:
            try:
                _verify(file, [each])
            except CorruptFile as error:
                errors.append(error)
    return errors


def _entry(stored: Stored) -> TensorEntry:
    """The bytes of a tensor as a tensor, for messages."""
    view = StorageView(stored.storage, 0, (1,))
    return TensorEntry((stored.name,), BY_CODE["U8"], (stored.storage.nbytes,), view)


def _strangers(catalogue: Catalogue, path: str, manifest: StepManifest) -> list[Finding]:
    """Files that somebody has put into the step."""
    known = {*manifest.files, MANIFEST_NAME, NEXT_STEP_NAME, VERIFIED_NAME}
    names = sorted(set(catalogue.storage.listdir(path)) - known)
    if not names:
        return []
    shown = ", ".join(names[:5]) + (f" and {len(names) - 5:,} more" if len(names) > 5 else "")
    message = f"step {step_number(os.path.basename(path))} holds what it wasn't committed with: {shown}"
    return [Finding("unknown-file", "warning", message)]


def _finding(error: CorruptFile) -> Finding:
    return Finding("damaged", "error", str(error), () if error.key is None else (error.key,))
