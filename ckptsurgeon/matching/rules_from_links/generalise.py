"""From links to the shortest general rules that give exactly them: folded numbers, whole modules, drops for what would go astray.

Rule: what is given back has been replayed. Rules that do not lead to the links, and to nothing else, are made again, less general,
in the end one for each link. Pure; the text that is written of them is made in `to_toml`.

Where rules would be many, they have two stages: one moves `features.7.**` to `blocks.3.0.**`, one renames what all of these modules hold.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from ckptsurgeon.adapters.table import offers
from ckptsurgeon.command import Option
from ckptsurgeon.errors import RuleError
from ckptsurgeon.matching.rules_from_links.modules import line_of, renamings
from ckptsurgeon.matching.rules_from_links.order import in_order
from ckptsurgeon.matching.rules_from_links.replay import Results, asked_results, replay
from ckptsurgeon.planning.apply_rules import NO_OUTSIDE
from ckptsurgeon.planning.links import Link
from ckptsurgeon.planning.own_loading.conversions import applied_prefix
from ckptsurgeon.planning.prefixes.find import Prefix, rename_all
from ckptsurgeon.progress import beat
from ckptsurgeon.rules.drafting import cover
from ckptsurgeon.rules.drafting.drafts import Draft, Known, merge
from ckptsurgeon.rules.drafting.rows import Line, Row, literal, rows
from ckptsurgeon.rules.patterns import literal as one_key
from ckptsurgeon.rules.patterns import unescaped
from ckptsurgeon.rules.rulefile import parse_rules, to_toml
from ckptsurgeon.rules.rules import Outside, Rule
from ckptsurgeon.tensors import Checkpoint

_TRIES = 3
MANY = 24  # rules, from which on two stages are tried
GENERAL, FOLDED, LITERAL = "general", "folded", "literal"  # how far rules are generalised, from the shortest on
_LEAST = 3  # keys of a module, below which it is no shorter to move it first


@dataclass(frozen=True)
class Ruled:
    """A rule, and the links that it is for; `without` are source keys that it leaves out since no link has them."""

    rule: Rule
    links: tuple[Link, ...] = ()
    without: tuple[str, ...] = ()


@dataclass(frozen=True)
class Task:
    """What rules must lead to.

    `before` are rules that a person gave, which come first, `given` what they lead to, and `touched` the source keys that they match;
    `links` are asked for beside it. `doubtful` are source keys of links that are not asked for. `options` are what a merge needs
    beside the rules.
    """

    source: Checkpoint
    target: Checkpoint
    links: tuple[Link, ...]
    before: tuple[Rule, ...] = ()
    outside: Outside = NO_OUTSIDE
    given: Results = field(default_factory=dict)
    touched: frozenset[str] = frozenset()
    doubtful: frozenset[str] = frozenset()
    options: tuple[Option, ...] = ()

    @cached_property
    def prefix(self) -> Prefix:
        """The prefix that the planner would strip."""
        return applied_prefix(self.source, self.target)

    @cached_property
    def expected(self) -> Results:
        """By target key, what must come of it; keys that are one tensor in the target get what the first of them gets."""
        results = {**self.given, **asked_results(self.links, self.source, self.target)}
        for group in self.target.ties:
            first = next((key for key in group if key in results), None)
            if first is not None:
                results.update({key: results[first] for key in group if key not in results})
        return results

    def replayed(self, rules: Iterable[Rule]) -> Results:
        """What rules lead to when they are read back from their text, after those of the person."""
        parsed = parse_rules(to_toml(rules), "matched")
        return replay(self.source, self.target, (*self.before, *parsed), self.outside)


def generalise(task: Task) -> tuple[Ruled, ...]:
    """The shortest rules found that lead to exactly the task's links. RuleError where none do: keys that no pattern can name."""
    expected = task.expected
    problem: RuleError | None = None
    for view in _views(task):
        for how in (GENERAL, FOLDED, LITERAL):
            also: frozenset[str] = frozenset()  # keys to drop that went astray by a prefix which only rules bring about
            for _ in range(_TRIES):
                beat()
                try:
                    candidate = list(view.rules(how, also))
                    led = task.replayed(ruled.rule for ruled in candidate)
                    if led == expected:
                        return _shorter(view, candidate, expected) if how == GENERAL and len(candidate) > MANY else tuple(candidate)
                    more = {key for name, (keys, _) in led.items() if name not in expected for key in keys} & view.loose
                except RuleError as error:
                    problem, more = error, set(view.loose)
                if more <= also:
                    break
                also |= more
    raise problem or RuleError("no rules lead to these links", path=task.source.path, hint="rename the keys that look like patterns")


