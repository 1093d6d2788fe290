"""The whole of matching: what a person's rules leave open is matched, and the links become rules that were replayed.

Rule: a key that a person's rule names is never matched again. Pure: no file, no torch, no printing.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from ckptsurgeon.command import NOT_IN_MEMORY, Command, InMemory, Option, at_root
from ckptsurgeon.errors import CoverageError, RuleError
from ckptsurgeon.limit_table import allowed
from ckptsurgeon.low_rank import lost_factors
from ckptsurgeon.matching.factors import DEQUANTIZE
from ckptsurgeon.matching.layouts.choices import Open, as_they_stand, by_rules, open_layouts, with_numbers
from ckptsurgeon.matching.matcher import looked_at, match
from ckptsurgeon.matching.proposals.shares import LEAST, share_of, unlike
from ckptsurgeon.matching.result import Matching, keys_left, result
from ckptsurgeon.matching.rules_from_links import to_toml
from ckptsurgeon.matching.rules_from_links.generalise import Ruled, Task, generalise
from ckptsurgeon.matching.rules_from_links.replay import origins
from ckptsurgeon.planning.apply_rules import NO_OUTSIDE, Names, name_sources
from ckptsurgeon.planning.diff import Resize
from ckptsurgeon.planning.links import Link
from ckptsurgeon.planning.own_loading.conversions import applied_prefix
from ckptsurgeon.planning.plan_types import viewing_command
from ckptsurgeon.planning.prefixes.find import rename_all
from ckptsurgeon.planning.prefixes.rivals import NameChange, rivals_with_rules
from ckptsurgeon.planning.resolve import find_refused, find_unkept, kept_out, without_a_rule
from ckptsurgeon.report import Coverage, Twins
from ckptsurgeon.rules.drafting.drafts import Known
from ckptsurgeon.rules.patterns import literal
from ckptsurgeon.rules.rules import Outside, Rule, compile_rules
from ckptsurgeon.shown import Result
from ckptsurgeon.sizes import percent
from ckptsurgeon.tensors import Checkpoint
from ckptsurgeon.wrappers import WRAPPERS, unwrap

Judge = Callable[[Matching], tuple[Matching, tuple[str, ...]]]  # a matching with its links judged, and warnings
UNWRITABLE = "a key that no text can have"


@dataclass(frozen=True, repr=False)
class Proposal(Matching, Result):
    """A matching of two sides, and the rules that lead to exactly the links that are applied.

    Attributes:
        links: in the target's order.
        unmatched: the target's keys that no link has.
        unused: the source's keys that no link has.
        order: how far the order of keys was trusted, 0 to 1.
        share: the part of the target's elements that certain links give, 0 to 1.
        source: the source's path.
        target: the target's path or spec.
        root: the nested dict of the source that was taken.
        applied: the links that the rules give: the certain ones, and where they were accepted the uncertain ones too.
        ruled: each rule with the links that it is for.
        before: a person's own rules, which come first.
        coverage: the share of the target that the applied links and the person's rules give.
        used: the share of the source that they take.
        explained: the share of the side that is explained best, with links that are sure but for their layout: the least of its tensors',
            its elements' and its matrices' share.
        possible: the same with the uncertain links.
        unlike: why both sides look like other models, though links explain half of one; empty where they do not.
        open: layouts that are in doubt, each with the rules that would settle it.
        toml: the rules as the text of a commented rules file.
        loose: the keys of both sides that are not applied and that no rule names, which `--strict` refuses.
        numbers_used: the numbers that were set and that a layout in doubt uses.
        warnings: keys too long to match, and what speaks against links, where values were looked at.
        forward: how far both models' outputs differ, where they ran.
        rivals: prefixes between which nothing decides, each with the rules that choose it.
        options: what a merge needs beside the rules, as options of a command: a `--drop` for each value that can't be carried.
        asked: the options that it was made with, which a command that matches again needs too.
        unkept: keys of a target file whose values can't be kept, so that no merge can take it as its target.
        written: the rules file that was written, or None.
        refused: why the links are no mapping to follow, where that was asked.
        sizes: what keys are that both sides have in another size.
        beside: adapters for these that the next command carries beside the links.
        spelled: whether the rules have to be written out, since `--match` alone would not lead to them.
        output: where the next command would write.
        task: what the rules were made for.
        accepts: whether uncertain links are applied too.
        conversions: what the conversions of the target's library come to, before any link, in words; empty without any.
        in_memory: of source and target, `file`, `model` or `state_dict` for what no path or spec names.
    """

    source: str = ""
    target: str = ""
    root: str = ""
    applied: tuple[Link, ...] = ()
    ruled: tuple[Ruled, ...] = ()
    before: tuple[Rule, ...] = ()
    coverage: Coverage = field(default_factory=lambda: Coverage(0.0, 0.0))
    used: Coverage = field(default_factory=lambda: Coverage(0.0, 0.0))
    explained: float = 0.0
    possible: float = 0.0
    unlike: str = ""
    open: tuple[Open, ...] = ()
    toml: str = ""
    loose: tuple[str, ...] = ()
    numbers_used: tuple[str, ...] = field(default=(), repr=False, compare=False)
    warnings: tuple[str, ...] = ()
    forward: Twins | None = None
    rivals: tuple[NameChange, ...] = ()
    options: tuple[Option, ...] = field(default=(), repr=False, compare=False)
    asked: tuple[Option, ...] = field(default=(), repr=False, compare=False)
    unkept: tuple[str, ...] = field(default=(), repr=False, compare=False)
    written: str | None = field(default=None, repr=False, compare=False)
    refused: str | None = field(default=None, repr=False, compare=False)
    sizes: tuple[Resize, ...] = field(default=(), repr=False, compare=False)
    beside: tuple[Rule, ...] = field(default=(), repr=False, compare=False)
    spelled: bool = field(default=False, repr=False, compare=False)
    output: str = field(default="merged.pt", repr=False, compare=False)
    conversions: str = ""
    in_memory: InMemory = field(default=NOT_IN_MEMORY, repr=False, compare=False)
    task: Task | None = field(default=None, repr=False, compare=False)
    accepts: bool = field(default=False, repr=False, compare=False)

    @cached_property
    def rules(self) -> tuple[Rule, ...]:
        """The rules, the person's own first; those that were found say in a plan what speaks for them."""
        return (
            *self.before,
            *(
                replace(ruled.rule, file=f"matched: {to_toml.evidence(ruled.links) if ruled.links else to_toml.comment(ruled)}")
                for ruled in self.ruled
            ),
        )

    def refusal(self, least: float = LEAST, less: str = "") -> CoverageError | None:
        """Why this is no mapping to follow.

        Args:
            least: the least share, from 0 to 1, of one side's tensors and elements that applied links must explain.
            less: how less is asked for, where that is possible; the hint ends with it.

        Returns:
            The error to raise, or None where it is one.
        """
        share = self.explained
        if share >= least and ((share and self.links) or self.before or (self.links and not least)):
            if not self.unlike or least < LEAST:
                return None
            return CoverageError(f"has too little in common with {self.target}: {self.unlike}", path=self.source, hint=self._way_on(less))
        if self.possible >= max(least, 1e-9) and len(self.applied) < len(self.links):
            applied = set(self.applied)
            left = [link for link in self.links if link not in applied and not (link.clear and link.doubt)]
            doubtful = (left or self.links)[0]
            codes = any(DEQUANTIZE in link.evidence for link in left)
            way = "leave out what rivals it, drop=['other_tower.**'], or take them as they are: accept_uncertain=True"
            rival = f", such as {doubtful.sources[0]} -> {doubtful.targets[0]} or {doubtful.runner_up}" if doubtful.runner_up else ""
            return CoverageError(
                f"{sum(not link.clear for link in self.links)} links are uncertain{rival}; "
                f"what is certain explains {percent(share)} of either side",
                path=self.source,
                hint="quantised weights are codes: make values of them: dequantize=True" if codes else way,
            )
        return CoverageError(
            f"has too little in common with {self.target}: links explain {percent(share)} of either side, "
            f"and {percent(least)} is asked for",
            path=self.source,
            hint=self._way_on(less),
        )

    def _way_on(self, less: str) -> str:
        look = f"are they the same architecture? see both: {viewing_command(self.source, self.root, False, self.target)}"
        return f"{look}; {less}" if less else look


