"""The structure of a checkpoint as a tree of nodes: walking it, finding a part, giving a part new paths, and back to Python.

Nothing here recurses: a file decides how deep its tree is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from statedict.errors import KeyNotFound
from statedict.keys import Path, near, parse_escaped
from statedict.manifest import Container, Node, ObjectEntry, Opaque, TensorEntry

__all__ = ["components", "every_tensor", "find", "fold", "rebased", "rebuilt", "walk"]


def components(keys: Sequence[object]) -> list[str | int]:
    """The path component of each key of one container: itself if it is a text or a number, else its text.

    Two keys that would give the same component (a tuple, and a text that reads like it) are told apart by a prime.
    """
    parts = [key if type(key) is str or type(key) is int else repr(key) for key in keys]
    if len(set(parts)) == len(parts):
        return parts
    taken: set[str | int] = set()
    for at, part in enumerate(parts):
        while part in taken:
            part = f"{part}'"
        taken.add(part)
        parts[at] = part
    return parts


def walk(node: Node, path: Path = ()) -> Iterator[tuple[Path, TensorEntry | ObjectEntry]]:
    """Every leaf below a node with its path, in the order of the file."""
    pending: list[tuple[Path, Node]] = [(path, node)]
    while pending:
        here, node = pending.pop()
        if isinstance(node, Container):
            parts = components(node.keys)
            pending.extend(((*here, parts[i]), node.children[i]) for i in range(len(parts) - 1, -1, -1))
        else:
            yield here, node


def every_tensor(root: Node) -> list[TensorEntry]:
    """The tensors of a tree in the order of the file: its leaves, and those inside attributes and inert records."""
    found: list[TensorEntry] = []
    pending: list[object] = [root]
    while pending:
        item = pending.pop()
        if isinstance(item, TensorEntry):
            found.append(item)
            if item.attributes:
                pending.append(item.attributes)
        elif isinstance(item, Container):
            if item.attributes:
                pending.append(item.attributes)
            pending.extend(reversed(item.children))
        elif isinstance(item, ObjectEntry):
            pending.append(item.value)
        elif isinstance(item, Opaque):
            pending.extend((item.pairs, item.items, item.state, item.args))
        elif isinstance(item, dict):
            pending.extend(item.values())
        elif isinstance(item, (list, tuple, set, frozenset)):
            pending.extend(item)
    return found


def find(root: Node, key: str | Path) -> Node:
    """The part of the tree under a key: a path, a dotted key, an escaped one, or a prefix of flat dotted keys.

    A prefix selects the keys that begin with it and a dot, without both. Raises ``KeyNotFound`` with the nearest keys.
    """
    found = _by_path(root, key) if isinstance(key, tuple) else _by_dotted(root, key)
    if found is None and isinstance(key, str) and ("\\" in key or key.startswith(".")):
        found = _by_path(root, parse_escaped(key))
    if found is None:
        shown = key if isinstance(key, str) else repr(key)
        names = [str(part) for part in components(root.keys)] if isinstance(root, Container) else []
        guesses = near(shown, names) or names[:8]
        raise KeyNotFound(
            "there is no such part",
            key=shown,
            hint=f"There is: {', '.join(guesses)}" if guesses else "The file holds one value only",
        )
    return found


def _by_path(node: Node, path: Path) -> Node | None:
    for part in path:
        if not isinstance(node, Container):
            return None
        parts = components(node.keys)
        if part not in parts:
            return None
        node = node.children[parts.index(part)]
    return node


def _by_dotted(root: Node, key: str) -> Node | None:
    """Components may hold dots themselves, so every way of cutting the key is tried; the shortest first component wins."""
    pending: list[tuple[Node, str]] = [(root, key)]
    prefixes: list[tuple[Container, str]] = []
    while pending:
        node, rest = pending.pop()
        if not rest:
            return node
        if not isinstance(node, Container):
            continue
        prefixes.append((node, rest + "."))
        longer = []
        for part, child in zip(components(node.keys), node.children):
            name = str(part)
            if rest == name:
                longer.append((len(name), child, ""))
            elif rest.startswith(name + "."):
                longer.append((len(name), child, rest[len(name) + 1 :]))
        longer.sort(key=lambda each: -each[0])
        pending.extend((child, left) for _, child, left in longer)
    for node, prefix in prefixes:
        picked = [
            (name[len(prefix) :], child)
            for name, child in zip(node.keys, node.children)
            if isinstance(name, str) and name.startswith(prefix)
        ]
        if picked:
            return Container("dict", [name for name, _ in picked], [child for _, child in picked])
    return None


def rebased(root: Node) -> tuple[Node, dict[Path, TensorEntry], dict[Path, ObjectEntry]]:
    """The node as a tree of its own: its leaves with paths that begin at it, and the leaves by path."""
    tensors: dict[Path, TensorEntry] = {}
    objects: dict[Path, ObjectEntry] = {}
    top: list[Node] = [root]
    pending: list[tuple[Path, list[Node], int]] = [((), top, 0)]
    while pending:
        path, siblings, index = pending.pop()
        node = siblings[index]
        if isinstance(node, TensorEntry):
            siblings[index] = tensors[path] = node._replace(path=path)
        elif isinstance(node, ObjectEntry):
            siblings[index] = objects[path] = node._replace(path=path)
        else:
            children = list(node.children)
            siblings[index] = Container(node.kind, node.keys, children, type=node.type, attributes=node.attributes)
            parts = components(node.keys)
            pending.extend(((*path, parts[i]), children, i) for i in range(len(parts) - 1, -1, -1))
    return top[0], tensors, objects


def fold(
    root: Node, leaf: Callable[[TensorEntry | ObjectEntry], Any], join: Callable[[Container, list[Any]], Any]
) -> Any:
    """What the tree comes to, from the leaves upwards: ``leaf`` of each leaf, ``join`` of each container's results."""
    top: list[Any] = [None]
    pending: list[tuple[Node, list[Any], int, list[Any] | None]] = [(root, top, 0, None)]
    while pending:
        node, siblings, index, results = pending.pop()
        if not isinstance(node, Container):
            siblings[index] = leaf(node)
        elif results is not None:
            siblings[index] = join(node, results)
        else:
            results = [None] * len(node.children)
            pending.append((node, siblings, index, results))
            pending.extend((node.children[i], results, i, None) for i in range(len(results) - 1, -1, -1))
    return top[0]


def rebuilt(node: Container, children: list[Any]) -> Any:
    """The Python container that a node stands for."""
    kind = node.kind
    if kind in ("list", "tuple", "set", "frozenset"):
        return {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}[kind](children)
    pairs = zip(node.keys, children)
    if kind == "Namespace":
        from types import SimpleNamespace

        return SimpleNamespace(**{str(key): value for key, value in pairs})
    if kind == "opaque":
        module, _, name = node.type.rpartition(".")
        fields = dict(pairs)
        if node.attributes.get("fields"):
            return Opaque(module, name, (), fields)
        made = Opaque(module, name, fields.get("args", ()), fields.get("state"))
        made.items = list(fields.get("items", ()))
        made.pairs = [(key, value) for key, value in fields.get("pairs", ())]
        return made
    import collections

    made_dict: Any = {
        "OrderedDict": collections.OrderedDict,
        "Counter": collections.Counter,
        "defaultdict": collections.defaultdict,
    }.get(kind, dict)()
    made_dict.update(pairs) if kind != "Counter" else dict.update(made_dict, pairs)
    for name, value in node.attributes.items():
        if kind == "OrderedDict" and name == "_metadata":
            made_dict._metadata = value
    return made_dict
