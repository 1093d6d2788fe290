"""Code that a found pyproject.toml names is not imported; what a plan or a rules file names is said before it is, under -q too."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest
import torch
from cli_support import ROOT

pytestmark = pytest.mark.slow  # with its like

NET = "net_params.pkl"
SCHEMA = json.loads((ROOT / "ckptsurgeon/views/schemas/check.json").read_text())
CODE = "open('ran', 'w').close()\nfrom model import Net\n"


@pytest.fixture
def stranger(place: Path) -> Path:
    """A folder with a module that leaves a trace when it is imported."""
    Path("evil.py").write_text(CODE)
    Path("model_only.py").write_text("from model import Net\n")
    return place


def ran() -> bool:
    found = Path("ran").exists()
    Path("ran").unlink(missing_ok=True)
    return found


FORMS = [
    '[tool.ckptsurgeon.check]\nagainst = "evil:Net"\n',
    '[tool.ckptsurgeon.check]\nagainst = "./evil.py:Net"\n',
    '[tool.ckptsurgeon.check]\nagainst = "evil:Net()"\nmax-size = "1GB"\n',
    f'[[tool.ckptsurgeon.check.files]]\npath = "{NET}"\nagainst = "evil:Net"\n',
]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("quiet", [(), ("-q",)])
def test_a_found_settings_file_imports_nothing_and_is_named(stranger, program, form, quiet):
    Path("pyproject.toml").write_text(form)
    ended = program("check", NET, *quiet)
    assert ended.code == 0 and not ran()
    assert "pyproject.toml" in ended.out and "not followed" in ended.out and "evil" in ended.out
    assert "1 file checked, all good; not held against" in ended.out
    assert ended.err.startswith("note: pyproject.toml: ") and "--against" in ended.err and "--config" in ended.err
    as_json = program("check", NET, "--json", *quiet)
    jsonschema.validate(as_json.json, SCHEMA)
    assert as_json.json["settings"]["path"] == "pyproject.toml" and "evil" in str(as_json.json["settings"]["not_used"]) and not ran()
    assert "::warning file=pyproject.toml,title=settings::" in program("check", NET, "--github", *quiet).out and not ran()


def test_a_call_that_says_so_imports_it(stranger, program):
    Path("pyproject.toml").write_text(FORMS[0])
    for words in (("--config", "pyproject.toml"), ("--against", "evil:Net")):
        ended = program("check", NET, *words)
        assert ended.code == 0 and ran() and "not followed" not in ended.out and "imports evil from" in ended.err
    assert "imports evil from" in program("check", NET, "--config", "pyproject.toml", "-q").err
    Path("pyproject.toml").write_text(FORMS[0].replace("evil:Net", "variants:NetVariant"))
    assert program("check", NET).code == 0
    assert program("check", NET, "--config", "pyproject.toml").code == 1  # it is a gate that is run


def test_the_hint_works_from_a_folder_below(stranger, program, monkeypatch):
    Path("pyproject.toml").write_text(FORMS[0])
    Path("sub").mkdir()
    monkeypatch.chdir("sub")
    ended = program("check", f"../{NET}")
    assert ended.code == 0 and not ran() and "--against ../evil.py:Net" in ended.err
    assert program("check", f"../{NET}", "--against", "../evil.py:Net").code == 0 and ran()


def test_a_skeleton_of_a_found_settings_file_is_followed(stranger, program):
    assert program("skeleton", "variants:NetVariant", "-o", "variant.json").code == 0
    Path("pyproject.toml").write_text('[tool.ckptsurgeon.check]\nagainst = "variant.json"\n')
    ended = program("check", NET)
    assert (
        ended.code == 1 and "CK301" in ended.out and 'settings: pyproject.toml: against = "variant.json"' in ended.out and ended.err == ""
    )


def test_what_a_settings_file_silences_is_named(stranger, run):
    torch.save({"w": torch.zeros(1), "config": Path("x")}, "asks.pt")
    assert run("check", "asks.pt").code == 1
    Path("pyproject.toml").write_text('[tool.ckptsurgeon.check]\nignore = ["CK2"]\nselect = "CK1"\nlimit = "pickle-bytes=9GB"\n')
    for words in ((), ("-q",)):
        ended = run("check", "asks.pt", *words)
        assert ended.code == 0 and 'ignore = ["CK2"], select = "CK1", limit = "pickle-bytes=9GB"' in ended.out
    assert run("check", "asks.pt", "--json").json["settings"]["used"]["ignore"] == ["CK2"]
    assert "title=settings" in run("check", "asks.pt", "--github").out
    given = run("check", "asks.pt", "--ignore", "CK3", "--json").json["settings"]["used"]
    assert "ignore" not in given and given["select"] == "CK1"  # what this call says instead is its own
    assert run("check", "asks.pt", "--no-config", "--json").json["settings"] is None


TOOLS = """open('ran', 'w').close()
import ckptsurgeon
@ckptsurgeon.adapter(shape=lambda shapes, **_: shapes[0])
def same(tensors):
    return tensors[0]
