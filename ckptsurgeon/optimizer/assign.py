"""Gives an optimizer's positions the names of their parameters: by the names at hand, or by an order of parameters.

By order there must be one assignment alone. The orders that count are the file's own, unless its keys were sorted, and that of a live model
and its optimizer; where both do, they must agree. In one group the parameters are taken in order, some left out; of several groups each
shape may stand in one only, unless the live optimizer has groups of the same sizes. Every moment's shape is held against its parameter's.
What is not unique is refused; no best fit is taken.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from ckptsurgeon.adapters.op import Shape
from ckptsurgeon.errors import FormatError, ModelError
from ckptsurgeon.hints import shortened
from ckptsurgeon.optimizer.format import Saved
from ckptsurgeon.optimizer.order import LiveOrder, candidates, order_of_keys
from ckptsurgeon.tensors import Checkpoint
from ckptsurgeon.wrappers import WRAPPERS, unwrap

MODEL = "model"  # in place of names: the order in which the model registers its parameters
# What the person can do where it can't be told whose the positions are: in Python, and on the command line.
IN_PYTHON = {
    "names": "give the source's names in the optimizer's order, group after group: optimizer_names=[name for name, {one} in "
    "source_model.named_parameters(){part}]",
    "model": "optimizer_names='model', if this model registers its parameters in the order of the one that was trained",
}
ON_THE_COMMAND_LINE = {
    "names": "--optimizer-names FILE, with the source's names in the optimizer's order, group after group, one a line",
    "model": "--optimizer-names model, if the target registers its parameters in the order of the model that was trained",
}
Positions = Mapping[Hashable, str]
Shapes = Mapping[Hashable, Shape | None]


@dataclass(frozen=True)
class Assigned:
    """The source's key of each position that has one, and what told it: `names`, the `order` of the file's keys, or a live `model`."""

    keys: Positions
    by: Literal["names", "order", "model"]


def assign(
    saved: Saved,
    source: Checkpoint,
    names: Sequence[str] | Literal["model"] | None = None,
    live: LiveOrder | None = None,
    help: Mapping[str, str] = IN_PYTHON,
) -> Assigned:
    """Whose each position is.

    Args:
        names: the parameters' names in the optimizer's order, before those that the file has; `"model"` for the live model's order.
        live: what a live model says.
        help: what the person can do where it can't be told, as `IN_PYTHON`.

    Raises:
        ModelError: names that are not the source's, or too few; without names, an order that does not fit or is not the only one.
        FormatError: moments of unlike shapes.
    """
    given = saved.names if names is None else None if names == MODEL else tuple(names)
    if given is not None:
        found = Assigned(_by_names(saved, source, given, live, _hint(saved, source, live, help)), "names")
    else:
        found = _by_order(saved, source, live, names == MODEL, help)
    wrong = []
    for position, key in found.keys.items():
        shape = saved.shape_of(position)
        if shape is not None and shape != source[key].shape:
            wrong.append(f"{key}: its moments are {shape}, and it is {source[key].shape}")
    if wrong:
        raise ModelError(
            "the optimizer's moments are not those of these parameters",
            path=source.path,
            problems=shortened(wrong),
            hint=_hint(saved, source, live, help),
        )
    return found


def _by_names(saved: Saved, source: Checkpoint, names: tuple[str, ...], live: LiveOrder | None, hint: str) -> dict[Hashable, str]:
    flat = saved.flat
    if len(names) != len(flat) or not all(type(name) is str for name in names) or len(set(names)) != len(names):
        raise ModelError(f"{len(names)} names are no names for the optimizer's {len(flat)} parameters", path=source.path, hint=hint)
    best: dict[str, str] = {}
    rivals = 0
    for found in _spellings(names, source, live):
        if len(found) > len(best):
            best, rivals = found, 0
        elif found != best and len(found) == len(best):
            rivals += 1
    if len(best) < len(names) and rivals:
        raise ModelError("the optimizer's names can be read in several ways", path=source.path, key=names[0], hint=hint)
    if names and not best:
        raise ModelError("none of the optimizer's names is a key of the source", path=source.path, key=names[0], hint=hint)
    return {position: best[name] for position, name in zip(flat, names, strict=True) if name in best}


def _spellings(names: tuple[str, ...], source: Checkpoint, live: LiveOrder | None) -> Iterator[dict[str, str]]:
    """Names to keys: as they are, then, unless all are, with and without wrappers' segments below each prefix that the keys may have, or
    without one that all names have, and as a live model calls its parameters; these for half of the names at least."""
    plain = {name: name for name in names if name in source}
    yield plain
    if len(plain) == len(names) or not names:
        return
    yield from (found for found in _changed(names, source, live) if 2 * len(found) >= len(names))


def _changed(names: tuple[str, ...], source: Checkpoint, live: LiveOrder | None) -> Iterator[dict[str, str]]:
    for wrappers in ((), WRAPPERS):
        bare = {key: unwrap(key, wrappers) for key in source}
        counts = Counter(bare.values())
        keys = {name: key for key, name in bare.items() if counts[name] == 1}
        wanted = {name: unwrap(name, wrappers) for name in names}
        first = wanted[names[0]]
        heads = dict.fromkeys(key[: -len(first)] for key in keys if key == first or key.endswith(f".{first}"))
        yield from ({name: keys[head + own] for name, own in wanted.items() if head + own in keys} for head in heads)
        while len({own.partition(".")[0] for own in wanted.values()}) == 1 and all("." in own for own in wanted.values()):
            wanted = {name: own.partition(".")[2] for name, own in wanted.items()}
            yield {name: keys[own] for name, own in wanted.items() if own in keys}
    if live is not None:
        found = {name: live.named.get(name, ()) for name in names}
        yield {name: own[0] for name, own in found.items() if len(own) == 1}


def _by_order(saved: Saved, source: Checkpoint, live: LiveOrder | None, by_model: bool, help: Mapping[str, str]) -> Assigned:
    shapes = {position: saved.shape_of(position) for position in saved.flat}
    stated = [position for position in saved.flat if shapes[position] is not None]
    keys = candidates(source, () if live is None else live.passed)
    worth = order_of_keys(source)
    by_file = None if worth == "sorted" or by_model else _in_groups(saved.positions, shapes, keys, source)
    by_live = None if live is None else _by_live(saved, shapes, keys, source, live, by_model)
    if by_model and by_live is None:
        raise ModelError(
            "the optimizer's positions do not fit the model's parameters in their order",
            path=source.path,
            hint=_hint(saved, source, live, help),
        )
    proven = worth == "registered" and (live is None or live.as_registered)
    if by_file is not None and by_live is not None and not proven:
        apart = next((position for position in stated if by_file.get(position) != by_live.get(position)), None)
        if apart is not None:
            raise ModelError(
                f"the file's order and the model's give the optimizer's position {str(apart)[:60]} to {by_file.get(apart)} and to "
                f"{by_live.get(apart)}, which have one shape",
                path=source.path,
                hint=_hint(saved, source, live, help),
            )
    if by_file is not None:
        return Assigned(by_file, "order")
    if by_live is not None and live is not None and (live.leads or by_model):
        return Assigned(by_live, "model")
    alone = _alone(stated, shapes, keys, source)
    if alone is None:
        count = f"{len(saved.flat)} parameters in {len(saved.positions)} group{'s' if len(saved.positions) != 1 else ''}"
        why = "; its keys are sorted, so that their order says nothing" if worth == "sorted" else ""
        raise ModelError(
            f"the optimizer stores {count} without names, and they can be the source's {len(keys)} in no way, or in several{why}",
            path=source.path,
            hint=_hint(saved, source, live, help),
        )
    return Assigned(alone, "order")


def _hint(saved: Saved, source: Checkpoint, live: LiveOrder | None, help: Mapping[str, str]) -> str:
    """What the person can do; the model's order only where it fits, and without the parameters that were not trained."""
    shapes = {position: saved.shape_of(position) for position in saved.flat}
    keys = candidates(source, () if live is None else live.passed)
    some = len(saved.flat) < len(keys)
    names = help["names"].format(one="one" if some else "_", part=" if one.requires_grad" if some else "")
    fits = live is not None and _by_live(saved, shapes, keys, source, live, True) is not None
    return f"{names}; or {help['model']}" if fits else names


