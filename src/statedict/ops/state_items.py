"""A checkpoint as one flat state dict: what stands under each key, whether a tensor or a value of another kind."""

from __future__ import annotations

from collections.abc import Container as Names
from collections.abc import Mapping

from statedict.checkpoint import Checkpoint
from statedict.errors import KeyMismatch
from statedict.manifest import Container, Node, TensorEntry
from statedict.nodes import components

__all__ = ["metadata_of", "state_items", "tensor_shapes"]


def state_items(checkpoint: Checkpoint, whole: Names[str] = ()) -> dict[str, Node]:
    """What stands under each dotted key. A container is taken apart, unless its own key is among ``whole``.

    An ``_extra_state`` is one value, whatever it is made of. Raises ``KeyMismatch`` where two paths read alike.
    """
    found: dict[str, Node] = {}
    pending: list[tuple[str, Node]] = [("", checkpoint.manifest.structure)]
    while pending:
        key, node = pending.pop()
        taken_apart = isinstance(node, Container) and node.kind in (
            "dict",
            "OrderedDict",
            "list",
            "tuple",
            "defaultdict",
        )
        last = key.rpartition(".")[2]
        if taken_apart and not (key and (key in whole or last == "_extra_state")):
            assert isinstance(node, Container)
            parts = components(node.keys)
            prefix = f"{key}." if key else ""
            pending.extend((f"{prefix}{parts[i]}", node.children[i]) for i in range(len(parts) - 1, -1, -1))
        elif key:
            if key in found:
                what = "two values of the file would have one key"
                raise KeyMismatch(what, path=checkpoint.source, key=key, hint="Say which part is meant: at=")
            found[key] = node
    return found


def tensor_shapes(items: Mapping[str, Node]) -> dict[str, tuple[int, ...]]:
    """The shapes of those that are tensors."""
    return {key: node.shape for key, node in items.items() if isinstance(node, TensorEntry)}


def metadata_of(checkpoint: Checkpoint) -> object:
    """The ``_metadata`` of the state dict: the versions of the modules that wrote it; None where it has none."""
    root = checkpoint.manifest.structure
    return root.attributes.get("_metadata") if isinstance(root, Container) else None
