"""What follows a diff or a match of something in memory: a Python call that runs, since no command could name it."""

import io
import os
import re
import subprocess

import pytest
import torch
from forked import program
from safetensors.torch import save_file
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


TIED = """
from torch import nn

class LM(nn.Module):
    def __init__(self, rows=10, bias=False):
        super().__init__()
        self.embed, self.body, self.lm_head = nn.Embedding(rows, 4), nn.Linear(4, 4), nn.Linear(4, rows, bias=bias)
        self.lm_head.weight = self.embed.weight

class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.shared = nn.Embedding(10, 4)
        self.encoder, self.decoder = (nn.ModuleDict({"embed_tokens": self.shared, "block": nn.Linear(4, 4)}) for _ in range(2))

class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.dense, self.LayerNorm = nn.Linear(4, 5), nn.LayerNorm(5)
"""


def run_next(text):
    """Run the command that a text says comes next, cut into words by a shell; its exit code and all that it says."""
    (line,) = re.findall(r"^Next: ckptsurgeon (.*)$", text, re.MULTILINE)
    words = subprocess.run(f"printf '%s\\0' {line}", shell=True, capture_output=True, text=True, check=True).stdout.split("\0")
    ended = program(*words[:-1])
    return ended.code, ended.out + ended.err


@pytest.mark.parametrize("spec", ["LM()", "LM(10, True)", "LM(12)", "Shared()"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_torch_file_without_the_tied_names_ends_well(file, spec, prefix):
    """torch's own load is the oracle: what Next writes loads strictly, and has the source's values."""
    name = f"tied_nets_{abs(hash((spec, prefix)))}"
    (file.parent / f"{name}.py").write_text(TIED)
    nets = {}
    exec(TIED, nets)
    small = eval(spec.replace("12", "10"), nets)
    given = {prefix + key: value.detach() for key, value in small.named_parameters()}
    torch.save(given, "tied.bin")
    text = str(cs.diff("tied.bin", f"{name}.py:{spec}"))
    code, said = run_next(text)
    assert code == 0, (text, said)
    model = eval(spec, nets)
    model.load_state_dict(torch.load("merged.pt"), strict=True)
    for key, value in small.state_dict().items():
        assert torch.equal(model.state_dict()[key][: len(value)], value)


def test_old_names_are_left_to_auto_safe(file):
    (file.parent / "normed_nets.py").write_text(TIED)
    nets = {}
    exec(TIED, nets)
    state = nets["Normed"]().state_dict()
    olds = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    torch.save({olds.get(key, key): value for key, value in state.items()}, "old.pt")
    text = str(cs.diff("old.pt", "normed_nets.py:Normed"))
    assert text.splitlines()[-1].endswith("--auto safe") and run_next(text)[0] == 0
    written = torch.load("merged.pt")
    assert all(torch.equal(written[key], value) for key, value in state.items())


def test_the_output_is_no_file_that_is_there(file):
    """Neither an older result nor the source or the target themselves, and in the source's format."""
    torch.save(SOURCE, "merged.pt")
    save_file({**SOURCE, "gone.bias": torch.ones(7)}, "merged.safetensors")
    for source, target, output in (
        ("merged.pt", "merged.safetensors", "merged-2.pt"),
        ("merged.safetensors", "merged.pt", "merged-2.safetensors"),
    ):
        text = str(cs.diff(source, target))
        assert f"merge {source} {target} -o {output}" in text and run_next(text)[0] == 0 and os.path.exists(output)
    text = str(cs.diff("merged.pt", "merged.safetensors"))
    assert "-o merged-3.pt" in text


def test_a_path_with_spaces_and_quotes_is_pasted_as_it_stands(file):
    torch.save(SOURCE, "my 'net' $1.pt")
    save_file({**SOURCE, "gone.bias": torch.ones(7)}, "-t.safetensors")
    text = str(cs.diff("my 'net' $1.pt", "./-t.safetensors"))
    assert run_next(text)[0] == 0 and len(torch.load("merged.pt")) == 3


def test_a_skeleton_s_missing_keys_are_initialised(file):
    torch.save(SOURCE, "a.pt")
    torch.save({**SOURCE, "head.weight": torch.ones(4, 2), "head.bias": torch.ones(4), "norm.weight": torch.ones(4)}, "b.pt")
    assert program("skeleton", "b.pt", "-o", "net.json").code == 0
    text = str(cs.diff("a.pt", "net.json"))
    assert run_next(text)[0] == 0, text
    written = torch.load("merged.pt")
    assert bool((written["norm.weight"] == 1).all()) and bool((written["head.bias"] == 0).all()) and written["head.weight"].std() > 0


def test_rows_of_a_file_fill_a_grown_table_up(file):
    """torch.cat is the oracle: the source's rows, and below them those that the target file has there; cast to the target's dtype."""
    old, new = torch.randn(5, 3), torch.randn(8, 3, dtype=torch.float64)
    torch.save({"wte.weight": old}, "old.pt")
    torch.save({"wte.weight": new}, "new.pt")
    code, said = run_next(str(cs.diff("old.pt", "new.pt")))
    assert code == 0, said
    assert torch.equal(torch.load("merged.pt")["wte.weight"], torch.cat([old.double(), new[5:]]))
    made = cs.plan("old.pt", "new.pt", adapt={"wte.weight": "pad(fill='init')"})
    (file.parent / "plan.json").write_text(made.to_json())
    cs.apply("plan.json", output="by_plan.pt")
    assert torch.equal(torch.load("by_plan.pt")["wte.weight"], torch.load("merged.pt")["wte.weight"])