def _by_live(saved: Saved, shapes: Shapes, keys: Sequence[str], source: Checkpoint, live: LiveOrder, asked: bool) -> Positions | None:
    """By the groups of the live optimizer, where they are as large as the saved ones, or by the model's order of registration.

    Unless the person asked for it, each of the model's parameters must be one key of the source at most, and no other key of the source
    may be confused with them: what the model has no place for has shapes of its own.
    """
    known = list(dict.fromkeys(key for own in live.registered for key in own))
    rest = {source[key].shape for key in keys} - {source[key].shape for key in known}
    apart = not asked and not set(keys) <= set(known)
    if apart and (None in shapes.values() or any(source[key].shape not in rest for key in keys if key not in known)):
        return None
    if not asked and any(len(own) > 1 for own in live.registered):
        return None
    found = None
    if not apart and list(map(len, live.groups)) == list(map(len, saved.positions)) and _alike(saved, live):
        found = _pairs(saved.flat, [own for group in live.groups for own in group], shapes, source)
    if found is None and asked and len(live.registered) == len(saved.flat) and sum(map(bool, saved.positions)) == 1:
        found = _pairs(saved.flat, live.registered, shapes, source)
    if found is not None:
        return found
    groups = [[position for position in group if not apart or shapes[position] not in rest] for group in saved.positions]
    return _in_groups(groups, shapes, known, source)


