"""From a checkpoint to the first training step: transfer into a live model, initialise fresh tensors, build parameter groups.

These verbs of `api` need torch and a model. The module is imported only when one of them is used.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field, replace
from functools import cache, partial
from hashlib import sha256
from typing import TYPE_CHECKING, Any

from ckptsurgeon.api import _gates, _gpu_layouts, _opening, _training_state
from ckptsurgeon.api._deciding import decide, report_of
from ckptsurgeon.api._options import NO_TRAINING, GroupOptions, RuleOptions, TrainingOptions, facts, facts_of, refuse_idle
from ckptsurgeon.api._rules import Own, Ruling
from ckptsurgeon.errors import ModelError, RootError, StaleError
from ckptsurgeon.models.init import initialize
from ckptsurgeon.models.sharded.meta import on_meta
from ckptsurgeon.models.sharded.ranks import Ranks
from ckptsurgeon.models.target.loaders import tensors_of
from ckptsurgeon.models.target.sharding import is_sharded, own_class, refuse_flat
from ckptsurgeon.models.target.skeleton import checkpoint_of, checkpoint_of_state_dict, refuse_no_tensors, state_dict_of
from ckptsurgeon.models.training import freezing, groups
from ckptsurgeon.models.training.ema import live_roots
from ckptsurgeon.models.training.transfer import InFile, Value, in_memory, put
from ckptsurgeon.models.verify.official import at_root
from ckptsurgeon.parameter_types import Given, Note
from ckptsurgeon.planning.plan import Plan, Step
from ckptsurgeon.planning.plan_types import digest
from ckptsurgeon.planning.roots import choose
from ckptsurgeon.progress import nobody, phase, raising_later
from ckptsurgeon.report import Cast, Finding, Report, with_training
from ckptsurgeon.rules.rules import from_arguments
from ckptsurgeon.streaming.adapting import adapted_and_cast, dense_parts
from ckptsurgeon.streaming.checksums import check_all, without
from ckptsurgeon.streaming.reading import Reader
from ckptsurgeon.streaming.step_values import with_data
from ckptsurgeon.streaming.values import cast, memory_of, refuse_losses, reported, tensor_from
from ckptsurgeon.streaming.writing import torn
from ckptsurgeon.tensors import Archive, Checkpoint

if TYPE_CHECKING:
    import torch
    from torch import nn

State = Mapping[str, Any]


def transfer(
    source: Given,
    model: nn.Module,
    gather_rules: Callable[[], Ruling],
    options: RuleOptions,
    training: TrainingOptions = NO_TRAINING,
    *,
    step: bool = False,
) -> Report:
    """See `ckptsurgeon.transfer`.

    Args:
        gather_rules: reads the rules, which may be in files. It is called within a step of all ranks, so that all fail if one can't read.
        step: whether this is a step of another call, which has checked the options already.
    """
    ranks = Ranks.of(model)
    with raising_later() as held, ExitStack() as undo:
        with ranks.step() as rank_step:
            refuse_flat(model.modules())
            ruling = gather_rules()
            target = checkpoint_of(model, own_class(model).__name__)
            target = target if options.conversions else _opening.without_conversions(target)
            source_checkpoint, live = _open(source, options.root, target, training.ema is not None)
            ruling, plan = decide([source_checkpoint], target, lambda real=False: model, ruling, options)
            if not step:
                _refuse_idle(plan, options, training, on_meta(model))
                _gates.refuse_idle_casts(plan.allow_cast, [planned.target for planned in plan.steps])
            _gates.refuse_open(plan)
            _gates.check(plan, options)
            _gpu_layouts.refuse(plan, [source_checkpoint], live)
            if ranks.size > 1:
                rank_step.same = {"source": source_checkpoint.fingerprint, "model": target.fingerprint, "plan": digest(plan)}
            reader = undo.enter_context(Reader([source_checkpoint]))
            run = _Run(plan, source_checkpoint, live, reader, model, ruling.own, training.optimizer)
        into_model = (
            _into_sharded_model(run, ranks, undo, held) if any(map(is_sharded, tensors_of(model))) else _into_plain_model(run, ranks, held)
        )

        def transfer_averaged(averaged_source: Given, copy: nn.Module, averaged_root: str, dropped: tuple[str, ...]) -> Report:
            rules = replace(ruling, rules=(*ruling.rules, *from_arguments(drop=dropped)))
            chosen = replace(options, root=averaged_root, match=False, accept_uncertain=False, layout=None, numbers=None)
            return transfer(averaged_source, copy, lambda: rules, chosen, TrainingOptions(checksums=training.checksums), step=True)

        with ranks.step() as rank_step:
            refuse_losses(into_model.casts, plan.allow_cast)
            reader.check_unchanged()
            extra = {entry.target: source_checkpoint.entries[entry.source[1]] for entry in plan.entries if entry.source is not None}
            beside_weights = cache(lambda: _training_state.beside_weights(source, source_checkpoint, reader))
            carried = _training_state.load_states(training, beside_weights, source_checkpoint, plan, model, undo) if training else None
            averaged = _training_state.find_averaged(training, source, beside_weights, undo) if training.ema is not None else None
            if training.checksums:
                check_all(reader, [source_checkpoint])
            rank_step.same = {"training state": sha256(repr(carried).encode()).hexdigest()}
        if carried is not None and averaged is not None:
            with ranks.step():  # the averaged copy may be on this rank alone
                report = transfer_averaged(averaged.source, averaged.model, averaged.root, averaged.left_out)
                carried = averaged.finish(carried, report)
        into_model.put(extra)
        with ranks.step():
            _check_still_unchanged(reader)
    findings = (*plan.findings, *(_without_checksums(reader, source_checkpoint) if training.checksums else ()))
    made = report_of(plan, casts=reported(into_model.casts), findings=findings)
    return made if carried is None else with_training(made, carried)


@dataclass(frozen=True)
class IntoModel:
    """A prepared transfer: the casts' losses, known before anything is changed, and a function that writes values and extra state."""

    casts: list[Cast]
    put: Callable[[Mapping[str, Any]], None]


