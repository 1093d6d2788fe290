"""Two models that should compute the same, run on the same inputs of a person's own making, and their outputs compared.

Both run in eval mode, without gradients, under forked random states; each gets copies of the inputs. That outputs agree on one input is
a proof of the weights that it reaches, and of no others.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ckptsurgeon.errors import ModelError, TargetError
from ckptsurgeon.models.target import imports, user_code
from ckptsurgeon.models.target.build import Note, forked, resolve
from ckptsurgeon.models.target.spec import parse
from ckptsurgeon.models.verify.forward import tensors_of
from ckptsurgeon.report import Twins

SIDES = ("source", "target")


def make_inputs(text: str, note: Note) -> tuple[Any, Any]:
    """What a person's `module:make_inputs` gives the source's model and the target's: the same for both, or for each its own.

    Raises TargetError where it can't be imported or fails.
    """
    spec = parse(text)
    with imports.search(spec):
        function = resolve(spec, note)
        if not callable(function):
            raise TargetError(
                "is no function that makes inputs", path=text, hint="write: def make_inputs(): return torch.randn(1, 3, 224, 224)"
            )
        with forked(0):
            inputs = user_code.call(text, function, *spec.args, **spec.kwargs)
    if isinstance(inputs, Mapping) and set(inputs) == set(SIDES):
        return inputs["source"], inputs["target"]
    return inputs, inputs


def compare(source: nn.Module, target: nn.Module, inputs: tuple[Any, Any], tolerance: float) -> Twins:
    """Run both models, and compare each output of the source's with the target's of the same place, else the first of the same shape.

    Raises TargetError where a model fails on its inputs.
    """
    source_outputs, target_outputs = (
        _run(model, sample, side) for model, sample, side in zip((source, target), inputs, SIDES, strict=True)
    )
    if not source_outputs or not target_outputs:
        raise ModelError("gives no tensor to compare", path="the source's model" if not source_outputs else "the target's model")
    rows: list[tuple[str, float | None, float | None]] = []
    left = dict(target_outputs)
    for place, tensor in source_outputs.items():
        fits = [name for name, output in left.items() if output.shape == tensor.shape]
        name = place if place in fits else fits[0] if fits else None
        if name is None:
            rows.append((place, None, None))
            continue
        expected, sample = tensor.double(), left.pop(name).double()
        difference = float((expected - sample).abs().max()) if expected.numel() else 0.0
        scale = float(expected.abs().max()) if expected.numel() else 0.0
        rows.append((place if name == place else f"{place} and {name}", difference, scale))
    return Twins((*rows, *((name, None, None) for name in left)), tolerance)


def _run(model: nn.Module, inputs: Any, side: str) -> dict[str, torch.Tensor]:
    """The floating outputs by place."""
    args, kwargs = _arguments(copy.deepcopy(inputs))
    what = f"the {side}'s model"
    with torch.no_grad(), forked(0):
        user_code.call(what, model.eval)
        outputs = user_code.call(what, model, *args, **kwargs)
    return {place: tensor for place, tensor in tensors_of(outputs) if tensor.is_floating_point()}


def _arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """One argument, a tuple of them, arguments by name, or a pair of both."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    if isinstance(inputs, tuple) and len(inputs) == 2 and isinstance(inputs[0], tuple) and isinstance(inputs[1], Mapping):
        return inputs[0], dict(inputs[1])
    return (inputs if isinstance(inputs, tuple) else (inputs,)), {}
