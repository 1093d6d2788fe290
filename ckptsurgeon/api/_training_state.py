"""Carries training state in `transfer`: the optimizer's state, the scheduler's, the scaler's and the averaged copy.

Each is found in the source, compared with the new object and converted before the first is loaded; if anything fails, all objects are
unchanged. State that can't be carried is reported, and the weights are transferred all the same.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from io import BytesIO
from typing import TYPE_CHECKING, Any

from ckptsurgeon import formats
from ckptsurgeon.api import _opening
from ckptsurgeon.api._options import TrainingOptions
from ckptsurgeon.errors import FormatError, ModelError
from ckptsurgeon.formats.registry import named
from ckptsurgeon.models.own_loading.probe import moment_steps
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
    "the source has none for the averaged copy, which keeps its own",
    "the source has none for the averaged copy, which keeps its own; at 0 the first update copies the model over the average",
)


def without_averaged(archive: Archive) -> Archive:
    """An archive without its averaged copies, if it has other state_dicts: then the model's own weights are meant."""
    copies = training_places.average_roots([state_dict.root for state_dict in archive.state_dicts])
    rest = tuple(state_dict for state_dict in archive.state_dicts if state_dict.root not in copies)
    return replace(archive, state_dicts=rest) if rest else archive


@dataclass(frozen=True)
class BesideWeights:
    """All values in a file or in a live source, and the reader of their tensors. `whole`: it is a second file, whose value may be a single
    state itself. `found`: the paths of the states that were looked for."""

    path: str
    value: Any
    root: str
    reader: Reader
    live: bool
    whole: bool = False
    files: tuple[FileStamp, ...] = ()
    found: list[str] = field(default_factory=list)

    def tree(self, path: str, value: Any) -> tuple[Any, Callable[[TensorMeta], torch.Tensor]]:
        """A part of the values as a tree with a `TensorMeta` for each tensor, and a function that returns these tensors."""
        if not self.live:
            return value, lambda leaf: tensor_from(self.reader.read(leaf), leaf.dtype).view(leaf.shape)
        tree, tensors = training_state.live_tree(value, path)
        return tree, lambda leaf: tensors[leaf.name]


