"""The options of a call, collected from the public keywords into frozen dataclasses. One table says which options apply to which call.

An option that would be ignored is refused, with the reason. A value that is not None, False or empty counts as given; so an option with a
default value has None as its keyword's default.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from ckptsurgeon.dtypes import choice
from ckptsurgeon.errors import ModelError, PlanError, SettingsError
from ckptsurgeon.report import PROOFS
from ckptsurgeon.sizes import parsed

if TYPE_CHECKING:
    from ckptsurgeon.api._rules import Rules
    from ckptsurgeon.parameter_types import Given, NoDecay, Path, Renames, Words
    from ckptsurgeon.planning.averaging import Weights
    from ckptsurgeon.planning.plan_types import Plan


@dataclass(frozen=True, kw_only=True)
class RuleOptions:
    """What decides how each key gets its value: `plan`, `merge`, `transfer`, `diff` and `match` have these keywords, or some of them."""

    root: str | None = None
    rename: Renames = ()
    drop: Iterable[str] = ()
    keep: Iterable[str] = ()
    adapt: Renames = ()
    init: Renames = ()
    rules: Rules = ()
    reverse: bool = False
    average: Weights | None = None
    auto: str | None = None
    conversions: bool = True
    match: bool = False
    accept_uncertain: bool = False
    layout: Words | None = None
    numbers: Mapping[str, int] | None = None
    dequantize: bool = False
    dtype: str | None = None
    seed: int | None = None
    allow_cast: Iterable[str] = ()
    min_coverage: float | None = None
    strict: bool = False

    def __post_init__(self) -> None:
        """Read the patterns of `allow_cast`, which may be an iterator, and the dtype by any of its names; refuse contradictions before
        any file is opened.

        Raises:
            RuleError: a pattern that is not well formed, or a value of `numbers` that is no number.
            PlanError: `accept_uncertain` or `layout` without `match`.
        """
        patterns = (self.allow_cast,) if isinstance(self.allow_cast, str) else tuple(self.allow_cast)
        if patterns:
            from ckptsurgeon.rules.patterns import compile_pattern

            for pattern in patterns:
                compile_pattern(pattern)
        if self.accept_uncertain and not self.match:
            raise PlanError("accepts uncertain links, and no match is asked for", hint="match=True, accept_uncertain=True")
        if self.layout is not None and not self.match:
            raise PlanError("chooses a layout for links, and no match is asked for", hint="match=True, layout='as-is'")
        object.__setattr__(self, "allow_cast", patterns)
        if self.dtype is not None:
            object.__setattr__(self, "dtype", choice(self.dtype))
        object.__setattr__(self, "layout", _layout(self.layout))
        if self.numbers:
            from ckptsurgeon.rules.variables import checked

            object.__setattr__(self, "numbers", checked(self.numbers))


def _layout(patterns: Words | None) -> tuple[str, ...] | None:
    """The patterns of target keys whose layout is taken as it stands; `"as-is"` stands for all keys."""
    if patterns is None:
        return None
    several = (patterns,) if isinstance(patterns, str) else tuple(patterns)
    return tuple("**" if word == "as-is" else word for word in several)


@dataclass(frozen=True, kw_only=True)
class OutputOptions:
    """Where and how `merge` and `apply` write, and how the file is verified.

    After construction `max_shard_size` is in bytes, and `proof` is set, of which `verify` is whether there is any.
    """

    output: Path
    format: str | None = None
    max_shard_size: int | str | None = None
    resume: bool = False
    overwrite: bool = False
    tied: str | None = None
    provenance: bool = True
    verify: bool | None = None
    proof: str | None = None
    device: str | None = None
    finite: bool = False

    def __post_init__(self) -> None:
        """Read `max_shard_size` and `proof`. Raises SettingsError for text that is no size or no proof, or that `verify` contradicts."""
        object.__setattr__(self, "max_shard_size", shard_size(self.max_shard_size))
        proof = _proof(self.proof, self.verify)
        object.__setattr__(self, "proof", proof)
        object.__setattr__(self, "verify", proof != "none")

    @property
    def shard_size(self) -> int | None:
        """The most bytes of a shard; None where it is not given."""
        return None if self.max_shard_size is None else int(self.max_shard_size)


def _proof(proof: str | None, verify: bool | None) -> str:
    """What is proven, as `proof` says, or else `verify`."""
    meant = "none" if verify is not None and not verify else "full"
    if proof is not None and proof not in PROOFS:
        raise SettingsError(f"{proof!r} is no proof", key="--proof", hint=", ".join(PROOFS))
    if proof is not None and verify is not None and proof != meant:
        word = "--verify" if verify else "--no-verify"
        raise SettingsError(f"{proof!r} contradicts {word}, which is {meant!r}", key="--proof", hint="leave out one of the two")
    return proof or meant


def shard_size(size: int | str | None) -> int | None:
    """A size in bytes, as a number or as text such as `5GB`.

    Raises:
        SettingsError: it is no size, or zero.

    >>> shard_size("5GB"), shard_size("2GiB"), shard_size(1000), shard_size(None)
    (5000000000, 2147483648, 1000, None)
    """
    if size is None:
        return None
    nbytes = parsed(size) if isinstance(size, str) else int(size)
    if not nbytes:
        raise SettingsError(f"{size!r} is no size", key="--max-shard-size", hint="5GB, 500MB or 2GiB, or a number of bytes")
    return nbytes


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """Which training state is carried with the weights, by `transfer` into objects and by `merge` into a file, and where it is found."""

    with_optimizer: bool = False
    optimizer: Any = None
    optimizer_root: str | None = None
    optimizer_names: tuple[str, ...] | Literal["model"] | None = None
    optimizer_from: Given | None = None
    scheduler: Any = None
    scheduler_from: Given | None = None
    scaler: Any = None
    ema: Any = None
    ema_root: str | None = None
    checksums: bool = False

    def __post_init__(self) -> None:
        """Read the names, which may be an iterator. ModelError for a text that is not `"model"`."""
        names: Any = self.optimizer_names
        if isinstance(names, str) and names != "model":
            raise ModelError(f"optimizer_names can't be {names!r}", hint="give the names in the optimizer's order, or 'model'")
        object.__setattr__(self, "optimizer_names", names if names is None or isinstance(names, str) else tuple(names))

    @property
    def written(self) -> bool:
        """Whether `merge` writes the optimizer's state."""
        return self.with_optimizer or self.optimizer_from is not None

    def __bool__(self) -> bool:
        return any(part is not None for part in (self.optimizer, self.scheduler, self.scaler, self.ema))


