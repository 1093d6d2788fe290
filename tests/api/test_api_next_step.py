"""What follows a diff or a match of something in memory: a Python call that runs, since no command could name it."""

import io
import re

import pytest
import torch
from torch import nn

import ckptsurgeon as cs
from ckptsurgeon.command import Command

SOURCE = {"fc1.weight": torch.ones(3, 2), "fc2.weight": torch.full((2, 3), 2.0), "gone.bias": torch.ones(5)}


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(2, 3, bias=False)
        self.dense = nn.Linear(3, 2, bias=False)


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"ema": SOURCE, "model": {**SOURCE, "gone.bias": torch.ones(6)}}, "net.pt")
    return tmp_path / "net.pt"


def followed(text, label, **given):
    """The result of the call that stands behind a label; it is the only step that the text offers."""
    found = re.search(rf"^\W*{label}:? (cs\..*)$", text, re.MULTILINE)
    assert found is not None and "ckptsurgeon" not in text, text
    return eval(found[1], {"cs": cs, **given})


@pytest.mark.parametrize(
    "rules",
    [
        {"rename": {"fc1.{p}": "first.{p}"}, "drop": ["gone.*"]},
        {"rules": [cs.Rule("rename", "fc1.{p}", "first.{p}"), cs.Rule("drop", "gone.*")]},
    ],
)
@pytest.mark.parametrize("in_memory", [False, True])
def test_a_live_model_gets_the_weights_by_the_same_rules(file, in_memory, rules):
    source, model = io.BytesIO(file.read_bytes()) if in_memory else "net.pt", Model()
    found = cs.diff(source, model, root="ema", **rules)
    report = followed(str(found), "Next", source=source, model=model)
    assert not report.fresh and bool((model.first.weight == 1).all()) and bool((model.dense.weight == 2).all())


def test_a_live_state_dict_is_merged_into_a_file(file):
    target = Model().state_dict()
    followed(str(cs.diff("net.pt", target, root="ema", rename={"fc1.{p}": "first.{p}"})), "Next", target=target)
    written = torch.load("merged.pt")
    assert bool((written["first.weight"] == 1).all()) and bool((written["dense.weight"] == 2).all())


class Numbered(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear1 = nn.Linear(2, 3, bias=False)
        self.dense = nn.Linear(3, 2, bias=False)


def test_a_match_of_what_is_in_memory_is_followed_by_a_call(file):
    for source in ("net.pt", cs.open(io.BytesIO(file.read_bytes()), root="ema")):
        model = Numbered()
        found = cs.match(source, model, **({"root": "ema"} if source == "net.pt" else {}))
        followed(str(found), "Next", source=source, model=model)
        assert bool((model.linear1.weight == 1).all())
        other = Numbered()
        (file.parent / "THIS_FILE").write_text(found.toml)
        followed(found.toml, "# Follow it", source=source, model=other)
        assert bool((other.linear1.weight == 1).all()) and bool((other.dense.weight == 2).all())


def test_a_file_in_memory_and_a_spec_have_no_next_step(file):
    (file.parent / "next_nets.py").write_text("from torch import nn\ndef make():\n    return nn.ModuleDict({'fc1': nn.Linear(2, 3)})\n")
    found = cs.diff(io.BytesIO(file.read_bytes()), "next_nets.py:make", root="ema")
    assert found.matched == ("fc1.weight",) and "Next" not in str(found) and "ckptsurgeon" not in str(found)
    assert "Next: ckptsurgeon merge net.pt next_nets.py:make" in str(cs.diff("net.pt", "next_nets.py:make", root="ema"))


def test_every_verb_as_a_call():
    merge = Command("merge", "net.pt", "Net", "m.pt", (("root", "ema"), ("dequantize",)))
    by_file = "cs.transfer('net.pt', model, root='ema', dequantize=True, rules=['r.toml'])"
    assert merge.having(("rules", "r.toml")).call(("", "model")) == by_file
    assert merge.call(("file", "")) is None and Command("inspect", "state_dict").call(("state_dict", "")) is None
    assert Command("match", "<BytesIO 1>", "m:N").call(("file", "")) == "print(cs.match(cs.open(source), 'm:N'))"
    assert Command("diff", "state_dict", "m:N").call(("state_dict", "")) == "print(cs.diff(cs.skeleton(state_dict), 'm:N'))"
    assert Command("inspect", "<BytesIO 1>").call(("file", "")) == "print(cs.inspect(source).to_text())"


def test_a_pattern_that_two_rules_have_stands_in_no_dict_twice():
    """Words back to rules by the library itself: what the call is given is what the command says, in its order."""
    rules = [("adapt", "w", "transpose"), ("adapt", "w", "reshape"), ("drop", "a")]
    call = Command("diff", "a.pt", "m:N", options=tuple(rules)).call(("file", ""))
    assert call == "print(cs.diff(source, 'm:N', adapt={'w': 'transpose'}, rules=[cs.Rule('adapt', 'w', 'reshape'), cs.Rule('drop', 'a')]))"
    assert Command("merge", "-a.pt", "-t.pt").words == ("ckptsurgeon", "merge", "./-a.pt", "./-t.pt")
