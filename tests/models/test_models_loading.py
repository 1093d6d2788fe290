"""Modules that load in their own way: `transfer` gives what torch's `load_state_dict(strict=False)` does, or the model stays as it was."""

from __future__ import annotations

import copy
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from loading_support import KINDS, Derives, InPlace, Raises, Remaps, Scaled, Turned, by_torch, everything, same
from profiles import examples
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import ckptsurgeon as cs
from ckptsurgeon.errors import CheckpointError, TargetError

VERSIONS = st.sampled_from([None, 1, 2, 3])


def tree(kinds: list[type[nn.Module]], nested: bool) -> nn.Module:
    model = nn.ModuleDict({f"m{number}": kind() for number, kind in enumerate(kinds)})
    return nn.Sequential(OrderedDict(stem=nn.Linear(3, 3), body=model)) if nested else model


@given(st.data())
@settings(max_examples=examples(60), deadline=None)
def test_any_tree_of_loaders_gives_what_torch_gives(data: st.DataObject) -> None:
    kinds = data.draw(st.lists(st.sampled_from(KINDS), min_size=1, max_size=4))
    nested = data.draw(st.booleans())
    torch.manual_seed(data.draw(st.integers(0, 99)))
    state: Any = tree(kinds, nested).state_dict()
    for path in list(state._metadata):
        version = data.draw(VERSIONS)
        state._metadata[path] = {} if version is None else {"version": version}
    if data.draw(st.booleans()):
        del state._metadata
    for key in data.draw(st.lists(st.sampled_from(sorted(state)), max_size=3, unique=True)):
        del state[key]
    assume(state)  # nothing at all to take is no coverage
    model = tree(kinds, nested)
    before = everything(model)
    try:
        truth = by_torch(model, state)
    except (KeyError, RuntimeError):  # of the module's own code, for what is not there
        with pytest.raises(CheckpointError):
            cs.transfer(state, model)
        same(everything(model), before)
        return
    kept = copy.deepcopy(state)
    cs.transfer(state, model)
    same(everything(model), everything(truth))
    same(state, kept)  # the source is not changed in place


@pytest.mark.parametrize("form", ["file", "legacy", "safetensors", "dict", "model"])
def test_the_sources_version_counts(form: str, tmp_path: Path) -> None:
    source = nn.Sequential(Turned(), InPlace())
    state: Any = source.state_dict()
    state._metadata["0"]["version"] = 1
    state._metadata["1"]["version"] = 2
    given: Any = state
    if form == "model":
        source[0]._version, source[1]._version = 1, 2
        given = source
    elif form == "safetensors":
        from safetensors.torch import save_file

        given = tmp_path / "a.safetensors"
        save_file(state, given)
        del state._metadata
    elif form != "dict":
        given = tmp_path / "a.pt"
        torch.save(state, given, _use_new_zipfile_serialization=form == "file")
    model = nn.Sequential(Turned(), InPlace())
    truth = by_torch(model, state)
    assert not torch.equal(truth[0].w, source[0].w)
    cs.transfer(given, model)
    same(everything(model), everything(truth))


@pytest.mark.parametrize(
    "wrap",
    [lambda net: net, nn.DataParallel, checkpoint_wrapper, lambda net: nn.ModuleDict({"deep": net})],
    ids=["as it is", "DataParallel", "checkpoint", "deep"],
)
def test_the_version_of_a_nested_module_comes_along_under_a_prefix_and_a_rename(wrap: Any, tmp_path: Path) -> None:
    source = nn.ModuleDict({"old": nn.Sequential(nn.Linear(3, 3), nn.Sequential(Turned()))})
    state: Any = source.state_dict()
    state._metadata["old.1.0"]["version"] = 1
    saved: Any = OrderedDict((f"module.{key}", value) for key, value in state.items())
    saved._metadata = OrderedDict((f"module.{path}".rstrip("."), local) for path, local in state._metadata.items())
    torch.save(saved, tmp_path / "a.pt")
    inner = nn.ModuleDict({"new": nn.Sequential(nn.Linear(3, 3), nn.Sequential(Turned()))})
    model = wrap(inner)
    head = next(iter(model.state_dict())).partition("new.")[0]
    cs.transfer(tmp_path / "a.pt", model, rename={"module.old.{**p}": f"{head}new.{{**p}}"})
    assert torch.equal(inner["new"][1][0].w, source["old"][1][0].w.t())
    assert torch.equal(inner["new"][0].weight, source["old"][0].weight)