def propose(
    source: Checkpoint,
    target: Checkpoint,
    before: Sequence[Rule] = (),
    outside: Outside = NO_OUTSIDE,
    *,
    accept: bool = False,
    judge: Judge | None = None,
    dequantize: bool = False,
    layout: Sequence[str] = (),
    numbers: Mapping[str, int] = {},
    target_numbers: Callable[[], Mapping[str, int]] | None = None,
) -> Proposal:
    """Match what a person's rules leave open, and make rules of the links; `judge` may look at the values behind them first. `dequantize`
    says that values are made of codes.

    Args:
        layout: patterns of the target's keys whose layout is taken as it stands.
        numbers: for the variables of layouts in doubt, by name.
        target_numbers: returns the numbers that the target itself tells, by name; called only where one is needed.

    Raises RuleError for rules of the person's that can't be followed.
    """
    names = name_sources([source], target, before, outside)
    late = _late(names, target)
    before = [own_rule for own_rule in before if own_rule not in late]
    refused = find_refused(source, 0, names)
    drops = tuple(("drop", literal(names.prefixes[0].bare(key))) for key in refused)
    task = replace(_open_task(source, target, tuple(before), outside), options=drops)
    kept = kept_out(target, names) if before else {}
    matching = match(
        {key: tensor for key, tensor in source.items() if key not in task.touched},
        {key: tensor for key, tensor in target.items() if key not in task.given and key not in kept},
        [tied for group in target.ties if len(tied := [key for key in group if key not in task.given and key not in kept]) > 1],
        around=(source, target),
        dequantize=dequantize,
    )
    judged, warnings = judge(matching) if judge is not None else (matching, ())
    taken, done = by_rules(judged.links, late)
    left = tuple(own_rule for own_rule in late if own_rule not in done)
    if left:  # told as any rule that has nothing to do
        origins(source, target, (*before, *left), outside)
    used: set[str] = set()
    links = as_they_stand(with_numbers(taken, numbers, used, target_numbers), layout)
    proposal = rule(replace(judged, links=tuple(links)), task, accept=accept)
    return replace(
        proposal,
        numbers_used=tuple(used),
        loose=without_a_rule(names, target, *keys_left(proposal, proposal.applied)),
        conversions=names.applied.words,
        warnings=(*_passed_over(source, target), *warnings, *((lost,) if (lost := lost_factors(matching.unused)) is not None else ())),
        rivals=rivals_with_rules([source], target, names, before)[0],
        unkept=tuple(find_unkept(target, {name for name, (_, key) in names.entries.items() if key not in refused})),
    )


