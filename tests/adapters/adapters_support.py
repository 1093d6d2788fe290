"""What tests of adapters share: kernels held against the shapes that were inferred, and cases of every adapter, drawn at random."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from hypothesis import strategies as st

from ckptsurgeon.adapters.op import Adapter, FillContext, Op, Shape
from ckptsurgeon.adapters.table import ADAPTERS, adapter_of, load, parse_ops

BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
OF_FAMILY = {
    family: {name: load(name) for name, room in ADAPTERS.items() if room.partition(".")[0] == family}
    for family in ("layout", "combining", "vision")
}


def no_initial() -> torch.Tensor:
    raise AssertionError("only a fill by initial values asks for them")


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Bitwise, NaN and sign of zero included."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if one.dtype.is_complex:
        one, other = torch.view_as_real(one.resolve_conj()), torch.view_as_real(other.resolve_conj())
    bits = BITS[one.dtype.itemsize]
    return torch.equal(one.contiguous().view(bits), other.contiguous().view(bits))


def shape_of(tensor: torch.Tensor) -> Shape:
    return tuple(tensor.shape)


def run(op: Op, *tensors: torch.Tensor, initial: Callable[[], torch.Tensor] = no_initial) -> list[torch.Tensor]:
    """What the kernel gives, held against what inference said, and against writes into the inputs."""
    before = [tensor.clone() for tensor in tensors]
    adapter = adapter_of(op)
    shapes = adapter.infer(op, tuple(map(shape_of, tensors)))
    found = list(adapter.kernel(op, list(tensors), initial))
    assert tuple(map(shape_of, found)) == shapes
    assert all(tensor.dtype == (torch.float32 if adapter.output_dtype == "F32" else tensors[0].dtype) for tensor in found)
    assert all(same(one, other) for one, other in zip(tensors, before, strict=True))
    return found


def apply(text: str, *tensors: torch.Tensor, initial: Callable[[], torch.Tensor] = no_initial, **place: Any) -> list[torch.Tensor]:
    """What a rule's op, filled in, makes of tensors."""
    (op,) = parse_ops(text)
    return run(adapter_of(op).fill(op, FillContext(tuple(map(shape_of, tensors)), **place)), *tensors, initial=initial)


def filled(shape: Shape, dtype: torch.dtype = torch.float32, start: int = 0) -> torch.Tensor:
    """Values that all differ, as far as the dtype goes."""
    return (torch.arange(prod(shape)) + start).reshape(shape).to(dtype)


