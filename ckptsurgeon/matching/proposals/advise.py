"""The one engine behind the next command: what old names, matching and adapters are certain of, together, tried before it is said.

Rule: what is advised was replayed as the command will follow it. It gives every key that the diff gives already, unless matching is certain
that the key's source belongs elsewhere, and nothing that is uncertain. Pure: no file, no torch, no printing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from ckptsurgeon.adapters.chain import filled_elements
from ckptsurgeon.errors import CheckpointError, RuleError
from ckptsurgeon.matching.counted_anew import torn_biases
from ckptsurgeon.matching.module_tree import fold
from ckptsurgeon.matching.proposals.propose import Proposal, propose
from ckptsurgeon.matching.proposals.shares import LEAST, share_of, sized_role, unlike
from ckptsurgeon.matching.proposals.sizes import resizes
from ckptsurgeon.matching.result import Matching
from ckptsurgeon.matching.rules_from_links.replay import origins
from ckptsurgeon.planning.apply_rules import NO_OUTSIDE
from ckptsurgeon.planning.diff import Advice, Diff, Resize, compare
from ckptsurgeon.planning.legacy_names import have_old_names
from ckptsurgeon.planning.links import Link
from ckptsurgeon.planning.prefixes.unchanged import set_aside
from ckptsurgeon.report import Coverage
from ckptsurgeon.rules.drafting.cover import cover
from ckptsurgeon.rules.rules import Outside, Rule
from ckptsurgeon.tensors import Checkpoint

FEW = 4  # rules that are written out; more are left to `--match`
MOST = 100  # that are written out where `--match` would not end well
_SCHEMES = {"weight": "ones", "running_var": "ones", "scale": "ones", "gamma": "ones"}  # of one dimension: a norm's; others begin at 0
LARGEST = 24_000  # names left over on both sides, beyond which a diff leaves matching to `match`
MANY = 240_000  # names of both sides, of which the equal ones are looked at too, beyond which it does so


@dataclass(frozen=True)
class Case:
    """What a diff was asked: two sides, a person's rules, and whether old names are allowed."""

    source: Checkpoint
    target: Checkpoint
    rules: tuple[Rule, ...]
    outside: Outside
    auto: str | None

    def diff(self, more: Sequence[Rule], auto: str | None) -> Diff | None:
        """The diff under more rules, which a command line's own put before those of files; None where they can't be followed."""
        try:
            return compare(self.source, self.target, self.ordered(more), self.outside, auto)
        except CheckpointError:
            return None

    def ordered(self, more: Sequence[Rule]) -> tuple[Rule, ...]:
        """A person's rules with more of them, in the order in which a command follows them."""
        at = next((index for index, rule in enumerate(self.rules) if rule.file), len(self.rules))
        return (*self.rules[:at], *more, *self.rules[at:])

    @cached_property
    def untaken(self) -> Outside:
        """What lies outside, without what the target's own loading code does: matching goes by the names as they are."""
        return replace(self.outside, taken={})

    @cached_property
    def plain(self) -> dict[str, str]:
        """By target key the source key that has its name and its shape, where no rule says anything."""
        equal, source, target = set_aside(self.source, self.target, self.rules, self.untaken)
        by_target = origins(source, target, self.rules, self.untaken)
        alone = {key: origin for key, origin in by_target.items() if origin.fits and not (origin.ops or origin.rules or origin.tied_to)}
        given = {key: origin.source_keys[0][1] for key, origin in alone.items() if len(origin.source_keys) == 1}
        return {key: given.get(key, key) for key in self.target if key in equal or key in given}


@dataclass(frozen=True)
class Candidate:
    """What matching found: rules that come before all others, the proposal, whether it is worth following, and whether `--match` leads to
    the same."""

    first: tuple[Rule, ...]
    proposal: Proposal
    worth: bool
    by_match: bool
    torn: frozenset[str] = frozenset()  # what names give, without the weight of its layer

    @property
    def rules(self) -> tuple[Rule, ...]:
        """All rules, as options would say them."""
        return (*self.first, *(ruled.rule for ruled in self.proposal.ruled))


