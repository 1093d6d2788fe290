"""A Lightning callback: it transfers before the optimizer is built, logs the report, freezes, and steps a thawing schedule.

A run that resumes (`trainer.fit(..., ckpt_path=...)`) transfers nothing: its checkpoint has the weights and the record of what was fresh.
Whether a run resumes is known only after `setup`, so the transfer waits until `configure_optimizers` calls `report_of`, or `fit` starts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from ckptsurgeon import api
from ckptsurgeon.errors import ModelError
from ckptsurgeon.loops.records import BY, Recorded, numbers, record, recorded
from ckptsurgeon.models.training.thawing import Thaw
from ckptsurgeon.report import Report


class TransferCallback(Callback):
    """Transfers weights into the LightningModule when `configure_optimizers` calls `report_of(self.trainer)`, or else when `fit` starts.

    Args:
        source: the source of `ckptsurgeon.transfer`.
        into: the attribute of the LightningModule that is the model, such as `"model"`; None for the module itself.
        freeze: patterns to freeze, or True to freeze what was transferred.
        thaw: the arguments of `ckptsurgeon.Thaw` (`lr`, `stages`, `at`, ...) without model, optimizer and scheduler.
        by: the unit of `thaw`, `"epoch"` or `"step"`.
        choices: the other arguments of `transfer` (`rename`, `adapt`, `rules`, `min_coverage`, ...).

    `report` is None before the transfer, then the transfer's report or, in a run that resumes, its record. Every logger gets its metrics.

    Raises:
        CheckpointError: when `fit` begins, as `transfer` raises it.

    >>> callback = TransferCallback("net_params.pkl", rename={"fc2.{p}": "dense2.{p}"}, freeze=True)
    >>> callback.report is None
    True
    """

    def __init__(
        self,
        source: Any,
        *,
        into: str | None = None,
        freeze: bool | str | Iterable[str] = False,
        thaw: Mapping[str, Any] | None = None,
        by: str = "epoch",
        **choices: Any,
    ) -> None:
        if by not in BY:
            raise ModelError(f"by can't be {by!r}", hint=f"one of {', '.join(BY)}")
        self.report: Report | Recorded | None = None
        self._source, self._into, self._freeze, self._thaw, self._by, self._choices = source, into, freeze, thaw, by, choices
        self._model: Any = None
        self._schedule: Thaw | None = None
        self._resumed: Mapping[str, Any] | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Keep the model for later. Lightning restores a checkpoint after this, and before it builds the optimizer."""
        if stage == "fit":
            self._model = pl_module if self._into is None else getattr(pl_module, self._into)

    def begin(self) -> Report | Recorded:
        """Transfer and freeze once, unless the run resumes; return the report or its record."""
        if self.report is None:
            if self._model is None:
                raise ModelError("the trainer has not begun to fit, so there is no model to transfer into")
            self.report = api.transfer(self._source, self._model, **self._choices)
            rank_zero_info(str(self.report))
            self._freeze_model()
        return self.report

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the metrics and build the schedule, or restore it. The optimizer exists by now; its state is not restored yet."""
        self.begin()
        if isinstance(self.report, Report):
            for logger in trainer.loggers:
                logger.log_metrics(numbers(self.report), step=0)
        if self._thaw is None:
            return
        if len(trainer.optimizers) != 1:
            raise ModelError(f"Thaw needs exactly one optimizer, but the trainer has {len(trainer.optimizers)}")
        schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
        self._schedule = Thaw(self._model, trainer.optimizers[0], scheduler=schedulers, **self._thaw)
        if self._resumed is not None:
            self._schedule.load_state_dict(self._resumed)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count an epoch."""
        if self._by == "epoch":
            self._step()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Count a step."""
        if self._by == "step":
            self._step()

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps: the record of the transfer, and the schedule's state."""
        state: dict[str, Any] = {} if self.report is None else record(self.report)
        return state if self._schedule is None else {**state, "thaw": self._schedule.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the record and the schedule's state from a checkpoint."""
        if "fresh" in state_dict:
            self.report = recorded(state_dict)
            self._freeze_model()
        self._resumed = state_dict.get("thaw")

    def _freeze_model(self) -> None:
        if self._freeze:
            rank_zero_info(str(api.freeze(self._model, self.report if self._freeze is True else self._freeze)))

    def _step(self) -> None:
        thawed = self._schedule.step() if self._schedule is not None else ()
        if thawed:
            rank_zero_info(f"thawed {', '.join(thawed)}")


def report_of(trainer: Trainer) -> Report | Recorded:
    """Return the report of a trainer's TransferCallback, for `param_groups` in `configure_optimizers`. Transfers first if needed.

    Raises:
        ModelError: there is no such callback, or the trainer has not begun to fit.
        CheckpointError: as `transfer`.
    """
    callback = next((callback for callback in trainer.callbacks if isinstance(callback, TransferCallback)), None)  # type: ignore[attr-defined]
    if callback is None:
        raise ModelError("this trainer has no TransferCallback", hint="Trainer(callbacks=[TransferCallback(...)])")
    return callback.begin()
