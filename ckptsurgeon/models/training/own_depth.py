"""Finds the depth of each parameter by the model's own `group_matcher`, timm's method that gives each name's group of layers.

The format is as timm documents it; timm itself is not imported. `group_matcher` returns a dict of regular expressions by group (one, or
several with a suffix), or a function of a name. Groups are ordered by their numbers; a group whose last number is 99999 joins the group
before it; a name that no expression matches is above all groups (the head). The `group_matcher` of a module that contains most of the
model's
elements is used for the whole model: parameters outside of the module are below or above it.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

from torch import nn

from ckptsurgeon.errors import TargetError
from ckptsurgeon.models.target import user_code
from ckptsurgeon.models.target.parameters import inner, modules_by_path

MOST_OF = 0.8  # the share of a model's elements that a module must contain for its depths to be used
_JOINS_PREVIOUS = 99999.0
_MATCHER = "group_matcher"
Group = tuple[float, ...]


def own_depths(model: nn.Module, sizes: Mapping[str, int]) -> tuple[str, dict[str, int]] | None:
    """Find the outermost module with a usable `group_matcher` that contains most of the model's elements.

    Args:
        sizes: the number of elements of each parameter, by its name without wrappers' segments.

    Returns:
        The module's path (with a dot at its end) and the depth of each of its parameters, from 0; None if there is no such module.
    """
    total = sum(sizes.values())
    for path, module in modules_by_path(model).items():
        prefix = f"{path}." if path else ""
        elements = {name: count for name, count in sizes.items() if name.startswith(prefix)}
        if sum(elements.values()) < MOST_OF * total:
            continue
        group_of = _matcher(inner(module))
        depths = None if group_of is None else _numbered({name: group_of(name.removeprefix(prefix)) for name in elements})
        if depths and len(set(depths.values())) > 1:
            return prefix, depths
    return None


def _matcher(module: nn.Module) -> Callable[[str], Group | None] | None:
    """A function from a name to its group, by the module's own `group_matcher`; None if the module has none or the method fails."""
    method = getattr(module, _MATCHER, None)
    if method is None or not callable(method):
        return None
    try:
        has_coarse = "coarse" in inspect.signature(method).parameters
        groups = user_code.call(type(module).__name__, partial(method, coarse=False) if has_coarse else method)
        rows = list(_rows(groups)) if isinstance(groups, Mapping) else None
    except (TargetError, TypeError, ValueError, re.error):
        return None
    if rows is not None:
        return partial(_by_rows, rows)
    return partial(_by_function, type(module).__name__, groups) if callable(groups) else None


def _rows(groups: Mapping[Any, Any]) -> Iterator[tuple[re.Pattern[str], int, tuple[Any, ...]]]:
    """A dict of regular expressions as rows: the expression, its group's number, and the suffix to add to the numbers it captures."""
    for number, expressions in enumerate(groups.values()):
        if expressions is None:
            continue
        for text, suffix in expressions if isinstance(expressions, (tuple, list)) else [(expressions, None)]:
            yield re.compile(text), number, tuple(suffix or ())


def _by_rows(rows: Iterable[tuple[re.Pattern[str], int, tuple[Any, ...]]], name: str) -> Group | None:
    for expression, number, suffix in rows:
        match = expression.match(name)
        if match is not None:
            try:
                return (float(number), *(float(part) for part in (*match.groups(), *suffix) if part is not None))
            except (TypeError, ValueError):
                return None
    return (math.inf,)


def _by_function(what: str, function: Callable[[str], Any], name: str) -> Group | None:
    try:
        number = user_code.call(what, function, name)
        return tuple(map(float, number)) if isinstance(number, Iterable) else (float(number),)
    except (TargetError, TypeError, ValueError):
        return None


def _numbered(groups: Mapping[str, Group | None]) -> dict[str, int] | None:
    """Depths by the order of groups; None if a name has no group."""
    distinct = {group for group in groups.values() if group}
    if None in groups.values() or () in groups.values():
        return None
    depth, depths = -1, {}
    for group in sorted(distinct):
        depth += depth < 0 or group[-1] != _JOINS_PREVIOUS
        depths[group] = depth
    return {name: depths[group] for name, group in groups.items() if group is not None}
