"""Translates transformers' operations on a checkpoint's tensors into ops, on names and shapes alone: each has one row in `TABLE`.

Rule: an operation is recognised by its class, which must be transformers' own. An operation without a row, or one that would not do with
these shapes what its row says, is a RuleError: a layout is never guessed.
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
    """A tensor within a conversion: its source tensors' names in order, the ops that make it of them, and its shape."""

    names: tuple[str, ...]
    ops: tuple[Op, ...]
    shape: Shape

    def then(self, op: Op) -> Part:
        """The result of one more op on this part."""
        return Part(self.names, (*self.ops, op), infer_chain([op], [self.shape])[0])


Parts = dict[str, list[Part]]  # the tensors by the pattern that their names matched


@dataclass(frozen=True)
class Conversion:
    """One application of a converter to the tensors of one layer.

    Attributes:
        module: the module of transformers that defines its operations.
        key: the first of the model's keys that the converter gives.
        sources, targets: the converter's patterns.
        own: the model's keys, with their shapes.
        config: the model's configuration.
    """

    module: str
    key: str
    sources: tuple[str, ...]
    targets: tuple[str, ...]
    own: Mapping[str, Shape]
    config: Any

    @property
    def first_shape(self) -> Shape:
        """The shape of the first key in the model."""
        return self.own[self.key]

    def result(self, source: str) -> str:
        """The pattern of a result that was made of one source pattern's tensors: the target's where the converter has one source and one
        target; else the source's, since another operation of the chain joins or splits."""
        if len(self.sources) == len(self.targets) == 1:
            return self.targets[0]
        return source


def operate(operations: Sequence[Any], inputs: Parts, conversion: Conversion) -> dict[str, Part]:
    """The model's keys and tensors that a converter's operations give. RuleError if an operation can't be translated."""
    parts = dict(inputs)
    for operation in operations:
        name = type(operation).__name__
        row = TABLE.get(name) if type(operation).__module__ == conversion.module else None
        if row is None:
            raise RuleError(f"no adapter does what {name} does")
        parts = row(operation, parts, conversion)
    return _named(parts, conversion)


def _named(parts: Parts, conversion: Conversion) -> dict[str, Part]:
    """The results by key. The keys are the first key with each pattern in place of the pattern that it contains."""
    whole = conversion.key.replace("*.", "0.")
    head, _, tail = next((whole.partition(pattern) for pattern in parts if pattern in whole), ("", "", ""))
    return {f"{head}{pattern}{tail}": _only(tensors) for pattern, tensors in parts.items()}


def _only(tensors: Sequence[Part]) -> Part:
    if len(tensors) != 1:
        raise RuleError(f"takes one tensor, not {len(tensors)}")
    return tensors[0]


def _single(parts: Parts) -> Part:
    """The only tensor of the only pattern."""
    if len(parts) != 1:
        raise RuleError(f"takes the tensors of one pattern, not of {len(parts)}")
    return _only(next(iter(parts.values())))


def _stacked(tensors: Sequence[Part], dim: int) -> Part:
    return _joined(tensors, "stack", _dim(dim, tensors[0].shape, True))


def _joined(tensors: Sequence[Part], op: str, dim: int) -> Part:
    """Joins parts that have the same ops, by one more op."""
    first = tensors[0]
    if any((part.ops, len(part.names)) != (first.ops, len(first.names)) for part in tensors):
        raise RuleError("joins tensors that were made by different operations")
    joining = {"op": op, "dim": _dim(dim, first.shape), "of": len(tensors)}
    shape = infer_chain([joining], [part.shape for part in tensors])[0]
    return Part(tuple(name for part in tensors for name in part.names), (*first.ops, joining), shape)


def _dim(dim: int, shape: Shape, stacked: bool = False) -> int:
    return dim + len(shape) + stacked if dim < 0 else dim


def _counted(operation: Any, conversion: Conversion) -> tuple[str, ...]:
    """The targets of a split. A field of the configuration may say how many there are."""
    attribute = getattr(operation, "num_shards_attribute", None)
    if attribute is None:
        return conversion.targets
    number = getattr(conversion.config.get_text_config(), attribute)
    return tuple(conversion.targets[0].replace("*", str(index)) for index in range(number))


def _chunk(operation: Any, parts: Parts, conversion: Conversion) -> Parts:
    part, targets = _single(parts), _counted(operation, conversion)
    dim = _dim(operation.dim, part.shape)
    return {target: [part.then({"op": "chunk", "dim": dim, "index": index, "of": len(targets)})] for index, target in enumerate(targets)}


def _split(operation: Any, parts: Parts, conversion: Conversion) -> Parts:
    part = _single(parts)
    dim, start, slices = _dim(operation.dim, part.shape), 0, {}
    for target in conversion.targets:
        key = conversion.key.replace(conversion.targets[0], target)
        if key not in conversion.own:
            raise RuleError(f"splits by the size of {key}, which the model does not have")
        size = conversion.own[key][dim]
        slices[target] = [part.then({"op": "slice", "dim": dim, "start": start, "stop": start + size})]
        start += size
    if start != part.shape[dim]:
        raise RuleError(f"splits {start} elements of dim {dim}, where the shape is {part.shape}")
    return slices


def _concatenate(operation: Any, parts: Parts, conversion: Conversion) -> Parts:
    if len(conversion.targets) > 1:
        raise RuleError("joins tensors for several targets")
    tensors = [part for source in conversion.sources for part in parts.get(source, ())]
    if not tensors:
        raise RuleError("has no tensors to join")
    return {conversion.targets[0]: [tensors[0] if len(tensors) == 1 else _joined(tensors, "concat", operation.dim)]}


