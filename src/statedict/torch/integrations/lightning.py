"""Lightning's checkpoints, written durably and read without running a byte of them.

    trainer = Trainer(plugins=[StateDictCheckpointIO()], callbacks=[ModelCheckpoint("checkpoints", save_top_k=2, monitor="val_loss")])
    trainer.fit(model, ckpt_path=newest_whole("checkpoints"))

Lightning's own writer has no fsync (``_atomic_save`` in lightning/fabric/utilities/cloud_io.py, 2.6), so that the older checkpoint can
be deleted before the newer one is on the disk; and ``ckpt_path="last"`` takes the last file to be changed, whole or not.

The files stay Lightning's: ``torch.load(weights_only=True)`` and ``LightningModule.load_from_checkpoint`` read them. What isn't in
them stays so: Lightning saves no random states. Strategies that write shards (FSDP, DeepSpeed) don't ask this plugin.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

from statedict.checkpoint import Checkpoint, of_memory
from statedict.checkpoint import open as open_checkpoint
from statedict.errors import (
    FileError,
    FormatError,
    LimitExceeded,
    MissingDependency,
    RunError,
    UnsafeContent,
    Unsupported,
    one_line,
)
from statedict.nodes import every_tensor
from statedict.runs.sealed_folders import is_loss, make_folders, say
from statedict.runs.storage import LocalStorage
from statedict.torch.integrations.plain import opaque_keys
from statedict.torch.modules.placing import check_before
from statedict.torch.reading import load
from statedict.torch.writing import captured, save

try:
    from lightning.fabric.plugins import CheckpointIO
except ImportError as error:
    raise MissingDependency(
        "StateDictCheckpointIO needs lightning, which can't be imported here",
        hint="Install it: pip install 'statedict[lightning]'",
    ) from error

__all__ = ["StateDictCheckpointIO", "newest_whole"]

# What a module or data module was made with: the trainer writes it and never reads it.
_HYPER_PARAMETERS = ("hyper_parameters", "datamodule_hyper_parameters")
# What every checkpoint has that a training can go on from (lightning/pytorch/trainer/connectors/checkpoint_connector.py, 2.6).
_NEEDED = frozenset({"loops", "optimizer_states", "state_dict"})


class StateDictCheckpointIO(CheckpointIO):
    """A ``CheckpointIO`` for ``Trainer(plugins=[...])`` and ``Fabric(plugins=[...])``.

    A checkpoint appears under its name complete, or not at all; when ``save_checkpoint`` returns it outlives a power cut. With
    ``wait=False`` it returns once the state is copied to host memory, and a thread writes; one save is under way at a time, an older
    file is removed only behind the save that replaces it, and an error is raised by the next save or at the end of training.

    Loading runs nothing, ``weights_only=False`` included, and compares every tensor with its digest or CRC.
    """

    def __init__(self, *, wait: bool = True) -> None:
        self._wait = wait
        self._thread: ThreadPoolExecutor | None = None
        self._saving: Future[None] | None = None  # the save that is under way, or done and not looked at
        self._removing: list[Future[None]] = []

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any | None = None
    ) -> None:
        """Write a checkpoint durably. Raises ``UnsafeContent`` with the keys of what only its own code could bring back,
        ``Unsupported`` for an address or storage options, ``FileError`` where the system refuses; none of them changes what is there.
        """
        target = _local(path)
        if storage_options is not None:
            raise Unsupported("there are no storage options for files of this machine", path=target)
        _refuse_modules(checkpoint, target)
        self._finish()
        make_folders(os.path.dirname(os.path.abspath(target)))
        if self._wait:
            _write(checkpoint, target)
            return
        # Loading from memory copies: what training changes from here on is another memory, on the host.
        copied = load(of_memory(captured(checkpoint), still=True), map_location="cpu")
        self._saving = self._later(lambda: _write(copied, target))

    def load_checkpoint(
        self, path: str | os.PathLike[str], map_location: Any | None = "cpu", weights_only: bool | None = None
    ) -> dict[str, Any]:
        """The checkpoint as ``statedict.load`` gives it, of any format that it reads. ``weights_only`` changes nothing.

        Raises ``UnsafeContent`` with the keys of objects that only code could build. Among the hyperparameters, which the trainer doesn't
        read, they stay inert records, and are said on stderr.
        """
        self._finish()
        target = _local(path)
        with open_checkpoint(target) as opened:
            _refuse_opaque(opened)
            made = load(opened, map_location=map_location)
        if not isinstance(made, dict):
            raise Unsupported("this is no checkpoint of Lightning's", path=target, found=type(made).__name__)
        return made

    def remove_checkpoint(self, path: str | os.PathLike[str]) -> None:
        """Remove a checkpoint, a folder of another strategy's too; behind the save that is under way, and only if that goes well."""
        target, saving = _local(path), self._saving
        if saving is None:
            _remove(target)
            return

        def remove() -> None:
            if saving.exception() is None:
                _remove(target)

        self._removing.append(self._later(remove))

    def teardown(self) -> None:
        """Wait for what is under way. Raises the error that nobody has met yet."""
        try:
            self._finish()
        finally:
            thread, self._thread = self._thread, None
            if thread is not None:
                thread.shutdown()

    def _later(self, work: Callable[[], None]) -> Future[None]:
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, "statedict-save")
        return self._thread.submit(work)

    def _finish(self) -> None:
        saving, self._saving = self._saving, None
        removing, self._removing = self._removing, []
        for future in ([saving] if saving is not None else []) + removing:
            future.result()


