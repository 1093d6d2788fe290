"""The worked conversions without their rules: what `diff` says comes next is run, and held against what the rules make.

The rules' results are held against equal outputs of both models elsewhere; here they are the truth. Next may leave tensors open (fresh) for
a layout that only a person can tell, and resizes a grid in the usual way, where a person may choose another; it gives none a wrong value.
"""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import conversions_support as support
import pytest
import torch
from conversions_support import hf, load, rules, save, source, spec

import ckptsurgeon as cs

# Source, target, the rules that make one of the other, and the keys that stay open or are resized otherwise, as a regular expression.
ROWS: dict[str, tuple[str, str, list[str], str]] = {
    "gpt2 to nanogpt": (hf("gpt2"), spec("nanogpt"), ["gpt2_to_nanogpt"], ""),
    "bert to torch": (hf("bert"), spec("torch_bert"), ["bert_to_torch_encoder"], ""),
    "mixtral": (spec("mixtral"), hf("mixtral"), ["mixtral_experts_stacked"], ""),
    "meta llama": (spec("meta_llama"), hf("llama"), ["meta_llama_to_hf"], r"[qk]_proj"),
    "whisper": (spec("whisper"), hf("whisper"), ["whisper_to_hf"], ""),
    "timm vit": (spec("timm_vit"), hf("vit"), ["timm_vit_to_hf_vit"], r"query|key|value"),
    "vit with larger images": (hf("vit"), hf("vit(image=56)"), ["vit_larger_images"], "position_embeddings"),
    "beit with larger images": (hf("beit"), hf("beit(image=48)"), ["beit_larger_images"], "relative_position_bias_table"),
    "resnet": (spec("resnet(deep=True)"), hf("resnet(deep=True)"), ["resnet_to_hf"], ""),
    "resnet in grey": (spec("resnet"), spec("resnet(in_channels=1)"), ["resnet_grey"], ""),
    "frames to video": (spec("frame_net"), spec("video_net"), ["frames_to_video"], ""),
    "vgg sliding": (spec("vgg"), spec("vgg(sliding=True)"), ["vgg_sliding"], r"classifier\.0\.weight"),
    "weight norm": (spec("weight_normed"), spec("weight_normed(parametrized=True)"), [], ""),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ROWS)
def test_next_gives_what_the_rules_give(name: str, tmp_path: Path) -> None:
    given, target, files, still_open = ROWS[name]
    path = save(source(given), tmp_path / "given.pt")
    cs.merge(path, target, tmp_path / "truth.pt", rules=[rules(one) for one in files], **({} if files else {"auto": "safe"}))
    truth = load(tmp_path / "truth.pt")
    (line,) = re.findall(r"^Next: ckptsurgeon (.*)$", support.cli("diff", path, target, cwd=tmp_path), re.MULTILINE)
    words = shlex.split(line)
    told = json.loads(support.cli(*words, "--json", cwd=tmp_path))
    if words[0] == "verify":
        return
    written = load(tmp_path / words[words.index("-o") + 1])
    right = {key for key, tensor in truth.items() if torch.equal(written[key], tensor)}
    left = {key for key in truth if still_open and re.search(still_open, key)}
    resized = {key for key in left if written[key].shape != support.source(given).state_dict().get(key, written[key]).shape}
    assert truth.keys() - right - resized <= set(told["fresh"]), words
    assert right >= truth.keys() - left
    assert all(written[key].std() > 0 and key not in told["fresh"] for key in resized if "sliding" not in name)
