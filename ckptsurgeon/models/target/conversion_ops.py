"""transformers' operations on a checkpoint's tensors as ops of ours, worked out on names and shapes: one row of `TABLE` for each.

Rule: an operation is told by its class, which must be transformers' own. One that has no row, or that would do something else with the
shapes at hand than its row says, is a RuleError: a layout is never guessed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil, prod
from typing import Any

from ckptsurgeon.adapters.chain import infer_chain
from ckptsurgeon.adapters.op import Op
from ckptsurgeon.errors import RuleError
from ckptsurgeon.loading import Shape


@dataclass(frozen=True)
class Part:
    """A tensor on its way: what is made of the tensors of these names, in order, by these ops, and its shape."""

    names: tuple[str, ...]
    ops: tuple[Op, ...]
    shape: Shape

    def then(self, op: Op) -> Part:
        """This, after one more op."""
        return Part(self.names, (*self.ops, op), infer_chain([op], [self.shape])[0])


Parts = dict[str, list[Part]]  # by pattern


@dataclass(frozen=True)
class Layer:
    """Where a converter is at work.

    Attributes:
        home: the module that transformers' own operations are classes of.
        key: the first key of the model that comes of it.
        sources, targets: its patterns.
        own: the model's keys, with their shapes.
        config: the model's configuration.
    """

    home: str
    key: str
    sources: tuple[str, ...]
    targets: tuple[str, ...]
    own: Mapping[str, Shape]
    config: Any

    @property
    def wanted(self) -> Shape:
        """The shape of the first key."""
        return self.own[self.key]

    def result(self, source: str) -> str:
        """Where what came by one source pattern stands after an operation that neither joins nor cuts: under its target, or, in a chain
        that joins or cuts elsewhere, under the same pattern."""
        if len(self.sources) == len(self.targets) == 1:
            return self.targets[0]
        return source


def operate(operations: Sequence[Any], given: Parts, layer: Layer) -> dict[str, Part]:
    """The model's keys that come of a converter's operations. RuleError where it can't be told."""
    parts = {pattern: given[pattern] for pattern in given}
    for operation in operations:
        name = type(operation).__name__
        row = TABLE.get(name) if type(operation).__module__ == layer.home else None
        if row is None:
            raise RuleError(f"{name} is no adapter here")
        parts = row(operation, parts, layer)
    return _named(parts, layer)


def _named(parts: Parts, layer: Layer) -> dict[str, Part]:
    """The results under their keys: where one of their patterns stands in the first key, each pattern's result gets its own."""
    whole = layer.key.replace("*.", "0.")
    head, _, tail = next((whole.partition(pattern) for pattern in parts if pattern in whole), ("", "", ""))
    return {f"{head}{pattern}{tail}": _only(found) for pattern, found in parts.items()}


def _only(found: Sequence[Part]) -> Part:
    if len(found) != 1:
        raise RuleError(f"takes one tensor, and {len(found)} are there")
    return found[0]


def _single(parts: Parts) -> Part:
    """The only tensor of the only pattern."""
    if len(parts) != 1:
        raise RuleError(f"takes one pattern, and tensors of {len(parts)} are there")
    return _only(next(iter(parts.values())))


def _stacked(found: Sequence[Part], dim: int) -> Part:
    """Parts that were made alike, as one with a dim more."""
    return _joined(found, "stack", _dim(dim, found[0].shape, True))


def _joined(found: Sequence[Part], op: str, dim: int) -> Part:
    """Parts that were made alike, as one."""
    first = found[0]
    if any((part.ops, len(part.names)) != (first.ops, len(first.names)) for part in found):
        raise RuleError("joins tensors of which each is made in its own way")
    after = {"op": op, "dim": _dim(dim, first.shape), "of": len(found)}
    shape = infer_chain([after], [part.shape for part in found])[0]
    return Part(tuple(name for part in found for name in part.names), (*first.ops, after), shape)


