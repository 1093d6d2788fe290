"""The library's verbs. Each opens what it is given, calls the floors below in order, and returns a frozen report; nothing is printed.

The command line is a thin twin of this module, and training code its first client.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ckptsurgeon import gates, opening
from ckptsurgeon.checking import check_files
from ckptsurgeon.errors import ModelError, OutputError, PlanError, TargetError
from ckptsurgeon.opening import Given, Note, Target, silent
from ckptsurgeon.provenance import record
from ckptsurgeon.proving import verify_written
from ckptsurgeon.report import CheckReport, Report, Verification
from ckptsurgeon.streaming.apply import SUFFIXES, Output, Values, Written
from ckptsurgeon.streaming.apply import apply as write_plan
from ckptsurgeon.streaming.atomic import check_free
from ckptsurgeon.streaming.values import Buffer
from ckptsurgeon.surgery import planfile
from ckptsurgeon.surgery.compare import Diff, compare
from ckptsurgeon.surgery.patterns import compile_pattern
from ckptsurgeon.surgery.plan import Plan, make_plan
from ckptsurgeon.surgery.rules import Rule, from_arguments
from ckptsurgeon.tensors import Archive, Checkpoint
from ckptsurgeon.views import text

if TYPE_CHECKING:
    from torch import nn

Renames = Mapping[str, str] | Iterable[tuple[str, str]]
Path = str | os.PathLike[str]


def open(path: Path, *, root: str | None = None) -> Checkpoint:  # the verb's name, as in `cs.open`
    """The state_dict of the file or Hugging Face folder at `path`, without its data.

    Args:
        root: which nested dict holds it, when there are several (`"model"`, `"ema"`).

    Returns:
        A mapping from keys to `TensorMeta` (dtype by safetensors' code, shape and stride in elements).

    Raises:
        CheckpointError: the file can't be read, is no checkpoint, or has several roots and none is named.

    >>> ckpt = open("fixtures/net_params.pkl")
    >>> ckpt["fc3.weight"].shape
    (10, 84)
    """
    return opening.open_source(path, root=root)


def inspect(path: Path) -> Archive:
    """What a file holds: every root, what a pickle asked for, what else is there; nothing of it is run and no data is read.

    Raises:
        CheckpointError: the file can't be read or is no checkpoint.
    """
    return opening.read(path)


def skeleton(target: Given, *, note: Note = silent) -> Checkpoint:
    """A target's names, dtypes and shapes without data: a spec such as `"model:Net"` (built on meta), a model, or a file.

    Raises:
        TargetError: the target can't be imported or built.
    """
    return opening.open_target(target, note=note).checkpoint


def diff(
    source: Given,
    target: Given,
    *,
    root: str | None = None,
    rename: Renames = (),
    drop: Iterable[str] = (),
    rules: Sequence[Rule] = (),
    note: Note = silent,
) -> Diff:
    """What of `target` does `source` cover: matched, missing, extra and mismatched keys, after wrapper prefixes and rules.

    Raises:
        CheckpointError: one of them can't be read or built.
        RuleError: rules that match nothing or collide.

    >>> diff("fixtures/net_params.pkl", "fixtures/variants.py:NetTwoClasses").coverage.counts
    (8, 10)
    """
    goal = opening.open_target(target, note=note).checkpoint
    given = opening.open_source(source, root=root, target=goal)
    return compare(given, goal, (*from_arguments(rename, drop), *rules))


def plan(
    sources: Given | Sequence[Given],
    target: Given | None = None,
    *,
    root: str | None = None,
    rename: Renames = (),
    drop: Iterable[str] = (),
    init: Renames = (),
    rules: Sequence[Rule] = (),
    dtype: str | None = None,
    seed: int = 0,
    allow_cast: Iterable[str] = (),
    min_coverage: float | None = None,
    strict: bool = False,
    note: Note = silent,
) -> Plan:
    """Decide how every key of `target` gets its value, and what becomes of every source key; write nothing.

    Args:
        sources: a path or `Checkpoint`, or several.
        target: a spec, model, skeleton or file; None converts the one source.
        root: which nested dict of the sources is meant.
        rename, drop, init: rules in DESIGN's patterns; `rules`, in an order of their own, come after them.
        dtype: `"target"` (the default with a target), `"source"`, or a floating code such as `"BF16"`.
        seed: for the model's constructor and the named schemes.
        allow_cast: patterns of keys whose casts may overflow or truncate.
        min_coverage: the least share, from 0 to 1, of tensors and of elements to be transferred.
        strict: refuse keys that are missing, extra or mismatched without a rule that names them.

    Raises:
        RuleError: rules that can't be followed, all at once.
        CoverageError, StrictError: the plan is a no.
        PlanError: nothing says what a key gets.
    """
    chosen = (*from_arguments(rename, drop, init), *rules)
    goal = None if target is None else opening.open_target(target, note=note)
    _, made = _decide(sources, goal, root, chosen, dtype, seed, allow_cast)
    gates.check(made, min_coverage=min_coverage, strict=strict)
    return made


def _decide(
    sources: Given | Sequence[Given],
    goal: Target | None,
    root: str | None,
    rules: Sequence[Rule],
    dtype: str | None,
    seed: int,
    allow_cast: Iterable[str],
) -> tuple[list[Checkpoint], Plan]:
    given = list(sources) if isinstance(sources, (list, tuple)) else [sources]
    wanted = None if goal is None else goal.checkpoint
    if not given or (wanted is None and len(given) > 1):
        raise PlanError("needs one source to convert, or a target", hint="the last path is the target: merge A B TARGET -o OUT")
    found = [opening.open_source(one, root=root, target=wanted) for one in given]
    made = make_plan(found, wanted, rules, dtype=dtype, seed=seed, allow_cast=_patterns(allow_cast))
    return found, replace(made, text=text.plan(made))


def _patterns(given: Iterable[str]) -> tuple[str, ...]:
    """Patterns that are well formed, one or several; found out before anything is written."""
    patterns = (given,) if isinstance(given, str) else tuple(given)
    for pattern in patterns:
        compile_pattern(pattern)
    return patterns


def merge(
    sources: Given | Sequence[Given],
    target: Given | None,
    output: Path,
    *,
    root: str | None = None,
    rename: Renames = (),
    drop: Iterable[str] = (),
    init: Renames = (),
    rules: Sequence[Rule] = (),
    dtype: str | None = None,
    seed: int = 0,
    allow_cast: Iterable[str] = (),
    min_coverage: float | None = None,
    strict: bool = False,
    format: str | None = None,
    overwrite: bool = False,
    tied: str = "copy",
    provenance: bool = True,
    verify: bool = True,
    device: str = "cpu",
    finite: bool = False,
    note: Note = silent,
) -> Report:
    """Plan, apply and verify: write to `output` what fits, and prove it before the file takes its name.

    With a model as target, missing keys get the values of its own constructor under `seed`, and the file is loaded strictly into a fresh
    model on `device`. With a checkpoint as target its own values are kept. With target None the source is converted.

    Args:
        output: its suffix says the format (`.pt .pth .pkl .bin .ckpt` torch's zip, `.safetensors`), unless `format` does
            (`"torch"` or `"safetensors"`).
        tied: how safetensors gets tied keys: `"copy"`, or `"alias"` (one copy and the library's own metadata).
        provenance: record the sources' fingerprints, the plan's digest and which keys are fresh.
        verify: hold the written file against the plan and the model.
        finite: with a model, let NaN and infinite values fail.
        The other arguments are `plan`'s.

    Raises:
        CheckpointError: as `plan`; also CastError, OutputError (it exists, or can't be written), VerificationError. Nothing is left behind.

    >>> report = merge("fixtures/net_params.pkl", "fixtures/variants.py:NetTwoClasses", "merged.pt", overwrite=True)
    >>> report.fresh
    ('fc3.weight', 'fc3.bias')
    """
    written_format = output_format(output, format)
    check_free(os.fspath(output), overwrite)
    chosen = (*from_arguments(rename, drop, init), *rules)
    goal = None if target is None else opening.open_target(target, note=note)
    found, made = _decide(sources, goal, root, chosen, dtype, seed, allow_cast)
    if goal is not None and goal.build is not None and (made.needs_model or verify):
        settled = opening.settle(goal, seed, note)
        if settled is not goal:
            goal = settled
            found, made = _decide(sources, goal, root, chosen, dtype, seed, allow_cast)
    gates.check(made, min_coverage=min_coverage, strict=strict)
    how = Output(os.fspath(output), written_format, overwrite, tied, record(made, found) if provenance else None, verify)
    return _carry_out(made, found, goal, how, device if verify else None, finite)


def apply(
    plan: Plan | Path,
    output: Path,
    *,
    format: str | None = None,
    overwrite: bool = False,
    tied: str = "copy",
    provenance: bool = True,
    verify: bool = True,
    device: str = "cpu",
    finite: bool = False,
    note: Note = silent,
) -> Report:
    """Do what was decided: carry out a plan, or the plan.json at a path, and prove the result as `merge` does.

    Raises:
        StaleError: a source or the target is not what it was when the plan was made.
        PlanError: the plan is of another version, or does not add up.
        CheckpointError: as `merge`.
    """
    made = plan if isinstance(plan, Plan) else load_plan(plan)
    written_format = output_format(output, format)
    check_free(os.fspath(output), overwrite)
    found = [opening.open_source(source.path, root=source.root) for source in made.sources]
    goal = None
    if made.target is not None:
        goal = opening.open_planned(made.target, note)
        if goal.build is not None and (made.needs_model or verify):
            goal = opening.settle(goal, made.seed, note)
    planfile.check_followable(made, found, None if goal is None else goal.checkpoint)
    how = Output(os.fspath(output), written_format, overwrite, tied, record(made, found) if provenance else None, verify)
    return _carry_out(made, found, goal, how, device if verify else None, finite)


def load_plan(path: Path) -> Plan:
    """The plan in a plan.json. Raises PlanError for anything that is none."""
    from ckptsurgeon.formats.files import open_regular

    with open_regular(os.fspath(path)) as file:
        made = planfile.from_json(file.read(0, file.size), os.fspath(path))
    return replace(made, text=text.plan(made))


def output_format(output: Path, format: str | None = None) -> str:
    """`torch` or `safetensors`, as `format` or the output's suffix says. OutputError for neither."""
    if format is not None:
        if format not in SUFFIXES.values():
            raise OutputError(f"{format!r} is no format to write", path=output, hint="torch or safetensors")
        return format
    suffix = os.path.splitext(os.fspath(output))[1].lower()
    if suffix not in SUFFIXES:
        raise OutputError(
            f"its suffix {suffix!r} does not say which format to write",
            path=output,
            hint=f"end it in one of {' '.join(SUFFIXES)}, or add --format torch",
        )
    return SUFFIXES[suffix]


def _carry_out(made: Plan, found: Sequence[Checkpoint], goal: Target | None, how: Output, device: str | None, finite: bool) -> Report:
    wanted = None if goal is None else goal.checkpoint
    if how.tied not in ("copy", "alias"):
        raise OutputError(f"{how.tied!r} is no way to write tied keys", path=how.path, hint="copy or alias")
    verification: list[Verification] = []

    def prove(path: str) -> None:
        if device is not None and goal is not None and goal.build is not None:
            verification.append(verify_written(path, goal, device, finite=finite, seed=made.seed, shown=how.path))

    written = write_plan(made, found, wanted, how, values=_values(made, goal), verify=prove)
    return _report(made, written, how.path, verification[0] if verification else None)


def _values(made: Plan, goal: Target | None) -> Values | None:
    schemes = {step.target: str(op["scheme"]) for step in made.steps for op in step.ops if op["op"] == "init"}
    if goal is None or not (schemes or made.needs_model):
        return None
    from ckptsurgeon.models.values import extra_state, make_provider

    model = goal.build(made.seed) if goal.build is not None and made.needs_model else None
    provide = make_provider(model, schemes, goal.checkpoint, made.seed)
    extra = extra_state(model) if model is not None else {}
    leaders = {key: group[0] for group in made.ties for key in group}

    def initial(key: str) -> Buffer:
        return provide(leaders.get(key, key))  # tied keys are one tensor, with one value

    def own_extra(key: str) -> Any:
        if key not in extra:
            raise ModelError("is an extra state, and no model is at hand that has it", key=key, hint="give the model itself as the target")
        return extra[key]

    return Values(initial, own_extra)


def _report(made: Plan, written: Written, output: str, verification: Verification | None) -> Report:
    report = Report(
        sources=tuple(source.path for source in made.sources),
        target=made.target.spec if made.target is not None else "",
        transferred=made.transferred,
        kept=made.kept,
        fresh=made.fresh,
        dropped=tuple((row.source, row.reason) for row in made.dropped),
        coverage=made.coverage,
        casts=written.casts,
        findings=(*written.findings, *(verification.findings if verification is not None else ())),
        output=output,
        nbytes=written.nbytes,
        verification=verification,
    )
    return replace(report, text=text.report(report))


def verify(
    checkpoint: Path,
    target: Given,
    *,
    root: str | None = None,
    device: str = "cpu",
    finite: bool = False,
    inputs: Iterable[str] = (),
    seed: int = 0,
    note: Note = silent,
) -> Verification:
    """Load a checkpoint strictly into a fresh model on `device` and compare every tensor bit for bit with the file.

    With a skeleton or another checkpoint as target, names, dtypes and shapes are compared.

    Args:
        device: `cpu`, `cuda:0`, `mps`; `meta` compares names, dtypes and shapes only.
        finite: NaN and infinite values fail instead of being warned about.
        inputs: shapes such as `"1x3x32x32"` (float32) or `"1x16:I64"` for one forward pass in eval mode.

    Raises:
        DeviceError: the device is not on this machine.
        CheckpointError: the file or the target can't be read or built. A file that does not fit is a report whose `ok` is False.
    """
    goal = opening.open_target(target, note=note)
    found = verify_written(os.fspath(checkpoint), goal, device, finite=finite, inputs=tuple(inputs), seed=seed, root=root)
    return replace(found, text=text.verification(found, os.fspath(checkpoint), goal.checkpoint.path))


def check(
    paths: Path | Iterable[Path],
    *,
    against: Given | None = None,
    finite: bool = False,
    root: str | None = None,
    note: Note = silent,
) -> CheckReport:
    """Whether files are readable, safe, whole, and fit `against` (a model, skeleton or checkpoint); every finding of every file at once.

    Raises:
        CheckpointError: `against` can't be read or built. A bad file is a finding, not an error.

    >>> check("fixtures/net_params.pkl").ok
    True
    """
    files = [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)
    goal = None if against is None else opening.open_target(against, note=note)
    return check_files([os.fspath(path) for path in files], goal, finite=finite, root=root)


def transfer(
    source: Given,
    model: nn.Module,
    *,
    root: str | None = None,
    rename: Renames = (),
    drop: Iterable[str] = (),
    init: Renames = (),
    rules: Sequence[Rule] = (),
    seed: int = 0,
    allow_cast: Iterable[str] = (),
    min_coverage: float | None = None,
    strict: bool = False,
) -> Report:
    """Put the weights that fit into a live model, in place, on whatever device it is: all, or, when anything is wrong, none.

    Args:
        source: a path, a `Checkpoint`, a state_dict or a module.
        model: keeps its own values where the source has none that fit; those keys are `report.fresh`.
        init: schemes for fresh keys by pattern, seeded by `seed` and the key's name.
        The other arguments are `plan`'s.

    Returns:
        The report; printed, it is the command line's table. `param_groups` and `initialize` take it.

    Raises:
        CheckpointError: as `plan`; also CastError for a value that the model's dtype can't hold. The model is unchanged then.
    """
    from ckptsurgeon import training

    chosen = (*from_arguments(rename, drop, init), *rules)
    allowed = _patterns(allow_cast)
    return training.transfer(source, model, chosen, root=root, seed=seed, allow_cast=allowed, min_coverage=min_coverage, strict=strict)


def initialize(model: nn.Module, source: Any, scheme: str | Mapping[str, str] = "per_layer_type", *, seed: int = 0) -> tuple[str, ...]:
    """Initialise only what is fresh, in place.

    Args:
        source: a report, a plan, a merged checkpoint or its path: what says which keys are fresh.
        scheme: a name such as `"xavier_normal"`, `"per_layer_type"` (convolutions xavier normal, norms 1 and 0, linear layers N(0, 0.01),
            biases 0; Glorot and Bengio 2010 for xavier), or schemes by pattern.
        seed: with a key's name, seeds its values; another layer does not change them.

    Returns:
        The keys that were initialised.

    Raises:
        RuleError: an unknown scheme, or one that does not suit a tensor.
    """
    from ckptsurgeon import training

    return training.initialize_fresh(model, source, scheme, seed)


def param_groups(
    model: nn.Module,
    source: Any,
    *,
    lr: float | None = None,
    fresh_lr: float | None = None,
    fresh_scale: float | None = None,
    weight_decay: float | None = None,
    overrides: Mapping[str, float] | None = None,
) -> list[dict[str, Any]]:
    """Parameter groups for any `torch.optim` optimizer: every trainable parameter in exactly one.

    Args:
        source: a report, a plan, a merged checkpoint or its path; or rates by pattern, `{"fc3.*": 1e-2}`.
        lr: for what was transferred.
        fresh_lr: for what is fresh; or `fresh_scale`, a multiple of `lr`.
        weight_decay: for all groups.
        overrides: rates by pattern of parameter names, before all else.

    Returns:
        Dicts with `params`, `lr`, `weight_decay`, `name` and `param_names`.

    Raises:
        NoRecordError: a checkpoint that records nothing fresh.
        ModelError: a record of another model, a pattern that matches nothing, no rate where one is needed.
    """
    from ckptsurgeon import training

    return training.param_groups(
        model, source, lr=lr, fresh_lr=fresh_lr, fresh_scale=fresh_scale, weight_decay=weight_decay, overrides=overrides
    )


def groups(
    checkpoint: Given,
    target: Given,
    *,
    lr: float,
    fresh_lr: float | None = None,
    fresh_scale: float | None = None,
    weight_decay: float | None = None,
    overrides: Mapping[str, float] | None = None,
    note: Note = silent,
) -> list[dict[str, Any]]:
    """The parameter groups of `param_groups` by name, for a merged file and a model that need not be in memory.

    Returns:
        Dicts with `name`, `lr`, `weight_decay` and `params`, a list of parameter names.

    Raises:
        NoRecordError: the checkpoint does not record what is fresh.
        TargetError: the target is no model.
    """
    goal = opening.open_target(target, note=note)
    if goal.build_meta is None:
        raise TargetError("is no model, and only a model has parameters", path=goal.checkpoint.path, hint="give module:Net")
    source = opening.open_source(checkpoint, target=goal.checkpoint)
    found = param_groups(
        goal.build_meta(),
        source,
        lr=lr,
        fresh_lr=fresh_lr,
        fresh_scale=fresh_scale,
        weight_decay=weight_decay,
        overrides=overrides,
    )
    return [
        {"name": row["name"], "lr": row["lr"], "weight_decay": row.get("weight_decay"), "params": list(row["param_names"])} for row in found
    ]
