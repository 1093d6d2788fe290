"""Patterns over keys: what they match, what their parts stand for, and what a result makes of them."""

import warnings

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from profiles import examples

from ckptsurgeon.errors import RuleError
from ckptsurgeon.rules.patterns import Pattern, compile_pattern, listed, literal, unescaped, written
from ckptsurgeon.rules.rulefile import parse_rules, to_toml
from ckptsurgeon.rules.rules import Rule, compile_rule
from ckptsurgeon.rules.templates import check_template, expand


def parts(pattern: str, key: str):
    return compile_pattern(pattern).match(key)


def renamed(pattern: str, template: str, key: str):
    compiled = compile_pattern(pattern)
    check_template(template, compiled)
    found = compiled.match(key)
    return None if found is None else expand(template, found)


@pytest.mark.parametrize(
    ("pattern", "yes", "no"),
    [
        ("fc", ["fc"], ["fc_in.fc", "fc.weight", "xfc", "fc2", "FC"]),
        ("fc.weight", ["fc.weight"], ["fcxweight", "fc.weight.g", "a.fc.weight"]),
        ("fc.*", ["fc.weight", "fc.bias"], ["fc.a.weight", "fc", "fc2.weight"]),
        ("fc*", ["fc", "fc2"], ["fc.weight", "afc"]),
        ("*.weight", ["fc.weight"], ["a.fc.weight", "weight"]),
        ("layer*.0.*", ["layer1.0.weight"], ["layer1.0.conv.weight", "layer1.1.weight"]),
        ("fc.**", ["fc.weight", "fc.a.b.weight"], ["fc", "fc2.weight"]),
        ("**.bias", ["bias", "fc.bias", "a.b.fc.bias"], ["xbias", "a.xbias", "bias.a"]),
        ("a.**.w", ["a.w", "a.b.w", "a.b.c.w"], ["a.xw", "aw", "b.a.w"]),
        ("**", ["a", "a.b.c", "a\nb"], []),
        ("a**w", ["aw", "a.b.w", "abw"], ["aw.b"]),
        ("{p}", ["fc"], ["fc.weight", ""]),
        ("layer_{i}.w", ["layer_0.w", "layer_ab.w"], ["layer_.w", "layer_0.1.w"]),
        ("a.{**rest}", ["a.b", "a.b.c"], ["a", "a.", "a..b", "ab"]),
        ("{p}.{p}", ["a.a"], ["a.b"]),
        ("{**x}.mid.{**x}", ["a.b.mid.a.b"], ["a.b.mid.a"]),
        ("a+b[0] (c).$x", ["a+b[0] (c).$x"], ["aab0 c.$x", "aab[0] (c).$x"]),
        ("é.{p}", ["é.ü"], ["e.u"]),
        ("/fc[12]\\..*/", ["fc1.weight", "fc2.a.b"], ["fc3.weight", "afc1.weight"]),
        ("/fc/", ["fc"], ["fc.weight", "afc"]),
        ("/a|b/", ["a", "b"], ["ab", "a.c"]),
        ("/", ["/"], ["a"]),
        ("h.{0..9..3}.w", ["h.0.w", "h.3.w", "h.9.w"], ["h.1.w", "h.12.w", "h.03.w", "h..w"]),
        ("h.{0..10..3}.w", ["h.9.w"], ["h.10.w", "h.12.w"]),
        ("h.{0,4,9}.w", ["h.0.w", "h.9.w"], ["h.3.w", "h.04.w"]),
        ("h.{1,10..20..5,x}", ["h.1", "h.15", "h.x"], ["h.5", "h.11"]),
        ("h.{i=0..9..3}.{p=w,b}", ["h.9.b"], ["h.1.w", "h.0.c"]),
        ("a\\*\\{b\\}", ["a*{b}"], ["aa{b}", "a\\*{b}"]),
        ("\\/a/", ["/a/"], ["a"]),
        ("a\\.\\\\", ["a.\\"], ["a\\.\\"]),
    ],
)
def test_the_whole_key_matches_or_none_of_it(pattern, yes, no):
    assert [key for key in yes if parts(pattern, key) is None] == []
    assert [key for key in no if parts(pattern, key) is not None] == []


