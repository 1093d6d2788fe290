"""Gives a model's values, and initial values by schemes, as bytes to write into files.

Bytes are dense and row-major, in the machine's byte order, which is the files' order. Nothing here writes into a model. A returned
buffer is read-only and keeps its tensor alive.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from torch import nn

from ckptsurgeon.errors import ModelError
from ckptsurgeon.models.init import schemes
from ckptsurgeon.models.init.schemes import KEEP
from ckptsurgeon.models.init.user_functions import Fill
from ckptsurgeon.models.target.skeleton import state_dict_of
from ckptsurgeon.streaming.values import memory_of
from ckptsurgeon.tensors import TensorMeta


def tensor_bytes(t: torch.Tensor) -> memoryview:
    """The tensor's elements, as `memory_of` gives them. Raises ModelError for a tensor on the meta device, which has no values.

    >>> bytes(tensor_bytes(torch.tensor([1, 256], dtype=torch.int16)))
    b'\\x01\\x00\\x00\\x01'
    """
    if t.device.type == "meta":
        raise ModelError("a tensor on the meta device has no values")
    return memory_of(t)


def make_provider(
    model: nn.Module | None,
    inits: Mapping[str, str],
    shapes: Mapping[str, TensorMeta],
    seed: int,
    own: Mapping[str, Fill] = {},
) -> Callable[[str], memoryview]:
    """A function from a target's key to its initial value: dense bytes in the dtype of `shapes[key]`.

    Args:
        model: a built model for the schemes `model` and `per_layer_type`; a model on meta is enough for `reset`; None without a model.
        inits: scheme by key; a key that is not in it gets `model`, the value of the target's constructor.
        shapes: the target's tensors by key.
        seed: together with the key, seeds the named schemes.
        own: the loaded functions of user-defined schemes by name (`user_functions.own_schemes`); none is imported here.

    The returned function raises:
        ModelError: there is no model, or it does not have the key, has another shape there, or no values (it is on meta).
        RuleError: a scheme is malformed, does not suit the tensor, or is `from(KEY)`, whose value another step of the plan gives.
        TargetError: a user-defined scheme, or a layer's `reset_parameters`, fails.
        CastError: a value does not fit the dtype.
    """

    @cache
    def values() -> Mapping[str, Any]:
        return {} if model is None else state_dict_of(model, type(model).__name__)

    def provide(key: str) -> memoryview:
        meta, scheme = shapes[key], inits.get(key, KEEP)
        if scheme != KEEP:
            owner, leaf = schemes.layer_of(model, key)
            return tensor_bytes(schemes.value(scheme, key, meta.shape, meta.dtype, seed, owner, own, leaf))
        if model is None:
            raise ModelError("has no initial value: no model is known", key=key, hint=f"name a scheme: init={{{key!r}: 'zeros'}}")
        return tensor_bytes(schemes.fitted(values().get(key), key, meta.shape, meta.dtype))

    return provide


def extra_state(model: nn.Module) -> dict[str, object]:
    """The values of the model's state_dict that are not tensors (`_extra_state`), by key."""
    state_dict = state_dict_of(model, type(model).__name__)
    return {key: value for key, value in state_dict.items() if not isinstance(value, torch.Tensor)}
