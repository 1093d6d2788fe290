"""Models that grow or change their vocabulary: what was there before is computed as before. Also Whisper's names and weight norm's."""

from __future__ import annotations

import json
from pathlib import Path

import conversions_support as support
import pytest
import torch
from conversions_support import agree, all_seen, convert, hf, rules, save, source, spec, tokens
from torch import nn

import ckptsurgeon as cs
from ckptsurgeon.errors import RuleError

pytest.importorskip("transformers")
HALF = 1e-5  # transformers computes RMSNorm and rotary angles in float32, whatever the model's dtype

BEFORE = (support.FOLDER / "rules" / "vocabulary_before.txt").read_text().split()
AFTER = json.loads((support.FOLDER / "rules" / "vocabulary_after.json").read_text())
MOVED = {row: BEFORE.index(token) for token, row in AFTER.items() if token in BEFORE}  # the new list's row -> the old list's
NEW = sorted(row for token, row in AFTER.items() if token not in BEFORE)


def logits(model: nn.Module, ids: torch.Tensor | None = None, **words: object) -> torch.Tensor:
    with torch.no_grad():
        found = model(tokens() if ids is None else ids, **words)
    return getattr(found, "logits", found)


# --- another vocabulary


def texts() -> tuple[torch.Tensor, torch.Tensor]:
    """The same texts by the new list's rows and by the old list's, of tokens that both lists have."""
    new = torch.tensor(sorted(MOVED))[tokens(len(MOVED))]
    return new, new.clone().apply_(MOVED.__getitem__)


def test_the_lists_of_this_example_are_a_case() -> None:
    assert (len(BEFORE), len(AFTER), NEW) == (50, 32, [1, 2, 31])
    assert list(MOVED.values()) != sorted(MOVED.values())


@pytest.mark.parametrize("suffix", ["json", "txt", "tokenizer"])
def test_gpt2_with_another_vocabulary_by_lists_of_tokens(suffix: str, tmp_path: Path) -> None:
    given = source(hf("gpt2"))
    path = save(given, tmp_path / "old.pt")
    if suffix == "json":
        found, _ = convert(path, hf("gpt2(vocab=32)"), tmp_path / "new.pt", "vocabulary")
    else:  # the same rules with the new list in another form
        after = tmp_path / ("after.txt" if suffix == "txt" else "tokenizer.json")
        added = [{"id": AFTER[token], "content": token, "special": True} for token in ("<|endoftext|>", "<user>")]
        vocab = {token: row for token, row in AFTER.items() if token != "<user>"}
        whole = {"version": "1.0", "added_tokens": added, "model": {"type": "BPE", "vocab": vocab, "merges": []}}
        after.write_text(
            json.dumps(whole) if suffix == "tokenizer" else "".join(f"{token}\n" for token in sorted(AFTER, key=AFTER.__getitem__))
        )
        (tmp_path / "vocabulary_before.txt").write_text("\n".join(BEFORE))
        mine = tmp_path / "mine.toml"
        mine.write_text(Path(rules("vocabulary")).read_text().replace("vocabulary_after.json", after.name))
        support.account(cs.merge(path, hf("gpt2(vocab=32)"), tmp_path / "new.pt", rules=mine))
        found = support.loaded(tmp_path / "new.pt", hf("gpt2(vocab=32)"))
    new, old = texts()
    one, other = logits(found, new), logits(given, old)
    agree(one[..., list(MOVED)], other[..., list(MOVED.values())])
    agree(one[..., AFTER["<user>"]], other[..., BEFORE.index("<|endoftext|>")])
    for token in ("neu", "late"):  # a mean of rows has the mean of the logits
        torch.testing.assert_close(one[..., AFTER[token]], other.mean(-1), rtol=0, atol=support.EXACT)
    assert found.lm_head.weight is found.transformer.wte.weight
    start = new.clone()
    start[:, 0] = AFTER["<user>"]
    old[:, 0] = BEFORE.index("<|endoftext|>")
    agree(logits(found, start)[..., list(MOVED)], logits(given, old)[..., list(MOVED.values())])  # as an input too


def test_llama_with_another_vocabulary_and_a_head_of_its_own(tmp_path: Path) -> None:
    given = source(hf("llama"))
    found, _ = convert(
        save(given, tmp_path / "old.safetensors"), hf("llama(vocab=32)"), tmp_path / "new.safetensors", "vocabulary_untied", seed=3
    )
    new, old = texts()
    agree(logits(found, new)[..., list(MOVED)], logits(given, old)[..., list(MOVED.values())], HALF)
    rows = found.lm_head.weight[NEW]
    assert 0 < rows.std() < 0.05  # transformers initialises with 0.02; the source's are about 0.35
    assert given.lm_head.weight.std() > 0.2


def test_llama_with_another_vocabulary_whose_head_is_forgotten_is_told(tmp_path: Path) -> None:
    path = save(source(hf("llama")), tmp_path / "old.pt")
    adapt = [
        (
            "model.embed_tokens.weight",
            f"rows(source={str(support.FOLDER / 'rules/vocabulary_before.txt')!r}, "
            f"target={str(support.FOLDER / 'rules/vocabulary_after.json')!r}, fill='mean')",
        )
    ]
    report = cs.merge(path, hf("llama(vocab=32)"), tmp_path / "new.pt", adapt=adapt)
    assert report.fresh == ("lm_head.weight",)
    assert [key for key, _ in report.dropped] == ["lm_head.weight"]


