"""Weights held in factors, on one side or both: links with the op that folds or unfolds them. Oracle: torch's own modules in eval mode."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pairs_support import meta
from profiles import examples
from torch import nn
from torch.nn.utils import parametrizations

import ckptsurgeon as cs
from ckptsurgeon.errors import CheckpointError
from ckptsurgeon.matching.factors import NOT_THE_WEIGHT, sides
from ckptsurgeon.matching.matcher import match
from ckptsurgeon.tensors import TensorMeta

Norm = Callable[..., nn.Module]


def plain(layer: nn.Module, **_: object) -> nn.Module:
    return layer


def old(layer: nn.Module, **how: object) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(layer, **how)


new = parametrizations.weight_norm
FORMS: dict[str, Norm] = {"plain": plain, "old": old, "new": new}
NAMES = ("conv_pre", "ups", "resblocks", "convs1", "convs2", "conv_post"), ("inp", "upsamples", "blocks", "first", "second", "out")


class Block(nn.Module):
    def __init__(self, norm: Norm, names: tuple[str, ...], size: int) -> None:
        super().__init__()
        setattr(self, names[3], nn.ModuleList([norm(nn.Conv1d(size, size, 3, padding=1)) for _ in range(2)]))
        setattr(self, names[4], nn.ModuleList([norm(nn.Conv1d(size, size, 5, padding=2)) for _ in range(2)]))


class Vocoder(nn.Module):
    """As HiFi-GAN is built: transposed convolutions, rows of blocks, one channel at the end, and one norm over the last dim."""

    def __init__(self, norm: Norm, names: tuple[str, ...], plain_end: bool = False) -> None:
        super().__init__()
        setattr(self, names[0], norm(nn.Conv1d(10, 16, 7)))
        setattr(self, names[1], nn.ModuleList([norm(nn.ConvTranspose1d(16 >> i, 8 >> i, 4, 2)) for i in range(2)]))
        setattr(self, names[2], nn.ModuleList([Block(norm, names, 8 >> i) for i in range(2)]))
        setattr(self, names[5], (plain if plain_end else norm)(nn.Conv1d(4, 1, 7)))
        self.pos_conv = norm(nn.Conv1d(16, 16, 6, groups=4), dim=2)


def weights(module: nn.Module) -> dict[str, torch.Tensor]:
    """By module its eval weight and bias, whatever they are made of."""
    found = {}
    for path, layer in module.eval().named_modules():
        if isinstance(layer, nn.Conv1d | nn.ConvTranspose1d | nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
            for hook in layer._forward_pre_hooks.values():
                hook(layer, (None,))
            found |= {f"{path}.weight": layer.weight.detach(), f"{path}.bias": layer.bias.detach()}
    return found


def scattered(module: nn.Module) -> nn.Module:
    for parameter in module.parameters():
        parameter.data.mul_(torch.rand_like(parameter) + 0.5)
    return module


@pytest.mark.parametrize("there", FORMS)
@pytest.mark.parametrize("here", FORMS)
@pytest.mark.parametrize("names", [0, 1], ids=["same names", "other names"])
def test_a_vocoder_goes_into_each_form_of_it(tmp_path: Path, here: str, there: str, names: int) -> None:
    """Complete, and the same weights: to the last bit where they are folded or renamed, to rounding where they are taken apart."""
    torch.manual_seed(0)
    source, target = scattered(Vocoder(FORMS[here], NAMES[0])), Vocoder(FORMS[there], NAMES[names])
    torch.save(source.state_dict(), tmp_path / "a.pt")
    torch.save(target.state_dict(), tmp_path / "t.pt")
    found = cs.match(tmp_path / "a.pt", tmp_path / "t.pt")
    assert found.coverage.tensors == 1 and not found.uncertain and not found.unmatched and not found.unused
    cs.merge(tmp_path / "a.pt", tmp_path / "t.pt", tmp_path / "o.pt", match=True)
    target.load_state_dict(torch.load(tmp_path / "o.pt", weights_only=True))
    for (_, wanted), (key, got) in zip(weights(source).items(), weights(target).items(), strict=True):
        if there == "plain" or here != "plain":
            assert torch.equal(got, wanted), key
        else:
            torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-7)


def test_one_side_may_hold_some_of_them_plain(tmp_path: Path) -> None:
    source, target = scattered(Vocoder(new, NAMES[0])), Vocoder(old, NAMES[1], plain_end=True)
    torch.save(source.state_dict(), tmp_path / "a.pt")
    torch.save(target.state_dict(), tmp_path / "t.pt")
    cs.merge(tmp_path / "a.pt", tmp_path / "t.pt", tmp_path / "o.pt", match=True)
    target.load_state_dict(torch.load(tmp_path / "o.pt", weights_only=True))
    assert all(torch.equal(one, other) for one, other in zip(weights(source).values(), weights(target).values(), strict=True))


def test_the_rules_file_says_it_and_leads_there(tmp_path: Path) -> None:
    source, target = scattered(Vocoder(old, NAMES[0])), Vocoder(plain, NAMES[1])
    torch.save(source.state_dict(), tmp_path / "a.pt")
    torch.save(target.state_dict(), tmp_path / "t.pt")
    (tmp_path / "r.toml").write_text(cs.match(tmp_path / "a.pt", tmp_path / "t.pt").toml)
    assert "weight_norm" in (tmp_path / "r.toml").read_text()
    cs.merge(tmp_path / "a.pt", tmp_path / "t.pt", tmp_path / "o.pt", rules=tmp_path / "r.toml")
    target.load_state_dict(torch.load(tmp_path / "o.pt", weights_only=True))
    assert all(torch.equal(one, other) for one, other in zip(weights(source).values(), weights(target).values(), strict=True))


def discriminator(norm: Norm) -> nn.Sequential:
    layers = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 4, 3, padding=1), nn.ConvTranspose2d(4, 6, 3, padding=1), nn.Conv2d(6, 5, 1)
    return nn.Sequential(*map(norm, layers))


@pytest.mark.parametrize("there", ["plain", "old", "new"])
@pytest.mark.parametrize("here", ["old", "new"])
def test_spectral_norm_is_folded_or_renamed(tmp_path: Path, here: str, there: str) -> None:
    forms = {"plain": plain, "old": nn.utils.spectral_norm, "new": parametrizations.spectral_norm}
    source, target = discriminator(forms[here]), discriminator(forms[there])
    for _ in range(3):
        source(torch.randn(2, 3, 4, 4))
    torch.save(source.state_dict(), tmp_path / "a.pt")
    torch.save(target.state_dict(), tmp_path / "t.pt")
    found = cs.match(tmp_path / "a.pt", tmp_path / "t.pt")
    assert not found.unmatched and not found.uncertain
    cs.merge(tmp_path / "a.pt", tmp_path / "t.pt", tmp_path / "o.pt", match=True)
    target.load_state_dict(torch.load(tmp_path / "o.pt", weights_only=True))
    assert all(torch.equal(one, other) for one, other in zip(weights(source).values(), weights(target).values(), strict=True))


def test_a_plain_weight_is_never_put_under_spectral_norm() -> None:
    """Torch would divide it by its norm: no original, u and v give any weight."""
    found = match(metas(discriminator(plain)), metas(discriminator(parametrizations.spectral_norm)))
    assert not [link for link in found.certain if any("parametrizations" in key for key in link.targets)]
    assert sum(key.endswith("bias") for link in found.certain for key in link.targets) == 4


def test_rows_that_shapes_do_not_tell_are_told_by_values_or_a_doubt(tmp_path: Path) -> None:
    """A kernel with as many inputs as outputs: of a convolution, or of a transposed one. Old spectral norm has random values at first."""
    torch.manual_seed(0)
    spectral = nn.utils.spectral_norm, parametrizations.spectral_norm
    for how, make in ((how, make) for how in spectral for make in ("Conv1d", "ConvTranspose1d")):
        net = nn.Sequential(how(getattr(nn, make)(16, 16, 3)), nn.Conv1d(16, 2, 1))
        bare = nn.Sequential(getattr(nn, make)(16, 16, 3), nn.Conv1d(16, 2, 1))
        link = match(metas(net), metas(bare)).by_target["0.weight"]
        if how is nn.utils.spectral_norm:
            assert link.doubt == "layout" and not link.certain
            assert [choice.op for choice in link.choices] == ["spectral_norm", "spectral_norm(dim=0)", "spectral_norm(dim=1)"]
            assert {(one.sources, one.targets) for one in link.choices} == {(link.sources, link.targets)}
            continue
        assert link.certain
        torch.save(net.state_dict(), tmp_path / "a.pt")
        torch.save(bare.state_dict(), tmp_path / "t.pt")
        cs.merge(tmp_path / "a.pt", tmp_path / "t.pt", tmp_path / "o.pt", match=True, overwrite=True)
        bare.load_state_dict(torch.load(tmp_path / "o.pt", weights_only=True))
        assert torch.equal(bare[0].weight.detach(), weights(net)["0.weight"])


def test_spectral_norm_and_weight_norm_are_not_one_another() -> None:
    found = match(metas(discriminator(nn.utils.spectral_norm)), metas(discriminator(new)))
    assert not [link for link in found.links if link.certain and not link.targets[0].endswith("bias")]


def metas(module: nn.Module) -> dict[str, TensorMeta]:
    return {key: TensorMeta(key, "F32", tuple(value.shape), ()) for key, value in module.state_dict().items()}


@settings(max_examples=examples(60), deadline=None)
@given(data=st.data())
def test_a_factor_is_never_sure_to_be_the_weight(data: st.DataObject) -> None:
    """Whatever keys of a normed net are there: a link of one key leads from a factor to the same factor, or from what is none to none."""
    form = data.draw(st.sampled_from([old, new, nn.utils.spectral_norm, parametrizations.spectral_norm]))
    other = data.draw(st.sampled_from([plain, old, new, nn.utils.spectral_norm, parametrizations.spectral_norm]))
    layers = data.draw(st.lists(st.sampled_from([(4, 8), (8, 4), (8, 8), (1, 8)]), min_size=1, max_size=3))
    make = data.draw(st.sampled_from([nn.Conv1d, nn.ConvTranspose1d]))
    one, two = (nn.Sequential(*(norm(make(a, b, 3)) for a, b in layers)) for norm in (form, other))
    sides_ = [metas(one), metas(two)]
    for side in sides_:
        for key in data.draw(st.lists(st.sampled_from(sorted(side)), max_size=2, unique=True)):
            del side[key]
    if data.draw(st.booleans()):
        sides_ = sides_[::-1]
    found = match(*sides_)
    for link in found.certain:
        if len(link.sources) == len(link.targets) == 1:
            assert part(link.sources[0]) == part(link.targets[0]), link
        assert (link.op == "") == (len(link.sources) == len(link.targets) == 1), link


def part(key: str) -> str:
    ends = {"original0": "g", "original1": "v", "original": "o", "weight_orig": "o", "weight_g": "g", "weight_v": "v", "0._v": "v"}
    return next((found for end, found in ends.items() if key.endswith(end)), "")


def test_lone_factors_are_said_not_to_be_the_weight() -> None:
    source = {key: one for key, one in metas(nn.Sequential(old(nn.Conv1d(4, 8, 3)))).items() if not key.endswith("_g")}
    (link,) = [link for link in match(source, metas(nn.Sequential(nn.Conv1d(4, 8, 3)))).links if link.targets == ("0.weight",)]
    assert not link.certain and NOT_THE_WEIGHT in link.evidence


def test_a_side_is_seen_as_a_plain_model_has_it() -> None:
    class Net(nn.Module):
        def __init__(self, norm: Norm) -> None:
            super().__init__()
            self.conv = norm(nn.Conv1d(8, 8, 3))
            self.rnn = norm(nn.LSTM(4, 8), name="weight_hh_l0")
            self.weight_g = nn.Parameter(torch.ones(3))

    bare = metas(Net(plain))
    for norm in (old, new):
        seen, _ = sides(metas(Net(norm)), bare)
        assert {key: one.shape for key, one in seen.tensors.items()} == {key: one.shape for key, one in bare.items()}
        assert set(seen.factored) == {"conv.weight", "rnn.weight_hh_l0"}


def test_another_parametrization_is_left_as_it_is() -> None:
    for norm in (parametrizations.orthogonal, lambda layer: new(parametrizations.orthogonal(layer))):
        side = metas(norm(nn.Linear(4, 4)))
        seen, _ = sides(side, side)
        assert seen.tensors == side and not seen.factored


def test_tied_weights_are_tied_as_they_are_seen(tmp_path: Path) -> None:
    class Net(nn.Module):
        def __init__(self, norm: Norm) -> None:
            super().__init__()
            self.embed = norm(nn.Linear(4, 9))
            self.head = self.embed

    source, target = scattered(Net(plain)), Net(old)
    torch.save(source.state_dict(), tmp_path / "a.pt")
    torch.save(target.state_dict(), tmp_path / "t.pt")
    cs.merge(tmp_path / "a.pt", tmp_path / "t.pt", tmp_path / "o.pt", match=True)
    target.load_state_dict(torch.load(tmp_path / "o.pt", weights_only=True))
    torch.testing.assert_close(weights(target)["embed.weight"], source.embed.weight.detach(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("how", [old, new])
def test_tied_weights_that_are_folded_stay_tied(tmp_path: Path, how: Norm) -> None:
    class Net(nn.Module):
        def __init__(self, norm: Norm) -> None:
            super().__init__()
            self.embed = norm(nn.Linear(4, 9))
            self.head = self.embed

    source, target = scattered(Net(how)), Net(plain)
    torch.save(source.state_dict(), tmp_path / "a.pt")
    torch.save(target.state_dict(), tmp_path / "t.pt")
    assert cs.merge(tmp_path / "a.pt", tmp_path / "t.pt", tmp_path / "o.pt", match=True).coverage.tensors == 1
    state = torch.load(tmp_path / "o.pt", weights_only=True)
    assert torch.equal(state["embed.weight"], weights(source)["embed.weight"])
    assert state["head.weight"].data_ptr() == state["embed.weight"].data_ptr()


@pytest.mark.parametrize("there", FORMS)
@pytest.mark.parametrize("here", FORMS)
def test_a_live_model_takes_them(tmp_path: Path, here: str, there: str) -> None:
    source, target = scattered(Vocoder(FORMS[here], NAMES[0])), Vocoder(FORMS[there], NAMES[1])
    torch.save(source.state_dict(), tmp_path / "a.pt")
    report = cs.transfer(tmp_path / "a.pt", target, match=True)
    assert report.coverage.tensors == 1
    for (_, wanted), (key, got) in zip(weights(source).items(), weights(target).items(), strict=True):
        if there == "plain" or here != "plain":
            assert torch.equal(got, wanted), key
        else:
            torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-7)


LAYERS = {
    "conv": lambda: nn.Conv1d(6, 8, 3),
    "up": lambda: nn.ConvTranspose1d(8, 4, 4),
    "square": lambda: nn.Conv1d(8, 8, 3),
    "linear": lambda: nn.Linear(6, 8),
    "same": lambda: nn.Linear(8, 8),
    "last": lambda: nn.Conv2d(8, 1, 3),
}
EVERY = {**FORMS, "spectral": parametrizations.spectral_norm, "old spectral": nn.utils.spectral_norm}


@settings(max_examples=examples(60), deadline=None)
@given(data=st.data())
def test_whatever_holds_a_weight_what_is_transferred_is_right(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Each layer in a form of its own on either side, keys in any order, modules with other names: nothing is wrong, and where names are
    the same, what the target's form can hold is there."""
    torch.manual_seed(0)
    names = data.draw(st.lists(st.sampled_from(sorted(LAYERS)), min_size=1, max_size=5))
    here, there = (data.draw(st.lists(st.sampled_from(sorted(EVERY)), min_size=len(names), max_size=len(names))) for _ in "ab")
    renamed = data.draw(st.booleans())

    def built(forms: list[str], head: str) -> nn.Module:
        made = {f"{head}{at}": EVERY[form](LAYERS[name]()) for at, (form, name) in enumerate(zip(forms, names, strict=True))}
        return scattered(nn.ModuleDict(made))

    source, target = built(here, "layer"), built(there, "block" if renamed else "layer")
    states = [list(module.state_dict().items()) for module in (source, target)]
    if data.draw(st.booleans()):
        states = [sorted(state, key=lambda item: item[0]) for state in states]
    folder = tmp_path_factory.mktemp("pair")
    for name, state in zip("at", states, strict=True):
        torch.save(dict(state), folder / f"{name}.pt")
    wanted, own = list(weights(source).items()), list(weights(target).values())
    found = cs.match(folder / "a.pt", folder / "t.pt")
    try:
        cs.merge(folder / "a.pt", folder / "t.pt", folder / "o.pt", match=True)
    except CheckpointError:
        assert (
            renamed
            or found.uncertain
            or any(one != other and "spectral" in f"{one}{other}" for one, other in zip(here, there, strict=True))
        )
        return
    target.load_state_dict(torch.load(folder / "o.pt", weights_only=True))
    for at, (key, got) in enumerate(weights(target).items()):
        right = torch.allclose(got, wanted[at][1], rtol=1e-5, atol=1e-6)
        layer = at // 2
        if key.endswith("bias"):
            assert right or renamed, key
            continue
        held = {here[layer], there[layer]}
        kinds = {form.removeprefix("old ").replace("old", "norm").replace("new", "norm") for form in held}
        possible = len(kinds) == 1 or "spectral" not in kinds or there[layer] == "plain"
        told = not (names[layer] == "square" and "old spectral" in held and len(kinds) > 1)
        if possible and told and not renamed:
            assert right, (key, here, there)
        else:
            assert right or torch.equal(got, own[at]), (key, here, there)


