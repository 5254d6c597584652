"""One committed step of a training run: a folder of safetensors files, the values beside their tensors, and a manifest of all.

    step-00001000/
        model.safetensors …   the tensors of each component, under their dotted keys, with a digest of each
        state.json            {"components": {name: tree}, "schema": "statedict.step-state/1", "step": 1000}
        manifest.json         {"digest": "xxh3-128:…", …}   written last; its digest covers all bytes behind its own

A tree is ``typed_json``'s, with the key of a tensor in its component's files where a tensor stands. The manifest:

    {"components": {name: [file, …]}, "facts": {…}, "files": {file: {"digest", "header_nbytes", "nbytes", "tensors"}},
     "inventory": {name: {"nbytes", "objects", "tensors"}}, "metrics": {…}, "schema": "statedict.step/1", "step", "time"}

``digest`` of a safetensors file is that of its header, whose length ``header_nbytes`` counts with its first eight bytes; ``tensors``
has for each name in the header the digest of its bytes, and that of their first 4,096 (both xxh3-128, 32 hexadecimal digits). So every
byte is covered once. Other files have a ``digest`` of the whole. ``time`` counts seconds since 1970.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from statedict.errors import CorruptFile, StateDictError, one_line
from statedict.formats.typed_json import decode, encode_value
from statedict.limits import DEFAULT_LIMITS, Limits
from statedict.manifest import TensorEntry

__all__ = [
    "BEGIN",
    "DAMAGED",
    "MANIFEST_NAME",
    "PROBE_NBYTES",
    "SCHEMA",
    "STATE_NAME",
    "STATE_SCHEMA",
    "FileRecord",
    "StepManifest",
    "digest_of",
    "is_plain_name",
    "parse_step",
    "render_step",
    "step_name",
    "step_number",
]

MANIFEST_NAME = "manifest.json"
STATE_NAME = "state.json"
SCHEMA = "statedict.step/1"
STATE_SCHEMA = "statedict.step-state/1"
# Bytes of a tensor's beginning that have a digest of their own: most tensors that have changed differ there already.
PROBE_NBYTES = 4096

# The first bytes of every manifest of a step.
BEGIN = b'{"digest":"xxh3-128:'

_KIND = "xxh3-128:"
_HEX = re.compile(r"[0-9a-f]{32}")
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.@+-]*")
_STEP_NAME = re.compile(r"step-(\d{8,19})")
_LONGEST_NAME = 200
# What to do about a step that isn't as it was written.
DAMAGED = "The step is damaged: restore an older one, or see which are whole with statedict runs FOLDER verify"


class FileRecord(NamedTuple):
    """What the manifest says of one file."""

    name: str
    nbytes: int
    digest: str  # of the header of a safetensors file, else of the whole
    header_nbytes: int = 0  # 0 for a file that is no safetensors file
    tensors: Mapping[
        str, tuple[str, str]
    ] = {}  # by name in the header: the digest of its bytes, and of their beginning

    def to_dict(self) -> dict[str, object]:
        """The record, JSON-ready."""
        made: dict[str, object] = {"digest": self.digest, "nbytes": self.nbytes}
        if self.header_nbytes:
            made["header_nbytes"] = self.header_nbytes
            made["tensors"] = {name: list(pair) for name, pair in self.tensors.items()}
        return made


class StepManifest(NamedTuple):
    """What the manifest of a step says."""

    step: int
    time: float  # seconds since 1970
    files: Mapping[str, FileRecord]
    components: Mapping[str, tuple[str, ...]]  # the names of its files
    inventory: Mapping[str, Mapping[str, int]]
    metrics: Mapping[str, float]
    facts: Mapping[str, object]
    digest: str = ""  # of the manifest itself

    @property
    def nbytes(self) -> int:
        """Bytes of all files beside the manifest."""
        return sum(record.nbytes for record in self.files.values())


def step_name(step: int) -> str:
    """The name of a step's folder: ``step-00001000``."""
    return f"step-{step:08d}"


def step_number(name: str) -> int | None:
    """The number of a step's folder; None for another name."""
    found = _STEP_NAME.fullmatch(name)
    if found is None or step_name(int(found[1])) != name:
        return None
    return int(found[1])


def digest_of(data: bytes | memoryview) -> str:
    """The digest of these bytes, as manifests spell it."""
    from xxhash import xxh3_128_hexdigest

    return f"{_KIND}{xxh3_128_hexdigest(data)}"


