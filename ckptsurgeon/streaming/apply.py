"""Carries out a plan: lays out the new file, writes every tensor's bytes, and proves the result before the file gets its name.

All decisions are in the plan. Tensors that are copied unchanged are copied by the kernel; a cast or a strided tensor goes through torch in
chunks; the caller passes initial values.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import TYPE_CHECKING, Any

from ckptsurgeon import __version__, formats
from ckptsurgeon.errors import OutputError, PlanError, VerificationError
from ckptsurgeon.formats import registry
from ckptsurgeon.formats.layout import RECORD, WEIGHTS, Contents, OutFile, OutTensor
from ckptsurgeon.planning.own_loading.versions import unkept
from ckptsurgeon.planning.plan_types import Plan, Step, digest, resolved
from ckptsurgeon.progress import Share, phase
from ckptsurgeon.report import Cast, Finding
from ckptsurgeon.sizes import rounded
from ckptsurgeon.storage import copying
from ckptsurgeon.streaming.atomic import NewFile, lost, new_file, syncing
from ckptsurgeon.streaming.checksums import checking, refuse, without
from ckptsurgeon.streaming.reading import Reader
from ckptsurgeon.streaming.step_values import Run, Values
from ckptsurgeon.streaming.values import refuse_losses, refused_losses, reported
from ckptsurgeon.streaming.writing import WRITING, begin, finish, located, made_in, prove_file, records_of, scratch, still_proven
from ckptsurgeon.tensors import Checkpoint, Span, TensorMeta

if TYPE_CHECKING:
    from ckptsurgeon.streaming.new_folder import NewFolder


@dataclass(frozen=True)
class Output:
    """How to write: the path, the format, and the user's options. `max_shard_size`, in bytes, is set where shards are written."""

    path: str
    format: str
    overwrite: bool = False
    tied: str = "copy"
    provenance: Mapping[str, Any] | None = None
    proof: str = "full"
    max_shard_size: int | None = None
    resume: bool = False

    @property
    def form(self) -> registry.Format:
        """The format's row in the registry."""
        return registry.WRITTEN[self.format]

    @property
    def record(self) -> str | None:
        """What the output records about itself, as text."""
        return None if self.provenance is None else json.dumps(self.provenance, separators=(",", ":"), ensure_ascii=False)

    @property
    def proven(self) -> bool:
        """Whether the output is held against the plan."""
        return self.proof != "none"

    @property
    def is_folder(self) -> bool:
        """Whether the output is a folder."""
        return self.max_shard_size is not None or bool(self.form.saved)


# Writes tensors, each in one span of a file, and other values into a folder.
Save = Callable[[str, Sequence[TensorMeta], Mapping[str, Any]], None]


@dataclass(frozen=True)
class Training:
    """The training state that is written around the weights: the value `around`, in which `Stored` marks each tensor, and the `steps` for
    these tensors. They read the checkpoint `source`, whose number follows those of the plan's sources."""

    around: Any
    steps: tuple[Step, ...]
    source: Checkpoint


@dataclass(frozen=True)
class Written:
    """The result of `apply`: each file's name in its folder and its size in bytes, the casts' losses, findings, how many tensors, and how
    many bytes are shared with sources or copied from them (0 where a format's own library writes)."""

    files: tuple[tuple[str, int], ...]
    casts: tuple[Cast, ...]
    findings: tuple[Finding, ...]
    tensors: int
    shared: int = 0
    copied: int = 0


