"""Cells of recurrent nets: which gate is which part of a fused weight, where torch's own name tells the order; and nets of two towers."""

from __future__ import annotations

import pytest
import torch
from rows_support import Rows, side, sure

from ckptsurgeon.matching.evidence.gates import _said
from ckptsurgeon.matching.matcher import match
from ckptsurgeon.tensors import TensorMeta

WIDTH = 6
GRU, LSTM = ("r", "z", "n"), ("i", "f", "g", "o")
STYLES = {
    "docs": ("W_i{}", "W_h{}"),
    "x2h": ("x2{}", "h2{}"),
    "letters": ("W_{}", "U_{}"),
    "sides": ("input_{}", "hidden_{}"),
}


def of_torch(kind: type[torch.nn.RNNBase]) -> dict[str, TensorMeta]:
    return side([(f"rnn.{key}", tuple(tensor.shape)) for key, tensor in kind(WIDTH, WIDTH, 2).state_dict().items()])


def cells(gates: tuple[str, ...], names: tuple[str, ...]) -> dict[str, TensorMeta]:
    paths = [f"cells.{at}.{name.format(gate)}" for at in range(2) for name in names for gate in gates]
    return side([row for path in paths for row in ((f"{path}.weight", (WIDTH, WIDTH)), (f"{path}.bias", (WIDTH,)))])


@pytest.mark.parametrize("names", STYLES.values(), ids=STYLES)
@pytest.mark.parametrize(("kind", "gates"), [(torch.nn.GRU, GRU), (torch.nn.LSTM, LSTM)], ids=["gru", "lstm"])
@pytest.mark.parametrize("in_order", [True, False], ids=["library", "sorted"])
def test_gates_are_the_parts_of_torchs_weights(
    kind: type[torch.nn.RNNBase], gates: tuple[str, ...], names: tuple[str, ...], in_order: bool
) -> None:
    sides = [of_torch(kind), cells(gates, names)]
    found = match(*(one if in_order else dict(sorted(one.items())) for one in sides))
    parts = {link.sources[0]: link.targets for link in found.certain}
    expected = {
        f"rnn.{role}_{own}_l{at}": tuple(f"cells.{at}.{name.format(gate)}.{role}" for gate in gates)
        for at in range(2)
        for own, name in zip(("ih", "hh"), names, strict=True)
        for role in ("weight", "bias")
    }
    assert parts == expected


def test_the_order_of_anothers_fused_gates_is_its_own() -> None:
    fused = side([row for own in ("x2h", "h2h") for row in ((f"rnn.{own}.weight", (3 * WIDTH, WIDTH)), (f"rnn.{own}.bias", (3 * WIDTH,)))])
    assert not match(fused, cells(GRU, STYLES["docs"])).certain


NAMED = [("W_i{}", "W_h{}"), ("x2{}", "h2{}"), ("W_{}", "U_{}"), ("x_{}_gate", "h_{}_gate")]
GATES = [("i", "f", "g", "o"), ("i", "f", "c", "o"), ("input", "forget", "cell", "output")]


@pytest.mark.parametrize("names", NAMED[1:])
@pytest.mark.parametrize("gates", GATES)
@pytest.mark.parametrize("in_order", [True, False], ids=["library", "sorted"])
def test_gates_of_two_cells_go_by_what_they_do(names: tuple[str, str], gates: tuple[str, ...], in_order: bool) -> None:
    """`ig` are the letters that `input_gate` begins with, and not what it says."""
    sides = [cells(GATES[0], NAMED[0]), cells(gates, names)]
    truth = dict(zip(sides[1], sides[0], strict=True))
    assert sure(match(*(one if in_order else dict(sorted(one.items())) for one in sides))) == truth


def test_gates_of_a_list_without_sides_are_told_by_nothing() -> None:
    assert _said("gate_r") is None
    assert _said("conv_z") is None


def tower(path: str, last: str, out: int) -> Rows:
    layers = [(f"{path}.0", 8, 5), (f"{path}.2", 8, 8), (last, out, 8)]
    return [row for name, rows, width in layers for row in ((f"{name}.weight", (rows, width)), (f"{name}.bias", (rows,)))]


