"""`merge --with-optimizer`: converts the source's optimizer state to the target's parameters, to be written beside the merged weights.

Plain entries of the training checkpoint (epochs, the schedule, the scaler) are written too. Tensors stay in the file and are streamed;
only step counts are read here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ckptsurgeon.api import _training_state
from ckptsurgeon.api._opening import Target
from ckptsurgeon.api._options import TrainingOptions
from ckptsurgeon.dtypes import BY_TORCH
from ckptsurgeon.errors import FormatError, PlanError, TargetError
from ckptsurgeon.formats.layout import WEIGHTS
from ckptsurgeon.models.own_loading.probe import moment_steps
from ckptsurgeon.models.target.parameters import named
from ckptsurgeon.models.training import optimizer_state
from ckptsurgeon.optimizer.assign import ON_THE_COMMAND_LINE, assign, held_by_key
from ckptsurgeon.optimizer.format import read_saved
from ckptsurgeon.optimizer.merge import is_plain, kind_of, merge_state, slots_of
from ckptsurgeon.optimizer.plan import Parameter
from ckptsurgeon.planning.plan import Plan
from ckptsurgeon.report import CarriedState
from ckptsurgeon.streaming.apply import Training
from ckptsurgeon.streaming.checksums import check_all
from ckptsurgeon.streaming.reading import Reader
from ckptsurgeon.tensors import Checkpoint

if TYPE_CHECKING:
    from torch import nn


def training(
    plan: Plan,
    sources: Sequence[Checkpoint],
    target: Target | None,
    options: TrainingOptions,
    checksums: bool,
) -> tuple[Training, CarriedState]:
    """The training state to write around the weights, and the outcome for the source's state.

    Args:
        checksums: compare all that is read here with its file's checksums. The moments are read later, when they are written.

    Raises:
        PlanError: several sources; an optimizer of an unknown kind.
        TargetError: the target is no model, so its parameters are unknown.
        RootError, ModelError, FormatError: as for `transfer` with an optimizer.
    """
    if len(sources) != 1:
        raise PlanError("an optimizer's state is carried from one source only", hint="merge without --with-optimizer")
    if target is None or target.build_meta is None:
        raise TargetError("only a model says which keys are parameters", hint="give module:Net as the target")
    source, optimizer_file = sources[0], options.optimizer_from
    model = target.build_meta()
    steps = moment_steps(model, plan)
    with Reader([source]) as reader, ExitStack() as opened:
        weights = (
            _training_state.beside_weights(source, source, reader) if optimizer_file is None or _training_state.holds_more(source) else None
        )
        beside = weights if optimizer_file is None else _training_state.second_source("optimizer", optimizer_file, opened)
        assert beside is not None
        place, value = _training_state.find("optimizer", beside, options.optimizer_root)
        tree, fetch = beside.tree(place, value)
        try:
            saved = read_saved(tree)
            assigned = assign(
                saved, source, options.optimizer_names, optimizer_state.order_of(model, None, steps, source), ON_THE_COMMAND_LINE
            )
            slots = slots_of(saved, kind_of(saved))
            parameters = _parameters(model, slots, steps)
            states = held_by_key(saved, assigned, source)
            state = merge_state(
                saved, assigned, states, parameters, steps, frozenset(steps), 1, lambda leaf: optimizer_state.count_of(leaf, fetch)
            )
        except FormatError as error:
            error.path, error.key = error.path or beside.path, error.key or place
            raise
        beside.reader.check_unchanged()
        if checksums:
            check_all(beside.reader, [source])
    around, plain = _around(None if weights is None else weights.value, source.root, place or "optimizer", state.value)
    carried = replace(
        _training_state.account(_training_state.shown(beside, place), saved, assigned, source, state.plans, state.notes),
        others=plain,
        paths=(*plain, *([] if beside.whole else [place])),
    )
    moments = Checkpoint(beside.path, "torch", "", state.leaves, files=beside.files)
    return Training(around, state.steps, moments), carried


def _parameters(model: nn.Module, slots: Any, steps: Mapping[str, Any]) -> list[Parameter]:
    parameters = []
    for name, parameter in named(model).items():
        planned_dtype = next((steps[key].dtype for key in parameter.keys if key in steps), None)
        dtype = planned_dtype or BY_TORCH[str(parameter.tensor.dtype).removeprefix("torch.")].code
        parameters.append(Parameter(name, parameter.keys, dtype, tuple(parameter.tensor.shape), slots))
    return parameters


def _around(value: Any, root: str, place: str, state: Mapping[str, Any]) -> tuple[dict[Any, Any], tuple[str, ...]]:
    """The training checkpoint, with weights and state at the source's paths and with its plain entries; and the names of these entries."""
    around: dict[Any, Any] = {}
    replaced = {(root or "model").partition(".")[0], place.partition(".")[0]}
    plain = []
    for key, entry in value.items() if isinstance(value, Mapping) and root else ():
        if str(key) not in replaced and type(key) in (str, int) and is_plain(entry):
            around[key] = entry
            plain.append(str(key))
    for dotted, content in ((root or "model", WEIGHTS), (place, dict(state))):
        _put(around, dotted, content)
    return around, tuple(plain)


def _put(tree: dict[Any, Any], path: str, value: Any) -> None:
    """Set a value at a dotted path; a number as the last segment makes a list with only this value."""
    name, _, rest = path.partition(".")
    if not rest:
        tree[name] = value
    elif rest.isdecimal():
        tree[name] = [value]
    else:
        inner = tree.setdefault(name, {})
        _put(inner, rest, value)