def _shorter(view: View, rules: Sequence[Ruled], expected: Results) -> tuple[Ruled, ...]:
    """The same in two stages where that is right and much shorter, else as it is."""
    try:
        staged = tuple(view.in_stages())
        right = 3 * len(staged) <= 2 * len(rules) and view.task.replayed(ruled.rule for ruled in staged) == expected
    except RuleError:
        right = False
    return staged if right else tuple(rules)


def _views(task: Task) -> Iterator[View]:
    """The source's names as patterns are to name them: without the prefix that the planner strips, else as they stand."""
    prefixed = View(task, task.prefix)
    if not task.prefix:
        yield prefixed
        return
    # A prefix that the planner would find for a few keys alone is no way to tell a person what becomes of them.
    stays = sum(prefixed.default[link.sources[0]] == one_key(link.targets[0]) for link in task.links)
    first = task.prefix.of_wrappers or 2 * stays >= len(task.links)
    if first:
        yield prefixed
    yield View(task, Prefix())
    if not first:
        yield prefixed


class View:
    """A task with the names that patterns see, each as the pattern that it is."""

    def __init__(self, task: Task, prefix: Prefix) -> None:
        self.task, self.prefix = task, prefix
        keys = (*task.source, *task.source.entries)
        self.bare = {key: one_key(prefix.bare(key)) for key in keys}
        self.default = {key: one_key(name) for key, name in rename_all(keys, {*task.target, *task.target.entries}, prefix).items()}
        self.key_of = {name: key for key, name in self.bare.items()}
        self.known = Known([prefix.bare(key) for key in keys if key not in task.touched])
        self.reached = frozenset(task.expected)
        self.loose = frozenset(task.source) - {key for link in task.links for key in link.sources} - task.touched

    def rules(self, how: str, also: frozenset[str] = frozenset()) -> Iterator[Ruled]:
        """Rules of one generality, in the order in which they must stand; keys in `also` are dropped whatever becomes of them."""
        drafts = self._drafts(how)
        links = self._links
        order, drops = in_order(drafts, self.known, self._destinations, self._astray)
        drops = list(dict.fromkeys([*drops, *(self.bare[key] for key in sorted(self.loose & also))]))
        doubtful = {self.bare[key] for key in self.task.doubtful}
        apart = [name for name in drops if name in doubtful], [name for name in drops if name not in doubtful]
        for names, other_names in (apart, apart[::-1]):  # a person who takes an uncertain link in takes only its own drop out
            for pattern, left in self._dropped(names, other_names):
                yield Ruled(Rule("drop", pattern), (), left)
        for draft in order:
            own_links = [link for line in draft.lines for link in links.get(line, ())]
            yield Ruled(draft.rule, tuple(dict.fromkeys(own_links)))
        yield from self._adapted(how)

    def in_stages(self) -> Iterator[Ruled]:
        """Rules in two stages: first numbered modules are moved, then their contents are renamed. None where no module moves."""
        if self.task.before or self.prefix.added or self.prefix.stripped:
            return
        destinations = self._destinations
        moved = module_moves({name: results[0] if results and len(results) == 1 else None for name, results in destinations.items()})
        if not moved:
            return
        order, after = first_stage(moved, self.known, destinations)
        by_name = {self.bare[link.sources[0]]: link for link in self.task.links if not _joins(link)}
        for draft in order:
            yield Ruled(draft.rule, tuple(by_name[line.sources[0]] for line in draft.lines))
        yield Ruled(Rule("stage"))
        called = {key: unescaped(after.get(name, name)) for key, name in self.bare.items()}
        own = {link.targets: link for link in self.task.links}
        key_of = {name: key for key, name in called.items()}
        if len(key_of) < len(called):
            raise RuleError("two keys have one name between the stages")
        for ruled in View(self._called(called), Prefix()).rules(GENERAL):
            yield Ruled(ruled.rule, tuple(own[link.targets] for link in ruled.links), tuple(key_of[name] for name in ruled.without))

    def _called(self, names: Mapping[str, str]) -> Task:
        """The task with other names for the source's keys."""
        task = self.task
        source = replace(
            task.source,
            tensors={names[key]: tensor for key, tensor in task.source.items()},
            entries={names[key]: value for key, value in task.source.entries.items()},
            ties=(),
        )
        links = tuple(replace(link, sources=tuple(names[key] for key in link.sources)) for link in task.links)
        return Task(source, task.target, links, doubtful=frozenset(names[key] for key in task.doubtful))

    @cached_property
    def _moves(self) -> tuple[Line, ...]:
        """Renames as lines: one source, to all of its targets."""
        to: dict[str, list[str]] = {}
        for link in self.task.links:
            if not _joins(link):
                to.setdefault(link.sources[0], []).extend(link.targets)
        return tuple(Line((self.bare[key],), tuple(map(one_key, targets))) for key, targets in to.items())

    @cached_property
    def _links(self) -> Mapping[Line, list[Link]]:
        joined: dict[Line, list[Link]] = {line_of(link, self.bare): [link] for link in self.task.links if _joins(link)}
        by_source: dict[str, list[Link]] = {}
        for link in self.task.links:
            if not _joins(link):
                by_source.setdefault(self.bare[link.sources[0]], []).append(link)
        return {**joined, **{line: by_source[line.sources[0]] for line in self._moves}}

    def _drafts(self, how: str) -> list[Draft]:
        """The drafts of links that join or cut keys, then those of renames."""
        joints = [line_of(link, self.bare) for link in self.task.links if _joins(link)]
        lines = (*joints, *self._moves)
        all_rows = list(map(literal, lines)) if how == LITERAL else rows(lines, self._stays)
        joining = frozenset(joints)
        joined = [Draft.of(row) for row in all_rows if row.lines[0] in joining]
        moved = [row for row in all_rows if row.lines[0] not in joining]
        if how == GENERAL:
            return [*merge(joined, self.known), *merge(renamings(moved, one_key(self.prefix.added)), self.known)]
        return [*joined, *(Draft.of(row) for row in moved if not self._stays(row))]

    def _stays(self, row: Row) -> bool:
        """Whether all keys of a row get their names without a rule."""
        return not row.op and all(line.targets == (self.default[self.key_of[line.sources[0]]],) for line in row.lines)

    @cached_property
    def _destinations(self) -> Mapping[str, tuple[str, ...] | None]:
        """By name where it must land; None for a name that a link with several keys takes, or a person's rule."""
        destinations: dict[str, tuple[str, ...] | None] = {line.sources[0]: line.targets for line in self._moves}
        destinations.update({self.bare[key]: None for link in self.task.links if _joins(link) for key in link.sources})
        return destinations

    def _astray(self, name: str, results: Sequence[str] | None) -> bool:
        """Whether a name that no link has would do harm as these names; without any, under the one that it has by itself."""
        key, target = self.key_of[name], self.task.target
        if key not in self.task.source:
            return False
        shape = self.task.source[key].shape
        for result in map(unescaped, results if results is not None else (self.default[key],)):
            if result in self.reached or (
                result in target and (target[result].shape == shape or offers(shape, target[result].shape, safe=True))
            ):
                return True
        return False

    def _dropped(self, drops: Sequence[str], others: Sequence[str]) -> Iterator[tuple[str, tuple[str, ...]]]:
        """Patterns that drop names, and nothing that a link has; each with the keys that it is for."""
        meant = set(drops)
        destinations = self._destinations
        loose = [name for name in self.bare.values() if name not in destinations]
        apart: tuple[list[str], list[str]] = [name for name in loose if name in meant], [name for name in loose if name not in meant]
        mine, kept, stay = (list(map(unescaped, names)) for names in (apart[0], (*destinations, *apart[1]), (*destinations, *others)))
        whole, rest = cover.modules(mine, kept)
        for pattern in (*whole, *cover.cover(rest, stay)):
            matched = [name for name in self.known.matched(Draft((pattern,), (), "", ()).compiled) if name in meant]
            meant -= set(matched)
            if matched:  # else others before it match all that it is for
                yield pattern, tuple(self.key_of[name] for name in matched)

    def _adapted(self, how: str) -> Iterator[Ruled]:
        """Ops of single tensors, as adapt rules over the target's keys."""
        by_op: dict[str, dict[str, Link]] = {}
        for link in self.task.links:
            if not _joins(link):
                for key in link.targets:
                    by_op.setdefault(link.op, {})[key] = link
        for op, links in by_op.items():
            others = [key for other_op, named in by_op.items() if other_op != op for key in named]
            others += [key for link in self.task.links if _joins(link) for key in link.targets]
            patterns = list(map(one_key, links)) if how == LITERAL else cover.cover(links, others)
            known = Known(links)
            for pattern in patterns if op else ():
                matched = [key for name in known.matched(Draft((pattern,), (), "", ()).compiled) if (key := unescaped(name)) in links]
                if matched:  # else others before it match all that it is for
                    yield Ruled(Rule("adapt", pattern, op), tuple(dict.fromkeys(links.pop(key) for key in matched)))


