"""Reads which of a model's keys are fresh, and which partly transferred, from a record: a report, a plan, a merged `Checkpoint`, or key
names.

Nothing is guessed: a missing record, a record with keys that the model does not have, or a parameter of which the record says nothing, is
an error.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Container, Iterable, Mapping

from ckptsurgeon.errors import ModelError, NoRecordError
from ckptsurgeon.hints import close_hint, shortened
from ckptsurgeon.models.target.parameters import Named, keys_by_name
from ckptsurgeon.rules.drafting.cover import cover
from ckptsurgeon.tensors import Checkpoint
from ckptsurgeon.wrappers import WRAPPERS, unwrap


def fresh_keys(source: object) -> frozenset[str]:
    """The keys that `source` records as fresh.

    Args:
        source: a report or a plan (anything with `fresh`, a tuple of keys), a merged file's `Checkpoint`, or key names.

    Raises:
        NoRecordError: a checkpoint without provenance, or a verification of such a checkpoint.
        ModelError: `source` is none of these.

    >>> sorted(fresh_keys(["fc3.weight", "fc3.bias"]))
    ['fc3.bias', 'fc3.weight']
    """
    if isinstance(source, Checkpoint):
        recorded: object = (source.provenance or {}).get("fresh")
        path: str | None = source.path
    else:
        recorded, path = getattr(source, "fresh", source), None
    if recorded is None:
        raise NoRecordError(
            "does not record which parameters are fresh",
            path=path,
            hint="give rates by pattern instead, such as {'head.*': 1e-2}, or merge it again, with provenance",
        )
    keys = list(recorded) if isinstance(recorded, Iterable) and not isinstance(recorded, (str, bytes)) else None
    if keys is None or not all(isinstance(key, str) for key in keys):
        raise ModelError(f"a {type(source).__name__} does not say what is fresh", hint="pass a report, a plan, a checkpoint or key names")
    return frozenset(keys)


def partial_keys(source: object) -> frozenset[str]:
    """The keys whose tensor is partly transferred and partly filled, such as a grown vocabulary; none if `source` is key names.

    Raises:
        NoRecordError: a file merged by a version that did not record this.

    >>> partial_keys(["fc3.weight"])
    frozenset()
    """
    if not isinstance(source, Checkpoint):
        return frozenset(getattr(source, "partial", ()))
    recorded = (source.provenance or {}).get("partial")
    if recorded is None:
        raise NoRecordError(
            "does not record which tensors are partly transferred", path=source.path, hint="merge again, or count them as transferred"
        )
    return frozenset(recorded)


def spoken_of(source: object) -> frozenset[str]:
    """Every key that a record says anything about; none where it says only what is fresh.

    >>> spoken_of(["fc3.weight"])
    frozenset()
    """
    if isinstance(source, Checkpoint):
        return frozenset(source)
    given = frozenset((*getattr(source, "transferred", ()), *getattr(source, "kept", ())))
    return given | fresh_keys(source) if given else given


def known_fresh(keys: Iterable[str], tensors: Iterable[Named], source: object) -> frozenset[str]:
    """`fresh_keys(source)` as the keys of a model's state_dict.

    Args:
        keys: the keys of the model's state_dict.
        tensors: the model's parameters and buffers. A record may use any of their names, and may have been made before or after the
            model was wrapped.

    Raises:
        ModelError: the record has keys that are not in the model, so it belongs to another model.
    """
    return _model_keys(keys, tensors, fresh_keys(source), "fresh")


def known_partial(keys: Iterable[str], tensors: Iterable[Named], source: object) -> frozenset[str]:
    """`partial_keys(source)` as the keys of a model's state_dict. Raises as `known_fresh`."""
    return _model_keys(keys, tensors, partial_keys(source), "partly transferred")


def _model_keys(keys: Iterable[str], tensors: Iterable[Named], recorded: frozenset[str], kind: str) -> frozenset[str]:
    known = set(keys)
    if recorded <= known:
        return recorded
    keys_of = _keys_of(known, tensors, recorded)
    unknown = sorted(name for name, matching in keys_of.items() if not matching)
    if unknown:
        raise ModelError(
            f"{len(unknown)} keys recorded as {kind} are not in this model",
            hint=close_hint(unknown[0], known) or "pass the model that the record was made for",
            problems=tuple(unknown[:10]) + ((f"and {len(unknown) - 10} more",) if len(unknown) > 10 else ()),
        )
    return frozenset(key for matching in keys_of.values() for key in matching)


def _keys_of(known: Collection[str], tensors: Iterable[Named], recorded: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """By recorded name, the model's keys that it means; it may have been recorded before or after the model was wrapped."""
    unwrapped = {key: unwrap(key, WRAPPERS) for key in known}
    counts = Counter(unwrapped.values())
    by_unwrapped = {name: (key,) for key, name in unwrapped.items() if counts[name] == 1}
    by_name = keys_by_name(tensors)
    return {name: (name,) if name in known else by_unwrapped.get(unwrap(name, WRAPPERS)) or by_name.get(name, ()) for name in recorded}


def refuse_unrecorded(keys: Iterable[str], tensors: Collection[Named], source: object, exempt: Container[str], hint: str) -> None:
    """Raise ModelError for trainable parameters of which the record says nothing: added since, or of another model, and perhaps fresh.

    Args:
        keys: the keys of the model's state_dict.
        tensors: the model's parameters and buffers.
        exempt: first names of parameters that need no record.
        hint: how a parameter is given a place by pattern; `{}` in it stands for a pattern that matches the first of them.
    """
    recorded = spoken_of(source)
    if not recorded:
        return
    known = {key for matching in _keys_of(set(keys), tensors, recorded).values() for key in matching}
    unrecorded = {
        named.names[0]: None
        for named in tensors
        if named.trainable and named.keys and known.isdisjoint(named.keys) and named.names[0] not in exempt
    }
    if unrecorded:
        first, *rest = unrecorded
        pattern = cover(unrecorded, [named.names[0] for named in tensors if named.names[0] not in unrecorded])[0]
        raise ModelError(
            "is not in the record of what is fresh: it was added later, or the record is another model's",
            key=first,
            hint=hint.format(pattern),
            problems=shortened(f"{name}: nor is it" for name in rest),
        )


def fresh_parameters(
    parameters: Mapping[str, Named], buffers: Mapping[str, Named], fresh: frozenset[str], exempt: Container[str] = ()
) -> set[str]:
    """First names of the parameters whose keys are all fresh. If any key is not, the parameter has its values from a source.

    Args:
        fresh: keys of the state_dict.
        exempt: first names of parameters that may lack a key.

    Raises:
        ModelError: a fresh key whose parameter is unknown, or, if any key is fresh, a trainable parameter without a key.
    """
    model_keys = {key for part in (parameters, buffers) for parameter in part.values() for key in parameter.keys}
    hint = "name it by pattern, without the record: param_groups(model, {'PATTERN': 1e-2}, lr=1e-3)"
    for key in sorted(fresh - model_keys):
        raise ModelError("is recorded as fresh, but is no parameter or buffer of the model: a state_dict hook made it", key=key, hint=hint)
    for first, parameter in parameters.items():
        if fresh and not parameter.keys and parameter.trainable and first not in exempt:
            raise ModelError("is not in the state_dict, so no record can say whether it is fresh", key=first, hint=hint)
    return {first for first, parameter in parameters.items() if parameter.keys and fresh.issuperset(parameter.keys)}
