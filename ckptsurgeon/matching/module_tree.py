"""Keys as a tree of modules, each with what its contents weigh and look like. Knows one side only, and compares nothing.

A leaf is a unit: the tensors of one module that make sense only together (weight and bias, running statistics), or a bare parameter.
A chain of modules with one child each is one node. Only floating tensors count for sizes and forms: buffers of numbers come and go.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import log2, prod

from ckptsurgeon.dtypes import BY_CODE
from ckptsurgeon.progress import beat
from ckptsurgeon.tensors import TensorMeta

Shape = tuple[int, ...]
# The last word of a key, and the role that it names in a module.
ROLES: Mapping[str, str] = {
    "weight": "weight", "kernel": "weight", "gamma": "weight", "scale": "weight", "gain": "weight", "a_2": "weight",
    "g": "weight", "w": "weight", "s": "weight",
    "bias": "bias", "beta": "bias", "b": "bias", "b_2": "bias", "offset": "bias", "shift": "bias",
    "running_mean": "running_mean", "moving_mean": "running_mean", "mean": "running_mean",
    "running_var": "running_var", "moving_variance": "running_var", "moving_var": "running_var", "variance": "running_var",
    "num_batches_tracked": "num_batches_tracked",
}  # fmt: skip
_STEMMED = re.compile(r"(?:(weight|bias)_(.+)|(.+)_(weight|bias))")
_NUMBER = re.compile(r"\d+")
COUNT = re.compile(r"\d{1,9}(?![dD](?![a-z]))")  # any number but that of the dimensions of `conv2d`
MEMBER = re.compile(r"(?<=\.)\d{1,9}(?=\.|$)")  # a number that is a whole part of a path
_LAST_NUMBER = re.compile(r"\d+(?=\D*$)")
_BESIDE_CHILDREN = {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}


def module_of(key: str) -> str:
    """The module that a key's tensor is in."""
    return key.rpartition(".")[0]


def around(key: str, number: re.Pattern[str]) -> str:
    """The path of what a tensor's module stands in, up to the last number there; empty without any.

    >>> around("layers.3.attn.q.weight", MEMBER)
    'layers.3'
    """
    return key[: max((found.end() for found in number.finditer(f"{module_of(module_of(key))}.")), default=0)]


def fold(path: str) -> str:
    """A path with every number left out.

    >>> fold("layers.11.norm1")
    'layers.{}.norm{}'
    """
    return _NUMBER.sub("{}", path)


def squeezed(shape: Shape) -> Shape:
    """A shape without its dimensions of one."""
    return tuple(size for size in shape if size != 1)


@dataclass(frozen=True, eq=False)
class Node:
    """A module, or a unit (a leaf), of one side.

    Attributes:
        path: the dotted name from the top.
        name: the part of `path` below the parent's.
        children: in the order of their first keys; none for a unit.
        tensors: a unit's tensors by role.
        at: the place of its first key in the checkpoint.
        size: the floating elements below it.
        shapes: how often each floating shape, without ones, stands below it.
        form: the same, as one value to compare.
        exact: the same of shapes as they are, ones included.
        inner: equal for nodes below which names, shapes and order are all equal.
    """

    path: str
    name: str
    children: tuple[Node, ...]
    tensors: Mapping[str, TensorMeta]
    at: int
    size: int
    shapes: Mapping[Shape, int]
    form: int
    exact: int
    inner: int

    @property
    def leaf(self) -> bool:
        """Whether it is a unit."""
        return not self.children

    @cached_property
    def parent(self) -> str:
        """The path of the node above it."""
        return self.path[: len(self.path) - len(self.name)].rstrip(".")

    @cached_property
    def folded(self) -> str:
        """Its path with every number left out."""
        return fold(self.path)

    @cached_property
    def tails(self) -> tuple[str, ...]:
        """The last one, two and three parts of its path, numbers left out but for the last part's."""
        *above, last = self.path.split(".")
        above = [fold(part) for part in above]
        counts = [count for count in (0, 1, 2) if len(above) >= count and (count or not last.isdigit())]
        return tuple(".".join([*above[len(above) - count :], last]) for count in counts)

    @cached_property
    def numbers(self) -> tuple[int, ...]:
        """The numbers in its path, in order."""
        return tuple(int(number) for number in _NUMBER.findall(self.path))

    @cached_property
    def whole_parts(self) -> tuple[bool, ...]:
        """Whether each of these numbers is a whole part of the path."""
        return tuple(part.isdigit() for part in self.path.split(".") for _ in _NUMBER.findall(part))

    @cached_property
    def nodes(self) -> tuple[Node, ...]:
        """Itself and all nodes below it, parents first."""
        return (self, *(node for child in self.children for node in child.nodes))

    @cached_property
    def weighed(self) -> Mapping[Shape, float]:
        """Each shape with its weight in a comparison: large tensors count more, but not by their size."""
        return {shape: count * (1 + log2(1 + prod(shape))) for shape, count in self.shapes.items()}

    @cached_property
    def spread(self) -> Mapping[int, int]:
        """Floating elements by the inputs of a row, 0 for vectors: what fusing, splitting and stacking rows keep."""
        elements: Counter[int] = Counter()
        for shape, count in self.shapes.items():
            inputs = shape[-1] if len(shape) == 3 else prod(shape[1:])
            elements[inputs if len(shape) > 1 else 0] += count * prod(shape)
        return elements

    @cached_property
    def main(self) -> Shape:
        """The shape, without ones, of a unit's largest tensor."""
        return squeezed(self.largest.shape)

    @cached_property
    def largest(self) -> TensorMeta:
        """A unit's largest tensor."""
        return max(self.tensors.values(), key=lambda tensor: (is_float(tensor), tensor.numel))

    def units(self) -> Iterator[Node]:
        """The units below it (itself, where it is one)."""
        return (node for node in self.nodes if node.leaf)


