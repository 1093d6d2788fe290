"""Named schemes against torch.nn.init, and `initialize` in place."""

import math
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from ckptsurgeon.errors import ModelError, NoRecordError, RuleError
from ckptsurgeon.models.init.initialize import initialize, value
from ckptsurgeon.models.init.scheme_text import SCHEMES, effective_scheme, parse_scheme
from ckptsurgeon.models.target.skeleton import checkpoint_of

DRAWN = ["normal", "uniform", "trunc_normal", "xavier_normal", "xavier_uniform", "kaiming_normal", "kaiming_uniform", "orthogonal"]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 5)
        self.norm = nn.BatchNorm2d(6)
        self.layer = nn.LayerNorm(6)
        self.rnn = nn.GRU(6, 4)
        self.fc = nn.Linear(40, 2)


@pytest.mark.parametrize("name", DRAWN)
def test_a_scheme_has_the_spread_that_torchs_has(name):
    shape = (200, 300)
    ours = value(name, "w", shape, "F32", 0, None)
    theirs = getattr(nn.init, f"{name}_")(torch.empty(shape))
    assert ours.shape == shape and ours.dtype == torch.float32
    assert math.isclose(ours.std(), theirs.std(), rel_tol=0.05) and abs(ours.mean() - theirs.mean()) < 0.02
    assert math.isclose(ours.abs().max(), theirs.abs().max(), rel_tol=0.5)


def test_arguments_reach_torch():
    assert math.isclose(value("normal(mean=3, std=0.02)", "w", (9999,), "F32", 0, None).mean(), 3, rel_tol=0.01)
    fan_out = value("kaiming_normal(mode='fan_out', nonlinearity='relu')", "w", (400, 100), "F32", 0, None)
    assert math.isclose(fan_out.std(), math.sqrt(2 / 400), rel_tol=0.05)
    assert value("uniform(-2, -1)", "w", (99,), "F32", 0, None).max() <= -1
    assert value("constant(0.1)", "w", (), "BF16", 0, None) == torch.tensor(0.1, dtype=torch.bfloat16)
    wide = value("orthogonal(gain=2)", "w", (3, 5), "F64", 0, None)
    assert torch.allclose(wide @ wide.T, 4 * torch.eye(3, dtype=torch.float64))


@given(st.sampled_from(DRAWN), st.integers(0, 2**70), st.text(min_size=1))
def test_values_depend_on_seed_and_key_only(name, seed, key):
    state = torch.get_rng_state()
    first, again = (value(name, key, (4, 5), "F32", seed, None) for _ in range(2))
    assert torch.equal(first, again) and torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(first, value(name, key + "x", (4, 5), "F32", seed, None))
    assert not torch.equal(first, value(name, key, (4, 5), "F32", seed + 1, None))


def test_a_narrow_dtype_is_the_cast_of_the_float32_values():
    drawn = value("normal", "w", (9, 9), "F32", 3, None)
    for code, dtype in (("F16", torch.float16), ("BF16", torch.bfloat16), ("F8_E5M2", torch.float8_e5m2)):
        assert torch.equal(value("normal", "w", (9, 9), code, 3, None).float(), drawn.to(dtype).float())


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("xavier", "no scheme 'xavier'", "xavier_normal"),
        ("zeros(1)", "takes 0 arguments", "zeros alone"),
        ("normal(sd=1)", "no argument 'sd'", "normal(mean=..., std=...)"),
        ("normal(std=-1)", "std can't be -1", None),
        ("normal(std=x)", "not a scheme", None),
        ("normal(0, mean=1)", "mean is given twice", None),
        ("constant", "needs value", "constant(value=...)"),
        ("constant('a')", "value can't be 'a'", None),
        ("uniform(a=2)", "greater", None),
        ("trunc_normal(a=3)", "greater", None),
        ("kaiming_normal(mode='fan')", "mode can't be 'fan'", None),
        ("", "not a scheme", None),
        ("__import__('os')", "no scheme", None),
    ],
)
def test_a_malformed_scheme_is_refused(text, message, hint):
    with pytest.raises(RuleError, match=message) as caught:
        parse_scheme(text)
    assert hint is None or hint in caught.value.hint


def test_every_scheme_parses_by_its_name_and_is_described():
    for name, scheme in SCHEMES.items():
        if not scheme.required:
            assert parse_scheme(name) == (name, {})
        assert scheme.words


def test_a_fan_based_scheme_on_a_bias_is_what_it_is():
    assert effective_scheme("xavier_normal", "fc3.bias", (2,)) == "zeros"
    assert effective_scheme("orthogonal", "norm.weight", (2,)) == "ones"
    assert effective_scheme("kaiming_normal(a=1)", "fc3.weight", (2, 3)) == "kaiming_normal(a=1)"
    assert torch.equal(value("xavier_normal", "fc3.bias", (2,), "F32", 0, None), torch.zeros(2))
    with pytest.raises(RuleError) as caught:
        effective_scheme("xavier_normal", "norm.running_mean", (2,))
    assert caught.value.key == "norm.running_mean" and "zeros" in caught.value.hint


