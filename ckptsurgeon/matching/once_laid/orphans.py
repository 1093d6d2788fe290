"""Tensors that stand apart from their module on one side, are fused there, or have their bias at another layer."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice

from ckptsurgeon.matching.evidence.support import OF_BOTH
from ckptsurgeon.matching.evidence.vocabulary import KIND_WORDS, SAYS_NOTHING, concepts, conflict
from ckptsurgeon.matching.module_tree import Shape, is_float, module_of, squeezed
from ckptsurgeon.matching.pairing import Record
from ckptsurgeon.planning.links import ENOUGH, Link
from ckptsurgeon.tensors import TensorMeta

Tensors = Mapping[str, TensorMeta]
_IMPLIED = {"attn", "self"}  # words that the other name may leave out
_QKV = ("q", "k", "v")
_ADDED_UP = ({"neighbour", "root"},)  # layers of a module that gives the sum of what they do


def orphans(links: Sequence[Link], record: Record, source: Tensors, target: Tensors) -> list[Link]:
    """Tensors that stand apart from their module on the other side (a fused layer's separate biases), and buffers, by names and places;
    then matrices of a shape that is left over once in modules that go together."""
    used, reached = {key for link in links for key in link.sources}, {key for link in links for key in link.targets}
    modules = [(laid.sources[0].path, laid.targets[0].path) for laid in record.modules if laid.margin >= ENOUGH]
    modules.sort(key=lambda pair: -len(pair[0]))
    source_left = {key: tensor for key, tensor in source.items() if key not in used}
    target_left = {key: tensor for key, tensor in target.items() if key not in reached}
    if not source_left or not target_left:
        return []
    sources_below, targets_below = _below(source_left.values()), _below(target_left.values())
    new_links: list[Link] = []
    for rule in _RULES:
        for source_path, target_path in modules:
            here = [tensor for tensor in sources_below.get(source_path, ()) if tensor.name in source_left]
            there = [tensor for tensor in targets_below.get(target_path, ()) if tensor.name in target_left]
            candidates = _Candidates(rule, here, there, (source_path, target_path))
            for tensor in there:
                mine = candidates.of_target(tensor, source_left)
                if (
                    len(mine) == 1
                    and len(candidates.of_source(mine[0], target_left)) == 1
                    and not _other_biases(mine[0].name, tensor.name, source, target)
                ):
                    new_links.append(Link((mine[0].name,), (tensor.name,), "", ENOUGH, (rule.words,)))
                    del source_left[mine[0].name], target_left[tensor.name]
    return new_links


def _other_biases(key: str, name: str, source: Tensors, target: Tensors) -> bool:
    """Whether two layers have biases of their own, of other sizes: their matrices are of one shape by chance, or one is turned."""
    biases = source.get(f"{module_of(key)}.bias"), target.get(f"{module_of(name)}.bias")
    return None not in biases and len({bias.shape for bias in biases if bias}) > 1


def uncrossed(links: Sequence[Link], source: Tensors, target: Tensors) -> list[Link]:
    """The links, where two weights of one shape and one module, linked against their names, are exchanged.

    One of two layers has a bias, and the other implementation gives it to the other one. Where a module adds up what both give, that is
    the same bias.
    """
    against: dict[tuple[str, str, Shape], list[Link]] = {}
    for link in links:
        if len(link.sources) == len(link.targets) == 1 and not link.clear and not link.op and _excluded(link.sources[0], link.targets[0]):
            around = (_around(link.sources[0]), _around(link.targets[0]), target[link.targets[0]].shape)
            against.setdefault(around, []).append(link)
    exchanged: dict[int, Link] = {}
    for (*_, shape), crossed in against.items():
        if len(crossed) == 2 and len(shape) > 1 and not any(_excluded(a.sources[0], b.targets[0]) for a, b in (crossed, crossed[::-1])):
            for link, other in (crossed, crossed[::-1]):
                words = ("names exclude the other way",)
                exchanged[id(link)] = Link(other.sources, link.targets, "", ENOUGH, words, f"{link.sources[0]} -> {link.targets[0]}")
            modules = {(module_of(link.sources[0]), module_of(link.targets[0])) for link in crossed}
            names = {word for link in crossed for word in concepts(link.sources[0])}
            if any(kind <= names for kind in _ADDED_UP):
                exchanged |= {
                    id(link): replace(link, margin=ENOUGH, evidence=(OF_BOTH,))
                    for link in links
                    if len(link.sources) == len(link.targets) == 1
                    and id(link) not in exchanged
                    and (module_of(link.sources[0]), module_of(link.targets[0])) in modules
                }
    return [exchanged.get(id(link), link) for link in links]


def _around(key: str) -> str:
    return module_of(module_of(key))


def _excluded(source_key: str, target_key: str) -> bool:
    return conflict(frozenset(concepts(source_key)), frozenset(concepts(target_key)))


def cut_biases(links: Sequence[Link], source: Tensors, target: Tensors) -> list[Link]:
    """Biases of queries, keys and values in one vector, of which the target has some as tensors, beside a matrix that goes over whole, or
    is cut into the weights of the three."""
    used, reached = {key for link in links for key in link.sources}, {key for link in links for key in link.targets}
    matrices = {link.sources[0]: link for link in links if link.clear and len(link.sources) == 1 and link.op in ("", "chunk(dim=0)")}
    beside: dict[tuple[str, str], list[str]] = {}
    for name, tensor in target.items():
        part = set(concepts(name.rpartition(".")[2])) & set(_QKV) or set(concepts(module_of(name).rpartition(".")[2])) & set(_QKV)
        if name not in reached and len(tensor.shape) == len(part) == 1 and name.endswith("bias"):
            own = module_of(name) if name.endswith(".bias") else name
            beside.setdefault((module_of(own), part.pop()), []).append(name)
    cut = []
    for key, tensor in source.items() if beside else ():
        matrix = matrices.get(f"{module_of(key)}.weight") if key not in used and key.endswith(".bias") else None
        if matrix is None or len(tensor.shape) != 1 or not _qkv(matrix):
            continue
        around = module_of(module_of(matrix.targets[0]))
        parts = {at: beside[around, word][0] for at, word in enumerate(_QKV) if len(beside.get((around, word), ())) == 1}
        if len(parts) == 2 and all(3 * target[name].shape[0] == tensor.shape[0] for name in parts.values()):
            words = "parts of the bias beside the same matrix; the target has no third"
            cut.append(Link((key,), tuple(parts.values()), f"chunk(of=3, parts={list(parts)})", matrix.margin, (words,)))
    return cut


def _qkv(matrix: Link) -> bool:
    """Whether a link is of queries, keys and values in one matrix: whole on both sides, or cut into the three."""
    names = [set(concepts(module_of(name).rpartition(".")[2])) for name in (*matrix.sources, *matrix.targets)]
    return (
        all("qkv" in words for words in names) if not matrix.op else [words & {*_QKV} for words in names[1:]] == [{word} for word in _QKV]
    )


def _below(tensors: Iterable[TensorMeta]) -> dict[str, list[TensorMeta]]:
    """The tensors below each module's path, the empty one among them."""
    below: dict[str, list[TensorMeta]] = {}
    for tensor in tensors:
        path = tensor.name
        while path:
            path = path.rpartition(".")[0]
            below.setdefault(path, []).append(tensor)
    return below


@dataclass(frozen=True)
class _Rule:
    """When two tensors below two modules may go together.

    Attributes:
        words: the evidence.
        fits: whether a source and a target do, below the modules of these paths.
        traits: what a tensor shows of itself; a source fits only targets that show all that it shows, or the one it has.
    """

    words: str
    fits: Callable[[TensorMeta, TensorMeta, str, str], bool]
    traits: Callable[[TensorMeta, str], Sequence[Hashable]]


class _Candidates:
    """Which tensors below one module fit which below another. Each source is compared only with the targets that show its rarest trait."""

    def __init__(self, rule: _Rule, sources: Sequence[TensorMeta], targets: Sequence[TensorMeta], paths: tuple[str, str]) -> None:
        self.rule, self.paths = rule, paths
        self.targets: dict[Hashable, list[TensorMeta]] = {}
        for target in targets if sources else ():
            for trait in set(rule.traits(target, paths[1])):
                self.targets.setdefault(trait, []).append(target)
        self.sources: dict[Hashable, list[TensorMeta]] = {}
        self.rarest: dict[str, Hashable] = {}
        for source in sources if targets else ():
            traits = rule.traits(source, paths[0])
            if traits:
                self.rarest[source.name] = rarest = min(traits, key=lambda trait: len(self.targets.get(trait, ())))
                self.sources.setdefault(rarest, []).append(source)

    def of_target(self, target: TensorMeta, left: Tensors) -> list[TensorMeta]:
        """The sources that fit a target and are left, two at most."""
        traits = dict.fromkeys(self.rule.traits(target, self.paths[1]))
        near = (source for trait in traits for source in self.sources.get(trait, ()))
        return list(islice((source for source in near if source.name in left and self.rule.fits(source, target, *self.paths)), 2))

    def of_source(self, source: TensorMeta, left: Tensors) -> list[TensorMeta]:
        """The targets that a source fits and that are left, two at most."""
        near = self.targets.get(self.rarest[source.name], ())
        return list(islice((target for target in near if target.name in left and self.rule.fits(source, target, *self.paths)), 2))


def _words_below(tensor: TensorMeta, path: str) -> tuple[str, ...]:
    """The words of a tensor's name below a module; where others are among them, not those that say nothing."""
    words = concepts(tensor.name[len(path) :].lstrip("."))
    return (*([word for word in words[:-1] if word not in SAYS_NOTHING] or words[:-1]), *words[-1:])


def _named(source: TensorMeta, target: TensorMeta, here: str, there: str) -> bool:
    """Whether two tensors of equal shape have the same role and, below their modules, the same words."""
    if source.shape != target.shape or is_float(source) != is_float(target) or not squeezed(source.shape):
        return False
    source_words, target_words = _words_below(source, here), _words_below(target, there)
    if not source_words or not target_words or source_words[-1] != target_words[-1]:
        return False
    more = set(target_words) - {*source_words, *_IMPLIED}
    return source_words == target_words or (set(source_words) <= {*target_words, *_IMPLIED} and more.isdisjoint(KIND_WORDS))


def _named_traits(tensor: TensorMeta, path: str) -> list[Hashable]:
    """Shape, role and each word that the other name must have too."""
    words = _words_below(tensor, path)
    return [(tensor.shape, is_float(tensor), word) for word in words if word not in _IMPLIED or word == words[-1]]


def _alone(source: TensorMeta, target: TensorMeta, _here: str, _there: str) -> bool:
    """Whether two matrices, not square (or kernels), are of one shape and not named against it."""
    return source.shape == target.shape and not conflict(frozenset(concepts(source.name)), frozenset(concepts(target.name)))


def _alone_traits(tensor: TensorMeta, _path: str) -> list[Hashable]:
    """The shape, where it is that of a matrix that is not square, or of a kernel."""
    shape = squeezed(tensor.shape)
    square = len(tensor.shape) == 2 and len(set(shape)) == 1
    return [] if not is_float(tensor) or len(shape) < 2 or square else [tensor.shape]


def _apart(source: TensorMeta, target: TensorMeta, here: str, there: str) -> bool:
    """Whether two are biases of one width, one of them the module's own."""
    own = ("bias",) in (_words_below(source, here), _words_below(target, there))
    return bool(here and there) and own and source.shape == target.shape


def _apart_traits(tensor: TensorMeta, path: str) -> list[Hashable]:
    """The width of a bias."""
    return [tensor.shape] if len(tensor.shape) == 1 and _words_below(tensor, path)[-1:] == ("bias",) else []


_RULES = (
    _Rule("named so in modules that go together", _named, _named_traits),
    _Rule("the only one of its shape that is left there", _alone, _alone_traits),
    _Rule("the only bias that is left there", _apart, _apart_traits),
)
