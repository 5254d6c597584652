"""What a file is that is no checkpoint, and what to do about it, in one sentence.

The magic numbers are those of each format's own description, and of the ``file`` program's database where it has none. Only the
first few kilobytes are looked at, and never trusted further than a sentence goes.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from statedict.errors import CorruptFile, FormatError, UnknownFormat, Unsupported, one_line
from statedict.io.ranges import File

__all__ = ["HEAD_NBYTES", "describe", "describe_tar", "describe_zip", "unfinished_hint"]

# Bytes of the beginning that are looked at: web pages have their title here, and an index of shards its first shard.
HEAD_NBYTES = 16 * 1024
# Characters of a file's own words that a sentence quotes.
_QUOTED = 80
# Names that a sentence lists.
_LISTED = 3
_AGAIN = "Download or copy it again"
_OTHER = "Name the file that holds the weights"
_READABLE = "Readable are .pth, .pt, .bin and .ckpt of torch, .safetensors, .npz, .npy, and pickles"
_CHECKPOINTS = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".th", ".npz")
_UNFINISHED = (".crdownload", ".part", ".partial", ".incomplete", ".download", ".aria2")
_PACKED = (".gz", ".bz2", ".xz", ".zst", ".lz4", ".tgz")


class _Kind(NamedTuple):
    """A kind of file: its magic bytes and where they stand, what it is called, and what to do."""

    magic: bytes
    name: str
    hint: str = ""  # {path} and {out} are filled in, quoted for a shell
    offset: int = 0


_KINDS = (
    _Kind(b"\x1f\x8b", "a gzip file", "Unpack it: gzip -dc {path} > {out}"),
    _Kind(b"BZh", "a bzip2 file", "Unpack it: bzip2 -dc {path} > {out}"),
    _Kind(b"\xfd7zXZ\x00", "an xz file", "Unpack it: xz -dc {path} > {out}"),
    _Kind(b"\x28\xb5\x2f\xfd", "a zstd file", "Unpack it: zstd -dc {path} > {out}"),
    _Kind(b"\x04\x22\x4d\x18", "an lz4 file", "Unpack it: lz4 -dc {path} > {out}"),
    _Kind(b"\x78\x9c", "a stream compressed by zlib, as joblib writes it", "Save its arrays with numpy.savez"),
    _Kind(b"\x78\xda", "a stream compressed by zlib, as joblib writes it", "Save its arrays with numpy.savez"),
    _Kind(b"7z\xbc\xaf\x27\x1c", "a 7z archive", "Unpack it: 7z x {path}"),
    _Kind(b"Rar!\x1a\x07", "a RAR archive", "Unpack it: unrar x {path}"),
    _Kind(b"PK\x05\x06", "an empty zip archive", _AGAIN),
    _Kind(b"PK\x07\x08", "one part of a zip archive in several", "Join the parts and unpack them"),
    _Kind(
        b"\x89HDF\r\n\x1a\n",
        "an HDF5 file, as Keras writes it",
        "Read it with h5py and save its arrays with numpy.savez",
    ),
    _Kind(b"GGUF", "a GGUF file, the format of llama.cpp", "GGUF can't be read yet"),
    _Kind(b"tjgg", "a GGML file, an old format of llama.cpp", "Convert it with llama.cpp"),
    _Kind(b"TFL3", "a TensorFlow Lite model", "Read it with TensorFlow", offset=4),
    _Kind(b"PAR1", "a Parquet table"),
    _Kind(b"ARROW1", "an Arrow table"),
    _Kind(b"\x89PNG\r\n\x1a\n", "a PNG image"),
    _Kind(b"\xff\xd8\xff", "a JPEG image"),
    _Kind(b"GIF8", "a GIF image"),
    _Kind(b"%PDF", "a PDF document"),
    _Kind(b"\x7fELF", "a program or library (ELF)"),
    _Kind(b"MZ\x90\x00", "a Windows program or library"),
    _Kind(b"\xcf\xfa\xed\xfe", "a program or library (Mach-O)"),
    _Kind(b"\xca\xfe\xba\xbe", "a program or library (Mach-O) or a Java class"),
    _Kind(b"SQLite format 3\x00", "an SQLite database"),
    _Kind(
        b"MATLAB 5.0 MAT-file", "a MATLAB file", "Read it with scipy.io.loadmat and save its arrays with numpy.savez"
    ),
    _Kind(b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an old Office document"),
    _Kind(b"\x0a\x0e\x0a\x05<unk>", "the vocabulary of a SentencePiece tokenizer"),
)
# The beginnings of the formats that are read, for files of which nothing else is left.
_BEGINNINGS = ((b"PK\x03\x04", "a zip archive, as torch.save writes it"), (b"\x93NUMPY", "an array of numpy's"))
# TensorFlow's index of a checkpoint ends so (tensorflow/core/lib/io/table_options, kTableMagicNumber).
_TABLE_END = b"\x57\xfb\x80\x8b\x24\x75\x47\xdb"

# What the entries of a zip archive say that it is: the end of a name that only such a file has.
_ZIPS = (
    ("word/document.xml", "a Word document"),
    ("xl/workbook.xml", "an Excel workbook"),
    ("ppt/presentation.xml", "a PowerPoint presentation"),
    ("AndroidManifest.xml", "an Android package"),
    ("META-INF/MANIFEST.MF", "a Java archive"),
    (".dist-info/WHEEL", "a Python wheel"),
    ("model.weights.h5", "a model of Keras (.keras)"),
    ("saved_model.pb", "a packed SavedModel of TensorFlow"),
    ("mimetype", "an OpenDocument file or an e-book"),
)


def describe(file: File, head: bytes) -> FormatError:
    """The error that says what a file is, from its first ``HEAD_NBYTES`` bytes; nothing that can be read begins so."""
    if not head:
        return UnknownFormat("the file is empty", path=file.path, hint=_AGAIN)
    return (
        _cut(file, head)
        or _by_magic(file, head)
        or _by_text(file, head)
        or _by_structure(file, head)
        or UnknownFormat(
            "this is no checkpoint of a known format",
            path=file.path,
            found=f"{head[:16]!r} at the beginning",
            hint=f"{_READABLE}; one of those is damaged or was never whole",
        )
    )


def unfinished_hint(path: str) -> str | None:
    """What to do if the name is one that downloaders give to unfinished files."""
    if path.lower().endswith(_UNFINISHED):
        return "By its name the download isn't finished: finish it or begin again"
    return None


def _is(file: File, what: str, hint: str = "") -> UnknownFormat:
    return UnknownFormat(f"this is {what}, not a checkpoint", path=file.path, hint=_filled(file.path, hint or _OTHER))


def _filled(path: str, hint: str) -> str:
    """The hint with the commands' file names in it."""
    if "{path}" not in hint:
        return hint
    from shlex import quote

    shown = one_line(path)
    stem = next((shown[: -len(end)] for end in _PACKED if shown.lower().endswith(end)), "")
    if stem.lower().endswith(".tar") or shown.lower().endswith(".tgz"):
        return f"Unpack it: tar xf {quote(shown)}"
    return hint.replace("{path}", quote(shown)).replace("{out}", quote(stem or f"{shown}.unpacked"))