@dataclass(frozen=True, kw_only=True)
class GroupOptions:
    """How parameters are put into groups: the keywords of `param_groups` and `groups`."""

    lr: float | None = None
    fresh_lr: float | None = None
    fresh_scale: float | None = None
    weight_decay: float | None = None
    overrides: Mapping[str, float] | None = None
    layer_decay: float | None = None
    layers: Words | None = None
    no_decay: NoDecay = False
    partial: str | None = None


NO_TRAINING = TrainingOptions()
Options = TypeVar("Options", RuleOptions, OutputOptions, TrainingOptions, GroupOptions)


def collect(kind: type[Options], arguments: Mapping[str, Any]) -> Options:
    """The options of a kind, from the arguments of a function: its `locals()` at the first line.

    >>> collect(GroupOptions, {"model": "a model", "lr": 0.1}).lr
    0.1
    """
    return kind(**{option_field.name: arguments[option_field.name] for option_field in fields(kind) if option_field.name in arguments})


@dataclass(frozen=True, slots=True)
class Row:
    """An option that applies only if at least one of the facts `needs` is true of the call; `reason` and `hint` are for the error."""

    option: str
    needs: tuple[str, ...]
    reason: str
    hint: str


TABLE: tuple[Row, ...] = (
    Row("seed", ("model built", "initial values"), "has nothing to draw: no model is built, and no rule initialises a key", "leave it out"),
    Row("device", ("model",), "is where a model is loaded, and the target is no model", "give module:Net as the target, or leave it out"),
    Row("device", ("verify",), "is where the proof loads the model, and --no-verify skips it", "leave out one of the two"),
    Row("proof copied", ("our writer",), "leaves out what is shared, and torch writes a DCP folder, which shares nothing", "leave it out"),
    Row("inputs", ("model",), "is for a forward pass, and the target is no model", "give module:Net as the target"),
    Row("inputs", ("values",), "is for a forward pass, and there are no values on meta", "name another --device"),
    Row(
        "tied",
        ("leaves out tied",),
        "says how safetensors gets tied keys; torch's format keeps them tied, DCP as copies",
        "leave it out",
    ),
    Row("dequantize", ("codes",), "makes values of quantised weights, and none is taken that is one", "leave it out"),
    Row("finite", ("written",), "is for what is written, and --dry-run writes nothing", "leave it out, or merge without --dry-run"),
    Row("auto", ("target",), "makes a source fit a target, and there is no target", "give the target as the last path"),
    Row("min_coverage", ("target",), "is the share of a target, and there is no target", "give the target as the last path"),
    Row("strict", ("target",), "is about a target's keys, and there is no target", "give the target as the last path"),
    Row("dtype target", ("target",), "takes the target's dtypes, and there is no target", "name a dtype: dtype='BF16'"),
    Row("depth", ("tree",), "is how deep a tree goes, and none is asked for", "leave it out, or ask for a tree"),
    Row("weights", ("average",), "goes with --average", "--average --weights 3,1"),
    Row("resume", ("our writer",), "goes on with shards that are proven, and torch writes a DCP folder at once", "leave it out"),
    Row(
        "resume",
        ("shards", "by torch"),
        "goes on with shards that are proven, and none are written",
        "leave it out, or add max_shard_size='5GB'",
    ),
    Row("resume", ("verify",), "goes on with shards that are proven, and --no-verify proves none", "leave out one of the two"),
    Row("max_shard_size", ("shards",), "is for Hugging Face's shards, and torch writes a DCP folder as it does", "leave it out"),
    Row("with_optimizer", ("one file",), "writes one training checkpoint, and a folder gets weights alone", "give -o OUT.pt"),
    Row("tolerance", ("forward",), "is for outputs that --forward compares", "source_model='module:Net', forward='module:make_inputs'"),
    Row("optimizer_root", ("optimizer",), "says where an optimizer's state stands, and none is asked for", "with_optimizer=True"),
    Row("optimizer_names", ("optimizer",), "names an optimizer's parameters, and none is asked for", "with_optimizer=True"),
    Row("optimizer_from", ("optimizer",), "holds an optimizer's state, and none is asked for", "transfer(..., optimizer=optimizer)"),
    Row("scheduler_from", ("scheduler",), "holds a scheduler's state, and none is asked for", "transfer(..., scheduler=scheduler)"),
    Row("ema_root", ("ema",), "says where an averaged copy stands, and none is asked for", "transfer(..., ema=copy)"),
    *(
        Row(name, ("record",), "is about a record of what is fresh, and patterns are none", "give a report, a plan or a checkpoint")
        for name in ("partial", "fresh_lr", "fresh_scale")
    ),
)
OPTIONS = frozenset(row.option for row in TABLE)


