"""A target as a person writes it, `module:Net` or `file.py:factory(num_classes=2)`, split into its parts.

Pure text: nothing is imported, opened or evaluated here, and torch isn't needed. An argument is a literal, read by
`ast.literal_eval`; anything that would have to be run to know its value is refused.
"""

from __future__ import annotations

import keyword
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ckptsurgeon.call_text import literal_call
from ckptsurgeon.errors import TargetError

_FORM = re.compile(r"(?P<place>.+?):(?P<attribute>[^\W\d]\w*(?:\.[^\W\d]\w*)*)\s*(?P<call>\(.*)?", re.DOTALL)
_MODULE = re.compile(r"[^\W\d]\w*(?:\.[^\W\d]\w*)*")
FORMS = "module:Net, path/to/file.py:Net or module:factory(num_classes=2)"


@dataclass(frozen=True)
class Spec:
    """A target's parts: either `module` (dotted) or `file` (as given), the dotted `attribute`, and its literal arguments.

    `called` says that the person wrote parentheses. The arguments are plain Python values; whoever calls with them copies them.
    """

    text: str
    module: str | None
    file: str | None
    attribute: str
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    args: tuple[Any, ...] = ()
    called: bool = False

    @property
    def place(self) -> str:
        """The module or file, as the person wrote it."""
        return self.module or self.file or ""


def looks_like_spec(text: str) -> bool:
    """Whether a command line's word is a spec and not a file's path: a colon, then an identifier path, then at most a call.

    >>> looks_like_spec("model:Net"), looks_like_spec("nets/a.py:make(n=2)"), looks_like_spec("net.pt"), looks_like_spec("s3://a/b")
    (True, True, False, False)
    """
    return _FORM.fullmatch(text) is not None


def parse(text: str) -> Spec:
    """Split a spec into its parts.

    Raises:
        TargetError: the text has no such form, names no importable module, or an argument is not a literal.

    >>> parse("nets/lenet.py:make(num_classes=2)").kwargs
    {'num_classes': 2}
    """
    match = _FORM.fullmatch(text)
    if match is None:
        raise TargetError("is not a target of the form module:Net", path=text, hint=f"write {FORMS}")
    place, attribute, call = match["place"], match["attribute"], match["call"]
    is_file = place.endswith(".py")
    if not is_file and not _MODULE.fullmatch(place):
        raise TargetError(f"{place!r} is neither a dotted module nor a .py file", path=text, hint=_better_place(place, attribute))
    words = [*attribute.split("."), *([] if is_file else place.split("."))]
    reserved = next((word for word in words if keyword.iskeyword(word)), None)
    if reserved is not None:
        raise TargetError(f"{reserved!r} is a word of Python's, not a name", path=text, hint=f"write {FORMS}")
    args, kwargs = _literals(text, attribute, call) if call else ((), {})
    module, file = (None, place) if is_file else (place, None)
    return Spec(text, module, file, attribute, kwargs, args, called=call is not None)


def _literals(text: str, attribute: str, call: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    found = literal_call("f" + call)
    if found is None:
        raise TargetError(
            f"the arguments {call} are not a call with literals only",
            path=text,
            hint=f"write values there, as in {attribute}(num_classes=2, sizes=[1, 2]), or name a function without arguments",
        )
    return found[1], found[2]


def _better_place(place: str, attribute: str) -> str:
    file = place.rstrip(":").replace("\\", "/")
    if "/" not in file and file == place:
        return f"write {FORMS}"
    return f"is it {file}{'.py' if '/' in file and not file.endswith('.py') else ''}:{attribute}?"
