"""The settings of `check` in a project: `[tool.ckptsurgeon.check]` of the nearest pyproject.toml, from the current folder upwards.

An unknown key, or a value of the wrong type, is a SettingsError that names the file and the key. Paths are relative to the file's folder.
Targets are opened only for the files of this run that need them.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ckptsurgeon.api import _opening
from ckptsurgeon.api._opening import Target, is_code, unmissable
from ckptsurgeon.api.checking import check_each, target_of
from ckptsurgeon.api.checking.settings import Gate, gate, refuse_unheard
from ckptsurgeon.errors import CheckpointError, SettingsError
from ckptsurgeon.hints import Unmissable, close_names
from ckptsurgeon.limit_table import current, limits
from ckptsurgeon.models.target.spec import looks_like_spec, parse
from ckptsurgeon.parameter_types import Note
from ckptsurgeon.report import CheckReport, Settings
from ckptsurgeon.rules import long_keys, toml_text
from ckptsurgeon.rules.long_keys import Token
from ckptsurgeon.storage.opening import open_regular

NAME = "pyproject.toml"
TABLE = "tool.ckptsurgeon"
_EXAMPLE = 'write for example: [tool.ckptsurgeon.check] and below it max-size = "500MB"'


def _words(value: Any) -> bool:
    return isinstance(value, str) or (type(value) is list and all(isinstance(word, str) for word in value))


def _is(kind: type) -> Callable[[Any], bool]:
    return lambda value: type(value) is kind


@dataclass(frozen=True)
class _Key:
    """A setting: the argument of `check` that it stands for, a test and a name of its type, and whether `[[files]]` tables may have it."""

    argument: str
    fits: Callable[[Any], bool]
    words: str
    own: bool = True


KEYS: Mapping[str, _Key] = {
    "against": _Key("against", _is(str), "text"),
    "root": _Key("root", _is(str), "text"),
    "conversions": _Key("conversions", _is(bool), "true or false"),
    "finite": _Key("finite", _is(bool), "true or false"),
    "full": _Key("full", _is(bool), "true or false"),
    "max-size": _Key("max_size", lambda value: type(value) in (str, int), 'a size such as "500MB"'),
    "dtype": _Key("dtypes", _words, "text or a list of texts"),
    "allow": _Key("allow", _words, "text or a list of texts"),
    "select": _Key("select", _words, "text or a list of texts"),
    "ignore": _Key("ignore", _words, "text or a list of texts"),
    "limit": _Key("limit", _words, "text or a list of texts", own=False),
    "jobs": _Key("jobs", lambda value: type(value) is int and value > 0, "a whole number above zero", own=False),
    "files": _Key("", lambda value: type(value) is list and all(type(row) is dict for row in value), "tables of their own", own=False),
}
PATH = _Key("path", _words, "a pattern of paths or a list of them")


@dataclass(frozen=True)
class Project:
    """The settings of a file: `common` for every checkpoint, and `files` for those whose path, relative to its folder, matches a pattern.

    `jobs` and `limits` are for the run; `written` has each setting as the file has it. `named` says that the call names this settings
    file (`--config`). The code that it names is imported only then: a file that was merely found may be anybody's.
    """

    path: str = ""
    folder: str = ""
    common: Mapping[str, Any] | None = None
    files: tuple[tuple[tuple[Glob, ...], Mapping[str, Any]], ...] = ()
    jobs: int | None = None
    limits: Mapping[str, str] = field(default_factory=dict)
    written: tuple[tuple[str, Any], ...] = ()
    named: bool = False

    def of(self, path: str) -> dict[str, Any]:
        """The arguments for a path; where several tables match it, later ones override earlier ones."""
        arguments = dict(self.common or {})
        relative = os.path.relpath(os.path.abspath(path), self.folder).replace(os.sep, "/")
        for patterns, values in self.files:
            if any(pattern.fits(relative) for pattern in patterns):
                arguments.update(values)
        return arguments


def find(start: str) -> Project:
    """The nearest pyproject.toml with a `[tool.ckptsurgeon]`, from `start` up to the repository's top; an empty project without one."""
    folder = os.path.abspath(start)
    while True:
        path = os.path.join(folder, NAME)
        if os.path.isfile(path):
            project = read(path, named=False)
            if project is not None:
                return project
        above = os.path.dirname(folder)
        if above == folder or os.path.exists(os.path.join(folder, ".git")):
            return Project()
        folder = above


