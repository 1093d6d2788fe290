"""The command line is the library's thin twin: what a command prints is what the verb's result gives as text, and as JSON."""

from __future__ import annotations

import shlex
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from test_cli_schemas import fits

import ckptsurgeon as cs
from ckptsurgeon.shown import VIEWS, Result, Shown

NET, VARIANT = "model:Net", "variants:NetVariant"
RULES = '[[rename]]\nfrom = "dense2.{p}"\nto = "fc2.{p}"\n'
RENAME = ("--rename", "fc2.{p}", "dense2.{p}")
# By schema, a command's words and the same call of the library.
TWINS = {
    "inspect": (("inspect", "net_params.pkl"), lambda: cs.inspect("net_params.pkl")),
    "inspect some": (
        ("inspect", "net_params.pkl", "fc*.weight", "conv1.*", "--sort", "size"),
        lambda: cs.inspect("net_params.pkl", ["fc*.weight", "conv1.*"], sort="size"),
    ),
    "inspect a tree": (("inspect", "net_params.pkl", "--tree", "--depth", "2"), lambda: cs.inspect("net_params.pkl", tree=True, depth=2)),
    "diff": (("diff", "net_params.pkl", VARIANT), lambda: cs.diff("net_params.pkl", VARIANT)),
    "diff by rules": (
        ("diff", "net_params.pkl", VARIANT, *RENAME),
        lambda: cs.diff("net_params.pkl", VARIANT, rename={RENAME[1]: RENAME[2]}),
    ),
    "diff by a file": (
        ("diff", "net_params.pkl", VARIANT, "--rules", "rules.toml", "--reverse"),
        lambda: cs.diff("net_params.pkl", VARIANT, rules="rules.toml", reverse=True),
    ),
    "match": (("match", "net_params.pkl", VARIANT), lambda: cs.match("net_params.pkl", VARIANT)),
    "plan": (("plan", "net_params.pkl", VARIANT), lambda: cs.plan("net_params.pkl", VARIANT)),
    "merge": (("merge", "net_params.pkl", VARIANT, "-o", "out.pt"), lambda: cs.merge("net_params.pkl", VARIANT, "out.pt", overwrite=True)),
    "apply": (("apply", "plan.json", "-o", "out.pt"), lambda: cs.apply("plan.json", "out.pt", overwrite=True)),
    "verify": (("verify", "net_params.pkl", NET), lambda: cs.verify("net_params.pkl", NET)),
    "verify a misfit": (("verify", "net_params.pkl", VARIANT), lambda: cs.verify("net_params.pkl", VARIANT)),
    "check": (("check", "net_params.pkl", "missing.pt"), lambda: cs.check(["net_params.pkl", "missing.pt"])),
    "skeleton": (("skeleton", VARIANT, "-o", "net.json"), lambda: cs.skeleton(VARIANT)),
}
SCHEMAS = {"apply": "merge"}


@pytest.mark.parametrize("name", TWINS)
def test_a_command_prints_what_the_result_of_the_verb_gives(name: str, place: Path, run: Any) -> None:
    words, verb = TWINS[name]
    Path("rules.toml").write_text(RULES)
    cs.plan("net_params.pkl", VARIANT)
    run("plan", "net_params.pkl", VARIANT, "-o", "plan.json")
    again = ("--overwrite",) if "-o" in words else ()
    as_json, as_text = run(*words, *again, "--json"), run(*words, *again)
    result = verb()
    assert result.to_json() + "\n" == as_json.out
    assert result.to_dict() == as_json.json
    fits(result.to_dict(), SCHEMAS.get(name, name.split()[0]))
    if name != "skeleton":  # the command says where it wrote it
        assert result.to_text() + "\n" == as_text.out
        assert str(result) == (repr(result) if name.startswith("inspect") else result.to_text())


def test_plain_json_has_every_tensor_of_an_inspected_file(place: Path) -> None:
    import json

    rows = cs.inspect("net_params.pkl").to_dict()["tensors"]
    assert len(json.loads(json.dumps(rows))) == len(cs.open("net_params.pkl")) and type(rows) is list


def results(found: type) -> set[type]:
    return {found, *(each for child in found.__subclasses__() for each in results(child))}


def test_the_table_of_views_has_a_row_for_each_result_and_each_row_its_functions() -> None:
    for _, of_json in VIEWS.values():
        import_module(of_json.rpartition(".")[0])
    import ckptsurgeon.matching.proposals.propose  # noqa: F401

    assert {found.__name__ for found in results(Result) - {Result}} == set(VIEWS)
    for views in VIEWS.values():
        for path in filter(None, views):
            module, _, function = path.rpartition(".")
            assert callable(getattr(import_module(module), function))
    assert not any("to_dict" in vars(found) for found in results(Shown) - {Result})


def next_command(out: str) -> list[str]:
    (line,) = (line for line in out.splitlines() if line.startswith("Next: ckptsurgeon merge"))
    return shlex.split(line)[2:]


def test_what_comes_next_has_the_options_that_the_diff_was_made_with(place: Path, run: Any) -> None:
    Path("rules.toml").write_text(RULES)
    found = run("diff", "net_params.pkl", VARIANT, "--rules", "rules.toml", "--reverse")
    assert next_command(found.out)[-3:] == ["--rules", "rules.toml", "--reverse"]
    assert run(*next_command(found.out), "--json").json["adapted"] == []
    torch.save({"w": torch.zeros(2, 1)}, "a.pt")
    torch.save({"w": torch.zeros(2)}, "b.pt")
    found = run("diff", "a.pt", "b.pt", "--auto", "safe")
    assert next_command(found.out)[-2:] == ["--auto", "safe"]
    assert run(*next_command(found.out), "--overwrite", "--json").json["adapted"] == ["w"]
