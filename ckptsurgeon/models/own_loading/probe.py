"""Finds what a model's own loading code does with names that the model does not have, by loading stand-in tensors that carry their names.

A stand-in has no memory of its own. A copy of one into the model writes nothing: the key that would have received it is recorded.
A computation on stand-ins gives one that carries the names of all inputs. Hooks after loading run only where the source lacks a key of
their module; such a key that they change is filled in. The model is restored.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import _IncompatibleKeys

from ckptsurgeon.dtypes import BY_CODE, BY_TORCH
from ckptsurgeon.errors import TargetError
from ckptsurgeon.formats.pickle.unpickled import written_out
from ckptsurgeon.loading import Loader
from ckptsurgeon.models.own_loading.snapshot import Writes, find_filled, take_snapshot, values_of
from ckptsurgeon.models.target import user_code
from ckptsurgeon.models.target.loaders import PLAIN, find_loaders, hooks_after, tensors_of
from ckptsurgeon.models.target.skeleton import state_dict_of, tie_key
from ckptsurgeon.planning.own_loading.versions import plain
from ckptsurgeon.planning.plan_types import Plan, Step
from ckptsurgeon.rules.loading_code import Made, Taken, is_below, needs_probe
from ckptsurgeon.tensors import Checkpoint, TensorMeta
from ckptsurgeon.wrappers import HIDDEN, unwrap

Build = Callable[..., nn.Module]

# Operations that keep a tensor's values, as long as its dtype and shape stay the same.
_SAME = ("detach", "clone", "contiguous", "cpu", "to", "type_as", "requires_grad_", "data")
_IN_PLACE = ("__iadd__", "__isub__", "__imul__", "__itruediv__", "__ifloordiv__", "__ipow__", "__setitem__")


@dataclass(frozen=True)
class _Loaded:
    """The value that loading would put into a tensor of the model with this `shape`: made of the tensors `names`, in `dtype`;
    `whole` if it is one of these tensors unchanged."""

    names: frozenset[str] = frozenset()
    whole: bool = False
    dtype: Any = None
    shape: tuple[int, ...] | None = None


@dataclass
class _Record:
    """What a probe recorded: `copies` by the memory they were copied to, and the loaded dict's `entries` by the model's keys."""

    copies: dict[Any, _Loaded] = field(default_factory=dict)
    entries: dict[str, _Loaded] = field(default_factory=dict)


class _Named(torch.Tensor):
    """A tensor that carries the names of the tensors it was made of."""

    names: frozenset[str]
    whole: bool
    record: _Record

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        name = getattr(getattr(func, "__self__", None), "__name__", name) if name == "__get__" else name
        inputs = [value for value in _flat((args, kwargs or {})) if isinstance(value, _Named)]
        names = frozenset().union(*(value.names for value in inputs))
        if name == "copy_" and not isinstance(args[0], _Named):
            inputs[0].record.copies[_start(args[0])] = _Loaded(names, inputs[0].whole, _dtype(inputs[0]), tuple(args[0].shape))
            return args[0]
        if name in _IN_PLACE or (name.endswith("_") and not name.startswith("__") and name not in _SAME):
            if isinstance(args[0], _Named):
                args[0].names, args[0].whole = names, False
            return args[0]
        with torch._C.DisableTorchFunctionSubclass(), torch.no_grad():
            result = func(*args, **(kwargs or {}))
        first = inputs[0]

        def wrapped(value: Any) -> Any:
            if isinstance(value, torch.Tensor):
                whole = len(names) == 1 and first.whole and name in _SAME and (value.shape, value.dtype) == (_shape(first), _dtype(first))
                return _named(value, names, whole, first.record)
            return type(value)(map(wrapped, value)) if type(value) in (tuple, list) else value

        return wrapped(result)


def _start(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Where a tensor's memory begins, without its shape, which loading code may change."""
    return tie_key(tensor)[:2]


def _shape(tensor: torch.Tensor) -> torch.Size:
    with torch._C.DisableTorchFunctionSubclass():
        return tensor.shape


