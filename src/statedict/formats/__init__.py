"""The formats: which one a file is, told by its content, and the reader of each.

A reader is a pure function from files to a ``Manifest``. The extension of a file is never believed.
"""

from __future__ import annotations

from collections.abc import Sequence

from statedict.errors import UnknownFormat
from statedict.io.ranges import File
from statedict.limits import DEFAULT_LIMITS, Limits
from statedict.manifest import Manifest

__all__ = ["read_manifest", "sniff"]

_TAR_MAGIC = (257, b"ustar")
_LEGACY = b"\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19"


def sniff(file: File) -> str:
    """The format of the file: ``torch-zip`` (TorchScript too), ``torch-legacy``, ``torch-tar``, ``safetensors``
    or ``pickle``.

    Reads the first 512 bytes. Raises ``UnknownFormat`` with what the file is.
    """
    head = file.read(0, min(512, file.nbytes))
    if not head:
        raise UnknownFormat("the file is empty", path=file.path, hint="Download or copy it again")
    if head.startswith(b"PK\x03\x04"):
        return "torch-zip"
    if len(head) > 8 and int.from_bytes(head[:8], "little") <= 1 << 40 and head[8:].lstrip(b" ")[:1] == b"{":
        return "safetensors"
    if head[:1] == b"\x80" and _LEGACY in head[:32]:
        return "torch-legacy"
    if head[_TAR_MAGIC[0] :].startswith(_TAR_MAGIC[1]):
        return "torch-tar"
    if head[:1] == b"\x80" and len(head) > 1 and head[1] <= 5:
        return "pickle"
    if head.startswith(b"version https://git-lfs"):
        raise UnknownFormat(
            "this is a git-lfs pointer, not the weights themselves", path=file.path, hint="Run: git lfs pull"
        )
    if head.lstrip()[:1] == b"<":
        raise UnknownFormat("this is a web page, not a checkpoint", path=file.path, hint="Download the file again")
    raise UnknownFormat("this is no checkpoint that can be read", path=file.path, found=repr(head[:16]))


def read_manifest(files: Sequence[File], limits: Limits = DEFAULT_LIMITS) -> Manifest:
    """The validated manifest of a checkpoint; header bytes only."""
    kind = sniff(files[0])
    if kind == "torch-zip":
        from statedict.formats.torch_zip import read_manifest as read
    elif kind == "torch-legacy":
        from statedict.formats.torch_legacy import read_manifest as read
    elif kind == "torch-tar":
        from statedict.formats.torch_tar import read_manifest as read
    elif kind == "safetensors":
        from statedict.formats.safetensors import read_manifest as read
    else:
        from statedict.formats.torch_legacy import read_pickle_manifest as read
    return read(files, limits).validate(limits)