@pytest.mark.parametrize(
    ("pattern", "key", "found"),
    [
        ("{a}.{b}.w", "x.y.w", {"a": "x", "b": "y"}),
        ("h_{i}.{**rest}", "h_12.attn.q.w", {"i": "12", "rest": "attn.q.w"}),
        ("{**head}.{leaf}", "a.b.c", {"head": "a.b", "leaf": "c"}),
        ("/(?P<n>\\d+)\\.(.*)/", "3.w", {"n": "3", "1": "3", "2": "w"}),
        ("/a(b)?/", "a", {"1": ""}),
        ("fc.*", "fc.w", {}),
    ],
)
def test_the_parts_stand_for_what_they_matched(pattern, key, found):
    assert parts(pattern, key) == found


@pytest.mark.parametrize(
    ("pattern", "template", "key", "result"),
    [
        ("fc2.{p}", "dense2.{p}", "fc2.weight", "dense2.weight"),
        ("fc2.{p}", "dense2.{p}", "fc2.a.weight", None),
        ("a.{**rest}", "{**rest}", "a.b.c", "b.c"),
        ("a.{**rest}", "b.{rest}", "a.b.c", "b.b.c"),
        ("h.{i}.w", "h.{i+1}.w", "h.9.w", "h.10.w"),
        ("h.{i=0..9..3}.w", "h.{i//3}.w", "h.9.w", "h.3.w"),
        ("h.{i=0..9..3}.w", "h.{i//3}.w", "h.8.w", None),
        ("h.{i=0,4}.{j=0,4}.w", "{j}.{i}", "h.0.4.w", "4.0"),
        ("h.{i=0,4}.{i}", "g.{i}", "h.4.4", "g.4"),
        ("h.{i=0,4}.{i}", "g.{i}", "h.4.0", None),
        ("h.{p}", "a\\*\\{p\\}{p}", "h.w", "a*{p}w"),
        ("h.{i}.w", "h.{2*i}.w", "h.3.w", "h.6.w"),
        ("h.{i}.w", "s.{i//4}.b.{i%4}.w", "h.7.w", "s.1.b.3.w"),
        ("h.{i}.w", "h.{ (i + 1) * 2 - i } .w", "h.3.w", "h.5 .w"),
        ("h.{i}.{j}", "h.{i*10+j}", "h.2.3", "h.23"),
        ("h.{i}.w", "h.{i}{i}.w", "h.2.w", "h.22.w"),
        ("h.{i}.w", "h.{i}.w", "h.007.w", "h.007.w"),
        ("h.{i}.w", "h.{i+0}.w", "h.007.w", "h.7.w"),
        ("/layer(\\d+)\\.(.*)/", "stages.{1}.{2}", "layer3.0.conv.w", "stages.3.0.conv.w"),
        ("/layer(?P<i>\\d+)\\.(?P<rest>.*)/", "stages.{i-1}.{rest}", "layer1.0.w", "stages.0.0.w"),
        ("a", "b", "a", "b"),
        ("{a}.{b}", "{b}.{a}", "x.y", "y.x"),
        ("{a}", "x.{a}", "{i+1}", "x.{i+1}"),  # what a key holds is never read as a template
    ],
)
def test_a_result_takes_the_parts_up_again(pattern, template, key, result):
    assert renamed(pattern, template, key) == result


@pytest.mark.parametrize(
    "pattern",
    ["", "//", "{", "}", "{}", "a.{", "{1}", "{i+1}", "{**}", "{***p}", "{a b}", "{a}}", "{é}", "/(/", "/*/", "/(?P<a>x)(?P<a>y)/",
     "/[b-a]/", "/(?L)a/", "/a{99999999999999999999}/", "/a{" + "9" * 5000 + "}/", "/(?P=x)/", "/(?<=a+)b/"],
)  # fmt: skip
def test_a_malformed_pattern_is_a_rule_error(pattern):
    with pytest.raises(RuleError) as caught:
        compile_pattern(pattern)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    "template",
    ["", "*", "b.*", "b.**", "{", "b.{", "}", "{}", "{q}", "{p+}", "{+p}", "{-p}", "{p**2}", "{p/2}", "{p.x}", "{p[0]}", "{p()}", "{p,p}",
     "{p if p else p}", "{1}", "{2+3}", "{q+1}", "{p+1.5}", "{p+1j}", "{p+'a'}", "{p;p}", "{p=1}", "{p!r}", "{p:02}", "{lambda: p}",
     "{__import__}", "{" + "(" * 90 + "p", "{p" + "+1" * 200 + "}", "{p+" + "9" * 5000 + "}", "\\1", "b.\\g<p>", "{**p+1}", "{p + 0777}"],
)  # fmt: skip
def test_a_malformed_result_is_found_before_any_key_is_seen(template):
    with pytest.raises(RuleError):
        check_template(template, compile_pattern("a.{p}"))


