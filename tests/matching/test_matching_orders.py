"""Parts of one tensor in another order: doubted where two names say so, and in a recurrent cell that two implementations name."""

from __future__ import annotations

import pytest
import torch
from test_matching_layouts import ORDERS, Shapes, links, made

from ckptsurgeon.planning.links import Link


def layer(name: str, rows: int, width: int) -> Shapes:
    """A linear layer's tensors."""
    return {f"{name}.weight": (rows, width), f"{name}.bias": (rows,)}


def block(name: str, rows: int = 24, width: int = 8, head: str = "blocks") -> Shapes:
    """Two blocks with a fused layer of some name in each."""
    return {
        key: shape
        for at in range(2)
        for own, size, takes in ((f"attn.{name}", rows, width), ("attn.proj", width, width), ("fc1", 40, width), ("fc2", width, 40))
        for key, shape in layer(f"{head}.{at}.{own}", size, takes).items()
    }


def ways(link: Link, tensors: dict[str, torch.Tensor], goal: Shapes, key: str) -> list[torch.Tensor]:
    """What each layout that needs no number makes of a key."""
    return [made(link, at, tensors, goal)[key] for at, choice in enumerate(link.choices) if "heads" not in choice.op]


@pytest.mark.parametrize("in_order", ORDERS)
@pytest.mark.parametrize(
    ("name", "goal_name", "order", "rows"),
    [
        ("kqv", "qkv", (1, 0, 2), 24),
        ("to_kqv", "to_qkv", (1, 0, 2), 24),
        ("qvk", "qkv", (0, 2, 1), 24),
        ("qkv", "kvq", (1, 2, 0), 24),
        ("c_attn", "kqv", (1, 0, 2), 24),
        ("kqv", "in_proj", (1, 0, 2), 24),
        ("kqv.linear", "qkv.linear", (1, 0, 2), 24),
        ("key_query_value", "query_key_value", (1, 0, 2), 24),
        ("kv", "vk", (1, 0), 16),
        ("up_gate", "gate_up", (1, 0), 24),
        ("scale_shift", "shift_scale", (1, 0), 16),
        ("adaLN_scale_shift", "norm.shift_scale", (1, 0), 16),
        ("mu_logvar", "logvar_mu", (1, 0), 10),
        ("xywh", "yxhw", (1, 0, 3, 2), 12),
        ("real_imag", "imag_real", (1, 0), 6),
    ],
)
def test_two_names_that_say_the_parts_in_two_orders(name: str, goal_name: str, order: tuple[int, ...], rows: int, in_order: bool) -> None:
    """Between files of otherwise equal names too: certain as it stands, `kqv` went into `qkv`."""
    source, goal = block(name, rows), block(goal_name, rows)
    found = links(source, goal, in_order)
    tensors = {key: torch.randn(shape) for key, shape in source.items()}
    for end in ("weight", "bias"):
        key = f"blocks.1.attn.{goal_name}.{end}"
        link = found[key]
        assert link.clear and link.doubt == "layout"
        parts = tensors[link.sources[0]].chunk(len(order))
        as_is, changed, *_ = ways(link, tensors, goal, key)
        assert torch.equal(as_is, torch.cat(parts)) and torch.equal(changed, torch.cat([parts[at] for at in order]))
    assert {key for key, link in found.items() if link.doubt} == {key for key in goal if goal_name in key}


@pytest.mark.parametrize("in_order", ORDERS)
def test_unequal_parts_change_places(in_order: bool) -> None:
    """Sixteen queries and four keys and values each."""
    source, goal = block("kqv", 24, 16), block("qkv", 24, 16)
    for end in ("weight", "bias"):
        link = links(source, goal, in_order)[f"blocks.0.attn.qkv.{end}"]
        whole = torch.randn(source[link.sources[0]])
        k, q, v = whole.split([4, 16, 4])
        assert torch.equal(made(link, 1, {link.sources[0]: whole}, goal)[link.targets[0]], torch.cat([q, k, v]))


def test_parts_along_what_a_layer_takes_in_and_a_bare_table() -> None:
    rest = layer("fc", 4, 8)
    source, goal = ({f"{name}_conv.weight": (8, 3, 5, 5), f"{name}_conv.bias": (8,), **rest} for name in ("rgb", "bgr"))
    found = links(source, goal)
    kernel = torch.randn(8, 3, 5, 5)
    got = ways(found["bgr_conv.weight"], {"rgb_conv.weight": kernel}, goal, "bgr_conv.weight")
    assert torch.equal(got[1], kernel.flip(1)) and found["bgr_conv.bias"].certain
    link = links({"cos_sin": (10, 4), **rest}, {"sin_cos": (10, 4), **rest})["sin_cos"]
    table = torch.randn(10, 4)
    got = ways(link, {"cos_sin": table}, {"sin_cos": (10, 4)}, "sin_cos")
    assert link.doubt and any(torch.equal(one, table.roll(2, 1)) for one in got)


