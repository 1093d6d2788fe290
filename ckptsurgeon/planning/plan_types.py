"""The types of a plan: the step of every target key, and what becomes of every source key. Nothing is decided here."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import sha256
from typing import Any, Literal

from ckptsurgeon.adapters.chain import filled_elements
from ckptsurgeon.errors import PlanError
from ckptsurgeon.planning.keys import SourceKey
from ckptsurgeon.report import Coverage, Finding
from ckptsurgeon.rules.copied_value import copied, follow
from ckptsurgeon.shown import Result

Action = Literal["copy", "rename", "adapt", "load", "init", "keep"]
FROM_MODEL = ("model", "per_layer_type", "reset")  # schemes that need the target model itself


@dataclass(frozen=True)
class PlanSource:
    """A source: its path as given, fingerprint, format, root, and how its names were changed.

    `sample` is the digest of a sample of its data, `sha256` that of all its bytes; each is `""` where it was not computed.
    """

    path: str
    fingerprint: str
    format: str
    root: str = ""
    prefix: Mapping[str, Any] = field(default_factory=dict)
    sample: str = ""
    sha256: str = ""

    @property
    def live(self) -> bool:
        """Whether it is a model or a state_dict in memory, not a file."""
        return self.format == "model"


@dataclass(frozen=True)
class PlanTarget:
    """What the sources must fit: a spec or path, its kind (`model`, `skeleton` or a file's format), and the same digests as a source."""

    spec: str
    fingerprint: str
    kind: str
    root: str = ""
    sample: str = ""
    sha256: str = ""


@dataclass(frozen=True)
class Step:
    """How one target key gets its value.

    Attributes:
        target: the target key.
        dtype, shape: the result's.
        action: what kind of step it is.
        sources: (number of the source, key) pairs, in order.
        ops: what is done to the sources, in order, each a dict with `op`. The op `load` stands for what the target's own loading code
            (`by` names the class) computes in torch's load.
        fresh: whether the value was never trained: this plan initialises it, or an earlier merge did.
        reason: why, in words.
        partial: whether, by the sources' records, only a part of the value was trained.
    """

    target: str
    dtype: str
    shape: tuple[int, ...]
    action: Action
    sources: tuple[SourceKey, ...]
    ops: tuple[Mapping[str, Any], ...]
    fresh: bool
    reason: str
    partial: bool = False

    @property
    def holds_own(self) -> bool:
        """Whether a rule says that the model's own value stays: its loading code finds it there, and doesn't fill in another."""
        return bool(self.ops) and any(op["op"] == "init" and op.get("ruled") is True for op in self.ops)

    @property
    def schemes(self) -> tuple[str, ...]:
        """The schemes of its initial values: its own, or those that an adapter fills up with."""
        return tuple(str(op["scheme"]) for op in self.ops if op["op"] == "init" or op.get("fill") == "init")

    @property
    def adapters(self) -> tuple[Mapping[str, Any], ...]:
        """The adapters that change source tensors: its ops without casts, initial values and torch's own load."""
        return tuple(op for op in self.changes if op["op"] != "load") if self.ops else ()

    @property
    def changes(self) -> tuple[Mapping[str, Any], ...]:
        """The ops that change source tensors: its adapters, or torch's load."""
        return tuple(op for op in self.ops if op["op"] not in ("cast", "init")) if self.ops else ()

    @property
    def filled(self) -> int:
        """How many of the result's elements no source gives: adapters filled them up."""
        return filled_elements(self.adapters, self.shape) if self.ops else 0

    @property
    def cast(self) -> str | None:
        """The dtype that an op casts to, if one does."""
        return next((str(op["dtype"]) for op in self.ops if op["op"] == "cast"), None) if self.ops else None


def copied_key(step: Step) -> str | None:
    """The key that a step initialised by `from(KEY)` copies; None for any other step."""
    return copied(step.ops[0]["scheme"]) if step.action == "init" else None


def resolved(step: Step, steps: Mapping[str, Step]) -> Step:
    """The step that gives a step its value: itself, or, where it copies another key by `from(KEY)`, the last step of that chain."""
    if copied_key(step) is None:
        return step
    keys = follow(step.target, lambda key: copied_key(steps[key]))
    if keys is None:
        raise PlanError("copies itself", key=step.target)
    return steps[keys[-1]]


@dataclass(frozen=True)
class Dropped:
    """A source key (of a tensor or of another value) that is not used, and why."""

    file: int
    source: str
    reason: str


@dataclass(frozen=True)
class Entry:
    """A value that is not a tensor (`_extra_state`): carried from a source, or, with `source` None, the target's own."""

    target: str
    source: SourceKey | None


@dataclass(frozen=True, repr=False)
class Plan(Result):
    """Everything that `apply` will do.

    Attributes:
        sources: the sources, with their fingerprints.
        target: what they must fit; None for a conversion.
        seed: the seed of the model's constructor and of init schemes.
        steps: how each target key gets its value.
        dropped: every source key that is not used, with the reason.
        coverage: the share of the target that is transferred.
        entries: values that are not tensors (`_extra_state`).
        module_metadata: what the output records as torch's `_metadata`.
        versions: the versions that the sources recorded for the target's modules with their own loading code.
        loaded: those of these modules for which the output has the values that torch's load leaves in the model.
        handed: by name, the source keys that torch's load gets unchanged, because the target's loading code computes values from them.
        ties: groups of target keys that share one tensor in the target.
        left_behind: what else the sources hold, by dotted path.
        allow_cast: the patterns of keys whose casts may lose something.
        findings: warnings and notes.
        loose: what `strict` refuses: each missing, extra or mismatched key that no rule names.
        max_shard_size: the most bytes of a shard, where `apply` is to write shards.
    """

    sources: tuple[PlanSource, ...]
    target: PlanTarget | None
    seed: int
    steps: tuple[Step, ...]
    dropped: tuple[Dropped, ...]
    coverage: Coverage
    entries: tuple[Entry, ...] = ()
    module_metadata: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, Any] = field(default_factory=dict)
    loaded: tuple[str, ...] = ()
    handed: Mapping[str, SourceKey] = field(default_factory=dict)
    ties: tuple[tuple[str, ...], ...] = ()
    left_behind: tuple[str, ...] = ()
    allow_cast: tuple[str, ...] = ()
    findings: tuple[Finding, ...] = ()
    loose: tuple[str, ...] = ()
    max_shard_size: int | None = None

    @property
    def transferred(self) -> tuple[str, ...]:
        """Target keys that take trained weights from a source."""
        return tuple(step.target for step in self.steps if step.sources and not step.fresh)

    @property
    def adapted(self) -> tuple[str, ...]:
        """Target keys whose sources adapters change."""
        return tuple(step.target for step in self.steps if step.changes)

    @property
    def partial(self) -> tuple[str, ...]:
        """Target keys of which only a part is trained: adapters fill up the rest, or a source's record says so."""
        return tuple(step.target for step in self.steps if not step.fresh and (step.partial or (step.sources and step.filled)))

    @property
    def kept(self) -> tuple[str, ...]:
        """Target keys that keep a target checkpoint's values."""
        return tuple(step.target for step in self.steps if step.action == "keep")

    @property
    def fresh(self) -> tuple[str, ...]:
        """Target keys that are initialised, now or by an earlier merge (`still_fresh`)."""
        return tuple(step.target for step in self.steps if step.fresh)

    @property
    def still_fresh(self) -> tuple[str, ...]:
        """Target keys whose value an earlier merge initialised and that were not trained since, as the file's record says."""
        return tuple(step.target for step in self.steps if step.fresh and step.action != "init")

    def leader(self, key: str) -> str:
        """The first of the keys that share a tensor with `key`.

        Args:
            key: a target key.

        Returns:
            The key that seeds the value, and whose layer owns it; `key` itself where it is not tied.
        """
        return self._leaders.get(key, key)

    @cached_property
    def _leaders(self) -> dict[str, str]:
        return {key: group[0] for group in reversed(self.ties) for key in group}

    @property
    def own_adapters(self) -> tuple[str, ...]:
        """The user's own adapters that steps use, as `module:function`."""
        return tuple(dict.fromkeys(str(op["op"]) for step in self.steps for op in step.ops if ":" in op["op"]))

    @property
    def needs_model(self) -> bool:
        """Whether a value comes from the target model itself."""
        if self.target is None or self.target.kind != "model":
            return False
        from_model = any(scheme in FROM_MODEL for step in self.steps for scheme in step.schemes)
        return from_model or bool(self.loaded) or any(entry.source is None for entry in self.entries)


