"""Freezing: what trains, what stays in eval mode, and what becomes of both in copies, pickles and compiled models."""

import copy
import io

import pytest
import torch
from torch import nn

import ckptsurgeon as cs
from ckptsurgeon.errors import ArgumentError, ModelError, NoRecordError
from ckptsurgeon.models.training.freezing import is_kept
from ckptsurgeon.report import Coverage, Report
from ckptsurgeon.tensors import Checkpoint


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)
        self.conv2, self.norm2 = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4, affine=False)
        self.drop, self.head = nn.Dropout(0.5), nn.Linear(4, 2)

    def forward(self, x):
        x = self.norm2(self.conv2(self.norm1(self.conv1(x)).relu())).mean((2, 3))
        return self.head(self.drop(x))


HEAD = ("head.weight", "head.bias")
DATA = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def report(*fresh, partial=()):
    return Report(("a.pt",), "model:Net", (), (), fresh, (), Coverage(0, 0), partial=partial)


def buffers(model):
    return {name: tensor.clone() for name, tensor in model.named_buffers()}


def test_patterns_freeze_and_the_norm_keeps_its_statistics_across_train():
    model = Net()
    keys = list(model.state_dict())
    before = buffers(model)
    done = cs.freeze(model, ["conv1.*", "norm1.*"])
    assert done.keys == ("conv1.weight", "conv1.bias", "norm1.weight", "norm1.bias") and done.modules == ("norm1",)
    assert done.trainable == ("conv2.weight", "conv2.bias", *HEAD) and done.elements == 40 + 8
    for mode in (True, False, True):
        model.train(mode)
        assert model.training is mode and model.norm2.training is mode and model.drop.training is mode and not model.norm1.training
        model(DATA)
    after = buffers(model)
    assert {name for name in after if not torch.equal(after[name], before[name])} == {
        f"norm2.{leaf}" for leaf in ("running_mean", "running_var", "num_batches_tracked")
    }
    assert list(model.state_dict()) == keys and type(model.norm1) is nn.BatchNorm2d
    assert str(done).splitlines()[1] == "kept in eval mode 1: norm1"


def test_a_report_freezes_what_was_transferred_and_the_fresh_trains():
    model = Net()
    done = cs.freeze(model, report(*HEAD))
    assert done.trainable == HEAD and done.modules == ("norm1", "norm2")
    model.train()
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(cs.param_groups(model, report(*HEAD), lr=0.1, fresh_lr=0.1, weight_decay=0.1))
    assert [group["name"] for group in optimizer.param_groups] == ["fresh"]
    model(DATA).square().sum().backward()
    optimizer.step()
    assert {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])} == set(HEAD)


def test_statistics_that_are_fresh_on_record_are_still_learned():
    fresh = ("norm1.running_mean", "norm1.running_var", "norm1.num_batches_tracked", *HEAD)
    done = cs.freeze(Net(), report(*fresh))
    assert done.modules == ("norm2",) and "norm1.weight" in done.keys
    whole = cs.freeze(Net(), report(*fresh, "norm1.weight", "norm1.bias"))
    assert whole.modules == ("norm2",) and "norm1.weight" in whole.trainable


@pytest.mark.parametrize(
    "layer",
    [
        nn.BatchNorm1d(4),
        nn.BatchNorm2d(4),
        nn.BatchNorm3d(4),
        nn.SyncBatchNorm(4),
        nn.InstanceNorm2d(4, track_running_stats=True),
        nn.InstanceNorm2d(4, affine=True, track_running_stats=True),
    ],
    ids=repr,
)
def test_layers_with_running_statistics_are_kept_in_eval_mode(layer):
    model = nn.Sequential(nn.Linear(2, 2), layer)
    assert cs.freeze(model, "1.*").modules == ("1",) and not model.train()[1].training


@pytest.mark.parametrize(
    "layer", [nn.LayerNorm(4), nn.GroupNorm(2, 4), nn.InstanceNorm2d(4, affine=True), nn.Dropout(), nn.RMSNorm(4)], ids=repr
)
def test_layers_without_are_left_alone(layer):
    model = nn.Sequential(nn.Linear(2, 2), layer)
    assert cs.freeze(model, "**").modules == () and model.train()[1].training


def test_a_norm_that_is_partly_frozen_stays_as_it_is():
    model = Net()
    assert cs.freeze(model, "norm1.weight").modules == () and model.train().norm1.training
    assert cs.freeze(model, "norm1.bias").modules == ("norm1",)  # the rest: now it is wholly frozen


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "twice"])
def test_a_copy_is_frozen_too_and_is_a_layer_of_its_own(way):
    model = Net()
    cs.freeze(model, ["conv1.*", "norm1.*"])
    if way == "pickle":
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    else:
        twin = copy.deepcopy(model)
        cs.freeze(twin, ["conv1.*", "norm1.*"]) if way == "twice" else None
    twin.train()
    model.train()
    assert not twin.norm1.training and not twin.conv1.weight.requires_grad
    cs.unfreeze(twin)
    twin.train()
    model.train()
    assert twin.norm1.training and not model.norm1.training and not is_kept(twin.norm1) and is_kept(model.norm1)


