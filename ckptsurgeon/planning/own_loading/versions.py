"""Decides what the output records in torch's `_metadata`: for each module, the version of the code that its values were saved with.

A module with its own loading code may change values depending on the recorded version. So the output keeps the source's version where all
of a module's values are the source's. Where some are the target's, the output has the values that torch's load leaves in the model, with
the target's version. Values of several versions within one such module are refused. Pure: no module's code is run or read.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from ckptsurgeon.errors import PlanError
from ckptsurgeon.formats.pickle.unpickled import written_out
from ckptsurgeon.hints import several, shortened
from ckptsurgeon.planning.apply_rules import Names
from ckptsurgeon.planning.keys import SourceKey
from ckptsurgeon.planning.plan_types import Plan, Step
from ckptsurgeon.planning.prefixes.find import Prefix
from ckptsurgeon.report import Finding
from ckptsurgeon.tensors import Checkpoint
from ckptsurgeon.wrappers import HIDDEN, unwrap

Local = Mapping[str, Any]
NORM = ("running_mean", "running_var")  # torch's own norms have both, and load values of every version alike


@dataclass(frozen=True)
class Versions:
    """What is decided, by the path of a module.

    Attributes:
        recorded: what the output records.
        stated: what the sources recorded for the target's modules with their own loading code.
        loaded: those of these modules that get the values that torch's load leaves in the model.
        notes: notes for the plan.
    """

    recorded: Mapping[str, Local]
    stated: Mapping[str, Local] = field(default_factory=dict)
    loaded: tuple[str, ...] = ()
    notes: tuple[Finding, ...] = ()


def find_versions(
    sources: Sequence[Checkpoint],
    target: Checkpoint | None,
    names: Names,
    steps: Sequence[Step],
    handed: Mapping[str, SourceKey] = {},
) -> Versions:
    """Decide what the output records for each module.

    Args:
        handed: the source keys that torch's load gets unchanged, by name.

    Raises:
        PlanError: modules whose values are of several versions.
    """
    if target is None or not target.module_metadata:
        return Versions(_of_sources(sources, target, names, steps))
    own = {path: plain(local) for path, local in written_out(target.module_metadata).items()}
    if target.kind == "model":
        return _of_model(sources, target, names, steps, own, handed)
    return Versions(_of_unknown(sources, target, names, steps, own))


def _of_model(
    sources: Sequence[Checkpoint],
    target: Checkpoint,
    names: Names,
    steps: Sequence[Step],
    own: Mapping[str, Local],
    handed: Mapping[str, SourceKey],
) -> Versions:
    """What to record where the target is a model, whose loading code is known."""
    changing = {path: loader for path, loader in target.loaders.items() if loader.changes}
    if not changing:
        return Versions(own)
    links = [*_links(step for step in steps if step.action != "load"), *((name, *source_key) for name, source_key in handed.items())]
    placed = _placed(sources, names, links)
    mixed = {step.target for step in steps if not step.sources or step.filled}
    computed = {step.target for step in steps if step.action == "load"}
    stated: dict[str, Local] = {}
    differ: dict[str, bool] = {}  # whether the sources recorded anything
    loaded: set[str] = set()
    problems = []
    for path, loader in changing.items():
        by_source = placed.get(unwrap(path, HIDDEN), {})
        target_local = own.get(path, {})
        recorded_by_source = {number: local for number, local in by_source.items() if local is not None}
        versions = {_version(local) for local in recorded_by_source.values()}
        if len(versions) > 1 or (versions and len(recorded_by_source) < len(by_source) and versions != {_version(target_local)}):
            problems.append(f"{_module(path)}, a {loader.name}: {_versions_of(by_source, sources)}")
            continue
        stated[path] = next(iter(recorded_by_source.values()), {})
        if stated[path] != target_local and loader.keys - mixed:
            differ[path] = bool(recorded_by_source)
        if loader.keys & computed or (path in differ and loader.keys & mixed):
            loaded.add(path)
    # Values that loading code leaves are of the target's version, so every module that shares a key with one of these is loaded too.
    while more := {path for path in stated if path not in loaded and any(changing[path].keys & changing[shared].keys for shared in loaded)}:
        loaded |= more
    recorded = dict(own)
    by_note: dict[str, list[str]] = {}
    for path, is_stated in differ.items():
        if path not in loaded and is_stated:
            recorded[path] = stated[path]
        elif path not in loaded:
            recorded.pop(path, None)
        kept = "a merged file has what that leaves" if path in loaded else "a merged file keeps both"
        now = _number(own.get(path, {}))
        words = f"{changing[path].name} loads in its own way, at {now}, and the values have {_number(stated[path])}; {kept}"
        by_note.setdefault(words, []).append(_module(path))
    if problems:
        command = shlex.join(["ckptsurgeon", "merge", sources[0].path, target.path, "-o", "first.pt"])
        raise _mixed(problems, f"merge each source with the model alone first: {command}")
    return Versions(
        recorded,
        stated,
        tuple(path for path in stated if path in loaded),
        tuple(Finding("version", f"{several(paths)}: {words}", None, "note") for words, paths in by_note.items()),
    )


def _of_unknown(
    sources: Sequence[Checkpoint], target: Checkpoint, names: Names, steps: Sequence[Step], own: Mapping[str, Local]
) -> dict[str, Local]:
    """What to record where the target is a file or a skeleton, so that the code of its modules is not known."""
    if _none_differs(sources, steps, own):
        return dict(own)
    placed = _placed(sources, names, _links(steps))
    mixed = {head for step in steps if not step.sources or step.filled for head in module_paths(step.target)}
    norms = _norms(target)
    recorded, problems = {}, []
    for path, target_local in own.items():
        bare = unwrap(path, HIDDEN)
        by_source = placed.get(bare, {})
        stated = [local for local in by_source.values() if local is not None]
        versions = {_version(local) for local in (*stated, *([target_local] if bare in mixed else []))}
        if len(versions) > 1 and bare not in norms:
            kept = f", {_number(target_local)} in {target.path}" if bare in mixed else ""
            problems.append(f"{_module(path)}: {_versions_of(by_source, sources)}{kept}")
        elif not by_source or bare in mixed or bare in norms:
            recorded[path] = target_local
        elif stated:
            recorded[path] = stated[0]
        elif _version(target_local) in (None, 1):
            recorded[path] = target_local
    if problems:
        raise _mixed(problems, "give the model itself as the target: its code tells what the versions mean")
    return recorded


def _none_differs(sources: Sequence[Checkpoint], steps: Iterable[Step], own: Mapping[str, Local]) -> bool:
    """Whether no version differs, by a quick test for the usual case: all are version 1, or the sources record what the target records."""
    recorded = [{path: plain(local) for path, local in written_out(source.module_metadata).items()} for source in sources]
    if all(local == {"version": 1} for by_path in (own, *recorded) for local in by_path.values()):
        return True
    return all(by_path == own for by_path in recorded) and all(key == step.target for step in steps for _, key in step.sources)


def _of_sources(sources: Sequence[Checkpoint], target: Checkpoint | None, names: Names, steps: Sequence[Step]) -> dict[str, Local]:
    """What to record where the target records nothing: what the sources record, each module renamed as its tensors were."""
    recorded: dict[str, Local] = {}
    for number, source in enumerate(sources):
        for path, local in written_out(source.module_metadata).items():
            target_path = names.prefixes[number].target_path(path)
            if target_path is not None:
                recorded[target_path] = plain(local)
    if len(sources) == 1 and all(key == step.target for step in steps for _, key in step.sources):
        return recorded
    several = len([source for source in sources if source.module_metadata]) > 1
    placed = _placed(sources, names, _links(steps))
    norms = _norms({step.target: None for step in steps}) if several else frozenset()
    problems = []
    for path, by_source in placed.items():
        stated = [local for local in by_source.values() if local is not None]
        if several and path and path not in norms and len({_version(local) for local in stated}) > 1:
            problems.append(f"{_module(path)}: {_versions_of(by_source, sources)}")
        if stated and path not in recorded:
            recorded[path] = stated[0]
    if problems:
        raise _mixed(problems, "give the model itself as the target, and merge one source at a time")
    return recorded


def _mixed(problems: Sequence[str], hint: str) -> PlanError:
    return PlanError("modules would get values of several versions of their code", problems=shortened(problems), hint=hint)


def _versions_of(by_source: Mapping[int, Local | None], sources: Sequence[Checkpoint]) -> str:
    return ", ".join(f"{_number(local)} in {sources[number].path}" for number, local in sorted(by_source.items()))


def _number(local: Local | None) -> str:
    return "no version" if local is None or _version(local) is None else f"version {_version(local)}"


def _module(path: str) -> str:
    return path or "the model itself"


def _version(local: Local) -> Any:
    return local.get("version")


def plain(local: Any) -> dict[str, Any]:
    """A module's `_metadata` without values that JSON can't hold; torch's own are numbers and flags."""
    items = local.items() if isinstance(local, Mapping) else ()
    values = {name: plain(value) if isinstance(value, Mapping) else value for name, value in items if type(name) is str}
    known = (int, str, bool, float, dict, type(None))
    return {name: value for name, value in values.items() if type(value) in known and (type(value) is not float or math.isfinite(value))}


