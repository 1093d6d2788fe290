"""Values into this rank's own parts of a model, by one `dcp.load` with a reader of ours; torch's engine plans, and gathers what fails.

The reader gives every tensor as one chunk under the target's name. Nothing is sent from rank to rank but plans and errors.
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
    """Give each tensor of `state` its value, of which each rank reads or copies the blocks that are its own.

    All ranks must come here with the same keys. `held` gets what a listener to the progress raises: no rank stops half way for it.

    Raises:
        UnreadableError, StaleError: a file fails or shrinks, on this rank or another, while it is read; the model may hold a mixture then.
    """
    reader = _Blocks(state, values, held)
    try:
        with torch.no_grad():
            dcp.load({key: state[key] for key in values}, storage_reader=reader, planner=DefaultLoadPlanner(allow_partial_load=True))
    except CheckpointException as error:
        raise _own(error, reader) from error


class _Blocks(StorageReader):
    """What torch's engine asks for blocks: it reads no metadata, which are at hand, and so can't fail before the first copy."""

    def __init__(self, state: Mapping[str, torch.Tensor], values: Mapping[str, Value], held: Held) -> None:
        self._metadata = whole_tensors({key: state[key] for key in values})
        self._values, self._held = values, held
        self.done: list[str] = []
        self.error: BaseException | None = None

    def reset(self, checkpoint_id: Any = None) -> None:
        """Part of torch's protocol: there is nothing to forget."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Every tensor as one chunk."""
        return self._metadata

    def set_up_storage_reader(self, *args: Any, **kwargs: Any) -> None:
        """Part of torch's protocol: the files are open."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """As torch planned it."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """As torch planned them."""
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
        """Part of torch's protocol: no path names such a checkpoint."""
        return False


def _own(error: CheckpointException, reader: _Blocks) -> BaseException:
    """An error of the engine as one of ours: this rank's own, or what another rank failed by."""
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
