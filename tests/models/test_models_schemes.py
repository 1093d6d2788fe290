"""Every scheme against its formula, `reset` against the layer itself, and no value that comes from memory as it was."""

import math
import os
import subprocess
import sys
import textwrap

import pytest
import torch
from torch import nn

from ckptsurgeon.errors import ModelError, RuleError, TargetError
from ckptsurgeon.models.init.initialize import initialize
from ckptsurgeon.models.init.scheme_text import SCHEMES, effective_scheme, is_own, needs, parse_scheme
from ckptsurgeon.models.init.schemes import seed_of, value
from ckptsurgeon.models.init.values import make_provider
from ckptsurgeon.models.target.build import is_unset, marked
from ckptsurgeon.models.target.skeleton import checkpoint_of

PROMISED = [
    *("model", "reset", "zeros", "ones", "constant", "normal", "trunc_normal", "xavier_normal", "xavier_uniform", "kaiming_normal"),
    *("orthogonal", "from", "per_layer_type"),
]
OUT, IN = 300, 200


def test_every_scheme_that_is_promised_is_in_the_table():
    assert set(PROMISED) <= set(SCHEMES)
    assert [needs(text) for text in ("model", "reset", "from(a)", "orthogonal", "zeros", "a:b")] == [
        *("model", "layer", "key", "fans", "nothing", "nothing")
    ]


@pytest.mark.parametrize(
    ("scheme", "std", "bound"),
    [
        ("zeros", 0, 0),
        ("ones", 0, 1),
        ("constant(0.25)", 0, 0.25),
        ("normal", 1, None),
        ("normal(std=0.02)", 0.02, None),
        ("trunc_normal(std=1, a=-1, b=1)", math.sqrt(1 - 2 * math.exp(-0.5) / math.sqrt(2 * math.pi) / math.erf(math.sqrt(0.5))), 1),
        ("uniform(-3, 3)", math.sqrt(3), 3),
        ("xavier_normal", math.sqrt(2 / (IN + OUT)), None),
        ("xavier_uniform(gain=2)", 2 * math.sqrt(2 / (IN + OUT)), 2 * math.sqrt(6 / (IN + OUT))),
        ("kaiming_normal(mode='fan_in', nonlinearity='relu')", math.sqrt(2 / IN), None),
        ("kaiming_normal(mode='fan_out', nonlinearity='linear')", math.sqrt(1 / OUT), None),
        ("kaiming_uniform(nonlinearity='tanh')", 5 / 3 / math.sqrt(IN), 5 / 3 * math.sqrt(3 / IN)),
    ],
)
def test_a_schemes_values_have_the_spread_of_its_formula(scheme, std, bound):
    drawn = value(scheme, "w", (OUT, IN), "F64", 0, None)
    assert math.isclose(drawn.std(), std, rel_tol=0.02, abs_tol=1e-12)
    if bound is not None:
        assert 0.98 * bound <= drawn.abs().max() <= bound
    if std:
        assert abs(drawn.mean()) < 5 * std / math.sqrt(drawn.numel())


def test_orthogonal_rows_or_columns_are_orthonormal():
    for shape in ((3, 5), (5, 3), (4, 2, 2)):
        flat = value("orthogonal", "w", shape, "F64", 0, None).flatten(1)
        small = flat @ flat.T if flat.shape[0] <= flat.shape[1] else flat.T @ flat
        assert torch.allclose(small, torch.eye(len(small), dtype=torch.float64))


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("from(layers.11.weight)", ("from", {"key": "layers.11.weight"})),
        ("from('layers.11.weight')", ("from", {"key": "layers.11.weight"})),
        (' from ( "a b" ) ', ("from", {"key": "a b"})),
        ("from(key='a')", ("from", {"key": "a"})),
        ("from(layers.{i-1}.{p})", ("from", {"key": "layers.{i-1}.{p}"})),
        ("from(layers.{(i - 1) // 2}.{**rest})", ("from", {"key": "layers.{(i - 1) // 2}.{**rest}"})),
        ("from(0)", ("from", {"key": "0"})),
        ("from('a:b')", ("from", {"key": "a:b"})),
        ("mylib:ortho", ("mylib:ortho", {})),
        (" my.lib:Inits.ortho ( gain = 2 ) ", ("my.lib:Inits.ortho", {"gain": 2})),
        ("inits/a.py:ortho(sizes=[1, 2], name='x:y')", ("inits/a.py:ortho", {"sizes": [1, 2], "name": "x:y"})),
    ],
)
def test_keys_and_own_functions_have_forms_of_their_own(text, parsed):
    assert parse_scheme(text) == parsed and is_own(text) == is_own(parsed[0]) == (":" in parsed[0])
    assert effective_scheme(text, "fc.bias", (2,)) == text


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("from", "needs key", "from(key=...)"),
        ("from()", "needs key", None),
        ("from('')", "key can't be ''", None),
        ("from(a, b)", "not a scheme", "from(layers.11.weight)"),
        ("from(a", "not a scheme", None),
        ("mylib:ortho(gain=g)", "literals", "mylib:ortho(gain=2)"),
        ("mylib:ortho(2)", "without names", "mylib:ortho(gain=2)"),
        ("inits/a:ortho", "neither a dotted module nor a .py file", None),
        ("mylib:", "not a target", "path/to/file.py:ortho"),
    ],
)
def test_a_form_that_is_none_is_refused(text, message, hint):
    with pytest.raises(RuleError, match=message) as caught:
        parse_scheme(text)
    assert hint is None or hint in caught.value.hint