@pytest.mark.parametrize(
    ("scheme", "code"),
    [("normal", "I64"), ("xavier_normal", "C64"), ("constant(0.5)", "I8"), ("constant(300)", "U8"), ("constant(1e6)", "F16"),
     ("zeros", "F8_E8M0"), ("normal", "F8_E8M0"), ("normal(std=1e30)", "F16"), ("constant(2)", "BOOL")],
)  # fmt: skip
def test_a_value_that_a_dtype_can_not_have_is_refused_with_the_key(scheme, code):
    with pytest.raises(RuleError) as caught:
        value(scheme, "a.weight", (3, 3), code, 0, None)
    assert caught.value.key == "a.weight"


@given(st.sampled_from(DRAWN), st.lists(st.integers(0, 2), min_size=2, max_size=3))
def test_empty_tensors_are_no_problem(name, shape):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert value(name, "w", (0, *shape), "F32", 0, None).numel() == 0


def test_per_layer_type_is_the_tutorials_table():
    model = Net()
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(5)
    keys = tuple(model.state_dict())
    touched = initialize(model, keys, seed=1)
    assert touched == tuple(key for key in keys if not key.startswith("rnn."))
    assert torch.equal(model.conv.weight, value("xavier_normal", "conv.weight", (6, 3, 5, 5), "F32", 1, None))
    assert torch.equal(model.fc.weight, value("normal(std=0.01)", "fc.weight", (2, 40), "F32", 1, None))
    for zero in (
        model.conv.bias,
        model.norm.bias,
        model.norm.running_mean,
        model.norm.num_batches_tracked,
        model.layer.bias,
        model.fc.bias,
    ):
        assert not zero.any()
    for one in (model.norm.weight, model.norm.running_var, model.layer.weight):
        assert (one == 1).all()
    assert (model.rnn.weight_ih_l0 == 5).all(), "another layer type keeps its constructor's value"


def test_per_layer_type_without_the_layer_names_the_key():
    with pytest.raises(RuleError, match="no model is known") as caught:
        value("per_layer_type", "fc.weight", (2, 3), "F32", 0, None)
    assert caught.value.key == "fc.weight"
    gru = nn.GRU(2, 2)
    assert torch.equal(value("per_layer_type", "rnn.bias_ih_l0", (6,), "F32", 0, gru), gru.bias_ih_l0)


def test_only_what_is_fresh_is_touched():
    model = Net()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    assert initialize(model, ["fc.weight", "fc.bias"], {"fc.*": "xavier_normal"}) == ("fc.weight", "fc.bias")
    changed = {key for key, tensor in model.state_dict().items() if not torch.equal(tensor, before[key])}
    assert changed == {"fc.weight", "fc.bias"} and model.fc.weight.requires_grad


def test_one_more_layer_does_not_change_anothers_values():
    one, two = nn.ModuleDict({"b": nn.Linear(2, 2)}), nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    initialize(one, list(one.state_dict()))
    initialize(two, list(two.state_dict()))
    assert torch.equal(one["b"].weight, two["b"].weight) and not torch.equal(two["a"].weight, two["b"].weight)


def test_patterns_the_first_wins_and_the_rest_keeps_its_value():
    model = Net()
    kept = model.conv.weight.clone()
    done = initialize(model, list(model.state_dict()), {"fc.bias": "ones", "fc.*": "zeros", "layer.*": "model"})
    assert done == ("fc.weight", "fc.bias") and (model.fc.bias == 1).all() and not model.fc.weight.any()
    assert torch.equal(model.conv.weight, kept)


def test_all_or_nothing_with_every_problem_at_once():
    model = Net()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(RuleError) as caught:
        initialize(model, list(model.state_dict()), "xavier_normal")
    assert len(caught.value.problems) > 3 and any("norm.running_mean" in problem for problem in caught.value.problems)
    with pytest.raises(RuleError, match="matches nothing in the model"):
        initialize(model, list(model.state_dict()), {"fc.*": "zeros", "fc9.*": "zeros"})
    with pytest.raises(RuleError, match="nothing that is fresh"):
        initialize(model, ["fc.bias"], {"fc.bias": "ones", "conv.*": "zeros"})
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_a_tie_is_written_once_and_never_over_a_transferred_name():
    model = nn.ModuleDict({"embed": nn.Embedding(4, 3), "head": nn.Linear(3, 4, bias=False)})
    model["head"].weight = model["embed"].weight
    before = model["embed"].weight.clone()
    assert initialize(model, ["head.weight"], "normal") == ()
    assert torch.equal(model["embed"].weight, before)
    assert initialize(model, ["head.weight", "embed.weight"], "normal", seed=2) == ("embed.weight", "head.weight")
    assert torch.equal(model["head"].weight, value("normal", "embed.weight", (4, 3), "F32", 2, None))


