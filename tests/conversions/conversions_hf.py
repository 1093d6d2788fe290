"""Models of transformers from small configs, in float64; what specs name. They match the reference models' sizes."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import transformers as tr


def gpt2(vocab: int = 50) -> tr.GPT2LMHeadModel:
    config = tr.GPT2Config(
        vocab_size=vocab, n_positions=16, n_embd=16, n_layer=2, n_head=2, n_inner=64, bos_token_id=0, eos_token_id=0, pad_token_id=0
    )
    return tr.GPT2LMHeadModel(config).double()


def vit(image: int = 32, classes: int = 5) -> tr.ViTForImageClassification:
    config = tr.ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        image_size=image,
        patch_size=8,
        layer_norm_eps=1e-6,
        num_labels=classes,
    )
    return tr.ViTForImageClassification(config).double()


def bert() -> tr.BertModel:
    config = tr.BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=24,
        max_position_embeddings=20,
    )
    return tr.BertModel(config, add_pooling_layer=False).double()


def llama(vocab: int = 50, tied: bool = False) -> tr.LlamaForCausalLM:
    config = tr.LlamaConfig(
        vocab_size=vocab,
        hidden_size=32,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        rms_norm_eps=1e-6,
        tie_word_embeddings=tied,
        pad_token_id=0,
    )
    return tr.LlamaForCausalLM(config).double()


def mixtral() -> tr.MixtralForCausalLM:
    config = tr.MixtralConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=11,
        num_experts_per_tok=2,
        max_position_embeddings=32,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        pad_token_id=0,
    )
    config._experts_implementation = "eager"  # the others are for float32 and below
    return tr.MixtralForCausalLM(config).double()


def resnet(deep: bool = False) -> tr.ResNetForImageClassification:
    times = 4 if deep else 1
    config = tr.ResNetConfig(
        embedding_size=4,
        hidden_sizes=[4 * times, 8 * times, 16 * times, 32 * times],
        depths=[2, 2, 2, 2],
        layer_type="bottleneck" if deep else "basic",
        num_labels=5,
    )
    return tr.ResNetForImageClassification(config).double()


def whisper() -> tr.WhisperForConditionalGeneration:
    config = tr.WhisperConfig(
        vocab_size=50,
        num_mel_bins=8,
        d_model=16,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=24,
        decoder_ffn_dim=24,
        max_source_positions=20,
        max_target_positions=12,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=3,
    )
    return tr.WhisperForConditionalGeneration(config).double()


def dinov2(image: int = 28) -> tr.Dinov2Model:
    config = tr.Dinov2Config(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=2, image_size=image, patch_size=7, num_register_tokens=0
    )
    return tr.Dinov2Model(config).double()


def beit(image: int = 32) -> tr.BeitForImageClassification:
    config = tr.BeitConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        image_size=image,
        patch_size=8,
        use_relative_position_bias=True,
        num_labels=5,
    )
    return tr.BeitForImageClassification(config).double()


def neox() -> tr.GPTNeoXForCausalLM:
    config = tr.GPTNeoXConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        hidden_act="gelu_pytorch_tanh",
        max_position_embeddings=32,
        use_parallel_residual=False,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0},
        bos_token_id=0,
        eos_token_id=0,
    )
    return tr.GPTNeoXForCausalLM(config).double()


def starcoder2() -> tr.Starcoder2ForCausalLM:
    config = tr.Starcoder2Config(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        intermediate_size=48,
        max_position_embeddings=32,
        tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        bos_token_id=0,
        eos_token_id=0,
    )
    return tr.Starcoder2ForCausalLM(config).double()
