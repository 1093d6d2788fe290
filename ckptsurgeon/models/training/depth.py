"""The depth of each parameter, from the stem (0) up to the head (the top): by patterns, a `group_matcher`, or the model's repeated blocks.

For a timm model, its own `group_matcher` gives the depths. Otherwise they follow from the parameters' names (without wrappers' segments)
and the order of registration (that of `named_parameters`); the forward pass is not considered. Parameters before the layers are one below
them (the stem), parameters after the layers one above (the head), and parameters between two layers have the depth of the earlier one.
"Before" and "after" refer to the smallest module that contains the parameter and a layer. Of several stacks of blocks, the one
with nearly all elements is taken as the layers. If that is ambiguous, or there is no stack, the error lists possible values for `layers`.

`group_matcher` is as timm documents it, and timm is not imported: a dict of regular expressions by group (one, or several with a suffix),
or a function of a name. Groups are ordered by their numbers; one whose last number is 99999 joins the group before it; a name that no
expression matches is above all groups. That of a module with most of the model's elements is used for the whole.
"""

from __future__ import annotations

import inspect
import math
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from ckptsurgeon.errors import ModelError, TargetError
from ckptsurgeon.models.target import user_code
from ckptsurgeon.models.target.parameters import Named, by_name, inner, listed, matched, modules_by_path, named
from ckptsurgeon.rules.meant import meant_hint
from ckptsurgeon.rules.patterns import Pattern, compile_pattern

_NUMBERED = re.compile(r"([^{}*/]*?)(0|[1-9][0-9]*)")
_MOST = 8  # modules in a hint
MOST_OF = 0.8  # the share of a model's elements that a module must contain for its depths to be used
_JOINS_PREVIOUS = 99999.0
_MATCHER = "group_matcher"
Group = tuple[float, ...]


@dataclass(frozen=True)
class Depths:
    """Depth by a parameter's first name, 0 to `top`; a tied parameter has the lowest depth of its names. `patterns` match the layers."""

    patterns: tuple[str, ...]
    of: Mapping[str, int]
    top: int

    def label(self, depth: int) -> str:
        """`stem`, `layer 0` …, `head`.

        >>> [Depths((), {}, 3).label(depth) for depth in range(4)]
        ['stem', 'layer 0', 'layer 1', 'head']
        """
        return "stem" if depth == 0 else "head" if depth == self.top else f"layer {depth - 1}"


def depths(model: nn.Module, layers: str | Iterable[str] | None = None, relevant: Collection[str] | None = None) -> Depths:
    """The depth of every parameter, frozen ones included.

    Args:
        layers: a pattern for the layers, whose numbers tell them apart (`encoder.layer.{i}.**`, `layer{s}.{i}.**`) and count from the
            bottom; a pattern without a number is one layer. Several patterns follow one another from the bottom up. Two towers
            side by side are one pattern: `*_model.encoder.layers.{i}.**`. None uses the model's own `group_matcher` (timm's models have
            one), or else finds the repeated blocks in the module tree.
        relevant: first names of the parameters whose depth is needed; stacks without any of them are no candidates. None for all.

    Raises:
        ModelError: no repeated blocks, more than one stack of them, or a pattern that matches no parameter.

    >>> net = nn.ModuleDict({"stem": nn.Linear(2, 2), "blocks": nn.ModuleList(nn.Sequential(nn.Linear(2, 2)) for _ in range(2))})
    >>> depths(net).of
    {'stem.weight': 0, 'stem.bias': 0, 'blocks.0.0.weight': 1, 'blocks.0.0.bias': 1, 'blocks.1.0.weight': 2, 'blocks.1.0.bias': 2}
    """
    parameters = named(model)
    names = _in_order(by_name(model, parameters.values()))
    order = list(names)
    sizes = {name: parameter.tensor.numel() for parameter in parameters.values() for name in parameter.bare}
    own_depth_of = own_depths(model, sizes) if layers is None else None
    if own_depth_of is not None:
        return _from_group_matcher(*own_depth_of, order, parameters)
    patterns = listed(layers) if layers is not None else (_find_layers(model, relevant, parameters),)
    layered: dict[str, int] = {}
    below = 0
    for text in patterns:
        levels = _levels(compile_pattern(text), {name: aliases for name, aliases in names.items() if name not in layered})
        if not levels:
            raise ModelError(f"the layers {text!r} match no parameter", hint=meant_hint(text, order))
        ranks = {index: rank for rank, index in enumerate(sorted(set(levels.values())), start=below + 1)}
        layered.update({name: ranks[index] for name, index in levels.items()})
        below += len(ranks)
    if not patterns:
        raise ModelError("layers is empty", hint="give a pattern such as 'encoder.layers.{i}.**', or leave it out")
    depth = {**_around(order, layered, below + 1), **layered}
    return Depths(patterns, {first: min(depth[name] for name in parameter.bare) for first, parameter in parameters.items()}, below + 1)


