"""The commonest slips get the one right word, and what is offered is run here and works; nothing of a person's is imported to find it."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
import torch

CODE = """
from torch import nn
class Net(nn.Module):
    def __init__(self, n=2):
        super().__init__()
        self.conv, self.bn, self.fc = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, n)
    def forward(self, x):
        return self.fc(self.bn(self.conv(x)).mean((2, 3)))
class LM(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Sequential(nn.Embedding(10, 4)), nn.Linear(4, 4))
    def forward(self, x):
        return self.encoder(x)
def make(n): return Net(n)
"""
BOMB = "raise SystemExit('this file must not be run')\n"


@pytest.fixture
def slips(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model, a package, files in folders, and a lambda that makes a model."""
    monkeypatch.chdir(tmp_path)
    scope: dict = {}
    exec(CODE, scope)
    for folder in ("hidden_nets", "runs"):
        Path(folder).mkdir()
    Path("zoo.py").write_text(CODE)
    Path("lam.py").write_text("from torch import nn\nSmall = lambda: nn.Linear(2, 2)\n")
    for name in ("deep", "far"):
        Path(f"hidden_nets/{name}.py").write_text(CODE.replace("LM", name.title()))
    torch.save(scope["Net"]().state_dict(), "params.pt")
    torch.save(scope["Net"]().state_dict(), "runs/best.pt")
    torch.save(scope["LM"]().state_dict(), "lm.pt")
    torch.save(torch.nn.Linear(2, 2).state_dict(), "small.pt")
    return tmp_path


def tried(ended) -> str:
    assert ended.code == 2, ended
    return ended.err.partition("\n  try: ")[2].rstrip("\n")


@pytest.mark.parametrize(
    ("file", "wrong", "right"),
    [
        ("params.pt", "zoo.Net", "zoo:Net"),
        ("params.pt", "zoo.Net()", "zoo:Net()"),
        ("params.pt", "zoo.Net(n=2)", "zoo:Net(n=2)"),
        ("params.pt", "zoo.py.Net", "zoo.py:Net"),
        ("params.pt", "zoo.py::Net", "zoo.py:Net"),
        ("params.pt", "zoo/Net", "zoo:Net"),
        ("params.pt", "zoo.Nett", "zoo:Net"),
        ("params.pt", "zo.Net", "zoo:Net"),
        ("params.pt", "zo:Net", "zoo:Net"),
        ("params.pt", "zo.py:Net", "zoo.py:Net"),
        ("lm.pt", "LM", "zoo:LM"),
        ("small.pt", "lam.py", "lam.py:Small"),
        ("small.pt", "lam", "lam:Small"),
        ("params.pt", "hidden_nets.deep.Net", "hidden_nets.deep:Net"),
        ("params.pt", "hidden_nets/deep.Net", "hidden_nets/deep.py:Net"),
        ("params.pt", "hidden_nets/deep:Net", "hidden_nets/deep.py:Net"),
        ("params.pt", r"hidden_nets\deep.py:Net", "hidden_nets/deep.py:Net"),
        ("params.pt", "hidden_nets.dep:Net", "hidden_nets.deep:Net"),
        ("lm.pt", "far:Far", "hidden_nets/far.py:Far"),
        ("lm.pt", "Far", "hidden_nets/far.py:Far"),
    ],
)
def test_a_target_with_a_slip(slips, run, file, wrong, right) -> None:
    Path("bomb.py").write_text(BOMB)
    hint = tried(run("diff", file, wrong))
    assert shlex.split(hint.removeprefix("is it ").removesuffix("?"))[0] == right, hint
    assert run("diff", file, right).code == 0


def test_installed_modules_are_told_without_importing_them(slips, run) -> None:
    for wrong, right in (("torch.nn.Linear(2, 2)", "torch.nn:Linear(2, 2)"), ("json.decoder.Nope", "json.decoder:Nope")):
        assert tried(run("diff", "small.pt", wrong)) == f"is it {shlex.quote(right)}?"
    assert run("diff", "small.pt", "torch.nn:Linear(2, 2)").code == 0
    assert tried(run("diff", "small.pt", "there.is.none")).startswith("check the path")


