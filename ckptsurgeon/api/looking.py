"""The verbs that only look: open, inspect, skeleton, diff, verify. None of them writes."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from ckptsurgeon.api import _opening
from ckptsurgeon.api._opening import silent
from ckptsurgeon.api._options import facts, refuse_idle
from ckptsurgeon.api._own_loading import learned
from ckptsurgeon.api._proving import unreadable, verify_written
from ckptsurgeon.api._rules import Rules, gather
from ckptsurgeon.errors import FormatError
from ckptsurgeon.parameter_types import Given, Note, Path, Renames
from ckptsurgeon.planning.diff import Diff, compare
from ckptsurgeon.planning.links import Link
from ckptsurgeon.report import Verification
from ckptsurgeon.rules.rules import from_arguments
from ckptsurgeon.tensors import Archive, Checkpoint, TensorMeta


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
    return _opening.open_source(path, root=root)


def inspect(path: Path) -> Archive:
    """What a file holds: every root, what a pickle asked for, what else is there; nothing of it is run and no data is read.

    Raises:
        CheckpointError: the file can't be read or is no checkpoint.

    >>> inspect("fixtures/net_params.pkl").format
    'torch-legacy'
    """
    return _opening.read(path)


def skeleton(target: Given, *, note: Note = silent) -> Checkpoint:
    """A target's names, dtypes and shapes without data: a spec such as `"model:Net"` (built on meta), a model, or a file.

    Raises:
        TargetError: the target can't be imported or built.

    >>> len(skeleton("fixtures/variants.py:NetVariant"))
    15
    """
    return _opening.open_target(target, note=note).checkpoint


def diff(
    source: Given,
    target: Given,
    *,
    root: str | None = None,
    rename: Renames = (),
    drop: Iterable[str] = (),
    keep: Iterable[str] = (),
    adapt: Renames = (),
    rules: Rules = (),
    reverse: bool = False,
    auto: str | None = None,
    note: Note = silent,
) -> Diff:
    """What of `target` does `source` cover: matched, missing, extra and mismatched keys, after wrapper prefixes and rules.

    Raises:
        CheckpointError: one of them can't be read or built.
        RuleError: rules that match nothing or collide.

    >>> diff("fixtures/net_params.pkl", "fixtures/variants.py:NetTwoClasses").coverage.counts
    (8, 10)
    """
    seen = _opening.look(source)
    ruling = gather(from_arguments(rename, drop, (), adapt, keep), rules, reverse=reverse, schemes=False, note=note)
    aim = _opening.open_target(target, note=note)
    goal = aim.checkpoint
    given = _opening.open_source(seen, root=root, target=goal)
    ruling = learned([given], goal, aim.any_model, ruling, auto=auto)
    found = compare(given, goal, ruling.rules, ruling.outside, auto, _links)
    return replace(found, options=(*ruling.options, *(["--auto", auto] if auto else [])))


def _links(source: Mapping[str, TensorMeta], target: Mapping[str, TensorMeta]) -> Sequence[Link]:
    """Matching, loaded where keys are left over on both sides."""
    from ckptsurgeon.matching.matcher import match

    return match(source, target).links


def verify(
    checkpoint: Path,
    target: Given,
    *,
    root: str | None = None,
    device: str | None = None,
    finite: bool = False,
    inputs: Iterable[str] = (),
    seed: int | None = None,
    note: Note = silent,
) -> Verification:
    """Load a checkpoint strictly into a fresh model on `device` and compare every tensor bit for bit with the file.

    Everything in the file, what stands beside the weights too, is held against the checksums that torch's zip format keeps, whatever the
    target and the device. With a skeleton or another checkpoint as target nothing is loaded: names, dtypes and shapes are compared.

    Args:
        device: `cpu` (by itself), `cuda:0`, `mps`; `meta` compares names, dtypes and shapes, and no values.
        finite: NaN and infinite values fail instead of being warned about.
        inputs: shapes such as `"1x3x32x32"` (float32) or `"1x16:I64"` for one forward pass in eval mode.

    Raises:
        DeviceError: the device is not on this machine.
        SettingsError: a device, input or seed where the target is no model.
        CheckpointError: the file or the target can't be read or built. A file that does not fit, or that is not what its own checksums
            say, is a report whose `ok` is False.

    >>> from ckptsurgeon import merge
    >>> _ = merge("fixtures/net_params.pkl", "fixtures/variants.py:NetTwoClasses", "merged.pt", overwrite=True)
    >>> verify("merged.pt", "fixtures/variants.py:NetTwoClasses", inputs=["1x3x32x32"]).outputs
    {'output': (1, 2)}
    """
    path = os.fspath(checkpoint)
    try:
        _opening.look(path)
    except FormatError as error:
        return replace(unreadable(error, path), source=path, target=_opening.name_of(target))
    goal = _opening.open_target(target, note=note)
    model, shapes = goal.build is not None, tuple(inputs)
    known = facts(model=model, model_built=model, verify=True, values=device is None or device.partition(":")[0] != "meta")
    refuse_idle(known, device=device, inputs=shapes, seed=seed)
    found = verify_written(path, goal, device or "cpu", finite=finite, inputs=shapes, seed=seed or 0, root=root)
    return replace(found, source=path, target=goal.checkpoint.path)
