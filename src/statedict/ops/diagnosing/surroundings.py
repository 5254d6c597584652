"""What stands beside the weights, or instead of them: optimizers, schedulers, devices, values that torch.load refuses."""

from __future__ import annotations

from collections.abc import Iterator

from statedict.errors import one_line
from statedict.manifest import Container, Finding, NumpyScalar, ObjectEntry, Opaque, TensorEntry
from statedict.ops.diagnosing.subject import Subject
from statedict.ops.findings import named
from statedict.report.units import plural

__all__ = ["optimizer_kind", "surroundings_of"]

# Optimizers by the names in the state that they keep for each parameter (torch ``optim``).
_OPTIMIZERS = (
    ({"exp_avg", "exp_avg_sq"}, "Adam or AdamW"),
    ({"momentum_buffer"}, "SGD with momentum"),
    ({"exp_avg", "exp_inf"}, "Adamax"),
    ({"exp_avg_sq_row"}, "Adafactor"),
    ({"square_avg", "acc_delta"}, "Adadelta"),
    ({"square_avg"}, "RMSprop"),
    ({"exp_avg"}, "Lion or the like"),
    ({"sum"}, "Adagrad"),
    ({"prev"}, "Rprop"),
)
# Values in the state dict of a scheduler (torch ``optim/lr_scheduler.py``).
_SCHEDULER = frozenset(
    {"last_epoch", "_step_count", "base_lrs", "_last_lr", "step_size", "gamma", "T_max", "milestones"}
)
# Keys of a process's share in ZeRO (deepspeed ``runtime/zero/stage_1_and_2.py`` and ``stage3.py``, state_dict).
_PARTITION = frozenset({"fp32_flat_groups", "zero_stage", "single_partition_of_fp32_groups", "partition_count"})
# Classes that one sentence lists.
_LISTED = 4
# Nodes that are looked at for unknown classes: those of real files are near the top.
_MOST_NODES = 200_000


def optimizer_kind(subject: Subject) -> str:
    """Which optimizer's state the file has, by the names in it; empty where nobody can say."""
    names = {str(path[-1]) for optimizer in subject.training.optimizers for path in _state(subject, optimizer.path)}
    return next((kind for words, kind in _OPTIMIZERS if words <= names), "")


def _state(subject: Subject, under: tuple[str | int, ...]) -> Iterator[tuple[str | int, ...]]:
    for path in subject.checkpoint.manifest.tensors:
        if path[: len(under)] == under and "state" in path[len(under) : len(under) + 1]:
            yield path


def surroundings_of(subject: Subject) -> Iterator[Finding]:
    """Everything that is said about what isn't the weights."""
    yield from _instead(subject)
    yield from _devices(subject)
    yield from _arrays(subject)
    yield from _refused(subject)


def _instead(subject: Subject) -> Iterator[Finding]:
    """A file that holds no weights, or holds them where nobody looks."""
    manifest = subject.checkpoint.manifest
    if any(_PARTITION.intersection(map(str, path)) for path in (*manifest.tensors, *manifest.objects)):
        message = (
            "this file is one process's share of a training with DeepSpeed ZeRO: its parameters and optimizer state are cut into rows "
            "over all files of the checkpoint. Make one file of weights with the zero_to_fp32.py that lies in its folder"
        )
        yield Finding("zero-partition", "warning", message)
    elif subject.parts:
        part = subject.parts[0]
        is_known = subject.training.is_checkpoint or subject.training.weights is not None
        if len(subject.parts) == 1 and part.path and not is_known:
            see = subject.command("inspect", "SOURCE", "--at", part.key)
            yield Finding("nested-weights", "info", f"the weights are under '{one_line(part.key)}': {see}", (part.key,))
    elif subject.training.optimizers:
        kind = optimizer_kind(subject)
        which = f" ({kind})" if kind else ""
        message = (
            f"no weights are in this file: it is the state of an optimizer{which}. The weights are in another file"
        )
        yield Finding("optimizer-only", "info", message)
    elif not manifest.tensors:
        tops = {str(path[-1]) for path in manifest.objects if 0 < len(path) < 3}
        if len(tops & _SCHEDULER) >= 2:
            message = "no weights are in this file: it is the state of a learning rate scheduler"
            yield Finding("scheduler-only", "info", message)
        else:
            message = (
                "there is no tensor in this file: its weights are in another one, or whatever saved it had none to save"
            )
            yield Finding("no-tensors", "warning", message)