def test_no_module_is_said_to_be_imported_that_is_not_there(slips, run) -> None:
    ended = run("diff", "params.pt", "modle:Net")
    assert "there is no module 'modle'" in ended.err and "note:" not in ended.err


@pytest.mark.parametrize(
    ("wrong", "right"),
    [("parms.pt", "params.pt"), ("params.pth", "params.pt"), ("best.pt", "runs/best.pt"), (r"runs\best.pt", "runs/best.pt")],
)
def test_a_file_with_a_slip(slips, run, wrong, right) -> None:
    for words in (
        ["inspect", wrong],
        ["diff", wrong, "zoo:Net"],
        ["merge", wrong, "zoo:Net", "-o", "out.pt"],
        ["diff", "params.pt", wrong],
    ):
        ended = run(*words)
        assert "does not exist" in ended.err and tried(ended) == f"is it {right}?"
    assert tried(run("inspect", "runs/params.pt")) == "is it params.pt?"


def test_a_model_where_the_file_should_stand(slips, run) -> None:
    for wrong in ("zoo:Net", "zoo.Net", "zoo.py"):
        assert "give the file first and the model last" in tried(run("diff", wrong, "params.pt"))
    assert "zoo:Net" in tried(run("diff", "zoo.Net", "params.pt"))


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("merge params.pt zoo:Net", "merge params.pt zoo:Net -o merged.pt"),
        ("merge params.pt", "merge params.pt -o params.safetensors"),
        ("merge params.pt zoo:Net out.pt", "merge params.pt zoo:Net -o out.pt"),
        ("merge params.pt zoo:Net --seed 1", "merge params.pt zoo:Net --seed 1 -o merged.pt"),
        ("skeleton zoo:Net", "skeleton zoo:Net -o net.json"),
        ("skeleton zoo:Net it.json", "skeleton zoo:Net -o it.json"),
        ("merge params.pt zoo:Net --out x.pt", "merge params.pt zoo:Net --output x.pt"),
        ("merge params.pt zoo:Net -o x.pt --min_coverage 0.5", "merge params.pt zoo:Net -o x.pt --min-coverage 0.5"),
        ("merge params.pt zoo:Net -o x.pt --no_verify", "merge params.pt zoo:Net -o x.pt --no-verify"),
        ("merge params.pt zoo:Net -o x.pt --Dtype=F16", "merge params.pt zoo:Net -o x.pt --dtype=F16"),
        ("diff params.pt zoo:Net --rule rules.toml", "diff params.pt zoo:Net --rules rules.toml"),
        ("convert params.pt -o x.safetensors", "merge params.pt -o x.safetensors"),
        ("average params.pt runs/best.pt -o x.pt", "merge --average params.pt runs/best.pt -o x.pt"),
        ("show params.pt", "inspect params.pt"),
        ("params.pt", "inspect params.pt"),
        ("params.pt zoo:Net", "diff params.pt zoo:Net"),
        ("--json inspect params.pt", "inspect params.pt --json"),
        ("-q diff params.pt zoo:Net", "diff params.pt zoo:Net -q"),
    ],
)
def test_a_command_line_with_a_slip(slips, run, wrong, right) -> None:
    Path("rules.toml").write_text('[[drop]]\nkey = "fc.*"\n')
    ended = run(*shlex.split(wrong))
    hint = ended.json["error"]["hint"] if "--json" in wrong else tried(ended)
    assert hint == f"ckptsurgeon {right}" and run(*shlex.split(right)).code == 0


def test_the_one_model_of_the_folder_is_offered_for_a_missing_target(slips, run) -> None:
    assert tried(run("diff", "params.pt")) == "ckptsurgeon diff --help"  # two files have models
    for other in set(Path(".").glob("*.py")) - {Path("zoo.py")}:
        other.unlink()
    hint = tried(run("diff", "params.pt"))
    assert hint == "ckptsurgeon diff params.pt zoo:Net" and run(*shlex.split(hint)[1:]).code == 0