def digest(plan: Plan) -> str:
    """SHA-256 (hex) of what a plan does. The paths of its sources and target don't count."""
    body = [
        [[source.fingerprint, source.root] for source in plan.sources],
        None if plan.target is None else [plan.target.fingerprint, plan.target.root],
        plan.seed,
        [
            [step.target, step.dtype, list(step.shape), step.action, [list(p) for p in step.sources], [dict(op) for op in step.ops]]
            for step in plan.steps
        ],
        [[entry.target, entry.source and list(entry.source)] for entry in plan.entries],
        [list(group) for group in plan.ties],
        {path: dict(local) for path, local in plan.module_metadata.items()},
        *([[{path: dict(local) for path, local in plan.versions.items()}, list(plan.loaded)]] if plan.versions else []),
        *([{name: list(source_key) for name, source_key in plan.handed.items()}] if plan.handed else []),
    ]
    return sha256(json.dumps(body, separators=(",", ":"), sort_keys=True).encode()).hexdigest()


def viewing_command(source: str, root: str, live: bool, target: str | None) -> str:
    """A command that shows a source's and a target's names side by side; a Python call where one of them is in memory.

    Args:
        source: the source's path.
        root: the dict of the source that was chosen.
        live: whether the source is a model or a state_dict in memory.
        target: the target's path or spec, or the class of a live model; None without a target.

    >>> viewing_command("my net.pt", "ema", False, "model:Net")
    "ckptsurgeon diff 'my net.pt' model:Net --root ema"
    >>> viewing_command("net.pt", "", False, None)
    'ckptsurgeon inspect -v net.pt'
    >>> viewing_command("net.pt", "", False, "Net")
    "print(ckptsurgeon.diff('net.pt', model))"
    >>> viewing_command("<BytesIO 1>", "", False, "model:Net")
    "print(ckptsurgeon.diff(source, 'model:Net'))"
    >>> viewing_command("Net", "", True, "Net")
    'print(ckptsurgeon.diff(ckptsurgeon.skeleton(source), model))'
    >>> viewing_command("<BytesIO 1>", "", False, None)
    'print(ckptsurgeon.inspect(source).to_text())'
    """
    in_memory = live or source.startswith("<BytesIO ")
    live_target = target is not None and target.isidentifier()
    if not in_memory and not live_target:
        paths = ["inspect", "-v", source] if target is None else ["diff", source, target]
        return shlex.join(["ckptsurgeon", *paths, *(["--root", root] if root else [])])
    name = "source" if in_memory else repr(source)
    chosen = f", root={root!r}" if root else ""
    if target is None:
        return f"print(ckptsurgeon.{'skeleton' if live else 'inspect'}({name}{chosen}).to_text())"
    first = f"ckptsurgeon.skeleton({name})" if live else name
    return f"print(ckptsurgeon.diff({first}, {'model' if live_target else repr(target)}{chosen}))"
