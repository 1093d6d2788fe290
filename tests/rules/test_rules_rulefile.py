"""A rules file: text to rules in their order, every problem with its line, and rules to text and back."""

import tomllib

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from planning_support import rule
from profiles import examples

from ckptsurgeon.errors import LimitError, RuleError
from ckptsurgeon.rules.rulefile import FORMS, parse_rules, to_toml
from ckptsurgeon.rules.rules import Rule, compile_rule


def refused(text: str) -> RuleError:
    with pytest.raises(RuleError) as caught:
        parse_rules(text, "rules.toml")
    assert "Traceback" not in str(caught.value) and caught.value.path.startswith("rules.toml")
    return caught.value


# ---- what stands where


def test_every_kind_in_the_order_of_the_text_with_its_line():
    text = """# how A becomes B
[[drop]]
key = ["aux.**", "ema.**"]      # two rules

[[rename]]
from = "encoder_layer_{i}.{p}"
to = "blocks.{i+1}.{p}"
[[ stage ]]   # the rules below see blocks
[["adapt"]]
from = ["q.{p}", "k.{p}"]
to = "qk.{p}"
op = ["transpose", "concat(dim=0)"]
[['init']]
key = 'head.*'
scheme = '''zeros'''
[[keep]]
key = "norm.*"
[[drop]]
key = "last"
[[adapt]]
key = "pos"
op = "transpose"
[[rename]]
from = ["a", "b"]
to = ["c", "d"]
"""
    assert parse_rules(text, "rules.toml") == (
        rule("drop", "aux.**"),
        rule("drop", "ema.**"),
        rule("rename", "encoder_layer_{i}.{p}", "blocks.{i+1}.{p}"),
        rule("stage", ""),
        rule("adapt", "q.{p} + k.{p} -> qk.{p}", "transpose | concat(dim=0)"),
        rule("init", "head.*", "zeros"),
        rule("keep", "norm.*"),
        rule("drop", "last"),
        rule("adapt", "pos", "transpose"),
        rule("rename", "a", "c + d"),
        rule("rename", "b", "c + d"),
    )
    assert [one.line for one in parse_rules(text, "rules.toml")] == [2, 2, 5, 8, 9, 13, 16, 18, 20, 23, 23]
    assert str(parse_rules(text, "conf/rules.toml")[2]) == "rename 'encoder_layer_{i}.{p}' 'blocks.{i+1}.{p}' (conf/rules.toml:5)"
    assert parse_rules(text.replace("\n", "\r\n"), "r") == parse_rules(text, "r")
    assert parse_rules("", "r") == () == parse_rules("# nothing\n", "r")


@pytest.mark.parametrize("quotes", ['"""', "'''"])
@pytest.mark.parametrize("tail", ["", "[[rename]]", '\n# "', "\n[[drop]]\n[[drop]]"])
def test_a_header_within_a_string_is_no_header(quotes, tail):
    text = f"""[[stage]]
name = {quotes}
[[rename]]
from = "never"{tail}
{quotes}
[[drop]]
key = "a"
[[rename]]
from = "b"
to = "c"
"""
    found = parse_rules(text, "r")
    assert found == (rule("stage", ""), rule("drop", "a"), rule("rename", "b", "c"))
    assert [text.split("\n")[one.line - 1] for one in found] == ["[[stage]]", "[[drop]]", "[[rename]]"]


def test_a_header_within_a_comment_or_behind_an_odd_line_break_is_none():
    text = '#\u2028[[rename]]\n# """\n[[drop]]\nkey = "a\u2028[[rename]]"\n[[rename]]  # \'\'\'\nfrom = "b"\nto = "c"\n[[stage]] # """\n'
    assert [(one.kind, one.line) for one in parse_rules(text, "r")] == [("drop", 3), ("rename", 5), ("stage", 8)]


# ---- every problem, with its line