def _joins(link: Link) -> bool:
    """Whether a link is one of several sources, or cuts one in parts: all others are renames, and an op of each target."""
    return len(link.sources) > 1 or (len(link.targets) > 1 and bool(link.op))


@dataclass
class _Node:
    """A module of the source: the targets of all keys below, None among them for a key that must stay where it is."""

    path: tuple[str, ...] = ()
    children: dict[str, _Node] = field(default_factory=dict)
    targets: list[str | None] = field(default_factory=list)


def module_moves(moves: Mapping[str, str | None]) -> dict[str, str]:
    """By module of the source the module of the target that it goes to; only for numbered modules all of whose keys go to one.

    `moves` has the target of each name, None for one that must keep its name for now.
    """
    root = _Node()
    for name, target in moves.items():
        node = root
        for segment in name.split(".")[:-1]:
            node = node.children.setdefault(segment, _Node((*node.path, segment)))
            node.targets.append(target)
    return {".".join(node.path): _common([target for target in node.targets if target is not None]) for node in _chosen(root)}


def _chosen(node: _Node) -> Iterable[_Node]:
    """The topmost modules that are worth a rule of their own."""
    if node.path and node.path[-1].isdecimal() and None not in node.targets and len(node.targets) >= _LEAST:
        module = _common([target for target in node.targets if target is not None])
        if any(segment.isdecimal() for segment in module.split(".")):
            yield node
            return
    for child in node.children.values():
        yield from _chosen(child)


