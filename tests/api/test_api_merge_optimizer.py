"""`merge --with-optimizer`: the written file is a training checkpoint that torch's own loaders resume from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import api_support as support
import pytest
import torch
from forked import program
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from model import Net
from profiles import examples
from test_api_resume import MAKERS, MORE, NetSplit, begun, renewed, train
from torch import nn
from variants import NetDeeper, NetGrey, NetRenamed

import ckptsurgeon as cs
from ckptsurgeon.errors import CheckpointError, OutputError, PlanError, TargetError, VerificationError
from ckptsurgeon.formats.torch import zip_writer
from ckptsurgeon.streaming import apply as applying

VARIANTS = str(support.FIXTURES / "variants.py")
RENAME = {"fc2.{p}": "dense2.{p}"}
STEPS = 12


def resumed(path: Path, kind: type[nn.Module], name: str) -> tuple[nn.Module, Any, Any]:
    """A training that resumes from a file in torch's own way."""
    value = torch.load(path, weights_only=True)
    net, optimizer, scheduler = renewed(kind, MAKERS[name])
    net.load_state_dict(value["model"])
    optimizer.load_state_dict(value["optimizer"])
    scheduler.load_state_dict(value["scheduler"])
    return net, optimizer, scheduler


@pytest.mark.parametrize("name", MAKERS)
def test_torch_resumes_from_the_merged_file_bit_for_bit(name: str, tmp_path: Path) -> None:
    expected, _ = begun(MAKERS[name], tmp_path / "a.pt")
    report = cs.merge(tmp_path / "a.pt", f"{VARIANTS}:NetRenamed", tmp_path / "b.pt", rename=RENAME, with_optimizer=True, root="model")
    assert report.proven and report.verification is not None and report.verification.ok
    assert report.optimizer is not None and report.optimizer.others == ("scheduler", "epoch")
    assert len(report.optimizer.carried) == 10 and report.optimizer.zeroed == ()
    assert train(*resumed(tmp_path / "b.pt", NetRenamed, name), STEPS, STEPS + MORE) == expected
    value = torch.load(tmp_path / "b.pt", weights_only=True)
    assert list(value) == ["scheduler", "epoch", "model", "optimizer"] and value["epoch"] == 3
    assert value["optimizer"]["param_groups"][0]["param_names"] == [key for key, _ in NetRenamed().named_parameters()]
    before = torch.load(tmp_path / "a.pt")["optimizer"]
    for position, state in before["state"].items():
        support.same(value["optimizer"]["state"].get(position, {}), {slot: one for slot, one in state.items() if one is not None})


def test_the_merged_file_is_a_source_for_transfer_by_name(tmp_path: Path) -> None:
    expected, _ = begun(MAKERS["AdamW"], tmp_path / "a.pt")
    cs.merge(tmp_path / "a.pt", f"{VARIANTS}:NetRenamed", tmp_path / "b.pt", rename=RENAME, with_optimizer=True)
    net, optimizer, scheduler = renewed(NetRenamed, MAKERS["AdamW"])
    report = cs.transfer(tmp_path / "b.pt", net, optimizer=optimizer, scheduler=scheduler)
    assert report.optimizer is not None and report.optimizer.by == "names"
    assert train(net, optimizer, scheduler, STEPS, STEPS + MORE) == expected
    assert cs.verify(tmp_path / "b.pt", f"{VARIANTS}:NetRenamed").ok


@pytest.mark.parametrize("name", ["SGD", "amsgrad"])
def test_a_layer_split_in_two(name: str, tmp_path: Path) -> None:
    expected, _ = begun(MAKERS[name], tmp_path / "a.pt")
    adapt = {"fc1.{p} -> left.{p} + right.{p}": "chunk"}
    report = cs.merge(tmp_path / "a.pt", NetSplit(), tmp_path / "b.pt", adapt=adapt, with_optimizer=True)
    assert report.optimizer is not None
    assert report.optimizer.adapted == ("left.weight", "left.bias", "right.weight", "right.bias")
    assert train(*resumed(tmp_path / "b.pt", NetSplit, name), STEPS, STEPS + MORE) == pytest.approx(expected, rel=2e-4)


