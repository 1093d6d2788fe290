"""Optimizer, scheduler and scaler take their states whole or not at all; hostile ones end in a typed error or a reason."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from profiles import examples
from torch import nn

import ckptsurgeon as cs
from ckptsurgeon.errors import CheckpointError, ModelError
from ckptsurgeon.models.training import ema, optimizer_state, training_state
from ckptsurgeon.optimizer.format import Slot
from ckptsurgeon.optimizer.plan import ParameterPlan, SlotPlan
from ckptsurgeon.tensors import Refused


class Renaming(nn.Linear):
    """Its state_dict has other names than its parameters."""

    def __init__(self) -> None:
        super().__init__(3, 2)
        self.register_state_dict_post_hook(lambda _m, state, _p, _l: state.update(kernel=state.pop("weight")))


def test_parameters_are_found_by_what_they_are_not_by_name():
    net = Renaming()
    other = nn.Parameter(torch.zeros(4))
    optimizer = torch.optim.Adam([{"params": [net.bias, other]}, {"params": [net.weight], "amsgrad": True}])
    found = optimizer_state.parameters_of(net, optimizer)
    assert [(one.name, one.keys) for one in found] == [("bias", ("bias",)), ("parameter 1 of group 0", ()), ("weight", ("kernel",))]
    assert [slot.name for slot in found[2].slots][-1] == "max_exp_avg_sq" and len(found[0].slots) == 3


def test_a_subclass_of_a_persons_own_is_not_taken_for_torchs():
    class Mine(torch.optim.Adam):
        pass

    assert optimizer_state.kind_of(Mine([torch.zeros(1)])) is None
    assert optimizer_state.kind_of(torch.optim.AdamW([torch.zeros(1)])) == "AdamW"


def made(leaf: Any) -> Any:
    parameter = nn.Parameter(torch.ones(2, 3))
    optimizer = torch.optim.Adam([parameter])
    tree, tensors = training_state.live_tree(leaf)
    found = optimizer_state.parameters_of(nn.ParameterDict({"w": parameter}), optimizer)
    plan = ParameterPlan(found[0], (SlotPlan(Slot("step", "step"), (tree,)),), ((0, "w"),))
    return optimizer_state.make(optimizer, [plan], lambda meta: tensors[meta.name])


@pytest.mark.parametrize("step", [0, 7, 7.0, torch.tensor(7.0), torch.tensor([7]), torch.tensor(7, dtype=torch.float64)])
def test_steps_are_kept_as_torch_keeps_them(step: Any) -> None:
    value = made(step).state_dict["state"][0]["step"]
    assert value.dtype == torch.float32 and value.shape == () and value.item() == float(step)


@pytest.mark.parametrize("step", [-1, float("nan"), float("inf"), 1 << 60, 1 << 5000, torch.tensor(float("nan")), torch.tensor(1j), True])
def test_what_is_no_count_is_no_step(step: Any) -> None:
    found = made(step)
    assert found.state_dict["state"] == {} and found.plans[0].reason == "the source's step is no count of steps"


def test_a_moment_lies_as_its_parameter_and_is_a_copy():
    parameter = nn.Parameter(torch.ones(2, 3, 4, 4).contiguous(memory_format=torch.channels_last))
    optimizer = torch.optim.SGD([parameter], lr=0.1, momentum=0.9)
    found = optimizer_state.parameters_of(nn.ParameterDict({"w": parameter}), optimizer)
    moment = torch.randn(2, 3, 4, 4)
    tree, tensors = training_state.live_tree(moment, "m")
    plan = ParameterPlan(found[0], (SlotPlan(Slot("momentum_buffer"), (tree,)),), ((0, "w"),))
    state = optimizer_state.make(optimizer, [plan], lambda meta: tensors[meta.name]).state_dict
    with optimizer_state.loaded(optimizer, state):
        pass
    own = optimizer.state[parameter]["momentum_buffer"]
    assert own.stride() == parameter.stride() and torch.equal(own, moment) and own.data_ptr() != moment.data_ptr()


def test_a_failure_within_puts_everything_back():
    parameter = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.Adam([parameter], lr=torch.tensor(0.5))
    parameter.grad = torch.ones(2)
    optimizer.step()
    before = {name: value.clone() for name, value in optimizer.state[parameter].items()}
    empty = {"state": {}, "param_groups": optimizer.state_dict()["param_groups"]}
    with (
        pytest.raises(ZeroDivisionError),
        optimizer_state.loaded(optimizer, empty),
        optimizer_state.options_set(optimizer.param_groups, [{"lr": 0.125}]),
    ):
        assert optimizer.param_groups[0]["lr"].item() == 0.125 and not optimizer.state
        raise ZeroDivisionError
    assert all(torch.equal(value, before[name]) for name, value in optimizer.state[parameter].items())
    assert optimizer.param_groups[0]["lr"].item() == 0.5


OWN = {"last_epoch": 3, "base_lrs": [0.1], "milestones": Counter({5: 1}), "best": None, "mode": "min", "parts": [{"a": 1}], "t": (1, 2)}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"last_epoch": "3"}, "its last_epoch is a str, not a int"),
        ({"last_epoch": Refused("an object of x")}, "its last_epoch is an object of x"),
        ({"last_epoch": float("nan")}, "its last_epoch is not a number"),
        ({"base_lrs": [0.1, 0.2]}, "is for 2 groups, but the optimizer has 1"),
        ({"base_lrs": 0.1}, "its base_lrs is no list"),
        ({"last_epoch": 1 << 80}, "its last_epoch is beyond 64 bits"),
        ({"base_lrs": ["x"]}, "its base_lrs.0 is a str, not a float"),
        ({"milestones": {"x": 1}}, "its milestones is no count of whole numbers"),
        ({"milestones": [1]}, "its milestones is no count of whole numbers"),
        ({"best": [1]}, "its best is a list, or none"),
        ({"parts": [{"b": 1}]}, "its parts.0 lacks 'a' and has an extra 'b'"),
        ({"parts": []}, "its parts has 0 parts, not 1"),
        ({"more": 1}, "has an extra 'more'"),
    ],
)
def test_a_state_that_does_not_fit_says_why(change: dict[str, Any], reason: str) -> None:
    found = training_state.fitted(OWN, {**OWN, **change}, lambda _: torch.zeros(1), groups=1)
    assert found == reason


def test_a_state_that_fits_comes_in_the_objects_own_kinds():
    given_ = {**OWN, "milestones": {7: 2}, "best": 0.5, "t": [3, 4], "verbose": False}
    found = training_state.fitted(OWN, given_, lambda _: torch.zeros(1), groups=1)
    assert isinstance(found, dict) and found["milestones"] == Counter({7: 2}) and isinstance(found["milestones"], Counter)
    assert found["t"] == (3, 4) and "verbose" not in found
    assert training_state.fitted(OWN, 3, lambda _: torch.zeros(1)) == "it is no dict"
    tree, tensors = training_state.live_tree({"lr": torch.tensor(0.5)})
    assert training_state.fitted({"lr": 0.1}, tree, lambda meta: tensors[meta.name]) == {"lr": 0.5}


def test_live_trees_end_and_name_each_tensor_once():
    loop: list[Any] = [torch.zeros(2)]
    loop.append(loop)
    tree, tensors = training_state.live_tree({"a.b": torch.ones(1), "a": {"b": torch.zeros(1)}, "loop": loop, "x": object()})
    assert len(tensors) == 3 and tree["a.b"].name != tree["a"]["b"].name
    assert isinstance(tree["loop"][1], Refused) and isinstance(tree["x"], Refused)
    assert isinstance(training_state.live_tree(torch.eye(2).to_sparse())[0], Refused)


def test_averaged_models_in_their_wrappers():
    net = nn.Linear(3, 2)
    assert ema.averaged_model(net) is net and ema.wrapper_buffers(net) == {}
    swa = torch.optim.swa_utils.AveragedModel(net)
    assert ema.averaged_model(swa) is swa.module and list(ema.wrapper_buffers(swa)) == ["n_averaged"]

    class Ultra:
        def __init__(self) -> None:
            self.ema = net

    assert ema.averaged_model(Ultra()) is net
    with pytest.raises(ModelError, match="no averaged model"):
        ema.averaged_model(3)


_junk = st.one_of(
    st.none(), st.integers(), st.just(1 << 200), st.floats(), st.text(max_size=3), st.booleans(), st.just([]), st.just({}),
    st.sampled_from([torch.zeros(3, 2), torch.zeros(2, 3), torch.tensor(3), torch.zeros(0), torch.zeros(2, dtype=torch.int8)]),
)  # fmt: skip
_state = st.dictionaries(st.sampled_from(["step", "exp_avg", "exp_avg_sq", "x"]), _junk, max_size=4)
_optimizer = st.fixed_dictionaries(
    {
        "state": st.one_of(_junk, st.dictionaries(st.integers(0, 3), st.one_of(_junk, _state), max_size=3)),
        "param_groups": st.one_of(
            _junk,
            st.lists(
                st.one_of(
                    _junk,
                    st.fixed_dictionaries(
                        {"params": st.one_of(_junk, st.just([0, 1]), st.lists(_junk, max_size=2))},
                        optional={"betas": _junk, "param_names": _junk},
                    ),
                ),
                max_size=2,
            ),
        ),
    }
)


@settings(max_examples=examples(150), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.one_of(_junk, _optimizer), st.one_of(_junk, st.dictionaries(st.sampled_from(["step_size", "gamma", "base_lrs", "_last_lr"]), _junk))
)
def test_any_training_state_is_carried_or_refused_from_file_and_memory(tmp_path: Path, optimizer: Any, scheduler: Any) -> None:
    value = {"model": {"weight": torch.ones(2, 3), "bias": torch.ones(2)}, "optimizer": optimizer, "scheduler": scheduler}
    torch.save(value, tmp_path / "a.pt")
    for source in (tmp_path / "a.pt", value):
        net = nn.Linear(3, 2)
        new = torch.optim.Adam(net.parameters())
        schedule = torch.optim.lr_scheduler.StepLR(new, 3)
        before = schedule.state_dict()
        try:
            cs.transfer(source, net, optimizer=new, scheduler=schedule)
        except CheckpointError:
            assert not torch.equal(net.weight, value["model"]["weight"]) and not new.state and schedule.state_dict() == before
        else:
            assert torch.equal(net.weight, value["model"]["weight"])
            net(torch.ones(1, 3)).sum().backward()
            new.step()
            schedule.step()
