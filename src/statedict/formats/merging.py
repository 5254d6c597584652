"""Several manifests as one: storages and files get numbers of the whole, state dicts stand one after the other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from statedict.errors import Unsupported
from statedict.formats.value_kinds import dict_like, hashed
from statedict.formats.value_tree import Tree
from statedict.keys import Path, display
from statedict.manifest import Container, Extent, Manifest, Node, ObjectEntry, Opaque, Storage, StorageView, TensorEntry
from statedict.nodes import every_tensor, fold, rebased

__all__ = ["Part", "merged"]

_MAPPINGS = ("dict", "OrderedDict", "defaultdict")


class Part(NamedTuple):
    """One file of a checkpoint in several: its name, its manifest with the numbers of the whole, and the keys in it."""

    name: str
    manifest: Manifest
    names: tuple[str, ...]  # the keys of its tensors and objects, as they are shown

    @classmethod
    def of(cls, name: str, file: int, manifest: Manifest, first: int) -> Part:
        """The manifest of a file, as that of file number ``file`` whose storages are numbered from ``first`` on."""
        numbers = _Numbers(file, first)
        root = fold(manifest.structure, numbers.leaf, numbers.container)
        storages = tuple([numbers.storage(storage) for storage in manifest.storages])
        moved = manifest._replace(structure=root, tensors=numbers.tensors, objects=numbers.objects, storages=storages)
        return cls(name, moved, (*display(numbers.tensors), *display(numbers.objects)))

    @property
    def is_flat(self) -> bool:
        """Whether it holds plain tensors under single keys, as the header of a safetensors file has them, and nothing else."""
        manifest = self.manifest
        return (
            manifest.format == "safetensors"
            and not manifest.objects
            and all(len(path) == 1 for path in manifest.tensors)
        )

    def codes(self) -> Iterator[tuple[str, tuple[str, tuple[int, ...]]]]:
        """The names in the header of a flat file, with dtype code and shape as they stand there."""
        for path, entry in self.manifest.tensors.items():
            code, shape = entry.dtype.code, entry.shape
            if code == "F4_X2":
                # torch's pairs: the format counts single numbers.
                code, shape = "F4", (*shape[:-1], shape[-1] * 2)
            yield str(path[0]), (code, shape)


class _Numbers:
    """Gives the storages of one file their numbers in the whole."""

    def __init__(self, file: int, first: int) -> None:
        self._file = file
        self._first = first
        self._moved: dict[int, Storage] = {}
        self.tensors: dict[Path, TensorEntry] = {}
        self.objects: dict[Path, ObjectEntry] = {}

    def storage(self, storage: Storage) -> Storage:
        found = self._moved.get(storage.id)
        if found is None:
            # Made anew: _replace takes three times as long, and there may be 100,000.
            extent = None if storage.extent is None else Extent(self._file, *storage.extent[1:])
            found = Storage(self._first + len(self._moved), storage.nbytes, extent, *storage[3:])
            self._moved[storage.id] = found
        return found

    def entry(self, entry: TensorEntry) -> TensorEntry:
        view = entry.view
        if view is not None:
            entry = entry._replace(view=StorageView(self.storage(view.storage), *view[1:]))
        if entry.parts:
            entry = entry._replace(parts={name: self.entry(part) for name, part in entry.parts.items()})
        if entry.attributes:
            entry = entry._replace(attributes={name: self._value(value) for name, value in entry.attributes.items()})
        return entry

    def leaf(self, node: TensorEntry | ObjectEntry) -> Node:
        if isinstance(node, TensorEntry):
            made = self.tensors[node.path] = self.entry(node)
            return made
        found = node._replace(value=self._value(node.value)) if every_tensor(node) else node
        self.objects[node.path] = found
        return found

    def container(self, node: Container, children: list[Node]) -> Node:
        attributes = {name: self._value(value) for name, value in node.attributes.items()}
        keys = (
            [self._value(key) for key in node.keys] if any(isinstance(key, Opaque) for key in node.keys) else node.keys
        )
        return Container(node.kind, keys, children, type=node.type, attributes=attributes)

    def _value(self, value: object) -> object:
        """A value with its tensors moved. The readers keep values inside attributes and records less than 64 levels deep."""
        if isinstance(value, TensorEntry):
            return self.entry(value)
        if isinstance(value, Opaque):
            made = Opaque(value.module, value.name, self._value(value.args), self._value(value.state))
            made.items = [self._value(item) for item in value.items]
            made.pairs = [(self._value(key), self._value(item)) for key, item in value.pairs]
            return made
        if isinstance(value, dict):
            pairs = [(self._value(key), self._value(item)) for key, item in value.items()]
            return hashed(dict_like(value), pairs, type(value).__name__)
        if type(value) in (list, tuple):
            return type(value)([self._value(item) for item in value])  # type: ignore[call-arg,attr-defined]
        if type(value) in (set, frozenset):
            return hashed(type(value), [self._value(item) for item in value], type(value).__name__)  # type: ignore[attr-defined]
        return value


def merged(parts: Sequence[Part], path: str) -> Tree:
    """The state dicts of all parts as one, in their order: an OrderedDict where all are, with the attributes that they have.

    Raises ``Unsupported`` where a part holds something else, or where two have the same top-level key: a nested value that was
    cut in two.
    """
    keys: list[object] = []
    children: list[Node] = []
    attributes: dict[str, object] = {}
    kinds: set[str] = set()
    for part in parts:
        root = part.manifest.structure
        if isinstance(root, ObjectEntry) and root.kind in _MAPPINGS and not root.value:
            continue  # an empty dict
        if not isinstance(root, Container) or root.kind not in _MAPPINGS:
            raise Unsupported(
                f"the shard '{part.name}' holds no state dict",
                path=path,
                hint="Open its shards one by one, by their paths",
            )
        keys += root.keys
        children += root.children
        kinds.add(root.kind)
        attributes = {**root.attributes, **attributes}
    if len({repr(key) for key in keys}) != len(keys):
        raise Unsupported(
            "two shards have parts of one nested value", path=path, hint="Open its shards one by one, by their paths"
        )
    kind = kinds.pop() if len(kinds) == 1 else "dict"
    tree = Tree()
    tree.root, tree.tensors, tree.objects = rebased(Container(kind, keys, children, attributes=attributes))
    tree.storages = [storage for part in parts for storage in part.manifest.storages]
    return tree
