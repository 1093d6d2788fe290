"""How deep each parameter lies, from the stem (0) up to the head (the top): by patterns, the model's own word, or its repeated blocks.

A timm model's own `group_matcher` says it for that model. Elsewhere depth goes by names, without what wrappers put into them, and by the
order of registration, as `named_parameters` gives it; the forward pass is not looked at. What stands before the layers is one below them
(the stem), what stands after is one above (the head), what stands between two has the depth of the one before it; "before" and "after" are
told within the smallest module that holds it and a layer. Of several stacks of blocks, the one that holds nearly all of what stands in
stacks is the layers. Where two real ones could be, or none is there, nothing is guessed: the error lists what could be given.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from torch import nn

from ckptsurgeon.errors import ModelError
from ckptsurgeon.models.target.parameters import Named, by_name, inner, listed, matched, named
from ckptsurgeon.models.training.own_depth import MOST_OF, own_depths
from ckptsurgeon.rules.meant import meant_hint
from ckptsurgeon.rules.patterns import Pattern, compile_pattern

_NUMBERED = re.compile(r"([^{}*/]*?)(0|[1-9][0-9]*)")
_MOST = 8  # modules that a hint names


@dataclass(frozen=True)
class Depths:
    """Depth by a parameter's first name, 0 to `top`; a tied one lies as low as the lowest of its names. `patterns` say what a layer is."""

    patterns: tuple[str, ...]
    of: Mapping[str, int]
    top: int

    def label(self, depth: int) -> str:
        """`stem`, `layer 0` …, `head`.

        >>> [Depths((), {}, 3).label(depth) for depth in range(4)]
        ['stem', 'layer 0', 'layer 1', 'head']
        """
        return "stem" if depth == 0 else "head" if depth == self.top else f"layer {depth - 1}"


def depths(model: nn.Module, layers: str | Iterable[str] | None = None, matter: Collection[str] | None = None) -> Depths:
    """The depth of every parameter, frozen ones too.

    Args:
        layers: what is a layer: a pattern whose parts that match numbers say which (`encoder.layer.{i}.**`, `layer{s}.{i}.**`), counted
            from the bottom; one without such a part is one layer. Several patterns stand on one another, in the order given. Two towers
            side by side are one pattern: `*_model.encoder.layers.{i}.**`. None asks the model's own `group_matcher`, as timm's models have
            it, and elsewhere finds the repeated blocks in the module tree.
        matter: first names of the parameters that depth is wanted for; stacks without any of them are no candidates. None for all.

    Raises:
        ModelError: no repeated blocks, more than one stack of them, or a pattern that matches no parameter.

    >>> net = nn.ModuleDict({"stem": nn.Linear(2, 2), "blocks": nn.ModuleList(nn.Sequential(nn.Linear(2, 2)) for _ in range(2))})
    >>> depths(net).of
    {'stem.weight': 0, 'stem.bias': 0, 'blocks.0.0.weight': 1, 'blocks.0.0.bias': 1, 'blocks.1.0.weight': 2, 'blocks.1.0.bias': 2}
    """
    parameters = named(model)
    names = _in_order(by_name(model, parameters.values()))
    order = list(names)
    sizes = {name: one.tensor.numel() for one in parameters.values() for name in one.bare}
    own = own_depths(model, sizes) if layers is None else None
    if own is not None:
        return _by_own_word(*own, order, parameters)
    patterns = listed(layers) if layers is not None else (_found(model, matter, parameters),)
    layered: dict[str, int] = {}
    below = 0
    for text in patterns:
        levels = _levels(compile_pattern(text), {name: every for name, every in names.items() if name not in layered})
        if not levels:
            raise ModelError(f"the layers {text!r} match no parameter", hint=meant_hint(text, order))
        ranks = {index: rank for rank, index in enumerate(sorted(set(levels.values())), start=below + 1)}
        layered.update({name: ranks[index] for name, index in levels.items()})
        below += len(ranks)
    if not patterns:
        raise ModelError("layers is empty", hint="give a pattern such as 'encoder.layers.{i}.**', or leave it out")
    depth = {**_around(order, layered, below + 1), **layered}
    return Depths(patterns, {first: min(depth[name] for name in one.bare) for first, one in parameters.items()}, below + 1)


def _by_own_word(prefix: str, said: Mapping[str, int], order: list[str], parameters: Mapping[str, Named]) -> Depths:
    """Depths as a module says; of what stands outside of it, below all or above all."""
    outside = [name for name in order if name not in said]
    first = next(place for place, name in enumerate(order) if name in said)
    below, top = set(outside) & set(order[:first]), max(said.values())
    depth = {name: at + bool(below) for name, at in said.items()}
    top += bool(below) + (len(below) < len(outside))
    depth.update({name: 0 if name in below else top for name in outside})
    return Depths((f"{prefix}**",), {first: min(depth[name] for name in one.bare) for first, one in parameters.items()}, top)


def _in_order(parameters: Mapping[str, Named]) -> dict[str, tuple[str, ...]]:
    """Each name without wrappers' segments, in the order of registration, to all that a pattern may call it."""
    bare = {name: dict(zip(parameter.names, parameter.bare, strict=True))[name] for name, parameter in parameters.items()}
    return {
        bare[name]: (bare[name], *parameter.every) if len(set(parameter.bare)) == 1 else (bare[name], name)
        for name, parameter in parameters.items()
    }


