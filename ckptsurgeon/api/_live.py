"""From a checkpoint to the first training step: transfer into a live model, initialise what is fresh, parameter groups.

The verbs of `api` that need torch and a model; imported only when one of them is used.
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
from ckptsurgeon.report import Cast, Finding, Report
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
    gathered: Callable[[], Ruling],
    options: RuleOptions,
    training: TrainingOptions = NO_TRAINING,
    *,
    step: bool = False,
) -> Report:
    """See `ckptsurgeon.transfer`. `gathered` reads the rules, which may be files, where all ranks learn of it if one can't. `step`: it is
    a step of another call, whose options have been held against it."""
    ranks = Ranks.of(model)
    with raising_later() as held, ExitStack() as undo:
        with ranks.step() as told:
            refuse_flat(model.modules())
            ruling = gathered()
            goal = checkpoint_of(model, own_class(model).__name__)
            goal = goal if options.conversions else _opening.without_conversions(goal)
            given, live = _open(source, options.root, goal, training.ema is not None)
            ruling, plan = decide([given], goal, lambda: model, ruling, options)
            if not step:
                _refuse_idle(plan, options, training, on_meta(model))
                _gates.refuse_idle_casts(plan.allow_cast, [each.target for each in plan.steps])
            _gates.refuse_open(plan)
            _gates.check(plan, options)
            _gpu_layouts.refuse(plan, [given], live)
            told.same = {"source": given.fingerprint, "model": goal.fingerprint, "plan": digest(plan)}
            reader = undo.enter_context(Reader([given]))
            run = _Run(plan, given, live, reader, model, ruling.own, training.optimizer)
        way = (
            _sharded_way(run, ranks, undo, held)
            if any(map(is_sharded, (*model.parameters(), *model.buffers())))
            else _plain_way(run, ranks, held)
        )

        def again(other: Given, copy: nn.Module, where: str, dropped: tuple[str, ...]) -> Report:
            rules = replace(ruling, rules=(*ruling.rules, *from_arguments(drop=dropped)))
            chosen = replace(options, root=where, match=False, accept_uncertain=False, layout=None, numbers=None)
            return transfer(other, copy, lambda: rules, chosen, TrainingOptions(checksums=training.checksums), step=True)

        with ranks.step() as told:
            refuse_losses(way.casts, plan.allow_cast)
            reader.check_unchanged()
            extra = {entry.target: given.entries[entry.source[1]] for entry in plan.entries if entry.source is not None}
            around = cache(lambda: _training_state.beside_weights(source, given, reader))
            carried = _training_state.give(training, around, given, plan, model, undo) if training else None
            averaged = _training_state.find_averaged(training, source, around, undo) if training.ema is not None else None
            if training.checksums:
                check_all(reader, [given])
            told.same = {"training state": sha256(repr(carried).encode()).hexdigest()}
        if carried is not None and averaged is not None:
            with ranks.step():  # the copy may be of this rank alone
                report = again(averaged.source, averaged.model, averaged.root, averaged.left_out)
                carried = averaged.told(carried, report)
        way.put(extra)
        with ranks.step():
            _check_still_unchanged(reader)
    return report_of(
        plan,
        casts=reported(way.casts),
        findings=(*plan.findings, *(_without_checksums(reader, given) if training.checksums else ())),
        optimizer=carried,
    )


@dataclass(frozen=True)
class Way:
    """How a plan's values get into a model: what casts lose, known before anything is changed, and what puts them in with extra state."""

    casts: list[Cast]
    put: Callable[[Mapping[str, Any]], None]


def _plain_way(run: _Run, ranks: Ranks, held: list[BaseException]) -> Way:
    """Into a model of plain tensors, also one of several copies that DistributedDataParallel keeps: each rank reads for itself."""
    plan = run.plan
    with ranks.step():
        values = _values(run, [each for each in plan.steps if each.sources and each.action != "load"])
        handed = {name: run.value_of(key) for name, (_, key) in plan.handed.items()}
        refuse_losses(run.casts, plan.allow_cast)
        _refuse_torn_ties(plan, values)

    def into(extra: Mapping[str, Any]) -> None:
        with ranks.step():
            put(plan, run.model, values.__getitem__, extra, run.own.schemes, handed, held)

    return Way(run.casts, into)


def _values(run: _Run, steps: Sequence[Step]) -> dict[str, Value]:
    """The values of steps; only those that are adapted or cast take time and memory."""
    changed = {each.target for each in steps if each.adapters or each.cast is not None}
    with phase("converting", len(changed), "tensors") if changed else nullcontext(nobody) as advance:
        values = {}
        for each in steps:
            values[each.target] = run.value(each)
            if each.target in changed:
                advance(1)
    return values


