"""Which tensors are fresh, and a model's parameters in groups that learn at different rates.

Every trainable parameter is in exactly one group, a frozen one in none; that is checked by identity before anything is returned.
Nothing here changes the model or guesses what is fresh: where no record says so, that is an error.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from ckptsurgeon.errors import ModelError, NoRecordError
from ckptsurgeon.models.skeleton import state_dict_of
from ckptsurgeon.surgery.patterns import compile_pattern
from ckptsurgeon.tensors import Checkpoint

TRANSFERRED, FRESH = "transferred", "fresh"
_WRAPPERS = ("module.", "_orig_mod.")


def fresh_keys(source: object) -> frozenset[str]:
    """The keys that are fresh by `source`'s own record.

    Args:
        source: a report or a plan (anything with `fresh`, a tuple of keys), a merged file's `Checkpoint`, or key names.

    Raises:
        NoRecordError: a checkpoint without provenance, or a verification of one.
        ModelError: `source` is none of these.

    >>> sorted(fresh_keys(["fc3.weight", "fc3.bias"]))
    ['fc3.bias', 'fc3.weight']
    """
    if isinstance(source, Checkpoint):
        found: object = (source.provenance or {}).get("fresh")
        path: str | None = source.path
    else:
        found, path = getattr(source, "fresh", source), None
    if found is None:
        raise NoRecordError(
            "does not record which parameters are fresh",
            path=path,
            hint="name them by pattern, {'fc3.*': 1e-2}, or merge again without --no-provenance",
        )
    keys = list(found) if isinstance(found, Iterable) and not isinstance(found, (str, bytes)) else None
    if keys is None or not all(isinstance(key, str) for key in keys):
        raise ModelError(f"a {type(source).__name__} does not say what is fresh", hint="pass a report, a plan, a checkpoint or key names")
    return frozenset(keys)


def known_fresh(keys: Iterable[str], source: object) -> frozenset[str]:
    """`fresh_keys(source)`, all of which must be among a model's `keys`.

    Raises:
        ModelError: some are not: the record is another model's, or the model was wrapped since.
    """
    fresh, known = fresh_keys(source), set(keys)
    unknown = sorted(fresh - known)
    if unknown:
        wrapper = next((prefix for prefix in _WRAPPERS if all(prefix + key in known for key in unknown)), None)
        hint = f"pass the model inside the wrapper: model.{wrapper[:-1]}" if wrapper else close_names(unknown[0], known)
        raise ModelError(
            f"{len(unknown)} keys that are fresh on record are not in this model",
            hint=hint or "pass the model that the record was made for",
            problems=tuple(unknown[:10]) + ((f"and {len(unknown) - 10} more",) if len(unknown) > 10 else ()),
        )
    return fresh


def param_groups(
    model: nn.Module,
    source: object,
    *,
    lr: float | None,
    fresh_lr: float | None = None,
    fresh_scale: float | None = None,
    weight_decay: float | None = None,
    overrides: Mapping[str, float] | None = None,
) -> list[dict[str, Any]]:
    """Parameter groups for any `torch.optim` optimizer: `transferred`, `fresh`, then one for each override; empty ones left out.

    A tied parameter counts once, under its first name; it is fresh only if all its names are, since otherwise a source gave it its
    values, and an override takes it if the pattern matches any of its names.

    Args:
        model: on any device; its `requires_grad` flags say what is trainable.
        source: what is fresh, as for `fresh_keys`.
        lr: the transferred parameters' learning rate; None leaves it to the optimizer.
        fresh_lr: the fresh parameters' learning rate, or
        fresh_scale: what `lr` is multiplied with for them.
        weight_decay: for all groups; None leaves it to the optimizer.
        overrides: learning rate by pattern of parameter names, before all else; the first pattern that matches wins.

    Returns:
        Dicts of `name`, `params` (the parameters), `param_names`, and `lr` and `weight_decay` where they are known. All have
        `param_names`, as torch's optimizers want it, and keep it through their state_dict.

    Raises:
        NoRecordError: as `fresh_keys`.
        ModelError: keys on record that the model has not, a pattern that matches no trainable parameter, nothing trainable, a lazy
            parameter, a rate that is negative or not a number, both or none of `fresh_lr` and `fresh_scale` where one is needed.

    >>> net = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    >>> groups = param_groups(net, ["1.weight", "1.bias"], lr=1e-3, fresh_lr=1e-2)
    >>> [(group["name"], group["lr"], group["param_names"]) for group in groups]
    [('transferred', 0.001, ['0.weight', '0.bias']), ('fresh', 0.01, ['1.weight', '1.bias'])]
    """
    given = dict(overrides or {})
    _check_rates({"lr": lr, "fresh_lr": fresh_lr, "fresh_scale": fresh_scale, "weight_decay": weight_decay, **given})
    if fresh_lr is not None and fresh_scale is not None:
        raise ModelError("fresh_lr and fresh_scale are both given", hint="give one: fresh_lr is a rate, fresh_scale a multiple of lr")
    if fresh_scale is not None and lr is None:
        raise ModelError("fresh_scale multiplies lr, and no lr is given", hint="give lr, or fresh_lr")
    keys = state_dict_of(model, type(model).__name__)
    fresh = known_fresh(keys, source)
    names = _names(model)
    trainable = {first: (parameter, all_names) for first, (parameter, all_names) in names.items() if parameter.requires_grad}
    if not trainable:
        raise ModelError("the model has no trainable parameter", hint="set requires_grad_(True) on what should learn" if names else None)
    chosen = _chosen(given, trainable, names)
    rate = lr * fresh_scale if lr is not None and fresh_scale is not None else fresh_lr
    rows: list[tuple[str, float | None]] = [(TRANSFERRED, lr), (FRESH, rate), *given.items()]
    members: list[list[tuple[str, nn.Parameter]]] = [[] for _ in rows]
    for first, (parameter, all_names) in trainable.items():
        by_record = int(all(name in fresh for name in all_names))
        members[chosen.get(first, by_record)].append((first, parameter))
    if members[1] and rate is None:
        raise ModelError(
            f"{len(members[1])} parameters are fresh, and no rate is given for them",
            key=members[1][0][0],
            hint="give fresh_lr=1e-2, or fresh_scale=10",
        )
    groups = [_group(*row, weight_decay, own) for row, own in zip(rows, members, strict=True) if own]
    _check_partition(model, groups)
    return groups


def close_names(text: str, names: Iterable[str]) -> str | None:
    """A hint with the names that look most like `text`, its wildcards left out, or with the first names; None without names.

    >>> close_names("fc9.*", ["conv1.weight", "fc3.bias"]), close_names("zz", ["conv1.weight", "fc3.bias"])
    ('is it fc3.bias?', 'there are conv1.weight, fc3.bias')
    """
    known = list(names)
    plain = text.replace("*", "")
    close = difflib.get_close_matches(plain, known, n=3) or difflib.get_close_matches(plain, known, n=3, cutoff=0.45)
    if close:
        return f"is it {' or '.join(close)}?"
    return f"there are {', '.join(known[:3])}{' …' if len(known) > 3 else ''}" if known else None


def _group(name: str, lr: float | None, weight_decay: float | None, members: list[tuple[str, nn.Parameter]]) -> dict[str, Any]:
    known = {"lr": lr, "weight_decay": weight_decay}
    return {
        "name": name,
        "params": [parameter for _, parameter in members],
        "param_names": [first for first, _ in members],
        **{word: value for word, value in known.items() if value is not None},
    }


def _names(model: nn.Module) -> dict[str, tuple[nn.Parameter, list[str]]]:
    """First name to the parameter and all its names, in the model's order."""
    found: dict[int, tuple[nn.Parameter, list[str]]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if is_lazy(parameter):
            raise ModelError("is lazy: it has no shape before the first forward pass", key=name, hint="run one forward pass first")
        found.setdefault(id(parameter), (parameter, []))[1].append(name)
    return {all_names[0]: (parameter, all_names) for parameter, all_names in found.values()}


def _chosen(
    overrides: Mapping[str, float],
    trainable: Mapping[str, tuple[nn.Parameter, list[str]]],
    names: Mapping[str, tuple[nn.Parameter, list[str]]],
) -> dict[str, int]:
    """First name to the place, in the list of groups, of the override that takes the parameter."""
    chosen: dict[str, int] = {}
    problems = []
    every = [name for _, all_names in names.values() for name in all_names]
    for place, text in enumerate(overrides, start=2):
        pattern = compile_pattern(text)
        matched = [first for first, (_, all_names) in trainable.items() if any(pattern.match(name) is not None for name in all_names)]
        for first in matched:
            chosen.setdefault(first, place)
        if not matched:
            frozen = any(pattern.match(name) is not None for name in every)
            problems.append((f"the pattern {text!r} matches {'frozen parameters only' if frozen else 'no parameter'}", text))
    if problems:
        hint = close_names(problems[0][1], every)
        if len(problems) == 1:
            raise ModelError(problems[0][0], hint=hint)
        raise ModelError(f"{len(problems)} patterns match nothing", hint=hint, problems=tuple(reason for reason, _ in problems))
    return chosen


def _check_rates(rates: Mapping[str, float | None]) -> None:
    for name, value in rates.items():
        if value is None:
            continue
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value) or value < 0:
            raise ModelError(f"{name} can't be {value!r}", hint="a rate is a number that is not negative")


def _check_partition(model: nn.Module, groups: list[dict[str, Any]]) -> None:
    """Every trainable parameter is in exactly one group, and nothing else is."""
    placed = [id(parameter) for group in groups for parameter in group["params"]]
    trainable = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    if len(placed) != len(set(placed)) or set(placed) != trainable:
        raise ModelError("the parameters changed while they were grouped")
