"""What a written checkpoint in several files will be: the single safetensors file cut at tensors, and the index of the pieces.

Every shard is a safetensors file for any reader. Names, carriers and aliases are those that the single file would have; a tied
tensor is written once, so it is in one shard. What the single file keeps in its ``__metadata__`` about the tree is in the index
instead, under ``metadata`` and ``statedict``; each shard has the digests of its own tensors. Tensors are cut in the order
of the state dict as huggingface_hub cuts them (``split_torch_state_dict_into_shards``): a shard is closed when the next tensor
would pass the size, and a tensor that is larger by itself is a shard by itself. The index is written as its libraries write it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from statedict.formats.safetensors_notes import DIGEST_CHARACTERS, NOTES_VERSION, fingerprint
from statedict.formats.safetensors_writer import SafetensorsWriter
from statedict.io.plans import Later, Literal, Payload, Source, Sum, WritePlan
from statedict.manifest import Finding, Node, TensorEntry

__all__ = ["ShardedWriter"]

# The data begin at a multiple of this many bytes, as in a single file.
_ALIGNMENT = 64
_DIGEST = "xxh3-128:"


class ShardedWriter:
    """The plans of all shards. After ``plan``: ``notes`` are findings, ``nbytes`` the bytes of all tensors."""

    def __init__(self, root: Node, metadata: Mapping[str, str], *, digests: bool, most_nbytes: int) -> None:
        """``most_nbytes`` is how many bytes of tensors a shard has at most, unless a single one has more."""
        self.notes: tuple[Finding, ...] = ()
        self.nbytes = 0
        self._root = root
        self._metadata = {"format": "pt", **metadata}
        self._digests = digests
        self._most_nbytes = most_nbytes
        self._infos: dict[str, Any] = {}  # the header of the single file, without its metadata
        self._texts: dict[str, str] = {}  # that metadata
        self._groups: list[list[str]] = []

    def plan(self, source_of: Callable[[TensorEntry], Source]) -> list[WritePlan]:
        """The shards, at least one. Raises ``Unsupported`` as ``SafetensorsWriter`` does."""
        single = SafetensorsWriter(self._root, self._metadata, digests=False)
        head, *rest = single.plan(source_of).segments
        self.notes = tuple(single.notes)
        assert isinstance(head, Literal)
        self._infos = json.loads(head.data[8:])
        self._texts = self._infos.pop("__metadata__")
        payloads = [segment for segment in rest if isinstance(segment, Payload)]
        sizes = {payload.key: payload.nbytes for payload in payloads}
        self.nbytes = sum(sizes.values())
        self._groups = _cut(((name, sizes[name]) for name in self._infos), self._most_nbytes) or [[]]
        homes = {name: number for number, group in enumerate(self._groups) for name in group}
        parts: list[list[Payload]] = [[] for _ in self._groups]
        for payload in payloads:
            # Within a shard in the order of the single file: by the size of the elements.
            parts[homes[payload.key]].append(payload._replace(digest=self._digests))
        return [self._shard(group, part) for group, part in zip(self._groups, parts)]

    def index(self, names: list[str]) -> bytes:
        """The index of the shards, whose file names are given in their order."""
        weight_map = {key: name for name, group in zip(names, self._groups) for key in group}
        metadata: dict[str, object] = {"total_size": self.nbytes}
        notes = self._notes()
        if notes is not None:
            metadata["statedict"] = notes
        found = {"metadata": metadata, "weight_map": weight_map}
        return (json.dumps(found, indent=2, sort_keys=True) + "\n").encode("ascii")

    def _notes(self) -> str | None:
        """What the single file says of the tree; with the order of the keys, where the cuts have changed that."""
        text = self._texts.get("statedict")
        order = list(self._infos)
        if order == [name for group in self._groups for name in group]:
            return text
        notes = (
            {"version": NOTES_VERSION, "names": self._fingerprint(self._infos)} if text is None else json.loads(text)
        )
        if "tree" not in notes:
            notes.setdefault("keys", order)
        return json.dumps(notes, separators=(",", ":"), allow_nan=False)

    def _fingerprint(self, names: Iterable[str]) -> int:
        infos = self._infos
        return fingerprint({name: (infos[name]["dtype"], tuple(infos[name]["shape"])) for name in names})

    # ---------------------------------------------------------------- one shard

    def _shard(self, group: list[str], payloads: list[Payload]) -> WritePlan:
        offsets: dict[str, list[int]] = {}
        end = 0
        for payload in payloads:
            offsets[payload.key] = [end, end + payload.nbytes]
            end += payload.nbytes
        infos = {name: {**self._infos[name], "data_offsets": offsets[name]} for name in group}
        texts = self._texts_of(group)
        names = sorted(group)
        if not self._digests:
            return WritePlan("safetensors", [Literal(_header(texts, infos)), *payloads])
        facts = {"version": NOTES_VERSION, "names": self._fingerprint(group)}

        def render(sums: Mapping[str, Sum]) -> bytes:
            return header("".join([str(sums[name].digest).removeprefix(_DIGEST) for name in names]))

        def header(digests: str) -> bytes:
            notes = json.dumps({**facts, "digests": digests}, separators=(",", ":"))
            return _header({**texts, "statedict": notes}, infos)

        nbytes = len(header("0" * DIGEST_CHARACTERS * len(names)))
        return WritePlan("safetensors", [Later(nbytes, render), *payloads])

    def _texts_of(self, group: list[str]) -> dict[str, str]:
        """The caller's texts, and the aliases of the shard's own tensors."""
        own = set(group)
        aliases = {key: text for key, text in self._texts.items() if key not in self._metadata and text in own}
        aliases.pop("statedict", None)
        return {**self._metadata, **aliases}


def _header(texts: Mapping[str, str], infos: Mapping[str, object]) -> bytes:
    found = {"__metadata__": texts, **infos}
    data = json.dumps(found, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    data += b" " * (-(8 + len(data)) % _ALIGNMENT)
    return len(data).to_bytes(8, "little") + data


def _cut(sizes: Iterable[tuple[str, int]], most: int) -> list[list[str]]:
    """The names in groups of at most that many bytes, a larger one alone."""
    groups: list[list[str]] = []
    current: list[str] = []
    filled = 0
    for name, nbytes in sizes:
        if nbytes > most:
            groups.append([name])
            continue
        if current and filled + nbytes > most:
            groups.append(current)
            current, filled = [], 0
        current.append(name)
        filled += nbytes
    return [*groups, current] if current else groups
