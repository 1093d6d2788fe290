"""Every command on the fixture: what it answers, where it prints, and what it writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ckptsurgeon.cli.main import COMMANDS

RENAME = ("--rename", "fc2.{p}", "dense2.{p}")
NET, VARIANT = "model:Net", "variants:NetVariant"


def test_inspect(run):
    ended = run("inspect", "net_params.pkl")
    assert ended.code == 0 and ended.err == ""
    assert "10 tensors, 62,006 elements, 248.0 kB (10 F32)" in ended.out
    assert "    fc3.{weight,bias}    F32  (10, 84), (10,)\n" in ended.out
    assert "    fc3.weight    F32  (10, 84)\n    fc3.bias      F32  (10,)\n" in run("inspect", "net_params.pkl", "-v").out


def test_inspect_lists_every_root_and_shows_the_tensors_of_one(place, run):
    net = torch.load("net_params.pkl", weights_only=True)
    torch.save({"epoch": 3, "model": net, "ema": {key: value + 1 for key, value in net.items()}}, "train.pt")
    ended = run("inspect", "train.pt")
    assert "root model: 10 tensors" in ended.out and "root ema: 10 tensors" in ended.out and "epoch" in ended.out
    assert "fc3." not in ended.out and "--root" in ended.out
    one = run("inspect", "train.pt", "--root", "ema").out
    assert "fc3.{weight,bias}" in one and "root model" not in one
    found = run("inspect", "train.pt", "--root", "ema", "--json").json
    assert found["root"] == "ema" and [row["root"] for row in found["roots"]] == ["model", "ema"]
    assert run("inspect", "train.pt", "-v").out.count("fc3.weight") == 2


def test_inspect_shows_forty_rows_at_most_unless_asked_for_all(place, run):
    torch.save({f"layer{chr(97 + n % 26)}{chr(97 + n // 26)}": torch.zeros(n + 1) for n in range(100)}, "many.pt")
    short, long = run("inspect", "many.pt").out.splitlines(), run("inspect", "many.pt", "-v").out.splitlines()
    assert len(short) == 2 + 40 + 1 and short[2 + 30].strip() == "… 60 more (-v shows all)"
    assert [*short[2:32], *short[33:]] == [*long[2:32], *long[-10:]] and len(long) == 2 + 100


def test_inspect_tells_ties(place, run):
    weight = torch.zeros(3, 2)
    torch.save({"embed.weight": weight, "head.weight": weight}, "tied.pt")
    assert "tied, one tensor: embed.weight, head.weight" in run("inspect", "tied.pt").out


def test_diff(run):
    ended = run("diff", "net_params.pkl", VARIANT)
    assert ended.code == 0
    assert ended.err == "note: imports variants from ./variants.py\n"
    for words in ("matched         6", "mismatched      2", "missing         7", "extra           2", "fc3.weight  (10, 84)  →  (2, 84)"):
        assert words in ended.out
    assert "Coverage 40.0 % of tensors, 83.1 % of elements (6 of 15 tensors)." in ended.out
    assert (
        ended.out.splitlines()[-1] == f"Next: ckptsurgeon merge net_params.pkl {VARIANT} -o merged.pt --rename 'fc2.{{p}}' 'dense2.{{p}}'"
    )


def test_the_command_after_a_diff_keeps_its_rules_and_works(place, run):
    import shlex

    last = run("diff", "net_params.pkl", VARIANT, *RENAME, "--drop", "fc3.*").out.splitlines()[-1]
    words = shlex.split(last.removeprefix("Next: ckptsurgeon "))
    assert words[-5:] == [*RENAME, "--drop", "fc3.*"]
    assert run(*words).code == 0 and Path("merged.pt").exists()


def test_diff_of_what_fits_leads_to_verify(run):
    last = run("diff", "net_params.pkl", NET).out.splitlines()[-1]
    assert last == f"Next: ckptsurgeon verify net_params.pkl {NET}"
    assert run(*last.split()[2:]).code == 0


def test_diff_where_nothing_fits_says_so(place, run):
    torch.save({"other": torch.zeros(3)}, "other.pt")
    assert run("diff", "other.pt", NET).out.splitlines()[-1] == "Nothing fits. See its keys: ckptsurgeon inspect other.pt"


def test_diff_exit_code_and_strict(place, run):
    assert run("diff", "net_params.pkl", NET, "--exit-code", "--strict").code == 0
    assert run("diff", "net_params.pkl", VARIANT).code == 0
    assert run("diff", "net_params.pkl", VARIANT, "--exit-code").code == 1
    assert run("diff", "net_params.pkl", VARIANT, "--strict").code == 1
    torch.save({key: value.half() for key, value in torch.load("net_params.pkl").items()}, "half.pt")
    half = run("diff", "half.pt", NET, "--exit-code")
    assert half.code == 1 and "other dtype    10" in half.out
    assert run("diff", "half.pt", NET, "--strict").code == 0


def test_merge(place, run):
    ended = run("merge", "net_params.pkl", VARIANT, *RENAME, "-o", "merged.pt")
    assert ended.code == 0 and ended.err == "note: imports variants from ./variants.py\n"
    assert "Wrote merged.pt" in ended.out and "transferred     8" in ended.out and "fresh           7" in ended.out
    assert "verified: 15 tensors, loaded strictly on cpu and compared bit for bit" in ended.out
    theirs = torch.load("net_params.pkl", weights_only=True)
    ours = torch.load("merged.pt", weights_only=True)
    assert torch.equal(ours["dense2.weight"], theirs["fc2.weight"]) and ours["fc3.weight"].shape == (2, 84)


def test_merge_dry_run_prints_exactly_the_plan_and_writes_nothing(files, run):
    before = files()
    words = ("net_params.pkl", VARIANT, *RENAME)
    dry = run("merge", *words, "-o", "merged.pt", "--dry-run")
    assert dry.code == 0 and files() == before
    assert dry.out == run("plan", *words).out
    assert run("merge", *words, "-o", "merged.pt", "--dry-run", "--json").json == run("plan", *words, "--json").json
    assert run("merge", *words, "-o", "merged.pt", "--dry-run", "-v").out == run("plan", *words, "-v").out != dry.out


def test_plan_then_apply_gives_what_merge_gives(place, run):
    words = ("net_params.pkl", VARIANT, *RENAME, "--seed", "3")
    planned = run("plan", *words, "-o", "plan.json")
    assert planned.code == 0 and "wrote plan.json; follow it with: ckptsurgeon apply plan.json -o merged.pt" in planned.err
    assert planned.out.splitlines()[-1].startswith("Plan: 6 to copy, 2 to rename, 7 to initialise, 2 to drop. Coverage 53.3 % of tensors")
    assert json.loads(Path("plan.json").read_text()) == run("plan", *words, "--json").json
    applied = run("apply", "plan.json", "-o", "applied.safetensors")
    merged = run("merge", *words, "-o", "merged.safetensors")
    assert applied.code == merged.code == 0
    assert applied.out.replace("applied", "merged") == merged.out
    assert Path("applied.safetensors").read_bytes() == Path("merged.safetensors").read_bytes()


def test_plan_verbose_has_a_row_for_every_target_key(run):
    lines = run("plan", "net_params.pkl", VARIANT, "-v").out.splitlines()
    assert sum(line.split()[1:2] in (["copy"], ["init"]) for line in lines) == 15


def test_a_stale_plan_is_refused(place, run):
    run("plan", "net_params.pkl", NET, "-o", "plan.json")
    torch.save(torch.load("net_params.pkl"), "net_params.pkl")
    ended = run("apply", "plan.json", "-o", "out.pt")
    assert ended.code == 2 and "error: net_params.pkl: has changed since" in ended.err and not Path("out.pt").exists()


def test_one_path_alone_is_converted(place, run):
    ended = run("merge", "net_params.pkl", "-o", "net.safetensors")
    assert ended.code == 0 and ended.err == ""
    theirs, ours = torch.load("net_params.pkl"), load_file("net.safetensors")
    assert theirs.keys() == ours.keys() and all(torch.equal(theirs[key], ours[key]) for key in theirs)


def test_verify(place, run):
    good = run("verify", "net_params.pkl", NET, "--input", "1x3x32x32")
    assert good.code == 0 and "net_params.pkl → model:Net: ok" in good.out and "forward pass: output (1, 10)" in good.out
    bad = run("verify", "net_params.pkl", VARIANT)
    assert bad.code == 1 and "NOT ok" in bad.out and "NOT verified on cpu: 10 errors; 6 tensors compared" in bad.out
    assert "Error(s) in loading state_dict" not in bad.out
    assert "Error(s) in loading state_dict" in run("verify", "net_params.pkl", VARIANT, "-v").out
    meta = run("verify", "net_params.pkl", NET, "--device", "meta")
    assert meta.code == 0 and "verified: names, dtypes and shapes of 10 tensors" in meta.out


def test_skeleton_check_against_it(place, run):
    assert run("skeleton", VARIANT, "-o", "net.json").out == "Wrote net.json: 15 tensors of variants:NetVariant, 61,351 elements\n"
    run("merge", "net_params.pkl", VARIANT, "-o", "merged.pt")
    good = run("check", "merged.pt", "--against", "net.json")
    assert good.code == 0 and good.out == "1 file checked, all good\n"
    bad = run("check", "merged.pt", "net_params.pkl", "--against", "net.json")
    assert bad.code == 1 and bad.out.splitlines()[-1].startswith("2 files checked, 1 not good (")
    assert "net_params.pkl: CK302 fc2.{weight,bias}: are in the file only" in bad.out and "merged.pt" not in bad.out
    assert len(run("check", "net_params.pkl", "--against", "net.json", "-v").out.splitlines()) == 12


def test_groups(place, run):
    run("merge", "net_params.pkl", VARIANT, *RENAME, "-o", "merged.pt")
    ended = run("groups", "merged.pt", VARIANT, "--lr", "1e-3", "--fresh-lr", "1e-2", "--weight-decay", "1e-4")
    assert ended.code == 0
    header, _, transferred, fresh = (line.split() for line in ended.out.splitlines())
    assert header == ["group", "lr", "weight", "decay", "tensors", "parameters"]
    assert transferred[:4] == ["transferred", "0.001", "0.0001", "8"] and fresh[:4] == ["fresh", "0.01", "0.0001", "4"]
    over = run("groups", "merged.pt", VARIANT, "--lr", "1e-3", "--fresh-scale", "10", "--override", "fc3.*", "0.5", "--json").json["groups"]
    assert [(row["name"], row["lr"]) for row in over] == [("transferred", 0.001), ("fresh", 0.01), ("fc3.*", 0.5)]


@pytest.mark.parametrize("merged", [False, True])
def test_groups_without_anything_fresh_on_record_is_a_no(place, run, merged):
    if merged:
        run("merge", "net_params.pkl", NET, "-o", "merged.pt")
    ended = run("groups", "merged.pt" if merged else "net_params.pkl", NET, "--lr", "1e-3", "--fresh-lr", "1e-2")
    assert ended.code == 1 and ended.out == "" and "record" in ended.err


def test_rules_hold_in_the_order_of_the_command_line(run):
    first = ("--drop", "fc2.bias", *RENAME)
    last = (*RENAME, "--drop", "fc1.bias", "--drop=fc3.*")
    fate = {row["source"]: row["reason"] for row in run("plan", "net_params.pkl", VARIANT, *first, "--json").json["dropped"]}
    assert fate["fc2.bias"] == "--drop 'fc2.bias'"
    swapped = run("plan", "net_params.pkl", VARIANT, *RENAME, "--drop", "fc2.bias")
    assert swapped.code == 2 and "--drop 'fc2.bias' never gets a turn" in swapped.err
    steps = {row["target"]: row["action"] for row in run("plan", "net_params.pkl", VARIANT, *last, "--json").json["steps"]}
    assert steps["dense2.bias"] == "rename" and steps["fc1.bias"] == "init"


def test_the_order_of_inits(run):
    words = ("plan", "net_params.pkl", VARIANT, "--init", "fc3.bias", "zeros", "--init", "fc3.*", "xavier_normal", "--json")
    schemes = {row["target"]: row["ops"][0]["scheme"] for row in run(*words).json["steps"] if row["action"] == "init"}
    assert schemes["fc3.bias"] == "zeros" and schemes["fc3.weight"] == "xavier_normal"


def test_an_option_that_looks_like_a_rule_is_none(run):
    ended = run("plan", "net_params.pkl", VARIANT, "--root", "--drop", "fc2.bias")
    # --drop is the root's name here, fc2.bias the target, and the model before it would be a source.
    assert ended.code == 2 and "variants:NetVariant: is a model, where a checkpoint file is needed" in ended.err


def write_forms(place: Path) -> None:
    (place / "zoo").mkdir()
    (place / "zoo" / "__init__.py").write_text("")
    (place / "zoo" / "nets.py").write_text(
        "from model import Net\n"
        "class Family:\n    class Small(Net):\n        pass\n"
        "def factory(num_classes=10, pretrained=True, sizes=()):\n    assert pretrained is False\n    return Net(num_classes)\n"
        "ready = Net(3)\n"
    )


@pytest.mark.parametrize(
    ("target", "head"),
    [
        ("model:Net", 10),
        ("model.py:Net", 10),
        ("./model.py:Net", 10),
        ("zoo.nets:Family.Small", 10),
        ("zoo.nets:factory(num_classes=2, pretrained=False)", 2),
        ("zoo.nets:factory(7, False, sizes=[1, 2])", 7),
        ("zoo.nets:ready", 3),
        ("zoo/nets.py:ready", 3),
        ("net_params.pkl", 10),
    ],
)
def test_every_form_of_target(place, run, target, head):
    write_forms(place)
    ended = run("skeleton", target, "-o", "net.json")
    assert ended.code == 0, ended.err
    assert ("note: imports " in ended.err) == (".pkl" not in target)
    shapes = {row["name"]: row["shape"] for row in json.loads(Path("net.json").read_text())["tensors"]}
    assert shapes["fc3.weight"] == [head, 84]
    again = run("diff", "net_params.pkl", "net.json", "--json")
    assert again.json == {**run("diff", "net_params.pkl", target, "--json").json}


def test_a_checkpoint_as_target_keeps_its_own_values(place, run):
    run("merge", "net_params.pkl", VARIANT, "-o", "base.pt")
    ended = run("merge", "net_params.pkl", "base.pt", *RENAME, "-o", "merged.pt")
    assert ended.code == 0 and "kept            7   the target's own values" in ended.out


def test_what_a_persons_code_prints_does_not_stand_in_the_data(place, program):
    (place / "loud.py").write_text(
        "import os\nfrom model import Net as Quiet\nprint('from the module')\n"
        "class Net(Quiet):\n    def __init__(self):\n        super().__init__()\n        print('from the constructor')\n"
        "    def forward(self, x):\n        print('from forward')\n        return super().forward(x)\n"
    )
    ended = program("verify", "net_params.pkl", "loud:Net", "--input", "1x3x32x32", "--json")
    assert ended.code == 0 and ended.json["ok"] is True
    for words in ("from the module", "from the constructor", "from forward"):
        assert words in ended.err


def test_help_lists_the_commands_in_the_order_of_use(run):
    ended = run("--help")
    assert ended.code == 0 and ended.err == ""
    names = [
        line.split()[0]
        for line in ended.out.split("Commands:")[1].partition("\n\n")[0].strip().splitlines()
        if line.startswith("  ") or line
    ]
    assert names == [*COMMANDS]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_helps_within_eighty_columns(run, monkeypatch, name):
    monkeypatch.setenv("COLUMNS", "80")
    ended = run(name, "-h")
    assert ended.code == 0 and ended.out.startswith(f"Usage: ckptsurgeon {name} ")
    assert max(map(len, ended.out.splitlines())) <= 80
