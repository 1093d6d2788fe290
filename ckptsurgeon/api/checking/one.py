"""Checks one file or folder. Whatever is wrong with it becomes a finding; nothing is raised.

The checks run one after another; torch is imported only for `finite`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from threading import Lock
from typing import TYPE_CHECKING

from ckptsurgeon import formats
from ckptsurgeon.api import _opening
from ckptsurgeon.api.checking import folders
from ckptsurgeon.api.checking.settings import Gate
from ckptsurgeon.dtypes import BY_CODE
from ckptsurgeon.errors import (
    CheckpointError,
    FormatError,
    LimitError,
    PartError,
    PointerError,
    RootError,
    UnreadableError,
    UnsafeError,
    no_memory,
)
from ckptsurgeon.formats.archive_tree import tensors_of
from ckptsurgeon.formats.folders.hf_shards import shard_in_words, shard_of
from ckptsurgeon.formats.registry import named
from ckptsurgeon.planning import roots
from ckptsurgeon.planning.quantised_weights.find import find
from ckptsurgeon.planning.training_places import of_optimizer
from ckptsurgeon.report import Finding
from ckptsurgeon.tensors import Archive, Checkpoint, Refused

if TYPE_CHECKING:
    from ckptsurgeon.streaming.values import Buffer

# The code of each kind of refusal; a class that is not here has its nearest base's.
REFUSALS: dict[type[CheckpointError], str] = {
    CheckpointError: "CK100",
    UnreadableError: "CK101",
    FormatError: "CK102",
    LimitError: "CK103",
    RootError: "CK104",
    PointerError: "CK105",
    PartError: "CK108",
    UnsafeError: "CK201",
}
FITS = {"missing": "CK301", "unexpected": "CK302", "shape": "CK303", "kind": "CK301", "dtype": "CK304"}
ASKS = "asks for {}, which is never imported here and would be elsewhere"
MEMORY = CheckpointError("there was not enough memory to check it", hint="check it alone, with --jobs 1")

_PROBING = Lock()  # a model whose loading code is run may be shared by the threads of several files

Alive = Callable[[], None]  # called every few megabytes; raises if the run was stopped


def findings(path: str, gate: Gate, alive: Alive) -> tuple[Finding, ...]:
    """The findings in the file or folder at `path` whose codes the gate selects."""
    collected: list[Finding] = []
    try:
        for step in _steps(path, gate, alive):
            collected += step
    except (MemoryError, RuntimeError) as error:
        if not no_memory(error):
            raise
        collected.append(_refusal(MEMORY, path))
    return tuple(finding for finding in collected if gate.wants(finding.code))


def _steps(path: str, gate: Gate, alive: Alive) -> Iterator[list[Finding]]:
    """The findings of one check after another. A check that fails adds its error as a finding, and the others still run."""
    archive = None
    try:
        archive = _opening.read(path)
    except CheckpointError as error:
        yield [_refusal(error, path)]
        if isinstance(error, PartError):
            yield [Finding("CK201", ASKS.format(name)) for name in error.globals]
    if gate.max_size is not None and (size := _size(path, archive)) > gate.max_size:
        yield [Finding("CK501", f"has {size:,} bytes, and {gate.max_size:,} are allowed")]
    if archive is None:
        return
    yield list(_safety(archive))
    quantised = {key: codes for state_dict in archive.state_dicts for key, codes in find(state_dict.tensors).items()}
    yield [Finding("CK203", codes.words, key, "note") for key, codes in quantised.items()]
    if archive.part is not None:
        yield [_refusal(PartError(archive.part.reason, hint=archive.part.hint), path)]
    shard = shard_of(path) if [stamp.path for stamp in archive.files] == [path] else None
    yield [Finding("CK108", shard_in_words(shard), level="note")] if shard is not None else []
    yield [Finding("CK107", f"beside it, and not looked at: {name}", level="note") for name in folders.other_checkpoints(path, archive)]
    if gate.allow and archive.format not in gate.allow:
        yield [Finding("CK502", f"is {archive.format}; allowed: {', '.join(gate.allow)}")]
    checkpoints = [roots.checkpoint(archive, state_dict, alone=True) for state_dict in archive.state_dicts]
    if gate.against is not None or gate.root is not None:
        try:
            against = gate.against if archive.part is None else None  # pieces fit nothing
            chosen = roots.choose(archive, root=gate.root, target=None if against is None else against.checkpoint, parts=True)
            checkpoints = [chosen]
            if against is not None:
                from ckptsurgeon.api._own_loading import taken_as_it_stands
                from ckptsurgeon.api._proving import strict_load
                from ckptsurgeon.planning.own_loading.read_by_library import read_by_library

                as_read = read_by_library(chosen, against.checkpoint)
                with _PROBING:
                    taken = taken_as_it_stands(as_read.checkpoint, against)
                misfits = as_read.forgiven(strict_load(as_read.checkpoint, against.checkpoint, taken))
                yield [replace(misfit, code=FITS[misfit.code]) for misfit in misfits if misfit.code in FITS]
        except CheckpointError as error:
            yield [_refusal(error, path)]
    if gate.dtypes:
        yield [finding for checkpoint in checkpoints for finding in _dtypes(checkpoint, gate.dtypes)]
    if gate.full and gate.wants("CK106"):
        yield _collected(_checksums(archive, alive), path)
    if gate.finite and gate.wants("CK401"):
        for checkpoint in checkpoints:
            yield _collected(_not_finite(checkpoint, alive), path)
        yield _collected(_moments_not_finite(checkpoints, archive, alive), path)


def _collected(stream: Iterator[Finding], path: str) -> list[Finding]:
    """The findings, and the error if reading fails midway."""
    findings = []
    try:
        for finding in stream:
            findings.append(finding)
    except CheckpointError as error:
        findings.append(_refusal(error, path))
    return findings


def _refusal(error: CheckpointError, path: str) -> Finding:
    """The finding for an error. A file that names code to import is unsafe, whatever else is wrong with it."""
    code_of_kind = next(REFUSALS[kind] for kind in type(error).__mro__ if kind in REFUSALS)
    code = "CK201" if error.globals and code_of_kind != "CK108" else code_of_kind
    where = f"{os.path.basename(error.path)}: " if error.path and error.path != path else ""  # a shard
    hint = f" (try: {error.hint})" if error.hint else ""
    return Finding(code, where + error.reason + "".join(f"; {problem}" for problem in error.problems) + hint, error.key)


def _size(path: str, archive: Archive | None) -> int:
    return folders.size(path) if archive is None else sum(stamp.size for stamp in archive.files)


def _safety(archive: Archive) -> Iterator[Finding]:
    for name in archive.globals:
        yield Finding("CK201", ASKS.format(name))
    for state_dict in archive.state_dicts:
        for key, entry in state_dict.entries.items():
            if isinstance(entry, Refused):
                yield Finding("CK202", f"is {entry.reason}", key)


def _dtypes(checkpoint: Checkpoint, expected: tuple[str, ...]) -> Iterator[Finding]:
    """Floating and complex tensors must have an expected dtype; integers and booleans only if one of their kind is expected."""
    kinds = {"float", "complex", *(BY_CODE[code].kind for code in expected)}
    for key, tensor in checkpoint.items():
        if tensor.dtype not in expected and BY_CODE[tensor.dtype].kind in kinds:
            yield Finding("CK503", f"is {tensor.dtype}; expected: {', '.join(expected)}", key)


def _checksums(archive: Archive, alive: Alive) -> Iterator[Finding]:
    from ckptsurgeon.streaming.checksums import check_file, entries_in, findings_of, places_in

    any_checksums = False
    entries = entries_in(archive)
    for stamp in archive.files:
        checked = check_file(stamp, alive, entries)
        any_checksums = any_checksums or checked.keeps
        where = f"{os.path.basename(stamp.path)}: " if len(archive.files) > 1 else ""
        places = (place for state_dict in archive.state_dicts for place in places_in(state_dict.tensors))
        yield from (replace(found, code="CK106") for found in findings_of(checked, places, where))
    if not any_checksums:
        yield Finding("CK106", f"{archive.format} keeps no checksums to compare the data with", level="note")


def _moments_not_finite(checkpoints: Sequence[Checkpoint], archive: Archive, alive: Alive) -> Iterator[Finding]:
    """The same for what an optimizer keeps beside the weights: a run that resumes would spread it."""
    if archive.kind == "skeleton" or not checkpoints or not named(archive.format).pickled or not any(map(of_optimizer, archive.beside)):
        return
    looked_at = {tensor.place for checkpoint in checkpoints for tensor in checkpoint.values()}
    everything = tensors_of(formats.read_tree(archive.path).value)
    moments = {key: tensor for key, tensor in everything if of_optimizer(key) and tensor.place not in looked_at}
    yield from _not_finite(replace(checkpoints[0], tensors=moments), alive)


def _not_finite(checkpoint: Checkpoint, alive: Alive) -> Iterator[Finding]:
    """Tensors with NaN or infinite values, streamed through torch; a tensor without data has none."""
    from ckptsurgeon.streaming.reading import Reader
    from ckptsurgeon.streaming.values import count_non_finite

    def watched(parts: Iterable[Buffer]) -> Iterator[Buffer]:
        for part in parts:
            alive()
            yield part

    if checkpoint.kind == "skeleton":
        yield Finding("CK401", "is a skeleton, and has no values that could be looked at", level="note")
    with Reader([checkpoint]) as reader:
        for key, tensor in checkpoint.items():
            if tensor.place is not None and (count := count_non_finite(watched(reader.parts(tensor)), tensor.dtype)):
                yield Finding("CK401", f"has {count:,} values that are NaN or infinite", key)
        reader.check_unchanged()
