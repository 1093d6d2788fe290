"""`check` as a program: its codes explained, settings of a project, annotations for GitHub, an interrupt, and what a person reads."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from importlib.resources import files as resources
from pathlib import Path

import pytest
import torch
import yaml
from cli_support import PROGRAM, ROOT
from jsonschema import Draft202012Validator

from ckptsurgeon import finding_codes
from ckptsurgeon.report import CheckReport, FileCheck, Finding
from ckptsurgeon.views import github
from ckptsurgeon.views.text.check import explain

SCHEMAS = resources("ckptsurgeon") / "views" / "schemas"
GATE = ROOT / "ckptsurgeon" / "guide" / "gate.md"
NET = "net_params.pkl"


def fits(value: object, name: str) -> None:
    Draft202012Validator(json.loads((SCHEMAS / f"{name}.json").read_text())).validate(value)


def told(ended) -> list[tuple[str, list[str]]]:
    return [(row["path"], sorted({finding["code"] for finding in row["findings"]})) for row in ended.json["files"]]


@pytest.fixture
def bad(place) -> None:
    """One file for each family: unreadable, unsafe, that does not fit, with a NaN."""
    torch.save({"model": {"w": torch.ones(2)}, "config": Path("x")}, "unsafe.pt")
    torch.save({"w": torch.tensor([float("nan")])}, "nan.pt")
    Path("page.pt").write_text("<html></html>")


# --- the codes ----------------------------------------------------------------------------------------------------------------------


def test_explain(run):
    ended = run("check", "--explain", "CK101")
    assert ended.code == 0 and ended.err == ""
    assert ended.out.splitlines()[0] == "CK101 unreadable"
    assert "Why it matters: " in ended.out and "What to do: " in ended.out
    assert run("check", "--explain", "unreadable").out == run("check", "--explain", " ck101").out == ended.out
    family = run("check", "--explain", "CK3").out
    assert [line.split()[0] for line in family.splitlines() if line.startswith("CK")] == ["CK301", "CK302", "CK303", "CK304"]
    assert "(looked for with --against)" in family
    for row in finding_codes.TABLE:
        assert f"{row.code} {row.name}" in run("check", "--explain", "all").out


def test_explain_in_json(run):
    value = run("check", "--explain", "CK", "--json").json
    fits(value, "explain")
    assert [row["code"] for row in value["codes"]] == list(finding_codes.BY_CODE)


@pytest.mark.parametrize("word", ["CK999", "safe", "", "--json"])
def test_explain_what_there_is_not(run, word):
    ended = run("check", f"--explain={word}")
    assert ended.code == 2 and ended.out == "" and ended.err.startswith("error: ")
    assert ended.err.splitlines()[-1] in ("  try: is it unsafe?", "  try: ckptsurgeon check --explain all") or "is it CK" in ended.err


def test_every_sentence_about_a_code_is_one():
    for row in finding_codes.TABLE:
        assert re.fullmatch(r"[a-z]+(-[a-z]+)*", row.name)
        for words in (row.meaning, row.why, row.todo):
            assert words.endswith((".", "…"))


def test_the_guide_lists_every_code():
    table = re.findall(r"^\| `(CK\d+)` \| ([a-z-]+) +\|", GATE.read_text(), re.MULTILINE)
    assert table == [(row.code, row.name) for row in finding_codes.TABLE]


# --- the command line ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [
        ("--select", "CK999"),
        ("--ignore", "CK2,CK8"),
        ("--dtype", "F61"),
        ("--allow", "onnx"),
        ("--max-size", "big"),
        ("--jobs", "0"),
        ("--jobs", "many"),
        ("--against", "missing.json"),
        ("--against", NET + ".json"),
        ("--against", "model:Nett"),
        ("--config", "missing.toml"),
        ("--config", "model.py"),
        ("--config", "pyproject.toml", "--no-config"),
        ("--github", "--json"),
        ("--limit", "tensors=none"),
    ],
    ids=" ".join,
)
def test_what_can_not_be_answered(run, words):
    ended = run("check", NET, *words)
    assert ended.code == 2 and "Traceback" not in ended.err
    assert "error: " in ended.err if "--json" not in words else ended.json["error"]["message"]
    if "--github" not in words:
        as_json = run("check", NET, *words, "--json")
        assert as_json.code == 2 and as_json.json["error"]["message"]


def test_all_findings_of_all_files_in_their_order(run, bad):
    paths = ("page.pt", NET, "missing.pt", "unsafe.pt", "nan.pt", NET)
    ended = run("check", *paths, "--finite", "--max-size", "100kB", "--allow", "torch-legacy", "--dtype", "F32", "--json")
    fits(ended.json, "check")
    assert ended.code == 1 and told(ended) == [
        ("page.pt", ["CK102"]),
        (NET, ["CK501"]),
        ("missing.pt", ["CK101"]),
        ("unsafe.pt", ["CK201", "CK502"]),
        ("nan.pt", ["CK401", "CK502"]),
        (NET, ["CK501"]),
    ]
    assert run("check", *paths, "--ignore", "CK1,CK2,CK5").code == 0


def test_select_repeats_and_commas(run, bad):
    words = ("check", "unsafe.pt", "nan.pt", "--dtype", "float16", "--json")
    assert told(run(*words, "--select", "CK2", "--select", "CK503")) == [("unsafe.pt", ["CK201", "CK503"]), ("nan.pt", ["CK503"])]
    assert told(run(*words, "--select", "CK2,CK503", "--ignore", "CK2")) == [("unsafe.pt", ["CK503"]), ("nan.pt", ["CK503"])]


def test_a_folder(run, bad):
    ended = run("check", ".", "--json")
    assert ended.code == 1 and {row["path"] for row in ended.json["files"]} >= {"./page.pt", "./unsafe.pt", "./nan.pt", f"./{NET}"}
    assert ".safetensors" in run("check", "--help").out and "Hugging Face folder" in run("check", "--help").out


def test_full_and_limit(run, place):
    torch.save({"w": torch.zeros(4)}, "in.pt")
    raw = Path("in.pt").read_bytes()
    at = raw.index(b"\0" * 16, raw.index(b"data/0"))
    Path("in.pt").write_bytes(raw[: at + 15] + b"\1" + raw[at + 16 :])
    assert run("check", "in.pt").code == 0
    ended = run("check", "in.pt", "--full")
    assert ended.code == 1 and ended.out.startswith("in.pt: CK106 w: is not what the file's own checksum says")
    assert "CK103" in run("check", NET, "--limit", "tensors=1").out


# --- the project's settings ---------------------------------------------------------------------------------------------------------


def configure(words: str, place: str = "pyproject.toml") -> None:
    Path(place).write_text(words)


def test_settings_of_the_project(run, bad):
    configure(
        '[project]\nname = "x"\n[tool.ckptsurgeon.check]\nfinite = true\nmax-size = 1000\ndtype = ["F16"]\nignore = "CK2"\njobs = 2\n'
    )
    words = ("check", "unsafe.pt", "nan.pt", "--json")
    assert told(run(*words)) == [("unsafe.pt", ["CK501", "CK503"]), ("nan.pt", ["CK401", "CK501", "CK503"])]
    # The command line goes before, option by option.
    assert told(run(*words, "--max-size", "1MB", "--dtype", "float32")) == [("unsafe.pt", []), ("nan.pt", ["CK401"])]
    assert told(run(*words, "--no-finite", "--ignore", "CK5")) == [("unsafe.pt", ["CK201"]), ("nan.pt", [])]
    assert told(run(*words, "--no-config")) == [("unsafe.pt", ["CK201"]), ("nan.pt", [])]


def test_settings_are_looked_for_upwards_as_far_as_the_repository(run, bad, monkeypatch):
    configure("[tool.ckptsurgeon.check]\nfinite = true\n")
    Path("repo/sub").mkdir(parents=True)
    torch.save({"w": torch.tensor([float("nan")])}, "repo/sub/nan.pt")
    monkeypatch.chdir("repo/sub")
    assert told(run("check", "nan.pt", "--json")) == [("nan.pt", ["CK401"])]
    configure('[tool.other]\nname = "not ours"\n')  # the nearest that has ours
    assert told(run("check", "nan.pt", "--json")) == [("nan.pt", ["CK401"])]
    Path("../.git").mkdir()
    assert told(run("check", "nan.pt", "--json")) == [("nan.pt", [])]
    assert told(run("check", "nan.pt", "--json", "--config", "../../pyproject.toml")) == [("nan.pt", ["CK401"])]


def test_each_file_its_own_settings(run, bad):
    run("skeleton", NET, "-o", "net.json")
    for place in ("weights/a/deep.pt", "weights/top.pt", "other.pt", "weights/old.pt"):
        Path(place).parent.mkdir(parents=True, exist_ok=True)
        torch.save({"w": torch.tensor([float("nan")])}, place)
    configure("""
