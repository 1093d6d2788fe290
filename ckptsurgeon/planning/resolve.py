"""Finds the source tensors of each target key, the ops that are applied to them, and whether the result fits. Shapes only."""

from __future__ import annotations

from collections.abc import Callable, Collection, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from ckptsurgeon.adapters.chain import RuleOp, can_compute, decodes, fill_chain, made_dtype
from ckptsurgeon.adapters.op import Op, Shape
from ckptsurgeon.adapters.table import offers, texts
from ckptsurgeon.errors import PlanError, RuleError
from ckptsurgeon.hints import SHOWN, close_names, several, shortened
from ckptsurgeon.planning.apply_rules import Names
from ckptsurgeon.planning.keys import Claim, SourceKey
from ckptsurgeon.planning.legacy_names import BY
from ckptsurgeon.planning.quantised_weights.find import Codes
from ckptsurgeon.rules import AUTO
from ckptsurgeon.rules.patterns import literal
from ckptsurgeon.rules.rules import CompiledRule, Rule
from ckptsurgeon.tensors import Checkpoint, Refused


@dataclass(frozen=True)
class Origin:
    """Where a target key gets its value from.

    Attributes:
        source_keys: the source tensors, in order.
        shape, dtype: those of the result.
        fits: whether the result fits the target key.
        ops: the ops that make one tensor of the sources, with all arguments filled in.
        rules: the rules that were applied.
        tied_to: the tied target key whose origin this is; None for the key's own.
    """

    source_keys: tuple[SourceKey, ...]
    shape: Shape
    dtype: str
    fits: bool
    ops: tuple[Op, ...] = ()
    rules: tuple[Rule, ...] = ()
    tied_to: str | None = None

    @property
    def values(self) -> bool:
        """Whether the ops dequantize."""
        return decodes(self.ops)


def find_origins(
    sources: Sequence[Checkpoint],
    target: Checkpoint | None,
    names: Names,
    auto: str | None = None,
    codes: Mapping[SourceKey, Codes] = {},
) -> dict[str, Origin]:
    """The origin of each target key that a source has; without a target, of each name.

    A key that no source has with its shape gets the origin of a tied target key that fits: they are one tensor.

    Args:
        codes: the quantised weights that are dequantized; their scales are used for that and written nowhere.

    Raises:
        RuleError: all adapters that can't be applied or don't give what the target needs, together.
    """
    if auto not in (None, *AUTO):
        raise PlanError(f"{auto!r} is nothing that may be applied unasked", hint=f"one of {', '.join(AUTO)}")
    known: Mapping[str, Shape] = {} if target is None else {key: tensor.shape for key, tensor in target.items()}
    problems: list[str] = []
    refused: dict[tuple[str, str], list[str]] = {}
    origins: dict[str, Origin] = {}
    adapts = _adapts_of(names, names.claims if target is None else target, problems)
    kept = frozenset() if target is None else kept_out(target, names)
    parts = {(number, name) for (number, _), weight in codes.items() for name in (*weight.scales, *weight.extras)}
    for name, claim in names.claims.items():
        if (target is not None and (name not in target or name in kept)) or parts.issuperset(claim.source_keys):
            continue
        extra, rule = adapts.get(name, ((), None))
        adapted = Claim(claim.source_keys, (*claim.ops, *extra), (*claim.rules, *([rule] if rule else [])))
        try:
            origins[name] = _origin(name, dequantized(adapted, codes), sources, known, names, auto)
        except RuleError as error:
            words = error.reason + (f"; {error.hint}" if error.hint else "")
            refused.setdefault((", ".join(map(str, adapted.rules)), words), []).append(name)
    problems += [f"{rules}: {several(named)}: {words}" for (rules, words), named in refused.items()]
    for group in target.ties if target is not None else ():
        _follow(group, origins, problems)
    if problems:
        from ckptsurgeon.planning.plan_types import viewing_command

        first = sources[0]
        look = viewing_command(first.path, first.root, first.in_memory == "model", None if target is None else target.path)
        raise RuleError("adapters that can't be followed", problems=shortened(problems), hint=f"see the names: {look}")
    return origins if target is None else {key: origins[key] for key in target if key in origins}