def test_all_problems_at_once_each_with_its_line():
    error = refused("""[[rename]]
form = "fc1.{p}"
to = "dense.{p}"
[[adapt]]
key = "pos"
op = "interpolte"
[[rename]]
from = "a.{p}"
to = "b.{q}"
[[init]]
key = "head"
scheme = 3
[[drop]]
key = []
[[keep]]
keys = "x"
[[adapt]]
key = "w"
op = "chunk(dims=0)"
[[adapt]]
key = "w"
from = "w"
to = "v"
op = "transpose"
[[stage]]
after = "x"
[[drop]]
key = "{"
""")
    lines = [int(problem.partition(":")[0].removeprefix("line ")) for problem in error.problems]
    assert lines == [2, 1, 4, 7, 12, 14, 16, 15, 17, 20, 26, 27]
    words = "\n".join(error.problems)
    assert "has no 'form'; is it 'from'?" in words and "there is no adapter 'interpolte'" in words and "is it interpolate" in words
    assert "uses {q}" in words and "scheme is not text" in words and "is it 'key'?" in words and "takes no argument 'dims'" in words
    assert "needs key or from and to" in words and "an odd brace" in words


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[[renam]]\nfrom='a'", "line 1: there is no rule 'renam'; is it [[rename]]?"),
        ("\n\n[[zzz]]", "line 3: there is no rule 'zzz'; the rules are rename, drop, keep, adapt, init, stage"),
        ("[rename]\nfrom='a'\nto='b'", "line 1: write each rule as a table of its own: [[rename]]"),
        ("# x\nrename.from = 'a'", "line 2: write each rule as a table of its own: [[rename]]"),
        ("[rename.from]\nx = 1", "line 1: write each rule as a table of its own: [[rename]]"),
        ("\n[[rename.x]]\ny = 1", "line 2: write each rule as a table of its own: [[rename]]"),
        ("rename = 1979-05-27", "line 1: write each rule as a table of its own: [[rename]]"),
        ("title = 'my rules'\n[[drop]]\nkey='a'", "line 1: there is no rule 'title'"),
        ("[[drop]]\nkey = 1979-05-27", "line 2: key is not text, or a list of texts"),
        ("[[drop]]\nkey = 1e400", "line 2: key is not text, or a list of texts"),
        ("[[drop]]\nkey = ['a', 3]", "line 2: key is not text, or a list of texts"),
        ("[[drop]]\n'key' = {a = 'b'}", "line 2: key is not text, or a list of texts"),
        ("[[drop]]\nkey.a = 'b'", "line 2: key is not text, or a list of texts"),
        ("[[drop]]\nkey = 'a'\n[drop.more]\nb = 1", "line 3: [[drop]] has no 'more'; it has key"),
        ("[[drop]]\nkey = ''", "line 1: an empty pattern matches nothing"),
        ("[[adapt]]\nfrom='a'\nto='b'", "line 1: [[adapt]] needs op"),
        ("[[init]]\nkey='a'", "line 1: [[init]] needs scheme"),
        ("[[adapt]]\nfrom='a -> b'\nto='c'\nop='transpose'", "line 1: has more than one ' -> '"),
        ("[[drop]]\nkey = '''\n[[drop]]\n'''\n[[drop]]\nkeyy = 'x'", "line 6: [[drop]] has no 'keyy'"),
    ],
)
def test_a_problem_and_its_line(text, words):
    assert any(problem.startswith(words) for problem in refused(text).problems)


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("[[rename]\n", "r:1"),
        ("[[drop]]\nkey = 'a'\nkey = 'b'\n", "r:3"),
        ("x = ", "r"),
        ("[[drop]]\n\nkey = 2024-13-41", "r:3"),
        ('x = """', "r"),
    ],
)
def test_what_is_no_toml_says_where(text, path):
    with pytest.raises(RuleError, match="is not TOML") as caught:
        parse_rules(text, "r")
    assert caught.value.path.startswith(path)


def test_rules_whose_order_can_not_be_told():
    for text in ("rename = [{from = 'a', to = 'b'}]", '[["re\\u006eame"]]\nfrom = "a"\nto = "b"'):
        error = refused(text)
        assert "order can't be told" in error.reason and "[[rename]]" in error.hint and error.path == "rules.toml"


def test_hundreds_of_problems_are_cut_short():
    error = refused("[[drop]]\nkee = 'a'\n" * 50)
    assert len(error.problems) == 21 and error.problems[-1] == "and 80 more"


@pytest.mark.parametrize(
    "text",
    [
        "x = " + "[" * 100_000,
        "x = " + "[" * 100_000 + "]" * 100_000,
        "x = " + "{a=" * 5000,
        "[[rename]]\nfrom = " + "9" * 5000,
        "a." * 2000 + "b = 1",
        "[[drop]]\nkey = 'a'\n" * 60_000 + "\n" * 200_000,
        "\x00",
        "\ud800 = 1",
        "[[drop]]\nkey = '" + "{p}" * 2000 + "'",
        "[[drop]]\nkey = '/" + "(" * 5000 + ")" * 5000 + "/'",
        "[[rename]]\nfrom = 'a.{i}'\nto = 'b.{" + "(" * 90 + "i" + ")" * 90 + "}'",
        "[[adapt]]\nkey = 'a'\nop = 'reshape(shape=" + "[" * 3000 + "]" * 3000 + ")'",
        "[[adapt]]\nkey = 'a'\nop = 'reshape(shape=[9" + "9" * 5000 + "])'",
        "[[adapt]]\nkey = 'a'\nop = 'pad(value=1e999)'",
    ],
)
def test_hostile_texts_are_rules_or_errors(text):
    try:
        parse_rules(text, "r")
    except (RuleError, LimitError) as error:
        assert error.reason


