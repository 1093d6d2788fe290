"""Averages several sources key by key: model soups (Wortsman et al. 2022, arXiv:2203.05482), checkpoint averages."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ckptsurgeon.adapters.chain import RuleOp
from ckptsurgeon.adapters.op import Op
from ckptsurgeon.dtypes import BY_CODE
from ckptsurgeon.errors import PlanError
from ckptsurgeon.planning.keys import Item
from ckptsurgeon.rules.rules import Rule
from ckptsurgeon.tensors import Checkpoint

Weights = Sequence[float] | bool
BY = Rule("average")


def weights_of(average: Weights, sources: Sequence[Checkpoint]) -> Op:
    """The op of an average. PlanError for weights that are not one number per source."""
    if len(sources) < 2:
        raise PlanError("an average needs two sources or more")
    if isinstance(average, bool):
        return {"op": "average"}
    try:
        weights = [float(weight) for weight in average]
    except (TypeError, ValueError, OverflowError) as error:
        raise PlanError(f"an average has weights {str(average)[:60]}", hint="give a number for each source, in order") from error
    if len(weights) != len(sources):
        raise PlanError(f"an average has {len(weights)} weights for {len(sources)} sources", hint="give one for each source, in order")
    if not all(0 <= weight < math.inf for weight in weights) or not any(weights):
        raise PlanError(f"an average has weights {weights[:8]}", hint="they are finite and not negative, and one at least is more than 0")
    return {"op": "average", "weights": weights}


def average_items(items: Sequence[Item], sources: Sequence[Checkpoint], op: Op, problems: list[str]) -> list[Item]:
    """One item for each name that all sources have. Integers, booleans and extra states are not averaged: they are the first source's."""
    rows: dict[str, dict[int, Item]] = {}
    for item in items:
        row = rows.setdefault(item.name, {})
        if item.source < 0:
            problems.append(f"{item.name!r} joins keys of several sources, and can't be averaged in the same run")
        elif item.source in row:
            problems.append(f"two keys of {sources[item.source].path} land on {item.name!r}: {row[item.source].words} and {item.words}")
        row[item.source] = item
    result = []
    for name, row in rows.items():
        lacking = [source.path for number, source in enumerate(sources) if number not in row]
        if lacking:
            problems += [f"{name!r} is not in {path}, or a rule dropped it there" for path in lacking if -1 not in row]
            continue
        first = row[0]
        number, key = first.source_keys[0]
        if any(item.ops != first.ops or item.entry != first.entry for item in row.values()):
            problems.append(f"{name!r} is made in another way in each source")
        elif first.entry or BY_CODE[sources[number][key].dtype].kind not in ("float", "complex"):
            result.append(first)
        else:
            source_keys = tuple(source_key for number in range(len(sources)) for source_key in row[number].source_keys)
            if len(first.source_keys) > 1:
                problems.append(f"{name!r} joins keys, and can't be averaged in the same run")
            result.append(Item(first.seen, name, source_keys, (*first.ops, RuleOp(op, siblings=(name,))), (*first.steps, (BY, 0))))
    return result
