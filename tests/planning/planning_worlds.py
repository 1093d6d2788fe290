"""Sources, targets and the rules between them, made together, with NumPy arrays to follow a plan by: an oracle that knows no rule."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from hypothesis import strategies as st

from ckptsurgeon.planning.plan_types import Plan
from ckptsurgeon.rules.rules import Rule

STAGE = Rule("stage")
KINDS = ("same", "rename", "shift", "split", "join", "stack", "unstack", "layers", "turn", "by_key", "two_stages", "squeeze", "exact")
ONE_WAY = ("pairs", "grow", "drop", "fresh", "anonymous")


@dataclass
class World:
    """The arrays of a source and what must come of each in the target; `rules` of two stages lead from one to the other."""

    source: dict[str, np.ndarray] = field(default_factory=dict)
    target: dict[str, np.ndarray | None] = field(default_factory=dict)
    stages: tuple[list[Rule], list[Rule]] = field(default_factory=lambda: ([], []))
    dropped: set[str] = field(default_factory=set)

    @property
    def rules(self) -> list[Rule]:
        first, second = self.stages
        return [*first, STAGE, *second] if second else first

    def fresh_array(self, *shape: int) -> np.ndarray:
        start = 1 + sum(array.size for array in self.source.values())
        return np.arange(start, start + int(np.prod(shape)), dtype=np.float64).reshape(shape)


def _same(world: World, j: int, draw: st.DrawFn) -> None:
    world.source[f"p{j}.w"] = world.target[f"p{j}.w"] = world.fresh_array(2, 3)


def _rename(world: World, j: int, draw: st.DrawFn) -> None:
    for part in ("w", "b"):
        world.source[f"s{j}.{part}"] = world.target[f"t{j}.x.{part}"] = world.fresh_array(3)
    world.stages[0].append(Rule("rename", f"s{j}.{{p}}", f"t{j}.x.{{p}}"))


def _exact(world: World, j: int, draw: st.DrawFn) -> None:
    """One name within what a wider rule, which stands before it, gives."""
    _rename(world, j, draw)
    world.source[f"x{j}"] = world.target[f"t{j}.x.scale"] = world.fresh_array(1)
    world.stages[0].append(Rule("rename", f"x{j}", f"t{j}.x.scale"))


def _two_stages(world: World, j: int, draw: st.DrawFn) -> None:
    world.source[f"s{j}.a"] = world.target[f"t{j}.c"] = world.fresh_array(3)
    world.stages[0].append(Rule("rename", f"s{j}.{{p}}", f"m{j}.{{p}}"))
    world.stages[1].append(Rule("rename", f"m{j}.a", f"t{j}.c"))


def _shift(world: World, j: int, draw: st.DrawFn) -> None:
    by = draw(st.integers(0, 3))
    for i in range(draw(st.integers(1, 3))):
        for part in ("w", "b.c"):
            world.source[f"s{j}.{i}.{part}"] = world.target[f"t{j}.{i + by}.{part}"] = world.fresh_array(2)
    world.stages[0].append(Rule("rename", f"s{j}.{{i}}.{{**p}}", f"t{j}.{{i+{by}}}.{{**p}}"))


def _qkv(world: World, j: int, draw: st.DrawFn) -> tuple[list[np.ndarray], list[str], list[np.ndarray], str]:
    sizes = draw(st.sampled_from([(2, 2, 2), (4, 1, 1), (1, 3)]))
    wholes, ends = [world.fresh_array(2, sum(sizes))], []
    cuts = list(np.cumsum(sizes))[:-1]
    dim = draw(st.sampled_from([0, 1]))
    wholes = [wholes[0].T.copy() if dim == 0 else wholes[0]]
    ends = [part.copy() for part in np.split(wholes[0], cuts, axis=dim)]
    return wholes, [f"n{k}" for k in range(len(sizes))], ends, f"(dim={dim})"


def _split(world: World, j: int, draw: st.DrawFn) -> None:
    (whole,), names, ends, dim = _qkv(world, j, draw)
    world.source[f"s{j}.3.qkv.w"] = whole
    for name, end in zip(names, ends, strict=True):
        world.target[f"t{j}.3.{name}.w"] = end
    results = " + ".join(f"t{j}.{{i}}.{name}.{{p}}" for name in names)
    world.stages[0].append(Rule("adapt", f"s{j}.{{i}}.qkv.{{p}} -> {results}", f"chunk{dim}"))


def _join(world: World, j: int, draw: st.DrawFn) -> None:
    (whole,), names, ends, dim = _qkv(world, j, draw)
    world.target[f"t{j}.qkv"] = whole
    for name, end in reversed(list(zip(names, ends, strict=True))):  # in no order of the rule's
        world.source[f"s{j}.{name}"] = end
    world.stages[0].append(Rule("adapt", " + ".join(f"s{j}.{name}" for name in names) + f" -> t{j}.qkv", f"concat{dim}"))


def _stack(world: World, j: int, draw: st.DrawFn) -> None:
    count, dim = draw(st.integers(1, 12)), draw(st.sampled_from([0, 1, -1]))
    parts = [world.fresh_array(2, 3) + 100 * e for e in range(count)]
    for e in draw(st.permutations(range(count))):
        world.source[f"s{j}.e.{e}.w"] = parts[e]
    world.target[f"t{j}.e.w"] = np.stack(parts, dim)
    world.stages[0].append(Rule("adapt", f"s{j}.e.{{e}}.{{p}} -> t{j}.e.{{p}}", f"stack(dim={dim})"))


def _unstack(world: World, j: int, draw: st.DrawFn) -> None:
    count, dim = draw(st.integers(1, 12)), draw(st.sampled_from([0, -1]))
    whole = np.moveaxis(world.fresh_array(count, 2), 0, dim)
    world.source[f"s{j}.e.w"] = whole
    for e in range(count):
        world.target[f"t{j}.e.{e}.w"] = np.take(whole, e, dim)
    world.stages[0].append(Rule("adapt", f"s{j}.e.{{p}} -> t{j}.e.{{e}}.{{p}}", f"unstack(dim={dim})"))


def _layers(world: World, j: int, draw: st.DrawFn) -> None:
    """Parts joined in each layer, and the layers stacked."""
    layers = [[world.fresh_array(1, 2) + 50 * i, world.fresh_array(1, 2) + 50 * i + 7] for i in range(3)]
    for i, (gate, up) in enumerate(layers):
        world.source[f"s{j}.{i}.gate"], world.source[f"s{j}.{i}.up"] = gate, up
    world.target[f"t{j}.all"] = np.stack([np.concatenate(pair) for pair in layers])
    world.stages[0].append(Rule("adapt", f"s{j}.{{i}}.gate + s{j}.{{i}}.up -> t{j}.all", "concat(of=2) | stack"))


def _turn(world: World, j: int, draw: st.DrawFn) -> None:
    world.source[f"s{j}.w"] = world.fresh_array(2, 3)
    world.target[f"t{j}.w"] = world.source[f"s{j}.w"].T
    world.stages[0].append(Rule("adapt", f"s{j}.{{p}} -> t{j}.{{p}}", "transpose"))


def _by_key(world: World, j: int, draw: st.DrawFn) -> None:
    """An adapter of a target's key by its name, which a rename has given."""
    world.source[f"s{j}.w"] = world.fresh_array(2, 3)
    world.target[f"t{j}.w"] = world.source[f"s{j}.w"].T
    world.stages[0].append(Rule("rename", f"s{j}.{{p}}", f"t{j}.{{p}}"))
    world.stages[draw(st.sampled_from([0, 1]))].append(Rule("adapt", f"t{j}.{{p}}", "permute(dims=[1, 0])"))


