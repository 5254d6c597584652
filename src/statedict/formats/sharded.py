"""A checkpoint in several files, as the hub has it: shards, and a JSON file that says which tensor is in which.

    {"metadata": {"total_size": bytes of all tensors, …},
     "weight_map": {name of a tensor: name of its shard, beside the index}}

Each shard is a checkpoint of its own, of safetensors or of torch, with some of the keys. Readers differ in what they believe, the
map or the shards, so the two must agree here. Where this program wrote the index, ``metadata`` also has ``statedict``: what is
in the ``__metadata__`` of a single file, about the tensors of all shards (``safetensors_notes.py``). Source of the layout:
huggingface_hub ``serialization/_torch.py`` and ``_base.py``.
"""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from statedict.errors import CorruptFile, FileError, Unsupported, one_line
from statedict.formats import read_manifest
from statedict.formats.merging import Part, merged
from statedict.formats.safetensors_notes import UnfitNotes, apply_notes
from statedict.formats.value_tree import Tree
from statedict.io.ranges import File
from statedict.keys import dotted, natural
from statedict.limits import DEFAULT_LIMITS, Limits
from statedict.manifest import FileFact, Finding, Manifest
from statedict.report.units import plural

__all__ = ["Index", "read_index", "read_sharded_manifest"]

# Names that one sentence lists.
_LISTED = 5
_AGAIN = "Download the index and its shards again, from one place"
# What a shard may be: anything that holds a state dict.
_SHARDS = frozenset({"safetensors", "torch-zip", "torch-legacy", "torch-tar", "torchscript", "pickle"})


class Index(NamedTuple):
    """What the index says, checked as far as it can be without the shards."""

    path: str
    weight_map: Mapping[str, str]  # the name of a tensor, and that of its shard
    metadata: Mapping[str, object]
    shards: tuple[str, ...]  # the names of the shards, once each, in the order of their numbers

    @property
    def paths(self) -> list[str]:
        """Where the shards are. Raises ``FileError`` if some aren't, naming them."""
        folder = os.path.dirname(self.path)
        paths = [os.path.join(folder, name) for name in self.shards]
        missing = [name for name, path in zip(self.shards, paths) if not os.path.exists(path)]
        if missing:
            raise FileError(
                f"this is the index of a checkpoint in several files, and {len(missing)} of {len(paths)} are missing: "
                f"{_named(missing)}",
                errno=errno.ENOENT,
                path=self.path,
                hint="Put them beside it: download them again",
            )
        return paths


