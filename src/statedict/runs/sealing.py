"""A folder that somebody else has written, sealed where it lies: every file on the disk, and a list of all with their digests.

    checkpoint-500/
        model.safetensors, optimizer.pt, global_step500/…    as their writer has left them, in folders of any depth
        statedict-seal.json                                   {"digest":"xxh3-128:…", …}   written last

    {"files": {name: {"digest", "nbytes"}}, "metrics": {…}, "schema": "statedict.seal/1", "step": number or null, "time"}

The names have slashes between their parts; ``digest`` of the seal covers all bytes behind its own. ``time`` counts seconds since 1970.

What a seal says: from the moment that it is there, the folder outlives a power cut, and every bit of it that changes is found. What
it can't say: that the writer wrote what it meant to, nor who wrote it, as anybody can seal. A folder without a seal may be
half written: its writer was killed, or is still at work.
"""

from __future__ import annotations

import errno
import json
import os
import stat
import time
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from statedict.errors import CorruptFile, FileError, RunError, StateDictError, Uncommitted, Unsupported, one_line
from statedict.formats.step import BEGIN, digest_of
from statedict.formats.typed_json import decode, encode_value
from statedict.io.durable import write_bytes
from statedict.io.ranges import LocalFile, blocks
from statedict.limits import DEFAULT_LIMITS
from statedict.manifest import Finding, TensorEntry
from statedict.runs.storage import LocalStorage

__all__ = ["SEAL_NAME", "FileSum", "Seal", "SealCheck", "check_sealed", "read_seal", "seal"]

SEAL_NAME = "statedict-seal.json"
SCHEMA = "statedict.seal/1"

_KIND = "xxh3-128:"
# Bytes that are hashed at a time: few enough for the processor's cache, many enough that calls don't count.
_BLOCK_NBYTES = 4 * 1024 * 1024
# What the writer of the seal calls it before it has its name.
_UNFINISHED = f".{SEAL_NAME}."
_DAMAGED = "Take an older checkpoint: this one isn't as it was sealed"


class FileSum(NamedTuple):
    """What the seal says of one file."""

    nbytes: int
    digest: str


class Seal(NamedTuple):
    """A sealed folder, as its seal describes it."""

    path: str
    step: int | None
    time: float  # seconds since 1970
    files: Mapping[str, FileSum]
    metrics: Mapping[str, float]
    durable: bool = True  # False where the file system can't say that a folder outlives a power cut

    @property
    def nbytes(self) -> int:
        """Bytes of all files but the seal."""
        return sum([file.nbytes for file in self.files.values()])


class SealCheck(NamedTuple):
    """What was found about a sealed folder: what isn't as it was sealed, and files that nobody sealed."""

    seal: Seal
    errors: tuple[CorruptFile, ...]
    findings: tuple[Finding, ...]


class _Item(NamedTuple):
    name: str  # from the folder on, with slashes; "" for the folder itself
    kind: str  # "file" | "folder" | "other"
    nbytes: int
    facts: object  # what changes when it does


def seal(
    folder: str | os.PathLike[str], *, step: int | None = None, metrics: Mapping[str, float] | None = None
) -> Seal:
    """Have every byte of a folder and every name in it on the disk, and write what they are. A seal that was there is replaced.

    Reads each file once, mostly from memory, as it was just written. Nobody may be writing to the folder: what changes meanwhile is
    an error. Raises ``FileError`` with the errno, and ``Unsupported`` for what is neither a file nor a folder.
    """
    path = os.fspath(folder)
    try:
        return _sealed(path, step, dict(metrics or {}))
    except StateDictError:
        raise
    except OSError as error:
        raise RunError.of(error, path, "the folder can't be sealed") from error


def _sealed(path: str, step: int | None, metrics: Mapping[str, float]) -> Seal:
    storage = LocalStorage()
    items = list(_walk(path))
    strange = [item.name for item in items if item.kind == "other"]
    if strange:
        what = f"'{one_line(strange[0])}' is neither a file nor a folder, and can't be sealed"
        raise Unsupported(what, path=path, hint="Put the file itself in its place: links lead to what may change")
    files = {item.name: _hashed(path, item) for item in items if item.kind == "file"}
    durable = True
    for item in reversed(items):  # the deepest folders first
        if item.kind == "folder" and item.name:
            durable &= storage.fsync_folder(os.path.join(path, item.name))
    if {item.name: item.facts for item in items if item.kind == "file"} != _facts(path):
        what = "the folder changes while it is being sealed"
        raise RunError(what, errno=errno.EBUSY, path=path, hint="Seal it when its writer is done")
    durable &= storage.fsync_folder(os.path.dirname(os.path.abspath(path)))
    made = Seal(path, step, time.time(), files, metrics, durable)
    write_bytes(os.path.join(path, SEAL_NAME), _render(made), overwrite=True)  # syncs the folder too
    return made


def _facts(path: str) -> dict[str, object]:
    return {item.name: item.facts for item in _walk(path) if item.kind == "file"}


def _walk(path: str) -> Iterator[_Item]:
    """Everything in a folder, itself first and each folder before what is in it, links not followed; the seal isn't listed."""
    pending = [_Item("", "folder", 0, None)]
    while pending:
        item = pending.pop()
        yield item
        if item.kind != "folder":
            continue
        with os.scandir(os.path.join(path, item.name)) as entries:
            found = sorted(entries, key=lambda entry: entry.name, reverse=True)
        for entry in found:
            if not item.name and (entry.name == SEAL_NAME or entry.name.startswith(_UNFINISHED)):
                continue
            facts = entry.stat(follow_symlinks=False)
            mode = facts.st_mode
            kind = "file" if stat.S_ISREG(mode) else "folder" if stat.S_ISDIR(mode) else "other"
            name = f"{item.name}/{entry.name}" if item.name else entry.name
            pending.append(_Item(name, kind, facts.st_size, (facts.st_ino, facts.st_size, facts.st_mtime_ns)))