def _from_group_matcher(prefix: str, own: Mapping[str, int], order: list[str], parameters: Mapping[str, Named]) -> Depths:
    """Depths from a module's `group_matcher`; parameters outside the module are below or above all of its depths."""
    outside = [name for name in order if name not in own]
    start = next(index for index, name in enumerate(order) if name in own)
    below, top = set(outside) & set(order[:start]), max(own.values())
    depth = {name: depth_within + bool(below) for name, depth_within in own.items()}
    top += bool(below) + (len(below) < len(outside))
    depth.update({name: 0 if name in below else top for name in outside})
    return Depths((f"{prefix}**",), {first: min(depth[name] for name in parameter.bare) for first, parameter in parameters.items()}, top)


def _in_order(parameters: Mapping[str, Named]) -> dict[str, tuple[str, ...]]:
    """Each name without wrappers' segments, in the order of registration, with all names that a pattern may match."""
    bare = {name: dict(zip(parameter.names, parameter.bare, strict=True))[name] for name, parameter in parameters.items()}
    return {
        bare[name]: (bare[name], *parameter.all_names) if len(set(parameter.bare)) == 1 else (bare[name], name)
        for name, parameter in parameters.items()
    }


def stacks(model: nn.Module) -> tuple[str, ...]:
    """Patterns of the outermost stacks of repeated blocks: children with numbers in their names (`3`, `layer3`), of which at least two have
    the same type and layers of their own. If such children contain only blocks of one type (stages), these blocks are the layers.

    >>> stacks(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))
    ()
    """
    patterns: list[str] = []

    def walk(module: nn.Module, prefix: str) -> None:
        children = _children(module)
        families: dict[str, dict[str, nn.Module]] = {}
        for name, child in children.items():
            number = _NUMBERED.fullmatch(name)
            if number is not None and _has_parameters(child):
                families.setdefault(number[1], {})[name] = child
        inside = set()
        for stem, members in families.items():
            kind, count = Counter(map(type, members.values())).most_common(1)[0]
            if count > 1 and any(_composite(child) for child in members.values() if type(child) is kind):
                patterns.append(f"{prefix}{stem}{{i}}{'.{j}' if _stages(members.values()) else ''}.**")
                inside |= set(members)
        for name, child in children.items():
            if name not in inside:
                walk(child, f"{prefix}{name}.")

    walk(model, "")
    return tuple(patterns)


def _stages(members: Iterable[nn.Module]) -> bool:
    """Whether each member contains only blocks of one type, as a ResNet's `layer1` does; attention and MLP in a list are two types."""
    kinds = set()
    for member in members:
        if type(member) not in (nn.Sequential, nn.ModuleList):
            return False
        children = [child for child in _children(member).values() if _has_parameters(child)]
        if not all(_composite(child) for child in children):
            return False
        kinds |= set(map(type, children))
    return len(kinds) == 1


def _children(module: nn.Module) -> dict[str, nn.Module]:
    """The modules within a module by name, each without its wrappers."""
    return {name: inner(child) for name, child in inner(module).named_children()}


def _has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def _composite(module: nn.Module) -> bool:
    return any(_has_parameters(child) for child in _children(module).values())


