"""The verbs that decide and write: plan, merge, apply. Each opens what it is given and calls the floors below in order."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from ckptsurgeon.api import _gates, _gpu_layouts, _opening
from ckptsurgeon.api._gates import Uncertain
from ckptsurgeon.api._opening import Target, silent
from ckptsurgeon.api._options import facts_of, refuse_idle, refuse_idle_writing
from ckptsurgeon.api._own_loading import learned
from ckptsurgeon.api._provenance import record
from ckptsurgeon.api._proving import refuse_non_finite, verify_written
from ckptsurgeon.api._rules import Own, Rules, Ruling, gather, load_own, own_code, say_code
from ckptsurgeon.api._stale import check_data, load_plan, sampled
from ckptsurgeon.errors import ModelError, OutputError, PlanError, no_memory, out_of_memory
from ckptsurgeon.formats.registry import OUTPUTS, WRITTEN
from ckptsurgeon.parameter_types import Given, Note, Path, Renames
from ckptsurgeon.planning import planfile
from ckptsurgeon.planning.averaging import Weights
from ckptsurgeon.planning.plan import Plan, make_plan
from ckptsurgeon.report import Report, Verification
from ckptsurgeon.rules.rules import from_arguments
from ckptsurgeon.streaming.apply import Output, Training, Values, Written
from ckptsurgeon.streaming.apply import apply as write_plan
from ckptsurgeon.streaming.atomic import check_free, named
from ckptsurgeon.streaming.values import Buffer
from ckptsurgeon.tensors import Checkpoint


def plan(
    sources: Given | Sequence[Given],
    target: Given | None = None,
    *,
    root: str | None = None,
    rename: Renames = (),
    drop: Iterable[str] = (),
    keep: Iterable[str] = (),
    adapt: Renames = (),
    init: Renames = (),
    rules: Rules = (),
    reverse: bool = False,
    average: Weights | None = None,
    auto: str | None = None,
    match: bool = False,
    accept_uncertain: bool = False,
    dequantize: bool = False,
    dtype: str | None = None,
    seed: int | None = None,
    allow_cast: Iterable[str] = (),
    min_coverage: float | None = None,
    strict: bool = False,
    full: bool = False,
    note: Note = silent,
) -> Plan:
    """Decide how every key of `target` gets its value, and what becomes of every source key; write nothing.

    Args:
        sources: a path or `Checkpoint`, or several.
        target: a spec, model, skeleton or file; None converts the one source.
        root: which nested dict of the sources is meant.
        rename, drop, keep, adapt, init: rules in ckptsurgeon's patterns; those of `rules` (TOML files, or `Rule`s) come after them.
        reverse: turn the rules of files round.
        average: True, or a weight for each source: every key is the (weighted) mean of all sources; floating tensors only.
        auto: `"safe"` applies adapters and repairs that can't change what a tensor means.
        match: find by itself what the rules leave open, as the verb `match` does; with `accept_uncertain` the uncertain links too.
        dtype: `"target"` (the default with a target), `"source"`, or a floating code such as `"BF16"`.
        seed: for the model's constructor and the named schemes; 0 by itself.
        allow_cast: patterns of keys whose casts may overflow or truncate, and of quantised weights that are meant as the codes they are.
        dequantize: make float32 values of fp8 and int8 codes and the scales beside them, then cast; to BF16 where no dtype is chosen.
        min_coverage: the least share, from 0 to 1, of tensors and of elements to be transferred.
        strict: refuse keys that are missing, extra or mismatched without a rule that names them.
        full: digest all data of the files, so that `apply` notices any change; else a sample of it, which notices a file saved anew.

    Raises:
        RuleError: rules that can't be followed, all at once.
        CoverageError, StrictError: the plan is a no.
        PlanError: nothing says what a key gets.

    >>> decided = plan("fixtures/net_params.pkl", "fixtures/variants.py:NetTwoClasses")
    >>> [(row.source, row.reason) for row in decided.dropped]
    [('fc3.weight', 'shape (10, 84) does not fit (2, 84)'), ('fc3.bias', 'shape (10,) does not fit (2,)')]
    """
    ruling = gather(from_arguments(rename, drop, init, adapt, keep), rules, reverse=reverse, note=note)
    choices = _Choices(
        ruling, root, dtype, seed or 0, _gates.patterns(allow_cast), dequantize, average, auto, _gates.matching(match, accept_uncertain)
    )
    seen = _look(sources)
    goal = None if target is None else _opening.open_target(target, note=note)
    found, made = _decide(seen, goal, choices)
    refuse_idle(facts_of(made), seed=seed, auto=auto, min_coverage=min_coverage, strict=strict, dtype=dtype, dequantize=dequantize)
    _gates.refuse_idle_casts(choices.allow_cast, [step.target for step in made.steps])
    _gates.check(made, min_coverage=min_coverage, strict=strict)
    return sampled(made, found, None if goal is None else goal.checkpoint, full)


@dataclass(frozen=True)
class _Choices:
    """What a person chose about deciding."""

    ruling: Ruling
    root: str | None
    dtype: str | None
    seed: int
    allow_cast: tuple[str, ...]
    dequantize: bool
    average: Weights | None
    auto: str | None
    match: Uncertain | None = None


def _look(sources: Any) -> list[Given]:
    """What can be told before a model is imported: that the sources can be read."""
    return [_opening.look_on_disk(one) for one in (sources if isinstance(sources, (list, tuple)) else [sources])]


def _decide(given: Sequence[Given], goal: Target | None, choices: _Choices) -> tuple[list[Checkpoint], Plan]:
    wanted = None if goal is None else goal.checkpoint
    if not given or (wanted is None and len(given) > 1 and not choices.average):
        raise PlanError("needs one source to convert, or a target", hint="the last path is the target: merge A B TARGET -o OUT")
    found = [_opening.open_source(one, root=choices.root, target=wanted) for one in given]
    ruling = choices.ruling
    if choices.match is not None:
        from ckptsurgeon.api._matched import matched

        ruling = matched(found, wanted, ruling, choices.match == "accepted")
    ruling = learned(found, wanted, None if goal is None else goal.any_model, ruling, average=choices.average, auto=choices.auto)
    made = make_plan(
        found,
        wanted,
        ruling.rules,
        dtype=choices.dtype,
        seed=choices.seed,
        allow_cast=choices.allow_cast,
        average=choices.average,
        auto=choices.auto,
        dequantize=choices.dequantize,
        outside=ruling.outside,
    )
    _gpu_layouts.refuse(made, found)
    return found, made


def merge(
    sources: Given | Sequence[Given],
    target: Given | None,
    output: Path,
    *,
    root: str | None = None,
    rename: Renames = (),
    drop: Iterable[str] = (),
    keep: Iterable[str] = (),
    adapt: Renames = (),
    init: Renames = (),
    rules: Rules = (),
    reverse: bool = False,
    average: Weights | None = None,
    auto: str | None = None,
    match: bool = False,
    accept_uncertain: bool = False,
    dequantize: bool = False,
    dtype: str | None = None,
    seed: int | None = None,
    allow_cast: Iterable[str] = (),
    min_coverage: float | None = None,
    strict: bool = False,
    format: str | None = None,
    overwrite: bool = False,
    tied: str | None = None,
    provenance: bool = True,
    verify: bool = True,
    device: str | None = None,
    finite: bool = False,
    with_optimizer: bool = False,
    optimizer_root: str | None = None,
    optimizer_names: Iterable[str] | Literal["model"] | None = None,
    optimizer_from: Path | None = None,
    note: Note = silent,
) -> Report:
    """Plan, apply and verify: write to `output` what fits, and prove it before the file takes its name.

    With a model as target, missing keys get the values of its own constructor under `seed`, and the file is loaded strictly into a fresh
    model on `device`. With a checkpoint as target its own values are kept. With target None the source is converted.

    Args:
        output: its suffix says the format (`.pt .pth .pkl .bin .ckpt` torch's zip, `.safetensors`), unless `format` does
            (`"torch"` or `"safetensors"`).
        tied: how safetensors gets tied keys: `"copy"` (by itself), or `"alias"` (one copy and the library's own metadata).
        provenance: record the sources' fingerprints, the plan's digest and which keys are fresh.
        verify: hold the written file against the plan and the model, and all that is read for it against the checksums that torch's zip
            format keeps (data without one is a note in the report).
        device: where the model is loaded to prove it; `"cpu"` by itself.
        finite: let NaN and infinite values fail, whatever the target, and those of an optimizer's state too.
        with_optimizer: write a training checkpoint: the optimizer's state beside the weights, under the names that the source has, with
            its groups' hyper-parameters, and whatever else is plain there. Needs a model as the target, one source and torch's format.
        optimizer_root, optimizer_names: as for `transfer`; the target model's order of registration counts only for `"model"`.
        optimizer_from: a second file that has the optimizer's state, such as the Trainer's `optimizer.pt`; with it `with_optimizer` goes
            without saying, and the source may be of any format.
        The other arguments are `plan`'s.

    Raises:
        CheckpointError: as `plan`; also CastError, OutputError (it exists, or can't be written), VerificationError, and FormatError
            for data that is not what its own checksum says. Nothing is left behind.

    >>> report = merge("fixtures/net_params.pkl", "fixtures/variants.py:NetTwoClasses", "merged.pt", overwrite=True)
    >>> report.fresh
    ('fc3.weight', 'fc3.bias')
    """
    written_format = output_format(output, format)
    check_free(os.fspath(output), overwrite)
    with_optimizer = with_optimizer or optimizer_from is not None
    ruling = gather(from_arguments(rename, drop, init, adapt, keep), rules, reverse=reverse, note=note)
    choices = _Choices(
        ruling, root, dtype, seed or 0, _gates.patterns(allow_cast), dequantize, average, auto, _gates.matching(match, accept_uncertain)
    )
    seen = _look(sources)
    goal = None if target is None else _opening.open_target(target, note=note)
    found, made = _decide(seen, goal, choices)
    if goal is not None and goal.build is not None and (made.needs_model or verify):
        settled = _opening.settle(goal, choices.seed, note)
        if settled is not goal:
            goal = settled
            found, made = _decide(seen, goal, choices)
    refuse_idle(facts_of(made, verify), seed=seed, auto=auto, min_coverage=min_coverage, strict=strict, dtype=dtype, dequantize=dequantize)
    refuse_idle_writing(made, written_format, verify, device, tied, with_optimizer, optimizer_root, optimizer_names)
    _gates.check(made, min_coverage=min_coverage, strict=strict)
    how = Output(os.fspath(output), written_format, overwrite, tied or "copy", record(made) if provenance else None, verify)
    around, carried = None, None
    if with_optimizer:
        from ckptsurgeon.api._merged_training_state import training
        from ckptsurgeon.api._training_state import names_of

        around, carried = training(made, found, goal, optimizer_root, names_of(optimizer_names), optimizer_from, verify)
    _gates.refuse_idle_casts(choices.allow_cast, [step.target for step in (*made.steps, *(around.steps if around is not None else ()))])
    done = _carry_out(made, found, goal, how, device, finite, choices.ruling.own, around)
    return done if carried is None else replace(done, optimizer=carried)


def apply(
    plan: Plan | Path,
    output: Path,
    *,
    format: str | None = None,
    overwrite: bool = False,
    tied: str | None = None,
    provenance: bool = True,
    verify: bool = True,
    device: str | None = None,
    finite: bool = False,
    note: Note = silent,
) -> Report:
    """Do what was decided: carry out a plan, or the plan.json at a path, and prove the result as `merge` does.

    Raises:
        StaleError: a source or the target is not what it was when the plan was made.
        PlanError: the plan is of another version, or does not add up.
        CheckpointError: as `merge`.

    >>> decided = plan("fixtures/net_params.pkl", "fixtures/variants.py:NetTwoClasses")
    >>> apply(decided, "applied.safetensors", overwrite=True).coverage.counts
    (8, 10)
    """
    made = plan if isinstance(plan, Plan) else load_plan(plan)
    schemes = [scheme for step in made.steps for scheme in step.schemes]
    if not isinstance(plan, Plan):
        note = _opening.unmissable(note)
        target = [made.target.spec] if made.target is not None and _opening.is_code(made.target.spec) else []
        say_code(os.fspath(plan), [*target, *own_code(made.own_adapters, schemes)], note)
    written_format = output_format(output, format)
    check_free(os.fspath(output), overwrite)
    refuse_idle_writing(made, written_format, verify, device, tied)
    found = [_opening.open_source(source.path, root=source.root) for source in made.sources]
    planfile.check_sources(made, found)  # before the target's module is imported
    check_data(made, found, None)
    goal = None if made.target is None else _opening.open_planned(made.target, note)
    if goal is not None and goal.build is not None and (made.needs_model or verify):
        goal = _opening.settle(goal, made.seed, note)
    planfile.check_followable(made, found, None if goal is None else goal.checkpoint)
    if goal is not None:
        check_data(replace(made, sources=()), (), goal.checkpoint)
    _, own = load_own(made.own_adapters, schemes, note)
    how = Output(os.fspath(output), written_format, overwrite, tied or "copy", record(made) if provenance else None, verify)
    return _carry_out(made, found, goal, how, device, finite, own)


def output_format(output: Path, format: str | None = None) -> str:
    """`torch` or `safetensors`, as `format` or the output's suffix says. OutputError for neither."""
    if format is not None:
        if format not in WRITTEN:
            raise OutputError(f"{format!r} is no format to write", path=output, hint=" or ".join(WRITTEN))
        return format
    suffix = os.path.splitext(os.fspath(output))[1].lower()
    if suffix not in OUTPUTS:
        raise OutputError(
            f"its suffix {suffix!r} does not say which format to write",
            path=output,
            hint=f"end it in one of {' '.join(OUTPUTS)}, or add --format torch",
        )
    return OUTPUTS[suffix]


def _carry_out(
    made: Plan,
    found: Sequence[Checkpoint],
    goal: Target | None,
    how: Output,
    device: str | None,
    finite: bool,
    own: Own,
    around: Training | None = None,
) -> Report:
    wanted = None if goal is None else goal.checkpoint
    if how.tied not in ("copy", "alias"):
        raise OutputError(f"{how.tied!r} is no way to write tied keys", path=how.path, hint="copy or alias")
    verification: list[Verification] = []

    def prove(path: str) -> None:
        if how.proof and goal is not None and goal.build is not None:
            seen = verify_written(path, goal, device or "cpu", finite=finite, seed=made.seed, shown=how.path)
            findings = tuple(replace(row, message=named(row.message, path, how.path)) for row in seen.findings)
            verification.append(replace(seen, findings=findings))
        if finite and (not verification or around is not None):  # the model has shown the weights alone
            refuse_non_finite(path, how.path)

    written = write_plan(made, found, wanted, how, values=_values(made, goal, own, how.format), verify=prove, training=around)
    return _report(made, written, how.path, how.proof, verification[0] if verification else None)


def _values(made: Plan, goal: Target | None, own: Own, format: str) -> Values | None:
    schemes = {step.target: scheme for step in made.steps for scheme in step.schemes}
    settle = _settling(made, goal, format)
    if goal is None or not (schemes or made.needs_model):
        return Values(_no_initial, _no_initial, own.kernels, settle) if own.kernels or settle else None
    from ckptsurgeon.models.init.values import extra_state, make_provider

    model = goal.build(made.seed) if goal.build is not None and made.needs_model else None
    provide = make_provider(model, schemes, goal.checkpoint, made.seed, own.schemes)
    extra = extra_state(model) if model is not None else {}
    leaders = {key: group[0] for group in made.ties for key in group}

    def initial(key: str) -> Buffer:
        try:
            return provide(leaders.get(key, key))  # tied keys are one tensor, with one value
        except (MemoryError, RuntimeError) as error:
            if no_memory(error):
                raise out_of_memory(error, key) from error
            raise

    def own_extra(key: str) -> Any:
        if key not in extra:
            raise ModelError("is an extra state, and no model is at hand that has it", key=key, hint="give the model itself as the target")
        return extra[key]

    return Values(initial, own_extra, own.kernels, settle)


def _settling(made: Plan, goal: Target | None, format: str) -> Any:
    """What finds the values that loading decides; None where it decides none."""
    if goal is None or goal.build is None or not (goal.checkpoint.loaders or goal.checkpoint.overlaps):
        return None
    from ckptsurgeon.models.own_loading.settled import is_needed, settled

    build, wanted, versionless = goal.build, goal.checkpoint, not WRITTEN[format].keeps_versions
    if not is_needed(made, wanted, versionless):
        return None
    return lambda fetch, extra: settled(made, wanted, build, fetch, extra, versionless)


def _no_initial(key: str) -> Any:
    raise PlanError("gets a value of the target's own, and there is no target with values", key=key)


def _report(made: Plan, written: Written, output: str, proven: bool, verification: Verification | None) -> Report:
    return Report(
        sources=tuple(source.path for source in made.sources),
        target=made.target.spec if made.target is not None else "",
        transferred=made.transferred,
        kept=made.kept,
        fresh=made.fresh,
        still_fresh=made.still_fresh,
        roots=tuple(source.root for source in made.sources),
        prefixes=tuple(source.prefix for source in made.sources),
        dropped=tuple((row.source, row.reason) for row in made.dropped),
        coverage=made.coverage,
        casts=written.casts,
        findings=(*written.findings, *(verification.findings if verification is not None else ())),
        output=output,
        nbytes=written.nbytes,
        proven=proven,
        verification=verification,
        adapted=made.adapted,
        partial=made.partial,
    )
