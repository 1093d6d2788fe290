"""`initialize` writes initial values into a live model's fresh tensors, in place.

Only tensors that a record lists as fresh are changed. Everything is checked, and every value is made, before the first write.
`schemes.py` makes the values; this module chooses a scheme for each key by pattern, treats tied names as one tensor, and resolves
`from(KEY)`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from ckptsurgeon.errors import ModelError, RuleError
from ckptsurgeon.hints import close_hint
from ckptsurgeon.models.init.recorded import known_fresh
from ckptsurgeon.models.init.scheme_text import parse_scheme
from ckptsurgeon.models.init.schemes import KEEP, concrete, drawn, fitted, layer_of, value
from ckptsurgeon.models.init.user_functions import Fill, function_schemes, own_schemes
from ckptsurgeon.models.target.loaders import storage_of, tensors_of
from ckptsurgeon.models.target.parameters import keys_by_name, matched, named_tensors
from ckptsurgeon.models.target.skeleton import checkpoint_of_state_dict, state_dict_of
from ckptsurgeon.rules.copied_value import copied, filled_in, follow
from ckptsurgeon.rules.meant import meant_hint
from ckptsurgeon.rules.patterns import Pattern, compile_pattern
from ckptsurgeon.streaming.values import code_of

__all__ = ["initialize", "layer_of", "value"]


def _copy(tensor: torch.Tensor, value: torch.Tensor) -> None:
    tensor.copy_(value)


Names = tuple[str, ...]  # all names of one tensor
SchemeOrFunction = str | Callable[..., Any]  # a scheme's text, or a function (tensor, generator)


def initialize(
    model: nn.Module,
    report: object,
    scheme: SchemeOrFunction | Mapping[str, SchemeOrFunction] = "per_layer_type",
    *,
    seed: int = 0,
    note: Callable[[str], None] = lambda _line: None,
    write: Callable[[torch.Tensor, torch.Tensor], None] = _copy,
    plain: Callable[[nn.Module], nn.Module] = lambda layer: layer,
    whole: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor,
) -> tuple[str, ...]:
    """Initialise a model's fresh tensors in place, on any device, and return the keys that were written.

    A tied tensor is written once, seeded by its first key, and only if all its names are fresh. Everything is checked, and
    every value is made, before the first write. The scheme `model`, and `per_layer_type` on a layer type that is not in its table,
    leave the constructor's value unchanged; such keys are not returned. `from(KEY)` gives the value that KEY has afterwards, whether
    KEY is fresh or not; KEY may use the pattern's parts: `{"layers.{i}.{p}": "from(layers.{i-1}.{p})"}`.

    Args:
        report: the record of what is fresh: a report, a plan, a merged file's `Checkpoint`, or key names.
        scheme: one scheme for all fresh keys, or schemes by pattern (the first matching pattern wins; a fresh key that no pattern matches
            keeps its value). A scheme is a text, or a function `f(tensor, generator)` that fills the tensor or returns another one; the
            generator is seeded by the key's name.
        note: takes one line for each user module that a scheme imports.
        write: writes a whole value into a tensor of the model.
        plain: returns a layer as it would be without sharding, so that its values are the same on every rank.
        whole: returns the whole value of a tensor of the model.

    Raises:
        NoRecordError: `report` is a checkpoint that does not record what is fresh.
        ModelError: it names keys that the model does not have, or the tensor is on meta or can't be written through the state_dict.
        RuleError: a malformed scheme, one that does not suit a tensor, or a pattern that matches no fresh key.
        TargetError: a user-defined scheme can't be imported or fails, or a layer's `reset_parameters` fails.
        CastError: `from(KEY)`, where KEY's value does not fit the dtype.

    >>> initialize(nn.Sequential(nn.Linear(3, 2)), ["0.weight"], "zeros")
    ('0.weight',)
    """
    state = state_dict_of(model, type(model).__name__)
    tensors = [named for part in named_tensors(model) for named in part.values()]
    fresh = known_fresh(state, tensors, report)
    texts, functions = _texts_and_functions(scheme)
    pattern_names = {key: {key: None} for key in state}  # what a pattern may match: the key, then its tensor's names in the model
    for name, keys in keys_by_name(tensors).items():
        for key in keys:
            pattern_names[key][name] = None
    schemes = _schemes_by_key(texts, {key: pattern_names[key] for key in state if key in fresh}, pattern_names)
    fills = {**own_schemes([text for text in schemes.values() if text not in functions], note), **functions}
    storages = {storage_of(tensor) for tensor in tensors_of(model)}
    tied = {key: names for names in checkpoint_of_state_dict(state).ties for key in names}
    tensor_names = dict.fromkeys(tied.get(key, (key,)) for key in schemes if isinstance(state[key], torch.Tensor))
    groups = [names for names in tensor_names if fresh.issuperset(names)]
    group_of = {name: group for group in groups for name in group}
    values: list[tuple[Names, torch.Tensor, torch.Tensor]] = []
    problems: list[RuleError] = []
    for names in groups:
        key = _first_with_scheme(names, schemes)
        tensor: torch.Tensor = state[key]
        try:
            origin = _origin(key, state, schemes, group_of)
            origin_tensor: torch.Tensor = state[origin]
            shape, code = tuple(origin_tensor.shape), code_of(origin_tensor)
            origin_scheme = schemes[origin] if origin in group_of else KEEP
            chosen = concrete(origin_scheme, origin, shape, code, *layer_of(model, origin, tensors))
            if chosen == KEEP and origin == key:
                continue
            if tensor.is_meta or storage_of(tensor) not in storages:
                reason = "is on the meta device" if tensor.is_meta else "is a copy that a hook of the state_dict made"
                raise ModelError(f"can't be initialised in place: it {reason}", key=key, hint="build the model on a real device")
            if chosen == KEEP:
                new_value = whole(origin_tensor)
            else:
                leader = group_of[origin][0]
                owner, leaf = layer_of(model, leader, tensors)
                new_value = drawn(chosen, leader, shape, code, seed, None if owner is None else plain(owner), fills, leaf)
            values.append((names, tensor, fitted(new_value, key, tuple(tensor.shape), code_of(tensor))))
        except RuleError as error:
            problems.append(error)
    _raise_all(problems)
    with torch.no_grad():
        for _, tensor, new in values:
            write(tensor, new)
    touched = {name for names, _, _ in values for name in names}
    return tuple(key for key in state if key in touched)


def _texts_and_functions(scheme: SchemeOrFunction | Mapping[str, SchemeOrFunction]) -> tuple[str | Mapping[str, str], dict[str, Fill]]:
    """The schemes as texts, with a generated name for each function; and the functions by these names."""
    rows = scheme if isinstance(scheme, Mapping) else {"**": scheme}
    functions = list(dict.fromkeys(value for value in rows.values() if not isinstance(value, str)))
    invalid = next((value for value in functions if not callable(value)), None)
    if invalid is not None:
        raise RuleError(f"{invalid!r:.60} is no scheme", hint="give a name such as 'xavier_normal', or a function of (tensor, generator)")
    by_name = function_schemes(functions)
    names = dict(zip(functions, by_name, strict=True))
    texts = {pattern: value if isinstance(value, str) else names[value] for pattern, value in rows.items()}
    return (texts if isinstance(scheme, Mapping) else texts["**"]), by_name


def _origin(key: str, state: Mapping[str, Any], schemes: Mapping[str, str], group_of: Mapping[str, Names]) -> str:
    """The key whose value a key gets: the key itself, or the end of its chain of `from(KEY)`.

    A tied tensor's scheme is that of its first name that has one.
    """

    def source_of(key: str) -> str | None:
        source = copied(schemes[key]) if key in group_of else None
        if source is None:
            return None
        if not isinstance(state.get(source), torch.Tensor):
            reason = "is not a tensor" if source in state else "is not in the model"
            raise RuleError(f"takes the value of {source!r}, which {reason}", key=key, hint=close_hint(source, state))
        if state[source].shape != state[key].shape:
            shapes = f"{tuple(state[key].shape)}, and {source!r}, whose value it takes, {tuple(state[source].shape)}"
            raise RuleError(f"has the shape {shapes}", key=key)
        return _first_with_scheme(group_of[source], schemes) if source in group_of else source

    keys = follow(key, source_of)
    if keys is None:
        raise RuleError(f"takes its value by {schemes[key]}, which leads back to it", key=key, hint="give one of them a scheme")
    return keys[-1]


def _first_with_scheme(names: Names, schemes: Mapping[str, str]) -> str:
    return next(name for name in names if name in schemes)


def _schemes_by_key(
    scheme: str | Mapping[str, str], fresh: Mapping[str, Iterable[str]], keys: Mapping[str, Iterable[str]]
) -> dict[str, str]:
    """The scheme of each fresh key. A pattern that matches no fresh key is a RuleError."""
    if isinstance(scheme, str):
        return dict.fromkeys(fresh, _with_parts(scheme, compile_pattern("**"), {}))
    schemes: dict[str, str] = {}
    problems = []
    for text, pattern_scheme in scheme.items():
        pattern = compile_pattern(text)
        matches = matched(pattern, fresh)
        _with_parts(pattern_scheme, pattern, None)
        for key, parts in matches.items():
            if key not in schemes:
                schemes[key] = _with_parts(pattern_scheme, pattern, parts)
        if not matches:
            known = bool(matched(pattern, keys))
            reason = f"the pattern {text!r} matches {'nothing that is fresh' if known else 'nothing in the model'}"
            problems.append(RuleError(reason, hint=meant_hint(text, fresh)))
    _raise_all(problems)
    return schemes


def _with_parts(scheme: str, pattern: Pattern, parts: dict[str, str] | None) -> str:
    """Check a scheme and return it, with the parts of a match filled into `from(KEY)`."""
    parse_scheme(scheme)
    return filled_in(scheme, pattern, parts)


def _raise_all(problems: list[RuleError]) -> None:
    if len(problems) == 1:
        raise problems[0]
    if problems:
        hint = next((problem.hint for problem in problems if problem.hint), None)
        reason = f"{len(problems)} initialisations are not possible"
        raise RuleError(reason, hint=hint, problems=tuple(problem.message for problem in problems))