def _late(names: Names, target: Checkpoint) -> list[Rule]:
    """A person's adapt rules over target keys to which no source's name leads: matching may find what does."""
    keys_of = [(rule.rule, [key for key in target if rule.match(key) is not None]) for rule in names.adapts]
    return [rule for rule, keys in keys_of if keys and not any(key in names.claims for key in keys)]


def _passed_over(source: Checkpoint, target: Checkpoint) -> Iterator[str]:
    """What is said of keys that are too long to be matched."""
    longest, deepest = allowed("match-characters"), allowed("match-segments")
    for side in (source, target):
        long = side.keys() - looked_at(side).keys()
        if long:
            number = f"{len(long)} keys have" if len(long) > 1 else "1 key has"
            limits = f"--limit match-segments={deepest}, --limit match-characters={longest}"
            yield f"{side.path}: {number} more segments or characters than are looked at, and no link ({limits})"


def rule(matching: Matching, task: Task, *, accept: bool = False) -> Proposal:
    """The proposal of a matching."""
    applied, left = _applied(matching, accept)
    full_task = replace(task, links=applied, doubtful=frozenset(key for link in left for key in link.sources))
    try:
        ruled = generalise(full_task) if applied or task.before or _by_name(task) else ()  # drops alone carry nothing
    except RuleError:
        writable = [link for link in applied if _is_writable(link)]
        if len(writable) == len(applied):
            raise
        matching = replace(matching, links=tuple(link if link in writable else _unwritable(link) for link in matching.links))
        applied = tuple(writable)
        ruled = generalise(replace(full_task, links=applied))
        left = [link for link in matching.links if link not in applied]
    return replace(_proposal(matching, full_task, applied, ruled, left), task=task, accepts=accept)


