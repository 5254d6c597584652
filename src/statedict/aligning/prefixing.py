"""Names that are the same on both sides, as they are or after the beginning of a part of them is exchanged."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from statedict.aligning.alignment import CORROBORATED, PROVEN, Mapped, Side
from statedict.aligning.board import Board
from statedict.aligning.naming import component_words
from statedict.aligning.opposites import opposed
from statedict.aligning.recognising import is_foreign

__all__ = ["Rewrite", "claim_equal_names", "claim_rewritten"]

_SHARE = 0.6  # of the names under a prefix that must lead to a tensor of the same shape
_FEWEST = 3  # names that a rewriting must carry over, unless it carries all


class Rewrite(NamedTuple):
    """``old`` at the beginning of the source's names replaced by ``new``."""

    old: str
    new: str

    def apply(self, key: str) -> str | None:
        """The key's new name, or None where it doesn't begin so."""
        if self.old and not key.startswith(self.old + "."):
            return None
        rest = key[len(self.old) + 1 :] if self.old else key
        return f"{self.new}.{rest}" if self.new else rest

    def __str__(self) -> str:
        if not self.new:
            return f"without {self.old!r} at the beginning the names are the same"
        if not self.old:
            return f"with {self.new!r} at the beginning the names are the same"
        return f"with {self.new!r} in place of {self.old!r} the names are the same"


def claim_equal_names(board: Board) -> None:
    """The same name and shape on both sides: the same tensor."""
    for key in list(board.open_target):
        if key in board.open_source and board.source.tensors[key].shape == board.target.tensors[key].shape:
            board.claim(Mapped(key, "copy", (key,), PROVEN, ("the same name and shape",)))


def claim_rewritten(board: Board) -> None:
    """Carries over what a change of prefix makes equal, the change that explains most first.

    Where several would fill the same tensors about equally well, none is carried out, and none that they contradict: of two trees
    that are alike on both sides, whichever goes to one leaves the other to the other.
    """
    done: set[Rewrite] = set()
    doubtful: set[Rewrite] = set()
    while True:
        found = _best(board, done, doubtful)
        if not found:
            return
        best, others = found
        if others:
            doubtful |= {best, *others}
            continue
        reason = str(best)
        for old, new in _carried(board, best).items():
            board.claim(Mapped(new, "copy", (old,), CORROBORATED, (reason, "all shapes that it carries over agree")))
        done.add(best)


def _best(board: Board, done: set[Rewrite], doubtful: set[Rewrite]) -> tuple[Rewrite, list[Rewrite]] | None:
    """The rewriting that carries most, and others that carry nearly as much to the same targets or from the same sources."""
    carried: dict[Rewrite, dict[str, str]] = {}
    endings = _Endings(board)
    for rewrite in _candidates(board):
        if rewrite not in done and _is_plausible(rewrite):
            pairs = _carried(board, rewrite)
            if _is_good(board, rewrite, pairs) and not endings.contradict(pairs):
                carried[rewrite] = pairs
    sure = [rewrite for rewrite in carried if rewrite not in doubtful]
    if not sure:
        return None
    best = max(sure, key=lambda rewrite: (len(carried[rewrite]), -len(rewrite.old) - len(rewrite.new)))
    others = [
        rewrite
        for rewrite, pairs in carried.items()
        if rewrite != best and _collides(carried[best], pairs) and 10 * len(pairs) >= 8 * len(carried[best])
    ]
    return best, others


def _collides(one: Mapping[str, str], two: Mapping[str, str]) -> bool:
    """Whether the two would fill the same tensors from different ones, or use the same for different ones."""
    back = {new: old for old, new in one.items()}
    return any(back.get(new, old) != old or one.get(old, new) != new for old, new in two.items())


def _candidates(board: Board) -> list[Rewrite]:
    """Rewritings that make a name equal whose ending of two components or more is on both sides, the most frequent first."""
    endings: dict[str, list[str]] = defaultdict(list)
    for key in board.open_target:
        for ending in _endings(key):
            endings[ending].append(key)
    count: Counter[Rewrite] = Counter()
    for key in board.open_source:
        if is_foreign(key):
            continue
        shape = board.source.tensors[key].shape
        for ending in _endings(key):
            fits = [new for new in endings.get(ending, ())[:8] if board.target.tensors[new].shape == shape]
            for new in fits:
                count[Rewrite(_before(key, ending), _before(new, ending))] += 1
            if fits:
                break
    return [rewrite for rewrite, _ in count.most_common(40)]


def _endings(key: str) -> Iterable[str]:
    """The key, and what remains of it without its first components, two at least; not from a number on, which is of its list."""
    parts = key.split(".")
    yield key
    for at in range(1, len(parts) - 1):
        if not parts[at].isdigit():
            yield ".".join(parts[at:])


class _Endings:
    """The endings of all open names with their shapes: whether a name has a better partner than the one that it is given."""

    def __init__(self, board: Board) -> None:
        self._board = board
        self._sources = _counted(board.open_source, board.source)
        self._targets = _counted(board.open_target, board.target)

    def contradict(self, pairs: Mapping[str, str]) -> bool:
        """Whether half of the pairs have a tensor of equal shape beside them whose name has more in common with one of the two."""
        return 2 * sum(1 for old, new in pairs.items() if self._is_rivalled(old, new)) > len(pairs)

    def _is_rivalled(self, old: str, new: str) -> bool:
        shape = self._board.source.tensors[old].shape
        for key, others in ((new, self._sources), (old, self._targets)):
            partner = old if key is new else new
            for ending in _endings(key):
                if partner == ending or partner.endswith("." + ending):
                    break
                if (ending, shape) in others:
                    return True
        return False


def _counted(keys: Iterable[str], side: Side) -> set[tuple[str, tuple[int, ...]]]:
    return {(ending, side.tensors[key].shape) for key in keys for ending in _endings(key)}


def _before(key: str, ending: str) -> str:
    return key[: -len(ending)].removesuffix(".")


def _carried(board: Board, rewrite: Rewrite) -> dict[str, str]:
    found = {}
    for key in board.open_source:
        new = rewrite.apply(key)
        if (
            new in board.open_target
            and new is not None
            and board.source.tensors[key].shape == board.target.tensors[new].shape
        ):
            found[key] = new
    return found


def _is_good(board: Board, rewrite: Rewrite, pairs: Mapping[str, str]) -> bool:
    under = [key for key in board.open_source if not is_foreign(key) and rewrite.apply(key) is not None]
    onto = [key for key in board.open_target if not rewrite.new or key.startswith(rewrite.new + ".")]
    bent = sum(1 for key in under if rewrite.apply(key) in board.open_target and key not in pairs)
    few = min(len(under), len(onto))
    return len(pairs) >= min(_FEWEST, few) and len(pairs) >= _SHARE * few and 8 * bent <= len(pairs) + 8


def _is_plausible(rewrite: Rewrite) -> bool:
    """Whether it stays above the blocks, whose names are judged for all of them at once, and exchanges no word for its opposite."""
    if any(part.isdigit() for prefix in rewrite for part in prefix.split(".")):
        return False
    return not opposed(_words(rewrite.old), _words(rewrite.new))


def _words(prefix: str) -> list[str]:
    return [word for part in prefix.split(".") for word in component_words(part)]
