"""What an adapter is, as a value: fields with their checks, and pure functions from shapes to shapes.

An op stands in a rule with some of its fields (`chunk(dim=0)`), and in a plan with all of them (`{"op": "chunk", "dim": 0, "index": 1,
"of": 3}`): `fill` completes it from the shapes at hand, so that whoever follows the plan decides nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Shape = tuple[int, ...]
Op = Mapping[str, Any]  # {"op": name, **fields}; values are JSON's own
Check = Callable[[Any], bool]


@dataclass(frozen=True)
class Place:
    """What `fill` may look at.

    Attributes:
        shapes: the tensors that come in, in order.
        wanted: the shape that must come out; None where it is not known (no target, or not the last op of a chain).
        index, of: which of its rule's results this is, and how many there are (`to = [q, k, v]`: 0 to 2, of 3).
        siblings: the target's shapes of all of the rule's results, in order; None for one that is not known.
        number: what a part stands for that is in the result's name alone (`experts.{e}`), for `unstack`; None without one.
    """

    shapes: tuple[Shape, ...]
    wanted: Shape | None = None
    index: int = 0
    of: int = 1
    siblings: tuple[Shape | None, ...] = ()
    number: int | None = None


@dataclass(frozen=True)
class Adapter:
    """One adapter.

    Attributes:
        words: what it does, as a formula in words; one line.
        fields: each field with the check of its value, in the order in which a rule may give them without names.
        infer: the shapes that come out of a filled op for the shapes that go in. RuleError where they do not go together.
        fill: the op as a plan has it, with all that `infer` and the kernel need, from what the rule gave (it may be another, simpler
            op: an uneven `chunk` is a `slice`). RuleError, with a hint, where it can't be told.
        invert: the op, as a rule writes it, that undoes a rule's op; None where nothing can.
        offer: the op, as a rule would write it, that makes a source's shape a target's; None where it can't, or where it would be a guess.
        planned: the fields that only a plan has, which a rule can't give.
        floats: whether it computes values, so that only floating tensors can take it; with `complexes`, complex ones too.
        safe: whether it can't change what a tensor means, so that `--auto safe` may apply what it offers.
        source: the paper or specification that the formula comes from.
        gives: the dtype (safetensors' code) of what comes out; None where it is that of what goes in.
    """

    words: str
    fields: Mapping[str, Check]
    infer: Callable[[Op, tuple[Shape, ...]], tuple[Shape, ...]]
    fill: Callable[[Op, Place], Op]
    invert: Callable[[Op], Op | None] = lambda _op: None
    offer: Callable[[Shape, Shape], Op | None] = lambda _source, _target: None
    planned: tuple[str, ...] = ()
    floats: bool = False
    complexes: bool = False
    safe: bool = False
    source: str = ""
    gives: str | None = None


def whole(value: Any) -> bool:
    """A whole number from 0 up, as a dimension's index or size is."""
    return type(value) is int and 0 <= value < 1 << 62


def signed(value: Any) -> bool:
    """A whole number of either sign, as a dimension counted from the end is."""
    return type(value) is int and abs(value) < 1 << 62


def wholes(value: Any) -> bool:
    """A list of whole numbers from 0 up."""
    return type(value) in (list, tuple) and all(map(whole, value))


def flag(value: Any) -> bool:
    """True or False."""
    return type(value) is bool


def one_of(*names: str) -> Check:
    """One of some words."""
    return lambda value: type(value) is str and value in names
