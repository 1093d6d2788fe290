"""`merge --with-optimizer`: the optimizer's state of the source, made that of the target, to be written around the merged weights.

What else the training checkpoint holds is written along where it is plain: epochs, the schedule, the scaler. Tensors stay in the file and
are streamed; only step counts are read here.
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
    made: Plan,
    found: Sequence[Checkpoint],
    goal: Target | None,
    options: TrainingOptions,
    checksums: bool,
) -> tuple[Training, CarriedState]:
    """What is to be written around the weights, and what becomes of the source's state.

    Args:
        checksums: hold what is read here against the checksums that its file keeps. The moments are read later, when they are written.

    Raises:
        PlanError: several sources; an optimizer that is of no kind we know.
        TargetError: no model as the target, so that no one knows its parameters.
        RootError, ModelError, FormatError: as for `transfer` with an optimizer.
    """
    if len(found) != 1:
        raise PlanError("an optimizer's state is carried from one source only", hint="merge without --with-optimizer")
    if goal is None or goal.build_meta is None:
        raise TargetError("only a model says which keys are parameters", hint="give module:Net as the target")
    given, second = found[0], options.optimizer_from
    model = goal.build_meta()
    steps = {step.target: step for step in made.steps}
    with Reader([given]) as reader, ExitStack() as opened:
        weights = _training_state.beside_weights(given, given, reader) if second is None or _training_state.holds_more(given) else None
        beside = weights if second is None else _training_state.apart("optimizer", second, opened)
        assert beside is not None
        place, value = _training_state.find("optimizer", beside, options.optimizer_root)
        tree, fetch = beside.tree(place, value)
        try:
            saved = read_saved(tree)
            assigned = assign(
                saved, given, options.optimizer_names, optimizer_state.order_of(model, None, steps, given), ON_THE_COMMAND_LINE
            )
            slots = slots_of(saved, kind_of(saved))
            parameters = _parameters(model, slots, steps)
            held = held_by_key(saved, assigned, given)
            state = merge_state(
                saved, assigned, held, parameters, steps, frozenset(steps), 1, lambda leaf: optimizer_state.count_of(leaf, fetch)
            )
        except FormatError as error:
            error.path, error.key = error.path or beside.path, error.key or place
            raise
        beside.reader.check_unchanged()
        if checksums:
            check_all(beside.reader, [given])
    around, others = _around(None if weights is None else weights.value, given.root, place or "optimizer", state.value)
    carried = replace(
        _training_state.account(_training_state.shown(beside, place), saved, assigned, given, state.plans, state.notes), others=others
    )
    source = Checkpoint(beside.path, "torch", "", state.leaves, files=beside.files)
    return Training(around, state.steps, source), carried


def _parameters(model: nn.Module, slots: Any, steps: Mapping[str, Any]) -> list[Parameter]:
    found = []
    for name, one in named(model).items():
        own = next((steps[key].dtype for key in one.keys if key in steps), None)
        dtype = own or BY_TORCH[str(one.tensor.dtype).removeprefix("torch.")].code
        found.append(Parameter(name, one.keys, dtype, tuple(one.tensor.shape), slots))
    return found


def _around(value: Any, root: str, place: str, state: Mapping[str, Any]) -> tuple[dict[Any, Any], tuple[str, ...]]:
    """The training checkpoint: weights and state where they stood, and beside them what is plain."""
    around: dict[Any, Any] = {}
    ours = {(root or "model").partition(".")[0], place.partition(".")[0]}
    others = []
    for name, one in value.items() if isinstance(value, Mapping) and root else ():
        if str(name) not in ours and type(name) in (str, int) and is_plain(one):
            around[name] = one
            others.append(str(name))
    for where, what in ((root or "model", WEIGHTS), (place, dict(state))):
        _put(around, where, what)
    return around, tuple(others)


def _put(around: dict[Any, Any], place: str, value: Any) -> None:
    """Set a value at a dotted place; a number counts in a list, which has this one member alone."""
    name, _, rest = place.partition(".")
    if not rest:
        around[name] = value
    elif rest.isdecimal():
        around[name] = [value]
    else:
        inner = around.setdefault(name, {})
        _put(inner, rest, value)