def _into_plain_model(run: _Run, ranks: Ranks, held: list[BaseException]) -> IntoModel:
    """Prepare a transfer into a model of plain tensors, also in DistributedDataParallel: each rank reads the whole values."""
    plan = run.plan
    with ranks.step():
        values = _values(run, [step for step in plan.steps if step.sources and step.action != "load"])
        handed = {name: run.value_of(key) for name, (_, key) in plan.handed.items()}
        refuse_losses(run.casts, plan.allow_cast)
        _refuse_torn_ties(plan, values)

    def write(extra: Mapping[str, Any]) -> None:
        with ranks.step():
            put(plan, run.model, values.__getitem__, extra, run.own.schemes, handed, held)

    return IntoModel(run.casts, write)


def _values(run: _Run, steps: Sequence[Step]) -> dict[str, Value]:
    """The values of steps. Only adapted and cast values are computed now; the others stay where they are."""
    changed = {step.target for step in steps if step.adapters or step.cast is not None}
    with phase("converting", len(changed), "tensors") if changed else nullcontext(nobody) as advance:
        values = {}
        for step in steps:
            values[step.target] = run.value(step)
            if step.target in changed:
                advance(1)
    return values


def _into_sharded_model(run: _Run, ranks: Ranks, undo: ExitStack, held: list[BaseException]) -> IntoModel:
    """Prepare a transfer into a model with sharded tensors: each rank reads its own blocks."""
    from ckptsurgeon.models.sharded import load as sharded
    from ckptsurgeon.models.sharded import meta, prepare

    plan, model = run.plan, run.model
    with ranks.step():
        state = state_dict_of(model, type(model).__name__)
        sharded.refuse(plan, model, state)
        if meta.on_meta(model):
            plan = meta.with_initial_values(plan, state)
            meta.refuse_unreachable(model, plan, state)
            undo.enter_context(meta.memory_for(model, run.optimizer))
            state = state_dict_of(model, type(model).__name__)
        origins = prepare.Origins(plan, run.source, run.live, run.reader, model, state, run.own.kernels, run.own.schemes)
        by_key = origins.all()
        sharded.refuse_unwritable(state, by_key)
    values, losses = prepare.prepare_values(by_key, state, ranks)
    with ranks.step() as rank_step:
        values = prepare.without_tied(values, state, plan.ties)
        rank_step.own = losses
    return IntoModel(prepare.summed(rank_step.by_rank), lambda extra: sharded.put(model, state, values, extra, ranks, held))


