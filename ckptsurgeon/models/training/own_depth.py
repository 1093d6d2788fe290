"""How deep each parameter lies by a model's own word: timm's `group_matcher`, which says for each name in which group of layers it is.

The form is timm's documented one, and nothing of timm is imported: a dict of regular expressions by group (one, or several with a suffix),
or a function of a name; groups in the order of their numbers; one whose last number is 99999 joins the group before it; what none matches
is above all (the head). A module that holds most of a model's parameters speaks for it: what stands outside of it is below or above.
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

MOST_OF = 0.8  # of a model's elements: whoever holds so much speaks for all
_JOINS = 99999.0
_MATCHER = "group_matcher"
Place = tuple[float, ...]


def own_depths(model: nn.Module, sizes: Mapping[str, int]) -> tuple[str, dict[str, int]] | None:
    """The module that speaks for the model (its path, with a dot at its end), and the depth of each of its parameters, from 0.

    Args:
        sizes: the elements of each parameter by its name without wrappers' segments.

    Returns:
        None where no module has a `group_matcher`, or what it says is of another form.
    """
    total = sum(sizes.values())
    for path, module in modules_by_path(model).items():
        prefix = f"{path}." if path else ""
        own = {name: count for name, count in sizes.items() if name.startswith(prefix)}
        if sum(own.values()) < MOST_OF * total:
            continue
        place_of = _matcher(inner(module))
        found = None if place_of is None else _numbered({name: place_of(name.removeprefix(prefix)) for name in own})
        if found and len(set(found.values())) > 1:
            return prefix, found
    return None


def _matcher(module: nn.Module) -> Callable[[str], Place | None] | None:
    """What tells a name's place by the module's own `group_matcher`; None where it has none, or it fails."""
    method = getattr(module, _MATCHER, None)
    if method is None or not callable(method):
        return None
    try:
        takes = "coarse" in inspect.signature(method).parameters
        said = user_code.call(type(module).__name__, partial(method, coarse=False) if takes else method)
        rows = list(_rows(said)) if isinstance(said, Mapping) else None
    except (TargetError, TypeError, ValueError, re.error):
        return None
    if rows is not None:
        return partial(_by_rows, rows)
    return partial(_by_function, type(module).__name__, said) if callable(said) else None


def _rows(said: Mapping[Any, Any]) -> Iterator[tuple[re.Pattern[str], int, tuple[Any, ...]]]:
    """A dict of regular expressions as rows: the expression, the number of its group, and what is added to the groups it captures."""
    for number, form in enumerate(said.values()):
        if form is None:
            continue
        for text, suffix in form if isinstance(form, (tuple, list)) else [(form, None)]:
            yield re.compile(text), number, tuple(suffix or ())


def _by_rows(rows: Iterable[tuple[re.Pattern[str], int, tuple[Any, ...]]], name: str) -> Place | None:
    for expression, number, suffix in rows:
        found = expression.match(name)
        if found is not None:
            try:
                return (float(number), *(float(part) for part in (*found.groups(), *suffix) if part is not None))
            except (TypeError, ValueError):
                return None
    return (math.inf,)


def _by_function(what: str, function: Callable[[str], Any], name: str) -> Place | None:
    try:
        said = user_code.call(what, function, name)
        return tuple(map(float, said)) if isinstance(said, Iterable) else (float(said),)
    except (TargetError, TypeError, ValueError):
        return None


def _numbered(places: Mapping[str, Place | None]) -> dict[str, int] | None:
    """Depths by the order of places; None where a name has none."""
    known = {place for place in places.values() if place}
    if None in places.values() or () in places.values():
        return None
    depth, depths = -1, {}
    for place in sorted(known):
        depth += depth < 0 or place[-1] != _JOINS
        depths[place] = depth
    return {name: depths[place] for name, place in places.items() if place is not None}