def _dtype(tensor: torch.Tensor) -> torch.dtype:
    with torch._C.DisableTorchFunctionSubclass():
        return tensor.dtype


def _flat(value: Any) -> list[Any]:
    if isinstance(value, (tuple, list)):
        return [item for part in value for item in _flat(part)]
    return [item for part in value.values() for item in _flat(part)] if isinstance(value, dict) else [value]


def _named(tensor: torch.Tensor, names: frozenset[str], whole: bool, record: _Record) -> _Named:
    with torch._C.DisableTorchFunctionSubclass():
        stand_in = tensor.as_subclass(_Named)
    stand_in.names, stand_in.whole, stand_in.record = names, whole, record
    return stand_in


@dataclass(frozen=True)
class _Run:
    """One try of loading: the model's keys `lacking` in the source that loading code can reach, the lists that torch's load hands to
    hooks, what failed by path of a module, and the record."""

    lacking: frozenset[str]
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    record: _Record = field(default_factory=_Record)


def probe(
    build: Build,
    loaders: Mapping[str, Loader],
    source_tensors: Mapping[str, TensorMeta],
    versions: Mapping[str, Any],
    absent: Collection[str],
) -> Taken:
    """What the model's code does with a source's names that the model does not have, or has with another shape, and what it makes of
    keys that the source lacks.

    Args:
        build: returns a model on which the code may run, on meta where possible; with `real=True` one that has values, if there is one.
            It is asked for values only where the code writes into a key that the source lacks.
        versions: the metadata that the source recorded, by the path of the model's module.
        absent: the model's keys that no source and no rule gives.
    """
    taken, written = _tried(build(), loaders, source_tensors, versions, absent)
    return _tried(build(real=True), loaders, source_tensors, versions, absent)[0] if written else taken


def _tried(
    model: nn.Module,
    loaders: Mapping[str, Loader],
    source_tensors: Mapping[str, TensorMeta],
    versions: Mapping[str, Any],
    absent: Collection[str],
) -> tuple[Taken, bool]:
    """What the code does, and whether it writes into a key that the source lacks, on a model that has no values."""
    path = type(model).__name__
    state = state_dict_of(model, path)
    unknown = {name for name, meta in source_tensors.items() if name not in state or tuple(state[name].shape) != meta.shape}
    on_meta = any(tensor.is_meta for tensor in tensors_of(model))
    metadata = {
        module_path: dict(module_metadata)
        for module_path, module_metadata in {**getattr(state, "_metadata", {}), **versions}.items()
        if module_path in versions
    }
    lacking = frozenset(key for key in absent if any(key in loader.keys for loader in loaders.values()))
    before = values_of(state, lacking)
    restore = take_snapshot(model.modules() if "" in loaders else [child for module in _own(model, loaders) for child in module.modules()])

    def load(run: _Run) -> Mapping[str, Any]:
        stand_ins = ((name, _stand_in(name, meta, on_meta, run.record)) for name, meta in source_tensors.items())
        loaded: OrderedDict[str, Any] = OrderedDict(stand_ins)
        loaded._metadata = metadata  # type: ignore[attr-defined]
        if type(model).load_state_dict is nn.Module.load_state_dict and "load_state_dict" not in vars(model):
            _load(model, loaded, "", metadata, run)
        else:
            run.unexpected.extend(unknown)
            _runs(run.failed, "", lambda: model.load_state_dict(loaded, strict=False))
        return state_dict_of(model, path)

    run, writes = _Run(lacking), Writes(state, lacking)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # torch warns that copying to meta does nothing
            with writes if lacking else nullcontext():
                after = load(run)
            for key, value in after.items():
                if isinstance(value, _Named) and key in state:
                    run.record.copies[_start(state[key])] = _Loaded(value.names, value.whole, _dtype(value), tuple(_shape(value)))
            replaced = writes.replaced(after)
            grown = {key for key in after if key not in state and key in unknown}
            held = values_of({key: value for key, value in after.items() if not isinstance(value, _Named)}, before)
            for key in find_filled(state, before, held, restore, lambda: load(_Run(lacking))):
                run.record.entries.setdefault(key, _Loaded(dtype=after[key].dtype, shape=tuple(after[key].shape)))
    finally:
        restore()
    taken = _summary(state, loaders, unknown, source_tensors, absent, run)
    return replace(taken, grown={name: by for name, by in taken.dropped.items() if name in grown}), on_meta and (writes.seen or replaced)


