"""A merged file of modules that load in their own way loads, by torch, to the model that torch makes of the source; or it is refused."""

from __future__ import annotations

import copy
import json
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from loading_support import KINDS, Assigns, Frozen, InPlace, Plain, Scaled, Turned, by_torch, everything, same
from profiles import examples
from safetensors.torch import load_file, save_file
from torch import nn

import ckptsurgeon as cs
from ckptsurgeon.errors import PlanError
from ckptsurgeon.planning.planfile import from_json, to_json

VERSIONS = st.sampled_from([None, 1, 2, 3])


def of(*kinds: type[nn.Module]) -> nn.Module:
    return nn.Sequential(OrderedDict((f"m{number}", kind()) for number, kind in enumerate(kinds)))


def state_of(model: nn.Module, **versions: int | None) -> Any:
    state: Any = model.state_dict()
    for path, version in versions.items():
        state._metadata[path] = {} if version is None else {"version": version}
    return state


def loaded(model: nn.Module, path: Path) -> dict[str, torch.Tensor]:
    """What torch alone makes of a file, strictly."""
    fresh = copy.deepcopy(model)
    state = load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)
    fresh.load_state_dict(state)
    return everything(fresh)


@given(data=st.data())
@settings(max_examples=examples(60), deadline=None)
def test_a_merged_file_of_any_tree_loads_to_the_model_of_torch(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("merged")
    kinds = data.draw(st.lists(st.sampled_from(KINDS), min_size=1, max_size=3))
    torch.manual_seed(data.draw(st.integers(0, 99)))
    state = of(*kinds).state_dict()
    same_versions = data.draw(st.booleans())
    for path in list(state._metadata):  # type: ignore[attr-defined]
        if not same_versions:
            version = data.draw(VERSIONS)
            state._metadata[path] = {} if version is None else {"version": version}  # type: ignore[attr-defined]
    for key in data.draw(st.lists(st.sampled_from(sorted(state)), max_size=2, unique=True)):
        del state[key]
    assume(state)
    torch.save(state, folder / "a.pt")
    model = of(*kinds)
    # What is fresh in a module of an equal version is not refused, and has no counterpart in torch's load.
    own: Any = model.state_dict()
    fresh = {key.partition(".")[0] for key in own if key not in state}
    apart = {path for path in fresh if getattr(state, "_metadata", {}).get(path, {}) == own._metadata[path]}
    apart |= {path for path in fresh if not any(key.startswith(f"{path}.") for key in state)}  # nothing of it has a version
    apart |= {path for path in fresh if kinds[int(path[1:])] is Assigns}  # changes its values at every load, whatever their version
    try:
        truth = everything(by_torch(model, torch.load(folder / "a.pt", weights_only=True)))
    except (KeyError, RuntimeError):
        return
    for name in ("o.pt", "o.safetensors"):
        try:
            cs.merge(folder / "a.pt", model, folder / name)
        except PlanError as error:
            assert not (folder / name).exists()
            assert "load to another model" in error.reason or "no file loads" in error.reason, error
            assert name.endswith("safetensors") or not same_versions
            continue
        found = loaded(model, folder / name)
        same(*({key: value for key, value in one.items() if key.partition(".")[0] not in apart} for one in (found, truth)))


@pytest.mark.parametrize("kind", [Turned, InPlace, Frozen, Scaled, Plain])
def test_equal_versions_are_never_refused(kind: type[nn.Module], tmp_path: Path) -> None:
    source, model = of(kind), of(kind)
    torch.save(source.state_dict(), tmp_path / "a.pt")
    truth = by_torch(model, source.state_dict())
    report = cs.merge(tmp_path / "a.pt", model, tmp_path / "o.pt")
    assert report.verification is not None and report.verification.ok
    same(torch.load(tmp_path / "o.pt", weights_only=True), source.state_dict())
    same(loaded(model, tmp_path / "o.pt"), everything(truth))


def test_old_values_keep_their_version_where_all_are_the_sources(tmp_path: Path) -> None:
    torch.save(state_of(of(Turned, Plain), m0=1), tmp_path / "a.pt")
    report = cs.merge(tmp_path / "a.pt", of(Turned, Plain), tmp_path / "o.pt")
    found = torch.load(tmp_path / "o.pt", weights_only=True)
    assert found._metadata["m0"] == {"version": 1} and found._metadata["m1.norm"] == {"version": 2}
    assert any(one.code == "version" and "m0: Turned loads in its own way, at version 2" in one.message for one in report.findings)


def test_old_values_beside_fresh_ones_are_written_as_torch_leaves_them(tmp_path: Path) -> None:
    source = state_of(of(InPlace, nn.Identity), m0=2)
    source["m0.running_var"] += 0.5
    del source["m0.bias"]
    torch.save(source, tmp_path / "a.pt")
    model = of(InPlace)
    truth = by_torch(model, torch.load(tmp_path / "a.pt", weights_only=True))
    plan = cs.plan(tmp_path / "a.pt", model)
    assert plan.loaded == ("m0",)
    report = cs.merge(tmp_path / "a.pt", model, tmp_path / "o.pt")
    found = torch.load(tmp_path / "o.pt", weights_only=True)
    assert report.fresh == ("m0.bias",) and found._metadata["m0"] == {"version": 3}
    assert torch.equal(found["m0.running_var"], source["m0.running_var"] - 1e-5)
    same(loaded(model, tmp_path / "o.pt"), everything(truth))


def test_a_cast_goes_along_with_the_conversion(tmp_path: Path) -> None:
    torch.save(state_of(of(Turned), m0=1), tmp_path / "a.pt")
    model = of(Turned)
    wanted = torch.load(tmp_path / "a.pt", weights_only=True)["m0.w"].bfloat16().float().t()
    cs.merge(tmp_path / "a.pt", model, tmp_path / "o.pt", dtype="BF16")
    assert torch.load(tmp_path / "o.pt", weights_only=True)["m0.w"].dtype == torch.bfloat16
    assert torch.equal(loaded(model, tmp_path / "o.pt")["m0.w"], wanted)


def test_what_scales_on_every_load_and_is_partly_fresh_is_refused_by_name_under_another_version(tmp_path: Path) -> None:
    state = state_of(of(Scaled), m0=None)
    del state["m0.inner.bias"]
    torch.save(state, tmp_path / "a.pt")
    with pytest.raises(PlanError, match="m0, a Scaled, changes what it loads every time"):
        cs.merge(tmp_path / "a.pt", of(Scaled), tmp_path / "o.pt")
    assert not (tmp_path / "o.pt").exists()


def test_safetensors_of_an_old_version_is_refused_and_says_what_holds_it(tmp_path: Path) -> None:
    torch.save(state_of(of(Turned), m0=1), tmp_path / "a.pt")
    torch.save(of(Turned).state_dict(), tmp_path / "b.pt")
    model = of(Turned)
    cs.merge(tmp_path / "a.pt", model, tmp_path / "o.safetensors", overwrite=True)  # without a version its code takes it for the first
    same(loaded(model, tmp_path / "o.safetensors"), everything(by_torch(model, torch.load(tmp_path / "a.pt", weights_only=True))))
    with pytest.raises(PlanError, match="m0, a Turned, loads by the version") as caught:
        cs.merge(tmp_path / "b.pt", model, tmp_path / "n.safetensors")
    assert caught.value.hint == "write a .pt file instead: -o OUT.pt"


def test_a_plan_of_versions_survives_its_file(tmp_path: Path) -> None:
    state = state_of(of(InPlace), m0=2)
    del state["m0.weight"]
    torch.save(state, tmp_path / "a.pt")
    plan = cs.plan(tmp_path / "a.pt", of(InPlace))
    back = from_json(json.dumps(to_json(plan)).encode(), "plan.json")
    assert (back.versions, back.loaded, back.module_metadata) == ({"m0": {"version": 2}}, ("m0",), plan.module_metadata)


@pytest.mark.parametrize("versions", [(1, 2), (2, 1)])
def test_an_average_over_two_versions_is_refused(versions: tuple[int, int], tmp_path: Path) -> None:
    for name, version in zip("ab", versions, strict=True):
        torch.save(state_of(of(Turned), m0=version), tmp_path / f"{name}.pt")
    for target in (of(Turned), None):
        with pytest.raises(PlanError, match="several versions"):
            cs.plan([tmp_path / "a.pt", tmp_path / "b.pt"], target, average=True)


def test_a_file_as_the_target_keeps_each_modules_own_version(tmp_path: Path) -> None:
    torch.save(state_of(of(Turned, Plain), m0=1, **{"m1.norm": 1}), tmp_path / "old.pt")
    torch.save(of(Turned, Plain).state_dict(), tmp_path / "new.pt")
    cs.merge(tmp_path / "old.pt", tmp_path / "new.pt", tmp_path / "o.pt")
    model = of(Turned, Plain)
    same(loaded(model, tmp_path / "o.pt"), loaded(model, tmp_path / "old.pt"))
    part = torch.load(tmp_path / "old.pt", weights_only=True)
    del part["m1.norm.weight"]
    torch.save(part, tmp_path / "part.pt")
    cs.merge(tmp_path / "part.pt", tmp_path / "new.pt", tmp_path / "p.pt")  # a norm's versions don't matter
    torch.save(state_of(of(InPlace), m0=2), tmp_path / "in2.pt")
    torch.save(of(InPlace).state_dict(), tmp_path / "in3.pt")
    save_file({"m0.weight": torch.ones(3)}, tmp_path / "few.safetensors")
    cs.merge(tmp_path / "few.safetensors", tmp_path / "in3.pt", tmp_path / "q.pt")
    assert torch.load(tmp_path / "q.pt", weights_only=True)._metadata["m0"] == {"version": 3}


def test_a_mixture_of_versions_with_a_file_as_the_target_is_refused(tmp_path: Path) -> None:
    class Two(nn.Module):
        _version = 2

        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))

    state = state_of(of(Two), m0=1)
    del state["m0.b"]
    torch.save(state, tmp_path / "a.pt")
    torch.save(of(Two).state_dict(), tmp_path / "b.pt")
    with pytest.raises(PlanError, match="several versions") as caught:
        cs.merge(tmp_path / "a.pt", tmp_path / "b.pt", tmp_path / "o.pt")
    assert "m0: version 1 in" in str(caught.value) and "the model itself" in str(caught.value.hint)


def test_verify_holds_a_converted_tensor_against_torchs_load(tmp_path: Path) -> None:
    torch.save(state_of(of(Turned, Plain), m0=1), tmp_path / "a.pt")
    model = of(Turned, Plain)
    found = cs.verify(tmp_path / "a.pt", model)
    assert found.ok and [one.key for one in found.findings if one.code == "hook"] == ["m0.w"]

    class Random(Turned):
        def _load_from_state_dict(self, state: Any, prefix: str, *rest: Any) -> None:
            state[prefix + "w"] = torch.randn(3, 3)
            super()._load_from_state_dict(state, prefix, *rest)

    torch.save(of(Random).state_dict(), tmp_path / "b.pt")
    found = cs.verify(tmp_path / "b.pt", of(Random))
    assert not found.ok and [one.key for one in found.findings if one.code == "differs"] == ["m0.w"]
