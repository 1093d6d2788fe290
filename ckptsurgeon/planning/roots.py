"""Chooses which nested dict of a file is the state_dict.

With a target: the dict that covers it best. A second dict that covers 0.9 as much is an error (raw weights and their EMA), unless it has
the same bytes, or is a parent read together with its dicts, or one of these. Without a target: the only dict, or the one asked for by name.
An optimizer's own dicts are taken only by name. Several dicts under one parent may also be read together, their names joined.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ckptsurgeon.dtypes import BY_CODE
from ckptsurgeon.errors import PartError, RootError
from ckptsurgeon.hints import without_slip
from ckptsurgeon.planning import training_places
from ckptsurgeon.planning.prefixes.find import NEAR, find_change
from ckptsurgeon.planning.training_places import all_moments, lightning_average, of_optimizer
from ckptsurgeon.tensors import Archive, Checkpoint, StateDict, TensorMeta, find_ties
from ckptsurgeon.wrappers import WRAPPERS

ALL = "**"  # the name, below a parent that holds tensors of its own, of that parent and all below it read together
_MANY = 64  # state_dicts in one file, beyond which none are read together unless asked for by name
_WORK = 1_000_000  # keys that are looked at to find the best root
_PARENTS = 16  # that are tried, the outermost first
_SHOWN = 8  # roots that an error lists


def choose(archive: Archive, *, root: str | None = None, target: Checkpoint | None = None, parts: bool = False) -> Checkpoint:
    """The checkpoint of `archive` under the named or best root.

    Raises:
        RootError: the name is not there, or several would do; with the candidates and how to choose.
        PartError: it is one rank's part of a checkpoint, unless `parts` will do.
    """
    if archive.part is not None and not parts:
        raise PartError(archive.part.reason, path=archive.path, hint=archive.part.hint)
    if root is not None:
        return checkpoint(archive, _named(archive, root))
    candidates = _unasked(archive)
    if len(candidates) == 1:
        return checkpoint(archive, candidates[0])
    if target is not None:
        return checkpoint(archive, _best(archive, target))
    serious = _serious(candidates)
    if len(serious) > 1:
        raise RootError(f"holds {len(serious)} state_dicts: {_listing(serious)}", path=archive.path, hint=_advice(serious))
    return checkpoint(archive, serious[0])


def _unasked(archive: Archive) -> Sequence[StateDict]:
    """The state_dicts that may be taken without being named: not an optimizer's own, such as its moments by the parameters' names."""
    candidates = [
        state_dict for state_dict in archive.state_dicts if not (of_optimizer(state_dict.root) or all_moments(state_dict.tensors))
    ]
    if not candidates:
        raise RootError(
            f"holds an optimizer's state and no model's: {_listing(archive.state_dicts)}",
            path=archive.path,
            hint=f"give the file with the model's weights; what is meant all the same is named: root={archive.state_dicts[0].root!r}",
        )
    return candidates


def checkpoint(archive: Archive, chosen: StateDict, *, alone: bool = False) -> Checkpoint:
    """`archive` seen as the checkpoint under one of its roots, or under several joined; `alone` leaves out what else it holds."""
    others: Sequence[StateDict] = ()
    if alone:
        pass
    elif any(state_dict is chosen for state_dict in archive.state_dicts):
        others = [state_dict for state_dict in archive.state_dicts if state_dict is not chosen]
    else:
        others = [state_dict for state_dict in archive.state_dicts if _below(state_dict.root, _parent(chosen.root)) is None]
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
        kind=archive.kind,
    )


def _named(archive: Archive, root: str) -> StateDict:
    names = [state_dict.root for state_dict in archive.state_dicts]
    joined = _join(archive.state_dicts, _parent(root)) if root not in names else None
    if joined is not None and joined.root == root:
        return joined
    for state_dict in archive.state_dicts:
        if state_dict.root == root:
            return state_dict
    raise RootError(
        f"has no state_dict at {root!r}",
        path=archive.path,
        hint=f"{f'is it {close}? ' if (close := without_slip(root, names)) else ''}its roots: {_listing(archive.state_dicts)}",
    )


def at_place(value: Any, place: str) -> StateDict | None:
    """All tensors below a dotted place of what a file holds, an optimizer's too, their names joined; None where there are none."""
    tensors: dict[str, TensorMeta] = {}
    waiting = [("", training_places.at_place(value, place))]
    while waiting:
        head, node = waiting.pop()
        if isinstance(node, TensorMeta) and head:
            tensors[head] = replace(node, name=head)
        elif isinstance(node, (Mapping, list, tuple)):
            items = list(node.items() if isinstance(node, Mapping) else enumerate(node))
            waiting += [(f"{head}.{key}" if head else str(key), child) for key, child in reversed(items) if type(key) in (str, int)]
    return StateDict(place, tensors) if tensors else None


