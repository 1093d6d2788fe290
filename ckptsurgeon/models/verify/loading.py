"""Loads a checkpoint strictly into a model, by the official readers, or by the code of the model's own library, if the library uses other
names and layouts in files. Every problem becomes a finding. Nothing is compared here.

A single file is loaded with `load_state_dict(strict=True)`. Shards are loaded one after the other, so that only one is in memory; a key is
missing if torch reports it for all shards, and unexpected if torch reports it for any. Loading by the library checks our conversions
independently: the loaded model is compared with what our conversions make of the file.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ckptsurgeon.adapters.table import run
from ckptsurgeon.errors import FormatError, TargetError
from ckptsurgeon.models.init.values import tensor_bytes
from ckptsurgeon.models.target import user_code
from ckptsurgeon.models.verify import official
from ckptsurgeon.models.verify.readback import BytesLike
from ckptsurgeon.planning.fits import misfits, shapes_of, tied_keys
from ckptsurgeon.planning.own_loading.read_by_library import AsRead
from ckptsurgeon.report import Finding
from ckptsurgeon.streaming.values import tensor_from
from ckptsurgeon.tensors import Checkpoint, TensorMeta

_MISFIT = "Error(s) in loading state_dict"
Read = Callable[[TensorMeta], BytesLike]


@dataclass(frozen=True)
class Loaded:
    """The result of loading.

    Attributes:
        file_shapes: the shapes in the file by key; None for a value that is not a tensor.
        findings: the problems.
        complete: whether all values that fit are now in the model.
        aliases: model keys that take their value from another key of the file, since the model ties them.
    """

    file_shapes: Mapping[str, tuple[int, ...] | None]
    findings: tuple[Finding, ...]
    complete: bool
    aliases: Mapping[str, str]


@dataclass(frozen=True)
class _Account:
    """One `load_state_dict`: torch's missing and unexpected keys (None if unknown), why it failed, and whether values that fit were
    loaded."""

    missing: frozenset[str] | None
    unexpected: frozenset[str] | None
    reason: str | None = None
    fits_loaded: bool = True


def load_strictly(model: nn.Module, checkpoint: Checkpoint, skeleton: Checkpoint) -> Loaded:
    """Load `checkpoint` into `model`, in place, whose state_dict is `skeleton` before.

    Returns:
        Findings of `misfits`, and of the codes `load` (a reader or `load_state_dict` failed: an error, or a note where other
        findings explain it) and `hook` (a note: the model's own code handled a missing or unexpected key).
    """
    files = official.data_files(checkpoint)
    file_shapes: dict[str, tuple[int, ...] | None] = {}
    accounts: list[_Account] = []
    refused: list[Finding] = []
    for file in files:
        try:
            state = official.load_file(checkpoint, file)
        except TargetError as error:
            refused.append(Finding("load", f"torch's or safetensors' reader refuses {file}: {error.reason}"))
            continue
        file_shapes.update({key: tuple(value.shape) if isinstance(value, torch.Tensor) else None for key, value in state.items()})
        accounts.append(_load(model, state, checkpoint, skeleton.ties, strict=len(files) == 1))
        del state
    aliases = tied_keys(checkpoint, file_shapes, skeleton.ties)
    if refused:
        return Loaded(file_shapes, tuple(refused), False, aliases)
    findings = _as_torch_says(misfits(file_shapes, shapes_of(skeleton), aliases), accounts)
    explained = any(finding.level == "error" for finding in findings)
    for account in accounts:
        if account.reason is not None:
            findings.append(Finding("load", account.reason, level="note" if explained and account.fits_loaded else "error"))
    return Loaded(file_shapes, tuple(findings), all(account.fits_loaded for account in accounts), aliases)


def _load(model: nn.Module, state: Mapping[str, Any], checkpoint: Checkpoint, ties: tuple[tuple[str, ...], ...], strict: bool) -> _Account:
    if strict:
        aliases = tied_keys(checkpoint, state, ties)
        if aliases:
            state = {**state, **{key: state[kept] for key, kept in aliases.items()}}
    reported: list[Any] = []  # torch's missing and unexpected keys, also when the load fails
    hook = model.register_load_state_dict_post_hook(lambda _model, keys: reported.append(keys))  # type: ignore[no-untyped-call]
    reason, fits_loaded = None, True
    try:
        result: object = user_code.call(checkpoint.path, model.load_state_dict, state, strict=strict)
        reported = [result] if hasattr(result, "missing_keys") and hasattr(result, "unexpected_keys") else reported
    except TargetError as error:
        cause = error.__cause__
        reason, fits_loaded = error.reason, isinstance(cause, RuntimeError) and str(cause).startswith(_MISFIT)
    finally:
        hook.remove()
    if not reported:
        keys = frozenset[str]() if strict and reason is None else None
        return _Account(keys, keys, reason, fits_loaded)
    return _Account(frozenset(reported[-1].missing_keys), frozenset(reported[-1].unexpected_keys), reason, fits_loaded)


def _as_torch_says(findings: list[Finding], accounts: list[_Account]) -> list[Finding]:
    """The findings. For a key that torch reports as neither missing nor unexpected, a note says that the model's own code handles it."""
    if any(account.missing is None or account.unexpected is None for account in accounts) or not accounts:
        return findings
    missing = frozenset.intersection(*(account.missing or frozenset() for account in accounts))
    unexpected = frozenset().union(*(account.unexpected or frozenset() for account in accounts))
    reported = {"missing": missing, "unexpected": unexpected}
    return [
        Finding("hook", f"{finding.message}; the model's own loading code handles it, so it is not compared", finding.key, "note")
        if finding.code in reported and finding.key not in reported[finding.code]
        else finding
        for finding in findings
    ]


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