def unkept(plan: Plan) -> list[Finding]:
    """A note on versions above 1 that a file without versions loses, where no model is at hand whose code tells if they matter."""
    if plan.target is not None and plan.target.kind == "model":
        return []
    norms = _norms(step.target for step in plan.steps)
    paths = [path for path, local in plan.module_metadata.items() if (local.get("version") or 1) != 1 and unwrap(path, HIDDEN) not in norms]
    words = "this format keeps no versions of modules, and code that loads by them takes these values for older ones (-o OUT.pt keeps them)"
    return [Finding("version", f"{several([_module(path) for path in paths])}: {words}", None, "note")] if paths else []


def _norms(keys: Iterable[str]) -> frozenset[str]:
    """The paths of torch's own norms, by their buffers."""
    have = set(keys)
    heads = {key.rpartition(".")[0] for key in have}
    return frozenset(head for head in heads if all((f"{head}." if head else "") + name in have for name in NORM))


def stated(number: int, sources: Sequence[Checkpoint], names: Names, paths: Iterable[str]) -> dict[str, Local]:
    """What a source recorded for the target's modules at these paths, found by all names that rules give its keys."""
    links = [(name, number, key) for (source, key), aliases in names.names_of.items() if source == number for name in aliases]
    placed = _placed(sources, names, links)
    recorded = {path: placed.get(unwrap(path, HIDDEN), {}).get(number) for path in paths}
    return {path: local for path, local in recorded.items() if local is not None}


