"""Finds which parameter each position of a saved optimizer state belongs to: by names if there are any, else by an order of parameters.

torch stores an optimizer's state by position, mostly without names. An order can be that of the file's keys, unless these are sorted, or
that of a live model and its optimizer; if both are known, they must agree. In a single group the parameters are in order, and some may
be left out. With several groups, all parameters of one shape must be in the same group, unless the live optimizer has groups of the same
sizes, and none is left out. Every moment's shape is compared with its parameter's. An ambiguous assignment is refused, never
guessed.
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

MODEL = "model"  # in place of names: use the order in which the model registers its parameters
# What the user can do if the assignment is ambiguous: in Python, and on the command line.
IN_PYTHON = {
    "names": "give the source's names in the optimizer's order, group after group: optimizer_names=[name for name, {one} in "
    "source_model.named_parameters(){part}]",
    "model": "optimizer_names='model', if this model and its optimizer have the parameters of those that were trained, in their order",
}
ON_THE_COMMAND_LINE = {
    "names": "write the source's names into a file, in the optimizer's order, group after group: open('names.txt', 'w').write('\\n'.join("
    "name for name, {one} in source_model.named_parameters(){part})); then add --optimizer-names names.txt",
    "model": "--optimizer-names model, if the target registers its parameters in the order of the model that was trained",
}
Positions = Mapping[Hashable, str]
Shapes = Mapping[Hashable, Shape | None]


@dataclass(frozen=True)
class Assigned:
    """The source key of each position that has one, and how it was found: by `names`, the `order` of the file's keys, or a live `model`."""

    keys: Positions
    by: Literal["names", "order", "model"]


def assign(
    saved: Saved,
    source: Checkpoint,
    names: Sequence[str] | Literal["model"] | None = None,
    live: LiveOrder | None = None,
    help: Mapping[str, str] = IN_PYTHON,
) -> Assigned:
    """The source key of each position.

    Args:
        saved: the optimizer's saved state.
        source: the checkpoint whose parameters it was saved for.
        names: the parameters' names in the optimizer's order, used in place of those in the file; `"model"` for the live model's order.
        live: the parameters of a live model, or None.
        help: what the user can do if the assignment is ambiguous: `IN_PYTHON` or `ON_THE_COMMAND_LINE`.

    Raises:
        ModelError: names that are not the source's, or too few; without names, an order that does not fit or is ambiguous.
        FormatError: moments with different shapes for one parameter.
    """
    known_names = saved.names if names is None else None if names == MODEL else tuple(names)
    if known_names is not None:
        assigned = Assigned(_by_names(saved, source, known_names, live, _hint(saved, source, live, help)), "names")
    else:
        assigned = _by_order(saved, source, live, names == MODEL, help)
    wrong = []
    for position, key in assigned.keys.items():
        shape = saved.shape_of(position)
        if shape is not None and shape != source[key].shape:
            wrong.append(f"{key}: its moments have the shape {shape}, but it has {source[key].shape}")
    if wrong:
        raise ModelError(
            "the optimizer's moments are not those of these parameters",
            path=source.path,
            problems=shortened(wrong),
            hint=_hint(saved, source, live, help),
        )
    return assigned


def _by_names(saved: Saved, source: Checkpoint, names: tuple[str, ...], live: LiveOrder | None, hint: str) -> dict[Hashable, str]:
    """Each position's key, by the parameters' names in the optimizer's order."""
    flat = saved.flat
    if len(names) != len(flat) or not all(type(name) is str for name in names) or len(set(names)) != len(names):
        raise ModelError(f"{len(names)} names are no names for the optimizer's {len(flat)} parameters", path=source.path, hint=hint)
    best: dict[str, str] = {}
    rivals = 0
    for reading in _spellings(names, source, live):
        if len(reading) > len(best):
            best, rivals = reading, 0
        elif reading != best and len(reading) == len(best):
            rivals += 1
    if len(best) < len(names) and rivals:
        raise ModelError("the optimizer's names can be read in several ways", path=source.path, key=names[0], hint=hint)
    if names and not best:
        raise ModelError("none of the optimizer's names is a key of the source", path=source.path, key=names[0], hint=hint)
    return {position: best[name] for position, name in zip(flat, names, strict=True) if name in best}


def _spellings(names: tuple[str, ...], source: Checkpoint, live: LiveOrder | None) -> Iterator[dict[str, str]]:
    """Ways to read names as keys: first unchanged; then, unless all are keys, every other way that gives keys for at least half of them."""
    plain = {name: name for name in names if name in source}
    yield plain
    if len(plain) == len(names) or not names:
        return
    yield from (reading for reading in _changed(names, source, live) if 2 * len(reading) >= len(names))


