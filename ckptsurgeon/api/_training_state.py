"""Resumes a training: the optimizer's state, the schedule, the scaler and the averaged copy go where the weights went, or nothing does.

Each is found in the source, held against the new object and made ready before the first is loaded; when anything fails, all have what they
had. What can't be carried is told, and never stops the weights.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from io import BytesIO
from typing import TYPE_CHECKING, Any

from ckptsurgeon import formats
from ckptsurgeon.api import _opening
from ckptsurgeon.api._options import TrainingOptions
from ckptsurgeon.errors import FormatError, ModelError
from ckptsurgeon.formats.registry import named
from ckptsurgeon.models.target.sharding import is_sharded
from ckptsurgeon.models.training import ema, optimizer_state, training_state
from ckptsurgeon.models.verify.official import at_root
from ckptsurgeon.optimizer.assign import Assigned, assign, held_by_key
from ckptsurgeon.optimizer.format import BITSANDBYTES, MARKS, SLOTS, Saved, read_saved
from ckptsurgeon.optimizer.plan import ParameterPlan, plan_states
from ckptsurgeon.parameter_types import Given
from ckptsurgeon.planning import training_places
from ckptsurgeon.planning.plan import Plan
from ckptsurgeon.report import CarriedState, Report
from ckptsurgeon.storage.memory import file_in_memory as held_in_memory
from ckptsurgeon.streaming.checksums import check_all
from ckptsurgeon.streaming.reading import Reader
from ckptsurgeon.streaming.values import reported, tensor_from
from ckptsurgeon.tensors import Archive, Checkpoint, FileStamp, TensorMeta

if TYPE_CHECKING:
    import torch
    from torch import nn


_STAYS = (
    "the source has none for the averaged copy, where it stays as it was",
    "the source has none for the averaged copy, where it stays as it was; at 0 the first update copies the model over the average",
)


def without_averaged(found: Archive) -> Archive:
    """An archive without its averaged copies, where it has others: the model's own weights are meant."""
    copies = training_places.average_roots([one.root for one in found.state_dicts])
    rest = tuple(one for one in found.state_dicts if one.root not in copies)
    return replace(found, state_dicts=rest) if rest else found


@dataclass(frozen=True)
class BesideWeights:
    """All that a file or a live source holds, as a tree or live, and how a tensor of it is had. `whole`: it may be a state itself."""

    path: str
    value: Any
    root: str
    reader: Reader
    live: bool
    whole: bool = False
    files: tuple[FileStamp, ...] = ()

    def tree(self, place: str, found: Any) -> tuple[Any, Callable[[TensorMeta], torch.Tensor]]:
        """One part of it with a `TensorMeta` for each tensor, and what gives these tensors."""
        if not self.live:
            return found, lambda leaf: tensor_from(self.reader.read(leaf), leaf.dtype).view(leaf.shape)
        tree, tensors = training_state.live_tree(found, place)
        return tree, lambda leaf: tensors[leaf.name]


def holds_more(given: Checkpoint) -> bool:
    """Whether a checkpoint's file may hold more than the weights."""
    form = named(given.format)
    return form.pickled or form.holds_folder


def beside_weights(source: Given, given: Checkpoint, reader: Reader) -> BesideWeights:
    """What stands beside the weights in the source.

    Raises:
        ModelError: a module, which holds no training state.
        FormatError: a file of a format that holds none.
        StaleError: the file changed since the weights' header was read.
    """
    if isinstance(source, Mapping) and not isinstance(source, Checkpoint):
        return BesideWeights("the source", source, given.root, reader, True)
    if not isinstance(source, (str, os.PathLike, BytesIO, Checkpoint)):
        raise ModelError(f"a {type(source).__name__} holds no training state", hint="give the checkpoint that training wrote")
    if not holds_more(given):
        raise FormatError(
            f"is a {given.format}, which holds no training state",
            path=given.path,
            hint="give the torch file that training wrote, or the optimizer's own file: optimizer_from='optimizer.pt'",
        )
    tree = formats.tree_of(given)
    return BesideWeights(given.path, tree.value, given.root, reader, False, files=tree.files)