def read(path: str, *, named: bool = True) -> Project | None:
    """The settings in the file at `path`; if it has no `[tool.ckptsurgeon]`, None, or an error with `named`."""
    with open_regular(path) as file:
        toml_text.check({"toml-bytes": file.size}, path)
        raw = file.read(0, file.size)
    try:
        value: Any = toml_text.parse(raw.decode(), path)
    except ValueError as error:  # neither UTF-8 nor TOML
        raise SettingsError(f"is not TOML: {error}", path=path) from error
    for name in TABLE.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    if value is None:
        if named:
            raise SettingsError(f"has no [{TABLE}.check]", path=path, hint=_EXAMPLE)
        return None
    _known(path, TABLE, value, {"check": _Key("", _is(dict), "a table")})
    return replace(_project(path, value.get("check", {})), named=named)


def _project(path: str, table: dict[str, Any]) -> Project:
    setting = f"{TABLE}.check"
    folder = os.path.dirname(os.path.abspath(path))
    _known(path, setting, table, KEYS)
    files = []
    written = [(name, value) for name, value in table.items() if name != "files"]
    for number, row in enumerate(table.get("files", ()), 1):
        file_table = f"{setting}.files[{number}]"
        _known(path, file_table, row, {"path": PATH, **{name: key for name, key in KEYS.items() if key.own}})
        if "path" not in row:
            raise SettingsError("does not say which files it is for", path=path, key=file_table, hint='path = "weights/**/*.pt"')
        patterns = [row["path"]] if isinstance(row["path"], str) else row["path"]
        written += [(f"files[{number}].{name}", value) for name, value in row.items()]
        try:
            globs = tuple(map(glob, patterns))
        except SettingsError as error:
            raise SettingsError(error.reason, path=path, key=f"{file_table}.path", hint=error.hint) from error
        files.append((globs, _arguments(path, file_table, folder, row)))
    return Project(
        path,
        folder,
        _arguments(path, setting, folder, table),
        tuple(files),
        table.get("jobs"),
        _limits(path, setting, table.get("limit", ())),
        tuple(written),
    )


def _limits(path: str, setting: str, words: str | list[str]) -> dict[str, str]:
    values = {}
    for word in [words] if isinstance(words, str) else words:
        name, _, value = word.partition("=")
        values[name.strip().replace("-", "_")] = value
    try:
        with limits(**values):
            return values
    except CheckpointError as error:
        raise SettingsError(error.reason, path=path, key=f"{setting}.limit", hint=error.hint) from error


def _known(path: str, setting: str, table: Any, keys: Mapping[str, _Key]) -> None:
    if type(table) is not dict:
        raise SettingsError("is no table", path=path, key=setting, hint=_EXAMPLE)
    for name, value in table.items():
        key = keys.get(name)
        if key is None:
            close = close_names(name.replace("_", "-"), keys, 1)
            near = f"; is it {close[0]!r}?" if close else ""
            raise SettingsError(f"there is no such setting{near}", path=path, key=f"{setting}.{name}", hint=f"there are {', '.join(keys)}")
        if not key.fits(value):
            raise SettingsError(f"takes {key.words}", path=path, key=f"{setting}.{name}")


def _arguments(path: str, setting: str, folder: str, table: Mapping[str, Any]) -> dict[str, Any]:
    """A table's settings as arguments of `check`, each validated; the target is resolved relative to the file's folder."""
    arguments = {KEYS[name].argument: value for name, value in table.items() if name in KEYS and KEYS[name].own}
    try:
        gate(**{name: value for name, value in arguments.items() if name not in ("against", "conversions")})
    except SettingsError as error:
        raise SettingsError(error.reason, path=path, key=f"{setting}.{(error.key or '').lstrip('-')}", hint=error.hint) from error
    if "against" in arguments:
        arguments["against"] = _from_here(folder, arguments["against"])
    return arguments


def _from_here(folder: str, target: str) -> str:
    """A target of a settings file in `folder`, as it is named from the current folder; a module in that folder by its file."""
    if os.path.realpath(folder) == os.path.realpath(os.getcwd()):
        return target
    if not looks_like_spec(target):
        return os.path.relpath(os.path.join(folder, target))
    spec = parse(target)
    file = spec.file or f"{spec.module}.py"
    beside = os.path.join(folder, file)
    return os.path.relpath(beside) + target[len(spec.module_or_file) :] if spec.file or os.path.isfile(beside) else target