def _without_checksums(reader: Reader, checkpoint: Checkpoint) -> list[Finding]:
    entries = reader.entries()
    if not entries:
        return [Finding("no-checksum", f"{checkpoint.format} keeps no checksums to compare the data with", level="note")]
    return without(entries.values())


def _refuse_idle(plan: Plan, options: RuleOptions, training: TrainingOptions, meta: bool) -> None:
    # For the scheme "model" nothing is drawn: a live model has its values already, unless it is on meta.
    drawn = any(meta or scheme != "model" for step in plan.steps for scheme in step.schemes)
    present = {kind: getattr(training, kind) is not None for kind in ("optimizer", "scheduler", "ema")}
    known = facts(target=True, initial_values=drawn, codes="codes" in facts_of(plan), **present)
    refuse_idle(known, **vars(options), **vars(training))


def _check_still_unchanged(reader: Reader) -> None:
    # Values are read from the file directly into the model: reading all of them before would take the memory of a second model.
    try:
        reader.check_unchanged()
    except StaleError as error:
        error.reason = "changed while it was copied into the model, which may now have a mixture of values"
        error.hint = "transfer again when no process writes to it"
        raise


def _open(source: Given, root: str | None, target: Checkpoint, skip_averaged: bool) -> tuple[Checkpoint, State]:
    """The source as a checkpoint, and its live tensors if it is in memory. `skip_averaged`: don't take the averaged copy's root."""
    from torch import nn

    if root is None and isinstance(source, Mapping) and not isinstance(source, Checkpoint):
        root = _live_root(source, target, skip_averaged)
    if root is not None and isinstance(source, (nn.Module, Mapping)) and not isinstance(source, Checkpoint):
        state_at_root = at_root(source, root)
        if not isinstance(state_at_root, Mapping):
            raise RootError(f"has no state_dict at {root!r}", path="the source")
        source = state_at_root
    if isinstance(source, Mapping) and not isinstance(source, Checkpoint):
        refuse_no_tensors(source, "source", target)
    if isinstance(source, nn.Module):
        state = state_dict_of(source, type(source).__name__)
        return checkpoint_of(source, type(source).__name__), state
    if isinstance(source, Mapping) and not isinstance(source, Checkpoint):
        return replace(checkpoint_of_state_dict(source), root=root or ""), source
    opened = _opening.look(source)
    if root is None and skip_averaged and isinstance(opened, Archive):
        opened = _training_state.without_averaged(opened)
    return _opening.open_source(opened, root=root, target=target), {}


def _live_root(source: Mapping[Any, Any], target: Checkpoint, skip_averaged: bool) -> str | None:
    """The root of the state_dict in a live training checkpoint, by the rule for files; None if `source` is a state_dict itself."""
    from torch import Tensor

    if any(isinstance(value, Tensor) for value in source.values()):
        return None
    archive = live_roots(source)
    archive = _training_state.without_averaged(archive) if skip_averaged else archive
    roots = {state_dict.root for state_dict in archive.state_dicts}
    chosen = choose(archive, target=target).root if roots else None
    return chosen if chosen in roots else None


def _refuse_torn_ties(plan: Plan, values: Mapping[str, Value]) -> None:
    for group in plan.ties:
        first, *rest = [key for key in group if key in values] or [""]
        for key in rest:
            if not _same(values[key], values[first]):
                raise torn(first, key)


def _same(first: Value, second: Value) -> bool:
    if (
        isinstance(first, InFile)
        and isinstance(second, InFile)
        and (first.meta.place, first.meta.stride) == (second.meta.place, second.meta.stride)
    ):
        return True
    return first is second or memory_of(in_memory(first)) == memory_of(in_memory(second))


