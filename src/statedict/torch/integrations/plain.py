"""What is asked of a checkpoint before a trainer takes it: whether all of it is plain values."""

from __future__ import annotations

from statedict.checkpoint import Checkpoint
from statedict.keys import dotted
from statedict.manifest import Container, ObjectEntry, Opaque
from statedict.nodes import components

__all__ = ["opaque_keys"]


def opaque_keys(checkpoint: Checkpoint) -> dict[str, str]:
    """The keys of what stays an inert record, with the names of the classes; in the order of the file. No tensor is read."""
    found: dict[str, str] = {}
    pending: list[tuple[tuple[str | int, ...], object]] = [((), checkpoint.manifest.structure)]
    while pending:
        path, node = pending.pop()
        if isinstance(node, ObjectEntry):
            kinds = _opaque_in(node.value)
            if kinds:
                found[dotted(path)] = kinds[0]
        elif isinstance(node, Container):
            kinds = [node.type] if node.kind == "opaque" else _opaque_in(list(node.keys))
            if kinds:
                found[dotted(path)] = kinds[0]
            pending += [((*path, part), child) for part, child in zip(components(node.keys), node.children)][::-1]
    return found


def _opaque_in(value: object) -> list[str]:
    """The classes of the records in a value or key: itself, or what a plain collection holds."""
    found: list[str] = []
    pending: list[object] = [value]
    while pending:
        item = pending.pop()
        if isinstance(item, Opaque):
            found.append(item.type)
        elif isinstance(item, dict):
            pending += [*item.keys(), *item.values()]
        elif isinstance(item, (list, tuple, set, frozenset)):
            pending += list(item)
    return found
