"""Chooses which nested dict of a file is the state_dict.

With a target: the one that covers it best, a tie being an error (raw weights and their EMA). Without: the only one there is, or the one
that is asked for by name. Several dicts under one parent may also be read together, their names joined.
"""

from __future__ import annotations

from collections.abc import Iterator

from ckptsurgeon.errors import RootError
from ckptsurgeon.surgery.prefixes import find_prefix, rename_all
from ckptsurgeon.surgery.rules import close_names
from ckptsurgeon.tensors import Archive, Checkpoint, StateDict, TensorMeta, find_ties


def choose(archive: Archive, *, root: str | None = None, target: Checkpoint | None = None) -> Checkpoint:
    """The checkpoint of `archive` under the named or best root.

    Raises RootError, with the candidates and how to choose, when the name is not there or several would do.
    """
    found = {state_dict.root: state_dict for state_dict in archive.state_dicts}
    if root is not None:
        chosen = found.get(root) or next((joined for joined in _joined(archive.state_dicts) if joined.root == root), None)
        if chosen is None:
            raise RootError(
                f"has no state_dict at {root!r}{close_names(root, found)}", path=archive.path, hint=f"its roots: {_listing(archive)}"
            )
    elif len(found) == 1:
        chosen = archive.state_dicts[0]
    elif target is not None:
        chosen = _best(archive, target)
    else:
        serious = _serious(archive.state_dicts)
        if len(serious) > 1:
            raise RootError(
                f"holds {len(serious)} state_dicts: {_listing(archive)}", path=archive.path, hint=f"choose one: --root {serious[0].root!r}"
            )
        chosen = serious[0]
    return checkpoint(archive, chosen)


def checkpoint(archive: Archive, chosen: StateDict) -> Checkpoint:
    """`archive` seen as the checkpoint under one of its roots."""
    left = [_words(other) for other in archive.state_dicts if other is not chosen and not _within(other.root, chosen)]
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
        left_behind=(*left, *archive.beside),
        globals=archive.globals,
        provenance=archive.provenance,
        files=archive.files,
        notes=archive.notes,
    )


def _words(state_dict: StateDict) -> str:
    return f"{state_dict.root or 'the top dict'} ({len(state_dict.tensors)} tensors)"


def _within(root: str, chosen: StateDict) -> bool:
    # A joined root holds the tensors of the dicts below it.
    inside = root.removeprefix(f"{chosen.root}.") if chosen.root else root
    return any(key.startswith(f"{inside}.") for key in chosen.tensors) if inside != root or not chosen.root else False


def _serious(state_dicts: tuple[StateDict, ...]) -> list[StateDict]:
    """Without dicts whose tensors are all single numbers (losses, scores), unless there is nothing else."""
    return [found for found in state_dicts if any(tensor.shape for tensor in found.tensors.values())] or list(state_dicts)


def _listing(archive: Archive) -> str:
    return ", ".join(f"{found.root or '(top)'} ({len(found.tensors)} tensors)" for found in archive.state_dicts[:8])


def _joined(state_dicts: tuple[StateDict, ...]) -> Iterator[StateDict]:
    """Parents of several roots, seen as one state_dict whose keys begin with the names of the dicts below."""
    parents = {
        ".".join(parts[:depth]) for parts in (found.root.split(".") for found in state_dicts if found.root) for depth in range(len(parts))
    }
    for parent in sorted(parents, key=len, reverse=True):
        below = [found for found in state_dicts if found.root == parent or not parent or found.root.startswith(f"{parent}.")]
        if len(below) < 2 and (not below or below[0].root == parent):
            continue
        tensors: dict[str, TensorMeta] = {}
        metadata = {}
        total = 0
        for found in below:
            head = found.root.removeprefix(parent).lstrip(".")
            for key, tensor in found.tensors.items():
                name = f"{head}.{key}" if head else key
                tensors[name] = TensorMeta(name, tensor.dtype, tensor.shape, tensor.stride, tensor.span)
                total += 1
            for path, local in found.module_metadata.items():
                metadata[f"{head}.{path}".strip(".") if head else path] = local
        if total == len(tensors):  # names that collide can't be joined
            yield StateDict(parent, tensors, {}, metadata)


def _best(archive: Archive, target: Checkpoint) -> StateDict:
    scored = []
    for depth, found in enumerate((*archive.state_dicts, *_joined(archive.state_dicts))):
        names = rename_all(found.tensors, target, find_prefix(found.tensors, target))
        fits = [found.tensors[key] for key, name in names.items() if name in target and target[name].shape == found.tensors[key].shape]
        scored.append((len(fits), frozenset(tensor.span for tensor in fits), depth, found))
    best = max(score for score, *_ in scored)
    if best == 0:
        serious = _serious(archive.state_dicts)
        if len(serious) == 1:
            return serious[0]
        raise RootError(
            f"holds several state_dicts, and none has a key of {target.path}: {_listing(archive)}",
            path=archive.path,
            hint=f"choose one: --root {serious[0].root!r}",
        )
    # A joined parent that fits by the very same tensors is no rival of the dict that holds them.
    winners = [(spans, found) for score, spans, _, found in scored if score == best]
    if len({spans for spans, _ in winners}) > 1:
        listing = ", ".join(repr(found.root) for _, found in winners)
        raise RootError(
            f"holds {len(winners)} state_dicts that fit equally well: {listing}",
            path=archive.path,
            hint=f"choose one: --root {winners[0][1].root!r}",
        )
    return winners[0][1]
