"""`groups`: the table and the JSON, by depth, without weight decay, partly transferred tensors, and what is refused."""

from __future__ import annotations

import json

import jsonschema
import pytest
import torch
from cli_support import ROOT

VARIANT = "variants:NetVariant"
SCHEMA = json.loads((ROOT / "ckptsurgeon/views/schemas/groups.json").read_text())
STACK = """
from torch import nn


class Stack(nn.Module):
    def __init__(self, words=5, classes=2):
        super().__init__()
        self.embed = nn.Embedding(words, 4)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)) for _ in range(3))
        self.norm, self.head = nn.LayerNorm(4), nn.Linear(4, classes)
"""


@pytest.fixture
def merged(place, run):
    """A stack whose vocabulary grew, and whose head is new; another process wrote the record."""
    (place / "stack.py").write_text(STACK)
    space = {}
    exec(STACK, space)
    torch.save(space["Stack"]().state_dict(), "stack.pt")
    grow = ("--adapt", "embed.weight", "rows(index=[0, 1, 2, 3, 4, -1, -1], fill='init')")
    ended = run("merge", "stack.pt", "stack:Stack(words=7,classes=3)", *grow, "-o", "merged.pt")
    assert ended.code == 0, ended.err
    return ("groups", "merged.pt", "stack:Stack(words=7,classes=3)", "--lr", "1", "--fresh-lr", "3")


def rows(ended):
    assert ended.code == 0, ended.err
    jsonschema.validate(ended.json, SCHEMA)
    return ended.json["groups"]


def test_layer_decay(run, merged):
    found = rows(run(*merged, "--layer-decay", "0.5", "--json"))
    assert [(row["name"], row["lr"], row["elements"]) for row in found] == [
        ("transferred/stem", 0.0625, 28),
        ("transferred/layer 0", 0.125, 28),
        ("transferred/layer 1", 0.25, 28),
        ("transferred/layer 2", 0.5, 28),
        ("transferred/head", 1.0, 8),
        ("fresh", 3.0, 15),
    ]
    table = run(*merged, "--layer-decay", "0.5").out.splitlines()
    assert table[0].split()[:2] == ["group", "lr"] and table[3].startswith("transferred/layer 0  0.125") and len(table) == 8
    stacked = rows(run(*merged, "--layer-decay", "0.5", "--layers", "blocks.0.**", "--layers", "blocks.1.**", "--json"))
    assert [row["lr"] for row in stacked] == [0.125, 0.25, 0.5, 1.0, 3.0]


def test_no_decay(run, merged):
    found = {row["name"]: row for row in rows(run(*merged, "--weight-decay", "0.1", "--no-decay", "--json"))}
    assert found["transferred"]["params"] == [f"blocks.{i}.0.weight" for i in range(3)] and found["transferred"]["weight_decay"] == 0.1
    assert found["fresh/no decay"]["params"] == ["head.bias"] and found["fresh/no decay"]["weight_decay"] == 0
    only = {row["name"]: row for row in rows(run(*merged, "--weight-decay", "0.1", "--no-decay-for", "embed.*", "--json"))}
    assert only["transferred/no decay"]["params"] == ["embed.weight"] and "fresh/no decay" not in only
    assert "transferred/no decay  1     0 " in run(*merged, "--weight-decay", "0.1", "--no-decay").out


def test_partial(run, merged):
    assert {row["name"]: len(row["params"]) for row in rows(run(*merged, "--json"))} == {"transferred": 15, "fresh": 2}
    found = {row["name"]: row["params"] for row in rows(run(*merged, "--partial", "fresh", "--json"))}
    assert found["fresh"] == ["embed.weight", "head.weight", "head.bias"]


def test_everything_at_once_places_each_parameter_once(run, merged):
    found = rows(run(*merged, "--layer-decay", "0.5", "--no-decay", "--override", "norm.*", "9", "--partial", "fresh", "--json"))
    names = [name for row in found for name in row["params"]]
    assert len(names) == len(set(names)) == 17 and ("norm.*/no decay", 9.0) in [(row["name"], row["lr"]) for row in found]


def test_a_network_without_blocks_is_told_by_order(run, place):
    run("merge", "net_params.pkl", VARIANT, "--rename", "fc2.{p}", "dense2.{p}", "-o", "merged.pt")
    words = ("groups", "merged.pt", VARIANT, "--lr", "1", "--fresh-lr", "3", "--layer-decay", "0.5")
    ended = run(*words)
    assert ended.code == 2 and "no repeated blocks" in ended.err
    assert "--layers 'conv1.**' --layers 'norm1.**' --layers 'conv2.**'" in ended.err
    layers = [word for name in ("conv1.*", "conv2.*", "fc1.*", "dense2.*") for word in ("--layers", name)]
    assert [row["lr"] for row in rows(run(*words, *layers, "--json"))] == [0.0625, 0.125, 0.25, 0.5, 3.0]


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("--layer-decay", "2"), "--layer-decay can't be 2.0"),
        (("--layers", "blocks.{i}.**"), "layers are given without --layer-decay"),
        (("--layer-decay", "0.5", "--layers", "block.{i}.**"), "match no parameter"),
        (("--no-decay-for", "nothing.*"), "matches no parameter"),
        (("--partial", "half"), "half"),
    ],
)
def test_choices_that_can_not_be(run, merged, words, reason):
    ended = run(*merged, *words)
    assert ended.code == 2 and reason in ended.err and ended.out == ""


def test_a_file_of_other_shapes_is_not_the_models(run, merged):
    ended = run("groups", "merged.pt", "stack:Stack(words=7,classes=5)", *merged[3:])
    assert ended.code == 2 and "head.weight: has the shape (5, 4), and (3, 4) in merged.pt" in ended.err and ended.out == ""


def test_nothing_fresh_is_a_no_unless_depth_is_asked_for(run, place):
    (place / "stack.py").write_text(STACK)
    space = {}
    exec(STACK, space)
    torch.save(space["Stack"]().state_dict(), "stack.pt")
    run("merge", "stack.pt", "stack:Stack", "-o", "merged.pt")
    words = ("groups", "merged.pt", "stack:Stack", "--lr", "1")
    assert run(*words).code == 1 and run(*words, "--no-decay").code == 1
    assert [row["lr"] for row in rows(run(*words, "--layer-decay", "0.5", "--json"))] == [0.0625, 0.125, 0.25, 0.5, 1.0]
