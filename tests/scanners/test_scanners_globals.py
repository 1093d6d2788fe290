"""Every name that the suites of two public scanners call dangerous, in every place of a checkpoint where it can stand.

picklescan and fickling keep lists of what a pickle must not ask for, and lists have holes: most of these names are in their suites because
one of them once passed them. `check` has no such list: what its allow-list does not know is told by name, so that none can be forgotten.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from scanners_pickles import PLACES, call, named, stacked, text

import ckptsurgeon as cs
from ckptsurgeon.report import Finding

# What it does there -> names, as "module name".
NAMES: dict[str, tuple[str, ...]] = {
    "runs a program, by the system's own names": (
        "os system", "posix system", "nt system", "os popen", "commands getoutput", "subprocess run", "subprocess Popen", "pty spawn",
        "_posixsubprocess fork_exec", "multiprocessing.util spawnv_passfds", "asyncio.unix_events _UnixSubprocessTransport._start",
        "shutil rmtree", "sys exit", "signal signal", "_signal signal",
    ),
    "runs a program, by a helper of the library that nobody thinks of": (
        "uuid _get_command_stdout", "_osx_support _read_output", "_osx_support _find_build_tool", "_aix_support _read_cmd_output",
        "imaplib IMAP4_stream", "_pyrepl.pager pipe_pager", "pydoc pipepager", "test.support.script_helper assert_python_ok",
        "pipes Template", "webbrowser open", "pexpect run", "venv create", "ensurepip _run_pip", "pip main",
        "torch._inductor.codecache compile_file", "torch.utils.collect_env run", "torch.utils.collect_env run_and_read_all",
        "platform popen",
    ),
    "evaluates text, by the language's own names": (
        "builtins eval", "builtins exec", "builtins compile", "__builtin__ eval", "__builtin__ exec", "__builtin__ compile",
        "__builtin__ apply", "builtins apply", "builtins __import__", "builtins getattr", "__builtin__ getattr", "builtins globals",
        "__builtin__ globals", "builtins open", "__builtin__ open", "builtins breakpoint", "__builtin__ breakpoint", "__builtins__ eval",
        "numpy __builtins__",
    ),
    "evaluates text, by what profiles, tests, debugs or completes": (
        "code InteractiveInterpreter", "code InteractiveInterpreter.runcode", "codeop compile_command", "cProfile run",
        "cProfile runctx", "profile run", "profile Profile.run", "profile Profile.runctx", "trace Trace.run", "trace Trace.runctx",
        "timeit timeit", "doctest debug_script", "bdb Bdb", "bdb Bdb.run", "pdb run", "idlelib.run Executive.runcode",
        "idlelib.calltip get_entity", "idlelib.calltip Calltip.fetch_tip", "idlelib.autocomplete AutoComplete.get_entity",
        "idlelib.debugobj ObjectTreeItem.SetText", "idlelib.autocomplete AutoComplete.fetch_completions",
        "idlelib.pyshell ModifiedInterpreter.runcode", "idlelib.pyshell ModifiedInterpreter.runcommand",
        "lib2to3.pgen2.grammar Grammar.loads", "unittest main", "lib2to3.pgen2.pgen ParserGenerator.make_label", "_interpreters create",
        "_xxsubinterpreters create",
    ),
    "evaluates text, within torch and NumPy, whose names look at home in a checkpoint": (
        "torch.utils.bottleneck.__main__ run_cprofile", "torch.utils.bottleneck.__main__ run_autograd_prof",
        "torch._dynamo.guards GuardBuilder.get", "torch.fx.experimental.symbolic_shapes ShapeEnv.evaluate_guards_expression",
        "torch.jit.unsupported_tensor_ops execWrapper", "numpy.f2py.crackfortran getlincoef", "numpy.f2py compile",
        "numpy.testing._private.utils runstring", "numpy.distutils exec_command", "torch.jit load", "torch compile",
        "torch.compile compile", "torch.hub load", "torch._dynamo optimize", "torch._inductor compile", "numpy poly1d", "numpy size",
    ),
    "reads another pickle, which no scan of this one has seen": (
        "pickle loads", "_pickle loads", "cPickle loads", "dill loads", "joblib load", "cloudpickle loads", "marshal loads",
        "shelve open", "torch load", "torch.serialization load", "torch.storage _load_from_bytes",
        "torch.utils._config_module ConfigModule", "torch.utils._config_module ConfigModule.load_config",
        "torch.utils.data.datapipes.utils.decoder basichandlers", "torch.distributed.elastic.rendezvous.api basichandlers",
    ),
    "builds a function or code object out of bytes": (
        "types CodeType", "types FunctionType", "cloudpickle.cloudpickle _make_function", "cloudpickle.cloudpickle _builtin_type",
        "cloudpickle.cloudpickle _function_setstate", "cloudpickle.cloudpickle _make_cell", "cloudpickle.cloudpickle _make_empty_cell",
        "cloudpickle.cloudpickle subimport",
    ),
    "finds anything else by a text": (
        "operator attrgetter", "operator methodcaller", "operator itemgetter", "_operator attrgetter", "_operator methodcaller",
        "_operator itemgetter", "functools partial", "pydoc locate", "pkgutil resolve_name", "importlib import_module",
        "inspect getattr_static", "runpy run_path", "runpy _run_code", "imp load_source", "_imp create_dynamic", "zipimport zipimporter",
        "_frozen_importlib __import__", "_frozen_importlib_external FileLoader", "site addsitedir", "gc get_objects",
        "pathlib os.system", "__future__ _ssl.RAND_bytes", "ast parse", "torch _utils",
    ),
    "calls into a C library": ("ctypes CDLL", "_ctypes dlopen", "mmap mmap"),
    "asks the network, and so tells it what it knows": (
        "socket create_connection", "ssl get_server_certificate", "httplib HTTPSConnection", "http.client HTTPSConnection",
        "select select", "urllib.request urlopen", "urllib2 urlopen", "requests.api get", "aiohttp.client ClientSession", "smtplib SMTP",
        "imaplib IMAP4", "ftplib FTP", "poplib POP3", "telnetlib Telnet", "nntplib NNTP", "socketserver TCPServer",
        "xmlrpc.server SimpleXMLRPCServer", "selectors DefaultSelector", "asyncio run",
    ),
    "reads or writes a file": (
        "_io FileIO", "io FileIO", "_io open", "io open", "logging FileHandler", "distutils.file_util write_file", "sqlite3 connect",
        "_sqlite3 connect", "tempfile mktemp", "filecmp cmp", "fileinput input", "glob glob", "linecache getline",
        "difflib context_diff", "compileall compile_dir", "py_compile compile", "syslog syslog", "tarfile open", "zipfile ZipFile",
    ),
    "stays behind, to run later": ("threading Timer", "_thread start_new_thread", "atexit register"),
    "turns a scanner off": (
        "fickling.hook remove_hook", "fickling.hook deactivate_safe_ml_environment", "fickling some", "picklescan some",
        "modelscan some", "model_unpickler some", "saferpickle some", "modelaudit some",
    ),
    "is harmless to them, or only to be looked at, but no part of a checkpoint": (
        "collections deque", "collections.abc Iterable", "__future__ annotations", "builtins len", "decimal Decimal", "mymodule myfunc",
        "copyreg __newobj__", "torch.nn.modules.container ParameterDict",
    ),
}  # fmt: skip
CASES = [(story, *name.split()) for story, names in NAMES.items() for name in names]
SPELLED = {"__builtin__": "builtins"}  # Python 2's names are told by Python 3's


def findings(raw: bytes, path: Path) -> tuple[Finding, ...]:
    """What `check` finds in a file, and that it is not good."""
    path.write_bytes(raw)
    report = cs.check(path)
    assert not report.ok and report.files[0].findings
    return report.files[0].findings


@pytest.mark.parametrize("story", NAMES)
def test_it_is_refused_by_name_in_every_place(story: str, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    for _, module, name in (case for case in CASES if case[0] == story):
        full = f"{SPELLED.get(module, module)}.{name}"
        for spell in (named, stacked):
            body = call(spell(module, name), text(f"touch {marker}"))
            for place, put in PLACES.items():
                found = findings(put(body), tmp_path / "patient")
                assert any(full in one.message for one in found), (full, place, found)
                assert "CK201" in {one.code for one in found}, (full, place, found)
    assert not marker.exists()


def test_naming_it_is_enough(tmp_path: Path) -> None:
    """Imported but never called: an import alone runs a module's top."""
    for put in PLACES.values():
        found = findings(put(named("os", "system")), tmp_path / "patient")
        assert any("os.system" in one.message for one in found)


def test_the_list_is_long_and_has_no_name_twice() -> None:
    names = [case[1:] for case in CASES]
    assert len(names) > 180 and len(set(names)) == len(names)
