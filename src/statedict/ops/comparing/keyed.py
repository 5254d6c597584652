"""One checkpoint by the keys that it is shown by: its leaves, the classes of its records, and its ties."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from statedict.checkpoint import Checkpoint
from statedict.keys import Path, display, matches
from statedict.manifest import Container, Node, ObjectEntry, TensorEntry, tied_groups
from statedict.nodes import components
from statedict.ops.comparing.walks import Side

__all__ = ["Keyed"]


class Keyed:
    """A checkpoint without the keys that are to be ignored.

    Attributes: ``checkpoint``, ``leaves`` and ``classes`` (of records of unknown classes) by key, and how many were ``ignored``.
    """

    def __init__(self, checkpoint: Checkpoint, globs: Sequence[str] = ()) -> None:
        manifest = checkpoint.manifest
        leaves: dict[Path, TensorEntry | ObjectEntry] = {**manifest.tensors, **manifest.objects}
        shown = display(leaves)
        self.checkpoint = checkpoint
        self.ignored = sum(_is_ignored(key, globs) for key in shown)
        self.leaves = {key: leaves[path] for key, path in shown.items() if not _is_ignored(key, globs)}
        classes = _classes(manifest.structure)
        self.classes = {key: classes[path] for key, path in display(classes).items() if not _is_ignored(key, globs)}

    def rename(self, old: str, new: str) -> None:
        """Show a leaf under another key."""
        self.leaves[new] = self.leaves.pop(old)

    @property
    def tensors(self) -> dict[str, TensorEntry]:
        """The leaves that are tensors."""
        return {key: leaf for key, leaf in self.leaves.items() if isinstance(leaf, TensorEntry)}

    def side(self, key: str) -> Side:
        """A tensor of this checkpoint, to be compared."""
        entry = self.leaves[key]
        assert isinstance(entry, TensorEntry)
        return Side(entry, self.checkpoint)

    def ties(self, keys: Iterable[str]) -> dict[str, frozenset[str]]:
        """The whole group of each of those keys that is tied with others of them."""
        paths = {entry.path: key for key in keys if isinstance(entry := self.leaves[key], TensorEntry)}
        tied: dict[str, frozenset[str]] = {}
        for group in tied_groups({path: self.checkpoint.manifest.tensors[path] for path in paths}):
            names = frozenset([paths[path] for path in group])
            tied.update(dict.fromkeys(names, names))
        return tied


def _is_ignored(key: str, globs: Sequence[str]) -> bool:
    return any(matches(key, glob) for glob in globs)


def _classes(root: Node) -> dict[Path, str]:
    """The class of each record of an object whose content has keys of its own."""
    found: dict[Path, str] = {}
    pending: list[tuple[Path, Node]] = [((), root)]
    while pending:
        path, node = pending.pop()
        if isinstance(node, Container):
            if node.kind == "opaque":
                found[path] = node.type
            parts = components(node.keys)
            pending.extend([(*path, part), child] for part, child in zip(parts, node.children))  # type: ignore[misc]
    return found
