"""A person's own schemes and adapters: imported once, told, guarded, and checked."""

import json
import os
import subprocess
import sys
import textwrap

import pytest
import torch
from torch import nn

from ckptsurgeon.errors import RuleError, TargetError
from ckptsurgeon.models.init.initialize import initialize
from ckptsurgeon.models.init.schemes import value
from ckptsurgeon.models.init.user_functions import load, load_adapter, own_schemes
from ckptsurgeon.models.init.values import make_provider
from ckptsurgeon.models.target.skeleton import checkpoint_of

INITS = """
import torch
from ckptsurgeon.adapters.user_adapter import adapter

print("imported")
number = 3

def in_place(tensor, generator, std=1.0):
    tensor.normal_(0, std, generator=generator)

def returned(tensor, generator):
    return torch.rand(tensor.shape, dtype=torch.float64)  # of the global state

def seen(tensor, generator, *, note=None):
    assert not tensor.any() and tensor.device.type == "cpu", tensor
    seen.dtypes.append(tensor.dtype)

seen.dtypes = []

def nan(tensor, generator): tensor[0] = float("nan")
def half(tensor, generator): tensor.fill_(0.5)
def wide(tensor, generator): return torch.zeros(9, 9)
def text(tensor, generator): return "zeros"
def meta(tensor, generator): return tensor.to("meta")
def fails(tensor, generator): raise ValueError("no such size")
def exits(tensor, generator): raise SystemExit(3)
def needs(tensor, generator, gain): tensor.fill_(gain)

def late(tensor, generator):
    import beside
    tensor.fill_(beside.FILL)

@adapter(shape=lambda shapes, **arguments: shapes[0][::-1])
def flip(tensors, **arguments):
    return tensors[0].T

@adapter(shape=lambda shapes, times=1: [sum(shape[0] for shape in shapes) * times])
def repeated(tensors, times=1):
    return [torch.cat(tensors).repeat(times)]

@adapter(shape=lambda shapes: shapes[0])
def noisy(tensors):
    return tensors[0] + torch.rand(tensors[0].shape)

@adapter(shape=lambda shapes: "2, 3")
def odd(tensors):
    return None

@adapter(shape=lambda shapes: (-1,))
def negative(tensors):
    raise ValueError("no")
"""


@pytest.fixture
def inits(tmp_path, monkeypatch):
    (tmp_path / "persons_inits.py").write_text(INITS)
    (tmp_path / "beside.py").write_text("FILL = 4.0\n")
    monkeypatch.chdir(tmp_path)
    yield "persons_inits"
    for name in ("persons_inits", "beside"):
        sys.modules.pop(name, None)


def make(scheme, shape=(3, 4), code="F32", key="w", seed=0):
    return value(scheme, key, shape, code, seed, None, own_schemes([scheme], lambda _line: None))


def test_a_function_fills_its_tensor_or_gives_another(inits):
    assert make(f"{inits}:in_place(std=0)").tolist() == torch.zeros(3, 4).tolist()
    filled = make(f"{inits}:in_place(std=2)", (300, 300))
    assert 1.95 < filled.std() < 2.05 and filled.dtype == torch.float32
    given = make(f"{inits}:returned")
    assert given.dtype == torch.float32 and given.min() >= 0 and given.max() <= 1


@pytest.mark.parametrize("name", ["in_place", "returned"])
def test_its_values_depend_on_seed_and_key_only_and_leave_the_random_state(inits, name):
    scheme, state = f"{inits}:{name}", torch.get_rng_state()
    first = make(scheme)
    torch.rand(3)
    assert (
        torch.equal(first, make(scheme)) and not torch.equal(first, make(scheme, key="v")) and not torch.equal(first, make(scheme, seed=1))
    )
    torch.set_rng_state(state)
    make(scheme)
    assert torch.equal(state, torch.get_rng_state())


def test_it_is_handed_zeros_of_the_dtype_that_values_are_made_in(inits):
    codes = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.float32, "F8_E4M3": torch.float32, "I64": torch.int64}
    for code in codes:
        assert not make(f"{inits}:seen", code=code).any()
    assert sys.modules[inits].seen.dtypes == list(codes.values())
    assert make(f"{inits}:half", code="BF16").dtype == torch.bfloat16
    assert make(f"{inits}:fails", (0, 3)).shape == (0, 3), "nothing to fill, nothing to call"


@pytest.mark.parametrize(
    ("name", "code", "kind", "message"),
    [
        ("nan", "F32", RuleError, "not finite in F32"),
        ("in_place(std=1e30)", "F16", RuleError, "not finite in F16"),
        ("returned", "I8", RuleError, "I8 can't have"),
        ("wide", "F32", TargetError, r"gives the shape \(9, 9\), not \(3, 4\)"),
        ("text", "F32", TargetError, "gives a str, not a tensor"),
        ("meta", "F32", TargetError, "meta device"),
        ("fails", "F32", TargetError, "ValueError: no such size"),
        ("exits", "F32", TargetError, "SystemExit"),
    ],
)
def test_what_it_gives_is_checked_and_told_with_the_key(inits, name, code, kind, message):
    with pytest.raises(kind, match=message) as caught:
        make(f"{inits}:{name}", code=code, key="fc.weight")
    assert caught.value.key == "fc.weight"


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("persons_inits:in_plac", "has no 'in_plac'", "persons_inits:in_place"),
        ("persons_init:in_place", "no module 'persons_init'", "persons_inits:in_place"),
        ("nowhere/inits.py:in_place", "no such file", None),
        ("persons_inits:number", "of the type int, not a function", "persons_inits:"),
        ("persons_inits:needs", "does not fit its signature", "(gain=2)"),
        ("persons_inits:in_place(sd=1)", "unexpected keyword argument 'sd'", None),
    ],
)
def test_one_that_is_not_there_or_takes_no_such_arguments_is_told_before_any_value_is_made(inits, text, message, hint):
    with pytest.raises(TargetError, match=message) as caught:
        own_schemes([text], lambda _line: None)
    assert hint is None or hint in caught.value.hint