def test_words_for_what_has_no_one_command(slips, run) -> None:
    for words, said in (
        ("mrege a b", "No such command 'mrege'; is it merge?"),
        ("merge params.pt zoo:Net -out x.pt", "'-out' has one dash; is it --output?"),
        ("diff params.pt zoo:Net --dtype F16", "diff has no option '--dtype'; plan, merge, check have it"),
        ("plan params.pt zoo:Net plan.json", "plan.json stands where the target is expected, and does not exist; is it -o plan.json?"),
    ):
        ended = run(*shlex.split(words))
        assert ended.code == 2 and said in ended.err.splitlines()[0], ended.err
    assert not Path("ut").exists()


@pytest.mark.parametrize("word", ["bf16", "BF16", "bfloat16", "float16", "fp16", "half", "torch.float16", "Float32", "SOURCE"])
def test_dtypes_by_all_their_names(slips, run, word) -> None:
    assert run("merge", "params.pt", "-o", "x.safetensors", "--dtype", word).code == 0
    if word != "SOURCE":
        assert run("check", "x.safetensors", "--dtype", word).code == 0
        Path("pyproject.toml").write_text(f'[tool.ckptsurgeon.check]\ndtype = "{word}"\n')
        assert run("check", "x.safetensors").code == 0


@pytest.mark.parametrize(
    ("words", "wrong", "right"),
    [
        ("merge lm.pt zoo:LM -o x.pt --drop {}", "encoder.*.weight.*", None),
        ("merge lm.pt zoo:LM -o x.pt --drop {}", "encoder.*", "encoder.**"),
        ("diff lm.pt zoo:LM --drop {}", "encoder", "encoder.**"),
        ("diff lm.pt zoo:LM --drop {}", "^encoder", "/encoder.*/"),
        ("diff lm.pt zoo:LM --keep {}", "encode*", "encode*.**"),
        ("merge lm.pt zoo:LM -o x.pt --drop encoder.1.* --init {} zeros", "encoder.*", "encoder.**"),
        ("merge lm.pt zoo:LM -o x.pt --dtype F16 --allow-cast {}", "encoder.*", "encoder.**"),
        ("groups m.pt zoo:LM --lr 1e-3 --override {} 1e-4", "encoder.*", "encoder.**"),
        ("groups m.pt zoo:LM --lr 1e-3 --fresh-lr 1 --no-decay-for {}", "encoder.*", "encoder.**"),
        ("groups m.pt zoo:LM --lr 1e-3 --fresh-lr 1 --layer-decay 0.5 --layers {}", "encoder.{i}", "encoder.{i}.**"),
    ],
)
def test_one_star_where_two_were_meant(slips, run, words, wrong, right) -> None:
    assert run("merge", "lm.pt", "zoo:LM", "-o", "m.pt", "--drop", "encoder.1.*").code == 0
    before = [word.format(wrong) if word == "{}" else word for word in words.split()]
    ended = run(*before, "--overwrite") if "-o" in before else run(*before)
    said = f"is it {right!r}?"
    assert ended.code == 2 and (said in ended.err if right else "is it" not in ended.err), ended.err
    if right and not {"--drop", "--keep"} & {before[-2]}:  # dropping or keeping all is a no of another kind
        after = [word.format(right) if word == "{}" else word for word in words.split()]
        assert run(*after, *(["--overwrite"] if "-o" in after else [])).code == 0


def test_a_rename_with_one_segment_where_several_were_meant(slips, run) -> None:
    ended = run("diff", "lm.pt", "zoo:LM", "--rename", "encoder.{p}", "decoder.{p}")
    assert "is it 'encoder.{**p}'?" in ended.err
    torch.save({key.replace("encoder", "old"): value for key, value in torch.load("lm.pt").items()}, "old.pt")
    assert "is it 'old.{**p}'?" in run("diff", "old.pt", "zoo:LM", "--rename", "old.{p}", "encoder.{p}").err
    assert run("merge", "old.pt", "zoo:LM", "-o", "x.pt", "--rename", "old.{**p}", "encoder.{p}", "--min-coverage", "1").code == 0