def _squeeze(world: World, j: int, draw: st.DrawFn) -> None:
    world.source[f"p{j}.w"] = world.fresh_array(2, 1, 3)
    world.target[f"p{j}.w"] = world.source[f"p{j}.w"].reshape(2, 3)
    world.stages[0].append(Rule("adapt", f"p{j}.w", "reshape"))


def _pairs(world: World, j: int, draw: st.DrawFn) -> None:
    layers = [world.fresh_array(2) + 10 * i for i in range(4)]
    for i in (3, 0, 1, 2):
        world.source[f"s{j}.{i}.w"] = layers[i]
    for i in range(2):
        world.target[f"t{j}.{i}.w"] = (layers[2 * i] + layers[2 * i + 1]) / 2
    world.stages[0].append(Rule("adapt", f"s{j}.{{i}}.{{p}} -> t{j}.{{i//2}}.{{p}}", "average"))


def _grow(world: World, j: int, draw: st.DrawFn) -> None:
    for i in range(2):
        world.source[f"s{j}.{i}.w"] = world.target[f"t{j}.{2 * i}.w"] = world.target[f"t{j}.{2 * i + 1}.w"] = world.fresh_array(2)
    world.stages[0].append(Rule("rename", f"s{j}.{{i}}.{{p}}", f"t{j}.{{2*i}}.{{p}} + t{j}.{{2*i+1}}.{{p}}"))