def _by_name(task: Task) -> bool:
    """Whether any key of the source would go by its name without a rule."""
    names = rename_all(task.source, task.target, task.prefix)
    return any(name in task.target for name in names.values())


def again(proposal: Proposal, links: Sequence[Link]) -> Proposal:
    """The proposal of the same two sides with other links; what was said of it stays."""
    assert proposal.task is not None
    remade = rule(result(list(links), proposal.task.source, proposal.task.target, proposal.order), proposal.task, accept=proposal.accepts)
    kept = {
        name: getattr(proposal, name) for name in ("warnings", "rivals", "unkept", "numbers_used", "sizes", "output", "asked", "options")
    }
    return replace(remade, **kept)


def _open_task(source: Checkpoint, target: Checkpoint, before: tuple[Rule, ...], outside: Outside) -> Task:
    """What a person's rules lead to, and the source keys that they name."""
    if not before and target.naming is None:
        return Task(source, target, ())
    prefix = applied_prefix(source, target)
    active = [compiled for compiled in compile_rules(before, outside) if not compiled.of_target]
    by_rules = {key: origin for key, origin in origins(source, target, before, outside).items() if origin.fits and origin.rules}
    read = {key for origin in by_rules.values() for _, key in origin.source_keys}
    readings = {key: (prefix.bare(key), key, *({unwrap(key, WRAPPERS)} - source.keys())) for key in source}
    touched = {key for key, names in readings.items() if any(compiled.match(name, 0) is not None for compiled in active for name in names)}
    led = {key: (tuple(source_key for _, source_key in origin.source_keys), origin.ops) for key, origin in by_rules.items()}
    return Task(source, target, (), before, outside, led, frozenset(touched | read))


def _applied(matching: Matching, accept: bool) -> tuple[tuple[Link, ...], list[Link]]:
    """The links that are applied, and those that are not: of several that want one target, or one source each in its own way, the one with
    the greatest margin. A source may go to several targets as it is, or be cut or joined once."""
    reached: set[str] = set()
    used: dict[str, object] = {}
    kept: set[int] = set()
    for link in sorted((link for link in matching.links if accept or link.certain), key=lambda link: -link.margin):
        if link.doubt:
            continue  # to accept what is uncertain settles no layout
        way: object = id(link) if len(link.sources) > 1 or (len(link.targets) > 1 and link.op) else "as it is"
        if reached.isdisjoint(link.targets) and all(used.get(key, way) == way for key in link.sources):
            reached.update(link.targets)
            used.update(dict.fromkeys(link.sources, way))
            kept.add(id(link))
    return tuple(link for link in matching.links if id(link) in kept), [link for link in matching.links if id(link) not in kept]


