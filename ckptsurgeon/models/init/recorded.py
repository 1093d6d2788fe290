"""Which of a model's keys are fresh, and which partly transferred, by a record: a report, a plan, a merged file's `Checkpoint`, or names.

Nothing here guesses: where no record says it, or where it speaks of keys that the model has not, that is an error.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterable, Mapping

from ckptsurgeon.errors import ModelError, NoRecordError
from ckptsurgeon.hints import close_hint
from ckptsurgeon.models.target.parameters import Named, other_names
from ckptsurgeon.tensors import Checkpoint
from ckptsurgeon.wrappers import WRAPPERS, unwrap


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
            hint="give rates by pattern in its place, such as {'head.*': 1e-2}, or merge it again, with provenance",
        )
    keys = list(found) if isinstance(found, Iterable) and not isinstance(found, (str, bytes)) else None
    if keys is None or not all(isinstance(key, str) for key in keys):
        raise ModelError(f"a {type(source).__name__} does not say what is fresh", hint="pass a report, a plan, a checkpoint or key names")
    return frozenset(keys)


def partial_keys(source: object) -> frozenset[str]:
    """The keys whose tensor is partly transferred and partly filled, such as a grown vocabulary; none where only names are given.

    Raises:
        NoRecordError: a file that was merged before this was recorded.

    >>> partial_keys(["fc3.weight"])
    frozenset()
    """
    if not isinstance(source, Checkpoint):
        return frozenset(getattr(source, "partial", ()))
    found = (source.provenance or {}).get("partial")
    if found is None:
        raise NoRecordError(
            "does not record which tensors are partly transferred", path=source.path, hint="merge again, or count them as transferred"
        )
    return frozenset(found)


def known_fresh(keys: Iterable[str], tensors: Iterable[Named], source: object) -> frozenset[str]:
    """`fresh_keys(source)` as the keys of a model's state_dict.

    Args:
        keys: those of the model's state_dict.
        tensors: the model's parameters and buffers. A record may use any of their names, and may have been made for the same model
            before it was wrapped or after.

    Raises:
        ModelError: some are no names of the model's: the record is another model's.
    """
    return _known(keys, tensors, fresh_keys(source), "fresh")


def known_partial(keys: Iterable[str], tensors: Iterable[Named], source: object) -> frozenset[str]:
    """`partial_keys(source)` as the keys of a model's state_dict; as `known_fresh`."""
    return _known(keys, tensors, partial_keys(source), "partly transferred")


def _known(keys: Iterable[str], tensors: Iterable[Named], recorded: frozenset[str], kind: str) -> frozenset[str]:
    known = set(keys)
    if recorded <= known:
        return recorded
    names = {key: unwrap(key, WRAPPERS) for key in known}
    counts = Counter(names.values())
    bare = {name: (key,) for key, name in names.items() if counts[name] == 1}
    others = other_names(tensors)
    keys_of = {name: (name,) if name in known else bare.get(unwrap(name, WRAPPERS)) or others.get(name, ()) for name in recorded}
    unknown = sorted(name for name, found in keys_of.items() if not found)
    if unknown:
        raise ModelError(
            f"{len(unknown)} keys that are {kind} on record are not in this model",
            hint=close_hint(unknown[0], known) or "pass the model that the record was made for",
            problems=tuple(unknown[:10]) + ((f"and {len(unknown) - 10} more",) if len(unknown) > 10 else ()),
        )
    return frozenset(key for found in keys_of.values() for key in found)


def fresh_parameters(
    parameters: Mapping[str, Named], buffers: Mapping[str, Named], fresh: frozenset[str], passed: Container[str] = ()
) -> set[str]:
    """First names of the parameters all of whose keys are fresh: otherwise a source gave it its values.

    Args:
        fresh: keys of the state_dict.
        passed: first names of parameters that need not be told.

    Raises:
        ModelError: a fresh key whose parameter can't be told, or, where anything is fresh, a trainable parameter without a key.
    """
    owned = {key for part in (parameters, buffers) for one in part.values() for key in one.keys}
    hint = "name it by pattern, without the record: param_groups(model, {'PATTERN': 1e-2}, lr=1e-3)"
    for key in sorted(fresh - owned):
        raise ModelError(
            "is fresh on record, and no parameter or buffer of the model: a hook of the state_dict made it", key=key, hint=hint
        )
    for first, one in parameters.items():
        if fresh and not one.keys and one.trainable and first not in passed:
            raise ModelError("is not in the state_dict, so that no record can say whether it is fresh", key=first, hint=hint)
    return {first for first, one in parameters.items() if one.keys and fresh.issuperset(one.keys)}
