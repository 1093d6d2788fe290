"""The text of `plan`, which `merge --dry-run` prints too."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from ckptsurgeon.planning.plan import Plan, Step
from ckptsurgeon.sizes import exact
from ckptsurgeon.views.text.words import coverage as coverage_words
from ckptsurgeon.views.text.words import findings, fitted, folded, heading, keys, listing, most_rows, name, places, shape, table

WORDS = {"copy": "copy", "rename": "rename", "adapt": "adapt", "load": "load", "init": "initialise", "keep": "keep"}


def plan(plan: Plan, verbose: bool = False, width: int | None = None) -> str:
    """What each key gets, by action and reason, the dropped keys, and a summary line; with `verbose` a row for every key."""
    most = most_rows(verbose)
    target = f" → {name(plan.target.spec)}" if plan.target is not None else ""
    lines = [f"{name(' + '.join(source.path for source in plan.sources))}{target}"]
    for number, source in enumerate(plan.sources):
        words = [f"root {source.root}"] if source.root else []
        words += [f"{word} {listing(value) if isinstance(value, list) else value}" for word, value in source.prefix.items() if value]
        if words:
            lines.append(f"  {f'source {number}: ' if len(plan.sources) > 1 else ''}{name(', '.join(words))}")
    if verbose:
        lines += table([_row(step) for step in plan.steps], width, None)
    else:
        for action, word in WORDS.items():
            lines += _action(word, [step for step in plan.steps if step.action == action], width)
    lines += _dropped(plan, width, most)
    if plan.left_behind:
        lines.append(f"  left behind: {places(plan.left_behind, verbose)}")
    shown = [finding for finding in plan.findings if finding.code != "prefix"]  # the prefix is shown above
    return fitted([*lines, *findings(shown, verbose, width), summary(plan)], width)


def _reason(step: Step) -> str:
    return step.reason if step.cast is None else f"{step.reason}; cast to {step.cast}"


def _row(step: Step) -> tuple[str, ...]:
    return step.target, step.action, step.dtype, shape(step.shape), _reason(step)


def _action(word: str, steps: Sequence[Step], width: int | None) -> list[str]:
    """A heading for each reason that several keys share, and one for the keys that each have their own."""
    by_reason: dict[str, list[str]] = {}
    for step in steps:
        by_reason.setdefault(_reason(step), []).append(step.target)
    single = sum(len(named) == 1 for named in by_reason.values())
    lines = []
    for reason, named in by_reason.items():
        if len(named) > 1 or single <= 1:
            lines += [heading(word, len(named), name(reason)), *keys(named, width, under=word)]
    apart = [(named[0], reason) for reason, named in by_reason.items() if len(named) == 1 < single]
    return [*lines, heading(word, len(apart), "each for its own reason"), *table(apart, width, under=word)] if apart else lines


def _dropped(plan: Plan, width: int | None, most: int | None) -> list[str]:
    if not plan.dropped:
        return []
    return [
        heading("drop", len(plan.dropped), "of the source"),
        *folded([(row.source, (row.reason,)) for row in plan.dropped], width, most, "drop"),
    ]


def summary(plan: Plan) -> str:
    """The plan in one line."""
    counts = Counter(step.action for step in plan.steps)
    words = [f"{counts[action]} to {word}" for action, word in WORDS.items() if counts[action]]  # type: ignore[index]
    words += [f"{len(plan.dropped)} to drop"] if plan.dropped else []
    shards = f" Shards of at most {exact(plan.max_shard_size)}." if plan.max_shard_size else ""
    return f"Plan: {', '.join(words) or 'nothing to do'}. Coverage {coverage_words(plan.coverage)}.{shards}"