def test_what_is_fresh_or_computed_has_no_state_and_nothing_shifts(tmp_path: Path) -> None:
    begun(MAKERS["AdamW"], tmp_path / "a.pt")
    before = torch.load(tmp_path / "a.pt")["optimizer"]["state"]
    report = cs.merge(tmp_path / "a.pt", f"{VARIANTS}:NetDeeper", tmp_path / "b.pt", with_optimizer=True)
    assert report.optimizer is not None and report.optimizer.zeroed == ("norm1.weight", "norm1.bias")
    net, optimizer, scheduler = resumed(tmp_path / "b.pt", NetDeeper, "AdamW")
    assert torch.equal(optimizer.state[net.conv2.weight]["exp_avg"], before[2]["exp_avg"])
    assert net.norm1.weight not in optimizer.state
    train(net, optimizer, scheduler, 0, 1)
    adapt = {"fc1.{p} -> left.{p} + right.{p}": "chunk", "conv1.weight": "in_channels"}
    report = cs.merge(tmp_path / "a.pt", NetGrey(), tmp_path / "c.pt", adapt=adapt, with_optimizer=True)
    assert report.optimizer is not None and report.optimizer.zeroed == ("conv1.weight",)
    assert "at zero" in str(report)


def test_two_halves_that_become_one_and_unlike_steps(tmp_path: Path) -> None:
    net = NetSplit()
    optimizer = MAKERS["Adam"](net.parameters())
    train(net, optimizer, None, 0, 3)
    net.left.requires_grad_(False)
    train(net, optimizer, None, 3, 5)
    torch.save({"net": {"weights": net.state_dict()}, "optim": optimizer.state_dict()}, tmp_path / "a.pt")
    report = cs.merge(tmp_path / "a.pt", Net(), tmp_path / "b.pt", adapt={"left.{p} + right.{p} -> fc1.{p}": "concat"}, with_optimizer=True)
    assert report.optimizer is not None
    assert ("fc1.weight", "its parts had taken 3 and 5 steps; the largest number is kept") in report.optimizer.not_carried
    value = torch.load(tmp_path / "b.pt", weights_only=True)
    assert list(value) == ["net", "optim"] and list(value["net"]) == ["weights"]
    state = value["optim"]["state"][4]
    assert state["step"].item() == 5
    halves = [optimizer.state[half.weight]["exp_avg"] for half in (net.left, net.right)]
    assert torch.equal(state["exp_avg"], torch.cat(halves))


