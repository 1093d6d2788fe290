"""What a name says: a dotted name to the concepts of the field that its words stand for. One table of synonyms; no model's name is in it.

Rule: a word means the same wherever it stands. What a word means only by its place (the `output` of an attention, `w1` beside `w3`) is told
by structure and never here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence, Set
from functools import cache

# Spellings of several words that mean one thing, told before a name is cut into words. Matched whole, between separators.
_PHRASES: tuple[tuple[str, str], ...] = (
    (r"parametrizations\.([a-z_]+)\.original0", r"\1_g"),
    (r"parametrizations\.([a-z_]+)\.original1", r"\1_v"),
    (r"post_?(self_?)?(attention|attn)(_?layer_?norm|_?norm|_?ln)", "postattn.norm"),
    (r"pre_?cross_?(attention|attn)(_?layer_?norm|_?norm|_?ln)", "precross.norm"),
    (r"pre_?(self_?)?(attention|attn)(_?layer_?norm|_?norm|_?ln)", "preattn.norm"),
    (r"pre_?(feed_?forward|ffw?|ffn|mlp)(_?layer_?norm|_?norm|_?ln)", "premlp.norm"),
    (r"post_?(feed_?forward|ffw?|ffn|mlp)(_?layer_?norm|_?norm|_?ln)", "postmlp.norm"),
    (r"(lin|fc|linear)_(l|src|neigh(bou?rs?)?|nbr|rel)|(att|attn)_(l|src)", r"\1\4.neighbour"),  # of a layer on a graph
    (r"(lin|fc|linear)_(r|dst|self|root)|(att|attn)_(r|dst)", r"\1\3.root"),
    (r"(self_?)?loop(_?weight|_?linear|_?fc)", "root.weight"),
    (r"value_?(net|network|function|fn|mlp|branch)|vf|v_net|critic", "critic"),
    (r"log_?std", "logstd"),
    (r"log_?var(iance)?|lnvar", "logvar"),
    (r"w_?[ix]([rzifgoc])|x2([rznifgoc])", r"ih.\1\2"),  # the gates of a recurrent cell
    (r"w_?h([rznifgoc])|h2([rznifgoc])", r"hh.\1\2"),
    (r"input_lin(ear)?", "first.ih.linear"),
    (r"hidden_lin(ear)?", "hh.linear"),
    (r"query_?key_?value|in_?proj|c_attn|w_?pack|w_?qkv|qkv_proj|to_qkv|attn_qkv", "qkv"),
    (r"key_?value|kv_proj|to_kv|wkv|c_kv", "kv"),
    (r"(e_)?score_correction_bias(?=$)", "expert.bias"),
    (r"shexp", "shared.expert"),
    (r"([qkv])(content|pos)", r"\1.\2"),
    (r"w2v2?_(encoder|model)", r"audio.\1"),
    (r"dense_h_to_4h", "up"),
    (r"dense_4h_to_h", "down"),
    (r"fc1?_g", "gate"),
    (r"fc1?_x", "up"),
    (r"gate_?up(_proj)?|gate_and_up(_proj)?|w12|w1_?w?3|fc1_gu", "gate.up"),
    (r"layer_?norms?|ln|rms_?norm|batch_?norm([123]d)?|group_?norm|instance_?norm|normali[sz]ation|bn|gn|norms", "norm"),
    (r"layer_?scale|ls|lambda|res_?scale", "scale"),
    (r"self_?attn|self_?attention|self_?attend|slf_attn|sa", "self.attn"),
    (
        r"cross_?attn|cross_?attention|enc_?dec_?attention|encoder_attn|encoder_decoder_attention|encoder_attention|src_attn|multihead_attn|ca"
        r"|enc_attn|inter_?attention|memory_attn|xattn|context_attn",
        "cross.attn",
    ),
    (r"feed_?forward|ffn?|mlps?|pointwise_feedforward|positionwise", "mlp"),
    (r"token_?types?|segments?|seg", "tokentype"),
    (r"position(s|al)?(_ids)?|pos|wpe", "pos"),
    (r"tokens?_?(mix(er|ing)?|mlp)|(mix(er|ing)?|mlp)_?tokens?", "tokenmix"),
    (r"class_?(token|embedding)|cls_?(token|embedding)?", "cls"),
    (r"mask_?(token|embedding)", "mask"),
    (r"wte|tok|word|token|tokens", "tok"),
    (r"(up|down)convs?", r"\1.conv"),
    (r"(lm_head|predictions|mlm_head|mlm)\.decoder", "head.lm"),
    (r"generator(\.proj)?(?=(\.(weight|bias))?$)", "head.lm"),  # as a layer, not as a part of a model
    (
        r"lm_head|vocab_proj(ector|ection)?|unembed(ding)?|output_projection|proj_out_vocab|embed_out|output_embeddings?|(word_)?embeddings?_for_head",
        "head.lm",
    ),
    (
        r"down_?sample|shortcut|skip|identity_conv|residual_conv|nin_shortcut|conv_shortcut|skip_connection|proj_conv_shortcut|res_?conv|identity",
        "shortcut",
    ),
    (r"rel(ative)?_?pos(ition)?(_?bias|_?bias_?table|_bias_embedding)?|relative_attention_bias|rel_?attn_?bias", "relpos"),
)
_SPLIT = re.compile(r"[._\-/]+")
_CAMEL = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")
_DIGITS = re.compile(r"\d+|\D+")
_LETTERS = frozenset("qkv")
_INITIALS = re.compile(r"([A-Z]{2,})([a-z]+)")

# A word, and the concepts that it stands for.
_WORDS: dict[str, str] = {}
for _concept, _spellings in (
    ("q", "q query queries wq qw qs"),
    ("k", "k key keys wk ks"),
    ("v", "v value values wv val vs"),
    ("qkv", "qkv"),
    ("kv", "kv"),
    ("attn", "attention attn att mha multihead selfattention attend"),
    ("mlp", "mlp intermediate"),
    ("out", "out output o wo outs"),
    ("proj", "proj projection projected projector prj"),
    ("linear", "lin linear dense fc"),
    ("norm", "norm ln layernorm"),
    ("conv", "conv convolution conv1d conv2d conv3d convs"),
    ("embed", "embed embedding embeddings emb embedder embeds embeddding"),
    ("patch", "patch patches patchify"),
    ("pos", "pos position positional"),
    ("tok", "tok"),
    ("cls", "cls label labels"),
    ("scale", "scale gamma lambda"),
    (
        "head",
        "head heads classifier classif classification decoder_head cls_head logits prediction predictions predictor fc_out",
    ),
    ("head", "pred preds score"),
    ("lm", "lm"),
    ("shortcut", "shortcut"),
    ("relpos", "relpos"),
    ("encoder", "encoder enc src"),
    ("decoder", "decoder dec tgt trg"),
    ("aux", "aux auxiliary"),
    ("self", "self slf"),
    ("cross", "cross"),
    ("gate", "gate gating gated"),
    ("up", "up"),
    ("down", "down"),
    ("text", "text textual language txt lang context ctx"),
    ("added", "added add"),
    ("image", "image visual vision img vit pixel"),
    ("audio", "audio speech wav sound mel"),
    ("depthwise", "depthwise dw dwconv"),
    ("pointwise", "pointwise pw pwconv"),
    ("expand", "expand expansion expanded exp"),
    ("reduce", "reduce reduction squeeze"),
    ("se", "se"),
    ("router", "router"),
    ("expert", "expert experts exps"),
    ("shared", "shared"),
    ("block", "block blocks layer layers h stage stages unit units resblocks resnets resblock layerlist group groups cell"),
    ("final", "final last post end"),
    ("first", "first before pre input initial in inp macaron"),
    ("second", "second after"),
    ("hr", "hr hires highres"),
    ("mid", "mid middle bottleneck"),
    ("stem", "stem"),
    ("mask", "mask masked"),
    ("tokentype", "tokentype"),
    ("teacher", "teacher"),
    ("student", "student"),
    ("fuse", "fuse fusion fused"),
    ("time", "time timestep temb t"),
    ("logit", "logit"),
    ("temperature", "temperature tau"),
    ("pool", "pool pools pooler pooling"),
    ("reverse", "reverse backward bw bwd rev"),
    ("forward", "forward fw fwd"),
    ("ih", "ih i2h x2h"),
    ("hh", "hh h2h"),
    ("policy", "policy actor pi"),
    ("stn", "stn tnet"),
    ("mu", "mu mean"),
    ("logvar", "logvar var"),
):
    for _word in _spellings.split():
        _WORDS[_word] = _concept
_PHRASE = [(re.compile(rf"(?<![a-z0-9])(?:{pattern})(?![a-z])"), replacement) for pattern, replacement in _PHRASES]
# Concepts that say what a part is; two names with different ones of a row do not mean the same tensor.
_KINDS = (
    {"norm", "scale", "pos", "cls", "relpos", "tok", "mask", "patch"},
    {"text", "image", "audio"},
    {"self", "cross"},
    {"encoder", "decoder"},
    {"q", "k", "v", "out"},
    {"gate", "up", "down"},
    {"student", "teacher"},
    {"ih", "hh"},
    {"neighbour", "root"},
    {"policy", "critic"},
    {"lm", "embed"},
    {"lm", "shared"},
    {"head", "tok"},
)
KIND_WORDS = frozenset().union(*_KINDS)
_OF_A_LAYER = frozenset({"out", "up", "down"})  # words that say so of what stands in them directly, or in a layer there
_DIMENSIONS = {"d1", "d2", "d3"}  # `conv2d` counts dimensions
_INSIDE = {"qkv": {"q", "k", "v"}, "kv": {"k", "v"}}  # words that say several
# Words that anything may be called.
SAYS_NOTHING = {
    "weight", "bias", "linear", "proj", "block", "model", "module", "net", "body", "backbone", "features", "param", "main", "layer",
}  # fmt: skip
CONFUSED = ({"q", "k", "v"}, {"gate", "up"})  # what implementations register in any order


@cache
def concepts(name: str) -> tuple[str, ...]:
    """The concepts of a dotted name, numbers among them, in its order; unknown words stand for themselves.

    >>> concepts("blocks.3.ln_1.weight")
    ('block', '#3', 'norm', '#1', 'weight')
    """
    text = _CAMEL.sub("_", _INITIALS.sub(_initials, _towers_aside(name))).lower()
    for pattern, replacement in _PHRASE:
        text = pattern.sub(replacement, text)
    words: list[str] = []
    for word in _SPLIT.split(text):
        if word in _WORDS:
            words.append(_WORDS[word])
            continue
        parts = _DIGITS.findall(word)
        for at, part in enumerate(parts):
            if part.isdigit():
                words.append(f"#{int(part)}")
            elif "a" <= part < "k" and len(part) == 1 and 0 < at == len(parts) - 1 and part + parts[at - 1][-1] not in _DIMENSIONS:
                words.append(f"#{ord(part) - ord('a') + 1}")  # `4b` is the second of the fourth
            else:
                words.append(_WORDS.get(part, part))
    return tuple(words)


def _towers_aside(name: str) -> str:
    """The name; a module of one letter that holds a module with a numbered list is a tower, and no query, key or value."""
    parts = name.split(".")
    if not _LETTERS.intersection(parts):
        return name
    end = max((at for at, part in enumerate(parts[:-2]) if part.isdigit()), default=0)
    return ".".join("tower" if at + 1 < end and part in _LETTERS else part for at, part in enumerate(parts))


def _initials(match: re.Match[str]) -> str:
    """`HRconv` is `HR` and a word in small letters, `CLSToken` is `CLS` and `Token`."""
    return f"{match[1]}_{match[2]}" if match[2] in _WORDS else match[0]


def implied(words: Sequence[str]) -> set[str]:
    """Words, with those that others of them imply.

    >>> sorted(implied(("attn", "kv")))
    ['attn', 'k', 'kv', 'v']
    """
    return set(words).union(*(_INSIDE.get(word, ()) for word in words))


def said(path: str) -> frozenset[str]:
    """What a path says; `output_blocks` is no output of an attention, nor `up_blocks` a projection up.

    >>> "out" in said("output_blocks.0.1.qkv"), "out" in said("layer.0.attention.output.dense")
    (False, True)
    """
    near = frozenset(concepts(".".join(path.split(".")[-2:])))
    return frozenset(concepts(path)) - (_OF_A_LAYER - near)


def said_by_place(path: str) -> frozenset[str]:
    """What a layer's name that says nothing stands for by its place: the projection of an attention is its output.

    >>> sorted(said_by_place("blocks.0.attn.proj"))
    ['out']
    """
    around, _, last = path.rpartition(".")
    plain = {word for word in concepts(last) if word[0] != "#"} <= {"proj", "linear"}
    return frozenset({"out"} if plain and {"attn", "self", "cross"} & {*concepts(around.rpartition(".")[2])} else ())


def gated(names: Sequence[str]) -> dict[str, str]:
    """What `w1`, `w2` and `w3` stand for where a layer has all of them, or the two of one shape: gate, down and up.

    >>> gated(["w1", "w3"]), gated(["w1", "w2"])
    ({'w1': 'gate', 'w2': 'down', 'w3': 'up'}, {})
    """
    return {"w1": "gate", "w2": "down", "w3": "up"} if {"w1", "w3"} <= set(names) else {}


def conflict(first: frozenset[str], second: frozenset[str], *, kinds: Iterable[Set[str]] = _KINDS) -> bool:
    """Whether two names name parts that can't be the same."""
    return any((first & kind) and (second & kind) and not (first & second & kind) for kind in kinds)
