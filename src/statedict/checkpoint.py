"""A ``Checkpoint`` is a mapping of keys to ``LazyTensor``, over a manifest and its files; ``open`` makes one."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from statedict.collecting import uncollected
from statedict.errors import KeyNotFound, StateDictError, Unsupported
from statedict.io.ranges import File, LocalFile, StreamFile, close_all
from statedict.io.storages import StorageReader
from statedict.keys import Path, display, dotted, escaped, near
from statedict.lazy_tensor import LazyTensor
from statedict.limits import DEFAULT_LIMITS, Limits
from statedict.manifest import Manifest, Node, ObjectEntry, TensorEntry, tied_groups
from statedict.nodes import find, fold, rebased, rebuilt

__all__ = ["Checkpoint", "of_memory", "open"]


class Checkpoint(Mapping[str, LazyTensor]):
    """The tensors of a file by key, read when they are used. A context manager; reading a closed one is an error.

    Keys are dotted (``optimizer.state.0.exp_avg``). Where two paths read alike, both are shown escaped and the dotted form
    raises ``KeyNotFound``; a path (a tuple) always works.
    """

    def __init__(
        self,
        manifest: Manifest,
        files: Sequence[File],
        *,
        source: str,
        limits: Limits = DEFAULT_LIMITS,
        owns_files: bool = True,
    ) -> None:
        self._owns_files = owns_files
        self.manifest = manifest
        self.source = source
        self.limits = limits
        self.reader = StorageReader(files)
        self._shown: dict[str, Path] | None = None
        self._ties: dict[Path, tuple[str, ...]] | None = None

    @property
    def _paths(self) -> dict[str, Path]:
        """Each tensor's path under the key that it is shown as."""
        if self._shown is None:
            self._shown = display(self.manifest.tensors)
        return self._shown

    @property
    def format(self) -> str:
        """``torch-zip``, ``torch-legacy``, ``torch-tar``, ``torchscript``, ``pickle``, ``safetensors``, ``sharded``, ``npz``, ``npy``,
        ``step``.
        """
        return self.manifest.format

    @property
    def metadata(self) -> Mapping[str, str]:
        """The texts that the file carries beside its tensors."""
        return self.manifest.metadata

    @property
    def objects(self) -> dict[str, object]:
        """Everything that is no tensor, by key: numbers, texts, dates … and inert records of unknown objects."""
        entries = self.manifest.objects
        return {key: entries[path].value for key, path in display(entries).items()}

    def __getitem__(self, key: str | Path) -> LazyTensor:
        return LazyTensor(self.manifest.tensors[self.path_of(key)], self)

    def __iter__(self) -> Iterator[str]:
        return iter(self._paths)

    def __len__(self) -> int:
        return len(self._paths)

    def __contains__(self, key: object) -> bool:
        return key in self._paths or (isinstance(key, tuple) and key in self.manifest.tensors)

    def __repr__(self) -> str:
        return f"Checkpoint({self.source!r}, {self.format}, {len(self)} tensors)"

    def path_of(self, key: str | Path) -> Path:
        """The path of a tensor's key. Raises ``KeyNotFound`` with the nearest keys, or with those that it could mean."""
        if isinstance(key, tuple):
            if key in self.manifest.tensors:
                return key
            raise KeyNotFound("there is no such tensor", path=self.source, key=dotted(key))
        found = self._paths.get(key)
        if found is not None:
            return found
        alike = [path for path in self.manifest.tensors if dotted(path) == key]
        if alike:
            shown = {path: name for name, path in self._paths.items()}
            names = ", ".join(shown[path] for path in alike)
            raise KeyNotFound(
                "this key could mean several tensors", path=self.source, key=key, hint=f"Say which: {names}"
            )
        if any(dotted(path) == key for path in self.manifest.objects):
            raise KeyNotFound("this is no tensor", path=self.source, key=key, hint="Its value is in .objects")
        guesses = near(key, self._paths)
        hint = (
            f"Did you mean {', '.join(guesses)}"
            if guesses
            else f"There are {len(self)} tensors: list them with statedict inspect"
        )
        raise KeyNotFound("there is no such tensor", path=self.source, key=key, hint=hint)

    def at(self, key: str | Path) -> Checkpoint:
        """The part under a key as a checkpoint of its own, over the same open files.

        A dotted key, a path, or the common prefix of flat keys. Raises ``KeyNotFound``.
        """
        try:
            root, tensors, objects = rebased(find(self.manifest.structure, key))
        except StateDictError as error:
            raise error.located(self.source) from None
        name = key if isinstance(key, str) else escaped(key)
        return self._over(root, tensors, objects, f"{self.source}#{name}")

    def with_root(self, root: Node) -> Checkpoint:
        """A checkpoint of the same files and name whose tree is another one, made of nodes of this one."""
        return self._over(*rebased(root), self.source)

    def _over(
        self, root: Node, tensors: dict[Path, TensorEntry], objects: dict[Path, ObjectEntry], source: str
    ) -> Checkpoint:
        used = {entry.view.storage.id for entry in tensors.values() if entry.view is not None}
        used |= {
            part.view.storage.id for entry in tensors.values() for part in entry.parts.values() if part.view is not None
        }
        storages = tuple([storage for storage in self.manifest.storages if storage.id in used])
        manifest = self.manifest._replace(tensors=tensors, objects=objects, structure=root, storages=storages)
        return Checkpoint(manifest, self.reader.files, source=source, limits=self.limits, owns_files=False)

    def tree(self) -> Any:
        """The nested Python value that was saved, with a ``LazyTensor`` for every tensor.

        Dicts, lists and tuples come back as themselves, an OrderedDict with its ``_metadata``; unknown objects as ``Opaque``.
        """
        return fold(
            self.manifest.structure, lambda e: LazyTensor(e, self) if isinstance(e, TensorEntry) else e.value, rebuilt
        )

    def tied_with(self, entry: TensorEntry) -> tuple[str, ...]:
        """The other keys that show the very same elements as this tensor of the checkpoint."""
        if self._ties is None:
            names = {path: key for key, path in self._paths.items()}
            groups = tied_groups(self.manifest.tensors)
            self._ties = {
                path: tuple(names[other] for other in group if other != path) for group in groups for path in group
            }
        known = self.manifest.tensors.get(entry.path)
        return self._ties.get(entry.path, ()) if known is entry else ()

    def close(self) -> None:
        """Close the files that this checkpoint has opened."""
        if self._owns_files:
            close_all(self.reader.files)

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def open(source: Any, *, at: str | Path | None = None, limits: Limits | None = None) -> Checkpoint:
    """A checkpoint, opened without being run: its header is read, its tensors are not.

    ``source`` is a path (``PATH#KEY`` selects a part; a folder or an index stands for its shards), a ``Checkpoint``, a mapping of
    tensors (of torch, numpy or lazy ones, flat or nested), a module, or an open binary file object that can be positioned. Files
    are read by position, and stay open until the checkpoint is closed; of tensors in memory nothing is copied.

    Raises ``FileError`` (it can't be opened), ``UnknownFormat`` (it is no checkpoint, and what it is), ``CorruptFile``,
    ``Unsupported``, ``LimitExceeded`` and ``KeyNotFound`` (nothing under ``at``).
    """
    limits = limits or DEFAULT_LIMITS
    if isinstance(source, Checkpoint):
        return source if at is None else source.at(at)
    if hasattr(source, "read") and hasattr(source, "seek"):
        made = _opened(StreamFile(source), limits)
        return made if at is None else made.at(at)
    if not isinstance(source, (str, os.PathLike)):
        made = _open_memory(source, limits)
        return made if at is None else made.at(at)
    path = os.fspath(source)
    if at is None and "#" in path and not os.path.lexists(path):
        path, _, at = path.rpartition("#")
        path, at = _step_of(path, at)
    made = _open_file(path, limits)
    if at is None:
        return made
    try:
        return made.at(at)
    except BaseException:
        made.close()
        raise


