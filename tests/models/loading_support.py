"""Modules that load in their own way, each after one that is in use, and what torch makes of a state_dict for them."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn


class Turned(nn.Module):
    """Version 1 kept the transposed matrix."""

    _version = 2

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(3, 3))

    def _load_from_state_dict(self, state: Any, prefix: str, local: Any, *rest: Any) -> None:
        if (local.get("version") or 1) < 2 and prefix + "w" in state:
            state[prefix + "w"] = state[prefix + "w"].t().contiguous()
        super()._load_from_state_dict(state, prefix, local, *rest)


class InPlace(nn.Module):
    """As detectron2's FrozenBatchNorm2d: values are changed in place, and made up where they are not there."""

    _version = 3

    def __init__(self) -> None:
        super().__init__()
        for name, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
            self.register_buffer(name, torch.full((3,), value))

    def _load_from_state_dict(self, state: Any, prefix: str, local: Any, *rest: Any) -> None:
        version = local.get("version")
        if version is None or version < 2:
            for name, fill in (("running_mean", 0.0), ("running_var", 1.0)):
                state.setdefault(prefix + name, torch.full_like(getattr(self, name), fill))
        if version is not None and version < 3:
            state[prefix + "running_var"] -= 1e-5
        super()._load_from_state_dict(state, prefix, local, *rest)


class Frozen(nn.Module):
    """As torchvision's, DETR's and timm's FrozenBatchNorm2d: BatchNorm's counter is dropped."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.rand(3))

    def _load_from_state_dict(self, state: Any, prefix: str, *rest: Any) -> None:
        state.pop(prefix + "num_batches_tracked", None)
        super()._load_from_state_dict(state, prefix, *rest)


class Scaled(nn.Module):
    """A hook before loading rescales, whatever the version."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 3)
        self.calls: list[str] = []
        self.register_load_state_dict_pre_hook(self._rescale)

    @staticmethod
    def _rescale(module: Any, state: Any, prefix: str, *_: Any) -> None:
        module.calls.append(prefix)
        if prefix + "inner.weight" in state:
            state[prefix + "inner.weight"] = state[prefix + "inner.weight"] * 2


class Derives(nn.Module):
    """A hook after loading derives a buffer that no file holds, from the values below it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 3)
        self.register_buffer("twice", self.inner.weight.detach() * 2, persistent=False)
        self.loaded = 0
        self.register_load_state_dict_post_hook(self._derive)

    @staticmethod
    def _derive(module: Any, _keys: Any) -> None:
        module.twice.copy_(module.inner.weight.detach() * 2)
        module.loaded += 1


class Assigns(nn.Module):
    """It puts a new Parameter in the old one's place."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(3))

    def _load_from_state_dict(self, state: Any, prefix: str, local: Any, strict: bool, missing: list[str], *rest: Any) -> None:
        if prefix + "w" in state:
            self.w = nn.Parameter(state[prefix + "w"] + 1)
        else:
            missing.append(prefix + "w")


class Raises(nn.Module):
    """It changes itself, then fails on what it does not know."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(3))
        self.seen: dict[str, Any] = {}

    def _load_from_state_dict(self, state: Any, prefix: str, local: Any, *rest: Any) -> None:
        with torch.no_grad():
            self.w.zero_()
        self.seen["prefix"] = prefix
        raise ValueError("not this one")


class Remaps(nn.Module):
    """The model's own `load_state_dict` remaps, then calls torch's."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 3)
        self.norm = nn.BatchNorm1d(3)

    def load_state_dict(self, state: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        changed = OrderedDict((key, value + 1 if value.is_floating_point() else value) for key, value in state.items())
        return super().load_state_dict(changed, strict=strict, assign=assign)


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 3)
        self.norm = nn.BatchNorm1d(3)
        self.only = nn.InstanceNorm1d(3, affine=True)


KINDS: tuple[type[nn.Module], ...] = (Turned, InPlace, Frozen, Scaled, Derives, Assigns, Plain)


def everything(model: nn.Module) -> dict[str, Any]:
    """Every parameter and buffer, those that no file holds among them."""
    return {
        name: tensor.detach().clone()
        for members in (model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))
        for name, tensor in members
    }


def same(one: Mapping[str, Any], other: Mapping[str, Any]) -> None:
    assert one.keys() == other.keys()
    for key, value in one.items():
        assert value.dtype == other[key].dtype and torch.equal(value, other[key]), key


def by_torch(model: nn.Module, state: Mapping[str, Any]) -> nn.Module:
    """What torch's own loading makes of a copy of the model, from those values that are the model's by name and shape."""
    truth = copy.deepcopy(model)
    own = truth.state_dict()
    given: Any = OrderedDict((key, value.clone()) for key, value in state.items() if key in own and own[key].shape == value.shape)
    if hasattr(state, "_metadata"):
        given._metadata = copy.deepcopy(state._metadata)
    truth.load_state_dict(given, strict=False)
    return truth
