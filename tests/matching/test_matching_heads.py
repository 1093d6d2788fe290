"""Attentions whose heads are a dim of their own in the target, and what tells which side is `x @ w`; values are held against torch."""

from __future__ import annotations

import pytest
import torch
from pairs_support import made
from rows_support import ORDERS, Rows, side, sides, sure

from ckptsurgeon.matching.matcher import match
from ckptsurgeon.planning.links import Link
from ckptsurgeon.tensors import TensorMeta

WIDTH, HEADS, KEYS, SIZE, WIDE = 12, 3, 1, 5, 20  # of the model, of queries and keys, of each head, and of the layers between
PARTS = {"q": "query", "k": "key", "v": "value"}


def block(at: int, linear: bool, heads: int = HEADS, size: int = SIZE, bias: bool = False) -> Rows:
    """A layer of an implementation without heads: torch's `linear`, or `x @ w` as GPT-2 has it."""
    head = f"model.layers.{at}"
    shapes = {"q": (heads * size, WIDTH), "k": (KEYS * size, WIDTH), "v": (KEYS * size, WIDTH), "o": (WIDTH, heads * size)}
    rows: Rows = [(f"{head}.input_layernorm.weight", (WIDTH,)), (f"{head}.post_attention_layernorm.weight", (WIDTH,))]
    for name, shape in shapes.items():
        rows.append((f"{head}.self_attn.{name}_proj.weight", shape if linear else shape[::-1]))
        rows += [(f"{head}.self_attn.{name}_proj.bias", shape[:1])] if bias else []
    for name, shape in (("up_proj", (WIDE, WIDTH)), ("down_proj", (WIDTH, WIDE))):
        rows.append((f"{head}.mlp.{name}.weight", shape if linear else shape[::-1]))
    return rows


def lens(at: int, heads: int = HEADS, size: int = SIZE, linear_mlp: bool = False) -> Rows:
    """The same as TransformerLens has it: W_Q is (heads, width, size), W_O is (heads, size, width), W_in is (width, wide)."""
    head = f"blocks.{at}"
    rows: Rows = [(f"{head}.ln1.w", (WIDTH,)), (f"{head}.ln2.w", (WIDTH,))]
    rows += [(f"{head}.attn.W_{name}", (many, WIDTH, size)) for name, many in (("Q", heads), ("K", KEYS), ("V", KEYS))]
    rows += [(f"{head}.attn.W_O", (heads, size, WIDTH))]
    rows += [(f"{head}.attn.b_{name}", (many, size)) for name, many in (("Q", heads), ("K", KEYS), ("V", KEYS))]
    inner = {"W_in": (WIDTH, WIDE), "W_out": (WIDE, WIDTH)}
    return rows + [(f"{head}.mlp.{name}", shape[::-1] if linear_mlp else shape) for name, shape in inner.items()]


def keras(at: int) -> Rows:
    """The same as Flax and Keras have it: a query's kernel is (width, heads, size)."""
    head = f"encoder.layer_{at}"
    rows: Rows = [(f"{head}.ln1.scale", (WIDTH,)), (f"{head}.ln2.scale", (WIDTH,))]
    shapes = {"query": (WIDTH, HEADS, SIZE), "key": (WIDTH, KEYS, SIZE), "value": (WIDTH, KEYS, SIZE), "out": (HEADS, SIZE, WIDTH)}
    rows += [(f"{head}.attention.{name}.kernel", shape) for name, shape in shapes.items()]
    return [*rows, (f"{head}.mlp.up.kernel", (WIDTH, WIDE)), (f"{head}.mlp.down.kernel", (WIDE, WIDTH))]


def value(link: Link, key: str, source: dict[str, TensorMeta], target: dict[str, TensorMeta]) -> tuple[torch.Tensor, torch.Tensor]:
    """A source's values, and what the link makes of them."""
    (name,) = link.sources
    given = torch.arange(source[name].numel).reshape(source[name].shape)
    goal = {key: target[key].shape for key in link.targets}
    return given, made(link, link.op, link.targets.index(key), [given], goal)


