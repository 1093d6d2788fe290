"""Holds a source's names, shapes and dtypes against a target's. Pure: values in, a `Diff` out; no file, no torch, no printing."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from ckptsurgeon.adapters.chain import filled_elements
from ckptsurgeon.adapters.op import Op
from ckptsurgeon.adapters.table import offers, texts
from ckptsurgeon.command import NOT_IN_MEMORY, InMemory, Option
from ckptsurgeon.low_rank import lost_factors
from ckptsurgeon.planning.apply_rules import NO_OUTSIDE, name_sources
from ckptsurgeon.planning.links import Link
from ckptsurgeon.planning.own_loading.computed import Computed, find_computed
from ckptsurgeon.planning.prefixes.find import Prefix
from ckptsurgeon.planning.prefixes.rivals import Way, ways_to_choose, ways_to_exchange
from ckptsurgeon.planning.quantised import Codes, find
from ckptsurgeon.planning.resolve import Origin, find_origins, find_refused, find_unkept, kept_out
from ckptsurgeon.report import Coverage
from ckptsurgeon.rules.loading_code import Taken
from ckptsurgeon.rules.rules import Outside, Rule
from ckptsurgeon.shown import Result
from ckptsurgeon.tensors import Checkpoint, TensorMeta
from ckptsurgeon.wrappers import WRAPPERS, unwrap

# From what is only in a source and only in a target to what of both goes together: the floor above knows how to.
Matcher = Callable[[Mapping[str, TensorMeta], Mapping[str, TensorMeta]], Sequence[Link]]
MOST = 2_000  # missing and extra tensors that are matched for hints


@dataclass(frozen=True)
class Mismatch:
    """A key in both, with two shapes."""

    key: str
    source_shape: tuple[int, ...]
    target_shape: tuple[int, ...]
    source: str


@dataclass(frozen=True)
class Offer:
    """An adapter, as a rule would write it, that makes a mismatched key fit."""

    key: str
    source_shape: tuple[int, ...]
    target_shape: tuple[int, ...]
    adapter: str
    safe: bool = False


@dataclass(frozen=True)
class Adapted:
    """A matched key that adapters make of its sources: these, in order, and the chain of ops."""

    key: str
    sources: tuple[str, ...]
    ops: tuple[Op, ...]


@dataclass(frozen=True)
class Loaded:
    """A key that the model's own loading code takes, of a name that the model has not, or a key of the model that it computes from such;
    and what becomes of it, in words. `planned` is False for what a plan can't do."""

    key: str
    words: str
    planned: bool = True


@dataclass(frozen=True)
class DtypeChange:
    """A matched key whose dtype (safetensors' code) differs."""

    key: str
    source_dtype: str
    target_dtype: str


@dataclass(frozen=True)
class Hint:
    """A missing key's likely source: the one extra key of the same shape and last segment, by the name that patterns see."""

    missing: str
    extra: str


