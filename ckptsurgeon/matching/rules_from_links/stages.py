"""Rules in two stages, where one would be long: modules that are numbered differently are moved first, then their contents are renamed.

Rule: one rule moves `features.7.**` to `blocks.3.0.**`, and one rule renames what is named differently in all of these modules.
The caller replays all rules.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from ckptsurgeon.matching.rules_from_links.order import in_order
from ckptsurgeon.rules.drafting.drafts import Draft, Known
from ckptsurgeon.rules.drafting.rows import Line, rows

_LEAST = 3  # keys of a module, below which it is no shorter to move it first


@dataclass
class _Node:
    """A module of the source: the targets of all keys below, None among them for a key that must stay where it is."""

    path: tuple[str, ...] = ()
    children: dict[str, _Node] = field(default_factory=dict)
    targets: list[str | None] = field(default_factory=list)


def module_moves(moves: Mapping[str, str | None]) -> dict[str, str]:
    """By module of the source the module of the target that it goes to; only for numbered modules all of whose keys go to one.

    `moves` has the target of each name, None for one that must keep its name for now.
    """
    root = _Node()
    for name, target in moves.items():
        node = root
        for segment in name.split(".")[:-1]:
            node = node.children.setdefault(segment, _Node((*node.path, segment)))
            node.targets.append(target)
    return {".".join(node.path): _common([target for target in node.targets if target is not None]) for node in _chosen(root)}


def _chosen(node: _Node) -> Iterable[_Node]:
    """The topmost modules that are worth a rule of their own."""
    if node.path and node.path[-1].isdecimal() and None not in node.targets and len(node.targets) >= _LEAST:
        module = _common([target for target in node.targets if target is not None])
        if any(segment.isdecimal() for segment in module.split(".")):
            yield node
            return
    for child in node.children.values():
        yield from _chosen(child)


def _common(targets: Sequence[str]) -> str:
    """The module that all targets are in."""
    parts = [target.split(".")[:-1] for target in targets]
    first, last = min(parts), max(parts)
    same = next((at for at, (one, other) in enumerate(zip(first, last, strict=False)) if one != other), min(len(first), len(last)))
    return ".".join(first[:same])


def first_stage(module_moves: Mapping[str, str], known: Known, names: Collection[str]) -> tuple[list[Draft], dict[str, str]]:
    """The rules that move these modules, and what all names are called after them; `goals` are the names that have a link."""
    lines: dict[str, list[Line]] = {head: [] for head in module_moves}
    for name in names:
        head = next((name[:end] for end in _dots(name) if name[:end] in module_moves), None)
        if head is not None:
            lines[head].append(Line((name,), (module_moves[head] + name[len(head) :],)))
    drafts = [
        Draft(
            (f"{row.sources[0]}.{{**rest}}",),
            (f"{row.targets[0]}.{{rest}}",),
            "",
            tuple(moved_line for line in row.lines for moved_line in lines[line.sources[0]]),
        )
        for row in rows(Line((head,), (module,)) for head, module in module_moves.items())
    ]
    moved = {line.sources[0]: line.targets for draft in drafts for line in draft.lines}
    order, _ = in_order(drafts, known, {name: moved.get(name, (name,)) for name in names}, lambda _name, _results: False)
    after: dict[str, str] = {}
    for draft in order:
        for name in known.matched(draft.compiled):
            results = draft.gives(name)
            if results:
                after.setdefault(name, results[0])
    return order, after


def _dots(name: str) -> Iterator[int]:
    return (at for at, letter in enumerate(name) if letter == ".")
