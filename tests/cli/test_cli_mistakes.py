"""Twenty mistakes and more that a newcomer makes, each with all that is printed: one sentence, and one way out.

As git, ruff, uv and terraform word theirs: what is wrong first, with the word that is wrong; then what to type. A way out that is a command
is run here.
"""

# ruff: noqa: E501 - messages stand here as they are printed

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch

import ckptsurgeon as cs

RULES = '[[rename]]\nfrom = "fc2.{p}"\nto = "dense2.{p}"\n\n[[rename]]\nform = "x"\nto = "y"\n'
# What is typed, the sentence with its problems, and the way out.
TYPED: tuple[tuple[str, str, str], ...] = (
    ("inspect net_param.pkl", "net_param.pkl: does not exist", "is it net_params.pkl?"),
    ("inspect runs", "runs: is a folder without a Hugging Face checkpoint", "give a file in it: runs/best.pt"),
    (
        "inspect model.py",
        "model.py: is not a checkpoint of a format that is read here",
        "save the names and shapes of its model: ckptsurgeon skeleton model.py:Net -o net.json",
    ),
    (
        "inspect model:Net",
        "model:Net: is a model, where a checkpoint file is needed",
        "save its names and shapes: ckptsurgeon skeleton model:Net -o net.json",
    ),
    (
        "inspect net_params.pkl 'fc4.*'",
        "net_params.pkl: 'fc4.*' matches no key (close: fc3.bias, fc2.bias, fc1.bias)",
        "see the names: ckptsurgeon inspect -v net_params.pkl",
    ),
    (
        "inspect train.pt 'fc4.*' fc5 --root model",
        "train.pt: 2 patterns match no key\n  'fc4.*' matches no key (close: fc3.bias, fc2.bias, fc1.bias)\n  'fc5' matches no key (close: fc1.weight, fc1.bias, fc2.weight)",
        "see the names: ckptsurgeon inspect -v train.pt --root model",
    ),
    ("diff net_params.pkl model:Nett", "model:Nett: model has no 'Nett'", "is it model:Net?"),
    (
        "diff net_params.pkl modle:Net",
        "modle:Net: there is no module 'modle' in this folder or among the installed ones",
        "is it model:Net?",
    ),
    ("diff net_params.pkl model.Net", "model.Net: does not exist", "is it model:Net?"),
    ("diff net_params.pkl model", "model: does not exist", "is it model:Net or model:TutorialModule?"),
    ("diff net_params.pkl", "Missing argument 'TARGET'.", "ckptsurgeon diff --help"),
    ("diff model:Net net_params.pkl", "model:Net: is a model, where a checkpoint file is needed", "give the file first and the model last"),
    (
        "diff train.pt model:Net --rootz model",
        "No such option '--rootz'; is it --root?",
        "ckptsurgeon diff train.pt model:Net --root model",
    ),
    (
        "diff net_params.pkl model:Net --strickt",
        "No such option '--strickt'; is it --strict?",
        "ckptsurgeon diff net_params.pkl model:Net --strict",
    ),
    ("diff train.pt model:Net --root modle", "train.pt: has no state_dict at 'modle'", "is it model? its roots: model (10 tensors)"),
    ("dif net_params.pkl model:Net", "No such command 'dif'; is it diff?", "ckptsurgeon diff net_params.pkl model:Net"),
    ("show net_params.pkl", "No such command 'show'; it is inspect", "ckptsurgeon inspect net_params.pkl"),
    ("net_params.pkl", "No such command 'net_params.pkl'; it is a file, and a command comes first", "ckptsurgeon inspect net_params.pkl"),
    ("help mrege", "No such command 'mrege'; is it merge?", "ckptsurgeon --help"),
    ("merge net_params.pkl model:Net", "Missing option '-o' / '--output'.", "ckptsurgeon merge net_params.pkl model:Net -o merged.pt"),
    ("merge net_params.pkl model:Net out.pt", "Missing option '-o' / '--output'.", "ckptsurgeon merge net_params.pkl model:Net -o out.pt"),
    ("merge net_params.pkl model:Net -out out.pt", "'-out' has one dash; is it --output?", "ckptsurgeon merge --help"),
    ("merge net_params.pkl -o net_params.pkl", "net_params.pkl: exists already", "give --overwrite to replace it, or choose another path"),
    (
        "plan net_params.pkl model:Net --overwrite",
        "--overwrite: replaces what -o names, and none is named",
        "leave it out, or add -o plan.json",
    ),
    (
        "match net_params.pkl model:Net --overwrite",
        "--overwrite: replaces what -o names, and none is named",
        "leave it out, or add -o rules.toml",
    ),
    (
        "merge net_params.pkl model:Net -o runs",
        "runs: is a folder that would be replaced whole, and it holds what is no file of a checkpoint written there\n  best.pt",
        "choose a new folder, or move these elsewhere first",
    ),
    (
        "merge net_params.pkl model:Net -o out.xyz",
        "out.xyz: its suffix '.xyz' does not say which format to write",
        "end it in one of .safetensors .pt .pth .pkl .bin .ckpt, or give --format torch",
    ),
    (
        "merge net_params.pkl variants:NetRenamed -o out.pt --rename 'fc2.*' 'dense2.*'",
        "rules that are not well formed\n  --rename 'fc2.*' 'dense2.*': the result 'dense2.*' has a '*' or an odd brace",
        "name the part on both sides: --rename 'fc2.{p}' 'dense2.{p}'; write a star of the name itself as \\*",
    ),
    (
        "merge net_params.pkl variants:NetRenamed -o out.pt --rename fc2 dense2",
        "rules that can't be followed\n  --rename 'fc2' 'dense2' matches nothing; is it 'fc2.**'?",
        "see the names: ckptsurgeon diff net_params.pkl variants:NetRenamed",
    ),
    (
        "merge net_params.pkl model:Net -o out.pt --drop 'fc4.*'",
        "rules that can't be followed\n  --drop 'fc4.*' matches nothing (close: fc3.bias, fc2.bias, fc1.bias)",
        "see the names: ckptsurgeon diff net_params.pkl model:Net",
    ),
    (
        "merge net_params.pkl model:Net -o out.pt --drop '*'",
        "rules that can't be followed\n  --drop '*' matches nothing; is it '**'?",
        "see the names: ckptsurgeon diff net_params.pkl model:Net",
    ),
    (
        "merge net_params.pkl variants:NetTwoClasses -o out.pt --init 'fc3.*' xavier_norml",
        "there is no scheme 'xavier_norml'",
        "is it xavier_normal or xavier_uniform or kaiming_normal? all of them: ckptsurgeon adapters; your own: mylib:ortho, path/to/file.py:ortho or mylib:ortho(gain=2)",
    ),
    (
        "merge net_params.pkl variants:NetTwoClasses -o out.pt --adapt fc3.weight slize",
        "rules that are not well formed\n  --adapt 'fc3.weight' 'slize': there is no adapter 'slize'",
        "is it slice or squeeze? all of them: ckptsurgeon adapters",
    ),
    (
        "merge net_params.pkl variants:NetTwoClasses -o out.pt --adapt fc3.weigth slice",
        "adapters that can't be followed\n  --adapt 'fc3.weigth' 'slice' matches nothing in the target (close: fc3.weight, fc2.weight, fc1.weight)",
        "see the names: ckptsurgeon diff net_params.pkl variants:NetTwoClasses",
    ),
    (
        "merge net_params.pkl model:Net -o out.pt --dtype fp61",
        "Invalid value for '--dtype': 'fp61' is not one of 'source', 'target', 'F16', 'BF16', 'F32', 'F64'; is it fp64?",
        "ckptsurgeon merge --help",
    ),
    ("merge net_params.pkl model:Net -o out.pt --rules rulez.toml", "rulez.toml: does not exist", "is it rules.toml?"),
    (
        "merge net_params.pkl model:Net -o out.pt --rules rules.toml",
        "rules.toml: has rules that are not well formed\n  line 6: [[rename]] has no 'form'; is it 'from'?\n  line 5: [[rename]] needs from and to",
        "ckptsurgeon guide rules",
    ),
    (
        "merge net_params.pkl model:Net -o out.pt --limit pickle-byte=2",
        "Invalid value for '--limit': there is no limit 'pickle-byte' (is it pickle-bytes or pickle-steps or pickle-memo?)",
        "ckptsurgeon merge --help",
    ),
    (
        "merge net_params.pkl model:Net -o out.pt --average",
        "--average takes checkpoints only, and model:Net is a model; leave it out",
        "ckptsurgeon merge --help",
    ),
    (
        "merge net_params.pkl net_params.pkl model:Net -o out.pt",
        "rules that can't be followed\n  two sources land on 'conv1.weight': 'conv1.weight' of net_params.pkl and 'conv1.weight' of net_params.pkl, and on 9 more names",
        "give one of the two files only: net_params.pkl has nothing else",
    ),
    (
        "merge net_params.pkl 'model:Net(classes=2)' -o out.pt",
        "model:Net(classes=2): Net does not take these arguments (got an unexpected keyword argument 'classes'); its signature is Net(num_classes: int = 10) -> None",
        "model:Net(num_classes=2)",
    ),
    (
        "merge net_params.pkl 'model:Net(num_classes=n)' -o out.pt",
        "model:Net(num_classes=n): the arguments (num_classes=n) are not a call with literals only",
        "write values there, as in Net(num_classes=2, sizes=[1, 2]), or name a function without arguments",
    ),
    (
        "merge net_params.pkl plan.json -o out.pt",
        "plan.json: is a plan, not a checkpoint",
        "follow it: ckptsurgeon apply plan.json -o out.pt",
    ),
    ("inspect plan.json", "plan.json: is a plan, not a checkpoint", "follow it: ckptsurgeon apply plan.json -o out.pt"),
    ("apply plan.jsn -o out.pt", "plan.jsn: does not exist", "is it plan.json?"),
    (
        "apply net_params.pkl -o out.pt",
        "net_params.pkl: is a checkpoint (torch-legacy), not a plan",
        "plan it first: ckptsurgeon help plan",
    ),
    ("apply plan.json", "Missing option '-o' / '--output'.", "ckptsurgeon apply plan.json -o merged.pt"),
    (
        "apply stale.json -o out.pt",
        "changing.pt: has changed since the plan was made",
        "plan again, with the rules and other options that it had, if any: ckptsurgeon plan changing.pt model:Net -o stale.json --overwrite",
    ),
    ("check", "Missing argument 'PATH...'.", "ckptsurgeon check --help"),
    (
        "check net_params.pkl --ignore CK20x",
        "--ignore: there is no code 'CK20x'; is it CK203?",
        "all of them: ckptsurgeon check --explain all; or the beginning of some, such as CK2",
    ),
    ("check --explain unsaf", "--explain: there is no code 'unsaf'", "is it unsafe?"),
    ("check net_params.pkl --max-size big", "--max-size: 'big' is no size", "write bytes, or a number with its unit: 500MB, 1.5GB"),
    (
        "check net_params.pkl --allow safetensor",
        "--allow: there is no format 'safetensor'; is it safetensors?",
        "the formats are safetensors, torch, torch-zip, torch-legacy, skeleton, dcp, dcp-safetensors, npz",
    ),
    ("groups net_params.pkl model:Net --lr fast", "Invalid value for '--lr': 'fast' is not a valid number.", "ckptsurgeon groups --help"),
    ("verify net_params.pkl model:Net --device gpu", "'gpu' is not the name of a device", "--device cpu or --device meta"),
    ("skeleton model:Net", "Missing option '-o' / '--output'.", "ckptsurgeon skeleton model:Net -o net.json"),
    ("guide pattern", "the guide has no page 'pattern'; is it patterns?", "ckptsurgeon guide patterns"),
)
# The same in Python: a call, the error, and the way out.
CALLED: tuple[tuple[str, str, str], ...] = (
    ('cs.transfer("net_param.pkl", model)', "net_param.pkl: does not exist", "is it net_params.pkl?"),
    (
        'cs.transfer(model, "net_params.pkl")',
        "model: takes a model, an instance of torch.nn.Module, and 'net_params.pkl' was given to transfer",
        "the other way round: transfer(source, model)",
    ),
    (
        'cs.transfer("net_params.pkl", Net)',
        "model: takes a model, an instance of torch.nn.Module, and the class Net was given to transfer",
        "make one first: Net(...)",
    ),
    ('cs.transfer("net_params.pkl", model, strict="no")', "strict: takes True or False, and 'no' was given to transfer", "strict=True"),
    (
        'cs.transfer("net_params.pkl", model, seed="1")',
        "seed: takes a whole number from 0 to 2**63 - 1, and '1' was given to transfer",
        "seed=1",
    ),
    (
        'cs.transfer("net_params.pkl", model, min_coverage="0.5")',
        "min_coverage: takes a number, and '0.5' was given to transfer",
        "min_coverage=0.5",
    ),
    (
        'cs.transfer("net_params.pkl", model, drop={"fc3.*": 1})',
        "drop: takes a pattern or a list of them, and a dict of 1 was given to transfer",
        "drop=['aux.**']",
    ),
    (
        'cs.transfer("net_params.pkl", NetRenamed(), rename=["fc2.{p}", "dense2.{p}"])',
        "rename: takes a dict from patterns to texts, or a list of pairs, and a list of 2 was given to transfer",
        "rename={'fc2.{p}': 'dense2.{p}'}",
    ),
    (
        'cs.transfer("net_params.pkl", NetTwoClasses(), init="zeros")',
        "init: takes a dict from patterns to texts, or a list of pairs, and 'zeros' was given to transfer",
        "init={'fc3.*': 'xavier_normal'}",
    ),
    (
        'cs.transfer("net_params.pkl", model, strickt=True)',
        "transfer() got an unexpected keyword argument 'strickt', did you mean strict?",
        "",
    ),
    (
        'cs.match("net_params.pkl", model, accept=True)',
        "match() got an unexpected keyword argument 'accept', did you mean accept_uncertain?",
        "",
    ),
    (
        'cs.plan(["net_params.pkl", "net_params.pkl"])',
        "needs one source to convert, or a target",
        "give the target, or average=True for the mean of all sources",
    ),
    (
        'cs.plan(["net_params.pkl", "net_params.pkl"], "model:Net", match=True)',
        "matching is between one source and a target",
        "match one source at a time, and give the rules of each: ckptsurgeon match net_params.pkl model:Net -o rules.toml",
    ),
    (
        'cs.plan(["net_params.pkl", "net_params.pkl"], model, match=True)',
        "matching is between one source and a target",
        "match one source at a time, and give the rules of each: ckptsurgeon.match('net_params.pkl', model).rules",
    ),
    ('cs.merge("net_params.pkl", model, model)', "output: takes a path, and a Net was given to merge", "output='out.pt'"),
    (
        'cs.merge("net_params.pkl", "model:Net", "out.pt", overwrite="True")',
        "overwrite: takes True or False, and 'True' was given to merge",
        "overwrite=True",
    ),
    (
        "cs.inspect(model)",
        "path: takes a path or an io.BytesIO, and a Net was given to inspect",
        "ckptsurgeon.skeleton(path) gives the names and shapes of a model or a state_dict",
    ),
    (
        'cs.diff("net_params.pkl", None)',
        "target: takes a path, a spec such as 'module:Net', a model, a state_dict or a Checkpoint, and None was given to diff",
        "target='model:Net'",
    ),
    (
        "cs.param_groups(model, None, lr=1e-3)",
        "source: takes a report, a plan, a merged checkpoint or its path, or patterns or keys, and None was given to param_groups",
        "source=report",
    ),
    (
        'cs.initialize(model, {"fc9.*": "zeros"})',
        "1 keys recorded as fresh are not in this model\n  fc9.*",
        "is it fc3.bias or fc2.bias or fc1.bias?",
    ),
    (
        'cs.apply({"version": 1}, "out.pt")',
        "plan: takes a plan, or the path of a plan.json, and a dict of 1 was given to apply",
        "plan='plan.json'",
    ),
    ('cs.verify("net_params.pkl", model, device=0)', "device: takes text, and 0 was given to verify", "device='cpu'"),
)


