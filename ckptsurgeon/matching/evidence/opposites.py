"""Names that share a word, and say opposites or other quantities: `user_embedding` and `item_embedding`, `log_alpha` and `alpha`.

Rule: words are taken as they are written, since what they mean may be one: `var` is short for `logvar` between two implementations, and
another quantity where all else keeps its name.
"""

from __future__ import annotations

import re

from ckptsurgeon.matching.module_tree import ROLES

_WORD = re.compile(r"[Ll]og(?=[Vv]ar|[Ss]td|[Ss]ig)|[A-Z]?[a-z]+|[A-Z]+")
# Words that exclude each other: one row for each choice, `|` between its sides.
_ROWS = (
    "user|item bos|eos row,rows|col,cols,column,columns mean,avg|var,variance|std|min|max pos,positive|neg,negative left|right "
    "src,source|tgt,trg,target start,begin|end first|last sin|cos prior|posterior real|imag high|low upper|lower top|bottom "
    "front|back fwd,forward|bwd,backward,reverse student|teacher scale,gamma|shift,beta width|height "
    "gen,generator|disc,discriminator day|night horizontal|vertical"
)
_OF_A_LAYER = "in,input|out,output"  # the same, of what a layer itself is called
_QUANTITIES = frozenset({"inv", "inverse", "sq", "squared", "sqrt", "rsqrt"})  # words that make another quantity of what is called so
_LOG = frozenset({"log"})  # the same, left out by some implementations


def _sides(rows: str) -> dict[str, tuple[int, int]]:
    return {
        word: (row, at) for row, sides in enumerate(rows.split()) for at, side in enumerate(sides.split("|")) for word in side.split(",")
    }


_EVERYWHERE, _IN_A_LAYER = _sides(_ROWS), _sides(_OF_A_LAYER)


def opposed(first: str, second: str) -> bool:
    """Whether two keys say opposites, or one of them another quantity.

    >>> opposed("user_embedding.weight", "item_embedding.weight"), opposed("src.user", "user"), opposed("inv_freq", "freqs")
    (True, False, True)
    """
    words, other_words = _words(first), _words(second)
    apart = _apart(words, other_words, _EVERYWHERE) or _apart(_words(_own_name(first)), _words(_own_name(second)), _IN_A_LAYER)
    return apart or not (words ^ other_words).isdisjoint(_QUANTITIES)


def one_is_a_log(first: str, second: str) -> bool:
    """Whether one key alone is of a logarithm.

    >>> one_is_a_log("fc_logvar.weight", "fc_var.weight"), one_is_a_log("log_var", "logvar")
    (True, False)
    """
    return not (_words(first) ^ _words(second)).isdisjoint(_LOG)


def _own_name(key: str) -> str:
    """What a layer or a bare parameter is called."""
    above, _, last = key.rpartition(".")
    return above.rpartition(".")[2] if last in ROLES else last


def _words(name: str) -> frozenset[str]:
    return frozenset(word.lower() for word in _WORD.findall(name))


def _apart(first: frozenset[str], second: frozenset[str], sides: dict[str, tuple[int, int]]) -> bool:
    """Whether two names are on different sides of one row, and share none of it."""
    ours, theirs = ({sides[word] for word in words if word in sides} for words in (first, second))
    return not {row for row, _ in ours} & {row for row, _ in theirs} <= {row for row, _ in ours & theirs}
