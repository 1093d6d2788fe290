"""A model whose tensors partly overlap in memory: `transfer` and `merge` agree with torch's `load_state_dict` followed by `state_dict`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loading_support import everything, same
from profiles import examples
from safetensors.torch import load_file
from torch import nn

import ckptsurgeon as cs

VIEWS: dict[str, Any] = {
    "head": lambda base: base[:4],
    "tail": lambda base: base[2:],
    "whole": lambda base: base,
    "even": lambda base: base[::2],
    "odd": lambda base: base[1::2],
    "bits": lambda base: base.view(torch.int32)[1:3],
}


class Views(nn.Module):
    def __init__(self, names: list[str], parameter: bool = False) -> None:
        super().__init__()
        base = torch.arange(8.0)
        for name in names:
            view = VIEWS[name](base)
            if parameter and view.is_floating_point():
                self.register_parameter(name, nn.Parameter(view))
            else:
                self.register_buffer(name, view)
        self.fc = nn.Linear(2, 2)


@given(
    names=st.lists(st.sampled_from(sorted(VIEWS)), min_size=2, max_size=4, unique=True),
    lacking=st.sets(st.sampled_from(sorted(VIEWS)), max_size=2),
    parameter=st.booleans(),
    form=st.sampled_from([".pt", ".safetensors"]),
)
@settings(max_examples=examples(40), deadline=None)
def test_transfer_merge_and_torch_agree(
    names: list[str], lacking: set[str], parameter: bool, form: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("views")
    model = Views(names, parameter)
    state = {key: value.clone() for key, value in model.state_dict().items() if key not in lacking}
    for number, value in enumerate(state.values()):
        value.copy_(torch.full_like(value, 10 + number))  # each key has values of its own, so that they contradict each other
    torch.save(state, folder / "a.pt")
    truth, fresh = (Views(names, parameter) for _ in range(2))  # no copies, which may lose what is shared
    for net in (truth, fresh):
        net.fc.load_state_dict(model.fc.state_dict())
    truth.load_state_dict(state, strict=False)
    report = cs.merge(folder / "a.pt", model, folder / f"o{form}")
    assert report.verification is not None and report.verification.ok
    found = load_file(folder / f"o{form}") if form == ".safetensors" else torch.load(folder / "o.pt", weights_only=True)
    same(found, truth.state_dict())
    fresh.load_state_dict(found)
    same(everything(fresh), everything(truth))
    cs.transfer(folder / "a.pt", model)
    same(everything(model), everything(truth))


def test_values_that_do_not_contradict_each_other_are_copied_as_they_are(tmp_path: Path) -> None:
    source = Views(["head", "tail"])
    with torch.no_grad():
        source.head.add_(5)
    torch.save(source.state_dict(), tmp_path / "a.pt")
    cs.merge(tmp_path / "a.pt", Views(["head", "tail"]), tmp_path / "o.pt")
    same(torch.load(tmp_path / "o.pt", weights_only=True), source.state_dict())


def test_the_report_says_that_the_memory_is_shared(tmp_path: Path) -> None:
    torch.save({"head": torch.ones(4), "tail": torch.zeros(6)}, tmp_path / "a.pt")
    for report in (
        cs.merge(tmp_path / "a.pt", Views(["head", "tail"]), tmp_path / "o.pt"),
        cs.transfer(tmp_path / "a.pt", Views(["head", "tail"])),
    ):
        (said,) = [one for one in report.findings if one.code == "overlap"]
        assert said.key == "tail" and "head" in said.message and "as loading leaves" in said.message
