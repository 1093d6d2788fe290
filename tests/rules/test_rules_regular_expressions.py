"""Regular expressions of rules answer as `re.fullmatch` does, in a process of their own, which none of them can hold for ever."""

from __future__ import annotations

import gc
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from profiles import examples

from ckptsurgeon import regular_expressions
from ckptsurgeon.errors import CheckpointError, LimitError, RuleError
from ckptsurgeon.limit_table import limits
from ckptsurgeon.planning.apply_rules import name_sources
from ckptsurgeon.regular_expressions import one_child
from ckptsurgeon.rules.patterns import compile_pattern
from ckptsurgeon.rules.rulefile import parse_rules
from ckptsurgeon.rules.rules import Rule, compile_rules
from ckptsurgeon.rules.templates import expand
from ckptsurgeon.tensors import Checkpoint, TensorMeta

pytestmark = pytest.mark.slow  # with its like

ENDLESS = "/(a+)+/"
KEY = "a" * 40 + "!"


@pytest.fixture(autouse=True)
def child(monkeypatch: pytest.MonkeyPatch) -> Iterator[object]:
    """One process for a test's expressions, as the command line has it: no other test's time counts."""
    monkeypatch.setattr(regular_expressions, "_current", None)
    yield one_child()
    gc.collect()


def source(*names: str) -> Checkpoint:
    return Checkpoint("a.pt", "torch-zip", "0", {name: TensorMeta(name, "F32", (1,), (1,)) for name in names})


plain = st.sampled_from(["a", "b", ".", "é", r"\.", r"\d", "[^.]", "(?i:A)", "^", "$", r"\Z"])
groups = st.sampled_from(["(a|b)", "(?:ab)", "(?P<n>.)", "(b)?", "(?=a)", "(?<=b)", r"\1", "*", "+", "?", "{2}", "|", "(", ")"])
words = st.one_of(plain, groups)


@settings(max_examples=examples(600), deadline=None)
@given(st.lists(words, min_size=1, max_size=7).map("".join), st.lists(st.text(alphabet="abA.1\né\ud800\udc00", max_size=8), max_size=4))
@example(r"(?P<n>a)(b)?.*", ["a", "ab", "a\n", "a.b"])
@example(".", ["\ud800\udc00", "\U00010000", "\n"])
def test_the_answers_are_re_fullmatchs(body: str, keys: list[str]) -> None:
    try:
        truth = re.compile(body)
    except (re.error, OverflowError) as error:
        with pytest.raises(RuleError, match=re.escape(str(error))):
            compile_pattern(f"/{body}/")
        return
    pattern = compile_pattern(f"/{body}/")
    assert pattern.parts == (*truth.groupindex, *map(str, range(1, truth.groups + 1)))
    pattern.learn(keys[:2])
    for key in keys:
        found = truth.fullmatch(key)
        parts = None if found is None else {**found.groupdict(""), **{str(n): one for n, one in enumerate(found.groups(""), 1)}}
        assert pattern.match(key) == parts and pattern.fits(key) is (found is not None) and bool(pattern.test(key)) is pattern.fits(key)


def test_a_rename_takes_its_groups_up() -> None:
    rules = parse_rules("[[rename]]\nfrom = '/h(?P<i>\\d+)\\.(?:(w)|(b))/'\nto = \"blocks.{i+1}.{2}{3}\"", "rules.toml")
    names = name_sources([source("h0.w", "h1.b", "other")], None, rules)
    assert set(names.claims) == {"blocks.1.w", "blocks.2.b", "other"}