def test_a_plan_rules_and_a_checkpoint_in_each_others_place(slips, run) -> None:
    for other in set(Path(".").glob("*.py")) - {Path("zoo.py")}:
        other.unlink()
    assert run("plan", "params.pt", "zoo:Net", "-o", "my plan.json").code == 0
    Path("rules.toml").write_text('# of mine\n\n[[rename]]\nfrom = "a.{p}"\nto = "b.{p}"\n')
    for words in (["inspect", "my plan.json"], ["diff", "my plan.json", "zoo:Net"], ["diff", "params.pt", "my plan.json"]):
        ended = run(*words)
        assert "is a plan, not a checkpoint" in ended.err
        hint = tried(ended)
        assert run(*shlex.split(hint.removeprefix("follow it: "))[1:]).code == 0 and Path("out.pt").exists()
        Path("out.pt").unlink()
    for words in (["diff", "rules.toml", "zoo:Net"], ["merge", "params.pt", "rules.toml", "-o", "x.pt"]):
        ended = run(*words)
        assert "is a rules file, not a checkpoint" in ended.err and "--rules rules.toml" in tried(ended)
    ended = run("apply", "rules.toml", "-o", "x.pt")
    assert "is a rules file, not a plan" in ended.err and "--rules rules.toml" in tried(ended)
    hint = tried(run("apply", "params.pt", "-o", "x.pt"))
    assert hint == "plan it first: ckptsurgeon plan params.pt zoo:Net -o plan.json"
    assert run(*shlex.split(hint.removeprefix("plan it first: "))[1:]).code == 0
    ended = run("diff", "params.pt", "zoo:Net", "--rules", "params.pt")
    assert "is a checkpoint (torch-zip), not rules" in ended.err
    Path("runs/config.json").write_text('{"model_type": "bert", "architectures": ["BertModel"]}')
    assert "a configuration of transformers" in run("diff", "runs/config.json", "zoo:Net").err


@pytest.mark.parametrize(
    ("file", "target", "wrong", "right"),
    [("params.pt", "zoo:Net", "3x8x8", "1x3x8x8"), ("lm.pt", "zoo:LM", "1x5", "1x5:I64"), ("lm.pt", "zoo:LM", "1x5:F32", None)],
)
def test_an_input_without_a_batch_or_of_floats_for_tokens(slips, run, file, target, wrong, right) -> None:
    ended = run("verify", file, target, "--input", wrong)
    assert ended.code == 1 and f"the forward pass with {wrong} failed" in ended.out
    assert (f"it works with {right}:" in ended.out) is (right is not None)
    if right:
        assert run("verify", file, target, "--input", right).code == 0


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("1,3,8,8", "1x3x8x8"),
        ("(1, 3, 8, 8)", "1x3x8x8"),
        ("[1,3,8,8]", "1x3x8x8"),
        ("1X3X8X8", "1x3x8x8"),
        ("1×3×8×8", "1x3x8x8"),
        ("1*3*8*8", "1x3x8x8"),
        ("1 3 8 8", "1x3x8x8"),
        ("1x3x8x8:flaot32", "1x3x8x8:float32"),
        ("1,3,8,8:float32", "1x3x8x8:F32"),
    ],
)
def test_an_input_with_other_signs(slips, run, wrong, right) -> None:
    ended = run("verify", "params.pt", "zoo:Net", "--input", wrong)
    assert tried(ended) == f"is it {right}?" and run("verify", "params.pt", "zoo:Net", "--input", right).code == 0


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("pad(dim=0, fill='initial')", "fill can't be 'initial'; is it 'init'?"),
        ("pad(dim=0, fill='zero')", "fill can't be 'zero'; is it 'zeros'?"),
        ("pad(dim=0, fil='init')", "takes no argument 'fil'; is it 'fill'?"),
        ("rows(index=[0], fill='initial')", "fill can't be 'initial'; is it 'init'?"),
        ("pad(dim=0, fill=3)", "fill can't be 3; it is one of 'zeros', 'mean', 'init', 'constant'"),
        ("interpolate(mode='bilinaer')", "mode can't be 'bilinaer'; is it 'bilinear'?"),
    ],
)
def test_an_adapters_word_with_a_slip(slips, run, wrong, said) -> None:
    ended = run("diff", "params.pt", "zoo:Net", "--adapt", "fc.weight", wrong)
    assert ended.code == 2 and said in ended.err, ended.err
    Path("rules.toml").write_text(f'[[adapt]]\nkey = "fc.weight"\nop = "{wrong}"\n')
    assert said in run("diff", "params.pt", "zoo:Net", "--rules", "rules.toml").err


