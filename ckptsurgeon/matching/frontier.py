"""The modules and units of one side that are not placed yet, found by size and by name without looking at all of them."""

from __future__ import annotations

import heapq
from collections.abc import Iterable

from ckptsurgeon.matching.module_tree import Node

_MANY = 300  # modules, above which only those of about the same size are compared


class Frontier:
    """Nodes that are open, by size; those that are placed or opened leave it, and children of opened ones come in."""

    def __init__(self, nodes: Iterable[Node]) -> None:
        self.nodes: dict[int, Node] = {}
        self.sizes: dict[int, dict[int, Node]] = {}
        self.rows: dict[str, dict[int, Node]] = {}
        self.modules: dict[int, Node] = {}
        self.heap: list[int] = []
        self.add(nodes)

    def __bool__(self) -> bool:
        return bool(self.nodes)

    def add(self, nodes: Iterable[Node]) -> None:
        """Let nodes in."""
        for node in nodes:
            self.nodes[id(node)] = node
            if not self.sizes.get(node.size):
                heapq.heappush(self.heap, -node.size)
            self.sizes.setdefault(node.size, {})[id(node)] = node
            self.rows.setdefault(node.folded, {})[id(node)] = node
            if not node.leaf:
                self.modules[id(node)] = node

    def remove(self, node: Node) -> None:
        """Take a node out."""
        for table in (self.nodes, self.sizes[node.size], self.rows[node.folded], self.modules):
            table.pop(id(node), None)

    @property
    def largest(self) -> int:
        """The size of the largest; there must be one."""
        while not self.sizes[-self.heap[0]]:
            heapq.heappop(self.heap)
        return -self.heap[0]

    def of_size(self, size: int) -> list[Node]:
        """Those of a size, in the order of their keys."""
        return sorted(self.sizes.get(size, {}).values(), key=lambda node: node.at)

    def in_row(self, node: Node) -> list[Node]:
        """Those that differ from a node by numbers alone, itself among them, in their order."""
        return sorted(self.rows.get(node.folded, {}).values(), key=lambda member: member.numbers)

    def like(self, node: Node) -> list[Node]:
        """Those that may be much like a module: modules, and units about as large."""
        modules = self.modules.values()
        if len(modules) > _MANY:
            modules_near = [candidate for candidate in modules if node.size <= 2 * candidate.size and candidate.size <= 2 * node.size]
        else:
            modules_near = list(modules)
        units = [
            unit
            for size in ([size for size in self.sizes if 0.9 * node.size <= size <= node.size / 0.9] if len(self.sizes) <= _MANY else ())
            for unit in self.sizes[size].values()
            if unit.leaf
        ]
        return sorted([*modules_near, *units], key=lambda candidate: candidate.at)

    def open(self, node: Node) -> None:
        """Put a module's children in its place."""
        self.remove(node)
        self.add(node.children)
