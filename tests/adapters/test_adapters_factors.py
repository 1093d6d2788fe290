"""Weights of factors, against torch's own modules: the `weight` that a layer has in eval mode, and the factors that torch makes of one."""

import json
import warnings

import pytest
import torch
from adapters_support import apply, same
from hypothesis import given, settings
from hypothesis import strategies as st
from profiles import examples
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import ckptsurgeon as cs
from ckptsurgeon.adapters.op import FillContext
from ckptsurgeon.adapters.table import adapter_of, parse_ops
from ckptsurgeon.errors import CheckpointError, RuleError
from ckptsurgeon.planning.planfile import to_json

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
LAYERS = {
    "linear": lambda: nn.Linear(6, 5),
    "square": lambda: nn.Linear(4, 4),
    "conv1d": lambda: nn.Conv1d(4, 6, 3),
    "to one channel": lambda: nn.Conv1d(6, 1, 3),
    "conv2d": lambda: nn.Conv2d(3, 5, 2),
    "transposed": lambda: nn.ConvTranspose1d(4, 6, 3),
    "transposed, square": lambda: nn.ConvTranspose2d(4, 4, 2),
    "grouped": lambda: nn.Conv1d(4, 8, 3, groups=4),
}
dims = st.sampled_from([0, 1, -1, 2, None])


def normed(make, how, dim, dtype=torch.float32):
    """A layer under weight_norm, old or new, whose g is not the norm of v any more; and its eval weight."""
    layer = make()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        layer = how(layer, dim=dim).to(dtype)
    for parameter in layer.parameters():
        parameter.data.mul_(torch.rand_like(parameter, dtype=torch.float32).to(dtype) + 0.5)
    layer.eval()
    for hook in layer._forward_pre_hooks.values():
        hook(layer, None)  # the old form computes its weight before a forward pass
    return layer, layer.weight.detach()


@pytest.mark.parametrize("how", [nn.utils.weight_norm, parametrizations.weight_norm])
@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
@settings(max_examples=examples(12), deadline=None)
@given(dim=dims, dtype=st.sampled_from(DTYPES), seed=st.integers(0, 99))
def test_weight_norm_is_the_modules_own_weight_bit_for_bit(how, make, dim, dtype, seed):
    torch.manual_seed(seed)
    rank = make().weight.dim()
    dim = dim if dim is None or dim < rank else 0
    if dim == -1 and rank > 2:
        dim = rank - 1  # to torch -1 is no last dim, but none
    layer, wanted = normed(make, how, dim, dtype)
    g, v = [value for key, value in layer.state_dict().items() if "bias" not in key]
    assert same(apply("weight_norm", g, v)[0], wanted)
    filled = adapter_of({"op": "weight_norm"}).fill({"op": "weight_norm"}, FillContext((tuple(g.shape), tuple(v.shape))))
    assert same(apply(f"weight_norm(dim={filled['dim']})", g, v)[0], wanted)


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
@settings(max_examples=examples(12), deadline=None)
@given(dim=st.sampled_from([0, 1, 2, None]), dtype=st.sampled_from(DTYPES), seed=st.integers(0, 99))
def test_factors_of_a_weight_are_those_that_torch_makes(make, dim, dtype, seed):
    torch.manual_seed(seed)
    plain = make().to(dtype)
    dim = dim if dim is None or dim < plain.weight.dim() else 0
    weight = plain.weight.detach().clone()
    g, v = parametrizations.weight_norm(plain, dim=dim).parametrizations.weight.state_dict().values()
    shapes = tuple(g.shape), tuple(v.shape)
    for index, factor in enumerate((g, v)):
        told = apply("weight_norm", weight, index=index, of=2, siblings=shapes, target=shapes[index])[0]
        named = apply(f"weight_norm(dim={dim}, part={'gv'[index]!r})", weight)[0]
        assert same(told, factor) and same(named, factor)


def spectral(make, how, dtype, trained=True):
    """A layer under spectral norm, old or new, after some steps of the power iteration; and its eval weight."""
    layer = how(make())
    layer.train()
    size = {nn.Linear: (), nn.Conv1d: (9,), nn.ConvTranspose1d: (9,), nn.Conv2d: (9, 9), nn.ConvTranspose2d: (9, 9)}
    inside = getattr(layer, "in_features", None) or layer.in_channels
    shape = next(rest for kind, rest in size.items() if isinstance(layer, kind))
    for _ in range(30 if trained else 0):
        layer(torch.randn(1, inside, *shape))
    layer = layer.to(dtype)
    layer.eval()
    if dtype in (torch.float32, torch.float64):
        layer(torch.randn(1, inside, *shape).to(dtype))
    else:
        for hook in layer._forward_pre_hooks.values():
            hook(layer, None)
    return layer, layer.weight.detach()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("how", [nn.utils.spectral_norm, parametrizations.spectral_norm])
