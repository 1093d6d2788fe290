"""Gradual unfreezing: frozen parameters become trainable stage by stage, top down, in new groups of a live optimizer.

A stage turns `requires_grad` on and calls `add_param_group`; other groups and the optimizer's state are not changed. A scheduler that is
passed is extended by the new group, at its current point. Call `step()` once per epoch or once per optimizer step; `at` counts these calls.
Gradual unfreezing: Howard and Ruder 2018, arXiv:1801.06146, section 3.3.

torch's schedulers keep lists with one value per group, in the attributes `_PER_GROUP`: each gets one more, scaled or copied.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import Optimizer

from ckptsurgeon.arguments import checked
from ckptsurgeon.errors import ModelError, printable
from ckptsurgeon.models.target.parameters import Named, first_matching_pattern, listed, named
from ckptsurgeon.models.training.depth import depths
from ckptsurgeon.models.training.freezing import Frozen, thaw
from ckptsurgeon.models.training.groups import NO_DECAY, check_decay, check_rates, without_decay
from ckptsurgeon.parameter_types import NoDecay, Words
from ckptsurgeon.shown import Shown
from ckptsurgeon.views.folding import fold_keys

_BASE = ("max_lr", "initial_lr", "lr")  # the first of these in a group is the base rate of its schedule; max_lr is OneCycleLR's
_SCALED = ("lr", "initial_lr", "max_lr", "min_lr")  # rates in a group
_OWN = ("params", "param_names", "name")
# Attributes of schedulers with one value per group, and whether the first group's value is scaled for a new group, or copied.
_PER_GROUP: dict[str, bool] = {
    "base_lrs": True,
    "max_lrs": True,
    "_last_lr": True,
    "lr_lambdas": False,
    "min_lrs": False,
    "base_momentums": False,
    "max_momentums": False,
}


@dataclass(frozen=True, repr=False)
class Stage(Shown):
    """The parameters that `Thaw` thaws together.

    Attributes:
        name: its patterns, or its layer.
        at: the call of `step()` at which it is thawed.
        lr: its learning rate when the schedule is at its base.
        keys: the names of its parameters.
    """

    name: str
    at: int
    lr: float
    keys: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.at}: {printable(self.name)}, lr {self.lr:g}: {printable(', '.join(fold_keys(self.keys)))}"


class Thaw:
    """A schedule that thaws a model stage by stage.

    Args:
        model: the model, in which everything to be thawed later is frozen (`freeze`).
        optimizer: over what is trainable now; new groups take all other options (betas, eps, fused …) from its first group.
        stages: for each stage, in order, one or more patterns for names of frozen parameters. The first matching stage wins; a parameter
            that no stage matches stays frozen. None: the head, the layers from the top down, and the stem, as far as they are frozen.
        lr: the learning rate of the model's top, as `param_groups` has it.
        layer_decay: a stage's rate is `lr` × layer_decay ** (its distance from the head): 1 for the first stage of `stages`, or for the
            last layer; 1 / 2.6 is ULMFiT's discriminative fine-tuning.
        at: when a stage is thawed, in calls of `step()`: one number for the distance between stages, or ascending numbers, one per stage.
        weight_decay: the weight decay of the new groups; None takes that of the first group.
        no_decay: True: no weight decay for biases, parameters of one dimension, norms and embeddings; or patterns, True among them or not.
        layers: a pattern for the layers, whose numbers tell them apart: `"encoder.layer.{i}.**"`; or several, from the bottom up. None
            uses a timm model's `group_matcher`, or finds the repeated blocks. Parameters before the layers are the stem (depth 0),
            those after them the head.
        scheduler: the optimizer's `torch.optim.lr_scheduler`, or several. If there is one, pass it, since its lists have one value per
            group. A new group starts at `lr` × (the first group's current rate / its base rate) and continues from there. `lr` is the peak
            under OneCycleLR, and `base_lr` under CyclicLR. A minimum (`eta_min`, `min_lr`) is the same for all groups, as in torch.

    Raises:
        ModelError: a stage that matches nothing frozen, invalid rates or counts, layers that can't be found, a scheduler of another
            optimizer, or a scheduler that was not passed.

    >>> import torch
    >>> from ckptsurgeon import freeze
    >>> net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    >>> _ = freeze(net, ["0.*", "1.*"])
    >>> optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1)
    >>> schedule = Thaw(net, optimizer, ["1.*", "0.*"], lr=0.01, layer_decay=0.5)
    >>> for epoch in range(3):
    ...     print([group["lr"] for group in optimizer.param_groups], schedule.step())
    [0.1] ('1.weight', '1.bias')
    [0.1, 0.005] ('0.weight', '0.bias')
    [0.1, 0.005, 0.0025] ()
    """

    stages: tuple[Stage, ...]

    @checked
    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        stages: Sequence[Words] | None = None,
        *,
        lr: float,
        layer_decay: float = 1.0,
        at: int | Sequence[int] = 1,
        weight_decay: float | None = None,
        no_decay: NoDecay = False,
        layers: Words | None = None,
        scheduler: object = (),
    ) -> None:
        check_rates({"lr": lr, "weight_decay": weight_decay})
        check_decay(layer_decay)
        every = named(model)
        rows = _stages_by_depth(model, every, layers) if stages is None else _stages_by_pattern(every, stages)
        self.stages = tuple(
            Stage(name, when, lr * layer_decay**below, keys) for when, (name, below, keys) in zip(_counts(at, len(rows)), rows, strict=True)
        )
        self._no_decay = without_decay(model, no_decay, {first for stage in self.stages for first in stage.keys})
        self._model, self._optimizer, self._weight_decay = model, optimizer, weight_decay
        self._schedulers = check_schedulers(optimizer, scheduler)
        self._base = base_rate(optimizer.param_groups[0])
        self._steps = self._done = 0

    def step(self) -> tuple[str, ...]:
        """Count one epoch or step, and thaw the stages that are due.

        Returns:
            The names that were thawed; usually none.

        Raises:
            ModelError: the optimizer has a scheduler that was not passed.
        """
        self._steps += 1
        thawed: list[str] = []
        while self._done < len(self.stages) and self.stages[self._done].at <= self._steps:
            thawed += self._thaw_stage(self.stages[self._done]).keys
        return tuple(thawed)

    def state_dict(self) -> dict[str, Any]:
        """The state to save in a checkpoint.

        Returns:
            Plain values: the number of `step()` calls, and the names of each thawed stage.
        """
        return {"steps": self._steps, "stages": [list(stage.keys) for stage in self.stages[: self._done]]}

    @checked
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume: thaw what `state` lists as thawed. Load the optimizer's and the scheduler's state after this, not before.

        Args:
            state: what `state_dict()` returned.

        Raises:
            ArgumentError: `state` is no such state.
            ModelError: `state` has other stages.
        """
        thawed = [tuple(keys) for keys in state["stages"]]
        if thawed != [stage.keys for stage in self.stages[: len(thawed)]] or self._done > len(thawed):
            raise ModelError("the state has other stages", hint="freeze the model and build Thaw as they were at the beginning")
        self._steps = int(state["steps"])
        while self._done < len(thawed):
            self._thaw_stage(self.stages[self._done])

    def __str__(self) -> str:
        return "\n".join(f"{stage}{'' if number >= self._done else ' (thawed)'}" for number, stage in enumerate(self.stages))

    def _thaw_stage(self, stage: Stage) -> Frozen:
        every = named(self._model)
        present = {id(parameter) for group in self._optimizer.param_groups for parameter in group["params"]}
        # a parameter that was in the optimizer before it was frozen stays in its group, with its state
        joining = [first for first in stage.keys if id(every[first].tensor) not in present]
        check_schedulers(self._optimizer, self._schedulers)
        for undecayed in (False, True):
            members = [first for first in joining if (first in self._no_decay) is undecayed]
            if members:
                title = f"thawed/{stage.name}{NO_DECAY if undecayed else ''}"
                decay = 0.0 if undecayed else self._weight_decay
                group = {"name": title, "params": [every[first].tensor for first in members], "param_names": members}
                attach(self._optimizer, self._schedulers, group, stage.lr, self._base, decay)
        thawed = thaw(self._model, every, {id(every[first].tensor) for first in stage.keys})
        self._done += 1
        return thawed


