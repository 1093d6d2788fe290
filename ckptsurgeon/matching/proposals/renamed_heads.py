"""A head under another name and with another number of classes: what a diff has only in the source, and what only in the target, that is
the same layer but for its rows. It stays fresh; this says why.

Rule: each side has one such layer of this width, and one of the two is a head by its name or the last layer of its model, while the other
may be one; or both are plain layers at the top of their models. A vocabulary has no classes.
"""

from __future__ import annotations

from collections.abc import Container, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice

from ckptsurgeon.matching.evidence.vocabulary import concepts
from ckptsurgeon.matching.module_tree import is_float
from ckptsurgeon.matching.proposals.sizes import HEADS
from ckptsurgeon.planning.diff import Diff, RenamedHead
from ckptsurgeon.tensors import Checkpoint

_VOCABULARY = frozenset({"lm", "tok", "embed"})
_PLAIN = frozenset({"linear", "final", "out", "block"})  # what a layer that is alone in its place may be called, a head among others
_TOP = 2  # segments of a name at the top of a model, that of a wrapper among them
_SURE, _MAYBE, _ALONE = 2, 1, 1.5  # how much a name says that it is a head; two sides need three together


@dataclass(frozen=True)
class _Layer:
    """A matrix or kernel, and whether a bias stands beside it."""

    module: str
    key: str
    shape: tuple[int, ...]
    biased: bool

    @property
    def kind(self) -> Hashable:
        """What a layer has in common with the same one of another number of rows."""
        return self.shape[1:], self.biased


def renamed_heads(diff: Diff, source: Checkpoint, target: Checkpoint) -> tuple[RenamedHead, ...]:
    """The heads among what is missing and extra.

    >>> side = lambda path, name, rows: Checkpoint(path, "safetensors", "0", {f"{name}.weight": TensorMeta("", "F32", (rows, 8), (8, 1))})
    >>> from ckptsurgeon.planning.diff import compare
    >>> from ckptsurgeon.tensors import TensorMeta
    >>> one, other = side("a", "fc", 1000), side("b", "head", 10)
    >>> [head.words for head in renamed_heads(compare(one, other), one, other)]
    ['looks like the head under another name, with 10 classes instead of 1,000: fresh']
    """
    ours, theirs = list(_layers(diff.extra, source)), list(_layers(diff.missing, target))
    taken = {key for link in diff.advice.links if link.certain for key in (*link.sources, *link.targets)}
    ours, theirs = _not_words(_with_other_rows(ours, theirs), taken), _not_words(_with_other_rows(theirs, ours), taken)
    heads = []
    of_ours, of_theirs = _by_rows(ours), _by_rows(theirs)
    last = tuple(map(_last_matrix, (source, target))) if ours and theirs else ()
    for layer in theirs:
        fit = _two_that_fit(layer, of_ours)
        if len(fit) == 1 == len(_two_that_fit(fit[0], of_theirs)):
            says = (_SURE if one.key == key else _says_head(one.module) for one, key in zip((fit[0], layer), last, strict=True))
            if sum(says) >= _SURE + _MAYBE:
                heads.append(RenamedHead(fit[0].key, layer.key, fit[0].shape, layer.shape))
    return tuple(heads)


def _layers(keys: Iterable[str], side: Checkpoint) -> Iterator[_Layer]:
    left = {key: side[key] for key in keys if key in side}
    for key, tensor in left.items():
        module, _, leaf = key.rpartition(".")
        if leaf != "weight" or not module or len(tensor.shape) < 2:
            continue
        bias = left.get(f"{module}.bias")
        if bias is None or bias.shape == tensor.shape[:1]:
            yield _Layer(module, key, tensor.shape, bias is not None)


def _with_other_rows(layers: Iterable[_Layer], others: Iterable[_Layer]) -> list[_Layer]:
    """The layers of which the others have one of the same kind with another number of rows."""
    rows: dict[Hashable, set[int]] = {}
    for other in others:
        rows.setdefault(other.kind, set()).add(other.shape[0])
    return [layer for layer in layers if rows.get(layer.kind, set()) - {layer.shape[0]}]


def _not_words(layers: Iterable[_Layer], taken: Container[str]) -> list[_Layer]:
    """The layers that are no vocabulary, and that no certain link has."""
    return [layer for layer in layers if layer.key not in taken and _VOCABULARY.isdisjoint(concepts(layer.module))]


def _by_rows(layers: Iterable[_Layer]) -> Mapping[Hashable, Mapping[int, list[_Layer]]]:
    """The layers by their kind and their number of rows."""
    by_kind: dict[Hashable, dict[int, list[_Layer]]] = {}
    for layer in layers:
        by_kind.setdefault(layer.kind, {}).setdefault(layer.shape[0], []).append(layer)
    return by_kind


def _two_that_fit(layer: _Layer, others: Mapping[Hashable, Mapping[int, list[_Layer]]]) -> list[_Layer]:
    """The first two layers that are the same as this one but for their rows and names, as far as there are any."""
    groups = (group for rows, group in others.get(layer.kind, {}).items() if rows != layer.shape[0])
    return list(islice((other for group in groups for other in group if other.module != layer.module), 2))


def _last_matrix(side: Checkpoint) -> str:
    return next((key for key in reversed(tuple(side)) if len(side[key].shape) > 1 and is_float(side[key])), "")


def _says_head(module: str) -> float:
    """How much a module's name says that it is a head."""
    if not HEADS.isdisjoint(concepts(module)):
        return _SURE
    last = set(concepts(module.rpartition(".")[2]))
    if not last <= _PLAIN or any(segment.isdigit() for segment in module.split(".")):
        return 0
    return _ALONE if module.count(".") < _TOP else _MAYBE
