"""Adapters, links, averages and copies from end to end: the written file and the live model against torch's own operations."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import ckptsurgeon as cs
from ckptsurgeon.errors import CheckpointError, ModelError, PlanError, RuleError, StaleError, TargetError
from ckptsurgeon.planning import planfile

OWN = """
import torch
import ckptsurgeon as cs

@cs.adapter(shape=lambda shapes, **arguments: shapes[0][::-1])
def flip(tensors, **arguments):
    return tensors[0].T.flip(0) if arguments.get("upside_down") else tensors[0].T

@cs.adapter(shape=lambda shapes, **arguments: shapes[0])
def lies(tensors, **arguments):
    return tensors[0][:1]

def twos(tensor, generator, by=2.0):
    tensor.fill_(by)
"""


class Attention(nn.Module):
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, width)


class Net(nn.Module):
    def __init__(self, depth: int = 2, positions: int = 26) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Attention() for _ in range(depth))
        self.pos = nn.Parameter(torch.zeros(1, positions, 4))
        self.head = nn.Linear(4, 8)


LINK = "blocks.{i}.qkv.{p} -> layers.{i}.q.{p} + layers.{i}.k.{p} + layers.{i}.v.{p}"
RULES: dict[str, Any] = {"adapt": {LINK: "chunk", "pos": "interpolate", "head.weight": "transpose"}}


def fused(depth: int = 2) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    state = {f"blocks.{i}.qkv.{p}": torch.randn(12, *rest) for i in range(depth) for p, rest in (("weight", (4,)), ("bias", ()))}
    return {**state, "pos": torch.randn(1, 17, 4), "head.weight": torch.randn(4, 8), "head.bias": torch.randn(8)}


def expected(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    made = {}
    for key, value in state.items():
        if key.startswith("blocks"):
            _, number, _, p = key.split(".")
            made.update({f"layers.{number}.{name}.{p}": part for name, part in zip("qkv", value.chunk(3), strict=True)})
    grid = state["pos"][:, 1:].reshape(1, 4, 4, 4).permute(0, 3, 1, 2)
    larger = nn.functional.interpolate(grid, size=(5, 5), mode="bicubic", antialias=True, align_corners=False)
    pos = torch.cat([state["pos"][:, :1], larger.permute(0, 2, 3, 1).reshape(1, 25, 4)], 1)
    return {**made, "pos": pos, "head.weight": state["head.weight"].T.contiguous(), "head.bias": state["head.bias"]}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    torch.save(fused(), tmp_path / "a.pt")
    return tmp_path / "a.pt"


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_merge_adapts_and_torch_loads_it(source: Path, tmp_path: Path, suffix: str) -> None:
    report = cs.merge(source, Net(), tmp_path / f"out{suffix}", **RULES)
    state = load_file(tmp_path / f"out{suffix}") if suffix != ".pt" else torch.load(tmp_path / "out.pt", weights_only=True)
    assert same(state, {key: expected(fused())[key] for key in state}) and report.coverage.tensors == 1.0 and not report.dropped
    net = Net()
    net.load_state_dict(state, strict=True)


def test_transfer_gives_what_merge_writes(source: Path, tmp_path: Path) -> None:
    cs.merge(source, Net(), tmp_path / "out.pt", **RULES)
    for given in (source, fused()):
        net = Net()
        report = cs.transfer(given, net, **RULES)
        assert same(net.state_dict(), torch.load(tmp_path / "out.pt", weights_only=True)) and not report.fresh


def test_a_plan_is_followed_to_the_same_bytes(source: Path, tmp_path: Path) -> None:
    (tmp_path / "net.json").write_text("")
    skeleton = tmp_path / "net.pt"
    torch.save(Net().state_dict(), skeleton)
    plan = cs.plan(source, skeleton, **RULES)
    (tmp_path / "plan.json").write_text(json.dumps(planfile.to_json(plan)))
    cs.apply(tmp_path / "plan.json", tmp_path / "one.safetensors")
    cs.merge(source, skeleton, tmp_path / "two.safetensors", **RULES)
    assert (tmp_path / "one.safetensors").read_bytes() == (tmp_path / "two.safetensors").read_bytes()


def test_byte_only_adapters_do_not_load_torch(tmp_path: Path) -> None:
    torch.save(fused(), tmp_path / "a.pt")
    code = f"""
