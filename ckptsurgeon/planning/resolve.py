"""Which source tensors stand for each target key, what is done to them, and whether the result fits. Shapes only."""

from __future__ import annotations

from collections.abc import Callable, Collection, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from ckptsurgeon.adapters.chain import Asked, can_compute, decodes, fill_chain, made_dtype
from ckptsurgeon.adapters.op import Op, Shape
from ckptsurgeon.adapters.table import offers, texts
from ckptsurgeon.errors import PlanError, RuleError
from ckptsurgeon.hints import SHOWN, close_names, several, shortened
from ckptsurgeon.planning.apply_rules import Names
from ckptsurgeon.planning.keys import Claim, SourceKey
from ckptsurgeon.planning.legacy_names import BY
from ckptsurgeon.planning.quantised import Codes
from ckptsurgeon.rules import AUTO
from ckptsurgeon.rules.rules import CompiledRule, Rule
from ckptsurgeon.tensors import Checkpoint, Refused


@dataclass(frozen=True)
class Origin:
    """The source tensors of a target key, the ops, filled in, that make one tensor of `shape` and `dtype` of them, and whether it fits.

    `rules` said so; `tied_to` is the tied target key by whose name it was found.
    """

    places: tuple[SourceKey, ...]
    shape: Shape
    dtype: str
    fits: bool
    ops: tuple[Op, ...] = ()
    rules: tuple[Rule, ...] = ()
    tied_to: str | None = None

    @property
    def values(self) -> bool:
        """Whether values are made of codes."""
        return decodes(self.ops)


def find_origins(
    sources: Sequence[Checkpoint],
    target: Checkpoint | None,
    names: Names,
    auto: str | None = None,
    codes: Mapping[SourceKey, Codes] = {},
) -> dict[str, Origin]:
    """For each key of the target that a source has (without a target: for each name): where, and how it is made to fit.

    A key that none has, or has with another shape, follows a key of the target that it is tied to and that fits: they are one tensor.
    `codes` are to be dequantized; their scales go into the values, and nowhere by themselves.
    Raises RuleError, once for all, for adapters that can't be followed or don't give what the target needs.
    """
    if auto not in (None, *AUTO):
        raise PlanError(f"{auto!r} is nothing that may be applied unasked", hint=f"one of {', '.join(AUTO)}")
    known: Mapping[str, Shape] = {} if target is None else {key: tensor.shape for key, tensor in target.items()}
    problems: list[str] = []
    refused: dict[tuple[str, str], list[str]] = {}
    found: dict[str, Origin] = {}
    asked = _asked_of(names, names.claims if target is None else target, problems)
    barred = frozenset() if target is None else kept_out(target, names)
    parts = {(number, name) for (number, _), one in codes.items() for name in (*one.scales, *one.beside)}
    for name, claim in names.claims.items():
        if (target is not None and (name not in target or name in barred)) or parts.issuperset(claim.places):
            continue
        extra, rule = asked.get(name, ((), None))
        whole = Claim(claim.places, (*claim.asked, *extra), (*claim.rules, *([rule] if rule else [])))
        try:
            found[name] = _origin(name, dequantized(whole, codes), sources, known, names, auto)
        except RuleError as error:
            words = error.reason + (f"; {error.hint}" if error.hint else "")
            refused.setdefault((", ".join(map(str, whole.rules)), words), []).append(name)
    problems += [f"{rules}: {several(named)}: {words}" for (rules, words), named in refused.items()]
    for group in target.ties if target is not None else ():
        _follow(group, found, problems)
    if problems:
        from ckptsurgeon.planning.plan_types import way_to_look

        first = sources[0]
        look = way_to_look(first.path, first.root, first.in_memory == "model", None if target is None else target.path)
        raise RuleError("adapters that can't be followed", problems=shortened(problems), hint=f"see the names: {look}")
    return found if target is None else {key: found[key] for key in target if key in found}


def dequantized(claim: Claim, codes: Mapping[SourceKey, Codes]) -> Claim:
    """A claim with the scales of its codes, and values made of both before anything else. RuleError for codes and values together."""
    read = [codes[place] for place in claim.places if place in codes]
    if not read:
        return claim
    ops = [one.op for one in read if one.op is not None]
    if len(ops) < len(claim.places) or any(op != ops[0] for op in ops):
        raise RuleError(f"joins {read[0].key}, which is {read[0].scheme}, with what is not, or is in another way")
    places = tuple(place for key, one in zip(claim.places, read, strict=True) for place in (key, (key[0], one.scales[0])))
    return replace(claim, places=places, asked=(Asked(ops[0]), *claim.asked))


def _follow(group: Sequence[str], found: dict[str, Origin], problems: list[str]) -> None:
    """Let tied keys of the target, one tensor, have one value: that of the first that adapters make, or of the first that fits."""
    fitting = [key for key in group if key in found and found[key].fits]
    adapted = [key for key in fitting if found[key].ops]
    if not fitting:
        return
    first = (adapted or fitting)[0]
    lead = found[first]
    others = [key for key in adapted if found[key].ops != lead.ops]
    if others:
        problems.append(f"{first} and {others[0]} are one tensor in the target, and each is adapted in its own way")
    # One that fits as it is, and is another tensor in the source, is told apart ("untied"); under an adapter it would be lost.
    fits = set(fitting)
    rest = [key for key in group if key not in fits or (adapted and not found[key].ops)]
    found.update(dict.fromkeys(rest, Origin(lead.places, lead.shape, lead.dtype, True, lead.ops, lead.rules, first)))


