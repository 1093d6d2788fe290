"""Chooses which nested dict of a file is the state_dict: its root.

With a target it is the dict that covers the target best. A second dict that covers at least 0.9 times as much is an error (such as raw
weights and their EMA), unless it gives the same bytes or one contains the other. Without a target it is the only dict, or the one that is
named. An optimizer's own dicts are used only by name. Several dicts below one parent may also be read together, with joined names.
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

ALL = "**"  # `parent.**` names a parent with tensors of its own, read together with all dicts below it
_MANY = 64  # with more state_dicts than this in a file, dicts are read together only by name
_WORK = 1_000_000  # how many keys are compared at most to find the best root
_PARENTS = 16  # how many parents are tried, the outermost first
_SHOWN = 8  # how many roots an error lists


def choose(archive: Archive, *, root: str | None = None, target: Checkpoint | None = None, parts: bool = False) -> Checkpoint:
    """The checkpoint of `archive` at the named or best root.

    Args:
        root: the name of the root, or None to choose it.
        target: what the root must cover, or None.
        parts: whether one rank's part of a checkpoint is accepted.

    Raises:
        RootError: there is no such root, or several fit; with the candidates and how to choose.
        PartError: it is one rank's part of a checkpoint.
    """
    if archive.part is not None and not parts:
        raise PartError(archive.part.reason, path=archive.path, hint=archive.part.hint)
    if root is not None:
        return checkpoint(archive, _named(archive, root))
    candidates = _candidates(archive)
    if len(candidates) == 1:
        return checkpoint(archive, candidates[0])
    if target is not None:
        return checkpoint(archive, _best(archive, target))
    serious = _serious(candidates)
    if len(serious) > 1:
        raise RootError(f"holds {len(serious)} state_dicts: {_listing(serious)}", path=archive.path, hint=_advice(serious))
    return checkpoint(archive, serious[0])


def _candidates(archive: Archive) -> Sequence[StateDict]:
    """The state_dicts that may be used without being named: all but an optimizer's own, such as its moments by parameter name."""
    candidates = [
        state_dict for state_dict in archive.state_dicts if not (of_optimizer(state_dict.root) or all_moments(state_dict.tensors))
    ]
    if not candidates:
        raise RootError(
            f"holds an optimizer's state and no model's: {_listing(archive.state_dicts)}",
            path=archive.path,
            hint=f"give the file with the model's weights; or name what you mean: root={archive.state_dicts[0].root!r}",
        )
    return candidates


def checkpoint(archive: Archive, chosen: StateDict, *, alone: bool = False) -> Checkpoint:
    """`archive` as the checkpoint at one of its roots, or at several joined ones; with `alone`, nothing else that it holds is listed."""
    unused: Sequence[StateDict] = ()
    if alone:
        pass
    elif any(state_dict is chosen for state_dict in archive.state_dicts):
        unused = [state_dict for state_dict in archive.state_dicts if state_dict is not chosen]
    else:
        unused = [state_dict for state_dict in archive.state_dicts if _below(state_dict.root, _parent(chosen.root)) is None]
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
        left_behind=() if alone else (*(_words(state_dict) for state_dict in unused), *archive.beside),
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


def at_path(value: Any, path: str) -> StateDict | None:
    """All tensors below a dotted path in a file's value, an optimizer's too, with joined names; None where there are none."""
    tensors: dict[str, TensorMeta] = {}
    waiting = [("", training_places.at_path(value, path))]
    while waiting:
        head, node = waiting.pop()
        if isinstance(node, TensorMeta) and head:
            tensors[head] = replace(node, name=head)
        elif isinstance(node, (Mapping, list, tuple)):
            items = list(node.items() if isinstance(node, Mapping) else enumerate(node))
            waiting += [(f"{head}.{key}" if head else str(key), child) for key, child in reversed(items) if type(key) in (str, int)]
    return StateDict(path, tensors) if tensors else None


def _words(state_dict: StateDict) -> str:
    count = len(state_dict.tensors)
    return f"{state_dict.root or 'the top dict'} ({count} tensor{'s' if count != 1 else ''})"


def _listing(state_dicts: Sequence[StateDict]) -> str:
    return ", ".join(map(_words, state_dicts[:_SHOWN])) + (f" and {len(state_dicts) - _SHOWN} more" if len(state_dicts) > _SHOWN else "")


def _advice(state_dicts: Sequence[StateDict]) -> str:
    return f"choose one: root={state_dicts[0].root!r}"


def _serious(state_dicts: Sequence[StateDict]) -> Sequence[StateDict]:
    """The state_dicts that hold weights (not losses, counters or states of random generators); all of them where none does."""
    return [state_dict for state_dict in state_dicts if any(map(_is_weight, state_dict.tensors.values()))] or state_dicts


def _is_weight(tensor: TensorMeta) -> bool:
    return bool(tensor.shape) and BY_CODE[tensor.dtype].kind in ("float", "complex")


def _parent(root: str) -> str:
    """The parent whose dicts a joined root reads together."""
    return root[: -len(ALL)].rstrip(".") if root.endswith(ALL) else root


def _below(root: str, parent: str) -> str | None:
    """A root's path relative to `parent`; None where it is not below it."""
    if root == parent or not parent:
        return root[len(parent) :]
    return root[len(parent) + 1 :] if root.startswith(f"{parent}.") else None