@pytest.mark.parametrize(
    ("names", "told"),
    [((("actor", "critic"), ("policy_net", "value_net")), True), ((("one", "other"), ("left", "right")), False)],
    ids=["words of the field", "other words"],
)
@pytest.mark.parametrize("turned", [False, True], ids=["into", "out of"])
def test_two_towers_whose_last_layers_stand_elsewhere(names: tuple[tuple[str, str], tuple[str, str]], told: bool, turned: bool) -> None:
    (actor, critic), (policy, value) = names
    whole = tower(actor, f"{actor}.4", 3) + tower(critic, f"{critic}.4", 1)
    apart = tower(f"extractor.{policy}", "action_net", 3) + tower(f"extractor.{value}", "last", 1)
    truth = {other: one for (one, _), (other, _) in zip(*((whole, apart) if turned else (apart, whole)), strict=True)}
    found = sure(match(*map(side, (whole, apart) if turned else (apart, whole))))
    assert found.items() <= truth.items()
    assert (found == truth) == told


def test_a_square_parameter_is_as_those_of_its_name_are() -> None:
    widths = [(10, 8), (8, 8), (8, 3)]
    source = [(f"convs.{at}.root", widths[at]) for at in range(3)] + [(f"convs.{at}.weight", (2, *widths[at])) for at in range(3)]
    target = [(f"layers.{at}.loop_weight", widths[at]) for at in range(3)] + [
        (f"layers.{at}.linear_r.W", (2, *widths[at])) for at in range(3)
    ]
    assert sure(match(side(source), side(target))) == {other: one for (one, _), (other, _) in zip(source, target, strict=True)}
    alone = match(side(source[1:2]), side(target[1:2]))
    assert not alone.certain


@pytest.mark.parametrize("names", [("mean_head", "logvar_head"), ("to_mu", "to_log_var"), ("fc_mean", "fc_log_variance")])
def test_two_heads_of_one_size_are_the_mean_and_the_variance(names: tuple[str, str]) -> None:
    body = [(f"encoder.{at}.weight", (8 + at, 7 + at)) for at in range(3)]
    source = [*body, *((f"{name}.{role}", shape) for name in ("fc_mu", "fc_var") for role, shape in (("weight", (4, 10)), ("bias", (4,))))]
    target = [(key.replace("fc_mu", names[0]).replace("fc_var", names[1]).replace("encoder", "enc"), shape) for key, shape in source]
    found = sure(match(side(sorted(source)), side(sorted(target))))
    assert found == {other: one for (one, _), (other, _) in zip(source, target, strict=True)}


@pytest.mark.parametrize("in_order", [True, False], ids=["library", "sorted"])
def test_a_layer_of_the_hidden_state_is_never_one_of_the_input(in_order: bool) -> None:
    """As wide as the input, and without the input's biases: shapes tell nothing."""
    lstm = side([(key, tuple(tensor.shape)) for key, tensor in torch.nn.LSTM(5, WIDTH, 2).state_dict().items()])
    rows: Rows = [
        (f"cells.{at}.hidden_lin.{part}", (4 * WIDTH, WIDTH)[: 1 + (part == "weight")]) for at in range(2) for part in ("weight", "bias")
    ]
    hand = side([*rows, *((f"cells.{at}.input_lin.weight", (4 * WIDTH, WIDTH if at else 5)) for at in range(2))])
    found = match(*(one if in_order else dict(sorted(one.items())) for one in (hand, lstm)))
    assert all(("hidden" in link.sources[0]) == ("_hh_" in link.targets[0]) for link in found.certain)


@pytest.mark.parametrize("inputs", [8, 10])
@pytest.mark.parametrize("both_ways", [False, True])
def test_a_deeper_cell_under_another_name_keeps_the_layers_that_were(inputs: int, both_ways: bool) -> None:
    def net(name: str, layers: int) -> dict[str, TensorMeta]:
        model = torch.nn.ModuleDict(
            {"emb": torch.nn.Embedding(50, inputs), name: torch.nn.LSTM(inputs, 8, layers, bidirectional=both_ways)}
        )
        return side([(key, tuple(tensor.shape)) for key, tensor in model.state_dict().items()])

    found = {link.targets[0]: link.sources[0] for link in match(net("rnn", 1), net("lstm", 2)).certain}
    assert found == {key.replace("rnn", "lstm"): key for key in net("rnn", 1)}