def test_groups_keep_their_hyper_parameters_and_their_members(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = Net()
    decay = [(n, p) for n, p in net.named_parameters() if p.dim() > 1]
    rest = [(n, p) for n, p in net.named_parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW([{"params": decay, "weight_decay": 0.5}, {"params": rest, "weight_decay": 0.0}], lr=1e-3)
    train(net, optimizer, None, 0, 2)
    torch.save({"model": net.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "a.pt")
    cs.merge(tmp_path / "a.pt", f"{VARIANTS}:NetRenamed", tmp_path / "b.pt", rename=RENAME, with_optimizer=True)
    groups = torch.load(tmp_path / "b.pt", weights_only=True)["optimizer"]["param_groups"]
    assert [group["weight_decay"] for group in groups] == [0.5, 0.0]
    assert groups[0]["param_names"] == ["conv1.weight", "conv2.weight", "fc1.weight", "dense2.weight", "fc3.weight"]
    assert groups[0]["params"] + groups[1]["params"] == list(range(10))


def test_same_input_same_bytes_and_lightnings_list(tmp_path: Path) -> None:
    begun(MAKERS["AdamW"], tmp_path / "a.pt")
    saved = torch.load(tmp_path / "a.pt")
    light = {"state_dict": {f"model.{key}": value for key, value in saved["model"].items()}, "optimizer_states": [saved["optimizer"]]}
    torch.save(light, tmp_path / "light.ckpt")
    for name in ("b.ckpt", "c.ckpt"):
        cs.merge(tmp_path / "light.ckpt", f"{VARIANTS}:NetRenamed", tmp_path / name, rename=RENAME, with_optimizer=True)
    assert (tmp_path / "b.ckpt").read_bytes() == (tmp_path / "c.ckpt").read_bytes()
    value = torch.load(tmp_path / "b.ckpt", weights_only=True)
    assert list(value) == ["state_dict", "optimizer_states"] and len(value["optimizer_states"]) == 1


def test_what_cannot_be_is_refused_and_nothing_is_left(tmp_path: Path) -> None:
    begun(MAKERS["AdamW"], tmp_path / "a.pt")
    torch.save(Net().state_dict(), tmp_path / "t.pt")
    (tmp_path / "out").mkdir()
    out = tmp_path / "out" / "b.pt"
    target = f"{VARIANTS}:NetRenamed"
    with pytest.raises(OutputError, match="safetensors"):
        cs.merge(tmp_path / "a.pt", target, out.with_suffix(".safetensors"), rename=RENAME, with_optimizer=True)
    with pytest.raises(TargetError, match="only a model"):
        cs.merge(tmp_path / "a.pt", tmp_path / "t.pt", out, with_optimizer=True)
    apart = ["0:fc1.*", "1:conv*.*", "1:fc2.*", "1:fc3.*"]
    with pytest.raises(PlanError, match="one source"):
        cs.merge([tmp_path / "a.pt", tmp_path / "t.pt"], target, out, rename=RENAME, drop=apart, with_optimizer=True)
    with pytest.raises(CheckpointError, match="no optimizer state"):
        cs.merge(tmp_path / "t.pt", target, out, rename=RENAME, with_optimizer=True)
    saved = torch.load(tmp_path / "a.pt")
    optimizer = torch.optim.Adagrad(Net().parameters())
    torch.save({"model": saved["model"], "optimizer": optimizer.state_dict()}, tmp_path / "ada.pt")
    with pytest.raises(PlanError, match="none of SGD"):
        cs.merge(tmp_path / "ada.pt", target, out, rename=RENAME, with_optimizer=True)
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("what", ["moment", "value"])
def test_a_file_that_is_not_what_was_to_be_written_is_not_kept(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun(MAKERS["AdamW"], tmp_path / "a.pt")
    honest = applying.finish

    def dishonest(run: Any, file: Any, temporary: Any, *shares: Any) -> None:
        honest(run, file, temporary, *shares)
        if what == "moment":
            slot = next(slot for slot in file.layout.slots if file.tensors[slot.index].name.startswith("conv1.weight exp_avg"))
            applying.copying.write_at(temporary.fd, b"\x01", slot.offset)

    def misplaced(*args: Any, **more: Any) -> Any:
        *rest, around = args
        around = {**around, "epoch": 4} if what == "value" else around
        return laid_out(*rest, around, **more)

    laid_out = zip_writer.lay_out
    monkeypatch.setattr(applying, "finish", dishonest)
    monkeypatch.setattr(zip_writer, "lay_out", misplaced)
    with pytest.raises(VerificationError) as error:
        cs.merge(tmp_path / "a.pt", f"{VARIANTS}:NetRenamed", tmp_path / "b.pt", rename=RENAME, with_optimizer=True, root="model")
    assert any("exp_avg" in problem or "epoch" in problem for problem in error.value.problems)
    assert not (tmp_path / "b.pt").exists()


class Deep(nn.Module):
    """Layers of one shape."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(3, 3) for _ in range(depth))


def test_a_layer_that_is_taken_twice_gives_each_its_own_moments(tmp_path: Path) -> None:
    net = Deep(2)
    optimizer = MAKERS["Adam"](net.parameters())
    sum(layer(torch.ones(1, 3)).square().sum() for layer in net.layers).backward()
    optimizer.step()
    torch.save({"model": net.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "a.pt")
    twice = {"layers.{i}.{p} -> layers.{2*i}.{p} + layers.{2*i+1}.{p}": "slice"}
    cs.merge(tmp_path / "a.pt", Deep(4), tmp_path / "b.pt", adapt=twice, with_optimizer=True)
    state = torch.load(tmp_path / "b.pt", weights_only=True)["optimizer"]["state"]
    assert torch.equal(state[0]["exp_avg"], state[2]["exp_avg"]) and torch.equal(
        state[0]["exp_avg"], optimizer.state_dict()["state"][0]["exp_avg"]
    )
    storages = {value.untyped_storage().data_ptr() for kept in state.values() for value in kept.values()}
    assert len(storages) == 3 * 8
    new = Deep(4)
    fresh = MAKERS["Adam"](new.parameters())
    cs.transfer(tmp_path / "a.pt", new, adapt=twice, optimizer=fresh)
    storages = {value.untyped_storage().data_ptr() for kept in fresh.state.values() for value in kept.values()}
    assert len(storages) == 3 * 8


_junk = st.one_of(
    st.none(), st.integers(), st.floats(), st.text(max_size=3), st.just([]), st.just({}), st.just(1 << 5000),
    st.sampled_from([torch.zeros(3, 2), torch.zeros(2, 3), torch.tensor(3), torch.zeros(0), torch.zeros(2)]),
)  # fmt: skip
_slots = st.fixed_dictionaries({"step": _junk, "exp_avg": _junk, "exp_avg_sq": _junk}, optional={"max_exp_avg_sq": _junk, "x": _junk})
_moments = st.sampled_from([(2, 3), (2,), (3, 2)]).map(
    lambda shape: {"step": 3, "exp_avg": torch.ones(shape), "exp_avg_sq": torch.ones(shape)}
)
_group = st.fixed_dictionaries(
    {"params": st.sampled_from([[0, 1], [0], [1, 0], 3]), "betas": _junk}, optional={"lr": _junk, "param_names": _junk}
)
_value = st.fixed_dictionaries(
    {
        "state": st.dictionaries(st.integers(0, 2), st.one_of(_moments, _slots, _junk), max_size=2),
        "param_groups": st.lists(st.one_of(_group, _junk), max_size=2),
    }
)


@settings(max_examples=examples(120), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.one_of(_value, _junk), _junk)
def test_any_state_is_written_whole_or_refused(tmp_path: Path, optimizer: Any, other: Any) -> None:
    torch.save({"model": nn.Linear(3, 2).state_dict(), "optimizer": optimizer, "other": other}, tmp_path / "a.pt")
    try:
        report = cs.merge(tmp_path / "a.pt", nn.Linear(3, 2), tmp_path / "b.pt", with_optimizer=True, overwrite=True)
    except CheckpointError:
        return
    value = torch.load(tmp_path / "b.pt", weights_only=True)
    assert report.optimizer is not None
    assert sorted([*report.optimizer.carried, *report.optimizer.adapted, *report.optimizer.zeroed]) == ["bias", "weight"]
    shapes = {
        name: shape
        for group in value["optimizer"]["param_groups"]
        for name, shape in zip(group["param_names"], group["params"], strict=True)
    }
    for name in report.optimizer.carried:
        kept = value["optimizer"]["state"].get(shapes[name], {})
        assert all(tensor.shape == {"weight": (2, 3), "bias": (2,)}[name] for slot, tensor in kept.items() if slot != "step")


def test_on_the_command_line(tmp_path: Path) -> None:
    begun(MAKERS["AdamW"], tmp_path / "a.pt")
    words = ("merge", "a.pt", f"{VARIANTS}:NetRenamed", "-o", "b.pt", "--with-optimizer", "--json", "--rename", "fc2.{p}", "dense2.{p}")
    value = program(*words, folder=tmp_path).json["optimizer"]
    assert len(value["carried"]) == 10 and value["place"] == "optimizer"


def test_positions_that_a_distributed_checkpoint_keeps_as_text_are_found(tmp_path: Path) -> None:
    """`dcp.save` of an optimizer's plain state_dict writes its positions, which are numbers, as text."""
    import torch.distributed.checkpoint as dcp

    def made() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4))
        groups = [{"params": [p for p in model.parameters() if p.dim() == size], "weight_decay": size / 10} for size in (2, 1)]
        return model, torch.optim.AdamW(groups)

    (model, optimizer), (second, other) = made(), made()
    model(torch.randn(5, 3)).square().sum().backward()
    optimizer.step()
    dcp.save({"model": model.state_dict(), "optim": optimizer.state_dict()}, checkpoint_id=tmp_path / "run")
    cs.transfer(tmp_path / "run", second, root="model", optimizer=other)
    for ours, theirs in zip(second.parameters(), model.parameters(), strict=True):
        for name, value in optimizer.state[theirs].items():
            assert torch.equal(other.state[ours][name], value)


def test_what_a_training_checkpoint_has_and_the_output_has_not_is_left_behind(tmp_path: Path) -> None:
    begun(MAKERS["AdamW"], tmp_path / "run.pt")
    value = torch.load(tmp_path / "run.pt")
    ema = {key: weight * 0.9 for key, weight in value["model"].items()}
    more = {"rng": torch.get_rng_state(), "rngs": [torch.ones(2), torch.ones(3)], "hist": {"loss": torch.ones(5)}, "model_ema": ema}
    torch.save({**value, **more}, tmp_path / "run.pt")
    lost = ("the top dict (1 tensor)", "hist (1 tensor)", "model_ema (10 tensors)", "rngs.0", "rngs.1")
    report = cs.merge(tmp_path / "run.pt", f"{support.FIXTURES / 'model.py'}:Net", tmp_path / "out.pt", with_optimizer=True, root="model")
    assert list(torch.load(tmp_path / "out.pt")) == ["scheduler", "epoch", "model", "optimizer"]
    assert report.left_behind == lost and report.to_dict()["left_behind"] == list(lost)
    words = "the top dict (1 tensor), hist (1 tensor), model_ema (10 tensors), rngs.* (2)"
    assert f"  left behind     5   {words}" in str(report).splitlines()
    net, optimizer, scheduler = renewed(Net, MAKERS["AdamW"])
    report = cs.transfer(tmp_path / "run.pt", net, root="model", optimizer=optimizer, scheduler=scheduler, ema=Net())
    assert report.left_behind == (*lost[:2], "epoch", *lost[3:]) and "left behind     5" in str(report)
    report = cs.transfer(tmp_path / "run.pt", net, root="model", optimizer=optimizer, optimizer_from={"state": {}, "param_groups": []})
    assert {"optimizer", "scheduler"} <= {path.partition(".")[0] for path in report.left_behind}
