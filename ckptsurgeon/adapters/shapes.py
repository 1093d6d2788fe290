"""What adapters share about shapes: dims counted from the front, sizes, equal parts, contiguous ranges, and errors that name the op."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from math import prod
from typing import Any, TypeVar

from ckptsurgeon.adapters.op import Check, FillContext, Op, Range, Shape
from ckptsurgeon.errors import RuleError

MOST_DIMS = 64  # torch's iterators take no more
MOST_ELEMENTS = 1 << 58  # so that strides and bytes stay within 64 bits
T = TypeVar("T")


def refused(op: Op, words: str, hint: str | None = None) -> RuleError:
    """An error that begins with the op's name and goes on with `words`.

    >>> refused({"op": "slice"}, "lacks 'stop'").reason
    "slice lacks 'stop'"
    """
    return RuleError(f"{op['op']} {words}", hint=hint)


def need(op: Op, field: str) -> Any:
    """A filled op's field. RuleError where it is not there."""
    if field not in op:
        raise refused(op, f"lacks {field!r}")
    return op[field]


def checked(op: Op, checks: Mapping[str, Check]) -> tuple[Any, ...]:
    """The fields of a filled op in the order of its checks; RuleError for a field unknown or missing, or a value that it can't have."""
    lacks = [name for name in checks if name not in op]
    wrong = [name for name, value in op.items() if name != "op" and not (name in checks and checks[name](value))]
    if lacks or wrong:
        raise RuleError(f"the op {op.get('op')} " + (f"lacks {lacks[0]!r}" if lacks else f"can't have {wrong[0]!r:.60} as it is"))
    return tuple(op[name] for name in checks)


def size_of(op: Op, dim: int, shape: Shape) -> int:
    """The size of a dim of `shape`, counted from the front. RuleError where there is none."""
    if not 0 <= dim < len(shape):
        raise refused(op, f"is for dim {dim}, and {shape} has {len(shape)} dims")
    return shape[dim]


def part_of(op: Op, dim: int, parts: int, shape: Shape) -> int:
    """The size of one of `parts` equal parts of a dim. RuleError where it has none."""
    size = size_of(op, dim, shape)
    if not 1 <= parts <= max(size, 1) or size % parts:
        raise refused(op, f"needs dim {dim} in {parts} equal parts, and {shape} has {size} there")
    return size // parts


def from_front(op: Op, dim: int, shapes: Sequence[Shape], more: int = 0) -> int:
    """A rule's dim, counted from the front. `more` is 1 where the op adds a dim. RuleError for a negative one where ranks differ.

    >>> from_front({"op": "chunk"}, -1, [(4, 5, 6)])
    2
    """
    if dim >= 0:
        return dim
    ranks = {len(shape) + more for shape in shapes}
    if len(ranks) != 1:
        raise refused(op, f"counts dim {dim} from the end of {len(shapes)} tensors with unlike numbers of dims", "count it from the front")
    rank = ranks.pop()
    if dim < -rank:
        raise refused(op, f"is for dim {dim}, and {shapes[0]} has {len(shapes[0])} dims")
    return dim + rank


def resized(shape: Shape, dim: int, size: int) -> Shape:
    """`shape` with another size of one dim."""
    return (*shape[:dim], size, *shape[dim + 1 :])


def bounded(op: Op, shape: Shape) -> Shape:
    """`shape` itself. RuleError where no tensor can have it."""
    if len(shape) > MOST_DIMS or prod(max(size, 1) for size in shape) > MOST_ELEMENTS:
        raise refused(op, f"would give a tensor of shape {str(shape)[:60]}, which is too large")
    return shape


def target_size(op: Op, context: FillContext, dim: int, field: str) -> int:
    """The target's size of a dim. RuleError where it is not known, with how to give it."""
    if context.target is None or not 0 <= dim < len(context.target):
        raise refused(op, f"does not know {field!r}: no shape of a target to tell it by", f"write {op['op']}(dim={dim}, {field}=...)")
    return context.target[dim]


def in_words(shape: Sequence[int]) -> str:
    """A shape as messages name it.

    >>> in_words((4,))
    'the shape (4)'
    """
    return f"the shape ({', '.join(map(str, shape))})"


def cut(tensor: int, shape: Shape, dim: int, start: int, stop: int) -> list[Range] | None:
    """The elements from `start` to `stop` along `dim` as a range; None where they are not contiguous.

    >>> cut(0, (4, 3), 0, 1, 3), cut(0, (4, 3), 1, 0, 2)
    ([(0, 3, 9)], None)
    """
    row = prod(shape[dim + 1 :])
    return [(tensor, start * row, stop * row)] if prod(shape[:dim]) == 1 else None


def part_ranges(bounds: Callable[[Op, Shape], tuple[int, int]]) -> Callable[[Op, Sequence[Shape]], list[list[Range] | None]]:
    """The `ranges` of an op that takes one part of a dim of each tensor; `bounds` gives its start and stop."""
    return lambda op, shapes: [cut(tensor, shape, op["dim"], *bounds(op, shape)) for tensor, shape in enumerate(shapes)]


def whole_ranges(_op: Op, shapes: Sequence[Shape]) -> list[list[Range]]:
    """The `ranges` of an op that only changes shapes: all elements of each tensor, in order."""
    return [[(tensor, 0, prod(shape))] for tensor, shape in enumerate(shapes)]


def groups(op: Op, items: Sequence[T]) -> Iterator[Sequence[T]]:
    """The items of each result: `of` consecutive ones. RuleError where some are left over.

    >>> list(groups({"op": "concat", "of": 2}, "abcd"))
    ['ab', 'cd']
    """
    of = need(op, "of")
    if of < 1 or len(items) % of or not items:
        raise refused(op, f"joins {of} tensors at a time, and {len(items)} come in")
    return (items[start : start + of] for start in range(0, len(items), of))


def joined_ranges(op: Op, shapes: Sequence[Shape]) -> list[list[Range] | None]:
    """Whole tensors one after the other, where they are joined along the first dim whose size is not 1; else None."""
    ranges = [group[0] for group in whole_ranges(op, shapes)]
    return [list(group) if prod(shapes[group[0][0]][: op["dim"]]) == 1 else None for group in groups(op, ranges)]