@pytest.fixture
def newcomer(place: Path) -> Path:
    """The fixtures, a folder of runs, a training checkpoint, a plan, a stale one, a rules file with a slip."""
    net = torch.load("net_params.pkl")
    Path("runs").mkdir()
    torch.save(net, "runs/best.pt")
    torch.save({"epoch": 1, "model": net}, "train.pt")
    Path("rules.toml").write_text(RULES)
    Path("plan.json").write_text(cs.plan("net_params.pkl", "model:Net").to_json())
    torch.save(net, "changing.pt")
    Path("stale.json").write_text(cs.plan("changing.pt", "model:Net").to_json())
    torch.save({key: value + 1 for key, value in net.items()} | {"more": torch.zeros(1)}, "changing.pt")
    return place


@pytest.mark.parametrize(("line", "sentence", "way"), TYPED, ids=[line for line, *_ in TYPED])
def test_what_is_typed_wrong_is_told_in_one_sentence_with_one_way_out(run, newcomer, files, line: str, sentence: str, way: str) -> None:
    before = files()
    ended = run(*shlex.split(line))
    said = "".join(row for row in ended.err.splitlines(keepends=True) if not row.startswith("note: "))
    assert (ended.code, ended.out, said) == (2, "", f"error: {sentence}\n  try: {way}\n") and files() == before
    command = re.search(r"ckptsurgeon [^;]*[^;,?]", way)
    if command is not None:
        assert run(*shlex.split(command[0])[1:]).code in (0, 1), command[0]


