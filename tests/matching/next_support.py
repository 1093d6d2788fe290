"""Following the next command: files with values that are nowhere twice, the command that `diff` prints, run, and by truth what it wrote.

A world is a source, a target, and what each of the target's keys must be made of; a key without truth must stay as the target has it.
"""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ckptsurgeon.cli import main

TORCH = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "int64": torch.int64, "bool": torch.bool}
State = dict[str, Tensor]


@dataclass(frozen=True)
class World:
    """Two sides, and what must come of the target's keys that the source gives."""

    source: State
    target: State
    truth: Mapping[str, Tensor]


@dataclass(frozen=True)
class Outcome:
    """By truth, which of the target's keys got what they must, and which something else than that and their own value; and how it ended."""

    right: frozenset[str]
    wrong: frozenset[str]
    code: int


def values(shapes: Mapping[str, tuple[int, ...]], seed: int, dtypes: Mapping[str, str] | None = None) -> State:
    """Random values, nowhere twice but by a chance that nobody sees."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for key, shape in shapes.items():
        dtype = TORCH[(dtypes or {}).get(key, "float32").removeprefix("torch.")]
        if key.endswith("num_batches_tracked"):  # whole numbers, whatever dtype they stand in
            found[key] = torch.randint(0, 1 << 20, shape, generator=generator).to(dtype)
        elif dtype.is_floating_point:
            found[key] = torch.randn(shape, generator=generator).to(dtype)
        else:
            found[key] = torch.randint(0, 2 if dtype == torch.bool else 1 << 40, shape, generator=generator).to(dtype)
    return found


def of_pair(path: Path) -> World:
    """The world of a published pair: its truth carried out by torch, without ckptsurgeon."""
    told = json.loads(path.read_text())
    sides = [
        values({key: tuple(shape) for key, shape, _ in told[side]}, seed, {key: dtype for key, _, dtype in told[side]})
        for seed, side in enumerate(("source", "target"))
    ]
    truth = {row["target"]: made(row, sides[0], sides[1][row["target"]]) for row in told["truth"]}
    return World(sides[0], sides[1], truth)


def made(row: dict[str, object], source: State, goal: Tensor) -> Tensor:
    """What one row of a pair's truth says, in torch."""
    op, given = str(row["op"]), [source[key] for key in row["sources"]]  # type: ignore[attr-defined]
    numbers = [int(number) for number in re.findall(r"\d+", op)]
    first = given[0]
    if op.startswith("permute_rows"):
        return first.index_select(numbers[0], torch.tensor(row["index"]))
    if op.startswith("chunk"):
        index, of, dim = numbers
        size = first.shape[dim] // of
        return first.narrow(dim, index * size, goal.shape[dim])
    if op.startswith("slice"):
        dim, start, stop = numbers
        return first.narrow(dim, start, stop - start)
    if op.startswith("stack(0) of concat"):
        pairs = [torch.cat(given[at : at + 2], numbers[1]) for at in range(0, len(given), 2)]
        return torch.stack(pairs, numbers[0])
    simple = {"copy": lambda: first, "transpose": lambda: first.mT, "reshape": lambda: first.reshape(goal.shape)}
    simple |= {"concat": lambda: torch.cat(given, numbers[0]), "stack": lambda: torch.stack(given, numbers[0])}
    found: Tensor = simple[op.partition("(")[0]]()
    return found


def save(world: World, folder: Path) -> None:
    """Both sides as files, in safetensors, in an order that is theirs."""
    for name, state in (("a.safetensors", world.source), ("t.safetensors", world.target)):
        save_file({key: tensor.contiguous().clone() for key, tensor in state.items()}, folder / name)


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    """A command line in this process; its exit code."""
    monkeypatch.setattr(sys, "argv", ["ckptsurgeon", *words])
    return main._run(False)


def next_words(text: str) -> list[str]:
    """The words of the command that a text says comes next, as a shell cuts them."""
    (line,) = re.findall(r"^Next: ckptsurgeon (.*(?:\\\n.*)*)", text, re.MULTILINE)
    return shlex.split(line.replace("\\\n", " "))


def outcome(world: World, path: Path, code: int) -> Outcome:
    """What was written by truth; where nothing was, the target is as it was."""
    got = load_file(path) if path.exists() else world.target
    assert set(got) == set(world.target)
    right = {key for key, tensor in world.truth.items() if same(got[key], tensor)}
    stays = {key for key, tensor in world.target.items() if same(got[key], tensor)}
    wrong = set(world.target) - right - stays
    return Outcome(frozenset(right), frozenset(wrong), code)


def same(one: Tensor, other: Tensor) -> bool:
    """Whether they are equal element for element."""
    return one.shape == other.shape and torch.equal(one.to(other.dtype), other)


def followed(world: World, folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> tuple[Outcome, Outcome]:
    """What a plain merge writes, and what the next command writes."""
    monkeypatch.chdir(folder)
    save(world, folder)
    plain = outcome(
        world, folder / "plain.safetensors", run(monkeypatch, "merge", "a.safetensors", "t.safetensors", "-o", "plain.safetensors")
    )
    capfd.readouterr()
    run(monkeypatch, "diff", "a.safetensors", "t.safetensors")
    text = capfd.readouterr().out
    if "\nNext: " not in text:
        assert not plain.right, text
        return plain, plain
    words = next_words(text)
    code = run(monkeypatch, *words)
    written = folder / words[words.index("-o") + 1] if "-o" in words else folder / "a.safetensors"
    assert code == 0, (words, capfd.readouterr())
    return plain, outcome(world, written, code)