def test_an_overridden_load_state_dict_of_the_model_is_called() -> None:
    state, model = Remaps().state_dict(), Remaps()
    truth = by_torch(model, state)
    cs.transfer(state, model)
    same(everything(model), everything(truth))


def test_a_failure_half_way_leaves_tensors_and_attributes_as_they_were() -> None:
    net = nn.ModuleDict({"a": nn.Linear(3, 3), "b": Scaled(), "c": Derives(), "d": Raises()})
    before = everything(net)
    source: Any = nn.ModuleDict({"a": nn.Linear(3, 3), "b": Scaled(), "c": Derives(), "d": Raises()}).state_dict()
    parameter = net["d"].w
    with pytest.raises(TargetError, match=r"not this one.*as it is before|not this one.*as it was before") as caught:
        cs.transfer(source, net)
    assert "outside" in caught.value.reason
    same(everything(net), before)
    assert (net["b"].calls, net["c"].loaded, net["d"].seen, net["d"].w is parameter) == ([], 0, {}, True)


def test_a_tensor_of_two_modules_one_of_which_loads_in_its_own_way() -> None:
    def net(first: bool) -> nn.Module:
        own, plain = Turned(), nn.Linear(3, 3, bias=False)
        plain.weight = own.w
        return nn.Sequential(own, plain) if first else nn.Sequential(plain, own)

    for first in (True, False):
        state: Any = net(first).state_dict()
        for local in state._metadata.values():
            local["version"] = 1
        model = net(first)
        truth = by_torch(model, state)
        cs.transfer(state, model)
        same(everything(model), everything(truth))


def test_one_module_at_two_places() -> None:
    def net() -> nn.Module:
        shared = Scaled()
        return nn.ModuleDict({"a": shared, "b": shared, "c": nn.Linear(3, 3)})

    state, model = net().state_dict(), net()
    truth = by_torch(model, state)
    cs.transfer(state, model)
    same(everything(model), everything(truth))


def test_other_modules_take_their_values_straight_from_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ckptsurgeon.models.training import transfer

    torch.save(nn.Sequential(Turned(), nn.Linear(3, 3)).state_dict(), tmp_path / "a.pt")
    held: list[tuple[int, ...]] = []
    real = transfer.in_memory
    monkeypatch.setattr(transfer, "in_memory", lambda value: (held.append(tuple(value.meta.shape)), real(value))[1])
    cs.transfer(tmp_path / "a.pt", nn.Sequential(Turned(), nn.Linear(3, 3)))
    assert held == [(3, 3)]  # Turned's matrix, and nothing of the other layer


def test_a_loader_that_gives_the_model_other_tensors_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def grow(self: Any, state: Any, prefix: str, *rest: Any) -> None:
        state.clear()
        self.layers[0] = nn.Linear(4, 4)

    class Grows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(3, 3))

        def _load_from_state_dict(self, state: Any, prefix: str, *rest: Any) -> None:
            self.layers[0] = nn.Linear(4, 4)
            super()._load_from_state_dict(state, prefix, *rest)

    model = Grows()
    before, layer = everything(model), model.layers[0]
    with pytest.raises(CheckpointError):
        cs.transfer(Grows().state_dict(), model)
    same(everything(model), before)
    assert model.layers[0] is layer
    monkeypatch.setattr(Grows, "_load_from_state_dict", grow)
    with pytest.raises(TargetError, match="replaces tensors by tensors of another shape"):
        cs.transfer(model.state_dict(), model)
    same(everything(model), before)


def test_two_sources_versions_within_one_module_are_refused(tmp_path: Path) -> None:
    model = nn.Sequential(InPlace())
    for name, version, keys in (("a.pt", 2, ("weight", "bias")), ("b.pt", 3, ("running_mean", "running_var"))):
        state: Any = nn.Sequential(InPlace()).state_dict()
        state._metadata["0"]["version"] = version
        for key in list(state):
            if key.split(".")[1] not in keys:
                del state[key]
        torch.save(state, tmp_path / name)
    with pytest.raises(cs.CheckpointError, match=r"0, a InPlace: version 2 in .*version 3"):
        cs.plan([tmp_path / "a.pt", tmp_path / "b.pt"], model)