import sys, ckptsurgeon as cs
cs.merge({str(tmp_path / "a.pt")!r}, None, {str(tmp_path / "out.pt")!r}, adapt={{{LINK!r}: 'chunk'}})
assert 'torch' not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    state = torch.load(tmp_path / "out.pt", weights_only=True)
    assert torch.equal(state["layers.1.k.weight"], fused()["blocks.1.qkv.weight"][4:8])


def test_an_adapted_tensor_is_cast_after(source: Path, tmp_path: Path) -> None:
    cs.merge(source, Net().half(), tmp_path / "out.pt", **RULES, allow_cast=["**"])
    state = torch.load(tmp_path / "out.pt", weights_only=True)
    assert all(torch.equal(state[key], value.half()) for key, value in expected(fused()).items())


# --- one source to several, several to one, copies ---------------------------------------------------------------------------------


def test_each_layer_of_a_deeper_model_is_its_own(tmp_path: Path) -> None:
    torch.save({f"layers.{i}.{n}.{p}": torch.randn(4) for i in range(2) for n in "qkv" for p in ("weight", "bias")}, tmp_path / "a.pt")
    rules = {"layers.{i}.{**rest}": "layers.{2*i}.{**rest} + layers.{2*i+1}.{**rest}"}
    report = cs.merge(tmp_path / "a.pt", None, tmp_path / "out.pt", rename=rules)
    state, given = (torch.load(tmp_path / name, weights_only=True) for name in ("out.pt", "a.pt"))
    assert len(state) == 24 and not report.dropped
    assert all(torch.equal(value, given[f"layers.{int(key.split('.')[1]) // 2}.{key.split('.', 2)[2]}"]) for key, value in state.items())
    assert len({value.untyped_storage().data_ptr() for value in state.values()}) == 24  # none would change with another


def test_experts_are_stacked_in_numerical_order_and_taken_apart_again(tmp_path: Path) -> None:
    state = {f"experts.{e}.{w}.weight": torch.randn(3, 2) for e in range(11) for w in ("w1", "w3")}
    torch.save(dict(sorted(state.items())), tmp_path / "a.pt")  # 10 stands before 2
    there = {"experts.{e}.w1.weight + experts.{e}.w3.weight -> experts.gate_up": "concat(of=2) | stack"}
    cs.merge(tmp_path / "a.pt", None, tmp_path / "stacked.safetensors", adapt=there)
    stacked = load_file(tmp_path / "stacked.safetensors")["experts.gate_up"]
    wanted = [torch.cat([state[f"experts.{e}.w1.weight"], state[f"experts.{e}.w3.weight"]]) for e in range(11)]
    assert torch.equal(stacked, torch.stack(wanted))
    back = {"experts.gate_up -> experts.{e}.w1.weight + experts.{e}.w3.weight": "unstack | chunk"}
    cs.merge(tmp_path / "stacked.safetensors", None, tmp_path / "back.pt", adapt=back)
    assert same(torch.load(tmp_path / "back.pt", weights_only=True), state)


def test_from_key_takes_what_that_key_gets(source: Path, tmp_path: Path) -> None:
    report = cs.merge(source, Net(depth=4), tmp_path / "out.pt", **RULES, init={"layers.{i}.{**rest}": "from(layers.{i-1}.{rest})"})
    state = torch.load(tmp_path / "out.pt", weights_only=True)
    assert {key.split(".")[1] for key in report.fresh} == {"2", "3"} and len(report.fresh) == 12
    assert all(torch.equal(state[key], state[f"layers.1.{key.split('.', 2)[2]}"]) for key in report.fresh)
    net = Net(depth=4)
    cs.transfer(source, net, **RULES, init={"layers.{i}.{**rest}": "from(layers.{i-1}.{rest})"})
    assert same(net.state_dict(), state)


