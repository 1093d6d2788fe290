"""The parts of matching, each against something that is not it: brute force, torch's own results, plain counting."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pairs_support import meta

from ckptsurgeon.matching.choose import assign, margins
from ckptsurgeon.matching.evidence.vocabulary import concepts, conflict, gated
from ckptsurgeon.matching.matcher import has_order, match
from ckptsurgeon.matching.module_tree import Node, both, fold

tables = st.integers(1, 5).flatmap(
    lambda columns: st.lists(st.lists(st.integers(-5, 5).map(float), min_size=columns, max_size=columns), min_size=1, max_size=5)
)


def best_sum(scores: list[list[float]]) -> float:
    rows, columns = len(scores), len(scores[0])
    if rows <= columns:
        return max(sum(scores[row][column] for row, column in enumerate(some)) for some in itertools.permutations(range(columns), rows))
    return max(sum(scores[row][column] for column, row in enumerate(some)) for some in itertools.permutations(range(rows), columns))


@given(tables)
def test_an_assignment_is_the_best_of_all(scores: list[list[float]]) -> None:
    pairs = assign(scores)
    assert len(pairs) == min(len(scores), len(scores[0]))
    assert len({row for row, _ in pairs}) == len({column for _, column in pairs}) == len(pairs)
    assert sum(scores[row][column] for row, column in pairs) == best_sum(scores)


@given(tables)
def test_a_margin_is_never_less_than_what_the_next_assignment_loses(scores: list[list[float]]) -> None:
    pairs = assign(scores)
    best = best_sum(scores)
    for (row, column), (margin, _) in zip(pairs, margins(scores, pairs), strict=True):
        without = [[value if (r, c) != (row, column) else -1000.0 for c, value in enumerate(values)] for r, values in enumerate(scores)]
        assert margin >= best - best_sum(without) or best_sum(without) < -500
        assert margin >= 0


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("encoder.layer.0.attention.self.query", "blocks.0.attn.q"),
        ("h.3.ln_1", "layers.3.norm1"),
        ("wte", "tok"),
        ("layer1.0.downsample", "layer1.0.shortcut"),
        ("cls_token", "class_embedding"),
        ("lm_head", "output_projection"),
        ("layerScale1", "ls1"),
        ("feed_forward", "mlp"),
        ("class_embedding", "label_emb"),
        ("ffn_gate_inp_shexp", "shared_expert_gate"),
        ("fc1_g", "gate_proj"),
        ("w_qs", "q_proj"),
        ("sa_kcontent_proj", "self_attn_key_content_proj"),
        ("w2v_model", "wav2vec2"),
    ],
)
def test_words_that_mean_the_same(one: str, other: str) -> None:
    assert set(concepts(one)) & set(concepts(other)) - {word for word in concepts(one) if word.startswith("#")}


def test_words_that_exclude_each_other() -> None:
    for one, other in (("q_proj", "key"), ("visual", "text_model"), ("self_attn", "cross_attn"), ("encoder", "decoder")):
        assert conflict(frozenset(concepts(one)), frozenset(concepts(other)))
    assert not conflict(frozenset(concepts("blocks.0.q")), frozenset(concepts("layer.0.query")))
    assert gated(["w1", "w2", "w3"]) == {"w1": "gate", "w2": "down", "w3": "up"}
    assert gated(["w1", "w2"]) == {}


class Layer(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = torch.nn.MultiheadAttention(8, 2)
        self.norm = torch.nn.BatchNorm1d(8)
        self.gamma = torch.nn.Parameter(torch.ones(8))
        self.rnn = torch.nn.LSTM(8, 8)
        self.conv = torch.nn.utils.parametrizations.weight_norm(torch.nn.Conv1d(8, 8, 3))


def tree(module: torch.nn.Module) -> Node:
    tensors = [meta(key, tuple(value.shape), str(value.dtype)) for key, value in module.state_dict().items()]
    return both(tensors, tensors)[0]


def test_units_of_a_real_module() -> None:
    units = {unit.path: sorted(unit.tensors) for unit in tree(Layer()).units()}
    assert units["attn.in_proj"] == ["bias", "weight"]
    assert units["attn.out_proj"] == ["bias", "weight"]
    assert units["norm"] == ["bias", "num_batches_tracked", "running_mean", "running_var", "weight"]
    assert units["gamma"] == ["param"]
    assert units["rnn.ih_l0"] == units["rnn.hh_l0"] == ["bias", "weight"]
    assert units["conv"] == ["bias"]  # the factors of its weight are one weight before there is a tree: test_matching_factors


def test_a_tree_has_every_tensor_once_and_sizes_add_up() -> None:
    module = Layer()
    root = tree(module)
    names = [tensor.name for unit in root.units() for tensor in unit.tensors.values()]
    assert sorted(names) == sorted(module.state_dict())
    floats = sum(value.numel() for value in module.state_dict().values() if value.is_floating_point())
    assert root.size == floats == sum(unit.size for unit in root.units())
    assert fold("a.10.b2") == "a.{}.b{}"


def test_the_order_of_keys_is_a_models_or_is_not() -> None:
    keys = list(Layer().state_dict())
    assert has_order({key: meta(key, ()) for key in keys})
    assert not has_order({key: meta(key, ()) for key in sorted(keys)})
    assert not has_order({key: meta(key, ()) for key in [*keys[3:], *keys[:3]][::2] + keys[1::2] + keys[:1]})


def test_weight_norm_before_and_after_parametrizations() -> None:
    old = [meta("conv.weight_g", (8, 1, 1)), meta("conv.weight_v", (8, 8, 3)), meta("conv.bias", (8,))]
    new = [meta(key, tuple(value.shape)) for key, value in Layer().state_dict().items() if key.startswith("conv.")]
    found = match({tensor.name: tensor for tensor in old}, {tensor.name: tensor for tensor in new})
    assert {link.targets: link.sources for link in found.certain} == {
        ("conv.parametrizations.weight.original0",): ("conv.weight_g",),
        ("conv.parametrizations.weight.original1",): ("conv.weight_v",),
        ("conv.bias",): ("conv.bias",),
    }
