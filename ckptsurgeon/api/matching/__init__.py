"""The verb that matches two implementations. It reads headers; torch is imported only for a model as target, or to compare values."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial

from ckptsurgeon.api import _opening
from ckptsurgeon.api._deciding import numbers_of
from ckptsurgeon.api._opening import Target, silent
from ckptsurgeon.api._options import RuleOptions, collect, facts, refuse_idle
from ckptsurgeon.api._rules import Rules, gather, refuse_unused
from ckptsurgeon.errors import PlanError
from ckptsurgeon.matching.evidence.value_evidence import judged
from ckptsurgeon.matching.layouts.choices import ALL
from ckptsurgeon.matching.proposals.advise import with_sizes
from ckptsurgeon.matching.proposals.propose import Judge, Proposal, propose
from ckptsurgeon.parameter_types import Given, Note, OnProgress, Renames, Words
from ckptsurgeon.progress import phase
from ckptsurgeon.tensors import Checkpoint

TOLERANCE = 1e-4  # of the greatest output


def match(
    source: Given,
    target: Given,
    *,
    root: str | None = None,
    rename: Renames = (),
    drop: Iterable[str] = (),
    keep: Iterable[str] = (),
    adapt: Renames = (),
    rules: Rules = (),
    reverse: bool = False,
    conversions: bool = True,
    accept_uncertain: bool = False,
    layout: Words | None = None,
    numbers: Mapping[str, int] | None = None,
    values: bool = False,
    forward: str | None = None,
    source_model: Given | None = None,
    tolerance: float | None = None,
    note: Note = silent,
    progress: OnProgress | None = None,
) -> Proposal:
    """Find the mapping between two implementations of one architecture from what their headers say: names, shapes, numbers and order.

    The keys that your rules name are not looked for.

    Args:
        source: a path or a `Checkpoint`.
        target: a model, a spec such as `"module:Net"`, a skeleton or a checkpoint.
        root: the nested dict that holds the state_dict, such as `"model"` or `"ema"`, where there are several.
        rename: new names for source keys, from pattern to result: `{"fc2.{p}": "dense2.{p}"}`.
        drop: patterns of source keys to leave out.
        keep: patterns of target keys that keep the target's own values.
        adapt: adapters for tensors whose shape must change, by pattern: `{"pos_embed": "interpolate"}`.
        rules: rules files (TOML) or `Rule`s; they come after the rules of the other arguments.
        reverse: use the rules files in the other direction: from the names of their targets to those of their sources.
        conversions: `False` takes names as they are where the target is a model of transformers, whose own loading renames keys, and cuts,
            joins or turns tensors.
        accept_uncertain: use the uncertain links of matching too.
        layout: `"as-is"` takes links whose layout is in doubt as they stand, patterns of target keys those that they match.
        numbers: for variables in adapters' arguments, by name: `{"heads": 32}`, as `permute_rope(heads=heads)` needs.
        values: look at the values too (torch): they tell a norm's weight from a bias, and never q from k from v. A model as the target has
            only what its constructor gives.
        forward: `"module:make_inputs"`, a function of yours: both models get what it returns (an argument, a tuple of them, a dict by name,
            or `{"source": …, "target": …}`), and their outputs are compared: `found.forward`. The target must be a model.
        source_model: for `forward`: the model that the checkpoint is of, or its spec.
        tolerance: for `forward`: by how much of their greatest value outputs may differ; 1e-4 by default.
        note: called with each note, a line of text; notes are dropped by default.
        progress: called with a `Progress`, how far the work is, at most ten times a second; what it raises stops the run, and nothing is
            left half done.

    Returns:
        A `Proposal`: links with their evidence and margin, `rules` to hand to `plan`, `merge` or `transfer`, in `toml` the same as the text
        of a rules file, and `refusal()`, None where the links are worth following. Printed, it is the command line's table.

    Raises:
        CheckpointError: one of them can't be read or built.
        RuleError: rules that can't be followed.

    >>> found = match("fixtures/net_params.pkl", "fixtures/variants.py:NetRenamed")
    >>> [(rule.pattern, rule.result) for rule in found.rules]
    [('fc2.{p}', 'dense2.{p}')]
    """
    options = collect(RuleOptions, {**locals(), "match": True})
    opened = _opening.look(source)
    ruling = gather(options, schemes=False, note=note)
    if (forward is None) != (source_model is None):
        raise PlanError("compares two models, and needs both", hint="source_model='module:Net', forward='module:make_inputs'")
    refuse_idle(facts(forward=forward), tolerance=tolerance)
    tolerance = TOLERANCE if tolerance is None else tolerance
    if not 0 <= tolerance < 1:
        raise PlanError(f"{tolerance} is no share that outputs may differ by", hint="tolerance=1e-4")
    opened_target = _opening.open_target(target, conversions=conversions, note=note)
    source_checkpoint = _opening.open_source(opened, root=root, target=opened_target.checkpoint)
    judge = _judge(source_checkpoint, opened_target, note) if values else None
    with phase("matching", len(opened_target.checkpoint), "tensors"):
        proposal = propose(
            source_checkpoint,
            opened_target.checkpoint,
            ruling.rules,
            ruling.outside,
            accept=accept_uncertain,
            judge=judge,
            layout=tuple(options.layout or ()),
            numbers=options.numbers or {},
            target_numbers=opened_target.any_model and partial(numbers_of, opened_target.any_model),
        )
        refuse_unused([name for name in ruling.unused if name not in proposal.numbers_used])
        proposal = with_sizes(proposal, source_checkpoint, opened_target.checkpoint, ruling.outside)
    layouts = (("layout", "as-is" if pattern == ALL else f"as-is={pattern}") for pattern in options.layout or ())
    more = {
        "accept-uncertain": accept_uncertain,
        "values": values,
        "source-model": isinstance(source_model, str) and source_model,
        "forward": forward,
        "tolerance": tolerance != TOLERANCE and f"{tolerance:g}",
    }
    proposal = replace(
        proposal,
        output=_opening.unused_name(source_checkpoint, opened_target.checkpoint),
        spelled=proposal.spelled or values,
        asked=(*ruling.options, *layouts, *((name, given) if isinstance(given, str) else (name,) for name, given in more.items() if given)),
    )
    if forward is not None and source_model is not None:
        from ckptsurgeon.api.matching.trying import tried

        opened_source_model = _opening.open_target(source_model, note=note)
        proposal = tried(proposal, source_checkpoint, opened_target, opened_source_model, forward, tolerance, note, conversions)
    return proposal


def _judge(source: Checkpoint, target: Target, note: Note) -> Judge:
    """A function that judges links by the values on both sides. Raises PlanError if a side has no values."""
    if source.kind == "skeleton" or (target.build is None and target.checkpoint.kind == "skeleton"):
        skeleton = source if source.kind == "skeleton" else target.checkpoint
        raise PlanError("is a skeleton and has no values to look at", path=skeleton.path, hint="give a checkpoint, or the model itself")
    from ckptsurgeon.streaming import statistics

    of_target = partial(statistics.of_file, target.checkpoint)
    if target.build is not None:
        from ckptsurgeon.models.target.skeleton import state_dict_of

        note(f"the values of {target.checkpoint.path} are its constructor's, and tell only how it is initialised")
        state = state_dict_of(target.build(0), target.checkpoint.path)
        of_target = partial(statistics.of_tensors, state)
    initialized = target.build is not None
    return lambda proposal: judged(proposal, source, target.checkpoint, partial(statistics.of_file, source), of_target, fresh=initialized)
