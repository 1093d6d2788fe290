"""`check --against` and `verify`: keys that a module's own loading code takes are not missing nor unexpected, as torch's load has it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import program
from loading_support import everything, same
from safetensors.torch import load_file
from test_models_taken import net, old, write
from torch import nn

import ckptsurgeon as cs


def todays(saved: Any) -> None:
    """Recorded as of the version that has no old names, so that nothing takes them."""
    for local in saved._metadata.values():
        local["version"] = 2


CHANGES: dict[str, Callable[[Any], object]] = {
    "nothing": lambda saved: None,
    "today's version": todays,
    "an old key less": lambda saved: saved.pop("block.linear_2.bias"),
    "a key less": lambda saved: saved.pop("stem.bias"),
    "a key more beside the old ones": lambda saved: saved.update({"block.more": torch.ones(2)}),
    "a key more elsewhere": lambda saved: saved.update({"more": torch.ones(2)}),
    "an old key beside today's": lambda saved: saved.update({"block.0.bias": torch.zeros(4)}),
}


def found(path: Path, against: Any) -> dict[str, set[str | None]]:
    """The keys of each code of what does not fit."""
    (file,) = cs.check(path, against=against, select="CK3").files
    return {code: {one.key for one in file.findings if one.code == code} for code in ("CK301", "CK302", "CK303", "CK304")}


def misfits(path: Path, against: Any, device: str) -> dict[str, set[str | None]]:
    """The keys of each code that `verify` tells as an error."""
    errors = [one for one in cs.verify(path, against, device=device).findings if one.level == "error"]
    return {code: {one.key for one in errors if one.code == code} for code in ("missing", "unexpected", "shape", "kind")}


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("name", ["a.pt", "a.safetensors"])
@pytest.mark.parametrize("change", CHANGES)
def test_verify_says_what_torch_says(change: str, name: str, device: str, tmp_path: Path) -> None:
    saved = old(net())
    CHANGES[change](saved)
    path = write(saved, tmp_path / name)
    state = load_file(path) if name == "a.safetensors" else torch.load(path, weights_only=True)
    told = net().load_state_dict(state, strict=False)
    expected = {"missing": set(told.missing_keys), "unexpected": set(told.unexpected_keys), "shape": set(), "kind": set()}
    assert misfits(path, net(), device) == expected


def test_verify_names_what_loading_code_did_with_each_name(tmp_path: Path) -> None:
    done = cs.verify(write(old(net()), tmp_path / "a.pt"), net(), device="meta")
    told = {one.key: one.message for one in done.findings if one.code == "hook"}
    assert done.ok and done.tensors == len(net().state_dict())
    assert told["block.linear_1.weight"] == "→ block.0.weight, as Block loads it"
    assert told["norm.num_batches_tracked"] == "left out, as Frozen loads it"


class Extra(nn.Module):
    """Its extra state is a tensor, whose shape follows what was done, as in Transformer Engine."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.extra = torch.zeros(size)

    def get_extra_state(self) -> Any:
        return self.extra

    def set_extra_state(self, state: Any) -> None:
        self.extra = state


@pytest.mark.parametrize("state", [torch.ones(3), {"step": 1}], ids=["tensor", "dict"])
def test_an_extra_state_fits_whatever_it_is(state: Any, tmp_path: Path) -> None:
    model = nn.Sequential(Extra(2), nn.Linear(2, 2))
    path = write({**model.state_dict(), "0._extra_state": state}, tmp_path / "a.pt")
    model.load_state_dict(torch.load(path, weights_only=True))
    assert not any(found(path, nn.Sequential(Extra(2), nn.Linear(2, 2))).values())
    for device in ("cpu", "meta"):
        assert cs.verify(path, nn.Sequential(Extra(2), nn.Linear(2, 2)), device=device).ok, device