def _cut(file: File, head: bytes) -> CorruptFile | None:
    """The error of a file of which only the first few bytes are there."""
    named = next((what for magic, what in _BEGINNINGS if magic.startswith(head)), None)
    if named is None and file.path.lower().endswith((".safetensors", ".sft")) and len(head) < 10:
        named = "a safetensors file, whose header is longer"
    if named is None:
        return None
    return CorruptFile(
        f"the file is cut short: it has only the beginning of {named}",
        path=file.path,
        offset=file.nbytes,
        found=f"{file.nbytes} bytes",
        hint=_AGAIN,
    )


def _by_magic(file: File, head: bytes) -> UnknownFormat | None:
    for kind in _KINDS:
        if head.startswith(kind.magic, kind.offset):
            return _is(file, kind.name, kind.hint)
    return None


# -------------------------------------------------------------------- text


def _by_text(file: File, head: bytes) -> FormatError | None:
    text = _text(head, file.nbytes > len(head))
    if text is None:
        return None
    if not text:
        return UnknownFormat("the file begins with white space alone", path=file.path, hint=_AGAIN)
    if text.startswith("version https://git-lfs"):
        size = re.search(r"^size (\d{1,18})$", text, re.MULTILINE)
        what = "a git-lfs pointer" + (f" to a file of {int(size[1]):,} bytes" if size else "")
        return _is(file, what, "Fetch the weights: git lfs pull")
    if "/annex/objects/" in text[:300]:
        return _is(file, "a git-annex pointer", "Fetch the weights: git annex get {path}")
    if text.startswith("<"):
        return _is_markup(file, text)
    if text.startswith(("{", "[")):
        return _is_json(file, text)
    return _is(file, f"a text{_quoted(text)}", f"If it came in the place of a checkpoint: {_AGAIN.lower()}")


def _text(head: bytes, more: bool) -> str | None:
    """The beginning of a text file without the white space before it; None for binary bytes."""
    encoding = "utf-16" if head.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig"
    try:
        text = head.decode(encoding)
    except UnicodeDecodeError as error:
        # The last character may lie across the end of what was read.
        if not more or error.start < len(head) - 4:
            return None
        text = head[: error.start].decode(encoding)
    text = text.lstrip()
    return text if not re.search(r"[\x00-\x08\x0e-\x1a\x1c-\x1f]", text) else None


def _quoted(text: str) -> str:
    """The first words, for a sentence."""
    words = one_line(" ".join(text[: 4 * _QUOTED].split()))
    return f' ("{words if len(words) <= _QUOTED else words[: _QUOTED - 1] + "…"}")' if words else ""


