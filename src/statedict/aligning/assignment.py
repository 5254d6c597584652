"""The one-to-one choice of greatest sum (the Hungarian method, with potentials)."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["assign"]


def assign(gains: Sequence[Sequence[float]]) -> list[tuple[int, int]]:
    """Pairs of row and column so that the sum of gains is greatest; the smaller side is used up. Takes O(n^2 m) steps."""
    if not gains or not gains[0]:
        return []
    if len(gains) > len(gains[0]):
        return sorted((row, column) for column, row in assign([list(line) for line in zip(*gains)]))
    rows, columns = len(gains), len(gains[0])
    by_row, by_column = [0.0] * (rows + 1), [0.0] * (columns + 1)
    owner = [0] * (columns + 1)  # the row of a column, counted from 1
    for row in range(1, rows + 1):
        way = _augment(row, gains, by_row, by_column, owner)
        column = way[0]
        steps = way[1]
        while column:
            owner[column] = owner[steps[column]]
            column = steps[column]
    return sorted((owner[column] - 1, column - 1) for column in range(1, columns + 1) if owner[column])


def _augment(
    row: int, gains: Sequence[Sequence[float]], by_row: list[float], by_column: list[float], owner: list[int]
) -> tuple[int, list[int]]:
    """The free column where the cheapest way from a new row ends, and the column before each on the way."""
    columns = len(by_column) - 1
    owner[0] = row
    column = 0
    least = [float("inf")] * (columns + 1)
    before = [0] * (columns + 1)
    done = [False] * (columns + 1)
    while True:
        done[column] = True
        here, delta, following = owner[column], float("inf"), 0
        for at in range(1, columns + 1):
            if done[at]:
                continue
            cost = -gains[here - 1][at - 1] - by_row[here] - by_column[at]
            if cost < least[at]:
                least[at], before[at] = cost, column
            if least[at] < delta:
                delta, following = least[at], at
        for at in range(columns + 1):
            if done[at]:
                by_row[owner[at]] += delta
                by_column[at] -= delta
            else:
                least[at] -= delta
        column = following
        if owner[column] == 0:
            return column, before
