"""From a spec to a model: what is imported, how it is built, and each way in which that fails."""

import random
import sys
import textwrap

import pytest
import torch

from ckptsurgeon.errors import TargetError
from ckptsurgeon.models.target.build import build, build_meta, forked, resolve
from ckptsurgeon.models.target.spec import parse

NET = """
from torch import nn
class Net(nn.Module):
    def __init__(self, num_classes=10):
        super().__init__()
        self.fc = nn.Linear(4, num_classes)
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = dict(sys.modules)
    yield lambda name, text: write(tmp_path / name, text)
    for name in set(sys.modules) - set(before):
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(textwrap.dedent(text))
    return path


def meta(text, note=lambda line: None):
    return build_meta(parse(text), note)


def real(text, seed=0, note=lambda line: None):
    return build(parse(text), seed, note)


@pytest.mark.parametrize("text", ["anet:Net(num_classes=2)", "anet.py:Net(2)", "./anet.py:Net(num_classes=2)"])
def test_a_class_is_built_on_meta_and_on_the_cpu(folder, text):
    folder("anet.py", NET)
    notes = []
    model = meta(text, notes.append)
    assert model.fc.weight.shape == (2, 4) and model.fc.weight.device.type == "meta"
    assert notes == ["imports anet from ./anet.py"]
    assert real(text).fc.weight.device.type == "cpu"


def test_a_package_a_nested_attribute_and_a_factory(folder):
    folder("apkg/__init__.py", "")
    folder("apkg/nets.py", NET + "class outer:\n    Inner = Net\ndef make(n=3):\n    print('making')\n    return Net(n)\n")
    assert meta("apkg.nets:outer.Inner").fc.out_features == 10
    assert meta("apkg.nets:make").fc.out_features == 3
    assert meta("apkg.nets:make(n=5)").fc.out_features == 5


def test_a_file_imports_what_lies_beside_it(folder):
    folder("sub/amodel.py", NET)
    folder("sub/avariant.py", "from amodel import Net\nclass Variant(Net):\n    def __init__(self):\n        super().__init__(2)\n")
    assert meta("sub/avariant.py:Variant").fc.out_features == 2


def test_a_constructor_may_import_late(folder):
    folder("sub/alate.py", "width = 7")
    folder(
        "sub/alazy.py",
        "from torch import nn\nclass Net(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
        "        from alate import width\n        self.fc = nn.Linear(1, width)\n",
    )
    path = list(sys.path)
    assert real("sub/alazy.py:Net").fc.out_features == 7
    assert sys.path == path


def test_two_files_of_one_name_with_helpers_of_one_name_are_told_apart(folder):
    for name, width in (("one", 1), ("two", 2)):
        folder(f"{name}/ahelper.py", f"width = {width}")
        folder(
            f"{name}/anet.py",
            "from torch import nn\nfrom ahelper import width\n"
            "class Net(nn.Linear):\n    def __init__(self):\n        super().__init__(1, width)\n",
        )
    widths = [meta(f"{name}/anet.py:Net").out_features for name in ("one", "two", "one", "two")]
    assert widths == [1, 2, 1, 2]
    assert sys.modules["ahelper"].width == 1, "what the process had imported first is still there"


def test_the_current_folder_comes_before_a_module_of_that_name_from_another(folder, monkeypatch, tmp_path):
    folder("one/anet.py", NET.replace("10", "1"))
    folder("two/anet.py", NET.replace("10", "2"))
    widths = []
    for name in ("one", "two", "one"):
        monkeypatch.chdir(tmp_path / name)
        widths.append(meta("anet:Net").fc.out_features)
    assert widths == [1, 2, 1]


def test_a_file_that_has_an_installed_modules_name_does_not_take_its_place(folder):
    import json

    folder("json.py", NET)
    assert meta("json.py:Net").fc.out_features == 10
    assert sys.modules["json"] is json


def test_values_depend_on_the_seed_only_and_random_states_are_left_alone(folder):
    folder(
        "arandom.py",
        "import random, torch, numpy\nfrom torch import nn\nclass Net(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
        "        self.a = nn.Parameter(torch.randn(3))\n        self.b = nn.Parameter(torch.tensor(random.random()))\n"
        "        self.c = nn.Parameter(torch.tensor(numpy.random.rand()))\n        torch.set_default_dtype(torch.float64)\n",
    )
    import numpy

    states = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].tolist()
    first = real("arandom:Net", 1).state_dict()
    torch.randn(5)
    torch.set_rng_state(states[0])
    again, other = real("arandom:Net", 1).state_dict(), real("arandom:Net", 2).state_dict()
    assert all(torch.equal(first[key], again[key]) and not torch.equal(first[key], other[key]) for key in "abc")
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
    assert numpy.random.get_state()[1].tolist() == states[2]
    assert torch.get_default_dtype() == torch.float32


def test_the_seeded_values_are_those_of_manual_seed(folder):
    folder("anet.py", NET)
    built = real("anet:Net", 7).fc.weight
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        assert torch.equal(built, torch.nn.Linear(4, 10).weight)


def test_a_constructor_that_needs_values_is_built_on_the_cpu_with_a_note(folder):
    folder(
        "avalue.py",
        NET + "class Needs(Net):\n    def __init__(self):\n        super().__init__(int(__import__('torch').ones(2).sum().item()))\n",
    )
    notes = []
    assert meta("avalue:Needs", notes.append).fc.weight.shape == (2, 4)
    assert "built on the CPU" in notes[-1] and "item()" in notes[-1]


def test_an_instance_is_used_as_it_is_and_copied_for_building(folder):
    folder("ainst.py", NET + "net = Net(2)\nnumber = 3\n")
    instance = resolve(parse("ainst:net"), lambda line: None)
    assert meta("ainst:net") is instance
    copy = real("ainst:net")
    assert copy is not instance and torch.equal(copy.fc.weight, instance.fc.weight)
    with pytest.raises(TargetError, match="model already"):
        meta("ainst:net()")
    with pytest.raises(TargetError, match="type int"):
        meta("ainst:number")


def test_mutable_arguments_are_fresh_for_each_build(folder):
    folder("amut.py", "from torch import nn\ndef make(sizes):\n    return nn.Linear(1, sizes.pop())\n")
    spec = parse("amut:make(sizes=[1, 2])")
    assert build_meta(spec, print).out_features == build(spec, 0, print).out_features == 2


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("amodle:Net", "no module 'amodle'", "amodel:Net"),
        ("amodle.py:Net", "no such file", "amodel.py:Net"),
        ("amodel:Nett", "no 'Nett'", "amodel:Net"),
        ("amodel.py:Nett", "no 'Nett'", "amodel.py:Net"),
        ("amodel:Zzz", "no 'Zzz'", "amodel:Needs"),
        ("amodel.sub:Net", "no module 'amodel.sub'", "amodel"),
        ("abad:Net", r"NameError: name 'undefined'.*abad\.py:2", "abad.py:2"),
        ("abad.py:Net", r"NameError: name 'undefined'.*abad\.py:2", "abad.py:2"),
        ("asyntax:Net", r"SyntaxError.*asyntax\.py:1", "asyntax.py:1"),
        ("aexit:Net", r"SystemExit: 5.*aexit\.py:1", "__main__"),
        ("amissing:Net", "ModuleNotFoundError: No module named 'not_there_at_all'", "environment"),
        ("amodel:Needs", "needs arguments.*num_classes", "amodel:Needs(num_classes=...)"),
        ("amodel:Net(classes=2)", "unexpected keyword argument 'classes'", "amodel:Net(num_classes=2)"),
        ("amodel:fails", r"ValueError: too small.*amodel\.py", "amodel.py"),
        ("amodel:none", "gives a NoneType, not a torch.nn.Module", None),
        ("amodel:lazy", "lazy", "forward"),
        ("asub:Net", "no 'Net'", None),
    ],
)
def test_failures_say_what_and_what_to_try(folder, text, message, hint):
    folder(
        "amodel.py",
        NET + "class Needs(nn.Module):\n    def __init__(self, num_classes):\n        super().__init__()\n"
        "def fails():\n    raise ValueError('too small')\ndef none():\n    pass\ndef lazy():\n    return nn.LazyLinear(2)\n",
    )
    folder("abad.py", "x = 1\nundefined\n")
    folder("asyntax.py", "def (:\n")
    folder("aexit.py", "import sys; sys.exit(5)")
    folder("amissing.py", "import not_there_at_all")
    (folder("asub/x.py", "")).unlink()
    for make in (meta, real):
        with pytest.raises(TargetError, match=message) as caught:
            make(text)
        assert hint is None or hint in caught.value.hint
        assert "\n" not in caught.value.reason
    failed = text.partition(":")[0].removesuffix(".py")
    assert failed == "amodel" or failed == "asub" or failed not in sys.modules


def test_the_cpus_error_is_the_one_that_is_raised(folder):
    folder("atwo.py", NET + "import torch\ndef make():\n    raise ValueError(str(torch.empty(1).device))\n")
    with pytest.raises(TargetError, match="ValueError: cpu"):
        meta("atwo:make")


def test_a_model_that_stays_on_meta_is_refused(folder):
    folder("ameta.py", "from torch import nn\ndef make():\n    return nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1, device='meta'))\n")
    assert meta("ameta:make")[0].weight.device.type == "meta"
    with pytest.raises(TargetError, match="without values") as caught:
        real("ameta:make")
    assert caught.value.key == "1.weight"


def test_the_cpu_is_used_whatever_the_default_device_is(folder):
    folder("anet.py", NET)
    with torch.device("meta"):
        assert real("anet:Net").fc.weight.device.type == "cpu"


def test_what_the_persons_code_prints_goes_to_stderr(folder, capsys):
    folder("aprint.py", "print('at import')\n" + NET + "def make():\n    print('at build')\n    return Net()\n")
    meta("aprint:make")
    assert capsys.readouterr().out == ""


def test_forked_restores_after_an_error():
    state = torch.get_rng_state()
    with pytest.raises(ZeroDivisionError), forked(3):
        torch.randn(3)
        1 / 0  # noqa: B018
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("text", ["nomodels:Variant", "nomodels.py:Variant"])
def test_only_a_file_that_has_the_name_is_offered_and_none_is_run(folder, text):
    """A script that would be offered by its name alone would run, and rewrite a person's files."""
    run = "from pathlib import Path\nPath('ran').touch()\n"
    script = folder("make.py", run + "from models import *\n")
    folder("modes.py", run + "if __name__ == '__main__':\n    class Variant: ...\n")
    folder("moved.py", run + "Variant(\n")
    where = script.parent

    def hint():
        with pytest.raises(TargetError) as caught:
            meta(text)
        assert not (where / "ran").exists()
        return caught.value.hint or ""

    assert "is it" not in hint()
    folder("models_too.py", run + "try:\n    from models import Variant\nexcept ImportError:\n    pass\n")
    suffix = ".py" if ".py" in text else ""
    assert hint() == f"is it models_too{suffix}:Variant?"
    folder("networks.py", run + "Variant = make()\n")
    folder("models.py", run + NET.replace("Net", "Variant"))
    assert hint() == f"is it models{suffix}:Variant or networks{suffix}:Variant?"


def test_arguments_under_other_names_are_offered_whole_or_not_at_all(folder):
    folder("acall.py", "def make(width, classes=10, *, depth=1): ...\ndef other(first, /): ...\n")

    def hint(text):
        with pytest.raises(TargetError, match="does not take these arguments") as caught:
            meta(text)
        return caught.value.hint

    assert hint("acall:make(4, clases=3)") == "acall:make(4, classes=3)"
    assert hint("acall:make(clases=3, dept=[1])") == "acall:make(classes=3, depth=[1], width=...)"
    assert hint("acall:make(depth='a')") == "acall:make(depth='a', width=...)"
    assert hint("acall:make(4, zzz=3)") is hint("acall:make(1, 2, 3)") is hint("acall:other(first=3)") is None