_words = st.sampled_from(
    ["[[rename]]", "[[drop]]", "[[keep]]", "[[adapt]]", "[[init]]", "[[stage]]", "[rename]", "[[rename.x]]", "[[renam]]", "from",
     "to", "key", "op", "scheme", "name", "=", ".", "#", "[", "]", ",", "\\", "'a.{p}'", '"b.{p}"', "['a','b']", "{x=1}",
     "1979-05-27", "1e5", "true", "'transpose'", "'concat(dim=0)'", "'zeros'", "'{'", "'*'", "'''", '"""', " ", "\n", "\r\n",
     "\u2028", "\x0b", "'a.{i} -> b.{i//2}'"]
)  # fmt: skip


@settings(max_examples=examples(1000), deadline=None)
@given(st.one_of(st.lists(_words, max_size=25).map(" ".join), st.lists(_words, max_size=25).map("".join), st.text(max_size=60)))
def test_any_text_gives_rules_or_a_rule_error(text):
    try:
        found = parse_rules(text, "r")
    except RuleError as error:
        assert error.reason and error.path
        return
    assert sum(map(len, tomllib.loads(text).values())) <= len(found)
    assert parse_rules(to_toml(found), "r") == found


_fields = st.fixed_dictionaries(
    {},
    optional={
        name: st.one_of(
            st.sampled_from(["a.{p}", "b.{p}", "transpose", "zeros", "a.{i} -> b", "concat", "{", "/(/", "rows(index=[0])", ""]),
            st.text(max_size=5), st.integers(), st.lists(st.sampled_from(["a", "b.{p}", "c"]), max_size=3),
        )
        for name in ("from", "to", "key", "op", "scheme", "name", "form")
    },
)  # fmt: skip


@settings(max_examples=examples(400))
@given(st.lists(st.tuples(st.sampled_from(list(FORMS)), _fields), max_size=6), st.data())
def test_any_tables_give_rules_in_order_or_problems_with_a_line_each(tables, data):
    def value(one):
        return "[" + ", ".join(map(value, one)) + "]" if type(one) is list else str(one) if type(one) is int else quoted(one)

    def quoted(one):
        return '"' + "".join(f"\\U{ord(letter):08x}" for letter in one) + '"'

    blank = data.draw(st.integers(0, 2))
    text = "".join(
        "\n" * blank + f"[[{kind}]]\n" + "".join(f"{name} = {value(one)}\n" for name, one in row.items()) for kind, row in tables
    )
    try:
        found = parse_rules(text, "r")
    except RuleError as error:
        assert all(problem.startswith(("line ", "and ")) for problem in error.problems)
        return
    lines = text.split("\n")
    assert [one.line for one in found] == sorted(one.line for one in found)
    assert all(lines[one.line - 1] == f"[[{one.kind}]]" for one in found)
    assert len({one.line for one in found}) == len(tables)


# ---- rules to text and back

_keys = st.one_of(st.sampled_from(["a", "b.{p}", "fc.*", "**.w", "/(a|b)\\.\"w'/", "x.{i}.{**r}", "0:a.{p}", 'say "so"', "ü\\n\u2028"]))
_texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8)


@st.composite
def _any_rule(draw: st.DrawFn) -> Rule:
    kind = draw(st.sampled_from(["rename", "drop", "keep", "adapt", "init", "stage"]))
    if kind == "stage":
        return Rule("stage")
    key = draw(st.one_of(_keys, _texts))
    if kind in ("drop", "keep"):
        return Rule(kind, key)
    if kind == "init":
        return Rule(kind, key, draw(st.one_of(st.sampled_from(["zeros", "normal(std=0.02)", "from(a.{p})"]), _texts)))
    results = " + ".join(draw(st.lists(st.sampled_from(["n.a", "n.b", 'n."c"']), min_size=1, max_size=3)))
    if kind == "rename":
        return Rule(kind, key, results)
    op = draw(st.sampled_from(["transpose", "concat(dim=0) | transpose", "rows(source='a | b', target=\"c\")", "chunk(-1, of=3, index=0)"]))
    return Rule(kind, draw(st.sampled_from([key, f"a + b -> {results}", f"0:a + 1:a -> {results}", f"a -> {results}"])), op)


@settings(max_examples=examples(500), deadline=None)  # a regular expression starts a process
@given(st.lists(_any_rule(), max_size=6))
@example([Rule("drop", '"""\n[[rename]]\n"""')])
@example([Rule("drop", "\\U0000005b"), Rule("drop", "\x7f\x00\r\n")])
def test_rules_come_back_from_their_text(rules):
    kept = []
    for one in rules:
        try:
            if one.kind != "stage":
                compile_rule(one)
            kept.append(one)
        except RuleError:
            pass
    text = to_toml(kept)
    found = parse_rules(text, "r")
    # ` -> ` and ` + ` may be written with more blanks; the text has one form
    assert [" ".join(f"{one.kind} {one.pattern} {one.result}".split()) for one in found] == [
        " ".join(f"{one.kind} {one.pattern} {one.result}".split()) for one in kept
    ]
    assert to_toml(found) == text and parse_rules(to_toml(found), "r") == found