def probe_file(build: Build, target: Checkpoint, source: Checkpoint) -> Taken:
    """What loading code would do with a file's names when torch loads that file. The model is built only if such code would run."""
    absent = target.keys() - source.keys()
    if not needs_probe(source, target, absent):
        return Taken()
    recorded = written_out(source.module_metadata)
    return probe(build, target.loaders, source, {path: plain(recorded[path]) for path in target.loaders if path in recorded}, absent)


def moment_steps(model: nn.Module, plan: Plan) -> dict[str, Step]:
    """A plan's steps by target key; a `load` where loading code changes a value of another version."""
    steps = {step.target: step for step in plan.steps}
    state = state_dict_of(model, type(model).__name__) if plan.versions else {}
    own = {path: plain(local) for path, local in getattr(state, "_metadata", {}).items() if path in plan.versions}
    older = {path for path, local in own.items() if {"version": 1, **plan.versions[path]} != {"version": 1, **local}}
    if older:
        loaders = {path: loader for path, loader in find_loaders(model, state).items() if path in older}
        metas = {key: TensorMeta(key, step.dtype, step.shape, ()) for key, step in steps.items() if step.sources and step.action != "load"}
        taken = probe(lambda real=False: model, loaders, metas, plan.versions, ())
        keys = {key for loader in loaders.values() for key in loader.keys} & metas.keys()
        for key in keys if taken.failed else keys & taken.changed:
            steps[key] = replace(steps[key], action="load", ops=({"op": "load"},))
    return steps


def _own(model: nn.Module, loaders: Mapping[str, Loader]) -> list[nn.Module]:
    return [module for module_path, module in model.named_modules(remove_duplicate=False) if module_path in loaders]


def _stand_in(name: str, meta: TensorMeta, on_meta: bool, record: _Record) -> _Named:
    kind = getattr(torch, BY_CODE[meta.dtype].torch)
    value = torch.empty(meta.shape, dtype=kind, device="meta") if on_meta else torch.zeros((), dtype=kind).expand(meta.shape)
    return _named(value, frozenset([name]), True, record)


def _load(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Mapping[str, Any], run: _Run) -> None:
    """Load as torch does, with hooks after loading that may fill in a key. A module whose code fails is skipped, and all in it."""
    path, local = prefix[:-1], dict(metadata.get(prefix[:-1], {}))
    own = module._load_state_dict_pre_hooks or type(module)._load_from_state_dict not in PLAIN  # torch's norms fill in a counter
    given = set(state)
    if not _runs(run.failed, path, lambda: module._load_from_state_dict(state, prefix, local, True, run.missing, run.unexpected, [])):
        return
    for name in (*module._parameters, *module._buffers):
        value = state.get(prefix + name)
        key = unwrap(prefix + name, HIDDEN)
        if isinstance(value, _Named):
            run.record.entries[key] = _Loaded(value.names, value.whole, _dtype(value))
        elif isinstance(value, torch.Tensor) and (own or prefix + name in given):
            run.record.entries[key] = _Loaded(dtype=value.dtype, shape=tuple(value.shape))
    for name, child in module._modules.items():
        if child is not None:
            below = f"{prefix}{name}."
            _load(child, {key: value for key, value in state.items() if key.startswith(below)}, below, metadata, run)
    if any(is_below(key, path) for key in run.lacking):
        for hook in hooks_after(module):
            _runs({}, path, partial(hook, module, _IncompatibleKeys(run.missing, run.unexpected)))  # the load itself says what fails


def _runs(failed: dict[str, str], path: str, function: Callable[[], object]) -> bool:
    try:
        user_code.call(path, function)
    except TargetError as error:
        failed[path] = error.reason
        return False
    return True