def dequantized(claim: Claim, codes: Mapping[SourceKey, Codes]) -> Claim:
    """A claim that dequantizes its codes first, with their scales added to its sources. RuleError for codes and plain values together."""
    weights = [codes[source_key] for source_key in claim.source_keys if source_key in codes]
    if not weights:
        return claim
    ops = [weight.op for weight in weights if weight.op is not None]
    if len(ops) < len(claim.source_keys) or any(op != ops[0] for op in ops):
        raise RuleError(f"joins {weights[0].key}, which is {weights[0].scheme}, with what is not, or is in another way")
    source_keys = tuple(
        source_key for key, weight in zip(claim.source_keys, weights, strict=True) for source_key in (key, (key[0], weight.scales[0]))
    )
    return replace(claim, source_keys=source_keys, ops=(RuleOp(ops[0]), *claim.ops))


def _follow(group: Sequence[str], origins: dict[str, Origin], problems: list[str]) -> None:
    """Give tied target keys one origin: that of the first key with adapters, else of the first key that fits."""
    fitting = [key for key in group if key in origins and origins[key].fits]
    adapted = [key for key in fitting if origins[key].ops]
    if not fitting:
        return
    first = (adapted or fitting)[0]
    lead = origins[first]
    differing = [key for key in adapted if origins[key].ops != lead.ops]
    if differing:
        problems.append(f"{first} and {differing[0]} are one tensor in the target, and each is adapted in its own way")
    # A key that fits unchanged keeps its own origin: if the source has another tensor for it, the finding "untied" reports that.
    fits = set(fitting)
    followers = [key for key in group if key not in fits or (adapted and not origins[key].ops)]
    origins.update(dict.fromkeys(followers, Origin(lead.source_keys, lead.shape, lead.dtype, True, lead.ops, lead.rules, first)))


def is_ruled(names: Names, target: Checkpoint | None) -> Callable[[str], bool]:
    """A function that says whether a rule names a target key: an init, a keep, or a drop of the source key that would get this name. A rule
    that names a key also applies to all keys that are tied to it."""
    rules = (*names.inits, *names.keeps)
    tied = {key: group for group in (target.ties if target is not None else ()) for key in group}

    def named(key: str) -> bool:
        return any(name in names.names_of_dropped or any(rule.match(name) is not None for rule in rules) for name in tied.get(key, (key,)))

    return named


def without_a_rule(names: Names, target: Checkpoint, targets: Iterable[str], sources: Iterable[str]) -> tuple[str, ...]:
    """Those of the given keys of the target and of the single source that no rule names."""
    ruled = is_ruled(names, target)
    return (
        *(key for key in targets if not ruled(key)),
        *(key for key in sources if not any(map(ruled, names.names_of.get((0, key), ())))),
    )


def kept_out(target: Checkpoint, names: Names) -> dict[str, Rule]:
    """The target's keys that a keep rule names, and all keys that are tied to them, each with the rule."""
    kept = {key: rule.rule for rule in reversed(names.keeps) for key in target if rule.match(key) is not None}
    for group in target.ties:
        rule = next((kept[key] for key in group if key in kept), None)
        if rule is not None:
            kept.update(dict.fromkeys(group, rule))
    return kept


def _adapts_of(names: Names, keys: Collection[str], problems: list[str]) -> dict[str, tuple[tuple[RuleOp, ...], Rule]]:
    """For each output key, the ops of the first adapt rule without `->` that matches it, and the rule."""
    adapts_of_key: dict[str, tuple[tuple[RuleOp, ...], Rule]] = {}
    for rule in names.adapts:
        matched = [key for key in keys if rule.match(key) is not None]
        taken = [key for key in matched if key in names.claims]
        new = [key for key in taken if key not in adapts_of_key]
        adapts_of_key.update({key: (tuple(RuleOp(op, siblings=(key,)) for op in rule.ops), rule.rule) for key in new})
        if not matched and any(rule.match(key) is not None for _, key in names.names_of):
            key = next(key for _, key in names.names_of if rule.match(key) is not None)
            problems.append(f"{rule.rule}: {key!r} is a source's name, and not the target's: {_link(key, keys)}")
        elif not matched:
            close = _meant(rule, keys) if len(problems) < SHOWN else ""
            problems.append(f"{rule.rule} matches nothing in the target{close}")
        elif not taken:
            like = close_names(matched[0], list(dict.fromkeys(key for _, key in names.names_of)), 1)
            link = f"link it: '{literal(like[0])} -> {literal(matched[0])}'" if like else "link one to it"
            problems.append(f"{rule.rule}: no source gives {matched[0]!r}: rename one to it, or {link}")
        elif not new:
            problems.append(f"{rule.rule} never gets a turn: earlier rules adapt all of its keys")
    for rule in names.keeps:
        if not any(rule.match(key) is not None for key in keys):
            problems.append(f"{rule.rule} matches nothing in the target{_meant(rule, keys)}")
    return adapts_of_key


