"""Each operation of transformers on tensors, as ops of ours: the same values, bit for bit, as its own `convert` gives."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from profiles import examples

from ckptsurgeon.adapters.table import run
from ckptsurgeon.errors import RuleError
from ckptsurgeon.models.target import conversion_ops
from ckptsurgeon.models.target.conversion_ops import Conversion, Part, operate

core = pytest.importorskip("transformers.core_model_loading")
pytestmark = pytest.mark.filterwarnings("ignore")

HEADS = 3


class Config(SimpleNamespace):
    """What operations read of a configuration."""

    def get_text_config(self) -> Config:
        """The part for text, which is the whole here."""
        return self


CONFIG = Config(num_attention_heads=HEADS, shards=3, unpadded_vocab_size=5, vision_config=Config(num_attention_heads=2))


class Model:
    """What operations ask of a model."""

    def __init__(self, own: dict[str, tuple[int, ...]]) -> None:
        self.own = own

    def get_parameter(self, key: str) -> torch.Tensor:
        """An empty parameter of the shape that the model has."""
        return torch.empty(self.own[key])


def both(
    operations: list[Any], sources: list[str], targets: list[str], tensors: dict[str, list[torch.Tensor]], own: dict[str, tuple[int, ...]]
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """By key what transformers makes, and what our ops make."""
    converter = core.WeightConverter(sources, targets, operations)
    for pattern, found in tensors.items():
        for number, tensor in enumerate(found):
            converter.add_tensor(next(iter(own)), f"{pattern}{number}", pattern, lambda tensor=tensor: tensor)
    theirs = converter.convert(next(iter(own)), model=Model(own), config=CONFIG)
    theirs = {key: value[0] if isinstance(value, list) else value for key, value in theirs.items()}
    names = {f"{pattern}#{number}": tensor for pattern, found in tensors.items() for number, tensor in enumerate(found)}
    conversion = Conversion(core.__name__, next(iter(own)), tuple(converter.source_patterns), tuple(converter.target_patterns), own, CONFIG)
    given = {
        pattern: [Part((f"{pattern}#{number}",), (), tuple(tensor.shape)) for number, tensor in enumerate(found)]
        for pattern, found in tensors.items()
    }
    ours = {}
    for key, part in operate(operations, given, conversion).items():
        values = [names[name] for name in part.names]
        for op in part.ops:
            values = list(run(op, values, pytest.fail, {}))
        (ours[key],) = values
        assert tuple(ours[key].shape) == part.shape
    return theirs, ours


def check(*arguments: Any) -> None:
    theirs, ours = both(*arguments)
    assert set(theirs) == set(ours)
    for key, value in theirs.items():
        assert torch.equal(ours[key], value), key


sizes = st.integers(1, 4)
quick = settings(max_examples=examples(25), deadline=None, suppress_health_check=list(HealthCheck))


def some(*shape: int) -> torch.Tensor:
    return torch.randn(shape)


@quick
@given(sizes, sizes, st.integers(0, 1), st.integers(2, 4))
def test_chunk(rows: int, columns: int, dim: int, parts: int) -> None:
    shape = [rows, columns]
    shape[dim] *= parts
    targets = [f"m.{number}.w" for number in range(parts)]
    check(
        [core.Chunk(dim=dim)],
        ["m.qkv.w"],
        targets,
        {"m.qkv.w": [some(*shape)]},
        {f"m.{number}.w": (rows, columns) for number in range(parts)},
    )


def test_chunk_into_as_many_as_the_configuration_says() -> None:
    check([core.Chunk(0, "shards")], ["m.w"], ["m.*.w"], {"m.w": [some(6, 2)]}, {"m.0.w": (2, 2)})


@quick
@given(st.lists(sizes, min_size=2, max_size=4), sizes)
def test_split_as_the_model_is_long(rows: list[int], columns: int) -> None:
    own = {f"m.{number}.w": (size, columns) for number, size in enumerate(rows)}
    check([core.Split(dim=0)], ["m.all.w"], list(own), {"m.all.w": [some(sum(rows), columns)]}, own)


@quick
@given(st.lists(sizes, min_size=1, max_size=4), sizes)
def test_concatenate(rows: list[int], columns: int) -> None:
    sources = [f"m.{number}.w" for number in range(len(rows))]
    tensors = {source: [some(size, columns)] for source, size in zip(sources, rows, strict=True)}
    check([core.Concatenate(dim=0)], sources, ["m.all.w"], dict(reversed(tensors.items())), {"m.all.w": (sum(rows), columns)})


@quick
@given(sizes, sizes, st.integers(0, 1), st.booleans())
def test_interleave(rows: int, columns: int, dim: int, inverse: bool) -> None:
    shape = [rows, columns]
    shape[dim] *= 2
    check([core.Interleave(dim, inverse)], ["m.a"], ["m.b"], {"m.a": [some(*shape)]}, {"m.b": tuple(shape)})


@quick
@given(st.integers(1, 5), sizes, sizes)
def test_experts_stacked_and_joined(experts: int, rows: int, columns: int) -> None:
    sources = ["experts.*.w1.weight", "experts.*.w3.weight"]
    tensors = {source: [some(rows, columns) for _ in range(experts)] for source in sources}
    operations = [core.MergeModulelist(dim=0), core.Concatenate(dim=1)]
    check(operations, sources, ["experts.gate_up"], tensors, {"experts.gate_up": (experts, 2 * rows, columns)})
    check(
        [core.MergeModulelist(dim=0)],
        sources[:1],
        ["experts.down"],
        {sources[0]: tensors[sources[0]]},
        {"experts.down": (experts, rows, columns)},
    )


@quick
@given(st.integers(2, 4), sizes, sizes)
def test_a_list_taken_apart(experts: int, rows: int, columns: int) -> None:
    check([core.SplitModulelist(dim=0)], ["m.all"], ["m.*.w"], {"m.all": [some(experts, rows, columns)]}, {"m.0.w": (rows, columns)})


@quick
@given(sizes, sizes, sizes, st.booleans())
def test_transpose(first: int, rows: int, columns: int, checked: bool) -> None:
    for wanted in ((first, rows, columns), (first, columns, rows)):
        check([core.Transpose(1, 2, check_dims=checked)], ["m.a"], ["m.b"], {"m.a": [some(first, rows, columns)]}, {"m.b": wanted})


@quick
@given(sizes, st.booleans(), st.booleans(), sizes)
def test_rotary_rows(half: int, inverse: bool, flat: bool, columns: int) -> None:
    shape = (HEADS * half * 2, columns)[: 1 if flat else 2]
    check([core.PermuteForRope(inverse=inverse)], ["m.wq"], ["m.q"], {"m.wq": [some(*shape)]}, {"m.q": shape})


@quick
@given(sizes, sizes)
def test_rotary_rows_of_some_parts_of_one(half: int, columns: int) -> None:
    rows = 2 * half * 2  # two heads, of the vision part
    targets = ["m.q_proj.weight", "m.k_proj.weight", "m.v_proj.weight"]
    operations = [core.Chunk(dim=0), core.PermuteForRope(subconfig_key="vision_config", permute_layer_names=["q_proj", "k_proj"])]
    own = dict.fromkeys(targets, (rows, columns))
    check(operations, ["m.in_proj_weight"], targets, {"m.in_proj_weight": [some(3 * rows, columns)]}, own)


def test_kernels_as_rows_and_back() -> None:
    check([core.Conv3dToLinear(2, (1, 3, 2))], ["m.a"], ["m.b"], {"m.a": [some(4, 2, 1, 3, 2)]}, {"m.b": (4, 12)})
    check([core.LinearToConv3d(2, (1, 3, 2))], ["m.a"], ["m.b"], {"m.a": [some(4, 12)]}, {"m.b": (4, 2, 1, 3, 2)})


@quick
@given(st.integers(1, 3), sizes, sizes)
def test_experts_of_text_and_vision(share: int, rows: int, columns: int) -> None:
    sources = ["experts.*.gate.weight", "experts.*.up.weight"]
    targets = ["text.gate_up", "vision.gate_up"]
    tensors = {source: [some(rows, columns) for _ in range(2 * share)] for source in sources}
    own = dict.fromkeys(targets, (share, 2 * rows, columns))
    check([core.ErnieFuseAndSplitTextVisionExperts()], sources, targets, tensors, own)


def test_queries_in_another_order() -> None:
    tensors = {"m.q": [some(6, 4)], "m.kv": [some(6, 4)]}
    check([core.Inkling2LoopMergeMessageQueries()], ["m.q", "m.kv"], ["m.query"], tensors, {"m.query": (3, 4, 4)})


def test_a_vocabulary_without_its_padding() -> None:
    for rows in (8, 5):
        check([core.Inkling2UnpadVocab()], ["lm_head"], ["lm_head"], {"lm_head": [some(rows, 3)]}, {"lm_head": (5, 3)})


def test_every_row_of_the_table_is_an_operation_of_the_library() -> None:
    assert [name for name in conversion_ops.TABLE if not hasattr(core, name)] == []


@pytest.mark.parametrize(
    ("operations", "sources", "targets", "tensors", "own"),
    [
        ([core.Chunk(dim=0)], ["a"], ["b", "c"], {"a": [some(5, 2)]}, {"b": (3, 2), "c": (2, 2)}),
        ([core.Chunk(dim=0)], ["a"], ["b", "c"], {"a": [some(4, 2), some(4, 2)]}, {"b": (2, 2), "c": (2, 2)}),
        ([core.Split(dim=0)], ["a"], ["b", "c"], {"a": [some(5, 2)]}, {"b": (2, 2), "c": (2, 2)}),
        ([core.MergeModulelist(dim=0)], ["a"], ["b"], {"a": [some(2, 2), some(3, 2)]}, {"b": (2, 2, 2)}),
        ([core.PermuteForRope()], ["a"], ["b"], {"a": [some(7, 2)]}, {"b": (7, 2)}),
        ([core.Interleave(dim=0)], ["a"], ["b"], {"a": [some(7, 2)]}, {"b": (7, 2)}),
        ([core.Inkling2LoopDequantizeExperts()], ["a", "s"], ["b"], {"a": [some(2, 2)], "s": [some(2, 2)]}, {"b": (2, 2)}),
        ([core._IdentityOp()], ["a"], ["b"], {"a": [some(2, 2)]}, {"b": (2, 2)}),
    ],
)
def test_what_can_not_be_told_is_refused(operations: Any, sources: Any, targets: Any, tensors: Any, own: Any) -> None:
    conversion = Conversion(core.__name__, next(iter(own)), tuple(sources), tuple(targets), own, CONFIG)
    given = {
        pattern: [Part((f"{pattern}#{number}",), (), tuple(tensor.shape)) for number, tensor in enumerate(found)]
        for pattern, found in tensors.items()
    }
    with pytest.raises(RuleError):
        operate(operations, given, conversion)
