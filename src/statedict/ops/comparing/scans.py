"""Which of many pairs of tensors have the same bytes: both sides are streamed once, by a thread of each processor.

A large pair is cut into pieces that the threads share; of a pair that differs, the rest isn't read. Nothing but bytes is
compared, so numpy isn't needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from threading import Lock
from typing import NamedTuple

from statedict.io.engine import cpus
from statedict.io.workers import Workers
from statedict.ops.comparing.walks import Room, Side, Walk, are_same_bytes

__all__ = ["Progress", "pairs_with_same_bytes"]

# Bytes of one side that a thread takes at a time: of one large pair, or of many small ones.
_PIECE_NBYTES = 8 * 1024 * 1024
# More threads than this only wait for the memory.
_MOST_THREADS = 8

Progress = Callable[[int, int], None]


class _Piece(NamedTuple):
    """Some elements of one pair: all of them where ``numel`` is None."""

    pair: int
    walk: Walk
    first: int
    numel: int | None
    nbytes: int  # of one side


def pairs_with_same_bytes(pairs: Sequence[tuple[Side, Side]], on_progress: Progress | None = None) -> list[bool]:
    """Whether both of each pair, which are of one shape and dtype, hold the same bytes. Raises what reading raises.

    ``on_progress`` is told the bytes read of both, and those that there are at most.
    """
    return _Scan(pairs, on_progress).run()


class _Scan:
    """One pass over all pairs, and what its threads share."""

    def __init__(self, pairs: Sequence[tuple[Side, Side]], on_progress: Progress | None) -> None:
        self._pairs = pairs
        self._is_same = [True] * len(pairs)
        self._total = 2 * sum(a.entry.nbytes for a, _ in pairs)
        self._on_progress = on_progress
        self._done = 0
        self._lock = Lock()
        self._jobs = self._cut()

    def run(self) -> list[bool]:
        """The answer for each pair."""
        count = min(_MOST_THREADS, cpus()) if self._total > 2 * _PIECE_NBYTES else 1
        self._workers = Workers(count)
        self._workers.run(self._work)
        return self._is_same

    def _cut(self) -> Iterator[list[_Piece]]:
        """The pieces, as many together as make a job."""
        job: list[_Piece] = []
        nbytes = 0
        for at, (a, b) in enumerate(self._pairs):
            walk = Walk(a, b)
            size = walk.numel * walk.bits // 8
            if size > _PIECE_NBYTES:
                yield from self._pieces(at, walk, size)
                continue
            job.append(_Piece(at, walk, 0, None, size))
            nbytes += size
            if nbytes >= _PIECE_NBYTES:
                yield job
                job, nbytes = [], 0
        if job:
            yield job

    def _pieces(self, at: int, walk: Walk, size: int) -> Iterator[list[_Piece]]:
        """A large pair in pieces; whole where it can only be read from the first byte to the last."""
        if not walk.can_be_cut:
            yield [_Piece(at, walk, 0, None, size)]
            return
        most = _PIECE_NBYTES * 8 // walk.bits & ~15
        for first in range(0, walk.numel, most):
            if self._is_same[at]:
                count = min(most, walk.numel - first)
                yield [_Piece(at, walk, first, count, count * walk.bits // 8)]

    def _work(self) -> None:
        room = Room()
        while not self._workers.stopped:
            with self._lock:
                job = next(self._jobs, None)
            if job is None:
                return
            for piece in job:
                self._compare(piece, room)
            if self._on_progress is not None:
                with self._lock:
                    self._done += 2 * sum(piece.nbytes for piece in job)
                    self._on_progress(self._done, self._total)

    def _compare(self, piece: _Piece, room: Room) -> None:
        """Look at the bytes until they differ, here or in another thread's piece of the pair."""
        for one, two, _ in piece.walk.blocks(piece.first, piece.numel, room):
            if not are_same_bytes(one, two):
                self._is_same[piece.pair] = False
            if not self._is_same[piece.pair] or self._workers.stopped:
                return