def _common(targets: Sequence[str]) -> str:
    """The module that all targets are in."""
    parts = [target.split(".")[:-1] for target in targets]
    first, last = min(parts), max(parts)
    same = next((at for at, (one, other) in enumerate(zip(first, last, strict=False)) if one != other), min(len(first), len(last)))
    return ".".join(first[:same])


def first_stage(module_moves: Mapping[str, str], known: Known, names: Collection[str]) -> tuple[list[Draft], dict[str, str]]:
    """The rules that move these modules, and what all names are called after them; `goals` are the names that have a link."""
    lines: dict[str, list[Line]] = {head: [] for head in module_moves}
    for name in names:
        head = next((name[:end] for end in _dots(name) if name[:end] in module_moves), None)
        if head is not None:
            lines[head].append(Line((name,), (module_moves[head] + name[len(head) :],)))
    drafts = [
        Draft(
            (f"{row.sources[0]}.{{**rest}}",),
            (f"{row.targets[0]}.{{rest}}",),
            "",
            tuple(moved_line for line in row.lines for moved_line in lines[line.sources[0]]),
        )
        for row in rows(Line((head,), (module,)) for head, module in module_moves.items())
    ]
    moved = {line.sources[0]: line.targets for draft in drafts for line in draft.lines}
    order, _ = in_order(drafts, known, {name: moved.get(name, (name,)) for name in names}, lambda _name, _results: False)
    after: dict[str, str] = {}
    for draft in order:
        for name in known.matched(draft.compiled):
            results = draft.gives(name)
            if results:
                after.setdefault(name, results[0])
    return order, after


def _dots(name: str) -> Iterator[int]:
    return (at for at, letter in enumerate(name) if letter == ".")
