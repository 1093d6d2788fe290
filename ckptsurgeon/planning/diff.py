"""Compares a source's names, shapes and dtypes with a target's. Pure: values in, a `Diff` out; no file, no torch, no printing."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from ckptsurgeon.adapters.chain import filled_elements
from ckptsurgeon.adapters.op import Op
from ckptsurgeon.command import NOT_IN_MEMORY, Command, InMemory, Option, at_root
from ckptsurgeon.formats.registry import named
from ckptsurgeon.planning.apply_rules import NO_OUTSIDE, name_sources
from ckptsurgeon.planning.legacy_names import is_counter
from ckptsurgeon.planning.links import Link
from ckptsurgeon.planning.own_loading.computed import Computed, find_computed
from ckptsurgeon.planning.own_loading.conversions import Applied
from ckptsurgeon.planning.prefixes.find import Prefix
from ckptsurgeon.planning.prefixes.rivals import NameChange, exchanges_with_rules, rivals_with_rules
from ckptsurgeon.planning.prefixes.unchanged import set_aside
from ckptsurgeon.planning.quantised_weights.find import Codes, find
from ckptsurgeon.planning.resolve import Origin, find_origins, find_refused, find_unkept, kept_out, without_a_rule
from ckptsurgeon.report import Coverage
from ckptsurgeon.rules.loading_code import Taken
from ckptsurgeon.rules.patterns import literal
from ckptsurgeon.rules.rules import Outside, Rule, rule_options
from ckptsurgeon.shown import Result
from ckptsurgeon.tensors import Checkpoint


@dataclass(frozen=True)
class Mismatch:
    """A key that is in both, with different shapes."""

    key: str
    source_shape: tuple[int, ...]
    target_shape: tuple[int, ...]
    source: str


@dataclass(frozen=True)
class RenamedHead:
    """A missing weight that is probably the same head as an extra one, with another name and another number of classes."""

    source: str
    target: str
    source_shape: tuple[int, ...]
    target_shape: tuple[int, ...]

    @property
    def words(self) -> str:
        """The guess in words, after the key of the missing weight."""
        new, old = self.target_shape[0], self.source_shape[0]
        return f"looks like the head under another name, with {new:,} class{'' if new == 1 else 'es'} instead of {old:,}: fresh"


@dataclass(frozen=True)
class Adapted:
    """A matched key whose value adapters make from its sources: the sources, in order, and the chain of ops."""

    key: str
    sources: tuple[str, ...]
    ops: tuple[Op, ...]


@dataclass(frozen=True)
class Loaded:
    """A key that the model has no parameter for and that its own loading code handles, or a key of the model that this code computes.

    `words` says what becomes of it; `planned` is False where a plan can't do that.
    """

    key: str
    words: str
    planned: bool = True


@dataclass(frozen=True)
class DtypeChange:
    """A matched key with different dtypes (safetensors codes)."""

    key: str
    source_dtype: str
    target_dtype: str


@dataclass(frozen=True)
class Offer:
    """An adapter that makes a mismatched key fit, in the form that a rule has it.

    Attributes:
        key: the target's key.
        source_shape, target_shape: the two shapes.
        adapter: the adapter; empty where none fits, and the key keeps the target's value.
        role: what the key is and what the adapter does, in words.
        sure: whether the next command includes it; an adapter that the user has to decide on is only shown.
        safe: whether it can't change the meaning of a tensor, so that `--auto safe` applies it.
    """

    key: str
    source_shape: tuple[int, ...]
    target_shape: tuple[int, ...]
    adapter: str = ""
    role: str = ""
    sure: bool = False
    safe: bool = False


@dataclass(frozen=True)
class Resize:
    """Offers with the same role and adapter, and the rules for them; no rules where no adapter fits."""

    offers: tuple[Offer, ...]
    rules: tuple[Rule, ...]

    @property
    def role(self) -> str:
        """What the keys are."""
        return self.offers[0].role

    @property
    def sure(self) -> bool:
        """Whether the next command includes the rules."""
        return bool(self.rules) and self.offers[0].sure


@dataclass(frozen=True)
class Advice:
    """The options that the next command gets in addition to those that the diff was made with.

    Attributes:
        rules: rules for all that is certain, including adapters for other sizes.
        match: whether the command uses `--match` in place of the rules of the links, which is shorter.
        auto: whether the command uses `--auto safe` for names that a library renamed and for dimensions of size 1.
        links: which source keys the missing keys probably are, certain or not.
        carried: the rules of the certain links, whether the command has these rules or `--match`.
        skipped: whether matching was skipped because there are too many keys.
        sizes: the keys of another size, with adapters.
        reaches: the coverage with all of these options; None where that is no more than the diff covers already.
        open: the target's keys that still get no value from the source.
        partly: the target's keys of which a part is filled up.
    """

    rules: tuple[Rule, ...] = ()
    match: bool = False
    auto: bool = False
    links: tuple[Link, ...] = ()
    carried: tuple[Rule, ...] = ()
    skipped: bool = False
    sizes: tuple[Resize, ...] = ()
    reaches: Coverage | None = None
    open: tuple[str, ...] = ()
    partly: tuple[str, ...] = ()

    @property
    def offers(self) -> tuple[Offer, ...]:
        """Every adapter that is offered for a key."""
        return tuple(offer for resize in self.sizes for offer in resize.offers if offer.adapter)

    @property
    def renames(self) -> tuple[tuple[str, str], ...]:
        """The target's and the source's key of each link that is certain and only renames."""
        return tuple((link.targets[0], link.sources[0]) for link in self.links if link.is_rename)

    @property
    def options(self) -> tuple[Option, ...]:
        """These options in the form of a command's."""
        return (*rule_options(self.rules), *([("auto", "safe")] if self.auto else []), *([("match",)] if self.match else []))

    @property
    def uncertain(self) -> tuple[Link, ...]:
        """Links that the next command does not include."""
        return tuple(link for link in self.links if not (link.certain and self.carried))


