"""How alike two modules are by what they hold, and which of two rows of modules go together in order. Shapes and numbers only, no names."""

from __future__ import annotations

from collections.abc import Sequence

from ckptsurgeon.matching.module_tree import Node

ALIKE = 0.7  # how much of the contents two modules share before one may stand for the other


def alike(first: Node, second: Node) -> float:
    """The share of contents that two modules have in common, 0 to 1; parts that are fused or turned count a little less."""
    if first.form == second.form:
        return 1.0
    a, b = first.weighed, second.weighed
    total = sum(a.values()) + sum(b.values())
    if not total:
        return 0.0
    shared = sum(min(weight, b[shape]) for shape, weight in a.items() if shape in b)
    exact = 2 * shared / total
    if first.leaf and second.leaf:
        return exact
    same = sum(min(elements, second.spread.get(inputs, 0)) for inputs, elements in first.spread.items())
    fused = 2 * same / (first.size + second.size)
    return max(exact, 0.95 * fused if fused > 0.9 else 0.0)


def in_order(table: Sequence[Sequence[float]]) -> list[tuple[int, int]]:
    """The pairs (row, column), both rising, with the greatest sum of likeness; the earliest of equals."""
    rows, columns = len(table), len(table[0]) if table else 0
    best = [[0.0] * (columns + 1) for _ in range(rows + 1)]
    for row in range(rows - 1, -1, -1):
        for column in range(columns - 1, -1, -1):
            pair = best[row + 1][column + 1] + table[row][column] if table[row][column] >= 0.5 else -1.0
            best[row][column] = max(pair, best[row + 1][column], best[row][column + 1])
    pairs, row, column = [], 0, 0
    while row < rows and column < columns:
        if table[row][column] >= 0.5 and best[row][column] == best[row + 1][column + 1] + table[row][column]:
            pairs.append((row, column))
            row, column = row + 1, column + 1
        elif best[row][column] == best[row + 1][column]:
            row += 1
        else:
            column += 1
    return pairs


def only_way(table: Sequence[Sequence[float]], pairs: Sequence[tuple[int, int]]) -> bool:
    """Whether the latest pairs of equal sum are the same as the earliest."""
    turned = [list(reversed(row)) for row in reversed(table)]
    rows, columns = len(table), len(table[0]) if table else 0
    return sorted((rows - 1 - row, columns - 1 - column) for row, column in in_order(turned)) == list(pairs)
