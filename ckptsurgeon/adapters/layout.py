"""Adapters that lay one tensor out anew: each element stays, in another place or under another shape. None joins, cuts or fills up.

Also what all adapters over dims share: a dim counted from the front, a size looked up, and the refusal that names the op.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

from ckptsurgeon.adapters.op import Adapter, Op, Place, Shape, one_of, signed, whole
from ckptsurgeon.errors import RuleError

Infer = Callable[[Op, tuple[Shape, ...]], tuple[Shape, ...]]
MOST_DIMS = 64  # more than torch's iterators take
MOST_ELEMENTS = 1 << 58  # so that strides and bytes stay within 64 bits


def refused(op: Op, words: str, hint: str | None = None) -> RuleError:
    """The error that an op ends in; `words` go on after its name.

    >>> refused({"op": "slice"}, "lacks 'stop'").reason
    "slice lacks 'stop'"
    """
    return RuleError(f"{op['op']} {words}", hint=hint)


def need(op: Op, field: str) -> Any:
    """A filled op's field. RuleError where it is not there."""
    if field not in op:
        raise refused(op, f"lacks {field!r}")
    return op[field]


def size_of(op: Op, dim: int, shape: Shape) -> int:
    """The size of a dim of `shape`, counted from the front. RuleError where there is none."""
    if not 0 <= dim < len(shape):
        raise refused(op, f"is for dim {dim}, and {shape} has {len(shape)} dims")
    return shape[dim]