def read_index(file: File, limits: Limits = DEFAULT_LIMITS) -> Index:
    """What an index says; no shard is looked at.

    Raises ``CorruptFile`` for what is no index, for a name that stands twice, and for a shard whose name leads out of the folder.
    """
    limits.check("header_bytes", file.nbytes, "the index is too long", path=file.path)
    try:
        found = json.loads(file.read(0, file.nbytes).decode("utf-8"), object_pairs_hook=_unique, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        what = error if type(error) is ValueError else type(error).__name__
        raise CorruptFile(f"the index is no JSON: {one_line(what)}", path=file.path, hint=_AGAIN) from error
    weight_map, metadata = (found.get("weight_map"), found.get("metadata")) if isinstance(found, dict) else (None, None)
    if not isinstance(weight_map, dict):
        raise CorruptFile("the index has no 'weight_map' with names of tensors", path=file.path, hint=_AGAIN)
    limits.check("nodes", len(weight_map), "too many tensors in the index", path=file.path)
    known: set[str] = set()
    for key, name in weight_map.items():
        if not isinstance(name, str):
            raise CorruptFile("the shard is no text", path=file.path, key=key, found=repr(name), hint=_AGAIN)
        if name not in known:
            _check_name(file.path, key, name)
            known.add(name)
    return Index(
        file.path, weight_map, metadata if isinstance(metadata, dict) else {}, tuple(sorted(known, key=natural))
    )


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    made = dict(pairs)
    if len(made) != len(pairs):
        # Readers differ in which of the two they take.
        raise ValueError("a name stands twice")
    return made


def _refuse(text: str) -> object:
    raise ValueError(f"{text} is no JSON number")


def _check_name(index: str, key: str, name: str) -> None:
    """Refuse the name of a shard that isn't that of a file in the index's own folder, or in a folder below it.

    The file itself may be a symbolic link, as those in the hub's cache are; a folder on the way may not lead out.
    """
    parts = name.split("/")
    what = ""
    if not name.isprintable() or "\\" in name or re.match(r"[A-Za-z]:", name):
        what = "is no plain name"
    elif any(part in ("", ".", "..") for part in parts):
        what = "leads out of the folder"
    elif name == os.path.basename(index):
        what = "is the index itself"
    elif len(parts) > 1:
        folder = os.path.realpath(os.path.dirname(index) or ".")
        inner = os.path.realpath(os.path.dirname(os.path.join(folder, name)))
        what = "" if os.path.commonpath([folder, inner]) == folder else "leads out of the folder"
    if what:
        raise CorruptFile(
            f"the index names a shard whose name {what}",
            path=index,
            key=key,
            expected="a file beside the index",
            found=f"'{one_line(name)}'",
            hint="Nothing outside the folder is read. Mend the index, or get it from where it can be trusted",
        )


# -------------------------------------------------------------------- the shards


def read_sharded_manifest(index: Index, files: Sequence[File], limits: Limits = DEFAULT_LIMITS) -> Manifest:
    """One manifest over all shards; header bytes only. ``files`` are those of ``index.paths``, and the index's own at the end.

    Raises ``CorruptFile`` where the map and the headers don't agree: a tensor that its shard doesn't hold, one that two shards
    hold; and what the readers of the shards raise.
    """
    parts: list[Part] = []
    first = 0
    for number, (name, file) in enumerate(zip(index.shards, files)):
        parts.append(Part.of(name, number, _shard(file, limits), first))
        first += len(parts[-1].manifest.storages)
    findings = [*_check_map(index, parts), *_check_size(index, parts), *_findings_of(parts)]
    tree = _tree(index, parts, limits, findings)
    return Manifest(
        "sharded",
        tuple([FileFact(file.path, file.nbytes) for file in files]),
        tuple(tree.storages),
        tree.tensors,
        tree.objects,
        tree.root,
        _texts(parts, tree),
        (*findings, *tree.notes),
        {"shards": str(len(parts)), **dict(_facts(index))},
    ).validate(limits)


def _shard(file: File, limits: Limits) -> Manifest:
    manifest = read_manifest([file], limits)
    if manifest.format not in _SHARDS:
        raise Unsupported(
            f"a shard is a file of the format {manifest.format}", path=file.path, hint="Open it by itself, by its path"
        )
    return manifest


def _check_map(index: Index, parts: Sequence[Part]) -> Iterator[Finding]:
    """Compare what the map says with what the shards hold."""
    homes: dict[str, str] = {}
    for part in parts:
        for name in part.names:
            if homes.setdefault(name, part.name) != part.name:
                raise CorruptFile(
                    "two shards hold the tensor, and readers differ in which they take",
                    path=index.path,
                    key=name,
                    found=_named([homes[name], part.name]),
                    hint=_AGAIN,
                )
    lost = [key for key, shard in index.weight_map.items() if homes.get(key) != shard]
    if lost:
        home = homes.get(lost[0])
        raise CorruptFile(
            f"the index names {plural(len(lost), 'tensor')} that the shard doesn't hold: {_named(lost)}",
            path=index.path,
            key=lost[0],
            expected=f"it in '{one_line(index.weight_map[lost[0]])}'",
            found="it in no shard" if home is None else f"it in '{one_line(home)}'",
            hint=_AGAIN,
        )
    unlisted = [name for part in parts for name in part.names if name not in index.weight_map]
    if unlisted:
        what = f"the shards hold {plural(len(unlisted), 'key')} that the index doesn't list: {_named(unlisted)}"
        yield Finding("unlisted-keys", "warning", f"{what}. They are shown: most loaders take them", tuple(unlisted))


def _check_size(index: Index, parts: Sequence[Part]) -> Iterator[Finding]:
    """A finding where the index counts other bytes: many do, and no reader relies on it."""
    said = index.metadata.get("total_size")
    views = sum([entry.nbytes for part in parts for entry in part.manifest.tensors.values()])
    stored = sum([storage.nbytes for part in parts for storage in part.manifest.storages])
    if said is not None and said not in (views, stored):
        what = f"the index gives a total size of {one_line(said)}, the tensors of its shards have {views} bytes"
        yield Finding("index-total-size", "info", what)


def _findings_of(parts: Sequence[Part]) -> Iterator[Finding]:
    """What the readers found in the shards: a finding that several have is told of the first."""
    found: dict[str, list[tuple[str, Finding]]] = {}
    for part in parts:
        for finding in part.manifest.notes:
            found.setdefault(finding.code, []).append((part.name, finding))
    for group in found.values():
        name, first = group[0]
        more = f"; so in {plural(len(group) - 1, 'other shard')}" if len(group) > 1 else ""
        keys = tuple([key for _, finding in group for key in finding.keys])
        yield first._replace(message=f"in '{one_line(name)}', {first.message}{more}", keys=keys)


def _tree(index: Index, parts: Sequence[Part], limits: Limits, findings: list[Finding]) -> Tree:
    """The tree of all shards: as the notes of the index describe it, else their state dicts one after the other."""
    notes = index.metadata.get("statedict")
    if isinstance(notes, str) and all(part.is_flat for part in parts):
        codes = {name: code for part in parts for name, code in part.codes()}
        entries = {str(path[0]): entry for part in parts for path, entry in part.manifest.tensors.items()}
        try:
            return apply_notes(notes, codes, entries, limits, index.path)
        except UnfitNotes as error:
            what = f"statedict's notes in the index are left aside: {error}. Shown are the tensors of the shards"
            findings.append(Finding("stale-notes", "warning", what))
    return merged(parts, index.path)


def _texts(parts: Sequence[Part], tree: Tree) -> dict[str, str]:
    """The texts of all shards, without those that stand for tied tensors, which are in the tree."""
    texts: dict[str, str] = {}
    for part in parts:
        for key, text in part.manifest.metadata.items():
            texts.setdefault(key, text)
    held = {name for part in parts for name in part.names}
    aliases = {dotted(path) for path in tree.tensors} - held
    return {key: text for key, text in texts.items() if key not in aliases}


def _facts(index: Index) -> Iterator[tuple[str, str]]:
    """The numbers and texts that the index gives beside the map."""
    for key, value in index.metadata.items():
        if key != "statedict" and isinstance(value, (str, int, float)):
            yield key, str(value)


def _named(names: Sequence[str]) -> str:
    shown = ", ".join([f"'{one_line(name)}'" for name in names[:_LISTED]])
    return f"{shown} and {len(names) - _LISTED:,} more" if len(names) > _LISTED else shown
