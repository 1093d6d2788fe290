"""Which nested dict of a file is the state_dict: the one that fits the target best, and never a guess between two."""

import pytest
import torch
from planning_support import archive, checkpoint, live, model
from torch import nn

from ckptsurgeon import formats
from ckptsurgeon.errors import RootError, UnsafeError
from ckptsurgeon.planning.plan import make_plan
from ckptsurgeon.planning.roots import checkpoint as seen_as
from ckptsurgeon.planning.roots import choose
from ckptsurgeon.tensors import Refused, StateDict

NET = {"conv.weight": (6, 3, 5, 5), "fc.weight": (2, 6), "fc.bias": (2,)}
ENCODER = {"emb.weight": (9, 4), "fc.weight": (4, 4)}


def wrapped(before, keys=NET):
    return {before + key: shape for key, shape in keys.items()}


def saved(path, value):
    torch.save(value, path)
    return formats.read(str(path))


def test_a_training_checkpoint(tmp_path):
    net = nn.Linear(3, 2)
    optimizer = torch.optim.Adam(net.parameters())
    net(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    value = {
        "epoch": 3,
        "model": net.state_dict(),
        "optimizer": optimizer.state_dict(),
        "best": torch.tensor(0.5),
        "rng": torch.get_rng_state(),
    }
    found = saved(tmp_path / "a.pt", value)
    for chosen in (choose(found), choose(found, target=live(net)), choose(found, root="model")):
        assert chosen.root == "model" and list(chosen) == ["weight", "bias"]
    assert any("optimizer" in place for place in chosen.left_behind) and "epoch" in chosen.left_behind


def test_a_lightning_checkpoint(tmp_path):
    net = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    value = {
        "pytorch-lightning_version": "2.1",
        "state_dict": {f"model.{key}": value for key, value in net.state_dict().items()},
        "callbacks": {"checkpoint": {"best_model_score": torch.tensor(0.3)}},
        "loops": {"fit": {"epoch": 2}},
        "lr_schedulers": [],
    }
    chosen = choose(saved(tmp_path / "a.ckpt", value), target=live(net))
    assert chosen.root == "state_dict"
    assert make_plan([chosen], live(net)).coverage.tensors == 1.0


@pytest.mark.parametrize("head", ["", "module."])
def test_raw_weights_and_their_average_are_a_tie(head):
    found = archive({"model": NET, "ema": wrapped(head)})
    with pytest.raises(RootError) as caught:
        choose(found, target=model(NET))
    assert "'model', 'ema'" in caught.value.reason and caught.value.hint == "choose one: root='model'"
    assert choose(found, root="ema").root == "ema"
    with pytest.raises(RootError, match=r"model \(3 tensors\), ema \(3 tensors\)"):
        choose(found)


def test_an_average_with_one_key_less_is_no_tie():
    found = archive({"ema": {key: NET[key] for key in list(NET)[1:]}, "model": NET})
    assert choose(found, target=model(NET)).root == "model"


def test_the_same_weights_twice_are_no_tie(tmp_path):
    net = nn.Linear(3, 2)
    found = saved(tmp_path / "a.pt", {"model": net.state_dict(), "state_dict": net.state_dict()})
    assert choose(found, target=live(net)).root == "model"


def test_two_models_in_one_file():
    found = archive({"encoder": ENCODER, "decoder": NET})
    assert choose(found, target=model(ENCODER)).root == "encoder"
    assert choose(found, target=model(NET)).root == "decoder"
    both = {**wrapped("encoder.", ENCODER), **wrapped("decoder.", NET)}
    chosen = choose(found, target=model(both))
    assert dict(chosen).keys() == both.keys() and chosen.left_behind == ()
    assert all(key == tensor.name for key, tensor in chosen.items())
    assert make_plan([chosen], model(both)).coverage.tensors == 1.0
    with pytest.raises(RootError, match="2 state_dicts"):
        choose(found)
    # By the root that a plan records, it is found again.
    assert list(choose(found, root=chosen.root)) == list(chosen)


def test_joined_below_a_parent_and_with_what_lies_in_the_parent():
    found = archive({"net.encoder": ENCODER, "net.decoder": NET, "ema": {"x": (3,)}})
    both = {**wrapped("encoder.", ENCODER), **wrapped("decoder.", NET)}
    chosen = choose(found, target=model(both))
    assert chosen.root == "net" and chosen.left_behind == ("ema (1 tensor)",)
    # The parent has tensors of its own, so that its name is taken.
    found = archive({"": {"scale": (1,)}, "encoder": ENCODER, "decoder": NET})
    chosen = choose(found, target=model({**both, "scale": (1,)}))
    assert len(chosen) == 6 and chosen.root == "**" and chosen.left_behind == ()
    assert list(choose(found, root="**")) == list(chosen)
    assert list(choose(found, root="")) == ["scale"]
    assert choose(found, root="").left_behind == ("encoder (2 tensors)", "decoder (3 tensors)")
    found = archive({"model": {"scale": (1,)}, "model.encoder": ENCODER, "optimizer": {"m": (3,)}})
    chosen = choose(found, target=model({**wrapped("encoder.", ENCODER), "scale": (1,)}))
    assert chosen.root == "model.**" and len(choose(found, root="model.**")) == 3
    assert chosen.left_behind == ("optimizer (1 tensor)",)


def test_joined_dicts_bring_their_metadata_ties_and_other_values(tmp_path):
    encoder, decoder = nn.BatchNorm1d(2), nn.Linear(2, 3)
    shared = {"w": decoder.weight.detach()}
    found = saved(tmp_path / "a.pt", {"encoder": encoder.state_dict(), "decoder": decoder.state_dict(), "tied": shared})
    chosen = choose(found, root="")
    assert chosen.module_metadata["encoder"] == {"version": 2}
    assert chosen.ties == (("decoder.weight", "tied.w"),)
    dicts = (StateDict("a", found.state_dicts[0].tensors, {"hook": Refused("an object of x.y")}), *found.state_dicts[1:])
    joined = choose(type(found)("a.pt", "torch-zip", "0", (), dicts), root="")
    with pytest.raises(UnsafeError, match=r"a\.hook"):
        make_plan([joined], model({key: tensor.shape for key, tensor in joined.items()}))


def test_dicts_whose_names_collide_are_not_joined():
    found = archive({"a": {"b.w": (2,)}, "a.b": {"w": (2,)}, "c": {"w": (3,)}})
    with pytest.raises(RootError, match="no state_dict at"):
        choose(found, root="")


def test_nested_deep_and_a_list_at_the_top(tmp_path):
    net = nn.Linear(3, 2)
    found = saved(tmp_path / "a.pt", {"a": {"b": [{"net": {"params": net.state_dict()}}, 3]}, "loss": torch.tensor(1.0)})
    assert choose(found).root == choose(found, target=live(net)).root == "a.b.0.net.params"
    found = saved(tmp_path / "b.pt", [nn.Linear(5, 5).state_dict(), net.state_dict()])
    assert choose(found, target=live(net)).root == "1"
    assert choose(found, root="0")["weight"].shape == (5, 5)


def test_dicts_without_weights_do_not_count_without_a_target():
    assert choose(archive({"losses": {"train": (), "val": ()}, "net": NET})).root == "net"
    assert choose(archive({"losses": {"train": (), "val": ()}})).root == "losses"
    with pytest.raises(RootError, match=r"losses .*, counts"):
        choose(archive({"losses": {"train": ()}, "counts": {"n": ()}}))


def test_a_name_that_is_not_there_gets_the_close_ones():
    found = archive({"model": NET, "model_ema": NET, "head": ENCODER})
    with pytest.raises(RootError) as caught:
        choose(found, root="modl")
    assert "is it model?" in (caught.value.hint or "")
    many = archive({f"client{number}": NET for number in range(20)})
    with pytest.raises(RootError) as caught:
        choose(many, root="x")
    assert "and 12 more" in (caught.value.hint or "")


def test_a_target_that_nothing_fits():
    other = model({"x.y": (7, 7)})
    with pytest.raises(RootError, match="none has a key of model:Net"):
        choose(archive({"encoder": ENCODER, "decoder": NET}), target=other)
    # With one root, or one that holds weights, there is nothing to choose, and the plan says that nothing fits.
    assert choose(archive({"model": NET}), target=other).root == "model"
    assert choose(archive({"model": NET, "losses": {"train": ()}}), target=other).root == "model"


def test_many_dicts_are_weighed_and_none_are_joined():
    clients = {f"client{number}": NET for number in range(300)}
    found = archive({**clients, "server": {**NET, "head": (500,)}})
    assert choose(found, target=model({**NET, "head": (500,)})).root == "server"
    parts = model({f"client{number}.{key}": shape for number in range(300) for key, shape in {**NET, "last": (1,)}.items()})
    with pytest.raises(RootError):
        choose(archive(clients), target=parts)
    assert len(choose(archive(clients), root="", target=parts)) == 900
    with pytest.raises(RootError, match="300 state_dicts that fit equally"):
        choose(archive(clients), target=model(NET))


def test_a_root_seen_as_a_checkpoint_says_what_it_leaves():
    found = archive({"": {"encoder.w": (2,)}, "encoder": {"w": (2,)}}, beside=("epoch",))
    assert seen_as(found, found.state_dicts[0]).left_behind == ("encoder (1 tensor)", "epoch")
    assert seen_as(found, found.state_dicts[1]).left_behind == ("the top dict (1 tensor)", "epoch")


def test_the_root_is_in_the_plan():
    chosen = choose(archive({"model": NET, "head": ENCODER}), root="model")
    plan = make_plan([chosen], checkpoint(NET, "b.pt"))
    assert plan.sources[0].root == "model" and plan.left_behind == ("head (2 tensors)",)


# ---- by a hair, the same bytes, and what is an optimizer's


class Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.bn = nn.Linear(3, 3), nn.BatchNorm1d(3)


def without_counter(state):
    return {key: value for key, value in state.items() if "num_batches" not in key}


@pytest.mark.parametrize("first", ["model", "ema"])
def test_by_a_hair_is_asked(tmp_path, first):
    full = Norm().state_dict()
    dicts = {"model": without_counter(full), "ema": {key: value + 1 for key, value in full.items()}}
    found = saved(tmp_path / "a.pt", {first: dicts[first], **dicts})
    with pytest.raises(RootError) as error:
        choose(found, target=live(Norm()))
    assert "'model'" in error.value.reason and "'ema'" in error.value.reason and error.value.exit_code == 2
    assert any("model (6 tensors): 6 of the target's 7" in words for words in error.value.problems)
    for root in dicts:
        chosen = choose(found, target=live(Norm()), root=root)
        assert chosen.root == root and make_plan([chosen], live(Norm())).transferred == tuple(dicts[root])


def test_nine_tenths_of_the_tensors_are_near_and_half_are_not():
    keys = {f"block.{number}.weight": (number + 1, 2) for number in range(20)}
    for lacking, asked in ((2, True), (10, False)):
        found = archive({"model": keys, "old": dict(list(keys.items())[lacking:])})
        if asked:
            with pytest.raises(RootError, match="'model', 'old'"):
                choose(found, target=model(keys))
        else:
            assert choose(found, target=model(keys)).root == "model"


def test_the_same_bytes_are_no_rival(tmp_path):
    state = Norm().state_dict()
    assert choose(saved(tmp_path / "a.pt", {"model": state, "best": without_counter(state)}), target=live(Norm())).root == "model"
    assert choose(saved(tmp_path / "b.pt", {"best": without_counter(state), "model": state}), target=live(Norm())).root == "model"
    # Saved as copies, the archive's own checksums say that they are the same.
    copies = {key: value.clone() for key, value in state.items()}
    assert choose(saved(tmp_path / "c.pt", {"model": state, "copy": copies}), target=live(Norm())).root == "model"


def test_a_parent_is_no_rival_of_its_parts_but_they_are_of_each_other(tmp_path):
    state = Norm().state_dict()
    part = saved(tmp_path / "a.pt", {"net": {"body": state, "head": {"w": torch.ones(1)}}})
    assert choose(part, target=live(Norm())).root == "net.body"
    both = saved(tmp_path / "b.pt", {"net": {"body": state, "twin": {key: value + 1 for key, value in state.items()}}})
    with pytest.raises(RootError, match=r"'net\.body', 'net\.twin'"):
        choose(both, target=live(Norm()))


MOMENTS = [
    lambda state: {"optimizer": {"exp_avg": state, "exp_avg_sq": state}},
    lambda state: {"exp_avg": state},
    lambda state: {"optimizer_states": [{"momentum_buffer": state}]},
    lambda state: {"optim_state_dict": {"state": {f"{key}.exp_avg": value for key, value in state.items()}}},
    lambda state: {"anything": {f"{key}.exp_avg": value for key, value in state.items()}},
    lambda state: {"optimizer": {"state": {key: {"exp_avg": value, "step": torch.tensor(1.0)} for key, value in state.items()}}},
]


@pytest.mark.parametrize("make", MOMENTS)
def test_moments_by_name_are_never_the_root_unasked(tmp_path, make):
    state = Norm().state_dict()
    moments = make({key: value + 1 for key, value in state.items()})
    found = saved(tmp_path / "a.pt", {**moments, "weights": state})
    assert choose(found, target=live(Norm())).root == choose(found).root == "weights"
    alone = saved(tmp_path / "b.pt", moments)
    for target in (None, live(Norm())):
        with pytest.raises(RootError, match="an optimizer's state and no model's") as error:
            choose(alone, target=target)
        assert "root=" in (error.value.hint or "")
    named = alone.state_dicts[0].root
    assert choose(alone, root=named).root == named
