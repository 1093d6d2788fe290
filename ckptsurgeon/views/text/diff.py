"""The text of `diff`, and the command that follows it."""

from __future__ import annotations

from collections.abc import Sequence

from ckptsurgeon.command import Command, InMemory, Option, at_root
from ckptsurgeon.planning.diff import Diff, Hint, Offer
from ckptsurgeon.planning.plan_findings import OTHER_TARGET
from ckptsurgeon.planning.prefixes.rivals import Way
from ckptsurgeon.views.text.words import (
    chain,
    count,
    fitted,
    folded,
    heading,
    keys,
    listing,
    most_rows,
    name,
    next_step,
    quantised,
    shape,
    table,
)
from ckptsurgeon.views.text.words import coverage as coverage_words

OFFERS = 6  # rows of adapters that would fit
RENAMES = 4  # likely renames that the next command takes in


def diff(found: Diff, verbose: bool = False, width: int | None = None) -> str:
    """What matches, what does not and why, coverage, and the command to run next."""
    most = most_rows(verbose)
    root = f" (root {name(found.root)})" if found.root else ""
    lines = [f"{name(found.source)}{root} → {name(found.target)}"]
    if found.prefix:
        lines.append(f"  {name(found.prefix)}")
    lines.append(heading("matched", len(found.matched)))
    if verbose:
        lines += keys(found.matched, width, None)
    if found.adapted:
        lines.append(heading("adapted", len(found.adapted), "of those that match, by rules"))
        lines += folded([(row.key, (chain(row.ops),)) for row in found.adapted], width, most)
    lines.append(heading("mismatched", len(found.mismatched), "in both, with another shape: source → target"))
    lines += folded([(row.key, (shape(row.source_shape), "→", shape(row.target_shape))) for row in found.mismatched], width, most)
    lines.append(heading("missing", len(found.missing), "only in the target"))
    lines += keys(found.missing, width, most)
    lines.append(heading("extra", len(found.extra), "only in the source"))
    lines += keys(found.extra, width, most)
    if found.dropped:
        lines += [heading("dropped", len(found.dropped), "by a rule"), *keys(found.dropped, width, most)]
    if found.loaded:
        lines.append(heading("loaded", len(found.loaded), "by the model's own loading code, under names that it takes"))
        lines += folded([(row.key, (row.words,)) for row in found.loaded], width, most)
    if found.dtype_changed:
        lines.append(heading("other dtype", len(found.dtype_changed), "matched; cast when merged"))
        lines += folded([(row.key, (row.source_dtype, "→", row.target_dtype)) for row in found.dtype_changed], width, most)
    lines += [*quantised(found.quantised), *quantised(found.target_quantised, " in the target")]
    if found.refused:
        lines.append(heading("refused", len(found.refused), "not told without running the file; leave out with --drop"))
        lines += table(list(found.refused.items()), width, most)
    lines += [f"  warning: {name(words)}" for words in found.warnings]
    done, total = found.coverage.counts
    lines.append(f"Coverage {coverage_words(found.coverage)} ({done} of {count(total, 'tensor')}).")
    return fitted([*lines, *_next(found, width)], width)