def advise(
    diff: Diff, source: Checkpoint, target: Checkpoint, rules: Sequence[Rule] = (), outside: Outside = NO_OUTSIDE, auto: str | None = None
) -> Advice:
    """What to do after a diff of these.

    Args:
        diff: the diff of the two sides, made with the same rules.
        source, target: its two sides.
        rules: a person's rules.
        outside: what the rules name, and what the target's own loading code does.
        auto: "safe" where that was asked for.

    Returns:
        What the next command carries and reaches; empty where nothing is left to do.

    >>> from ckptsurgeon.tensors import TensorMeta
    >>> side = lambda path, *keys: Checkpoint(path, "safetensors", "0", {key: TensorMeta(key, "F32", (2, 3), (3, 1)) for key in keys})
    >>> one, other = side("a", "fc1.weight", "fc2.weight"), side("b", "fc1.weight", "dense2.weight")
    >>> [str(rule) for rule in advise(compare(one, other), one, other).rules]
    ["--rename 'fc2.weight' 'dense2.weight'"]
    """
    case = Case(source, target, tuple(rules), outside, auto)
    if diff.rivals or len(diff.exchanges) > 1:  # nothing decides between prefixes: that comes first
        return Advice(sizes=_sizes(case, diff))
    base, chosen = _safely(case, diff)
    links: tuple[Link, ...] = ()
    to_match = _open(case, base)
    few = len(diff.missing) + len(diff.extra) <= LARGEST and len(source) + len(target) <= MANY
    # Names that loading code gives are not matched; old names only where that leads to less.
    aside = (frozenset(key for key in either.matched if key not in case.plain) for either in (diff, base))
    for keys in dict.fromkeys(aside) if to_match and few else ():
        matched = _matched(case, base, keys)
        links = links or (tuple(link for link in matched.proposal.links if not _stays(link)) if matched else ())
        for carried, by_match in _ways(matched, base):
            reached = _reached(case, carried, chosen, base, matched if matched is not None and matched.worth else None)
            if reached is not None:
                return _advice(case, diff, reached, chosen, matched, carried, by_match, links)
    drops = _torn(case, base)
    advice = _advice(case, diff, (case.diff(drops, chosen) if drops else None) or base, chosen, None, (), False, links)
    return replace(advice, rules=(*drops, *advice.rules), skipped=to_match and not few)


def _torn(case: Case, base: Diff) -> tuple[Rule, ...]:
    """Rules that keep the biases of layers off norms that have their names."""
    changed = {row.key for row in base.mismatched if {1} < {len(row.source_shape), len(row.target_shape)}}
    torn = {case.plain.get(key, "") for key in base.matched if key.endswith(".bias") and f"{key[:-4]}weight" in changed} - {""}
    names = {key: base.prefix.bare(key) for key in case.source} if torn else {}
    patterns = cover(sorted(names[key] for key in torn), [name for key, name in names.items() if key not in torn]) if torn else ()
    return tuple(Rule("drop", pattern) for pattern in patterns)


def with_sizes(proposal: Proposal, source: Checkpoint, target: Checkpoint, outside: Outside = NO_OUTSIDE) -> Proposal:
    """A proposal with what is said of keys that both sides have in another size, and the adapters that go with its links."""
    if not (proposal.unmatched and proposal.unused):
        return proposal
    case = Case(source, target, proposal.before, outside, None)
    ruled = tuple(ruled.rule for ruled in proposal.ruled)
    reached = case.diff(ruled, None)
    sizes = _sizes(case, reached) if reached is not None else ()
    adapts = tuple(rule for size in sizes if size.sure for rule in size.rules)
    again = case.diff((*ruled, *adapts), None) if adapts else None
    holds = again is not None and reached is not None and len(again.matched) > len(reached.matched)
    spelled = holds and not _same_beside(case, (), proposal, adapts)
    fits = not spelled or (len(ruled) <= MOST and all(rule.kind != "stage" for rule in ruled))
    proposal = replace(proposal, sizes=sizes, spelled=spelled)
    if again is None or reached is None or not (holds and fits):
        return proposal
    targets = {*again.matched, *(key for link in proposal.links for key in link.targets)}
    sources = {row.source for row in reached.mismatched if row.key in targets} | {key for link in proposal.links for key in link.sources}
    explained = max(proposal.explained, share_of({*again.matched}, target))
    return replace(proposal, beside=adapts, explained=explained, unlike=unlike(sources, targets, source, target))


def _safely(case: Case, diff: Diff) -> tuple[Diff, str | None]:
    """The diff, or that under `--auto safe` where this gives more."""
    if case.auto is None and (diff.mismatched or (diff.missing and diff.extra and _have_old_names(case, diff))):
        safe = case.diff((), "safe")
        if safe is not None and len(safe.matched) > len(diff.matched):
            return safe, "safe"
    return diff, case.auto


def _have_old_names(case: Case, diff: Diff) -> bool:
    """Whether old names may give more: a look at what is left over, where the source's names are compared as they are."""
    changed = diff.prefix or case.rules or case.outside.taken or case.target.naming is not None
    return bool(changed) or have_old_names(diff.extra, set(diff.missing))


