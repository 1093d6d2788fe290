"""The JSON of every command, held against the schemas that the package ships."""

from __future__ import annotations

import json
from importlib.resources import files as resources
from pathlib import Path
from typing import Any

import pytest
import torch
from jsonschema import Draft202012Validator

NET, VARIANT = "model:Net", "variants:NetVariant"
SCHEMAS = resources("ckptsurgeon") / "views" / "schemas"
NAMES = ["adapters", "check", "diff", "error", "explain", "groups", "guide", "inspect", "match", "merge", "plan", "skeleton", "verify"]


def fits(value: Any, name: str) -> None:
    schema = json.loads((SCHEMAS / f"{name}.json").read_text())
    Draft202012Validator(schema).validate(value)
    undescribed = set(value) - set(schema["properties"])
    assert not undescribed, f"{name}.json says nothing of {undescribed}"


def test_there_is_a_schema_for_everything_and_nothing_else():
    assert sorted(path.name for path in SCHEMAS.iterdir()) == sorted(f"{name}.json" for name in NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_the_schema_is_one_and_asks_for_version_1(name):
    schema = json.loads((SCHEMAS / f"{name}.json").read_text())
    Draft202012Validator.check_schema(schema)
    assert schema["properties"]["version"] == {"const": 1} and "version" in schema["required"]
    assert not Draft202012Validator(schema).is_valid({"version": 1})
    assert "additionalProperties" not in schema  # keys are only ever added


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("diff", "matched missing extra mismatched dtype_changed prefix root coverage"),
        ("inspect", "format root roots tensors globals metadata"),
        ("plan", "sources target seed steps dropped"),
        ("verify", "ok device tensors findings"),
        ("check", "ok files"),
        ("groups", "groups"),
        ("error", "error"),
    ],
)
def test_what_the_design_promises_is_required(name, keys):
    schema = json.loads((SCHEMAS / f"{name}.json").read_text())
    assert {"version", *keys.split()} == set(schema["required"])


def test_inspect(place, run):
    fits(run("inspect", "net_params.pkl", "--json").json, "inspect")
    net = torch.load("net_params.pkl")
    torch.save({"model": net, "best": Path("x"), "model_ema": {key: value + 1 for key, value in net.items()}}, "train.pt")
    found = run("inspect", "train.pt", "--json").json
    fits(found, "inspect")
    assert len(found["roots"]) == 2 and found["globals"] and found["tensors"][0]["shape"] == [6, 3, 5, 5]
    run("merge", "net_params.pkl", VARIANT, "-o", "merged.safetensors")
    merged = run("inspect", "merged.safetensors", "--json").json
    fits(merged, "inspect")
    assert merged["metadata"]["format"] == "pt" and "fc3.weight" in merged["provenance"]["fresh"]


def test_diff(place, run):
    torch.save({f"module.{key}": value.double() for key, value in torch.load("net_params.pkl").items()}, "ddp.pt")
    found = run("diff", "ddp.pt", VARIANT, "--json").json
    fits(found, "diff")
    assert found["prefix"]["stripped"] == "module." or found["prefix"]["unwrapped"] == ["module"]
    assert found["mismatched"][0] == {"key": "fc3.weight", "source_shape": [10, 84], "target_shape": [2, 84]}
    assert found["dtype_changed"][0] == {"key": "conv1.weight", "source_dtype": "F64", "target_dtype": "F32"}
    assert sorted(found["extra"]) == ["module.fc2.bias", "module.fc2.weight"] and found["coverage"]["tensors"] == 0.4


def test_plan_skeleton_and_merge(place, run):
    words = ("net_params.pkl", VARIANT, "--rename", "fc2.{p}", "dense2.{p}", "--init", "fc3.*", "normal(std=0.02)")
    made = run("plan", *words, "-o", "plan.json", "--json").json
    fits(made, "plan")
    fits(json.loads(Path("plan.json").read_text()), "plan")
    fits(run("plan", "net_params.pkl", "--json").json, "plan")
    fits(run("merge", *words, "-o", "a.pt", "--dry-run", "--json").json, "plan")
    fits(run("skeleton", VARIANT, "-o", "net.json", "--json").json, "skeleton")
    fits(json.loads(Path("net.json").read_text()), "skeleton")
    merged = run("merge", *words, "-o", "a.safetensors", "--dtype", "F16", "--json").json
    fits(merged, "merge")
    assert (
        merged["verified"] is True
        and merged["casts"][0]["target_dtype"] == "F16"
        and merged["bytes"] == Path("a.safetensors").stat().st_size
    )
    assert sorted(merged["transferred"] + merged["kept"] + merged["fresh"]) == sorted(step["target"] for step in made["steps"])
    fits(run("apply", "plan.json", "-o", "b.pt", "--json").json, "merge")
    fits(run("merge", "net_params.pkl", "-o", "c.pt", "--json").json, "merge")


def test_verify_check_and_groups(place, run):
    run("merge", "net_params.pkl", VARIANT, "-o", "merged.pt")
    run("skeleton", VARIANT, "-o", "net.json")
    good = run("verify", "merged.pt", VARIANT, "--input", "1x3x32x32", "--json").json
    fits(good, "verify")
    assert good["ok"] and good["tensors"] == 15 and good["outputs"] == [{"name": "output", "shape": [1, 2]}]
    bad = run("verify", "net_params.pkl", VARIANT, "--json")
    fits(bad.json, "verify")
    assert bad.code == 1 and not bad.json["ok"]
    fits(run("verify", "merged.pt", "net.json", "--json").json, "verify")
    fits(run("verify", "merged.pt", VARIANT, "--device", "meta", "--json").json, "verify")
    checked = run("check", "merged.pt", "net_params.pkl", "missing.pt", "--against", "net.json", "--json")
    fits(checked.json, "check")
    assert checked.code == 1 and [row["ok"] for row in checked.json["files"]] == [True, False, False]
    groups = run("groups", "merged.pt", VARIANT, "--lr", "1e-3", "--fresh-lr", "1e-2", "--json").json
    fits(groups, "groups")
    assert groups["groups"][0]["weight_decay"] is None


@pytest.mark.parametrize(
    "words", [("inspect", "missing.pt"), ("diff",), ("diff", "net_params.pkl", "model:Nett"), ("plan", "model.py")], ids=" ".join
)
def test_errors(run, words):
    ended = run(*words, "--json")
    assert ended.code == 2
    fits(ended.json, "error")
    assert ended.json["error"]["hint"]


def test_adapters(run):
    from ckptsurgeon.adapters.table import ADAPTERS
    from ckptsurgeon.models.init.scheme_text import SCHEMES

    value = run("adapters", "--json").json
    fits(value, "adapters")
    assert {(row["kind"], row["name"]) for row in value["known"]} == {
        *(("adapter", name) for name in ADAPTERS),
        *(("scheme", name) for name in SCHEMES),
    }
    shown = run("adapters").out
    assert "  interpolate(prefix, grid, to, mode, antialias, layout)\n" in shown and "given" not in shown.split("pad(")[1].split(")")[0]
