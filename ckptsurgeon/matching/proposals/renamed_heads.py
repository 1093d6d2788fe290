"""A head under another name and with another number of classes: what a diff has only in the source, and what only in the target, that is
the same layer but for its rows. It stays fresh; this says why.

Rule: each side has one such layer of this width, and one of the two is a head by its name or the last layer of its model, while the other
may be one; or both are plain layers at the top of their models. A vocabulary has no classes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from ckptsurgeon.matching.evidence.vocabulary import concepts
from ckptsurgeon.matching.module_tree import is_float
from ckptsurgeon.matching.proposals.sizes import HEADS
from ckptsurgeon.planning.diff import Diff, RenamedHead
from ckptsurgeon.tensors import Checkpoint, TensorMeta

_VOCABULARY = frozenset({"lm", "tok", "embed"})
_PLAIN = frozenset({"linear", "final", "out", "block"})  # what a layer that is alone in its place may be called, a head among others
_TOP = 2  # segments of a name at the top of a model, that of a wrapper among them
_SURE, _MAYBE, _ALONE = 2, 1, 1.5  # how much a name says that it is a head; two sides need three together


@dataclass(frozen=True)
class _Layer:
    """A matrix or kernel with the bias that may stand beside it."""

    module: str
    weight: TensorMeta
    bias: TensorMeta | None
    head: float


def renamed_heads(diff: Diff, source: Checkpoint, target: Checkpoint) -> tuple[RenamedHead, ...]:
    """The heads among what is missing and extra.

    >>> side = lambda path, name, rows: Checkpoint(path, "safetensors", "0", {f"{name}.weight": TensorMeta("", "F32", (rows, 8), (8, 1))})
    >>> from ckptsurgeon.planning.diff import compare
    >>> one, other = side("a", "fc", 1000), side("b", "head", 10)
    >>> [head.words for head in renamed_heads(compare(one, other), one, other)]
    ['looks like the head under another name, with 10 classes instead of 1,000: fresh']
    """
    taken = {key for link in diff.advice.links if link.certain for key in (*link.sources, *link.targets)}
    ours = [layer for layer in _layers(diff.extra, source) if layer.weight.name not in taken]
    theirs = [layer for layer in _layers(diff.missing, target) if layer.weight.name not in taken]
    heads = []
    for layer in theirs:
        fit = [candidate for candidate in ours if _is_same(candidate, layer)]
        back = [candidate for candidate in theirs if fit and _is_same(fit[0], candidate)]
        if len(fit) == len(back) == 1 and layer.head + fit[0].head >= _SURE + _MAYBE:
            heads.append(RenamedHead(fit[0].weight.name, layer.weight.name, fit[0].weight.shape, layer.weight.shape))
    return tuple(heads)


def _layers(keys: Iterable[str], side: Checkpoint) -> Iterator[_Layer]:
    last = [key for key, tensor in side.items() if len(tensor.shape) > 1 and is_float(tensor)][-1:]
    left: Mapping[str, TensorMeta] = {key: side[key] for key in keys if key in side}
    for key, tensor in left.items():
        module, _, leaf = key.rpartition(".")
        if leaf != "weight" or not module or len(tensor.shape) < 2:
            continue
        words = [word for word in concepts(module) if word[0] != "#"]
        if _VOCABULARY & set(words):
            continue
        bias = left.get(f"{module}.bias")
        if bias is None or bias.shape == tensor.shape[:1]:
            yield _Layer(module, _called(tensor, key), bias, _SURE if [key] == last else _says_head(module, words))


def _says_head(module: str, words: list[str]) -> float:
    """How much a module's name says that it is a head."""
    if HEADS & set(words):
        return _SURE
    last = set(concepts(module.rpartition(".")[2]))
    if not last <= _PLAIN or any(segment.isdigit() for segment in module.split(".")):
        return 0
    return _ALONE if module.count(".") < _TOP else _MAYBE


def _called(tensor: TensorMeta, key: str) -> TensorMeta:
    return tensor if tensor.name == key else TensorMeta(key, tensor.dtype, tensor.shape, tensor.stride)


def _is_same(first: _Layer, second: _Layer) -> bool:
    """Whether two layers are the same but for their rows and names."""
    old, new = first.weight.shape, second.weight.shape
    return old[1:] == new[1:] and old[0] != new[0] and (first.bias is None) == (second.bias is None) and first.module != second.module
