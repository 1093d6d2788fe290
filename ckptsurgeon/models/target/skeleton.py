"""Describes a live model or state_dict as a `Checkpoint`: names, dtypes, shapes, strides and ties, without data.

No tensor is copied or read, so the model may be on the meta device. A sharded tensor has the shape of the whole tensor. A tensor that no
checkpoint can hold (sparse, quantized, nested, lazy, a dtype without a code) is refused by its key, never left out.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ckptsurgeon.dtypes import BY_TORCH
from ckptsurgeon.errors import FormatError
from ckptsurgeon.formats.plain.skeleton import fingerprint
from ckptsurgeon.models.target import user_code
from ckptsurgeon.models.target.conversions import find_naming
from ckptsurgeon.models.target.loaders import find_loaders
from ckptsurgeon.models.target.sharding import is_sharded, local
from ckptsurgeon.tensors import Checkpoint, TensorMeta


def checkpoint_of(model: nn.Module, path: str, *, note: Callable[[str], None] | None = None) -> Checkpoint:
    """The model's state_dict as a `Checkpoint` of format `model`, in state_dict order, non-persistent buffers left out.

    `note` gets one line if the state_dict holds values that are not tensors.

    Raises:
        TargetError: a hook of the model failed.
        FormatError: a tensor that no checkpoint can hold, with its key.

    >>> checkpoint_of(nn.Linear(3, 2), "demo")["weight"].shape
    (2, 3)
    """
    state = state_dict_of(model, path)
    checkpoint = replace(
        checkpoint_of_state_dict(state, path),
        loaders=find_loaders(model, state),
        naming=find_naming(model, state),
        overlaps=_overlaps(state),
    )
    if note is not None and checkpoint.entries:
        note(f"{path} holds {len(checkpoint.entries)} beside its tensors: {', '.join(checkpoint.entries)}")
    return checkpoint


def checkpoint_of_state_dict(state_dict: Mapping[str, object], path: str = "state_dict") -> Checkpoint:
    """A live dict of tensors as a `Checkpoint` of format `model`; its other values become `entries`.

    Ties are tensors of one storage with the same offset, dtype, shape and stride, on any device. The fingerprint is the SHA-256
    of names, dtypes, shapes and ties.

    Raises:
        FormatError: a key that is no string, or a tensor that no checkpoint can hold, with its key.

    >>> checkpoint_of_state_dict({"w": torch.zeros(2, 3), "epoch": 3}).entries
    {'epoch': 3}
    """
    tensors: dict[str, TensorMeta] = {}
    entries: dict[str, Any] = {}
    by_tie: dict[tuple[Any, ...], list[str]] = {}
    for key, value in state_dict.items():
        if not isinstance(key, str):
            raise FormatError(f"has a key that is not a string: {key!r}", path=path)
        if not isinstance(value, torch.Tensor):
            entries[key] = value
            continue
        tensors[key] = _meta(key, value, path)
        if value.numel():
            by_tie.setdefault(tie_key(value), []).append(key)
    ties = tuple(tuple(keys) for keys in by_tie.values() if len(keys) > 1)
    return Checkpoint(
        path=path,
        format="model",
        kind="model",
        fingerprint=fingerprint(tensors, ties),
        tensors=tensors,
        entries=entries,
        module_metadata=module_metadata(state_dict),
        ties=ties,
    )


def refuse_no_tensors(state_dict: Mapping[Any, object], path: str, wanted: Container[str] = ()) -> None:
    """FormatError for an empty dict, and for arrays or lists of numbers instead of tensors.

    In a dict that also has tensors, only the `wanted` keys are checked.
    """
    if not state_dict:
        raise FormatError("is an empty dict, and holds no tensor", path=path, hint="give model.state_dict(), or what torch.load returned")
    numbers = [key for key, value in state_dict.items() if _is_array(value) or _is_numbers(value)]
    beside_tensors = any(isinstance(value, torch.Tensor) for value in state_dict.values())
    numbers = [key for key in numbers if key in wanted] if beside_tensors else numbers
    if not numbers:
        return
    value = state_dict[numbers[0]]
    kind, make = ("np.ndarray", "torch.from_numpy(v)") if _is_array(value) else (type(value).__name__, "torch.tensor(v)")
    words = "a NumPy array" if _is_array(value) else f"a {kind} of numbers"
    reason = f"is {words}, not a tensor{f', nor are {len(numbers) - 1} more' if len(numbers) > 1 else ''}"
    hint = f"{{k: {make} for k, v in {path}.items(){'' if len(numbers) == len(state_dict) else f' if isinstance(v, {kind})'}}}"
    if beside_tensors:
        hint = f"{{k: torch.as_tensor(v) if k in model.state_dict() else v for k, v in {path}.items()}}"
    raise FormatError(reason, path=path, key=str(numbers[0]), hint=hint)


def _is_array(value: object) -> bool:
    return type(value).__name__ in ("ndarray", "memmap") and type(value).__module__.startswith("numpy")


def _is_numbers(value: object) -> bool:
    """Whether a value is a list of numbers, possibly nested."""
    while isinstance(value, (list, tuple)) and value:
        value = value[0]
        if isinstance(value, (int, float, complex)):
            return True
    return False


def state_dict_of(model: nn.Module, path: str) -> dict[str, Any]:
    """The model's `state_dict()`; TargetError, with `path`, if the user's hooks fail."""
    state_dict: dict[str, Any] = user_code.call(path, model.state_dict)
    return state_dict


def module_metadata(state_dict: Mapping[str, object]) -> dict[str, Any]:
    """torch's `_metadata` (module path to version and the like) as plain dicts; empty for a plain dict."""
    metadata = getattr(state_dict, "_metadata", None)
    if not isinstance(metadata, Mapping):
        return {}
    return {str(name): dict(value) if isinstance(value, Mapping) else value for name, value in metadata.items()}