# reset


class Kinds(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 3)
        self.conv = nn.Conv2d(3, 2, 3)
        self.norm = nn.BatchNorm2d(2)
        self.rnn = nn.GRU(3, 4, num_layers=2)
        self.embed = nn.Embedding(5, 3, padding_idx=1)


def reset(model, key, seed=0):
    tensor = model.state_dict()[key]
    return make_provider(model, {key: "reset"}, checkpoint_of(model, "m"), seed)(key), tensor


def tensors(model, seed=0):
    metas = checkpoint_of(model, "m")
    provide = make_provider(model, dict.fromkeys(metas, "reset"), metas, seed)
    return {key: bytes(provide(key)) for key in metas}


def test_reset_is_what_the_layer_does_to_itself_in_one_run_for_all_its_tensors():
    model = Kinds()
    values = tensors(model, 7)
    for name, layer in model.named_children():
        torch.manual_seed(seed_of(7, name))
        layer.reset_parameters()
    assert values == {key: tensor.numpy().tobytes() for key, tensor in model.state_dict().items()}


def test_reset_needs_no_values_of_the_model():
    with torch.device("meta"):
        bare = Kinds()
    assert tensors(bare) == tensors(Kinds())
    assert all(tensor.is_meta for tensor in bare.state_dict().values())


def test_reset_brings_running_statistics_back():
    model = Kinds()
    with torch.no_grad():
        for tensor in (*model.norm.parameters(), *model.norm.buffers()):
            tensor.fill_(9)
    found = {key: value("reset", f"norm.{key}", tuple(t.shape), "F32", 0, model.norm) for key, t in model.norm.state_dict().items()}
    assert {key: set(tensor.flatten().tolist()) for key, tensor in found.items()} == {
        "weight": {1.0},
        "bias": {0.0},
        "running_mean": {0.0},
        "running_var": {1.0},
        "num_batches_tracked": {0.0},
    }


def test_reset_changes_neither_the_model_nor_the_random_state():
    model = Kinds()
    model.fc.eval()
    calls = []
    model.fc.register_forward_hook(lambda *_: calls.append(1))
    before = {key: (id(tensor), tensor.clone()) for key, tensor in model.state_dict(keep_vars=True).items()}
    state = torch.get_rng_state()
    tensors(model)
    assert torch.equal(state, torch.get_rng_state()) and not model.fc.training and model.norm.training and not calls
    after = model.state_dict(keep_vars=True)
    assert all(id(after[key]) == place and torch.equal(after[key], old) for key, (place, old) in before.items())
    assert len(model.fc._forward_hooks) == 1 and all(tensor.grad is None for tensor in model.parameters())


def test_reset_depends_on_seed_and_path_and_not_on_other_layers():
    one, two = nn.ModuleDict({"b": nn.Linear(2, 2)}), nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    assert tensors(one) == {key: data for key, data in tensors(two).items() if key.startswith("b")}
    assert tensors(two)["a.weight"] != tensors(two)["b.weight"] and tensors(one) != tensors(one, 1)


