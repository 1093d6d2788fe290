"""Layouts in doubt from Python: a Llama as Meta wrote it into transformers' own, by a forward pass, by words, refused without either."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import ckptsurgeon as cs
from ckptsurgeon.errors import PlanError, RuleError
from ckptsurgeon.planning.links import Link

HEADS, KV, WIDTH, HIDDEN, LAYERS, WORDS = 4, 2, 32, 48, 2, 50
MODELS = f"""
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

HEADS, KV, WIDTH, HIDDEN, LAYERS, WORDS = {HEADS}, {KV}, {WIDTH}, {HIDDEN}, {LAYERS}, {WORDS}


class Norm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x):
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


def rotated(x, angles):
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * angles[None, :, None]).flatten(3)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        size = WIDTH // HEADS
        self.wq, self.wk = nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, KV * size, bias=False)
        self.wv, self.wo = nn.Linear(WIDTH, KV * size, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.n_heads = HEADS

    def forward(self, x, angles):
        size = WIDTH // HEADS
        q, k, v = (layer(x).view(*x.shape[:2], -1, size) for layer in (self.wq, self.wk, self.wv))
        q, k = rotated(q, angles), rotated(k, angles)
        k, v = (one.repeat_interleave(HEADS // KV, 2) for one in (k, v))
        out = nn.functional.scaled_dot_product_attention(*(one.transpose(1, 2) for one in (q, k, v)), is_causal=True)
        return self.wo(out.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    def __init__(self):
        super().__init__()
        self.w1, self.w2 = nn.Linear(WIDTH, HIDDEN, bias=False), nn.Linear(HIDDEN, WIDTH, bias=False)
        self.w3 = nn.Linear(WIDTH, HIDDEN, bias=False)

    def forward(self, x):
        return self.w2(nn.functional.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention, self.feed_forward, self.attention_norm, self.ffn_norm = Attention(), FeedForward(), Norm(), Norm()

    def forward(self, x, angles):
        x = x + self.attention(self.attention_norm(x), angles)
        return x + self.feed_forward(self.ffn_norm(x))


class Meta(nn.Module):
    def __init__(self):
        super().__init__()
        self.tok_embeddings, self.layers = nn.Embedding(WORDS, WIDTH), nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm, self.output = Norm(), nn.Linear(WIDTH, WORDS, bias=False)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.3) if parameter.dim() > 1 else None

    def forward(self, tokens):
        size = WIDTH // HEADS
        freqs = 1.0 / 10000.0 ** (torch.arange(0, size, 2).float() / size)
        angles = torch.polar(torch.ones(()), torch.outer(torch.arange(tokens.shape[1]).float(), freqs))
        x = self.tok_embeddings(tokens)
        for layer in self.layers:
            x = layer(x, angles)
        return self.output(self.norm(x))


def hf():
    config = LlamaConfig(vocab_size=WORDS, hidden_size=WIDTH, intermediate_size=HIDDEN, num_hidden_layers=LAYERS,
                         num_attention_heads=HEADS, num_key_value_heads=KV, rms_norm_eps=1e-6, tie_word_embeddings=False)
    return LlamaForCausalLM(config)


def make_inputs():
    tokens = torch.randint(0, WORDS, (2, 7))
    return {{"source": tokens, "target": {{"input_ids": tokens}}}}
"""
WQ = "model.layers.{}.self_attn.q_proj.weight"


def permuted(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """`permute` of transformers' own converter of Meta's files."""
    return weight.view(heads, weight.shape[0] // heads // 2, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    name = f"llamas_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(MODELS)
    torch.manual_seed(0)
    space: dict[str, type[nn.Module]] = {}
    exec(compile(MODELS, "llamas.py", "exec"), space)
    torch.save(space["Meta"]().state_dict(), tmp_path / "meta.pt")
    return Path(name)


def test_a_forward_pass_chooses_the_layout_of_transformers(place: Path) -> None:
    found = cs.match("meta.pt", f"{place}:hf", source_model=f"{place}:Meta", forward=f"{place}:make_inputs")
    assert found.forward is not None and found.forward.same and not found.open and not found.uncertain
    told = [link for link in found.links if link.targets == (WQ.format(0),)]
    assert told[0].op == f"permute_rope(heads={HEADS}, to='halves')" and "both models give the same outputs" in told[0].evidence[-1]
    source = torch.load("meta.pt")
    cs.merge("meta.pt", f"{place}:hf", "hf.pt", rules=found.rules)
    merged = torch.load("hf.pt")
    for layer in range(LAYERS):
        for part, heads in (("q", HEADS), ("k", KV)):
            wanted = permuted(source[f"layers.{layer}.attention.w{part}.weight"], heads)
            assert torch.equal(merged[f"model.layers.{layer}.self_attn.{part}_proj.weight"], wanted)


def test_the_targets_configuration_says_how_many_heads(place: Path) -> None:
    found = cs.match("meta.pt", f"{place}:hf")
    assert [one.kind for one in found.open] == ["rotary"] and found.open[0].variables == ()
    link = found.by_target[WQ.format(1)]
    assert link.doubt == "layout" and link.clear and not link.certain
    assert [choice.op for choice in link.choices] == ["", *(f"permute_rope(heads={HEADS}, to='{to}')" for to in ("halves", "pairs"))]
    key = found.by_target[WQ.format(1).replace("q_proj", "k_proj")]
    assert f"heads={KV}," in key.choices[1].op
    assert found.refusal(0.9) is None and found.refusal(1.0) is None  # sure but for its layout: explained


def model(place: Path) -> LlamaForCausalLM:
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=WORDS, hidden_size=WIDTH, intermediate_size=HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        num_key_value_heads=KV, tie_word_embeddings=False,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def test_transfer_and_merge_refuse_what_is_open_and_change_nothing(place: Path) -> None:
    net = model(place)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    for accept in (False, True):
        with pytest.raises(PlanError, match="none is chosen") as caught:
            cs.transfer("meta.pt", net, match=True, accept_uncertain=accept)
        assert "permute_rope(heads=4, to='halves')" in str(caught.value) and "layout='as-is'" in str(caught.value)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    with pytest.raises(PlanError, match="none is chosen"):
        cs.merge("meta.pt", f"{place}:hf", "out.pt", match=True)
    assert not Path("out.pt").exists()


def test_a_plan_is_made_and_says_what_is_open_and_is_not_followed(place: Path) -> None:
    made = cs.plan("meta.pt", f"{place}:hf", match=True, min_coverage=1.0)
    steps = {step.target: step for step in made.steps}
    assert steps[WQ.format(0)].reason.startswith("open: layout") and steps[WQ.format(0)].action == "init"
    assert {row.source for row in made.dropped if row.reason == "open: layout"} == {
        f"layers.{layer}.attention.w{part}.weight" for layer in range(LAYERS) for part in "qk"
    }
    with pytest.raises(PlanError, match="none is chosen"):
        cs.apply(made, "out.pt")
    assert not Path("out.pt").exists()


def test_words_and_adapters_settle_it(place: Path) -> None:
    source = torch.load("meta.pt")
    net = model(place)
    cs.transfer("meta.pt", net, match=True, layout="as-is")
    assert torch.equal(net.state_dict()[WQ.format(0)], source["layers.0.attention.wq.weight"])
    op = "permute_rope(heads=kv_heads, to='halves')"
    adapt = {"model.layers.*.self_attn.k_proj.weight": op}
    cs.transfer("meta.pt", net, match=True, layout=["**.q_proj.weight"], adapt=adapt, numbers={"kv_heads": KV})
    assert torch.equal(net.state_dict()[WQ.format(0)], source["layers.0.attention.wq.weight"])
    wanted = permuted(source["layers.1.attention.wk.weight"], KV)
    assert torch.equal(net.state_dict()["model.layers.1.self_attn.k_proj.weight"], wanted)
    linked = {
        f"layers.{{i}}.attention.w{part}.weight -> model.layers.{{i}}.self_attn.{part}_proj.weight": f"permute_rope(heads={n}, to='halves')"
        for part, n in (("q", HEADS), ("k", KV))
    }
    report = cs.transfer("meta.pt", net, match=True, adapt=linked)
    assert len(report.transferred) == len(net.state_dict())
    assert torch.equal(net.state_dict()[WQ.format(1)], permuted(source["layers.1.attention.wq.weight"], HEADS))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"layout": ["nothing.*"]}, "matches no link whose layout is in doubt"),
        ({"layout": "as-is", "numbers": {"head": 4}}, "'head' is set"),
        ({"adapt": {"**.q_proj.weight": "permute_rope(heads=head, to='halves')"}}, "'head' is not set"),
        ({"numbers": {"heads": 0.5}}, "numbers"),
    ],
)
def test_what_does_nothing_is_refused_by_name(place: Path, options: dict[str, object], words: str) -> None:
    with pytest.raises(cs.CheckpointError, match=words):
        cs.transfer("meta.pt", model(place), match=True, **options)  # type: ignore[arg-type]


def test_numbers_without_a_use_are_refused_without_matching_too() -> None:
    with pytest.raises(RuleError, match="'heads' is set"):
        cs.transfer({"weight": torch.zeros(2, 3)}, nn.Linear(3, 2), numbers={"heads": 3})
    with pytest.raises(PlanError, match="no match is asked for"):
        cs.transfer({"weight": torch.zeros(2, 3)}, nn.Linear(3, 2), layout="as-is")


def test_the_rules_file_has_each_way_in_comments_that_can_be_taken_out(place: Path) -> None:
    found = cs.match("meta.pt", f"{place}:hf")
    lines = found.toml.splitlines()
    start = next(at for at, line in enumerate(lines) if "become halves of each head:" in line)
    stop = next(at for at in range(start, len(lines)) if lines[at] in ("#", ""))
    taken = [line.removeprefix("# ") for line in lines[start + 1 : stop]]
    Path("rules.toml").write_text("\n".join([*lines[: start + 1], *taken, *lines[stop:]]) + "\n")
    cs.merge("meta.pt", f"{place}:hf", "hf.pt", rules="rules.toml")
    source, merged = torch.load("meta.pt"), torch.load("hf.pt")
    assert torch.equal(merged[WQ.format(1)], permuted(source["layers.1.attention.wq.weight"], HEADS))


def test_outputs_that_tell_nothing_apart_leave_it_open(place: Path) -> None:
    """One token is rotated by nothing: all layouts give the same."""
    text = Path(f"{place}.py").read_text().replace("(2, 7)", "(2, 1)")
    Path(f"{place}.py").write_text(text)
    said: list[str] = []
    found = cs.match("meta.pt", f"{place}:hf", source_model=f"{place}:Meta", forward=f"{place}:make_inputs", note=said.append)
    assert found.open and any("other inputs may tell them apart" in note for note in said)


def test_a_layout_is_a_value_with_its_rule() -> None:
    link = Link(("a",), ("b",))
    assert link.choices == () and link.doubt == ""


STAGES = """
import torch
from torch import nn


class Stage(nn.Module):
    def __init__(self, first, second):
        super().__init__()
        self.names = (first, second)
        setattr(self, first, nn.Conv2d(4, 4, 3, padding=1))
        setattr(self, second, nn.Conv2d(4, 4, 3, padding=1))

    def forward(self, x):
        return x + getattr(self, self.names[1])(torch.relu(getattr(self, self.names[0])(x)))


class Finest(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)
        for number in (1, 2, 3):
            setattr(self, f"refinenet{number}", Stage("conv1", "conv2"))

    def forward(self, x):
        return self.head(self.refinenet1(self.refinenet2(self.refinenet3(self.stem(x)))))


class Coarsest(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)
        self.fusion_stage = nn.ModuleList(Stage("convolution1", "convolution2") for _ in range(3))

    def forward(self, x):
        x = self.stem(x)
        for stage in self.fusion_stage:
            x = stage(x)
        return self.head(x)


def make_inputs():
    return torch.randn(2, 3, 8, 8)
"""


def test_stages_that_are_counted_up_or_down_are_turned_round_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    name = f"stages_{tmp_path.name.replace('-', '_')}"
    Path(f"{name}.py").write_text(STAGES)
    torch.manual_seed(0)
    space: dict[str, type[nn.Module]] = {}
    exec(compile(STAGES, "stages.py", "exec"), space)
    source = space["Finest"]().state_dict()
    torch.save(source, "finest.pt")
    looked = cs.match("finest.pt", f"{name}:Coarsest")
    assert [(one.kind, len(one.targets)) for one in looked.open] == [("counted up or down", 8)]
    assert all(link.doubt for link in looked.uncertain)
    with pytest.raises(PlanError, match="none is chosen"):
        cs.merge("finest.pt", f"{name}:Coarsest", "out.pt", match=True, accept_uncertain=True)
    found = cs.match("finest.pt", f"{name}:Coarsest", source_model=f"{name}:Finest", forward=f"{name}:make_inputs")
    assert found.forward is not None and found.forward.same and not found.open
    for rules, order in ((found.rules, (3, 2, 1)), (cs.match("finest.pt", f"{name}:Coarsest", layout="as-is").rules, (1, 2, 3))):
        cs.merge("finest.pt", f"{name}:Coarsest", f"{order}.pt", rules=rules)
        merged = torch.load(f"{order}.pt")
        for at, number in enumerate(order):
            assert torch.equal(merged[f"fusion_stage.{at}.convolution2.weight"], source[f"refinenet{number}.conv2.weight"])
