"""What rules lead to, and what links ask for, in the same words: by target key the sources and the filled ops. Both must be equal.

Rule: whether rules are right is told by the planner's own floor (`apply_rules`, `resolve`), never by how they were made.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache

from ckptsurgeon.adapters.chain import RuleOp, counted_at, fill_chain
from ckptsurgeon.adapters.op import Op, Shape
from ckptsurgeon.adapters.table import parse_ops
from ckptsurgeon.planning.apply_rules import NO_OUTSIDE, name_sources
from ckptsurgeon.planning.links import Link
from ckptsurgeon.planning.resolve import Origin, find_origins
from ckptsurgeon.rules.rules import Outside, Rule
from ckptsurgeon.tensors import Checkpoint

Results = Mapping[str, tuple[tuple[str, ...], tuple[Op, ...]]]  # by target key: its sources in order, and the ops as a plan has them


def replay(source: Checkpoint, target: Checkpoint, rules: Sequence[Rule], outside: Outside = NO_OUTSIDE) -> Results:
    """What rules give each key of the target. RuleError for rules that can't be followed."""
    return {key: _result(origin) for key, origin in origins(source, target, rules, outside).items() if origin.fits}


def origins(source: Checkpoint, target: Checkpoint, rules: Sequence[Rule], outside: Outside = NO_OUTSIDE) -> Mapping[str, Origin]:
    """Where each key of the target comes from under rules. RuleError for rules that can't be followed."""
    return find_origins([source], target, name_sources([source], target, rules, outside))


def _result(origin: Origin) -> tuple[tuple[str, ...], tuple[Op, ...]]:
    return tuple(key for _, key in origin.source_keys), origin.ops


def asked_results(links: Iterable[Link], source: Checkpoint, target: Checkpoint) -> Results:
    """What links ask for. RuleError for ops that do not go with the shapes."""
    known = {key: tensor.shape for key, tensor in target.items()}
    results = {}
    for link in links:
        shapes = [source[key].shape for key in link.sources]
        for index, key in enumerate(link.targets):
            ops = _ops_of(link, index, shapes)
            results[key] = (link.sources, fill_chain(ops, shapes, known[key], known)[0] if ops else ())
    return results


_parsed = lru_cache(maxsize=256)(parse_ops)


def _ops_of(link: Link, position: int, shapes: Sequence[Shape]) -> list[RuleOp]:
    """The ops of one of a link's targets; where a tensor is unstacked into several groups, the group's number is the unstack's."""
    ops = _parsed(link.op) if link.op else ()
    names, index, number = link.targets, position, None
    at = counted_at(ops)
    if at is not None and len(names) > 1:
        _, filled = fill_chain([RuleOp(op) for op in ops[:at]], shapes, None, {})
        count = max(len(names) // filled[0][ops[at].get("dim", 0)], 1)
        number, index = divmod(position, count)
        names = names[number * count : (number + 1) * count]
    return [RuleOp(op, index, names, number) for op in ops]
