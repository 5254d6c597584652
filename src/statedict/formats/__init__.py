"""The formats: which one a file is, told by its content, and the reader of each.

A reader is a pure function from files to a ``Manifest``. The extension of a file is never believed; where it says something
else than the content, that becomes a finding.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from statedict.errors import FormatError, LimitExceeded, StateDictError, UnknownFormat, Unsupported
from statedict.io.ranges import File
from statedict.limits import DEFAULT_LIMITS, Limits
from statedict.manifest import Finding, Manifest

__all__ = ["is_index", "read_manifest", "sniff"]

_Reader = Callable[[Sequence[File], Limits], Manifest]

# Bytes of the beginning that are looked at first.
_HEAD_NBYTES = 512
# torch's magic number as a pickle has it: LONG1 of ten bytes and STOP; below protocol 2 as a line of digits and STOP.
_LEGACY = b"\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19."
_LEGACY_TEXT = b"L119547037146038801333356L\n."
# The members of torch's tar archives (``torch/serialization.py``, ``legacy_load``).
_TAR_MEMBERS = frozenset({"sys_info", "pickle", "tensors", "storages"})
# How pickles of protocols 0 and 1 begin that hold more than a number or a text.
_OLD_PICKLE = re.compile(
    rb"\([dlt]p\d+\r?\n|[\]})]q[\x00-\x08]|c(?:copy_reg|copyreg|__builtin__|builtins|collections|numpy[\w.]*|torch[\w.]*)\n\w+\n"
)

# Instructions of what may be a text or a pickle that are carried out to tell: no text passes for so many of them.
_MOST_GUESSED = 1_000_000
_DISTRIBUTED = (
    "Turn its folder into one file: python -m torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER FILE"
)

# What an extension promises; one that isn't here promises nothing.
_TORCH = frozenset({"torch-zip", "torchscript", "torch-legacy", "torch-tar", "pickle"})
_PROMISES: dict[str, frozenset[str]] = {
    **dict.fromkeys(("pth", "pt", "bin", "ckpt", "th", "tar", "pkl", "pickle", "ptl"), _TORCH),
    **dict.fromkeys(("safetensors", "sft"), frozenset({"safetensors"})),
    "npz": frozenset({"npz"}),
    "npy": frozenset({"npy"}),
    **dict.fromkeys(("h5", "hdf5", "keras", "onnx", "gguf", "tflite", "pb", "msgpack", "json"), frozenset()),
}
_NAMES = {
    "torch-zip": ("a zip archive of torch.save", ".pth"),
    "torchscript": ("a TorchScript archive", ".pt"),
    "torch-legacy": ("a stream of torch.save before 1.6", ".pth"),
    "torch-tar": ("a tar archive of torch before 0.1.10", ".pth"),
    "pickle": ("a pickle", ".pkl"),
    "safetensors": ("a safetensors file", ".safetensors"),
    "npz": ("an archive of numpy's", ".npz"),
    "npy": ("an array of numpy's", ".npy"),
}


def sniff(file: File, limits: Limits = DEFAULT_LIMITS) -> str:
    """The format of the file: ``torch-zip`` (TorchScript too), ``torch-legacy``, ``torch-tar``, ``safetensors``, ``npz``,
    ``npy`` or ``pickle``.

    Reads the first 512 bytes; of an archive its directory, and all of what may be a pickle without a mark of one. Raises
    ``UnknownFormat``, or another ``FormatError`` where more is known, with what the file is and what to do.
    """
    head = file.read(0, min(_HEAD_NBYTES, file.nbytes))
    if head.startswith(b"PK\x03\x04"):
        return _zip(file, head, limits)
    if head.startswith(b"\x93NUMPY"):
        return "npy"
    if _is_safetensors(file, head):
        return "safetensors"
    if _LEGACY in (head[2:15], head[11:24]) or head.startswith(_LEGACY_TEXT):
        return "torch-legacy"
    if head[257:262] == b"ustar":
        return _tar(file)
    if _is_pickle(file, head, limits):
        return "pickle"
    if is_index(file, limits):
        raise Unsupported(
            "this is the index of a checkpoint in several files, which lie beside it",
            path=file.path,
            hint="Open it by its own path, or that of its folder",
        )
    from statedict.formats.foreign import HEAD_NBYTES, describe

    raise describe(file, file.read(0, min(HEAD_NBYTES, file.nbytes)))


def is_index(file: File, limits: Limits = DEFAULT_LIMITS) -> bool:
    """Whether the file is the index of a checkpoint in several files: a JSON text with a ``weight_map``.

    Reads 512 bytes, and of a text that begins with a brace as much as a header may have.
    """
    head = file.read(0, min(_HEAD_NBYTES, file.nbytes))
    if head.lstrip()[:1] != b"{" or _is_safetensors(file, head):
        return False
    return b'"weight_map"' in file.read(0, min(file.nbytes, limits.header_bytes))


def _is_safetensors(file: File, head: bytes) -> bool:
    """A length in eight bytes, and the brace of JSON. Of a damaged file, the name may stand for one of the two."""
    start = head[8:].lstrip(b" ")
    length = int.from_bytes(head[:8], "little")
    if len(head) < 8 or (length > 1 << 40 and start[:1] != b"{"):
        return False
    named = file.path.lower().endswith((".safetensors", ".sft"))
    return (start[:1] == b"{" and (named or length <= 1 << 40)) or (named and not start)


def _zip(file: File, head: bytes, limits: Limits) -> str:
    if file.path.endswith(".distcp"):
        raise UnknownFormat(
            "this is one file of a distributed checkpoint, which can't be opened yet",
            path=file.path,
            hint=_DISTRIBUTED,
        )
    # torch.save writes this entry first: the directory need not be read twice.
    if re.match(rb"[^/]*/data\.pkl$", head[30 : 30 + int.from_bytes(head[26:28], "little")]):
        return "torch-zip"
    from statedict.formats.foreign import describe_zip
    from statedict.formats.zips import read_directory

    names = [entry.name for entry in read_directory(file, limits, fold=False).entries]
    below = {name.partition("/")[2] for name in names}
    # An archive that has lost its folder or its data.pkl is still one of torch's; its reader says what is wrong.
    if "data.pkl" in below or "data.pkl" in names or {"version", "data/0"} <= below:
        return "torch-zip"
    arrays = sum(name.endswith(".npy") for name in names)
    if arrays and 2 * arrays >= sum(not name.endswith("/") for name in names):
        return "npz"
    raise describe_zip(file, names)


def _tar(file: File) -> str:
    from statedict.formats.foreign import describe_tar
    from statedict.formats.torch_tar import members

    first = file.read(0, 100).split(b"\x00")[0].decode("latin-1").removeprefix("./")
    if first in _TAR_MEMBERS:
        return "torch-tar"
    names = members(file)
    if {"pickle", "storages"} <= names.keys():
        return "torch-tar"
    raise describe_tar(file, list(names))


def _is_pickle(file: File, head: bytes, limits: Limits) -> bool:
    """Whether the file is a pickle.

    Below protocol 2 it has no mark: what may be a text must be a pickle from end to end, or for a million instructions.
    """
    if head[:1] == b"\x80" and (len(head) == 1 or head[1] <= 5):
        if b"torch.distributed.checkpoint.metadata" in head:
            raise UnknownFormat(
                "this is the description of a distributed checkpoint, which can't be opened yet",
                path=file.path,
                hint=_DISTRIBUTED,
            )
        return True
    if _OLD_PICKLE.match(head):
        return True
    # Anything that isn't ASCII in its first byte is no instruction of those protocols, and no text begins with a brace.
    if not b"(" <= head[:1] <= b"}":
        return False
    from statedict.formats.pickles import Machine

    guessed = limits._replace(opcodes=min(limits.opcodes, _MOST_GUESSED))
    machine = Machine(file, persistent=lambda pid: pid, limits=guessed, keep_blobs=True)
    try:
        machine.run()
    except LimitExceeded:
        return True
    except StateDictError:
        return False
    return machine.offset == file.nbytes


def read_manifest(files: Sequence[File], limits: Limits = DEFAULT_LIMITS) -> Manifest:
    """The validated manifest of a checkpoint; header bytes only.

    Raises ``UnknownFormat`` for what is no checkpoint, and every other ``FormatError`` for what is a damaged one.
    """
    path = files[0].path
    try:
        manifest = _reader(sniff(files[0], limits))(files, limits).validate(limits)
    except FormatError as error:
        from statedict.formats.foreign import unfinished_hint

        error.hint = unfinished_hint(path) or error.hint
        raise
    notes = _extension(path, manifest.format)
    return manifest._replace(notes=(*manifest.notes, *notes)) if notes else manifest


def _reader(kind: str) -> _Reader:
    """The reader of a format, loaded when a file needs it."""
    if kind == "torch-zip":
        from statedict.formats.torch_zip import read_manifest as read
    elif kind == "torch-legacy":
        from statedict.formats.torch_legacy import read_manifest as read
    elif kind == "torch-tar":
        from statedict.formats.torch_tar import read_manifest as read
    elif kind == "safetensors":
        from statedict.formats.safetensors import read_manifest as read
    elif kind == "npz":
        from statedict.formats.npz import read_npz_manifest as read
    elif kind == "npy":
        from statedict.formats.npz import read_npy_manifest as read
    else:
        from statedict.formats.torch_legacy import read_pickle_manifest as read
    return read


def _extension(path: str, kind: str) -> list[Finding]:
    """A finding where the extension promises another format than the file has."""
    name = re.split(r"[/\\]", path)[-1].lower()
    stem, _, extension = name.rpartition(".")
    promised = _PROMISES.get(extension) if stem else None
    if promised is None or kind in promised:
        return []
    what, proper = _NAMES[kind]
    if extension in ("safetensors", "sft"):
        # torch/serialization.py, load(): the name alone decides.
        fails = ": torch.load and other loaders take it for safetensors by its name and fail"
    elif promised == _TORCH:
        fails = ": torch.load can't read it, and loaders that go by the name call that"
    else:
        fails = ": loaders that go by the name can't read it"
    message = f"the name ends in .{extension}, but the file is {what}{fails}. Rename it to end in {proper}"
    return [Finding("extension", "warning", message)]