def stacks(model: nn.Module) -> tuple[str, ...]:
    """Patterns of the outermost stacks of repeated blocks: children numbered in name (`3`, `layer3`), two at least of one type with layers
    of its own. Stages that hold nothing but blocks of one type are gone into: their blocks are the layers.

    >>> stacks(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))
    ()
    """
    found: list[str] = []

    def walk(module: nn.Module, prefix: str) -> None:
        children = _children(module)
        families: dict[str, dict[str, nn.Module]] = {}
        for name, child in children.items():
            number = _NUMBERED.fullmatch(name)
            if number is not None and _holds(child):
                families.setdefault(number[1], {})[name] = child
        inside = set()
        for stem, members in families.items():
            kind, times = Counter(map(type, members.values())).most_common(1)[0]
            if times > 1 and any(_composite(child) for child in members.values() if type(child) is kind):
                found.append(f"{prefix}{stem}{{i}}{'.{j}' if _stages(members.values()) else ''}.**")
                inside |= set(members)
        for name, child in children.items():
            if name not in inside:
                walk(child, f"{prefix}{name}.")

    walk(model, "")
    return tuple(found)


def _stages(members: Iterable[nn.Module]) -> bool:
    """Whether each is a container of blocks of one type, as a ResNet's `layer1` is; attention and MLP in a list are two types."""
    kinds = set()
    for member in members:
        if type(member) not in (nn.Sequential, nn.ModuleList):
            return False
        children = [child for child in _children(member).values() if _holds(child)]
        if not all(_composite(child) for child in children):
            return False
        kinds |= set(map(type, children))
    return len(kinds) == 1


def _children(module: nn.Module) -> dict[str, nn.Module]:
    """The modules within a module by name, each without its wrappers."""
    return {name: inner(child) for name, child in inner(module).named_children()}


def _holds(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def _composite(module: nn.Module) -> bool:
    return any(_holds(child) for child in _children(module).values())


def _found(model: nn.Module, matter: Collection[str] | None, parameters: Mapping[str, Named]) -> str:
    """The pattern of the one stack that matters."""
    wanted = {name: (name,) for first, one in parameters.items() if matter is None or first in matter for name in one.bare}
    every = stacks(model)
    counts = {text: len(set(_levels(compile_pattern(text), wanted).values())) for text in every}
    mattering = [text for text in every if counts[text]] or list(every)
    if len(mattering) == 1:
        return mattering[0]
    names = {name: (name,) for one in parameters.values() for name in one.bare}
    sizes = {name: one.tensor.numel() for one in parameters.values() for name in one.bare}
    held = {text: sum(sizes[name] for name in _levels(compile_pattern(text), names)) for text in mattering}
    largest = max(mattering, key=held.__getitem__, default="")
    if mattering and held[largest] >= MOST_OF * sum(held.values()) > 0:
        return largest
    if mattering:
        raise ModelError(
            f"{len(mattering)} stacks of blocks could be the layers",
            hint=f"say which, layers={mattering[0]!r}, or several in their order: layers={mattering[:2]!r}",
            problems=tuple(f"{text} ({counts[text]} layers)" for text in mattering),
        )
    own = [f"{name}.**" for name, child in _children(model).items() if _holds(child)]
    raise ModelError(
        "has no repeated blocks that could be the layers",
        path=type(model).__name__,
        hint=f"name the layers from the bottom up: layers={own[:_MOST]!r}{' …' if len(own) > _MOST else ''}" if own else None,
    )


def _levels(pattern: Pattern, names: Mapping[str, Iterable[str]]) -> dict[str, tuple[int, ...]]:
    """The numbers that a layer's pattern sees in each name that it matches, under the first of the names that this one goes by."""
    matches = matched(pattern, names)
    digits = [{part for part, value in parts.items() if value.isascii() and value.isdigit()} for parts in matches.values()]
    # `layer{i}.**` also matches layer_norm: a part that is a number somewhere must be one everywhere, unless another part always is
    always = set.intersection(*digits) if digits else set()
    numbers = [part for part in pattern.parts if part in (always or set().union(*digits))]
    return {
        name: tuple(int(parts[part]) for part in numbers)
        for (name, parts), found in zip(matches.items(), digits, strict=True)
        if found.issuperset(numbers)
    }


def _around(order: list[str], layered: Mapping[str, int], top: int) -> dict[str, int]:
    """The depth of every name that is in no layer."""
    spans: dict[str, list[int]] = {}  # a module's prefix to the first and last place of a layer in it, and the lowest and highest depth
    places = []
    for place, name in enumerate(order):
        if name not in layered:
            continue
        places.append(place)
        for prefix in _prefixes(name):
            span = spans.setdefault(prefix, [place, place, layered[name], layered[name]])
            span[1:] = [place, min(span[2], layered[name]), max(span[3], layered[name])]
    found = {}
    for place, name in enumerate(order):
        if name in layered:
            continue
        first, last, lowest, highest = next(spans[prefix] for prefix in _prefixes(name) if prefix in spans)
        if place < first:
            found[name] = lowest - 1
        elif place > last:
            found[name] = min(highest + 1, top)
        else:
            found[name] = layered[order[places[bisect_right(places, place) - 1]]]
    return found


def _prefixes(name: str) -> list[str]:
    """The modules that hold a name, the innermost first.

    >>> _prefixes("a.b.weight")
    ['a.b.', 'a.', '']
    """
    parts = name.split(".")[:-1]
    return [".".join(parts[:length]) + "." for length in range(len(parts), 0, -1)] + [""]
