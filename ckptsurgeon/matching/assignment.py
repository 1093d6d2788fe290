"""Who goes with whom, for a table of scores: the best assignment, and by how much it beats the next. Pure numbers.

Method: shortest augmenting paths (Jonker and Volgenant, Computing 38, 1987), O(n³) for n rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf

Scores = Sequence[Sequence[float]]


def assign(scores: Scores) -> list[tuple[int, int]]:
    """Pairs (row, column), as many as the shorter side has, whose scores have the greatest sum.

    >>> assign([[1.0, 2.0], [0.0, 3.0]])
    [(0, 0), (1, 1)]
    """
    rows, columns = len(scores), len(scores[0]) if scores else 0
    if rows > columns:
        turned = assign([[scores[row][column] for row in range(rows)] for column in range(columns)])
        return sorted((row, column) for column, row in turned)
    potential_row, potential = [0.0] * (rows + 1), [0.0] * (columns + 1)
    owner, before = [0] * (columns + 1), [0] * (columns + 1)
    for row in range(1, rows + 1):
        owner[0], column = row, 0
        least, done = [inf] * (columns + 1), [False] * (columns + 1)
        while True:
            done[column] = True
            here, step, following = owner[column], inf, 0
            for other_column in range(1, columns + 1):
                if not done[other_column]:
                    cost = -scores[here - 1][other_column - 1] - potential_row[here] - potential[other_column]
                    if cost < least[other_column]:
                        least[other_column], before[other_column] = cost, column
                    if least[other_column] < step:
                        step, following = least[other_column], other_column
            for other_column in range(columns + 1):
                if done[other_column]:
                    potential_row[owner[other_column]] += step
                    potential[other_column] -= step
                else:
                    least[other_column] -= step
            column = following
            if not owner[column]:
                break
        while column:
            owner[column] = owner[before[column]]
            column = before[column]
    return sorted((owner[column] - 1, column - 1) for column in range(1, columns + 1) if owner[column])


def margins(scores: Scores, pairs: Sequence[tuple[int, int]]) -> list[tuple[float, tuple[int, int] | None]]:
    """For each pair, what the sum would lose in the nearest assignment without it, and the pair that the row would then be in.

    Looked at are exchanges of two pairs, and a row or a column that no pair has.
    """
    rows, columns = len(scores), len(scores[0]) if scores else 0
    free_rows, free_columns = set(range(rows)) - {row for row, _ in pairs}, set(range(columns)) - {column for _, column in pairs}
    losses: list[tuple[float, tuple[int, int] | None]] = []
    for row, column in pairs:
        best: tuple[float, tuple[int, int] | None] = (inf, None)
        for other_row, other_column in pairs:
            if other_row != row:
                lost = scores[row][column] + scores[other_row][other_column] - scores[row][other_column] - scores[other_row][column]
                best = min(best, (lost, (row, other_column)), key=lambda item: item[0])
        for free in free_columns:
            best = min(best, (scores[row][column] - scores[row][free], (row, free)), key=lambda item: item[0])
        for free in free_rows:
            best = min(best, (scores[row][column] - scores[free][column], (free, column)), key=lambda item: item[0])
        losses.append(best)
    return losses
