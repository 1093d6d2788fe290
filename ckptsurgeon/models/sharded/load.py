"""Loads values into this rank's parts of a model by one `dcp.load` with our own reader. torch plans the load and gathers the errors.

The reader presents every tensor as one chunk with the target's name. The ranks exchange only plans and errors.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.distributed.checkpoint import state_dict_loader as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from ckptsurgeon.errors import CheckpointError
from ckptsurgeon.hints import shortened
from ckptsurgeon.models.sharded.planner import parts_of, whole_tensors
from ckptsurgeon.models.sharded.values import Value
from ckptsurgeon.progress import Held, phase


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
        """Part of torch's protocol: does nothing, since there is no state to reset."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Metadata in which every tensor is one chunk."""
        return self._metadata

    def set_up_storage_reader(self, *args: Any, **kwargs: Any) -> None:
        """Part of torch's protocol: does nothing, since the files are open."""

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
        """Part of torch's protocol: False, since this reader has no path."""
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
        count = len(reader._values)
        failure.reason += f"; this rank's part of the model holds {len(dict.fromkeys(reader.done))} of {count} new tensors by now"
        failure.problems = shortened([f"{key}: has its new value" for key in dict.fromkeys(reader.done)])
        failure.hint = "transfer again when the file is whole, or build the model anew"
    return failure
