"""Pairs of implementations with verified mappings: how they are read, and how a matching is scored against them.

A pair is a JSON file with `source` and `target` ([[key, shape, dtype], …] in state_dict order), `truth` ([{"target", "sources", "op"}, …])
and `unmapped_target`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from ckptsurgeon.adapters.chain import RuleOp, fill_chain
from ckptsurgeon.adapters.table import parse_ops, run
from ckptsurgeon.dtypes import BY_TORCH
from ckptsurgeon.matching.matcher import match
from ckptsurgeon.matching.result import Matching
from ckptsurgeon.planning.links import Link
from ckptsurgeon.tensors import TensorMeta, contiguous_stride

PAIRS = Path(__file__).parent / "pairs"


@dataclass(frozen=True)
class Truth:
    """What a target key is made of."""

    sources: tuple[str, ...]
    op: str
    twins: bool = False  # another source is just as good: uncertain is as right as can be


@dataclass(frozen=True)
class Pair:
    """Two sides, and the verified truth by target key."""

    name: str
    source: dict[str, TensorMeta]
    target: dict[str, TensorMeta]
    truth: dict[str, Truth]


@dataclass(frozen=True)
class Score:
    """How many target tensors are right and certain, wrong and certain, uncertain (right or wrong), and not found.

    `doubted` are in doubt for a layout that shapes can't show, with the right sources among the choices: as right as can be told.
    """

    right: int
    wrong: int
    uncertain: int
    missed: int
    uncertain_right: int = 0
    doubted: int = 0

    @property
    def complete(self) -> bool:
        """Whether every tensor is right, and sure."""
        return not (self.wrong or self.uncertain or self.missed)


@cache
def read_pair(path: Path) -> Pair:
    """The pair of a file, read once: nobody may change it."""
    value = json.loads(path.read_text())
    twins = value.get("twins", False)  # of a whole pair, or of one target
    truth = {row["target"]: Truth(tuple(row["sources"]), row["op"], row.get("twins", twins)) for row in value["truth"]}
    return Pair(path.stem, side(value["source"]), side(value["target"]), truth)


def sorted_keys(pair: Pair) -> Pair:
    """The same pair with both sides' keys in the alphabet's order, as safetensors files have them."""
    return replace(pair, source=dict(sorted(pair.source.items())), target=dict(sorted(pair.target.items())))


@cache
def matched(path: Path, in_order: bool = True) -> Matching:
    """What matching finds for the pair of a file, made once: with the library's order of keys, or the alphabet's."""
    pair = read_pair(path) if in_order else sorted_keys(read_pair(path))
    return match(pair.source, pair.target)


def side(rows: Iterable[tuple[str, list[int], str]]) -> dict[str, TensorMeta]:
    """The tensors of one side, without data."""
    return {key: meta(key, tuple(shape), dtype) for key, shape, dtype in rows}


def meta(key: str, shape: tuple[int, ...], dtype: str = "float32") -> TensorMeta:
    """A tensor without data; the dtype is torch's name of it."""
    return TensorMeta(key, BY_TORCH[dtype.removeprefix("torch.")].code, shape, contiguous_stride(shape))


def score(found: Matching, pair: Pair) -> Score:
    """Hold a matching against the truth; a certain link of a target that has no counterpart is wrong."""
    counts: dict[str, Any] = dict.fromkeys(("right", "wrong", "uncertain", "missed", "uncertain_right", "doubted"), 0)
    for key, told in pair.truth.items():
        link = found.by_target.get(key)
        if link is None:
            counts["missed"] += 1
            continue
        if link.doubt and told.sources in (link.sources, *(choice.sources for choice in link.choices)):
            counts["doubted"] += 1
            continue
        good = link.sources == told.sources and _same_op(link, told.op, key, pair)
        if told.twins and good and not link.certain:
            counts["right"] += 1
            continue
        counts[("right" if good else "wrong") if link.certain else "uncertain"] += 1
        counts["uncertain_right"] += good and not link.certain
    counts["wrong"] += sum(link.certain for key, link in found.by_target.items() if key not in pair.truth)
    return Score(**counts)