@dataclass(frozen=True)
class _Run:
    """One transfer: its plan, source and model, and the casts' losses, which are added to `casts`."""

    plan: Plan
    source: Checkpoint
    live: State
    reader: Reader
    model: nn.Module
    own: Own
    optimizer: torch.optim.Optimizer | None = None
    casts: list[Cast] = field(default_factory=list)

    def value(self, step: Step) -> Value:
        """A step's value. One that is neither adapted nor cast is not copied: it stays in the file or in the live source."""
        key = step.sources[0][1]
        dtype = self.source[key].dtype
        if step.adapters:
            tensors = [in_memory(self.value_of(source_key)) for _, source_key in step.sources]
            return adapted_and_cast(step, tensors, dtype, lambda: self._initial(step), self.own.kernels, self.casts)
        stored = self.value_of(key)
        if step.cast is None:
            return stored
        parts = self.reader.parts(stored.meta) if isinstance(stored, InFile) else dense_parts(stored)
        data = bytearray().join(cast(step.target, parts, dtype, step.cast, self.casts))
        return tensor_from(data, step.dtype).view(step.shape)

    def value_of(self, key: str) -> Value:
        """The source's value of a key, unchanged."""
        if key not in self.live:
            origin = with_data(self.source, key)
            for span in origin.spans:
                self.reader.locate(span)  # opened, compared with its stamp and unpacked now, before the first copy
            return InFile(origin, self.reader)
        tensor: torch.Tensor = self.live[key].detach()
        if tensor.device.type == "meta":
            raise ModelError("has no values: it is on the meta device", path=self.source.path, key=key)
        return tensor.resolve_conj().resolve_neg()  # a copy only of what torch conjugates or negates lazily

    def _initial(self, step: Step) -> torch.Tensor:
        """The value with which an adapter fills: the model's own, or a scheme's."""
        scheme = next(iter(step.schemes), "model")
        state = state_dict_of(self.model, type(self.model).__name__)
        if scheme == "model":
            current: torch.Tensor = state[step.target].detach()
            return current
        leader = self.plan.leader(step.target)
        owner, leaf = initialize.layer_of(self.model, leader)
        return initialize.value(scheme, leader, step.shape, step.dtype, self.plan.seed, owner, self.own.schemes, leaf)


def _record(source: Any) -> Any:
    """The record of which keys are fresh: a report, plan or checkpoint as it is; a path is opened."""
    return _opening.open_source(source) if isinstance(source, (str, os.PathLike)) else source


def param_groups(model: nn.Module, source: Any, options: GroupOptions) -> list[dict[str, Any]]:
    """See `ckptsurgeon.param_groups`."""
    record = not isinstance(source, Mapping) or isinstance(source, Checkpoint)
    refuse_idle(facts(record=record), **vars(options))
    if not record:
        options, source = replace(options, overrides={**source, **(options.overrides or {})}), ()
    return groups.param_groups(model, _record(source), **{**vars(options), "partial": options.partial or groups.TRANSFERRED})


def freeze(model: nn.Module, what: Any, partial: str | None) -> freezing.Frozen:
    """See `ckptsurgeon.freeze`. A string is a pattern, never a path; if it is the path of a file, the error says how to use that file."""
    refuse_idle(facts(record=not freezing.is_patterns(what)), partial=partial)
    try:
        return freezing.freeze(
            model, _opening.open_source(what) if isinstance(what, os.PathLike) else what, partial=partial or groups.FRESH
        )
    except ModelError as error:
        if isinstance(what, str) and os.path.isfile(what):
            error.hint = f"to use a merged file's record: freeze(model, ckptsurgeon.open({what!r}))"
        raise


def initialize_fresh(model: nn.Module, source: Any, scheme: Any, seed: int, note: Note) -> tuple[str, ...]:
    """See `ckptsurgeon.initialize`."""
    ranks = Ranks.of(model)
    if not any(map(is_sharded, (*model.parameters(), *model.buffers()))):
        with ranks.step():
            return initialize.initialize(model, _record(source), scheme, seed=seed, note=note)
    from ckptsurgeon.models.sharded.planner import spread, whole
    from ckptsurgeon.models.sharded.prepare import plain_layer

    with ranks.step():
        record = _record(source)
    # If a scheme fails, it fails on every rank: all ranks draw the same values.
    with Reader([]) as no_files:
        return initialize.initialize(
            model, record, scheme, seed=seed, note=note, write=partial(spread, reader=no_files), plain=plain_layer, whole=whole
        )