def _summary(
    state: Mapping[str, Any],
    loaders: Mapping[str, Loader],
    unknown: set[str],
    source_tensors: Mapping[str, TensorMeta],
    absent: Collection[str],
    run: _Run,
) -> Taken:
    record, failed = run.record, run.failed

    def class_of(name: str) -> str | None:
        path = max((path for path in loaders if is_below(name, path)), key=len, default=None)
        return None if path is None else loaders[path].name

    def is_rename(name: str, key: str) -> bool:
        return name not in state and key not in source_tensors and name not in renamed

    renamed: dict[str, tuple[str, str]] = {}
    made: dict[str, Made] = {}
    used: set[str] = set()
    changed: set[str] = set()
    known = [name for name in source_tensors if name in state and name not in unknown]
    below: dict[str, list[str]] = {}  # by the path of a module that fills in a value, the names that its code got
    for key, value in state.items():
        if not isinstance(value, torch.Tensor):
            continue
        copied = record.copies.get(_start(value))
        loaded = copied or record.entries.get(key, _Loaded())
        if loaded.names and not (loaded.whole and loaded.names == {key}):
            changed.add(key)
        filled = loaded.dtype is not None and not loaded.names
        near = max((path for path in loaders if is_below(key, path)), key=len, default="") if filled else ""
        if filled and near not in below:
            below[near] = [name for name in source_tensors if is_below(name, near)]
        names = loaded.names or frozenset((below[near] or known)[:1] if filled else ())
        new = key in absent and names
        if not (new or loaded.names & unknown) or (copied is None and loaded.names == {key}):
            continue
        (name, *more) = sorted(names)
        class_name = class_of(key) or class_of(name) or "model"
        used |= loaded.names
        if (
            name in unknown
            and loaded.whole
            and not more
            and is_rename(name, key)
            and (copied is None or source_tensors[name].shape == tuple(value.shape))
        ):
            renamed[name] = (key, class_name)
        elif not loaded.whole or loaded.names != {key} or source_tensors[key].shape != tuple(value.shape):
            dtype = BY_TORCH[str(loaded.dtype).removeprefix("torch.")].code
            made[key] = Made(tuple(sorted(names)), class_name, dtype, loaded.shape == tuple(value.shape), filled=filled)
    ignored = {name: class_of(name) for name in sorted(unknown - used - set(run.unexpected) - state.keys())}
    reached = {name: class_name for name, class_name in ignored.items() if not any(is_below(name, path) for path in failed)}
    dropped = {name: class_name for name, class_name in reached.items() if class_name is not None}
    heads = _heads(loaders, made)
    for name, (key, class_name) in list(renamed.items()):
        if _head(name, heads) is not None or _head(key, heads) is not None:
            made[key] = Made((name,), class_name, source_tensors[name].dtype, source_tensors[name].shape == tuple(state[key].shape))
            del renamed[name]
    needed = {*made, *(name for value in made.values() for name in value.names)}
    handed = {
        name: head
        for name in source_tensors
        if (name in unknown or name in made) and (name in needed or name not in state) and (head := _head(name, heads)) is not None
    }
    made = {
        key: replace(value, head=next(filter(None, (_head(name, heads) for name in (*value.read, key))), "")) for key, value in made.items()
    }
    return Taken(renamed, dropped, made, handed, failed, changed=frozenset(changed))


def _heads(loaders: Mapping[str, Loader], made: Mapping[str, Made]) -> list[str]:
    """The outermost modules whose code may compute one of these values; each is treated as a whole, with its submodules."""
    names = {name for key, value in made.items() for name in (key, *value.read)}
    paths = dict.fromkeys(unwrap(path, HIDDEN) for path in loaders)
    matching = sorted((path for path in paths if any(is_below(name, path) for name in names)), key=len)
    return [path for path in matching if not any(path != outer and (not outer or path.startswith(f"{outer}.")) for outer in matching)]


def _head(name: str, heads: list[str]) -> str | None:
    return next((path for path in heads if is_below(name, path)), None)