@pytest.mark.parametrize("name", LAYERS)
def test_spectral_norm_is_the_modules_own_weight_bit_for_bit(how, name, dtype):
    torch.manual_seed(0)
    layer, wanted = spectral(LAYERS[name], how, dtype)
    factors = [value for key, value in layer.state_dict().items() if "bias" not in key]
    if name == "transposed, square":
        with pytest.raises(RuleError, match="the values of u and v are those of dim 1"):
            apply("spectral_norm(dim=0)", *factors)
        assert same(apply("spectral_norm(dim=1)", *factors)[0], wanted)
    assert same(apply("spectral_norm", *factors)[0], wanted)
    twice = apply("spectral_norm", *factors, *factors)
    assert same(twice[0], wanted) and same(twice[1], wanted)


@pytest.mark.parametrize("make", [nn.Conv2d, nn.ConvTranspose2d])
@settings(max_examples=examples(60), deadline=None)
@given(size=st.integers(3, 12), seed=st.integers(0, 999), steps=st.sampled_from([0, 1, 2, 20]), stale=st.booleans())
def test_values_tell_the_rows_of_a_kernel_or_it_is_refused(make, size, seed, steps, stale):
    """As many inputs as outputs; the values of a net that was trained, or not yet, or whose last step came after the last iteration."""
    torch.manual_seed(seed)
    for how in (nn.utils.spectral_norm, parametrizations.spectral_norm):
        layer = how(make(size, size, 3))
        for _ in range(steps):
            layer(torch.randn(1, size, 5, 5))
        if stale:
            for parameter in layer.parameters():
                parameter.data.add_(torch.randn_like(parameter), alpha=0.01)
        layer.eval()
        layer(torch.randn(1, size, 5, 5))
        factors = [value for key, value in layer.state_dict().items() if "bias" not in key]
        try:
            made = apply("spectral_norm", *factors)[0]
        except RuleError as error:
            assert "dim=1" in str(error.hint)
        else:
            assert same(made, layer.weight.detach())


@pytest.mark.parametrize("make", [nn.Conv2d, nn.ConvTranspose2d])
def test_values_tell_the_rows_of_a_kernel_as_soon_as_they_can(make):
    """From the first in the new form, after some steps of training in the old one."""
    torch.manual_seed(0)
    for how, steps in ((parametrizations.spectral_norm, 0), (nn.utils.spectral_norm, 30)):
        layer = how(make(32, 32, 3))
        for _ in range(steps):
            layer(torch.randn(1, 32, 5, 5))
        layer.eval()
        layer(torch.randn(1, 32, 5, 5))
        factors = [value for key, value in layer.state_dict().items() if "bias" not in key]
        assert same(apply("spectral_norm", *factors)[0], layer.weight.detach())
    layer = nn.utils.spectral_norm(make(32, 32, 3))
    with pytest.raises(RuleError, match="can't tell by its values"):
        apply("spectral_norm", *(value for key, value in layer.state_dict().items() if "bias" not in key))


def test_what_is_no_pair_or_triple_is_refused():
    g, v = torch.ones(4, 1), torch.ones(4, 3)
    for text, tensors, words in (
        ("weight_norm", (v, g), "no g and v of one"),
        ("weight_norm(dim=1)", (g, v), "no lengths of"),
        ("weight_norm", (g, v, g), "by turns"),
        ("weight_norm(part='g')", (torch.tensor(1.0),), "has no direction"),
        ("weight_norm", (torch.ones(0, 1), torch.ones(0, 3)), "no g and v"),
        ("weight_norm(part='g', dim=2)", (v,), "dim 2"),
        ("spectral_norm", (v, torch.ones(4)), "by turns"),
        ("spectral_norm", (v, torch.ones(3), torch.ones(3)), "no weight, u and v"),
        ("spectral_norm(dim=1)", (v, torch.ones(4), torch.ones(3)), "with dim 1 as its rows"),
        ("spectral_norm", (torch.ones(4), torch.ones(4), torch.ones(1)), "no weight, u and v"),
    ):
        with pytest.raises(RuleError, match=words):
            apply(text, *tensors)


def test_a_zero_that_torch_would_divide_by_is_refused():
    v = torch.ones(3, 4)
    v[1] = 0
    for text, tensors in (("weight_norm", (torch.ones(3, 1), v)), ("weight_norm(part='g')", (v,)), ("weight_norm(part='v')", (v,))):
        with pytest.raises(RuleError, match="a slice of dim 0 is all zeros"):
            apply(text, *tensors)
    with pytest.raises(RuleError, match="which is zero"):
        apply("spectral_norm", torch.zeros(3, 4), torch.ones(3), torch.ones(4))


