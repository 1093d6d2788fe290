"""Makes the initial value of a tensor by a scheme of `scheme_text`.

Values of named and user-defined schemes depend only on the seed and the key, those of `reset` on the seed and the layer's name, so that
another layer doesn't change them. torch's global random state is neither read nor changed, and no model is written to.
The formulas are `torch.nn.init`'s; `SCHEMES` names their papers.

`reset` is what a module's own `reset_parameters` gives: it runs on a copy of that module on the CPU, under a forked random state, whose
tensors are overwritten first, so that one which it does not set is recognised and refused. The module may be on meta.
"""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from ckptsurgeon.dtypes import BY_CODE
from ckptsurgeon.errors import CastError, ModelError, RuleError, TargetError
from ckptsurgeon.models.init.scheme_text import SCHEMES, effective_scheme, is_own, parse_scheme
from ckptsurgeon.models.init.user_functions import Fill, checked_tensor
from ckptsurgeon.models.target import user_code
from ckptsurgeon.models.target.build import forked, is_unset
from ckptsurgeon.models.target.parameters import Named, inner, named_tensors
from ckptsurgeon.wrappers import WRAPPERS

KEEP = "model"
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

# `per_layer_type`: the first row whose types a layer has. Other layers, and other names in a layer, keep their constructor's value.
PER_LAYER_TYPE: tuple[tuple[tuple[type[nn.Module], ...], Mapping[str, str]], ...] = (
    (
        (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
        {"weight": "xavier_normal", "bias": "zeros"},
    ),
    ((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm), _NORM),
    ((nn.LayerNorm, nn.GroupNorm), {"weight": "ones", "bias": "zeros"}),
    ((nn.Linear,), {"weight": "normal(std=0.01)", "bias": "zeros"}),
)


def value(
    scheme: str,
    key: str,
    shape: tuple[int, ...],
    dtype_code: str,
    seed: int,
    module: nn.Module | None,
    own: Mapping[str, Fill] = {},
    leaf: str | None = None,
) -> torch.Tensor:
    """The initial value of one tensor, dense on the CPU. Values are drawn in float32 (float64 for `F64`) and then cast.

    Args:
        scheme: a scheme's text; `from(KEY)` has no value by itself.
        key: together with `seed` it seeds the values.
        module: the layer that owns the key, which `model`, `per_layer_type` and `reset` need. The first two take its current value;
            for `reset` it may be on meta.
        own: the loaded functions of user-defined schemes, by name (`user_functions.own_schemes`).
        leaf: the tensor's name in its layer; by default the key's last segment.

    Raises:
        RuleError: the scheme is malformed, does not suit this tensor, or needs a module or a function that the caller did not pass.
        TargetError: a user-defined function, or a layer's `reset_parameters`, fails or returns something else.

    >>> value("constant(2)", "fc.bias", (2,), "I64", 0, None)
    tensor([2, 2])
    """
    chosen = concrete(scheme, key, shape, dtype_code, module, leaf)
    if chosen == KEEP:
        return fitted(own_tensor(module, leaf or key), key, shape, dtype_code)
    return drawn(chosen, key, shape, dtype_code, seed, module, own, leaf)


def concrete(scheme: str, key: str, shape: tuple[int, ...], dtype_code: str, module: nn.Module | None, leaf: str | None = None) -> str:
    """The scheme that this tensor really gets (`model` for its constructor's value), checked against its shape and dtype."""
    name, _ = parse_scheme(scheme)
    if is_own(name):
        return scheme
    if name == "from":
        raise RuleError(
            f"{scheme} is another key's value, and no other values are available here", key=key, hint=f"init={{{key!r}: 'zeros'}}"
        )
    if SCHEMES[name].needs in ("model", "layer") and module is None:
        raise RuleError(f"{name} needs the layer itself, and no model is known here", key=key, hint=f"init={{{key!r}: 'zeros'}}")
    if name == "per_layer_type":
        row = next((row for types, row in PER_LAYER_TYPE if isinstance(module, types)), {})
        scheme = row.get((leaf or key).rpartition(".")[2], KEEP)
        name, _ = parse_scheme(scheme)
    if name in (KEEP, "reset"):
        return name
    chosen = effective_scheme(scheme, key, shape)
    name, kwargs = parse_scheme(chosen)
    if name in _FILL and (BY_CODE[dtype_code].kind != "float" or dtype_code == "F8_E8M0"):
        raise RuleError(f"{name} can't be drawn in {dtype_code}", key=key, hint=f"give it a value: init={{{key!r}: 'zeros'}}")
    if name not in _FILL:
        constant = _FIXED.get(name, kwargs.get("value", 0.0))
        stored = float(_scalar(constant, dtype_code).to(torch.float64).real)
        exact = name in _FIXED or BY_CODE[dtype_code].kind in ("int", "bool")
        if abs(stored) == float("inf") or stored != stored or (exact and stored != constant):
            raise RuleError(f"{chosen} is not a value of {dtype_code}", key=key)
    return chosen


def drawn(
    chosen: str,
    key: str,
    shape: tuple[int, ...],
    dtype_code: str,
    seed: int,
    module: nn.Module | None,
    own: Mapping[str, Fill],
    leaf: str | None = None,
) -> torch.Tensor:
    """The value of a scheme that `concrete` returned, except `model`. Raises as `value`."""
    name, kwargs = parse_scheme(chosen)
    try:
        if name == "reset" and module is not None:
            return fitted(reset_value(module, key, seed_of(seed, key.rpartition(".")[0]), leaf), key, shape, dtype_code)
        if is_own(name):
            return _cast(_filled(chosen, key, shape, dtype_code, seed, own), chosen, key, dtype_code)
    except TargetError as error:
        raise TargetError(error.reason, path=error.path, key=error.key or key, hint=error.hint) from error.__cause__
    if name not in _FILL:
        return _scalar(_FIXED.get(name, kwargs.get("value", 0.0)), dtype_code).expand(shape).contiguous()
    tensor = torch.zeros(shape, dtype=torch.float64 if dtype_code == "F64" else torch.float32, device="cpu")
    if tensor.numel():
        with _one_thread() if name == "orthogonal" else nullcontext():  # its decomposition depends on the number of threads
            _FILL[name](tensor, generator=torch.Generator("cpu").manual_seed(seed_of(seed, key)), **kwargs)
    return _cast(tensor, chosen, key, dtype_code)


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def seed_of(seed: int, name: str) -> int:
    """The seed of one key or layer: 64 bits of a SHA-256 of `seed` and its name.

    >>> seed_of(0, "fc.weight") == seed_of(0, "fc.weight") != seed_of(1, "fc.weight")
    True
    """
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "big")