def _find_layers(model: nn.Module, relevant: Collection[str] | None, parameters: Mapping[str, Named]) -> str:
    """The pattern of the one stack of blocks that contains relevant parameters, or nearly all elements. ModelError if there is none."""
    candidates = {
        name: (name,) for first, parameter in parameters.items() if relevant is None or first in relevant for name in parameter.bare
    }
    patterns = stacks(model)
    counts = {text: len(set(_levels(compile_pattern(text), candidates).values())) for text in patterns}
    matching = [text for text in patterns if counts[text]] or list(patterns)
    if len(matching) == 1:
        return matching[0]
    names = {name: (name,) for parameter in parameters.values() for name in parameter.bare}
    sizes = {name: parameter.tensor.numel() for parameter in parameters.values() for name in parameter.bare}
    elements = {text: sum(sizes[name] for name in _levels(compile_pattern(text), names)) for text in matching}
    largest = max(matching, key=elements.__getitem__, default="")
    if matching and elements[largest] >= MOST_OF * sum(elements.values()) > 0:
        return largest
    if matching:
        raise ModelError(
            f"{len(matching)} stacks of blocks could be the layers",
            hint=f"say which, layers={matching[0]!r}, or several in their order: layers={matching[:2]!r}",
            problems=tuple(f"{text} ({counts[text]} layers)" for text in matching),
        )
    own = [f"{name}.**" for name, child in _children(model).items() if _has_parameters(child)]
    raise ModelError(
        "has no repeated blocks that could be the layers",
        path=type(model).__name__,
        hint=f"name the layers from the bottom up: layers={own[:_MOST]!r}{' …' if len(own) > _MOST else ''}" if own else None,
    )


def _levels(pattern: Pattern, names: Mapping[str, Iterable[str]]) -> dict[str, tuple[int, ...]]:
    """The numbers that a layer's pattern finds in each name that it matches."""
    matches = matched(pattern, names)
    digits = [{part for part, value in parts.items() if value.isascii() and value.isdigit()} for parts in matches.values()]
    # `layer{i}.**` also matches layer_norm: a part that is a number somewhere must be one everywhere, unless another part always is
    always = set.intersection(*digits) if digits else set()
    numbers = [part for part in pattern.parts if part in (always or set().union(*digits))]
    return {
        name: tuple(int(parts[part]) for part in numbers)
        for (name, parts), numeric in zip(matches.items(), digits, strict=True)
        if numeric.issuperset(numbers)
    }


def _around(order: list[str], layered: Mapping[str, int], top: int) -> dict[str, int]:
    """The depth of every name that is in no layer."""
    spans: dict[str, list[int]] = {}  # by a module's prefix: the first and last position of a layer in it, its lowest and highest depth
    layer_positions = []
    for position, name in enumerate(order):
        if name not in layered:
            continue
        layer_positions.append(position)
        for prefix in _prefixes(name):
            span = spans.setdefault(prefix, [position, position, layered[name], layered[name]])
            span[1:] = [position, min(span[2], layered[name]), max(span[3], layered[name])]
    depth_of = {}
    for position, name in enumerate(order):
        if name in layered:
            continue
        first, last, lowest, highest = next(spans[prefix] for prefix in _prefixes(name) if prefix in spans)
        if position < first:
            depth_of[name] = lowest - 1
        elif position > last:
            depth_of[name] = min(highest + 1, top)
        else:
            depth_of[name] = layered[order[layer_positions[bisect_right(layer_positions, position) - 1]]]
    return depth_of


def _prefixes(name: str) -> list[str]:
    """The prefixes of the modules that contain a name, the innermost first.

    >>> _prefixes("a.b.weight")
    ['a.b.', 'a.', '']
    """
    parts = name.split(".")[:-1]
    return [".".join(parts[:length]) + "." for length in range(len(parts), 0, -1)] + [""]


def own_depths(model: nn.Module, sizes: Mapping[str, int]) -> tuple[str, dict[str, int]] | None:
    """The outermost module with a usable `group_matcher` and most of the model's elements: its path with a dot at its end, and the depth of
    each of its parameters, from 0; None if there is no such module. `sizes` are by names without wrappers' segments."""
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
