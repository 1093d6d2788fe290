"""The segments of a pattern: dots within braces (`{i=0..90..3}`) don't end a segment. Pure text."""

from __future__ import annotations

import re

from ckptsurgeon.rules.patterns import without_escapes

_TOKEN = re.compile(r"[^.\\{]+|\\.|\{[^{}]*\}|.", re.DOTALL)
_CHOICES = re.compile(r"(\\.)|(\{[A-Za-z_][A-Za-z0-9_]*)=[^{}]*(?=\})", re.DOTALL)


def segments(pattern: str) -> list[str]:
    """The texts between dots, except for dots in braces.

    >>> segments("layers.{i=0..90..3}.attn.{p}")
    ['layers', '{i=0..90..3}', 'attn', '{p}']
    """
    if "{" not in pattern:
        return pattern.split(".")
    texts = [""]
    for token in _TOKEN.findall(pattern):
        if token == ".":
            texts.append("")
        else:
            texts[-1] += token
    return texts


def plain(segment: str) -> str:
    """A segment as a result writes it: without the choices of its parts.

    >>> plain("h{i=0,4,9}")
    'h{i}'
    """
    return _CHOICES.sub(r"\1\2", segment) if "=" in segment else segment


def is_open(pattern: str) -> bool:
    """Whether a pattern has parts, so that it is no literal key."""
    return "{" in without_escapes(pattern)
