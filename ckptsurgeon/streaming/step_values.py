"""The values of a plan's steps: ranges of files that are copied as they are, or bytes that are made, part by part.

Nothing is decided or written here. A cast or a strided tensor goes through torch in chunks; the caller passes initial values.

A chain of ops moves ranges where no byte has to be brought into memory: on dense row-major tensors of one dtype, where each adapter says
which ranges of its inputs' elements a result consists of. Where one says nothing, or they do not lie together, the tensors go through
torch.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from ckptsurgeon.adapters.chain import infer_chain, made_dtype
from ckptsurgeon.adapters.table import UserKernel, adapter_of
from ckptsurgeon.dtypes import BY_CODE
from ckptsurgeon.errors import PlanError
from ckptsurgeon.formats.layout import Origin
from ckptsurgeon.planning.plan_types import Plan, Step, resolved
from ckptsurgeon.report import Cast
from ckptsurgeon.storage.files import OpenFile
from ckptsurgeon.storage.pieces import merged, runs
from ckptsurgeon.streaming.adapting import adapted_and_cast, by_rows, dense_parts, elementwise
from ckptsurgeon.streaming.bands import side_by_side
from ckptsurgeon.streaming.reading import Reader
from ckptsurgeon.streaming.values import Buffer, cast, code_of, tensor_from
from ckptsurgeon.tensors import Checkpoint, Span, TensorMeta

if TYPE_CHECKING:
    import torch

Ranges = tuple[Span, ...]


def _between(ranges: Ranges, ends: Sequence[int], start: int, stop: int) -> Iterator[Span]:
    """The bytes from `start` to `stop` of what the ranges are together; `ends` says where in it each of them ends."""
    for number in range(bisect_right(ends, start), bisect_left(ends, stop) + 1 if start < stop else 0):
        each = ranges[number]
        begin = ends[number] - each.nbytes
        first, last = max(start - begin, 0), min(stop - begin, each.nbytes)
        yield replace(each, offset=each.offset + first, nbytes=last - first)


def ranges_of(tensors: Sequence[TensorMeta], ops: Sequence[Mapping[str, Any]]) -> Ranges | None:
    """The ranges of bytes that a chain of filled ops makes of dense tensors, one after the other; None where values change or scatter, or
    where the ranges of one are too short to be copied one by one."""
    dense = [tensor for tensor in tensors if tensor.as_stored and tensor.place is not None and not side_by_side(tensor)]
    given: list[Ranges] = [tuple(runs(tensor)) for tensor in dense] if len(dense) == len(tensors) else []
    if len(given) < len(tensors) or len({tensor.dtype for tensor in tensors}) != 1:
        return None
    if not ops:
        return given[0] if len(given) == 1 else None
    shapes, size = tuple(tensor.shape for tensor in tensors), BY_CODE[tensors[0].dtype].size
    for op in ops:
        taken = adapter_of(op).ranges
        found = [None] if taken is None else taken(op, shapes)
        kept = [row for row in found if row is not None]
        if len(kept) < len(found):
            return None
        ends = [list(accumulate(each.nbytes for each in ranges)) for ranges in given]
        given = [
            tuple(part for at, start, stop in row for part in _between(given[at], ends[at], start * size, stop * size)) for row in kept
        ]
        shapes = infer_chain([op], shapes)
    return tuple(merged(given[0])) if len(given) == 1 else None


@dataclass(frozen=True)
class Values:
    """Functions that give values which no file holds: a model's, those of schemes and of user code.

    `initial` gives the dense bytes of a target key's initial value in the target's own dtype, `extra_state` the target's own value of a
    key that is no tensor, `kernels` the user's own adapters by name. `loaded`, given the plan's values and the values that are no tensors,
    gives those that loading decides, to be written instead; what torch's load gets of the sources as it is counts as the plan's.
    """

    initial: Callable[[str], Buffer]
    extra_state: Callable[[str], Any]
    kernels: Mapping[str, UserKernel] = field(default_factory=dict)
    loaded: Callable[[Callable[[str], torch.Tensor], Mapping[str, Any]], Mapping[str, torch.Tensor]] | None = None


@dataclass(frozen=True, slots=True)
class Shared:
    """Bytes of an output's file from `start` to `stop` that are the same on disk as those of `source` that lie `distance` before; `record`
    is the file and offset of the zip entry that has them there, if any."""

    start: int
    stop: int
    source: OpenFile
    distance: int
    record: tuple[str, int] | None


@dataclass
class Run:
    """One application of a plan. `digests` and `crcs` have the SHA-256 and the CRC-32 of each storage whose bytes were computed rather than
    copied, `loaded` the bytes that are written instead of a step's own, `held` the file and offset of each record that is known to have the
    checksum that the file gives for it. `shared` has, by the name of an output's file, the bytes that it shares with sources, and
    `nbytes_copied` says how many were copied."""

    plan: Plan
    sources: Sequence[Checkpoint]
    target: Checkpoint | None
    values: Values | None
    reader: Reader
    steps: Mapping[str, Step]
    casts: list[Cast] = field(default_factory=list)
    digests: dict[int, str] = field(default_factory=dict)
    crcs: dict[int, int] = field(default_factory=dict)
    loaded: dict[str, Buffer] = field(default_factory=dict)
    held: set[tuple[str, int]] = field(default_factory=set)
    shared: dict[str, list[Shared]] = field(default_factory=dict)
    nbytes_copied: int = 0

    def find_loaded(self, entries: Mapping[str, Any]) -> None:
        """Compute the values that loading decides."""
        if self.values is None or self.values.loaded is None:
            return
        lost: dict[str, list[Cast]] = {}

        def fetch(key: str) -> torch.Tensor:
            if key in self.plan.handed:
                number, name = self.plan.handed[key]
                origin = with_data(self.sources[number], name)
                return tensor_from(self.reader.read(origin), origin.dtype).view(origin.shape)
            step = self.steps[key]
            single = replace(self, casts=lost.setdefault(key, []))
            single.casts.clear()
            return tensor_from(bytearray().join(single.parts(step)), step.dtype).view(step.shape)

        for key, value in self.values.loaded(fetch, entries).items():
            dtype, casts = code_of(value), lost.get(key, [])
            parts = dense_parts(value)
            self.loaded[key] = bytearray().join(
                parts if dtype == self.steps[key].dtype else cast(key, parts, dtype, self.steps[key].dtype, casts)
            )
            self.casts += casts

    def origins(self, step: Step) -> tuple[TensorMeta, ...]:
        """The tensors of files that a step reads; none where its value comes from no file."""
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

    def origin(self, step: Step, numbers: Mapping[str, int]) -> Origin | None:
        """Where most of the bytes lie that a step copies; None where it computes them. `numbers` counts the files of all sources."""
        longest, position, origin = 0, 0, None
        for each in self.ranges(step) or ():
            if each.nbytes > longest and each.packed is None:
                longest, origin = each.nbytes, Origin(numbers[each.file], each.offset - position)
            position += each.nbytes
        return origin

    def copied(self, step: Step) -> TensorMeta | None:
        """The tensor of a file that a step copies as it is; None for any other step."""
        made = resolved(step, self.steps)
        origins = self.origins(made) if step.target not in self.loaded else ()
        return origins[0] if len(origins) == 1 and not made.adapters and made.cast is None else None

    def by_others(self, step: Step) -> bool:
        """Whether a step's value depends on a model or on user code."""
        made = resolved(step, self.steps)
        return made.target in self.loaded or not self.origins(made) or bool(made.schemes) or any(":" in op["op"] for op in made.ops)

    def parts(self, step: Step) -> Iterator[Buffer]:
        """The bytes of a step whose value is computed: adapted, dense, cast where the plan says so."""
        if step.target in self.loaded:
            return iter([self.loaded[step.target]])
        made = resolved(step, self.steps)
        casts = self.casts if made is step else []  # the losses of a tensor that several keys copy are reported once
        origins = self.origins(made)
        parts, dtype = self._plain_parts(made, origins), origins[0].dtype if origins else self._wanted(made).dtype
        if parts is not None:
            before = made_dtype(made.adapters, dtype)
            return iter(parts) if made.cast is None else cast(made.target, parts, before, made.cast, casts)

        def initial() -> torch.Tensor:
            meta = self._wanted(made)
            return tensor_from(self._initial(made), meta.dtype).view(meta.shape)

        tensors = [tensor_from(self.reader.read(origin), origin.dtype).view(origin.shape) for origin in origins]
        return dense_parts(adapted_and_cast(made, tensors, dtype, initial, self.values.kernels if self.values is not None else {}, casts))

    def _plain_parts(self, step: Step, origins: tuple[TensorMeta, ...]) -> Iterable[Buffer] | None:
        """The bytes of a step, before its cast, where they can be computed in parts; None where its adapters need whole tensors."""
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


def with_data(checkpoint: Checkpoint, key: str) -> TensorMeta:
    """A tensor that has data behind it; PlanError for a skeleton's."""
    tensor = checkpoint[key]
    if tensor.place is None:
        raise PlanError(
            f"has no values behind it: {checkpoint.path} is a {checkpoint.format}", key=key, hint="give a checkpoint file as the source"
        )
    return tensor
