"""The verbs for training code: transfer, initialize, param_groups, groups. torch is loaded when one of them is called."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from ckptsurgeon.api import gates, opening
from ckptsurgeon.api.opening import Given, Note, Renames, silent
from ckptsurgeon.api.ruling import Rules, gather
from ckptsurgeon.errors import TargetError
from ckptsurgeon.report import Report
from ckptsurgeon.surgery.rules import from_arguments

if TYPE_CHECKING:
    from torch import nn


def transfer(
    source: Given,
    model: nn.Module,
    *,
    root: str | None = None,
    rename: Renames = (),
    drop: Iterable[str] = (),
    keep: Iterable[str] = (),
    adapt: Renames = (),
    init: Renames = (),
    rules: Rules = (),
    reverse: bool = False,
    auto: str | None = None,
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

    >>> from torch import nn
    >>> report = transfer({"weight": nn.Linear(3, 2).weight}, nn.Linear(3, 2))
    >>> report.transferred, report.fresh
    (('weight',), ('bias',))
    """
    from ckptsurgeon.api import live

    ruling = gather(from_arguments(rename, drop, init, adapt, keep), rules, reverse=reverse)
    return live.transfer(
        source,
        model,
        ruling,
        root=root,
        seed=seed,
        allow_cast=gates.patterns(allow_cast),
        min_coverage=min_coverage,
        strict=strict,
        auto=auto,
    )


def initialize(
    model: nn.Module, source: Any, scheme: str | Mapping[str, str] = "per_layer_type", *, seed: int = 0, note: Note = silent
) -> tuple[str, ...]:
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

    >>> from torch import nn
    >>> net = nn.Linear(3, 2)
    >>> initialize(net, ["bias"], "zeros"), net.bias.tolist()
    (('bias',), [0.0, 0.0])
    """
    from ckptsurgeon.api import live

    return live.initialize_fresh(model, source, scheme, seed, note)


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

    >>> from torch import nn
    >>> groups = param_groups(nn.Linear(3, 2), ["bias"], lr=1e-3, fresh_scale=10)
    >>> [(group["name"], group["lr"], group["param_names"]) for group in groups]
    [('transferred', 0.001, ['weight']), ('fresh', 0.01, ['bias'])]
    """
    from ckptsurgeon.api import live

    return live.param_groups(
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
    seen = opening.look(checkpoint)
    goal = opening.open_target(target, note=note)
    if goal.build_meta is None:
        raise TargetError("is no model, and only a model has parameters", path=goal.checkpoint.path, hint="give module:Net")
    source = opening.open_source(seen, target=goal.checkpoint)
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