def _overlaps(state_dict: Mapping[str, object]) -> tuple[tuple[str, ...], ...]:
    """Groups of keys whose memory overlaps, ties left out. A tensor's memory is all from its first to its last byte."""
    by_storage: dict[int, list[tuple[int, int, str]]] = {}
    for key, value in state_dict.items():
        if isinstance(value, torch.Tensor) and value.numel() and not is_traceable_wrapper_subclass(value):
            first = int(value.storage_offset()) * value.element_size()
            extent = sum((int(size) - 1) * int(step) for size, step in zip(value.shape, value.stride(), strict=True)) + 1
            by_storage.setdefault(value.untyped_storage()._cdata, []).append((first, first + extent * value.element_size(), key))
    groups: list[list[str]] = []
    for spans in by_storage.values():
        end = -1
        for first, last, key in sorted(spans) if len(spans) > 1 else ():
            groups[-1].append(key) if first < end else groups.append([key])
            end = max(end, last)
    tie_keys = {key: tie_key(value) for key, value in state_dict.items() if isinstance(value, torch.Tensor)} if groups else {}
    return tuple(tuple(group) for group in groups if len({tie_keys[key] for key in group}) > 1)


def _meta(key: str, tensor: torch.Tensor, path: str) -> TensorMeta:
    problem = _unsupported(tensor)
    if problem is not None:
        reason, hint = problem
        raise FormatError(reason, path=path, key=key, hint=hint)
    dtype = BY_TORCH.get(str(tensor.dtype).removeprefix("torch."))
    if dtype is None:
        raise FormatError(f"has the dtype {tensor.dtype}, which no checkpoint can hold", path=path, key=key)
    return TensorMeta(key, dtype.code, tuple(tensor.shape), tuple(tensor.stride()))


def _unsupported(tensor: torch.Tensor) -> tuple[str, str] | None:
    """The reason and hint for a tensor that is no plain slice of a storage; None for a tensor that is."""
    if is_lazy(tensor):
        return "is lazy: it has no shape before the first forward pass", "run one forward pass first"
    if tensor.is_quantized:
        return "is quantized", "use its dequantized values: tensor.dequantize()"
    if tensor.is_nested or tensor.layout != torch.strided:
        return f"is not a dense tensor ({'nested' if tensor.is_nested else tensor.layout})", "use its dense form: tensor.to_dense()"
    if is_traceable_wrapper_subclass(tensor) and not is_sharded(tensor):
        return f"is a {type(tensor).__name__}, which wraps other tensors", "use a plain tensor: its full or dequantized values"
    return None


def tie_key(tensor: torch.Tensor) -> tuple[Any, ...]:
    """A value that is equal for tied tensors.

    A storage is identified by its object, since every data pointer on meta is 0. For a sharded tensor: the memory of this rank's part, and
    the whole tensor's shape.
    """
    if is_sharded(tensor):
        return (*tie_key(local(tensor)), tuple(tensor.shape))
    storage = tensor.untyped_storage()._cdata
    flags = (tensor.is_conj(), tensor.is_neg())
    return (storage, tensor.storage_offset(), tensor.dtype, tuple(tensor.shape), tensor.stride(), flags)
