"""Guesses what the user meant by a target that is neither a file nor a spec: `model.Net` for `model:Net`, a file without a name, a name
without its file.

Works on text alone. Nothing is imported, since giving a hint must never run a script.
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
_FEW = 20  # files of a folder that are read to find its only model
_BETWEEN = re.compile(r"::|[.:/]")
_FILES = (*SUFFIXES, ".json", ".toml", ".npz", ".npy", ".gguf", ".h5", ".onnx")  # with such an ending, the user means a file


def meant_specs(text: str) -> list[str]:
    """The specs that the user may mean by a Python file, a module, or a spec with another separator than a colon.

    >>> meant_specs("fixtures/model.py"), meant_specs("fixtures/model.Net"), meant_specs("fixtures/net_params.pkl")
    (['fixtures/model.py:Net', 'fixtures/model.py:TutorialModule'], ['fixtures/model.py:Net'], [])
    """
    written = _WRITTEN.fullmatch(text.strip())
    if written is None or written["body"].lower().endswith(_FILES):
        return []
    body, call = written["body"].replace("\\", "/"), written["call"] or ""
    file = _file_of(body)
    if file is not None:
        names = model_names(file[0]) or _callables(file[0])
        return [f"{file[1]}:{name}{call}" for name in names[:MOST]]
    parts = list(_parts(body))
    for module, attribute in parts:
        file = _file_of(module)
        if file is not None:
            names = _meant_names(attribute, file[0])
            return [f"{file[1]}:{name}{call}" for name in names]
    for module, attribute in parts[:1] or ([("", body)] if _ATTRIBUTE.fullmatch(body) else []):
        if _is_installed(module):
            return [f"{module}:{attribute}{call}"]
        folder, stem = os.path.split(module.replace(".", "/"))
        files = files_with(attribute.partition(".")[0], f"{stem}.py", Path(folder))
        return [spec_of(os.path.join(folder, name), attribute) + call for name in files]
    return []


def spec_of(path: str, attribute: str) -> str:
    """The spec of a name in a file; a file in the current folder is written as a module.

    >>> spec_of("model.py", "Net"), spec_of("nets/lenet.py", "LeNet")
    ('model:Net', 'nets/lenet.py:LeNet')
    """
    return f"{path if os.path.dirname(path) else path.removesuffix('.py')}:{attribute}"


def only_model() -> str | None:
    """The spec of the only model in the files of the current folder; None if there is no model, or more than one."""
    try:
        files = sorted(name for name in os.listdir(".") if name.endswith(".py"))
    except OSError:
        return None
    specs = [spec_of(file, name) for file in files[:_FEW] for name in model_names(file)[:1]]
    return specs[0] if len(specs) == 1 and len(files) <= _FEW else None


def _parts(body: str) -> Iterator[tuple[str, str]]:
    """The text split into a module or file and an attribute, at each possible separator, the last one first."""
    for separator in reversed(list(_BETWEEN.finditer(body))):
        module, attribute = body[: separator.start()], body[separator.end() :]
        if module and _ATTRIBUTE.fullmatch(attribute):
            yield module, attribute


def _file_of(module: str) -> tuple[str, str] | None:
    """The file of a module or path, and the module or path as a spec writes it; None if there is no such file."""
    if module.endswith(".py"):
        return (module, module) if os.path.isfile(module) else None
    path = module if "/" in module else module.replace(".", "/")
    for file in (f"{path}.py", f"{path}/__init__.py"):
        if os.path.isfile(file):
            return file, (file if "/" in module else module)
    return None


def _meant_names(attribute: str, file: str) -> list[str]:
    """The attribute if the file's source has it, else models of the file with close names, else its first models."""
    first = attribute.partition(".")[0]
    defined, imported = names_in(file)
    if first in defined or first in imported:
        return [attribute]
    models = model_names(file)
    return close_names(first, models, MOST) or models[:MOST]


def _callables(file: str) -> list[str]:
    """The capitalised public names that a file defines: any may be a model, if its base class is unknown."""
    return sorted(name for name in names_in(file)[0] if name[:1].isupper() and not name.isupper())


def _is_installed(module: str) -> bool:
    """Whether a dotted name is a module of an installed package: whether it has such a file."""
    if not _ATTRIBUTE.fullmatch(module):
        return False
    top, *rest = module.split(".")
    try:
        package = PathFinder.find_spec(top)
    except (ImportError, ValueError):
        return False
    if package is None or not rest:
        return package is not None
    paths = [os.path.join(folder, *rest) for folder in package.submodule_search_locations or ()]
    return any(os.path.isfile(f"{path}.py") or os.path.isfile(os.path.join(path, "__init__.py")) for path in paths)