@pytest.mark.parametrize(
    "rule",
    [
        Rule("drop", ENDLESS, "", "rules.toml", 7),
        Rule("rename", ENDLESS, "b.{1}", "rules.toml", 7),
        Rule("adapt", "/(?:a+)+/ -> b", "concat(dim=0)", "rules.toml", 7),
        Rule("adapt", "b + /(?:a+)+/ -> c", "concat(dim=0)", "rules.toml", 7),
        Rule("adapt", ENDLESS, "transpose", "rules.toml", 7),
        Rule("keep", ENDLESS, "", "rules.toml", 7),
        Rule("init", ENDLESS, "zeros", "rules.toml", 7),
    ],
)
def test_one_that_would_run_for_ever_is_stopped_by_name(rule: Rule) -> None:
    began = time.monotonic()
    with pytest.raises(LimitError) as caught, limits(regex_seconds=1):
        name_sources([source(KEY, "b")], source(KEY, "c"), [rule])
    assert time.monotonic() - began < 8
    text = str(caught.value)
    assert "a+)+" in text and "rules.toml:7" in text and "1 s" in text and "--limit regex-seconds=5" in text
    assert compile_pattern("/a(.)/").match("ab") == {"1": "b"}, "the next one has its answer all the same"


@pytest.mark.parametrize("body", ["(?i:[\\0-\U0010ffff])" * 3000, "(?i)" + "[\\0-\U0010fffe]" * 3000])
def test_nor_can_compiling_one_take_for_ever(body: str) -> None:
    began = time.monotonic()
    with pytest.raises(LimitError, match="to be compiled"), limits(regex_seconds=1):
        compile_pattern(f"/{body}/")
    assert time.monotonic() - began < 8


def test_many_that_are_each_quick_are_bounded_together() -> None:
    slow = "/" + "(?i:[\\0-\U0010ffff])" * 8 + "/"  # some tenths of a second to compile
    rules = [Rule("drop", slow.replace("(?i:", f"(?i:{number}", 1)) for number in range(60)]
    with pytest.raises(LimitError, match="all-regex-seconds=5"), limits(all_regex_seconds=1):
        compile_rules(rules)
    text = "".join(f"[[drop]]\nkey = '{rule.pattern}'\n" for rule in rules)
    with pytest.raises(LimitError, match="all-regex-seconds=5"), limits(all_regex_seconds=1):
        parse_rules(text.replace("\\0-\U0010ffff", "\\x00-\\U0010ffff"), "rules.toml")


def test_a_kept_error_does_not_stop_the_calls_after_it() -> None:
    """A notebook keeps the last error, and with it the expression that took too long and the seconds that it used."""
    kept = []
    for _ in range(3):
        with limits(regex_seconds=1, all_regex_seconds=1):
            assert compile_pattern("/a(.)/").match("ab") == {"1": "b"}
            with pytest.raises(LimitError) as caught:
                compile_pattern(ENDLESS).match(KEY)
        kept.append(caught.value)
    assert len(kept) == 3


def test_a_part_that_stands_twice_is_tried_elsewhere_where_a_key_is_long() -> None:
    pattern = compile_pattern("{**a}x{**b}x{**a}x{**b}")
    assert pattern.match("a.bxcxa.bxc") == {"a": "a.b", "b": "c"}
    long = "a" * 300
    assert pattern.match(f"{long}.bxcx{long}.bxc") == {"a": f"{long}.b", "b": "c"}
    began = time.monotonic()
    with pytest.raises(LimitError, match="regex-seconds"), limits(regex_seconds=1):
        pattern.match("x".join(map(str, range(30_000))))
    assert time.monotonic() - began < 8


def test_a_part_that_stands_twice_says_where() -> None:
    rule = Rule("drop", "{**a}x{**b}x{**a}x{**b}", "", "rules.toml", 3)
    with pytest.raises(LimitError, match=r"rules\.toml:3"), limits(regex_seconds=1):
        name_sources([source("x".join(map(str, range(30_000))))], None, [rule])


def test_too_many_groups_are_refused() -> None:
    with pytest.raises(RuleError, match="101 groups"):
        compile_pattern("/" + "(a)" * 101 + "/")
    assert compile_pattern("/" + "(a)?" * 100 + "/").match("a") is not None


