"""The verbs that look at one file or target: open, inspect, skeleton. None of them writes."""

from __future__ import annotations

from io import BytesIO

from ckptsurgeon.api import _opening
from ckptsurgeon.api._opening import silent
from ckptsurgeon.parameter_types import Given, Note, Path
from ckptsurgeon.tensors import Archive, Checkpoint


def open(path: Path | BytesIO, *, root: str | None = None) -> Checkpoint:  # the verb's name, as in `cs.open`
    """The state_dict of the file or Hugging Face folder at `path`, or of the file that an `io.BytesIO` holds, without its data.

    Args:
        path: a checkpoint file, a Hugging Face folder, or an `io.BytesIO` that holds a file.
        root: the nested dict that holds the state_dict, such as `"model"` or `"ema"`, where there are several.

    Returns:
        A mapping from keys to `TensorMeta` (dtype by safetensors' code, shape and stride in elements). It is printed as one line;
        `print(inspect(path).to_text())` prints the table of its tensors.

    Raises:
        CheckpointError: the file can't be read, is no checkpoint, or has several roots and none is named.

    >>> ckpt = open("fixtures/net_params.pkl")
    >>> ckpt["fc3.weight"].shape
    (10, 84)
    """
    return _opening.open_source(path, root=root)


def inspect(path: Path | BytesIO) -> Archive:
    """What a file holds: every root, what a pickle asked for, what else is there; nothing of it is run and no data is read.

    Args:
        path: a checkpoint file, a Hugging Face folder, or an `io.BytesIO` that holds a file.

    Returns:
        An `Archive`: its `state_dicts` by root, `globals` that a pickle asked for, what stands `beside`, `metadata`. It is printed as one
        line; `to_text()` is the command line's table.

    Raises:
        CheckpointError: the file can't be read or is no checkpoint.

    >>> print(inspect("fixtures/net_params.pkl").to_text())  # doctest: +ELLIPSIS
    fixtures/net_params.pkl: torch-legacy, 249.6 kB
      10 tensors, 62,006 elements, 248.0 kB (10 F32)
        conv1.weight  F32  (6, 3, 5, 5)
    ...
    """
    return _opening.read(path)


def skeleton(target: Given, *, note: Note = silent) -> Checkpoint:
    """A target's names, dtypes and shapes without data: a spec such as `"model:Net"` (built on meta), a model, or a file.

    Args:
        target: a model, a spec such as `"module:Net"`, a skeleton or a checkpoint.
        note: called with each note, a line of text; notes are dropped by default.

    Returns:
        A `Checkpoint` without files: keys, dtypes and shapes.

    Raises:
        TargetError: the target can't be imported or built.

    >>> len(skeleton("fixtures/variants.py:NetVariant"))
    15
    """
    return _opening.open_target(target, note=note).checkpoint