def owner_of(model: nn.Module | None, key: str) -> nn.Module | None:
    """The layer whose own tensor or extra state the key names; None without a model, or if the key is not in it.

    The key may leave out the segments that wrappers add to a path.

    >>> owner_of(nn.Sequential(nn.DataParallel(nn.Linear(3, 2))), "0.weight")
    Linear(in_features=3, out_features=2, bias=True)
    """
    *path, leaf = key.split(".")
    module = model
    for name in path:
        if module is None:
            return None
        within = inner(module)
        if name in WRAPPERS and within is not module and name not in {*module._modules, *within._modules}:
            continue  # the segment of a wrapper within `module`, whose own segment a hook left out of the key
        module = module._modules[name] if name in module._modules else within._modules.get(name)
    if module is None:
        return None
    own_state = leaf == "_extra_state" and type(module).get_extra_state is not nn.Module.get_extra_state
    return module if own_state or leaf in module._parameters or leaf in module._buffers else inner(module)


def layer_of(model: nn.Module | None, key: str, tensors: Iterable[Named] | None = None) -> tuple[nn.Module | None, str]:
    """`owner_of`, and the tensor's name in it, even if a hook gives the tensor another key in the state_dict."""
    owner, leaf = owner_of(model, key), key.rpartition(".")[2]
    if model is None or (owner is not None and own_tensor(owner, leaf) is not None):
        return owner, leaf
    if tensors is None:
        tensors = [named for part in named_tensors(model) for named in part.values()]
    name = next((named.names[0] for named in tensors if key in named.keys), None)
    return (owner, leaf) if name is None else (owner_of(model, name), name.rpartition(".")[2])


def fitted(source: object, key: str, shape: tuple[int, ...], dtype_code: str) -> torch.Tensor:
    """A model's value as a CPU tensor of dtype `dtype_code`. Finite values stay finite, and integers keep their value.

    Raises:
        ModelError: `source` is no tensor, has another shape, is on meta, or was never written to.
        CastError: a value does not fit the dtype.
    """
    if not isinstance(source, torch.Tensor):
        raise ModelError("is not among the model's tensors", key=key)
    if tuple(source.shape) != tuple(shape):
        raise ModelError(f"has the shape {tuple(source.shape)} in the model, not {tuple(shape)}", key=key)
    if source.is_meta:
        raise ModelError("is on the meta device and has no value", key=key, hint="build the model on the CPU")
    if is_unset(source):
        raise ModelError(
            "is left without a value by the model's constructor: it is uninitialised memory", key=key, hint=f"init={{{key!r}: 'zeros'}}"
        )
    original = source.detach().to("cpu")
    cast = original.to(getattr(torch, BY_CODE[dtype_code].torch))
    if cast.dtype == original.dtype:
        return cast
    if original.is_floating_point() and cast.is_floating_point():
        fits = bool((_finite(cast) | ~_finite(original)).all())
    else:
        fits = torch.equal(cast.to(original.dtype), original)
    if not fits:
        raise CastError(f"the model's initial value ({original.dtype}) does not fit {dtype_code}", key=key)
    return cast


