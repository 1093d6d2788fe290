"""--limit stands after any command that reads; the error names it, and with it the file is read. A wrong one is a usage error."""

from __future__ import annotations

import json
import re

import pytest

from ckptsurgeon.limit_table import BY_NAME

FILE = "net_params.pkl"
COMMANDS = [
    ("inspect", FILE),
    ("diff", FILE, FILE),
    ("match", FILE, FILE),
    ("plan", FILE),
    ("merge", FILE, "-o", "out.pt", "--overwrite"),
    ("verify", FILE, FILE),
    ("check", FILE),
    ("check", FILE, FILE, "other.pt", "--jobs", "2"),
    ("skeleton", FILE, "-o", "net.json", "--overwrite"),
]


@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: " ".join(words[:3]))
@pytest.mark.parametrize("first", [True, False])
def test_every_command_that_reads_takes_it(run, place, words, first):
    (place / "other.pt").write_bytes((place / FILE).read_bytes())

    def limited(*limits):
        options = [word for limit in limits for word in ("--limit", limit)]
        return run(words[0], *options, *words[1:]) if first else run(*words, *options)

    refused = limited("tensors=3")
    assert refused.code == (1 if words[0] == "check" else 2)
    told = refused.out + refused.err
    assert "has more than 3 tensors" in told
    (flag,) = set(re.findall(r"--limit (tensors=\d+)", told))
    assert limited(flag).code == 0
    assert limited("tensors=3", flag).code == 0  # the last one holds
    assert limited().code == 0


def test_two_limits_at_once(run):
    assert "more than 3 tensors" in run("inspect", FILE, "--limit", "tensors=3", "--limit", "nesting=2").err
    assert "global" not in run("inspect", FILE, "--limit", "pickle-bytes=1GiB", "--limit", "global-characters=2000").err


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("tensor=3", "there is no limit 'tensor'"),
        ("=3", "there is no limit ''"),
        ("tensors", "'' is no amount for the limit tensors"),
        ("tensors=", "'' is no amount"),
        ("tensors=0", "'0' is no amount"),
        ("tensors=-1", "'-1' is no amount"),
        ("pickle-bytes=much", "such as 1GB"),
        ("nesting=1000", "up to 150"),
    ],
)
def test_a_limit_that_is_none(run, word, says):
    ended = run("inspect", FILE, "--limit", word)
    assert ended.code == 2 and not ended.out and says in ended.err and "try: ckptsurgeon inspect --help" in ended.err
    if "no limit" in says:
        assert "is it tensors" in ended.err if word != "=3" else all(name in ended.err for name in BY_NAME)
    as_json = run("inspect", FILE, "--limit", word, "--json")
    assert as_json.code == 2 and says in json.loads(as_json.out)["error"]["message"]
