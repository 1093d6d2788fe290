"""Whether a checkpoint loads strictly into a target, by names, shapes and dtypes. `check --against` and `verify` both use it.

The renames of the target's own loading code (`Taken`) are applied first. Pure: no file and no value is read.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from ckptsurgeon.formats.registry import named
from ckptsurgeon.report import Finding
from ckptsurgeon.rules.loading_code import Taken
from ckptsurgeon.tensors import Checkpoint, TensorMeta

Shapes = Mapping[str, tuple[int, ...] | None]  # None for a value that is no tensor
NOTHING = Taken()
EXTRA_STATE = "_extra_state"  # the name under which torch stores what a module's `get_extra_state` returns


def shapes_of(checkpoint: Checkpoint, tensors: Mapping[str, TensorMeta] | None = None) -> Shapes:
    """The shape of every key of a checkpoint; with `tensors`, of these in place of its own. Values that are not tensors have None."""
    return {**{key: meta.shape for key, meta in (checkpoint if tensors is None else tensors).items()}, **dict.fromkeys(checkpoint.entries)}


def tied_keys(checkpoint: Checkpoint, present: Iterable[str], ties: Iterable[tuple[str, ...]]) -> dict[str, str]:
    """Keys of the target that a safetensors file leaves out, each with the key of the file that the target ties it to.

    `safetensors.torch.save_model` writes one name of a tied tensor, and `load_model` accepts that. torch's formats keep every name, so for
    them the result is empty.
    """
    if not named(checkpoint.format).leaves_out_tied:
        return {}
    present = set(present)
    kept = {names: next((name for name in names if name in present), None) for names in ties}
    return {name: key for names, key in kept.items() if key is not None for name in names if name not in present}


def misfits(shapes: Shapes, target: Shapes, tied: Mapping[str, str] = {}) -> list[Finding]:
    """Findings of the codes `missing`, `unexpected`, `shape` and `kind` (errors), and `tied` (a note for each key of `tied`).

    >>> [(row.key, row.message) for row in misfits({"a": (2,), "b": (1,)}, {"a": (3,), "c": (1,)})]
    [('c', 'is in the target only'), ('b', 'is in the file only'), ('a', 'has shape (2,), the target (3,)')]
    """
    absent, unlike = [], []
    for key, target_shape in target.items():
        shape, is_extra = shapes.get(key), key.rpartition(".")[2] == EXTRA_STATE
        if key in tied:
            absent.append(Finding("tied", f"is not in the file; the target ties it to {tied[key]}, which is", key, "note"))
        elif key not in shapes:
            absent.append(Finding("missing", f"is {'an extra state ' if is_extra else ''}in the target only", key))
        elif is_extra:
            continue  # a module's `set_extra_state` takes any value
        elif shape is None and target_shape is not None:
            unlike.append(Finding("kind", "is no tensor, in the target it is one", key))
        elif target_shape is None and shape is not None:
            unlike.append(Finding("kind", "is a tensor, in the target it is none", key))
        elif shape != target_shape:
            unlike.append(Finding("shape", f"has shape {shape}, the target {target_shape}", key))
    return [*absent, *(Finding("unexpected", "is in the file only", key) for key in shapes if key not in target), *unlike]


def as_taken(checkpoint: Checkpoint, target: Checkpoint, taken: Taken) -> dict[str, TensorMeta]:
    """A file's tensors after the target's loading code: renamed, with the tensors that it computes, without those that it computes
    them from."""
    unfit = {name for made in taken.made.values() if not made.fits for name in made.names}
    used_up = taken.dropped.keys() | (taken.handed.keys() - unfit)
    tensors = {taken.renamed.get(name, (name,))[0]: tensor for name, tensor in checkpoint.items() if name not in used_up}
    return {**tensors, **{key: replace(target[key], dtype=made.dtype) for key, made in taken.made.items() if made.fits}}


def fits(checkpoint: Checkpoint, target: Checkpoint, taken: Taken = NOTHING) -> tuple[list[Finding], dict[str, TensorMeta]]:
    """What keeps `checkpoint` from loading strictly into `target`, and which tensors load.

    Args:
        taken: what the target's own loading code does with the file's names.

    Returns:
        The findings of `misfits`, and the file's tensors with the target's shape, by the target's keys.
    """
    tensors = as_taken(checkpoint, target, taken)
    shapes = shapes_of(checkpoint, tensors)
    tied = tied_keys(checkpoint, shapes, target.ties)
    tensors.update({key: tensors[kept] for key, kept in tied.items() if kept in tensors})
    loaded = {key: tensors[key] for key, meta in target.items() if key in tensors and tensors[key].shape == meta.shape}
    return misfits(shapes, shapes_of(target), tied), loaded