class Odd(nn.Module):
    """Sets `done` whole, `part` in part, and nothing else; its child is left alone."""

    def __init__(self):
        super().__init__()
        self.done, self.part, self.never = (nn.Parameter(torch.zeros(3)) for _ in range(3))
        self.register_buffer("count", torch.zeros(2, dtype=torch.int64))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("flags", torch.zeros(2, dtype=torch.bool))
        self.register_buffer("scale", torch.tensor(5.0))
        self.child = nn.Linear(2, 2)

    def reset_parameters(self):
        with torch.no_grad():
            self.done.copy_(torch.full((3,), float(self.scale)))
            self.part[0] = 1
            self.steps.zero_()
            self.count[0] = 4


@pytest.mark.parametrize("name", ["never", "part", "count", "flags", "scale"])
def test_what_reset_parameters_does_not_set_is_refused(name):
    model = nn.ModuleDict({"odd": Odd()})
    with pytest.raises(RuleError, match=r"reset_parameters does not set (all of )?this") as caught:
        reset(model, f"odd.{name}")
    assert caught.value.key == f"odd.{name}" and "init=" in caught.value.hint
    assert ("all of" in caught.value.reason) == (name in ("part", "count"))


def test_reset_may_use_a_buffer_that_has_a_value_and_leaves_children_alone():
    odd = Odd()
    assert value("reset", "odd.done", (3,), "F32", 0, odd).tolist() == [5, 5, 5]
    assert value("reset", "odd.steps", (), "I64", 0, odd) == 0
    with torch.device("meta"):
        bare = Odd()
    with pytest.raises(RuleError, match="does not set this"):  # 5 is known to the constructor alone
        value("reset", "odd.done", (3,), "F32", 0, bare)


def test_a_layer_without_reset_parameters_is_refused_by_key():
    plain = nn.Module()
    plain.w = nn.Parameter(torch.zeros(1))
    wrapped = nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))
    for model, key in ((plain, "w"), (wrapped, "parametrizations.weight.original0"), (nn.MultiheadAttention(2, 1), "in_proj_weight")):
        with pytest.raises(RuleError, match="has no reset_parameters") as caught:
            reset(model, key)
        assert caught.value.key == key and "zeros" in caught.value.hint
    with pytest.raises(RuleError, match="no model is known"):
        value("reset", "fc.weight", (2,), "F32", 0, None)


def test_a_reset_parameters_that_fails_is_told_with_the_key():
    class Failing(nn.Linear):
        broken = False

        def reset_parameters(self):
            if self.broken:
                raise ValueError("no such size")

    model = nn.Sequential(Failing(2, 2))
    model[0].broken = True
    with pytest.raises(TargetError, match="no such size") as caught:
        reset(model, "0.weight")
    assert caught.value.key == "0.weight" and caught.value.path == "Failing"


# nothing uninitialised

SCRIPT = textwrap.dedent(
    """
    import hashlib, sys, torch
    from torch import nn
    from ckptsurgeon.models.target.build import build
    from ckptsurgeon.models.target.skeleton import checkpoint_of
    from ckptsurgeon.models.target.spec import parse
    from ckptsurgeon.models.target.build import marked
    from ckptsurgeon.models.init.values import make_provider

    torch.ones(1 << 20).mul_(3.0)  # memory that is free again, with something in it
    model = build(parse("nets:Net"), 0, lambda line: None)
    metas = checkpoint_of(model, "m")
    for scheme in sys.argv[1:]:
        provide = make_provider(model, {key: scheme for key in metas if key != "norm.num_batches_tracked"}, metas, 0)
        digest = hashlib.sha256()
        for key, meta in metas.items():
            data = bytes(provide(key))
            digest.update(data)
            tensor = torch.frombuffer(bytearray(data), dtype=torch.int64 if meta.dtype == "I64" else torch.float32)
            assert torch.isfinite(tensor).all(), (scheme, key)
        print(scheme, digest.hexdigest())
    """
)
NETS = """
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.conv, self.norm, self.rnn = nn.Linear(70, 30), nn.Conv2d(3, 8, 5), nn.BatchNorm2d(8), nn.GRU(9, 7)
"""
EACH = ["model", "per_layer_type", "reset", "zeros", "ones", "constant(0.1)", "normal(std=0.02)", "uniform(-1, 1)", "trunc_normal"]


@pytest.mark.slow
def test_no_value_comes_from_memory_as_it_was(tmp_path):
    """glibc fills what it hands out with a byte of ours, another one in each run: whatever was not written to would differ."""
    (tmp_path / "nets.py").write_text(NETS)
    outputs = {
        subprocess.run(
            [sys.executable, "-W", "ignore", "-c", SCRIPT, *EACH],
            capture_output=True,
            text=True,
            check=True,
            cwd=tmp_path,
            env={**os.environ, "MALLOC_PERTURB_": byte, "PYTHONHASHSEED": byte},
        ).stdout
        for byte in ("85", "170")
    }
    assert len(outputs) == 1 and len(next(iter(outputs)).splitlines()) == len(EACH)


