"""Layers that PEFT has wrapped: the frozen weight under `base_layer`, and beside it the factors that were trained (LoRA and its kin).

Rule: what the layer computes is W + scale · B · A, and the scale (alpha / r) is in a file of its own; so nothing is folded here, and
factors that go nowhere are said. Names only, no torch.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable

from ckptsurgeon.hints import several

# How the name of a factor begins, segment by segment: LoRA and DoRA of PEFT and of kohya, VeRA, RandLoRA, VB-LoRA, (IA)³, LoHa, LoKr,
# OFT, BOFT, HRA, FourierFT, tuned norms.
_LORA = ("lora_A", "lora_B", "lora_embedding_", "lora_magnitude_vector", "lora_down", "lora_up", "lora_mid")
_KIN = (
    *("vera_A", "vera_B", "vera_lambda_", "randlora_", "vblora_", "ia3_l", "hada_w1", "hada_w2", "hada_t1", "hada_t2"),
    *("lokr_w1", "lokr_w2", "lokr_t2", "oft_r", "oft_R", "boft_R", "boft_s", "hra_u", "fourierft_spectrum", "ln_tuning_layers"),
)
_BASE, _SAVED, _ORIGINAL = "base_layer", "modules_to_save", "original_module"
_NAMES = (*_LORA, *_KIN)
_FACTOR = re.compile(rf"(?:^|\.)(?:{'|'.join(_NAMES)})")
_TOLD = re.compile(rf"{_FACTOR.pattern}|\.{_SAVED}\.")


def is_factor(key: str) -> bool:
    """Whether a key is a factor of a low-rank change, or of another small change of a frozen weight.

    >>> is_factor("q_proj.lora_A.default.weight"), is_factor("emb.lora_embedding_B.default"), is_factor("explora_A.weight")
    (True, True, False)
    """
    return _FACTOR.search(key) is not None


def unwrapped(keys: Iterable[str]) -> dict[str, str | None]:
    """What each key that PEFT's wrappers have renamed stands for: the name in the bare model; None for what no bare model has.

    Of a module that was trained whole (`modules_to_save`), the trained copy stands for it; of several such copies none does.

    >>> unwrapped(["q.base_layer.weight", "q.lora_A.default.weight", "head.original_module.bias", "head.modules_to_save.default.bias"])
    {'q.base_layer.weight': 'q.weight', 'q.lora_A.default.weight': None, 'head.original_module.bias': None, 'head.modules_to_save.default.bias': 'head.bias'}
    """  # noqa: E501
    every = list(keys)
    if not any(_TOLD.search(key) for key in every):
        return {}
    wrapped = {".".join(segments[:at]) for segments, at in map(_placed, every) if at is not None}
    saved: dict[str, set[str]] = {}
    for key in every:
        head, found, rest = _cut(key, _SAVED)
        if found:
            saved.setdefault(head, set()).add(rest.partition(".")[0])
    once = {head for head, names in saved.items() if len(names) == 1}
    known = set(every)
    renamed: dict[str, str | None] = {}
    for key in every:
        stands = _bare(key, wrapped, once)
        if stands != key and (stands is None or stands not in known):
            renamed[key] = stands
    return renamed


def _bare(key: str, wrapped: set[str], saved: set[str]) -> str | None:
    if is_factor(key):
        return None
    head, found, rest = _cut(key, _BASE)
    if found and head in wrapped:
        return f"{head}.{rest}"
    head, found, rest = _cut(key, _ORIGINAL)
    if found and head in saved:
        return None
    head, found, rest = _cut(key, _SAVED)
    return f"{head}.{rest.partition('.')[2]}" if found and head in saved else key


def _cut(key: str, segment: str) -> tuple[str, bool, str]:
    """What stands before and after a segment within a key."""
    head, found, rest = key.partition(f".{segment}.")
    return head, bool(found), rest


def _placed(key: str) -> tuple[list[str], int | None]:
    """A key's segments, and which of them makes it a factor."""
    segments = key.split(".")
    return segments, next((at for at, segment in enumerate(segments) if segment.startswith(_NAMES)), None)


def _pattern(key: str) -> str:
    """What drops a factor and all that are called so."""
    segments, at = _placed(key)
    assert at is not None
    name = "lora_*" if segments[at].startswith("lora_") else segments[at]
    return ".".join([*(["**"] if at else []), name, *(["**"] if segments[at + 1 :] else [])])


def lost_factors(keys: Iterable[str]) -> str | None:
    """What is said of factors that go nowhere; None where there are none among `keys`.

    >>> lost_factors(["norm.weight"]), lost_factors(["q.lora_A.default.weight"])[:46]
    (None, 'a factor that PEFT trained (LoRA) goes nowhere')
    """
    found = [key for key in keys if is_factor(key)]
    if not found:
        return None
    drops = [word for pattern in dict.fromkeys(map(_pattern, found)) for word in ("--drop", pattern)]
    many = f"{len(found)} factors that PEFT trained (LoRA) go" if len(found) > 1 else "a factor that PEFT trained (LoRA) goes"
    return (
        f"{many} nowhere: merge them into the weights first (peft: merge_and_unload(); their scale is in no tensor), "
        f"or say that it is meant: {shlex.join(drops)} ({several(found)})"
    )