def _drop(world: World, j: int, draw: st.DrawFn) -> None:
    for part in ("w", "b"):
        world.source[f"s{j}.{part}"] = world.fresh_array(2)
        world.dropped.add(f"s{j}.{part}")
    world.stages[draw(st.sampled_from([0, 1]))].append(Rule("drop", f"s{j}.**"))


def _fresh(world: World, j: int, draw: st.DrawFn) -> None:
    world.target[f"t{j}.w"] = None


def _anonymous(world: World, j: int, draw: st.DrawFn) -> None:
    world.source[f"s{j}.7.w"] = world.target[f"t{j}.w"] = world.fresh_array(2)
    world.stages[0].append(Rule("rename", f"s{j}.*.{{p}}", f"t{j}.{{p}}"))


MAKERS = {name[1:]: maker for name, maker in list(globals().items()) if name[1:] in (*KINDS, *ONE_WAY) and callable(maker)}


@st.composite
def worlds(draw: st.DrawFn, kinds: tuple[str, ...] = (*KINDS, *ONE_WAY)) -> World:
    """A world of a few pieces of these kinds."""
    world = World()
    for j in range(40):  # so that no change of a prefix makes more keys equal
        world.source[f"k{j}"] = world.target[f"k{j}"] = world.fresh_array(1)
    for j, kind in enumerate(draw(st.lists(st.sampled_from(kinds), min_size=1, max_size=5))):
        MAKERS[kind](world, j, draw)
    return world


def followed(plan: Plan, source: Mapping[str, np.ndarray]) -> dict[str, np.ndarray | None]:
    """What a plan makes of a source's arrays, each op as NumPy has it; None for a key that takes nothing."""
    return {step.target: _made(step.adapters, [source[key] for _, key in step.sources]) if step.sources else None for step in plan.steps}


def _made(ops, arrays: list[np.ndarray]) -> np.ndarray:
    for op in ops:
        kind, dim = op["op"], op.get("dim", 0)
        if kind in ("concat", "stack"):
            join = np.concatenate if kind == "concat" else np.stack
            arrays = [join(arrays[start : start + op["of"]], dim) for start in range(0, len(arrays), op["of"])]
        elif kind == "average":
            arrays = [sum(weight * array for weight, array in zip(op["weights"], arrays, strict=True))]
        else:
            arrays = [_one(op, kind, dim, array) for array in arrays]
    (array,) = arrays
    return array


def _one(op, kind: str, dim: int, array: np.ndarray) -> np.ndarray:
    if kind == "chunk":
        return np.split(array, op["of"], dim)[op["index"]]
    if kind == "slice":
        return np.take(array, range(op["start"], op["stop"]), dim)
    if kind == "unstack":
        return np.take(array, op["index"], dim)
    if kind == "transpose":
        return np.swapaxes(array, *op["dims"])
    return np.transpose(array, op["dims"]) if kind == "permute" else {"reshape": array.reshape}[kind](op["shape"])