@ORDERS
@pytest.mark.parametrize("heads", [HEADS, 4], ids=["other width", "of the model's width"])
@pytest.mark.parametrize("bias", [True, False], ids=["biases", "no biases"])
def test_projections_of_linear_layers_become_those_of_heads(in_order: bool, heads: int, bias: bool) -> None:
    size = WIDTH // heads if heads == 4 else SIZE
    rows = [row for at in range(3) for row in block(at, True, heads, size, bias)], [row for at in range(3) for row in lens(at, heads, size)]
    source, target = sides(*rows, in_order)
    found = {key: link for link in match(source, target).certain for key in link.targets}
    for at in range(3):
        for name in "QKV":
            key, many = f"blocks.{at}.attn.W_{name}", heads if name == "Q" else KEYS
            given, result = value(found[key], key, source, target)
            assert found[key].sources == (f"model.layers.{at}.self_attn.{name.lower()}_proj.weight",)
            assert torch.equal(result, given.reshape(many, size, WIDTH).permute(0, 2, 1))
            if bias:
                given, result = value(found[f"blocks.{at}.attn.b_{name}"], f"blocks.{at}.attn.b_{name}", source, target)
                assert torch.equal(result, given.reshape(many, size))
        key = f"blocks.{at}.attn.W_O"
        given, result = value(found[key], key, source, target)
        assert torch.equal(result, given.T.reshape(heads, size, WIDTH))
        for name, part in (("W_in", "up_proj"), ("W_out", "down_proj")):
            link = found[f"blocks.{at}.mlp.{name}"]
            assert link.sources == (f"model.layers.{at}.mlp.{part}.weight",) and link.op == "transpose"


@ORDERS
def test_projections_that_are_x_at_w_become_those_of_heads_unturned(in_order: bool) -> None:
    source, target = sides(
        [row for at in range(3) for row in block(at, linear=False)], [row for at in range(3) for row in lens(at)], in_order
    )
    found = {key: link for link in match(source, target).certain for key in link.targets}
    given, result = value(found["blocks.1.attn.W_Q"], "blocks.1.attn.W_Q", source, target)
    assert torch.equal(result, given.reshape(WIDTH, HEADS, SIZE).permute(1, 0, 2))
    given, result = value(found["blocks.1.attn.W_O"], "blocks.1.attn.W_O", source, target)
    assert torch.equal(result, given.reshape(HEADS, SIZE, WIDTH))
    assert found["blocks.1.mlp.W_in"].op == ""


@ORDERS
def test_the_other_layers_of_a_model_with_heads_may_be_linear(in_order: bool) -> None:
    """As the experts of TransformerLens are."""
    rows = [row for at in range(3) for row in block(at, True)], [row for at in range(3) for row in lens(at, linear_mlp=True)]
    source, target = sides(*rows, in_order)
    found = {key: link for link in match(source, target).certain for key in link.targets}
    given, result = value(found["blocks.1.attn.W_Q"], "blocks.1.attn.W_Q", source, target)
    assert torch.equal(result, given.reshape(HEADS, SIZE, WIDTH).permute(0, 2, 1))
    assert found["blocks.1.mlp.W_in"].op == "" and found["blocks.1.mlp.W_in"].sources == ("model.layers.1.mlp.up_proj.weight",)


@ORDERS
def test_kernels_with_heads_are_made_of_linear_layers(in_order: bool) -> None:
    source, target = sides([row for at in range(3) for row in block(at, True)], [row for at in range(3) for row in keras(at)], in_order)
    found = {key: link for link in match(source, target).certain for key in link.targets}
    for name, many in (("query", HEADS), ("key", KEYS), ("value", KEYS)):
        key = f"encoder.layer_1.attention.{name}.kernel"
        given, result = value(found[key], key, source, target)
        assert torch.equal(result, given.T.reshape(WIDTH, many, SIZE))


