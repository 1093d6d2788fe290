"""What values say of links: real norms, biases and tables are told apart, q from k from v never, and no certain link is changed."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

import pytest
import torch
from rules_support import checkpoint
from torch import nn

import ckptsurgeon as cs
from ckptsurgeon.matching.evidence import value_evidence as judging
from ckptsurgeon.matching.evidence.value_evidence import NEAR_ONE, NEAR_ZERO, NOISE, SMOOTH, Stats, judged
from ckptsurgeon.matching.result import Matching
from ckptsurgeon.planning.links import Link
from ckptsurgeon.streaming import statistics

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def positions(length: int, width: int) -> torch.Tensor:
    """The table of Vaswani et al. 2017."""
    place, dim = torch.arange(length)[:, None], torch.arange(0, width, 2)
    angle = place / 10000 ** (dim / width)
    return torch.cat([angle.sin(), angle.cos()], 1)


def trained() -> nn.Module:
    """A small transformer after a few steps, so that no value is a constructor's."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0)
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-2)
    for _ in range(30):
        x = torch.randn(10, 8, 32)
        (layer(x) - x.flip(-1)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return layer


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_statistics_are_those_of_torch_whether_read_in_parts_or_at_once(tmp_path: Path, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    state = {"v": torch.randn(1000) + 1, "m": torch.randn(300, 400), "big": torch.randn(1500, 700) * 3 - 1, "none": torch.randn(0)}
    state = {key: value.to(dtype) for key, value in state.items()} | {"turned": torch.randn(40, 30).to(dtype).t(), "n": torch.arange(3)}
    torch.save(state, tmp_path / "a.pt")
    streamed = statistics.of_file(cs.open(tmp_path / "a.pt"), state)
    whole = statistics.of_tensors(state, state)
    assert set(streamed) == set(whole) == {"v", "m", "big", "turned"}
    for key, stats in streamed.items():
        values = state[key].double()
        assert stats.mean == pytest.approx(float(values.mean()), abs=1e-9)
        assert stats.spread == pytest.approx(float(values.std(correction=0)), rel=1e-9)
        assert stats == whole[key]
    sample = state["m"].double()[:256, :256]
    centred = sample - sample.mean()
    expected = float(torch.linalg.svdvals(centred)[0] ** 2 / centred.square().sum()) / ((256**0.5 * 2) ** 2 / 256**2)
    assert streamed["m"].top == pytest.approx(expected, rel=1e-6)


def test_nothing_is_said_of_values_that_are_not_finite() -> None:
    assert statistics.of_tensors({"v": torch.tensor([1.0, math.inf]), "w": torch.tensor([math.nan])}, ["v", "w"]) == {}
    assert statistics.of_tensors({"v": torch.randn(20, 20, dtype=torch.float64) * 1e200}, ["v"]) == {}  # whose squares are not


def test_the_parts_of_a_trained_layer_look_like_what_they_are() -> None:
    state = trained().state_dict()
    kinds = {key: stats.kind for key, stats in statistics.of_tensors(state, state).items()}
    assert {kinds[f"norm{i}.weight"] for i in (1, 2)} == {NEAR_ONE}
    assert {kinds[key] for key in kinds if key.endswith("bias")} <= {NEAR_ZERO, ""}
    assert NEAR_ZERO in {kinds[key] for key in ("norm1.bias", "norm2.bias", "linear1.bias")}
    tables = {f"{length}x{width}": positions(length, width) for length, width in ((64, 64), (128, 64), (1024, 768), (50, 768))}
    assert {stats.pattern for stats in statistics.of_tensors(tables, tables).values()} == {SMOOTH}
    fresh = {"weight": nn.Linear(64, 64).weight, "hidden": state["linear1.weight"]}
    assert {stats.pattern for stats in statistics.of_tensors(fresh, fresh).values()} == {NOISE}
    constant = {"ones": torch.ones(5), "zeros": torch.zeros(5), "tenth": torch.full((5,), 1e-6)}
    assert {key: stats.kind for key, stats in statistics.of_tensors(constant, constant).items()} == {
        "ones": NEAR_ONE,
        "zeros": NEAR_ZERO,
        "tenth": NEAR_ZERO,
    }


def judge(
    links: list[Link], one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], fresh: bool = False
) -> tuple[Matching, tuple[str, ...]]:
    source, target = (checkpoint({key: tuple(value.shape) for key, value in side.items()}) for side in (one, other))
    used, reached = {link.sources[0] for link in links}, {link.targets[0] for link in links}
    left = tuple(key for key in other if key not in reached), tuple(key for key in one if key not in used)
    found = Matching(tuple(links), *left, 1.0, 1.0)
    of_source, of_target = (partial(statistics.of_tensors, side) for side in (one, other))
    return judged(found, source, target, of_source, of_target, fresh=fresh)


def vectors() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return 1 + 0.1 * torch.randn(50), 0.1 * torch.randn(50)


def test_a_tie_between_a_scale_and_a_shift_is_decided() -> None:
    scale, shift = vectors()
    doubtful = [Link(("a",), ("x",), "", 0.5, ("order",), "b -> x"), Link(("b",), ("y",), "", 0.5, ("order",), "a -> y")]
    found, warnings = judge(doubtful, {"a": scale, "b": shift}, {"x": scale + 0.01, "y": shift + 0.01})
    assert warnings == () and all(link.certain for link in found.links)
    assert "values: the only one here that is around one" in found.links[0].evidence
    crossed, warnings = judge(doubtful, {"a": shift, "b": scale}, {"x": scale, "y": shift})
    assert warnings == () and not any(link.certain for link in crossed.links)
    assert all(link.margin == -1 and "values disagree" in link.evidence for link in crossed.links)


def test_a_certain_link_that_values_speak_against_stays_with_a_warning() -> None:
    scale, shift = vectors()
    certain = [Link(("norm.weight",), ("ln.weight",), "", 9.0), Link(("norm.bias",), ("ln.bias",), "", 9.0)]
    found, warnings = judge(certain, {"norm.weight": shift, "norm.bias": shift}, {"ln.weight": scale, "ln.bias": shift})
    assert found.links == tuple(certain)
    assert warnings == ("values disagree: norm.weight is around zero, ln.weight around one",)


def test_values_do_not_tell_q_from_k_from_v_nor_one_layer_from_another() -> None:
    torch.manual_seed(0)
    names = ("q", "k", "v")
    one = {key: torch.randn(64, 64) for key in names} | {f"norm{i}": 1 + 0.1 * torch.randn(64) for i in range(2)}
    links = [Link((key,), (f"{key}_proj",), "", 0.5, ("order",)) for key in names]
    links += [Link((f"norm{i}",), (f"ln{i}",), "", 0.5, ("order",)) for i in range(2)]
    found, warnings = judge(links, one, {link.targets[0]: one[link.sources[0]].clone() for link in links})
    assert found.links == tuple(links) and warnings == ()


def test_one_more_of_its_kind_that_no_link_has_leaves_it_open() -> None:
    scale, shift = vectors()
    links = [Link(("a",), ("x",), "", 0.5), Link(("b",), ("y",), "", 0.5)]
    found, _ = judge(links, {"a": scale, "b": shift, "c": scale + 0.1}, {"x": scale, "y": shift})
    assert [link.certain for link in found.links] == [False, True]
    unclear = 0.5 * torch.rand(50)
    found, _ = judge(links, {"a": scale, "b": shift, "c": unclear}, {"x": scale, "y": shift})
    assert Stats(0.25, 0.14).kind == "" and not any(link.certain for link in found.links)


def test_a_table_of_positions_is_told_from_noise() -> None:
    torch.manual_seed(0)
    table, noise = positions(64, 64), torch.randn(64, 64)
    links = [Link(("a",), ("pos",), "", 0.5), Link(("b",), ("tok",), "", 0.5)]
    found, _ = judge(links, {"a": table, "b": noise}, {"pos": table, "tok": torch.randn(64, 64)})
    assert all(link.certain for link in found.links)
    # What a constructor gives says nothing of what a table is for.
    fresh, _ = judge(links, {"a": table, "b": noise}, {"pos": table, "tok": torch.randn(64, 64)}, fresh=True)
    assert not any(link.certain for link in fresh.links)
    small, _ = judge(links, {"a": table[:4, :4], "b": noise[:4, :4]}, {"pos": table[:4, :4], "tok": noise[:4, :4]})
    assert not any(link.certain for link in small.links)


def test_the_least_of_noise_is_what_theory_says() -> None:
    torch.manual_seed(0)
    for rows, columns in ((256, 256), (64, 256), (200, 50)):
        energy = torch.linalg.svdvals(torch.randn(rows, columns, dtype=torch.float64)).square()
        assert float(energy[0] / energy.sum()) == pytest.approx(judging.noise_share(rows, columns), rel=0.15)


class Vectors(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.ModuleList(nn.Linear(30, 30) for _ in range(3))
        self.first, self.second = nn.Parameter(torch.ones(7)), nn.Parameter(torch.zeros(7))


def test_match_with_values_reads_files_and_models(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Vectors()
    body = {key: value for key, value in model.state_dict().items() if key.startswith("body")}
    torch.save(body | {"alpha": 1 + 0.1 * torch.randn(7), "zeta": 0.1 * torch.randn(7)}, tmp_path / "a.pt")
    torch.save(body | {"first": 1 + 0.1 * torch.randn(7), "second": 0.1 * torch.randn(7)}, tmp_path / "b.pt")
    for target in (tmp_path / "b.pt", model):
        notes: list[str] = []
        plain, told = cs.match(tmp_path / "a.pt", target), cs.match(tmp_path / "a.pt", target, values=True, note=notes.append)
        assert len(told.certain) >= len(plain.certain)
        assert all(link in told.links for link in plain.certain)
        for link in told.certain:
            assert link.sources == link.targets or (link.sources[0], link.targets[0]) in {("alpha", "first"), ("zeta", "second")}
        assert (target is model) == any("tell only how it is initialised" in note for note in notes)