def fill(tensor, generator):
    tensor.zero_()
"""


@pytest.mark.parametrize("quiet", [(), ("-q",)])
def test_rules_say_what_they_import_before_they_do(stranger, program, quiet):
    Path("tools.py").write_text(f"import sys\nsys.stderr.write('IMPORTED\\n')\n{TOOLS}")
    Path("rules.toml").write_text('[[adapt]]\nkey = "fc1.weight"\nop = "tools:same"\n[[init]]\nkey = "fc3.*"\nscheme = "tools:fill"\n')
    words = ("merge", NET, "variants:NetTwoClasses", "-o", "out.pt", "--drop", "fc3.*", "--rules", "rules.toml", "--overwrite")
    ended = program(*words, *quiet)
    assert ended.code == 0 and ran(), ended.err
    said, _, _ = ended.err.partition("IMPORTED")
    assert "note: rules.toml names code, which is imported now: tools:same, tools:fill" in said and "imports tools from ./tools.py" in said
    assert ("imports variants" in ended.err) == (not quiet)  # that one stands in the call itself


@pytest.mark.parametrize("quiet", [(), ("-q",)])
def test_a_plan_says_what_it_imports_before_it_does(stranger, program, quiet):
    Path("tools.py").write_text(TOOLS)
    Path("net.py").write_text("import sys\nsys.stderr.write('IMPORTED\\n')\nfrom variants import NetTwoClasses as Net\n")
    planned = program("plan", NET, "net:Net", "--drop", "fc3.*", "--init", "fc3.*", "tools:fill", "-o", "plan.json")
    assert planned.code == 0, planned.err
    ended = program("apply", "plan.json", "-o", "out.pt", *quiet)
    said, _, _ = ended.err.partition("IMPORTED")
    assert ended.code == 0 and "note: plan.json names code, which is imported now: net:Net, tools:fill" in said
    assert "imports net from ./net.py" in said and "imports tools from ./tools.py" in ended.err


def test_a_stale_plan_imports_nothing(stranger, program):
    assert program("plan", NET, "evil:Net", "-o", "plan.json").code == 0 and ran()
    torch.save({**torch.load(NET), "more": torch.zeros(3)}, NET)
    ended = program("apply", "plan.json", "-o", "out.pt")
    assert ended.code == 2 and "has changed since the plan was made" in ended.err and not ran()
    assert program("plan", NET, "evil:Net", "--drop", "more", "-o", "plan.json", "--overwrite").code == 0 and ran()
    torch.save({key: value + 1 for key, value in torch.load(NET).items()}, NET)  # the same header, but for its checksums
    ended = program("apply", "plan.json", "-o", "out.pt")
    assert ended.code == 2 and "since the plan was made" in ended.err and not ran()


def test_a_plan_for_a_file_imports_nothing_whatever_its_target_is_called(stranger, program):
    assert program("plan", NET, NET, "-o", "plan.json").code == 0
    value = json.loads(Path("plan.json").read_text())
    value["target"]["spec"] = "evil:Net"
    Path("plan.json").write_text(json.dumps(value))
    ended = program("apply", "plan.json", "-o", "out.pt")
    assert ended.code == 2 and not ran() and "Traceback" not in ended.err