def test_an_extra_state_that_no_module_takes_is_unexpected(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    path = write({**model.state_dict(), "0._extra_state": {"step": 1}}, tmp_path / "a.pt")
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"0\._extra_state"'):
        model.load_state_dict(torch.load(path, weights_only=True))
    assert found(path, model)["CK302"] == {"0._extra_state"}
    assert misfits(path, model, "cpu")["unexpected"] == misfits(path, model, "meta")["unexpected"] == {"0._extra_state"}


@pytest.mark.parametrize("name", ["a.pt", "a.safetensors"])
@pytest.mark.parametrize("change", CHANGES)
def test_what_does_not_fit_is_what_torch_says(change: str, name: str, tmp_path: Path) -> None:
    saved = old(net())
    CHANGES[change](saved)
    path = write(saved, tmp_path / name)
    state = load_file(path) if name == "a.safetensors" else torch.load(path, weights_only=True)
    told = net().load_state_dict(state, strict=False)
    said = found(path, net())
    assert said == {"CK301": set(told.missing_keys), "CK302": set(told.unexpected_keys), "CK303": set(), "CK304": set()}
    assert set(cs.transfer(path, net()).fresh) == said["CK301"]


def test_a_renamed_key_of_another_shape_or_dtype(tmp_path: Path) -> None:
    saved = old(net())
    saved["block.linear_2.weight"] = torch.ones(5, 4)
    saved["block.linear_1.weight"] = saved["block.linear_1.weight"].half()
    with pytest.raises(RuntimeError, match=r"size mismatch for block\.3\.weight"):
        net().load_state_dict(copy.deepcopy(saved))
    said = found(write(saved, tmp_path / "a.pt"), net())
    assert said == {"CK301": set(), "CK302": set(), "CK303": {"block.3.weight"}, "CK304": {"block.0.weight"}}


def test_values_that_loading_code_computes_are_there(tmp_path: Path) -> None:
    class Fused(nn.Module):
        """torch's MultiheadAttention of old, in one matrix today."""

        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Parameter(torch.zeros(6, 2))

        def _load_from_state_dict(self, state: Any, prefix: str, *rest: Any) -> None:
            if prefix + "q" in state:
                state[prefix + "qkv"] = torch.cat([state.pop(prefix + name) for name in "qkv"])
            super()._load_from_state_dict(state, prefix, *rest)

    state = {f"attn.{name}": torch.rand(2, 2) for name in "qkv"}
    model = nn.ModuleDict({"attn": Fused()})
    assert not any(copy.deepcopy(model).load_state_dict(dict(state)))
    assert not any(found(write(state, tmp_path / "a.pt"), model).values())
    del state["attn.q"]
    assert found(write(state, tmp_path / "b.pt"), model)["CK302"] == {"attn.k", "attn.v"}


def test_a_hook_that_takes_a_wrappers_segment(tmp_path: Path) -> None:
    """Names as they stand: no prefix is stripped that torch would not strip."""

    def strip(state: Any, *_: Any) -> None:
        for key in [key for key in state if key.startswith("module.")]:
            state[key.removeprefix("module.")] = state.pop(key)

    model = nn.Sequential(nn.Linear(2, 2))
    path = write({f"module.{key}": value for key, value in model.state_dict().items()}, tmp_path / "a.pt")
    assert found(path, model)["CK302"] == {"module.0.weight", "module.0.bias"}
    model._register_load_state_dict_pre_hook(strip)  # type: ignore[no-untyped-call]
    assert not any(copy.deepcopy(model).load_state_dict(torch.load(path, weights_only=True)))
    assert not any(found(path, model).values())


def test_many_files_at_a_time_share_one_model(tmp_path: Path) -> None:
    paths = [write(old(net()), tmp_path / f"{number}.pt") for number in range(8)]
    model = net()
    before = everything(model)
    report = cs.check(paths, against=model, finite=True, jobs=4)
    assert report.ok and not [one for file in report.files for one in file.findings]
    same(everything(model), before)


def test_on_the_command_line(tmp_path: Path) -> None:
    write(old(net()), tmp_path / "a.pt")
    lines = (
        f"import sys; sys.path[:0] = {[str(folder) for folder in Path(__file__).parents[:2]]!r}\nfrom test_models_taken import net as Net\n"
    )
    (tmp_path / "nets.py").write_text(lines)
    ended = program("check", "a.pt", "--against", "nets.py:Net", folder=tmp_path)
    assert ended.code == 0 and "CK30" not in ended.out, ended