def _words(state_dict: StateDict) -> str:
    count = len(state_dict.tensors)
    return f"{state_dict.root or 'the top dict'} ({count} tensor{'s' if count != 1 else ''})"


def _listing(state_dicts: Sequence[StateDict]) -> str:
    return ", ".join(map(_words, state_dicts[:_SHOWN])) + (f" and {len(state_dicts) - _SHOWN} more" if len(state_dicts) > _SHOWN else "")


def _advice(state_dicts: Sequence[StateDict]) -> str:
    return f"choose one: root={state_dicts[0].root!r}"


def _serious(state_dicts: Sequence[StateDict]) -> Sequence[StateDict]:
    """Without dicts that hold no weights (losses, counters, states of random generators), unless there is nothing else."""
    return [state_dict for state_dict in state_dicts if any(map(_is_weight, state_dict.tensors.values()))] or state_dicts


def _is_weight(tensor: TensorMeta) -> bool:
    return bool(tensor.shape) and BY_CODE[tensor.dtype].kind in ("float", "complex")


def _parent(root: str) -> str:
    """The parent whose dicts a joined root reads together."""
    return root[: -len(ALL)].rstrip(".") if root.endswith(ALL) else root


def _below(root: str, parent: str) -> str | None:
    """A root's place below `parent`; None when it is not there."""
    if root == parent or not parent:
        return root[len(parent) :]
    return root[len(parent) + 1 :] if root.startswith(f"{parent}.") else None


def _join(state_dicts: Sequence[StateDict], parent: str) -> StateDict | None:
    """Every state_dict at and below `parent` as one whose keys begin with the places of the dicts below; None where there are not two, or
    where two keys would be one."""
    below = [(head, state_dict) for state_dict in state_dicts if (head := _below(state_dict.root, parent)) is not None]
    if not any(head for head, _ in below):
        return None
    tensors: dict[str, TensorMeta] = {}
    entries: dict[str, Any] = {}
    metadata: dict[str, Any] = {}
    for head, state_dict in below:
        for key, tensor in state_dict.tensors.items():
            name = f"{head}.{key}" if head else key
            tensors[name] = replace(tensor, name=name)
        entries.update({f"{head}.{key}" if head else key: entry for key, entry in state_dict.entries.items()})
        metadata.update({f"{head}.{path}".strip(".") if head else path: local for path, local in state_dict.module_metadata.items()})
    total = sum(len(state_dict.tensors) + len(state_dict.entries) for _, state_dict in below)
    if total != len({*tensors, *entries}):
        return None
    name = f"{parent}.{ALL}" if parent else ALL
    return StateDict(name if any(not head for head, _ in below) else parent, tensors, entries, metadata)


def _joined(state_dicts: Sequence[StateDict]) -> Iterator[StateDict]:
    """Every parent of several state_dicts, the innermost first."""
    if len(state_dicts) > _MANY:
        return
    parents: dict[str, None] = {}
    for state_dict in state_dicts:
        parts = state_dict.root.split(".") if state_dict.root else []
        parents.update(dict.fromkeys(".".join(parts[:depth]) for depth in range(len(parts))))
    for parent in reversed(sorted(parents, key=len)[:_PARENTS]):
        joined = _join(state_dicts, parent)
        if joined is not None and sum(_below(state_dict.root, parent) is not None for state_dict in state_dicts) > 1:
            yield joined


@dataclass(frozen=True)
class _Fit:
    """How a state_dict covers a target: for each key of the target that it covers, which bytes that would get, and how many elements."""

    found: StateDict
    origins: Mapping[str, Hashable]
    spans: frozenset[Hashable]
    elements: int
    joined: bool

    def near(self, best: _Fit) -> bool:
        """Whether it covers about as much as the best one, of the tensors or of the elements."""
        return len(self.origins) >= NEAR * len(best.origins) or self.elements >= NEAR * best.elements > 0

    def same(self, best: _Fit) -> bool:
        """Whether it would give nothing but what the best one gives: the same bytes, or a parent of the best one or a part of it."""
        one, other = _parent(self.found.root), _parent(best.found.root)
        return (
            self.origins.items() <= best.origins.items()
            or (self.joined and _below(other, one) is not None)
            or (best.joined and _below(one, other) is not None and self.spans <= best.spans)
        )


