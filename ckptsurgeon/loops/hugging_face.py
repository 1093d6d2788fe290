"""A callback for Hugging Face's Trainer: it logs the transfer's report and steps a thawing schedule.

The Trainer takes a model and an optimizer, so call `transfer`, `freeze` and `param_groups` first, then
`Trainer(model, ..., optimizers=(optimizer, scheduler), callbacks=[TransferCallback(report)])`.
"""

from __future__ import annotations

import json
import os
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from ckptsurgeon.errors import ModelError
from ckptsurgeon.loops.records import BY, numbers, record
from ckptsurgeon.models.training.thawing import Thaw
from ckptsurgeon.report import Report


class TransferCallback(TrainerCallback, ExportableState):
    """Writes a transfer's numbers into the Trainer's log, and thaws what is frozen stage by stage.

    Args:
        report: the report that `ckptsurgeon.transfer` returned.
        thaw: a schedule over the Trainer's own optimizer and scheduler.
        by: the unit of `thaw`, `"epoch"` or `"step"` (of the optimizer).

    A Trainer's checkpoint records which keys were fresh and how far the schedule is. To resume: build model, optimizer and schedule as
    before, call `resume(folder)`, then `trainer.train(resume_from_checkpoint=folder)`.

    >>> from ckptsurgeon.report import Coverage
    >>> callback = TransferCallback(Report(("a.pt",), "Net", ("w",), (), ("b",), (), Coverage(0.5, 0.9, (1, 2))))
    >>> callback.state()["attributes"]["fresh"]
    ['b']
    """

    def __init__(self, report: Report, *, thaw: Thaw | None = None, by: str = "epoch") -> None:
        if by not in BY:
            raise ModelError(f"by can't be {by!r}", hint=f"one of {', '.join(BY)}")
        self.report, self._thaw, self._by = report, thaw, by

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Log the transfer once, at the start of a run that does not resume."""
        if state.global_step == 0:
            state.log_history.append({**numbers(self.report), "step": 0})

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Count an epoch."""
        if self._thaw is not None and self._by == "epoch":
            self._thaw.step()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Count an optimizer step."""
        if self._thaw is not None and self._by == "step":
            self._thaw.step()

    def state(self) -> dict[str, Any]:
        """Return what a Trainer's checkpoint keeps in its trainer_state.json."""
        thaw = {} if self._thaw is None else {"thaw": self._thaw.state_dict()}
        return {"args": {}, "attributes": {**record(self.report), **thaw}}

    def resume(self, folder: str | os.PathLike[str]) -> None:
        """Set the schedule to the progress recorded in a checkpoint's folder.

        Raises:
            ModelError: the folder contains no record of this callback.
        """
        path = os.path.join(os.fspath(folder), "trainer_state.json")
        try:
            with open(path, encoding="utf-8") as file:
                saved = json.load(file)["stateful_callbacks"][type(self).__name__]
            attributes = (saved[0] if isinstance(saved, list) else saved)["attributes"]
        except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
            raise ModelError("has no record of a transfer", path=path, hint="give a folder that the Trainer wrote") from error
        if self._thaw is not None and "thaw" in attributes:
            self._thaw.load_state_dict(attributes["thaw"])
