"""Splits a target as the user writes it, `module:Net` or `file.py:factory(num_classes=2)`, into its parts.

Works on the text alone: nothing is imported, opened or evaluated, and torch isn't needed. Each argument must be a literal, which
`ast.literal_eval` reads; an expression that would have to be run is refused.
"""

from __future__ import annotations

import keyword
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ckptsurgeon.call_text import literal_call
from ckptsurgeon.errors import TargetError

_FORM = re.compile(r"(?P<module>.+?):(?P<attribute>[^\W\d]\w*(?:\.[^\W\d]\w*)*)\s*(?P<call>\(.*)?", re.DOTALL)
_MODULE = re.compile(r"[^\W\d]\w*(?:\.[^\W\d]\w*)*")
FORMS = "module:Net, path/to/file.py:Net or module:factory(num_classes=2)"


@dataclass(frozen=True)
class Spec:
    """A target's parts: a dotted `module` or a `file` (as written), the dotted `attribute`, and the literal arguments.

    `called` is whether the user wrote parentheses. The arguments are plain Python values; copy them before a call that may change them.
    """

    text: str
    module: str | None
    file: str | None
    attribute: str
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    args: tuple[Any, ...] = ()
    called: bool = False

    @property
    def module_or_file(self) -> str:
        """The module or file, as the user wrote it."""
        return self.module or self.file or ""


def looks_like_spec(text: str) -> bool:
    """Whether an argument is a spec and not a file's path: it has a colon, then dotted identifiers, then at most a call.

    >>> looks_like_spec("model:Net"), looks_like_spec("nets/a.py:make(n=2)"), looks_like_spec("net.pt"), looks_like_spec("s3://a/b")
    (True, True, False, False)
    """
    return _FORM.fullmatch(text) is not None


def parse(text: str) -> Spec:
    """Split a spec into its parts.

    Raises:
        TargetError: the text is no spec, the part before the colon is no module or .py file, or an argument is not a literal.

    >>> parse("nets/lenet.py:make(num_classes=2)").kwargs
    {'num_classes': 2}
    """
    match = _FORM.fullmatch(text)
    if match is None:
        raise TargetError("is not a target of the form module:Net", path=text, hint=f"write {FORMS}")
    module_or_file, attribute, call = match["module"], match["attribute"], match["call"]
    is_file = module_or_file.endswith(".py")
    if not is_file and not _MODULE.fullmatch(module_or_file):
        hint = _closest_form(module_or_file, attribute)
        raise TargetError(f"{module_or_file!r} is neither a dotted module nor a .py file", path=text, hint=hint)
    words = [*attribute.split("."), *([] if is_file else module_or_file.split("."))]
    reserved = next((word for word in words if keyword.iskeyword(word)), None)
    if reserved is not None:
        raise TargetError(f"{reserved!r} is a keyword of Python, not a name", path=text, hint=f"write {FORMS}")
    args, kwargs = _literals(text, attribute, call) if call else ((), {})
    module, file = (None, module_or_file) if is_file else (module_or_file, None)
    return Spec(text, module, file, attribute, kwargs, args, called=call is not None)


def _literals(text: str, attribute: str, call: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    parsed = literal_call("f" + call)
    if parsed is None:
        raise TargetError(
            f"the arguments {call} are not a call with literals only",
            path=text,
            hint=f"write values there, as in {attribute}(num_classes=2, sizes=[1, 2]), or name a function without arguments",
        )
    return parsed[1], parsed[2]


def _closest_form(written: str, attribute: str) -> str:
    """A hint for text before the colon that is neither a module nor a file: as a file's path where it has a slash."""
    file = written.rstrip(":").replace("\\", "/")
    if "/" not in file and file == written:
        return f"write {FORMS}"
    return f"is it {file}{'.py' if '/' in file and not file.endswith('.py') else ''}:{attribute}?"
