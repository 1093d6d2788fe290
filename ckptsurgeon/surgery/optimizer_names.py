"""Gives an optimizer's positions the names of their parameters: by the names at hand, or by the model's order.

By order there must be one assignment alone: in one group the parameters are taken in the state_dict's order, of several groups each shape
may stand in one group only. Every moment's shape is held against its parameter's. What is not unique is refused; no best fit is taken.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from ckptsurgeon.dtypes import BY_CODE
from ckptsurgeon.errors import FormatError, ModelError
from ckptsurgeon.surgery.adapters.op import Shape
from ckptsurgeon.surgery.items import shortened
from ckptsurgeon.surgery.optimizer_saved import Saved
from ckptsurgeon.tensors import Checkpoint

# The buffers of torch's norms; others are told by their dtype, or by not fitting.
BUFFERS = frozenset({"running_mean", "running_var", "num_batches_tracked"})
_WRAPPERS = ("module.", "_orig_mod.", "model.")
_HINT = "give the names in the optimizer's order: optimizer_names=[name for name, _ in source_model.named_parameters()]"


@dataclass(frozen=True)
class Assigned:
    """The source's key of each position that has one, and what told it: `names` or `order`."""

    keys: Mapping[Hashable, str]
    by: Literal["names", "order"]


def assign(saved: Saved, source: Checkpoint, names: Sequence[str] | None = None) -> Assigned:
    """Whose each position is.

    Args:
        names: the parameters' names in the optimizer's order, before those that the file has.

    Raises:
        ModelError: names that are not the source's, or too few; without names, an order that does not fit or is not the only one.
        FormatError: moments of unlike shapes.
    """
    given = saved.names if names is None else tuple(names)
    keys = _by_order(saved, source) if given is None else _by_names(saved, source, given)
    wrong = []
    for position, key in keys.items():
        shape = saved.shape_of(position)
        if shape is not None and shape != source[key].shape:
            wrong.append(f"{key}: its moments are {shape}, and it is {source[key].shape}")
    if wrong:
        raise ModelError(
            "the optimizer's moments are not those of these parameters", path=source.path, problems=shortened(wrong), hint=_HINT
        )
    return Assigned(keys, "order" if given is None else "names")


def _by_names(saved: Saved, source: Checkpoint, names: tuple[str, ...]) -> dict[Hashable, str]:
    flat = saved.flat
    if len(names) != len(flat) or not all(type(name) is str for name in names) or len(set(names)) != len(names):
        raise ModelError(f"{len(names)} names are no names for the optimizer's {len(flat)} parameters", path=source.path, hint=_HINT)
    best: dict[str, str] = {}
    rivals = 0
    for found in _spellings(names, source):
        if len(found) > len(best):
            best, rivals = found, 0
        elif found != best and len(found) == len(best):
            rivals += 1
    if len(best) < len(names) and rivals:
        raise ModelError("the optimizer's names can be read in several ways", path=source.path, key=names[0], hint=_HINT)
    if names and not best:
        raise ModelError("none of the optimizer's names is a key of the source", path=source.path, key=names[0], hint=_HINT)
    return {position: best[name] for position, name in zip(flat, names, strict=True) if name in best}


def _spellings(names: tuple[str, ...], source: Checkpoint) -> Iterable[dict[str, str]]:
    """Names to keys: as they are, then, unless all are, below each prefix that the keys may have, and without a wrapper's."""
    plain = {name: name for name in names if name in source}
    yield plain
    if len(plain) == len(names) or not names:
        return
    last = f".{names[0]}"
    for prefix in dict.fromkeys(key[: -len(names[0])] for key in source if key.endswith(last)):
        yield {name: prefix + name for name in names if prefix + name in source}
    for wrapper in _WRAPPERS:
        yield {name: name[len(wrapper) :] for name in names if name.startswith(wrapper) and name[len(wrapper) :] in source}


def _by_order(saved: Saved, source: Checkpoint) -> dict[Hashable, str]:
    later = {key for group in source.ties for key in group[1:]}
    candidates = [
        key
        for key, tensor in source.items()
        if key not in later and key.rpartition(".")[2] not in BUFFERS and BY_CODE[tensor.dtype].kind in ("float", "complex")
    ]
    shapes = {position: saved.shape_of(position) for position in saved.flat}
    groups = [group for group in saved.positions if group]
    one = len(groups) == 1
    found = _in_order(groups[0], shapes, candidates, source) if one else _by_shape(groups, shapes, candidates, source)
    if found is None:
        count = f"{len(saved.flat)} parameters in {len(groups)} group{'s' if len(groups) != 1 else ''}"
        raise ModelError(
            f"the optimizer stores {count} without names, and they can be the source's {len(candidates)} in no way, or in several",
            path=source.path,
            hint=_HINT,
        )
    return found


def _in_order(
    positions: Sequence[Hashable], shapes: Mapping[Hashable, Shape | None], candidates: Sequence[str], source: Checkpoint
) -> dict[Hashable, str] | None:
    """One group: the candidates in order, some left out. The first way and the last way to do so must be one, where there is state."""
    first = _embed(positions, shapes, candidates, source)
    last = _embed(positions[::-1], shapes, candidates[::-1], source)
    if first is None or last is None or any(shapes[position] is not None and first[position] != last[position] for position in positions):
        return None
    return {position: key for position, key in first.items() if key == last[position]}


def _embed(
    positions: Sequence[Hashable], shapes: Mapping[Hashable, Shape | None], candidates: Sequence[str], source: Checkpoint
) -> dict[Hashable, str] | None:
    """Each position's earliest candidate after the one before it; one without moments takes any."""
    found: dict[Hashable, str] = {}
    left = iter(candidates)
    for position in positions:
        key = next((key for key in left if shapes[position] in (None, source[key].shape)), None)
        if key is None:
            return None
        found[position] = key
    return found


def _by_shape(
    groups: Sequence[Sequence[Hashable]], shapes: Mapping[Hashable, Shape | None], candidates: Sequence[str], source: Checkpoint
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
