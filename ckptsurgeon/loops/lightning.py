"""A Lightning callback: the transfer before the optimizer is built, the report in the logs, freezing and a schedule that thaws.

A run that resumes (`trainer.fit(..., ckpt_path=...)`) transfers nothing: its weights are in its checkpoint, and so is what was fresh.
Whether it does is known only after `setup`, so the transfer waits until `configure_optimizers` asks for the report, or `fit` starts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from ckptsurgeon import api
from ckptsurgeon.errors import ModelError
from ckptsurgeon.loops.words import BY, Recorded, numbers, record, recorded
from ckptsurgeon.models.training.thawing import Thaw
from ckptsurgeon.report import Report


class TransferCallback(Callback):
    """Transfers weights into the LightningModule when `configure_optimizers` calls `report_of(self.trainer)`, or else when `fit` starts.

    Args:
        source: what `ckptsurgeon.transfer` takes.
        into: the attribute of the LightningModule that is the model, such as `"model"`; None for the module itself.
        freeze: patterns to freeze, or True to freeze what was transferred.
        thaw: the arguments of `ckptsurgeon.Thaw` (`lr`, `stages`, `at`, ...) but for model, optimizer and scheduler.
        by: what `thaw` counts, `"epoch"` or `"step"`.
        choices: the other arguments of `transfer` (`rename`, `adapt`, `rules`, `min_coverage`, ...).

    `report` is None before; then the transfer's report, or, in a run that resumes, the record of it. Every logger gets its numbers.

    Raises:
        CheckpointError: as `transfer`, when `fit` begins.

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
        """Remember the model. A checkpoint is restored after this, and before the optimizer is built."""
        if stage == "fit":
            self._model = pl_module if self._into is None else getattr(pl_module, self._into)

    def begin(self) -> Report | Recorded:
        """Transfer and freeze, once, unless the run resumes; the report, or the record of it."""
        if self.report is None:
            if self._model is None:
                raise ModelError("the trainer has not begun to fit, and there is no model to transfer into")
            self.report = api.transfer(self._source, self._model, **self._choices)
            rank_zero_info(str(self.report))
            self._freeze_now()
        return self.report

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The optimizer is there, its state not yet restored: the schedule begins, or goes on where it was."""
        self.begin()
        if isinstance(self.report, Report):
            for logger in trainer.loggers:
                logger.log_metrics(numbers(self.report), step=0)
        if self._thaw is None:
            return
        if len(trainer.optimizers) != 1:
            raise ModelError(f"thaws into one optimizer, and there are {len(trainer.optimizers)}")
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
        """What a checkpoint keeps: what was transferred and what is fresh, and how far the schedule is."""
        state: dict[str, Any] = {} if self.report is None else record(self.report)
        return state if self._schedule is None else {**state, "thaw": self._schedule.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where the checkpoint was."""
        if "fresh" in state_dict:
            self.report = recorded(state_dict)
            self._freeze_now()
        self._resumed = state_dict.get("thaw")

    def _freeze_now(self) -> None:
        if self._freeze is True:
            rank_zero_info(str(api.freeze(self._model, self.report)))
        elif self._freeze:
            rank_zero_info(str(api.freeze(self._model, self._freeze)))

    def _step(self) -> None:
        thawed = self._schedule.step() if self._schedule is not None else ()
        if thawed:
            rank_zero_info(f"thawed {', '.join(thawed)}")


def report_of(trainer: Trainer) -> Report | Recorded:
    """The report of a trainer's TransferCallback, for `param_groups` in `configure_optimizers`; the transfer is made if it has not been.

    Raises:
        ModelError: there is no such callback, or the trainer has not begun to fit.
        CheckpointError: as `transfer`.
    """
    found = next((callback for callback in trainer.callbacks if isinstance(callback, TransferCallback)), None)  # type: ignore[attr-defined]
    if found is None:
        raise ModelError("this trainer has no TransferCallback", hint="Trainer(callbacks=[TransferCallback(...)])")
    return found.begin()
