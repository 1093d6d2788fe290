"""`initialize`: initial values for a live model's fresh tensors, in place.

Only what is on record as fresh is touched, and all is checked, and every value made, before the first write. `schemes.py` makes
the values; here they are chosen by pattern, tied names are one tensor, and `from(KEY)` finds the key whose value it takes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from ckptsurgeon.dtypes import BY_TORCH
from ckptsurgeon.errors import ModelError, RuleError
from ckptsurgeon.hints import close_hint
from ckptsurgeon.models.init.recorded import known_fresh
from ckptsurgeon.models.init.scheme_text import SCHEMES, Scheme, describe_effective, parse_scheme
from ckptsurgeon.models.init.schemes import KEEP, PER_LAYER_TYPE, concrete, drawn, fitted, layer_of, owner_of, value
from ckptsurgeon.models.init.user_functions import Fill, in_hand, own_schemes
from ckptsurgeon.models.target.loaders import storage_of, tensors_of
from ckptsurgeon.models.target.parameters import Named, matched, named_tensors, other_names
from ckptsurgeon.models.target.skeleton import checkpoint_of_state_dict, state_dict_of
from ckptsurgeon.rules.copied_value import copied, filled_in, follow
from ckptsurgeon.rules.meant import meant_hint
from ckptsurgeon.rules.patterns import Pattern, compile_pattern

__all__ = [
    "PER_LAYER_TYPE",
    "SCHEMES",
    "Scheme",
    "describe_effective",
    "fitted",
    "initialize",
    "layer_of",
    "owner_of",
    "parse_scheme",
    "value",
]


def _copy(tensor: torch.Tensor, value: torch.Tensor) -> None:
    tensor.copy_(value)


Group = tuple[str, ...]  # all names of one tensor
Chosen = str | Callable[..., Any]  # a scheme's text, or a function (tensor, generator)


def initialize(
    model: nn.Module,
    report: object,
    scheme: Chosen | Mapping[str, Chosen] = "per_layer_type",
    *,
    seed: int = 0,
    note: Callable[[str], None] = lambda _line: None,
    write: Callable[[torch.Tensor, torch.Tensor], None] = _copy,
    plain: Callable[[nn.Module], nn.Module] = lambda layer: layer,
    whole: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor,
) -> tuple[str, ...]:
    """Initialise a model's fresh tensors in place, on whatever device they are, and return the keys that were touched.

    A tied tensor is written once, seeded by its first key, and only if all its names are fresh. Everything is checked, and
    every value is made, before the first write. The scheme `model`, and `per_layer_type` on a layer that its table does not
    have, leave the constructor's value as it is; such keys are not returned. `from(KEY)` gives the value that KEY has afterwards, be
    it fresh or not; the key may use the pattern's parts: `{"layers.{i}.{p}": "from(layers.{i-1}.{p})"}`.

    Args:
        report: what is fresh: a report, a plan, a merged file's `Checkpoint`, or key names.
        scheme: one scheme for all fresh keys, or schemes by pattern (the first that matches wins; a fresh key that none matches
            keeps its value). A scheme is a text, or a function `f(tensor, generator)` that fills a tensor, or returns another, with a
            generator that is seeded by name.
        note: takes one line for each module of the person's own that a scheme imports.
        write: puts a whole value into a tensor of the model.
        plain: a layer as it would be on one machine, whose values are the same on every rank.
        whole: the whole value of a tensor of the model.

    Raises:
        NoRecordError: `report` is a checkpoint that records nothing.
        ModelError: it names keys that the model has not, or the tensor is on meta or can't be written through the state_dict.
        RuleError: a malformed scheme, one that does not suit a tensor, a pattern that matches nothing fresh.
        TargetError: a person's own scheme can't be imported or fails, or a layer's `reset_parameters` does.
        CastError: `from(KEY)`, where the other key's value does not fit the dtype.

    >>> initialize(nn.Sequential(nn.Linear(3, 2)), ["0.weight"], "zeros")
    ('0.weight',)
    """
    state = state_dict_of(model, type(model).__name__)
    tensors = [one for part in named_tensors(model) for one in part.values()]
    fresh = known_fresh(state, tensors, report)
    texts, given = _texts(scheme)
    spelled = _names(state, tensors)
    schemes = _by_key(texts, {key: spelled[key] for key in state if key in fresh}, spelled)
    own = {**own_schemes([text for text in schemes.values() if text not in given], note), **given}
    storages = {storage_of(tensor) for tensor in tensors_of(model)}
    groups = _tie_groups(state, schemes, fresh)
    written = {name: group for group in groups for name in group}
    values: list[tuple[Group, torch.Tensor, torch.Tensor]] = []
    problems: list[RuleError] = []
    for names in groups:
        key = _named(names, schemes)
        tensor: torch.Tensor = state[key]
        try:
            origin = _origin(key, state, schemes, written)
            found: torch.Tensor = state[origin]
            shape, code = tuple(found.shape), _code(found)
            wanted = schemes[origin] if origin in written else KEEP
            chosen = concrete(wanted, origin, shape, code, *layer_of(model, origin, tensors))
            if chosen == KEEP and origin == key:
                continue
            if tensor.is_meta or storage_of(tensor) not in storages:
                reason = "is on the meta device" if tensor.is_meta else "is a copy that a hook of the state_dict made"
                raise ModelError(f"can't be initialised in place: it {reason}", key=key, hint="build the model on a real device")
            if chosen == KEEP:
                made = whole(found)
            else:
                leader = written[origin][0]
                owner, leaf = layer_of(model, leader, tensors)
                made = drawn(chosen, leader, shape, code, seed, None if owner is None else plain(owner), own, leaf)
            values.append((names, tensor, fitted(made, key, tuple(tensor.shape), _code(tensor))))
        except RuleError as error:
            problems.append(error)
    _raise_all(problems)
    with torch.no_grad():
        for _, tensor, new in values:
            write(tensor, new)
    touched = {name for names, _, _ in values for name in names}
    return tuple(key for key in state if key in touched)


def _texts(scheme: Chosen | Mapping[str, Chosen]) -> tuple[str | Mapping[str, str], dict[str, Fill]]:
    """Schemes as texts, those that are functions by the names under which they are given too."""
    rows = scheme if isinstance(scheme, Mapping) else {"**": scheme}
    functions = list(dict.fromkeys(one for one in rows.values() if not isinstance(one, str)))
    wrong = next((one for one in functions if not callable(one)), None)
    if wrong is not None:
        raise RuleError(f"{wrong!r:.60} is no scheme", hint="give a name such as 'xavier_normal', or a function of (tensor, generator)")
    given = in_hand(functions)
    names = dict(zip(functions, given, strict=True))
    texts = {pattern: one if isinstance(one, str) else names[one] for pattern, one in rows.items()}
    return (texts if isinstance(scheme, Mapping) else texts["**"]), given


def _origin(key: str, state: Mapping[str, Any], schemes: Mapping[str, str], written: Mapping[str, Group]) -> str:
    """The key whose value a key gets: itself, or where its `from(KEY)`, and perhaps that key's own, leads.

    A tied tensor goes by its first name with a scheme.
    """

    def source_of(key: str) -> str | None:
        source = copied(schemes[key]) if key in written else None
        if source is None:
            return None
        if not isinstance(state.get(source), torch.Tensor):
            reason = "is not a tensor" if source in state else "is not in the model"
            raise RuleError(f"takes the value of {source!r}, which {reason}", key=key, hint=close_hint(source, state))
        if state[source].shape != state[key].shape:
            shapes = f"{tuple(state[key].shape)}, and {source!r}, whose value it takes, {tuple(state[source].shape)}"
            raise RuleError(f"has the shape {shapes}", key=key)
        return _named(written[source], schemes) if source in written else source

    keys = follow(key, source_of)
    if keys is None:
        raise RuleError(f"takes its value by {schemes[key]}, which leads back to it", key=key, hint="give one of them a scheme")
    return keys[-1]


def _named(names: Group, schemes: Mapping[str, str]) -> str:
    """The first name of a tensor that has a scheme."""
    return next(name for name in names if name in schemes)


def _code(tensor: torch.Tensor) -> str:
    return BY_TORCH[str(tensor.dtype).removeprefix("torch.")].code


def _names(state: Mapping[str, Any], tensors: Iterable[Named]) -> dict[str, tuple[str, ...]]:
    """Each key to the names that a pattern may call it by: its own first, then those that its tensor has in the model."""
    more: dict[str, list[str]] = {}
    for name, keys in other_names(tensors).items():
        for key in keys:
            more.setdefault(key, []).append(name)
    return {key: tuple(dict.fromkeys((key, *more.get(key, ())))) for key in state}


def _by_key(scheme: str | Mapping[str, str], fresh: Mapping[str, tuple[str, ...]], keys: Mapping[str, tuple[str, ...]]) -> dict[str, str]:
    """Which fresh key gets which scheme; a pattern that matches no fresh key is an error."""
    if isinstance(scheme, str):
        return dict.fromkeys(fresh, _written_out(scheme, compile_pattern("**"), {}))
    chosen: dict[str, str] = {}
    problems = []
    for text, wanted in scheme.items():
        pattern = compile_pattern(text)
        taken = matched(pattern, fresh)
        _written_out(wanted, pattern, None)
        for key, parts in taken.items():
            if key not in chosen:
                chosen[key] = _written_out(wanted, pattern, parts)
        if not taken:
            known = bool(matched(pattern, keys))
            reason = f"the pattern {text!r} matches {'nothing that is fresh' if known else 'nothing in the model'}"
            problems.append(RuleError(reason, hint=meant_hint(text, fresh)))
    _raise_all(problems)
    return chosen


def _written_out(scheme: str, pattern: Pattern, parts: dict[str, str] | None) -> str:
    """A scheme, checked; in `from(KEY)` the parts of a match are filled in."""
    parse_scheme(scheme)
    return filled_in(scheme, pattern, parts)


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