@pytest.mark.parametrize(("call", "sentence", "way"), CALLED, ids=[call for call, *_ in CALLED])
def test_what_is_called_wrong_is_told_in_one_sentence_with_one_way_out(newcomer, monkeypatch, call: str, sentence: str, way: str) -> None:
    monkeypatch.syspath_prepend(newcomer)
    scope: dict = {"cs": cs, "torch": torch}
    exec("from model import Net\nfrom variants import NetRenamed, NetTwoClasses\nmodel = Net()", scope)
    with pytest.raises((cs.CheckpointError, TypeError)) as caught:
        eval(call, scope)
    hint = getattr(caught.value, "hint", None) or ""
    message = caught.value.message if isinstance(caught.value, cs.CheckpointError) else str(caught.value)
    assert (message, hint) == (sentence, way)


def test_there_are_twenty_and_more() -> None:
    assert len(TYPED) >= 40 and len(CALLED) >= 12
    assert all(len(sentence.splitlines()[0]) <= 160 and len(way) <= 200 for _, sentence, way in (*TYPED, *CALLED))


def test_an_output_that_is_there_is_told_before_the_work(run, newcomer, monkeypatch) -> None:
    """Before a checkpoint is read or a model imported, which may take minutes."""
    Path("slow.py").write_text("raise SystemExit('imported')\n")
    for words in (
        ("merge", "net_params.pkl", "slow:Net", "-o", "train.pt"),
        ("plan", "net_params.pkl", "slow:Net", "-o", "plan.json"),
        ("match", "net_params.pkl", "slow:Net", "-o", "rules.toml"),
        ("skeleton", "slow:Net", "-o", "plan.json"),
        ("apply", "plan.json", "-o", "train.pt"),
    ):
        ended = run(*words)
        assert ended.code == 2 and ended.err == (
            f"error: {words[-1]}: exists already\n  try: give --overwrite to replace it, or choose another path\n"
        )
