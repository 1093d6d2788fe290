"""Lists of tokens: held against the tokenizers library and transformers' configs; every other file is refused with a CheckpointError."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from profiles import examples
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers
from transformers import ViTConfig

from ckptsurgeon.errors import CheckpointError, FormatError, LimitError, UnreadableError
from ckptsurgeon.formats.labels import read_labels
from ckptsurgeon.limit_table import limits

TEXT = ["the cat sat on the mat", "a dog", 'naïve 猫 {"x": [1]}', "the mat\tsat"]


def written(folder: Path, content: Any) -> str:
    path = folder / "list"  # by content: the name says nothing
    raw = content if isinstance(content, bytes) else content.encode() if isinstance(content, str) else json.dumps(content).encode()
    path.write_bytes(raw)
    return str(path)


def trained(model: Any, trainer: Any) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator(TEXT, trainer)
    return tokenizer


TOKENIZERS: dict[str, Callable[[], Tokenizer]] = {
    "BPE": lambda: trained(models.BPE(unk_token="[UNK]"), trainers.BpeTrainer(special_tokens=["[UNK]"], vocab_size=60)),
    "WordPiece": lambda: trained(models.WordPiece(unk_token="[UNK]"), trainers.WordPieceTrainer(special_tokens=["[UNK]"], vocab_size=60)),
    "WordLevel": lambda: trained(models.WordLevel(unk_token="[UNK]"), trainers.WordLevelTrainer(special_tokens=["[UNK]", "[PAD]"])),
    "Unigram": lambda: trained(models.Unigram(), trainers.UnigramTrainer(special_tokens=["<unk>"], unk_token="<unk>", vocab_size=40)),
}


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("added", [False, True])
def test_a_tokenizer_as_its_library_reads_it(kind: str, added: bool, tmp_path: Path) -> None:
    tokenizer = TOKENIZERS[kind]()
    if added:
        tokenizer.add_tokens(["<new>", AddedToken("two words", lstrip=True), "the"])
        tokenizer.add_special_tokens(["<|end|>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"), pretty=added)
    found = read_labels(str(tmp_path / "tokenizer.json"))
    assert {token: row for row, token in enumerate(found) if token is not None} == tokenizer.get_vocab()
    assert len(found) == max(tokenizer.get_vocab().values()) + 1


@pytest.mark.parametrize("kind", ["BPE", "WordPiece", "WordLevel"])
def test_a_models_own_vocab_file(kind: str, tmp_path: Path) -> None:
    tokenizer = TOKENIZERS[kind]()
    path = next(path for path in tokenizer.model.save(str(tmp_path)) if "vocab" in path)  # vocab.json or WordPiece's vocab.txt
    found = read_labels(path)
    assert {token: row for row, token in enumerate(found)} == tokenizer.get_vocab()


def test_a_config_of_transformers(tmp_path: Path) -> None:
    names = {0: "cat", 1: "dog", 2: "great white shark"}
    ViTConfig(id2label=names, label2id={name: row for row, name in names.items()}).save_pretrained(tmp_path)
    assert read_labels(tmp_path / "config.json") == tuple(names.values())


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("a\nb\n", ("a", "b")),
        ("a\nb", ("a", "b")),
        ("a \n\tb\n\nc\n", ("a ", "\tb", "", "c")),  # only the line end is taken
        ("a\r\nb\r\n", ("a", "b")),
        ("a\u2028b\x0bc\nd\n", ("a\u2028b\x0bc", "d")),  # other separators are part of a token
        ("[PAD]\n[UNK]\nthe\n", ("[PAD]", "[UNK]", "the")),
        ("{\nx\n", ("{", "x")),  # no JSON, and nothing that looks like it
        ("123\n7\n", ("123", "7")),
        (b"\xef\xbb\xbfa\nb\n", ("a", "b")),
        (["a", None, "b"], ("a", None, "b")),
        ({"b": 1, "a": 0, "c": 3}, ("a", "b", None, "c")),
        ({"0": "cat", "1": "dog"}, ("cat", "dog")),
        ({"0": 1, "1": 0}, ("1", "0")),  # tokens that are numbers, and their rows
        ({"label2id": {"cat": "1", "dog": "0"}}, ("dog", "cat")),
        ({"id2label": {"0": "cat"}, "label2id": {"cat": 0}, "hidden_size": 8}, ("cat",)),
        (b'\xef\xbb\xbf["a"]', ("a",)),
    ],
)
def test_the_forms(content: Any, expected: tuple[str | None, ...], tmp_path: Path) -> None:
    assert read_labels(written(tmp_path, content)) == expected


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("a\nb\na\n", "has 'a' twice, at rows 0 and 2"),
        ("a\n\n\n", "has '' twice"),
        ("", "has no token"),
        ("[]", "has no token"),
        ({}, "has no token"),
        ({"a": 0, "b": 0}, "two tokens at row 0: 'a' and 'b'"),
        ('{"a": 0, "a": 1}', "the name 'a' twice"),
        ('{"a": 0, "b"', "not valid JSON"),
        ({"0": "cat", "1": "cat"}, "'cat' twice, at rows 0 and 1"),
        ({"a": -1}, "the row of type int for 'a'"),
        ({"a": 1.5}, "the row of type float"),
        ({"a": True}, "the row of type bool"),
        ({"a": 10_000_000}, "1 tokens and rows up to 10000000"),
        ({"a": 1005}, "1 tokens and rows up to 1005"),
        (["a", 1], "the token of type int"),
        ({"architectures": ["LM"], "vocab_size": 8}, "the row of type list for 'architectures'"),
        ({"id2label": {"0": "cat"}, "label2id": {"cat": 1}}, "contradict each other"),
        ({"model": {"type": "BPE"}}, "a vocab that is a dict or a list"),
        ({"model": {"vocab": {"a": 0}}, "added_tokens": [{"id": 1, "content": "a"}]}, "'a' twice, at rows 0 and 1"),
        ({"model": {"vocab": {"a": 0}}, "added_tokens": [{"id": 0, "content": "b"}]}, "two tokens at row 0"),
        ({"model": {"vocab": {"a": 0}}, "added_tokens": [{"id": 1}]}, "the token of type NoneType"),
        ({"model": {"vocab": {"a": 0}}, "added_tokens": {"b": 1}}, "no list of objects"),
        (b"a\nb\xff\n", "not UTF-8"),
    ],
)
def test_what_has_not_one_reading_is_refused(content: Any, words: str, tmp_path: Path) -> None:
    path = written(tmp_path, content)
    with pytest.raises(FormatError, match=words) as refused:
        read_labels(path)
    assert refused.value.path == path


def test_what_is_no_file_of_a_sensible_size_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for name in ("missing", "fifo", "."):
        with pytest.raises(UnreadableError):
            read_labels(str(tmp_path / name))
    with limits(label_bytes=3), pytest.raises(LimitError, match="above the limit of 3"):
        read_labels(written(tmp_path, "a\nb\n"))


LINES = st.lists(st.text(st.characters(exclude_characters="\n", exclude_categories=["Cs"]), min_size=1), min_size=1, unique=True)


@settings(max_examples=examples(100), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tokens=LINES)
def test_what_is_written_is_read(tokens: list[str], tmp_path: Path) -> None:
    assert read_labels(written(tmp_path, tokens)) == tuple(tokens)
    assert read_labels(written(tmp_path, {token: row for row, token in enumerate(tokens)})) == tuple(tokens)
    lines = ["[first]", *(token for token in tokens if token != "[first]")]
    if not all(token.endswith("\r") for token in lines):
        assert read_labels(written(tmp_path, "".join(f"{token}\n" for token in lines))) == tuple(lines)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 5) | st.integers() | st.text(max_size=3) | st.sampled_from(["0", "1"]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["model", "vocab", "added_tokens", "id2label", "label2id", "id", "content", "0", "1", "a"]), inner
        )
    ),
    max_leaves=12,
)


@settings(max_examples=examples(400), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=VALUES | st.binary() | st.text())
def test_any_content_is_a_list_or_a_checkpoint_error(content: Any, tmp_path: Path) -> None:
    try:
        found = read_labels(written(tmp_path, content if not isinstance(content, str) else content.encode("utf-8", "replace")))
    except CheckpointError:
        return
    names = [token for token in found if token is not None]
    assert names and all(type(token) is str for token in names) and len(set(names)) == len(names)
