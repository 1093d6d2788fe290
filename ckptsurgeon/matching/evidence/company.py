"""What a norm belongs to: the convolution that it stands behind, and the attention or the MLP that it is named after;
and whether what goes by no name is a body of many layers.

Rule: names and shapes decide, never the order of keys, so that sorted files are read alike.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise, permutations, takewhile

from ckptsurgeon.matching.evidence.vocabulary import concepts
from ckptsurgeon.matching.module_tree import Node, grow, is_float
from ckptsurgeon.planning.links import Link
from ckptsurgeon.tensors import TensorMeta

Tensors = Mapping[str, TensorMeta]
_LEAST_LAYERS, _LEAST_SHAPES = 5, 3
_KINDS = {"conv", "norm"}
_MOST = 4  # convolutions of a module whose orders are tried
PARTS = frozenset({"attn", "self", "cross", "mlp"})  # of a layer


@dataclass(frozen=True)
class _Kernels:
    """One convolution, or several side by side that share the channels among them, within a module."""

    units: tuple[Node, ...]
    name: str

    @property
    def gives(self) -> int:
        """The channels that come out."""
        return sum(unit.largest.shape[0] for unit in self.units)

    @property
    def takes(self) -> int:
        """The channels that go in; one channel to each kernel is a depthwise convolution."""
        return sum(unit.largest.shape[0] if unit.largest.shape[1] == 1 else unit.largest.shape[1] for unit in self.units)

    @property
    def may_be_grouped(self) -> bool:
        """Whether it has a window: such a convolution may take each channel for some of its kernels only."""
        return any(size > 1 for unit in self.units for size in unit.largest.shape[2:])


def behind(root: Node) -> dict[int, Node]:
    """By norm (its id) the convolution that it stands behind, the first of several, where the module that holds both tells."""
    convolutions: dict[int, Node] = {}
    for module in root.nodes:
        vectors = [child for child in module.children if child.leaf and len(child.main) == 1]
        norms = vectors if len(vectors) == 1 else [child for child in vectors if "running_var" in child.tensors]
        parts = [part for child in module.children if norms for part in _layers(child)]
        kernels = [_Kernels(tuple(part.units()), part.name) for part in parts if _is_kernels(part)]
        if kernels:
            convolutions.update((id(norm), kernel.units[0]) for norm, kernel in _pairs(norms, kernels) if norm.main == (kernel.gives,))
    return convolutions


def _layers(child: Node) -> tuple[Node, ...]:
    """A child of a module; or what is in it, where it is nothing but the word that names of several convolutions begin with."""
    stem = concepts(child.name) == ("conv",) and child.children and not _is_kernels(child) and all(map(_is_kernels, child.children))
    return child.children if stem else (child,)


def _is_kernels(node: Node) -> bool:
    """Whether a node is a convolution, or a plain list of them."""
    units = node.children or (node,)
    return all(unit.leaf and len(unit.largest.shape) > 2 and (unit is node or unit.name[-1:].isdigit()) for unit in units)


def _pairs(norms: Sequence[Node], kernels: Sequence[_Kernels]) -> Iterable[tuple[Node, _Kernels]]:
    if len(norms) == len(kernels) == 1:
        return [(norms[0], kernels[0])]
    layers: list[Node | _Kernels] = [*norms, *kernels]
    if all(part.name.isdigit() for part in layers):  # a row of layers: a norm is of what stands right before it, or behind it all along
        row = sorted(layers, key=lambda part: int(part.name), reverse=min(layers, key=lambda part: int(part.name)) in norms)
        return [(after, before) for before, after in pairwise(row) if isinstance(after, Node) and isinstance(before, _Kernels)]
    by_count = {_marked(kernel.name): kernel for kernel in kernels}
    counts = [_marked(norm.name) for norm in norms]
    if len(kernels) == len(by_count) and set(by_count) <= set(counts) and len(norms) == len({*counts}):  # `bn_s` is of `conv_s`
        return [(norm, by_count[count]) for norm, count in zip(norms, counts, strict=True) if count in by_count]
    if len(norms) == len(kernels) <= _MOST and len({norm.folded for norm in norms}) == 1:
        counted = sorted(norms, key=lambda norm: norm.numbers)
        chains = [chain for chain in permutations(kernels) if _is_chain(chain, counted)]
        return zip(counted, chains[0], strict=True) if len(chains) == 1 else ()
    return ()


def _marked(name: str) -> tuple[str, ...]:
    """What a name says beside its kind: a number, mostly."""
    return tuple(word for word in concepts(name) if word not in _KINDS)


def _is_chain(kernels: Sequence[_Kernels], norms: Sequence[Node]) -> bool:
    """Whether each convolution takes what the one before it gives, and gives what its norm takes."""
    return all((kernel.gives,) == norm.main for kernel, norm in zip(kernels, norms, strict=True)) and all(
        before.gives == after.takes or (after.may_be_grouped and before.gives % after.takes == 0) for before, after in pairwise(kernels)
    )


def companions(root: Node) -> dict[int, Node]:
    """By unit (its id) the one that is with it: the other of two in a module, or the only one beside it whose name begins with its word."""
    together: dict[int, Node] = {}
    for module in root.nodes:
        units = [child for child in module.children if child.leaf]
        by_word: dict[str, list[Node]] = {"": units} if len(module.children) == 2 and module is not root else {}
        for unit in units:
            first, _, rest = unit.name.partition("_")
            if rest and len(first) > 1:
                by_word.setdefault(first, []).append(unit)
        for pair in by_word.values():
            if len(pair) == 2:
                together |= {id(pair[0]): pair[1], id(pair[1]): pair[0]}
    return together


@dataclass(frozen=True)
class Inside:
    """What the matrices in a module are on the other side: the parts of a layer that their names say, and the path that these share."""

    parts: frozenset[str]
    path: str

    def is_part_of(self, unit: Node) -> bool:
        """Whether a unit is called as the one part that is in the module, and stands in or beside that part."""
        named_parts = PARTS & set(concepts(unit.path))
        kinds = {"mlp" if part == "mlp" else "attn" for part in self.parts}
        above, _, last = self.path.rpartition(".")
        around = above if self.parts & set(concepts(last)) else self.path
        return len(kinds) == 1 and bool(named_parts) and named_parts <= self.parts and (not around or unit.path.startswith(f"{around}."))


def lists_of(pairs: Iterable[tuple[Node, Node]]) -> tuple[Mapping[str, str], Mapping[str, str]]:
    """By numbered list of either side the other's, where members of the one go to members of the other only."""
    heads = {(source.parent, target.parent) for source, target in pairs if source.name.isdigit() and target.name.isdigit()}
    sources, targets = Counter(here for here, _ in heads), Counter(there for _, there in heads)
    here = {here: there for here, there in heads if sources[here] == targets[there] == 1}
    return here, {name: path for path, name in here.items()}