[tool.ckptsurgeon.check]
dtype = "F16"
[[tool.ckptsurgeon.check.files]]
path = "weights/**/*.pt"
finite = true
dtype = "F32"
[[tool.ckptsurgeon.check.files]]
path = ["weights/old.pt", "nothing/*"]
finite = false
ignore = "CK503"
dtype = "F64"
[[tool.ckptsurgeon.check.files]]
path = "*.pkl"
against = "net.json"
dtype = []
""")
    paths = ("weights", "other.pt", NET)
    expected = {"weights/a/deep.pt": ["CK401"], "weights/top.pt": ["CK401"], "weights/old.pt": [], "other.pt": ["CK503"], NET: []}
    assert dict(told(run("check", *paths, "--json"))) == expected
    assert run("check", os.path.abspath("weights/top.pt"), "--json").json["files"][0]["findings"][0]["code"] == "CK401"
    torch.save({"w": torch.ones(1)}, NET)
    assert "CK301" in dict(told(run("check", *paths, "--json")))[NET]
    assert dict(told(run("check", *paths, "--json", "--no-finite", "--dtype", "F32")))["weights/top.pt"] == []


def test_paths_in_the_settings_are_those_of_their_folder(run, place, monkeypatch):
    run("skeleton", NET, "-o", "net.json")
    Path("sub").mkdir()
    monkeypatch.chdir("sub")
    configure('[tool.ckptsurgeon.check]\nagainst = "net.json"\n', "../pyproject.toml")
    assert run("check", f"../{NET}").code == 0
    named = ("--config", "../pyproject.toml")
    configure('[tool.ckptsurgeon.check]\nagainst = "model.py:Net"\n', "../pyproject.toml")
    assert run("check", f"../{NET}", *named).code == 0
    configure('[tool.ckptsurgeon.check]\nagainst = "variants:NetVariant"\n', "../pyproject.toml")
    ended = run("check", f"../{NET}", *named)
    assert ended.code == 1 and "CK301" in ended.out and ended.err.startswith("note: imports variants from ")
    monkeypatch.chdir("..")
    ended = run("check", NET, "--config", "pyproject.toml")
    assert ended.code == 1 and ended.err == "note: imports variants from ./variants.py\n"


def test_a_target_of_the_settings_is_opened_only_for_a_file_that_needs_it(run, place):
    configure('[[tool.ckptsurgeon.check.files]]\npath = "never.pt"\nagainst = "missing.json"\n')
    assert run("check", NET).code == 0
    configure('[tool.ckptsurgeon.check]\nagainst = "missing.json"\n')
    ended = run("check", NET)
    assert ended.code == 2 and "missing.json: does not exist (asked for by pyproject.toml)" in ended.err
    assert run("check", NET, "--against", "model:Net").code == 0


@pytest.mark.parametrize(
    ("words", "key", "said"),
    [
        ("[tool.ckptsurgeon.check]\nmaxsize = 3\n", "tool.ckptsurgeon.check.maxsize", "is it 'max-size'?"),
        ("[tool.ckptsurgeon.check]\nmax_size = 3\n", "tool.ckptsurgeon.check.max_size", "is it 'max-size'?"),
        ("[tool.ckptsurgeon.check]\nnonsense = 3\n", "tool.ckptsurgeon.check.nonsense", "no such setting"),
        ("[tool.ckptsurgeon.chek]\nfinite = true\n", "tool.ckptsurgeon.chek", "is it 'check'?"),
        ("[tool]\nckptsurgeon = 3\n", "tool.ckptsurgeon", "is no table"),
        ("[tool.ckptsurgeon]\ncheck = 3\n", "tool.ckptsurgeon.check", "takes a table"),
        ('[tool.ckptsurgeon.check]\nfinite = "yes"\n', "tool.ckptsurgeon.check.finite", "true or false"),
        ("[tool.ckptsurgeon.check]\nfinite = 1\n", "tool.ckptsurgeon.check.finite", "true or false"),
        ("[tool.ckptsurgeon.check]\ndtype = [3]\n", "tool.ckptsurgeon.check.dtype", "text"),
        ('[tool.ckptsurgeon.check]\ndtype = ["F61"]\n', "tool.ckptsurgeon.check.dtype", "no dtype 'F61'"),
        ('[tool.ckptsurgeon.check]\nselect = "CK9"\n', "tool.ckptsurgeon.check.select", "no code 'CK9'"),
        ('[tool.ckptsurgeon.check]\nmax-size = "big"\n', "tool.ckptsurgeon.check.max-size", "no size"),
        ("[tool.ckptsurgeon.check]\nmax-size = true\n", "tool.ckptsurgeon.check.max-size", "takes a size"),
        ("[tool.ckptsurgeon.check]\njobs = 0\n", "tool.ckptsurgeon.check.jobs", "above zero"),
        ('[tool.ckptsurgeon.check]\nlimit = "tensor=3"\n', "tool.ckptsurgeon.check.limit", "no limit 'tensor'"),
        ("[tool.ckptsurgeon.check]\nfiles = 3\n", "tool.ckptsurgeon.check.files", "tables"),
        ("[[tool.ckptsurgeon.check.files]]\nfinite = true\n", "tool.ckptsurgeon.check.files[1]", "which files"),
        ('[[tool.ckptsurgeon.check.files]]\npath = "a"\njobs = 2\n', "tool.ckptsurgeon.check.files[1].jobs", "no such setting"),
        (
            '[[tool.ckptsurgeon.check.files]]\npath = "a"\n[[tool.ckptsurgeon.check.files]]\npath = "b"\nallow = "x"\n',
            ".files[2].allow",
            "no format",
        ),
        ("[tool.ckptsurgeon.check\n", "", "is not TOML"),
        ("a = " + "[" * 5000, "", "nests more than"),
        ("\udcff", "", "is not TOML"),
    ],
    ids=lambda words: words[:60] if "\n" in words else None,
)
def test_settings_that_are_not_well_formed(run, place, words, key, said):
    Path("pyproject.toml").write_bytes(words.encode(errors="surrogateescape"))
    ended = run("check", NET)
    assert ended.code == 2 and ended.out == "" and "Traceback" not in ended.err
    first = ended.err.splitlines()[0]
    assert first.startswith(f"error: {os.path.abspath('pyproject.toml')}: ") and key in first and said in first
    error = run("check", NET, "--json").json["error"]
    assert error["path"] == os.path.abspath("pyproject.toml") and (error["key"] or "").endswith(key)
    assert run("check", NET, "--no-config").code == 0


def test_limits_of_the_project(run, place):
    configure('[tool.ckptsurgeon.check]\nlimit = ["tensors=3", "shards=5"]\n')
    assert "CK103" in run("check", NET).out
    assert run("check", NET, "--limit", "tensors=100").code == 0


def test_settings_that_are_no_file(run, place):
    os.mkfifo("pyproject.toml")
    assert run("check", NET).code == 0
    assert run("check", NET, "--config", "pyproject.toml").code == 2


# --- GitHub -------------------------------------------------------------------------------------------------------------------------

ANNOTATION = re.compile(r"::(error|warning|notice) file=([^,:\r\n]*),title=([^,:\r\n]*)::([^\r\n]*)")


def unescaped(words: str) -> str:
    """As GitHub's runner does it (`ActionCommand.cs`): the percent sign last."""
    for escape, character in (("%0D", "\r"), ("%0A", "\n"), ("%3A", ":"), ("%2C", ","), ("%25", "%")):
        words = words.replace(escape, character)
    return words


