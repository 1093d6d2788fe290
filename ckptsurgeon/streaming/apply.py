"""Carries out a plan: lays the new file out, moves every tensor's bytes, and proves the result before it takes its name.

It decides nothing. Tensors that only move are copied by the kernel; a cast or a strided tensor goes through torch in chunks; initial values
are handed in.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ckptsurgeon.errors import OutputError, PlanError
from ckptsurgeon.formats import registry
from ckptsurgeon.formats.layout import WEIGHTS, Contents, Layout, OutTensor
from ckptsurgeon.planning.plan_types import Plan, Step
from ckptsurgeon.report import Cast, Finding
from ckptsurgeon.streaming.atomic import lost, new_file, syncing
from ckptsurgeon.streaming.checksums import checking, refuse, without
from ckptsurgeon.streaming.reading import Reader
from ckptsurgeon.streaming.step_values import Run, Values
from ckptsurgeon.streaming.storages import storages_of, tensors_of
from ckptsurgeon.streaming.values import reported
from ckptsurgeon.streaming.writing import expected_of, prove_file, write
from ckptsurgeon.tensors import Checkpoint


@dataclass(frozen=True)
class Output:
    """How to write: the path, `torch` or `safetensors`, and the choices that a person has."""

    path: str
    format: str
    overwrite: bool = False
    tied: str = "copy"
    provenance: Mapping[str, Any] | None = None
    proof: bool = True

    @property
    def form(self) -> registry.Format:
        """The format as the registry has it."""
        return registry.WRITTEN[self.format]


@dataclass(frozen=True)
class Training:
    """What is written around the weights: `steps` for its tensors, which stand as `Stored` in the value `around`, and read the checkpoint
    `source`, whose number follows those of the plan's sources."""

    around: Any
    steps: tuple[Step, ...]
    source: Checkpoint


@dataclass(frozen=True)
class Written:
    """What was written: the file's size in bytes, what the casts lost, and what there is to say."""

    nbytes: int
    casts: tuple[Cast, ...]
    findings: tuple[Finding, ...]
    tensors: int


def apply(
    plan: Plan,
    sources: Sequence[Checkpoint],
    target: Checkpoint | None,
    output: Output,
    *,
    values: Values | None = None,
    verify: Callable[[str], None] | None = None,
    training: Training | None = None,
) -> Written:
    """Write what `plan` says to `output.path`, with `training` as a training checkpoint.

    `verify` gets the path of the proven temporary file and raises to stop it from taking its name. Raises CastError for casts that overflow
    or truncate and are not allowed by name, VerificationError when the file differs from the plan, OutputError when it can't be written.
    """
    own = [step.target for step in plan.steps]
    if training is not None:
        plan, sources = replace(plan, steps=(*plan.steps, *training.steps)), [*sources, training.source]
    around = WEIGHTS if training is None else training.around
    checkpoints = [*sources, *([target] if target is not None else [])]
    with Reader(checkpoints) as reader:
        run = Run(plan, sources, target, values, reader, {step.target: step for step in plan.steps})
        entries = _entries(run)
        run.find_loaded(entries)
        storages = storages_of(plan, run.steps, run.origins)
        if training is not None:  # each moment is its own: two that shared memory would be counted on twice
            storages |= {step.target: -1 - number for number, step in enumerate(training.steps)}
        tensors, aliases = tensors_of(plan, storages, alias=output.form.leaves_out_tied and output.tied == "alias")
        layout = _layout(plan, tensors, aliases, entries, output, [*own, *entries], around)
        _refuse_part_of_source(output.path, checkpoints)
        with new_file(output.path, output.overwrite) as temporary:
            write(run, layout, tensors, temporary, output.proof)
            reader.check_unchanged()
            with syncing(temporary):
                if output.proof:
                    left = [span for place, span in reader.entries().items() if place not in run.held]
                    with checking(reader, left) as wrong:
                        prove_file(temporary.path, [expected_of(run, tensor) for tensor in tensors], entries, reader, around)
                    if wrong:
                        reader.check_unchanged()
                    refuse(wrong, checkpoints)
                if verify is not None:
                    verify(temporary.path)
            reader.check_unchanged()  # the proof has read the sources again
    found = (*_findings(plan, tensors, aliases, output), *(without(reader.entries().values()) if output.proof else ()), *lost(temporary))
    return Written(layout.size, reported(run.casts), found, len(own))


def _refuse_part_of_source(path: str, checkpoints: Sequence[Checkpoint]) -> None:
    """A source may be replaced whole, never a shard of it: the others would be worth nothing."""
    real = os.path.realpath(path)
    for checkpoint in checkpoints:
        if len(checkpoint.files) > 1 and any(os.path.realpath(file.path) == real for file in checkpoint.files):
            words = f"is one of the {len(checkpoint.files)} files of {checkpoint.path}, which can't do without it"
            raise OutputError(words, path=path, hint="choose another path")


def _entries(run: Run) -> dict[str, Any]:
    found = {}
    for entry in run.plan.entries:
        own = run.target.entries if run.target is not None and run.target.files else {}
        number, key = entry.source or (0, "")
        if entry.source is not None and key in run.sources[number].entries:
            found[entry.target] = run.sources[number].entries[key]
        elif entry.source is None and entry.target in own:
            found[entry.target] = own[entry.target]
        elif entry.source is None and run.values is not None:
            found[entry.target] = run.values.extra_state(entry.target)
        else:
            raise PlanError("is an extra state that is neither in the source nor in the target", key=entry.target)
    return found


def _layout(
    plan: Plan,
    tensors: Sequence[OutTensor],
    aliases: Mapping[str, str],
    entries: Mapping[str, Any],
    output: Output,
    order: Sequence[str],
    around: Any,
) -> Layout:
    record = None if output.provenance is None else json.dumps(output.provenance, separators=(",", ":"), ensure_ascii=False)
    contents = Contents(tensors, aliases, entries, plan.module_metadata, order, record, around)
    try:
        layout: Layout = registry.module(output.form.writer).layout_of(contents)
        return layout
    except OutputError as error:
        error.path = error.path or output.path
        raise


def _findings(plan: Plan, tensors: Sequence[OutTensor], aliases: Mapping[str, str], output: Output) -> tuple[Finding, ...]:
    findings = list(plan.findings)
    first: dict[int, str] = {}
    for tensor in tensors:
        kept = first.setdefault(tensor.storage, tensor.name)
        if kept != tensor.name and output.form.leaves_out_tied:
            words = f"is tied to {kept} and written as a copy, which costs {tensor.nbytes} bytes (--tied alias writes one)"
            findings.append(Finding("tied-copy", words, tensor.name, "note"))
    findings += [Finding("tied-alias", f"is tied to {kept} and written as its alias", key, "note") for key, kept in aliases.items()]
    return tuple(findings)
