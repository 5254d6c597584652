"""One tree written to a folder in several files, as the hub has it: planned, written, read back and compared, then named.

    target                     files
    folder/                    model-00001-of-00002.safetensors …, model.safetensors.index.json
    x.safetensors              x-00001-of-00002.safetensors …, x.safetensors.index.json
    x.safetensors.index.json   the same, and an index where one shard would do

Where one file is enough, it is ``model.safetensors`` or ``x.safetensors``, without an index, as huggingface_hub does.
"""

from __future__ import annotations

import os
import re
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from typing import NamedTuple

from statedict.errors import CorruptFile, FileError, StateDictError, Unsupported
from statedict.io.durable_folders import DurableFolder, check_folder
from statedict.io.plans import Literal, Sum, WritePlan
from statedict.io.pools import open_files
from statedict.io.ranges import LocalFile, close_all
from statedict.io.writers import Progress, Written, execute
from statedict.manifest import FileFact, Node
from statedict.ops.writing import UNLIMITED, Prepared, Tree, compare_bytes, difference

__all__ = [
    "DEFAULT_SHARD_NBYTES",
    "ShardTarget",
    "parse_size",
    "plan_shards",
    "refuse_own_place",
    "shard_target",
    "write_shards",
]

# Bytes of a shard where nobody says another size: the hub library's own.
DEFAULT_SHARD_NBYTES = 5 * 1000**3
_UNITS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}
_SIZE = re.compile(r"(\d{1,15}(?:\.\d{1,6})?)\s*([KMGT]?)(I?)B?", re.IGNORECASE | re.ASCII)
_INDEX = ".index.json"
_SUFFIX = ".safetensors"


def parse_size(size: int | str) -> int:
    """A number of bytes: itself, or a text such as ``5GB`` (10**9) or ``5GiB`` (2**30). Raises ``StateDictError``."""
    found = _SIZE.fullmatch(size.strip()) if isinstance(size, str) else None
    if found is not None:
        nbytes = int(float(found[1]) * (1024 if found[3] else 1000) ** _UNITS[found[2].upper()])
    elif type(size) is int:
        nbytes = size
    else:
        nbytes = 0
    if nbytes < 1 or (found is not None and found[3] and not found[2]):
        raise StateDictError(
            "this is no size of a shard", expected="bytes, or a text such as 5GB or 500MiB", found=repr(size)
        )
    return nbytes


class ShardTarget(NamedTuple):
    """Where a checkpoint in several files goes, and what its files are called."""

    path: str  # as it was given, for messages
    folder: str
    stem: str  # what the names of its shards begin with
    has_index: bool  # an index is asked for, even of one shard
    most_nbytes: int  # bytes of tensors in a shard, unless a single one has more

    @property
    def single(self) -> str:
        """The name of the file, where one is enough."""
        return f"{self.stem}{_SUFFIX}"

    @property
    def index_name(self) -> str:
        """The name of the index: that of the single file, and ``.index.json``."""
        named = os.path.basename(self.path)
        return named if self.has_index else f"{self.single}{_INDEX}"

    def shards(self, count: int) -> list[str]:
        """The names of so many shards."""
        return [f"{self.stem}-{number:05d}-of-{count:05d}{_SUFFIX}" for number in range(1, count + 1)]

    def check(self, *, overwrite: bool) -> None:
        """Raise ``TargetExists`` where a checkpoint of this name is there and may stay, ``FileError`` where none can be put."""
        check_folder(self.folder, [self.single, self.index_name], overwrite=overwrite)

    def paths(self, prepared: Prepared) -> list[str]:
        """What will be written or removed: no file of the source may be among these."""
        return [os.path.join(self.folder, name) for name in {*(name for name, _ in prepared.files), *self.old()}]

    def old(self) -> list[str]:
        """The names of all files of the checkpoint that is there under this name, its index last; by its index, if it has one."""
        from statedict.formats.sharded import read_index

        found: list[str] = []
        place = os.path.join(self.folder, self.index_name)
        if os.path.isfile(place):
            pattern = re.compile(re.escape(self.stem) + r"-\d{5}-of-\d{5}" + re.escape(_SUFFIX))
            try:
                file = LocalFile(place)
                try:
                    found = [name for name in read_index(file).shards if pattern.fullmatch(name)]
                finally:
                    file.close()
            except StateDictError:
                found = []  # a damaged index goes alone
        names = [*found, self.single, self.index_name]
        return [name for name in names if os.path.isfile(os.path.join(self.folder, name))]


def shard_target(path: str, max_shard_size: int | str | None) -> ShardTarget | None:
    """Where the shards go that this target asks for; None where it asks for one file, of whatever format.

    A path that ends in a slash, a folder that is there, and with a size a name without a suffix are folders. Raises
    ``Unsupported`` for a size with another format than safetensors, ``StateDictError`` for a size that is none.
    """
    most = DEFAULT_SHARD_NBYTES if max_shard_size is None else parse_size(max_shard_size)
    folder, name = os.path.split(path)
    suffix = os.path.splitext(name)[1].lower()
    if not path:
        return None
    if not name or os.path.isdir(path) or (max_shard_size is not None and not suffix):
        return ShardTarget(path, path.rstrip("/") or "/", "model", False, most)
    if name.lower().endswith(_INDEX):
        stem = name[: -len(_INDEX)].removesuffix(_SUFFIX)
        if stem and not stem.lower().endswith((".bin", ".h5", ".msgpack")):
            return ShardTarget(path, folder or ".", stem, True, most)
    elif max_shard_size is None:
        return None
    elif suffix == _SUFFIX and name != _SUFFIX:
        return ShardTarget(path, folder or ".", name[: -len(_SUFFIX)], False, most)
    raise Unsupported(
        "checkpoints in several files are written as safetensors only",
        path=path,
        hint="Name a folder with a slash at its end, NAME.safetensors, or NAME.safetensors.index.json",
    )


