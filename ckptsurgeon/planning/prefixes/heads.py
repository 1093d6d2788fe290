"""Heads (leading segments with their dot) that could be stripped from or added to one side's names to make them the other side's.

Each comes with the number of keys that it makes equal. Names and shapes only; `find` decides which head is applied.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping

from ckptsurgeon.tensors import TensorMeta

MOST = 6  # how many heads are tried, the most frequent first
_DEPTH = 6  # how many segments a head has at most

Tensors = Mapping[str, TensorMeta]


def equal_keys(source: Tensors, target: Tensors) -> list[str]:
    """The keys that are equal in name and shape."""
    return [key for key, tensor in source.items() if key in target and target[key].shape == tensor.shape]


def one_head(source: Tensors, target: Tensors) -> Iterator[tuple[int, str, str]]:
    """Heads to strip or to add, as (number of keys that are equal then, stripped, added)."""
    equal = equal_keys(source, target)
    lost = Counter(head for key in equal for head in heads_of(key))
    for head, count in _counts(source, target).most_common(MOST):
        yield count + len(equal) - lost[head], head, ""
    for head, count in _counts(target, source).most_common(MOST):
        yield count, "", head


def two_heads(source: Tensors, target: Tensors) -> Iterator[tuple[int, str, str]]:
    """Heads of most of the source's keys to strip, each with a head of the target to add, in the form of `one_head`.

    What remains of a key must begin with a module's name and have a dot; else any module or list of layers would match any other.
    """
    half = min(len(source), len(target)) / 2
    frequent = [(head, count) for head, count in Counter(head for key in source for head in heads_of(key)).items() if count >= half]
    for head, _ in sorted(frequent, key=lambda row: -row[1])[:MOST]:
        rest = {
            name: tensor
            for key, tensor in source.items()
            if key.startswith(head) and "." in (name := key[len(head) :]) and not name[0].isdigit()
        }
        for add, count in _counts(target, rest).most_common(MOST):
            yield count, head, add


def heads_of(key: str) -> Iterator[str]:
    """The heads of a key, each with its dot."""
    dot = key.find(".")
    for _ in range(_DEPTH):
        if dot < 0:
            return
        yield key[: dot + 1]
        dot = key.find(".", dot + 1)


def any_head(long: Tensors, short: Tensors) -> bool:
    """Whether any of `long`'s keys without a head is a key of `short` with the same shape."""
    for key, tensor in long.items():
        rest = key
        for _ in range(_DEPTH):
            _, dot, rest = rest.partition(".")
            if not dot:
                break
            if rest in short and short[rest].shape == tensor.shape:
                return True
    return False


def _counts(long: Tensors, short: Tensors) -> Counter[str]:
    """By head, how many of `long`'s keys without it are a key of `short` with the same shape."""
    shapes = {key: tensor.shape for key, tensor in short.items()}
    firsts = {key.partition(".")[0] for key in short}  # excludes most heads before the rest of a key is looked up
    heads = []
    for key, tensor in long.items():
        dot = 0
        for segment in key.split(".", _DEPTH + 1)[:_DEPTH]:
            if dot and segment in firsts and shapes.get(key[dot:]) == tensor.shape:
                heads.append(key[:dot])
            dot += len(segment) + 1
    return Counter(heads)
