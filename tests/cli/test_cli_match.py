"""`match`, `plan --match` and `merge --match` as a person runs them: what they say, what they write, what they refuse, and their JSON."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
import torch
from test_cli_schemas import fits
from torch import nn

from ckptsurgeon.rules.rulefile import parse_rules

NET, RENAMED, VARIANT = "model:Net", "variants:NetRenamed", "variants:NetVariant"
MODELS = """
import torch
from torch import nn


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.qkv, self.proj = nn.LayerNorm(16), nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        return x + self.proj(nn.functional.scaled_dot_product_attention(q, k, v))


class Here(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.blocks, self.head = nn.Linear(4, 16), nn.Sequential(Block(), Block()), nn.Linear(16, 3)

    def forward(self, x):
        return self.head(self.blocks(self.stem(x)))


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.out, self.ln = nn.Linear(16, 16), nn.LayerNorm(16)
        self.query, self.key, self.value = (nn.Linear(16, 16) for _ in range(3))

    def forward(self, x):
        y = self.ln(x)
        return x + self.out(nn.functional.scaled_dot_product_attention(self.query(y), self.key(y), self.value(y)))


class There(nn.Module):
    def __init__(self, factor=1.0):
        super().__init__()
        self.classifier, self.layers, self.embed = nn.Linear(16, 3), nn.ModuleDict({str(i): Layer() for i in (1, 2)}), nn.Linear(4, 16)
        self.factor = factor

    def forward(self, hidden=None):
        x = self.embed(hidden)
        for layer in self.layers.values():
            x = layer(x)
        return {"logits": self.factor * self.classifier(x)}


class Other(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv1d(7, 5, 3), nn.Linear(9, 11)


def make_inputs():
    x = torch.randn(2, 5, 4)
    return {"source": x, "target": {"hidden": x}}


def fails():
    raise ValueError("no data here")


def small():
    return torch.randn(2, 5, 3)


number = 3
"""


@pytest.fixture
def two(place: Path) -> Path:
    (place / "two.py").write_text(MODELS)
    torch.manual_seed(1)
    space: dict[str, type[nn.Module]] = {}
    exec(compile(MODELS, "two.py", "exec"), space)
    torch.save(space["Here"]().state_dict(), place / "here.pt")
    return place


def test_match_shows_the_rules_what_speaks_for_them_and_what_is_left_over(run, place):
    ended = run("match", "net_params.pkl", VARIANT)
    assert ended.code == 0
    assert "fc2.{p}  →  dense2.{p}   (2 tensors: " in ended.out and "6 keep their names" in ended.out
    assert "  unmatched       7   only in the target" in ended.out and "  unused          2   only in the source" in ended.out
    assert "Matched 53.3 % of tensors, 99.6 % of elements of the target (8 of 15 tensors)." in ended.out
    assert ended.out.rstrip().endswith(f"Next: ckptsurgeon merge net_params.pkl {VARIANT} -o merged.pt --match")


def test_two_implementations_are_matched_written_merged_and_proven(run, two):
    ended = run("match", "here.pt", "two:There", "-o", "rules.toml", "--layout", "as-is")
    assert ended.code == 0 and "wrote rules.toml: 5 rules" in ended.err
    assert "100.0 % of tensors, 100.0 % of elements" in ended.out and "--rules rules.toml" in ended.out
    text = Path("rules.toml").read_text()
    assert len(parse_rules(text, "rules.toml")) == 5
    assert 'op = "chunk(dim=0)"' in text and "{i+1}" in text
    assert text.startswith("# here.pt -> two:There, matched by names, numbers and shapes.\n")
    assert all(line.startswith("#") for line in text.splitlines() if "margin" in line or "possible" in line)
    merged = run("merge", "here.pt", "two:There", "-o", "there.pt", "--rules", "rules.toml")
    assert merged.code == 0 and "verified: 24 tensors" in merged.out
    assert run("merge", "here.pt", "two:There", "-o", "again.pt", "--match", "--layout", "as-is").code == 0
    one, other = torch.load("there.pt"), torch.load("again.pt")
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    source = torch.load("here.pt")
    assert torch.equal(one["layers.2.key.weight"], source["blocks.1.qkv.weight"][16:32])
    assert torch.equal(one["layers.1.ln.weight"], source["blocks.0.norm.weight"])


def test_the_file_is_the_same_each_time_and_is_replaced_only_when_asked(run, two):
    run("match", "here.pt", "two:There", "-o", "rules.toml")
    first = Path("rules.toml").read_bytes()
    again = run("match", "here.pt", "two:There", "-o", "rules.toml")
    assert again.code == 2 and "exists" in again.err and Path("rules.toml").read_bytes() == first
    assert run("match", "here.pt", "two:There", "-o", "rules.toml", "--overwrite").code == 0
    assert Path("rules.toml").read_bytes() == first
    checkpoint = Path("here.pt").read_bytes()
    refused = run("match", "here.pt", "two:There", "-o", "here.pt", "--overwrite")
    assert refused.code == 2 and Path("here.pt").read_bytes() == checkpoint


def test_the_plan_says_that_a_rule_was_matched_and_by_what(run, two):
    made = run("plan", "here.pt", "two:There", "--match", "--layout", "as-is", "--json").json
    fits(made, "plan")
    step = next(step for step in made["steps"] if step["target"] == "layers.1.query.weight")
    assert step["action"] == "adapt" and "(matched: " in step["reason"] and "tensors" not in step["reason"].split("(matched: ")[1]
    assert {step["action"] for step in made["steps"]} == {"rename", "adapt"}
    assert run("plan", "here.pt", "two:There", "--match", "--layout", "as-is", "-o", "plan.json").code == 0
    assert run("apply", "plan.json", "-o", "there.pt").code == 0


def test_a_persons_rules_come_first(run, two):
    words = ("here.pt", "two:There", "--rename", "blocks.0.norm.{p}", "layers.2.ln.{p}", "--drop", "blocks.1.norm.*")
    made = run("plan", *words, "--match", "--json").json
    by_target = {step["target"]: step for step in made["steps"]}
    assert by_target["layers.2.ln.weight"]["sources"][0]["key"] == "blocks.0.norm.weight"
    assert by_target["layers.1.ln.weight"]["action"] == "init"
    shown = run("match", *words, "-o", "rules.toml")
    assert "by 2 rules of yours, which come first" in shown.out
    assert [rule.kind for rule in parse_rules(Path("rules.toml").read_text(), "r")][:2] == ["rename", "drop"]
    from_file = run("plan", "here.pt", "two:There", "--rules", "rules.toml", "--json").json
    assert [step["sources"] for step in from_file["steps"]] == [step["sources"] for step in made["steps"]]


def test_json(run, two):
    found = run("match", "here.pt", "two:There", "--layout", "as-is", "--json").json
    fits(found, "match")
    link = next(link for link in found["links"] if len(link["targets"]) == 3)
    assert link["op"] == "chunk(dim=0)" and link["certain"] and link["applied"] and link["evidence"]
    assert len({key for link in found["links"] for key in link["targets"]}) == 24 and found["unmatched"] == found["unused"] == []
    assert found["coverage"] == {"tensors": 1.0, "elements": 1.0} and found["refused"] is None
    refused = run("match", "here.pt", "two:Other", "--json")
    fits(refused.json, "match")
    assert refused.code == 1 and "too little in common" in refused.json["refused"]


def test_other_architectures_are_a_no_with_its_reason_and_no_file(run, two):
    ended = run("match", "here.pt", "two:Other", "-o", "rules.toml")
    assert ended.code == 1 and not Path("rules.toml").exists()
    assert "error: here.pt: has too little in common with two:Other" in ended.err and "try:" in ended.err
    for command in ("plan", "merge"):
        output = ("-o", "out.pt") if command == "merge" else ()
        refused = run(command, "here.pt", "two:Other", *output, "--match")
        assert refused.code == 1 and "too little in common" in refused.err and not Path("out.pt").exists()


def towers(place: Path) -> None:
    net = {"conv.weight": (4, 3, 3, 3), "bn.weight": (4,), "bn.bias": (4,), "fc.weight": (2, 4)}
    torch.manual_seed(0)
    torch.save({f"{tower}.{key}": torch.randn(shape) for tower in ("one", "two") for key, shape in net.items()}, place / "towers.pt")
    torch.save({key: torch.randn(shape) for key, shape in net.items()}, place / "net.pt")


def test_two_towers_are_uncertain_until_one_is_left_out_or_the_person_accepts(run, place):
    towers(place)
    ended = run("match", "towers.pt", "net.pt", "-o", "rules.toml")
    assert ended.code == 1 and not Path("rules.toml").exists()
    assert "uncertain       4" in ended.out and "links are uncertain" in ended.err and "--accept-uncertain" in ended.err
    assert run("merge", "towers.pt", "net.pt", "-o", "out.pt", "--match").code == 1
    # Whoever asks for no coverage gets even a file without a rule that is applied, to choose from.
    assert run("match", "towers.pt", "net.pt", "-o", "doubt.toml", "--min-coverage", "0").code == 0
    assert parse_rules(Path("doubt.toml").read_text(), "r") == () and '# to = "' in Path("doubt.toml").read_text()
    chosen = run("match", "towers.pt", "net.pt", "-o", "rules.toml", "--drop", "two.**")
    assert chosen.code == 0
    assert run("merge", "towers.pt", "net.pt", "-o", "out.pt", "--rules", "rules.toml").code == 0
    source, out = torch.load("towers.pt"), torch.load("out.pt")
    assert all(torch.equal(out[key], source[f"one.{key}"]) for key in out)
    accepted = run("merge", "towers.pt", "net.pt", "-o", "accepted.pt", "--match", "--accept-uncertain")
    assert accepted.code == 0
    out = torch.load("accepted.pt")
    assert any(all(torch.equal(out[key], source[f"{tower}.{key}"]) for key in out) for tower in ("one", "two"))


def test_something_uncertain_is_told_and_is_a_no_only_under_strict(run, place):
    torch.manual_seed(0)
    body = {f"layers.{i}.weight": torch.randn(30, 30) for i in range(4)}
    torch.save({**{f"net.{key}": value for key, value in body.items()}, "alpha": torch.randn(5, 4), "beta": torch.randn(5, 4)}, "a.pt")
    torch.save({**body, "first": torch.randn(5, 4), "second": torch.randn(5, 4)}, "b.pt")
    ended = run("match", "a.pt", "b.pt", "-o", "rules.toml", "--json")
    doubtful = [link for link in ended.json["links"] if not link["certain"]]
    assert ended.code == 0 and (doubtful or ended.json["unmatched"])
    assert not any(link["applied"] for link in doubtful)
    assert run("match", "a.pt", "b.pt", "--strict").code == int(bool(doubtful))


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("match",), "Missing argument"),
        (("match", "net_params.pkl"), "Missing argument"),
        (("match", "missing.pt", NET), "does not exist"),
        (("match", "net_params.pkl", "model:Nett"), "has no 'Nett'"),
        (("match", "net_params.pkl", NET, "--min-coverage", "2"), "--min-coverage"),
        (("match", "net_params.pkl", NET, "--root", "nowhere"), "nowhere"),
        (("match", "net_params.pkl", NET, "--rename", "zzz", "fc1.weight"), "matches nothing"),
        (("match", "net_params.pkl", NET, "--forward", "model:Net"), "needs both"),
        (("match", "net_params.pkl", NET, "--source-model", NET), "needs both"),
        (("match", "net_params.pkl", "net_params.pkl", "--source-model", NET, "--forward", "a:b"), "no model that can be run"),
        (("match", "net_params.pkl", "net.json", "--values"), "has no values"),
        (("match", "net_params.pkl", NET, "-o", "nowhere/rules.toml"), "nowhere"),
        (("plan", "net_params.pkl", "--match"), "one source and a target"),
        (("plan", "net_params.pkl", "net_params.pkl", NET, "--match"), "one source and a target"),
        (("plan", "net_params.pkl", NET, "--accept-uncertain"), "no match is asked for"),
        (("merge", "net_params.pkl", NET, "-o", "m.pt", "--accept-uncertain"), "no match is asked for"),
    ],
    ids=lambda value: " ".join(value[1:])[:50] if isinstance(value, tuple) else "",
)
def test_bad_input_is_told_in_a_sentence(run, place, words, reason):
    run("skeleton", NET, "-o", "net.json")
    ended = run(*words)
    assert ended.code == 2 and reason in ended.err and "Traceback" not in ended.err


def test_odd_sides(run, place):
    torch.save({"w": torch.zeros(2)}, "one.pt")
    torch.save({"v": torch.zeros(2)}, "other.pt")
    assert run("match", "one.pt", "one.pt").code == 0
    assert run("match", "one.pt", "other.pt").code in (0, 1)
    torch.save({f"a.{i}.w": torch.zeros(2) for i in range(40)}, "same.pt")
    torch.save({f"b{i}": torch.zeros(2) for i in range(40)}, "shapes.pt")
    assert run("match", "same.pt", "shapes.pt").code in (0, 1)
    (place / "empty.py").write_text("from torch import nn\nNothing = nn.Identity\n")
    assert run("match", "one.pt", "empty:Nothing").code == 1


def test_a_skeleton_as_target(run, two):
    run("skeleton", "two:There", "-o", "there.json")
    found = run("match", "here.pt", "there.json", "--layout", "as-is")
    assert found.code == 0 and "24 of 24 tensors" in found.out


def test_forward_proves_a_right_mapping_and_finds_a_wrong_model_out(run, two):
    words = ("match", "here.pt", "two:There", "--source-model", "two:Here", "--forward", "two:make_inputs")
    ended = run(*words)
    assert ended.code == 0 and "outputs         1   the same from both models" in ended.out and "output and output.logits" in ended.out
    found = run(*words, "--json").json
    fits(found, "match")
    following = ended.out.splitlines()[-1].partition(" ckptsurgeon ")[2].split()
    assert following == [*words[:3], "-o", "rules.toml", *words[3:]]  # --match would find the layout open again
    merging = run(*following).out.splitlines()[-1].partition(" ckptsurgeon ")[2].split()
    assert merging[0] == "merge" and run(*merging).code == 0
    Path("rules.toml").unlink()
    assert found["forward"]["same"] and found["forward"]["outputs"][0]["difference"] < 1e-5 < found["forward"]["outputs"][0]["scale"]
    other = run("match", "here.pt", "two:There(factor=1.01)", *words[3:], "-o", "rules.toml")
    assert other.code == 1 and "NOT the same from both models" in other.out and not Path("rules.toml").exists()
    assert "Next: " not in other.out and "ckptsurgeon merge" not in other.out and "merge nothing before you know" in other.out
    assert run("match", "here.pt", "two:There(factor=1.01)", *words[3:], "--tolerance", "0.1").code == 0


@pytest.mark.parametrize(
    ("given", "verb"),
    [
        (["--layout", "as-is", "--accept-uncertain"], "merge"),
        (["--layout", "as-is=layers.1.**", "--min-coverage", "0.1"], "match"),
        (["--layout", "as-is", "--values"], "match"),
        (["--rules", "own.toml", "--layout", "as-is=**"], "merge"),
    ],
)
def test_the_next_command_has_the_options_of_this_one(run, two, given, verb):
    Path("own.toml").write_text("[[rename]]\nfrom = 'stem.{p}'\nto = 'embed.{p}'\n")
    ended = run("match", "here.pt", "two:There", *given)
    following = shlex.split(ended.out.splitlines()[-1].partition(" ckptsurgeon ")[2])
    assert ended.code == 0 and following[0] == verb, ended
    assert {"as-is" if word == "as-is=**" else word for word in given} <= set(following)
    assert run(*following).code == 0


@pytest.mark.parametrize(
    ("inputs", "reason"),
    [("two:fails", "no data here"), ("two:small", "the source's model"), ("two:number", "not a function"), ("two:gone", "gone")],
)
def test_inputs_that_can_not_be_made_or_taken(run, two, inputs, reason):
    ended = run("match", "here.pt", "two:There", "--source-model", "two:Here", "--forward", inputs)
    assert ended.code == 2 and reason in ended.err and "Traceback" not in ended.err


def test_diff_says_what_missing_keys_probably_are(run, two):
    ended = run("diff", "here.pt", "two:There")
    assert "Probably the same under other names:" in ended.out and "Try: ckptsurgeon match here.pt two:There\n" in ended.out
    found = run("diff", "here.pt", "two:There", "--json").json
    fits(found, "diff")
    likely = next(link for link in found["likely"] if "layers.1.key.weight" in link["targets"])
    assert likely["sources"] == ["blocks.0.qkv.weight"] and likely["op"] == "chunk(dim=0)"
    assert run("diff", "net_params.pkl", RENAMED, "--json").json["likely"] == []