_MANY = 1 << 17  # elements from which on values are not made to compare an op by
_STEP = re.compile(r"([a-z_]+)(?:\(([^()]*)\))? ?")
_STEPS: dict[str, Callable[[torch.Tensor, list[list[int]]], torch.Tensor]] = {
    "transpose": lambda value, numbers: value.transpose(*(numbers[0] if numbers else (0, 1))),
    "slice": lambda value, numbers: value.narrow(numbers[0][0], numbers[0][1], numbers[0][2] - numbers[0][1]),
    "reshape": lambda value, numbers: value.reshape(numbers[-1]),
    "permute_dims": lambda value, numbers: value.permute(numbers[0]),
    "chunk": lambda value, numbers: value.chunk(numbers[0][1], numbers[0][2])[numbers[0][0]],
}


def of_steps(told: str, value: torch.Tensor) -> torch.Tensor | None:
    """What the steps of a truth make of a tensor; None where they are one step, or not all can be read."""
    steps = _STEP.findall(told)
    if len(steps) < 2 or "".join(found[0] for found in _STEP.finditer(told)) != told or not {name for name, _ in steps} <= _STEPS.keys():
        return None
    for name, text in steps:
        value = _STEPS[name](value, [list(map(int, re.findall(r"\d+", part))) for part in text.split("->") if part])
    return value


def made(link: Link, op: str, at: int, given: Sequence[torch.Tensor], goal: Mapping[str, tuple[int, ...]]) -> torch.Tensor:
    """What an op makes of a link's sources for one of its targets, as a plan has it done; `goal` has the targets' shapes."""
    asked = [RuleOp(one, at, link.targets) for one in (parse_ops(op) if op else ())]
    chain, _ = fill_chain(asked, [tuple(one.shape) for one in given], goal[link.targets[at]], goal)
    parts = list(given)
    for step in chain:
        parts = list(run(step, parts, lambda: torch.empty(0), {}))
    return parts[0]


def _same_op(link: Link, told: str, key: str, pair: Pair) -> bool:
    """Whether a link's op is what the truth says; rows in another order are no copy."""
    if len(link.sources) == 1 and pair.source[link.sources[0]].numel < _MANY:
        value = torch.arange(pair.source[link.sources[0]].numel).reshape(pair.source[link.sources[0]].shape)
        wanted_value = of_steps(told, value)
        if wanted_value is not None:
            goal = {name: pair.target[name].shape for name in link.targets}
            return torch.equal(made(link, link.op, link.targets.index(key), [value], goal), wanted_value)
    ops = re.findall(r"[a-z_]+(?=[( ]|$)", link.op)
    part = re.match(r"chunk\((\d+)/(\d+),", told)
    some = re.search(r"of=(\d+), parts=\[([\d, ]+)\]", link.op)
    if part and some:
        return (some[1], some[2].split(", ")[link.targets.index(key)]) == (part[2], part[1])
    if part and "unstack" in ops:
        return link.targets.index(key) == int(part[1])
    if part:
        rows = [pair.target[target].shape[0] for target in link.targets]
        return "chunk" in ops and sum(rows[: link.targets.index(key)]) * int(part[2]) == sum(rows) * int(part[1])
    if (turned := re.match(r"transpose\(([\d,]+)\)", told)) and "permute" in ops:
        order = list(map(int, turned[1].split(",")))
        if len(order) == 2:  # two dims that change places
            order = [dict(zip(order, order[::-1], strict=True)).get(dim, dim) for dim in range(len(pair.target[key].shape))]
        return f"permute({order})" in link.op
    if told.startswith("reshape") and max(pair.target[key].shape, default=1) == pair.target[key].numel:
        return not {*ops} - {"reshape", "transpose", "permute"}  # a row is a column turned, or with other dims
    name = told.partition("(")[0].split(" ")[0]
    if name == "permute_rows" and not ops:
        return False
    wanted = {"copy": [], "reshape": ["reshape"], "transpose": ["transpose"], "concat": ["concat"], "stack": ["stack"]}.get(name)
    return wanted is None or (set(wanted) <= set(ops) and (bool(wanted) or not ops))
