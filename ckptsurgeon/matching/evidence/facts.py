"""Everything that doubts look at: both sides, all links, and what is asked of them more than once.

Rule: nothing is judged here. What a question costs is paid once, when it is first asked.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from ckptsurgeon.matching.evidence.vocabulary import concepts
from ckptsurgeon.matching.module_tree import module_of
from ckptsurgeon.matching.spelling import squash, squashed
from ckptsurgeon.planning.links import Link
from ckptsurgeon.tensors import TensorMeta

Tensors = Mapping[str, TensorMeta]


@dataclass(frozen=True)
class Facts:
    """Everything that doubts look at.

    Attributes:
        links: all links, those of equal names among them.
        same: target names by source keys, where both sides call a tensor the same, in the same shape.
        bare: every source key as the target's names would call it.
        ordered: whether the keys of both sides stand in an order of their own.
    """

    links: Sequence[Link]
    source: Tensors
    target: Tensors
    same: Mapping[str, str]
    bare: Mapping[str, str]
    ordered: bool

    def named(self, link: Link) -> bool:
        """Whether a link is of equal names, in a list that was found to be shifted as a whole by the numbers there."""
        return len(link.sources) == len(link.targets) == 1 and self.same.get(link.sources[0]) == link.targets[0]

    @cached_property
    def used(self) -> frozenset[str]:
        """Source keys that links have."""
        return frozenset(key for link in self.links for key in link.sources)

    @cached_property
    def dims(self) -> dict[str, int]:
        """The most dims that a tensor of each of the source's modules has."""
        dims: dict[str, int] = {}
        for key, tensor in self.source.items():
            dims[module_of(key)] = max(len(tensor.shape), dims.get(module_of(key), 0))
        return dims

    def before(self, key: str, side: int) -> str:
        """`self` or `cross`, where the module right before that of a key on a side is such an attention."""
        module = key.rpartition(".")[0]
        above = module.rpartition(".")[0]
        last = ""
        for sibling in self._beside[side].get(above, ()):
            if sibling.startswith(f"{module}."):
                break
            last = sibling
        words = set(concepts(last[len(above) + 1 :].partition(".")[0])) & {"self", "cross"}
        return words.pop() if len(words) == 1 else ""

    def attentions_alike(self, key: str, side: int) -> bool:
        """Whether the self- and the cross-attention beside a norm have weights of the same shapes."""
        above = key.rpartition(".")[0].rpartition(".")[0]
        shapes: dict[str, Counter[tuple[int, ...]]] = {"self": Counter(), "cross": Counter()}
        for sibling in self._beside[side].get(above, ()):
            words = set(concepts(sibling[len(above) + 1 :].partition(".")[0]))
            for kind in words & shapes.keys() if "norm" not in words else ():
                shapes[kind][(self.source, self.target)[side][sibling].shape] += 1
        return shapes["self"] == shapes["cross"]

    @cached_property
    def _beside(self) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
        """The keys within each module that holds a counted norm, at any depth, in their order."""
        by_module: tuple[dict[str, list[str]], dict[str, list[str]]] = ({}, {})
        for side, tensors in enumerate((self.source, self.target)):
            for key in tensors:
                head = key.rpartition(".")[0]
                while head:
                    by_module[side].setdefault(head, []).append(key)
                    head = head.rpartition(".")[0]
        return by_module

    @cached_property
    def namesakes(self) -> dict[str, str]:
        """By target key, the source key of that name but for separators, whatever its shape."""
        names = squashed(self.target)
        return {names[name]: key for key, name in ((key, squash(name)) for key, name in self.bare.items()) if name in names}