def test_the_state_dict_loads_and_the_model_moves_as_ever():
    model = Net()
    cs.freeze(model, ["conv1.*", "norm1.*"])
    twin = Net()
    twin.load_state_dict(model.state_dict(), strict=True)
    model.load_state_dict(Net().state_dict(), strict=True)
    model.to(torch.float64).train()
    assert not model.norm1.training and model.norm1.running_mean.dtype == torch.float64


def test_a_compiled_model_and_its_gradients():
    model = Net().eval()
    cs.freeze(model, ["conv1.*", "norm1.*"])
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.allclose(compiled(DATA), model(DATA))
    compiled.train()
    assert model.training and not model.norm1.training
    compiled(DATA).sum().backward()
    assert model.conv1.weight.grad is None and model.conv2.weight.grad is not None
    inside = torch.compile(Net(), backend="eager")
    assert cs.freeze(inside, "_orig_mod.norm1.*").modules == ("_orig_mod.norm1",)
    assert not inside.train()._orig_mod.norm1.training


def test_a_gradient_from_before_moves_nothing_any_more():
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    model(DATA).sum().backward()
    cs.freeze(model, "conv1.*")
    before = model.conv1.weight.clone()
    optimizer.step()
    assert model.conv1.weight.grad is None and torch.equal(model.conv1.weight, before)


def test_unfreezing_gives_back_what_was_taken():
    model = Net().train()
    cs.freeze(model, "**")
    assert cs.freeze(model, "**").trainable == ()
    part = cs.unfreeze(model, ["norm1.weight"])
    assert part.keys == ("norm1.weight",) and part.modules == ("norm1",) and model.norm1.training and not model.norm2.training
    assert "train" not in model.norm1.__dict__
    rest = cs.unfreeze(model)
    assert rest.modules == ("norm2",) and len(rest.trainable) == 8 and "norm1.weight" not in rest.keys
    assert str(rest).startswith("thawed 7 tensors")
    with pytest.raises(ModelError, match="matches no parameter"):
        cs.unfreeze(model, "norm9.*")


def test_integers_do_not_learn():
    model = nn.ParameterDict({"a": nn.Parameter(torch.zeros(2, dtype=torch.int8), requires_grad=False), "b": nn.Parameter(torch.zeros(2))})
    cs.freeze(model, "*")
    assert cs.unfreeze(model).keys == ("b",)


def test_tied_parameters_are_frozen_by_any_name_and_under_a_record_only_if_not_all_are_fresh():
    def tied():
        model = nn.ModuleDict({"embed": nn.Embedding(4, 3), "head": nn.Linear(3, 4)})
        model["head"].weight = model["embed"].weight
        return model

    assert cs.freeze(tied(), "head.weight").keys == ("embed.weight",)
    assert cs.freeze(tied(), report("head.weight", "head.bias")).keys == ("embed.weight",)
    with pytest.raises(ModelError, match="there is no parameter to freeze"):
        cs.freeze(tied(), report("embed.weight", "head.weight", "head.bias"))


def test_partly_transferred_tensors_train_unless_they_count_as_transferred():
    record = report(*HEAD, partial=("conv1.weight",))
    assert "conv1.weight" in cs.freeze(Net(), record).trainable
    assert "conv1.weight" in cs.freeze(Net(), record, partial="transferred").keys
    with pytest.raises(ModelError, match="partial can't be"):
        cs.freeze(Net(), record, partial="half")


def test_a_merged_file_freezes_by_its_record(tmp_path):
    torch.save({key: value for key, value in Net().state_dict().items() if key not in HEAD}, tmp_path / "source.pt")
    cs.merge(tmp_path / "source.pt", Net(), tmp_path / "merged.pt")
    for what in (tmp_path / "merged.pt", cs.open(tmp_path / "merged.pt")):
        model = Net()
        assert cs.freeze(model, what).trainable == HEAD
    with pytest.raises(ModelError) as caught:
        cs.freeze(Net(), str(tmp_path / "merged.pt"))
    assert "ckptsurgeon.open(" in caught.value.hint


@pytest.mark.parametrize(
    ("what", "error"),
    [
        ("norm9.*", ModelError),
        (["conv1.*", "conv9.*"], ModelError),
        ("norm1.running_mean", ModelError),
        ([], ModelError),
        ([3], ArgumentError),
        (3, ArgumentError),
        (None, ArgumentError),
        (report("fc9.weight"), ModelError),
        (Checkpoint("m.pt", "torch-zip", "", {}), NoRecordError),
    ],
)
def test_what_can_not_be_frozen_changes_nothing(what, error):
    model = Net()
    with pytest.raises(error):
        cs.freeze(model, what)
    assert all(parameter.requires_grad for parameter in model.parameters()) and model.norm1.training