def _hashed(path: str, item: _Item) -> FileSum:
    """The size and digest of a file, which is on the disk from then on."""
    file = LocalFile(os.path.join(path, item.name))
    try:
        made = FileSum(file.nbytes, _digest(file))
        os.fsync(file.fileno())
    finally:
        file.close()
    return made


def _digest(file: LocalFile) -> str:
    from xxhash import xxh3_128

    state = xxh3_128()
    buffer = memoryview(bytearray(min(_BLOCK_NBYTES, file.nbytes)))
    for offset, count in blocks(0, file.nbytes, _BLOCK_NBYTES):
        file.read_into(offset, buffer[:count])
        state.update(buffer[:count])
    return _KIND + str(state.hexdigest())


# -------------------------------------------------------------------- the seal itself


def _render(made: Seal) -> bytes:
    body = {
        "files": {name: file._asdict() for name, file in made.files.items()},
        "metrics": {name: encode_value(float(value), _no_tensor, name) for name, value in made.metrics.items()},
        "schema": SCHEMA,
        "step": made.step,
        "time": made.time,
    }
    text = json.dumps(body, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=True)
    rest = text[1:].encode("ascii") + b"\n"
    return BEGIN + digest_of(rest).removeprefix(_KIND).encode("ascii") + b'",' + rest


def _no_tensor(entry: TensorEntry) -> object:
    raise ValueError("a metric is a number")


def _no_name(value: object) -> object:
    raise ValueError("a tensor where there is none")


def read_seal(folder: str | os.PathLike[str]) -> Seal:
    """What the seal of a folder says; no other file is read.

    Raises ``Uncommitted`` where there is none, ``CorruptFile`` where it isn't as it was written, ``FileError`` for what the system refuses.
    """
    path = os.fspath(folder)
    name = os.path.join(path, SEAL_NAME)
    if os.path.isdir(path) and not os.path.lexists(name):
        hint = f"If you know that it is whole, seal it: statedict.runs.sealing.seal({path!r})"
        raise Uncommitted("the folder was never sealed, and may be half written", path=path, hint=hint)
    file = LocalFile(name)
    try:
        DEFAULT_LIMITS.check("header_bytes", file.nbytes, "the seal is too long", path=name)
        data = file.read(0, file.nbytes)
    finally:
        file.close()
    start = len(BEGIN) + len("0123456789abcdef0123456789abcdef")
    rest = data[start + 2 :]
    digest = _KIND + data[len(BEGIN) : start].decode("ascii", "replace")
    if not data.startswith(BEGIN) or data[start : start + 2] != b'",' or digest_of(rest) != digest:
        raise CorruptFile("the seal isn't the one that was written: its digest differs", path=name, hint=_DAMAGED)
    try:
        return _parsed(path, json.loads(b"{" + rest))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CorruptFile(f"the seal is of no known form: {one_line(error)}", path=name, hint=_DAMAGED) from error


def _parsed(path: str, found: Any) -> Seal:
    if found["schema"] != SCHEMA:
        raise ValueError(f"its schema is {found['schema']!r}, this program knows {SCHEMA}")
    files = {}
    for name, facts in found["files"].items():
        if type(facts["nbytes"]) is not int or not isinstance(facts["digest"], str):
            raise ValueError("the size or digest of a file is none")
        files[name] = FileSum(facts["nbytes"], facts["digest"])
    step = found["step"]
    if step is not None and type(step) is not int:
        raise ValueError("its step is no number")
    metrics = {name: _number(decode(value, _no_name)) for name, value in found["metrics"].items()}
    return Seal(path, step, float(found["time"]), files, metrics)


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError("a metric that is no number")
    return float(value)


# -------------------------------------------------------------------- is it still so?


def check_sealed(folder: str | os.PathLike[str], *, first: bool = False) -> SealCheck:
    """Read every byte of a sealed folder and compare; with ``first`` only until something differs. Nothing is changed.

    Names of the seal are compared with those that are there, none is opened that isn't. Raises what ``read_seal`` does, and
    ``FileError`` for what the system doesn't let be read.
    """
    path = os.fspath(folder)
    found = read_seal(path)
    try:
        there = {item.name: item for item in _walk(path) if item.kind != "folder"}
        errors: list[CorruptFile] = []
        for name, expected in found.files.items():
            error = _difference(path, name, there.get(name), expected)
            if error is not None:
                errors.append(error)
                if first:
                    break
    except StateDictError:
        raise
    except OSError as error:
        raise FileError.of(error, path, "the folder can't be read") from error
    strangers = sorted(there.keys() - found.files.keys())
    shown = ", ".join([one_line(name) for name in strangers[:5]])
    findings = [Finding("unknown-file", "warning", f"not part of what was sealed: {shown}")] if strangers else []
    return SealCheck(found, tuple(errors), tuple(findings))


def _difference(path: str, name: str, item: _Item | None, expected: FileSum) -> CorruptFile | None:
    where = os.path.join(path, name)
    if item is None or item.kind != "file":
        what = "a file that was sealed is missing" if item is None else "a file that was sealed is something else now"
        return CorruptFile(what, path=where, hint=_DAMAGED)
    file = LocalFile(where)
    try:
        if file.nbytes != expected.nbytes:
            what = "the file has another size than when it was sealed"
            return CorruptFile(what, path=where, expected=f"{expected.nbytes} bytes", found=file.nbytes, hint=_DAMAGED)
        if _digest(file) != expected.digest:
            return CorruptFile("the file isn't as it was sealed: its digest differs", path=where, hint=_DAMAGED)
    finally:
        file.close()
    return None