def test_three_letters_of_one_stem_are_no_factors() -> None:
    """A query, a key and a value."""
    source = {f"attn.weight_{part}": TensorMeta(f"attn.weight_{part}", "F32", (4, 6), ()) for part in "qkv"}
    target = {f"attn.{part}_proj.weight": TensorMeta(f"attn.{part}_proj.weight", "F32", (4, 6), ()) for part in "qkv"}
    found = match(source, target)
    assert not [link for link in found.links if NOT_THE_WEIGHT in link.evidence]


def test_names_that_both_sides_have_stay_as_they_are() -> None:
    """A wrapped layer on both sides, whose factors one of them has left out."""
    keys = [f"layers.{at}.q.{rest}" for at in range(2) for rest in ("base_layer.weight", "lora_A.default.weight", "lora_B.default.weight")]
    side = {key: TensorMeta(key, "F32", (4, 4) if "base" in key else (2, 4), ()) for key in keys}
    bare = {key: one for key, one in side.items() if "lora" not in key}
    for source, target in ((side, bare), (bare, side)):
        assert {link.targets: link.sources for link in match(source, target).certain} == {(key,): (key,) for key in bare}


# --- codes


def quantised(scale: str, dtype: torch.dtype, scheme: str = "fp8") -> dict[str, torch.Tensor]:
    state = {}
    for at in range(2):
        shape = () if scheme == "fp8" else (16,)
        state |= {f"layers.{at}.q.weight": torch.randint(-9, 9, (16, 8)).to(dtype), f"layers.{at}.q.{scale}": torch.rand(shape) + 0.5}
        state[f"layers.{at}.norm.weight"] = torch.rand(8)
    return state