def _dim(dim: int, shape: Shape, more: bool = False) -> int:
    return dim + len(shape) + more if dim < 0 else dim


def _counted(operation: Any, layer: Layer) -> tuple[str, ...]:
    """The targets of a cut, of which a field of the configuration may say how many there are."""
    attribute = getattr(operation, "num_shards_attribute", None)
    if attribute is None:
        return layer.targets
    number = getattr(layer.config.get_text_config(), attribute)
    return tuple(layer.targets[0].replace("*", str(index)) for index in range(number))


def _chunk(operation: Any, parts: Parts, layer: Layer) -> Parts:
    part, targets = _single(parts), _counted(operation, layer)
    dim = _dim(operation.dim, part.shape)
    return {target: [part.then({"op": "chunk", "dim": dim, "index": index, "of": len(targets)})] for index, target in enumerate(targets)}


def _split(operation: Any, parts: Parts, layer: Layer) -> Parts:
    part = _single(parts)
    dim, start, found = _dim(operation.dim, part.shape), 0, {}
    for target in layer.targets:
        key = layer.key.replace(layer.targets[0], target)
        if key not in layer.own:
            raise RuleError(f"cuts as the model's {key} is long, which the model has not")
        size = layer.own[key][dim]
        found[target] = [part.then({"op": "slice", "dim": dim, "start": start, "stop": start + size})]
        start += size
    if start != part.shape[dim]:
        raise RuleError(f"cuts {start} of dim {dim} of {part.shape}")
    return found


def _concatenate(operation: Any, parts: Parts, layer: Layer) -> Parts:
    if len(layer.targets) > 1:
        raise RuleError("joins for several targets")
    found = [part for source in layer.sources for part in parts.get(source, ())]
    if not found:
        raise RuleError("joins nothing")
    return {layer.targets[0]: [found[0] if len(found) == 1 else _joined(found, "concat", operation.dim)]}


def _interleave(operation: Any, parts: Parts, layer: Layer) -> Parts:
    part = _single(parts)
    op = {"op": "interleave" if operation.inverse else "deinterleave", "dim": _dim(operation.dim, part.shape), "parts": 2}
    return {layer.targets[0]: [part.then(op)]}


def _merge_list(operation: Any, parts: Parts, layer: Layer) -> Parts:
    if len(parts) == 1 and len(layer.targets) > 1:
        raise RuleError("joins for several targets")
    return {layer.targets[0] if len(parts) == 1 else source: [_stacked(found, operation.dim)] for source, found in parts.items()}


def _split_list(operation: Any, parts: Parts, layer: Layer) -> Parts:
    if len(parts) == 1 and len(layer.targets) > 1:
        raise RuleError("takes one tensor apart for several targets")
    found: Parts = {}
    for source, one in parts.items():
        part, pattern = _only(one), layer.targets[0] if len(parts) == 1 else source
        dim = _dim(operation.dim, part.shape)
        for index in range(part.shape[dim]):
            found[pattern.replace("*", str(index))] = [part.then({"op": "unstack", "dim": dim, "index": index})]
    return found


def _transpose(operation: Any, parts: Parts, layer: Layer) -> Parts:
    part = _single(parts)
    target = layer.sources[0] if len(layer.targets) > 1 else layer.targets[0]
    if operation.check_dims and part.shape == layer.wanted:
        return {target: [part]}
    return {target: [part.then({"op": "transpose", "dims": [_dim(dim, part.shape) for dim in (operation.dim0, operation.dim1)]})]}


def _flat(_operation: Any, parts: Parts, layer: Layer) -> Parts:
    part = _single(parts)
    if len(part.shape) == 5:
        part = part.then({"op": "reshape", "shape": [part.shape[0], prod(part.shape[1:])]})
    elif len(part.shape) != 2:
        raise RuleError(f"takes 5 dims or 2, not {part.shape}")
    return {layer.result(next(iter(parts))): [part]}