def holds_more(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint's format can hold more than the weights."""
    source_format = named(checkpoint.format)
    return source_format.pickled or source_format.holds_folder


def beside_weights(source: Given, checkpoint: Checkpoint, reader: Reader) -> BesideWeights:
    """All values of the source, the training state among them.

    Raises:
        ModelError: a module, which holds no training state.
        FormatError: a file of a format without training state.
        StaleError: the file changed since the weights' header was read.
    """
    if isinstance(source, Mapping) and not isinstance(source, Checkpoint):
        return BesideWeights("the source", source, checkpoint.root, reader, True)
    if not isinstance(source, (str, os.PathLike, BytesIO, Checkpoint)):
        raise ModelError(f"a {type(source).__name__} holds no training state", hint="give the checkpoint that training wrote")
    if not holds_more(checkpoint):
        raise FormatError(
            f"is a {checkpoint.format}, which holds no training state",
            path=checkpoint.path,
            hint="give the torch file that training wrote, or the optimizer's own file: optimizer_from='optimizer.pt'",
        )
    tree = formats.tree_of(checkpoint)
    return BesideWeights(checkpoint.path, tree.value, checkpoint.root, reader, False, files=tree.files)


def second_source(kind: training_places.Kind, source: Given, undo: ExitStack) -> BesideWeights:
    """All values of a second file or a state in memory: one state (the Trainer's `optimizer.pt`, accelerate's `optimizer.bin`), or several.

    In a folder that the Trainer or accelerate wrote, the file for this kind of state is read.

    Raises:
        ModelError: it is neither a path nor a mapping.
        FormatError, UnreadableError: the file can't be read.
    """
    if isinstance(source, Mapping) and not isinstance(source, Checkpoint):
        return BesideWeights("the state", source, "", undo.enter_context(Reader([])), True, True)
    if not isinstance(source, (str, os.PathLike, BytesIO)):
        raise ModelError(f"a {type(source).__name__} holds no training state", hint="give the file that has it, such as optimizer.pt")
    tree = formats.read_tree(held_in_memory(source) if isinstance(source, BytesIO) else _state_file(kind, os.fspath(source)))
    checkpoint = Checkpoint(tree.path, "", "", {}, files=tree.files)
    return BesideWeights(tree.path, tree.value, "", undo.enter_context(Reader([checkpoint])), False, True, tree.files)


def _state_file(kind: training_places.Kind, path: str) -> str:
    """The file for a kind of state in the folder at `path`; `path` itself if there is none."""
    files = [os.path.join(path, name) for name in training_places.FILES[kind]]
    return next((file for file in files if os.path.isfile(file)), path)


def find(kind: training_places.Kind, beside: BesideWeights, root: str | None) -> tuple[str, Any]:
    """The dotted path of a kind of state in the values, and the state; the path is "" if the file is that state itself."""
    if root is None and beside.whole and training_places.is_state(kind, beside.value):
        return "", beside.value
    place, value = training_places.find(kind, beside.value, beside.root, root, beside.path)
    beside.found.append(place)
    return place, value


def shown(beside: BesideWeights, place: str) -> str:
    """A state's dotted path for the report, with the file's path if it is in a second file."""
    return place if not beside.whole else f"{beside.path}: {place}" if place else beside.path


def load_states(
    training: TrainingOptions,
    beside_source: Callable[[], BesideWeights],
    checkpoint: Checkpoint,
    plan: Plan,
    model: nn.Module,
    undo: ExitStack,
) -> CarriedState:
    """Load the state of the optimizer, scheduler and scaler that the call has. `undo` restores all of them if a later step fails.

    Args:
        beside_source: returns all values of the source; called only if needed.

    Raises:
        RootError: an object's state is not in the source, or is there several times.
        FormatError: the optimizer's state contradicts itself.
        ModelError: the parameters of the optimizer's state can't be identified, or an object has no state to load.
    """
    carried = CarriedState()
    new_state, saved = None, None
    states: list[BesideWeights] = []
    if training.optimizer is not None:
        beside = beside_source() if training.optimizer_from is None else second_source("optimizer", training.optimizer_from, undo)
        states.append(beside)
        new_state, saved, carried = _optimizer(training, beside, checkpoint, plan, model)
    ready = []
    groups: list[dict[str, Any]] = []
    group_options: list[dict[str, Any]] = []
    for kind, receiver in (("scheduler", training.scheduler), ("scaler", training.scaler)):
        if receiver is None:
            continue
        origin = training.scheduler_from if kind == "scheduler" else None
        states.append(beside_source() if origin is None else second_source("scheduler", origin, undo))
        state = _new_state(kind, receiver, states[-1], training)
        if isinstance(state, str):
            carried = replace(carried, not_carried=(*carried.not_carried, (kind, state)))
            continue
        ready.append((receiver, state))
        carried = replace(carried, others=(*carried.others, kind))
        if kind == "scheduler" and hasattr(receiver, "optimizer"):
            group_options = training_state.scheduled_options(state, receiver.optimizer.param_groups, () if saved is None else saved.groups)
    for state_source in states if training.checksums else ():
        check_all(state_source.reader, [checkpoint])
    if new_state is not None:
        undo.enter_context(optimizer_state.loaded(training.optimizer, new_state.state_dict))
    for receiver, state in ready:
        undo.enter_context(training_state.loaded(receiver, state))
    if group_options:
        groups = training.scheduler.optimizer.param_groups  # new dicts since the optimizer was loaded
        undo.enter_context(optimizer_state.options_set(groups, group_options))
    return replace(carried, paths=tuple(path for beside in states if not beside.whole for path in beside.found))


def _optimizer(
    training: TrainingOptions, beside: BesideWeights, checkpoint: Checkpoint, plan: Plan, model: nn.Module
) -> tuple[optimizer_state.NewState | None, Saved, CarriedState]:
    parameters = optimizer_state.parameters_of(model, training.optimizer)
    place, value = find("optimizer", beside, training.optimizer_root)
    tree, fetch = beside.tree(place, value)
    steps = moment_steps(model, plan)
    live = optimizer_state.order_of(model, training.optimizer, steps, checkpoint)
    try:
        saved = read_saved(tree)
        assigned = assign(saved, checkpoint, training.optimizer_names, live)
    except FormatError as error:
        error.path, error.key = error.path or beside.path, error.key or place
        raise
    place = shown(beside, place)
    names = tuple(parameter.name for parameter in parameters)
    reason = _incompatible(optimizer_state.kind_of(training.optimizer), training.optimizer, saved)
    if reason is not None:
        return None, saved, CarriedState(place, assigned.by, zeroed=names, not_carried=((type(training.optimizer).__name__, reason),))
    states = {(0, key): state for key, state in held_by_key(saved, assigned, checkpoint).items()}
    new_state = optimizer_state.make(training.optimizer, plan_states(parameters, steps, states), fetch, _spread(model, beside, fetch))
    beside.reader.check_unchanged()
    return (
        new_state,
        saved,
        replace(account(place, saved, assigned, checkpoint, new_state.plans, new_state.notes), casts=reported(new_state.casts)),
    )


def _spread(model: nn.Module, beside: BesideWeights, fetch: Callable[[TensorMeta], torch.Tensor]) -> optimizer_state.Spread | None:
    """A function that writes values into the moments of a sharded model; None for another model."""
    if not any(map(is_sharded, model.parameters())):
        return None
    from ckptsurgeon.models.sharded.planner import spread

    def own_part(moment: torch.Tensor, value: TensorMeta | torch.Tensor) -> None:
        spread(moment, fetch(value) if beside.live and isinstance(value, TensorMeta) else value, beside.reader)

    return own_part


def _incompatible(kind: str | None, optimizer: Any, saved: Saved) -> str | None:
    """Why the new optimizer can't take the source's state; None if it can."""
    if kind is None:
        return f"is none of {', '.join(SLOTS)}: it is unchanged"
    if saved.state and saved.by_bitsandbytes != (kind == BITSANDBYTES):
        state_kind = "8-bit codes of bitsandbytes" if saved.by_bitsandbytes else "none of bitsandbytes"
        return f"the source's state is {state_kind}, which this optimizer can't take; it is unchanged"
    if kind == BITSANDBYTES:
        return None
    if saved.groups and not all(MARKS[kind] in group for group in saved.groups):
        return f"the source's groups have no {MARKS[kind]!r}, so its optimizer was of another kind; this one is unchanged"
    return None


def account(
    place: str, saved: Saved, assigned: Assigned, checkpoint: Checkpoint, plans: Sequence[ParameterPlan], notes: Sequence[tuple[str, str]]
) -> CarriedState:
    """The outcome for each parameter's state, and for the rest of the source's state."""
    rows = [(parameter_plan.parameter.name, parameter_plan.reason) for parameter_plan in plans if parameter_plan.reason is not None]
    return CarriedState(
        place=place,
        by=assigned.by,
        carried=tuple(
            parameter_plan.parameter.name for parameter_plan in plans if parameter_plan.reason is None and not parameter_plan.adapted
        ),
        adapted=tuple(
            parameter_plan.parameter.name for parameter_plan in plans if parameter_plan.reason is None and parameter_plan.adapted
        ),
        zeroed=tuple(name for name, _ in rows),
        not_carried=(*rows, *notes, *not_carried(saved, assigned, checkpoint, plans)),
    )


def not_carried(saved: Saved, assigned: Assigned, checkpoint: Checkpoint, plans: Sequence[ParameterPlan]) -> list[tuple[str, str]]:
    """The parts of the source's state that are not carried, with the reasons."""
    used = {key for plan in plans if plan.reason is None for _, key in plan.sources}
    reported = {key for plan in plans if plan.reason is not None for _, key in plan.sources}
    ties = {key: set(group) for group in checkpoint.ties for key in group}
    rows = []
    for position, state in saved.state.items():
        if all(value is None for value in state.values()):
            continue
        key = assigned.keys.get(position)
        if key is None:
            rows.append((f"position {str(position)[:60]} of the source", "it belongs to no parameter in the source's state_dict"))
        elif not ties.get(key, {key}) & (used | reported):
            rows.append((f"{key} of the source", "its parameter is not used"))
    slot_names = {slot.slot.name for plan in plans for slot in plan.slots}
    unused = dict.fromkeys(
        name for state in saved.state.values() for name, value in state.items() if value is not None and name not in slot_names
    )
    if slot_names:
        rows += [(name, "the new optimizer does not keep it") for name in unused]
    return rows


def _new_state(kind: Any, receiver: Any, beside: BesideWeights, training: TrainingOptions) -> dict[str, Any] | str:
    """A scheduler's or scaler's new state, or the reason why there is none."""
    if not callable(getattr(receiver, "state_dict", None)) or not callable(getattr(receiver, "load_state_dict", None)):
        raise ModelError(f"a {type(receiver).__name__} is no {kind}: it has no state_dict")
    optimizer = getattr(receiver, "optimizer", None)
    if kind == "scheduler" and training.optimizer is not None and optimizer is not None and optimizer is not training.optimizer:
        raise ModelError("the scheduler belongs to another optimizer", hint="build it with the new optimizer")
    place, value = find(kind, beside, None)
    tree, fetch = beside.tree(place, value)
    own_state = training_state.own_state(receiver)
    if not own_state:
        return "the new object is not enabled, and has no state"
    groups = len(optimizer.param_groups) if optimizer is not None and kind == "scheduler" else None
    return training_state.fitted(own_state, tree, fetch, groups)


@dataclass(frozen=True)
class Averaged:
    """The transfer into the averaged copy `model`: from `source`, under `root`, without the keys `left_out`.

    `buffers` are the wrapper's own, such as `n_averaged`. For each buffer that the source has, `values` has a function that returns its
    value. `paths` are those that it takes of the source.
    """

    source: Given
    model: nn.Module
    root: str
    left_out: tuple[str, ...]
    buffers: Mapping[str, torch.Tensor]
    values: Mapping[str, Callable[[], torch.Tensor]]
    paths: tuple[str, ...]

    def finish(self, carried: CarriedState, report: Report) -> CarriedState:
        """Copy the wrapper's own buffers, and return `carried` with the averaged copy's report."""
        import torch

        for name, value in self.values.items():
            with torch.no_grad():
                self.buffers[name].copy_(value())
        kept = replace(report, dropped=tuple(row for row in report.dropped if row[0] not in self.values))
        missing = tuple((name, _STAYS[name == "n_averaged"]) for name in self.buffers if name not in self.values)
        not_carried, paths = (*carried.not_carried, *missing), (*carried.paths, *self.paths)
        return replace(carried, others=(*carried.others, "ema"), ema=kept, not_carried=not_carried, paths=paths)


def find_averaged(training: TrainingOptions, source: Given, beside_source: Callable[[], BesideWeights], undo: ExitStack) -> Averaged:
    """Find what to transfer into the averaged copy. `undo` restores the copy if a later step fails.

    Raises:
        RootError: the source has no averaged copy, or several.
        ModelError: `ema` neither is nor holds a model.
    """
    beside = beside_source()
    model, buffers = ema.averaged_model(training.ema), ema.wrapper_buffers(training.ema)
    if beside.live:
        assert isinstance(source, Mapping)
        roots = ema.live_roots(source).state_dicts
    else:
        source = source.path if isinstance(source, Checkpoint) else source
        assert isinstance(source, (str, os.PathLike))
        roots = _opening.read(source).state_dicts
    root = training_places.choose_average_root([state_dict.root for state_dict in roots], training.ema_root, beside.path)
    chosen = next((state_dict for state_dict in roots if state_dict.root == root), None)
    buffers_root = (
        training_places.AVERAGING_STATE if root == training_places.lightning_average([state_dict.root for state_dict in roots]) else root
    )
    found_buffers = {
        name: (state_dict.root, meta)
        for state_dict in roots
        if state_dict is chosen or state_dict.root == buffers_root
        for name, meta in state_dict.tensors.items()
        if name in buffers and meta.shape == tuple(buffers[name].shape)
    }
    undo.enter_context(ema.restored(model, buffers))
    left_out = () if chosen is None else tuple(name for name in found_buffers if name in chosen.tensors)

    def value(name: str, root_of_buffer: str, meta: TensorMeta) -> torch.Tensor:
        live_buffers: Any = at_root(source, root_of_buffer) if beside.live else {}
        return live_buffers[name] if beside.live else tensor_from(beside.reader.read(meta), meta.dtype).view(meta.shape)

    values = {name: partial(value, name, root_of_buffer, meta) for name, (root_of_buffer, meta) in found_buffers.items()}
    return Averaged(source, model, root, left_out, buffers, values, (root, *(place for place, _ in found_buffers.values())))
