"""What a model on the meta device is refused for: the error names the first tensor, lists the others, and says what to do."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from ckptsurgeon.errors import ModelError
from ckptsurgeon.models.sharded.meta import refuse_unreachable

NO_STEPS: Any = SimpleNamespace(steps=())


def on_meta() -> nn.Sequential:
    with torch.device("meta"):
        return nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))


def test_parameters_with_values_beside_others_on_meta_are_all_named() -> None:
    model = on_meta()
    model[1] = nn.Linear(2, 2)
    with pytest.raises(ModelError, match="which it would lose") as caught:
        refuse_unreachable(model, NO_STEPS, model.state_dict())
    assert caught.value.key == "1.weight" and caught.value.problems == ("1.bias",) and "on meta" in str(caught.value.hint)


def test_buffers_that_no_transfer_reaches_are_all_named() -> None:
    model = on_meta()
    for name in ("first", "second"):
        model.register_buffer(name, torch.empty(2, device="meta"), persistent=False)
    with pytest.raises(ModelError, match="would get no value") as caught:
        refuse_unreachable(model, NO_STEPS, model.state_dict())
    assert caught.value.key == "first" and caught.value.problems == ("second",) and "to_empty" in str(caught.value.hint)


def test_a_model_that_is_all_on_meta_is_taken() -> None:
    model = on_meta()
    refuse_unreachable(model, NO_STEPS, model.state_dict())