def _join(state_dicts: Sequence[StateDict], parent: str) -> StateDict | None:
    """Every state_dict at and below `parent` as one, whose keys begin with the relative paths of the dicts; None where there is only one,
    or where two keys would get one name."""
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
    """How a state_dict covers a target.

    Attributes:
        state_dict: the state_dict.
        origins: by target key that it covers, what identifies the bytes that the key would get.
        spans: the paths of the tensors that it would use.
        elements: how many of the target's elements it covers.
        joined: whether it is several dicts read together.
    """

    state_dict: StateDict
    origins: Mapping[str, Hashable]
    spans: frozenset[Hashable]
    elements: int
    joined: bool

    def near(self, best: _Fit) -> bool:
        """Whether it covers about as much as the best one, of the tensors or of the elements."""
        return len(self.origins) >= NEAR * len(best.origins) or self.elements >= NEAR * best.elements > 0

    def same(self, best: _Fit) -> bool:
        """Whether it is no rival of the best one: it gives the same bytes, or one of the two contains the other."""
        own, of_best = _parent(self.state_dict.root), _parent(best.state_dict.root)
        return (
            self.origins.items() <= best.origins.items()
            or (self.joined and _below(of_best, own) is not None)
            or (best.joined and _below(own, of_best) is not None and self.spans <= best.spans)
        )


def _best(archive: Archive, target: Checkpoint) -> StateDict:
    single = _candidates(archive)
    candidates = [*single, *_joined(single)]
    forms = {_form(key, tensor) for key, tensor in target.items()}
    fits: list[_Fit] = []
    least, work = 1.0, 0
    for index, state_dict in sorted(enumerate(candidates), key=lambda row: -len(row[1].tensors)):
        if sum(_form(key, tensor) in forms for key, tensor in state_dict.tensors.items()) < least:
            continue  # it can't cover half of what the best state_dict covers
        work += len(state_dict.tensors) + len(target)
        if work > _WORK and index < len(single):
            raise RootError(
                f"holds {len(single)} state_dicts, too many to find the one that fits {target.path} best",
                path=archive.path,
                hint=_advice(single),
            )
        fit = _fit(state_dict, target, index >= len(single))
        fits.append(fit)
        least = max(least, len(fit.origins) / 2)
    order = {id(state_dict): index for index, state_dict in enumerate(candidates)}
    fits.sort(key=lambda fit: (-len(fit.origins), order[id(fit.state_dict)]))
    if not fits or not fits[0].origins:
        serious = _serious(single)
        if len(serious) == 1:
            return serious[0]
        raise RootError(
            f"holds several state_dicts, and none has a key of {target.path}: {_listing(serious)}", path=archive.path, hint=_advice(serious)
        )
    rivals = [fits[0], *(fit for fit in fits[1:] if fit.near(fits[0]) and not fit.same(fits[0]))]
    # Of several that would give the same bytes, only the first is kept.
    distinct = [fit for index, fit in enumerate(rivals) if not any(fit.same(earlier) for earlier in rivals[:index])]
    if len(distinct) > 1:
        distinct.sort(key=lambda fit: order[id(fit.state_dict)])
        equally = "equally" if len({len(fit.origins) for fit in distinct}) == 1 else "about equally"
        listing = ", ".join(f"{fit.state_dict.root!r}" for fit in distinct[:_SHOWN]) + (
            f" and {len(distinct) - _SHOWN} more" if len(distinct) > _SHOWN else ""
        )
        averaged = lightning_average([state_dict.root for state_dict in archive.state_dicts], archive.beside)
        counts = tuple(
            f"{_words(fit.state_dict)}: {len(fit.origins)} of the target's {len(target)}"
            + (", the average of the weights" if fit.state_dict.root == averaged else "")
            for fit in distinct[:_SHOWN]
        )
        raise RootError(
            f"holds {len(distinct)} state_dicts that fit {equally} well: {listing}",
            path=archive.path,
            hint=_advice([fit.state_dict for fit in distinct]),
            problems=counts,
        )
    return fits[0].state_dict


def _form(key: str, tensor: TensorMeta) -> tuple[str, tuple[int, ...]]:
    """The last segment of a key that is not a wrapper's, and the tensor's shape: no prefix changes them."""
    last = key.rpartition(".")[2]
    if last in WRAPPERS:
        last = next((segment for segment in reversed(key.split(".")) if segment not in WRAPPERS), last)
    return last, tensor.shape


def _fit(state_dict: StateDict, target: Checkpoint, joined: bool) -> _Fit:
    """What a state_dict covers with the change of names that makes most keys equal, even where that change has rivals."""
    from ckptsurgeon.planning.own_loading import conversions

    mapping = conversions.choose(state_dict.tensors, target, find_change(state_dict.tensors, target)).best.mapping
    parent = _parent(state_dict.root)
    origins: dict[str, Hashable] = {}
    spans: set[Hashable] = set()
    for key, name in mapping.items():
        tensor = state_dict.tensors[key]
        identity = tensor.place or (f"{parent}.{key}" if parent else key)
        spans.add(identity)
        crc = tensor.span.checksum() if tensor.span is not None else None
        # Tensors with the same layout, length and checksum are taken for the same bytes.
        origins[name] = (tensor.dtype, tensor.stride, crc, tensor.nbytes) if crc else identity
    return _Fit(state_dict, origins, frozenset(spans), sum(target[name].numel for name in origins), joined)