def apart(kind: training_places.Kind, source: Given, undo: ExitStack) -> BesideWeights:
    """What a second file holds, or a live state: a state by itself (the Trainer's `optimizer.pt`, accelerate's `optimizer.bin`), or one
    beside others. Of a folder that these wrote, the file of this kind.

    Raises:
        ModelError: it is neither.
        FormatError, UnreadableError: as the reader's.
    """
    if isinstance(source, Mapping) and not isinstance(source, Checkpoint):
        return BesideWeights("the state", source, "", undo.enter_context(Reader([])), True, True)
    if not isinstance(source, (str, os.PathLike, BytesIO)):
        raise ModelError(f"a {type(source).__name__} holds no training state", hint="give the file that has it, such as optimizer.pt")
    tree = formats.read_tree(held_in_memory(source) if isinstance(source, BytesIO) else _state_file(kind, os.fspath(source)))
    held = Checkpoint(tree.path, "", "", {}, files=tree.files)
    return BesideWeights(tree.path, tree.value, "", undo.enter_context(Reader([held])), False, True, tree.files)


def _state_file(kind: training_places.Kind, path: str) -> str:
    """The file of a kind of state, where a path is the folder that has it; else the path."""
    files = [os.path.join(path, name) for name in training_places.FILES[kind]]
    return next((one for one in files if os.path.isfile(one)), path)


def find(kind: training_places.Kind, found: BesideWeights, asked: str | None) -> tuple[str, Any]:
    """Where a kind of state stands, and it itself; a file that is one by itself is named by its path."""
    if asked is None and found.whole and training_places.is_state(kind, found.value):
        return "", found.value
    return training_places.find(kind, found.value, found.root, asked, found.path)


def shown(found: BesideWeights, place: str) -> str:
    """A state's place as the report names it: with its file, where this is a second one."""
    return place if not found.whole else f"{found.path}: {place}" if place else found.path


def give(
    asked: TrainingOptions,
    around: Callable[[], BesideWeights],
    given: Checkpoint,
    plan: Plan,
    model: nn.Module,
    undo: ExitStack,
) -> CarriedState:
    """Carry what is asked for, but for the averaged copy (`find_averaged`). What fails within `undo` is put back as it was.

    Args:
        around: what stands beside the weights; called only where something of it is asked for.

    Raises:
        RootError: a state that is asked for is not in the source, or could be several.
        FormatError: the optimizer's state contradicts itself.
        ModelError: whose the optimizer's positions are can't be told, or an object that takes none.
    """
    carried = CarriedState()
    made, saved = None, None
    read: list[BesideWeights] = []
    if asked.optimizer is not None:
        found = around() if asked.optimizer_from is None else apart("optimizer", asked.optimizer_from, undo)
        read.append(found)
        made, saved, carried = _optimizer(asked, found, given, plan, model)
    ready = []
    groups: list[dict[str, Any]] = []
    driven: list[dict[str, Any]] = []
    for kind, taker in (("scheduler", asked.scheduler), ("scaler", asked.scaler)):
        if taker is None:
            continue
        origin = asked.scheduler_from if kind == "scheduler" else None
        read.append(around() if origin is None else apart("scheduler", origin, undo))
        state = _other(kind, taker, read[-1], asked)
        if isinstance(state, str):
            carried = replace(carried, not_carried=(*carried.not_carried, (kind, state)))
            continue
        ready.append((taker, state))
        carried = replace(carried, others=(*carried.others, kind))
        if kind == "scheduler" and hasattr(taker, "optimizer"):
            driven = training_state.driven(state, taker.optimizer.param_groups, () if saved is None else saved.groups)
    for one in read if asked.checksums else ():
        check_all(one.reader, [given])
    if made is not None:
        undo.enter_context(optimizer_state.loaded(asked.optimizer, made.state_dict))
    for taker, state in ready:
        undo.enter_context(training_state.loaded(taker, state))
    if driven:
        groups = asked.scheduler.optimizer.param_groups  # new dicts since the optimizer was loaded
        undo.enter_context(optimizer_state.driving(groups, driven))
    return carried