@dataclass(frozen=True, repr=False)
class Diff(Result):
    """What of a target a source covers.

    Every key of the target is in exactly one of `matched`, `missing` and `mismatched`, by the target's name. Every key of the source
    matches something, or is in `extra`, `mismatched`, `dropped` or `refused`, by its own name. Values that are no tensors (`_extra_state`)
    count as keys, as they do for torch.

    Attributes:
        source: the source's path.
        target: the target's path or spec.
        root: the nested dict of the source that was taken.
        prefix: how the source's names were changed before they were compared.
        matched: keys that fit.
        missing: target keys that the source does not have.
        extra: source keys that the target does not have.
        mismatched: keys in both with two shapes.
        dtype_changed: matched keys whose dtype differs.
        coverage: the share of the target's tensors and elements that the source gives.
        dropped: source keys that a rule leaves out.
        hints: for a missing key, the one extra key of the same shape and last segment.
        refused: source keys whose values can't be read safely, with the reason.
        adapted: matched keys that adapters make of their sources.
        offers: for a mismatched key, the adapters that would make it fit.
        likely: what missing keys probably are, as matching the leftovers says, save what `hints` say already.
        quantised: the source's weights that are codes beside scales.
        target_quantised: the target's.
        parted_codes: keys of `quantised` that a merge would cast or part from their scales.
        loaded: keys that the model's own loading code takes.
        rivals: prefixes between which nothing decides, so that none is applied.
        warnings: what is said of the source's keys that nothing takes.
        exchanges: renames of one prefix to another that would explain most of what is left, the best first.
        options: the rules that it was made with, as options of a command.
        unkept: keys of a target file whose values can't be kept, so that no merge can take it as its target.
        in_memory: of source and target, `file`, `model` or `state_dict` for what no path or spec names.
    """

    source: str
    target: str
    root: str
    prefix: Prefix
    matched: tuple[str, ...]
    missing: tuple[str, ...]
    extra: tuple[str, ...]
    mismatched: tuple[Mismatch, ...]
    dtype_changed: tuple[DtypeChange, ...]
    coverage: Coverage
    dropped: tuple[str, ...] = ()
    hints: tuple[Hint, ...] = ()
    refused: Mapping[str, str] = field(default_factory=dict)
    adapted: tuple[Adapted, ...] = ()
    offers: tuple[Offer, ...] = ()
    likely: tuple[Link, ...] = ()
    quantised: tuple[Codes, ...] = ()
    target_quantised: tuple[Codes, ...] = ()
    parted_codes: tuple[str, ...] = ()
    loaded: tuple[Loaded, ...] = ()
    rivals: tuple[Way, ...] = ()
    exchanges: tuple[Way, ...] = ()
    warnings: tuple[str, ...] = ()
    options: tuple[Option, ...] = field(default=(), repr=False, compare=False)
    unkept: tuple[str, ...] = field(default=(), repr=False, compare=False)
    in_memory: InMemory = field(default=NOT_IN_MEMORY, repr=False, compare=False)

    @property
    def same(self) -> bool:
        """Whether the source fits the target exactly: no missing, extra or mismatched key, and no other dtype."""
        return not (self.missing or self.extra or self.mismatched or self.dtype_changed or self.refused)


def compare(
    source: Checkpoint,
    target: Checkpoint,
    rules: Iterable[Rule] = (),
    outside: Outside = NO_OUTSIDE,
    auto: str | None = None,
    match: Matcher | None = None,
) -> Diff:
    """Compare a source with a target, after wrapper prefixes and rules; with `auto` "safe", after what can't change a tensor's meaning.

    `match` is asked for what missing keys probably are, and only where keys are left over on both sides.
    A key of the target that is tied to a matched one is matched too. Raises RuleError for rules that match nothing or collide, and for
    adapters that can't be followed.
    """
    rules = tuple(rules)
    names = name_sources([source], target, rules, outside, auto=auto)
    computed = find_computed([source], target, names)
    origins = {key: origin for key, origin in find_origins([source], target, names, auto).items() if key not in computed.made}
    refused = find_refused(source, 0, names)
    given = {name: key for name, (_, key) in names.entries.items() if key not in refused}
    matched = [key for key in target if key in computed.made or (key in origins and origins[key].fits)]
    missing = [key for key in target if key not in origins and key not in computed.made]
    mismatched = {key: origin.places[0][1] for key, origin in origins.items() if not origin.fits}
    kept = kept_out(target, names)
    codes = find(source)
    used = {key for origin in origins.values() for _, key in origin.places}
    used |= {key for places in computed.places.values() for _, key in places}
    used |= {key for name, key in given.items() if name in target.entries}
    used |= {key for name in kept if name in names.claims for _, key in names.claims[name].places}
    extra = [key for _, key in names.names_of if key not in used and key not in refused]
    left = [key for key in extra if key in source]
    exchanges = ways_to_exchange({key: source[key] for key in left}, {key: target[key] for key in missing})
    led = exchanges[0].mapping if exchanges else {}
    open_keys = [key for key in missing if key not in led.values()]
    over = [key for key in left if unwrap(key, WRAPPERS) not in led]
    likely = _likely(open_keys, over, source, target, match)
    hints = _hints(open_keys, over, source, target, names.prefixes[0], likely)
    return Diff(
        source=source.path,
        target=target.path,
        root=source.root,
        prefix=names.prefixes[0],
        matched=(*matched, *(key for key in target.entries if key in given)),
        missing=(*missing, *(key for key in target.entries if key not in given)),
        extra=tuple(extra),
        mismatched=tuple(Mismatch(key, source[origin].shape, target[key].shape, origin) for key, origin in mismatched.items()),
        dtype_changed=tuple(
            DtypeChange(key, origins[key].dtype, target[key].dtype)
            for key in matched
            if key in origins and origins[key].dtype != target[key].dtype
        ),
        coverage=Coverage.of(
            {key: target[key] for key in matched},
            target,
            sum(filled_elements(origins[key].ops, origins[key].shape) for key in matched if key in origins),
        ),
        dropped=tuple(key for _, key in names.dropped),
        hints=hints,
        refused=refused,
        adapted=tuple(
            Adapted(key, tuple(name for _, name in origins[key].places), origins[key].ops)
            for key in matched
            if key in origins and origins[key].ops
        ),
        offers=tuple(
            Offer(
                key, source[origin].shape, target[key].shape, texts([op]), bool(offers(source[origin].shape, target[key].shape, safe=True))
            )
            for key, origin in mismatched.items()
            for op in offers(source[origin].shape, target[key].shape)
        ),
        likely=_beyond(likely, hints),
        quantised=tuple(codes.values()),
        target_quantised=tuple(find(target).values()),
        parted_codes=_parted(origins, codes, target),
        rivals=ways_to_choose([source], target, names, rules)[0],
        exchanges=exchanges,
        warnings=tuple(words for words in (lost_factors(extra),) if words is not None),
        loaded=_loaded(outside.taken.get(0), computed),
        unkept=tuple(find_unkept(target, given)),
        in_memory=(source.in_memory, target.in_memory),
    )