def test_what_is_imported_is_said_once_and_only_where_a_scheme_names_it(inits, tmp_path, capsys):
    said = []
    assert own_schemes(["zeros", "normal(std=2)", "from(a)"], said.append) == {} and not said and inits not in sys.modules
    found = own_schemes([f"{inits}:half", f"{inits}:in_place(std=1)", f"{inits}:in_place(std=2)"], said.append)
    assert list(found) == [f"{inits}:half", f"{inits}:in_place"]
    assert said == [f"imports {inits} from ./{inits}.py"]
    out, err = capsys.readouterr()
    assert out == "" and err == "imported\n"


def test_a_file_is_named_by_its_path_and_its_folder_comes_first_also_for_imports_in_the_call(tmp_path, monkeypatch):
    folder = tmp_path / "a" / "b"
    folder.mkdir(parents=True)
    (folder / "persons_inits.py").write_text(INITS)
    (folder / "beside.py").write_text("FILL = 7.0\n")
    monkeypatch.chdir(tmp_path)
    assert make("a/b/persons_inits.py:late").unique().tolist() == [7.0]
    path = list(sys.path)
    assert load("a/b/persons_inits.py:late", lambda _line: None) and sys.path == path
    for name in ("persons_inits", "beside"):
        sys.modules.pop(name, None)


def test_without_being_imported_it_has_no_value(inits):
    shapes = checkpoint_of(nn.Linear(2, 2), "m")
    with pytest.raises(RuleError, match="has not been imported") as caught:
        make_provider(None, {"weight": f"{inits}:half"}, shapes, 0)("weight")
    assert caught.value.key == "weight" and inits not in sys.modules
    own = own_schemes([f"{inits}:half"], lambda _line: None)
    provided = make_provider(None, {"weight": f"{inits}:half"}, shapes, 0, own)("weight")
    assert provided == torch.full((2, 2), 0.5).numpy().tobytes()


def test_initialize_imports_it_and_says_so_and_a_failure_writes_nothing(inits):
    model, said = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), []
    keys = list(model.state_dict())
    assert initialize(model, keys, {"0.*": f"{inits}:needs(gain=3)"}, note=said.append) == ("0.weight", "0.bias")
    assert (model[0].weight == 3).all() and said == [f"imports {inits} from ./{inits}.py"]
    with pytest.raises(TargetError):
        initialize(model, keys, {"0.*": f"{inits}:half", "1.*": f"{inits}:fails"})
    assert (model[0].weight == 3).all()


def test_the_mark_and_the_scheme_texts_need_no_torch():
    code = "import sys, ckptsurgeon.adapters.user_adapter, ckptsurgeon.models.init.scheme_text as s; s.parse_scheme('a:b(c=1)')"
    assert subprocess.run([sys.executable, "-c", f"{code}; sys.exit('torch' in sys.modules)"], check=False).returncode == 0


# adapters


def test_an_adapter_has_a_shape_and_a_kernel(inits):
    said = []
    flip = load_adapter(f"{inits}:flip", said.append)
    tensor = torch.arange(6.0).view(2, 3)
    assert flip.shape([(2, 3)]) == (3, 2) and torch.equal(flip.kernel([tensor]), tensor.T) and len(said) == 1
    repeated = load_adapter(f"{inits}:repeated", said.append)
    assert repeated.shape(((2,), (3,)), times=2) == (10,) and repeated.kernel([torch.ones(2), torch.zeros(3)], times=2).shape == (10,)
    noisy, state = load_adapter(f"{inits}:noisy", said.append), torch.get_rng_state()
    assert torch.equal(noisy.kernel([tensor]), noisy.kernel([tensor])) and torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    ("name", "which", "message"),
    [
        ("odd", "shape", "'2, 3', not a tuple"),
        ("odd", "kernel", "gives a NoneType"),
        ("negative", "shape", r"\(-1,\), not a tuple"),
        ("negative", "kernel", "ValueError: no"),
    ],
)
def test_what_an_adapter_gives_is_checked(inits, name, which, message):
    adapter = load_adapter(f"{inits}:{name}", lambda _line: None)
    with pytest.raises(TargetError, match=message) as caught:
        getattr(adapter, which)([(2, 3)] if which == "shape" else [torch.zeros(2, 3)])
    assert caught.value.path == f"{inits}:{name}"


def test_a_function_that_tells_no_shape_is_no_adapter(inits):
    with pytest.raises(TargetError, match="does not say which shape") as caught:
        load_adapter(f"{inits}:half", lambda _line: None)
    assert "@ckptsurgeon.adapter(shape=" in caught.value.hint


def test_two_processes_give_the_same_bytes(inits):
    code = textwrap.dedent(
        f"""
        import json
        from ckptsurgeon.models.init.schemes import value
        from ckptsurgeon.models.init.user_functions import own_schemes
        texts = ["{inits}:in_place", "{inits}:returned"]
        own = own_schemes(texts, lambda line: None)
        print(json.dumps([value(text, "w", (3, 4), "F32", 0, None, own).tolist() for text in texts]))
        """
    )
    env = {**os.environ, "PYTHONHASHSEED": "5"}
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True, env=env)
    assert json.loads(done.stdout) == [make(f"{inits}:{name}").tolist() for name in ("in_place", "returned")]
