"""Gradual unfreezing: stages join a live optimizer and its schedule, and nothing that was there before is touched."""

import copy

import pytest
import torch
from groups_support import SCHEDULERS, ratios, steps
from torch import nn

import ckptsurgeon as cs
from ckptsurgeon.errors import ModelError
from ckptsurgeon.models.training.groups import check_groups


class Net(nn.Module):
    """An embedding, three blocks with batch norms, a head."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)) for _ in range(3))
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        x = self.embed(x).mean(1)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


FRESH = ["head.weight", "head.bias"]


def data():
    return torch.randint(5, (8, 3))


def frozen():
    """A model of which only the head trains."""
    torch.manual_seed(0)
    model = Net()
    cs.freeze(model, ["embed.**", "blocks.**"])
    return model.train()


def head(model, make=torch.optim.AdamW, **options):
    return make(cs.param_groups(model, FRESH, lr=0.1, fresh_lr=0.4, weight_decay=0.01), **options)


def test_layers_come_back_top_down_each_at_its_rate():
    model = frozen()
    optimizer = head(model)
    thaw = cs.Thaw(model, optimizer, lr=0.1, layer_decay=0.5, at=2)
    assert [(stage.name, stage.at, stage.lr, len(stage.keys)) for stage in thaw.stages] == [
        ("layer 2", 2, 0.05, 4),
        ("layer 1", 4, 0.025, 4),
        ("layer 0", 6, 0.0125, 4),
        ("stem", 8, 0.00625, 1),
    ]
    seen = []
    for count in range(1, 10):
        steps(model, optimizer, 1, data)
        thawed = thaw.step()
        assert bool(thawed) is (count in (2, 4, 6, 8))
        check_groups(model, optimizer.param_groups)
        seen += thawed
    assert len(seen) == 13 and all(parameter.requires_grad for parameter in model.parameters())
    assert [group["name"] for group in optimizer.param_groups] == ["fresh", *(f"thawed/{s.name}" for s in thaw.stages)]
    assert [group["lr"] for group in optimizer.param_groups] == [0.4, 0.05, 0.025, 0.0125, 0.00625]
    assert optimizer.param_groups[4]["param_names"] == ["embed.weight"] and str(thaw).count("(thawed)") == 4


def test_norms_of_a_stage_follow_the_models_mode_again():
    model = frozen()
    thaw = cs.Thaw(model, head(model), ["blocks.2.**"], lr=0.1)
    assert not model.blocks[2][1].training
    thaw.step()
    assert model.blocks[2][1].training and not model.blocks[1][1].training
    before = model.blocks[1][1].running_mean.clone()
    model.train()(data())
    assert torch.equal(model.blocks[1][1].running_mean, before)


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (torch.optim.SGD, {"momentum": 0.9}),
        (torch.optim.AdamW, {}),
        (torch.optim.AdamW, {"fused": True}),
        (torch.optim.AdamW, {"foreach": True, "amsgrad": True, "betas": (0.8, 0.9)}),
        (torch.optim.Adagrad, {}),
    ],
)
def test_the_others_state_is_not_touched(make, options):
    model = frozen()
    optimizer = head(model, make, **options)
    thaw = cs.Thaw(model, optimizer, ["blocks.2.**", ["blocks.1.**", "blocks.0.**"]], lr=0.1)
    steps(model, optimizer, 3, data)
    first = optimizer.param_groups[0]
    group = {word: copy.copy(value) for word, value in first.items() if word != "params"}
    objects = {(id(p), word): value for p, row in optimizer.state.items() for word, value in row.items()}
    values = {place: value.clone() for place, value in objects.items() if isinstance(value, torch.Tensor)}
    assert objects
    thaw.step()
    assert {(id(p), word) for p, row in optimizer.state.items() for word in row} >= set(objects)
    for parameter, row in optimizer.state.items():
        for word, value in row.items():
            if (id(parameter), word) in objects:
                assert value is objects[id(parameter), word]
                assert not isinstance(value, torch.Tensor) or torch.equal(value, values[id(parameter), word])
    assert optimizer.param_groups[0] is first and {word: first[word] for word in group} == group
    added = optimizer.param_groups[1]
    assert {word: added[word] for word in options} == options and added["weight_decay"] == 0.01
    before = model.blocks[2][0].weight.detach().clone()
    steps(model, optimizer, 1, data)
    assert not torch.equal(model.blocks[2][0].weight, before)
    assert thaw.step() == tuple(name for name, _ in model.named_parameters() if name.startswith(("blocks.0", "blocks.1")))


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_new_group_joins_a_schedule_and_keeps_its_ratio(name):
    """Beside an optimizer whose groups were all there from the beginning: the rates are the same at every step."""
    model, whole = frozen(), Net()
    optimizer = head(model, torch.optim.SGD, momentum=0.9)
    scheduler = SCHEDULERS[name](optimizer)
    rates = {"head.*": 0.4, "blocks.2.**": 0.1, "blocks.1.**": 0.05}
    cs.freeze(whole, ["embed.**", "blocks.0.**"])
    twin = torch.optim.SGD(cs.param_groups(whole, rates, lr=0.4), momentum=0.9)
    course = SCHEDULERS[name](twin)
    # a group under CyclicLR or OneCycleLR takes its place by base_lr, or max_lr: here those are the groups' own rates
    thaw = cs.Thaw(model, optimizer, ["blocks.2.**", "blocks.1.**"], lr=0.2, layer_decay=0.5, at=[2, 5], scheduler=scheduler)
    metric = [1.0] if name == "ReduceLROnPlateau" else []
    for count in range(1, 10):
        for one, own, schedule in ((model, optimizer, scheduler), (whole, twin, course)):
            steps(one, own, 1, data)
            schedule.step(*metric)
        thaw.step()
        number = len(optimizer.param_groups)
        assert number == 1 + (count >= 2) + (count >= 5)
        for word in ("lr", "momentum"):
            assert [g[word] for g in optimizer.param_groups] == pytest.approx([g[word] for g in twin.param_groups[:number]]), count
        assert ratios(optimizer.param_groups) == pytest.approx([1, 0.25, 0.125][:number])
        assert len(scheduler.get_last_lr()) == number


def test_several_schedulers_at_once_and_a_rate_that_is_a_tensor():
    model = frozen()
    optimizer = head(model, torch.optim.Adam)
    optimizer.param_groups[0]["lr"] = torch.tensor(0.4)
    one, other = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5), torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    thaw = cs.Thaw(model, optimizer, ["blocks.2.**", "blocks.1.**"], lr=0.1, scheduler=[one, other])
    for _ in range(3):
        steps(model, optimizer, 1, data)
        one.step()
        other.step()
        thaw.step()
    lrs = [float(group["lr"]) for group in optimizer.param_groups]
    assert lrs == pytest.approx([0.4 / 64, 0.1 / 64, 0.1 / 64])
    assert len({id(group["lr"]) for group in optimizer.param_groups}) == 3


def test_a_scheduler_that_is_not_given_is_told_before_anything_changes():
    model = frozen()
    optimizer = head(model)
    thaw = cs.Thaw(model, optimizer, ["blocks.2.**"], lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    with pytest.raises(ModelError, match="was not passed"):
        thaw.step()
    assert len(optimizer.param_groups) == 1 and not model.blocks[2][0].weight.requires_grad
    with pytest.raises(ModelError, match="was not passed"):
        cs.Thaw(model, optimizer, ["blocks.2.**"], lr=0.1)
    with pytest.raises(ModelError, match="another optimizer"):
        cs.Thaw(model, head(model), ["blocks.2.**"], lr=0.1, scheduler=scheduler)
    with pytest.raises(ModelError, match="is no torch scheduler"):
        cs.Thaw(model, optimizer, ["blocks.2.**"], lr=0.1, scheduler=[3])


def start():
    """All that a process begins with."""
    model = frozen()
    optimizer = head(model)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
    thaw = cs.Thaw(model, optimizer, lr=0.1, layer_decay=0.5, at=2, no_decay=True, scheduler=scheduler)
    return model, optimizer, scheduler, thaw


def run(parts, number, seed):
    model, optimizer, scheduler, thaw = parts
    torch.manual_seed(seed)
    for _ in range(number):
        steps(model, optimizer, 1, data)
        scheduler.step()
        thaw.step()


def test_another_process_goes_on_as_if_nothing_had_happened(tmp_path):
    through = start()
    run(through, 5, 1)
    model, optimizer, scheduler, thaw = through
    torch.save(
        {"m": model.state_dict(), "o": optimizer.state_dict(), "s": scheduler.state_dict(), "t": thaw.state_dict()}, tmp_path / "a.pt"
    )
    run(through, 5, 2)
    again = start()
    saved = torch.load(tmp_path / "a.pt", weights_only=True)
    again[3].load_state_dict(saved["t"])  # first: it brings the groups back
    for part, word in zip(again, ("m", "o", "s"), strict=False):
        part.load_state_dict(saved[word])
    run(again, 5, 2)
    assert all(torch.equal(one, two) for one, two in zip(through[0].state_dict().values(), again[0].state_dict().values(), strict=True))
    assert [g["name"] for g in again[1].param_groups] == [g["name"] for g in through[1].param_groups]
    assert [g["lr"] for g in again[1].param_groups] == [g["lr"] for g in through[1].param_groups]
    assert again[3].state_dict() == through[3].state_dict()


def test_a_state_of_other_stages_is_refused():
    model = frozen()
    thaw = cs.Thaw(model, head(model), ["blocks.2.**"], lr=0.1)
    with pytest.raises(ModelError, match="other stages"):
        thaw.load_state_dict({"steps": 1, "stages": [["embed.weight"]]})
    thaw.step()
    with pytest.raises(ModelError, match="other stages"):
        thaw.load_state_dict({"steps": 0, "stages": []})


def test_no_decay_splits_a_stage():
    model = frozen()
    optimizer = head(model)
    cs.Thaw(model, optimizer, ["blocks.2.**"], lr=0.1, weight_decay=0.2, no_decay=True).step()
    assert [(group["name"], group["weight_decay"], group["param_names"]) for group in optimizer.param_groups[1:]] == [
        ("thawed/blocks.2.**", 0.2, ["blocks.2.0.weight"]),
        ("thawed/blocks.2.**/no decay", 0.0, ["blocks.2.0.bias", "blocks.2.1.weight", "blocks.2.1.bias"]),
    ]


def test_an_optimizer_without_names_gets_none_and_one_that_knows_a_parameter_keeps_it():
    model = Net()
    optimizer = torch.optim.SGD(model.head.parameters(), lr=0.1, momentum=0.9)
    optimizer.add_param_group({"params": list(model.blocks[2].parameters()), "lr": 0.7})
    steps(model, optimizer, 1, data)
    state = optimizer.state[model.blocks[2][0].weight]["momentum_buffer"]
    cs.freeze(model, ["embed.**", "blocks.**"])
    thaw = cs.Thaw(model, optimizer, ["blocks.2.**", "blocks.1.**"], lr=0.1)
    assert len(thaw.step()) == 4 and len(optimizer.param_groups) == 2 and optimizer.param_groups[1]["lr"] == 0.7
    assert optimizer.state[model.blocks[2][0].weight]["momentum_buffer"] is state
    thaw.step()
    assert len(optimizer.param_groups) == 3 and "param_names" not in optimizer.param_groups[2]


def test_what_no_stage_names_stays_frozen_and_the_first_that_matches_wins():
    model = frozen()
    thaw = cs.Thaw(model, head(model), ["blocks.2.0.*", "blocks.2.**"], lr=0.1)
    assert [stage.keys for stage in thaw.stages] == [("blocks.2.0.weight", "blocks.2.0.bias"), ("blocks.2.1.weight", "blocks.2.1.bias")]
    for _ in range(3):
        thaw.step()
    assert not model.embed.weight.requires_grad


@pytest.mark.parametrize(
    ("stages", "options", "message"),
    [
        (["blok.2.**"], {}, "matches no parameter"),
        (["head.*"], {}, "matches trainable parameters only"),
        (["blocks.**", "blocks.2.**"], {}, "is empty: earlier stages thaw all that it matches"),
        (["blocks.2.**"], {"lr": -1.0}, "lr can't be"),
        (["blocks.2.**"], {"layer_decay": 2.0}, "layer_decay can't be"),
        (["blocks.2.**"], {"at": 0}, "at can't be"),
        (["blocks.2.**"], {"at": [1, 2]}, "at has 2 counts"),
        (["blocks.2.**", "blocks.1.**"], {"at": [2, 1]}, "at can't be"),
        (["blocks.2.**"], {"no_decay": "head.*"}, "matches other parameters only"),
        (None, {"layers": "blok.{i}.**"}, "match no parameter"),
    ],
)
def test_stages_that_can_not_be(stages, options, message):
    model = frozen()
    with pytest.raises(ModelError, match=message):
        cs.Thaw(model, head(model), stages, **{"lr": 0.1, **options})


def test_a_model_with_nothing_frozen_has_nothing_to_thaw():
    model = Net()
    with pytest.raises(ModelError, match="no frozen parameter"):
        cs.Thaw(model, torch.optim.SGD(model.parameters(), lr=0.1), lr=0.1)


def test_a_real_transformer_thaws_by_its_layers():
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(vocab_size=12, hidden_size=8, num_hidden_layers=3, num_attention_heads=2, intermediate_size=16)
    model = transformers.BertForSequenceClassification(config)
    cs.freeze(model, "bert.**")
    fresh = ["classifier.weight", "classifier.bias"]
    optimizer = torch.optim.AdamW(cs.param_groups(model, fresh, lr=1e-4, fresh_lr=1e-3))
    thaw = cs.Thaw(model, optimizer, lr=1e-4, layer_decay=1 / 2.6)
    assert [stage.name for stage in thaw.stages] == ["head", "layer 2", "layer 1", "layer 0", "stem"]
    assert thaw.stages[0].keys == ("bert.pooler.dense.weight", "bert.pooler.dense.bias") and thaw.stages[0].lr == 1e-4
    for _ in thaw.stages:
        thaw.step()
    check_groups(model, optimizer.param_groups)


def test_lightning_thaws_by_epoch(tmp_path):
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = frozen()

        def training_step(self, batch, _index):
            return self.net(batch[0]).square().mean()

        def configure_optimizers(self):
            optimizer = head(self.net)
            scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
            self.thaw = cs.Thaw(self.net, optimizer, lr=0.1, at=1, scheduler=scheduler)
            return {"optimizer": optimizer, "lr_scheduler": scheduler}

        def on_train_epoch_end(self):
            self.thaw.step()

    module = Module()
    rows = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randint(5, (8, 3))), batch_size=4)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    lightning.Trainer(max_epochs=3, accelerator="cpu", default_root_dir=tmp_path, **quiet).fit(module, rows)
    groups = module.thaw._optimizer.param_groups
    assert [group["name"] for group in groups] == ["fresh", "thawed/layer 2", "thawed/layer 1", "thawed/layer 0"]
    assert ratios(groups) == pytest.approx([1, 0.25, 0.25, 0.25]) and not module.net.embed.weight.requires_grad
    assert all(bool(module.thaw._optimizer.state[parameter]) for group in groups[:3] for parameter in group["params"])


def test_a_plateau_with_a_floor_for_each_group():
    model = frozen()
    optimizer = head(model)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0, min_lr=[1e-3])
    thaw = cs.Thaw(model, optimizer, ["blocks.2.**"], lr=0.1, scheduler=scheduler)
    steps(model, optimizer, 1, data)
    thaw.step()
    for _ in range(3):
        scheduler.step(1.0)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.1, 0.025]) and scheduler.min_lrs == [1e-3, 1e-3]


def test_a_first_group_that_stands_still_lends_no_ratio():
    model = frozen()
    optimizer = torch.optim.SGD(model.head.parameters(), lr=torch.tensor(0.0))
    cs.Thaw(model, optimizer, ["blocks.2.**"], lr=0.1).step()
    assert isinstance(optimizer.param_groups[1]["lr"], torch.Tensor) and float(optimizer.param_groups[1]["lr"]) == pytest.approx(0.1)