@pytest.mark.parametrize(
    ("scheme", "words"),
    [("from(nowhere.weight)", "not in the target"), ("from(head.weight)", "copies"), ("from(layers.1.q.weight)", "copies it in turn")],
)
def test_a_copy_that_can_not_be_made(source: Path, scheme: str, words: str) -> None:
    with pytest.raises(RuleError, match=words):
        init = {"layers.2.q.weight": scheme, "layers.1.q.weight": "from(layers.2.q.weight)"}
        cs.plan(source, Net(depth=3), drop=["blocks.1.**"], init=init, adapt=RULES["adapt"])


# --- averages ------------------------------------------------------------------------------------------------------------------------


def states(count: int, dtype: torch.dtype = torch.float32) -> list[dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    shapes = {"w": (300, 70), "b": (7,), "scalar": (), "none": (0, 3)}
    return [
        {**{name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}, "bn.num_batches_tracked": torch.tensor(number)}
        for number in range(count)
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("weights", [True, [3.0, 1.0, 0.5]])
def test_an_average_is_the_weighted_mean(tmp_path: Path, dtype: torch.dtype, weights: Any) -> None:
    given = states(3, dtype)
    paths = [tmp_path / f"{number}.pt" for number in range(3)]
    for state, path in zip(given, paths, strict=True):
        torch.save(state, path)
    report = cs.merge(paths, None, tmp_path / "soup.safetensors", average=weights)
    soup = load_file(tmp_path / "soup.safetensors")
    shares = torch.tensor([1.0, 1, 1] if weights is True else weights, dtype=torch.float64)
    shares /= shares.sum()
    for key in ("w", "b", "scalar", "none"):
        mean = sum(share * state[key].double() for share, state in zip(shares, given, strict=True))
        torch.testing.assert_close(soup[key].double(), mean, rtol=4 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps)
        assert soup[key].dtype == dtype
    assert soup["bn.num_batches_tracked"] == 0  # a counter is no floating number: the first source's
    assert [row for row in report.dropped if "not averaged" in row[1]] == [
        ("bn.num_batches_tracked", "not averaged: bn.num_batches_tracked is the first source's")
    ] * 2


@pytest.mark.parametrize("dtype", [torch.complex32, torch.complex64, torch.complex128])
@pytest.mark.parametrize("adapted", [{}, {"adapt": {"w": "transpose(dims=(0, 1))"}}], ids=["in chunks", "whole"])
def test_complex_tensors_are_averaged_too(tmp_path: Path, dtype: torch.dtype, adapted: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(0)
    given = [{"w": torch.randn(30, 7, dtype=torch.complex128, generator=generator).to(dtype), "n": torch.ones(2)} for _ in range(2)]
    for number, state in enumerate(given):
        torch.save(state, tmp_path / f"{number}.pt")
    report = cs.merge([tmp_path / "0.pt", tmp_path / "1.pt"], None, tmp_path / "soup.pt", average=(3, 1), **adapted)
    found = torch.load(tmp_path / "soup.pt", weights_only=True)["w"]
    mean = 0.75 * given[0]["w"].to(torch.complex128) + 0.25 * given[1]["w"].to(torch.complex128)
    assert found.dtype == dtype and not report.dropped
    eps = {torch.complex32: 2**-10, torch.complex64: 2**-22}.get(dtype, 2**-50)
    torch.testing.assert_close(found.to(torch.complex128), mean.T if adapted else mean, rtol=4 * eps, atol=4 * eps)


def test_an_average_takes_rules_and_wrappers(tmp_path: Path) -> None:
    one, other = states(2)
    torch.save(one, tmp_path / "a.pt")
    torch.save({f"module.{key}": value for key, value in other.items()}, tmp_path / "b.pt")
    cs.merge([tmp_path / "a.pt", tmp_path / "b.pt"], None, tmp_path / "soup.pt", average=True, rename={"w": "weight"}, drop=["none"])
    soup = torch.load(tmp_path / "soup.pt", weights_only=True)
    assert set(soup) == {"weight", "b", "scalar", "bn.num_batches_tracked"}
    torch.testing.assert_close(soup["weight"], (one["w"] + other["w"]) / 2)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda state: state.pop("b"), "'b' is not in"),
        (lambda state: state.update(b=torch.zeros(8)), "b"),
        (lambda state: state.update(b=torch.zeros(7, dtype=torch.float16)), "joins F16 and F32"),
    ],
)
def test_sources_that_can_not_be_averaged(tmp_path: Path, change: Any, words: str) -> None:
    one, other = states(2)
    change(other)
    torch.save(one, tmp_path / "a.pt")
    torch.save(other, tmp_path / "b.pt")
    with pytest.raises(RuleError, match=words):
        cs.merge([tmp_path / "a.pt", tmp_path / "b.pt"], None, tmp_path / "soup.pt", average=True)
    assert not (tmp_path / "soup.pt").exists()