def _changed(names: tuple[str, ...], source: Checkpoint, live: LiveOrder | None) -> Iterator[dict[str, str]]:
    """Names read as keys with a prefix added, with a prefix removed that all names have, each with and without wrapper segments, and by the
    names of a live model's parameters."""
    for wrappers in ((), WRAPPERS):
        bare = {key: unwrap(key, wrappers) for key in source}
        counts = Counter(bare.values())
        keys = {name: key for key, name in bare.items() if counts[name] == 1}
        changed = {name: unwrap(name, wrappers) for name in names}
        first = changed[names[0]]
        heads = dict.fromkeys(key[: -len(first)] for key in keys if key == first or key.endswith(f".{first}"))
        yield from ({name: keys[head + tail] for name, tail in changed.items() if head + tail in keys} for head in heads)
        while len({tail.partition(".")[0] for tail in changed.values()}) == 1 and all("." in tail for tail in changed.values()):
            changed = {name: tail.partition(".")[2] for name, tail in changed.items()}
            yield {name: keys[tail] for name, tail in changed.items() if tail in keys}
    if live is not None:
        of_model = {name: live.named.get(name, ()) for name in names}
        yield {name: source_keys[0] for name, source_keys in of_model.items() if len(source_keys) == 1}


def _by_order(saved: Saved, source: Checkpoint, live: LiveOrder | None, by_model: bool, help: Mapping[str, str]) -> Assigned:
    """Each position's key, by an order of parameters; with `by_model` by the live model's order alone."""
    shapes = {position: saved.shape_of(position) for position in saved.flat}
    with_moments = [position for position in saved.flat if shapes[position] is not None]
    keys = candidates(source, () if live is None else live.passed)
    key_order = order_of_keys(source)
    by_file = None if key_order == "sorted" or by_model else _in_groups(saved.positions, shapes, keys, source)
    by_live = None if live is None else _by_live(saved, shapes, keys, source, live, by_model)
    if by_model and by_live is None:
        raise ModelError(
            "the optimizer's positions do not fit the model's parameters in their order",
            path=source.path,
            hint=_hint(saved, source, live, help),
        )
    proven = key_order == "registered" and (live is None or live.as_registered)
    if by_file is not None and by_live is not None and not proven:
        differing = next((position for position in with_moments if by_file.get(position) != by_live.get(position)), None)
        if differing is not None:
            raise ModelError(
                f"the file's order and the model's give the optimizer's position {str(differing)[:60]} to {by_file.get(differing)} and to "
                f"{by_live.get(differing)}, which have the same shape",
                path=source.path,
                hint=_hint(saved, source, live, help),
            )
    if by_file is not None:
        return Assigned(by_file, "order")
    if by_live is not None and live is not None and (live.leads or by_model):
        return Assigned(by_live, "model")
    by_unique_shape = _by_unique_shape(with_moments, shapes, keys, source)
    if by_unique_shape is None:
        count = f"{len(saved.flat)} parameters in {len(saved.positions)} group{'s' if len(saved.positions) != 1 else ''}"
        why = "; its keys are sorted, so their order says nothing" if key_order == "sorted" else ""
        raise ModelError(
            f"the optimizer stores {count} without names, which can be assigned to the source's {len(keys)} in no way, or in several{why}",
            path=source.path,
            hint=_hint(saved, source, live, help),
        )
    return Assigned(by_unique_shape, "order")


def _hint(saved: Saved, source: Checkpoint, live: LiveOrder | None, help: Mapping[str, str]) -> str:
    """What the user can do. The model's order is offered only if it fits; if some parameters were not trained, only the names of the others
    are."""
    shapes = {position: saved.shape_of(position) for position in saved.flat}
    keys = candidates(source, () if live is None else live.passed)
    some_untrained = len(saved.flat) < len(keys)
    names = help["names"].format(one="parameter" if some_untrained else "_", part=" if parameter.requires_grad" if some_untrained else "")
    fits = live is not None and _by_live(saved, shapes, keys, source, live, True) is not None
    return f"{names}; or {help['model']}" if fits else names


def _by_live(saved: Saved, shapes: Shapes, keys: Sequence[str], source: Checkpoint, live: LiveOrder, by_user: bool) -> Positions | None:
    """Each position's key, by the groups of the live optimizer, if they have the sizes of the saved ones, or by the model's order of
    registration; None if neither fits.

    Unless the user asked for this order, each of the model's parameters must correspond to at most one source key, and source keys that the
    model does not have must have shapes that none of its parameters has.
    """
    known = list(dict.fromkeys(key for parameter in live.registered for key in parameter))
    foreign_shapes = {source[key].shape for key in keys} - {source[key].shape for key in known}
    has_foreign = not by_user and not set(keys) <= set(known)
    if has_foreign and (None in shapes.values() or any(source[key].shape not in foreign_shapes for key in keys if key not in known)):
        return None
    if not by_user and any(len(parameter) > 1 for parameter in live.registered):
        return None
    assigned = None
    whole = len(saved.flat) >= len(keys)  # else the two optimizers may have different parts of the model
    if (by_user or whole) and not has_foreign and list(map(len, live.groups)) == list(map(len, saved.positions)) and _alike(saved, live):
        assigned = _pairs(saved.flat, [parameter for group in live.groups for parameter in group], shapes, source)
    if assigned is None and by_user and len(live.registered) == len(saved.flat) and sum(map(bool, saved.positions)) == 1:
        assigned = _pairs(saved.flat, live.registered, shapes, source)
    if assigned is not None:
        return assigned
    groups = [[position for position in group if not has_foreign or shapes[position] not in foreign_shapes] for group in saved.positions]
    return _in_groups(groups, shapes, known, source)


