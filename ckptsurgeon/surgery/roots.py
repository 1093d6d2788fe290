"""Chooses which nested dict of a file is the state_dict.

With a target: the one that covers it best, a tie being an error (raw weights and their EMA). Without: the only one there is, or the one
that is asked for by name. Several dicts under one parent may also be read together, their names joined.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from ckptsurgeon.dtypes import BY_CODE
from ckptsurgeon.errors import RootError
from ckptsurgeon.surgery.prefixes import WRAPPERS, find_prefix, rename_all
from ckptsurgeon.surgery.rules import close_names
from ckptsurgeon.tensors import Archive, Checkpoint, StateDict, TensorMeta, find_ties

ALL = "**"  # the name, below a parent that holds tensors of its own, of that parent and all below it read together
_MANY = 64  # state_dicts in one file, beyond which none are read together unless asked for by name
_WORK = 1_000_000  # keys that are looked at to find the best root
_PARENTS = 16  # that are tried, the outermost first


def choose(archive: Archive, *, root: str | None = None, target: Checkpoint | None = None) -> Checkpoint:
    """The checkpoint of `archive` under the named or best root.

    Raises RootError, with the candidates and how to choose, when the name is not there or several would do.
    """
    found = archive.state_dicts
    if root is not None:
        return checkpoint(archive, _named(archive, root))
    if len(found) == 1:
        return checkpoint(archive, found[0])
    if target is not None:
        return checkpoint(archive, _best(archive, target))
    serious = _serious(found)
    if len(serious) > 1:
        raise RootError(f"holds {len(serious)} state_dicts: {_listing(serious)}", path=archive.path, hint=_advice(serious))
    return checkpoint(archive, serious[0])


def checkpoint(archive: Archive, chosen: StateDict, *, alone: bool = False) -> Checkpoint:
    """`archive` seen as the checkpoint under one of its roots, or under several joined; `alone`, nothing is told of what else it holds."""
    others: Sequence[StateDict] = ()
    if alone:
        pass
    elif any(found is chosen for found in archive.state_dicts):
        others = [found for found in archive.state_dicts if found is not chosen]
    else:
        others = [found for found in archive.state_dicts if _below(found.root, _parent(chosen.root)) is None]
    return Checkpoint(
        path=archive.path,
        format=archive.format,
        fingerprint=archive.fingerprint,
        tensors=chosen.tensors,
        root=chosen.root,
        entries=chosen.entries,
        module_metadata=chosen.module_metadata,
        ties=chosen.ties or find_ties(chosen.tensors),
        metadata=archive.metadata,
        left_behind=() if alone else (*(_words(other) for other in others), *archive.beside),
        globals=archive.globals,
        provenance=archive.provenance,
        files=archive.files,
        notes=archive.notes,
    )


def _named(archive: Archive, root: str) -> StateDict:
    names = [found.root for found in archive.state_dicts]
    joined = _join(archive.state_dicts, _parent(root)) if root not in names else None
    if joined is not None and joined.root == root:
        return joined
    for found in archive.state_dicts:
        if found.root == root:
            return found
    raise RootError(
        f"has no state_dict at {root!r}{close_names(root, names)}",
        path=archive.path,
        hint=f"its roots: {_listing(archive.state_dicts)}",
    )


def _words(state_dict: StateDict) -> str:
    count = len(state_dict.tensors)
    return f"{state_dict.root or 'the top dict'} ({count} tensor{'s' if count != 1 else ''})"


def _listing(found: Sequence[StateDict]) -> str:
    return ", ".join(map(_words, found[:8])) + (f" and {len(found) - 8} more" if len(found) > 8 else "")


def _advice(found: Sequence[StateDict]) -> str:
    return f"choose one: --root {found[0].root!r}"


def _serious(state_dicts: Sequence[StateDict]) -> Sequence[StateDict]:
    """Without dicts that hold no weights (losses, counters, states of random generators), unless there is nothing else."""
    return [found for found in state_dicts if any(map(_is_weight, found.tensors.values()))] or state_dicts


def _is_weight(tensor: TensorMeta) -> bool:
    return bool(tensor.shape) and BY_CODE[tensor.dtype].kind in ("float", "complex")


def _parent(root: str) -> str:
    """Whose dicts a joined root reads together."""
    return root[: -len(ALL)].rstrip(".") if root.endswith(ALL) else root


def _below(root: str, parent: str) -> str | None:
    """A root's place below `parent`; None when it is not there."""
    if root == parent or not parent:
        return root[len(parent) :]
    return root[len(parent) + 1 :] if root.startswith(f"{parent}.") else None