def _pairs(positions: Sequence[Hashable], parameters: Sequence[tuple[str, ...]], shapes: Shapes, source: Checkpoint) -> Positions | None:
    """Each position's one key; None where a position with moments has none, or one of another shape, or a key would be two positions'."""
    found = {position: own[0] for position, own in zip(positions, parameters, strict=True) if len(own) == 1}
    fits = all(shape is None or (position in found and source[found[position]].shape == shape) for position, shape in shapes.items())
    return found if fits and len(set(found.values())) == len(found) else None


def _alike(saved: Saved, live: LiveOrder) -> bool:
    """Whether groups of the same sizes may be the same: by their names, where both have them, and by which have no weight decay."""
    rows = list(zip(saved.groups, live.options, strict=True))
    names = all(one["name"] == other["name"] for one, other in rows if "name" in one and "name" in other)
    bare = [(one.get("weight_decay") == 0, other.get("weight_decay") == 0) for one, other in rows]
    decays = [pair for pair in zip(*bare, strict=True) if len(set(pair)) > 1]  # a side on which some have it and some have not
    return names and (len(decays) < 2 or decays[0] == decays[1])


def _alone(stated: Sequence[Hashable], shapes: Shapes, keys: Sequence[str], source: Checkpoint) -> Positions | None:
    """By shape, where each shape stands for one position and one key."""
    counts = Counter(shapes[position] for position in stated)
    by_shape: dict[Shape, list[str]] = {}
    for key in keys:
        by_shape.setdefault(source[key].shape, []).append(key)
    found: dict[Hashable, str] = {}
    for position in stated:
        shape = shapes[position]
        own = by_shape.get(shape, []) if shape is not None else []
        if len(own) != 1 or counts[shape] != 1:
            return None
        found[position] = own[0]
    return found


def _in_groups(groups: Sequence[Sequence[Hashable]], shapes: Shapes, keys: Sequence[str], source: Checkpoint) -> Positions | None:
    """By an order of keys: one group in order, several by shape."""
    full = [group for group in groups if group]
    return _in_order(full[0], shapes, keys, source) if len(full) == 1 else _by_shape(full, shapes, keys, source)


def _in_order(positions: Sequence[Hashable], shapes: Shapes, keys: Sequence[str], source: Checkpoint) -> dict[Hashable, str] | None:
    """One group: the keys in order, some left out. The first way and the last way to do so must be one, where there is state."""
    first = _embed(positions, shapes, keys, source)
    last = _embed(positions[::-1], shapes, keys[::-1], source)
    if first is None or last is None or any(shapes[position] is not None and first[position] != last[position] for position in positions):
        return None
    return {position: key for position, key in first.items() if key == last[position]}


def _embed(positions: Sequence[Hashable], shapes: Shapes, keys: Sequence[str], source: Checkpoint) -> dict[Hashable, str] | None:
    """Each position's earliest candidate after the one before it; one without moments takes any."""
    found: dict[Hashable, str] = {}
    left = iter(keys)
    for position in positions:
        key = next((key for key in left if shapes[position] in (None, source[key].shape)), None)
        if key is None:
            return None
        found[position] = key
    return found


def _by_shape(
    groups: Sequence[Sequence[Hashable]], shapes: Shapes, candidates: Sequence[str], source: Checkpoint
) -> dict[Hashable, str] | None:
    """Several groups: which parameters are in which is not known, so that all of one shape must be in one, in order."""
    owners: dict[Shape, list[tuple[int, Hashable]]] = {}
    for number, group in enumerate(groups):
        for position in group:
            shape = shapes[position]
            if shape is not None:
                owners.setdefault(shape, []).append((number, position))
    found: dict[Hashable, str] = {}
    for shape, owned in owners.items():
        keys = [key for key in candidates if source[key].shape == shape]
        if len({number for number, _ in owned}) != 1 or len(keys) != len(owned):
            return None
        found.update((position, key) for (_, position), key in zip(owned, keys, strict=True))
    order = {key: place for place, key in enumerate(candidates)}
    for group in groups:
        places = [order[found[position]] for position in group if position in found]
        if places != sorted(places):
            return None
    return found


def held_by_key(saved: Saved, assigned: Assigned, source: Checkpoint) -> dict[str, Mapping[str, object]]:
    """What the optimizer keeps by the source's keys, a tied parameter's under each of its names. FormatError for two states of one."""
    held: dict[str, Mapping[str, object]] = {}
    ties = {key: group for group in source.ties for key in group}
    for position, key in assigned.keys.items():
        for name in ties.get(key, (key,)):
            if name in held:
                raise FormatError("has two states for one tied parameter", path=source.path, key=name)
            held[name] = saved.state.get(position, {})
    return held