def _best(archive: Archive, target: Checkpoint) -> StateDict:
    unasked = _unasked(archive)
    candidates = [*unasked, *_joined(unasked)]
    forms = {_form(key, tensor) for key, tensor in target.items()}
    fits: list[_Fit] = []
    least, work = 1.0, 0
    for index, state_dict in sorted(enumerate(candidates), key=lambda row: -len(row[1].tensors)):
        if sum(_form(key, tensor) in forms for key, tensor in state_dict.tensors.items()) < least:
            continue  # can't cover half of what the best one covers
        work += len(state_dict.tensors) + len(target)
        if work > _WORK and index < len(unasked):
            raise RootError(
                f"holds {len(unasked)} state_dicts, too many to find the one that fits {target.path} best",
                path=archive.path,
                hint=_advice(unasked),
            )
        fit = _fit(state_dict, target, index >= len(unasked))
        fits.append(fit)
        least = max(least, len(fit.origins) / 2)
    order = {id(state_dict): index for index, state_dict in enumerate(candidates)}
    fits.sort(key=lambda fit: (-len(fit.origins), order[id(fit.found)]))
    if not fits or not fits[0].origins:
        serious = _serious(unasked)
        if len(serious) == 1:
            return serious[0]
        raise RootError(
            f"holds several state_dicts, and none has a key of {target.path}: {_listing(serious)}", path=archive.path, hint=_advice(serious)
        )
    rivals = [fits[0], *(fit for fit in fits[1:] if fit.near(fits[0]) and not fit.same(fits[0]))]
    # Of those that would give the same bytes, the first one stands for all.
    apart = [fit for place, fit in enumerate(rivals) if not any(fit.same(other) for other in rivals[:place])]
    if len(apart) > 1:
        apart.sort(key=lambda fit: order[id(fit.found)])
        equally = "equally" if len({len(fit.origins) for fit in apart}) == 1 else "about equally"
        listing = ", ".join(f"{fit.found.root!r}" for fit in apart[:_SHOWN]) + (
            f" and {len(apart) - _SHOWN} more" if len(apart) > _SHOWN else ""
        )
        averaged = lightning_average([state_dict.root for state_dict in archive.state_dicts], archive.beside)
        counts = tuple(
            f"{_words(fit.found)}: {len(fit.origins)} of the target's {len(target)}"
            + (", the average of the weights" if fit.found.root == averaged else "")
            for fit in apart[:_SHOWN]
        )
        raise RootError(
            f"holds {len(apart)} state_dicts that fit {equally} well: {listing}",
            path=archive.path,
            hint=_advice([fit.found for fit in apart]),
            problems=counts,
        )
    return fits[0].found


def _form(key: str, tensor: TensorMeta) -> tuple[str, tuple[int, ...]]:
    """What no prefix changes of a tensor: its last segment that is no wrapper's, and its shape."""
    last = key.rpartition(".")[2]
    if last in WRAPPERS:
        last = next((segment for segment in reversed(key.split(".")) if segment not in WRAPPERS), last)
    return last, tensor.shape


def _fit(state_dict: StateDict, target: Checkpoint, joined: bool) -> _Fit:
    """What a state_dict covers under the change of names that explains most, whether that is applied or its rivals are asked for."""
    from ckptsurgeon.planning.own_loading import conversions

    mapping = conversions.choose(state_dict.tensors, target, find_change(state_dict.tensors, target)).best.mapping
    parent = _parent(state_dict.root)
    origins: dict[str, Hashable] = {}
    spans: set[Hashable] = set()
    for key, name in mapping.items():
        tensor = state_dict.tensors[key]
        place = tensor.place or (f"{parent}.{key}" if parent else key)
        spans.add(place)
        crc = tensor.span.checksum() if tensor.span is not None else None
        # Bytes of one length and checksum, laid out alike, are the same bytes.
        origins[name] = (tensor.dtype, tensor.stride, crc, tensor.nbytes) if crc else place
    return _Fit(state_dict, origins, frozenset(spans), sum(target[name].numel for name in origins), joined)