def _writable(key: str) -> bool:
    """Whether a rules file can have this key: text that UTF-8 knows."""
    return bool(key) and not any("\ud800" <= letter <= "\udfff" for letter in key)


def _is_writable(link: Link) -> bool:
    stays = link.sources == link.targets and not link.op
    return stays or all(map(_writable, (*link.sources, *link.targets)))


def _unwritable(link: Link) -> Link:
    if _is_writable(link):
        return link
    return replace(link, margin=0.0, evidence=(*link.evidence, UNWRITABLE))


def _proposal(matching: Matching, task: Task, applied: tuple[Link, ...], ruled: tuple[Ruled, ...], left: Iterable[Link]) -> Proposal:
    source, target = task.source, task.target
    doubtful = [link for link in left if UNWRITABLE not in link.evidence]
    sure = [link for link in doubtful if link.clear and link.doubt]
    reached = {*task.given, *(key for link in applied for key in link.targets)}
    taken = {key for keys, _ in task.given.values() for key in keys} | {key for link in applied for key in link.sources}
    maybe = reached | {key for link in doubtful for key in link.targets}
    coverage = Coverage.of({key: target[key] for key in target if key in reached}, target)
    used = Coverage.of({key: source[key] for key in source if key in taken}, source)
    maybe_taken = taken | {key for link in doubtful for key in link.sources}
    explained = max(
        share_of(reached | {key for link in sure for key in link.targets}, target),
        share_of(taken | {key for link in sure for key in link.sources}, source),
    )
    possible = max(share_of(maybe, target), share_of(maybe_taken, source))
    prefix = task.prefix
    bare = {key: prefix.bare(key) if prefix.of_wrappers else key for key in source}
    known = Known([bare[key] for key in source if key not in task.touched])
    unsure = [link for link in doubtful if link not in sure]
    doubts = to_toml.doubts(unsure, bare, known)
    opened = open_layouts(sure, bare, known)
    head = list(_head(matching, task, coverage, applied, unsure, opened))
    return Proposal(
        matching.links,
        matching.unmatched,
        matching.unused,
        matching.order,
        matching.share,
        source.path,
        target.path,
        source.root,
        applied,
        ruled,
        task.before,
        coverage,
        used,
        explained,
        possible,
        unlike(maybe_taken, maybe, source, target),
        opened,
        to_toml.toml(head, task.before, doubts, ruled, opened),
        options=task.options,
        in_memory=(source.in_memory, target.in_memory),
    )


def _head(
    matching: Matching, task: Task, coverage: Coverage, applied: Sequence[Link], left: Sequence[Link], opened: Sequence[Open]
) -> Iterator[str]:
    source, target = task.source, task.target
    done, total = coverage.counts
    root = f" (root {source.root})" if source.root else ""
    by = "names, numbers, shapes and order" if matching.order else "names, numbers and shapes"  # no order was trusted
    yield f"{source.path}{root} -> {target.path}, matched by {by}."
    yield f"Given: {done} of {total} tensors of the target, {int(coverage.elements * 1000) / 10} % of its elements."
    stays = sum(link.sources == link.targets and not link.op for link in applied)
    if stays:
        yield f"{stays} of them keep their names and need no rule."
    if left:
        yield f"Uncertain: {sum(len(link.targets) for link in left)} tensors."
    for layout in opened:
        yield f"Layout open ({layout.kind}): {len(layout.targets)} tensors."
    if matching.unmatched:
        yield f"Only in the target: {len(matching.unmatched)}, such as {matching.unmatched[0]}."
    if matching.unused:
        yield f"Only in the source: {len(matching.unused)}, such as {matching.unused[0]}."
    options = (*at_root(source.root), *task.options, ("rules", "THIS_FILE"))
    command = Command("merge", source.path, target.path, "merged.pt", options)
    live = (source.in_memory, target.in_memory)
    follow = command.call(live) if any(live) else shlex.join(command.words)
    if follow is not None:
        yield f"Follow it: {follow}"
