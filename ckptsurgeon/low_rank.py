"""Layers that PEFT has wrapped: the frozen weight under `base_layer`, and the factors that were trained (LoRA and similar methods).

Rule: the layer computes W + scale · B · A, and the scale (alpha / r) is in another file. So the factors can't be merged into the weight
here, and factors that are not used are reported. Names only, no torch.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable

from ckptsurgeon.hints import several

# How the name of a factor begins, segment by segment: LoRA and DoRA of PEFT, kohya, torchtune and diffusers, VeRA, RandLoRA, VB-LoRA,
# (IA)³, LoHa, LoKr, OFT, BOFT, HRA, FourierFT, tuned norms.
_LORA = (
    *("lora_A", "lora_B", "lora_a", "lora_b", "lora_embedding_", "lora_magnitude_vector"),
    *("lora_down", "lora_up", "lora_mid", "lora_linear_layer"),
)
PAIRED = tuple(f"lora_{name}.weight" for name in ("A", "B", "a", "b", "down", "up"))  # the last parts of the keys of two factors
_PAIRS = r"(?:[^.]+_)?lora\d*\.(?:down|up|[ABab])(?=\.|$)"  # a module called so, with both factors in it
_HALF = re.compile(r"(?:^|[._])lora(\d*)(?:_linear_layer)?[._](?:(down|[Aa])|up|[Bb])(?=\.|$)")
_KIN = (
    *("vera_A", "vera_B", "vera_lambda_", "randlora_", "vblora_", "ia3_l", "hada_w1", "hada_w2", "hada_t1", "hada_t2"),
    *("lokr_w1", "lokr_w2", "lokr_t2", "oft_r", "oft_R", "boft_R", "boft_s", "hra_u", "fourierft_spectrum", "ln_tuning_layers"),
)
_BASE, _SAVED, _ORIGINAL = "base_layer", "modules_to_save", "original_module"
_NAMES = (*_LORA, *_KIN)
_FACTOR = re.compile(rf"(?:^|\.)(?:{_PAIRS}|{'|'.join(_NAMES)})")
_WRAPPED = re.compile(rf"{_FACTOR.pattern}|\.{_SAVED}\.")


def is_factor(key: str) -> bool:
    """Whether a key is a factor of a low-rank change, or of another small change of a frozen weight.

    >>> is_factor("q_proj.lora_A.default.weight"), is_factor("emb.lora_embedding_B.default"), is_factor("explora_A.weight")
    (True, True, False)
    """
    return _FACTOR.search(key) is not None


def without_prefix(key: str) -> str:
    """A key without the word that kohya puts before the names of a model's parts.

    >>> without_prefix("lora_unet.mid_block.alpha")
    'unet.mid_block.alpha'
    """
    return key.removeprefix("lora_")


def pairs(keys: Iterable[str]) -> dict[str, tuple[str, str]]:
    """By the name of the weight that they change, the two factors of each low-rank change: what it takes, and what it gives.

    >>> pairs(["to_q.lora_A.weight", "to_q.lora_B.weight", "qkv_lora1.up.weight", "qkv_lora1.down.weight"])["qkv1.weight"]
    ('qkv_lora1.down.weight', 'qkv_lora1.up.weight')
    """
    found: dict[str, dict[bool, str]] = {}
    for key in keys:
        half = _HALF.search(key)
        if half is not None:
            name = without_prefix(f"{key[: half.start()]}{half[1]}{key[half.end() :]}".lstrip("."))
            found.setdefault(name, {})[half[2] is None] = key
    return {name: (halves[False], halves[True]) for name, halves in found.items() if len(halves) > 1}


def unwrapped(keys: Iterable[str]) -> dict[str, str | None]:
    """The keys that PEFT's wrappers have renamed, each with its name in the unwrapped model; None for a key that this model lacks.

    A module that was trained whole (`modules_to_save`) gets the name from its trained copy, unless there are several copies.

    >>> unwrapped(["q.base_layer.weight", "q.lora_A.default.weight", "head.original_module.bias", "head.modules_to_save.default.bias"])
    {'q.base_layer.weight': 'q.weight', 'q.lora_A.default.weight': None, 'head.original_module.bias': None, 'head.modules_to_save.default.bias': 'head.bias'}
    """  # noqa: E501
    all_keys = list(keys)
    if not any(_WRAPPED.search(key) for key in all_keys):
        return {}
    wrapped = {".".join(segments[:index]) for segments, index in map(_split, all_keys) if index is not None}
    saved: dict[str, set[str]] = {}
    for key in all_keys:
        head, has_copy, rest = _cut(key, _SAVED)
        if has_copy:
            saved.setdefault(head, set()).add(rest.partition(".")[0])
    single_copies = {head for head, names in saved.items() if len(names) == 1}
    known = set(all_keys)
    renamed: dict[str, str | None] = {}
    for key in all_keys:
        bare = _bare(key, wrapped, single_copies)
        if bare != key and (bare is None or bare not in known):
            renamed[key] = bare
    return renamed


def _bare(key: str, wrapped: set[str], saved: set[str]) -> str | None:
    if is_factor(key):
        return None
    head, is_inside, rest = _cut(key, _BASE)
    if is_inside and head in wrapped:
        return f"{head}.{rest}"
    head, is_inside, rest = _cut(key, _ORIGINAL)
    if is_inside and head in saved:
        return None
    head, is_inside, rest = _cut(key, _SAVED)
    return f"{head}.{rest.partition('.')[2]}" if is_inside and head in saved else key


def _cut(key: str, segment: str) -> tuple[str, bool, str]:
    """The parts of a key before and after a segment, and whether the key has this segment between two others."""
    head, separator, rest = key.partition(f".{segment}.")
    return head, bool(separator), rest


def _split(key: str) -> tuple[list[str], int | None]:
    """A key's segments, and the index of the segment that makes it a factor."""
    factor = _FACTOR.search(key)
    return key.split("."), None if factor is None else key[: factor.start() + 1].count(".")


def _pattern(key: str) -> str:
    """The pattern that drops a factor and all factors of the same name."""
    segments, index = _split(key)
    assert index is not None
    name = "lora_*" if segments[index].startswith("lora_") else segments[index]
    return ".".join([*(["**"] if index else []), name, *(["**"] if segments[index + 1 :] else [])])


def lost_factors(keys: Iterable[str]) -> str | None:
    """The warning about factors among `keys`, which are not used; None without factors.

    >>> lost_factors(["norm.weight"]), lost_factors(["q.lora_A.default.weight"])[:46]
    (None, 'a factor that PEFT trained (LoRA) goes nowhere')
    """
    factors = [key for key in keys if is_factor(key)]
    if not factors:
        return None
    drops = [word for pattern in dict.fromkeys(map(_pattern, factors)) for word in ("--drop", pattern)]
    many = f"{len(factors)} factors that PEFT trained (LoRA) go" if len(factors) > 1 else "a factor that PEFT trained (LoRA) goes"
    return (
        f"{many} nowhere: merge them into the weights first (peft: merge_and_unload(); their scale is in no tensor), "
        f"or say that it is meant: {shlex.join(drops)} ({several(factors)})"
    )