@pytest.mark.parametrize(
    ("scale", "dtype", "scheme"),
    [("weight_scale_inv", torch.float8_e4m3fn, "fp8"), ("SCB", torch.int8, "int8"), ("weight_scale", torch.int8, "int8")],
)
def test_codes_are_no_weight_unless_values_are_made_of_them(tmp_path: Path, scale: str, dtype: torch.dtype, scheme: str) -> None:
    state = quantised(scale, dtype, scheme)
    torch.save(state, tmp_path / "a.pt")
    names = {"q": "q_proj", "norm": "ln"}
    target = {f"h.{at}.{names[name]}.weight": torch.zeros(16, 8) if name == "q" else torch.zeros(8) for at in range(2) for name in names}
    torch.save(target, tmp_path / "t.pt")
    found = cs.match(tmp_path / "a.pt", tmp_path / "t.pt")
    doubtful = [link for link in found.links if link.targets[0].endswith("q_proj.weight")]
    assert doubtful and not any(link.certain for link in doubtful) and all("--dequantize" in " ".join(link.evidence) for link in doubtful)
    with pytest.raises(CheckpointError) as error:
        cs.merge(tmp_path / "a.pt", tmp_path / "t.pt", tmp_path / "o.pt", match=True)
    assert "dequantize" in str(error.value.hint)
    cs.merge(tmp_path / "a.pt", tmp_path / "t.pt", tmp_path / "o.pt", match=True, dequantize=True)
    got = torch.load(tmp_path / "o.pt", weights_only=True)
    for at in range(2):
        scales = state[f"layers.{at}.q.{scale}"].reshape(-1, 1)
        wanted = state[f"layers.{at}.q.weight"].float() * scales / (127 if scale == "SCB" else 1)
        torch.testing.assert_close(got[f"h.{at}.q_proj.weight"], wanted, rtol=1e-6, atol=1e-7)


