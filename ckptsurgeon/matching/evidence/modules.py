"""What whole modules say for the links of what is in them: a part that is all that differs, the convolution before a norm.

Rule: a head of one's own may have the shape of another head by chance; many layers of several shapes have not.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from ckptsurgeon.matching.evidence.company import behind
from ckptsurgeon.matching.module_tree import grow, is_float
from ckptsurgeon.planning.links import Link
from ckptsurgeon.tensors import TensorMeta

Tensors = Mapping[str, TensorMeta]
_LEAST_LAYERS, _LEAST_SHAPES = 5, 3


def rest_is_a_body(links: Sequence[Link], same: Mapping[str, str], source: Tensors, target: Tensors) -> bool:
    """Whether links cover all that holds values on both sides, and what does not go by its name (`same`) is many layers."""
    covered = {key for link in links for key in (*link.sources, *link.targets)}
    if any(key not in covered and is_float(tensor) for side in (source, target) for key, tensor in side.items()):
        return False
    rest = [link.targets[0] for link in links if not any(same.get(key) in link.targets for key in link.sources)]
    return _many_layers(target[key].shape for key in rest)


def layers_before_norms(side: Tensors) -> dict[str, str]:
    """By module of each norm the convolution's before it."""
    root = grow(side.values())
    paths = {id(node): node.path for node in root.nodes}
    return {paths[norm]: layer.path for norm, layer in behind(root).items()}


def _many_layers(shapes: Iterable[tuple[int, ...]]) -> bool:
    """Whether tensors are so many layers, of so many shapes, that a part of a model of its own would hardly hold the same."""
    matrices = [shape for shape in shapes if len(shape) > 1]
    return len(matrices) >= _LEAST_LAYERS and len({*matrices}) >= _LEAST_SHAPES
