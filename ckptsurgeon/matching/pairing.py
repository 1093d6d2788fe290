"""What passes over two trees write down: units and modules that go together, and what is left over. Values only."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from ckptsurgeon.matching.choose import Choice
from ckptsurgeon.matching.module_tree import Node


@dataclass(frozen=True)
class Laid:
    """One decision: units (or modules, for the record) of both sides that go together."""

    sources: tuple[Node, ...]
    targets: tuple[Node, ...]
    margin: float
    evidence: tuple[str, ...]
    runner_up: tuple[Node, Node] | None = None


@dataclass
class Record:
    """What a pass decides: pairs of units, and pairs of modules, with their margins, and modules that lost against a look-alike."""

    units: list[Laid] = field(default_factory=list)
    modules: list[Laid] = field(default_factory=list)
    lost: list[Node] = field(default_factory=list)


@dataclass(frozen=True)
class Left:
    """What found no partner, and may be tried higher up."""

    sources: tuple[Node, ...] = ()
    targets: tuple[Node, ...] = ()


def under(choice: Choice, above: Choice) -> Choice:
    """A choice within another: no surer than that one, whose runner-up is its own then."""
    if choice.margin <= above.margin:
        return choice
    return replace(choice, margin=above.margin, runner_up=above.runner_up or choice.runner_up)


def laid(choice: Choice) -> Laid:
    """A pair, written down."""
    return Laid((choice.source,), (choice.target,), choice.margin, choice.evidence, choice.runner_up)
