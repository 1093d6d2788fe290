"""The verb that compares the names and shapes of two sides: diff. It writes nothing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from ckptsurgeon.api import _opening
from ckptsurgeon.api._opening import silent, unused_name
from ckptsurgeon.api._options import RuleOptions, collect
from ckptsurgeon.api._rules import Rules, gather
from ckptsurgeon.formats.folders.hf_shards import shard_in_words
from ckptsurgeon.formats.sniff import no_collections
from ckptsurgeon.parameter_types import Given, Note, OnProgress, Renames
from ckptsurgeon.planning.diff import Diff, compare


def diff(
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
    auto: str | None = None,
    conversions: bool = True,
    numbers: Mapping[str, int] | None = None,
    note: Note = silent,
    progress: OnProgress | None = None,
) -> Diff:
    """What of `target` does `source` cover: matched, missing, extra and mismatched keys, after wrapper prefixes and rules.

    Args:
        source: a path, an `io.BytesIO` or a `Checkpoint`.
        target: a model, a spec such as `"module:Net"`, a skeleton or a checkpoint.
        root: the nested dict that holds the state_dict, such as `"model"` or `"ema"`, where there are several.
        rename: new names for source keys, from pattern to result: `{"fc2.{p}": "dense2.{p}"}`.
        drop: patterns of source keys to leave out.
        keep: patterns of target keys that keep the target's own values.
        adapt: adapters for tensors whose shape must change, by pattern: `{"pos_embed": "interpolate"}`.
        rules: rules files (TOML) or `Rule`s; they come after the rules of the other arguments.
        reverse: use the rules files in the other direction: from the names of their targets to those of their sources.
        auto: `"safe"` applies adapters and repairs that can't change what a tensor means.
        conversions: `False` takes names as they are where the target is a model of transformers, whose own loading renames keys, and cuts,
            joins or turns tensors.
        numbers: for variables in adapters' arguments, by name: `{"heads": 32}`, as `permute_rope(heads=heads)` needs.
        note: called with each note, a line of text; notes are dropped by default.
        progress: called with a `Progress`, how far the work is, at most ten times a second; what it raises stops the run, and nothing is
            left half done.

    Returns:
        A `Diff`; printed, it is the command line's table.

    Raises:
        CheckpointError: one of them can't be read or built.
        RuleError: rules that match nothing or collide.

    >>> diff("fixtures/net_params.pkl", "fixtures/variants.py:NetTwoClasses").coverage.counts
    (8, 10)
    """
    options = collect(RuleOptions, locals())
    opened = _opening.look(source)
    ruling = gather(options, schemes=False, note=note)
    opened_target = _opening.open_target(target, conversions=conversions, note=note)
    target_checkpoint = opened_target.checkpoint
    source_checkpoint = _opening.open_source(opened, root=root, target=target_checkpoint)
    for side in (source_checkpoint, target_checkpoint):
        if side.shard is not None:
            note(f"{side.path} {shard_in_words(side.shard)}")
        for words in side.notes:
            note(f"{side.path}: {words}")
    if opened_target.any_model is not None:
        from ckptsurgeon.api._own_loading import learned

        ruling = learned([source_checkpoint], target_checkpoint, opened_target.any_model, ruling, auto=auto)
    with no_collections():
        result = compare(source_checkpoint, target_checkpoint, ruling.rules, ruling.outside, auto)
        if result.mismatched or (result.missing and (result.extra or target_checkpoint.kind == "skeleton")):
            from ckptsurgeon.matching.proposals.advise import advise
            from ckptsurgeon.progress import phase

            with phase("matching", len(target_checkpoint), "tensors"):
                result = replace(result, advice=advise(result, source_checkpoint, target_checkpoint, ruling.rules, ruling.outside, auto))
        if result.missing and result.extra:
            from ckptsurgeon.matching.proposals.renamed_heads import renamed_heads

            result = replace(result, heads=renamed_heads(result, source_checkpoint, target_checkpoint))
    return replace(
        result, options=(*ruling.options, *([("auto", auto)] if auto else [])), output=unused_name(source_checkpoint, target_checkpoint)
    )