def test_gpt2_whose_tied_head_is_not_named_follows_its_embedding(tmp_path: Path) -> None:
    lists = (
        f"source={str(support.FOLDER / 'rules/vocabulary_before.txt')!r}, target={str(support.FOLDER / 'rules/vocabulary_after.json')!r}"
    )
    path = save(source(hf("gpt2")), tmp_path / "old.pt")
    report = cs.merge(path, hf("gpt2(vocab=32)"), tmp_path / "new.pt", adapt=[("transformer.wte.weight", f"rows({lists}, fill='zeros')")])
    assert report.coverage.tensors == 1.0
    found = support.loaded(tmp_path / "new.pt", hf("gpt2(vocab=32)"))
    assert found.lm_head.weight is found.transformer.wte.weight
    assert found.lm_head.weight[NEW].abs().max() == 0


def test_a_new_token_that_nothing_fills_is_refused(tmp_path: Path) -> None:
    mine = tmp_path / "mine.toml"
    for name in ("vocabulary_before.txt", "vocabulary_after.json"):
        (tmp_path / name).write_text((support.FOLDER / "rules" / name).read_text())
    mine.write_text(Path(rules("vocabulary")).read_text().replace("fill='mean', ", ""))
    with pytest.raises(RuleError) as caught:
        cs.plan(save(source(hf("gpt2")), tmp_path / "old.pt"), hf("gpt2(vocab=32)"), rules=mine)
    assert "2 of the target's 32 rows have no counterpart in the source: 'neu', 'late'" in str(caught.value)


# --- more layers


def test_gpt_twice_as_deep_with_each_layer_twice(tmp_path: Path) -> None:
    given = source(spec("nanogpt"))
    found, _ = convert(save(given, tmp_path / "small.pt"), spec("nanogpt(layers=4)"), tmp_path / "deep.pt", "gpt_depth_stacked")
    agree(logits(found), logits(given, times=2))
    all_seen(found, logits, within=1e-9)


def test_gpt_twice_as_deep_that_computes_the_same(tmp_path: Path) -> None:
    given = source(spec("nanogpt"))
    new = {f"transformer.h.{i}.{block}.c_proj.{p}" for i in (1, 3) for block in ("attn", "mlp") for p in ("weight", "bias")}
    found, _ = convert(save(given, tmp_path / "small.pt"), spec("nanogpt(layers=4)"), tmp_path / "deep.pt", "gpt_depth_identity", fresh=new)
    agree(logits(found), logits(given), 1e-14)
    support.same(found.transformer["h"][3].attn.c_attn.state_dict(), given.transformer["h"][1].attn.c_attn.state_dict())


def test_gpt2_of_conv1d_to_a_deeper_gpt_by_two_files_of_rules(tmp_path: Path) -> None:
    """The transpose is asked of the target's keys, so it holds for both copies of a layer."""
    given = source(hf("gpt2"))
    path = save(given, tmp_path / "hf.pt")
    found, _ = convert(path, spec("nanogpt(layers=4)"), tmp_path / "deep.pt", ["gpt_depth_stacked", "gpt2_to_nanogpt"])
    shallow, _ = convert(path, spec("nanogpt"), tmp_path / "nano.pt", "gpt2_to_nanogpt")
    agree(logits(found), logits(shallow, times=2))


# --- Whisper


def speech(model: nn.Module) -> torch.Tensor:
    mels = torch.randn(2, 8, 40, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    with torch.no_grad():
        found = model(mels, tokens(length=8)) if not hasattr(model, "config") else model(mels, decoder_input_ids=tokens(length=8))
    return getattr(found, "logits", found)


def test_whisper_from_openais_names(tmp_path: Path) -> None:
    """As published: the state_dict beside its sizes."""
    given = source(spec("whisper"))
    path = tmp_path / "tiny.pt"
    torch.save({"dims": {"n_mels": 8, "n_vocab": 50}, "model_state_dict": given.state_dict()}, path)
    found, report = convert(path, hf("whisper"), tmp_path / "hf.pt", "whisper_to_hf")
    agree(speech(found), speech(given))
    all_seen(found, speech)
    assert "proj_out.weight" in report.transferred


def test_whisper_to_openais_names_and_back(tmp_path: Path) -> None:
    given = source(hf("whisper"))
    state = {key: tensor for key, tensor in given.state_dict().items() if key != "proj_out.weight"}  # as transformers saves it
    path = save(state, tmp_path / "model.safetensors")
    found, _ = convert(path, spec("whisper"), tmp_path / "tiny.pt", "whisper_to_hf", reverse=True)
    agree(speech(found), speech(given))
    again, _ = convert(tmp_path / "tiny.pt", hf("whisper"), tmp_path / "back.pt", "whisper_to_hf")
    support.same(again.state_dict(), given.state_dict())


# --- weight norm


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated")
@pytest.mark.parametrize("old_to_new", [True, False], ids=["hooks to parametrizations", "parametrizations to hooks"])
def test_weight_norm_under_its_other_names_needs_no_rules(old_to_new: bool, tmp_path: Path) -> None:
    names = (spec("weight_normed"), spec("weight_normed(parametrized=True)"))
    one, other = names if old_to_new else names[::-1]
    given = source(one)
    found, _ = convert(save(given, tmp_path / "one.safetensors"), other, tmp_path / "other.safetensors", auto="safe")
    wave = torch.randn(2, 3, 20, generator=torch.Generator().manual_seed(8), dtype=torch.float64)

    def run(model: nn.Module) -> torch.Tensor:
        with torch.no_grad():
            answer: torch.Tensor = model(wave)
        return answer

    agree(run(found), run(given))
    all_seen(found, run)