@dataclass(frozen=True, repr=False)
class Diff(Result):
    """Which keys of a target a source covers.

    Every key of the target is in exactly one of `matched`, `missing` and `mismatched`, by the target's name. Every key of the source
    matches something, or is in `extra`, `mismatched`, `dropped` or `refused`, by its own name. Values that are not tensors (`_extra_state`)
    count as keys, as they do for torch.

    Attributes:
        source: the source's path.
        target: the target's path or spec.
        root: the nested dict of the source that was used as its state_dict.
        prefix: how the source's names were changed before the comparison.
        matched: keys that fit.
        missing: target keys that the source does not have.
        extra: source keys that the target does not have.
        missing_shapes: the shape of each missing tensor, by its key.
        extra_shapes: the shape of each extra tensor, by its key.
        heads: heads that have another name and another number of classes.
        mismatched: keys that are in both, with different shapes.
        dtype_changed: matched keys with different dtypes.
        coverage: the share of the target's tensors and elements that the source gives.
        dropped: source keys that a rule leaves out.
        refused: source keys whose values can't be read safely, with the reason.
        adapted: matched keys whose values adapters make from the source.
        quantised: the source's quantised weights: codes with scales.
        target_quantised: the target's quantised weights.
        parted_codes: keys of `quantised` that a merge would cast or separate from their scales.
        loaded: keys that the model's own loading code handles.
        rivals: prefixes between which the names don't decide, so that none of them is applied.
        warnings: warnings about source keys that nothing uses.
        exchanges: renames of one prefix to another that would explain most of the keys that are left, the best first.
        output: where the next command would write.
        options: the rules that the diff was made with, as options of a command.
        loose: the missing, extra and mismatched keys that no rule names, which `--strict` refuses.
        lacking: matched keys that the file has only under a tied name, although its format stores every name.
        advice: options for the next command; empty where matching was not run.
        unkept: keys of a target file whose values can't be kept, so that no merge can take it as its target.
        conversions: what the conversions of the target's library did.
        in_memory: for source and target, `file`, `model` or `state_dict` where it is in memory, else empty.
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
    missing_shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    extra_shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    heads: tuple[RenamedHead, ...] = ()
    dropped: tuple[str, ...] = ()
    refused: Mapping[str, str] = field(default_factory=dict)
    adapted: tuple[Adapted, ...] = ()
    quantised: tuple[Codes, ...] = ()
    target_quantised: tuple[Codes, ...] = ()
    parted_codes: tuple[str, ...] = ()
    loaded: tuple[Loaded, ...] = ()
    rivals: tuple[NameChange, ...] = ()
    exchanges: tuple[NameChange, ...] = ()
    warnings: tuple[str, ...] = ()
    loose: tuple[str, ...] = ()
    lacking: tuple[str, ...] = ()
    advice: Advice = field(default=Advice(), compare=False)
    output: str = field(default="merged.pt", repr=False, compare=False)
    options: tuple[Option, ...] = field(default=(), repr=False, compare=False)
    unkept: tuple[str, ...] = field(default=(), repr=False, compare=False)
    conversions: Applied = field(default_factory=Applied)
    in_memory: InMemory = field(default=NOT_IN_MEMORY, repr=False, compare=False)

    @property
    def same(self) -> bool:
        """Whether the source fits the target exactly: no missing, extra or mismatched key, and no other dtype."""
        return not (self.missing or self.extra or self.mismatched or self.dtype_changed or self.refused)

    @property
    def can_follow(self) -> bool:
        """Whether a merge can follow: the user has nothing to decide first, and something fits."""
        chosen = not (self.rivals or len(self.exchanges) > 1)
        codes = any(weight.key in self.parted_codes and (weight.whole or weight.op is None) for weight in self.quantised)
        computed = all(row.planned for row in self.loaded)
        return bool(chosen and computed and not codes and not self.unkept and (self.matched or self.advice.reaches))

    @property
    def next_command(self) -> Command | None:
        """The command to run next: `verify` where the file fits as it is, else one `merge` with everything that is certain; None where
        the user has to decide something first, or nothing fits."""
        if not self.can_follow:
            return None
        root = at_root(self.root)
        if self.same and not (self.dropped or self.options or self.prefix or self.lacking):
            return Command("verify", self.source, self.target, options=root)
        drops = (("drop", literal(self.prefix.bare(key))) for key in self.refused)
        own = (*root, *([("dequantize",)] if self.parted_codes else []), *self.options)
        return Command("merge", self.source, self.target, self.output, (*own, *drops, *self.advice.options))


def compare(
    source: Checkpoint,
    target: Checkpoint,
    rules: Iterable[Rule] = (),
    outside: Outside = NO_OUTSIDE,
    auto: str | None = None,
) -> Diff:
    """Compare a source with a target, after wrapper prefixes and rules were applied.

    A key of the target that is tied to a matched one is matched too.

    Args:
        auto: "safe" also applies adapters and renames that can't change the meaning of a tensor.

    Raises:
        RuleError: rules that match nothing or collide, and adapters that can't be applied.
    """
    rules, ours, theirs = tuple(rules), source.tensors, target.tensors
    equal, other_source, other_target = set_aside(source, target, rules, outside)
    names = name_sources([other_source], other_target, rules, outside, auto=auto)
    computed = find_computed([source], target, names)
    origins = {key: origin for key, origin in find_origins([other_source], other_target, names, auto).items() if key not in computed.made}
    refused = find_refused(source, 0, names)
    entry_keys = {name: key for name, (_, key) in names.entries.items() if key not in refused}
    fits = {key: origin for key, origin in origins.items() if origin.fits}
    matched = [key for key in target if key in equal or key in fits or key in computed.made]
    missing = [key for key in other_target if key not in origins and key not in computed.made]
    mismatched = {key: origin.source_keys[0][1] for key, origin in origins.items() if not origin.fits}
    kept = kept_out(target, names)
    codes = find(source)
    used = {key for origin in origins.values() for _, key in origin.source_keys}
    used |= {key for source_keys in computed.source_keys.values() for _, key in source_keys}
    used |= {key for name, key in entry_keys.items() if name in target.entries}
    used |= {key for name in kept if name in names.claims for _, key in names.claims[name].source_keys}
    extra = [key for _, key in names.names_of if key not in used and key not in refused]
    extra_tensors = [key for key in extra if key in source]
    # An exchange of prefixes is looked for only where fewer than half of the smaller side's keys match: else what is left is other layers.
    smaller = min(len(source), len(target))
    exchanges = (
        exchanges_with_rules({key: source[key] for key in extra_tensors}, {key: target[key] for key in missing})
        if 2 * len(matched) < smaller
        else ()
    )
    begins_at_zero = auto == "safe" and target.kind != "file"  # a plan sets BatchNorm's counters to 0 then
    loose = [key for key in (*missing, *mismatched) if not (begins_at_zero and is_counter(key))]
    missing_entries = [key for key in target.entries if key not in entry_keys]
    return Diff(
        source=source.path,
        target=target.path,
        root=source.root,
        prefix=names.prefixes[0],
        matched=(*matched, *(key for key in target.entries if key in entry_keys)),
        missing=(*missing, *missing_entries),
        extra=tuple(extra),
        missing_shapes={key: target[key].shape for key in missing},
        extra_shapes={key: source[key].shape for key in extra_tensors},
        mismatched=tuple(Mismatch(key, source[origin].shape, target[key].shape, origin) for key, origin in mismatched.items()),
        dtype_changed=tuple(
            DtypeChange(key, dtype, theirs[key].dtype)
            for key in matched
            if key not in computed.made and (dtype := (ours if key in equal else fits)[key].dtype) != theirs[key].dtype
        ),
        coverage=Coverage.of(
            {key: theirs[key] for key in matched},
            theirs,
            sum(filled_elements(origin.ops, origin.shape) for origin in fits.values()),
        ),
        dropped=tuple(key for _, key in names.dropped),
        refused=refused,
        adapted=tuple(
            Adapted(key, tuple(name for _, name in origin.source_keys), origin.ops) for key, origin in fits.items() if origin.ops
        ),
        quantised=tuple(codes.values()),
        target_quantised=tuple(find(target).values()),
        parted_codes=_parted(origins, codes, target),
        rivals=rivals_with_rules([source], target, names, rules)[0],
        exchanges=exchanges,
        warnings=_lost(extra),
        loaded=_loaded(outside.taken.get(0), computed),
        lacking=() if named(source.format).leaves_out_tied else tuple(key for key, origin in fits.items() if origin.tied_to),
        loose=without_a_rule(names, target, (*loose, *missing_entries), extra),
        unkept=tuple(find_unkept(target, entry_keys)),
        conversions=names.applied,
        in_memory=(source.in_memory, target.in_memory),
    )


def _loaded(taken: Taken | None, computed: Computed) -> tuple[Loaded, ...]:
    if taken is None:
        return ()
    return (
        *(Loaded(name, words) for name, words in taken.moved()),
        *(Loaded(key, made.words) for key, made in computed.made.items()),
        *(Loaded(key, f"{made.words}: a merge can't, since {why}", False) for key, (made, why) in computed.refused.items()),
        *(Loaded(path or "the model itself", f"its own loading code fails: {reason}", False) for path, reason in taken.failed.items()),
    )


def _parted(origins: Mapping[str, Origin], codes: Mapping[str, Codes], target: Checkpoint) -> tuple[str, ...]:
    """Keys of the source's codes that the target does not get unchanged and with their scales."""
    whole = {origin.source_keys[0][1] for origin in origins.values() if origin.fits and not origin.ops}
    parted = []
    for key, origin in origins.items() if codes else ():
        quantised = [codes[name] for _, name in origin.source_keys if name in codes]
        as_it_is = origin.dtype == target[key].dtype and not origin.ops and all(whole.issuperset(weight.own_scales) for weight in quantised)
        parted += [weight.key for weight in quantised if origin.fits and not as_it_is]
    return tuple(parted)


def _lost(extra: Collection[str]) -> tuple[str, ...]:
    """A warning about low-rank factors of PEFT that nothing uses, if there are any."""
    if not extra:
        return ()
    from ckptsurgeon.low_rank import lost_factors

    words = lost_factors(extra)
    return (words,) if words is not None else ()