def _open(case: Case, diff: Diff) -> bool:
    """Whether names are left over on both sides, matrices are turned (square ones of their kind are too), or a list that is longer on one
    side may be shifted."""
    rows = diff.mismatched
    shifted = any(
        not {fold(key) for key in keys}.isdisjoint(map(fold, left))
        for keys, left in (([row.key for row in rows], diff.missing), ([row.source for row in rows], diff.extra))
    )
    names = any(key in case.target for key in diff.missing) and any(key in case.source for key in diff.extra)
    turned = any(len(row.source_shape) == 2 and row.source_shape == row.target_shape[::-1] for row in rows)
    return names or turned or shifted


def _stays(link: Link) -> bool:
    return link.sources == link.targets and not link.op


def _matched(case: Case, base: Diff, aside: frozenset[str]) -> Candidate | None:
    """What matching finds beside these keys; None where that is nothing to follow."""
    exchanges = tuple(rule for way in base.exchanges for rule in way.rules)
    exchanged_keys = {name for way in base.exchanges for name in way.mapping.values()}
    candidate = _proposed(case, (), aside)
    if exchanges and (candidate is None or not (candidate.worth and exchanged_keys <= _targets(candidate.proposal))):
        exchanged = _proposed(case, exchanges, aside)
        return exchanged if exchanged is not None and exchanged.worth else candidate
    return candidate


def _targets(proposal: Proposal) -> set[str]:
    return {key for link in proposal.applied for key in link.targets}


def _proposed(case: Case, first: tuple[Rule, ...], aside: frozenset[str]) -> Candidate | None:
    """The proposal after these rules; `aside` are keys that old names or loading code give, which are not matched."""
    judge = _Judge(case, aside)
    try:
        proposal = propose(case.source, case.target, (*case.rules, *first), case.untaken, judge=judge)
    except RuleError:
        return None
    worth = _enough(case, first, proposal) and bool(first or any(not _stays(link) for link in proposal.applied))
    apart = judge.changed or proposal.refusal() is not None or any(link.doubt for link in proposal.links)
    return Candidate(first, proposal, worth, not apart, judge.torn)


def _enough(case: Case, first: tuple[Rule, ...], proposal: Proposal) -> bool:
    """Whether links are worth following: as `match` says, or where they do not explain half of the elements since one key of another size
    has most of them: as it would say without such keys. Those between two models are not."""
    if proposal.refusal() is None or _of_another(proposal):
        return not _of_another(proposal)
    reached = case.diff((*first, *(ruled.rule for ruled in proposal.ruled)), None)
    pairs = {} if reached is None else {**{row.key: row.source for row in reached.mismatched}, **_renamed(case, reached)}
    if not pairs:
        return False
    target_side = (_targets(proposal), {*pairs}, case.target)
    source_side = ({key for link in proposal.applied for key in link.sources}, {*pairs.values()}, case.source)
    return max(map(_explained, (target_side, source_side))) >= LEAST


def _of_another(proposal: Proposal) -> bool:
    """Whether both sides look like other models, whatever links explain."""
    return bool(proposal.unlike) and proposal.explained >= LEAST


def _explained(side: tuple[set[str], set[str], Checkpoint]) -> float:
    """The lesser share of a side's tensors and elements that links explain, some keys aside."""
    explained, aside, tensors = side
    rest = {key: tensor for key, tensor in tensors.items() if key not in aside or key in explained}
    share = Coverage.of({key: tensor for key, tensor in rest.items() if key in explained}, rest)
    return min(share.tensors, share.elements)


class _Judge:
    """Takes out links to keys that are given by other means, and puts those in that names and shapes give already."""

    def __init__(self, case: Case, aside: frozenset[str]) -> None:
        self.case, self.aside, self.changed = case, aside, False
        self.torn: frozenset[str] = frozenset()

    def __call__(self, matching: Matching) -> tuple[Matching, tuple[str, ...]]:
        certain = [link for link in matching.links if link.certain]
        reached = {key for link in certain for key in link.targets}
        used = {key for link in certain for key in link.sources}
        stays = {name: key for name, key in self.case.plain.items() if name not in reached and key not in used}
        named = [Link((key,), (name,), "", 1.0, ("same name, same shape",)) for name, key in stays.items()]
        self.torn = frozenset(name for link in torn_biases([*certain, *named], self.case.source) for name in link.targets if name in stays)
        links = [
            link
            for link in matching.links
            if self.aside.isdisjoint(link.targets) and (link.certain or stays.keys().isdisjoint(link.targets))
        ]
        self.changed = len(links) < len(matching.links) or bool(stays)
        links += [link for link in named if self.torn.isdisjoint(link.targets)]
        return replace(matching, links=tuple(links)), ()


def _ways(candidate: Candidate | None, base: Diff) -> list[tuple[tuple[Rule, ...], bool]]:
    """The rules that may be carried, each with whether `--match` stands for them, the first to be tried first."""
    if candidate is None or not candidate.worth:
        return [] if candidate and _of_another(candidate.proposal) else [(way.rules, False) for way in base.exchanges]
    writable = all(rule.kind != "stage" for rule in candidate.rules)
    short = writable and len(candidate.rules) <= FEW
    ways = [(candidate.rules, True)] if candidate.by_match and not short else []
    if writable and len(candidate.rules) <= MOST:
        ways.append((candidate.rules, False))
    return ways