def annotations(out: str) -> list[tuple[str, str, str, str]]:
    *lines, last = out.splitlines()
    assert not last.startswith("::") and re.match(r"\d+ files? checked, ", last)
    found = []
    for line in lines:
        match = ANNOTATION.fullmatch(line)
        assert match, line
        found.append((match[1], *map(unescaped, match.groups()[1:])))
    return found


def test_annotations(run, bad):
    run("skeleton", "variants:NetVariant", "-o", "net.json")
    ended = run("check", NET, "page.pt", "unsafe.pt", "--against", "net.json", "--github")
    assert ended.code == 1
    found = annotations(ended.out)
    assert [(level, file, title) for level, file, title, _ in found] == [
        ("error", NET, "CK301 missing"),
        ("error", NET, "CK302 unexpected"),
        ("error", NET, "CK303 wrong-shape"),
        ("error", NET, "CK303 wrong-shape"),
        ("error", "page.pt", "CK102 malformed"),
        ("error", "unsafe.pt", "CK201 unsafe"),
        ("error", "unsafe.pt", "CK301 missing"),
        ("error", "unsafe.pt", "CK302 unexpected"),
    ]
    assert found[2][3] == "fc3.weight: has shape (10, 84), the target (2, 84)"
    assert run("check", NET, "--github").out == "1 file checked, all good\n"


