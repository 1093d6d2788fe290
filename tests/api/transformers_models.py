"""Architectures of the installed transformers at reduced size: every one that builds from its own configuration with smaller numbers."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

os.environ.update(TRANSFORMERS_VERBOSITY="error", HF_HUB_OFFLINE="1", HF_HUB_DISABLE_PROGRESS_BARS="1", TQDM_DISABLE="1")

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

LAYERS = 2
MOST = 30_000_000  # parameters of a model that is built
PARTS = ("text_config", "vision_config", "audio_config", "encoder", "decoder")
SIZES = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "embed_dim", "image_size"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "encoder_layers", "decoder_layers", "n_layers"), LAYERS),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "encoder_attention_heads", "decoder_attention_heads", "num_heads"), 4),
    **dict.fromkeys(("intermediate_size", "d_ff", "encoder_ffn_dim", "decoder_ffn_dim", "ffn_dim"), 64),
    **dict.fromkeys(("max_position_embeddings", "n_positions"), 64),
    **dict.fromkeys(("head_dim", "d_kv", "patch_size"), 8),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "vocab_size": 99,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
NAMES = sorted(CONFIG_MAPPING.keys())


def small(name: str, **more: Any) -> Any:
    """The configuration of an architecture with smaller numbers, those of its parts too; `more` are fields of its own."""
    config = CONFIG_MAPPING[name]()
    for part in (config, *(getattr(config, part, None) for part in PARTS)):
        if hasattr(part, "to_dict"):
            for key, value in SIZES.items():
                if type(getattr(part, key, None)) is int:
                    setattr(part, key, value)
    for key, value in more.items():
        setattr(config, key, value)
    for part in (config, *(getattr(config, part, None) for part in PARTS)):
        if hasattr(part, "to_dict") and not _valid(part):
            for key in ("layer_types", "mlp_layer_types"):  # one for each layer
                if isinstance(getattr(part, key, None), list):
                    setattr(part, key, getattr(part, key)[:LAYERS])
    return config


def _valid(config: Any) -> bool:
    if not hasattr(config, "validate"):
        return True  # transformers 4
    try:
        config.validate()
    except (StrictDataclassError, ValueError, TypeError):
        return False
    return True


def maker(config: Any, auto: Any = AutoModel) -> Callable[[int], Any] | None:
    """What makes the model of a configuration from a seed; None where it is too large."""
    with torch.device("meta"):
        if sum(parameter.numel() for parameter in auto.from_config(config).parameters()) > MOST:
            return None

    def make(seed: int) -> Any:
        torch.manual_seed(seed)
        return auto.from_config(config).eval()

    return make


def unlike(model: Any, truth: dict[str, torch.Tensor]) -> list[str]:
    """The keys whose values a model does not have as they are in `truth`, bit for bit."""
    state = model.state_dict()
    return [key for key, value in truth.items() if not torch.equal(_bits(state[key]), _bits(value))]


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8) if tensor.numel() else torch.tensor(tensor.shape)
