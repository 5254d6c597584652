"""Checkpoints of the Hugging Face Trainer, sealed as soon as they are written.

    trainer = Trainer(..., callbacks=[SealCheckpoints(keep=Latest(3) | Best("eval_loss"))])
    trainer.train(resume_from_checkpoint=newest_whole("out"))

The Trainer writes ``checkpoint-N`` file by file under its final name, without fsync, and takes the highest N on resume, whole or not
(``_save_checkpoint`` in transformers/trainer.py, ``get_last_checkpoint`` in trainer_utils.py, 5.24). The callback runs behind that:
it has every file on the disk, and writes a list of their digests last. A checkpoint that a kill or power cut has left half written has
no seal; one whose bytes have changed since doesn't match it. What the Trainer itself wrote wrongly is sealed as it is.

A seal is no signature: loading the checkpoint stays the Trainer's own, with all that it trusts.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from statedict.errors import MissingDependency, RunError, StateDictError
from statedict.runs.policies import Keep
from statedict.runs.sealed_folders import SealedFolders

try:
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
except ImportError as error:
    raise MissingDependency(
        "SealCheckpoints needs transformers, which can't be imported here",
        hint="Install it: pip install 'statedict[transformers]'",
    ) from error

__all__ = ["SealCheckpoints", "newest_whole"]

# transformers/trainer_utils.py, PREFIX_CHECKPOINT_DIR
_PREFIX = "checkpoint-"


class SealCheckpoints(TrainerCallback):
    """Seals every checkpoint of a Trainer, and then deletes those that ``keep`` doesn't keep (None: keeps all).

    ``keep`` is a number or ``Latest(3) | Best("eval_loss")``, of the metrics that the Trainer has logged at that step. Never deleted: the
    newest, the Trainer's best model, the last one that is whole, and folders without a seal. ``save_total_limit`` must be left
    out of the arguments: it deletes before the new checkpoint is on the disk.

    With several processes, the one that writes seals, when all have come so far. Raises ``FileError`` where the disk refuses: a
    training whose checkpoints can't be saved ends.
    """

    def __init__(self, *, keep: Keep | int | None = None) -> None:
        self._keep = keep
        self._folders: SealedFolders | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Refuse arguments with which nothing could be promised. Raises ``StateDictError``."""
        if args.save_total_limit is not None:
            what = "save_total_limit deletes older checkpoints before the new one is on the disk"
            hint = f"Leave it out of TrainingArguments: SealCheckpoints(keep={args.save_total_limit})"
            raise StateDictError(what, expected=None, found=args.save_total_limit, hint=hint)
        self._folders = SealedFolders(str(args.output_dir), _PREFIX, keep=self._keep)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Seal what was just written; only then may older ones go. Raises ``FileError``."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.barrier()  # the others write their random states, or their shards
        if self._folders is None or not args.should_save:
            return
        step = int(state.global_step)
        path = self._folders.path_of(step)
        if not os.path.isdir(path):
            hint = "A hyperparameter search writes elsewhere: leave SealCheckpoints out of it"
            raise RunError("the Trainer's checkpoint isn't where it should be", path=path, hint=hint)
        self._folders.seal(step, metrics=_metrics(state.log_history, step))
        best = state.best_model_checkpoint
        self._folders.prune(spare=[best] if best else [])


def newest_whole(output_dir: str | os.PathLike[str]) -> str | None:
    """The path of the newest sealed checkpoint that is whole, for ``resume_from_checkpoint=``; None where none was ever sealed.

    Reads every byte of it. What is passed over is said on stderr: a checkpoint that was never sealed, and a damaged one, which is
    renamed to ``checkpoint-N.damaged``. Raises ``RunError`` where all that were sealed are damaged.
    """
    found = SealedFolders(output_dir, _PREFIX).newest()
    return None if found is None else found.path


def _metrics(history: Sequence[Mapping[str, Any]], step: int) -> dict[str, float]:
    """The numbers that were logged at a step, by name."""
    entries = [entry for entry in history if entry.get("step") == step]
    return {
        name: float(value)
        for entry in entries
        for name, value in entry.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool) and name != "step"
    }
