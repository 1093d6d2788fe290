"""Every scheduler of torch's, and what the tests of groups, freezing and thawing share."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim import lr_scheduler as torchs


def _rates(optimizer: Optimizer, scale: float = 1.0) -> list[float]:
    return [group["lr"] * scale for group in optimizer.param_groups]


def _sequential(optimizer: Optimizer) -> Any:
    parts = [torchs.LinearLR(optimizer, 0.5, total_iters=3), torchs.CosineAnnealingLR(optimizer, 8)]
    return torchs.SequentialLR(optimizer, parts, milestones=[3])


def _chained(optimizer: Optimizer) -> Any:
    return torchs.ChainedScheduler([torchs.ConstantLR(optimizer, 0.5, total_iters=3), torchs.ExponentialLR(optimizer, 0.9)])


# Those that take rates take a list, one for each group.
SCHEDULERS: dict[str, Callable[[Optimizer], Any]] = {
    "LambdaLR": lambda o: torchs.LambdaLR(o, lambda epoch: 1 / (epoch + 1)),
    "MultiplicativeLR": lambda o: torchs.MultiplicativeLR(o, lambda epoch: 0.9),
    "StepLR": lambda o: torchs.StepLR(o, 2, 0.5),
    "MultiStepLR": lambda o: torchs.MultiStepLR(o, [1, 4], 0.5),
    "ConstantLR": lambda o: torchs.ConstantLR(o, 0.5, total_iters=3),
    "LinearLR": lambda o: torchs.LinearLR(o, 0.5, total_iters=5),
    "ExponentialLR": lambda o: torchs.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: torchs.PolynomialLR(o, 10, 2.0),
    "CosineAnnealingLR": lambda o: torchs.CosineAnnealingLR(o, 10),
    "CosineAnnealingWarmRestarts": lambda o: torchs.CosineAnnealingWarmRestarts(o, 3),
    "ReduceLROnPlateau": lambda o: torchs.ReduceLROnPlateau(o, patience=1),
    "CyclicLR": lambda o: torchs.CyclicLR(o, _rates(o), _rates(o, 10), step_size_up=3),
    "OneCycleLR": lambda o: torchs.OneCycleLR(o, _rates(o), total_steps=20),
    "SequentialLR": _sequential,
    "ChainedScheduler": _chained,
}


def ratios(groups: list[dict[str, Any]]) -> list[float]:
    """Each group's rate over the first one's."""
    return [group["lr"] / groups[0]["lr"] for group in groups]


def steps(model: nn.Module, optimizer: Optimizer, number: int, data: Callable[[], torch.Tensor]) -> None:
    """So many training steps."""
    for _ in range(number):
        optimizer.zero_grad()
        model(data()).square().mean().backward()
        optimizer.step()