def test_codes_are_refused_though_most_matches_without_them(tmp_path: Path) -> None:
    """A merge by names alone refuses them, and so does one that is matched."""
    state = quantised("weight_scale_inv", torch.float8_e4m3fn) | {f"layers.{at}.k.weight": torch.randn(16, 8) for at in range(4)}
    torch.save(state, tmp_path / "a.pt")
    torch.save({key: torch.zeros(value.shape) for key, value in state.items() if "scale" not in key}, tmp_path / "t.pt")
    for match_ in (False, True):
        with pytest.raises(CheckpointError) as error:
            cs.merge(tmp_path / "a.pt", tmp_path / "t.pt", tmp_path / "o.pt", match=match_)
        assert "dequantize=True" in str(error.value.hint)
    cs.merge(tmp_path / "a.pt", tmp_path / "t.pt", tmp_path / "o.pt", match=True, keep=["**.q.weight"])
    cs.merge(tmp_path / "a.pt", tmp_path / "t.pt", tmp_path / "o.pt", match=True, dequantize=True, overwrite=True)


def test_codes_go_to_codes_as_they_are(tmp_path: Path) -> None:
    state = quantised("weight_scale_inv", torch.float8_e4m3fn)
    torch.save(state, tmp_path / "a.pt")
    torch.save({key.replace("layers.", "h."): value for key, value in state.items()}, tmp_path / "t.pt")
    found = cs.match(tmp_path / "a.pt", tmp_path / "t.pt")
    assert all(link.targets[0] == link.sources[0].replace("layers.", "h.") for link in found.certain)
    assert any(link.targets[0].endswith("q.weight") for link in found.certain)