def is_ruled(names: Names, target: Checkpoint | None) -> Callable[[str], bool]:
    """Whether a rule says what becomes of a key of the target: an init, a keep, or a drop of what would land there. A rule that names a key
    holds for all keys that are tied to it."""
    rules = (*names.inits, *names.keeps)
    tied = {key: group for group in (target.ties if target is not None else ()) for key in group}

    def named(key: str) -> bool:
        return any(one in names.names_of_dropped or any(rule.match(one) is not None for rule in rules) for one in tied.get(key, (key,)))

    return named


def without_a_rule(names: Names, target: Checkpoint, targets: Iterable[str], sources: Iterable[str]) -> tuple[str, ...]:
    """Those of some keys of the target, and of the one source, that no rule names."""
    ruled = is_ruled(names, target)
    return (
        *(key for key in targets if not ruled(key)),
        *(key for key in sources if not any(map(ruled, names.names_of.get((0, key), ())))),
    )


def kept_out(target: Checkpoint, names: Names) -> dict[str, Rule]:
    """The target's keys that a keep rule names, with all that are tied to them."""
    kept = {key: rule.rule for rule in reversed(names.keeps) for key in target if rule.match(key) is not None}
    for group in target.ties:
        rule = next((kept[key] for key in group if key in kept), None)
        if rule is not None:
            kept.update(dict.fromkeys(group, rule))
    return kept


def _asked_of(names: Names, keys: Collection[str], problems: list[str]) -> dict[str, tuple[tuple[Asked, ...], Rule]]:
    """The ops that rules ask of one of the output's keys by its name; the first rule that matches."""
    asked: dict[str, tuple[tuple[Asked, ...], Rule]] = {}
    for rule in names.adapts:
        matched = [key for key in keys if rule.match(key) is not None]
        taken = [key for key in matched if key in names.claims]
        new = [key for key in taken if key not in asked]
        asked.update({key: (tuple(Asked(op, siblings=(key,)) for op in rule.ops), rule.rule) for key in new})
        if not matched and any(rule.match(key) is not None for _, key in names.names_of):
            key = next(key for _, key in names.names_of if rule.match(key) is not None)
            problems.append(f"{rule.rule}: {key!r} is a source's name, and not the target's: {_link(key, keys)}")
        elif not matched:
            close = _meant(rule, keys) if len(problems) < SHOWN else ""
            problems.append(f"{rule.rule} matches nothing in the target{close}")
        elif not taken:
            problems.append(f"{rule.rule}: no source gives {matched[0]!r}: rename one to it, or link it: 'A -> {matched[0]}'")
        elif not new:
            problems.append(f"{rule.rule} never gets a turn: earlier rules adapt all of its keys")
    for rule in names.keeps:
        if not any(rule.match(key) is not None for key in keys):
            problems.append(f"{rule.rule} matches nothing in the target{_meant(rule, keys)}")
    return asked


def _link(key: str, keys: Collection[str]) -> str:
    close = close_names(key, keys, 1)
    return f"link it: '{key} -> {close[0]}'" if close else "link it to the target's, as in 'a -> b'"


def _meant(rule: CompiledRule, keys: Collection[str]) -> str:
    """What a rule that matches nothing may have meant, in words."""
    from ckptsurgeon.rules.meant import meant_words

    return meant_words(rule.patterns[0][1].text, keys)


def _origin(name: str, claim: Claim, sources: Sequence[Checkpoint], known: Mapping[str, Shape], names: Names, auto: str | None) -> Origin:
    given = [sources[number][key] for number, key in claim.places]
    wanted = known.get(name)
    dtype = given[0].dtype
    mixed = {tensor.dtype for tensor in given}
    if not claim.asked and len(given) == 1:
        shape = given[0].shape
        safe = offers(shape, wanted, safe=True) if auto == "safe" and wanted is not None and shape != wanted else ()
        if len(safe) != 1:
            return Origin(claim.places, shape, dtype, wanted in (None, shape), (), claim.rules)
        claim = Claim(claim.places, (Asked(safe[0], siblings=(name,)),), (*claim.rules, Rule("adapt", name, f"{texts(safe)}", BY)))
    ops, shapes = fill_chain(claim.asked, [tensor.shape for tensor in given], wanted, known, names.outside.shapes)
    if len(shapes) != 1:
        raise RuleError(f"leaves {len(shapes)} tensors of {len(given)}", hint="end the chain with concat, stack or average")
    dtype = made_dtype(ops, dtype)
    if len(mixed) > 1 and made_dtype(ops[:1], "") == "":
        raise RuleError(
            f"joins {' and '.join(sorted(mixed))}",
            hint="convert one of their files to the dtype of the other first: ckptsurgeon help merge",
        )
    if not can_compute(ops, dtype):
        raise RuleError(f"computes values, and {claim.places[0][1]} is {dtype}")
    if wanted is not None and shapes[0] != wanted:
        if not any(rule.kind == "adapt" for rule in claim.rules):  # an average, which no rule has promised to fit
            return Origin(claim.places, shapes[0], dtype, False, (), claim.rules)
        raise RuleError(f"gives {shapes[0]}, and the target has {wanted}")
    return Origin(claim.places, shapes[0], dtype, True, ops, claim.rules)


def reasons(rules: Iterable[Rule]) -> str:
    """The rules that led somewhere, as a plan's reason says it."""
    return ", ".join(dict.fromkeys(map(str, rules)))


def find_refused(source: Checkpoint, number: int, names: Names) -> dict[str, str]:
    """The values of a source that can't be carried and that no rule drops, each with its reason."""
    return {key: entry.reason for key, entry in source.entries.items() if isinstance(entry, Refused) and (number, key) not in names.dropped}


def find_unkept(target: Checkpoint, given: Container[str]) -> dict[str, str]:
    """The values of a target file that can't be kept and that no source gives, each with its reason."""
    own = target.entries if target.kind == "file" else {}
    return {key: entry.reason for key, entry in own.items() if isinstance(entry, Refused) and key not in given}
