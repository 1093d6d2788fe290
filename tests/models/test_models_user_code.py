"""A person's code may print, fail or exit; what comes out is one clear error."""

import contextlib
import sys
import textwrap
from pathlib import Path

import pytest

import ckptsurgeon
from ckptsurgeon.errors import FormatError, TargetError
from ckptsurgeon.models.target.user_code import call, is_user_file, words


def make(tmp_path, text):
    path = tmp_path / "theirs.py"
    path.write_text(textwrap.dedent(text))
    space = {}
    exec(compile(path.read_text(), str(path), "exec"), space)
    return space["run"], path


def test_the_result_is_handed_on_with_any_argument_name():
    assert call("x", lambda *a, **k: (a, k), 1, what=2, function=3) == ((1,), {"what": 2, "function": 3})


def test_prints_go_to_stderr(capsys):
    call("x", lambda: print("hello"))
    assert capsys.readouterr() == ("", "hello\n")


@pytest.mark.parametrize("statement", ["raise ValueError('no such size')", "import sys; sys.exit(3)", "raise RecursionError"])
def test_a_failure_says_what_and_where(tmp_path, statement):
    run, path = make(tmp_path, f"def run():\n    {statement}\n")
    with pytest.raises(TargetError) as caught:
        call("model:Net", run)
    error = caught.value
    assert error.path == "model:Net" and error.hint and f"({path}:2)" in error.reason
    assert type(error.__cause__).__name__ in error.reason


def test_the_place_is_in_the_persons_code_and_not_in_the_library_that_it_called(tmp_path):
    run, path = make(tmp_path, "import json\ndef run():\n    return json.loads('{')\n")
    with pytest.raises(TargetError, match=f"JSONDecodeError.*{path}:3"):
        call("x", run)


def test_without_a_frame_of_theirs_the_librarys_place_is_named():
    import json

    with pytest.raises(TargetError, match=r"json/\w+\.py:\d+"):
        call("x", json.loads, "{")


def test_interrupts_and_our_own_errors_pass_through():
    def interrupt():
        raise KeyboardInterrupt

    def ours():
        raise FormatError("odd", key="w")

    with pytest.raises(KeyboardInterrupt):
        call("x", interrupt)
    with pytest.raises(FormatError):
        call("x", ours)


def test_an_exception_that_can_not_be_printed_is_still_reported():
    class Odd(Exception):
        def __str__(self):
            raise ValueError

    def fail():
        raise Odd

    with pytest.raises(TargetError, match="Odd"):
        call("x", fail)


def test_words_are_one_line_and_bounded():
    assert words(ValueError("a\n  b")) == "ValueError: a b"
    assert len(words(ValueError("a" * 10_000))) < 1_000


def test_installed_and_standard_modules_are_not_a_persons():
    import json

    import torch

    assert is_user_file(__file__)
    assert not is_user_file(json.__file__) and not is_user_file(torch.__file__) and not is_user_file(sys.modules[call.__module__].__file__)


def test_our_own_modules_are_not_a_persons():
    assert not any(is_user_file(str(path)) for path in Path(ckptsurgeon.__file__).parent.rglob("*.py"))


def test_an_interrupt_of_the_redirections_end_leaves_stdout_where_it_was(monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    before = sys.stdout
    monkeypatch.setattr(contextlib.redirect_stdout, "__exit__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        call("int", int, "7")
    assert sys.stdout is before
