"""Initial values: the named schemes of `scheme_text` as tensors, and `initialize`, which puts them into a model's fresh tensors.

A named scheme's values depend on the seed and the key's name only, so that one more layer doesn't change another's values; torch's
global random state is neither read nor moved. Only what is on record as fresh is touched, and all is checked before the first
write. The formulas are `torch.nn.init`'s, whose sources `SCHEMES` names.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from ckptsurgeon.dtypes import BY_CODE, BY_TORCH
from ckptsurgeon.errors import CastError, ModelError, RuleError
from ckptsurgeon.models.groups import close_names, known_fresh
from ckptsurgeon.models.scheme_text import SCHEMES, Scheme, describe_effective, effective_scheme, parse_scheme
from ckptsurgeon.models.skeleton import checkpoint_of_state_dict, state_dict_of
from ckptsurgeon.surgery.patterns import compile_pattern

__all__ = ["SCHEMES", "Scheme", "describe_effective", "fitted", "initialize", "owner_of", "parse_scheme", "value"]

_FILL: dict[str, Callable[..., Any]] = {
    "normal": nn.init.normal_,
    "uniform": nn.init.uniform_,
    "trunc_normal": nn.init.trunc_normal_,
    "xavier_normal": nn.init.xavier_normal_,
    "xavier_uniform": nn.init.xavier_uniform_,
    "kaiming_normal": nn.init.kaiming_normal_,
    "kaiming_uniform": nn.init.kaiming_uniform_,
    "orthogonal": nn.init.orthogonal_,
}
_FIXED: dict[str, float] = {"zeros": 0.0, "ones": 1.0}
_NORM = {"weight": "ones", "bias": "zeros", "running_mean": "zeros", "running_var": "ones", "num_batches_tracked": "zeros"}

# `per_layer_type`: the first row whose types a layer is; another layer, or another name in it, keeps its constructor's value.
PER_LAYER_TYPE: tuple[tuple[tuple[type[nn.Module], ...], Mapping[str, str]], ...] = (
    (
        (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
        {"weight": "xavier_normal", "bias": "zeros"},
    ),
    ((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm), _NORM),
    ((nn.LayerNorm, nn.GroupNorm), {"weight": "ones", "bias": "zeros"}),
    ((nn.Linear,), {"weight": "normal(std=0.01)", "bias": "zeros"}),
)


def value(scheme: str, key: str, shape: tuple[int, ...], dtype_code: str, seed: int, module: nn.Module | None) -> torch.Tensor:
    """The initial value of one tensor, dense on the CPU.

    Args:
        scheme: a scheme's text, `xavier_normal` or `normal(std=0.02)`.
        key: the tensor's key; with `seed` it seeds the values.
        dtype_code: safetensors' code. Values are drawn in float32 (float64 for `F64`) and then cast.
        module: the layer that owns the key, which `model` and `per_layer_type` need; its own value is taken for theirs.

    Raises:
        RuleError: the scheme is malformed, does not suit this tensor, or needs a module that is not there.

    >>> value("constant(2)", "fc.bias", (2,), "I64", 0, None)
    tensor([2, 2])
    """
    concrete = _concrete(scheme, key, shape, dtype_code, module)
    if concrete == "model":
        return fitted(_own(module, key), key, shape, dtype_code)
    return _draw(concrete, key, shape, dtype_code, seed)


def initialize(model: nn.Module, report: object, scheme: str | Mapping[str, str] = "per_layer_type", *, seed: int = 0) -> tuple[str, ...]:
    """Initialise a model's fresh tensors in place, on whatever device they are, and return the keys that were touched.

    A tied tensor is written once, seeded by its first key, and only if all its names are fresh. Everything is checked, and
    every value is made, before the first write. The scheme `model`, and `per_layer_type` on a layer that its table does not
    have, leave the constructor's value as it is; such keys are not returned.

    Args:
        report: what is fresh: a report, a plan, a merged file's `Checkpoint`, or key names.
        scheme: one scheme for all fresh keys, or schemes by pattern (the first that matches wins; a fresh key that none matches
            keeps its value).

    Raises:
        NoRecordError: `report` is a checkpoint that records nothing.
        ModelError: it names keys that the model has not, or the tensor is on meta or can't be written through the state_dict.
        RuleError: a malformed scheme, one that does not suit a tensor, a pattern that matches nothing fresh.

    >>> initialize(nn.Sequential(nn.Linear(3, 2)), ["0.weight"], "zeros")
    ('0.weight',)
    """
    state = state_dict_of(model, type(model).__name__)
    fresh = known_fresh(state, report)
    schemes = _by_key(scheme, [key for key in state if key in fresh], list(state))
    storages = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
    values: list[tuple[tuple[str, ...], torch.Tensor, torch.Tensor]] = []
    problems: list[RuleError] = []
    for names in _tie_groups(state, schemes, fresh):
        key = next(name for name in names if name in schemes)
        tensor: torch.Tensor = state[key]
        code = BY_TORCH[str(tensor.dtype).removeprefix("torch.")].code
        try:
            concrete = _concrete(schemes[key], key, tuple(tensor.shape), code, owner_of(model, key))
            if concrete == "model":
                continue
            if tensor.device.type == "meta" or tensor.untyped_storage()._cdata not in storages:
                reason = "is on the meta device" if tensor.device.type == "meta" else "is a copy that a hook of the state_dict made"
                raise ModelError(f"can't be initialised in place: it {reason}", key=key, hint="build the model on a real device")
            values.append((names, tensor, _draw(concrete, names[0], tuple(tensor.shape), code, seed)))
        except RuleError as error:
            problems.append(error)
    _raise_all(problems)
    with torch.no_grad():
        for _, tensor, new in values:
            tensor.copy_(new)
    touched = {name for names, _, _ in values for name in names}
    return tuple(key for key in state if key in touched)


def owner_of(model: nn.Module | None, key: str) -> nn.Module | None:
    """The layer whose own tensor the key names, or None without a model or where the key is no path in it."""
    module: object = model
    for name in key.split(".")[:-1]:
        module = getattr(module, "_modules", {}).get(name)
    return module if isinstance(module, nn.Module) else None


def fitted(found: object, key: str, shape: tuple[int, ...], dtype_code: str) -> torch.Tensor:
    """A constructor's own value as a CPU tensor of the dtype that is wanted: finite stays finite, an integer stays what it is.

    Raises:
        ModelError: `found` is no tensor, or has another shape.
        CastError: a value does not fit the dtype.
    """
    if not isinstance(found, torch.Tensor):
        raise ModelError("is not among the model's tensors", key=key)
    if tuple(found.shape) != tuple(shape):
        raise ModelError(f"has the shape {tuple(found.shape)} in the model, not {tuple(shape)}", key=key)
    own = found.detach().to("cpu")
    cast = own.to(getattr(torch, BY_CODE[dtype_code].torch))
    if cast.dtype == own.dtype:
        return cast
    if own.is_floating_point() and cast.is_floating_point():
        fits = bool((_finite(cast) | ~_finite(own)).all())
    else:
        fits = torch.equal(cast.to(own.dtype), own)
    if not fits:
        raise CastError(f"the model's initial value ({own.dtype}) does not fit {dtype_code}", key=key)
    return cast


def _concrete(scheme: str, key: str, shape: tuple[int, ...], dtype_code: str, module: nn.Module | None) -> str:
    """The scheme that this tensor really gets, `model` for its constructor's value, checked against its shape and dtype."""
    name, _ = parse_scheme(scheme)
    if SCHEMES[name].needs == "model" and module is None:
        raise RuleError(f"{name} needs the layer itself, and no model is known here", key=key, hint=f"--init {key!r} zeros")
    if name == "per_layer_type":
        row = next((row for types, row in PER_LAYER_TYPE if isinstance(module, types)), {})
        scheme = row.get(key.rpartition(".")[2], "model")
    if scheme == "model" or name == "model":
        return "model"
    concrete = effective_scheme(scheme, key, shape)
    name, kwargs = parse_scheme(concrete)
    if name in _FILL and (BY_CODE[dtype_code].kind != "float" or dtype_code == "F8_E8M0"):
        raise RuleError(f"{name} can't be drawn in {dtype_code}", key=key, hint=f"give it a value: --init {key!r} zeros")
    if name not in _FILL:
        wanted = _FIXED.get(name, kwargs.get("value", 0.0))
        kept = float(_scalar(wanted, dtype_code).to(torch.float64).real)
        exact = name in _FIXED or BY_CODE[dtype_code].kind in ("int", "bool")
        if abs(kept) == float("inf") or kept != kept or (exact and kept != wanted):
            raise RuleError(f"{concrete} is not a value of {dtype_code}", key=key)
    return concrete


