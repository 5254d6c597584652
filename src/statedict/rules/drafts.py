"""A checkpoint while rules are applied to it: its tree, its files, and the files of computed tensors that come to them."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from typing import TYPE_CHECKING, NamedTuple

from statedict.checkpoint import Checkpoint
from statedict.dtypes import DType
from statedict.errors import one_line
from statedict.io.ranges import File
from statedict.io.storages import StorageReader
from statedict.lazy_tensor import LazyTensor
from statedict.manifest import Extent, FileFact, Manifest, Node, Storage, StorageView, TensorEntry
from statedict.nodes import every_tensor, rebased
from statedict.views import packed_stride

if TYPE_CHECKING:
    from statedict.recipes.derived import Recipe

__all__ = ["CastOf", "Draft", "identity_of", "untied_by"]


class CastOf(NamedTuple):
    """A tensor that a rule casts: its key then, the tensor before, and its dtype after."""

    key: str
    source: LazyTensor
    after: DType


class Draft:
    """The tree that the next rule sees in ``root``. It stands in for the checkpoint where lazy tensors are read."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.root: Node = checkpoint.manifest.structure
        self.source = checkpoint.source
        self.limits = checkpoint.limits
        self._checkpoint = checkpoint
        self._files: list[File] = list(checkpoint.reader.files)
        self._stored = len(self._files)
        self.reader = StorageReader(self._files)
        self._next_id = 1 + max([storage.id for storage in checkpoint.manifest.storages], default=-1)
        self._recipes: list[Recipe] = []
        self._filled = 0
        self._made: dict[Hashable, TensorEntry] = {}
        self.casts: list[CastOf] = []

    def tied_with(self, entry: TensorEntry) -> tuple[str, ...]:
        """None: ties are those of the finished checkpoint."""
        return ()

    def lazy(self, entry: TensorEntry) -> LazyTensor:
        """A tensor of the tree, to be read now or when a tensor that is computed of it is."""
        return LazyTensor(entry, self)

    def computed(self, like: TensorEntry, recipe: Recipe) -> TensorEntry:
        """The entry of a computed tensor, with what is known of ``like`` besides its values."""
        from statedict.recipes.derived import ALIGNMENT, nbytes_of

        self._filled += -self._filled % ALIGNMENT
        nbytes = nbytes_of(recipe)
        storage = Storage(self._next_id, nbytes, Extent(len(self._files), self._filled, nbytes), name=recipe.name)
        self._next_id += 1
        self._filled += nbytes
        self._recipes.append(recipe)
        view = StorageView(storage, 0, packed_stride(recipe.shape))
        return like._replace(dtype=recipe.dtype, shape=recipe.shape, view=view, digest=None, memory_stride=None)

    def computed_once(self, key: Hashable, like: TensorEntry, make: Callable[[], Recipe]) -> TensorEntry:
        """The same, but tensors that were one stay one: ``key`` says what is computed, and of which elements."""
        known = self._made.get(key)
        if known is None:
            known = self._made[key] = self.computed(like, make())
        return like._replace(dtype=known.dtype, shape=known.shape, view=known.view, digest=None, memory_stride=None)

    def untied(self, entry: TensorEntry) -> TensorEntry:
        """The tensor over a storage of its own, which has the same bytes."""
        view = entry.view
        if view is None:
            return entry
        storage = view.storage._replace(id=self._next_id)
        self._next_id += 1
        return entry._replace(view=view._replace(storage=storage))

    def settle(self) -> None:
        """Make a file of the tensors that were computed since the last one."""
        self._made.clear()
        if self._recipes:
            from statedict.recipes.derived import DerivedFile

            names = self._recipes[0].name + (f" and {len(self._recipes) - 1} more" if len(self._recipes) > 1 else "")
            self._files.append(DerivedFile(self._recipes, names))
            self._recipes, self._filled = [], 0

    def checkpoint(self, *, owns_files: bool) -> Checkpoint:
        """The checkpoint that the rules have made, over the same open files."""
        root, tensors, objects = rebased(self.root)
        manifest: Manifest = self._checkpoint.manifest
        storages: dict[int, Storage] = {}
        for entry in every_tensor(root):
            for part in (entry, *entry.parts.values()):
                if part.view is not None:
                    storages.setdefault(part.view.storage.id, part.view.storage)
        kept = tuple([storages.pop(each.id) for each in manifest.storages if each.id in storages])
        made = [FileFact(file.path, file.nbytes) for file in self._files[self._stored :]]
        manifest = manifest._replace(
            tensors=tensors,
            objects=objects,
            structure=root,
            storages=(*kept, *storages.values()),
            files=(*manifest.files, *made),
        )
        if made:
            manifest = manifest.validate(self.limits)
        return Checkpoint(manifest, self._files, source=self.source, limits=self.limits, owns_files=owns_files)


def identity_of(entry: TensorEntry) -> Hashable:
    """What two tensors share that are one: the elements that they show, and how."""
    view = entry.view
    if view is None:
        return id(entry)
    return (view.storage.id, view.offset, view.stride, view.bits, entry.shape, entry.dtype.code)


def untied_by(changed: Iterable[TensorEntry], kept: Iterable[TensorEntry]) -> tuple[str, ...]:
    """A sentence for each tensor that was changed, or taken, while another name of it was not."""
    others: dict[Hashable, list[str]] = {}
    for entry in kept:
        others.setdefault(identity_of(entry), []).append(entry.key)
    return tuple(
        [
            f"'{one_line(entry.key)}' is no longer tied with '{one_line(others[identity_of(entry)][0])}'"
            for entry in changed
            if entry.numel and identity_of(entry) in others
        ]
    )