@ORDERS
def test_square_projections_of_which_nothing_tells_the_side_are_not_certain(in_order: bool) -> None:
    """Where no other layer tells whether a side is `x @ w`, a square matrix fits both ways."""
    source: Rows = [(f"layers.{at}.attn.{name}.weight", (WIDTH, WIDTH)) for at in range(3) for name in ("q", "k", "v", "o")]
    target: Rows = [(f"blocks.{at}.attn.W_{name}", (4, WIDTH, 3)) for at in range(3) for name in "QKV"]
    target += [(f"blocks.{at}.attn.W_O", (4, 3, WIDTH)) for at in range(3)]
    assert not match(*sides(source, target, in_order)).certain


@ORDERS
def test_a_fused_projection_is_cut_into_those_of_heads(in_order: bool) -> None:
    size = WIDTH // 4
    source: Rows = []
    target: Rows = []
    for at in range(3):
        source += [
            (f"h.{at}.ln_1.weight", (WIDTH,)),
            (f"h.{at}.attn.c_attn.weight", (WIDTH, 3 * WIDTH)),
            (f"h.{at}.attn.c_attn.bias", (3 * WIDTH,)),
        ]
        source += [(f"h.{at}.mlp.c_fc.weight", (WIDTH, WIDE)), (f"h.{at}.mlp.c_fc.bias", (WIDE,))]
        target += [(f"blocks.{at}.ln1.w", (WIDTH,)), *((f"blocks.{at}.attn.W_{name}", (4, WIDTH, size)) for name in "QKV")]
        target += [(f"blocks.{at}.attn.b_{name}", (4, size)) for name in "QKV"]
        target += [(f"blocks.{at}.mlp.W_in", (WIDTH, WIDE)), (f"blocks.{at}.mlp.b_in", (WIDE,))]
    here, there = sides(source, target, in_order)
    found = {key: link for link in match(here, there).links if link.clear for key in link.targets}
    for part, name in enumerate("QKV"):
        given, result = value(found[f"blocks.1.attn.W_{name}"], f"blocks.1.attn.W_{name}", here, there)
        assert torch.equal(result, given.chunk(3, 1)[part].reshape(WIDTH, 4, size).permute(1, 0, 2))
        given, result = value(found[f"blocks.1.attn.b_{name}"], f"blocks.1.attn.b_{name}", here, there)
        assert torch.equal(result, given.chunk(3)[part].reshape(4, size))


@ORDERS
@pytest.mark.parametrize(
    "names", [("wi", "wo"), ("up_proj", "down_proj"), ("fc1", "fc2"), ("linear1", "linear2")], ids=lambda pair: pair[0]
)
def test_what_layers_are_for_tells_which_side_is_turned(names: tuple[str, str], in_order: bool) -> None:
    """Without biases both matrices fit the other's place as they are."""
    shapes = (WIDE, WIDTH), (WIDTH, WIDE)
    source: Rows = [(f"block.{at}.norm.weight", (WIDTH,)) for at in range(3)]
    target: Rows = [(f"blocks.{at}.ln.w", (WIDTH,)) for at in range(3)]
    source += [(f"block.{at}.mlp.{name}.weight", shape) for at in range(3) for name, shape in zip(names, shapes, strict=True)]
    target += [(f"blocks.{at}.mlp.{name}", shape[::-1]) for at in range(3) for name, shape in zip(("W_in", "W_out"), shapes, strict=True)]
    found = {key: link for link in match(*sides(source, target, in_order)).certain for key in link.targets}
    for name, other in zip(("W_in", "W_out"), names, strict=True):
        assert found[f"blocks.2.mlp.{name}"].sources == (f"block.2.mlp.{other}.weight",)
        assert found[f"blocks.2.mlp.{name}"].op == "transpose"


