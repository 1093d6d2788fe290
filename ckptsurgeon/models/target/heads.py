"""How many heads a model's attention has, as the model itself says: by its configuration, or by its attention modules.

Rule: a number is told only where all that speak of it agree. Nothing is run.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

HEADS = ("num_attention_heads", "n_heads", "num_heads", "n_head", "nhead", "heads")
KEY_HEADS = ("num_key_value_heads", "n_kv_heads", "num_kv_heads", "n_query_groups", "n_local_heads", "kv_heads")


def numbers_of(model: nn.Module) -> dict[str, int]:
    """`heads` and `kv_heads` of a model, as far as it says them.

    >>> numbers_of(nn.MultiheadAttention(8, 2))
    {'heads': 2}
    """
    found: dict[str, int] = {}
    for name, words in (("heads", HEADS), ("kv_heads", KEY_HEADS)):
        for said in (list(_of(_config(model), words)), [number for module in model.modules() for number in _of(module, words)]):
            if len(set(said)) == 1:
                found[name] = said[0]
            if said:
                break
    return found


def _config(model: nn.Module) -> Any:
    """What a model was made by: its `config`, `args` or `params`; of a model of several kinds the part for text."""
    found = next((value for name in ("config", "args", "params") if (value := vars(model).get(name)) is not None), None)
    text = getattr(found, "get_text_config", None)
    return text() if callable(text) else found


def _of(owner: Any, names: tuple[str, ...]) -> Iterator[int]:
    """The first of these attributes that is a whole number."""
    held = vars(owner) if hasattr(owner, "__dict__") else {}
    number = next((held[name] for name in names if type(held.get(name)) is int and held[name] > 0), None)
    if number is not None:
        yield number