def _counts(at: int | Sequence[int], number: int) -> list[int]:
    counts = [at * stage for stage in range(1, number + 1)] if isinstance(at, int) else list(at)
    if len(counts) != number:
        raise ModelError(f"at has {len(counts)} counts, but there are {number} stages", hint="give one count per stage, or a single number")
    if not all(isinstance(count, int) and count > 0 for count in counts) or counts != sorted(counts):
        raise ModelError(f"at can't be {at!r}", hint="give ascending counts of at least 1")
    return counts


def _stages_by_pattern(every: Mapping[str, Named], stages: Sequence[Words]) -> list[tuple[str, int, tuple[str, ...]]]:
    frozen = {first: parameter.all_names for first, parameter in every.items() if not parameter.trainable}
    trainable = [name for parameter in every.values() if parameter.trainable for name in parameter.all_names]
    rows = [listed(stage) for stage in ([stages] if isinstance(stages, str) else stages)]
    by_pattern = first_matching_pattern([text for row in rows for text in row], frozen, trainable, "trainable")
    result: list[tuple[str, int, tuple[str, ...]]] = []
    remaining = dict(by_pattern)
    for below, row in enumerate(rows, start=1):
        keys = tuple(first for first, text in remaining.items() if text in row)
        remaining = {first: text for first, text in remaining.items() if first not in keys}
        if not keys:
            raise ModelError(f"the stage {', '.join(row)!r} is empty: earlier stages thaw all that it matches")
        result.append((", ".join(row), below, keys))
    return result