def test_the_gates_of_a_cell_are_no_layers() -> None:
    """`W_in` beside `W_ir` and `W_iz` is the new gate's matrix."""
    names = [f"{kind}_{side}{gate}" for kind in ("W", "b") for side in "ih" for gate in "rzn"]
    rows: Rows = [(f"cell.{name}", (8, 8) if name[0] == "W" else (8,)) for name in names]
    renamed: Rows = [(f"rnn.cell.{name}", shape) for name, shape in rows]
    assert sure(match(side(rows), side(renamed))) == {new: old for (old, _), (new, _) in zip(rows, renamed, strict=True)}


@ORDERS
def test_a_layer_that_has_a_bias_on_one_side_alone_is_found_by_its_name(in_order: bool) -> None:
    source: Rows = [(f"layers.{at}.attn.{name}_proj.weight", (8, 8)) for at in range(3) for name in "qkvo"]
    source += [(f"layers.{at}.norm.weight", (8,)) for at in range(3)]
    target: Rows = [(f"h.{at}.attention.{name}.weight", (8, 8)) for at in range(3) for name in ("query", "key", "value", "output")]
    target += [(f"h.{at}.attention.{name}.bias", (8,)) for at in range(3) for name in ("query", "key", "value")]
    target += [(f"h.{at}.ln.weight", (8,)) for at in range(3)]
    found = sure(match(*sides(source, target, in_order)))
    for name, part in (("query", "q"), ("key", "k"), ("value", "v"), ("output", "o")):
        assert found[f"h.1.attention.{name}.weight"] == f"layers.1.attn.{part}_proj.weight"
    assert "h.1.attention.query.bias" not in found


@ORDERS
def test_layers_that_are_counted_from_0_are_not_taken_for_the_second(in_order: bool) -> None:
    """`linear_1` is the second where `linear_0` stands beside it: nothing is turned."""
    shapes = {"up_proj": (WIDE, WIDTH), "down_proj": (WIDTH, WIDE)}
    source: Rows = [(f"blocks.{at}.ffn.{name}.weight", shape) for at in range(3) for name, shape in shapes.items()]
    target: Rows = [(f"layer_{at}.ffn.linear_{n}.weight", shape) for at in range(3) for n, shape in enumerate(shapes.values())]
    source += [(f"blocks.{at}.norm.weight", (WIDTH,)) for at in range(3)]
    target += [(f"layer_{at}.ffn.layer_norm.gamma", (WIDTH,)) for at in range(3)]
    found = {key: link for link in match(*sides(source, target, in_order)).certain for key in link.targets}
    assert {link.op for link in found.values()} == {""}
    assert found["layer_1.ffn.linear_1.weight"].sources == ("blocks.1.ffn.down_proj.weight",)


@ORDERS
def test_a_fused_kernel_over_one_place_is_turned_before_it_is_cut(in_order: bool) -> None:
    """As in OpenAI's files of GPT-2: (1, in, out), beside kernels that are told to be turned."""
    source: Rows = []
    target: Rows = []
    for at in range(3):
        kernels = {"attn.c_attn": 3 * WIDTH, "attn.c_proj": WIDTH, "mlp.c_fc": WIDE}
        source += [row for name, out in kernels.items() for row in ((f"h{at}.{name}.w", (1, WIDTH, out)), (f"h{at}.{name}.b", (out,)))]
        layers = {"att.q": WIDTH, "att.k": WIDTH, "att.v": WIDTH, "att.out_proj": WIDTH, "ff.0": WIDE}
        target += [
            row
            for name, out in layers.items()
            for row in ((f"blocks.{at}.{name}.weight", (out, WIDTH)), (f"blocks.{at}.{name}.bias", (out,)))
        ]
    here, there = sides(source, target, in_order)
    found = {key: link for link in match(here, there).links if link.clear for key in link.targets}
    given, result = value(found["blocks.1.att.k.weight"], "blocks.1.att.k.weight", here, there)
    assert torch.equal(result, given[0].T.chunk(3)[1])