def _link(key: str, keys: Collection[str]) -> str:
    close = close_names(key, keys, 1)
    return f"link it: '{key} -> {close[0]}'" if close else "link it to the target's, as in 'a -> b'"


def _meant(rule: CompiledRule, keys: Collection[str]) -> str:
    """Which pattern was probably meant by a rule that matches nothing, in words."""
    from ckptsurgeon.rules.meant import meant_words

    return meant_words(rule.patterns[0][1].text, keys)


def _origin(name: str, claim: Claim, sources: Sequence[Checkpoint], known: Mapping[str, Shape], names: Names, auto: str | None) -> Origin:
    tensors = [sources[number][key] for number, key in claim.source_keys]
    target_shape = known.get(name)
    dtype = tensors[0].dtype
    dtypes = {tensor.dtype for tensor in tensors}
    if not claim.ops and len(tensors) == 1:
        shape = tensors[0].shape
        safe = offers(shape, target_shape, safe=True) if auto == "safe" and target_shape is not None and shape != target_shape else ()
        if len(safe) != 1:
            return Origin(claim.source_keys, shape, dtype, target_shape in (None, shape), (), claim.rules)
        claim = Claim(claim.source_keys, (RuleOp(safe[0], siblings=(name,)),), (*claim.rules, Rule("adapt", name, f"{texts(safe)}", BY)))
    ops, shapes = fill_chain(claim.ops, [tensor.shape for tensor in tensors], target_shape, known, names.outside.shapes)
    if len(shapes) != 1:
        raise RuleError(f"leaves {len(shapes)} tensors of {len(tensors)}", hint="end the chain with concat, stack or average")
    dtype = made_dtype(ops, dtype)
    if len(dtypes) > 1 and made_dtype(ops[:1], "") == "":
        raise RuleError(
            f"joins {' and '.join(sorted(dtypes))}",
            hint="convert one of their files to the dtype of the other first: ckptsurgeon help merge",
        )
    if not can_compute(ops, dtype):
        raise RuleError(f"computes values, and {claim.source_keys[0][1]} is {dtype}")
    if target_shape is not None and shapes[0] != target_shape:
        if not any(rule.kind == "adapt" for rule in claim.rules):  # an average, which no rule has promised to fit
            return Origin(claim.source_keys, shapes[0], dtype, False, (), claim.rules)
        raise RuleError(f"gives {shapes[0]}, and the target has {target_shape}")
    return Origin(claim.source_keys, shapes[0], dtype, True, ops, claim.rules)


def reasons(rules: Iterable[Rule]) -> str:
    """Rules as the reason of a plan's step."""
    return ", ".join(dict.fromkeys(map(str, rules)))


def find_refused(source: Checkpoint, number: int, names: Names) -> dict[str, str]:
    """The values of a source that can't be carried and that no rule drops, each with its reason."""
    return {key: entry.reason for key, entry in source.entries.items() if isinstance(entry, Refused) and (number, key) not in names.dropped}


def find_unkept(target: Checkpoint, carried: Container[str]) -> dict[str, str]:
    """The values of a target file that can't be kept and that no source gives, each with its reason."""
    own = target.entries if target.kind == "file" else {}
    return {key: entry.reason for key, entry in own.items() if isinstance(entry, Refused) and key not in carried}
