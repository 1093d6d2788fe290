"""One call with literal arguments, as users write schemes and adapters: `normal(std=0.02)`, `transpose`, `mylib:flip(dim=1)`.

Pure text: only literals are evaluated, by `ast.literal_eval`.
"""

from __future__ import annotations

import ast
import re
from typing import Any

_DOTTED = r"[^\W\d]\w*(?:\.[^\W\d]\w*)*"
_CALL = re.compile(rf"\s*(?P<name>(?:[^\s()'\"|:]+:)?{_DOTTED})\s*(?P<call>\(.*\))?\s*", re.DOTALL)


def literal_call(text: str) -> tuple[str, tuple[Any, ...], dict[str, Any]] | None:
    """The name (for a user's own function with its module or file before a colon), positional and keyword arguments; None for any other
    text.

    >>> literal_call("normal(std=-1)"), literal_call("mylib/init.py:ortho")
    (('normal', (), {'std': -1}), ('mylib/init.py:ortho', (), {}))
    """
    match = _CALL.fullmatch(text)
    if match is None:
        return None
    try:
        tree = ast.parse(f"f{match['call'] or '()'}", mode="eval").body
        if not isinstance(tree, ast.Call) or not isinstance(tree.func, ast.Name):
            return None
        if any(word.arg is None for word in tree.keywords) or any(isinstance(value, ast.Starred) for value in tree.args):
            return None
        names = [word.arg for word in tree.keywords]
        if len(set(names)) != len(names):
            return None
        kwargs = {str(word.arg): ast.literal_eval(word.value) for word in tree.keywords}
        return match["name"], tuple(ast.literal_eval(value) for value in tree.args), kwargs
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        return None