def test_what_values_do_not_allow_is_refused_by_name_with_a_way_out(tmp_path):
    net = nn.Sequential(parametrizations.weight_norm(nn.Linear(3, 4)), nn.Linear(4, 4))
    net[0].parametrizations.weight.original1.data[1] = 0
    torch.save(net.state_dict(), tmp_path / "a.pt")
    torch.save(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4)).state_dict(), tmp_path / "t.pt")
    with pytest.raises(RuleError, match="weight_norm divides") as error:
        cs.merge(tmp_path / "a.pt", tmp_path / "t.pt", tmp_path / "o.pt", match=True)
    assert error.value.key == "0.weight" and "keep=['0.weight']" in error.value.hint and not (tmp_path / "o.pt").exists()
    cs.merge(tmp_path / "a.pt", tmp_path / "t.pt", tmp_path / "o.pt", match=True, keep=["0.weight"])


def test_fields_are_held():
    for text in ("weight_norm(dim='0')", "weight_norm(part='w')", "weight_norm(0, 'g', 1)", "spectral_norm(dim='rows')"):
        with pytest.raises(RuleError):
            parse_ops(text)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_merges_fold_and_unfold_and_prove_it(tmp_path, suffix, dtype):
    torch.manual_seed(1)
    convs = [normed(LAYERS[name], parametrizations.weight_norm, dim, dtype) for name, dim in (("conv1d", 0), ("transposed", 1))]
    state = {f"{at}.{key}": value for at, (layer, _) in enumerate(convs) for key, value in layer.state_dict().items()}
    source, out = tmp_path / f"a{suffix}", tmp_path / f"b{suffix}"
    save_file(state, source) if suffix == ".safetensors" else torch.save(state, source)
    pair = "{i}.parametrizations.weight.original0 + {i}.parametrizations.weight.original1"
    report = cs.merge(source, None, out, adapt={f"{pair} -> {{i}}.weight": "weight_norm"})
    assert not any(finding.level == "error" for finding in report.findings)
    made = load_file(out) if suffix == ".safetensors" else torch.load(out, weights_only=True)
    assert sorted(made) == ["0.bias", "0.weight", "1.bias", "1.weight"]
    assert all(same(made[f"{at}.weight"], weight) for at, (_, weight) in enumerate(convs))
    back = tmp_path / f"c{suffix}"
    cs.merge(out, source, back, adapt={"{i}.weight -> " + pair: "weight_norm"})
    again = load_file(back) if suffix == ".safetensors" else torch.load(back, weights_only=True)
    fresh = [LAYERS[name]().to(dtype) for name in ("conv1d", "transposed")]
    for at, (layer, dim) in enumerate(zip(fresh, (0, 1), strict=True)):
        layer.load_state_dict({"weight": made[f"{at}.weight"], "bias": made[f"{at}.bias"]})
        parametrizations.weight_norm(layer, dim=dim)
        assert all(same(again[f"{at}.{key}"], value) for key, value in layer.state_dict().items())


def test_a_plan_folds_what_parametrize_removes(tmp_path):
    """Through plan.json too; `remove_parametrizations` is torch's own way."""
    torch.manual_seed(2)
    layer, _ = spectral(LAYERS["conv2d"], parametrizations.spectral_norm, torch.float32)
    torch.save(layer.state_dict(), tmp_path / "a.pt")
    names = [f"parametrizations.weight.{name}" for name in ("original", "0._u", "0._v")]
    parametrize.remove_parametrizations(layer, "weight")
    torch.save(layer.state_dict(), tmp_path / "t.pt")
    planned = cs.plan(tmp_path / "a.pt", tmp_path / "t.pt", adapt={" + ".join(names) + " -> weight": "spectral_norm"})
    (tmp_path / "plan.json").write_text(json.dumps(to_json(planned)))
    cs.apply(tmp_path / "plan.json", tmp_path / "o.pt")
    found = torch.load(tmp_path / "o.pt", weights_only=True)
    assert all(same(found[key], value) for key, value in layer.state_dict().items())


def test_moments_are_not_carried_through_factors():
    for name in ("weight_norm", "spectral_norm"):
        assert adapter_of({"op": name}).moments({"op": name, "dim": 0}) is None


def test_whole_numbers_have_no_norm(tmp_path):
    save_file({"g": torch.ones(4, 1, dtype=torch.int32), "v": torch.ones(4, 3, dtype=torch.int32)}, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match="computes values"):
        cs.merge(tmp_path / "a.safetensors", None, tmp_path / "b.safetensors", adapt={"g + v -> w": "weight_norm"})