def from_front(op: Op, dim: int, shapes: Sequence[Shape], more: int = 0) -> int:
    """A dim of a rule, from the front. `more` is 1 where the op makes one dim more of them. RuleError where it can't be told.

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


def bounded(op: Op, shape: Shape) -> Shape:
    """`shape` itself. RuleError where no tensor can have it."""
    if len(shape) > MOST_DIMS or prod(max(size, 1) for size in shape) > MOST_ELEMENTS:
        raise refused(op, f"would give a tensor of shape {str(shape)[:60]}, which is too large")
    return shape


def each(one: Callable[[Op, Shape], Shape]) -> Infer:
    """Shape inference of an op that takes every tensor by itself, from that of one."""
    return lambda op, shapes: tuple(one(op, shape) for shape in shapes)


def _swap(op: Op, shape: Shape) -> Shape:
    dims = need(op, "dims")
    if len(dims) != 2 or dims[0] == dims[1]:
        raise refused(op, f"swaps two dims, not {list(dims)[:4]}")
    found = list(shape)
    found[dims[0]], found[dims[1]] = size_of(op, dims[1], shape), size_of(op, dims[0], shape)
    return tuple(found)


def _filled_swap(op: Op, place: Place) -> Op:
    flat = next((shape for shape in place.shapes if len(shape) < 2), None)
    if flat is not None:
        raise refused(op, f"needs two dims, and {flat} has {len(flat)}", "name only the weights: '**.weight'")
    return {"op": op["op"], "dims": [from_front(op, dim, place.shapes) for dim in op.get("dims", (-2, -1))]}


def _offered_swap(source: Shape, target: Shape) -> Op | None:
    fits = len(source) == 2 and source == target[::-1] and source[0] != source[1] and 1 not in source  # reshape offers those with 1
    return {"op": "transpose"} if fits else None


def _reorder(op: Op, shape: Shape) -> Shape:
    dims = need(op, "dims")
    if sorted(dims) != list(range(len(shape))):
        raise refused(op, f"orders dims {list(dims)[:8]}, and {shape} has {len(shape)} dims", "name each dim once")
    return tuple(shape[dim] for dim in dims)


def _filled_reorder(op: Op, place: Place) -> Op:
    return {"op": op["op"], "dims": [from_front(op, dim, place.shapes) for dim in need(op, "dims")]}


def _inverse_reorder(op: Op) -> Op | None:
    dims = op.get("dims", ())
    order = [dim + len(dims) * (dim < 0) for dim in dims]
    whole = bool(order) and sorted(order) == list(range(len(order)))
    return {"op": "permute", "dims": [order.index(dim) for dim in range(len(order))]} if whole else None


def _reshaped(op: Op, shape: Shape) -> Shape:
    found = tuple(need(op, "shape"))
    if any(size < 0 for size in found) or prod(found) != prod(shape):
        raise refused(op, f"makes {str(found)[:60]} of {shape}: not the same number of elements")
    return bounded(op, found)


def _filled_reshape(op: Op, place: Place) -> Op:
    shape = op.get("shape", place.wanted)
    if shape is None:
        raise refused(op, "does not know the shape that must come out", "write reshape(shape=[...])")
    sizes = list(shape)
    if sizes.count(-1) > 1:
        raise refused(op, f"leaves more than one size open in {sizes[:8]}", "write -1 once at most")
    if -1 in sizes:
        total, rest = prod(place.shapes[0]) if place.shapes else 0, prod(size for size in sizes if size != -1)
        if not rest or total % rest:
            raise refused(op, f"can't tell -1 in {sizes[:8]} for {total} elements")
        sizes[sizes.index(-1)] = total // rest
    return {"op": "reshape", "shape": sizes}


def _offered_reshape(source: Shape, target: Shape) -> Op | None:
    """Only where dims of size 1 are taken out, or put in: a (1, 5) that becomes (5, 1) may be a transpose."""
    short, long = sorted((source, target), key=len)
    rest = iter(long)
    kept = len(short) < len(long) and all(any(size == other for other in rest) for size in short)
    return {"op": "reshape"} if kept and prod(short) == prod(long) else None


def _squeezed(op: Op, shape: Shape) -> Shape:
    if "dim" not in op:
        return tuple(size for size in shape if size != 1)
    dim = op["dim"]
    if size_of(op, dim, shape) != 1:
        raise refused(op, f"takes out dim {dim}, and {shape} has {shape[dim]} there, not 1")
    return shape[:dim] + shape[dim + 1 :]


def _unsqueezed(op: Op, shape: Shape) -> Shape:
    dim = need(op, "dim")
    if not 0 <= dim <= len(shape):
        raise refused(op, f"adds dim {dim}, and {shape} has {len(shape)} dims")
    return bounded(op, (*shape[:dim], 1, *shape[dim:]))


def _filled_as_reshape(one: Callable[[Op, Shape], Shape], more: int) -> Callable[[Op, Place], Op]:
    """The `reshape` that does the same, unless tensors of several shapes come in."""

    def fill(op: Op, place: Place) -> Op:
        named = {**op, "dim": from_front(op, op["dim"], place.shapes, more)} if "dim" in op else op
        found = list(dict.fromkeys(one(named, shape) for shape in place.shapes))
        return {"op": "reshape", "shape": list(found[0])} if len(found) == 1 else named

    return fill


def part_of(op: Op, dim: int, parts: int, shape: Shape) -> int:
    """The size of one of `parts` equal parts of a dim. RuleError where it has none."""
    size = size_of(op, dim, shape)
    if not 1 <= parts <= max(size, 1) or size % parts:
        raise refused(op, f"needs dim {dim} in {parts} equal parts, and {shape} has {size} there")
    return size // parts


def _parted(op: Op, shape: Shape) -> Shape:
    part_of(op, need(op, "dim"), need(op, "parts"), shape)
    return shape


def _filled_parted(op: Op, place: Place) -> Op:
    return {"op": op["op"], "dim": from_front(op, op.get("dim", 0), place.shapes), "parts": op.get("parts", 2)}


def _rotary(op: Op, shape: Shape) -> Shape:
    dim, heads = need(op, "dim"), need(op, "heads")
    if need(op, "to") not in ("halves", "pairs"):
        raise refused(op, f"goes to 'halves' or 'pairs', not {str(op['to'])[:20]!r}")
    if part_of(op, dim, heads, shape) % 2:
        raise refused(op, f"needs heads of an even size, and {heads} heads of {shape} have {shape[dim] // heads}")
    return shape


def _filled_rotary(op: Op, place: Place) -> Op:
    if "heads" not in op:
        raise refused(op, "needs the number of heads", "query heads for q, key-value heads for k: permute_rope(heads=32, to='halves')")
    if "to" not in op:
        raise refused(op, "needs its direction", "to='halves' is Hugging Face's layout, to='pairs' is Meta's")
    return {"op": op["op"], "heads": op["heads"], "to": op["to"], "dim": from_front(op, op.get("dim", 0), place.shapes)}


def signeds(value: Any) -> bool:
    """A list of dims, each of either sign."""
    return type(value) in (list, tuple) and all(map(signed, value))


def _open_shape(value: Any) -> bool:
    """A shape in which -1 may stand for a size."""
    return signeds(value) and all(size >= -1 for size in value)


_DIM = {"dim": signed}
LAYOUT: dict[str, Adapter] = {
    "transpose": Adapter(
        "swaps two dims, without `dims` the last two: out[j, i] = in[i, j]",
        {"dims": signeds},
        each(_swap),
        _filled_swap,
        lambda op: op,
        _offered_swap,
    ),
    "permute": Adapter(
        "puts the dims in the order `dims`: out's dim i is in's dim dims[i]",
        {"dims": signeds},
        each(_reorder),
        _filled_reorder,
        _inverse_reorder,
    ),
    "reshape": Adapter(
        "the same elements in row-major order under `shape` (-1 once for what is left), without it the target's",
        {"shape": _open_shape},
        each(_reshaped),
        _filled_reshape,
        lambda op: None if "shape" in op else op,
        _offered_reshape,
        safe=True,  # it offers to add and take out dims of size 1 alone
    ),
    "squeeze": Adapter(
        "takes out dim `dim`, which has size 1; without it all dims of size 1",
        _DIM,
        each(_squeezed),
        _filled_as_reshape(_squeezed, 0),
        lambda op: {"op": "unsqueeze", "dim": op["dim"]} if "dim" in op else {"op": "reshape"},
    ),
    "unsqueeze": Adapter(
        "adds a dim of size 1 as dim `dim`",
        _DIM,
        each(_unsqueezed),
        _filled_as_reshape(_unsqueezed, 1),
        lambda op: {**op, "op": "squeeze"},
    ),
    "interleave": Adapter(
        "takes turns between `parts` equal parts of dim `dim`, p parts of n: out[i * p + j] = in[j * n + i]",
        _DIM | {"parts": whole},
        each(_parted),
        _filled_parted,
        lambda op: {**op, "op": "deinterleave"},
    ),
    "deinterleave": Adapter(
        "every `parts`-th element of dim `dim` together, p parts of n: out[j * n + i] = in[i * p + j]",
        _DIM | {"parts": whole},
        each(_parted),
        _filled_parted,
        lambda op: {**op, "op": "interleave"},
    ),
    "permute_rope": Adapter(
        "rows of rotary queries or keys, in each of `heads` heads: rotated pairs side by side (to='pairs', Meta's Llama), "
        "or their first halves before their second (to='halves', Hugging Face): halves[j * n + i] = pairs[2 * i + j], n half a head",
        {"heads": whole, "to": one_of("halves", "pairs"), "dim": signed},
        each(_rotary),
        _filled_rotary,
        lambda op: {**op, "to": "pairs" if op["to"] == "halves" else "halves"} if "to" in op else None,
        source="Su et al. 2021, RoFormer, arXiv:2104.09864",
    ),
}
