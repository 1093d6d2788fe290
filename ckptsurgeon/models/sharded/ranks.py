"""What the ranks of a process group tell one another: that a step failed on one of them, and that they are about to do the same.

Rule: every rank comes to each of these points, whatever happens to it before, so that none waits for another that has given up.
Only small objects are gathered, by torch's own collectives; no tensor moves here.
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
    """One step that all ranks take. `same`: what must be equal on all of them, by what it is called; `tell`: what each tells the others;
    `told`: what all of them told, by rank, after the step."""

    same: Mapping[str, str] = field(default_factory=dict)
    tell: Any = None
    told: tuple[Any, ...] = ()


@dataclass(frozen=True)
class _Failure:
    """An error as other ranks are told of it."""

    kind: str
    reason: str
    path: str | None = None
    key: str | None = None
    hint: str | None = None
    problems: tuple[str, ...] = ()


@dataclass(frozen=True)
class Ranks:
    """The ranks of the default process group, of which this is number `rank`; one alone where there is no group, or nobody to ask."""

    rank: int = 0
    size: int = 1

    @classmethod
    def of(cls, model: nn.Module) -> Ranks:
        """Those that a model is spread over.

        >>> Ranks.of(nn.Linear(3, 2))
        Ranks(rank=0, size=1)
        """
        if not over_ranks(model):
            return cls()
        return cls(torch.distributed.get_rank(), torch.distributed.get_world_size())

    @contextmanager
    def step(self) -> Iterator[Step]:
        """A step that all ranks take or none: it ends when all have come to its end, and raises on all if one has failed.

        Within the block nothing may be asked of other ranks, but by steps which all ranks take before anything else in it can fail.

        Raises:
            CheckpointError: of the kind that the other rank raised, which it names; PlanError where the ranks are about to do different
                things.
        """
        step = Step()
        try:
            yield step
        except BaseException as error:
            self._gather((_failure(error), {}, None))
            raise
        rows = self._gather((None, dict(step.same), step.tell))
        for rank, (failure, _, _) in enumerate(rows):
            if failure is not None:
                raise _error(failure, rank)
        for what, own in rows[0][1].items():
            apart = [rank for rank, (_, same, _) in enumerate(rows) if same.get(what) != own]
            if apart:
                raise PlanError(f"rank {apart[0]} has another {what} than rank 0; nothing was changed", hint=_HINT)
        step.told = tuple(told for _, _, told in rows)

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
    """What this rank raises where another has failed."""
    kind = getattr(errors, failure.kind, CheckpointError)
    made: CheckpointError = kind(
        f"{failure.reason} (on rank {rank})", path=failure.path, key=failure.key, hint=failure.hint, problems=failure.problems
    )
    return made