_GLOB = re.compile(r"(?:(?<=/)|^)\*\*/|\*\*|\*|\?|[^*?]+")  # `**/` is any folders, or none, where a name begins
_WILD = {"**/": Token("leading"), "**": Token("anything"), "*": Token("star"), "?": Token("char")}
_MOST_WILD = 100  # wildcards of a pattern
_SWAPPED = str.maketrans("/.", "./")  # as keys have dots where paths have slashes


@dataclass(frozen=True)
class Glob:
    """A pattern of paths: `*` is anything within a name, `?` one character of it, `**` also goes across folders.

    Matching takes time that grows with the path alone, as for patterns of keys.

    >>> [glob("weights/**/*.pt").fits(path) for path in ("weights/a.pt", "weights/b/c/a.pt", "a.pt")]
    [True, True, False]
    """

    tokens: tuple[Token, ...]

    def fits(self, path: str) -> bool:
        """Whether the whole of `path` matches."""
        return bool(self.tokens) and long_keys.fits(self.tokens, path.translate(_SWAPPED))


def glob(words: str) -> Glob:
    """A pattern of paths, compiled. Raises SettingsError for one with too many wildcards."""
    parts = _GLOB.findall(words.removeprefix("./").rstrip("/"))
    if sum(part in _WILD for part in parts) > _MOST_WILD:
        raise SettingsError(f"has more than {_MOST_WILD} wildcards", hint='path = "weights/**/*.pt"')
    return Glob(tuple(_WILD.get(part) or Token("text", (part.translate(_SWAPPED),)) for part in parts))


def check_project(
    paths: Iterable[str], project: Project, overrides: Mapping[str, Any], *, jobs: int | None = None, note: Note = _opening.silent
) -> CheckReport:
    """`check` with a project's settings; `overrides`, arguments of `check`, override them.

    Code that the settings file names is imported only if the call names the file; else the report and a note say that it was not.
    """
    targets: dict[str, Target] = {}
    settings = _followed(project, overrides)
    if settings is not None:
        for name, value in settings.not_used:
            words = f"{settings.path}: {name} = {value!r} is not followed, since it names code and the file was only found"
            here = shlex.quote(_from_here(project.folder, value))
            note(Unmissable(f"{words} (follow it: --against {here}, or --config {shlex.quote(settings.path)})"))
    code_note = unmissable(note) if project.path and "against" not in overrides else note
    refuse_unheard(overrides)
    alone = {name: value for name, value in overrides.items() if name not in ("against", "conversions")}
    gate(**alone)  # an invalid option is an error before a model is built

    def target(words: str) -> Target:
        if words not in targets:
            try:
                targets[words] = target_of(words, code_note)
            except CheckpointError as error:
                if "against" not in overrides:
                    error.reason += f" (asked for by {os.path.relpath(project.path)})"
                raise
        return targets[words]

    def choose(path: str) -> Gate:
        arguments = {**project.of(path), **overrides} if project.path else dict(overrides)
        against = arguments.pop("against", None)
        if against is not None and "against" not in overrides and not project.named and is_code(against):
            against = None
            arguments.pop("conversions", None)
        return gate(against=None if against is None else target(against), **arguments)

    bounds: dict[str, int | str] = {**project.limits, **current()}  # those of the command line override the file's
    with limits(**bounds):
        return check_each(paths, choose, jobs=jobs or project.jobs, settings=settings, note=note)


def _followed(project: Project, overrides: Mapping[str, Any]) -> Settings | None:
    """The settings of the file that this run uses, and those that it does not, since they name code. Overridden settings are left out."""
    if not project.path:
        return None
    used: list[tuple[str, Any]] = []
    not_used: list[tuple[str, Any]] = []
    for setting, value in project.written:
        name = setting.rpartition(".")[2]
        if name in KEYS and KEYS[name].argument in overrides:
            continue
        code = name == "against" and not project.named and is_code(_from_here(project.folder, value))
        (not_used if code else used).append((setting, value))
    return Settings(os.path.relpath(project.path), tuple(used), tuple(not_used))