def _draw(concrete: str, key: str, shape: tuple[int, ...], dtype_code: str, seed: int) -> torch.Tensor:
    name, kwargs = parse_scheme(concrete)
    if name not in _FILL:
        return _scalar(_FIXED.get(name, kwargs.get("value", 0.0)), dtype_code).expand(shape).contiguous()
    digest = hashlib.sha256(f"{seed}:{key}".encode()).digest()
    generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "big"))
    drawn = torch.empty(shape, dtype=torch.float64 if dtype_code == "F64" else torch.float32, device="cpu")
    if drawn.numel():
        _FILL[name](drawn, generator=generator, **kwargs)
    cast = drawn.to(getattr(torch, BY_CODE[dtype_code].torch))
    if not bool(_finite(cast).all()):
        raise RuleError(f"{concrete} gives values that are not finite in {dtype_code}", key=key)
    return cast


def _scalar(number: float, dtype_code: str) -> torch.Tensor:
    return torch.full((), number, dtype=torch.float64, device="cpu").to(getattr(torch, BY_CODE[dtype_code].torch))


def _finite(tensor: torch.Tensor) -> torch.Tensor:
    return torch.isfinite(tensor if tensor.dtype == torch.float64 else tensor.to(torch.float32))


def _own(module: nn.Module | None, key: str) -> object:
    last = key.rpartition(".")[2]
    found = getattr(module, "_parameters", {}).get(last)
    return found if found is not None else getattr(module, "_buffers", {}).get(last)