def is_float(tensor: TensorMeta) -> bool:
    """Whether a tensor's values are floating numbers."""
    return BY_CODE[tensor.dtype].kind == "float"


@dataclass
class _Interned:
    ids: dict[object, int] = field(default_factory=dict)

    def __call__(self, value: object) -> int:
        return self.ids.setdefault(value, len(self.ids))


_DEEPEST = 64  # modules within modules; what a stranger's key has below is one name


class _Module(dict[str, "_Module"]):
    """A module while keys are read: its children by name, and its own tensors by the unit they belong to."""

    def __init__(self) -> None:
        super().__init__()
        self.own: dict[str, tuple[int, TensorMeta]] = {}


def grow(tensors: Iterable[TensorMeta], interned: _Interned | None = None) -> Node:
    """The tree of a side's tensors. Give both sides the same `interned` (see `both`)."""
    root = _Module()
    for at, tensor in enumerate(tensors):
        *path, leaf = tensor.name.split(".", _DEEPEST)
        module = root
        for part in path:
            module = module.setdefault(part, _Module())
        while leaf in module.own:
            leaf += "'"
        module.own[leaf] = (at, tensor)
    return _node(root, "", "", interned or _Interned())


def both(source: Iterable[TensorMeta], target: Iterable[TensorMeta]) -> tuple[Node, Node]:
    """The trees of two sides whose forms can be compared."""
    interned = _Interned()
    return grow(source, interned), grow(target, interned)


def list_lengths(root: Node) -> dict[int, int]:
    """By node (its id), how many have its path but for the last number in it."""
    heads = {id(node): _LAST_NUMBER.sub("{}", node.path) for node in root.nodes}
    counts = Counter(_LAST_NUMBER.sub("{}", path) for path in {node.path for node in root.nodes})  # a module's own tensors have its path
    return {node: counts[head] for node, head in heads.items()}


def _node(module: _Module, path: str, name: str, interned: _Interned) -> Node:
    beat()
    children = [_node(child, _join(path, part), part, interned) for part, child in module.items()]
    children += _units(module, path, interned)
    children.sort(key=lambda node: node.at)
    if len(children) == 1:
        only = children[0]
        joined = _join(name, only.name)
        return replace(only, name=joined)
    shapes: Counter[Shape] = Counter()
    for child in children:
        shapes.update(child.shapes)
    return Node(
        path,
        name,
        tuple(children),
        {},
        min((child.at for child in children), default=0),
        sum(child.size for child in children),
        shapes,
        interned(frozenset(shapes.items())),
        interned(("exact", *sorted(child.exact for child in children))),
        interned(tuple((child.name, child.inner) for child in children)),
    )


def _units(module: _Module, path: str, interned: _Interned) -> list[Node]:
    """A module's own tensors, those of one stem together."""
    groups: dict[str, dict[str, tuple[int, TensorMeta]]] = {}
    for leaf, placed in module.own.items():
        stem, role = _role(leaf, bool(module))
        if role in groups.get(stem, {}):
            stem, role = leaf, "param"
        groups.setdefault(stem, {})[role] = placed
    return [_unit(stem, by_role, path, interned) for stem, by_role in groups.items()]


def _role(leaf: str, beside_children: bool) -> tuple[str, str]:
    """The stem of a unit that a tensor belongs to, and its role there."""
    if leaf in ROLES and (not beside_children or leaf in _BESIDE_CHILDREN):
        return "", ROLES[leaf]
    stemmed = _STEMMED.fullmatch(leaf)
    if stemmed and leaf not in ROLES:
        return stemmed[2] or stemmed[3], stemmed[1] or stemmed[4]
    return leaf, "param"


def _unit(stem: str, by_role: dict[str, tuple[int, TensorMeta]], path: str, interned: _Interned) -> Node:
    tensors = {role: tensor for role, (_, tensor) in by_role.items()}
    counted = [tensor for role, tensor in tensors.items() if is_float(tensor) and role != "num_batches_tracked"]
    shapes = Counter(squeezed(tensor.shape) for tensor in counted)
    form = interned(frozenset(shapes.items()))
    exact = interned(("exact", *sorted(tensor.shape for tensor in counted)))
    contents = tuple(sorted((role, tensor.shape, tensor.dtype) for role, tensor in tensors.items()))
    return Node(
        _join(path, stem),
        stem,
        (),
        tensors,
        min(at for at, _ in by_role.values()),
        sum(tensor.numel for tensor in counted),
        shapes,
        form,
        exact,
        interned(contents),
    )


def _join(*parts: str) -> str:
    return ".".join(part for part in parts if part)