def _sharded_way(run: _Run, ranks: Ranks, undo: ExitStack, held: list[BaseException]) -> Way:
    """Into a model with sharded tensors: each rank reads the blocks that are its own."""
    from ckptsurgeon.models.sharded import meta, prepare
    from ckptsurgeon.models.sharded import put as sharded

    plan, model = run.plan, run.model
    with ranks.step():
        state = state_dict_of(model, type(model).__name__)
        sharded.refuse(plan, model, state)
        if meta.on_meta(model):
            plan = meta.with_initial_values(plan, state)
            meta.refuse_unreachable(model, plan, state)
            undo.enter_context(meta.memory_for(model, run.optimizer))
            state = state_dict_of(model, type(model).__name__)
        origins = prepare.Origins(plan, run.given, run.live, run.reader, model, state, run.own.kernels, run.own.schemes)
        wanted = origins.all()
        sharded.refuse_unwritable(state, wanted)
    values, lost = prepare.settle(wanted, state, ranks)
    with ranks.step() as told:
        values = prepare.without_tied(values, state, plan.ties)
        told.tell = lost
    return Way(prepare.together(told.told), lambda extra: sharded.put(model, state, values, extra, ranks, held))


def _without_checksums(reader: Reader, given: Checkpoint) -> list[Finding]:
    entries = reader.entries()
    if not entries:
        return [Finding("no-checksum", f"{given.format} keeps no checksums that the data could be held against", level="note")]
    return without(entries.values())


def _refuse_idle(plan: Plan, options: RuleOptions, training: TrainingOptions, meta: bool) -> None:
    # "model" is what the live model has already, unless it is on meta.
    drawn = any(meta or scheme != "model" for step in plan.steps for scheme in step.schemes)
    present = {kind: getattr(training, kind) is not None for kind in ("optimizer", "scheduler", "ema")}
    known = facts(target=True, initial_values=drawn, codes="codes" in facts_of(plan), **present)
    refuse_idle(known, **vars(options), **vars(training))


def _check_still_unchanged(reader: Reader) -> None:
    # Values are read from the file straight into the model: reading them all beforehand would take the memory of a second one.
    try:
        reader.check_unchanged()
    except StaleError as error:
        error.reason = "changed while it was copied into the model, which may hold a mixture now"
        error.hint = "transfer again when nothing writes to it"
        raise


def _open(source: Given, root: str | None, goal: Checkpoint, beside_average: bool) -> tuple[Checkpoint, State]:
    """The source as a checkpoint, and, when it is in memory, its live tensors. `beside_average`: the averaged copy is asked for too."""
    from torch import nn

    if root is None and isinstance(source, Mapping) and not isinstance(source, Checkpoint):
        root = _live_root(source, goal, beside_average)
    if root is not None and isinstance(source, (nn.Module, Mapping)) and not isinstance(source, Checkpoint):
        held = at_root(source, root)
        if not isinstance(held, Mapping):
            raise RootError(f"has no state_dict at {root!r}", path="the source")
        source = held
    if isinstance(source, Mapping) and not isinstance(source, Checkpoint):
        refuse_no_tensors(source, "source", goal)
    if isinstance(source, nn.Module):
        state = state_dict_of(source, type(source).__name__)
        return checkpoint_of(source, type(source).__name__), state
    if isinstance(source, Mapping) and not isinstance(source, Checkpoint):
        return replace(checkpoint_of_state_dict(source), root=root or ""), source
    found = _opening.look(source)
    if root is None and beside_average and isinstance(found, Archive):
        found = _training_state.without_averaged(found)
    return _opening.open_source(found, root=root, target=goal), {}


def _live_root(source: Mapping[Any, Any], goal: Checkpoint, beside_average: bool) -> str | None:
    """The root that a live training checkpoint's state_dict is at, by the rule for files; None for a state_dict itself."""
    from torch import Tensor

    if any(isinstance(value, Tensor) for value in source.values()):
        return None
    found = live_roots(source)
    found = _training_state.without_averaged(found) if beside_average else found
    roots = {one.root for one in found.state_dicts}
    chosen = choose(found, target=goal).root if roots else None
    return chosen if chosen in roots else None


def _refuse_torn_ties(plan: Plan, values: Mapping[str, Value]) -> None:
    for group in plan.ties:
        first, *rest = [key for key in group if key in values] or [""]
        for key in rest:
            if not _same(values[key], values[first]):
                raise torn(first, key)