def test_annotations_of_hostile_names_are_still_ours():
    path = "a,b:c%0A\n::warning::x\r.pt"
    finding = Finding("CK301", "50% of it\n::add-mask::secret, title=x::y", "k::\n::stop-commands::t")
    report = CheckReport((FileCheck(path, (finding, Finding("CK304", "m", None, "warning"), Finding("CK107", "n", None, "note"))),))
    found = annotations(github.check(report))
    assert [row[0] for row in found] == ["error", "warning", "notice"]
    assert found[0][1] == "a,b:c%0A\\n::warning::x\\r.pt"
    assert found[0][3] == "k::\\n::stop-commands::t: 50% of it\\n::add-mask::secret, title=x::y"


def test_a_file_is_named_as_the_workspace_has_it(run, bad, monkeypatch):
    monkeypatch.setenv("GITHUB_WORKSPACE", os.getcwd())
    Path("sub").mkdir()
    monkeypatch.chdir("sub")
    (row,) = annotations(run("check", "../page.pt", "--github").out)
    assert row[1] == "page.pt"
    Path("../../outside.pt").write_text("x")
    (row,) = annotations(run("check", "../../outside.pt", "--github").out)
    assert row[1] == "../../outside.pt"


def test_the_workflow_of_the_guide(run, bad):
    """As far as it can be held without GitHub: a workflow's form, and its last step run where a good and a bad checkpoint lie."""
    (block,) = [words for words in re.findall(r"```yaml \S+\n(.*?)```", GATE.read_text(), re.DOTALL) if "runs-on" in words]
    workflow = yaml.safe_load(block)
    workflow["on"] = workflow.pop(True)  # YAML 1.1 takes the word for a truth
    assert set(workflow) == {"name", "on", "permissions", "jobs"} and set(workflow["on"]) <= {"push", "pull_request"}
    (job,) = workflow["jobs"].values()
    assert set(job) == {"runs-on", "steps"}
    for step in job["steps"]:
        assert ("uses" in step) is not ("run" in step) and set(step) <= {"uses", "with", "name", "run"}
        assert re.fullmatch(r"[\w-]+/[\w-]+@v\d+", step.get("uses", "a/b@v1"))
    program, *words = job["steps"][-1]["run"].split()
    assert program == "ckptsurgeon" and "--github" in words
    Path("weights").mkdir()
    run("skeleton", NET, "-o", "net.json")
    torch.save(torch.load(NET), "weights/good.pt")
    ended = run(*words)
    assert ended.code == 0 and annotations(ended.out) == []
    Path("weights/cut.pt").write_bytes(Path("weights/good.pt").read_bytes()[:-9])
    ended = run(*words)
    assert ended.code == 1 and [row[:3] for row in annotations(ended.out)] == [("error", "weights/cut.pt", "CK102 malformed")]


