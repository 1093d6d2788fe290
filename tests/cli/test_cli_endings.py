"""What ends a run is one sentence and an exit code: no torch, a stream that is closed or full, no memory, an error that nobody foresaw."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cli_support import PROGRAM
from safetensors.torch import load_file, save_file

from ckptsurgeon.cli import endings
from ckptsurgeon.errors import InternalError, MissingError, OutOfMemoryError

pytestmark = pytest.mark.slow  # with its like

NO_TORCH = {
    "halted": "sys.modules['torch'] = None",
    "not installed": """
import importlib.machinery
find = importlib.machinery.PathFinder.find_spec
importlib.machinery.PathFinder.find_spec = lambda name, *rest: None if name.split('.')[0] == 'torch' else find(name, *rest)""",
    "broken": """
class Blocks:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] == 'torch':
            raise ImportError('libtorch_cpu.so: cannot open shared object file')
sys.meta_path.insert(0, Blocks())""",
    "without what it imports": """
class Blocks:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] == 'typing_extensions':
            raise ModuleNotFoundError("No module named 'typing_extensions'", name='typing_extensions')
sys.meta_path.insert(0, Blocks())""",
}
# Every command, and whether it needs torch.
COMMANDS = {
    "inspect a.safetensors": False,
    "diff a.safetensors t.pt": False,
    "diff a.safetensors model:Net": True,
    "match a.safetensors t.pt": False,
    "match a.safetensors t.pt --values": True,
    "match a.safetensors model:Net --forward variants:f --source-model model:Net": True,
    "plan a.safetensors t.pt": False,
    "plan a.safetensors model:Net": True,
    "plan a.safetensors t.pt --init other model:f": True,
    "plan a.safetensors t.pt --adapt w model:f": True,
    "merge a.safetensors t.pt -o out.pt": False,
    "merge a.safetensors -o out.pt": False,
    "merge a.safetensors -o out.pt --dtype BF16": True,
    "merge a.safetensors a.safetensors --average -o out.pt": True,
    "merge a.safetensors model:Net -o out.safetensors": True,
    "merge a.safetensors net.json -o out.pt --drop x --init x zeros": True,
    "merge t.pt model:Net --with-optimizer -o out.pt": True,
    "apply plan.json -o out.pt": False,
    "apply model.json -o out.pt": True,
    "verify a.safetensors t.pt": False,
    "verify a.safetensors model:Net": True,
    "verify a.safetensors t.pt --finite": True,
    "check a.safetensors t.pt": False,
    "check a.safetensors t.pt --full": False,
    "check a.safetensors t.pt --finite": True,
    "check a.safetensors --against model:Net": True,
    "check a.safetensors --against net.json": False,
    "skeleton a.safetensors -o out.json": False,
    "skeleton model:Net -o out.json": True,
    "groups a.safetensors model:Net --lr 1": True,
    "adapters": False,
    "guide": False,
    "guide patterns": False,
    "--help": False,
}


@pytest.fixture
def two(place: Path, run) -> Path:
    """A folder with two small checkpoints, a skeleton, and two plans, one of which has a model as its target."""
    save_file({"w": torch.zeros(2), "x": torch.ones(2)}, "a.safetensors")
    torch.save({"w": torch.ones(2), "x": torch.zeros(2)}, "t.pt")
    for words in (
        "skeleton a.safetensors -o net.json",
        "plan a.safetensors t.pt -o plan.json",
        "plan net_params.pkl model:Net -o model.json",
    ):
        assert run(*words.split()).code == 0
    return place


@pytest.mark.parametrize("how", NO_TORCH)
def test_without_torch_each_command_works_or_says_how_to_install_it(two, how):
    """All commands in one process for each kind of lack, each with and without --json."""
    Path("run.py").write_text(
        f"import sys\n{NO_TORCH[how]}\n"
        "import contextlib, io, json, os\nfrom ckptsurgeon.cli import main\n"
        "found = []\n"
        "for words in json.loads(sys.stdin.read()):\n"
        "    sys.argv, out, err, before = ['ckptsurgeon', *words], io.StringIO(), io.StringIO(), os.listdir()\n"
        "    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):\n"
        "        code = main._run('--json' in words)\n"
        "    made = set(os.listdir()) - {*before, '__pycache__'}\n"
        "    found.append((code, out.getvalue(), err.getvalue(), list(made)))\n"
        "    for name in made:\n        os.unlink(name)\n"
        "print(json.dumps(found))\n"
    )
    asked = [(*words.split(), *more) for words in COMMANDS for more in ([], ["--json"] if words != "--help" else [])]
    done = subprocess.run([sys.executable, "run.py"], input=json.dumps(asked), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    hint = "pip install torch" if how in ("halted", "not installed") else "python -c 'import torch'"
    for words, (code, out, err, made) in zip(asked, json.loads(done.stdout), strict=True):
        if not COMMANDS[" ".join(word for word in words if word != "--json")]:
            assert code == 0, (words, out, err)
            continue
        assert code == 2 and made == [], (words, out, err)
        if "--json" in words:
            error = json.loads(out)["error"]
            assert error["type"] == "MissingError" and "torch" in error["message"] and hint in error["hint"]
        else:
            assert "error: this needs torch" in err and hint in err, (words, err)


VERBS = {
    "diff": "cs.diff('a.safetensors', 'model:Net')",
    "match": "cs.match('a.safetensors', 'model:Net')",
    "plan": "cs.plan('a.safetensors', 'model:Net')",
    "merge": "cs.merge('a.safetensors', None, 'out.pt', dtype='BF16')",
    "apply": "cs.apply('model.json', 'out.pt')",
    "verify": "cs.verify('a.safetensors', 'model:Net')",
    "check": "cs.check('a.safetensors', finite=True)",
    "skeleton": "cs.skeleton('model:Net')",
    "Thaw": "cs.Thaw",
}


@pytest.mark.parametrize("how", NO_TORCH)
def test_without_torch_each_verb_of_the_library_says_how_to_install_it(two, how):
    code = (
        f"import sys\n{NO_TORCH[how]}\nimport json\nimport ckptsurgeon as cs\nfound = {{}}\n"
        "for name, call in json.loads(sys.stdin.read()).items():\n"
        "    try:\n        eval(call)\n"
        "    except cs.CheckpointError as error:\n"
        "        found[name] = [type(error).__name__, isinstance(error, ImportError), str(error)]\n"
        "print(json.dumps(found))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], input=json.dumps(VERBS), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    hint = "pip install torch" if how in ("halted", "not installed") else "python -c 'import torch'"
    found = json.loads(done.stdout)
    assert found.keys() == VERBS.keys()
    for name, (kind, is_import_error, words) in found.items():
        assert kind == "MissingError" and is_import_error and "this needs torch" in words and hint in words, (name, words)
    assert not Path("out.pt").exists()


def test_another_library_that_is_not_there_is_named_too(two):
    code = "import sys\nsys.modules['safetensors'] = None\nsys.argv = ['x', 'verify', 'net_params.pkl', 'model:Net']\n"
    done = subprocess.run([sys.executable, "-c", f"{code}from ckptsurgeon.cli.main import main\nmain()"], capture_output=True, text=True)
    assert done.returncode == 2 and "error: this needs safetensors" in done.stderr and "pip install safetensors" in done.stderr
    code = "import sys\nsys.modules['click'] = None\nfrom ckptsurgeon.__main__ import main\nmain()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2 and "click" in done.stderr and "Traceback" not in done.stderr


def shell(words: str, redirect: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["sh", "-c", f"{' '.join(PROGRAM)} {words} {redirect}"], capture_output=True, text=True, timeout=120)


ANSWERS = (
    "inspect a.safetensors",
    "inspect a.safetensors --json",
    "diff a.safetensors t.pt",
    "--help",
    "merge --help",
    "--version",
    "adapters",
    "guide patterns",
)


@pytest.mark.parametrize("redirect", [">&-", ">/dev/full", "1</dev/null"])
def test_a_stdout_that_cant_be_written_is_told(two, redirect):
    for words in ANSWERS:
        done = shell(words, redirect)
        assert done.returncode == 2 and done.stderr.startswith("error: ") and "Traceback" not in done.stderr, (words, done.stderr)
        assert "Exception ignored" not in done.stderr


def test_a_closed_stdout_is_told_before_anything_is_written(two, files):
    before = files()
    assert shell("merge a.safetensors -o out.pt", ">&-").returncode == 2
    assert files() == before


def test_no_file_gets_the_number_of_a_closed_stream(two):
    """What a library writes to descriptor 2 (a warning of torch's, say) must not land in a checkpoint."""
    Path("loud.py").write_text("import os\nfrom model import Net as Quiet\ndef Net():\n    os.write(2, b'loud' * 9)\n    return Quiet()\n")
    done = shell("merge net_params.pkl loud:Net -o out.safetensors", "2>&- <&-")
    assert done.returncode == 0 and b"loud" not in Path("out.safetensors").read_bytes()
    assert load_file("out.safetensors").keys() == torch.load("net_params.pkl").keys()


@pytest.mark.parametrize("redirect", ["2>&-", "2>/dev/full", "<&-", "2>&- <&-"])
def test_a_stderr_that_nobody_reads_stops_nothing(two, redirect):
    done = shell("plan a.safetensors t.pt -o new.json", redirect)  # which has a note
    assert done.returncode == 0 and "copy" in done.stdout and Path("new.json").exists()
    assert shell("diff missing.pt t.pt", redirect).returncode == 2


def test_an_error_under_json_that_stdout_cant_take_stands_on_stderr(two):
    done = shell("inspect missing.pt --json", ">/dev/full")
    assert done.returncode == 2 and "missing.pt: does not exist" in done.stderr and "stdout" in done.stderr


@pytest.mark.parametrize("words", ["inspect a.safetensors", "--help", "merge --help", "adapters --json", "inspect missing.pt --json"])
def test_a_reader_that_has_gone_is_no_error(two, words):
    code = f"{' '.join(PROGRAM)} {words} 2>err; echo $? >code"
    reading, writing = os.pipe()
    os.close(reading)
    subprocess.run(["sh", "-c", code], stdout=writing, check=False)
    os.close(writing)
    assert Path("code").read_text().strip() == ("2" if "missing" in words else "0") and "Traceback" not in Path("err").read_text()


def test_a_reader_of_the_notes_that_has_gone_is_no_error(two):
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run([*PROGRAM, "plan", "a.safetensors", "t.pt", "-o", "new.json"], stdout=subprocess.PIPE, stderr=writing)
    os.close(writing)
    assert done.returncode == 0 and json.loads(Path("new.json").read_text()) == json.loads(Path("plan.json").read_text())


def test_an_encoding_without_our_signs_gets_escapes(two):
    done = subprocess.run(
        [*PROGRAM, "diff", "a.safetensors", "t.pt"], capture_output=True, env={**os.environ, "PYTHONIOENCODING": "latin-1"}
    )
    assert done.returncode == 0 and b"\\u2192" in done.stdout and done.stderr == b""


def test_a_tensor_that_no_memory_holds_is_named(two, run, files):
    rows = [{"name": name, "dtype": "F32", "shape": shape} for name, shape in (("w", [2]), ("x", [2]), ("huge", [1 << 20, 1 << 20]))]
    Path("huge.json").write_text(
        json.dumps({"version": 1, "kind": "skeleton", "spec": "", "tensors": rows, "ties": [], "entries": [], "module_metadata": {}})
    )
    before = files()
    for out in ("out.pt", "out.safetensors"):
        for scheme in ("zeros", "normal"):
            words = ("merge", "a.safetensors", "huge.json", "-o", out, "--init", "huge", scheme)
            ended = run(*words)
            assert ended.code == 2 and ended.err.startswith("error: huge: there is not enough memory") and "Traceback" not in ended.err
            assert run(*words, "--json").json["error"]["type"] == "OutOfMemoryError"
    assert files() == before


def test_a_model_that_no_memory_holds(two, run):
    Path("huge.py").write_text("import torch\nfrom model import Net as Small\n")
    Path("huge.py").write_text(
        "import torch\nfrom model import Net as Small\nclass Net(Small):\n    def __init__(self):\n        super().__init__()\n"
        "        self.register_buffer('huge', torch.zeros(1 << 42, device='cpu'))\n"
    )
    for words in (("merge", "net_params.pkl", "huge:Net", "-o", "out.pt"), ("verify", "net_params.pkl", "huge:Net")):
        ended = run(*words)
        assert ended.code == 2 and "allocate" in ended.err and "use a target that needs less memory" in ended.err


def test_a_limit_of_memory_is_told(two):
    code = "import resource, sys\nresource.setrlimit(resource.RLIMIT_AS, (300 << 20,) * 2)\nfrom ckptsurgeon.cli.main import main\nmain()"
    done = subprocess.run([sys.executable, "-c", code, "diff", "net_params.pkl", "model:Net"], capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr and "error: " in done.stderr, done.stderr


@pytest.mark.parametrize(
    "error", [ZeroDivisionError("by nothing"), RecursionError(), KeyError("w"), AssertionError(), BaseExceptionGroup("", [KeyError()])]
)
def test_what_nobody_foresaw_asks_for_a_report(two, run, monkeypatch, error):
    def fails(*_words: object, **_more: object) -> object:
        raise error

    monkeypatch.setattr("ckptsurgeon.api._opening.read", fails)
    monkeypatch.delenv("CKPTSURGEON_DEBUG", raising=False)
    ended = run("inspect", "a.safetensors")
    assert ended.code == 2 and ended.out == "" and "Traceback" not in ended.err
    first, hint = ended.err.splitlines()
    assert "please report it" in first and type(error).__name__ in first and "ckptsurgeon/api/looking.py:" in first
    assert hint.endswith("ckptsurgeon --debug inspect a.safetensors")
    assert run("inspect", "a.safetensors", "--json").json["error"]["type"] == "InternalError"
    for words in (("--debug", "inspect", "a.safetensors"), ("inspect", "a.safetensors", "--debug")):
        ended = run(*words)
        assert ended.code == 2 and "Traceback (most recent call last)" in ended.err and "error: " in ended.err.splitlines()[-2]
    monkeypatch.setenv("CKPTSURGEON_DEBUG", "1")
    assert "Traceback" in run("inspect", "a.safetensors").err


def test_what_nobody_foresaw_in_a_worker_process_ends_the_run_in_words(two):
    """And not as a bad file, nor with the worker's own traceback."""
    Path("run.py").write_text(
        "import time\nimport ckptsurgeon.api.checking as checking\nreal = checking.one.findings\n"
        "def fails(path, gate, alive):\n    time.sleep(0.06)\n    return 1 // 0 if path == '3.pt' else real(path, gate, alive)\n"
        "checking.one.findings = fails\nfrom ckptsurgeon.cli.main import main\nmain()\n"
    )
    for number in range(6):
        Path(f"{number}.pt").write_bytes(Path("t.pt").read_bytes())
    done = subprocess.run(
        [sys.executable, "run.py", "check", *(f"{n}.pt" for n in range(6)), "--jobs", "3"], capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stdout == "" and done.stderr.startswith("error: this is an error in ckptsurgeon itself")
    assert "ZeroDivisionError" in done.stderr and "Traceback" not in done.stderr


def test_an_allocator_that_fails_in_check_is_told_of_the_file(two, run, monkeypatch):
    def short(*_words: object) -> object:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")

    monkeypatch.setattr("ckptsurgeon.streaming.values.count_non_finite", short)
    ended = run("check", "a.safetensors", "--finite")
    assert ended.code == 1 and "CK100" in ended.out and "memory" in ended.out


def test_each_kind_has_its_words():
    assert isinstance(endings.as_checkpoint_error(MemoryError()), OutOfMemoryError)
    assert isinstance(
        endings.as_checkpoint_error(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")), OutOfMemoryError
    )
    assert "21.5 GB are asked for" in str(
        endings.as_checkpoint_error(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."))
    )
    assert isinstance(endings.as_checkpoint_error(ModuleNotFoundError("No module named 'safetensors'", name="safetensors")), MissingError)
    assert isinstance(endings.as_checkpoint_error(ImportError("cannot import name 'x'", name="ckptsurgeon.api")), InternalError)


def test_a_folder_of_a_strangers_that_has_modules_of_our_names(two):
    """`python -m` would take them first; only a target's own modules are looked for in the current folder."""
    for name in ("click", "torch", "safetensors", "tomllib"):
        Path(f"{name}.py").write_text("open('ran', 'w').close()\n")
    for words in (
        "check a.safetensors",
        "check a.safetensors --finite",
        "inspect a.safetensors",
        "merge a.safetensors -o out.pt --dtype BF16",
    ):
        done = subprocess.run([*PROGRAM, *words.split()], capture_output=True, text=True)
        assert done.returncode == 0 and not Path("ran").exists(), (words, done.stderr)
