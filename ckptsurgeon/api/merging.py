"""The verbs that decide and write: plan, merge, apply. Each opens its arguments and calls the floors below in order."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from ckptsurgeon.api import _gates, _gpu_layouts, _opening
from ckptsurgeon.api._deciding import decide
from ckptsurgeon.api._opening import Target, silent
from ckptsurgeon.api._options import OutputOptions, RuleOptions, TrainingOptions, collect, facts_of, refuse_idle, shard_size
from ckptsurgeon.api._rules import Rules, Ruling, gather, load_own, own_code, say_code
from ckptsurgeon.api._stale import check_data, hinting, load_plan, sampled
from ckptsurgeon.errors import PlanError
from ckptsurgeon.parameter_types import Dtype, Given, Note, OnProgress, Path, Renames, Words
from ckptsurgeon.planning import planfile
from ckptsurgeon.planning.averaging import Weights
from ckptsurgeon.planning.plan import Plan
from ckptsurgeon.report import Report, with_training
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
    conversions: bool = True,
    match: bool = False,
    accept_uncertain: bool = False,
    layout: Words | None = None,
    numbers: Mapping[str, int] | None = None,
    dequantize: bool = False,
    dtype: Dtype | None = None,
    seed: int | None = None,
    allow_cast: Iterable[str] = (),
    min_coverage: float | None = None,
    strict: bool = False,
    max_shard_size: int | str | None = None,
    full: bool = False,
    note: Note = silent,
    progress: OnProgress | None = None,
) -> Plan:
    """Decide how every key of `target` gets its value, and what becomes of every source key; write nothing.

    Args:
        sources: a path or a `Checkpoint`, or a list of them.
        target: a model, a spec such as `"module:Net"`, a skeleton or a checkpoint; None converts the one source.
        root: the nested dict that holds the state_dict, such as `"model"` or `"ema"`, where there are several.
        rename: new names for source keys, from pattern to result: `{"fc2.{p}": "dense2.{p}"}`.
        drop: patterns of source keys to leave out.
        keep: patterns of target keys that keep the target's own values.
        adapt: adapters for tensors whose shape must change, by pattern: `{"pos_embed": "interpolate"}`.
        init: schemes for keys that no source gives, by pattern: `{"fc3.*": "xavier_normal"}`.
        rules: rules files (TOML) or `Rule`s; they come after the rules of the other arguments.
        reverse: use the rules files in the other direction: from the names of their targets to those of their sources.
        average: True, or a weight for each source: each key is the weighted mean of all sources (floating tensors only).
        auto: `"safe"` applies adapters and repairs that can't change what a tensor means.
        conversions: `False` takes names as they are where the target is a model of transformers, whose own loading renames keys, and cuts,
            joins or turns tensors.
        match: match the keys that the rules leave open, as the function `match` does.
        accept_uncertain: use the uncertain links of matching too.
        layout: `"as-is"` takes links whose layout is in doubt as they stand, patterns of target keys those that they match.
        numbers: for variables in adapters' arguments, by name: `{"heads": 32}`, as `permute_rope(heads=heads)` needs.
        dequantize: compute float32 values from fp8 and int8 codes and their scales, then cast them (to BF16 where no dtype is chosen).
        dtype: `"target"` (the default with a target), `"source"`, or a floating dtype by any name: `"BF16"`, `"float16"`, `torch.float32`.
        seed: the seed of a model's constructor and of init schemes, which draw each key's values from the seed and its name; 0 by default.
        allow_cast: patterns of keys whose casts may overflow or truncate, and of quantised weights that may be taken as plain codes.
        min_coverage: the least share, from 0 to 1, of the target's tensors and of its elements that must be transferred.
        strict: refuse missing, extra and mismatched keys that no rule names.
        max_shard_size: write shards of at most this size, with their index, into a folder: a number of bytes, or text such as `"5GB"` (of
            10⁹ bytes) or `"2GiB"` (of 2³⁰). A tensor is never split, and tied ones are in one shard. The default is 5 GB.
        full: digest all data of the files, so that `apply` notices any change; else a sample of it, which notices a file saved anew.
        note: called with each note, a line of text; notes are dropped by default.
        progress: called with a `Progress`, how far the work is, at most ten times a second; what it raises stops the run, and nothing is
            left half done.

    Returns:
        A `Plan`, for `apply`; printed, it is the command line's table.

    Raises:
        RuleError: rules that can't be followed, all at once.
        CoverageError, StrictError: the plan transfers nothing or too little, or leaves keys that no rule names.
        PlanError: nothing says what a key gets.

    >>> decided = plan("fixtures/net_params.pkl", "fixtures/variants.py:NetTwoClasses")
    >>> [(row.source, row.reason) for row in decided.dropped]
    [('fc3.weight', 'shape (10, 84) does not fit (2, 84)'), ('fc3.bias', 'shape (10,) does not fit (2,)')]
    """
    options = collect(RuleOptions, locals())
    ruling = gather(options, note=note)
    opened = _look(sources)
    opened_target = None if target is None else _opening.open_target(target, conversions=conversions, note=note)
    checkpoints, decided = _decide(opened, opened_target, ruling, options)
    refuse_idle(facts_of(decided), **vars(options))
    _gates.refuse_idle_casts(decided.allow_cast, [step.target for step in decided.steps])
    _gates.check(decided, options)
    decided = replace(decided, max_shard_size=shard_size(max_shard_size))
    return sampled(decided, checkpoints, None if opened_target is None else opened_target.checkpoint, full)


def _look(sources: Any) -> list[Given]:
    """The sources with their headers read, so that an unreadable file is an error before a model is imported."""
    return [_opening.look_on_disk(source) for source in (sources if isinstance(sources, (list, tuple)) else [sources])]


def _decide(sources: Sequence[Given], target: Target | None, ruling: Ruling, options: RuleOptions) -> tuple[list[Checkpoint], Plan]:
    target_checkpoint = None if target is None else target.checkpoint
    if not sources or (target_checkpoint is None and len(sources) > 1 and not options.average):
        hint = "give the target, or average=True for the mean of all sources" if sources else "give the path of a checkpoint"
        raise PlanError("needs one source to convert, or a target", hint=hint)
    checkpoints = [_opening.open_source(source, root=options.root, target=target_checkpoint) for source in sources]
    _, plan_of_all = decide(checkpoints, target_checkpoint, None if target is None else target.any_model, ruling, options)
    _gpu_layouts.refuse(plan_of_all, checkpoints)
    return checkpoints, plan_of_all


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
    conversions: bool = True,
    match: bool = False,
    accept_uncertain: bool = False,
    layout: Words | None = None,
    numbers: Mapping[str, int] | None = None,
    dequantize: bool = False,
    dtype: Dtype | None = None,
    seed: int | None = None,
    allow_cast: Iterable[str] = (),
    min_coverage: float | None = None,
    strict: bool = False,
    format: str | None = None,
    max_shard_size: int | str | None = None,
    resume: bool = False,
    overwrite: bool = False,
    tied: str | None = None,
    provenance: bool = True,
    verify: bool | None = None,
    proof: str | None = None,
    device: str | None = None,
    finite: bool = False,
    with_optimizer: bool = False,
    optimizer_root: str | None = None,
    optimizer_names: Iterable[str] | Literal["model"] | None = None,
    optimizer_from: Path | None = None,
    note: Note = silent,
    progress: OnProgress | None = None,
) -> Report:
    """Plan, apply and verify: write to `output` what fits, and prove it before the file takes its name.

    With a model as target, missing keys get the values of its own constructor under `seed`, and the file is loaded strictly into a fresh
    model on `device`. With a checkpoint as target its own values are kept. With target None the source is converted.

    With an optimizer's state that has no names, the order in which the target model registers its parameters counts only if
    `optimizer_names` is `"model"`.

    Args:
        sources: a path or a `Checkpoint`, or a list of them.
        target: a model, a spec such as `"module:Net"`, a skeleton or a checkpoint; None converts the one source.
        output: the file to write; its suffix says the format (`.pt .pth .pkl .bin .ckpt` for torch's zip, `.safetensors`). A folder, or a
            path that ends in a slash, gets shards in Hugging Face's names, of safetensors where no format is named.
        root: the nested dict that holds the state_dict, such as `"model"` or `"ema"`, where there are several.
        rename: new names for source keys, from pattern to result: `{"fc2.{p}": "dense2.{p}"}`.
        drop: patterns of source keys to leave out.
        keep: patterns of target keys that keep the target's own values.
        adapt: adapters for tensors whose shape must change, by pattern: `{"pos_embed": "interpolate"}`.
        init: schemes for keys that no source gives, by pattern: `{"fc3.*": "xavier_normal"}`.
        rules: rules files (TOML) or `Rule`s; they come after the rules of the other arguments.
        reverse: use the rules files in the other direction: from the names of their targets to those of their sources.
        average: True, or a weight for each source: each key is the weighted mean of all sources (floating tensors only).
        auto: `"safe"` applies adapters and repairs that can't change what a tensor means.
        conversions: `False` takes names as they are where the target is a model of transformers, whose own loading renames keys, and cuts,
            joins or turns tensors.
        match: match the keys that the rules leave open, as the function `match` does.
        accept_uncertain: use the uncertain links of matching too.
        layout: `"as-is"` takes links whose layout is in doubt as they stand, patterns of target keys those that they match.
        numbers: for variables in adapters' arguments, by name: `{"heads": 32}`, as `permute_rope(heads=heads)` needs.
        dequantize: compute float32 values from fp8 and int8 codes and their scales, then cast them (to BF16 where no dtype is chosen).
        dtype: `"target"` (the default with a target), `"source"`, or a floating dtype by any name: `"BF16"`, `"float16"`, `torch.float32`.
        seed: the seed of a model's constructor and of init schemes, which draw each key's values from the seed and its name; 0 by default.
        allow_cast: patterns of keys whose casts may overflow or truncate, and of quantised weights that may be taken as plain codes.
        min_coverage: the least share, from 0 to 1, of the target's tensors and of its elements that must be transferred.
        strict: refuse missing, extra and mismatched keys that no rule names.
        format: `"torch"` or `"safetensors"`, whatever the suffix of `output`; `"dcp"` writes a folder of torch.distributed.checkpoint.
        max_shard_size: write shards of at most this size, with their index, into a folder: a number of bytes, or text such as `"5GB"` (of
            10⁹ bytes) or `"2GiB"` (of 2³⁰). A tensor is never split, and tied ones are in one shard. The default is 5 GB.
        resume: continue with the shards that an interrupted run of the same call has verified; each is compared with its sources again.
        overwrite: replace `output` if it exists; a folder as a whole, and only where it holds nothing but a checkpoint's files.
        tied: how safetensors gets tied keys: `"copy"` (the default), or `"alias"` (one copy, and the library's own metadata).
        provenance: record the sources' fingerprints, the plan's digest and which keys are fresh.
        verify: `False` is `proof="none"`, `True` is `proof="full"`.
        proof: `"full"` (the default) compares the written file with the plan and the model, and all that is read with the checksums of
            torch's zip format; data without a checksum is a note in the report. `"copied"` leaves out the bytes that the file shares with
            the sources on disk, and loads the model on `"meta"`, without values. `"none"` compares nothing.
        device: where the model is loaded: `"cpu"` (the default), `"cuda:0"`, `"mps"`; `"meta"` compares names, dtypes and shapes, and no
            values.
        finite: NaN and infinite values are errors; needs torch.
        with_optimizer: write a training checkpoint: the optimizer's state beside the weights, under the names that the source has, with its
            groups' hyper-parameters, and whatever else is plain there. Needs a model as the target, one source and torch's format;
            `optimizer_from` implies it.
        optimizer_root: where the source holds the optimizer's state, such as `"optimizer_states.1"`; the usual names are tried by default.
        optimizer_names: the source's parameter names in the order of its optimizer, group after group, for a state that has no names;
            `"model"`: the order in which the target registers its parameters.
        optimizer_from: a second file or folder that has the optimizer's state, such as the Trainer's `optimizer.pt` or accelerate's
            `optimizer.bin`; the source may then be of any format.
        note: called with each note, a line of text; notes are dropped by default.
        progress: called with a `Progress`, how far the work is, at most ten times a second; what it raises stops the run, and nothing is
            left half done.

    Returns:
        A `Report`: which keys were transferred, kept and fresh, and how the file was proven; printed, it is the command line's table.

    Raises:
        CheckpointError: as `plan`; also CastError, OutputError (it exists, or can't be written), VerificationError, and FormatError
            for data that is not what its own checksum says. Nothing is left behind.
        PlanError: also where matching leaves a layout open.

    >>> report = merge("fixtures/net_params.pkl", "fixtures/variants.py:NetTwoClasses", "merged.pt", overwrite=True)
    >>> report.fresh
    ('fc3.weight', 'fc3.bias')
    """
    options, writing = collect(RuleOptions, locals()), collect(OutputOptions, locals())
    training = collect(TrainingOptions, locals())
    from ckptsurgeon.api._writing import carry_out, refuse_idle_writing, refuse_output

    refuse_output(writing)
    ruling = gather(options, note=note)
    opened = _look(sources)
    opened_target = None if target is None else _opening.open_target(target, conversions=conversions, note=note)
    checkpoints, decided = _decide(opened, opened_target, ruling, options)
    if opened_target is not None and opened_target.build is not None and (decided.needs_model or writing.verify):
        built = _opening.as_built(opened_target, decided.seed, note)
        if built is not opened_target:
            opened_target = built
            checkpoints, decided = _decide(opened, opened_target, ruling, options)
    refuse_idle(facts_of(decided, bool(writing.verify)), **vars(options))
    refuse_idle_writing(decided, writing, training)
    _gates.refuse_open(decided)
    _gates.check(decided, options)
    around, carried = None, None
    if training.written:
        from ckptsurgeon.api import _merged_training_state

        around, carried = _merged_training_state.training(decided, checkpoints, opened_target, training, bool(writing.verify))
    _gates.refuse_idle_casts(decided.allow_cast, [step.target for step in (*decided.steps, *(around.steps if around is not None else ()))])
    written_report = carry_out(decided, checkpoints, opened_target, writing, ruling.own, around)
    return written_report if carried is None else with_training(written_report, carried)


def apply(
    plan: Plan | Path,
    output: Path,
    *,
    format: str | None = None,
    max_shard_size: int | str | None = None,
    resume: bool = False,
    overwrite: bool = False,
    tied: str | None = None,
    provenance: bool = True,
    verify: bool | None = None,
    proof: str | None = None,
    device: str | None = None,
    finite: bool = False,
    note: Note = silent,
    progress: OnProgress | None = None,
) -> Report:
    """Carry out a plan, or the plan.json at a path, and verify the result as `merge` does.

    Args:
        plan: a plan, or the path of a plan.json.
        output: the file to write; its suffix says the format (`.pt .pth .pkl .bin .ckpt` for torch's zip, `.safetensors`). A folder, or a
            path that ends in a slash, gets shards in Hugging Face's names, of safetensors where no format is named.
        format: `"torch"` or `"safetensors"`, whatever the suffix of `output`; `"dcp"` writes a folder of torch.distributed.checkpoint.
        max_shard_size: write shards of at most this size, with their index, into a folder: a number of bytes, or text such as `"5GB"` (of
            10⁹ bytes) or `"2GiB"` (of 2³⁰). A tensor is never split, and tied ones are in one shard. The default is 5 GB.
        resume: continue with the shards that an interrupted run of the same call has verified; each is compared with its sources again.
        overwrite: replace `output` if it exists; a folder as a whole, and only where it holds nothing but a checkpoint's files.
        tied: how safetensors gets tied keys: `"copy"` (the default), or `"alias"` (one copy, and the library's own metadata).
        provenance: record the sources' fingerprints, the plan's digest and which keys are fresh.
        verify: `False` is `proof="none"`, `True` is `proof="full"`.
        proof: `"full"` (the default) compares the written file with the plan and the model, and all that is read with the checksums of
            torch's zip format; data without a checksum is a note in the report. `"copied"` leaves out the bytes that the file shares with
            the sources on disk, and loads the model on `"meta"`, without values. `"none"` compares nothing.
        device: where the model is loaded: `"cpu"` (the default), `"cuda:0"`, `"mps"`; `"meta"` compares names, dtypes and shapes, and no
            values.
        finite: NaN and infinite values are errors; needs torch.
        note: called with each note, a line of text; notes are dropped by default.
        progress: called with a `Progress`, how far the work is, at most ten times a second; what it raises stops the run, and nothing is
            left half done.

    Returns:
        A `Report`, as `merge` returns it.

    Raises:
        StaleError: a source or the target is not what it was when the plan was made.
        PlanError: the plan is of another version, does not add up, or leaves a layout open.
        CheckpointError: as `merge`.

    >>> decided = plan("fixtures/net_params.pkl", "fixtures/variants.py:NetTwoClasses")
    >>> apply(decided, "applied.safetensors", overwrite=True).coverage.counts
    (8, 10)
    """
    writing = collect(OutputOptions, locals())
    from ckptsurgeon.api._writing import carry_out, refuse_idle_writing, refuse_output

    decided = plan if isinstance(plan, Plan) else load_plan(plan)
    refuse_output(writing, decided.max_shard_size)
    _gates.refuse_open(decided, None if isinstance(plan, Plan) else os.fspath(plan))
    schemes = [scheme for step in decided.steps for scheme in step.schemes]
    if not isinstance(plan, Plan):
        note = _opening.unmissable(note)
        target_code = [decided.target.spec] if decided.target is not None and _opening.is_code(decided.target.spec) else []
        say_code(os.fspath(plan), [*target_code, *own_code(decided.own_adapters, schemes)], note)
    refuse_idle_writing(decided, writing)
    checkpoints = [_opening.open_source(source.path, root=source.root) for source in decided.sources]
    path = None if isinstance(plan, Plan) else os.fspath(plan)
    with hinting(decided, path):
        planfile.check_sources(decided, checkpoints)  # before the target's module is imported
        check_data(decided, checkpoints, None)
    opened_target = None if decided.target is None else _opening.open_planned(decided.target, note)
    if opened_target is not None and opened_target.build is not None and (decided.needs_model or writing.verify):
        opened_target = _opening.as_built(opened_target, decided.seed, note)
    with hinting(decided, path):
        planfile.check_followable(decided, checkpoints, None if opened_target is None else opened_target.checkpoint)
        if opened_target is not None:
            check_data(replace(decided, sources=()), (), opened_target.checkpoint)
    _, own = load_own(decided.own_adapters, schemes, note)
    return carry_out(decided, checkpoints, opened_target, writing, own)