def _next(found: Diff, width: int | None) -> list[str]:
    if not all(row.planned for row in found.loaded):
        return [
            "What the model's own loading code computes is in no file: load it by torch once, save model.state_dict(), and take that file."
        ]
    renames = rename_hints(found.hints)
    lines = []
    root = at_root(found.root)
    if found.rivals or len(found.exchanges) > 1:
        command = Command("diff", found.source, found.target, options=(*root, *found.options))
        return choices(found.rivals or found.exchanges, command, found.in_memory, width)
    if found.exchanges:
        lines.append(f"Likely another prefix, never exchanged unasked: {name(found.exchanges[0].words)}")
    if renames:
        shown = "; ".join(f"{name(one)} → {name(other)}" for one, other in renames[:RENAMES])
        more = len(renames) - RENAMES
        lines.append(f"Likely renamed: {shown}{f' and {more} more' if more > 0 else ''}")
    if found.likely:
        from ckptsurgeon.matching.rules_from_links import to_toml

        sure = [link for link in found.likely if link.certain] or found.likely
        lines += [
            "Probably the same under other names:",
            *table([(to_toml.arrow(one.rule),) for one in to_toml.sketched(sure)], width, OFFERS),
        ]
        lines += next_step("Try:", Command("match", found.source, found.target, options=root), found.in_memory, width)
    if found.offers:
        rows = [
            (offer.key, (shape(offer.source_shape), "fits by", offer.adapter, "to", shape(offer.target_shape))) for offer in found.offers
        ]
        lines += ["Would fit by an adapter, if you ask for it (--adapt KEY OP):", *folded(rows, width, OFFERS)]
    apart = [one for one in found.quantised if one.whole and one.key in found.parted_codes]
    if apart:
        words = f"{count(len(apart), 'weight')} as {apart[0].scheme} would be cast without them"
        return [*lines, f"{words}: give the whole checkpoint, {name(apart[0].whole)}, then diff again."]
    unread = [one for one in found.quantised if one.op is None and one.key in found.parted_codes]
    if unread:
        words = (
            f"{count(len(unread), 'weight')} as {unread[0].scheme} would be cast or lose their scales, and no values are made of them here"
        )
        return [*lines, f"{words}: dequantize by the library that wrote {name(found.source)}, then diff again."]
    if found.unkept:
        return [*lines, no_merge(found.target, found.unkept)]
    if found.matched or renames or found.offers or found.exchanges:
        return [*lines, *next_step("Next:", next_command(found, renames), found.in_memory, width)]
    look = Command("inspect", found.source, options=root)
    return [*lines, *(next_step("Nothing fits. See its keys:", look, (found.in_memory[0], ""), width) or ["Nothing fits."])]


def choices(ways: Sequence[Way], command: Command, live: InMemory, width: int | None) -> list[str]:
    """Changes of names between which nothing decides, each with the command that chooses it."""
    lines = ["The names fit in more than one way, and none is chosen unasked:"] if len(ways) > 1 else ["The names fit by a prefix:"]
    for way in ways:
        lines.append(f"  {name(way.words)}: {count(len(way.mapping), 'tensor')}")
        if way.rules:
            lines += next_step("  Choose it:", command.having(*way.options), live, width)
        else:
            lines.append("  No few rules choose it: it takes a --rename or a --drop for each key.")
    return lines


def no_merge(target: str, unkept: Sequence[str]) -> str:
    """What is said in place of a merge where a target file has values that can't be kept."""
    return f"No merge can keep {listing(unkept, 4)} of {name(target)}: {OTHER_TARGET}."


def rename_hints(hints: Sequence[Hint]) -> list[tuple[str, str]]:
    """Hints as renames, of whole modules where a key has one.

    >>> rename_hints([Hint("dense2.weight", "fc2.weight"), Hint("dense2.bias", "fc2.bias"), Hint("scale", "gain")])
    [('fc2.{p}', 'dense2.{p}'), ('gain', 'scale')]
    """
    return list(dict.fromkeys(_renamed(hint.extra, hint.missing) for hint in hints))


def adapter_hints(offers: Sequence[Offer]) -> list[tuple[str, str]]:
    """The adapters of keys that only one adapter would make fit.

    >>> adapter_hints([Offer("w", (2, 3), (3, 2), "transpose")])
    [('w', 'transpose')]
    """
    by_key: dict[str, list[str]] = {}
    for offer in offers:
        by_key.setdefault(offer.key, []).append(offer.adapter)
    return [(key, adapters[0]) for key, adapters in by_key.items() if len(adapters) == 1]


def _renamed(extra: str, missing: str) -> tuple[str, str]:
    one, other = extra.rpartition("."), missing.rpartition(".")
    whole = one[0] and other[0] and one[2] == other[2]
    return (f"{one[0]}.{{p}}", f"{other[0]}.{{p}}") if whole else (extra, missing)


def next_command(found: Diff, renames: Sequence[tuple[str, str]] = ()) -> Command:
    """The command that follows a diff: `verify` where the file fits as it is, else `merge`."""
    root = at_root(found.root)
    if found.same and not (found.dropped or found.options or found.prefix):
        return Command("verify", found.source, found.target, options=root)
    options: list[Option] = [*root, *([("dequantize",)] if found.parted_codes else []), *found.options]
    options += [("drop", found.prefix.bare(key)) for key in found.refused]
    options += [option for way in found.exchanges[:1] for option in way.options]
    options += [("rename", one, other) for one, other in renames[:RENAMES]]
    options += [("adapt", key, adapter) for key, adapter in adapter_hints(found.offers)[:OFFERS]]
    return Command("merge", found.source, found.target, "merged.pt", tuple(options))
