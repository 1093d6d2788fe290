"""Links as one literal rule each, and the plan that these lead to: what general rules are held against."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from hashlib import sha256
from typing import Any

from ckptsurgeon.matching.proposals.propose import Proposal, rule
from ckptsurgeon.matching.result import Matching
from ckptsurgeon.matching.rules_from_links.generalise import Task
from ckptsurgeon.planning.links import Link
from ckptsurgeon.planning.plan import Plan, make_plan
from ckptsurgeon.rules.patterns import literal
from ckptsurgeon.rules.rulefile import parse_rules
from ckptsurgeon.rules.rules import Rule
from ckptsurgeon.tensors import Checkpoint, TensorMeta, contiguous_stride

Led = dict[str, tuple[tuple[str, ...], tuple[Any, ...]]]


def checkpoint(tensors: Mapping[str, TensorMeta] | Mapping[str, tuple[int, ...]], path: str = "a.pt", **more: Any) -> Checkpoint:
    """A checkpoint of tensors, or of their shapes."""
    metas = {
        key: one if isinstance(one, TensorMeta) else TensorMeta(key, "F32", tuple(one), contiguous_stride(tuple(one)))
        for key, one in tensors.items()
    }
    form = "torch-zip" if path.endswith(".pt") else "model"
    return Checkpoint(path, form, sha256(path.encode()).hexdigest(), metas, kind="model" if form == "model" else "file", **more)


def proposed(source: Checkpoint, target: Checkpoint, links: Sequence[Link], accept: bool = False) -> Proposal:
    """The proposal of links, whatever found them."""
    reached, used = {key for link in links for key in link.targets}, {key for link in links for key in link.sources}
    left = (tuple(key for key in target if key not in reached), tuple(key for key in source if key not in used))
    return rule(Matching(tuple(links), *left, 1.0, 1.0), Task(source, target, ()), accept=accept)


def led(plan: Plan) -> Led:
    """What a plan gives each key of the target: the sources in order, and the ops."""
    return {step.target: (tuple(key for _, key in step.sources), tuple(step.ops)) for step in plan.steps if step.sources}


def read_back(found: Proposal, source: Checkpoint, target: Checkpoint) -> Led:
    """What the text of the rules leads to when it is read."""
    return led(make_plan([source], target, parse_rules(found.toml, "rules.toml")))


def _joined(keys: Iterable[str]) -> str:
    return " + ".join(map(literal, keys))


def literal_plan(links: Iterable[Link], source: Checkpoint, target: Checkpoint) -> Led:
    """What one rule for each link leads to, all other keys of the source dropped. The prefix is out of play: names get a mark first."""
    links = list(links)
    moves: dict[str, list[str]] = {}
    rules: list[Rule] = []
    for link in links:
        if len(link.sources) == len(link.targets) == 1 or not link.op:
            moves.setdefault(link.sources[0], []).extend(link.targets)
            rules += [Rule("adapt", literal(key), link.op) for key in link.targets if link.op]
        elif link.op == "unstack(dim=0) | chunk(dim=0)":  # no rule names all of these parts; by its own key, each can be told
            per = len(link.targets) // source[link.sources[0]].shape[0]
            moves.setdefault(link.sources[0], []).extend(link.targets)
            rules += [
                Rule("adapt", literal(key), f"unstack(dim=0, index={at // per}) | chunk(dim=0, index={at % per}, of={per})")
                for at, key in enumerate(link.targets)
            ]
        else:
            rules.append(Rule("adapt", f"{_joined(link.sources)} -> {_joined(link.targets)}", link.op))
    used = {key for link in links for key in link.sources}
    rules += [Rule("rename", literal(key), _joined(targets)) for key, targets in moves.items()]
    rules += [Rule("drop", literal(key)) for key in source if key not in used]
    return led(make_plan([source], target, rules))
