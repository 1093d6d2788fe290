"""The verb that loads a file into a fresh model and compares it: verify. It writes nothing."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import replace

from ckptsurgeon.api import _opening
from ckptsurgeon.api._opening import silent
from ckptsurgeon.api._options import facts, is_given, option, refuse_idle
from ckptsurgeon.api._proving import held_in_place, unreadable, verify_held, verify_written
from ckptsurgeon.errors import FormatError, SettingsError
from ckptsurgeon.parameter_types import Given, Note, OnProgress, Path
from ckptsurgeon.report import Verification


def _shapes(inputs: Iterable[str]) -> tuple[str, ...]:
    return (inputs,) if isinstance(inputs, str) else tuple(inputs)


def verify(
    checkpoint: Path,
    target: Given,
    *,
    root: str | None = None,
    device: str | None = None,
    finite: bool = False,
    inputs: Iterable[str] = (),
    seed: int | None = None,
    conversions: bool = True,
    in_place: bool = False,
    note: Note = silent,
    progress: OnProgress | None = None,
) -> Verification:
    """Load a checkpoint strictly into a fresh model on `device` and compare every tensor bit for bit with the file.

    Of a live model a copy is loaded, and the model itself is neither changed nor compared. With `in_place` the values that it has now are
    compared instead, as after `transfer`. So is always a model that is spread over ranks, by FSDP2, tensor parallelism or
    DistributedDataParallel: every rank calls this, compares its own part with the same part of the file, and gets the same report.

    Everything in the file, what stands beside the weights too, is held against the checksums that torch's zip format keeps, whatever the
    target and the device. With a skeleton or another checkpoint as target nothing is loaded: names, dtypes and shapes are compared.

    Args:
        checkpoint: a checkpoint file, a Hugging Face folder, or a folder of `torch.distributed.checkpoint`.
        target: a model, a spec such as `"module:Net"`, a skeleton or a checkpoint.
        root: the nested dict that holds the state_dict, such as `"model"` or `"ema"`, where there are several.
        device: where the model is loaded: `"cpu"` (the default), `"cuda:0"`, `"mps"`; `"meta"` compares names, dtypes and shapes, and no
            values.
        finite: NaN and infinite values are errors; needs torch.
        inputs: shapes for one forward pass in eval mode, such as `"1x3x32x32"` (float32) or `"1x16:I64"`.
        seed: the seed of a model's constructor and of init schemes, which draw each key's values from the seed and its name; 0 by default.
        conversions: `False` takes names as they are where the target is a model of transformers, whose own loading renames keys, and cuts,
            joins or turns tensors.
        in_place: compare what the live model `target` holds with the file; names without the segments of wrappers.
        note: called with each note, a line of text; notes are dropped by default.
        progress: called with a `Progress`, how far the work is, at most ten times a second; what it raises stops the run, and nothing is
            left half done.

    Returns:
        A `Verification`: `ok`, its `findings`, and `outputs`, the shapes of the forward pass.

    Raises:
        DeviceError: the device is not on this machine.
        SettingsError: a device, input or seed where the target is no model, or is compared in place; `in_place` for what is no live model.
        CheckpointError: the file or the target can't be read or built. A file that does not fit, or that is not what its own checksums
            say, is a report whose `ok` is False.

    >>> from ckptsurgeon import merge
    >>> _ = merge("fixtures/net_params.pkl", "fixtures/variants.py:NetTwoClasses", "merged.pt", overwrite=True)
    >>> verify("merged.pt", "fixtures/variants.py:NetTwoClasses", inputs=["1x3x32x32"]).outputs
    {'output': (1, 2)}
    """
    path = os.fspath(checkpoint)
    model = held_in_place(target, in_place)
    if model is not None:
        _refuse_loading(device=device, inputs=_shapes(inputs), seed=seed)
        return replace(verify_held(path, model, root=root, finite=finite, conversions=conversions), source=path)
    try:
        _opening.look(path)
    except FormatError as error:
        return replace(unreadable(error, path), source=path, target=_opening.name_of(target))
    opened_target = _opening.open_target(target, conversions=conversions, note=note)
    built, shapes = opened_target.build is not None, _shapes(inputs)
    known = facts(model=built, model_built=built, verify=True, values=device is None or device.partition(":")[0] != "meta")
    refuse_idle(known, device=device, inputs=shapes, seed=seed)
    verification = verify_written(path, opened_target, device or "cpu", finite=finite, inputs=shapes, seed=seed or 0, root=root)
    return replace(verification, source=path, target=opened_target.checkpoint.path)


def _refuse_loading(**given: object) -> None:
    """Raises SettingsError for an option that is about loading a copy: with `in_place` none is loaded."""
    for name, value in given.items():
        if is_given(value):
            reason = "is for a copy that is loaded, and the model is compared in place"
            raise SettingsError(reason, key=option(name), hint="leave it out")