def parts_within(pairs: Iterable[tuple[Node, Node]]) -> tuple[Mapping[str, Inside], Mapping[str, Inside]]:
    """By module of either side, what the matrices that are in it are on the other side, where names there say parts of a layer."""
    by_module: tuple[dict[str, Inside], dict[str, Inside]] = ({}, {})
    for pair in pairs:
        if pair[0].leaf and pair[1].leaf and len(pair[0].main) > 1:
            for side in (0, 1):
                path = pair[1 - side].path
                named_parts = PARTS & set(concepts(path))
                for module in _above(pair[side].path) if named_parts else ():
                    before = by_module[side].get(module)
                    by_module[side][module] = (
                        Inside(before.parts | named_parts, _common(before.path, path)) if before else Inside(named_parts, path)
                    )
    return by_module


def nearest(path: str, within: Mapping[str, Inside]) -> Inside | None:
    """What is in the nearest module around a unit that holds any part."""
    return next((within[module] for module in _above(path) if module in within), None)


def _common(first: str, second: str) -> str:
    """The parts at the head of two paths that are equal."""
    return ".".join(a for a, _ in takewhile(lambda pair: pair[0] == pair[1], zip(first.split("."), second.split("."), strict=False)))


def _above(path: str) -> Iterator[str]:
    while path := path.rpartition(".")[0]:
        yield path


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