def apply(
    plan: Plan,
    sources: Sequence[Checkpoint],
    target: Checkpoint | None,
    output: Output,
    *,
    values: Values | None = None,
    verify: Callable[[str], None] | None = None,
    training: Training | None = None,
    save: Save | None = None,
) -> Written:
    """Write what `plan` says to `output.path`, with `training` as a training checkpoint, or by `save`, where a format's own library writes.

    `verify` gets the path of the proven temporary file and raises to stop it from taking its name. Raises CastError for casts that overflow
    or truncate and are not allowed by name, VerificationError when the file differs from the plan, OutputError when it can't be written.
    """
    weights = [step.target for step in plan.steps]
    if training is not None:
        plan, sources = replace(plan, steps=(*plan.steps, *training.steps)), [*sources, training.source]
    around = WEIGHTS if training is None else training.around
    checkpoints = [*sources, *([target] if target is not None else [])]
    with Reader(checkpoints) as reader:
        run = Run(plan, sources, target, values, reader, {step.target: step for step in plan.steps})
        entries = _entries(run)
        run.find_loaded(entries)
        storages = storages_of(plan, run.steps, run.origins)
        if training is not None:  # moments are never tied: an optimizer would update shared memory twice
            storages |= {step.target: -1 - number for number, step in enumerate(training.steps)}
        tensors, aliases = tensors_of(plan, storages, alias=output.form.leaves_out_tied and output.tied == "alias")
        if save is None:
            paths = dict.fromkeys(file.path for checkpoint in checkpoints for file in checkpoint.files)
            numbers = {path: number for number, path in enumerate(paths)}
            tensors = [replace(tensor, origin=run.origin(run.steps[tensor.name], numbers)) for tensor in tensors]
            files, index = _files(plan, tensors, aliases, entries, output, [*weights, *entries], around)
        else:
            record = output.record
            files, index = [scratch(run, tensors)], {} if record is None else {RECORD: record}
        names = [*(output.form.saved or (file.name for file in files)), *index]
        _refuse_part_of_source(output.path, checkpoints)
        resumed, share = [], Share(0, sum(file.nbytes for file in files))
        with _new_place(output, names, _task(plan, checkpoints, output)) as place:
            _write_texts(place, index)
            for file in files:
                with place.opened(file.name) as temporary:
                    with syncing(temporary) as syncs:
                        known = place.proven(file.name)
                        if known is not None and still_proven(run, file, temporary, known, share):
                            resumed.append(file.name)
                        else:
                            rest = begin(run, file, temporary, syncs.wrote, output.proven, share)
                            if refused_losses(run.casts, plan.allow_cast):
                                continue  # nothing more is copied; all casts that are refused are reported together
                            finish(run, file, temporary, syncs.wrote, rest)
                        written, read_from = file, temporary.path
                        if save is not None:
                            written, read_from = replace(file, tensors=tensors, entries=entries), place.path
                            with phase(WRITING, sum(tensor.nbytes for tensor in tensors)):
                                save(read_from, located(run, tensors, file, temporary.path), entries)
                        reader.check_unchanged()
                        syncs.start()
                        if output.proven:
                            shared = run.shared.get(file.name, ()) if output.proof == "copied" and save is None else ()
                            unread = {each.record for each in shared}
                            held = run.held | records_of(run, written)
                            left = [span for entry, span in reader.entries().items() if entry not in held and entry not in unread]
                            damaged: list[Span] = []
                            with checking(reader, left) as wrong:
                                if file.name not in resumed:
                                    damaged = prove_file(run, written, read_from, around, share if save is None else None, shared)
                            wrong += damaged
                            if wrong:
                                reader.check_unchanged()
                            refuse(wrong, checkpoints)
                            run.held.update(entry for entry in reader.entries() if entry not in unread)
                        if file is files[-1]:
                            _check_whole(place, tensors, output)
                            if verify is not None:
                                verify(place.path)
                    reader.check_unchanged()  # the proof has read the sources again
                    if output.proven and save is None and file.name not in resumed:
                        place.keep(file.name, *made_in(run, file))
                share = share.after(file.nbytes)
            refuse_losses(run.casts, plan.allow_cast)
            sizes = [(os.path.basename(output.path), files[0].layout.size)]
            if output.is_folder:
                sizes = [(name, os.path.getsize(os.path.join(place.path, name))) for name in names]
    findings = [*_findings(plan, tensors, aliases, output), *(without(reader.entries().values()) if output.proven else ())]
    if resumed:
        words = f"{len(resumed)} of {len(files)} shards were there from an interrupted run, and were held against the plan again"
        findings.append(Finding("resumed", words, level="note"))
    nbytes = sum(each.stop - each.start for ranges in run.shared.values() for each in ranges)
    moved = (nbytes, run.nbytes_copied) if save is None else (0, 0)
    return Written(tuple(sizes), reported(run.casts), (*findings, *lost(place.lost, output.is_folder)), len(weights), *moved)


