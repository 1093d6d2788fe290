"""What `inspect` and `diff` are asked to show: patterns, orders, trees, tables; each with its JSON and its refusals."""

from __future__ import annotations

import csv
import io

import pytest
import torch

import ckptsurgeon as cs

VARIANT = "variants:NetVariant"


def test_patterns_choose_tensors_in_text_and_in_json(place, run):
    ended = run("inspect", "net_params.pkl", "fc*.bias", "conv1.*")
    assert ended.code == 0 and "6" not in ended.out.splitlines()[1][:6] and "5 of 10 tensors" in ended.out
    assert "fc{1..3}.bias" not in ended.out and "fc1.bias" in ended.out and "fc1.weight" not in ended.out
    found = run("inspect", "net_params.pkl", "fc*.bias", "--json").json
    assert [row["name"] for row in found["tensors"]] == ["fc1.bias", "fc2.bias", "fc3.bias"] and found["roots"][0]["tensors"] == 10


def test_a_pattern_that_matches_nothing_is_said(place, run):
    ended = run("inspect", "net_params.pkl", "fc4.*")
    assert ended.code == 2 and "'fc4.*' matches no key" in ended.err
    ended = run("inspect", "net_params.pkl", "fc4.*", "fc3.*", "dense.*")
    assert ended.code == 2 and "2 patterns match no key" in ended.err and "'dense.*' matches no key" in ended.err and not ended.out


def test_patterns_are_looked_for_in_every_root(place, run):
    net = torch.load("net_params.pkl", weights_only=True)
    torch.save({"model": net, "ema": {**net, "steps.n": torch.zeros(1)}}, "train.pt")
    ended = run("inspect", "train.pt", "steps.*")
    assert "root ema: 1 of 11 tensors" in ended.out and "root model" not in ended.out
    assert run("inspect", "train.pt", "steps.*", "--json").json["root"] == "ema"
    assert run("inspect", "train.pt", "steps.*", "--root", "model").code == 2
    assert cs.inspect("train.pt", ["fc3.*"], root="ema").to_text().count("fc3") == 1


def test_orders(place, run):
    names = [row["name"] for row in run("inspect", "net_params.pkl", "--sort", "size", "--json").json["tensors"]]
    tensors = cs.open("net_params.pkl")
    assert [tensors[name].nbytes for name in names] == sorted((one.nbytes for one in tensors.values()), reverse=True)
    text = run("inspect", "net_params.pkl", "--sort", "size").out.splitlines()
    assert text[2].split()[0] == "fc1.weight" and text[2].endswith("192.0 kB")
    names = [row["name"] for row in run("inspect", "net_params.pkl", "--sort", "name", "--json").json["tensors"]]
    assert names == sorted(tensors)


def test_a_tree_has_shares_that_add_up(place, run):
    torch.save({f"m.layers.{i}.{part}.{leaf}": torch.zeros(4, 4) for i in range(3) for part in "qk" for leaf in "wb"}, "deep.pt")
    ended = run("inspect", "deep.pt", "--tree")
    lines = [line.split() for line in ended.out.splitlines()[2:]]
    assert lines == [
        ["module", "tensors", "elements", "size", "share"],
        ["m.layers.{0..2}", "12", "192", "768", "B", "100.0", "%"],
        ["k", "6", "96", "384", "B", "50.0", "%"],
        ["q", "6", "96", "384", "B", "50.0", "%"],
    ] or [line[0] for line in lines[2:]] == ["q", "k"]
    assert len(run("inspect", "deep.pt", "--tree", "--depth", "1").out.splitlines()) == 4
    rows = run("inspect", "deep.pt", "--tree", "--json").json["modules"]
    assert rows[0] == {"path": "m.layers.{0..2}", "level": 0, "tensors": 12, "elements": 192, "bytes": 768}
    assert rows[1]["path"] == "m.layers.{0..2}.q" and run("inspect", "deep.pt", "--json").json["modules"] is None
    assert len(run("inspect", "deep.pt", f"{rows[1]['path']}.**", "--json").json["tensors"]) == 6  # its rows are patterns


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("inspect", "net_params.pkl", "--depth", "2"), "--depth: is how deep a tree goes"),
        (("inspect", "net_params.pkl", "--json", "--table", "csv"), "--json and --table are two forms of output"),
        (("diff", "net_params.pkl", VARIANT, "--only", "mising"), "there is no category 'mising'"),
        (("diff", "net_params.pkl", VARIANT, "--only", "missing", "--json"), "--json has every list, so that --only would do nothing"),
        (("diff", "net_params.pkl", VARIANT, "--name-status", "--json"), "--json has every list"),
        (("diff", "net_params.pkl", VARIANT, "--stat", "--only", "extra"), "--only and --stat are two forms of output"),
        (("diff", "net_params.pkl", VARIANT, "--table", "csv", "--name-status"), "--table and --name-status are two forms of output"),
    ],
)
def test_what_would_do_nothing_is_refused(words, says, place, run):
    ended = run(*words)
    told = ended.out if "--json" in words and ended.out else ended.err
    assert ended.code == 2 and says in told