@pytest.mark.parametrize("weights", [[1.0], [1.0, 2.0, 3.0], [0.0, 0.0], [1.0, -1.0], [float("nan"), 1.0]])
def test_weights_that_are_none(tmp_path: Path, weights: list[float]) -> None:
    for state, name in zip(states(2), "ab", strict=True):
        torch.save(state, tmp_path / f"{name}.pt")
    with pytest.raises(CheckpointError):
        cs.merge([tmp_path / "a.pt", tmp_path / "b.pt"], None, tmp_path / "soup.pt", average=weights)


def test_one_source_is_no_average(source: Path) -> None:
    with pytest.raises(PlanError, match="two sources or more"):
        cs.plan([source], None, average=True)


# --- a person's own ------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "own_rules.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    return "own_rules.py"


def test_a_persons_own_adapter_and_scheme(source: Path, own: str, tmp_path: Path) -> None:
    notes: list[str] = []
    rules = {LINK: "chunk", "pos": "interpolate", "head.weight": f"{own}:flip(upside_down=True)"}
    cs.merge(source, Net(depth=3), tmp_path / "out.pt", adapt=rules, init={"layers.2.**": f"{own}:twos(by=3.0)"}, note=notes.append)
    state = torch.load(tmp_path / "out.pt", weights_only=True)
    assert torch.equal(state["head.weight"], fused()["head.weight"].T.flip(0))
    assert all((state[f"layers.2.{n}.{p}"] == 3).all() for n in "qkv" for p in ("weight", "bias"))
    assert [note for note in notes if "own_rules" in note] == ["imports own_rules from ./own_rules.py"]


def test_a_plan_with_a_persons_own_imports_it_when_it_is_followed(source: Path, own: str, tmp_path: Path) -> None:
    torch.save(Net().state_dict(), tmp_path / "net.pt")
    plan = cs.plan(source, tmp_path / "net.pt", adapt={**RULES["adapt"], "head.weight": f"{own}:flip"})
    (tmp_path / "plan.json").write_text(json.dumps(planfile.to_json(plan)))
    notes: list[str] = []
    cs.apply(tmp_path / "plan.json", tmp_path / "out.pt", note=notes.append)
    assert torch.equal(torch.load(tmp_path / "out.pt", weights_only=True)["head.weight"], fused()["head.weight"].T)
    assert any("own_rules" in note for note in notes)


@pytest.mark.parametrize("op", ["lies", "nowhere", "twos"])
def test_a_persons_own_that_is_not_what_it_says(source: Path, own: str, tmp_path: Path, op: str) -> None:
    with pytest.raises((PlanError, TargetError)):
        cs.merge(
            source,
            Net(),
            tmp_path / "out.pt",
            adapt={LINK: "chunk", "pos": "interpolate", "head.bias": f"{own}:{op}", "head.weight": "transpose"},
        )
    assert not (tmp_path / "out.pt").exists()