@contextmanager
def _new_place(output: Output, names: Sequence[str], task: str) -> Iterator[NewFile | NewFolder]:
    """The new file or folder, which gets its name when the block ends without an error."""
    if not output.is_folder:
        with new_file(output.path, output.overwrite) as temporary:
            yield NewFile(temporary)
    else:
        from ckptsurgeon.streaming.new_folder import new_folder

        with new_folder(output.path, output.overwrite, task, names, output.resume) as folder:
            yield folder


def _task(plan: Plan, checkpoints: Sequence[Checkpoint], output: Output) -> str:
    """The digest of everything that determines the output: the plan, its files as they are now, the options, and this program."""
    stamps = [(file.size, file.mtime_ns, file.inode, file.device) for checkpoint in checkpoints for file in checkpoint.files]
    how = (output.format, output.max_shard_size, output.tied, output.provenance, __version__)
    return sha256(repr((digest(plan), stamps, how)).encode()).hexdigest()


def _write_texts(place: NewFile | NewFolder, texts: Mapping[str, str]) -> None:
    for name, text in texts.items():
        with place.opened(name) as temporary:
            copying.write_at(temporary.fd, text.encode(), 0)
            os.ftruncate(temporary.fd, len(text.encode()))
            os.fsync(temporary.fd)


def _check_whole(place: NewFile | NewFolder, tensors: Sequence[OutTensor], output: Output) -> None:
    """Raises VerificationError where a reader of the folder finds other tensors in it than were written."""
    if output.proven and output.max_shard_size is not None:
        names = {tensor.name for tensor in tensors}
        wrong = names.symmetric_difference(formats.read(place.path).state_dicts[0].tensors)
        if wrong:
            raise VerificationError(
                "the folder as a whole is not what was planned; nothing was kept", path=place.path, problems=tuple(wrong)
            )


def _refuse_part_of_source(path: str, checkpoints: Sequence[Checkpoint]) -> None:
    """OutputError where the output would replace one file of several of a source: the other files would be useless without it."""
    real = os.path.realpath(path)
    for checkpoint in checkpoints:
        if len(checkpoint.files) > 1 and any(os.path.realpath(file.path) == real for file in checkpoint.files):
            words = f"is one of the {len(checkpoint.files)} files of {checkpoint.path}, which can't do without it"
            raise OutputError(words, path=path, hint="choose another path")


def _entries(run: Run) -> dict[str, Any]:
    entries = {}
    for entry in run.plan.entries:
        target_entries = run.target.entries if run.target is not None and run.target.files else {}
        number, key = entry.source or (0, "")
        if entry.source is not None and key in run.sources[number].entries:
            entries[entry.target] = run.sources[number].entries[key]
        elif entry.source is None and entry.target in target_entries:
            entries[entry.target] = target_entries[entry.target]
        elif entry.source is None and run.values is not None:
            entries[entry.target] = run.values.extra_state(entry.target)
        else:
            raise PlanError("is an extra state that is neither in the source nor in the target", key=entry.target)
    return entries