def _pairs(positions: Sequence[Hashable], parameters: Sequence[tuple[str, ...]], shapes: Shapes, source: Checkpoint) -> Positions | None:
    """Each position's key, if positions and parameters are in the same order.

    None if a position with moments has no key or a key of another shape, or if two positions have the same key.
    """
    keys = {position: parameter[0] for position, parameter in zip(positions, parameters, strict=True) if len(parameter) == 1}
    fits = all(shape is None or (position in keys and source[keys[position]].shape == shape) for position, shape in shapes.items())
    return keys if fits and len(set(keys.values())) == len(keys) else None


def _alike(saved: Saved, live: LiveOrder) -> bool:
    """Whether groups of the same sizes may be the same groups: by their names, if both have names, and by which have no weight decay."""
    rows = list(zip(saved.groups, live.options, strict=True))
    names = all(old["name"] == new["name"] for old, new in rows if "name" in old and "name" in new)
    without_decay = [(old.get("weight_decay") == 0, new.get("weight_decay") == 0) for old, new in rows]
    decays = [side for side in zip(*without_decay, strict=True) if len(set(side)) > 1]  # sides on which some groups decay and others don't
    return names and (len(decays) < 2 or decays[0] == decays[1])


def _by_unique_shape(positions: Sequence[Hashable], shapes: Shapes, keys: Sequence[str], source: Checkpoint) -> Positions | None:
    """Each position's key by shape; None unless every shape has exactly one position and one key."""
    counts = Counter(shapes[position] for position in positions)
    by_shape: dict[Shape | None, list[str]] = {}
    for key in keys:
        by_shape.setdefault(source[key].shape, []).append(key)
    if any(counts[shape] != 1 or len(by_shape.get(shape, ())) != 1 for shape in counts):
        return None
    return {position: by_shape[shapes[position]][0] for position in positions}


def _in_groups(groups: Sequence[Sequence[Hashable]], shapes: Shapes, keys: Sequence[str], source: Checkpoint) -> Positions | None:
    """Each position's key, by an order of keys: in a single group by the order, in several also by shape."""
    full = [group for group in groups if group]
    return _in_order(full[0], shapes, keys, source) if len(full) == 1 else _by_shape(full, shapes, keys, source)


def _in_order(positions: Sequence[Hashable], shapes: Shapes, keys: Sequence[str], source: Checkpoint) -> dict[Hashable, str] | None:
    """Each position's key in a single group: keys in order, some left out. For a position with moments, the earliest and the
    latest possible key must be the same; None otherwise."""
    first = _embed(positions, shapes, keys, source)
    last = _embed(positions[::-1], shapes, keys[::-1], source)
    if first is None or last is None or any(shapes[position] is not None and first[position] != last[position] for position in positions):
        return None
    return {position: key for position, key in first.items() if key == last[position]}


def _embed(positions: Sequence[Hashable], shapes: Shapes, keys: Sequence[str], source: Checkpoint) -> dict[Hashable, str] | None:
    """Each position's earliest possible key after that of the position before it; a position without moments takes any key."""
    earliest: dict[Hashable, str] = {}
    left = iter(keys)
    for position in positions:
        key = next((key for key in left if shapes[position] in (None, source[key].shape)), None)
        if key is None:
            return None
        earliest[position] = key
    return earliest


def _by_shape(
    groups: Sequence[Sequence[Hashable]], shapes: Shapes, candidates: Sequence[str], source: Checkpoint
) -> dict[Hashable, str] | None:
    """Each position's key in several groups. Which parameters are in which group is not known, so all parameters of one shape must be in
    one group, in order; None otherwise."""
    owners: dict[Shape, list[tuple[int, Hashable]]] = {}
    for number, group in enumerate(groups):
        for position in group:
            shape = shapes[position]
            if shape is not None:
                owners.setdefault(shape, []).append((number, position))
    assigned: dict[Hashable, str] = {}
    for shape, owned in owners.items():
        keys = [key for key in candidates if source[key].shape == shape]
        if len({number for number, _ in owned}) != 1 or len(keys) != len(owned):
            return None
        assigned.update((position, key) for (_, position), key in zip(owned, keys, strict=True))
    order = {key: index for index, key in enumerate(candidates)}
    for group in groups:
        places = [order[assigned[position]] for position in group if position in assigned]
        if places != sorted(places):
            return None
    return assigned


def held_by_key(saved: Saved, assigned: Assigned, source: Checkpoint) -> dict[str, Mapping[str, object]]:
    """The optimizer's state by source key; a tied parameter's under each of its names. FormatError for two states of one parameter."""
    states: dict[str, Mapping[str, object]] = {}
    ties = {key: group for group in source.ties for key in group}
    for position, key in assigned.keys.items():
        for name in ties.get(key, (key,)):
            if name in states:
                raise FormatError("has two states for one tied parameter", path=source.path, key=name)
            states[name] = saved.state.get(position, {})
    return states