def _join(state_dicts: Sequence[StateDict], parent: str) -> StateDict | None:
    """Every state_dict at and below `parent` as one whose keys begin with the places of the dicts below; None where there are not two, or
    where two keys would be one."""
    below = [(head, found) for found in state_dicts if (head := _below(found.root, parent)) is not None]
    if not any(head for head, _ in below):
        return None
    tensors: dict[str, TensorMeta] = {}
    entries: dict[str, Any] = {}
    metadata: dict[str, Any] = {}
    for head, found in below:
        for key, tensor in found.tensors.items():
            name = f"{head}.{key}" if head else key
            tensors[name] = replace(tensor, name=name)
        entries.update({f"{head}.{key}" if head else key: entry for key, entry in found.entries.items()})
        metadata.update({f"{head}.{path}".strip(".") if head else path: local for path, local in found.module_metadata.items()})
    total = sum(len(found.tensors) + len(found.entries) for _, found in below)
    if total != len({*tensors, *entries}):
        return None
    name = f"{parent}.{ALL}" if parent else ALL
    return StateDict(name if any(not head for head, _ in below) else parent, tensors, entries, metadata)


def _joined(state_dicts: Sequence[StateDict]) -> Iterator[StateDict]:
    """Every parent of several state_dicts, the innermost first."""
    if len(state_dicts) > _MANY:
        return
    parents: dict[str, None] = {}
    for found in state_dicts:
        parts = found.root.split(".") if found.root else []
        parents.update(dict.fromkeys(".".join(parts[:depth]) for depth in range(len(parts))))
    for parent in reversed(sorted(parents, key=len)[:_PARENTS]):
        joined = _join(state_dicts, parent)
        if joined is not None and sum(_below(found.root, parent) is not None for found in state_dicts) > 1:
            yield joined


def _best(archive: Archive, target: Checkpoint) -> StateDict:
    rivals: list[tuple[int, StateDict, frozenset[Any]]] = []
    best = 0
    work = 0
    candidates = [*archive.state_dicts, *_joined(archive.state_dicts)]
    forms = {_form(key, tensor) for key, tensor in target.items()}
    for index, found in sorted(enumerate(candidates), key=lambda row: -len(row[1].tensors)):
        if min(len(found.tensors), len(target)) < max(best, 1):
            continue  # can't win
        if sum(_form(key, tensor) in forms for key, tensor in found.tensors.items()) < max(best, 1):
            continue
        work += len(found.tensors) + len(target)
        if work > _WORK and index < len(archive.state_dicts):
            raise RootError(
                f"holds {len(archive.state_dicts)} state_dicts, too many to find the one that fits {target.path} best",
                path=archive.path,
                hint=_advice(archive.state_dicts),
            )
        fits = _fits(found, target)
        if len(fits) > best:
            best, rivals = len(fits), []
        if len(fits) == best:
            rivals.append((index, found, frozenset(fits)))
    if best == 0:
        serious = _serious(archive.state_dicts)
        if len(serious) == 1:
            return serious[0]
        raise RootError(
            f"holds several state_dicts, and none has a key of {target.path}: {_listing(serious)}", path=archive.path, hint=_advice(serious)
        )
    rivals.sort(key=lambda row: row[0])
    # One that fits by the very same tensors as another (a joined parent, a dict that is in the file twice) is no rival of it.
    apart = [found for place, (_, found, fits) in enumerate(rivals) if all(fits != other for _, _, other in rivals[:place])]
    if len(apart) > 1:
        listing = ", ".join(repr(found.root) for found in apart)
        raise RootError(f"holds {len(apart)} state_dicts that fit equally well: {listing}", path=archive.path, hint=_advice(apart))
    return rivals[0][1]


def _form(key: str, tensor: TensorMeta) -> tuple[str, tuple[int, ...]]:
    """What no prefix changes of a tensor: its last segment that is no wrapper's, and its shape."""
    last = key.rpartition(".")[2]
    if last in WRAPPERS:
        last = next((segment for segment in reversed(key.split(".")) if segment not in WRAPPERS), last)
    return last, tensor.shape


def _fits(found: StateDict, target: Checkpoint) -> list[Any]:
    """Where the bytes of each tensor that fits lie (without bytes, its name)."""
    parent = _parent(found.root)
    names = rename_all(found.tensors, target, find_prefix(found.tensors, target))
    fits = [key for key, name in names.items() if name in target and target[name].shape == found.tensors[key].shape]
    return [found.tensors[key].span or (f"{parent}.{key}" if parent else key) for key in fits]