def _open_memory(source: Any, limits: Limits) -> Checkpoint:
    from statedict.memory import is_source

    if not is_source(source):
        raise Unsupported(
            f"a {type(source).__name__} can't be opened",
            hint="Give a path, a Checkpoint, a mapping of tensors, or a module",
        )
    return of_memory(source, limits)


def of_memory(value: Any, limits: Limits = DEFAULT_LIMITS, *, still: bool = False) -> Checkpoint:
    """Any nested value in memory as a checkpoint, a single tensor too; nothing is copied. Raises as ``manifest_of`` does.

    ``still`` says that it won't change until all of it was read, so that memory of devices may be read ahead.
    """
    from statedict.memory import manifest_of

    manifest, files = manifest_of(value, limits, _lazy, still=still)
    name = f"{type(value).__name__} in memory"
    return Checkpoint(manifest.validate(limits), files, source=name, limits=limits, owns_files=False)


def _lazy(value: object) -> tuple[TensorEntry, tuple[File, ...]] | None:
    """What a lazy tensor is made of."""
    return (value.entry, tuple(value.origin.reader.files)) if isinstance(value, LazyTensor) else None


def _step_of(path: str, at: str) -> tuple[str, str | None]:
    """The folder of a step, and the key in it, where ``run#1000`` names one; else both as they are."""
    if not at[:1].isdecimal() or not os.path.isdir(path):
        return path, at
    from statedict.formats.step_reader import locate_step

    return locate_step(path, at) or (path, at)


def _open_file(path: str, limits: Limits) -> Checkpoint:
    if "://" in path:
        raise Unsupported("addresses can't be opened yet", path=path, hint="Download the file first")
    if not os.path.isdir(path):
        return _opened(LocalFile(path), limits)
    from statedict.formats.step import MANIFEST_NAME

    if os.path.lexists(os.path.join(path, MANIFEST_NAME)):
        from statedict.formats.step_reader import is_step, open_step

        if is_step(path):
            manifest, files = open_step(path, limits)
            return Checkpoint(manifest, files, source=path, limits=limits)
    from statedict.formats.folders import choose

    choice = choose(path)
    if choice is None:
        from statedict.formats.step_reader import refuse_run

        refuse_run(path)
    # Where it isn't clear what is meant, the folder is refused as a file, with the names of what could be.
    made = _opened(LocalFile(path if choice is None else choice.path), limits, source=path)
    if choice is not None and choice.notes:
        made.manifest = made.manifest._replace(notes=(*choice.notes, *made.manifest.notes))
    return made


def _opened(file: File, limits: Limits, source: str | None = None) -> Checkpoint:
    from statedict.formats import is_index, read_manifest

    files: list[File] = [file]
    try:
        with uncollected():
            if isinstance(file, LocalFile) and is_index(file, limits):
                from statedict.formats.sharded import read_index, read_sharded_manifest
                from statedict.io.pools import open_files

                index = read_index(file, limits)
                files = [*open_files(index.paths), file]
                manifest = read_sharded_manifest(index, files, limits)
            else:
                manifest = read_manifest([file], limits)
        return Checkpoint(manifest, files, source=source or file.path, limits=limits)
    except BaseException as error:
        close_all(files)
        if isinstance(error, StateDictError):
            raise error.located(file.path) from error.__cause__
        raise