def _links(steps: Iterable[Step]) -> list[tuple[str, int, str]]:
    return [(step.target, number, key) for step in steps for number, key in step.sources]


def _placed(sources: Sequence[Checkpoint], names: Names, links: Iterable[tuple[str, int, str]]) -> dict[str, dict[int, Local | None]]:
    """For each module of the target, what each source that gives it a value recorded for it; None where it recorded nothing.

    `links` are target keys, each with a source's number and key.
    """
    by_path = [{unwrap(path, HIDDEN): plain(local) for path, local in written_out(source.module_metadata).items()} for source in sources]

    @cache
    def pairs(number: int, target: str, source: str) -> tuple[tuple[str, str], ...]:
        return tuple(_pairs(target, source, names.prefixes[number]).items())

    recorded: dict[str, dict[int, Local | None]] = {}
    for number, target, source in dict.fromkeys(
        (number, key.rpartition(".")[0], origin.rpartition(".")[0]) for key, number, origin in links
    ):
        matched = pairs(number, unwrap(target, HIDDEN), unwrap(source, HIDDEN))
        for path, source_path in matched:
            local = by_path[number].get(source_path)
            if local is not None or number not in recorded.get(path, {}):
                recorded.setdefault(path, {})[number] = local
    return recorded


def _pairs(target: str, source: str, prefix: Prefix) -> dict[str, str]:
    """Which source module each module around a target key corresponds to, from the paths of the two modules that hold the tensor.

    >>> _pairs("encoder.mlp.0", "net.mlp.linear_1", Prefix())
    {'': '', 'encoder.mlp.0': 'net.mlp.linear_1', 'encoder.mlp': 'net.mlp', 'encoder': 'net'}
    """
    source_of = {}
    for head in module_paths(f"{source}." if source else ""):
        path = prefix.target_path(head)
        if path is not None and (not path or f"{target}.".startswith(f"{path}.")):
            source_of[path] = head
    ours, theirs = (path.split(".") if path else [] for path in (target, source))
    source_of[target] = source
    while ours and theirs and (ours[-1] == theirs[-1] or ours[-2:-1] == theirs[-2:-1] != []):
        ours, theirs = ours[:-1], theirs[:-1]
        source_of[".".join(ours)] = ".".join(theirs)
    return source_of


def module_paths(key: str) -> Iterator[str]:
    """The paths of the modules that a key may belong to, from the model itself (`""`) inwards."""
    yield ""
    dot = key.find(".")
    while dot >= 0:
        yield key[:dot]
        dot = key.find(".", dot + 1)
