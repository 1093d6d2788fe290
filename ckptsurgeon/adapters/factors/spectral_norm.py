"""`spectral_norm` makes the weight that a layer under torch's spectral norm has in eval mode: w = original / σ, where σ = u · (original v).

>>> import torch
>>> original, u, v = torch.tensor([[0.0, 4.0], [2.0, 0.0]]), torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
>>> SPECTRAL_NORM.kernel({"dim": 0}, [original, u, v], None)[0].tolist()
[[0.0, 1.0], [0.5, 0.0]]
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod

from ckptsurgeon.adapters.op import Adapter, FillContext, Initial, Op, Shape, Tensor, cannot_follow, or_none, signed
from ckptsurgeon.adapters.shapes import from_front, need, refused
from ckptsurgeon.errors import RuleError

_IMAGES, _OTHERS = 0.9, 0.5  # above the first cosine u and v fit a dim; below the second they don't
_NEARLY, _EXACT, _INEXACT = (
    0.7,
    0.999,
    0.99,
)  # the same where one of u and v is exactly the image of the other, as a power iteration leaves it
_WAYS = "write spectral_norm(dim=0), or spectral_norm(dim=1) for a transposed convolution"


def dims_of(original: Shape, u: Shape, v: Shape) -> tuple[int, ...]:
    """The dims of a weight that can be its rows, by the lengths of u and v; none where there is none.

    Of several it is the first of a matrix, and one of the first two of a kernel: torch takes the second for transposed convolutions alone.

    >>> dims_of((8, 4, 3), (8,), (12,)), dims_of((4, 8, 8), (8,), (32,)), dims_of((8, 8, 3), (8,), (24,)), dims_of((8, 8), (8,), (8,))
    ((0,), (1,), (0, 1), (0,))
    """
    fits = _fitting(original, u, v)
    single = len(original) == 2 or u == (1,)  # with a single row every dim gives the same
    return fits[:1] if single else tuple(dim for dim in fits if dim < 2) or fits


def _fitting(original: Shape, u: Shape, v: Shape) -> tuple[int, ...]:
    if len(u) != 1 or len(v) != 1 or len(original) < 2 or not prod(original):
        return ()
    return tuple(dim for dim, size in enumerate(original) if (size,) == u and (prod(original) // size,) == v)


def _triples(op: Op, shapes: Sequence[Shape]) -> Iterator[tuple[Shape, Shape, Shape]]:
    if not shapes or len(shapes) % 3:
        raise refused(op, f"takes a weight, u and v by turns, and {len(shapes)} tensors come in")
    return zip(shapes[::3], shapes[1::3], shapes[2::3], strict=True)


def _infer(op: Op, shapes: tuple[Shape, ...]) -> tuple[Shape, ...]:
    dim = need(op, "dim")
    for original, u, v in _triples(op, shapes):
        fits = _fitting(original, u, v)
        if not fits or dim not in (None, *fits):
            rows = "" if dim is None else f" with dim {dim} as its rows"
            words = f"takes a weight, u and v, and {u} and {v} are none of {original}{rows}"
            raise refused(op, words, "name them in order: a.weight_orig + a.weight_u + a.weight_v")
    return shapes[::3]


def _fill(op: Op, context: FillContext) -> Op:
    candidates = [dims_of(*triple) for triple in _triples(op, context.shapes)]
    if "dim" in op:
        return {"op": "spectral_norm", "dim": None if op["dim"] is None else from_front(op, op["dim"], context.shapes[::3])}
    dims = [dim for dim in candidates[0] if all(dim in row for row in candidates)]
    if not dims:
        words = f"can't tell its dim: {', '.join(map(str, context.shapes[:3]))} are no weight, u and v"
        raise refused(op, words, "name them in order: a.weight_orig + a.weight_u + a.weight_v")
    return {"op": "spectral_norm", "dim": dims[0] if len(dims) == 1 else None}


def _kernel(op: Op, tensors: Sequence[Tensor], _initial: Initial) -> list[Tensor]:
    return [_weight(op["dim"], *triple) for triple in zip(tensors[::3], tensors[1::3], tensors[2::3], strict=True)]


def _weight(dim: int | None, original: Tensor, u: Tensor, v: Tensor) -> Tensor:
    import torch

    dim = _rows(dim, original, u, v)
    sigma = torch.dot(u, torch.mv(_matrix(original, dim), v))
    if not sigma:
        raise RuleError("spectral_norm divides by u · (w v), which is zero: u and v are none of this weight")
    return original / sigma


def _rows(dim: int | None, original: Tensor, u: Tensor, v: Tensor) -> int:
    """The dim of the rows: `dim` if given, else the one that the values of u and v fit.

    RuleError where the values fit another dim, or none: before training, u and v of the old spectral norm are random.
    """
    fits = dims_of(tuple(original.shape), tuple(u.shape), tuple(v.shape))
    if len(fits) == 1:
        return fits[0] if dim is None else dim
    cosines = {row_dim: _cosines(_matrix(original, row_dim), u, v) for row_dim in (*fits, *([] if dim is None else [dim]))}
    best = max(cosines, key=lambda row_dim: min(cosines[row_dim]))
    others = [pair for row_dim, pair in cosines.items() if row_dim != best]
    near = min(cosines[best]) > _IMAGES and all(min(pair) < _OTHERS for pair in others)
    exact = min(cosines[best]) > _NEARLY and max(cosines[best]) > _EXACT and all(max(pair) < _INEXACT for pair in others)
    clear = near or (dim is None and exact)
    if dim is None and not clear:
        raise RuleError("spectral_norm can't tell by its values which dim of a weight are the rows", hint=_WAYS)
    if clear and dim not in (None, best):
        words = f"spectral_norm has dim {dim}, and the values of u and v are those of dim {best}"
        raise RuleError(words, hint=f"write spectral_norm(dim={best})")
    return best if dim is None else dim


def _matrix(original: Tensor, dim: int) -> Tensor:
    """The weight with a row for each index of `dim`."""
    return original.movedim(dim, 0).flatten(1)


def _cosines(matrix: Tensor, u: Tensor, v: Tensor) -> list[float]:
    """The cosines between u and W v, and between v and Wᵀ u: both near 1 after some steps of the power iteration."""
    import torch

    matrix, u, v = matrix.double(), u.double(), v.double()
    images = (u, torch.mv(matrix, v)), (v, torch.mv(matrix.T, u))
    return [float(torch.dot(vector, image) / (vector.norm() * image.norm()).clamp_min(1e-300)) for vector, image in images]


SPECTRAL_NORM = Adapter(
    words="w = original / (u · (original v)), of a weight, u and v by turns, as torch has it in eval mode; "
    "the rows are dim `dim`, told by the shapes, else (None) by the values of u and v",
    fields={"dim": or_none(signed)},
    infer=_infer,
    fill=_fill,
    kernel=_kernel,
    moments=cannot_follow,
    floats=True,
    joins=True,
    source="Miyato et al. 2018, Spectral normalization, arXiv:1802.05957; torch.nn.utils.parametrizations.spectral_norm",
)