def test_one_number_has_no_parts() -> None:
    found = links({"kqv_scale": (), **layer("fc", 4, 8)}, {"qkv_scale": (), **layer("fc", 4, 8)})
    assert not any(link.doubt for link in found.values())


@pytest.mark.parametrize(
    ("name", "goal_name"), [("norm_attn", "attn_norm"), ("proj_out", "out_proj"), ("conv_in", "in_conv"), ("q_norm", "norm_q")]
)
def test_words_for_a_kind_of_layer_are_no_parts(name: str, goal_name: str) -> None:
    found = links(block(name), block(goal_name))
    assert not any(link.doubt for link in found.values()) and len(found) == len(block(name))


@pytest.mark.parametrize("joins", [False, True])
def test_a_fused_name_says_the_order_of_what_is_cut_or_joined(joins: bool) -> None:
    fused, parted = block("kqv"), block("proj")
    parted |= {key: shape for at in range(2) for part in "qkv" for key, shape in layer(f"blocks.{at}.attn.{part}", 8, 8).items()}
    whole = torch.randn(24, 8)
    k, q, v = whole.chunk(3)
    parts = {f"blocks.1.attn.{name}.weight": part for name, part in (("q", q), ("k", k), ("v", v))}
    key = "blocks.1.attn.kqv.weight"
    if joins:
        link = links(parted, fused)[key]
        assert any(torch.equal(way, whole) for way in ways(link, parts, fused, key))
    else:
        link = links(fused, parted)["blocks.1.attn.q.weight"]
        for name, part in parts.items():
            assert any(torch.equal(way, part) for way in ways(link, {key: whole}, parted, name)[1:])


@pytest.mark.parametrize("in_order", ORDERS)
@pytest.mark.parametrize("equal_names", [False, True])
@pytest.mark.parametrize(("gates", "order"), [(4, (0, 1, 3, 2)), (3, (1, 0, 2))], ids=["LSTM", "GRU"])
@pytest.mark.parametrize("back", [False, True])
def test_the_fused_gates_of_a_cell(gates: int, order: tuple[int, ...], equal_names: bool, back: bool, in_order: bool) -> None:
    """char-rnn's i, f, o, g and Keras's z, r, n, against torch's i, f, g, o and r, z, n. Both weights and biases are one doubt."""
    rows, rest = 5 * gates, {**layer("fc1", 9, 7), **layer("fc2", 9, 9), **layer("fc3", 2, 9)}
    own = {**layer("i2h", rows, 3), **layer("h2h", rows, 5), **rest}
    torchs = {f"rnn.{end}_{side}_l0": own[f"{name}.{end}"] for side, name in (("ih", "i2h"), ("hh", "h2h")) for end in ("weight", "bias")}
    torchs |= rest if equal_names else {key.replace("fc", "dense"): shape for key, shape in rest.items()}
    source, goal = (torchs, own) if back else (own, torchs)
    found = links(source, goal, in_order)
    doubted = {key: link for key, link in found.items() if link.doubt}
    assert len(doubted) == 4 and len({len(link.choices) for link in doubted.values()}) == 1
    for key, link in doubted.items():
        whole = torch.randn(source[link.sources[0]])
        parts = whole.chunk(gates)
        as_is, changed, *_ = ways(link, {link.sources[0]: whole}, goal, key)
        assert torch.equal(as_is, whole) and torch.equal(changed, torch.cat([parts[at] for at in order]))


def test_a_kernel_of_gates_is_turned_first() -> None:
    source: Shapes = {"lstm.kernel": (3, 20), "lstm.recurrent_kernel": (5, 20), "lstm.bias": (20,)}
    goal: Shapes = {"rnn.weight_ih_l0": (20, 3), "rnn.weight_hh_l0": (20, 5), "rnn.bias_ih_l0": (20,), "rnn.bias_hh_l0": (20,)}
    link = links(source, goal)["rnn.weight_hh_l0"]
    kernel = torch.randn(5, 20)
    i, f, o, g = kernel.T.chunk(4)
    assert link.doubt and torch.equal(made(link, 1, {link.sources[0]: kernel}, goal)["rnn.weight_hh_l0"], torch.cat([i, f, g, o]))


def test_torchs_own_gates_are_in_no_doubt() -> None:
    cell = {"cell.weight_ih": (20, 3), "cell.weight_hh": (20, 5), "cell.bias_ih": (20,), "cell.bias_hh": (20,)}
    found = links(cell, {key.replace("cell.", "rnn.lstm.") + "_l0": shape for key, shape in cell.items()})
    assert len(found) == 4 and all(link.certain for link in found.values())
