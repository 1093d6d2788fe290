"""Finds and loads the user's module, so that two files with the same name in one process are never confused.

Within `search(spec)`, the target's folder is first on sys.path, and user modules that were loaded from another folder under the same name
are taken out of sys.modules. Afterwards both are restored. Installed packages are never taken out.
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
    """Within the block, have the spec's folder first on sys.path.

    Code that may import lazily, such as a forward pass, must run in such a block too.
    """
    folder = str(Path(spec.file).resolve().parent) if spec.file else os.getcwd()
    set_aside = {name: module for name, module in list(sys.modules.items()) if _of_another_folder(name, folder)}
    for name in set_aside:
        del sys.modules[name]
    before = list(sys.path)
    sys.path.insert(0, folder)
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path[:] = before
        if set_aside:
            tops = {name.partition(".")[0] for name in set_aside}
            for name in [name for name in sys.modules if name.partition(".")[0] in tops]:
                del sys.modules[name]
            sys.modules.update(set_aside)


def load(spec: Spec, note: Callable[[str], None]) -> ModuleType:
    """Import and return the spec's module; call it within `search(spec)`. TargetError, with close names, where that fails."""
    return _load_file(spec, note) if spec.file else _load_module(spec, note)


def _load_module(spec: Spec, note: Callable[[str], None]) -> ModuleType:
    name = str(spec.module)
    top = name.partition(".")[0]
    exists, origin = _origin(top)
    if exists:
        note(f"imports {name} from {_shown(origin)}" if origin else f"imports {name}")
    try:
        return user_code.call(spec.text, importlib.import_module, name)
    except TargetError as error:
        cause = error.__cause__
        if not isinstance(cause, ModuleNotFoundError) or cause.name is None or not f"{name}.".startswith(f"{cause.name}."):
            raise
        raise TargetError(
            f"there is no module {cause.name!r} in this folder or among the installed ones", path=spec.text, hint=_module_hint(spec, top)
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
    """Load `path` under its stem. A module that had this name in sys.modules gets it back afterwards, also when loading fails."""
    module_spec = importlib.util.spec_from_file_location(path.stem, path.resolve())
    if module_spec is None or module_spec.loader is None:
        raise ImportError(f"python can't load {path}")
    module = importlib.util.module_from_spec(module_spec)
    previous = sys.modules.get(path.stem)
    sys.modules[path.stem] = module
    done = False
    try:
        module_spec.loader.exec_module(module)
        done = True
    finally:
        if previous is not None:
            sys.modules[path.stem] = previous
        elif not done:
            sys.modules.pop(path.stem, None)
    return module


def _of_another_folder(name: str, folder: str) -> bool:
    """Whether a loaded module is the user's, and `folder` has another module of the same top-level name."""
    top = name.partition(".")[0]
    if top in ("__main__", "ckptsurgeon"):
        return False
    file = getattr(sys.modules.get(top), "__file__", None)
    if not isinstance(file, str) or not user_code.is_user_file(file):
        return False
    own = (os.path.join(folder, f"{top}.py"), os.path.join(folder, top, "__init__.py"))
    return any(os.path.isfile(path) for path in own) and not any(_same_file(file, path) for path in own)


def _same_file(path: str | None, other_path: str) -> bool:
    return path is not None and os.path.realpath(path) == os.path.realpath(other_path)


def _origin(top: str) -> tuple[bool, str | None]:
    """Whether a top-level module exists, as far as Python can tell without importing it, and its file or folder."""
    try:
        module_spec = importlib.util.find_spec(top)
    except (ValueError, ImportError):
        return True, None
    if module_spec is None:
        return False, None
    return True, module_spec.origin or next(iter(module_spec.submodule_search_locations or ()), None)


def _shown(path: str) -> str:
    relative = os.path.relpath(path)
    return path if relative.startswith("..") else os.path.join(".", relative)


def _module_hint(spec: Spec, top: str) -> str:
    path = Path(*str(spec.module).split("."))
    close = _other_files(spec, path.with_name(f"{path.name}.py"))
    dotted = [name.removesuffix(".py").replace(os.sep, ".") if Path(name).parent == path.parent else name for name in close]
    elsewhere = f"run it in the folder that holds {top}.py, or name the file: path/to/{top}.py:{spec.attribute}"
    return _is_it(f"{name}:{spec.attribute}" for name in dotted) or elsewhere


def _is_it(specs: Iterable[str]) -> str | None:
    words = " or ".join(map(shlex.quote, specs))
    return f"is it {words}?" if words else None


def _other_files(spec: Spec, path: Path) -> list[str]:
    """For a file that does not exist: the same path with `/` for `\\`, or files in its folder and below whose source has the spec's
    name."""
    straight = str(path).replace("\\", "/")
    if straight != str(path) and os.path.isfile(straight):
        return [straight]
    return [str(path.parent / name) for name in files_with(spec.attribute.partition(".")[0], path.name, path.parent)]