def render_step(manifest: StepManifest) -> bytes:
    """The text of the manifest: canonical JSON (sorted keys, no blanks), its own digest first. Raises ``StateDictError``
    for facts that are no JSON.
    """
    body = {
        "components": {name: list(files) for name, files in manifest.components.items()},
        "facts": manifest.facts,
        "files": {name: record.to_dict() for name, record in manifest.files.items()},
        "inventory": manifest.inventory,
        "metrics": {name: encode_value(value, _no_tensor, name) for name, value in manifest.metrics.items()},
        "schema": SCHEMA,
        "step": manifest.step,
        "time": manifest.time,
    }
    try:
        text = json.dumps(body, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=True)
    except (ValueError, TypeError, RecursionError) as error:
        raise StateDictError(f"the facts of a step must be plain JSON: {one_line(error)}") from error
    rest = text[1:].encode("ascii") + b"\n"
    return BEGIN + digest_of(rest).removeprefix(_KIND).encode("ascii") + b'",' + rest


def _no_tensor(entry: TensorEntry) -> object:
    raise ValueError("a metric is a number")


def parse_step(data: bytes, path: str, limits: Limits = DEFAULT_LIMITS) -> StepManifest:
    """The manifest in these bytes. Raises ``CorruptFile`` where its digest or its form isn't right."""
    limits.check("header_bytes", len(data), "the manifest is too long", path=path)
    start = len(BEGIN) + 32
    rest = data[start + 2 :]
    if not data.startswith(BEGIN) or data[start : start + 2] != b'",':
        raise CorruptFile("this is no manifest of a step", path=path, hint=DAMAGED)
    digest = _KIND + data[len(BEGIN) : start].decode("ascii", "replace")
    if digest_of(rest) != digest:
        raise CorruptFile("the manifest isn't the one that was written: its digest differs", path=path, hint=DAMAGED)
    try:
        return _manifest(json.loads(b"{" + rest), digest)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CorruptFile(f"the manifest is of no known form: {one_line(error)}", path=path, hint=DAMAGED) from error


def _manifest(found: Any, digest: str) -> StepManifest:
    if found["schema"] != SCHEMA:
        raise ValueError(f"its schema is {found['schema']!r}, this program knows {SCHEMA}")
    files = {str(name): _record(name, facts) for name, facts in found["files"].items()}
    components = {str(name): tuple(listed) for name, listed in found["components"].items()}
    named = [name for listed in components.values() for name in listed]
    if len(set(named)) != len(named) or not set(named) | {STATE_NAME} <= files.keys():
        raise ValueError("a component names a file that isn't listed, or that another has")
    step, time = found["step"], found["time"]
    if type(step) is not int or not 0 <= step < 10**19 or type(time) not in (int, float):
        raise ValueError("its step or time is no number")
    metrics = {str(name): _number(value) for name, value in found["metrics"].items()}
    inventory = {str(name): dict(counts) for name, counts in found["inventory"].items()}
    return StepManifest(step, float(time), files, components, inventory, metrics, dict(found["facts"]), digest)


def _number(value: object) -> float:
    number = decode(value, _no_name)
    if isinstance(number, bool) or not isinstance(number, (int, float)):
        raise ValueError("a metric that is no number")
    return number


def _no_name(value: object) -> object:
    raise ValueError("a tensor where there is none")


def _record(name: object, facts: Any) -> FileRecord:
    if not isinstance(name, str) or not is_plain_name(name) or name == MANIFEST_NAME:
        raise ValueError("the name of a file is none that a step has")
    nbytes, digest, header_nbytes = facts["nbytes"], facts["digest"], facts.get("header_nbytes", 0)
    if type(nbytes) is not int or type(header_nbytes) is not int or not 0 <= header_nbytes <= nbytes:
        raise ValueError("the size of a file is none")
    if not isinstance(digest, str) or not _HEX.fullmatch(digest.removeprefix(_KIND)):
        raise ValueError("the digest of a file is none")
    tensors = {}
    for tensor, (whole, probe) in facts.get("tensors", {}).items():
        if not _HEX.fullmatch(whole) or not _HEX.fullmatch(probe):
            raise ValueError("the digest of a tensor is none")
        tensors[tensor] = (whole, probe)
    return FileRecord(name, nbytes, digest, header_nbytes, tensors)


def is_plain_name(name: str) -> bool:
    """Whether a file of a step, or a component, may be called so."""
    return len(name) <= _LONGEST_NAME and _PLAIN_NAME.fullmatch(name) is not None