def _same(one: Value, other: Value) -> bool:
    if isinstance(one, InFile) and isinstance(other, InFile) and (one.meta.place, one.meta.stride) == (other.meta.place, other.meta.stride):
        return True
    return one is other or memory_of(in_memory(one)) == memory_of(in_memory(other))


@dataclass(frozen=True)
class _Run:
    """One transfer: where values come from, and what the casts lose."""

    plan: Plan
    given: Checkpoint
    live: State
    reader: Reader
    model: nn.Module
    own: Own
    optimizer: torch.optim.Optimizer | None = None
    casts: list[Cast] = field(default_factory=list)

    def value(self, step: Step) -> Value:
        """A step's value. One that is neither adapted nor cast is not copied: it waits in the file, or lies in the live source."""
        key = step.sources[0][1]
        dtype = self.given[key].dtype
        if step.adapters:
            tensors = [in_memory(self.value_of(one)) for _, one in step.sources]
            return adapted_and_cast(step, tensors, dtype, lambda: self._initial(step), self.own.kernels, self.casts)
        made = self.value_of(key)
        if step.cast is None:
            return made
        parts = self.reader.parts(made.meta) if isinstance(made, InFile) else dense_parts(made)
        data = bytearray().join(cast(step.target, parts, dtype, step.cast, self.casts))
        return tensor_from(data, step.dtype).view(step.shape)

    def value_of(self, key: str) -> Value:
        """The source's own value of a key."""
        if key not in self.live:
            origin = with_data(self.given, key)
            for span in origin.spans:
                self.reader.locate(span)  # opened, held against its stamp and unpacked now: not between two copies
            return InFile(origin, self.reader)
        tensor: torch.Tensor = self.live[key].detach()
        if tensor.device.type == "meta":
            raise ModelError("has no values: it is on the meta device", path=self.given.path, key=key)
        return tensor.resolve_conj().resolve_neg()  # a copy only of what torch conjugates or negates lazily

    def _initial(self, step: Step) -> torch.Tensor:
        """The model's own value, or a scheme's, where an adapter fills up with it."""
        scheme = next(iter(step.schemes), "model")
        state = state_dict_of(self.model, type(self.model).__name__)
        if scheme == "model":
            found: torch.Tensor = state[step.target].detach()
            return found
        leader = self.plan.leader(step.target)
        owner, leaf = initialize.layer_of(self.model, leader)
        return initialize.value(scheme, leader, step.shape, step.dtype, self.plan.seed, owner, self.own.schemes, leaf)


def _record(source: Any) -> Any:
    """What says which keys are fresh: a report, plan or checkpoint as it is; a path is opened."""
    return _opening.open_source(source) if isinstance(source, (str, os.PathLike)) else source


def param_groups(model: nn.Module, source: Any, options: GroupOptions) -> list[dict[str, Any]]:
    """See `ckptsurgeon.param_groups`."""
    record = not isinstance(source, Mapping) or isinstance(source, Checkpoint)
    refuse_idle(facts(record=record), **vars(options))
    if not record:
        options, source = replace(options, overrides={**source, **(options.overrides or {})}), ()
    return groups.param_groups(model, _record(source), **{**vars(options), "partial": options.partial or groups.TRANSFERRED})


def freeze(model: nn.Module, what: Any, partial: str | None) -> freezing.Frozen:
    """See `ckptsurgeon.freeze`. A string is a pattern, never a file, though the error says so where it names one."""
    refuse_idle(facts(record=not freezing.is_patterns(what)), partial=partial)
    try:
        return freezing.freeze(
            model, _opening.open_source(what) if isinstance(what, os.PathLike) else what, partial=partial or groups.FRESH
        )
    except ModelError as error:
        if isinstance(what, str) and os.path.isfile(what):
            error.hint = f"to go by a merged file's record: freeze(model, ckptsurgeon.open({what!r}))"
        raise


def initialize_fresh(model: nn.Module, source: Any, scheme: Any, seed: int, note: Note) -> tuple[str, ...]:
    """See `ckptsurgeon.initialize`."""
    ranks = Ranks.of(model)
    if not any(map(is_sharded, (*model.parameters(), *model.buffers()))):
        with ranks.step():
            return initialize.initialize(model, _record(source), scheme, seed=seed, note=note)
    from ckptsurgeon.models.sharded.plain_layer import plain_layer
    from ckptsurgeon.models.sharded.planner import spread, whole

    with ranks.step():
        record = _record(source)
    # What a scheme fails by, it fails by on every rank: they draw the same values.
    with Reader([]) as none:
        return initialize.initialize(
            model, record, scheme, seed=seed, note=note, write=partial(spread, reader=none), plain=plain_layer, whole=whole
        )
