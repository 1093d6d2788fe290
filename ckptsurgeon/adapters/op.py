"""What an adapter is, as a value: fields with their checks, functions from shapes to shapes, a kernel on tensors, and traits.

An op stands in a rule with some of its fields (`chunk(dim=0)`), and in a plan with all of them (`{"op": "chunk", "dim": 0, "index": 1,
"of": 3}`): `fill` completes it from the shapes at hand, so that applying the plan decides nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from ckptsurgeon.hints import close_names

if TYPE_CHECKING:
    from torch import Tensor as Tensor
else:
    Tensor = Any  # torch is not imported for a name

T = TypeVar("T")
Shape = tuple[int, ...]
Op = Mapping[str, Any]  # {"op": name, **fields}; values are JSON's own
Check = Callable[[Any], bool]
Initial = Callable[[], Tensor]  # gives the target's initial value
Kernel = Callable[[Op, Sequence[Tensor], Initial], Sequence[Tensor]]
Range = tuple[int, int, int]  # which tensor, and its elements from start to stop, counted in row-major order


@dataclass(frozen=True)
class FillContext:
    """What `fill` knows about the tensors and the rule.

    Attributes:
        shapes: the tensors that come in, in order.
        target: the shape that must come out; None where it is not known (no target, or not the last op of a chain).
        index, of: which of its rule's results this is, and how many there are (`to = [q, k, v]`: 0 to 2, of 3).
        siblings: the target's shapes of all of the rule's results, in order; None for one that is not known.
        number: the number in the result's name that no source's name has (the e of `experts.{e}`), for `unstack`; None without one.
    """

    shapes: tuple[Shape, ...]
    target: Shape | None = None
    index: int = 0
    of: int = 1
    siblings: tuple[Shape | None, ...] = ()
    number: int | None = None


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """One adapter: its functions, and the traits by which callers decide; none compares its name.

    Attributes:
        words: what it does, as a formula in words; one line.
        fields: each field with the check of its value, in the order in which a rule may give them without names.
        infer: the shapes that come out of a filled op for the shapes that go in. RuleError where they do not go together.
        fill: the op as a plan has it, with all that `infer` and the kernel need, from what the rule gave (it may be another, simpler
            op: an uneven `chunk` is a `slice`). RuleError, with a hint, where the shapes do not determine it.
        kernel: the tensors that a filled op makes of tensors; views where torch has one. It decides nothing and writes to no input.
        moments: the op by which an optimizer's moments follow a weight that goes through a filled op: `same_op`, `zeros_where_filled`
            or `cannot_follow`.
        invert: the op, as a rule writes it, that undoes a rule's op; None where nothing can.
        offer: the op, as a rule would write it, that makes a source's shape a target's; None where it can't, or where it would be a guess.
        ranges: for each result of an op that only moves bytes, the ranges of input elements that it consists of, in order; None for a
            result whose elements are not contiguous. An adapter without this function always computes.
        share: the share of what comes out of a filled op that comes from the source; the rest is filled.
        fill_note: the sentence in a plan's report about what a filled op fills, if it isn't the number of elements.
        plan_only: the fields that only a plan has, which a rule can't give.
        safe: whether it can't change what a tensor means, so that `--auto safe` may apply what it offers.
        floats: whether it computes values, so that only floating tensors can take it; with `complexes`, complex ones too.
        output_dtype: the dtype (safetensors' code) of what comes out; None where it is that of what goes in.
        decodes: whether it makes values of quantised codes: each tensor of codes is followed by its scale.
        joins: whether it makes one tensor of several.
        counts_parts: whether it takes one of many parts, and only the result's name says which (`experts.{e}`).
        elementwise: whether each element of the result needs the same element of each input alone, so that it can be computed in parts.
        by_rows: a kernel for some rows of the result, where these need only the same rows of the first tensor, and the other tensors
            whole. It takes these tensors, the whole shape of the first one, and the number of its first row.
        source: the paper or specification that the formula comes from.
    """

    words: str
    fields: Mapping[str, Check]
    infer: Callable[[Op, tuple[Shape, ...]], tuple[Shape, ...]]
    fill: Callable[[Op, FillContext], Op]
    kernel: Kernel
    moments: Callable[[Op], Op | None]
    invert: Callable[[Op], Op | None] = lambda _op: None
    offer: Callable[[Shape, Shape], Op | None] = lambda _source, _target: None
    ranges: Callable[[Op, Sequence[Shape]], Sequence[Sequence[Range] | None]] | None = None
    share: Callable[[Op], float] = lambda _op: 1.0
    fill_note: Callable[[Op], str | None] = lambda _op: None
    plan_only: tuple[str, ...] = ()
    safe: bool = False
    floats: bool = False
    complexes: bool = False
    output_dtype: str | None = None
    decodes: bool = False
    joins: bool = False
    counts_parts: bool = False
    elementwise: bool = False
    by_rows: Callable[[Op, Sequence[Tensor], Shape, int], Tensor] | None = None
    source: str = ""


def each(function: Callable[[Op, T], T]) -> Callable[..., tuple[T, ...]]:
    """The `infer` or the kernel of an op that treats each tensor separately, from a function of one tensor."""
    return lambda op, tensors, *_: tuple(function(op, item) for item in tensors)


def same_op(op: Op) -> Op:
    """Moments go through the same op as their weight."""
    return op


def zeros_where_filled(op: Op) -> Op:
    """Moments go through the same op as their weight, and are zero where it is filled: these elements have had no gradient yet."""
    kept = {name: value for name, value in op.items() if name not in ("fill", "value", "scheme")}
    return {**kept, "fill": "none" if op.get("fill") == "none" else "zeros"}


def cannot_follow(_op: Op) -> None:
    """The weight is computed from others, so that no saved moment belongs to it."""


def whole(value: Any) -> bool:
    """A whole number from 0 up, as a dimension's index or size is."""
    return type(value) is int and 0 <= value < 1 << 62


def signed(value: Any) -> bool:
    """A whole number of either sign, as a dimension counted from the end is."""
    return type(value) is int and abs(value) < 1 << 62


def number(value: Any) -> bool:
    """A finite number."""
    return (type(value) is float and math.isfinite(value)) or signed(value)


def flag(value: Any) -> bool:
    """True or False."""
    return type(value) is bool


def list_of(check: Check) -> Check:
    """A list of values that pass a check."""
    return lambda value: type(value) in (list, tuple) and all(map(check, value))


def or_none(check: Check) -> Check:
    """None, or a value that passes a check."""
    return lambda value: value is None or check(value)


@dataclass(frozen=True)
class OneOf:
    """A check that a value is one of some words; `meant` names the closest word to a wrong value."""

    names: tuple[str, ...]

    def __call__(self, value: Any) -> bool:
        return type(value) is str and value in self.names

    def meant(self, value: Any) -> str:
        """The end of a message that says what to write instead.

        >>> one_of("zeros", "init").meant("initial"), one_of("zeros", "init").meant(3)
        ("; is it 'init'?", "; it is one of 'zeros', 'init'")
        """
        close = close_names(value, self.names, 1) if type(value) is str else []
        return f"; is it {close[0]!r}?" if close else f"; it is one of {', '.join(map(repr, self.names))}"


def one_of(*names: str) -> OneOf:
    """The check that a value is one of some words."""
    return OneOf(names)
