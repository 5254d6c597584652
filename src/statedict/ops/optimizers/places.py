"""Where the state of optimizers and schedulers stands in a checkpoint; told by the keys that torch gives it."""

from __future__ import annotations

from collections.abc import Callable

from statedict.checkpoint import Checkpoint
from statedict.errors import KeyMismatch
from statedict.keys import Path, escaped
from statedict.manifest import Container, Node
from statedict.nodes import components

__all__ = ["is_optimizer", "is_schedule", "one_optimizer", "one_schedule", "optimizer_paths", "schedule_paths"]

# Containers above a state that are looked through: real files have fewer than four.
_DEEPEST = 6


def is_optimizer(node: Node) -> bool:
    """Whether it is the state dict of an optimizer, grouped or flattened."""
    if not isinstance(node, Container):
        return False
    names = set(map(str, node.keys))
    return "param_groups" in names or any(name.startswith("param_groups.") for name in names)


def is_schedule(node: Node) -> bool:
    """Whether it is the state dict of a learning rate scheduler (torch ``optim/lr_scheduler.py``: all attributes but the optimizer)."""
    if not isinstance(node, Container):
        return False
    names = set(map(str, node.keys))
    return "last_epoch" in names and bool(names & {"_step_count", "base_lrs", "_last_lr", "_schedulers"})


def optimizer_paths(root: Node) -> list[Path]:
    """Where optimizers' states stand, in the order of the file; the empty path is the whole."""
    return _paths(root, is_optimizer)


def schedule_paths(root: Node) -> list[Path]:
    """Where schedulers' states stand, in the order of the file; those inside of another scheduler's not."""
    return _paths(root, is_schedule)


def _paths(root: Node, is_wanted: Callable[[Node], bool]) -> list[Path]:
    found: list[Path] = []
    pending: list[tuple[Path, Node]] = [((), root)]
    while pending:
        path, node = pending.pop()
        if is_wanted(node):
            found.append(path)
        elif isinstance(node, Container) and len(path) < _DEEPEST:
            parts = components(node.keys)
            pending.extend(((*path, parts[i]), node.children[i]) for i in range(len(parts) - 1, -1, -1))
    return found


def one_optimizer(checkpoint: Checkpoint) -> Path:
    """Where the state of an optimizer stands; empty if the checkpoint is one. Raises ``KeyMismatch`` where several do, or none."""
    return _only(optimizer_paths(checkpoint.manifest.structure), "optimizer", "It has keys 'state' and 'param_groups'")


def one_schedule(checkpoint: Checkpoint) -> Path:
    """Where the state of a scheduler stands. Raises ``KeyMismatch`` where several do, or none."""
    return _only(schedule_paths(checkpoint.manifest.structure), "scheduler", "It has a key 'last_epoch'")


def _only(found: list[Path], what: str, hint: str) -> Path:
    if len(found) == 1:
        return found[0]
    if not found:
        article = "an" if what[0] in "aeio" else "a"
        raise KeyMismatch(f"there is no state of {article} {what} in it", hint=hint)
    names = ", ".join(f"at={escaped(path)!r}" for path in found[:5])
    raise KeyMismatch(f"there are the states of several {what}s in it", hint=f"Say which: {names}")
