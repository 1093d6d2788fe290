"""Everything that is found in one file or folder: nothing is raised for a bad one, whatever is wrong with it.

The questions are asked one after another; torch is loaded for values (`finite`) alone.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from threading import Lock
from typing import TYPE_CHECKING

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
from ckptsurgeon.planning import roots
from ckptsurgeon.planning.quantised import find
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

_TRYING = Lock()  # loading code is tried out on a model that several files may share

Alive = Callable[[], None]  # called every few megabytes; raises where nobody waits for the answer any more


def findings(path: str, gate: Gate, alive: Alive) -> tuple[Finding, ...]:
    """What is found in the file or folder at `path`, as far as the gate wants to be told."""
    found: list[Finding] = []
    try:
        for step in _steps(path, gate, alive):
            found += step
    except (MemoryError, RuntimeError) as error:
        if not no_memory(error):
            raise
        found.append(_refusal(MEMORY, path))
    return tuple(finding for finding in found if gate.wants(finding.code))


def _steps(path: str, gate: Gate, alive: Alive) -> Iterator[list[Finding]]:
    """Each a kind of question, so that one that can't be answered does not keep the others from being asked."""
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
    quantised = {key: one for state_dict in archive.state_dicts for key, one in find(state_dict.tensors).items()}
    yield [Finding("CK203", one.words, key, "note") for key, one in quantised.items()]
    if archive.part is not None:
        yield [_refusal(PartError(archive.part.reason, hint=archive.part.hint), path)]
    yield [Finding("CK107", f"beside it, and not looked at: {name}", level="note") for name in folders.other_checkpoints(path, archive)]
    if gate.allow and archive.format not in gate.allow:
        yield [Finding("CK502", f"is {archive.format}; allowed: {', '.join(gate.allow)}")]
    checkpoints = [roots.checkpoint(archive, found, alone=True) for found in archive.state_dicts]
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
                with _TRYING:
                    taken = taken_as_it_stands(as_read.checkpoint, against)
                misfits = as_read.forgiven(strict_load(as_read.checkpoint, against.checkpoint, taken))
                yield [replace(found, code=FITS[found.code]) for found in misfits if found.code in FITS]
        except CheckpointError as error:
            yield [_refusal(error, path)]
    if gate.dtypes:
        yield [finding for checkpoint in checkpoints for finding in _dtypes(checkpoint, gate.dtypes)]
    if gate.full and gate.wants("CK106"):
        yield _collected(_checksums(archive, alive), path)
    for checkpoint in checkpoints if gate.finite and gate.wants("CK401") else ():
        yield _collected(_not_finite(checkpoint, alive), path)


def _collected(found: Iterator[Finding], path: str) -> list[Finding]:
    """What was found until the reading failed, and why it did."""
    findings = []
    try:
        for finding in found:
            findings.append(finding)
    except CheckpointError as error:
        findings.append(_refusal(error, path))
    return findings


def _refusal(error: CheckpointError, path: str) -> Finding:
    """What kept a file from being read. Who asked for code is unsafe, whatever else is wrong with the file."""
    own = next(REFUSALS[kind] for kind in type(error).__mro__ if kind in REFUSALS)
    code = "CK201" if error.globals and own != "CK108" else own
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
    """Numbers with a fraction must have an expected dtype; integers and booleans only where one of their kind is expected."""
    kinds = {"float", "complex", *(BY_CODE[code].kind for code in expected)}
    for key, tensor in checkpoint.items():
        if tensor.dtype not in expected and BY_CODE[tensor.dtype].kind in kinds:
            yield Finding("CK503", f"is {tensor.dtype}; expected: {', '.join(expected)}", key)


def _checksums(archive: Archive, alive: Alive) -> Iterator[Finding]:
    from ckptsurgeon.streaming.checksums import check_file, entries_in, findings_of, places_in

    keeps = False
    within = entries_in(archive)
    for stamp in archive.files:
        held = check_file(stamp, alive, within)
        keeps = keeps or held.keeps
        where = f"{os.path.basename(stamp.path)}: " if len(archive.files) > 1 else ""
        places = (place for state_dict in archive.state_dicts for place in places_in(state_dict.tensors))
        yield from (replace(found, code="CK106") for found in findings_of(held, places, where))
    if not keeps:
        yield Finding("CK106", f"{archive.format} keeps no checksums that the data could be held against", level="note")


def _not_finite(checkpoint: Checkpoint, alive: Alive) -> Iterator[Finding]:
    """Streamed through torch; a tensor without data has no values."""
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