def _filled(chosen: str, key: str, shape: tuple[int, ...], dtype_code: str, seed: int, own: Mapping[str, Fill]) -> torch.Tensor:
    """The value of a user-defined scheme. Its function fills a tensor of dtype `dtype_code`, or float32 for narrower floats."""
    name, arguments = parse_scheme(chosen)
    if name not in own:
        raise RuleError(f"{name} is a function of your own, and it has not been imported here", key=key)
    row = BY_CODE[dtype_code]
    tensor = torch.zeros(shape, dtype=torch.float32 if row.kind == "float" and row.size < 4 else getattr(torch, row.torch), device="cpu")
    if not tensor.numel():
        return tensor
    key_seed = seed_of(seed, key)
    with forked(key_seed):  # the function may draw without the generator
        returned = own[name](tensor, torch.Generator("cpu").manual_seed(key_seed), **arguments)
    filled = checked_tensor(tensor if returned is None else returned, chosen)
    if filled.shape != tensor.shape:
        raise TargetError(f"gives the shape {tuple(filled.shape)}, not {tuple(shape)}", path=chosen, key=key)
    return filled


def _cast(tensor: torch.Tensor, chosen: str, key: str, dtype_code: str) -> torch.Tensor:
    cast = tensor.to(getattr(torch, BY_CODE[dtype_code].torch))
    if (
        BY_CODE[dtype_code].kind not in ("float", "complex")
        and cast.dtype != tensor.dtype
        and not torch.equal(cast.to(tensor.dtype), tensor)
    ):
        raise RuleError(f"{chosen} gives values that {dtype_code} can't have", key=key)
    if not bool(_finite(cast).all()):
        raise RuleError(f"{chosen} gives values that are not finite in {dtype_code}", key=key)
    return cast


def _scalar(number: float, dtype_code: str) -> torch.Tensor:
    return torch.full((), number, dtype=torch.float64, device="cpu").to(getattr(torch, BY_CODE[dtype_code].torch))


def _finite(tensor: torch.Tensor) -> torch.Tensor:
    return torch.isfinite(tensor if tensor.dtype == torch.float64 else tensor.to(torch.float32))


def reset_value(module: nn.Module, key: str, seed: int, leaf: str | None = None) -> torch.Tensor:
    """The tensor that `key` names in the layer `module` after `module.reset_parameters()`, on the CPU, in the module's own dtype and shape.

    All tensors of a module come from runs with the same seed. Its children are reset only if its `reset_parameters` does so.

    Raises:
        RuleError: the module has no `reset_parameters`, or it does not set this tensor, or sets it to NaN.
        TargetError: `reset_parameters` fails, or the module can't be copied.

    >>> reset_value(nn.LayerNorm(2), "norm.weight", 0)
    tensor([1., 1.])
    """
    kind, hint = type(module).__name__, f"name another scheme: init={{{key!r}: 'zeros'}}, or model for the constructor's value"
    if not callable(getattr(module, "reset_parameters", None)):
        raise RuleError(f"its layer, a {kind}, has no reset_parameters", key=key, hint=hint)
    name = leaf or key.rpartition(".")[2]
    value = _run(module, name, seed, 0)
    if value is None:
        raise RuleError(f"the {kind}'s reset_parameters leaves no such tensor", key=key, hint=hint)
    if value.is_floating_point() or value.is_complex():
        unset = torch.isnan(value if value.is_complex() or value.dtype == torch.float64 else value.to(torch.float32))
    else:
        again = _run(module, name, seed, 1)
        unset = torch.ones((), device="cpu") if again is None or again.shape != value.shape else value != again
    if bool(unset.any()):
        how = "does not set this" if bool(unset.all()) else "does not set all of this"
        raise RuleError(f"the {kind}'s reset_parameters {how}", key=key, hint=hint)
    return value


def own_tensor(module: nn.Module | None, key: str) -> torch.Tensor | None:
    """The parameter or buffer of `module` itself whose name is the key's last segment."""
    name = key.rpartition(".")[2]
    tensor = getattr(module, "_parameters", {}).get(name)
    if tensor is None:
        tensor = getattr(module, "_buffers", {}).get(name)
    return tensor if isinstance(tensor, torch.Tensor) else None


def _run(module: nn.Module, name: str, seed: int, prefill: int) -> torch.Tensor | None:
    """The tensor after one run on a copy whose tensors were filled with NaN, or with `prefill` if their dtype has no NaN."""

    def run() -> torch.Tensor | None:
        layer = _on_cpu(module, name, prefill)
        reset: object = layer.reset_parameters
        assert callable(reset)
        reset()
        tensor = own_tensor(layer, name)
        return None if tensor is None else tensor.detach()

    with forked(seed), torch.device("cpu"):
        return user_code.call(type(module).__name__, run)


def _on_cpu(module: nn.Module, name: str, prefill: int) -> nn.Module:
    """A copy on the CPU whose own parameters and tensor `name` are overwritten; for a module on meta, all its tensors are."""
    layer = copy.deepcopy(module)
    tensors = [*layer.parameters(), *layer.buffers()]
    if any(tensor.is_meta for tensor in tensors):
        layer.to_empty(device="cpu")
        overwritten = [*layer.parameters(), *layer.buffers()]
    else:
        layer.to("cpu")
        requested = own_tensor(layer, name)
        overwritten = [*layer.parameters(recurse=False), *([] if requested is None else [requested])]
    with torch.no_grad():
        for tensor in overwritten:
            tensor.fill_(math.nan if tensor.is_floating_point() or tensor.is_complex() else prefill)
    return layer