@dataclass(frozen=True)
class Case:
    """An op as a rule writes it, the shapes that come in, and the target's shapes of its rule's results (None: not known)."""

    rule: Op
    shapes: tuple[Shape, ...]
    results: tuple[Shape | None, ...] = (None,)

    @property
    def adapter(self) -> Adapter:
        return adapter_of(self.rule)

    def op(self, index: int = 0) -> Op:
        """The op of one of the results, as a plan has it."""
        return filled_for(self.rule, self.shapes, self.results, index)

    def tensors(self, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
        found = [filled(shape, dtype, 100 * number + 1) for number, shape in enumerate(self.shapes)]
        return [one if number % 2 else (one % 100).to(torch.int8) for number, one in enumerate(found)] if self.adapter.decodes else found


def filled_for(rule: Op, shapes: tuple[Shape, ...], results: tuple[Shape | None, ...], index: int) -> Op:
    number = index if adapter_of(rule).counts_parts else None
    return adapter_of(rule).fill(rule, FillContext(shapes, results[index], index, len(results), results, number))


small = st.integers(1, 4)
Draw = Callable[[st.SearchStrategy[Any]], Any]


def _shape(draw: Draw, least: int = 1, most: int = 4) -> Shape:
    return tuple(draw(st.lists(small, min_size=least, max_size=most)))


def _with(shape: Shape, dim: int, size: int) -> Shape:
    """A shape with another size of one dim, whichever end it is counted from."""
    dim %= len(shape)
    return (*shape[:dim], size, *shape[dim + 1 :])


def _dim(draw: Draw, dims: int) -> int:
    return draw(st.integers(-dims, dims - 1))


def _transpose(draw: Draw) -> Case:
    shape = _shape(draw, 2)
    dims = draw(st.permutations(range(len(shape))))[:2]
    return Case(draw(st.sampled_from([{}, {"dims": dims}, {"dims": [dims[0] - len(shape), dims[1]]}])), (shape,) * draw(st.integers(1, 2)))


def _permute(draw: Draw) -> Case:
    shape = _shape(draw)
    return Case({"dims": draw(st.permutations(range(len(shape))))}, (shape,))


def _reshape(draw: Draw) -> Case:
    shape = _shape(draw, 0)
    wanted = tuple(draw(st.permutations((*shape, 1))))
    return draw(st.sampled_from([Case({"shape": [-1]}, (shape,)), Case({"shape": list(wanted)}, (shape,)), Case({}, (shape,), (wanted,))]))


def _ones(draw: Draw) -> tuple[int, tuple[Shape, ...]]:
    """A place for a dim of size 1, and shapes that differ, so that the op is no reshape."""
    rest = draw(st.lists(st.lists(small, min_size=2, max_size=2).map(tuple), min_size=1, max_size=2, unique=True))
    return draw(st.integers(0, 2)), tuple(rest)


def _squeeze(draw: Draw) -> Case:
    dim, rest = _ones(draw)
    shapes = tuple((*one[:dim], 1, *one[dim:]) for one in rest)
    return Case({"dim": dim} if len(set(rest)) > 1 or draw(st.booleans()) else {}, shapes)


def _unsqueeze(draw: Draw) -> Case:
    dim, rest = _ones(draw)
    return Case({"dim": dim}, rest)


def _parted(draw: Draw) -> Case:
    shape, parts = _shape(draw), draw(small)
    dim = _dim(draw, len(shape))
    return Case({"dim": dim, "parts": parts}, (_with(shape, dim, shape[dim] * parts),))


def _roll(draw: Draw) -> Case:
    shape = _shape(draw)
    return Case({"dim": _dim(draw, len(shape)), "by": draw(st.integers(-9, 9))}, (shape,))


def _permute_rope(draw: Draw) -> Case:
    shape, heads = _shape(draw), draw(small)
    dim = _dim(draw, len(shape))
    return Case(
        {"heads": heads, "to": draw(st.sampled_from(["halves", "pairs"])), "dim": dim}, (_with(shape, dim, 2 * heads * shape[dim]),)
    )


def _slice(draw: Draw) -> Case:
    shape = _shape(draw)
    dim = _dim(draw, len(shape))
    start = draw(st.integers(0, shape[dim]))
    return Case({"dim": dim, "start": start, "stop": draw(st.integers(start, shape[dim]))}, (shape,))


def _pad(draw: Draw) -> Case:
    shape = _shape(draw)
    dim = _dim(draw, len(shape))
    wanted = _with(shape, dim, shape[dim] + draw(st.integers(0, 3)))
    fill = draw(st.sampled_from([{}, {"fill": "mean"}, {"fill": "init"}, {"value": 2}]))
    return Case({"dim": dim, "at": draw(st.sampled_from(["start", "end"])), **fill}, (shape,), (wanted,))


def _concat(draw: Draw) -> Case:
    shape, sizes = _shape(draw), draw(st.lists(small, min_size=1, max_size=4))
    dim = _dim(draw, len(shape))
    named = draw(st.sampled_from([{}, {"sizes": sizes}]))
    return Case({"dim": dim, **named}, tuple(_with(shape, dim, size) for size in sizes))


def _chunk(draw: Draw) -> Case:
    joined = _concat(draw)
    dim, sizes = joined.rule["dim"], [shape[joined.rule["dim"]] for shape in joined.shapes]
    whole = _with(joined.shapes[0], dim, sum(sizes))
    if len(sizes) == 1:
        return Case({"dim": dim, "sizes": sizes}, (whole,), joined.shapes)
    return Case({"dim": dim}, (whole,), joined.shapes)


def _stack(draw: Draw) -> Case:
    shape = _shape(draw, 0, 3)
    return Case({"dim": _dim(draw, len(shape) + 1)}, (shape,) * draw(small))


def _unstack(draw: Draw) -> Case:
    shape = _shape(draw)
    dim = _dim(draw, len(shape))
    at = dim % len(shape)
    return Case({"dim": dim}, (shape,), ((*shape[:at], *shape[at + 1 :]),) * shape[dim])


def _average(draw: Draw) -> Case:
    weights = draw(st.lists(small, min_size=1, max_size=3))
    return Case(draw(st.sampled_from([{}, {"weights": weights}])), (_shape(draw, 0, 3),) * len(weights))


def _group_mean(draw: Draw) -> Case:
    shape, to, group = _shape(draw), draw(small), draw(small)
    dim = _dim(draw, len(shape))
    size = shape[dim]
    given, wanted = _with(shape, dim, to * group * size), _with(shape, dim, to * size)
    return draw(
        st.sampled_from(
            [Case({"heads": to * group, "dim": dim}, (given,), (wanted,)), Case({"heads": to * group, "to": to, "dim": dim}, (given,))]
        )
    )


def _interpolate(draw: Draw) -> Case:
    grid, to = [draw(small), draw(small)], [draw(small), draw(small)]
    prefix, layout = draw(st.integers(0, 2)), draw(st.sampled_from(["tokens", "channels_last", "channels_first"]))
    size = draw(small)
    shape = {
        "tokens": (1, prefix + prod(grid), size),
        "channels_last": (1, *grid, size),
        "channels_first": (size, *grid),
    }[layout]
    fields = {"grid": grid, "to": to, "mode": draw(st.sampled_from(["bicubic", "bilinear", "nearest"]))}
    return Case(fields | ({"prefix": prefix} if layout == "tokens" else {"layout": layout}), (shape,))


def _relative_position_bias(draw: Draw) -> Case:
    grid, to, extra = [draw(small), draw(small)], [draw(small), draw(small)], draw(st.integers(0, 3))
    return Case({"grid": grid, "to": to, "extra": extra}, ((extra + prod(2 * side - 1 for side in grid), draw(small)),))


def _patch_embed(draw: Draw) -> Case:
    shape = _shape(draw, 4)
    return Case({"mode": draw(st.sampled_from(["bicubic", "bilinear"]))}, (shape,), ((*shape[:2], draw(small), draw(small)),))


def _in_channels(draw: Draw) -> Case:
    shape = _shape(draw, 3)
    return Case({"channels": draw(st.just(1) | st.integers(shape[1], 9))}, (shape,))


def _inflate(draw: Draw) -> Case:
    shape = _shape(draw, 3)
    mode = draw(st.sampled_from(["mean", "center"]))
    return Case({"dim": draw(st.integers(2, len(shape))), "size": draw(small), "mode": mode}, (shape,))


def _rows(draw: Draw) -> Case:
    shape = _shape(draw)
    dim = _dim(draw, len(shape))
    fill = draw(st.sampled_from([{}, {"fill": "zeros"}, {"fill": "mean"}, {"fill": "init"}]))
    some = st.lists(st.integers(-1 if fill else 0, shape[dim] - 1), min_size=1, max_size=5)
    index = draw(some | st.permutations(range(shape[dim])))
    return Case({"index": index, "dim": dim, **fill}, (shape,), (_with(shape, dim, len(index)),))


def _dequantize(draw: Draw) -> Case:
    codes, block = (draw(small), draw(small)), [draw(st.integers(0, 3)), draw(st.integers(0, 3))]
    scale = tuple(-(-size // part) if part else 1 for size, part in zip(codes, block, strict=True))
    return Case({"block": block, "divisor": draw(small)}, (codes, scale))


def _weight_norm(draw: Draw) -> Case:
    v = _shape(draw)
    dim = draw(st.none() | st.integers(-len(v), len(v) - 1))
    told = draw(st.sampled_from([{}, {"dim": dim}]))
    g = tuple(size if at == (dim or 0) % len(v) else 1 for at, size in enumerate(v)) if dim is not None else ()
    return draw(
        st.sampled_from(
            [
                Case(told, (g, v) * draw(st.integers(1, 2))),
                Case(told, (v,), (g, v)),
                Case({"dim": dim, "part": draw(st.sampled_from(["g", "v"]))}, (v,) * draw(st.integers(1, 2))),
            ]
        )
    )


def _spectral_norm(draw: Draw) -> Case:
    original = _shape(draw, 2)
    dim = _dim(draw, len(original))
    return Case({"dim": dim}, (original, (original[dim],), (prod(original) // original[dim],)) * draw(st.integers(1, 2)))


_DRAW: dict[str, Callable[[Draw], Case]] = {
    "transpose": _transpose,
    "permute": _permute,
    "reshape": _reshape,
    "squeeze": _squeeze,
    "unsqueeze": _unsqueeze,
    "interleave": _parted,
    "deinterleave": _parted,
    "permute_rope": _permute_rope,
    "roll": _roll,
    "slice": _slice,
    "pad": _pad,
    "concat": _concat,
    "chunk": _chunk,
    "stack": _stack,
    "unstack": _unstack,
    "average": _average,
    "group_mean": _group_mean,
    "interpolate": _interpolate,
    "relative_position_bias": _relative_position_bias,
    "patch_embed": _patch_embed,
    "in_channels": _in_channels,
    "inflate": _inflate,
    "rows": _rows,
    "dequantize": _dequantize,
    "weight_norm": _weight_norm,
    "spectral_norm": _spectral_norm,
}


@st.composite
def cases(draw: Draw, name: str) -> Case:
    """A case of an adapter: an op that goes with its shapes."""
    case = _DRAW[name](draw)
    return Case({"op": name, **case.rule}, case.shapes, case.results)