def test_a_regular_expressions_groups_are_not_written_with_backslashes():
    with pytest.raises(RuleError) as caught:
        check_template(r"b.\1", compile_pattern("/a(.*)/"))
    assert "{1}" in (caught.value.hint or "")
    with pytest.raises(RuleError, match=r"uses \{3\}.*names: 1, 2"):
        check_template("{3}", compile_pattern("/(a)(b)/"))


@pytest.mark.parametrize(
    ("template", "value", "words"),
    [
        ("{i+1}", "a", "matched 'a'"),
        ("{i+1}", "1a", "matched '1a'"),
        ("{i+1}", "²", "matched"),
        ("{i+1}", "٣", "matched"),
        ("{i+1}", "1" * 5000, "matched"),
        ("{i//0}", "1", "zero"),
        ("{5%i}", "0", "zero"),
        ("{i-1}", "0", "-1"),
        ("{i*i*i}", "9" * 18, "digits"),
    ],
)
def test_arithmetic_that_can_not_be_done_is_a_rule_error(template, value, words):
    with pytest.raises(RuleError, match=words):
        renamed("{i}", template, value)


def test_no_warning_reaches_a_person():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compile_pattern("/[[a]/")
        with pytest.raises(RuleError):
            check_template("{p is 1}", compile_pattern("{p}"))


pattern_text = st.one_of(st.text(max_size=20), st.text(alphabet="ab{}*./()[]?+\\|^$1i_P<>=:", max_size=12))


@given(pattern_text, st.text(max_size=20))
@example("/(?a)(?u)x/", "x")
@example("{p²}", "x")
@example("\ud800{p}", "\ud800x")
def test_any_text_is_a_pattern_or_a_rule_error(text, key):
    try:
        pattern = compile_pattern(text)
    except RuleError:
        return
    assert isinstance(pattern, Pattern)
    found = pattern.match(key)
    assert found is None or set(found) == set(pattern.parts)


@given(
    st.one_of(st.text(max_size=20), st.text(alphabet="ip{}*+-/%()0123 .\\", max_size=14)),
    st.one_of(st.integers(0, 99).map(str), st.text(alphabet="ab.0", min_size=1, max_size=6)),
)
@example("{i+1" + " " * 50 + "}", "1")
@example("{ﬁ}", "1")
def test_any_template_gives_text_or_a_rule_error(template, value):
    pattern = compile_pattern("{i}.{**p}")
    try:
        check_template(template, pattern)
        made = expand(template, {"i": value, "p": "w.b"})
    except RuleError:
        return
    assert isinstance(made, str)


MARKS = "ab01.,*{}+-> |/:\\=\"'[#é\n\t\u2028"
any_key = st.one_of(st.text(alphabet=MARKS, min_size=1, max_size=12), st.text(st.characters(exclude_categories=["Cs"]), min_size=1))


@settings(max_examples=examples(400), deadline=None)
@given(any_key, any_key, any_key, st.lists(any_key, max_size=3))
@example("a -> b", " + ", "/x/", ["0:a"])
@example("3:x", "/", "//", [" "])
def test_any_key_is_named_by_its_literal_pattern_and_no_other_is(key, other, third, others):
    pattern = compile_pattern(literal(key))
    assert unescaped(literal(key)) == key and pattern.match(key) == {} and pattern.test(key)
    assert not [
        one for one in (other, key + "x", "x" + key, key + "\n", literal(key)) if one != key and (pattern.match(one) or pattern.fits(one))
    ]
    assert expand(literal(other), {}) == other
    results = list(map(literal, [other, *others]))
    rename = Rule("rename", literal(key), " + ".join(results))
    adapt = Rule("adapt", f"{literal(key)} + {literal(third)} -> {' + '.join(results)}", "concat")
    found = parse_rules(to_toml([rename, adapt, Rule("drop", literal(key))]), "rules.toml")
    for rule in (rename, adapt, *found[:2]):
        compiled = compile_rule(rule)
        assert [expand(result, {}) for result in compiled.results] == [other, *others]
        assert [(number, pattern.key) for number, pattern in compiled.patterns] == [(None, key), (None, third)][: len(compiled.patterns)]
    assert compile_rule(found[2]).patterns[0][1].key == key


