"""Loads values into this rank's parts of a model by one `dcp.load` with our own reader. torch plans the load and gathers the errors.

The reader presents every tensor as one chunk with the target's name. The ranks exchange only plans and errors.

Each rank fills its own parts (`put`, the counterpart of `training.transfer`): all decisions are in the plan, and if anything is wrong
before the first copy, no rank copies.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint import state_dict_loader as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from ckptsurgeon.errors import CheckpointError, ModelError
from ckptsurgeon.models.sharded.planner import parts_of, whole_tensors
from ckptsurgeon.models.sharded.ranks import Ranks
from ckptsurgeon.models.sharded.values import Value
from ckptsurgeon.models.target.loaders import changing_loaders, storage_of, tensors_of
from ckptsurgeon.models.target.sharding import local
from ckptsurgeon.models.training.transfer import check_writable, reset_extra, say_half_filled, set_extra
from ckptsurgeon.planning.plan_types import Plan
from ckptsurgeon.progress import Held, phase
from ckptsurgeon.streaming.signals import undisturbed

_BEFORE = "transfer into the model before it is sharded"


def load(state: Mapping[str, torch.Tensor], values: Mapping[str, Value], held: Held = None) -> None:
    """Load each tensor of `state`: each rank reads or copies its own blocks.

    All ranks must call this with the same keys. `held` collects what a progress callback raises, so that no rank stops half way.

    Raises:
        UnreadableError, StaleError: a file fails or shrinks, on this rank or another, while it is read; the model may hold a mixture then.
    """
    reader = _Blocks(state, values, held)
    try:
        with torch.no_grad():
            dcp.load({key: state[key] for key in values}, storage_reader=reader, planner=DefaultLoadPlanner(allow_partial_load=True))
    except CheckpointException as error:
        raise _cause(error, reader) from error


class _Blocks(StorageReader):
    """The reader that torch asks for blocks. Its metadata is in memory, so nothing can fail before the first copy."""

    def __init__(self, state: Mapping[str, torch.Tensor], values: Mapping[str, Value], held: Held) -> None:
        self._metadata = whole_tensors({key: state[key] for key in values})
        self._values, self._held = values, held
        self.done: list[str] = []
        self.error: BaseException | None = None

    def reset(self, checkpoint_id: Any = None) -> None:
        """Do nothing: there is no state to reset."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Metadata in which every tensor is one chunk."""
        return self._metadata

    def set_up_storage_reader(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: the files are open."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Torch's plan, unchanged."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Torch's plans, unchanged."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Fill this rank's parts."""
        try:
            parts = list(parts_of(plan, planner))
            with phase("transferring", sum(part.memory.nbytes for part in parts), held=self._held) as advance:
                for part in parts:
                    self._values[part.key].into(part)
                    self.done.append(part.key)
                    advance(part.memory.nbytes)
        except BaseException as error:
            self.error = error
            raise
        future: Future[None] = Future()
        future.set_result(None)
        return future

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        """False: this reader has no path."""
        return False


def _cause(error: CheckpointException, reader: _Blocks) -> BaseException:
    """The error that made torch's load fail: this rank's own, or another rank's."""
    failure = reader.error
    if failure is None:
        rank, (failure, _) = next(iter(error.failures.items()))
        if not isinstance(failure, CheckpointError):
            return failure
        failure.reason += f" (on rank {rank})"
    if isinstance(failure, CheckpointError):
        done, count = dict.fromkeys(reader.done), len(reader._values)
        say_half_filled(failure, done, f"this rank's part of the model holds {len(done)} of {count} new tensors by now")
    return failure


def refuse(plan: Plan, model: nn.Module, state: Mapping[str, Any]) -> None:
    """ModelError for a model whose own loading code would have to run, or whose state_dict does not share its memory."""
    loaders = changing_loaders(model, state)
    if loaders or plan.handed or any(step.action == "load" for step in plan.steps):
        path, loader = next(iter(loaders.items()), ("", None))
        kind = type(model).__name__ if loader is None else loader.name
        raise ModelError(f"has loading code of its own ({kind}), which can't run on sharded tensors", key=path or None, hint=_BEFORE)
    own = {storage_of(tensor) for tensor in tensors_of(model)}
    copies = [key for key, tensor in state.items() if isinstance(tensor, torch.Tensor) and storage_of(tensor) not in own]
    if copies:
        raise ModelError("is a copy that a hook of the state_dict made, not the model's own memory", key=copies[0], hint=_BEFORE)


def put(
    model: nn.Module, state: Mapping[str, Any], values: Mapping[str, Value], extra: Mapping[str, Any], ranks: Ranks, held: Held = None
) -> None:
    """Load the values (of tied keys only the first) into the model, in place. All ranks must call this together. An interrupt waits until
    this rank's parts are complete.

    Raises: UnreadableError, StaleError: a file fails or shrinks while it is read, on this rank or another. Only then the model may hold old
        and new values.
    """
    name = type(model).__name__
    with undisturbed(), torch.no_grad():
        with ranks.step():
            set_extra(model, state, extra, name)
        try:
            load(state, values, held)
        except BaseException:
            reset_extra(model, state, extra, name)
            raise


def refuse_unwritable(state: Mapping[str, Any], keys: Iterable[str]) -> None:
    """As `check_writable`, for this rank's parts."""
    for key in keys:
        check_writable(key, local(state[key]))