def refuse_idle(facts: Collection[str], **given: Any) -> None:
    """Raises SettingsError for each given option that would do nothing in a call that has these `facts`.

    >>> refuse_idle({"target"}, strict=True, device=None)
    >>> refuse_idle((), strict=True)
    Traceback (most recent call last):
    ckptsurgeon.errors.SettingsError: --strict: is about a target's keys, and there is no target
      try: give the target as the last path
    """
    if given.get("dtype") == "target":
        given["dtype target"] = True
    given["proof copied"] = given.get("proof") == "copied"
    idle = [row for row in TABLE if is_given(given.get(row.option)) and not set(row.needs) & set(facts)]
    if len(idle) == 1:
        raise SettingsError(idle[0].reason, key=option(idle[0].option), hint=idle[0].hint)
    if idle:
        problems = tuple(f"{option(row.option)} {row.reason}" for row in idle)
        raise SettingsError("options that would do nothing here", problems=problems, hint=idle[0].hint)


def is_given(value: Any) -> bool:
    """Whether an option was given a value; 0 counts as one.

    >>> is_given(0), is_given(None), is_given(False), is_given(())
    (True, False, False, False)
    """
    return value is not None and value is not False and value != () and value != ""


def option(name: str) -> str:
    """An option as the command line writes it.

    >>> option("min_coverage"), option("inputs")
    ('--min-coverage', '--input')
    """
    return "--" + {"inputs": "input"}.get(name, name).replace("_", "-")


def facts(**named: object) -> frozenset[str]:
    """The facts of a call: the names whose values are true.

    >>> sorted(facts(target=True, model_built=None, initial_values=[1]))
    ['initial values', 'target']
    """
    return frozenset(name.replace("_", " ") for name, value in named.items() if value)


def facts_of(plan: Plan, verify: bool = True) -> frozenset[str]:
    """The facts of a call that made this plan; `verify` is whether `merge` loads the result into a model."""
    from ckptsurgeon.adapters.table import adapter_of

    model = plan.target is not None and plan.target.kind == "model"
    drawn = any(step.schemes for step in plan.steps)
    dequantized = any(adapter_of(op).decodes for step in plan.steps for op in step.adapters)
    return facts(target=plan.target, model_built=model and (verify or plan.needs_model), initial_values=drawn, codes=dequantized)
