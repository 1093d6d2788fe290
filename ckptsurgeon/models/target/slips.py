"""What a person may have meant by a target that is neither a file nor a spec: `model.Net` for `model:Net`, a file without a name, a name
without its file. By text alone: nothing is imported, since a hint must never lead to running a script.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from importlib.machinery import PathFinder
from pathlib import Path

from ckptsurgeon.formats.registry import SUFFIXES
from ckptsurgeon.hints import close_names
from ckptsurgeon.models.target.source_names import MOST, files_with, model_names, names_in

_WRITTEN = re.compile(r"(?P<body>[^()]+?)\s*(?P<call>\(.*\))?", re.DOTALL)
_ATTRIBUTE = re.compile(r"[^\W\d]\w*(?:\.[^\W\d]\w*)*")
_FEW = 20  # files of a folder that are looked at for its one model
_BETWEEN = re.compile(r"::|[.:/]")
_NEVER = (*SUFFIXES, ".json", ".toml", ".npz", ".npy", ".gguf", ".h5", ".onnx")  # what ends so is meant as a file


def meant_specs(text: str) -> list[str]:
    """The specs that a target may mean which is a file of code, a module, or a spec with another sign in place of its colon.

    >>> meant_specs("fixtures/model.py"), meant_specs("fixtures/model.Net"), meant_specs("fixtures/net_params.pkl")
    (['fixtures/model.py:Net', 'fixtures/model.py:TutorialModule'], ['fixtures/model.py:Net'], [])
    """
    written = _WRITTEN.fullmatch(text.strip())
    if written is None or written["body"].lower().endswith(_NEVER):
        return []
    body, call = written["body"].replace("\\", "/"), written["call"] or ""
    whole = _file_of(body)
    if whole is not None:
        names = model_names(whole[0]) or _callables(whole[0])
        return [f"{whole[1]}:{name}{call}" for name in names[:MOST]]
    parts = list(_parts(body))
    for place, attribute in parts:
        found = _file_of(place)
        if found is not None:
            names = _meant_names(attribute, found[0])
            return [f"{found[1]}:{name}{call}" for name in names]
    for place, attribute in parts[:1] or ([("", body)] if _ATTRIBUTE.fullmatch(body) else []):
        if _is_installed(place):
            return [f"{place}:{attribute}{call}"]
        folder, stem = os.path.split(place.replace(".", "/"))
        files = files_with(attribute.partition(".")[0], f"{stem}.py", Path(folder))
        return [spec_of(os.path.join(folder, file), attribute) + call for file in files]
    return []


def spec_of(path: str, attribute: str) -> str:
    """The spec of a name in a file: by its module's name where the file lies in this folder.

    >>> spec_of("model.py", "Net"), spec_of("nets/lenet.py", "LeNet")
    ('model:Net', 'nets/lenet.py:LeNet')
    """
    return f"{path if os.path.dirname(path) else path.removesuffix('.py')}:{attribute}"


def only_model() -> str | None:
    """The spec of the one model that the files of this folder have; None where there are more, or none."""
    try:
        files = sorted(name for name in os.listdir(".") if name.endswith(".py"))
    except OSError:
        return None
    found = [spec_of(file, name) for file in files[:_FEW] for name in model_names(file)[:1]]
    return found[0] if len(found) == 1 and len(files) <= _FEW else None


def _parts(body: str) -> Iterator[tuple[str, str]]:
    """A place and an attribute, for each sign that may stand between them, the last first."""
    for sign in reversed(list(_BETWEEN.finditer(body))):
        place, attribute = body[: sign.start()], body[sign.end() :]
        if place and _ATTRIBUTE.fullmatch(attribute):
            yield place, attribute


def _file_of(place: str) -> tuple[str, str] | None:
    """The file of a place written in any way, and the place as a spec has it."""
    if place.endswith(".py"):
        return (place, place) if os.path.isfile(place) else None
    path = place if "/" in place else place.replace(".", "/")
    for file in (f"{path}.py", f"{path}/__init__.py"):
        if os.path.isfile(file):
            return file, (file if "/" in place else place)
    return None


def _meant_names(attribute: str, file: str) -> list[str]:
    """The attribute where the file has it by its source, or else the names of models that are close."""
    first = attribute.partition(".")[0]
    defined, imported = names_in(file)
    if first in defined or first in imported:
        return [attribute]
    models = model_names(file)
    return close_names(first, models, MOST) or models[:MOST]


def _callables(file: str) -> list[str]:
    """Public names with a capital that a file defines, where none is known to be a model: a base may be anything."""
    return sorted(name for name in names_in(file)[0] if name[:1].isupper() and not name.isupper())


def _is_installed(place: str) -> bool:
    """Whether a dotted place is a module of an installed package, by its files."""
    if not _ATTRIBUTE.fullmatch(place):
        return False
    top, *rest = place.split(".")
    try:
        found = PathFinder.find_spec(top)
    except (ImportError, ValueError):
        return False
    if found is None or not rest:
        return found is not None
    paths = [os.path.join(folder, *rest) for folder in found.submodule_search_locations or ()]
    return any(os.path.isfile(f"{path}.py") or os.path.isfile(os.path.join(path, "__init__.py")) for path in paths)