def _devices(subject: Subject) -> Iterator[Finding]:
    devices: dict[str, list[TensorEntry]] = {}
    for entry in subject.checkpoint.manifest.tensors.values():
        devices.setdefault(entry.device or "cpu", []).append(entry)
    meta = devices.pop("meta", [])
    if meta:
        message = (
            f"{plural(len(meta), 'tensor')} were saved from the meta device and have no values: "
            f"{named(subject.keys(meta))}. The model was never filled: save it after its weights are loaded"
        )
        yield Finding("meta-tensors", "error", message, subject.keys(meta))
    devices.pop("cpu", None)
    if devices:
        names = sorted(devices)
        what = f"{plural(sum(map(len, devices.values())), 'tensor')} were saved on {', '.join(map(one_line, names[:_LISTED]))}"
        message = (
            f'{what}: where that device isn\'t there, torch.load needs map_location="cpu"; statedict.load needs nothing'
        )
        yield Finding("saved-on-device", "info", message)


def _arrays(subject: Subject) -> Iterator[Finding]:
    if not subject.checkpoint.format.startswith(("torch", "pickle")):
        return
    found = [entry for _, _, entry in subject.weights() if entry.kind == "ndarray"]
    if found:
        repair = subject.command("convert", "SOURCE", "weights.safetensors", "--weights-only")
        message = (
            f"{plural(len(found), 'weight')} are arrays of numpy's, which load_state_dict refuses: "
            f"{named(subject.keys(found))}. {repair} makes them tensors"
        )
        yield Finding("numpy-weights", "warning", message, subject.keys(found))


def _refused(subject: Subject) -> Iterator[Finding]:
    """Values for which torch.load refuses a file by default."""
    manifest = subject.checkpoint.manifest
    if not manifest.format.startswith("torch") or manifest.format == "torchscript":
        return
    if any(note.code == "whole-module" for note in manifest.notes):
        yield Finding(
            "saved-as-object",
            "warning",
            "the model itself was saved, not its state dict: torch.load refuses it, and with weights_only=False "
            "needs the code that it was made of. "
            f"{subject.command('convert', 'SOURCE', 'weights.safetensors', '--weights-only')} writes its state dict "
            "without running anything",
        )
        return
    classes = dict.fromkeys(_classes(manifest.structure))
    if classes:
        names = list(classes)
        shown = ", ".join(map(one_line, names[:_LISTED])) + (
            f" and {len(names) - _LISTED:,} more" if len(names) > _LISTED else ""
        )
        convert = subject.command("convert", "SOURCE", "weights.safetensors", "--weights-only")
        message = (
            f"torch.load refuses this file by default, because of {shown} in it. Don't pass weights_only=False, "
            "which runs what the file says: the weights don't need it. "
            f"{convert if subject.parts else 'statedict.load gives the rest as inert records'}"
        )
        yield Finding("needs-pickle", "info", message)


def _classes(root: object) -> Iterator[str]:
    """The classes of values that aren't on torch's list for weights_only."""
    pending: list[object] = [root]
    for _ in range(_MOST_NODES):
        if not pending:
            return
        node = pending.pop()
        if isinstance(node, Container):
            if node.kind == "opaque":
                yield node.type
            elif node.kind == "Namespace":
                yield "argparse.Namespace"
            pending.extend(node.children)
        elif isinstance(node, ObjectEntry):
            value = node.value
            if isinstance(value, Opaque):
                yield value.type
            elif isinstance(value, NumpyScalar):
                yield "numpy.core.multiarray.scalar"