def _is_markup(file: File, text: str) -> UnknownFormat:
    patterns = [rf"<{name}\b[^>]{{0,300}}>([^<]{{1,300}})" for name in ("title", "message", "code")]
    said = next(filter(None, (re.search(pattern, text, re.IGNORECASE) for pattern in patterns)), None)
    words = _quoted(said[1]) if said else ""
    start = text[:200].lower()
    if "<html" in start or "<!doctype html" in start or "<head" in start:
        hint = "Download the file itself: the link may need a login, or be that of the page around the file"
        return _is(file, f"a web page{words}", hint)
    return _is(file, f"an XML text{words}", _AGAIN)


def _is_json(file: File, text: str) -> FormatError:
    if '"weight_map"' in text:
        # Where it is short enough, it was opened.
        hint = "Raise how much a header may have: --limit header_bytes=N, Limits(header_bytes=N)"
        return _is(file, "the index of a checkpoint in several files, and longer than is allowed", hint)
    said = re.search(r'"(?:message|error|detail|title)"\s{0,9}:\s{0,9}"((?:[^"\\]|\\.){1,300})"', text, re.IGNORECASE)
    if said:
        return _is(file, f"a JSON text with a message{_quoted(said[1])}", _AGAIN)
    return _is(file, f"a JSON text{_quoted(text)}", "Name the file with the weights, which lies beside it as a rule")


# -------------------------------------------------------------------- binary formats without a magic number


def _by_structure(file: File, head: bytes) -> UnknownFormat | None:
    zeros = len(head) - len(head.lstrip(b"\x00"))
    if zeros == len(head):
        what = (
            f"the file holds only zeros: {zeros:,} bytes"
            if zeros == file.nbytes
            else f"the first {zeros:,} bytes are zeros"
        )
        return UnknownFormat(what, path=file.path, hint=f"A crash or an unfinished download leaves a file so. {_AGAIN}")
    name = re.split(r"[/\\]", file.path)[-1].lower()
    if name == "saved_model.pb" or re.search(r"\.data-\d{5}-of-\d{5}$", name) or _ends_as_table(file):
        return _is(file, "a part of a model or checkpoint of TensorFlow", "Save its variables with numpy.savez")
    producer = re.match(rb"\x08[\x01-\x14]\x12([\x02-\x40])([a-zA-Z][\w.+ -]+)", head)
    if name.endswith(".onnx") or (producer and len(producer[2]) >= producer[1][0]):
        by = f", written by {producer[2][: producer[1][0]].decode()}" if producer else ""
        return _is(file, f"an ONNX model{by}", "Read it with onnx and save its initializers with numpy.savez")
    if _is_msgpack(head):
        return _is(file, "a msgpack file, as Flax writes it", "Read it with flax and save its arrays with numpy.savez")
    return None


def _ends_as_table(file: File) -> bool:
    return file.nbytes >= 48 and file.read(file.nbytes - 8, 8) == _TABLE_END


def _is_msgpack(head: bytes) -> bool:
    """A small map whose first key is a short text that reads as a name (msgpack spec, "map format family")."""
    length = head[1] - 0xA0 if len(head) > 1 and 0x81 <= head[0] <= 0x8F else 0
    return 2 <= length <= 31 and re.fullmatch(rb"[A-Za-z_][\w./-]+", head[2 : 2 + length]) is not None


# -------------------------------------------------------------------- archives


def describe_zip(file: File, names: Sequence[str]) -> FormatError:
    """The error that says what a zip archive is that holds neither a checkpoint of torch's nor arrays of numpy's."""
    files = [name for name in names if not name.endswith("/")]
    if any(name.endswith(".data/extern_modules") for name in files):
        return Unsupported(
            "this is an archive of torch.package, which holds code and can't be read yet",
            path=file.path,
            hint="Load it with torch.package.PackageImporter if you trust it, and save its state dict",
        )
    if any(name.endswith(("/archive_format", "serialized_exported_program.json")) for name in files):
        return Unsupported(
            "this is a program of torch.export (.pt2), which can't be read yet",
            path=file.path,
            hint="Load it with torch.export.load, and save its state_dict",
        )
    for end, what in _ZIPS:
        if any(name == end or name.endswith((f"/{end}", end if end.startswith(".") else f"/{end}")) for name in files):
            return _is(file, what)
    return _is(file, f"a zip archive of {_listed(files)}", _inside(files, "unzip {path}"))


def describe_tar(file: File, names: Sequence[str]) -> UnknownFormat:
    """The error that says what a tar archive is that isn't torch's."""
    inside = _inside(names, "tar xf {path}")
    return _is(file, f"a tar archive of {_listed(names)}", inside or "Unpack it: tar xf {path}")


def _listed(names: Sequence[str]) -> str:
    count = "1 file" if len(names) == 1 else f"{len(names):,} files"
    shown = ", ".join(one_line(name) for name in names[:_LISTED])
    return f"{count} ({shown}{', …' if len(names) > _LISTED else ''})" if names else "no files"


def _inside(names: Sequence[str], command: str) -> str:
    found = next((name for name in names if name.lower().endswith(_CHECKPOINTS)), None)
    return "" if found is None else f"Unpack it, it holds '{one_line(found)}': {command}"
