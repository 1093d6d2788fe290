"""The Trainer's callback in real runs: the log, thawing, and a run that resumes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="needs transformers")
pytest.importorskip("accelerate", reason="the Trainer needs accelerate")
sys.path.insert(0, str(Path(__file__).parents[2] / "fixtures"))

from variants import NetVariant  # noqa: E402

import ckptsurgeon as cs  # noqa: E402
from ckptsurgeon.errors import ModelError  # noqa: E402
from ckptsurgeon.loops.hugging_face import TransferCallback  # noqa: E402

with_trainer = pytest.importorskip("with_trainer", reason="needs scikit-learn")
PARAMS = Path(__file__).parents[2] / "fixtures" / "net_params.pkl"
RENAME = {"fc2.{p}": "dense2.{p}"}


def trainer(folder: Path, epochs: int) -> tuple[Any, Any, TransferCallback]:
    transformers.set_seed(0)
    net = NetVariant()
    report = cs.transfer(PARAMS, net, rename=RENAME)
    cs.freeze(net, report)
    optimizer = torch.optim.SGD(cs.param_groups(net, report, lr=0.001, fresh_lr=0.01), momentum=0.9)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1000)
    callback = TransferCallback(report, thaw=cs.Thaw(net, optimizer, ["dense2.*", "fc1.*"], lr=0.001, at=[1, 2], scheduler=scheduler))
    torch.manual_seed(0)
    data = with_trainer.Images(torch.randn(8, 3, 32, 32), torch.randint(2, (8,)))
    arguments = transformers.TrainingArguments(
        str(folder), num_train_epochs=epochs, per_device_train_batch_size=4, report_to=[], disable_tqdm=True, use_cpu=True,
        save_strategy="epoch", save_only_model=False,
    )  # fmt: skip
    made = transformers.Trainer(
        model=with_trainer.WithLoss(net), args=arguments, train_dataset=data, optimizers=(optimizer, scheduler), callbacks=[callback]
    )
    return made, net, callback


def test_the_log_has_the_transfer_and_stages_come_back(tmp_path: Path) -> None:
    made, net, _ = trainer(tmp_path, 2)
    made.train()
    told = next(row for row in made.state.log_history if "transfer/fresh" in row)
    assert told["step"] == 0 and told["transfer/transferred"] == 8.0 and told["transfer/fresh"] == 7.0
    assert [group["name"] for group in made.optimizer.param_groups] == ["fresh", "thawed/dense2.*", "thawed/fc1.*"]
    assert net.fc1.weight.requires_grad and not net.conv1.weight.requires_grad


def test_a_run_that_resumes_goes_on_where_it_was(tmp_path: Path) -> None:
    whole, net, _ = trainer(tmp_path / "whole", 3)
    whole.train()
    first, _, _ = trainer(tmp_path / "first", 3)
    first.train()
    folder = sorted((tmp_path / "first").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))[1]
    resumed, again, callback = trainer(tmp_path / "again", 3)
    callback.resume(folder)
    resumed.train(resume_from_checkpoint=str(folder))
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in net.state_dict().items())


def test_mistakes_are_told(tmp_path: Path) -> None:
    report = cs.transfer(PARAMS, NetVariant(), rename=RENAME)
    with pytest.raises(ModelError, match="by can't be 'day'"):
        TransferCallback(report, by="day")
    for text in ("{", "{}", '{"stateful_callbacks": {"TransferCallback": []}}'):
        (tmp_path / "trainer_state.json").write_text(text)
        with pytest.raises(ModelError, match="has no record of a transfer"):
            TransferCallback(report).resume(tmp_path)


@pytest.mark.slow
def test_the_example_learns(tmp_path: Path) -> None:
    assert with_trainer.main(folder=str(tmp_path))[0] > 0.95