# --- an interrupt, and what a person reads ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [(), ("--jobs", "1")], ids=["processes", "alone"])
def test_an_interrupt_ends_it_soon_and_whole(place, words):
    torch.save({f"layers.{number}.weight": torch.zeros(1) for number in range(20_000)}, "large.pt")
    process = subprocess.Popen(
        [*PROGRAM, "check", *["large.pt"] * 30, "--jobs", "2", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # a group of its own, which a terminal's Ctrl-C reaches whole
    )
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    until = time.monotonic() + 60
    while time.monotonic() < until and (len(children.read_text().split()) < 2 if not words else time.monotonic() < until - 58):
        time.sleep(0.05)
    workers = children.read_text().split()
    assert len(workers) == (0 if words else 2)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and out == "" and err.split() == ["interrupted"]
    assert not [worker for worker in workers if Path(f"/proc/{worker}").exists()]


@pytest.mark.parametrize("width", [80, 200])
def test_lines_end_where_the_terminal_does(width):
    rows = [Finding("CK301", "is in the target only", f"backbone.stage{n % 3}.block{n}.conv.weight") for n in range(40)]
    rows += [Finding("CK102", "is no checkpoint " + "of any kind that anybody knows " * 6)]
    report = CheckReport((FileCheck("some/where/weights.pt", tuple(rows)),))
    lines = report.to_text(width=width).splitlines()
    assert len(lines) > 2 and all(len(line) <= width for line in lines)
    whole = str(report).splitlines()
    assert len(whole) == 3 and max(map(len, whole)) > 200  # a program gets each on one line
    explained = explain(finding_codes.TABLE, width).splitlines()
    assert all(len(line) <= width for line in explained)