def _optimizer(
    asked: TrainingOptions, found: BesideWeights, given: Checkpoint, plan: Plan, model: nn.Module
) -> tuple[optimizer_state.Made | None, Saved, CarriedState]:
    parameters = optimizer_state.parameters_of(model, asked.optimizer)
    place, value = find("optimizer", found, asked.optimizer_root)
    tree, fetch = found.tree(place, value)
    steps = {step.target: step for step in plan.steps}
    live = optimizer_state.order_of(model, asked.optimizer, steps, given)
    try:
        saved = read_saved(tree)
        assigned = assign(saved, given, asked.optimizer_names, live)
    except FormatError as error:
        error.path, error.key = error.path or found.path, error.key or place
        raise
    place = shown(found, place)
    every = tuple(parameter.name for parameter in parameters)
    reason = _other_kind(optimizer_state.kind_of(asked.optimizer), asked.optimizer, saved)
    if reason is not None:
        return None, saved, CarriedState(place, assigned.by, zeroed=every, not_carried=((type(asked.optimizer).__name__, reason),))
    held = {(0, key): state for key, state in held_by_key(saved, assigned, given).items()}
    made = optimizer_state.make(asked.optimizer, plan_states(parameters, steps, held), fetch, _spread(model, found, fetch))
    found.reader.check_unchanged()
    return made, saved, replace(account(place, saved, assigned, given, made.plans, made.notes), casts=reported(made.casts))


def _spread(model: nn.Module, found: BesideWeights, fetch: Callable[[TensorMeta], torch.Tensor]) -> optimizer_state.Spread | None:
    """What gives a sharded model's moments their values; None for another model."""
    if not any(map(is_sharded, model.parameters())):
        return None
    from ckptsurgeon.models.sharded.planner import spread

    def own_part(into: torch.Tensor, value: TensorMeta | torch.Tensor) -> None:
        spread(into, fetch(value) if found.live and isinstance(value, TensorMeta) else value, found.reader)

    return own_part


def _other_kind(kind: str | None, optimizer: Any, saved: Saved) -> str | None:
    """Why nothing of the source's optimizer is any good to the new one; None where it is."""
    if kind is None:
        return f"is none of {', '.join(SLOTS)}: it was left as it is"
    if saved.state and saved.by_bitsandbytes != (kind == BITSANDBYTES):
        other = "8-bit codes of bitsandbytes" if saved.by_bitsandbytes else "none of bitsandbytes"
        return f"the source's state is {other}, which this optimizer can't take; it was left as it is"
    if kind == BITSANDBYTES:
        return None
    if saved.groups and not all(MARKS[kind] in group for group in saved.groups):
        return f"the source's groups have no {MARKS[kind]!r}, so that its optimizer was none such; this one was left as it is"
    return None


def account(
    place: str, saved: Saved, assigned: Assigned, given: Checkpoint, plans: Sequence[ParameterPlan], notes: Sequence[tuple[str, str]]
) -> CarriedState:
    """What became of each parameter's state, and of what the source has beside."""
    rows = [(one.parameter.name, one.reason) for one in plans if one.reason is not None]
    return CarriedState(
        place=place,
        by=assigned.by,
        carried=tuple(one.parameter.name for one in plans if one.reason is None and not one.adapted),
        adapted=tuple(one.parameter.name for one in plans if one.reason is None and one.adapted),
        zeroed=tuple(name for name, _ in rows),
        not_carried=(*rows, *notes, *left(saved, assigned, given, plans)),
    )


def left(saved: Saved, assigned: Assigned, given: Checkpoint, plans: Sequence[ParameterPlan]) -> list[tuple[str, str]]:
    """What of the source's state goes nowhere."""
    used = {key for plan in plans if plan.reason is None for _, key in plan.sources}
    told = {key for plan in plans if plan.reason is not None for _, key in plan.sources}
    ties = {key: set(group) for group in given.ties for key in group}
    rows = []
    for position, state in saved.state.items():
        if all(value is None for value in state.values()):
            continue
        key = assigned.keys.get(position)
        if key is None:
            rows.append((f"position {str(position)[:60]} of the source", "it is no parameter of the source's state_dict"))
        elif not ties.get(key, {key}) & (used | told):
            rows.append((f"{key} of the source", "its parameter goes nowhere"))
    kept = {slot.slot.name for plan in plans for slot in plan.slots}
    more = dict.fromkeys(name for state in saved.state.values() for name, value in state.items() if value is not None and name not in kept)
    if kept:
        rows += [(name, "the new optimizer does not keep it") for name in more]
    return rows


