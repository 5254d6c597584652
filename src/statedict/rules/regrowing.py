"""A tree grown anew from leaves that got other paths: containers follow their content, with what belongs to them.

Nothing here recurses, and no node of the old tree is changed.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from statedict.keys import Path, dotted
from statedict.manifest import Container, Node, ObjectEntry
from statedict.nodes import components

__all__ = ["INSIDE", "Moved", "Tree", "grown", "placed"]

Move = Callable[[Path], Path]

# Stands for whatever is inside a container or a module, so that these move as a key inside them would.
INSIDE = "\0"
# Kinds whose keys are positions.
_SEQUENCES = ("list", "tuple", "set", "frozenset")


class Moved(NamedTuple):
    """A leaf, or a container with nothing in it, on its way from one path to another."""

    old: Path
    new: Path
    node: Node


class Tree:
    """A tree taken apart.

    ``leaves`` are in order, containers that hold nothing among them; ``containers`` are the others, each before those inside
    it; ``keys`` are the keys themselves where the component of the path is only their text. ``flat`` are the containers
    whose keys are dotted themselves, or texts under which nothing is nested: state dicts as torch has them.
    """

    def __init__(self, root: Node) -> None:
        self.leaves: list[tuple[Path, Node]] = []
        self.containers: dict[Path, Container] = {}
        self.keys: dict[Path, object] = {}
        self.flat: set[Path] = set()
        # One value that is no tensor has no name to change; an empty state dict is such a value.
        pending: list[tuple[Path, Node]] = [((), root)] if not isinstance(root, ObjectEntry) else []
        while pending:
            path, node = pending.pop()
            if not isinstance(node, Container) or (path and not node.children):
                self.leaves.append((path, node))
                continue
            self.containers[path] = node
            if _is_flat(node):
                self.flat.add(path)
            parts = components(node.keys)
            self.keys.update({(*path, part): key for part, key in zip(parts, node.keys) if part is not key})
            pending.extend([((*path, parts[i]), node.children[i]) for i in range(len(parts) - 1, -1, -1)])


def _is_flat(node: Container) -> bool:
    nested = any(isinstance(child, Container) and child.children for child in node.children)
    plain = not nested and all(isinstance(key, str) for key in node.keys)
    return plain or any(isinstance(key, str) and "." in key for key in node.keys)


def grown(tree: Tree, leaves: Sequence[Moved], move: Move | None = None) -> Node:
    """The tree of the leaves at their new paths, which no two share; ``move`` is what gave them, None if all stayed."""
    homes = {path: path for path in tree.containers} if move is None else _homes(tree, leaves, move)
    made: dict[Path, tuple[Container, list[object], list[Node]]] = {}

    def container(path: Path) -> tuple[Container, list[object], list[Node]]:
        """The container at a path, made with those that it stands in if there is none yet."""
        missing = []
        while path not in made:
            keys: list[object] = []
            children: list[Node] = []
            made[path] = (_container(tree, path, homes.get(path), keys, children, move), keys, children)
            missing.append(path)
            path = path[:-1] if path else path
        for path in missing:
            if path:
                _, keys, children = made[path[:-1]]
                keys.append(_key(tree, homes.get(path), path))
                children.append(made[path][0])
        return made[missing[0]] if missing else made[path]

    if not tree.containers and leaves and not leaves[0].new:
        return leaves[0].node
    container(())
    for leaf in leaves:
        _, keys, children = container(leaf.new[:-1])
        keys.append(_key(tree, leaf.old, leaf.new))
        children.append(leaf.node)
    for node, keys, _ in made.values():
        if node.kind in _SEQUENCES and keys != list(range(len(keys))):
            node.kind, node.type = "dict", ""
    return made[()][0]


def _container(
    tree: Tree, path: Path, home: Path | None, keys: list[object], children: list[Node], move: Move | None
) -> Container:
    """An empty container at a new path, of the kind and with the attributes of the one that it comes from."""
    if home is None:
        return Container("dict", keys, children)
    old = tree.containers[home]
    attributes = old.attributes
    metadata = attributes.get("_metadata")
    if move is not None and isinstance(metadata, Mapping):
        attributes = {**attributes, "_metadata": _moved_metadata(metadata, home, path, move)}
    return Container(old.kind, keys, children, type=old.type, attributes=attributes)


def _key(tree: Tree, old: Path | None, new: Path) -> object:
    """The key of a leaf or container in the container that it stands in."""
    if old is not None and old[-1:] == new[-1:]:
        return tree.keys.get(old, new[-1])
    return new[-1]


def _homes(tree: Tree, leaves: Sequence[Moved], move: Move) -> dict[Path, Path]:
    """Which old container stands at each new path: the outermost, or the one that all that is left came from."""
    candidates: dict[Path, list[Path]] = {}
    for path in tree.containers:
        candidates.setdefault(move((*path, INSIDE))[:-1], []).append(path)
    shared = {path: found for path, found in candidates.items() if len(found) > 1}
    origins: dict[Path, set[Path]] = {}
    for leaf in leaves if shared else ():
        for at in range(len(leaf.new)):
            within = [path for path in shared.get(leaf.new[:at], ()) if leaf.old[: len(path)] == path]
            if within:
                origins.setdefault(leaf.new[:at], set()).add(max(within, key=len))
    homes = {path: found[0] for path, found in candidates.items()}
    return homes | {path: next(iter(found)) for path, found in origins.items() if len(found) == 1}


def _moved_metadata(metadata: Mapping[object, object], old: Path, new: Path, move: Move) -> Mapping[object, object]:
    """The ``_metadata`` of a state dict (torch/nn/modules/module.py): facts by the path of each module, ``""`` the whole.

    Where a wrapper and what it wraps get one path, the inner one's facts stay, as torch's own
    ``consume_prefix_in_state_dict_if_present`` has it. Modules that leave the container are left out.
    """
    made: dict[object, object] = OrderedDict() if isinstance(metadata, OrderedDict) else {}
    lengths: dict[object, int] = {}
    for name, facts in metadata.items():
        if not isinstance(name, str):
            made[name] = facts
            continue
        path = move((*old, f"{name}.{INSIDE}" if name else INSIDE))
        if path[: len(new)] != new:
            continue
        key = dotted(path[len(new) :]).removesuffix(INSIDE).removesuffix(".")
        if len(name) >= lengths.get(key, 0):
            made[key], lengths[key] = facts, len(name)
    return made


def placed(old: Path, key: str, tree: Tree) -> Path:
    """Where a leaf that was at ``old`` goes to have that dotted key: in containers as those that it stood in.

    Outer containers that the new key begins with stay; among flat keys the rest is one text, else each word is a component,
    a number where one stood at that depth.
    """
    if dotted(old) == key:
        return old
    home: Path = ()
    for at, part in enumerate(old[:-1]):
        if home in tree.flat or not key.startswith(f"{part}."):
            break
        home, key = old[: at + 1], key[len(str(part)) + 1 :]
    if home in tree.flat:
        return (*home, key)
    made: list[str | int] = list(home)
    for word in key.split("."):
        beside = old[len(made)] if len(made) < len(old) else None
        made.append(int(word) if isinstance(beside, int) and word.isascii() and word.isdigit() else word)
    return tuple(made)