def test_one_process_serves_all_and_ends_with_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(regular_expressions, "_current", None)
    started: list[subprocess.Popen[bytes]] = []
    true = subprocess.Popen

    def counted(*args: object, **named: object) -> object:
        started.append(true(*args, **named))  # type: ignore[call-overload]
        return started[-1]

    monkeypatch.setattr(subprocess, "Popen", counted)
    kept = [compile_pattern(f"/{name}(.)/") for name in "abc"]
    assert [pattern.match("bx") for pattern in kept] == [None, {"1": "x"}, None]
    assert len(started) == 1 and started[0].poll() is None
    assert started[0].args[1:4] == ["-I", "-S", "-c"]  # type: ignore[index]
    kept.clear()
    gc.collect()
    assert started[0].poll() is not None


def test_a_question_is_asked_once_for_all_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bytes] = []
    true = regular_expressions._Child.ask
    monkeypatch.setattr(regular_expressions._Child, "ask", lambda child, request: (asked.append(request), true(child, request))[1])
    every = [f"layers.{number}.weight" for number in range(3000)]
    rules = [Rule("drop", r"/layers\.\d\..*/"), Rule("rename", r"/layers\.(\d+)\.(.*)/", "h.{1}.{2}")]
    names = name_sources([source(*every)], None, rules)
    assert len(names.dropped) == 10 and len(names.claims) == 2990
    assert len(asked) == 4, "one to compile each rule, one for its keys"


def test_without_one_no_process_is_started_nor_thought_of() -> None:
    code = (
        "import sys; from ckptsurgeon.rules.patterns import compile_pattern as c; c('a.{p}').match('a.b'); c('{p}.{p}').match('b.b');"
        "print('subprocess' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "False"


def test_threads_get_their_own_answers() -> None:
    pattern = compile_pattern(r"/k(\d+)/")
    wrong = []

    def ask(start: int) -> None:
        wrong.extend(n for n in range(start, start + 200) if pattern.match(f"k{n}") != {"1": str(n)})

    threads = [threading.Thread(target=ask, args=(start,)) for start in range(0, 1000, 200)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="the processes of a process are told by Linux")
def test_it_gives_up_by_itself_when_nobody_waits_any_more() -> None:
    code = f"from ckptsurgeon.rules.patterns import compile_pattern as c; p = c({ENDLESS!r}); print('go', flush=True); p.match({KEY!r})"
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert parent.stdout is not None
    parent.stdout.readline()
    time.sleep(0.3)
    (child,) = map(int, Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split())
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            if Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return
            os.kill(child, 0)
        except (ProcessLookupError, FileNotFoundError):
            return
        time.sleep(0.1)
    os.kill(child, signal.SIGKILL)
    pytest.fail("it runs on")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_a_forked_process_has_its_own() -> None:
    pattern = compile_pattern("/a(.)/")
    pid = os.fork()
    if pid == 0:
        try:
            os._exit(0 if compile_pattern("/b(.)/").match("bx") == {"1": "x"} else 1)
        finally:
            os._exit(2)
    assert os.waitpid(pid, 0)[1] == 0
    assert pattern.match("ax") == {"1": "x"}


def test_an_interrupt_leaves_no_answer_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    pattern, other = compile_pattern(r"/(a*)*b/"), compile_pattern("/x(.)/")
    previous = signal.signal(signal.SIGALRM, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        with pytest.raises(KeyboardInterrupt):
            pattern.match("a" * 40)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    assert other.match("xy") == {"1": "y"}


def test_no_interpreter_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(regular_expressions, "_current", None)
    monkeypatch.setattr(sys, "executable", "")
    with pytest.raises(RuleError, match="interpreter"):
        compile_pattern("/a/")
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(CheckpointError, match="started"):
        compile_pattern("/a/")


def test_a_killed_process_is_no_rule_that_takes_long(monkeypatch: pytest.MonkeyPatch) -> None:
    pattern = compile_pattern("/a(.)/")
    assert pattern.expression is not None
    process = pattern.expression._child._process
    assert process is not None
    process.kill()
    process.wait()
    with pytest.raises(RuleError, match="killed"):
        pattern.match("ab")
    assert pattern.match("ab") == {"1": "b"} and expand("{1}", {"1": "b"}) == "b"
