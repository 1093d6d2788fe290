"""The verbs for training code: transfer, initialize, param_groups, freeze, unfreeze, groups. torch is loaded when one of them is called."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal

from ckptsurgeon.api import _opening
from ckptsurgeon.api._opening import silent
from ckptsurgeon.api._options import GroupOptions, RuleOptions, TrainingOptions, collect
from ckptsurgeon.api._rules import Rules, gather
from ckptsurgeon.errors import TargetError
from ckptsurgeon.parameter_types import Given, LazyModule, NoDecay, Note, OnProgress, Renames, Scheme, Words, nn, torch
from ckptsurgeon.report import Report

if TYPE_CHECKING:
    from ckptsurgeon.models.training import freezing
else:
    freezing = LazyModule("ckptsurgeon.models.training.freezing")


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
    conversions: bool = True,
    match: bool = False,
    accept_uncertain: bool = False,
    layout: Words | None = None,
    numbers: Mapping[str, int] | None = None,
    dequantize: bool = False,
    seed: int | None = None,
    allow_cast: Iterable[str] = (),
    min_coverage: float | None = None,
    strict: bool = False,
    optimizer: torch.optim.Optimizer | None = None,
    optimizer_root: str | None = None,
    optimizer_names: Iterable[str] | Literal["model"] | None = None,
    optimizer_from: Given | None = None,
    scheduler: Any = None,
    scheduler_from: Given | None = None,
    scaler: Any = None,
    ema: Any = None,
    ema_root: str | None = None,
    checksums: bool = False,
    progress: OnProgress | None = None,
) -> Report:
    """Put the weights that fit into a live model, in place, on whatever device it is: all, or, when anything is wrong, none.

    An optimizer's state without names goes by the order of the source's keys, unless they were sorted, and the order in which this model
    registers its parameters; where they disagree, `optimizer_names` must say. `optimizer_from` may be the state in memory.

    A model may be spread over the ranks of a process group: by FSDP2 (`fully_shard`), tensor parallelism (DTensor),
    DistributedDataParallel, or several of these. Then every rank calls this with the same arguments, reads the bytes of its own shards, and
    gets the same report. What one rank can't do before the first copy is raised on all, and nothing is changed. A sharded model on the meta
    device gets its memory here; its fresh tensors are drawn by their layer's `reset_parameters`, from the seed, the same on every mesh.
    Modules with loading code of their own are refused in a sharded model.

    Args:
        source: a path, an `io.BytesIO`, a `Checkpoint`, a state_dict or a training checkpoint in memory, or a model.
        model: changed in place; it keeps its own values where the source has none that fit, and those keys are `report.fresh`.
        root: the nested dict that holds the state_dict, such as `"model"` or `"ema"`, where there are several.
        rename: new names for source keys, from pattern to result: `{"fc2.{p}": "dense2.{p}"}`.
        drop: patterns of source keys to leave out.
        keep: patterns of target keys that keep the target's own values.
        adapt: adapters for tensors whose shape must change, by pattern: `{"pos_embed": "interpolate"}`.
        init: schemes for keys that no source gives, by pattern: `{"fc3.*": "xavier_normal"}`.
        rules: rules files (TOML) or `Rule`s; they come after the rules of the other arguments.
        reverse: use the rules files in the other direction: from the names of their targets to those of their sources.
        auto: `"safe"` applies adapters and repairs that can't change what a tensor means.
        conversions: `False` takes names as they are where the target is a model of transformers, whose own loading renames keys, and cuts,
            joins or turns tensors.
        match: match the keys that the rules leave open, as the function `match` does.
        accept_uncertain: use the uncertain links of matching too.
        layout: `"as-is"` takes links whose layout is in doubt as they stand, patterns of target keys those that they match.
        numbers: for variables in adapters' arguments, by name: `{"heads": 32}`, as `permute_rope(heads=heads)` needs.
        dequantize: compute float32 values from fp8 and int8 codes and their scales, then cast them (to BF16 where no dtype is chosen).
        seed: the seed of a model's constructor and of init schemes, which draw each key's values from the seed and its name; 0 by default.
        allow_cast: patterns of keys whose casts may overflow or truncate, and of quantised weights that may be taken as plain codes.
        min_coverage: the least share, from 0 to 1, of the target's tensors and of its elements that must be transferred.
        strict: refuse missing, extra and mismatched keys that no rule names.
        optimizer: a new SGD, Adam, AdamW or RMSprop over the model's parameters, which gets the moments of the source's by the parameters'
            names, adapted as their weights are, zero for fresh ones. Steps are kept; the groups' hyper-parameters stay its own.
        optimizer_root: where the source holds the optimizer's state, such as `"optimizer_states.1"`; the usual names are tried by default.
        optimizer_names: the source's parameter names in the order of its optimizer, group after group, for a state that has no names;
            `"model"`: the order in which the target registers its parameters.
        optimizer_from: a second file or folder that has the optimizer's state, such as the Trainer's `optimizer.pt` or accelerate's
            `optimizer.bin`; the source may then be of any format.
        scheduler: a new scheduler, which gets the state of the source's where it fits, and sets the learning rate it stood at.
        scheduler_from: a second file or folder that has the scheduler's state, such as the Trainer's `scheduler.pt`, or the state in
            memory.
        scaler: a new gradient scaler, which gets the state of the source's where it fits.
        ema: a new averaged copy (`AveragedModel`, timm's, or a model), which gets the source's by the same rules.
        ema_root: where the source holds the averaged copy; the usual names are tried by default.
        checksums: compare all that is read with the checksums of torch's zip format before the first copy. Without it only deflated data
            is, which is unpacked anyway; the other formats have none.
        progress: called with a `Progress`, how far the work is, at most ten times a second; what it raises stops the run, once the
            model is whole.

    Returns:
        The report; printed, it is the command line's table. `param_groups` and `initialize` take it. `report.optimizer` says what became
        of the training state.

    Raises:
        CheckpointError: as `plan`; also CastError for a value that the model's dtype can't hold. RootError or ModelError
            for a training state that is not there, or whose parameters can't be identified. FormatError for data that is not what its own
            checksum says. The model is unchanged then.
        UnreadableError, StaleError: also for a file that fails or changes while it is copied, on any rank: these alone can leave a mixture,
            and say so.
        KeyboardInterrupt: the model has all of the new values, or none.

    >>> from torch import nn
    >>> report = transfer({"weight": nn.Linear(3, 2).weight}, nn.Linear(3, 2))
    >>> report.transferred, report.fresh
    (('weight',), ('bias',))
    """
    options, training = collect(RuleOptions, locals()), collect(TrainingOptions, locals())
    from ckptsurgeon.api import _live

    return _live.transfer(source, model, lambda: gather(options), options, training)


def initialize(
    model: nn.Module, source: Any, scheme: Scheme | Mapping[str, Scheme] = "per_layer_type", *, seed: int = 0, note: Note = silent
) -> tuple[str, ...]:
    """Initialise only what is fresh, in place.

    Args:
        model: changed in place.
        source: what says which keys are fresh: a report, a plan, a merged checkpoint or its path; or patterns or keys.
        scheme: a name such as `"xavier_normal"`, `"per_layer_type"` (convolutions xavier normal, norms 1 and 0, linear layers N(0, 0.01),
            biases 0; Glorot and Bengio 2010 for xavier), a function `f(tensor, generator)` of your own, or schemes by pattern.
        seed: the seed of a model's constructor and of init schemes, which draw each key's values from the seed and its name; 0 by default.
        note: called with each note, a line of text; notes are dropped by default.

    Returns:
        The keys that were initialised.

    Raises:
        RuleError: an unknown scheme, or one that does not suit a tensor.

    >>> from torch import nn
    >>> net = nn.Linear(3, 2)
    >>> initialize(net, ["bias"], "zeros"), net.bias.tolist()
    (('bias',), [0.0, 0.0])
    """
    from ckptsurgeon.api import _live

    return _live.initialize_fresh(model, source, scheme, seed, note)


def param_groups(
    model: nn.Module,
    source: Any,
    *,
    lr: float | None = None,
    fresh_lr: float | None = None,
    fresh_scale: float | None = None,
    weight_decay: float | None = None,
    overrides: Mapping[str, float] | None = None,
    layer_decay: float | None = None,
    layers: str | Iterable[str] | None = None,
    no_decay: NoDecay = False,
    partial: str | None = None,
) -> list[dict[str, Any]]:
    """Parameter groups for any `torch.optim` optimizer with groups: every trainable parameter in exactly one, tied ones once.

    Every torch scheduler keeps the ratio between them, down to a floor where it has one (`eta_min`, `min_lr`); those that take rates
    (OneCycleLR's `max_lr`, CyclicLR's `base_lr`) need a list, `[group["lr"] for group in groups]`.

    Args:
        model: the model to train; frozen parameters are in no group.
        source: what says which keys are fresh: a report, a plan, a merged checkpoint or its path; or rates by pattern, `{"fc3.*": 1e-2}`.
        lr: the learning rate of transferred parameters.
        fresh_lr: the learning rate of fresh parameters.
        fresh_scale: instead of `fresh_lr`, a multiple of `lr`.
        weight_decay: the weight decay of all groups.
        overrides: learning rates by pattern of parameter names; they come first.
        layer_decay: a transferred parameter's rate is `lr` × layer_decay ** (depth below the head), in a group for each depth, named
            `transferred/layer 3` and so on; fresh ones and overrides keep theirs (Clark et al. 2020, arXiv:2003.10555).
        layers: a pattern for the layers, whose numbers tell them apart: `"encoder.layer.{i}.**"`; or several, from the bottom up. None
            uses a timm model's `group_matcher`, or finds the repeated blocks. Parameters before the layers are the stem (depth 0),
            those after them the head.
        no_decay: True: no weight decay for biases, parameters of one dimension, norms and embeddings; or patterns, True among them or not.
        partial: whether partly transferred tensors (a grown vocabulary) count as `"transferred"` (the default) or as `"fresh"`.

    Returns:
        Dicts with `params`, `lr`, `weight_decay`, `name` and `param_names`.

    Raises:
        NoRecordError: a checkpoint that records nothing fresh.
        ModelError: a record of another model, a pattern that matches nothing, a learning rate that is needed but missing, layers that can't
            be found.

    >>> from torch import nn
    >>> groups = param_groups(nn.Linear(3, 2), ["bias"], lr=1e-3, fresh_scale=10)
    >>> [(group["name"], group["lr"], group["param_names"]) for group in groups]
    [('transferred', 0.001, ['weight']), ('fresh', 0.01, ['bias'])]
    """
    options = collect(GroupOptions, locals())
    from ckptsurgeon.api import _live

    return _live.param_groups(model, source, options)


def freeze(model: nn.Module, what: Any, *, partial: str | None = None) -> freezing.Frozen:
    """Freeze parameters: `requires_grad` off, and wholly frozen norms that keep running statistics in eval mode across `model.train()`.

    The norms stay so in copies and pickles of the model; state_dict and forward are not changed. Dropout, LayerNorm and GroupNorm, which
    keep no statistics, are left alone. Freeze before you build the optimizer: `param_groups` leaves frozen parameters out.

    Args:
        model: changed in place.
        what: patterns over the names of parameters and buffers; or a report, a plan or a merged checkpoint (`cs.open`): then what was
            transferred is frozen, and what is fresh trains.
        partial: under a record, whether partly transferred tensors count as `"fresh"` (the default), and train, or as `"transferred"`.

    Returns:
        What was frozen: `keys`, `modules` kept in eval mode, `trainable`; printed, a short text.

    Raises:
        ModelError: a pattern that matches nothing, a record of another model.
        NoRecordError: a checkpoint that records nothing fresh.

    >>> from torch import nn
    >>> net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Linear(2, 2))
    >>> freeze(net, ["0.*", "1.*"]).modules, net.train()[1].training
    (('1',), False)
    """
    from ckptsurgeon.api import _live

    return _live.freeze(model, what, partial)


def unfreeze(model: nn.Module, what: str | Iterable[str] = "**") -> freezing.Frozen:
    """Undo `freeze` for what the patterns match, all by default; `Thaw` does so stage by stage, with the optimizer.

    Args:
        model: changed in place.
        what: patterns over the names of parameters and buffers; all by default.

    Returns:
        What was thawed: `keys`, `modules` that follow the model's mode again, `trainable`.

    Raises:
        ModelError: a pattern that matches nothing.

    >>> from torch import nn
    >>> net = nn.Linear(2, 2)
    >>> freeze(net, "weight").trainable, unfreeze(net).trainable
    (('bias',), ('weight', 'bias'))
    """
    return freezing.unfreeze(model, what)


def groups(
    checkpoint: Given,
    target: Given,
    *,
    lr: float,
    fresh_lr: float | None = None,
    fresh_scale: float | None = None,
    weight_decay: float | None = None,
    overrides: Mapping[str, float] | None = None,
    layer_decay: float | None = None,
    layers: str | Iterable[str] | None = None,
    no_decay: NoDecay = False,
    partial: str | None = None,
    note: Note = silent,
) -> list[dict[str, Any]]:
    """The parameter groups of `param_groups` by name, for a merged file and a model that need not be in memory.

    Args:
        checkpoint: a merged checkpoint, or its path.
        target: a model, a spec such as `"module:Net"`, a skeleton or a checkpoint.
        lr: the learning rate of transferred parameters.
        fresh_lr: the learning rate of fresh parameters.
        fresh_scale: instead of `fresh_lr`, a multiple of `lr`.
        weight_decay: the weight decay of all groups.
        overrides: learning rates by pattern of parameter names; they come first.
        layer_decay: a transferred parameter's rate is `lr` × layer_decay ** (depth below the head), in a group for each depth, named
            `transferred/layer 3` and so on; fresh ones and overrides keep theirs (Clark et al. 2020, arXiv:2003.10555).
        layers: a pattern for the layers, whose numbers tell them apart: `"encoder.layer.{i}.**"`; or several, from the bottom up. None
            uses a timm model's `group_matcher`, or finds the repeated blocks. Parameters before the layers are the stem (depth 0),
            those after them the head.
        no_decay: True: no weight decay for biases, parameters of one dimension, norms and embeddings; or patterns, True among them or not.
        partial: whether partly transferred tensors (a grown vocabulary) count as `"transferred"` (the default) or as `"fresh"`.
        note: called with each note, a line of text; notes are dropped by default.

    Returns:
        Dicts with `name`, `lr`, `weight_decay`, `params`, a list of parameter names, and `elements`, how many numbers they hold.

    Raises:
        NoRecordError: the checkpoint does not record what is fresh.
        TargetError: the target is no model, or has other shapes.

    >>> from ckptsurgeon import merge
    >>> net = "fixtures/variants.py:NetTwoClasses"
    >>> _ = merge("fixtures/net_params.pkl", net, "merged.pt", overwrite=True)
    >>> [(row["name"], row["lr"], len(row["params"])) for row in groups("merged.pt", net, lr=1e-3, fresh_scale=10)]
    [('transferred', 0.001, 8), ('fresh', 0.01, 2)]
    """
    options = collect(GroupOptions, locals())
    opened = _opening.look(checkpoint)
    opened_target = _opening.open_target(target, note=note)
    if opened_target.build_meta is None:
        raise TargetError("is no model, and only a model has parameters", path=opened_target.checkpoint.path, hint="give module:Net")
    known = opened_target.checkpoint
    source = _opening.open_source(opened, target=known)
    from ckptsurgeon.api import _live

    rows = _live.param_groups(opened_target.build_meta(), source, options)
    wrong = next((key for key, meta in known.items() if key in source and source[key].shape != meta.shape), None)
    if wrong is not None:
        words = f"has the shape {known[wrong].shape}, and {source[wrong].shape} in {source.path}"
        raise TargetError(words, path=known.path, key=wrong, hint="give the model that the file was merged for")
    return [
        {
            "name": row["name"],
            "lr": row["lr"],
            "weight_decay": row.get("weight_decay"),
            "params": list(row["param_names"]),
            "elements": sum(parameter.numel() for parameter in row["params"]),
        }
        for row in rows
    ]