def test_an_output_that_exists_is_told_before_what_is_wrong_with_the_inputs(slips, run) -> None:
    """It costs nothing to look, and reading and planning may take minutes."""
    Path("out.pt").write_bytes(b"mine")
    assert run("plan", "params.pt", "zoo:Net", "-o", "plan.json").code == 0
    torch.save({"conv.weight": torch.zeros(1)}, "params.pt")
    for words, said in (
        (["merge", "parms.pt", "zoo:Net"], "parms.pt: does not exist"),
        (["merge", "params.pt", "zoo:Nett"], "has no 'Nett'"),
        (["merge", "params.pt", "zoo:Net", "--drop", "no.such"], "matches nothing"),
        (["merge", "params.pt", "zoo:Net", "--rules", "no.toml"], "no.toml: does not exist"),
        (["apply", "plan.json"], "has changed since"),
    ):
        ended = run(*words, "-o", "out.pt")
        assert ended.code == 2 and ended.err.startswith("error: out.pt: exists already"), ended.err
        ended = run(*words, "-o", "new.pt")
        assert ended.code == 2 and said in ended.err, ended.err
    assert Path("out.pt").read_bytes() == b"mine" and not Path("new.pt").exists()


def test_several_checkpoints_without_average(slips, run) -> None:
    other = {key: value + 1 if value.is_floating_point() else value for key, value in torch.load("params.pt").items()}
    for name in ("b.pt", "c.pt"):
        torch.save(other, name)
    hint = tried(run("merge", "params.pt", "b.pt", "c.pt", "-o", "soup.pt"))
    assert hint.startswith("for the mean of all of them: --average; or give one of the two files only")
    assert run("merge", "params.pt", "b.pt", "c.pt", "-o", "soup.pt", "--average").code == 0
    assert "--average" not in tried(run("merge", "params.pt", "b.pt", "zoo:Net", "-o", "x.pt"))
    ended = run("merge", "params.pt", "b.pt", "-o", "x.pt")
    assert ended.code == 0 and "nothing of b.pt is in the result" in ended.out and "--average" in ended.out
    assert "nothing of" not in run("merge", "params.pt", "zoo:Net", "-o", "y.pt").out
    torch.save({**other, "more": torch.ones(1)}, "d.pt")
    assert "nothing of" not in run("merge", "params.pt", "d.pt", "-o", "z.pt").out


@pytest.mark.parametrize(
    ("option", "wrong", "right"),
    [
        ("--dtype", "flaot16", "float16"),
        ("--dtype", "sorce", "source"),
        ("--format", "pt", "torch"),
        ("--format", ".safetensor", "safetensors"),
        ("--tied", "aliases", "alias"),
        ("--min-coverage", "90%", "0.9"),
        ("--min-coverage", "99", "0.99"),
    ],
)
def test_one_of_few_words_with_a_slip(slips, run, option, wrong, right) -> None:
    ended = run("merge", "params.pt", "lm.pt", "-o", "x.pt", option, wrong)
    assert ended.code == 2 and ended.err.splitlines()[0].endswith(f"; is it {right}?"), ended.err


@pytest.mark.parametrize("word", ["int8", "float8_e4m3fn"])
def test_a_dtype_that_no_option_takes_is_not_offered_again(slips, run, word) -> None:
    ended = run("merge", "params.pt", "-o", "x.pt", "--dtype", word)
    assert ended.code == 2 and "is not one of" in ended.err and f"is it {word}" not in ended.err, ended.err


@pytest.mark.parametrize("words", [["merge", "", "-o", "y.pt"], ["inspect", ""], ["merge", "params.pt", "", "-o", "y.pt"]])
def test_an_empty_path_is_seen(slips, run, words) -> None:
    ended = run(*words)
    assert ended.code == 2 and ended.err.startswith("error: '': does not exist"), ended.err


def test_help_shows_no_range_without_limits(run) -> None:
    page = run("groups", "--help").out
    assert "None" not in page and "[x>=0; required]" in page