@given(st.lists(st.integers(0, 40), min_size=1, unique=True).map(sorted), st.lists(any_key, min_size=2, max_size=2), st.booleans())
def test_numbers_that_are_listed_match_just_these(numbers, texts, named):
    pattern = compile_pattern(written((texts[0] + "a", "b" + texts[1]), (f"{{i={listed(numbers)}}}",)))
    assert [i for i in range(60) if pattern.fits(f"{texts[0]}a{i}b{texts[1]}")] == numbers
    assert pattern.match(f"{texts[0]}a{numbers[-1]}b{texts[1]}") == {"i": str(numbers[-1])}


@pytest.mark.parametrize(
    ("pattern", "why"),
    [
        ("a\\", "ends in a backslash"),
        ("layer(\\d+)", "backslash before 'd'"),
        ("h.{3..0}", "no range"),
        ("h.{0..9..0}", "no range"),
        ("h.{a..9,1}", "no range"),
        ("h.{i=0,1}.{i=0,1}", "chooses {i} twice"),
        ("h.{i=0..20000}", "more than 10000 choices"),
        ("h.{0,3,…,90: 31}", "odd brace"),
    ],
)
def test_what_is_no_escape_or_choice_is_told(pattern, why):
    with pytest.raises(RuleError) as caught:
        compile_pattern(pattern)
    assert why in caught.value.reason


@given(st.text(alphabet="ab.[+(^$ |?-]#é\n", min_size=1, max_size=12))
def test_a_key_without_braces_and_stars_names_itself_alone(key):
    pattern = compile_pattern(key)
    assert pattern.match(key) == {}
    assert pattern.match(key + "x") is None and pattern.match("x" + key) is None and pattern.match(key + "\n") is None


@given(st.lists(st.text(alphabet="abc01_", min_size=1, max_size=3), min_size=1, max_size=5))
def test_taking_a_key_apart_and_together_again_changes_nothing(segments):
    key = ".".join(segments)
    assert renamed("{**all}", "{**all}", key) == key
    names = [f"p{index}" for index in range(len(segments))]
    whole = ".".join(f"{{{name}}}" for name in names)
    assert renamed(whole, whole, key) == key
    assert (renamed("{first}.{**rest}", "{rest}.{first}", key) is None) == (len(segments) == 1)


@pytest.mark.parametrize(
    ("pattern", "yes", "no"),
    [
        ("fc.{weight,bias}", ["fc.weight", "fc.bias"], ["fc.scale", "fc.weightbias", "fc.{weight,bias}"]),
        ("h.{0..11}.w", ["h.0.w", "h.11.w"], ["h.12.w", "h.01.w", "h.1.1.w"]),
        (
            "h.{0..2,5,7..8}.{q,k}_proj.*",
            ["h.1.q_proj.w", "h.5.k_proj.b", "h.8.q_proj.w"],
            ["h.3.q_proj.w", "h.6.k_proj.w", "h.5.v_proj.w"],
        ),
        ("{**m}.norm{1..2}.{p}", ["a.b.norm1.w", "a.norm2.b"], ["a.norm3.w", "norm1.w"]),
    ],
)
def test_a_pattern_takes_keys_as_texts_fold_them(pattern, yes, no):
    compiled = compile_pattern(pattern)
    assert all(compiled.match(key) is not None for key in yes) and not any(compiled.match(key) is not None for key in no)


@pytest.mark.parametrize("pattern", ["h.{3..1}.w", "h.{0..99999999}.w", "h.{a..3}.w", "{,}", "{a,}", "{1..}", "{..1}"])
def test_a_choice_that_is_none_is_refused(pattern):
    with pytest.raises(RuleError):
        compile_pattern(pattern)
