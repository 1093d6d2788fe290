"""Carries out a plan: lays the new file out, moves every tensor's bytes, and proves the result before it takes its name.

It decides nothing. Tensors that only move are copied by the kernel; a cast or a strided tensor goes through torch in chunks; initial values
are handed in.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from typing import TYPE_CHECKING, Any

from ckptsurgeon.adapters.chain import made_dtype
from ckptsurgeon.adapters.table import OwnKernel, adapter_of
from ckptsurgeon.dtypes import BY_TORCH
from ckptsurgeon.errors import OutputError, PlanError, VerificationError
from ckptsurgeon.formats import registry
from ckptsurgeon.formats.layout import WEIGHTS, Contents, Layout, OutTensor, Slot
from ckptsurgeon.planning.plan_types import Plan, Step, resolved
from ckptsurgeon.report import Cast, Finding
from ckptsurgeon.storage import copying
from ckptsurgeon.storage.local import LocalFile
from ckptsurgeon.streaming.adapting import adapted_and_cast, by_rows, dense_parts, elementwise
from ckptsurgeon.streaming.atomic import Temporary, lost, new_file, syncing
from ckptsurgeon.streaming.checksums import checking, refuse, without
from ckptsurgeon.streaming.moved_ranges import Ranges, ranges_of
from ckptsurgeon.streaming.proof import Expected, prove
from ckptsurgeon.streaming.reading import Reader
from ckptsurgeon.streaming.storages import storages_of, tensors_of
from ckptsurgeon.streaming.values import Buffer, cast, refuse_losses, reported, tensor_from
from ckptsurgeon.tensors import Checkpoint, TensorMeta

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Values:
    """Where values that no file holds come from (a model, schemes, a person's own code), handed in by who knows models.

    `initial` gives the dense bytes of a target key's initial value in the target's own dtype, `extra_state` the target's own value of a
    key that is no tensor, `kernels` a person's own adapters by name. `loaded`, given the plan's values and the values that are no tensors,
    gives those that loading decides, to be written instead; what torch's load gets of the sources as it is counts as the plan's.
    """

    initial: Callable[[str], Buffer]
    extra_state: Callable[[str], Any]
    kernels: Mapping[str, OwnKernel] = field(default_factory=dict)
    loaded: Callable[[Callable[[str], torch.Tensor], Mapping[str, Any]], Mapping[str, torch.Tensor]] | None = None


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


@dataclass
class _Run:
    """One application of a plan. `digests` has the SHA-256 of each storage whose bytes were made rather than copied, `loaded` the bytes
    that are written instead of a step's own, `held` the file and offset of each record whose copy has the checksum that the file gives
    for it: the proof compares the two."""

    plan: Plan
    sources: Sequence[Checkpoint]
    target: Checkpoint | None
    values: Values | None
    reader: Reader
    steps: Mapping[str, Step]
    casts: list[Cast] = field(default_factory=list)
    digests: dict[int, str] = field(default_factory=dict)
    loaded: dict[str, Buffer] = field(default_factory=dict)
    held: set[tuple[str, int]] = field(default_factory=set)

    def find_loaded(self, entries: Mapping[str, Any]) -> None:
        """Find what loading decides."""
        if self.values is None or self.values.loaded is None:
            return
        lost: dict[str, list[Cast]] = {}

        def fetch(key: str) -> torch.Tensor:
            if key in self.plan.handed:
                number, name = self.plan.handed[key]
                origin = with_data(self.sources[number], name)
                return tensor_from(self.reader.read(origin), origin.dtype).view(origin.shape)
            step = self.steps[key]
            apart = replace(self, casts=lost.setdefault(key, []))
            apart.casts.clear()
            return tensor_from(bytearray().join(apart.parts(step)), step.dtype).view(step.shape)

        for key, value in self.values.loaded(fetch, entries).items():
            dtype, casts = BY_TORCH[str(value.dtype).removeprefix("torch.")].code, lost.get(key, [])
            parts = dense_parts(value)
            self.loaded[key] = bytearray().join(
                parts if dtype == self.steps[key].dtype else cast(key, parts, dtype, self.steps[key].dtype, casts)
            )
            self.casts += casts

    def origins(self, step: Step) -> tuple[TensorMeta, ...]:
        """The tensors of files that a step reads; none where its value is made."""
        if step.target in self.loaded:
            return ()
        if step.action == "load":
            raise PlanError("is computed by the target's own loading code, and no model is at hand that has it", key=step.target)
        if step.action == "keep" and self.target is not None:
            return (with_data(self.target, step.target),)
        return tuple(with_data(self.sources[number], key) for number, key in step.sources)

    def ranges(self, step: Step) -> Ranges | None:
        """The ranges of files whose bytes a step copies as they are, or None where they change."""
        if step.target in self.loaded:
            return None
        step = resolved(step, self.steps)
        origins = self.origins(step)
        return ranges_of(origins, step.adapters) if origins and step.cast is None else None

    def parts(self, step: Step) -> Iterator[Buffer]:
        """The bytes of a step whose value is made: adapted, dense, cast where the plan says so."""
        if step.target in self.loaded:
            return iter([self.loaded[step.target]])
        made = resolved(step, self.steps)
        casts = self.casts if made is step else []  # what a copy's original loses is told once
        origins = self.origins(made)
        parts, dtype = self._plain_parts(made, origins), origins[0].dtype if origins else self._wanted(made).dtype
        if parts is not None:
            given = made_dtype(made.adapters, dtype)
            return iter(parts) if made.cast is None else cast(made.target, parts, given, made.cast, casts)

        def initial() -> torch.Tensor:
            wanted = self._wanted(made)
            return tensor_from(self._initial(made), wanted.dtype).view(wanted.shape)

        tensors = [tensor_from(self.reader.read(origin), origin.dtype).view(origin.shape) for origin in origins]
        return dense_parts(adapted_and_cast(made, tensors, dtype, initial, self.values.kernels if self.values is not None else {}, casts))

    def _plain_parts(self, step: Step, origins: tuple[TensorMeta, ...]) -> Iterable[Buffer] | None:
        """The bytes of a step, before its cast, where they can be had part by part; None where its adapters need whole tensors."""
        if not origins:
            return [self._initial(step)]
        if not step.adapters:
            return self.reader.parts(origins[0])
        op, adapter = step.adapters[0], adapter_of(step.adapters[0])
        if len(step.adapters) == 1 and adapter.by_rows is not None and origins[0].as_stored and origins[0].shape:
            return by_rows(self.reader, step.target, op, *origins)
        if len(step.adapters) == 1 and adapter.elementwise:
            return elementwise([self.reader.parts(origin) for origin in origins], origins[0].dtype, op)
        ranges = ranges_of(origins, step.adapters)
        if ranges is None:
            return None
        return self.reader.chunks(ranges, sum(each.nbytes for each in ranges))

    def _initial(self, step: Step) -> Buffer:
        if self.target is not None and self.target.kind == "file" and step.sources and step.schemes == ("model",):
            return self.reader.read(with_data(self.target, step.target))
        if self.values is None:
            raise _no_values(step)
        return self.values.initial(step.target)

    def _wanted(self, step: Step) -> TensorMeta:
        if self.target is None:
            raise _no_values(step)
        return self.target[step.target]


def _no_values(step: Step) -> PlanError:
    return PlanError("gets a value of the target's own, and there is no target with values", key=step.target)


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
        run = _Run(plan, sources, target, values, reader, {step.target: step for step in plan.steps})
        entries = _entries(run)
        run.find_loaded(entries)
        storages = storages_of(plan, run.steps, run.origins)
        if training is not None:  # each moment is its own: two that shared memory would be counted on twice
            storages |= {step.target: -1 - number for number, step in enumerate(training.steps)}
        tensors, aliases = tensors_of(plan, storages, alias=output.form.leaves_out_tied and output.tied == "alias")
        layout = _layout(plan, tensors, aliases, entries, output, [*own, *entries], around)
        _refuse_part_of_source(output.path, checkpoints)
        with new_file(output.path, output.overwrite) as temporary:
            _write(run, layout, tensors, temporary, output.proof)
            reader.check_unchanged()
            with syncing(temporary):
                if output.proof:
                    left = [span for place, span in reader.entries().items() if place not in run.held]
                    with checking(reader, left) as wrong:
                        _prove(temporary.path, [_expected(run, tensor) for tensor in tensors], entries, reader, around)
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


def _prove(path: str, expected: Sequence[Expected], entries: Mapping[str, Any], reader: Reader, around: Any) -> None:
    try:
        prove(path, expected, entries, reader, around)
    except VerificationError:
        reader.check_unchanged()  # a source that changed since it was copied is the likelier reason
        raise


def with_data(checkpoint: Checkpoint, key: str) -> TensorMeta:
    """A tensor that has data behind it; PlanError for a skeleton's."""
    tensor = checkpoint[key]
    if tensor.place is None:
        raise PlanError(
            f"has no values behind it: {checkpoint.path} is a {checkpoint.format}", key=key, hint="give a checkpoint file as the source"
        )
    return tensor


def _entries(run: _Run) -> dict[str, Any]:
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


def _write(run: _Run, layout: Layout, tensors: Sequence[OutTensor], temporary: Temporary, proof: bool) -> None:
    for offset, data in layout.chunks:
        copying.write_at(temporary.fd, data, offset)
    moved = {slot.index: run.ranges(run.steps[tensors[slot.index].name]) for slot in layout.slots}
    # Values that are made come first: a cast that must not be stops the run before the long copying.
    for slot in layout.slots:
        if moved[slot.index] is None:
            _make(run, slot, tensors[slot.index], temporary, proof)
    order = {key: place for place, key in enumerate(run.steps)}
    run.casts.sort(key=lambda found: order[found.key])
    refuse_losses(run.casts, run.plan.allow_cast)
    for slot in layout.slots:
        position = slot.offset
        for each in moved[slot.index] or ():
            copying.copy_range(*run.reader.locate(each), temporary.fd, position, each.nbytes)
            position += each.nbytes
    _refuse_torn_ties(run, layout, tensors, temporary)
    written = LocalFile(temporary.path, temporary.fd)
    checksums = [copying.checksum(written, slot.offset, slot.nbytes) for slot in layout.slots] if layout.checksums else []
    for slot, crc in zip(layout.slots, checksums, strict=bool(checksums)):
        ranges = moved[slot.index] or ()
        if len(ranges) == 1 and ranges[0].checksum() == crc:
            run.held.add((ranges[0].file, ranges[0].offset))
    for offset, data in layout.tail(checksums):
        copying.write_at(temporary.fd, data, offset)


def _refuse_torn_ties(run: _Run, layout: Layout, tensors: Sequence[OutTensor], temporary: Temporary) -> None:
    """Raises PlanError where keys that are one tensor in the target model came by different values: it could hold only one of them."""
    if run.plan.target is None or run.plan.target.kind not in ("model", "skeleton"):
        return
    slots = {tensors[slot.index].name: slot for slot in layout.slots}
    written = LocalFile(temporary.path, temporary.fd)
    number = {tensor.name: tensor.storage for tensor in tensors}
    for group in run.plan.ties:
        first, *rest = [key for key in group if key in number]
        for key in rest:
            one, other = slots.get(first), slots.get(key)
            if number[key] == number[first] or one is None or other is None:
                continue
            if not copying.equal_ranges(written, one.offset, written, other.offset, one.nbytes):
                raise torn(first, key)


def torn(first: str, key: str) -> PlanError:
    """The refusal of two values for one tensor."""
    return PlanError(
        f"is one tensor with {first} in the target, and they would get different values", key=key, hint=f"choose one: drop=[{key!r}]"
    )


def _make(run: _Run, slot: Slot, tensor: OutTensor, temporary: Temporary, proof: bool) -> None:
    position, digest = slot.offset, sha256()
    for part in run.parts(run.steps[tensor.name]):
        copying.write_at(temporary.fd, part, position)
        if proof:
            digest.update(part)
        position += memoryview(part).nbytes
    if position != slot.offset + slot.nbytes:
        raise OutputError(f"got {position - slot.offset} bytes where the plan says {slot.nbytes}", key=tensor.name)
    run.digests[tensor.storage] = digest.hexdigest()


def _expected(run: _Run, tensor: OutTensor) -> Expected:
    return Expected(tensor.name, tensor.dtype, tensor.shape, run.ranges(run.steps[tensor.name]), run.digests.get(tensor.storage))


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