def test_values_are_not_taken_for_codes(tmp_path: Path) -> None:
    state = quantised("weight_scale_inv", torch.float8_e4m3fn)
    floats = {key.replace("q.", "q_proj."): value.float() for key, value in state.items() if "scale" not in key}
    torch.save(floats, tmp_path / "a.pt")
    torch.save(state, tmp_path / "t.pt")
    assert not [link for link in cs.match(tmp_path / "a.pt", tmp_path / "t.pt").certain if link.targets[0].endswith("q.weight")]


@pytest.mark.parametrize("turned", [False, True])
def test_a_direction_beside_its_norm_is_not_the_weight_whatever_they_are_called(turned: bool) -> None:
    """One side has weight_norm's names, the other names of its own: the direction has the weight's shape, and is no weight."""
    shapes = {"norm": (6, 1, 1), "direction": (6, 4, 3), "bias": (6,)}
    own = {(key := f"net.{at}.{name}"): meta(key, shape) for at in range(3) for name, shape in shapes.items()}
    theirs = {"norm": "weight_g", "direction": "weight_v", "bias": "bias"}
    torchs = {(key := f"net.{at}.{theirs[name]}"): meta(key, shape) for at in range(3) for name, shape in shapes.items()}
    found = match(torchs, own) if turned else match(own, torchs)
    weights = [link for link in found.links if any("weight" in key or "direction" in key for key in (*link.sources, *link.targets))]
    assert weights and not any(link.certain for link in weights)
    without = {key: tensor for key, tensor in own.items() if not key.endswith("norm")}
    certain = (match(torchs, without) if turned else match(without, torchs)).certain
    assert sum("weight_norm" in link.op for link in certain) == 3


