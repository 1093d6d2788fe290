"""The Lightning callback in real runs: the transfer before the optimizer, the log, freezing, thawing, and a run that resumes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

pl = pytest.importorskip("lightning.pytorch", reason="needs lightning")
sys.path.insert(0, str(Path(__file__).parents[2] / "fixtures"))

from torch.utils.data import DataLoader, TensorDataset  # noqa: E402
from variants import NetVariant  # noqa: E402

import ckptsurgeon as cs  # noqa: E402
from ckptsurgeon.errors import ModelError  # noqa: E402
from ckptsurgeon.loops.lightning import TransferCallback, report_of  # noqa: E402

PARAMS = Path(__file__).parents[2] / "fixtures" / "net_params.pkl"
RENAME = {"fc2.{p}": "dense2.{p}"}
FRESH = {"norm1.weight", "norm1.bias", "norm1.running_mean", "norm1.running_var", "norm1.num_batches_tracked", "fc3.weight", "fc3.bias"}


class Module(pl.LightningModule):
    """NetVariant, and what of it was there when its optimizer was built."""

    def __init__(self) -> None:
        super().__init__()
        self.model = NetVariant()
        self.seen: Any = None

    def training_step(self, batch: Any, _index: int) -> torch.Tensor:
        return F.cross_entropy(self.model(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        report = report_of(self.trainer)
        self.seen = {key: value.clone() for key, value in self.model.state_dict().items()}, tuple(report.fresh)
        groups = cs.param_groups(self.model, report, lr=0.001, fresh_lr=0.01)
        optimizer = torch.optim.SGD(groups, momentum=0.9)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)}


class Log(pl.loggers.logger.Logger):
    """Keeps what it is told."""

    name, version = "log", 0

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[dict[str, float], int | None]] = []

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        """Nothing is kept of these."""

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.rows.append((metrics, step))


def batches() -> DataLoader[Any]:
    torch.manual_seed(0)
    return DataLoader(TensorDataset(torch.randn(8, 3, 32, 32), torch.randint(2, (8,))), batch_size=4)


def fit(folder: Path, callback: TransferCallback, epochs: int, *, checkpoint: str | None = None, log: Any = False) -> tuple[Module, Any]:
    pl.seed_everything(0, verbose=False)
    module = Module()
    trainer = pl.Trainer(
        max_epochs=epochs, accelerator="cpu", callbacks=[callback], default_root_dir=folder, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False, logger=log,
    )  # fmt: skip
    trainer.fit(module, batches(), ckpt_path=checkpoint)
    return module, trainer


def test_the_transfer_comes_before_the_optimizer_and_into_the_log(tmp_path: Path) -> None:
    log = Log()
    module, trainer = fit(tmp_path, TransferCallback(PARAMS, into="model", rename=RENAME), 1, log=log)
    source = torch.load(PARAMS, weights_only=True)
    assert torch.equal(module.seen[0]["dense2.weight"], source["fc2.weight"]) and set(module.seen[1]) == FRESH
    assert [group["name"] for group in trainer.optimizers[0].param_groups] == ["transferred", "fresh"]
    told = next(row for row, step in log.rows if "transfer/fresh" in row and step == 0)
    assert told["transfer/transferred"] == 8.0 and told["transfer/fresh"] == 7.0 and 0.5 < told["transfer/coverage_tensors"] < 0.6


def test_what_was_transferred_is_frozen_and_thaws(tmp_path: Path) -> None:
    thaw = {"stages": ["dense2.*", "fc1.*"], "lr": 0.001, "at": [1, 3]}
    callback = TransferCallback(PARAMS, into="model", rename=RENAME, freeze=True, thaw=thaw)
    module, trainer = fit(tmp_path, callback, 2)
    source = torch.load(PARAMS, weights_only=True)
    trained = {key for key, value in module.model.named_parameters() if value.requires_grad}
    assert trained == {"norm1.weight", "norm1.bias", "fc3.weight", "fc3.bias", "dense2.weight", "dense2.bias"}
    assert torch.equal(module.model.fc1.weight, source["fc1.weight"]) and not torch.equal(module.model.dense2.weight, source["fc2.weight"])
    assert [group["name"] for group in trainer.optimizers[0].param_groups] == ["fresh", "thawed/dense2.*"]


def test_a_run_that_resumes_transfers_nothing_and_goes_on_where_it_was(tmp_path: Path) -> None:
    thaw = {"stages": ["dense2.*", "fc1.*"], "lr": 0.001, "at": [1, 2]}

    def callback(source: Path) -> TransferCallback:
        return TransferCallback(source, into="model", rename=RENAME, freeze=True, thaw=thaw)

    whole, _ = fit(tmp_path, callback(PARAMS), 3)
    _, trainer = fit(tmp_path, callback(PARAMS), 2)
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    resumed, again = fit(tmp_path, callback(tmp_path / "is not read.pt"), 3, checkpoint=str(tmp_path / "run.ckpt"))
    assert set(resumed.seen[1]) == FRESH and len(again.optimizers[0].param_groups) == 3
    assert all(torch.equal(value, resumed.state_dict()[key]) for key, value in whole.state_dict().items())


def test_mistakes_are_told() -> None:
    with pytest.raises(ModelError, match="by can't be 'day'"):
        TransferCallback(PARAMS, by="day")
    with pytest.raises(ModelError, match="has no TransferCallback"):
        report_of(pl.Trainer(logger=False, enable_checkpointing=False, accelerator="cpu"))


def test_without_report_of_the_transfer_comes_when_fit_starts(tmp_path: Path) -> None:
    class Plain(Module):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=1e-6)

    module = Plain()
    callback = TransferCallback(PARAMS, into="model", rename=RENAME)
    with pytest.raises(ModelError, match="has not begun to fit"):
        callback.begin()
    trainer = pl.Trainer(
        max_epochs=1, accelerator="cpu", callbacks=[callback], default_root_dir=tmp_path, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False, logger=False,
    )  # fmt: skip
    trainer.fit(module, batches())
    source = torch.load(PARAMS, weights_only=True)
    torch.testing.assert_close(module.model.fc1.weight.detach(), source["fc1.weight"], atol=1e-3, rtol=0)
    assert callback.report is not None and set(callback.report.fresh) == FRESH


@pytest.mark.slow
def test_the_example_learns(tmp_path: Path) -> None:
    pytest.importorskip("data", reason="needs scikit-learn")
    import with_lightning

    assert with_lightning.main(folder=str(tmp_path)) > 0.95
