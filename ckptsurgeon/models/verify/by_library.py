"""Loads a checkpoint into a model by the code of the model's own library, if the library uses other names and layouts in files.

This checks our conversions independently: the loaded model is compared with what our conversions make of the file.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ckptsurgeon.adapters.table import run
from ckptsurgeon.errors import FormatError, TargetError
from ckptsurgeon.models.init.values import tensor_bytes
from ckptsurgeon.models.target import user_code
from ckptsurgeon.models.verify import official
from ckptsurgeon.models.verify.loading import Loaded
from ckptsurgeon.models.verify.readback import BytesLike
from ckptsurgeon.planning.fits import misfits, shapes_of, tied_keys
from ckptsurgeon.planning.own_loading.read_by_library import AsRead
from ckptsurgeon.report import Finding
from ckptsurgeon.streaming.values import tensor_from
from ckptsurgeon.tensors import Checkpoint, TensorMeta

Read = Callable[[TensorMeta], BytesLike]


def load_by_library(model: nn.Module, checkpoint: Checkpoint, skeleton: Checkpoint, as_read: AsRead, read: Read) -> Loaded:
    """Load `checkpoint` into `model`, in place, by the library's own code. If the library's model is only a part of `model`, load it by
    torch, with the values that `read` gives; a note says so.

    Returns:
        As `loading.load_strictly`, with a `load` error if the library fails, and a `conversions` note on what was converted.
    """
    findings: list[Finding] = as_read.notes()
    state: dict[str, Any] = {}
    for file in official.data_files(checkpoint):
        try:
            state.update(official.load_file(checkpoint, file))
        except TargetError as error:
            refused = Finding("load", f"torch's or safetensors' reader refuses {file}: {error.reason}")
            return Loaded({}, (*findings, refused), False, {})
    file_shapes = {key: tuple(value.shape) if isinstance(value, torch.Tensor) else None for key, value in state.items()}
    view = as_read.checkpoint
    shapes = shapes_of(view)
    aliases = tied_keys(view, shapes, skeleton.ties)
    findings += as_read.forgiven(misfits(shapes, shapes_of(skeleton), aliases))
    try:
        if isinstance(model, sys.modules["transformers.modeling_utils"].PreTrainedModel):
            problems = user_code.call(checkpoint.path, _load_by_transformers, model, state)
        else:
            problems = {}
            values = {key: tensor_from(read(meta), meta.dtype).view(meta.shape) for key, meta in view.items() if key in skeleton}
            user_code.call(checkpoint.path, model.load_state_dict, values, strict=False)
            words = "loaded by torch after our own conversions: the library's model is only a part of the target"
            findings.append(Finding("conversions", words, None, "note"))
    except TargetError as error:
        return Loaded(file_shapes, (*findings, Finding("load", error.reason)), False, aliases)
    findings += [Finding("load", words, key) for key, words in problems.items()]
    return Loaded(file_shapes, tuple(findings), True, aliases)


def _load_by_transformers(model: nn.Module, state: dict[str, Any]) -> dict[str, str]:
    """Have transformers load a file's tensors into its model, as `from_pretrained` does. Returns the failed conversions by key."""
    modeling, core = sys.modules["transformers.modeling_utils"], sys.modules["transformers.core_model_loading"]
    conversions = sys.modules["transformers.conversion_mapping"].get_model_conversion_mapping(model)
    config = modeling.LoadStateDictConfig(weight_mapping=conversions)
    loading_info, _ = core.convert_and_load_state_dict_in_model(model=model, state_dict=state, load_config=config)
    model.tie_weights(missing_keys=loading_info.missing_keys, recompute_mapping=False)  # type: ignore[operator]
    return {key: str(words).strip().rpartition("\n")[2] for key, words in loading_info.conversion_errors.items()}


def reader(checkpoint: Checkpoint, as_read: AsRead, read: Read) -> Read:
    """A function that reads a tensor of `as_read`: the result of our adapters on the file's tensors, which `read` reads."""

    def values(name: str) -> torch.Tensor:
        meta = checkpoint[name]
        return tensor_from(read(meta), meta.dtype).view(meta.shape)

    def no_filling() -> torch.Tensor:
        raise FormatError("a conversion fills no tensor", path=checkpoint.path)

    def converted(meta: TensorMeta) -> BytesLike:
        conversion = as_read.converted.made.get(meta.name) if meta.place is None else None
        if conversion is None:
            return read(meta)
        tensors = [values(name) for name in conversion.names]
        for op in conversion.ops:
            tensors = list(run(op, tensors, no_filling, {}))
        return tensor_bytes(tensors[0])

    return converted