def _reached(case: Case, rules: tuple[Rule, ...], auto: str | None, base: Diff, candidate: Candidate | None) -> Diff | None:
    """The diff under rules, where it gives all that it has to."""
    reached = case.diff(rules, auto)
    if reached is None:
        return None
    used = {key for link in candidate.proposal.applied for key in link.sources} if candidate else set()
    kept = {key for key in base.matched if case.plain.get(key) not in used}
    required = (kept - candidate.torn) | _targets(candidate.proposal) if candidate else kept
    return reached if required <= set(reached.matched) else None


def _sizes(case: Case, diff: Diff) -> tuple[Resize, ...]:
    pairs = {row.key: row.source for row in diff.mismatched if row.source in case.source}
    return resizes(case.source, case.target, pairs, _renamed(case, diff))


def _renamed(case: Case, diff: Diff) -> dict[str, str]:
    """The source's keys by the target's that are left over and are the only ones of their role, in two sizes."""
    if not (diff.missing and diff.extra) or len(diff.missing) + len(diff.extra) > LARGEST:
        return {}
    only: list[dict[object, str]] = []
    for left, side in ((diff.extra, case.source), (diff.missing, case.target)):
        roles = {key: role for key in left if key in side and (role := sized_role(key, side)) is not None}
        counts = Counter(roles.values())
        only.append({role: key for key, role in roles.items() if counts[role] == 1})
    names, keys = only
    pairs = {keys[role]: name for role, name in names.items() if role in keys}
    return {key: name for key, name in pairs.items() if case.source[name].shape != case.target[key].shape}


def _advice(
    case: Case,
    diff: Diff,
    reached: Diff,
    auto: str | None,
    matched: Candidate | None,
    rules: tuple[Rule, ...],
    by_match: bool,
    links: tuple[Link, ...],
) -> Advice:
    """The advice that carries these rules, and the adapters that are sure beside them."""
    if auto is not None and case.auto is None and (without := case.diff(rules, None)) is not None and without.coverage == reached.coverage:
        auto, reached = None, without  # the links give what old names would
    sizes = _sizes(case, reached)
    adapts: tuple[Rule, ...] = ()
    for size in sizes:
        if size.sure and (more := case.diff((*rules, *adapts, *size.rules), auto)) is not None and len(more.matched) > len(reached.matched):
            reached, adapts = more, (*adapts, *size.rules)
    if by_match and matched is not None and not _same_beside(case, matched.first, matched.proposal, adapts):
        by_match = False
    if case.target.kind == "skeleton":
        adapts = (*adapts, *_initials(case, reached))
    gains = reached.coverage != diff.coverage
    partly = tuple(row.key for row in reached.adapted if filled_elements(row.ops, case.target[row.key].shape))
    return Advice(
        rules=(*(matched.first if by_match and matched else rules), *adapts),
        match=by_match,
        auto=auto is not None and case.auto is None,
        links=links,
        carried=rules,
        sizes=sizes,
        reaches=reached.coverage if gains else None,
        open=(*(row.key for row in reached.mismatched), *(key for key in reached.missing if key in case.target)),
        partly=partly,
    )


def _initials(case: Case, reached: Diff) -> Iterator[Rule]:
    """Schemes for what no source gives a skeleton, behind which no constructor stands: by what a tensor's name says that it is."""
    left = {*(row.key for row in reached.mismatched), *reached.missing} & case.target.keys()
    schemes: dict[str, list[str]] = {}
    for key in left:
        flat = len(case.target[key].shape) < 2
        scheme = next((scheme for leaf, scheme in _SCHEMES.items() if flat and key.endswith(leaf)), "zeros" if flat else "normal(std=0.02)")
        schemes.setdefault(scheme, []).append(key)
    for scheme, keys in sorted(schemes.items()):
        named = frozenset(keys)
        for pattern in cover(sorted(keys), [key for key in case.target if key not in named]):
            yield Rule("init", pattern, scheme)


def _same_beside(case: Case, first: tuple[Rule, ...], proposal: Proposal, adapts: tuple[Rule, ...]) -> bool:
    """Whether `--match` finds the same links where these adapters are asked for too."""
    if not adapts:
        return True
    try:
        again = propose(case.source, case.target, case.ordered((*first, *adapts)), case.untaken)
    except RuleError:
        return False
    links = {(link.sources, link.targets, link.op) for link in proposal.applied if not _stays(link)}
    return again.refusal() is None and links <= {(link.sources, link.targets, link.op) for link in again.applied}
