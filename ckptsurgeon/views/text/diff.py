"""The text of `diff`, and the command to run next."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence

from ckptsurgeon.command import Command, InMemory, as_words, at_root
from ckptsurgeon.errors import pasteable
from ckptsurgeon.planning.diff import Diff, Resize
from ckptsurgeon.planning.prefixes.rivals import NameChange
from ckptsurgeon.rules.rules import rule_options
from ckptsurgeon.shown import styled
from ckptsurgeon.sizes import percent
from ckptsurgeon.views.folding import fold, fold_keys
from ckptsurgeon.views.text.words import (
    cells_of,
    chain,
    count,
    cut,
    fitted,
    folded,
    heading,
    keys,
    level_line,
    listing,
    most_rows,
    name,
    next_step,
    quantised,
    right_aligned,
    shape,
    table,
)
from ckptsurgeon.views.text.words import coverage as coverage_words

ROWS = 40  # modules that are shown
OFFERS = 6  # rules that are shown
OPEN = 3  # keys that stay open and are named


def diff(
    diff: Diff, verbose: bool = False, width: int | None = None, only: Sequence[str] = (), stat: bool = False, name_status: bool = False
) -> str:
    """What matches, what does not and why, coverage, and the command to run next.

    Args:
        diff: a diff.
        verbose: a row for every key.
        width: the terminal's, in columns.
        only: the categories to show; if empty, all of them and the command to run next.
        stat: show the numbers of each module's keys instead.
        name_status: show a letter and a key on each line instead.
    """
    if name_status:
        from ckptsurgeon.views.counted import lettered

        return "\n".join(f"{letter}\t{name(key)}" for letter, key in lettered(diff, only, verbose))
    root = f" (root {name(diff.root)})" if diff.root else ""
    lines = [f"{name(diff.source)}{root} → {name(diff.target)}"]
    if diff.prefix:
        lines.append(f"  {name(diff.prefix)}")
    if diff.conversions.library:
        lines.append(f"  {diff.conversions.words}")
    done, total = diff.coverage.counts
    last = f"Coverage {coverage_words(diff.coverage)} ({done:,} of {count(total, 'tensor')})."
    if stat:
        return fitted([*lines, *_stat(diff, width, most_rows(verbose)), last], width)
    shown: tuple[str, ...] = ()
    if only:
        from ckptsurgeon.views.counted import categories

        shown = categories(only)
    for word, rows in _sections(diff, verbose, width, bool(only)):
        lines += rows if not only or word in shown else []
    if only:
        return fitted([*lines, last], width)
    lines += [level_line("warning", name(words)) for words in diff.warnings]
    return fitted([*lines, last, *_next(diff, width)], width)


def _stat(diff: Diff, width: int | None, most: int | None) -> list[str]:
    """A row for each module, a column for each category that has a key."""
    from ckptsurgeon.views.counted import COUNTED, counted

    modules = counted(diff)
    totals = [sum(row.numbers[at] for row in modules) for at in range(len(COUNTED))]
    columns = [at for at, total in enumerate(totals) if total]
    rows = [["module", *(COUNTED[at] for at in columns)]]
    rows += [[name(row.path), *(f"{row.numbers[at]:,}" if row.numbers[at] else "" for at in columns)] for row in modules]
    rows.append(["all", *(f"{totals[at]:,}" for at in columns)])
    if width is not None and max(map(len, right_aligned(rows))) > width:
        rows[0] = ["module", *({"mismatched": "other", "matched": "same"}.get(COUNTED[at], COUNTED[at]) for at in columns)]
    lines = right_aligned(rows)
    if width is not None and max(map(len, lines)) > width:  # a line of words for each module
        sentences = (
            f"    {row[0]}: {', '.join(f'{number} {COUNTED[at]}' for number, at in zip(row[1:], columns, strict=True) if number)}"
            for row in rows[1:]
        )
        return cut([*sentences], None if most is None else ROWS)
    return [styled(lines[0], "faint", 4), *cut(lines[1:-1], None if most is None else ROWS), lines[-1]]


def _sections(diff: Diff, verbose: bool, width: int | None, listed: bool) -> Iterator[tuple[str, list[str]]]:
    """The lines of each category; `listed` also lists the matched keys."""
    most = most_rows(verbose)
    matched = keys(diff.matched, width, most, "matched") if verbose or listed else []
    yield "matched", [heading("matched", len(diff.matched)), *matched]
    if diff.adapted:
        yield (
            "matched",
            [
                heading("adapted", len(diff.adapted), "of those that match, by rules"),
                *folded([(row.key, (chain(row.ops),)) for row in diff.adapted], width, most),
            ],
        )
    reshaped = [(row.key, (shape(row.source_shape), "→", shape(row.target_shape))) for row in diff.mismatched]
    words = "in both, with another shape: source → target"
    yield "mismatched", [heading("mismatched", len(diff.mismatched), words), *folded(reshaped, width, most, "mismatched")]
    rows = _with_shapes("missing", diff.missing, diff.missing_shapes, width, most)
    yield "missing", [heading("missing", len(diff.missing), "only in the target"), *rows]
    rows = _with_shapes("extra", diff.extra, diff.extra_shapes, width, most)
    heads = [
        (f"{head.source} {shape(head.source_shape)}", "→", f"{head.target} {shape(head.target_shape)}: {head.words}") for head in diff.heads
    ]
    yield "extra", [heading("extra", len(diff.extra), "only in the source"), *rows]
    if heads:
        yield "extra", [heading("other heads", len(heads), "under other names"), *table(heads, width, most)]
    if diff.dropped:
        yield "dropped", [heading("dropped", len(diff.dropped), "by a rule"), *keys(diff.dropped, width, most, "dropped")]
    if diff.loaded:
        rows = folded([(row.key, (row.words,)) for row in diff.loaded], width, most)
        yield "loaded", [heading("loaded", len(diff.loaded), "by the model's own loading code, under names that it takes"), *rows]
    if diff.conversions.refused:
        rows = folded([(key, (words,)) for (_, key), words in diff.conversions.refused.items()], width, most, "not converted")
        yield "not converted", [heading("not converted", len(diff.conversions.refused), "by operations that are not done here"), *rows]
    if diff.dtype_changed:
        changed = [(row.key, (row.source_dtype, "→", row.target_dtype)) for row in diff.dtype_changed]
        rows = folded(changed, width, most, "other dtype")
        yield "dtype", [heading("other dtype", len(diff.dtype_changed), "matched; cast when merged"), *rows]
    yield "quantised", [*quantised(diff.quantised), *quantised(diff.target_quantised, " in the target")]
    if diff.refused:
        rows = table(list(diff.refused.items()), width, most, "refused")
        yield "refused", [heading("refused", len(diff.refused), "not told without running the file; leave out with --drop"), *rows]


def _with_shapes(under: str, names: Sequence[str], shapes: Mapping[str, Sequence[int]], width: int | None, most: int | None) -> list[str]:
    """Keys with their shapes, one a line with `most` None; else folded where the shapes are equal, and by their names alone where that is
    needed to show them all."""
    rows = [(key, (shape(shapes[key]) if key in shapes else "",)) for key in names]
    if most is None:
        return table([(key, *cells) for key, cells in rows], width, None, under)
    lines = fold(rows, lambda _shape: ())
    return table(cells_of(lines), width, most, under) if len(lines) <= most else keys(names, width, most, under)


def _next(diff: Diff, width: int | None) -> list[str]:
    if not all(row.planned for row in diff.loaded):
        return [
            "What the model's own loading code computes is in no file: load it by torch once, save model.state_dict(), and take that file."
        ]
    advice, root = diff.advice, at_root(diff.root)
    if diff.rivals or len(diff.exchanges) > 1:
        command = Command("diff", diff.source, diff.target, options=(*root, *diff.options))
        return choices(diff.rivals or diff.exchanges, command, diff.in_memory, width)
    lines = [*_links(diff, width), *resized(advice.sizes, width), *_cut(diff)]
    apart = [weight for weight in diff.quantised if weight.whole and weight.key in diff.parted_codes]
    if apart:
        words = f"{count(len(apart), 'weight')} as {apart[0].scheme} would be cast without them"
        return [*lines, f"{words}: give the whole checkpoint, {name(apart[0].whole)}, then diff again."]
    unread = [weight for weight in diff.quantised if weight.op is None and weight.key in diff.parted_codes]
    if unread:
        words = (
            f"{count(len(unread), 'weight')} as {unread[0].scheme} would be cast or lose their scales, and no values are made of them here"
        )
        return [*lines, f"{words}: dequantize by the library that wrote {name(diff.source)}, then diff again."]
    if diff.unkept:
        return [*lines, no_merge(diff.target, diff.unkept)]
    following = diff.next_command
    if following is not None:
        return [*lines, *_reaches(diff), *next_step("Next:", following, diff.in_memory, width)]
    look = Command("inspect", diff.source, options=root)
    return [*lines, *(next_step("Nothing fits. See its keys:", look, (diff.in_memory[0], ""), width) or ["Nothing fits."])]


def _cut(diff: Diff) -> Iterator[str]:
    """A sentence for each numbered list of layers of which one side has only the first, so that dropped layers are noticed."""
    advice = diff.advice
    links = [link for link in advice.links if link.certain] if advice.carried or advice.match else []
    sources, targets = {key for link in links for key in link.sources}, {key for link in links for key in link.targets}
    extra = _numbers(diff.prefix.added + diff.prefix.bare(key) for key in diff.extra if key not in sources)
    missing = _numbers(key for key in diff.missing if key not in targets)
    if extra.keys() == missing.keys():  # the matched keys may be a million
        return
    shared = _numbers([*diff.matched, *(diff.prefix.added + diff.prefix.bare(key) for key in sources), *targets])
    for head, beyond in extra.items():
        if head not in missing and (kept := _first(shared.get(head), beyond)):
            yield f"{name(head)}: the first {kept} of {kept + len(beyond)} are kept."
    for head, beyond in missing.items():
        if head not in extra and (present := _first(shared.get(head), beyond)):
            yield f"{name(head)}: the first {present} of {present + len(beyond)} come from the source."


def _first(some: set[int] | None, beyond: set[int]) -> int:
    """The length of `some` if it is 0, 1, … and `beyond` continues it; else 0."""
    count = len(some) if some else 0
    return count if some == set(range(count)) and beyond == set(range(count, count + len(beyond))) else 0


def _numbers(keys: Iterable[str]) -> dict[str, set[int]]:
    """For each list's name, the numbers of its keys; only the first number of a key is used.

    >>> _numbers(["h.0.w", "h.1.w", "ln.w"])
    {'h': {0, 1}}
    """
    numbers: dict[str, set[int]] = {}
    for key in keys:
        segments = key.split(".")
        index = next((index for index, segment in enumerate(segments) if index and segment.isascii() and segment.isdigit()), None)
        if index is not None and len(segments[index]) < 7:
            numbers.setdefault(".".join(segments[:index]), set()).add(int(segments[index]))
    return numbers


def _links(diff: Diff, width: int | None) -> list[str]:
    """The keys that probably have other names: the rules in the next command, and how many keys are left open."""
    advice = diff.advice
    if advice.skipped:
        look = Command("match", diff.source, diff.target, "rules.toml", (*at_root(diff.root), *diff.options))
        words = "There are too many names to match them here."
        return [words, *next_step("Try:", look, diff.in_memory, width)]
    if not advice.links and not advice.carried:
        return []
    from ckptsurgeon.matching.rules_from_links import to_toml

    lines = []
    shown = [(to_toml.arrow(rule),) for rule in advice.carried if rule.kind in ("rename", "adapt")]
    if shown:
        lines += ["Probably the same under other names:", *table(shown, width, OFFERS)]
    missing = set(diff.missing)
    left = [link for link in advice.uncertain if not missing.isdisjoint(link.targets)]
    if left:
        doubts = sum(len(link.targets) for link in left if link.doubt)
        rest = sum(len(link.targets) for link in left) - doubts
        parts = [f"{count(rest, 'tensor')} of unclear origin"] if rest else []
        parts += [f"{count(doubts, 'tensor')} whose keys are clear and whose layout is not"] if doubts else []
        lines.append(f"Left open: {', '.join(parts)}.")
    if left or advice.match:  # match shows the evidence
        look = Command("match", diff.source, diff.target, options=(*at_root(diff.root), *diff.options))
        lines += next_step("Try:", look, diff.in_memory, width)
    return lines


def _reaches(diff: Diff) -> list[str]:
    """The coverage of the next command, and the keys that stay open."""
    reaches, shapes = diff.advice.reaches, {row.key: row for row in diff.mismatched}
    if reaches is None:
        return []
    done, total = reaches.counts
    sizes = {offer.key: offer for resize in diff.advice.sizes for offer in resize.offers}

    def sized_keys(keys: Sequence[str]) -> list[str]:
        rows = [(key, sizes.get(key) or shapes.get(key)) for key in keys]
        sized = fold((key, f"{shape(row.source_shape)} → {shape(row.target_shape)}") for key, row in rows if row is not None)
        return [*(f"{row.key} {row.common}" for row in sized), *fold_keys(key for key, row in rows if row is None)]

    lists = (("partly open", sized_keys(diff.advice.partly)), ("open", sized_keys(diff.advice.open)))
    rest = "".join(f"; {words}: {listing(left, OPEN)}" for words, left in lists if left)
    return [f"→ {done:,} of {count(total, 'tensor')}, {percent(reaches.elements)} of elements{rest}"]


def resized(sizes: Sequence[Resize], width: int | None) -> list[str]:
    """The keys of another size, with the rules that make them fit."""
    if not sizes:
        return []
    lines = ["Another size:"]
    for resize in sizes:
        keys_ = listing(fold_keys(offer.key for offer in resize.offers), 2)
        line, how = f"    {keys_}: {name(resize.role)}", pasteable(shlex.join(as_words(rule_options(resize.rules))))
        if how and width is not None and len(line) + len(how) + 10 > width:
            lines += [f"{line};", f"        fits by {how}"]
        else:
            lines.append(f"{line}; fits by {how}" if how else line)
    return lines


def choices(ways: Sequence[NameChange], command: Command, live: InMemory, width: int | None) -> list[str]:
    """Equally good changes of names, each with the command that chooses it."""
    lines = ["The names fit in more than one way, and none is chosen unasked:"] if len(ways) > 1 else ["The names fit by a prefix:"]
    for way in ways:
        lines.append(f"  {name(way.words)}: {count(len(way.mapping), 'tensor')}")
        if way.rules:
            lines += next_step("  Choose it:", command.having(*way.options), live, width)
        else:
            lines.append("  No few rules choose it: it takes a --rename or a --drop for each key.")
    return lines


def no_merge(target: str, unkept: Sequence[str]) -> str:
    """The sentence in place of a merge command, where a target file has values that can't be kept."""
    from ckptsurgeon.planning.plan_findings import OTHER_TARGET

    return f"No merge can keep {listing(unkept, 4)} of {name(target)}: {OTHER_TARGET}."