def _stages_by_depth(model: nn.Module, every: Mapping[str, Named], layers: Words | None) -> list[tuple[str, int, tuple[str, ...]]]:
    frozen = [first for first, parameter in every.items() if not parameter.trainable]
    if not frozen:
        raise ModelError("the model has no frozen parameter", hint="freeze it first: freeze(model, report)")
    layer_depths = depths(model, layers, frozen)
    rows = [(depth, tuple(first for first in frozen if layer_depths.of[first] == depth)) for depth in range(layer_depths.top, -1, -1)]
    return [(layer_depths.label(depth), layer_depths.top - depth, keys) for depth, keys in rows if keys]


def base_rate(group: Mapping[str, Any]) -> float:
    """The base rate of a group's schedule: its highest rate under OneCycleLR, else its initial rate.

    >>> base_rate({"lr": 0.01, "initial_lr": 0.1})
    0.1
    """
    return float(next(group[option] for option in _BASE if option in group))


def check_schedulers(optimizer: Optimizer, scheduler: object) -> tuple[Any, ...]:
    """The schedulers as a tuple; `scheduler` is one scheduler, several, or None.

    Raises:
        ModelError: a value is no scheduler, or belongs to another optimizer; or there is none although the groups have an `initial_lr`.
    """
    schedulers = tuple(scheduler) if isinstance(scheduler, Iterable) else () if scheduler is None else (scheduler,)
    for member in schedulers:
        if not hasattr(member, "step") or not hasattr(member, "optimizer"):
            raise ModelError(f"a {type(member).__name__} is no torch scheduler", hint="give a torch.optim.lr_scheduler")
        if getattr(member.optimizer, "optimizer", member.optimizer) is not getattr(optimizer, "optimizer", optimizer):
            raise ModelError(f"the {type(member).__name__} belongs to another optimizer")
    if not schedulers and any("initial_lr" in group for group in optimizer.param_groups):
        raise ModelError(
            "this optimizer has a scheduler, which was not passed", hint="pass scheduler=…, since its lists have one value per group"
        )
    return schedulers


def attach(
    optimizer: Optimizer, schedulers: Sequence[Any], group: dict[str, Any], lr: float, base: float, weight_decay: float | None
) -> None:
    """Add `group` (name, params, param_names) with all other options of the first group, its rates scaled.

    Args:
        lr: the new group's rate when the schedule is at its base.
        base: the `base_rate` of the first group; if it is 0, the new group's rates are `lr` itself.
        weight_decay: None takes that of the first group.
    """
    first = optimizer.param_groups[0]
    ratio = lr / base if base else None
    scaled = {option: _scaled(first[option], ratio, lr) for option in _SCALED if option in first}
    decay = {} if weight_decay is None else {"weight_decay": weight_decay}
    names = _OWN if "param_names" in first else ("params", "name")
    before = len(optimizer.param_groups)
    options = {option: value for option, value in first.items() if option not in _OWN}
    optimizer.add_param_group({**options, **scaled, **decay, **{option: group[option] for option in names}})
    for scheduler in _all(schedulers):
        for attribute, scales in _PER_GROUP.items():
            values = getattr(scheduler, attribute, None)
            if isinstance(values, list) and len(values) == before:
                # a new list: a SequentialLR shares the list of its current scheduler, which must not grow twice
                setattr(scheduler, attribute, [*values, _scaled(values[0], ratio, lr) if scales else values[0]])


def _all(schedulers: Iterable[Any]) -> Iterator[Any]:
    """Each scheduler, and the schedulers that it contains."""
    for scheduler in schedulers:
        yield scheduler
        yield from _all(getattr(scheduler, "_schedulers", ()))


def _scaled(value: Any, ratio: float | None, lr: float) -> Any:
    """A rate times `ratio`, as a new value: a rate may be a tensor, which a scheduler fills in place."""
    return value * ratio if ratio is not None else value * 0 + lr