def _interleave(operation: Any, parts: Parts, conversion: Conversion) -> Parts:
    part = _single(parts)
    op = {"op": "interleave" if operation.inverse else "deinterleave", "dim": _dim(operation.dim, part.shape), "parts": 2}
    return {conversion.targets[0]: [part.then(op)]}


def _merge_list(operation: Any, parts: Parts, conversion: Conversion) -> Parts:
    if len(parts) == 1 and len(conversion.targets) > 1:
        raise RuleError("joins tensors for several targets")
    return {conversion.targets[0] if len(parts) == 1 else source: [_stacked(tensors, operation.dim)] for source, tensors in parts.items()}


def _split_list(operation: Any, parts: Parts, conversion: Conversion) -> Parts:
    if len(parts) == 1 and len(conversion.targets) > 1:
        raise RuleError("splits one tensor for several targets")
    slices: Parts = {}
    for source, tensors in parts.items():
        part, pattern = _only(tensors), conversion.targets[0] if len(parts) == 1 else source
        dim = _dim(operation.dim, part.shape)
        for index in range(part.shape[dim]):
            slices[pattern.replace("*", str(index))] = [part.then({"op": "unstack", "dim": dim, "index": index})]
    return slices


def _transpose(operation: Any, parts: Parts, conversion: Conversion) -> Parts:
    part = _single(parts)
    target = conversion.sources[0] if len(conversion.targets) > 1 else conversion.targets[0]
    if operation.check_dims and part.shape == conversion.first_shape:
        return {target: [part]}
    return {target: [part.then({"op": "transpose", "dims": [_dim(dim, part.shape) for dim in (operation.dim0, operation.dim1)]})]}


def _flat(_operation: Any, parts: Parts, conversion: Conversion) -> Parts:
    part = _single(parts)
    if len(part.shape) == 5:
        part = part.then({"op": "reshape", "shape": [part.shape[0], prod(part.shape[1:])]})
    elif len(part.shape) != 2:
        raise RuleError(f"takes a tensor with 5 dims or 2, not of shape {part.shape}")
    return {conversion.result(next(iter(parts))): [part]}


def _kernels(operation: Any, parts: Parts, conversion: Conversion) -> Parts:
    part = _single(parts)
    op = {"op": "reshape", "shape": [part.shape[0], operation.in_channels, *operation.kernel_size]}
    return {conversion.result(next(iter(parts))): [part.then(op)]}


def _rotary(operation: Any, parts: Parts, conversion: Conversion) -> Parts:
    names, config = operation.permute_layer_names, conversion.config
    config = config if operation.subconfig_key is None else getattr(config, operation.subconfig_key, config)
    op = {
        "op": "permute_rope",
        "heads": getattr(config, "num_attention_heads", 1),
        "to": "pairs" if operation.inverse else "halves",
        "dim": 0,
    }
    results: Parts = {}
    for source, tensors in parts.items():
        included = names is None or any(name in source for name in names)
        permuted = included and len(_only(tensors).shape) in (1, 2)  # other tensors stay as they are
        results[conversion.result(source)] = [tensors[0].then(op)] if permuted else tensors
    return results


def _experts(operation: Any, parts: Parts, conversion: Conversion) -> Parts:
    """For each target: its share of every source's tensors is stacked, and the stacks are joined."""
    stacks: Parts = {target: [] for target in conversion.targets}
    for source in conversion.sources:
        if source not in parts:
            raise RuleError(f"needs tensors of {source}, and the file has none")
        size = ceil(len(parts[source]) / len(conversion.targets))
        for index, target in enumerate(conversion.targets):
            share = parts[source][index * size : (index + 1) * size]
            if not share:
                raise RuleError(f"has {len(parts[source])} tensors for {len(conversion.targets)} targets")
            stacks[target].append(_stacked(share, operation.stack_dim))
    return {
        target: [_joined(of_target, "concat", operation.concat_dim) if len(of_target) > 1 else of_target[0]]
        for target, of_target in stacks.items()
    }


def _as_stored(_operation: Any, parts: Parts, conversion: Conversion) -> Parts:
    """Keeps the values as they are. Quantised weights are dequantised elsewhere, by `--dequantize`."""
    if len(parts) != 1:
        raise RuleError("dequantizes a weight")
    return {conversion.targets[0]: [_single(parts)]}


def _queries(operation: Any, parts: Parts, conversion: Conversion) -> Parts:
    if operation.inverse or len(parts) != 2:
        raise RuleError(f"joins two tensors, not {len(parts)}")
    pairs = []
    for source in conversion.sources:
        part = _only(parts[source])
        pairs.append(part.then({"op": "reshape", "shape": [part.shape[0] // 2, 2, *part.shape[1:]]}))
    order: Op = {"op": "rows", "dim": 1, "rows": 4, "runs": [[0, 0, 1], [1, 2, 2], [3, 1, 1]], "fill": "none"}
    return {conversion.targets[0]: [_joined(pairs, "concat", 1).then(order)]}


def _without_padding(operation: Any, parts: Parts, conversion: Conversion) -> Parts:
    part, size = _single(parts), conversion.config.get_text_config().unpadded_vocab_size
    if operation.inverse or size is None:
        raise RuleError("pads a vocabulary")
    return {conversion.targets[0]: [part if part.shape[0] <= size else part.then({"op": "slice", "dim": 0, "start": 0, "stop": size})]}


TABLE: Mapping[str, Callable[[Any, Parts, Conversion], Parts]] = {
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