COMMANDS = {
    "inspect": (("inspect", "net_params.pkl"), "key"),
    "inspect --tree": (("inspect", "net_params.pkl", "--tree"), "module"),
    "diff": (("diff", "net_params.pkl", VARIANT), "status"),
    "diff --stat": (("diff", "net_params.pkl", VARIANT, "--stat"), "module"),
    "match": (("match", "net_params.pkl", VARIANT), "status"),
    "plan": (("plan", "net_params.pkl", VARIANT), "action"),
    "merge": (("merge", "net_params.pkl", VARIANT, "-o", "out.pt", "--overwrite"), "status"),
    "check": (("check", "net_params.pkl", "missing.pt"), "path"),
    "verify": (("verify", "net_params.pkl", VARIANT), "code"),
    "groups": (("groups", "merged.pt", VARIANT, "--lr", "1e-3", "--fresh-lr", "1e-2"), "group"),
    "adapters": (("adapters",), "kind"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_table_is_all_that_stdout_has(name, place, run):
    words, first = COMMANDS[name]
    if "merged.pt" in words:
        assert run("merge", "net_params.pkl", VARIANT, "-o", "merged.pt").code == 0
    ended = run(*words, "--table", "csv")
    rows = list(csv.reader(io.StringIO(ended.out)))
    assert rows[0][0] == first and len(rows) > 1 and {len(row) for row in rows} == {len(rows[0])}
    assert run(*words, "--table", "github").out.startswith(f"| {first}")
    assert run(*words, "--table", "html").out.startswith("<table>")
    assert ended.code == run(*words).code


def test_a_table_of_tensors_adds_up_and_has_each_with_v(place, run):
    rows = list(csv.DictReader(io.StringIO(run("inspect", "net_params.pkl", "--table", "csv", "-v").out)))
    tensors = cs.open("net_params.pkl")
    assert {row["key"]: int(row["bytes"]) for row in rows} == {key: one.nbytes for key, one in tensors.items()}


def test_a_table_of_groups_has_each_parameter_once_with_its_rate(place, run):
    assert run("merge", "net_params.pkl", VARIANT, "-o", "merged.pt").code == 0
    words = ("groups", "merged.pt", VARIANT, "--lr", "1e-3", "--fresh-lr", "1e-2", "--weight-decay", "0.1", "--no-decay")
    rows = list(csv.DictReader(io.StringIO(run(*words, "--table", "csv", "-v").out)))
    table = [(row["group"], float(row["lr"]), float(row["weight decay"]), row["key"]) for row in rows]
    groups = run(*words, "--json").json["groups"]
    assert table == [(group["name"], group["lr"], group["weight_decay"], key) for group in groups for key in group["params"]]
    assert "conv{1..2}.weight" in run(*words, "--table", "csv").out


def test_a_table_of_adapters_has_each_with_its_arguments(run):
    rows = list(csv.DictReader(io.StringIO(run("adapters", "--table", "csv").out)))
    known = run("adapters", "--json").json["known"]
    assert [(row["kind"], row["name"], row["arguments"], row["words"]) for row in rows] == [
        (row["kind"], row["name"], ", ".join(row["arguments"]), row["words"]) for row in known
    ]


FORMULAS = ["=1+1", "+1", "-1", "@SUM(1)", "\uff1d1", '=HYPERLINK("https://e.org")']


def test_a_key_that_a_spreadsheet_would_compute_is_text_in_csv(place, run):
    torch.save({key: torch.zeros(2) for key in [*FORMULAS, "a;=1+1", "fc.weight"]}, "formulas.pt")
    out = run("inspect", "formulas.pt", "--table", "csv", "-v").out
    assert [row["key"] for row in csv.DictReader(io.StringIO(out))] == [*(f"'{key}" for key in FORMULAS), "a;=1+1", "fc.weight"]
    assert '"a;=1+1","F32"' in out  # quoted, so that a reader with another separator does not cut it
    assert "| =1+1 " in run("inspect", "formulas.pt", "--table", "github", "-v").out


def test_name_status_help_names_every_letter(run):
    from ckptsurgeon.views.counted import LETTERS

    text = " ".join(run("diff", "--help").out.split())
    words = text[text.index("--name-status") :].split("--exit-code")[0]
    assert all(f" {letter} " in words for letter in LETTERS.values())
