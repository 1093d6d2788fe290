"""Which of a model's keys are fresh, and which partly transferred, by a record: a report, a plan, a merged file's `Checkpoint`, or names.

Nothing here guesses: where no record says it, or where it speaks of keys that the model has not, that is an error.
"""

from __future__ import annotations

from collections.abc import Iterable

from ckptsurgeon.errors import ModelError, NoRecordError
from ckptsurgeon.models.parameters import close_names
from ckptsurgeon.tensors import Checkpoint

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


def known_fresh(keys: Iterable[str], source: object) -> frozenset[str]:
    """`fresh_keys(source)`, all of which must be among a model's `keys`.

    Raises:
        ModelError: some are not: the record is another model's, or the model was wrapped since.
    """
    return _known(keys, fresh_keys(source), "fresh")


def known_partial(keys: Iterable[str], source: object) -> frozenset[str]:
    """`partial_keys(source)`, all of which must be among a model's `keys`; raises as `known_fresh`."""
    return _known(keys, partial_keys(source), "partly transferred")


def _known(keys: Iterable[str], found: frozenset[str], kind: str) -> frozenset[str]:
    known = set(keys)
    unknown = sorted(found - known)
    if unknown:
        wrapper = next((prefix for prefix in _WRAPPERS if all(prefix + key in known for key in unknown)), None)
        hint = f"pass the model inside the wrapper: model.{wrapper[:-1]}" if wrapper else close_names(unknown[0], known)
        raise ModelError(
            f"{len(unknown)} keys that are {kind} on record are not in this model",
            hint=hint or "pass the model that the record was made for",
            problems=tuple(unknown[:10]) + ((f"and {len(unknown) - 10} more",) if len(unknown) > 10 else ()),
        )
    return found