def _low_rank(layers: dict[str, tuple[int, int]], rank: int, takes: str, gives: str) -> dict[str, TensorMeta]:
    """The factors of changes to weights (rows, columns), under the names of a method."""
    shapes = {}
    for name, (rows, columns) in layers.items():
        shapes |= {f"{name}{takes}.weight": (rank, columns), f"{name}{gives}.weight": (rows, rank)}
    return {key: meta(key, shape) for key, shape in shapes.items()}


@pytest.mark.parametrize("in_order", [True, False])
def test_a_fused_low_rank_change_is_cut_in_one_factor_and_shared_in_the_other(in_order: bool) -> None:
    fused = {f"h.{at}.{name}": (rows, 64) for at in range(2) for name, rows in (("qkv", 192), ("out", 48))}
    parts = {f"blocks.{at}.attn.to_{name}": (64 if name in "qkv" else 48, 64) for at in range(2) for name in ("q", "k", "v", "out")}
    here, there = _low_rank(fused, 4, "_lora1.down", "_lora1.up"), _low_rank(parts, 4, ".lora_A", ".lora_B")
    sides = [side if in_order else dict(sorted(side.items())) for side in (here, there)]
    found = match(*sides)
    for at in range(2):
        block = f"blocks.{at}.attn.to_"
        shared = [found.by_target[f"{block}{name}.lora_A.weight"] for name in "qkv"]
        assert [(link.certain, link.sources, link.op) for link in shared] == [(True, (f"h.{at}.qkv_lora1.down.weight",), "")] * 3
        cut = found.by_target[f"{block}q.lora_B.weight"]
        assert cut.sources == (f"h.{at}.qkv_lora1.up.weight",)
        assert cut.targets == tuple(f"{block}{name}.lora_B.weight" for name in "qkv")
        assert [choice.op for choice in cut.choices] == ["chunk(dim=0)", "reshape(shape=[heads, 3, -1, 4]) | chunk(dim=1) | reshape"]
        assert found.by_target[f"{block}out.lora_B.weight"].certain
    up, down = torch.randn(192, 4), torch.randn(4, 64)  # what the cut factor and the shared one change is the part of the whole change
    assert torch.allclose(up.chunk(3)[1] @ down, (up @ down).chunk(3)[1])
    assert not match(here, _low_rank(parts, 8, ".lora_A", ".lora_B")).links  # of another rank