def test_records_of_another_model_or_none_are_errors():
    with pytest.raises(ModelError) as caught:
        initialize(Net(), ["fc9.weight"])
    assert "fc9.weight" in caught.value.problems
    with pytest.raises(NoRecordError):
        initialize(Net(), checkpoint_of(Net(), "m"))
    with torch.device("meta"):
        model = Net()
    with pytest.raises(ModelError, match="meta"):
        initialize(model, ["fc.weight"])


def test_a_state_dict_whose_hook_copies_can_not_be_written_silently():
    model = nn.Linear(2, 2)
    model.register_state_dict_post_hook(lambda module, state, prefix, local: state.update(weight=state["weight"].clone()))
    with pytest.raises(ModelError, match="hook") as caught:
        initialize(model, ["weight"])
    assert caught.value.key == "weight"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
def test_a_model_on_cuda_gets_the_same_values():
    model = Net().cuda()
    initialize(model, ["fc.weight"], "normal")
    assert torch.equal(model.fc.weight.cpu(), value("normal", "fc.weight", (2, 40), "F32", 0, None))


class Stack(nn.Module):
    def __init__(self, layers=4):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(3, 3) for _ in range(layers))
        self.head = nn.Linear(3, 2)


def test_from_takes_another_keys_value_and_leaves_that_alone():
    model = Stack()
    kept = model.layers[0].weight.clone()
    assert initialize(model, ["layers.1.weight"], "from(layers.0.weight)") == ("layers.1.weight",)
    assert torch.equal(model.layers[1].weight, kept) and torch.equal(model.layers[0].weight, kept)
    with torch.no_grad():
        model.layers[1].weight.zero_()
    assert torch.equal(model.layers[0].weight, kept)


def test_from_follows_the_patterns_parts_to_the_value_that_the_other_key_gets():
    model = Stack()
    new = [f"layers.{i}.{p}" for i in (1, 2, 3) for p in ("weight", "bias")]
    assert initialize(model, new, {"layers.{i}.{p}": "from(layers.{i-1}.{p})"}) == tuple(new)
    for layer in model.layers[1:]:
        assert torch.equal(layer.weight, model.layers[0].weight) and torch.equal(layer.bias, model.layers[0].bias)
    initialize(model, new, {"layers.1.weight": "normal", "layers.{i}.weight": "from(layers.{i-1}.weight)"}, seed=3)
    assert torch.equal(model.layers[3].weight, value("normal", "layers.1.weight", (3, 3), "F32", 3, None))


@pytest.mark.parametrize(
    ("schemes", "message", "hint"),
    [
        ({"head.weight": "from(layers.0.weight)"}, r"shape \(2, 3\), and 'layers.0.weight'.*\(3, 3\)", None),
        ({"head.weight": "from(hed.weight)"}, "'hed.weight', which is not in the model", "head.weight"),
        ({"head.weight": "from(head.weight)"}, "leads back to it", None),
        ({"layers.1.bias": "from(layers.2.bias)", "layers.2.bias": "from(layers.1.bias)"}, "2 initialisations", None),
        ({"layers.*.bias": "from(layers.{i}.bias)"}, "does not name", None),
        ({"layers.{i}.bias": "from(layers.{i-1}.bias)"}, "comes to -1", None),
    ],
)
def test_a_key_that_from_can_not_take_its_value_from_is_refused(schemes, message, hint):
    model = Stack()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(RuleError, match=message) as caught:
        initialize(model, list(before), schemes)
    assert hint is None or hint in caught.value.hint
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_from_has_no_value_where_no_other_values_are():
    with pytest.raises(RuleError, match="no other values are available") as caught:
        value("from(a)", "b", (2,), "F32", 0, nn.Linear(1, 1))
    assert caught.value.key == "b"


def test_from_of_a_tied_tensor_is_what_that_tensor_gets():
    model = nn.ModuleDict({"embed": nn.Embedding(4, 4), "head": nn.Linear(4, 4, bias=False), "new": nn.Linear(4, 4, bias=False)})
    model["head"].weight = model["embed"].weight
    touched = initialize(model, list(model.state_dict()), {"head.weight": "normal", "new.weight": "from(embed.weight)"})
    assert set(touched) == {"embed.weight", "head.weight", "new.weight"}
    assert torch.equal(model["new"].weight, model["embed"].weight)
    assert torch.equal(model["new"].weight, value("normal", "embed.weight", (4, 4), "F32", 0, None))


def test_reset_in_place_is_the_layers_own():
    model = Net()
    expected = {key: value("reset", f"norm.{key}", (6,), "F32", 0, model.norm) for key in ("weight", "running_var")}
    with torch.no_grad():
        for tensor in model.norm.parameters():
            tensor.fill_(5)
    assert initialize(model, ["norm.weight", "norm.running_var", "fc.weight"], "reset") == ("norm.weight", "norm.running_var", "fc.weight")
    assert torch.equal(model.norm.weight, expected["weight"]) and torch.equal(model.norm.running_var, expected["running_var"])
    assert torch.equal(model.fc.weight, value("reset", "fc.weight", (2, 40), "F32", 0, model.fc))