def _loaded(taken: Taken | None, computed: Computed) -> tuple[Loaded, ...]:
    if taken is None:
        return ()
    return (
        *(Loaded(name, words) for name, words in taken.moved()),
        *(Loaded(key, one.words) for key, one in computed.made.items()),
        *(Loaded(key, f"{one.words}: a merge can't, since {why}", False) for key, (one, why) in computed.refused.items()),
        *(Loaded(path or "the model itself", f"its own loading code fails: {reason}", False) for path, reason in taken.failed.items()),
    )


def _parted(origins: Mapping[str, Origin], codes: Mapping[str, Codes], target: Checkpoint) -> tuple[str, ...]:
    """The source's codes that the target does not get as they are, with their scales."""
    whole = {origin.places[0][1] for origin in origins.values() if origin.fits and not origin.ops}
    found = []
    for key, origin in origins.items():
        read = [codes[name] for _, name in origin.places if name in codes]
        as_it_is = origin.dtype == target[key].dtype and not origin.ops and all(whole.issuperset(one.here) for one in read)
        found += [one.key for one in read if origin.fits and not as_it_is]
    return tuple(found)


def _likely(
    missing: Sequence[str], extra: Sequence[str], source: Checkpoint, target: Checkpoint, match: Matcher | None
) -> tuple[Link, ...]:
    """What is only in the target matched with what is only in the source, where there is not too much of both."""
    if match is None or not (0 < len(missing) <= MOST and 0 < len(extra) <= MOST):
        return ()
    return tuple(match({key: source[key] for key in extra}, {key: target[key] for key in missing}))


def _beyond(likely: Sequence[Link], hints: Sequence[Hint]) -> tuple[Link, ...]:
    """What is likely and no hint says."""
    told = {hint.missing for hint in hints}
    return tuple(one for one in likely if one.op or not set(one.targets) <= told)


def _hints(
    missing: Sequence[str], extra: Sequence[str], source: Checkpoint, target: Checkpoint, prefix: Prefix, likely: Sequence[Link]
) -> tuple[Hint, ...]:
    """Missing keys with exactly one likely source. Evidence: equal shape and equal last segment, and no other key on either side
    that has these; nothing certain speaks against it."""
    pool: dict[tuple[tuple[int, ...], str], list[str]] = defaultdict(list)
    for key in extra:
        pool[(source[key].shape, key.rpartition(".")[2])].append(key)
    wanted: dict[tuple[tuple[int, ...], str], list[str]] = defaultdict(list)
    for key in missing:
        wanted[(target[key].shape, key.rpartition(".")[2])].append(key)
    alone = [(keys[0], pool[form][0]) for form, keys in wanted.items() if len(keys) == 1 and len(pool.get(form, ())) == 1]
    other = {key: one.sources for one in likely if one.certain for key in one.targets}
    return tuple(Hint(key, prefix.bare(given)) for key, given in alone if other.get(key, (given,)) == (given,))