def _files(
    plan: Plan,
    tensors: Sequence[OutTensor],
    aliases: Mapping[str, str],
    entries: Mapping[str, Any],
    output: Output,
    order: Sequence[str],
    around: Any,
) -> tuple[list[OutFile], dict[str, str]]:
    """The files of an output, laid out, and the texts beside them by name: the index, where there are several shards.

    Values that are no tensors are in the first file.
    """
    layout_of = registry.module(output.form.writer).layout_of

    def laid_out(name: str, shard: Sequence[OutTensor], own: Mapping[str, Any], keys: Sequence[str]) -> OutFile:
        names = {tensor.name for tensor in shard}
        stood_for = {key: kept for key, kept in aliases.items() if kept in names}
        try:
            return OutFile(name, shard, own, layout_of(Contents(shard, stood_for, own, plan.module_metadata, keys, output.record, around)))
        except OutputError as error:
            error.path = error.path or output.path
            raise

    if output.max_shard_size is None:
        return [laid_out("", tensors, entries, order)], {}
    from ckptsurgeon.formats.folders.shards import INDEX, file_name, index_text, split

    leaders = {key: group[0] for group in plan.ties for key in group}
    shards = split(
        tensors,
        output.max_shard_size,
        lambda tensor: [tensor.storage, leaders.get(tensor.name, tensor.name)],
        written_once=not output.form.leaves_out_tied,
    )
    files, positions = [], {key: position for position, key in enumerate(order)}
    for number, shard in enumerate(shards):
        own = entries if number == 0 else {}
        keys = sorted((*(tensor.name for tensor in shard), *own), key=positions.__getitem__)
        files.append(laid_out(file_name(output.form.in_folder, number, len(shards)), shard, own, keys))
    if len(files) == 1:
        return files, {}
    weight_map = {key: file.name for file in files for key in (*(tensor.name for tensor in file.tensors), *file.entries)}
    size = sum(slot.nbytes for file in files for slot in file.layout.slots)
    return files, {file_name(output.form.in_folder, 0, 1) + INDEX: index_text(weight_map, size)}


def _findings(plan: Plan, tensors: Sequence[OutTensor], aliases: Mapping[str, str], output: Output) -> tuple[Finding, ...]:
    findings = list(plan.findings)
    first: dict[int, str] = {}
    for tensor in tensors:
        kept = first.setdefault(tensor.storage, tensor.name)
        if kept != tensor.name and not output.form.pickled:
            other = " (--tied alias writes one)" if output.form.leaves_out_tied else ""
            words = f"is tied to {kept} and written as a copy, which costs {rounded(tensor.nbytes)}{other}"
            findings.append(Finding("tied-copy", words, tensor.name, "note"))
    findings += [Finding("tied-alias", f"is tied to {kept} and written as its alias", key, "note") for key, kept in aliases.items()]
    findings += unkept(plan) if not output.form.keeps_versions else []
    return tuple(findings)


def storages_of(plan: Plan, steps: Mapping[str, Step], origins: Callable[[Step], tuple[TensorMeta, ...]]) -> dict[str, int]:
    """A number for each target key; keys with one number are tied: they read the same tensor in the same way, or are one fresh tensor.

    `origins` gives the tensors of files that a step reads.
    """
    group = {key: keys[0] for keys in plan.ties for key in keys}
    numbers: dict[Any, int] = {}
    first: dict[Any, str] = {}
    storages = {}
    for step in plan.steps:
        made = resolved(step, steps)
        leader = group.get(step.target, step.target)
        read = origins(made)
        identity: Any = ("made", leader)
        if read and not all(origin.nbytes for origin in read):
            identity = step.target
        elif read:
            spans = tuple((origin.place, origin.dtype, origin.stride) for origin in read)
            identity = (spans, repr(made.adapters), leader if made.schemes else "", made.action == "keep")
            # One key of the source that goes to two is no tie: each layer of a deeper model is its own.
            if first.setdefault((identity, made.sources), leader) != leader:
                identity = (identity, leader)
        storages[step.target] = numbers.setdefault((identity, step.dtype, step.shape), len(numbers))
    return storages


def tensors_of(plan: Plan, storages: Mapping[str, int], *, alias: bool) -> tuple[list[OutTensor], dict[str, str]]:
    """What to write, and, where ties become aliases, which key stands for which.

    A loader gives an alias its value only where the model ties the two, so with a target only its own ties become aliases.
    """
    group = {key: number for number, keys in enumerate(plan.ties) for key in keys}
    tensors: list[OutTensor] = []
    aliases: dict[str, str] = {}
    first: dict[int, str] = {}
    for step in plan.steps:
        number = storages[step.target]
        kept = first.setdefault(number, step.target)
        linked = kept != step.target and (plan.target is None or group.get(kept, -1) == group.get(step.target, -2))
        if linked and alias:
            aliases[step.target] = kept
        else:
            tensors.append(OutTensor(step.target, step.dtype, step.shape, number))
    return tensors, aliases