# --- nothing is left without a value -------------------------------------------------------------------------------------------------


class Careless(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 2)
        self.never = nn.Parameter(torch.empty(5))


def test_memory_that_a_constructor_never_wrote_does_not_reach_a_file(tmp_path: Path) -> None:
    (tmp_path / "careless.py").write_text("import torch\nfrom torch import nn\n" + _source_of(Careless))
    torch.save({"fc.weight": torch.ones(2, 3), "fc.bias": torch.ones(2)}, tmp_path / "a.pt")
    with pytest.raises(ModelError, match="left without a value") as error:
        cs.merge(tmp_path / "a.pt", f"{tmp_path}/careless.py:Careless", tmp_path / "out.pt")
    assert error.value.key == "never" and not (tmp_path / "out.pt").exists()
    cs.merge(tmp_path / "a.pt", f"{tmp_path}/careless.py:Careless", tmp_path / "out.pt", init={"never": "zeros"})
    assert torch.equal(torch.load(tmp_path / "out.pt", weights_only=True)["never"], torch.zeros(5))


def _source_of(kind: type) -> str:
    import inspect

    return inspect.getsource(kind)


SCHEMES = ["model", "reset", "per_layer_type", "zeros", "ones", "constant(0.5)", "normal(std=0.02)", "uniform", "trunc_normal(std=0.02)"]
SCHEMES += ["xavier_normal", "xavier_uniform", "kaiming_normal(mode='fan_out', nonlinearity='relu')", "kaiming_uniform", "orthogonal"]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_after_a_merge_every_value_is_set_and_none_is_on_meta(source: Path, tmp_path: Path, scheme: str) -> None:
    report = cs.merge(source, Net(depth=3), tmp_path / "out.pt", **RULES, init={"layers.2.**": scheme})
    net = Net(depth=3)
    with torch.no_grad():
        for tensor in net.state_dict().values():
            tensor.fill_(float("nan"))
    net.load_state_dict(torch.load(tmp_path / "out.pt", weights_only=True), strict=True)
    assert len(report.fresh) == 6
    assert all(tensor.isfinite().all() and not tensor.is_meta for tensor in net.state_dict().values())
    again = cs.merge(source, Net(depth=3), tmp_path / "again.pt", **RULES, init={"layers.2.**": scheme})
    assert again.fresh == report.fresh
    if scheme != "model":  # the live model's own values differ from one Net() to the next
        assert (tmp_path / "again.pt").read_bytes() == (tmp_path / "out.pt").read_bytes()


# --- what is left of the promises ----------------------------------------------------------------------------------------------------


def test_keep_leaves_the_targets_own_value(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(3), "head": torch.ones(2)}, tmp_path / "a.pt")
    torch.save({"w": torch.zeros(3), "head": torch.zeros(2)}, tmp_path / "b.pt")
    report = cs.merge(tmp_path / "a.pt", tmp_path / "b.pt", tmp_path / "out.pt", keep=["head"], strict=True)
    state = torch.load(tmp_path / "out.pt", weights_only=True)
    assert state["w"].sum() == 3 and state["head"].sum() == 0 and report.kept == ("head",)
    assert report.dropped == (("head", "--keep 'head'"),)


def test_auto_safe_squeezes_and_repairs_and_nothing_else(tmp_path: Path) -> None:
    state = {"fc.weight": torch.randn(5, 3), "n.gamma": torch.randn(4), "n.beta": torch.randn(4), "turned": torch.randn(2, 3)}
    torch.save(state, tmp_path / "a.pt")
    wanted = {"fc.weight": torch.zeros(5, 3, 1, 1), "n.weight": torch.zeros(4), "n.bias": torch.zeros(4), "turned": torch.zeros(3, 2)}
    torch.save(wanted, tmp_path / "b.pt")
    assert cs.diff(tmp_path / "a.pt", tmp_path / "b.pt").matched == ()
    report = cs.merge(tmp_path / "a.pt", tmp_path / "b.pt", tmp_path / "out.pt", auto="safe")
    made = torch.load(tmp_path / "out.pt", weights_only=True)
    assert report.transferred == ("fc.weight", "n.weight", "n.bias") and report.kept == ("turned",)
    assert torch.equal(made["fc.weight"], state["fc.weight"][:, :, None, None]) and torch.equal(made["n.bias"], state["n.beta"])


