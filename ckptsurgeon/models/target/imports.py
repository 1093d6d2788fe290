"""How a person's module is found and loaded, so that two files of one name in one process are never taken for each other.

Within `search(spec)` the target's folder comes first on sys.path, and modules of a person's own that another folder's files of
the same name left in sys.modules step aside; afterwards both are as they were. Installed packages are never put aside.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from ckptsurgeon.errors import TargetError
from ckptsurgeon.models.target import user_code
from ckptsurgeon.models.target.source_names import files_with
from ckptsurgeon.models.target.spec import Spec


@contextmanager
def search(spec: Spec) -> Iterator[None]:
    """Put the folder that the spec starts from first on sys.path for the time of the block, imports within calls included.

    Wrap a forward pass in it when the model's code imports lazily.
    """
    folder = str(Path(spec.file).resolve().parent) if spec.file else os.getcwd()
    aside = {name: module for name, module in list(sys.modules.items()) if _of_another_folder(name, folder)}
    for name in aside:
        del sys.modules[name]
    before = list(sys.path)
    sys.path.insert(0, folder)
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path[:] = before
        if aside:
            tops = {name.partition(".")[0] for name in aside}
            for name in [name for name in sys.modules if name.partition(".")[0] in tops]:
                del sys.modules[name]
            sys.modules.update(aside)


def load(spec: Spec, note: Callable[[str], None]) -> ModuleType:
    """The spec's module, imported; call it within `search(spec)`.

    Raises:
        TargetError: there is no such file or module (with close names), or it fails on import.
    """
    return _load_file(spec, note) if spec.file else _load_module(spec, note)


def _load_module(spec: Spec, note: Callable[[str], None]) -> ModuleType:
    name = str(spec.module)
    top = name.partition(".")[0]
    known, origin = _origin(top)
    if known:
        note(f"imports {name} from {_shown(origin)}" if origin else f"imports {name}")
    try:
        return user_code.call(spec.text, importlib.import_module, name)
    except TargetError as error:
        cause = error.__cause__
        if not isinstance(cause, ModuleNotFoundError) or cause.name is None or not f"{name}.".startswith(f"{cause.name}."):
            raise
        raise TargetError(
            f"there is no module {cause.name!r} in this folder or among the installed ones", path=spec.text, hint=_close_module(spec, top)
        ) from cause


def _load_file(spec: Spec, note: Callable[[str], None]) -> ModuleType:
    path = Path(str(spec.file))
    if not path.is_file():
        reason = "there is no such file" if not path.exists() else "is not a regular file"
        raise TargetError(reason, path=path, hint=_is_it(f"{name}:{spec.attribute}" for name in _other_files(spec, path)))
    note(f"imports {path.stem} from {_shown(str(path))}")
    present = sys.modules.get(path.stem)
    if present is not None and _same_file(getattr(present, "__file__", None), str(path)):
        return present
    return user_code.call(spec.text, _execute, path)


def _execute(path: Path) -> ModuleType:
    """Load `path` under its stem; a module that has that name already takes it back when the loading is done, or fails."""
    found = importlib.util.spec_from_file_location(path.stem, path.resolve())
    if found is None or found.loader is None:
        raise ImportError(f"python can't load {path}")
    module = importlib.util.module_from_spec(found)
    former = sys.modules.get(path.stem)
    sys.modules[path.stem] = module
    done = False
    try:
        found.loader.exec_module(module)
        done = True
    finally:
        if former is not None:
            sys.modules[path.stem] = former
        elif not done:
            sys.modules.pop(path.stem, None)
    return module


def _of_another_folder(name: str, folder: str) -> bool:
    """Whether a loaded module is a person's, and `folder` has its own of the same top-level name."""
    top = name.partition(".")[0]
    if top in ("__main__", "ckptsurgeon"):
        return False
    file = getattr(sys.modules.get(top), "__file__", None)
    if not isinstance(file, str) or not user_code.is_persons(file):
        return False
    own = (os.path.join(folder, f"{top}.py"), os.path.join(folder, top, "__init__.py"))
    return any(os.path.isfile(path) for path in own) and not any(_same_file(file, path) for path in own)


def _same_file(one: str | None, other: str) -> bool:
    return one is not None and os.path.realpath(one) == os.path.realpath(other)


def _origin(top: str) -> tuple[bool, str | None]:
    """Whether there is such a module, as far as can be told, and where it lies."""
    try:
        found = importlib.util.find_spec(top)
    except (ValueError, ImportError):
        return True, None
    if found is None:
        return False, None
    return True, found.origin or next(iter(found.submodule_search_locations or ()), None)


def _shown(path: str) -> str:
    relative = os.path.relpath(path)
    return path if relative.startswith("..") else os.path.join(".", relative)


def _close_module(spec: Spec, top: str) -> str:
    path = Path(*str(spec.module).split("."))
    close = _other_files(spec, path.with_name(f"{path.name}.py"))
    dotted = [name.removesuffix(".py").replace(os.sep, ".") if Path(name).parent == path.parent else name for name in close]
    other = f"run it in the folder that holds {top}.py, or name the file: path/to/{top}.py:{spec.attribute}"
    return _is_it(f"{name}:{spec.attribute}" for name in dotted) or other


def _is_it(specs: Iterable[str]) -> str | None:
    words = " or ".join(map(shlex.quote, specs))
    return f"is it {words}?" if words else None


def _other_files(spec: Spec, path: Path) -> list[str]:
    """Files beside one that is not there, or below, which have what the spec names by their source; the same path with `/` for `\\`."""
    straight = str(path).replace("\\", "/")
    if straight != str(path) and os.path.isfile(straight):
        return [straight]
    return [str(path.parent / name) for name in files_with(spec.attribute.partition(".")[0], path.name, path.parent)]
