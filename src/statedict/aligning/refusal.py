"""Whether the two are the same network at all."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from statedict.aligning.alignment import Mapped
from statedict.aligning.blocks import chain, pair_blocks
from statedict.aligning.board import Board
from statedict.aligning.families import Family, units
from statedict.aligning.lists import Forest, Path
from statedict.aligning.naming import meaning
from statedict.aligning.opposites import opposed
from statedict.aligning.recognising import is_foreign, is_recomputable, is_resizable

# The share of a side's tensors that may be strange to the other before the two count as different networks.
_STRANGE = 0.02

__all__ = ["refusal"]


def refusal(board: Board, sources: Forest, targets: Forest) -> str:
    """Why nothing should be mapped, in one sentence; empty where the two are one network."""
    return (
        _depth(board, sources, targets)
        or _width(board, sources, targets)
        or _share(board)
        or _strangeness(board, sources, targets)
    )


def _strangeness(board: Board, sources: Forest, targets: Forest) -> str:
    """Both sides have tensors that the other has nothing like. A part of a network lacks some; it has no others instead.

    The same number of elements in other pieces would be an operation that isn't known here, not another network.
    """
    if 2 * sum(1 for mapped in board.claims.values() if not _is_ending(mapped)) < len(board.claims):
        return ""
    old, new = _strangers(board, sources, targets)
    if sum(family.numel for family in old) == sum(family.numel for family in new):
        return ""
    many = [sum(len(family.keys) for family in families) for families in (old, new)]
    if any(count < max(2, _STRANGE * len(side.tensors)) for count, side in zip(many, (board.source, board.target))):
        return ""
    return (
        f"{many[0]} tensors of the source, such as {old[0].keys[0]} {list(old[0].shapes[0])}, and {many[1]} of the target, such as "
        f"{new[0].keys[0]} {list(new[0].shapes[0])}, are like nothing that is left in the other: "
        "these are different networks, so nothing is mapped."
    )


def _is_ending(mapped: Mapped) -> bool:
    """Whether the names are the same, or one is the end of the other."""
    one, two = mapped.sources[0], mapped.target
    return one == two or one.endswith("." + two) or two.endswith("." + one)


def _share(board: Board) -> str:
    """Less than half of either side found its place."""
    source = [key for key in board.source.tensors if not is_recomputable(key) and not is_foreign(key)]
    target = [key for key in board.target.tensors if not is_recomputable(key)]
    placed = {**board.doubts, **board.claims}
    used = {
        key
        for mapped in placed.values()
        for key in (*mapped.sources, *(k for keys in mapped.alternatives for k in keys))
    }
    filled = sum(1 for key in target if key in placed)
    taken = sum(1 for key in source if key in used)
    if 2 * filled >= len(target) or 2 * taken >= len(source):
        return ""
    if not filled:
        return "Nothing in the source has the names and shapes of anything in the target: these are different networks."
    return (
        f"Only {filled} of the target's {len(target)} tensors have a counterpart among the source's {len(source)}: "
        "these are different networks, so nothing is mapped."
    )


def _strangers(board: Board, sources: Forest, targets: Forest) -> tuple[list[Family], list[Family]]:
    """What is left of either side and has no counterpart on the other: none by name, and none left of the same shapes."""
    asked = {key for key, mapped in board.doubts.items() if mapped.sources}
    taken = {key for mapped in board.doubts.values() for keys in (mapped.sources, *mapped.alternatives) for key in keys}
    old = _left(sources, [key for key in board.open_source if key not in taken])
    new = _left(targets, [key for key in board.open_target if key not in asked])
    return (
        [family for signature, families in old.items() if signature not in new for family in families],
        [family for signature, families in new.items() if signature not in old for family in families],
    )


def _left(trees: Forest, keys: Iterable[str]) -> dict[object, list[Family]]:
    found: dict[object, list[Family]] = defaultdict(list)
    for unit in units(trees, keys, whole=False):
        family = unit.leaves[0]
        if family.kind == "real" and not is_recomputable(family.keys[0]) and not is_foreign(family.keys[0]):
            found[family.signature].append(family)
    return found


def _width(board: Board, sources: Forest, targets: Forest) -> str:
    """The same matrix of the same blocks, in another size."""
    pairing = pair_blocks(board, sources, targets)
    asked = {key for key, mapped in board.doubts.items() if mapped.sources}
    taken = {key for mapped in board.doubts.values() for key in mapped.sources}
    old = _open_in_blocks(sources, [key for key in board.open_source if key not in taken])
    new = _open_in_blocks(targets, [key for key in board.open_target if key not in asked])
    for path, families in old.items():
        others = new.get(pairing.forth.get(path, ("",)), [])
        if sum(family.numel for family in families) == sum(family.numel for family in others):
            continue
        for one in families:
            for two in others:
                if _is_same_part(one, two):
                    return (
                        f"{one.keys[0]} is {list(one.shapes[0])} and {two.keys[0]} is {list(two.shapes[0])}, and so on in every block: "
                        "these are networks of different sizes, so nothing is mapped."
                    )
    return ""


def _open_in_blocks(trees: Forest, keys: Iterable[str]) -> dict[Path, list[Family]]:
    found: dict[Path, list[Family]] = defaultdict(list)
    for unit in units(trees, keys, whole=False):
        family = unit.leaves[0]
        for path in chain(trees, unit.path)[:1]:
            inside = unit.path[len(path) :]
            if (
                family.kind == "real"
                and len(family.shapes[0]) > 1
                and not is_recomputable(family.keys[0])
                and not is_resizable(".".join(inside))
            ):
                found[path].append(family)
    return found


def _is_same_part(one: Family, two: Family) -> bool:
    if one.leaf != two.leaf or len(one.shapes) != len(two.shapes) or len(one.shapes[0]) != len(two.shapes[0]):
        return False
    first, second = meaning(one.path), meaning(two.path)
    if first.role and second.role and first.role != second.role:
        return False
    return bool({*first.words} & {*second.words}) and not opposed(first.words, second.words)


def _depth(board: Board, sources: Forest, targets: Forest) -> str:
    """Whole blocks more on one side, and all else there."""
    for old in _stacks(sources):
        for new in _stacks(targets):
            one, two = sources.ranks[old], targets.ranks[new]
            if len(one) == len(two) or min(len(one), len(two)) < 1 or not _are_alike(board, sources, targets, old, new):
                continue
            return (
                f"The source has {len(one)} blocks in {'.'.join(old[:-1])} and the target has {len(two)} in {'.'.join(new[:-1])}: "
                "these are networks of different depth, so nothing is mapped."
            )
    return ""


def _stacks(trees: Forest) -> list[Path]:
    return [path for path in trees.blocks if not any(path[:n] in trees.blocks for n in range(1, len(path)))]


def _are_alike(board: Board, sources: Forest, targets: Forest, old: Path, new: Path) -> bool:
    """Whether two stacks are of the same blocks, complete in both, and all that is missing is of theirs."""
    claimed = [
        mapped
        for key, mapped in board.claims.items()
        if targets.paths[key][: len(new)] == new and sources.paths[mapped.sources[0]][: len(old)] == old
    ]
    if not claimed:
        return False

    def blocks(trees: Forest, path: Path) -> dict[int, int]:
        count: dict[int, int] = defaultdict(int)
        for found in trees.indices.values():
            if found and found[0][0] == path:
                count[found[0][1]] += 1
        return count

    one, two = blocks(sources, old), blocks(targets, new)
    if min(one.values()) != max(one.values()) or min(two.values()) != max(two.values()) or min(one.values()) < 4:
        return False
    if set(one.values()) != set(two.values()):
        return False
    inside = {key for key in targets.paths if targets.paths[key][: len(new)] == new}
    missing = [
        key for key in board.open_target if key not in inside and not is_recomputable(key) and not is_resizable(key)
    ]
    return not missing