@pytest.mark.parametrize("scheme", [name if not scheme.required else f"{name}(1)" for name, scheme in SCHEMES.items() if name != "from"])
@pytest.mark.parametrize("shape", [(4, 3), (2, 3, 5, 5), (0, 3)])
@pytest.mark.filterwarnings("ignore:Initializing zero-element")
def test_no_scheme_hands_on_memory_that_it_did_not_write_to(scheme, shape):
    layer = nn.Linear(1, 1)
    layer.weight = nn.Parameter(torch.ones(shape))
    with marked():
        drawn = value(scheme, "fc.weight", shape, "F32", 0, layer)
    assert not is_unset(drawn) and torch.isfinite(drawn).all() and not drawn.is_meta and drawn.is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_what_a_constructor_leaves_unset_is_known_and_refused(dtype):
    class Forgetful(nn.Module):
        def __init__(self):
            super().__init__()
            self.never = nn.Parameter(torch.empty(2, 3, dtype=dtype))
            self.part = nn.Parameter(torch.empty_like(self.never))
            self.fine = nn.Parameter(self.never.new_empty(3))
            self.meant = nn.Parameter(torch.full((2,), math.nan, dtype=dtype))
            self.register_buffer("ints", torch.empty(3, dtype=torch.int64))
            with torch.no_grad():
                self.part[0] = 1
                self.fine.fill_(1)

    with marked():
        model = Forgetful()
    assert [key for key, tensor in model.state_dict().items() if is_unset(tensor)] == ["never", "part"]
    assert model.meant.isnan().all() and not model.ints.any()
    metas = checkpoint_of(model, "m")
    for key in ("never", "part"):
        with pytest.raises(ModelError, match="left without a value") as caught:
            make_provider(model, {}, metas, 0)(key)
        assert caught.value.key == key and caught.value.hint == f"init={{{key!r}: 'zeros'}}"
    for key in ("fine", "meant", "ints"):
        make_provider(model, {}, metas, 0)(key)


def test_marking_changes_no_constructors_values_and_no_random_state():
    for seed in range(2):
        torch.manual_seed(seed)
        plain, state = Kinds(), torch.get_rng_state()
        torch.manual_seed(seed)
        with marked():
            same = Kinds()
        assert torch.equal(state, torch.get_rng_state())
        assert all(torch.equal(one, other) for one, other in zip(plain.state_dict().values(), same.state_dict().values(), strict=True))


def test_marking_loads_no_compiler():
    code = "import sys, torch\nfrom ckptsurgeon.models.target.build import marked\nwith marked(): torch.nn.Linear(2, 2)\n"
    code += "sys.exit('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=False).returncode == 0


def test_a_function_in_hand_is_a_scheme_seeded_by_name() -> None:
    def spread(tensor: torch.Tensor, generator: torch.Generator) -> None:
        tensor.normal_(0, 0.5, generator=generator)

    nets = [nn.Sequential(nn.Linear(3, 2), nn.Linear(3, 2)) for _ in range(2)]
    keys = ["0.weight", "1.weight", "1.bias"]
    for net in nets:
        assert initialize(net, keys, {"*.weight": spread, "1.bias": lambda tensor, generator: torch.full_like(tensor, 7.0)}) == tuple(keys)
    assert torch.equal(nets[0][0].weight, nets[1][0].weight) and not torch.equal(nets[0][0].weight, nets[0][1].weight)
    assert nets[0][1].bias.tolist() == [7.0, 7.0]
    assert initialize(nets[0], keys, spread) == tuple(keys)


def test_a_function_in_hand_that_is_no_scheme() -> None:
    net = nn.Linear(3, 2)
    with pytest.raises(TargetError, match=r"does not fit its signature"):
        initialize(net, ["weight"], lambda tensor: tensor)
    with pytest.raises(RuleError, match="is no scheme"):
        initialize(net, ["weight"], {"weight": 3})  # type: ignore[dict-item]

    def fails(tensor: torch.Tensor, generator: torch.Generator) -> None:
        raise ValueError("on purpose")

    with pytest.raises(TargetError, match="on purpose"):
        initialize(net, ["weight"], fails)
