"""The command line speaks of its options, never of Python's parameters: in its help, and in what the library says of a call."""

from __future__ import annotations

import re

import click
import pytest
import torch

import ckptsurgeon as cs
from ckptsurgeon.cli.endings import as_options
from ckptsurgeon.cli.main import COMMANDS, cli
from ckptsurgeon.errors import RootError
from ckptsurgeon.planning.training_places import find

TWO = """
from torch import nn


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.one = nn.ModuleList(nn.Sequential(nn.Linear(2, 2)) for _ in range(3))
        self.other = nn.ModuleList(nn.Sequential(nn.Linear(2, 2)) for _ in range(3))
"""


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_names_no_parameter_of_python(run, name: str) -> None:
    ended = run(name, "--help")
    assert ended.code == 0 and "--" in ended.out
    command = cli.get_command(click.Context(cli), name)
    assert command is not None
    parameters = {one.name for one in command.params if one.name and "_" in one.name}
    assert not parameters & set(re.findall(r"[a-z_]+", ended.out))
    assert re.findall(r"\b[a-z]+(?:_[a-z]+)*=(?=['\"\[])", ended.out) == []


@pytest.fixture
def training(place):
    """Training checkpoints: with no optimizer that is found by its name, with two, and none at all."""
    space: dict[str, type[torch.nn.Module]] = {}
    exec(TWO, space)
    (place / "two.py").write_text(TWO)
    net = space["Two"]()
    optimizer = torch.optim.SGD(net.parameters(), 0.1).state_dict()
    torch.save({"model": net.state_dict(), "mine": optimizer}, "none.pt")
    torch.save({"model": net.state_dict(), "optimizer": optimizer, "optim": optimizer}, "several.pt")
    torch.save({key: value for key, value in net.state_dict().items() if key != "one.0.0.weight"}, "part.pt")
    return place


def test_an_optimizers_place_is_an_option(run, training) -> None:
    merge = ("merge", "--with-optimizer", "-o", "out.pt", "--root", "model", "two:Two")
    ended = run("merge", "several.pt", *merge[1:])
    assert ended.code == 2 and "try: choose one: --optimizer-root optimizer\n" in ended.err
    assert run("merge", "several.pt", *merge[1:], "--optimizer-root", "optimizer").code == 0
    ended = run("merge", "none.pt", *merge[1:], "--json", "--overwrite")
    assert ended.code == 2 and ended.json["error"]["hint"].endswith("name the optimizer's, as in --optimizer-root mine")
    assert run("merge", "none.pt", *merge[1:], "--optimizer-root", "mine", "--overwrite").code == 0
    assert run("merge", "none.pt", "-o", "a.safetensors", "--root", "model").code == 0
    ended = run("merge", "a.safetensors", "two:Two", "-o", "out.pt", "--with-optimizer", "--overwrite")
    assert ended.code == 2 and "--optimizer optimizer.pt" in ended.err and "optimizer_from" not in ended.err


def test_a_file_of_weights_alone_leads_to_a_second_file(run, training) -> None:
    """No place in it could be named; the file that has the optimizer's state can."""
    assert run("merge", "none.pt", "-o", "bare.pt", "--root", "model").code == 0
    torch.save({"model": torch.load("bare.pt")}, "rooted.pt")
    for source in ("bare.pt", "rooted.pt"):
        ended = run("merge", source, "two:Two", "-o", "out.pt", "--with-optimizer")
        assert ended.code == 2 and ended.err.endswith("try: if another file has it, name it: --optimizer optimizer.pt\n")
        with pytest.raises(RootError) as caught:
            cs.merge(source, "two:Two", "out.pt", with_optimizer=True)
        assert caught.value.hint == "if another file has it, name it: optimizer_from='optimizer.pt'"
    with pytest.raises(RootError, match="holds no optimizer state") as caught:
        find("optimizer", {**{f"part{number}": {} for number in range(14)}, "model": {}}, "model", None, "a.pt")
    assert "part11, …; if another file has" in str(caught.value.hint)


def test_rates_and_layers_are_options(run, training) -> None:
    assert run("merge", "part.pt", "two:Two", "-o", "merged.pt").code == 0
    groups = ("groups", "merged.pt", "two:Two", "--lr", "1", "--fresh-lr", "1")
    ended = run(*groups, "--layers", "one.{i}.**")
    assert ended.code == 2 and "layers are given without --layer-decay" in ended.err and "try: give --layer-decay 0.75\n" in ended.err
    ended = run(*groups, "--layer-decay", "0.75")
    assert ended.code == 2 and "say which, --layers 'one.{i}.**'" in ended.err
    assert "in their order: --layers 'one.{i}.**' --layers 'other.{i}.**'" in ended.err
    assert run(*groups, "--layer-decay", "0.75", "--layers", "one.{i}.**", "--layers", "other.{i}.**").code == 0
    ended = run(*groups, "--fresh-scale", "2")
    assert ended.code == 2 and "--fresh-lr and --fresh-scale are both given" in ended.err and "fresh_" not in ended.err


@pytest.mark.parametrize(
    "words",
    [
        "interpolate(grid=[14, 14], seed=3)",  # an adapter's own arguments
        "model.load_state_dict(x, strict=False)",
        "the file fresh_lr.pt, fresh_lr/a.pt and out_fresh_lr",
        "'fresh_lr' is a key, and a.fresh_lr another",
        "with ckptsurgeon.limits(pickle_bytes='2GiB')",
        "other_word and other_word='x'",
        "grid=[name for name in names]",
        "model:Net(4, grid=3)",
    ],
)
def test_what_is_no_parameter_stays(words: str) -> None:
    options = {"fresh_lr": "--fresh-lr", "grid": "--grid", "strict": "--strict", "seed": "--seed", "pickle_bytes": "--pickle-bytes"}
    assert as_options(words, options) == words