def test_weight_norm_is_repaired_into_its_parametrization(tmp_path: Path) -> None:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        old = nn.Sequential(nn.Linear(3, 2), torch.nn.utils.weight_norm(nn.Conv1d(2, 4, 3)))
    new = nn.Sequential(nn.Linear(3, 2), torch.nn.utils.parametrizations.weight_norm(nn.Conv1d(2, 4, 3)))
    torch.save(old.state_dict(), tmp_path / "a.pt")
    report = cs.transfer(tmp_path / "a.pt", new, auto="safe", strict=True)
    x = torch.randn(1, 2, 9)
    assert not report.fresh and torch.equal(new[1](x), old[1](x))


def test_a_source_that_changes_is_refused_for_an_adapted_plan(source: Path, tmp_path: Path) -> None:
    torch.save(Net().state_dict(), tmp_path / "net.pt")
    plan = cs.plan(source, tmp_path / "net.pt", **RULES)
    torch.save({**fused(), "more": torch.zeros(1)}, source)
    with pytest.raises(StaleError):
        cs.apply(plan, tmp_path / "out.pt")


@pytest.mark.slow
def test_value_operations_hold_one_tensor_at_a_time(tmp_path: Path) -> None:
    """Twelve tensors of 32 MB each: a merge that held them all would need 400 MB more than one that holds one at a time."""
    torch.save({f"l{number}.weight": torch.zeros(2048, 4096) for number in range(12)}, tmp_path / "a.pt")
    code = """
import resource, sys, torch
import ckptsurgeon as cs
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
cs.merge(sys.argv[1], None, sys.argv[2], adapt={"*.weight": "transpose"}, verify=False)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "a.pt"), str(tmp_path / "out.pt")], capture_output=True, check=True)
    assert int(done.stdout) / 1024 < 150


def test_a_grown_vocabulary_is_partly_transferred_and_on_record(tmp_path: Path) -> None:
    torch.save({"emb.weight": torch.ones(4, 2), "w": torch.ones(2)}, tmp_path / "a.pt")
    torch.save({"emb.weight": torch.zeros(6, 2), "w": torch.zeros(2)}, tmp_path / "b.pt")
    (tmp_path / "old.txt").write_text("a\nb\nc\nd\n")
    (tmp_path / "new.txt").write_text("d\nc\nx\nb\na\ny\n")
    rows = f"rows(source={str(tmp_path / 'old.txt')!r}, target={str(tmp_path / 'new.txt')!r}, fill='zeros')"
    for op in (rows, "pad"):
        report = cs.merge(tmp_path / "a.pt", tmp_path / "b.pt", tmp_path / "out.safetensors", adapt={"emb.weight": op}, overwrite=True)
        assert report.partial == ("emb.weight",) and "partly" in str(report)
        assert report.coverage.tensors == 1.0 and report.coverage.elements == (8 + 2) / (12 + 2)
        assert (cs.open(tmp_path / "out.safetensors").provenance or {})["partial"] == ["emb.weight"]
        assert cs.diff(tmp_path / "a.pt", tmp_path / "b.pt", adapt={"emb.weight": op}).coverage == report.coverage
        plan = cs.plan(tmp_path / "a.pt", tmp_path / "b.pt", adapt={"emb.weight": op})
        assert planfile.from_json(json.dumps(planfile.to_json(plan)).encode(), "plan.json").coverage == report.coverage
