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
from pairs_support import of_steps
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
    chained = of_steps(op, first) if len(given) == 1 else None
    if chained is not None:
        return chained
    if op.startswith("permute_rows"):
        if "index" not in row:  # an order that nobody wrote down: whatever a copy is, it is wrong
            return first.roll(1, numbers[0])
        return first.index_select(numbers[0], torch.tensor(row["index"]))
    if op.startswith("transpose of "):
        return made({**row, "op": op.removeprefix("transpose of ")}, source, goal.mT).mT
    if op.startswith("permute"):
        return first.permute(numbers[: first.ndim]).reshape(goal.shape)
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


def save(world: World, folder: Path, suffix: str = "safetensors") -> None:
    """Both sides as files: in safetensors' order of keys, which is the alphabet's, or in torch's, which is the model's."""
    for name, state in (("a", world.source), ("t", world.target)):
        if suffix == "safetensors":
            save_file({key: tensor.contiguous().clone() for key, tensor in state.items()}, folder / f"{name}.safetensors")
        else:
            torch.save(state, folder / f"{name}.{suffix}")


def next_words(text: str) -> list[str]:
    """The words of the command that a text says comes next, as a shell cuts them."""
    (line,) = re.findall(r"^Next: ckptsurgeon (.*(?:\\\n.*)*)", text, re.MULTILINE)
    return shlex.split(line.replace("\\\n", " "))


def outcome(world: World, path: Path, code: int) -> Outcome:
    """What was written by truth; where nothing was, the target is as it was."""
    got = world.target if not path.exists() else load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)
    assert set(got) == set(world.target)
    right = {key for key, tensor in world.truth.items() if same(got[key], tensor)}
    stays = {key for key, tensor in world.target.items() if same(got[key], tensor)}
    wrong = set(world.target) - right - stays
    return Outcome(frozenset(right), frozenset(wrong), code)


def same(one: Tensor, other: Tensor) -> bool:
    """Whether they are equal element for element."""
    return one.shape == other.shape and torch.equal(one.to(other.dtype), other)


@dataclass(frozen=True)
class Follower:
    """Runs commands in this process, in a folder of their own."""

    folder: Path
    monkeypatch: pytest.MonkeyPatch
    capfd: pytest.CaptureFixture[str]

    def run(self, *words: str) -> tuple[int, str]:
        """A command line's exit code and all that it says."""
        self.monkeypatch.chdir(self.folder)
        self.monkeypatch.setattr(sys, "argv", ["ckptsurgeon", *words])
        self.capfd.readouterr()
        code = main._run(False)
        return code, "".join(self.capfd.readouterr())

    def follow(self, world: World, suffix: str = "safetensors", verb: str = "diff") -> tuple[Outcome, Outcome, list[str]]:
        """What a plain merge writes, what the next command writes, and its words (none where no command comes next)."""
        save(world, self.folder, suffix)
        files = (f"a.{suffix}", f"t.{suffix}")
        code, _ = self.run("merge", *files, "-o", "plain.safetensors")
        plain = outcome(world, self.folder / "plain.safetensors", code)
        _, text = self.run(verb, *files)
        if "\nNext: ckptsurgeon merge" not in text:
            return plain, outcome(world, self.folder / "nothing", 1), []
        words = next_words(text)
        code, said = self.run(*words)
        assert code == 0, (words, said)
        return plain, outcome(world, self.folder / words[words.index("-o") + 1], code), words


@pytest.fixture
def follower(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Follower:
    """One for a test."""
    return Follower(tmp_path, monkeypatch, capfd)