def _other(kind: Any, taker: Any, found: BesideWeights, asked: TrainingOptions) -> dict[str, Any] | str:
    """A scheduler's or scaler's new state, or why it can't have one."""
    if not callable(getattr(taker, "state_dict", None)) or not callable(getattr(taker, "load_state_dict", None)):
        raise ModelError(f"a {type(taker).__name__} is no {kind}: it has no state_dict")
    optimizer = getattr(taker, "optimizer", None)
    if kind == "scheduler" and asked.optimizer is not None and optimizer is not None and optimizer is not asked.optimizer:
        raise ModelError("the scheduler drives another optimizer than the one given", hint="make it from the new optimizer")
    place, value = find(kind, found, None)
    tree, fetch = found.tree(place, value)
    own = training_state.own_state(taker)
    if not own:
        return "the new one is not enabled, and keeps no state"
    groups = len(optimizer.param_groups) if optimizer is not None and kind == "scheduler" else None
    return training_state.fitted(own, tree, fetch, groups)


@dataclass(frozen=True)
class Averaged:
    """What the averaged copy `model` takes, by a transfer of its own: from `source`, under `root`, without the keys `left_out`.

    `buffers` are its wrapper's own, such as `n_averaged`; `values` those of them that the source has, each with what gives it.
    """

    source: Given
    model: nn.Module
    root: str
    left_out: tuple[str, ...]
    buffers: Mapping[str, torch.Tensor]
    values: Mapping[str, Callable[[], torch.Tensor]]

    def told(self, carried: CarriedState, report: Report) -> CarriedState:
        """Copy the wrapper's own buffers, and add the copy's report to what was carried."""
        import torch

        for name, value in self.values.items():
            with torch.no_grad():
                self.buffers[name].copy_(value())
        kept = replace(report, dropped=tuple(row for row in report.dropped if row[0] not in self.values))
        missing = tuple((name, _STAYS[name == "n_averaged"]) for name in self.buffers if name not in self.values)
        return replace(carried, others=(*carried.others, "ema"), ema=kept, not_carried=(*carried.not_carried, *missing))


def find_averaged(asked: TrainingOptions, source: Given, around: Callable[[], BesideWeights], undo: ExitStack) -> Averaged:
    """What goes into the averaged copy. When what is done until `undo` ends fails, the copy holds what it held.

    Raises:
        RootError: the source has no averaged copy, or several.
        ModelError: `ema` is neither a model nor keeps one.
    """
    found = around()
    model, buffers = ema.inner(asked.ema), ema.own_buffers(asked.ema)
    if found.live:
        assert isinstance(source, Mapping)
        roots = ema.live_roots(source).state_dicts
    else:
        source = source.path if isinstance(source, Checkpoint) else source
        assert isinstance(source, (str, os.PathLike))
        roots = _opening.read(source).state_dicts
    root = training_places.choose_average_root([one.root for one in roots], asked.ema_root, found.path)
    chosen = next((one for one in roots if one.root == root), None)
    counts = training_places.AVERAGING_STATE if root == training_places.lightning_average([one.root for one in roots]) else root
    ours = {
        name: (one.root, meta)
        for one in roots
        if one is chosen or one.root == counts
        for name, meta in one.tensors.items()
        if name in buffers and meta.shape == tuple(buffers[name].shape)
    }
    undo.enter_context(ema.restored(model, buffers))
    left_out = () if chosen is None else tuple(name for name in ours if name in chosen.tensors)

    def value(name: str, place: str, meta: TensorMeta) -> torch.Tensor:
        lives: Any = at_root(source, place) if found.live else {}
        return lives[name] if found.live else tensor_from(found.reader.read(meta), meta.dtype).view(meta.shape)

    values = {name: partial(value, name, place, meta) for name, (place, meta) in ours.items()}
    return Averaged(source, model, root, left_out, buffers, values)
