"""Keeps the ranks of a process group in step: a step that fails on one rank fails on all, and all ranks must be doing the same.

Rule: every rank reaches the end of each step, whatever happens to it before, so that no rank waits for one that has failed.
Only small objects are gathered, by torch's own collectives; no tensor is sent.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ckptsurgeon import errors
from ckptsurgeon.errors import CheckpointError, PlanError
from ckptsurgeon.models.target.sharding import over_ranks

_HINT = "give every rank the same files and the same arguments; on nodes without a shared file system, copy the checkpoint to each"


@dataclass
class Step:
    """One step that all ranks take.

    Attributes:
        same: values that must be equal on all ranks, by what the error calls them.
        own: this rank's value for the other ranks.
        by_rank: the `own` values of all ranks, after the step.
    """

    same: Mapping[str, str] = field(default_factory=dict)
    own: Any = None
    by_rank: tuple[Any, ...] = ()


@dataclass(frozen=True)
class _Failure:
    """An error in the form that is sent to the other ranks."""

    kind: str
    reason: str
    path: str | None = None
    key: str | None = None
    hint: str | None = None
    problems: tuple[str, ...] = ()


@dataclass(frozen=True)
class Ranks:
    """The ranks of the default process group and this rank's number; a single rank if the model is not spread over a group."""

    rank: int = 0
    size: int = 1

    @classmethod
    def of(cls, model: nn.Module) -> Ranks:
        """The ranks that a model is spread over.

        >>> Ranks.of(nn.Linear(3, 2))
        Ranks(rank=0, size=1)
        """
        if not over_ranks(model):
            return cls()
        return cls(torch.distributed.get_rank(), torch.distributed.get_world_size())

    @contextmanager
    def step(self) -> Iterator[Step]:
        """A step that succeeds on all ranks or fails on all: it ends when all ranks have reached its end, and raises on all if one failed.

        The block must not communicate with other ranks, except by inner steps that all ranks reach before anything in the block can fail.

        Raises:
            CheckpointError: another rank failed; the error has its class and names the rank. PlanError if a value of `same` differs.
        """
        step = Step()
        try:
            yield step
        except BaseException as error:
            self._gather((_failure(error), {}, None))
            raise
        rows = self._gather((None, dict(step.same), step.own))
        for rank, (failure, _, _) in enumerate(rows):
            if failure is not None:
                raise _error(failure, rank)
        for name, value in rows[0][1].items():
            differing = [rank for rank, (_, same, _) in enumerate(rows) if same.get(name) != value]
            if differing:
                raise PlanError(f"rank {differing[0]} has another {name} than rank 0; nothing was changed", hint=_HINT)
        step.by_rank = tuple(own for _, _, own in rows)

    def _gather(self, own: tuple[_Failure | None, Mapping[str, str], Any]) -> list[Any]:
        rows: list[Any] = [own] * self.size
        if self.size > 1:
            torch.distributed.all_gather_object(rows, own)
        return rows


def _failure(error: BaseException) -> _Failure:
    if isinstance(error, CheckpointError):
        return _Failure(type(error).__name__, error.reason, error.path, error.key, error.hint, error.problems)
    return _Failure("CheckpointError", f"{type(error).__name__}: {error}")


def _error(failure: _Failure, rank: int) -> CheckpointError:
    """The error to raise on this rank when another failed."""
    kind = getattr(errors, failure.kind, CheckpointError)
    error: CheckpointError = kind(
        f"{failure.reason} (on rank {rank})", path=failure.path, key=failure.key, hint=failure.hint, problems=failure.problems
    )
    return error