def plan_shards(tree: Tree, target: ShardTarget, *, digests: bool, keep_storages: bool = False) -> Prepared:
    """The plans of the shards and the index, or of the one file that is enough. Reads what the plan needs, writes nothing.

    Raises ``Unsupported`` or ``LimitExceeded``, naming the keys, for what the format can't take.
    """
    from statedict.formats.safetensors_writer import SafetensorsWriter
    from statedict.formats.sharded_writer import ShardedWriter

    if keep_storages:
        raise Unsupported(
            "shards hold tensors and not the storages that they are views of",
            path=target.path,
            hint="Leave --keep-storages out, or write a .pth",
        )
    try:
        writer = ShardedWriter(tree.root, tree.metadata, digests=digests, most_nbytes=target.most_nbytes)
        shards = writer.plan(tree.source_of)
        if len(shards) == 1 and not target.has_index:
            single = SafetensorsWriter(tree.root, tree.metadata, digests=digests)
            plan = single.plan(tree.source_of)
            return Prepared(tree, plan, tuple(single.notes), ((target.single, plan),))
    except StateDictError as error:
        raise error.located(target.path) from error.__cause__
    names = target.shards(len(shards))
    index = WritePlan("index", [Literal(writer.index(names))])
    files = (*zip(names, shards), (target.index_name, index))
    segments = [segment for _, plan in files for segment in plan.segments]
    return Prepared(tree, WritePlan("sharded", segments), writer.notes, files)


def write_shards(
    prepared: Prepared,
    target: ShardTarget,
    *,
    overwrite: bool,
    durable: bool = True,
    on_progress: Progress | None = None,
) -> tuple[Written, float]:
    """Carry the plans out: all files appear complete, read back and compared, the index last, or none does.

    With ``overwrite``, what was there under the same name goes, shards that the new index doesn't name too; after a failure it is
    all as it was. Gives what was written, and the seconds that the comparison took of the whole. Raises what ``execute``
    raises, and ``CorruptFile`` if what is on the disk isn't what was meant.
    """
    names = [name for name, _ in prepared.files]
    total = prepared.plan.nbytes
    took = [0.0]
    parts: list[Written] = []

    def check(plan: WritePlan, file: LocalFile, sums: Mapping[str, Sum]) -> None:
        start = time.perf_counter()
        compare_bytes(file, plan, sums)
        took[0] += time.perf_counter() - start

    replacing = DurableFolder(
        target.folder, names, name=target.index_name, overwrite=overwrite, old=target.old, durable=durable
    )
    with replacing as folder:
        try:
            done = 0
            for name, plan in prepared.files:
                path = os.path.join(folder.staging, name)
                progress = None if on_progress is None else partial(_advance, on_progress, done, total)
                checked = partial(check, plan)
                parts.append(execute(plan, path, overwrite=False, durable=durable, on_progress=progress, check=checked))
                done += plan.nbytes
            start = time.perf_counter()
            _compare(prepared.tree.root, folder.staging, names)
            took[0] += time.perf_counter() - start
        except StateDictError as error:
            error.path = None if error.path is None else folder.final(error.path)
            raise
    return _together(parts, total, durable=folder.durable), took[0]


def _advance(on_progress: Progress, before: int, total: int, done: int, of: int) -> None:
    on_progress(before + done, total)


def _together(parts: Sequence[Written], nbytes: int, *, durable: bool) -> Written:
    sums: dict[str, Sum] = {}
    method: Counter[str] = Counter()
    for part in parts:
        sums.update(part.sums)
        method.update(part.method)
    return Written(nbytes, sums, True, durable and all(part.durable for part in parts), dict(method), parts[0].writing)


def _compare(meant: Node, folder: str, names: Sequence[str]) -> None:
    """Read the files back: index and headers must agree, and describe the tree that was meant."""
    from statedict.formats import read_manifest
    from statedict.formats.sharded import read_index, read_sharded_manifest

    files = open_files([os.path.join(folder, name) for name in names])
    try:
        found = read_manifest(files, UNLIMITED) if len(files) == 1 else None
        if found is None:
            found = read_sharded_manifest(read_index(files[-1], UNLIMITED), files, UNLIMITED)
    finally:
        close_all(files)
    wrong = difference(meant, found.structure)
    if wrong:
        raise CorruptFile(
            f"the files that were written aren't what was meant: {wrong}",
            path=folder,
            hint="Nothing was changed. Please report it",
        )


def refuse_own_place(files: Sequence[FileFact], paths: Sequence[str]) -> None:
    """Raise ``FileError`` where one of the paths is one of the files that are read."""
    read = {_identity(file.path) for file in files} - {None}
    for path in paths:
        if _identity(path) in read:
            raise FileError("a file can't be converted in its own place", path=path, hint="Name another target")


def _identity(path: str) -> tuple[int, int] | None:
    try:
        facts = os.stat(path)
    except (OSError, ValueError):
        return None
    return facts.st_dev, facts.st_ino