@pytest.mark.parametrize("in_order", [True, False])
def test_low_rank_changes_of_two_models_in_one_file_are_found_for_both(in_order: bool) -> None:
    """Most names are the same but for separators, and those of the text encoder are not: these are not fresh for that."""
    unet = {f"down.{at}.attn.to_{name}": (64, 64) for at in range(6) for name in ("q", "k", "v", "out")}
    text = {f"encoder.layers.{at}.self_attn.{name}_proj": (40, 40) for at in range(3) for name in ("q", "k", "v", "out")}
    here = {f"lora_{head}_{name.replace('.', '_')}": shape for head, some in (("unet", unet), ("te", text)) for name, shape in some.items()}
    there = {f"{head}.{name}": shape for head, some in (("unet", unet), ("text_encoder", text)) for name, shape in some.items()}
    alphas = {f"{name}.alpha": meta(f"{name}.alpha", ()) for name in here}
    sides = _low_rank(here, 4, ".lora_down", ".lora_up") | alphas, _low_rank(there, 4, ".lora_A", ".lora_B")
    found = match(*(side if in_order else dict(sorted(side.items())) for side in sides))
    pairs = {link.targets[0]: link.sources[0] for link in found.certain}
    assert pairs == {
        f"{name}.lora_{target}.weight": f"{key}.lora_{source}.weight"
        for key, name in zip(here, there, strict=True)
        for source, target in (("down", "A"), ("up", "B"))
    }


@pytest.mark.parametrize("in_order", [True, False])
def test_blocks_of_codes_go_with_their_scales(in_order: bool) -> None:
    """OpenAI's own file of gpt-oss and transformers' hold MXFP4 under two names, with a doubt about gate and up as their bias has it."""

    def side(head: str, fused: str, down: str, mark: str, norm: str) -> dict[str, TensorMeta]:
        found = [meta(f"{head}.{at}.{norm}", (96,)) for at in range(2)]
        for name, rows, blocks in ((fused, 64, 3), (down, 96, 1)):
            stems = [f"{head}.{at}.{name}" for at in range(2)]
            found += [meta(f"{stem.removesuffix('_weight')}_bias", (4, rows)) for stem in stems]
            found += [TensorMeta(f"{stem}{mark}blocks", "U8", (4, rows, blocks, 16), ()) for stem in stems]
            found += [TensorMeta(f"{stem}{mark}scales", "U8", (4, rows, blocks), ()) for stem in stems]
        return {one.name: one for one in (found if in_order else sorted(found, key=lambda one: one.name))}

    source = side("block", "mlp.mlp1_weight", "mlp.mlp2_weight", ".", "norm.scale")
    target = side("layers", "mlp.experts.gate_up_proj", "mlp.experts.down_proj", "_", "layernorm.weight")
    for sides_of, back in (((source, target), False), ((target, source), True)):
        found = match(*sides_of)
        assert len(found.links) == len(target) and all(link.clear for link in found.links)
        for part in ("blocks", "scales"):
            keys = [f"layers.1.mlp.experts.{name}_proj_{part}" for name in ("gate_up", "down")]
            firsts = [f"block.1.mlp.mlp{number}_weight.{part}" for number in (1, 2)]
            links = [found.by_target[key] for key in (firsts if back else keys)]
            assert [link.sources for link in links] == [(key,) for key in (keys if back else firsts)]
            assert links[0].choices[1].op == "roll(dim=1, by=32)" and links[1].certain
