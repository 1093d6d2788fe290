"""The role of a tensor in a whole model: token table, table of positions, first layer, output head, last norm.

Rule: a role speaks for a link only where each side has one tensor of it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from functools import cached_property

from ckptsurgeon.matching.evidence.vocabulary import concepts
from ckptsurgeon.matching.module_tree import ROLES, module_of
from ckptsurgeon.tensors import TensorMeta

Tensors = Mapping[str, TensorMeta]
_OF_NORMS = tuple(f".{name}" for name, role in ROLES.items() if role in ("weight", "bias"))
_HEAD, _TOKENS, PLACES = "output head", "table of tokens", "table of positions"
STEM, _INPUT = "first convolution", "projection of the input"
_LAYERS = {"proj", "linear", "conv"}
_HEADS = {"fc", "output", "out", "linear", "last_linear", "dense"}  # modules at the top of a model


class Roles:
    """The roles of two sides' tensors."""

    def __init__(self, source: Tensors, target: Tensors) -> None:
        self.source, self.target = source, target

    def meet(self, source_key: str, target_key: str, by_place: bool) -> bool:
        """Whether two tensors are the only ones of one role; `by_place` also where nothing but their place in the model tells it."""
        roles = role_of(source_key, self.source), role_of(target_key, self.target)
        if roles[0] != roles[1] and set(roles) == {_TOKENS, None}:
            side = roles.index(None)
            return self._of_role[1 - side].get(_TOKENS) == 1 and self._only_tables[side] == [(source_key, target_key)[side]]
        if roles[0] != roles[1] and set(roles) == {_HEAD, None}:
            side = roles.index(None)
            counts = self._of_role[side].get(_HEAD, 0), self._of_role[1 - side].get(_HEAD)
            if counts == (0, 1) and _only(self._tops[side]) == module_of((source_key, target_key)[side]):
                return True
        ends = [(module_of(source_key), module_of(target_key)) == tuple(map(_only, ends)) for ends in (self._last_norms, self._outputs)]
        if by_place and any(ends):
            return True
        return roles[0] is not None and roles[0] == roles[1] and self._of_role[0].get(roles[0]) == 1 == self._of_role[1].get(roles[0])

    @cached_property
    def _tops(self) -> tuple[set[str], set[str]]:
        """The layers of each side that are in no module, or else the one layer that a decoder is: one that stands so alone is the output
        head, if another is not said to be."""
        tops = []
        for side in (self.source, self.target):
            layers = {module_of(key) for key, tensor in side.items() if len(tensor.shape) == 2 and key.count(".") == 1}
            tops.append(layers or _decoders_of_one_layer(side))
        return tops[0], tops[1]

    @cached_property
    def _last_norms(self) -> tuple[set[str], set[str]]:
        """The modules of each side outside of numbered lists that hold vectors alone: where there is one, it is the last norm."""
        norms = []
        for side in (self.source, self.target):
            layers = {module_of(key) for key, tensor in side.items() if len(tensor.shape) != 1 and not key.endswith("num_batches_tracked")}
            norms.append({module_of(key) for key in side if key.endswith(_OF_NORMS) and not _listed(key)} - layers)
        return norms[0], norms[1]

    @cached_property
    def _outputs(self) -> tuple[set[str], set[str]]:
        """The modules of each side outside of numbered lists that have a matrix of the shape of the tokens' table, and are none."""
        outputs = []
        for side in (self.source, self.target):
            matrices = {key: tensor.shape for key, tensor in side.items() if len(tensor.shape) == 2 and not _listed(key)}
            tables = {key: shape for key, shape in matrices.items() if role_of(key, side) == _TOKENS}
            outputs.append({module_of(key) for key, shape in matrices.items() if key not in tables and shape in tables.values()})
        return outputs[0], outputs[1]

    @cached_property
    def _only_tables(self) -> tuple[list[str], list[str]]:
        """The matrices of each side that are all that their module holds: where there is one, it is looked up and multiplies nothing."""
        tables = []
        for side in (self.source, self.target):
            own = Counter(key.rpartition(".")[0] for key in side)
            tables.append([key for key, tensor in side.items() if len(tensor.shape) == 2 and own[key.rpartition(".")[0]] == 1])
        return tables[0], tables[1]

    @cached_property
    def _of_role(self) -> tuple[Counter[str], Counter[str]]:
        counts = [
            Counter(
                role
                for key, tensor in side.items()
                if (role := role_of(key, side)) and (key.endswith("weight") or _projects(key, tensor.shape))
            )
            for side in (self.source, self.target)
        ]
        return counts[0], counts[1]


def _decoders_of_one_layer(side: Tensors) -> set[str]:
    """The layers of a side that are all that a decoder at its top holds."""
    inside: dict[str, set[str]] = {}
    for key in side:
        inside.setdefault(key.partition(".")[0], set()).add(module_of(key))
    layers = {module_of(key) for key, tensor in side.items() if _is_matrix(tensor.shape)}
    return {layer for top, modules in inside.items() if "decoder" in concepts(top) for layer in layers if modules == {layer}}


def _is_matrix(shape: tuple[int, ...]) -> bool:
    """Whether a tensor of this shape is a matrix, or a convolution over one place, which is as good."""
    return len(shape) >= 2 and max(shape[2:], default=1) == 1


def _only(modules: set[str]) -> str | None:
    return next(iter(modules)) if len(modules) == 1 else None


def _listed(key: str) -> bool:
    """Whether a key stands in a numbered list."""
    return any(map(str.isdigit, key.split(".")))


def _projects(key: str, shape: tuple[int, ...]) -> bool:
    """Whether a matrix is a parameter by itself, outside of numbered lists, that projects what a tower gives: `visual.proj`."""
    return len(shape) == 2 and key.rpartition(".")[2] == "proj" and not _listed(key)


def role_of(key: str, side: Tensors) -> str | None:
    """The role that a tensor has in a whole model, where its name and shape say one."""
    module, shape = key.rpartition(".")[0], side[key].shape
    if _projects(key, shape):
        return _HEAD
    words = set(concepts(module))
    if len(shape) in (4, 5) and 1 < shape[1] <= 4 < shape[0]:
        return STEM
    if len(shape) >= 2 and not _listed(key) and ("patch" in words or ("first" in words and words & _LAYERS)):
        return _INPUT
    if len(shape) != 2:
        return _HEAD if _is_matrix(shape) and (words & {"head", "lm"} or module in _HEADS) else None
    if "pos" in words:
        return PLACES
    last = set(concepts(module.rpartition(".")[2]))
    if last & {"tok", "embed"} and not last & {"head", "lm", "out"}:
        return _TOKENS
    if words & {"head", "lm"} or {"embed", "out"} <= words or module in _HEADS or module.rpartition(".")[2] == "output_layer":
        return _HEAD
    return _TOKENS if words & {"tok", "embed"} else None
