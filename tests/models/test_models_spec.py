"""Specs are split, never evaluated."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptsurgeon.errors import TargetError
from ckptsurgeon.models.target.spec import Spec, looks_like_spec, parse


@pytest.mark.parametrize(
    ("text", "module", "file", "attribute", "args", "kwargs", "called"),
    [
        ("module:Net", "module", None, "Net", (), {}, False),
        ("pkg.module:a.Net", "pkg.module", None, "a.Net", (), {}, False),
        ("path/to/file.py:Net", None, "path/to/file.py", "Net", (), {}, False),
        ("net-v1.py:Net", None, "net-v1.py", "Net", (), {}, False),
        ("C:\\nets\\file.py:Net", None, "C:\\nets\\file.py", "Net", (), {}, False),
        ("m:Net()", "m", None, "Net", (), {}, True),
        ("m:make(num_classes=2, pretrained=False)", "m", None, "make", (), {"num_classes": 2, "pretrained": False}, True),
        ("m:make(-1, +2.5, 'a:b', [1, (2,)], {'k': None})", "m", None, "make", (-1, 2.5, "a:b", [1, (2,)], {"k": None}), {}, True),
        ("m:make(x='(:)')", "m", None, "make", (), {"x": "(:)"}, True),
    ],
)
def test_a_spec_is_split_into_its_parts(text, module, file, attribute, args, kwargs, called):
    assert parse(text) == Spec(text, module, file, attribute, kwargs, args, called)
    assert looks_like_spec(text)


@pytest.mark.parametrize(
    "call",
    [
        "(n=x)",
        "(n=print())",
        "(*[1])",
        "(**{})",
        "(n=1, n=2)",
        "(",
        "()()",
        "() or 1",
        "(1), 2",
        "(lambda: 0)",
        "(n=[i for i in ()])",
        "(" * 999,
    ],
)
def test_what_is_not_a_literal_is_refused_and_not_run(call):
    assert looks_like_spec(f"m:make{call}")
    with pytest.raises(TargetError) as caught:
        parse(f"m:make{call}")
    assert caught.value.hint


@pytest.mark.parametrize("text", ["net.pt", "a/b/net.safetensors", "s3://bucket/x", "m:", ":Net", "m:1Net", "model.py", "", "a b"])
def test_a_path_is_no_spec(text):
    assert not looks_like_spec(text)
    with pytest.raises(TargetError):
        parse(text)


@pytest.mark.parametrize("text", ["a/b:Net", "a-b:Net", ".model:Net", "m.:Net", "class:Net", "m:import", "m:a.def"])
def test_a_place_that_can_not_be_imported_is_refused(text):
    with pytest.raises(TargetError):
        parse(text)


def test_a_folder_path_without_suffix_is_answered_with_the_file():
    with pytest.raises(TargetError) as caught:
        parse("nets/lenet:Net")
    assert caught.value.hint == "is it nets/lenet.py:Net?"


LITERALS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


@given(st.lists(LITERALS, max_size=3), st.dictionaries(st.sampled_from(["a", "num_classes", "ü"]), LITERALS, max_size=3))
def test_every_literal_comes_back_as_it_is(args, kwargs):
    words = [repr(value) for value in args] + [f"{name}={value!r}" for name, value in kwargs.items()]
    spec = parse(f"m:make({', '.join(words)})")
    assert (list(spec.args), dict(spec.kwargs)) == (args, kwargs)


@given(st.text())
def test_any_text_is_parsed_or_refused_by_our_own_error(text):
    try:
        spec = parse(text)
    except TargetError:
        return
    assert looks_like_spec(text) and spec.attribute in text


def test_specs_and_scheme_texts_do_not_load_torch():
    code = "import sys; import ckptsurgeon.models.target.spec, ckptsurgeon.models.init.scheme_text; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_the_module_never_evaluates():
    import ckptsurgeon.models.target.spec as module

    tree = ast.parse(Path(module.__file__).read_text())
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    assert not names & {"eval", "exec", "compile", "__import__"}