def _kernels(operation: Any, parts: Parts, layer: Layer) -> Parts:
    part = _single(parts)
    op = {"op": "reshape", "shape": [part.shape[0], operation.in_channels, *operation.kernel_size]}
    return {layer.result(next(iter(parts))): [part.then(op)]}


def _rotary(operation: Any, parts: Parts, layer: Layer) -> Parts:
    named, config = operation.permute_layer_names, layer.config
    config = config if operation.subconfig_key is None else getattr(config, operation.subconfig_key, config)
    op = {
        "op": "permute_rope",
        "heads": getattr(config, "num_attention_heads", 1),
        "to": "pairs" if operation.inverse else "halves",
        "dim": 0,
    }
    found: Parts = {}
    for source, one in parts.items():
        asked = named is None or any(name in source for name in named)
        turned = asked and len(_only(one).shape) in (1, 2)  # others are left as they are
        found[layer.result(source)] = [one[0].then(op)] if turned else one
    return found


def _experts(operation: Any, parts: Parts, layer: Layer) -> Parts:
    """Each target gets its share of every list, stacked, one list's after the other's."""
    found: Parts = {target: [] for target in layer.targets}
    for source in layer.sources:
        if source not in parts:
            raise RuleError(f"needs {source}, which is not there")
        size = ceil(len(parts[source]) / len(layer.targets))
        for index, target in enumerate(layer.targets):
            share = parts[source][index * size : (index + 1) * size]
            if not share:
                raise RuleError(f"has {len(parts[source])} tensors for {len(layer.targets)} targets")
            found[target].append(_stacked(share, operation.stack_dim))
    return {target: [_joined(lists, "concat", operation.concat_dim) if len(lists) > 1 else lists[0]] for target, lists in found.items()}


def _as_stored(_operation: Any, parts: Parts, layer: Layer) -> Parts:
    """Values as they are; codes are made values of elsewhere."""
    if len(parts) != 1:
        raise RuleError("makes values of codes")
    return {layer.targets[0]: [_single(parts)]}


def _queries(operation: Any, parts: Parts, layer: Layer) -> Parts:
    if operation.inverse or len(parts) != 2:
        raise RuleError(f"joins two tensors, and {len(parts)} are there")
    pairs = []
    for source in layer.sources:
        part = _only(parts[source])
        pairs.append(part.then({"op": "reshape", "shape": [part.shape[0] // 2, 2, *part.shape[1:]]}))
    order: Op = {"op": "rows", "dim": 1, "rows": 4, "runs": [[0, 0, 1], [1, 2, 2], [3, 1, 1]], "fill": "none"}
    return {layer.targets[0]: [_joined(pairs, "concat", 1).then(order)]}


def _without_padding(operation: Any, parts: Parts, layer: Layer) -> Parts:
    part, size = _single(parts), layer.config.get_text_config().unpadded_vocab_size
    if operation.inverse or size is None:
        raise RuleError("fills a vocabulary up")
    return {layer.targets[0]: [part if part.shape[0] <= size else part.then({"op": "slice", "dim": 0, "start": 0, "stop": size})]}


TABLE: Mapping[str, Callable[[Any, Parts, Layer], Parts]] = {
    "Chunk": _chunk,
    "Split": _split,
    "Concatenate": _concatenate,
    "Interleave": _interleave,
    "MergeModulelist": _merge_list,
    "SplitModulelist": _split_list,
    "Transpose": _transpose,
    "Conv3dToLinear": _flat,
    "LinearToConv3d": _kernels,
    "PermuteForRope": _rotary,
    "ErnieFuseAndSplitTextVisionExperts": _experts,
    "Inkling2LoopDequantizeExperts": _as_stored,
    "Inkling2LoopMergeMessageQueries": _queries,
    "Inkling2UnpadVocab": _without_padding,
}