def newest_whole(folder: str | os.PathLike[str]) -> str | None:
    """The path of the checkpoint in a folder that has trained the longest and is whole, for ``ckpt_path=``; None where there is none yet.

    Every tensor is compared with its digest or CRC. What is damaged is passed over and said on stderr; files of weights alone are
    no candidates. Raises ``RunError`` where there are checkpoints, and none of them is whole.
    """
    where = os.fspath(folder)
    candidates, damaged = _candidates(where)
    for _, _, path in sorted(candidates, reverse=True):
        try:
            with open_checkpoint(path) as opened:
                check_before(opened, every_tensor(opened.manifest.structure))
            return path
        except (FormatError, FileError) as error:  # noqa: PERF203
            damaged += _passed_over(where, path, error)
    if damaged:
        raise RunError("there are checkpoints, and none of them is whole", errno=errno.EIO, path=where)
    return None


def _candidates(folder: str) -> tuple[list[tuple[int, float, str]], int]:
    """The checkpoints by step, time and path, and how many could not be opened. Reads their headers only."""
    found, damaged = [], 0
    try:
        names = sorted(os.listdir(folder))
    except FileNotFoundError:
        names = []
    except OSError as error:
        raise FileError.of(error, folder, "the folder can't be read") from error
    for name in names:
        path = os.path.join(folder, name)
        if not name.endswith(".ckpt") or name.startswith(".") or not os.path.isfile(path):
            continue
        try:
            with open_checkpoint(path) as opened:
                keys = set(getattr(opened.manifest.structure, "keys", ()))
                step = opened.objects.get("global_step")
        except (FormatError, FileError) as error:
            damaged += _passed_over(folder, path, error)
            continue
        if keys >= _NEEDED and type(step) is int:
            found.append((step, os.stat(path).st_mtime, path))
    return found, damaged


def _passed_over(folder: str, path: str, error: FormatError | FileError) -> int:
    """Say that a checkpoint is damaged; the count of it. Raises what says nothing about its bytes."""
    if isinstance(error, LimitExceeded) or (isinstance(error, FileError) and not is_loss(error)):
        raise error
    say(folder, f"{os.path.basename(path)} is passed over: {error}")
    return 1


def _local(path: str | os.PathLike[str]) -> str:
    target = os.fspath(path)
    if "://" in target:
        hint = "Leave StateDictCheckpointIO out: Lightning's own plugin writes to addresses"
        raise Unsupported("addresses can't be read or written", path=target, hint=hint)
    return target


def _write(checkpoint: Any, target: str) -> None:
    kind = None if target.endswith(".safetensors") else "torch-zip"
    if not os.path.islink(target):
        save(checkpoint, target, format=kind)
        return
    # Lightning links last.ckpt to another checkpoint (save_last="link"): the link is replaced, what it names stays as it is.
    folder, name = os.path.split(os.path.abspath(target))
    temporary = os.path.join(folder, f".new-{name}")
    save(checkpoint, temporary, format=kind)
    try:
        os.replace(temporary, target)
        LocalStorage().fsync_folder(folder)
    except OSError as error:
        raise FileError.of(error, target, "can't be written") from error


def _remove(target: str) -> None:
    try:
        if os.path.isdir(target) and not os.path.islink(target):
            from shutil import rmtree

            rmtree(target)
        elif os.path.lexists(target):
            os.unlink(target)
    except OSError as error:
        raise FileError.of(error, target, "the checkpoint can't be removed") from error


def _refuse_modules(checkpoint: Mapping[str, Any], target: str) -> None:
    """Modules among the hyperparameters: they would be written as their state dicts, and come back as something else."""
    for name in _HYPER_PARAMETERS:
        values = checkpoint.get(name)
        for key, value in values.items() if isinstance(values, Mapping) else ():
            if isinstance(value, torch.nn.Module):
                kind = f"{type(value).__module__}.{type(value).__qualname__}"
                what = (
                    f"the hyperparameter '{one_line(key)}' is a module ({kind}), which only its code could bring back"
                )
                hint = f"Its weights are saved anyway: self.save_hyperparameters(ignore=[{key!r}])"
                raise UnsafeContent(what, globals=[kind], path=target, key=f"{name}.{key}", hint=hint)


def _refuse_opaque(opened: Checkpoint) -> None:
    found = opaque_keys(opened)
    harmless = [key for key in found if key.startswith(tuple([f"{name}." for name in _HYPER_PARAMETERS]))]
    for key in harmless:
        say(opened.source, f"'{key}' ({found[key]}) is not built, it stays an inert record")
    bad = {key: kind for key, kind in found.items() if key not in harmless}
    if bad:
        shown = ", ".join([f"'{one_line(key)}' ({kind})" for key, kind in list(bad.items())[:5]])
        more = f" and {len(bad) - 5} more" if len(bad) > 5 else ""
        hint = "If you trust the file, resume from it once without this plugin; what is saved with it has plain values only"
        what = f"the file wants objects built by code: {shown}{more}"
        raise UnsafeContent(what, globals=list(bad.values()), path=opened.source, key=next(iter(bad)), hint=hint)
