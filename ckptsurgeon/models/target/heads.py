"""The number of attention heads of a model, from its configuration or from its attention modules.

A number is returned only if all its values in the model agree. The forward pass is not run.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

HEADS = ("num_attention_heads", "n_heads", "num_heads", "n_head", "nhead", "heads")
KEY_HEADS = ("num_key_value_heads", "n_kv_heads", "num_kv_heads", "n_query_groups", "n_local_heads", "kv_heads")


def numbers_of(model: nn.Module) -> dict[str, int]:
    """`heads` and `kv_heads` of a model, as far as they are known.

    >>> numbers_of(nn.MultiheadAttention(8, 2))
    {'heads': 2}
    """
    numbers: dict[str, int] = {}
    for name, names in (("heads", HEADS), ("kv_heads", KEY_HEADS)):
        values = list(_first_number(_config(model), names)) or [
            number for module in model.modules() for number in _first_number(module, names)
        ]
        if len(set(values)) == 1:
            numbers[name] = values[0]
    return numbers


def _config(model: nn.Module) -> Any:
    """A model's configuration: its `config`, `args` or `params`; for a multimodal model, the part for text."""
    config = next((value for name in ("config", "args", "params") if (value := vars(model).get(name)) is not None), None)
    text = getattr(config, "get_text_config", None)
    return text() if callable(text) else config


def _first_number(owner: Any, names: tuple[str, ...]) -> Iterator[int]:
    """The first of these attributes that is a positive whole number."""
    attributes = vars(owner) if hasattr(owner, "__dict__") else {}
    number = next((attributes[name] for name in names if type(attributes.get(name)) is int and attributes[name] > 0), None)
    if number is not None:
        yield number
