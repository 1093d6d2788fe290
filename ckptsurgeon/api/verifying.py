"""The verb that loads a file and proves it: verify. It writes nothing."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import replace

from ckptsurgeon.api import _opening
from ckptsurgeon.api._opening import silent
from ckptsurgeon.api._options import facts, refuse_idle
from ckptsurgeon.api._proving import unreadable, verify_written
from ckptsurgeon.errors import FormatError
from ckptsurgeon.parameter_types import Given, Note, Path
from ckptsurgeon.report import Verification


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
    note: Note = silent,
) -> Verification:
    """Load a checkpoint strictly into a fresh model on `device` and compare every tensor bit for bit with the file.

    Everything in the file, what stands beside the weights too, is held against the checksums that torch's zip format keeps, whatever the
    target and the device. With a skeleton or another checkpoint as target nothing is loaded: names, dtypes and shapes are compared.

    Args:
        checkpoint: a checkpoint file, or a Hugging Face folder.
        target: a model, a spec such as `"module:Net"`, a skeleton or a checkpoint.
        root: the nested dict that holds the state_dict, such as `"model"` or `"ema"`, where there are several.
        device: where the model is loaded: `"cpu"` (the default), `"cuda:0"`, `"mps"`; `"meta"` compares names, dtypes and shapes, and no
            values.
        finite: NaN and infinite values are errors; needs torch.
        inputs: shapes for one forward pass in eval mode, such as `"1x3x32x32"` (float32) or `"1x16:I64"`.
        seed: the seed of a model's constructor and of init schemes, which draw each key's values from the seed and its name; 0 by default.
        conversions: `False` takes names as they are where the target is a model of transformers, whose own loading renames keys, and cuts,
            joins or turns tensors.
        note: called with each note, a line of text; notes are dropped by default.

    Returns:
        A `Verification`: `ok`, its `findings`, and `outputs`, the shapes of the forward pass.

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
    goal = _opening.open_target(target, conversions=conversions, note=note)
    model, shapes = goal.build is not None, tuple(inputs)
    known = facts(model=model, model_built=model, verify=True, values=device is None or device.partition(":")[0] != "meta")
    refuse_idle(known, device=device, inputs=shapes, seed=seed)
    found = verify_written(path, goal, device or "cpu", finite=finite, inputs=shapes, seed=seed or 0, root=root)
    return replace(found, source=path, target=goal.checkpoint.path)