def _by_key(scheme: str | Mapping[str, str], fresh: list[str], keys: list[str]) -> dict[str, str]:
    """Which fresh key gets which scheme; a pattern that matches no fresh key is an error."""
    if isinstance(scheme, str):
        parse_scheme(scheme)
        return dict.fromkeys(fresh, scheme)
    chosen: dict[str, str] = {}
    problems = []
    for text, wanted in scheme.items():
        parse_scheme(wanted)
        pattern = compile_pattern(text)
        matched = [key for key in fresh if pattern.match(key) is not None]
        for key in matched:
            chosen.setdefault(key, wanted)
        if not matched:
            known = any(pattern.match(key) is not None for key in keys)
            reason = f"the pattern {text!r} matches {'nothing that is fresh' if known else 'nothing in the model'}"
            problems.append(RuleError(reason, hint=close_names(text, fresh)))
    _raise_all(problems)
    return chosen


def _tie_groups(state: Mapping[str, Any], schemes: Mapping[str, str], fresh: frozenset[str]) -> list[tuple[str, ...]]:
    """The tensors to initialise, each as all its names; one of whose names is not fresh is left out."""
    tied = {key: names for names in checkpoint_of_state_dict(state).ties for key in names}
    groups = dict.fromkeys(tied.get(key, (key,)) for key in schemes if isinstance(state[key], torch.Tensor))
    return [names for names in groups if fresh.issuperset(names)]


def _raise_all(problems: list[RuleError]) -> None:
    if len(problems) == 1:
        raise problems[0]
    if problems:
        hint = next((problem.hint for problem in problems if problem.hint), None)
        reason = f"{len(problems)} initialisations are not possible"
        raise RuleError(reason, hint=hint, problems=tuple(problem.message for problem in problems))
