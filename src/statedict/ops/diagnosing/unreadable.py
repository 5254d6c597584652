"""Files that can't be opened as checkpoints: what each is, what is left of it, and what to do."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import Any

from statedict.errors import CorruptFile, FileError, FormatError, LimitExceeded, StateDictError, one_line
from statedict.formats.remains import Remains, remains_of
from statedict.io.ranges import File, LocalFile
from statedict.limits import DEFAULT_LIMITS, Limits
from statedict.manifest import Finding
from statedict.ops.findings import named
from statedict.report.units import human_bytes, plural

__all__ = ["unreadable_findings"]

# The code of each kind of file, by the words with which its error begins (``formats/foreign.py``, ``io/ranges.py``).
_CODES = (
    (r"this is a git-lfs pointer|this is a git-annex pointer", "pointer-file"),
    (r"this is a web page", "web-page"),
    (r"this is an? (JSON text|XML text|text)", "text-file"),
    (r"the file holds only zeros|the first [\d,]+ bytes are zeros", "all-zeros"),
    (r"the file is empty|the file begins with white space", "empty-file"),
    (r"this is .{0,40}(gzip|bzip2|xz|zstd|lz4|zip archive|tar archive|7z|RAR|part of a zip)", "still-packed"),
    (r"this is a directory", "folder"),
    (r"this is the description of a distributed|this is one file of a distributed", "distributed-checkpoint"),
    (r"this is", "other-format"),
)
_ENDS_EARLY = re.compile(
    r"ends (inside|too early|outside)|cut short|has no end|lie outside the file|is missing", re.IGNORECASE
)
# How much of a pointer is looked at.
_POINTER_NBYTES = 1024


def unreadable_findings(source: Any, error: StateDictError, limits: Limits | None = None) -> list[Finding]:
    """What is to be said about a file that ``open`` refused; nothing where that isn't about what the file holds."""
    if not isinstance(source, (str, os.PathLike)) or isinstance(error, LimitExceeded) or error.path is None:
        return []
    if isinstance(error, FileError):
        return list(_shards(error, limits or DEFAULT_LIMITS))
    if not isinstance(error, FormatError) or not os.path.lexists(error.path):
        return []
    if os.path.isdir(error.path):
        return [_folder(error)]
    return [_file(error, limits or DEFAULT_LIMITS)]


def _file(error: FormatError, limits: Limits) -> Finding:
    assert error.path is not None
    hint = f". {error.hint}" if error.hint else ""
    try:
        file = LocalFile(error.path)
    except StateDictError:
        return Finding("unreadable", "error", f"{error.what}{hint}")
    try:
        if isinstance(error, CorruptFile):
            return _damaged(file, error, remains_of(file, limits))
        code = next((code for words, code in _CODES if re.match(words, error.what)), "unreadable")
        what = _pointer(file) if code == "pointer-file" else None
        return Finding(code, "error", what or f"{error.what}{hint}")
    finally:
        file.close()


def _pointer(file: File) -> str | None:
    """What a pointer of git-lfs points to (its specification: one ``oid`` and one ``size`` a line)."""
    text = file.read(0, min(file.nbytes, _POINTER_NBYTES)).decode("utf-8", "replace")
    size = re.search(r"^size (\d{1,18})\s*$", text, re.MULTILINE)
    oid = re.search(r"^oid (sha256:[0-9a-f]{64})\s*$", text, re.MULTILINE)
    if size is None:
        return None
    which = f", its oid {oid[1]}" if oid is not None else ""
    return (
        f"this file of {file.nbytes:,} bytes is a git-lfs pointer, not weights: the real file has "
        f"{human_bytes(int(size[1]))}. Run `git lfs pull` in the repository, or download the file itself. Its size "
        f"is {int(size[1]):,} bytes{which}"
    )


def _damaged(file: File, error: CorruptFile, left: Remains | None) -> Finding:
    at = f" at byte {error.offset:,}" if error.offset is not None else ""
    facts = (
        f" (expected {one_line(error.expected)}, found {one_line(error.found)})" if error.expected is not None else ""
    )
    key = f", in tensor '{one_line(error.key)}'" if error.key is not None else ""
    cut = left is not None and left.lost
    code = "truncated" if cut or _ENDS_EARLY.search(error.what) else "damaged"
    if code == "truncated":
        begins = f"the file ends at byte {file.nbytes:,}, before its content does"
        begins += f": {error.what}{facts}" if left is None else ""
    else:
        begins = f"the file is damaged: {error.what}{at}{key}{facts}"
    return Finding(
        code,
        "error",
        f"{begins}. {_left(file, left)}{error.hint or 'Download or copy it again'}",
        left.lost if left else (),
    )


def _left(file: File, left: Remains | None) -> str:
    """What is still whole, in a sentence; empty where nobody can say."""
    if left is None or not left.lost:
        return ""
    total = len(left.whole) + len(left.lost)
    size = f"The whole file had {'at least ' if left.is_least else ''}{left.nbytes:,} bytes. " if left.nbytes else ""
    if not left.whole:
        return f"{size}None of {plural(total, 'tensor')} is whole. "
    return f"{size}{len(left.whole):,} of {plural(total, 'tensor')} are still whole; lost are {named(left.lost)}. "


def _folder(error: FormatError) -> Finding:
    """A folder that is no checkpoint; of DeepSpeed's, what to do with it."""
    assert error.path is not None
    try:
        names = sorted(os.listdir(error.path))[:10_000]
    except OSError:
        names = []
    if any(re.match(r"global_step\d+$|(bf16_)?zero_pp_rank_\d+|mp_rank_\d+_model_states\.pt$", name) for name in names):
        message = (
            "this folder is a checkpoint of DeepSpeed: the weights are spread over the files of all processes. One "
            "file of them is made by its zero_to_fp32.py, which lies in the folder (python zero_to_fp32.py . OUTPUT)"
        )
        return Finding("deepspeed-folder", "error", message)
    return Finding("folder", "error", f"{error.what}. {error.hint}" if error.hint else error.what)


def _shards(error: FileError, limits: Limits) -> Iterator[Finding]:
    """An index whose shards aren't all there: which tensors are in those that aren't."""
    from statedict.formats.sharded import read_index

    if error.path is None or not error.path.endswith(".index.json") or not os.path.isfile(error.path):
        return
    file = LocalFile(error.path)
    try:
        index = read_index(file, limits)
    except StateDictError:
        return
    finally:
        file.close()
    folder = os.path.dirname(error.path)
    missing = {name for name in index.shards if not os.path.exists(os.path.join(folder, name))}
    lost = tuple([key for key, name in index.weight_map.items() if name in missing])
    if missing:
        message = (
            f"{len(missing):,} of {plural(len(index.shards), 'file')} of this checkpoint are missing: "
            f"{named(sorted(missing))}. In them are {len(lost):,} of {plural(len(index.weight_map), 'tensor')}: "
            f"{named(lost)}. Download them into the folder of the index; the other files can be opened one by one"
        )
        yield Finding("missing-shards", "error", message, lost)
